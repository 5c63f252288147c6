/*
 * What tests/agent_switch.rs patches: functions that check on every call that they are of one version, and threads that make life hard for
 * a switch. Built as a shared library, once with -DVERSION=1 and once with -DVERSION=2, and loaded by examples/inside.rs.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <pthread.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <setjmp.h>
#include <signal.h>
#include <spawn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#define HIDDEN __attribute__((visibility("hidden"), noipa))
#define LOAD(x) __atomic_load_n(&(x), __ATOMIC_SEQ_CST)
#define STORE(x, v) __atomic_store_n(&(x), v, __ATOMIC_SEQ_CST)
#define COUNT(x) __atomic_fetch_add(&(x), 1, __ATOMIC_SEQ_CST)

static long mixed, calls, odd, inside, seen, jumps;
static int napping = 1, spinning = 1, blocking = 1, busy = 1;

HIDDEN int leaf(int a, int b)
{
	unsigned sum = VERSION;
	for (int i = 0; i < (a & 7); i++)
		sum = sum * 31 + b;
	return sum == 0xdeadbeef ? 9 : VERSION;
}

HIDDEN int middle(int a, int b)
{
	if (leaf(a, b) != VERSION || leaf(b, a) != VERSION)
		COUNT(mixed);
	return VERSION;
}

HIDDEN int outer(int depth)
{
	if (middle(depth, 1) != VERSION || (depth > 0 && outer(depth - 1) != VERSION))
		COUNT(mixed);
	return VERSION;
}

/* sleeps in here as long as it is told to, and calls now and then */
HIDDEN int nap(int calls_too)
{
	COUNT(inside);
	while (LOAD(napping)) {
		usleep(1000);
		if (calls_too && outer(1) != VERSION)
			COUNT(mixed);
	}
	return outer(1) == VERSION ? VERSION : 9;
}

/* never sleeps in here */
HIDDEN int spin(int calls_too)
{
	COUNT(inside);
	while (LOAD(spinning))
		if (calls_too && outer(1) != VERSION)
			COUNT(mixed);
	return outer(1) == VERSION ? VERSION : 9;
}

static int one_call(void)
{
	int got = outer(2);
	if (got < 1 || got > 3)
		COUNT(mixed);
	COUNT(calls);
	return got;
}

static void *napper(void *arg) { return (void *)(long)nap(arg != NULL); }
static void *spinner(void *arg) { return (void *)(long)spin(arg != NULL); }

static void *caller(void *arg)
{
	while (LOAD(busy)) {
		one_call();
		for (int i = 0; i < 200; i++)
			__builtin_ia32_pause();
	}
	return arg;
}

static void *few(void *arg)
{
	struct timespec a, b;
	clock_gettime(CLOCK_MONOTONIC, &a);
	do {
		one_call();
		clock_gettime(CLOCK_MONOTONIC, &b);
	} while ((b.tv_sec - a.tv_sec) * 1000000000 + b.tv_nsec - a.tv_nsec < (long)arg);
	return arg;
}

/* births by the thousand, each on a stack that was not there before */
static void *births(void *arg)
{
	pthread_attr_t attr;
	pthread_attr_init(&attr);
	while (LOAD(busy)) {
		pthread_t t;
		size_t size = 1 << 18;
		char *stack = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
		pthread_attr_setstack(&attr, stack, size);
		if (pthread_create(&t, &attr, few, arg) == 0)
			pthread_join(t, NULL);
		munmap(stack, size);
	}
	return arg;
}

static void *forks(void *arg)
{
	while (LOAD(busy)) {
		pid_t child = fork();
		if (child == 0) {
			mixed = 0;
			int first = one_call();
			for (int i = 0; i < 20; i++)
				if (one_call() != first)
					_exit(9);
			_exit(mixed ? 8 : first);
		}
		int status = 0;
		while (waitpid(child, &status, 0) < 0 && errno == EINTR)
			COUNT(odd);
		if (!WIFEXITED(status) || (WEXITSTATUS(status) != 1 && WEXITSTATUS(status) != 2))
			COUNT(mixed);
		COUNT(seen);
	}
	return arg;
}

static void *spawns(void *arg)
{
	char *argv[] = { "true", NULL };
	while (LOAD(busy)) {
		pid_t child;
		int status;
		if (posix_spawnp(&child, "true", NULL, NULL, argv, NULL) == 0)
			while (waitpid(child, &status, 0) < 0 && errno == EINTR)
				COUNT(odd);
		one_call();
		COUNT(seen);
	}
	return arg;
}

/* a child of vfork that calls in the memory of its parent */
static void *vforks(void *arg)
{
	while (LOAD(busy)) {
		pid_t child = vfork();
		if (child == 0) {
			one_call();
			one_call();
			_exit(0);
		}
		int status = 0;
		while (waitpid(child, &status, 0) < 0 && errno == EINTR)
			COUNT(odd);
		if (!WIFEXITED(status))
			COUNT(odd);
		COUNT(seen);
	}
	return arg;
}

static void *sleeps(void *arg)
{
	while (LOAD(busy)) {
		struct timespec moment = { 0, 3000000 };
		if (nanosleep(&moment, NULL))
			COUNT(odd);
		one_call();
		COUNT(seen);
	}
	return arg;
}

static __thread sigjmp_buf place;
static __thread int may_jump;

static void on_timer(int signal)
{
	one_call();
	if (may_jump) {
		may_jump = 0;
		COUNT(jumps);
		siglongjmp(place, signal);
	}
}

/* a timer whose handler calls, and if `arg` leaves by a jump wherever it finds the thread, in a handler of another or not */
static void *timed(void *arg)
{
	struct sigevent event = { .sigev_notify = SIGEV_THREAD_ID, .sigev_signo = SIGUSR1 };
	struct itimerspec often = { { 0, 50000 }, { 0, 50000 } };
	timer_t timer;
	event._sigev_un._tid = gettid();
	signal(SIGUSR1, on_timer);
	timer_create(CLOCK_MONOTONIC, &event, &timer);
	timer_settime(timer, 0, &often, NULL);
	while (LOAD(busy)) {
		sigsetjmp(place, 1);
		may_jump = arg != NULL;
		for (int i = 0; i < 20; i++)
			one_call();
	}
	timer_delete(timer);
	may_jump = 0;
	return arg;
}

static void *endless(void *arg)
{
	pthread_setcanceltype(PTHREAD_CANCEL_ASYNCHRONOUS, NULL);
	for (;;)
		outer(1);
	return arg;
}

static void *cancels(void *arg)
{
	while (LOAD(busy)) {
		pthread_t t;
		if (pthread_create(&t, NULL, endless, NULL))
			continue;
		usleep(300);
		pthread_cancel(t);
		pthread_join(t, NULL);
		COUNT(seen);
	}
	return arg;
}

/* blocks SIGTRAP past the C library */
static void *blocker(void *arg)
{
	unsigned long set = 1ul << (SIGTRAP - 1);
	syscall(SYS_rt_sigprocmask, SIG_BLOCK, &set, NULL, sizeof set);
	COUNT(inside);
	while (LOAD(blocking))
		usleep(1000);
	syscall(SYS_rt_sigprocmask, SIG_UNBLOCK, &set, NULL, sizeof set);
	return arg;
}

static void on_sigtrap(int signal, siginfo_t *info, void *context)
{
	(void)signal, (void)info, (void)context;
	COUNT(seen);
}

/* for all threads: process_vm_readv fails from now on */
static void confine(void)
{
	struct sock_filter code[] = {
		BPF_STMT(BPF_LD | BPF_W | BPF_ABS, 0),
		BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, SYS_process_vm_readv, 0, 1),
		BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ERRNO | EPERM),
		BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW),
	};
	struct sock_fprog filter = { sizeof code / sizeof *code, code };
	prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0);
	if (syscall(SYS_seccomp, SECCOMP_SET_MODE_FILTER, SECCOMP_FILTER_FLAG_TSYNC, &filter))
		abort();
}

static void thread(void *(*run)(void *), void *arg)
{
	pthread_t t;
	if (pthread_create(&t, NULL, run, arg))
		abort();
	pthread_detach(t);
}

void start(void) { prctl(PR_SET_PDEATHSIG, SIGKILL); }

static const struct { const char *name; void *(*run)(void *); void *arg; int enters; } ways[] = {
	{ "call", caller, NULL, 0 },	{ "nap", napper, NULL, 1 },	{ "nap and call", napper, "", 1 },	{ "spin", spinner, NULL, 1 },
	{ "spin and call", spinner, "", 1 }, { "births", births, (void *)200000, 0 }, { "long births", births, (void *)50000000, 0 },
	{ "forks", forks, NULL, 0 },	{ "spawns", spawns, NULL, 0 },	{ "vforks", vforks, NULL, 0 },	{ "sleeps", sleeps, NULL, 0 },
	{ "handlers", timed, NULL, 0 },	{ "jumps", timed, "", 0 },	{ "cancels", cancels, NULL, 0 },	{ "block", blocker, NULL, 1 },
};

const char *ask(const char *question)
{
	static char out[200];
	for (size_t i = 0; i < sizeof ways / sizeof *ways; i++)
		if (!strcmp(question, ways[i].name)) {
			long before = LOAD(inside);
			thread(ways[i].run, ways[i].arg);
			while (ways[i].enters && LOAD(inside) == before)
				usleep(1000);
			return "started";
		}
	if (!strcmp(question, "free")) {
		STORE(napping, 0), STORE(spinning, 0), STORE(blocking, 0), STORE(busy, 0);
		usleep(30000);
		STORE(napping, 1), STORE(spinning, 1), STORE(blocking, 1), STORE(busy, 1);
	} else if (!strcmp(question, "handle")) {
		struct sigaction action = { .sa_sigaction = on_sigtrap, .sa_flags = SA_SIGINFO };
		sigaction(SIGTRAP, &action, NULL);
	} else if (!strcmp(question, "trap")) {
		raise(SIGTRAP);
		__asm__ volatile("int3");
		__asm__ volatile(".byte 0xcd, 0x03");
	} else if (!strcmp(question, "not dumpable")) {
		prctl(PR_SET_DUMPABLE, 0);
	} else if (!strcmp(question, "confine")) {
		confine();
	} else if (!strcmp(question, "free and exit")) {
		STORE(napping, 0);
		syscall(SYS_exit, 0);
	} else if (!strcmp(question, "exit")) {
		syscall(SYS_exit, 0);
	} else if (!strcmp(question, "child")) {
		pid_t child = fork();
		if (child == 0)
			for (prctl(PR_SET_PDEATHSIG, SIGKILL);;)
				pause();
		snprintf(out, sizeof out, "%d", child);
		return out;
	}
	snprintf(out, sizeof out, "version %d mixed %ld odd %ld seen %ld jumps %ld calls %ld", one_call(), mixed, odd, seen, jumps, calls);
	return out;
}
