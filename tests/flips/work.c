/*
 * What ./ci/flips flips: three small functions that check on every call that they are of one version, called by hot threads that time each
 * call. Built as a shared library, once with -DVERSION=1 and once with -DVERSION=2, and loaded by examples/inside.rs.
 *
 *   FLIP_HOT=N      threads that call without a pause
 *   FLIP_BORN=1     another thread makes threads that call a few times and end, all the time
 *   FLIP_FORK=1     another one forks children that call and report, all the time
 */
#define _GNU_SOURCE
#include <errno.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>
#include <x86intrin.h>

#define HIDDEN __attribute__((visibility("hidden"), noipa))
#define BUCKETS 40

static long wrong, calls, births, forks, sleeps, spurious;
static double ns_per_tick;
static _Atomic uint64_t histogram[BUCKETS], longest;

static void count(long *what) { __atomic_fetch_add(what, 1, __ATOMIC_RELAXED); }

/* an entry of several short instructions, a callee that must agree, and a loop */
HIDDEN int leaf(const unsigned char *text, int len)
{
	unsigned sum = VERSION;
	for (int i = 0; i < len; i++)
		sum = sum * 31 + text[i];
	return sum == 0xdeadbeef ? 9 : VERSION;
}

HIDDEN int middle(int a, int b, int c, int d)
{
	unsigned char text[32];
	memset(text, a + b + c + d, sizeof text);
	if (leaf(text, sizeof text) != VERSION)
		count(&wrong);
	return VERSION;
}

HIDDEN int outer(int depth)
{
	if (middle(depth, 1, 2, 3) != VERSION || (depth > 0 && outer(depth - 1) != VERSION))
		count(&wrong);
	return VERSION;
}

static int one_call(void)
{
	int got = outer(2);
	if (got != 1 && got != 2)
		count(&wrong);
	return got;
}

static void *hot(void *arg)
{
	for (;;) {
		uint64_t before = __rdtsc();
		one_call();
		uint64_t ns = (uint64_t)((double)(__rdtsc() - before) * ns_per_tick);
		int bucket = 63 - __builtin_clzll(ns | 1);
		atomic_fetch_add_explicit(&histogram[bucket < BUCKETS ? bucket : BUCKETS - 1], 1, memory_order_relaxed);
		uint64_t most = atomic_load_explicit(&longest, memory_order_relaxed);
		while (ns > most && !atomic_compare_exchange_weak(&longest, &most, ns))
			;
		count(&calls);
	}
	return arg;
}

static void *few(void *arg)
{
	for (int i = 0; i < 20; i++)
		one_call();
	return arg;
}

static void *bearer(void *arg)
{
	for (;;) {
		pthread_t t[4];
		for (int i = 0; i < 4; i++)
			if (pthread_create(&t[i], NULL, few, NULL))
				abort();
		for (int i = 0; i < 4; i++)
			pthread_join(t[i], NULL);
		__atomic_fetch_add(&births, 4, __ATOMIC_RELAXED);
	}
	return arg;
}

/* a child is of one version for good, and says so by its exit status */
static void *forker(void *arg)
{
	for (;;) {
		pid_t child = fork();
		if (child == 0) {
			wrong = 0;
			int first = one_call();
			for (int i = 0; i < 50; i++)
				if (one_call() != first)
					_exit(9);
			_exit(wrong ? 8 : first);
		}
		int status = 0;
		while (waitpid(child, &status, 0) < 0 && errno == EINTR)
			count(&spurious);
		if (!WIFEXITED(status) || (WEXITSTATUS(status) != 1 && WEXITSTATUS(status) != 2))
			count(&wrong);
		count(&forks);
	}
	return arg;
}

/* sleeps in epoll and in read, which nobody may wake without a reason */
static void *sleeper(void *arg)
{
	int event = eventfd(0, 0), epoll = epoll_create1(0);
	struct epoll_event wanted = { .events = EPOLLIN }, got;
	epoll_ctl(epoll, EPOLL_CTL_ADD, event, &wanted);
	for (;;) {
		int n = epoll_wait(epoll, &got, 1, 3);
		if (n < 0)
			count(&spurious);
		one_call();
		struct timespec moment = { 0, 200000 };
		if (nanosleep(&moment, NULL))
			count(&spurious);
		count(&sleeps);
	}
	return arg;
}

static int wanted(const char *name)
{
	const char *value = getenv(name);
	return value ? atoi(value) : 0;
}

void start(void *(*enter)(unsigned long), void (*leave)(void *))
{
	struct timespec a, b;
	clock_gettime(CLOCK_MONOTONIC, &a);
	uint64_t ticks = __rdtsc();
	usleep(50000);
	clock_gettime(CLOCK_MONOTONIC, &b);
	ns_per_tick = ((double)(b.tv_sec - a.tv_sec) * 1e9 + (double)(b.tv_nsec - a.tv_nsec)) / (double)(__rdtsc() - ticks);
	pthread_t t;
	for (int i = 0; i < wanted("FLIP_HOT"); i++)
		pthread_create(&t, NULL, hot, NULL);
	if (wanted("FLIP_BORN"))
		pthread_create(&t, NULL, bearer, NULL);
	if (wanted("FLIP_FORK"))
		pthread_create(&t, NULL, forker, NULL);
	for (int i = 0; i < wanted("FLIP_SLEEPERS"); i++)
		pthread_create(&t, NULL, sleeper, NULL);
}

const char *ask(const char *question)
{
	static char out[4096];
	if (*question == 'v') {
		snprintf(out, sizeof out, "%d", one_call());
		return out;
	}
	int n = snprintf(out, sizeof out, "{\"wrong\":%ld,\"calls\":%ld,\"births\":%ld,\"forks\":%ld,\"sleeps\":%ld,\"spurious\":%ld,\"longest_ns\":%lu,\"histogram\":[",
		wrong, calls, births, forks, sleeps, spurious, (unsigned long)longest);
	for (int i = 0; i < BUCKETS; i++)
		n += snprintf(out + n, sizeof out - n, "%s%lu", i ? "," : "", (unsigned long)histogram[i]);
	snprintf(out + n, sizeof out - n, "]}");
	if (*question == 'r') {
		memset((void *)histogram, 0, sizeof histogram);
		longest = 0;
	}
	return out;
}
