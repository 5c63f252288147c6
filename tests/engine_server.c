/* A target for the engine's tests: it answers lines, while threads wait in every way that a thread can wait and check
 * that nothing about that ever looks different. */
#define _GNU_SOURCE
#include <errno.h>
#include <pthread.h>
#include <sched.h>
#include <semaphore.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/ptrace.h>
#include <sys/wait.h>
#include <time.h>
#include <ucontext.h>
#include <unistd.h>

int calls;
/* interrupted: an EINTR that nobody sent; allowed only where a tool was killed right after a stop */
static volatile int errors, interrupted, leave, entered;
static void failed(void) { if (errno == EINTR) interrupted++; else errors++; }

__attribute__((noinline)) int plain(int x) { __asm__ volatile("" ::: "memory"); return x; }

__attribute__((noinline, noclone)) int answer(int x)
{
	calls++;
	return plain(x) + 1001;
}

__attribute__((noinline, noclone)) int slow(int x)
{
	entered = 1;
	while (!leave)
		usleep(1000);
	return plain(x) + 1;
}

static void *slow_thread(void *arg)
{
	prctl(PR_SET_NAME, "slowpoke");
	int r = slow(1);
	__asm__ volatile("" ::"r"(r));
	leave = 2;
	return arg;
}

static void *in_epoll(void *arg)
{
	int ep = epoll_create1(0), ev = eventfd(0, 0);
	struct epoll_event e = { .events = EPOLLIN };
	epoll_ctl(ep, EPOLL_CTL_ADD, ev, &e);
	for (;;)
		if (epoll_wait(ep, &e, 1, -1) < 0)
			failed();
	return arg;
}

static void *in_sleep(void *arg)
{
	for (;;) {
		struct timespec t = { 0, 3000000 }, a, b;
		clock_gettime(CLOCK_MONOTONIC, &a);
		if (nanosleep(&t, NULL))
			errors++;
		clock_gettime(CLOCK_MONOTONIC, &b);
		if ((b.tv_sec - a.tv_sec) * 1000000000l + b.tv_nsec - a.tv_nsec < 3000000)
			errors++;
	}
	return arg;
}

static void *in_read(void *arg)
{
	int p[2];
	char c;
	if (pipe(p))
		return NULL;
	for (;;)
		if (read(p[0], &c, 1) != 1)
			errors++;
	return arg;
}

static void *in_wait(void *arg)
{
	pthread_mutex_t m = PTHREAD_MUTEX_INITIALIZER;
	pthread_cond_t c = PTHREAD_COND_INITIALIZER;
	pthread_mutex_lock(&m);
	for (;;)
		pthread_cond_wait(&c, &m);
	return arg;
}

static void *in_sigwait(void *arg)
{
	sigset_t s;
	sigemptyset(&s);
	sigaddset(&s, SIGRTMIN);
	for (;;)
		if (sigwaitinfo(&s, NULL) < 0)
			failed();
	return arg;
}

/* keeps known values in all the registers that a program can see, and in its red zone */
static void *in_registers(void *arg)
{
	for (;;) {
		long bad;
		__asm__ volatile(
			"movq $0x1122334455667788, %%rax\n movq %%rax, %%rbx\n movq %%rax, %%r12\n movq %%rax, %%r13\n"
			"movq %%rax, %%r14\n movq %%rax, %%r15\n movq %%rax, -8(%%rsp)\n movq %%rax, -128(%%rsp)\n movq %%rax, %%xmm9\n"
			"movl $100000, %%ecx\n 1: pause\n loop 1b\n"
			"xorl %%edx, %%edx\n movq %%xmm9, %%rsi\n"
			"cmpq %%rax, %%rbx\n jne 2f\n cmpq %%rax, %%r12\n jne 2f\n cmpq %%rax, %%r13\n jne 2f\n cmpq %%rax, %%r14\n jne 2f\n"
			"cmpq %%rax, %%r15\n jne 2f\n cmpq %%rax, -8(%%rsp)\n jne 2f\n cmpq %%rax, -128(%%rsp)\n jne 2f\n cmpq %%rax, %%rsi\n je 3f\n"
			"2: movl $1, %%edx\n 3:\n"
			: "=d"(bad)
			:: "rax", "rbx", "rcx", "rsi", "r12", "r13", "r14", "r15", "xmm9", "memory", "cc");
		errors += bad;
	}
	return arg;
}

/* calls without end; every result must be of one version: 1002, 2002, or 3002 */
static void *hammer(void *arg)
{
	for (;;) {
		int r = answer(1);
		if (r != 1002 && r != 2002 && r != 3002)
			errors++;
		for (int i = 0; i < 1000; i++)
			__builtin_ia32_pause();
	}
	return arg;
}

/* signals that are sent and those that arrive, at a thread that sleeps */
static volatile long sent, handled;
static volatile int hush;
static pthread_t sleeper;
static void on_signal(int s) { (void)s; handled++; }

static void *in_pause(void *arg)
{
	sigset_t s;
	sigemptyset(&s);
	sigaddset(&s, SIGRTMIN + 1);
	pthread_sigmask(SIG_UNBLOCK, &s, NULL);
	for (;;)
		pause();
	return arg;
}

static void *sender(void *arg)
{
	union sigval v = { 0 };
	for (;; usleep(500))
		if (!hush && !pthread_sigqueue(sleeper, SIGRTMIN + 1, v))
			sent++;
	return arg;
}

static void on_usr1(int s) { (void)s; }

#ifdef CONTEXTS
ucontext_t here, there;
void use_contexts(void) { swapcontext(&here, &there); }
#endif

static int sharer(void *arg)
{
	(void)arg;
	prctl(PR_SET_PDEATHSIG, SIGKILL);
	for (;;)
		pause();
}

int main(void)
{
	void *(*const list[])(void *) = { in_epoll, in_sleep, in_read, in_wait, in_sigwait, in_registers };
	pthread_t t;
	char line[100];
	sigset_t s;
	sigemptyset(&s);
	sigaddset(&s, SIGRTMIN);
	sigaddset(&s, SIGRTMIN + 1);
	signal(SIGRTMIN + 1, on_signal);
	sigprocmask(SIG_BLOCK, &s, NULL);
	signal(SIGUSR1, on_usr1);
	prctl(PR_SET_PDEATHSIG, SIGKILL);
	for (unsigned i = 0; i < sizeof list / sizeof *list; i++)
		pthread_create(&t, NULL, list[i], NULL);
	usleep(20000);
	printf("ready\n");
	fflush(stdout);
	while (fgets(line, sizeof line, stdin)) {
		if (!strncmp(line, "answer", 6)) {
			printf("%d\n", answer(atoi(line + 6)));
		} else if (!strncmp(line, "enter", 5)) {
			pthread_create(&t, NULL, slow_thread, NULL);
			while (!entered)
				usleep(100);
			printf("in\n");
		} else if (!strncmp(line, "hammer", 6)) {
			pthread_create(&t, NULL, hammer, NULL);
			pthread_create(&sleeper, NULL, in_pause, NULL);
			pthread_create(&t, NULL, sender, NULL);
			printf("on\n");
		} else if (!strncmp(line, "leave", 5)) {
			leave = 1;
			while (leave != 2)
				usleep(100);
			printf("out\n");
		} else if (!strncmp(line, "errors", 6)) {
			printf("%d\n", errors + interrupted);
		} else if (!strncmp(line, "lost", 4)) {
			hush = 1;
			for (int i = 0; i < 100 && (usleep(2000), sent != handled); i++)
				;
			printf("%ld\n", sent - handled);
			hush = 0;
		} else if (!strncmp(line, "torn", 4)) {
			printf("%d\n", errors);
		} else if (!strncmp(line, "calls", 5)) {
			printf("%d\n", calls);
		} else if (!strncmp(line, "scribble", 8)) {
			char *page = (char *)((long)answer & ~4095l);
			mprotect(page, 8192, PROT_READ | PROT_WRITE | PROT_EXEC);
			*(volatile unsigned char *)answer = 0xcc;
			mprotect(page, 8192, PROT_READ | PROT_EXEC);
			printf("done\n");
		} else if (!strncmp(line, "traceme", 7)) {
			int p[2];
			char c;
			if (pipe(p))
				return 1;
			if (!fork()) {
				prctl(PR_SET_PDEATHSIG, SIGKILL);
				ptrace(PTRACE_SEIZE, getppid(), 0, 0);
				if (write(p[1], "x", 1) != 1)
					return 1;
				for (;;)
					pause();
			}
			if (read(p[0], &c, 1) != 1)
				return 1;
			printf("done\n");
		} else if (!strncmp(line, "share", 5)) {
			char *stack = malloc(65536);
			clone(sharer, stack + 65536, CLONE_VM | SIGCHLD, NULL);
			printf("done\n");
		} else if (!strncmp(line, "quit", 4)) {
			return 0;
		}
		fflush(stdout);
	}
	return 0;
}
