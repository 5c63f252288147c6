// A shared library of the program under test: its calls have to reach the agent's wrappers.
#define _GNU_SOURCE
#include <poll.h>
#include <pthread.h>
#include <setjmp.h>
#include <signal.h>
#include <string.h>
#include <sys/epoll.h>
#include <unistd.h>

static sigset_t all(void) {
    sigset_t set;
    sigfillset(&set);
    return set;
}

static void trap(void) { __asm__ volatile("int3"); }

int lib_sigprocmask(void) {
    sigset_t set = all();
    int result = sigprocmask(SIG_SETMASK, &set, NULL);
    trap();
    return result;
}

int lib_pthread_sigmask(void) {
    sigset_t set = all();
    int result = pthread_sigmask(SIG_BLOCK, &set, NULL);
    trap();
    return result;
}

int lib_sigblock(void) {
    sigblock(-1);
    sigsetmask(-1);
    sighold(SIGTRAP);
    sigset(SIGTRAP, SIG_HOLD);
    trap();
    return 0;
}

static void handler(int signal) { trap(); }

int lib_sigaction(void) {
    struct sigaction action = {.sa_handler = handler, .sa_mask = all()};
    int result = sigaction(SIGUSR1, &action, NULL);
    raise(SIGUSR1);
    return result;
}

static void *child(void *count) {
    trap();
    return NULL;
}

// The mask with which a thread begins comes from its attributes, or from its creator.
int lib_attributes(void) {
    pthread_attr_t attr;
    pthread_t thread;
    sigset_t set = all();
    pthread_attr_init(&attr);
    pthread_attr_setsigmask_np(&attr, &set);
    int result = pthread_create(&thread, &attr, child, NULL);
    pthread_join(thread, NULL);
    return result;
}

int lib_creator(void) {
    pthread_t thread;
    sigset_t set = all();
    pthread_sigmask(SIG_SETMASK, &set, NULL);
    int result = pthread_create(&thread, NULL, child, NULL);
    pthread_join(thread, NULL);
    return result;
}

static void *waits(void *kind) {
    sigset_t set = all();
    struct pollfd none = {.fd = -1};
    switch ((long)kind) {
    case 0: ppoll(&none, 1, NULL, &set); break;
    case 1: pselect(0, NULL, NULL, NULL, NULL, &set); break;
    case 2: sigsuspend(&set); break;
    }
    return NULL;
}

// A thread that waits is a cancellation point, and unwinds through the wrapper.
int lib_cancel(void) {
    for (long kind = 0; kind < 3; kind++) {
        pthread_t thread;
        void *result;
        if (pthread_create(&thread, NULL, waits, (void *)kind)) return 1;
        usleep(20000);
        pthread_cancel(thread);
        pthread_join(thread, &result);
        if (result != PTHREAD_CANCELED) return 2;
    }
    return 0;
}

// With _FORTIFY_SOURCE this is a call of __ppoll_chk.
int lib_ppoll(struct pollfd *fds, int count) {
    struct pollfd own[4];
    sigset_t set = all();
    memcpy(own, fds, count * sizeof *own);
    return ppoll(own, count, NULL, &set);
}

static sigjmp_buf back;

static void jumps(int signal) { siglongjmp(back, 1); }

// A chained handler may leave with a jump.
int lib_jump(void) {
    struct sigaction action = {.sa_handler = jumps, .sa_mask = all()};
    volatile int jumped = 0;
    if (sigaction(SIGTRAP, &action, NULL)) return 1;
    for (int i = 0; i < 1000; i++) {
        if (sigsetjmp(back, 1) == 0) {
            trap();
            return 2;
        }
        jumped++;
    }
    return jumped == 1000 ? 0 : 3;
}
