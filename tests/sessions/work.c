/*
 * What ./ci/canary shows of sessions: four functions of a patch, called while messages of 100,000 sessions are handled by several threads. In
 * one message all of them must be of one version, also while the share changes; and a session that went to the new one must stay there
 * while the share grows. Built twice, with -DVERSION=1 and -DVERSION=2, and loaded by examples/inside.rs.
 */
#define _GNU_SOURCE
#include <pthread.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <x86intrin.h>

#define HIDDEN __attribute__((visibility("hidden"), noipa))
#define SESSIONS 100000

HIDDEN long fee(long a, long b, long c, long d, long e, long f, double g, long h)
{
	return VERSION * 1000000 + a + b + c + d + e + f + (long)g + h;
}

HIDDEN long limit(const char *name, long n)
{
	return VERSION * 1000000 + name[0] + n;
}

HIDDEN int leaf(void)
{
	return VERSION;
}

/*
 * Its loop goes back to its first instruction, with something below the stack pointer (the red zone): each turn finds what the one before
 * left there, so at most the first may not. Ten turns must be of one version.
 */
HIDDEN __attribute__((optimize("align-loops=1"))) void turns(int n, volatile long *x)
{
	volatile int kept[2];
	do {
		kept[n & 1] = n;
		x[0] += VERSION;
		x[1] += kept[~n & 1] - n == 1;
	} while (--n);
}

static void *(*begin)(unsigned long);
static void (*end)(void *);
static _Atomic long mixed, moved, lost, messages;
static _Atomic unsigned char seen[SESSIONS]; /* the version that a session ran last */
static _Atomic int sticky; /* shares only grow: nobody may go back */

static int version_of(long session)
{
	long a = fee(session, 1, 2, 3, 4, 5, 6.0, 7) - session - 28;
	long b = limit("a", session) - session - 'a';
	long c = leaf() * 1000000L;
	volatile long x[2] = {0, 0};
	turns(10, x);
	if ((a != 1000000 && a != 2000000) || x[1] < 9)
		lost++;
	if (a != b || b != c || c != x[0] * 100000)
		mixed++;
	return (int)(a / 1000000);
}

static void handle(unsigned long session)
{
	void *scope = begin(session);
	int first = version_of(session);
	for (int i = 0; i < 3; i++) {
		for (int k = 0; k < 50; k++)
			__builtin_ia32_pause();
		if (version_of(session) != first)
			mixed++;
	}
	end(scope);
	unsigned char before = atomic_exchange(&seen[session], (unsigned char)first);
	if (atomic_load(&sticky) && before == 2 && first == 1)
		moved++;
	messages++;
}

static void *worker(void *arg)
{
	for (unsigned long s = (unsigned long)arg;; s = (s + 7919) % SESSIONS)
		handle(s);
	return arg;
}

void start(void *(*enter)(unsigned long), void (*leave)(void *))
{
	begin = enter;
	end = leave;
	pthread_t t;
	const char *n = getenv("WORKERS");
	for (long i = 0; i < (n ? atol(n) : 3); i++)
		pthread_create(&t, NULL, worker, (void *)i);
}

/* one round over all sessions by this thread: how many ran the new version; and what a call costs */
const char *ask(const char *question)
{
	static char out[512];
	if (*question == 's')
		sticky = atoi(question + 1);
	long new = 0;
	if (*question == 'r')
		for (long s = 0; s < SESSIONS; s++) {
			void *scope = begin((unsigned long)s);
			new += version_of(s) == 2;
			end(scope);
		}
	double best = 1e9;
	if (*question == 'c')
		for (int round = 0; round < 200; round++) {
			struct timespec a, b;
			void *scope = begin(5);
			clock_gettime(CLOCK_MONOTONIC, &a);
			for (int i = 0; i < 20000; i++)
				leaf();
			clock_gettime(CLOCK_MONOTONIC, &b);
			end(scope);
			double ns = ((double)(b.tv_sec - a.tv_sec) * 1e9 + (double)(b.tv_nsec - a.tv_nsec)) / 20000;
			best = ns < best ? ns : best;
		}
	snprintf(out, sizeof out, "{\"new\":%ld,\"mixed\":%ld,\"moved\":%ld,\"lost\":%ld,\"messages\":%ld,\"ns\":%.3f}", new, mixed, moved, lost, messages, best);
	return out;
}
