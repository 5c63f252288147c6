/* One program, and a kind of process for each word: it makes itself that kind and then answers every line with its number and
 * what fee() says. Built twice, with FEE 70 and 75. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <linux/filter.h>
#include <linux/futex.h>
#include <linux/io_uring.h>
#include <linux/seccomp.h>
#include <poll.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/ipc.h>
#include <sys/mman.h>
#include <sys/msg.h>
#include <sys/prctl.h>
#include <sys/ptrace.h>
#include <sys/resource.h>
#include <sys/select.h>
#include <sys/sem.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/timerfd.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

static volatile long thousand = 1000;
__attribute__((noipa)) long fee(long amount) { return amount * FEE / 1000; }
__attribute__((noipa)) long rebate(long amount) { return amount * FEE / 500; }

static void fail(const char *what)
{
    printf("%s: %s\n", what, strerror(errno));
    exit(1);
}
/* Without memory from anywhere. */
static void say(const char *format, ...)
{
    char text[128];
    va_list arguments;
    va_start(arguments, format);
    int n = vsnprintf(text, sizeof text, format, arguments);
    va_end(arguments);
    if (write(1, text, (size_t)n) != n)
        _exit(1);
}
#define MUST(x) ((x) >= 0 ? (void)0 : fail(#x))

static pthread_t thread(void *(*body)(void *), void *argument)
{
    pthread_t id;
    if (pthread_create(&id, NULL, body, argument))
        fail("pthread_create");
    return id;
}

/* A filter that lets everything pass but `count` calls, which get `action`. */
static void confine(unsigned action, const int *calls, int count)
{
    struct sock_filter code[40];
    int n = 0;
    code[n++] = (struct sock_filter)BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, nr));
    for (int i = 0; i < count; i++) {
        code[n++] = (struct sock_filter)BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, (unsigned)calls[i], 0, 1);
        code[n++] = (struct sock_filter)BPF_STMT(BPF_RET | BPF_K, action);
    }
    code[n++] = (struct sock_filter)BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW);
    struct sock_fprog program = {(unsigned short)n, code};
    MUST(prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0));
    MUST(prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &program));
}

static const int memory_calls[] = {SYS_mmap, SYS_mprotect, SYS_munmap, SYS_mremap, SYS_brk};

static void seccomp_errno(void) { confine(SECCOMP_RET_ERRNO | EPERM, memory_calls, 5); }
static void seccomp_kill(void) { confine(SECCOMP_RET_KILL_PROCESS, memory_calls, 5); }
static void seccomp_other(void)
{
    static const int calls[] = {SYS_ptrace, SYS_kexec_load, SYS_reboot};
    confine(SECCOMP_RET_KILL_PROCESS, calls, 3);
}
static void seccomp_no_return(void)
{
    static const int calls[] = {SYS_rt_sigreturn, SYS_mmap};
    confine(SECCOMP_RET_KILL_PROCESS, calls, 2);
}

static void mdwe(void) { MUST(prctl(65 /* PR_SET_MDWE */, 1, 0, 0, 0)); }
static void undumpable(void) { MUST(prctl(PR_SET_DUMPABLE, 0, 0, 0, 0)); }

/* A child that shares the memory: for a second, by vfork; for good, by clone. */
static void *vforker(void *unused)
{
    for (;;) {
        if (vfork() == 0) {
            struct timespec t = {0, 300000000};
            nanosleep(&t, NULL);
            _exit(0);
        }
        usleep(100000);
    }
    return unused;
}
static void vforks(void) { thread(vforker, NULL); }
static int sleeper(void *unused)
{
    int parent = getppid();
    while (getppid() == parent)
        usleep(100000);
    _exit(unused != NULL);
}
static void sharer(void)
{
    static char stack[65536];
    MUST(clone(sleeper, stack + sizeof stack, CLONE_VM | SIGCHLD, NULL));
}

/* Threads on a signal stack, one in a handler for good, one that gets signals all the time. */
static volatile unsigned long handled;
static void on_signal(int number)
{
    if (number == SIGUSR1)
        for (;;)
            pause();
    handled++;
}
static void *on_signal_stack(void *which)
{
    stack_t stack = {.ss_sp = malloc(65536), .ss_size = 65536};
    MUST(sigaltstack(&stack, NULL));
    raise(which ? SIGUSR1 : SIGUSR2);
    for (;;)
        pause();
}
static void *signaller(void *target)
{
    for (;;) {
        pthread_kill(*(pthread_t *)target, SIGUSR2);
        usleep(200);
    }
}
static void handlers(void)
{
    struct sigaction action = {.sa_handler = on_signal, .sa_flags = SA_ONSTACK | SA_RESTART};
    MUST(sigaction(SIGUSR1, &action, NULL));
    MUST(sigaction(SIGUSR2, &action, NULL));
    static pthread_t busy;
    thread(on_signal_stack, "handler");
    busy = thread(on_signal_stack, NULL);
    thread(signaller, &busy);
}

/* A thread in each kind of system call that the kernel restarts in its own way, or not. An error that nobody asked for is counted. */
static volatile int interrupted;
static int waiting;
static void check(const char *what, long result)
{
    if (result < 0 && errno == EINTR) {
        interrupted++;
        fprintf(stderr, "EINTR from %s\n", what);
    }
}
#define FOREVER(name, call)                     \
    static void *name(void *unused)             \
    {                                           \
        (void)unused;                           \
        __atomic_add_fetch(&waiting, 1, __ATOMIC_SEQ_CST); \
        for (;;)                                \
            check(#name, (long)(call));         \
    }
static int pipes[2], epoll_fd, timer_fd, event_fd, message_queue, semaphores, pair[2], listener, locked;
static int word;
static struct sembuf down = {0, -1, 0};
static struct timespec hour = {3600, 0}, blink = {0, 3000000};
static struct timeval hour_v = {3600, 0};
static char byte[64];
static fd_set *set(void)
{
    static __thread fd_set fds;
    FD_ZERO(&fds);
    FD_SET(pipes[0], &fds);
    return &fds;
}
static struct pollfd *polled(void)
{
    static __thread struct pollfd p;
    p = (struct pollfd){pipes[0], POLLIN, 0};
    return &p;
}
static struct epoll_event event;
static sigset_t none;
FOREVER(in_read, read(pipes[0], byte, 1))
FOREVER(in_poll, poll(polled(), 1, -1))
FOREVER(in_poll_timed, poll(polled(), 1, 3600000))
FOREVER(in_ppoll, ppoll(polled(), 1, &hour, NULL))
FOREVER(in_select, select(pipes[0] + 1, set(), NULL, NULL, NULL))
FOREVER(in_select_timed, select(pipes[0] + 1, set(), NULL, NULL, &(struct timeval){3600, 0}))
FOREVER(in_pselect, pselect(pipes[0] + 1, set(), NULL, NULL, &hour, &none))
FOREVER(in_epoll, epoll_wait(epoll_fd, &event, 1, -1))
FOREVER(in_epoll_timed, epoll_wait(epoll_fd, &event, 1, 3600000))
FOREVER(in_nanosleep, nanosleep(&hour, NULL))
FOREVER(in_short_sleep, nanosleep(&blink, NULL))
FOREVER(in_clock_nanosleep, (errno = clock_nanosleep(CLOCK_MONOTONIC, 0, &hour, NULL)) ? -1 : 0)
FOREVER(in_futex, syscall(SYS_futex, &word, FUTEX_WAIT_PRIVATE, 0, NULL, NULL, 0))
FOREVER(in_futex_timed, syscall(SYS_futex, &word, FUTEX_WAIT_PRIVATE, 0, &hour, NULL, 0))
FOREVER(in_timerfd, read(timer_fd, byte, 8))
FOREVER(in_eventfd, read(event_fd, byte, 8))
FOREVER(in_msgrcv, msgrcv(message_queue, byte, 32, 0, 0))
FOREVER(in_semop, semop(semaphores, &down, 1))
FOREVER(in_semtimedop, semtimedop(semaphores, &down, 1, &hour))
FOREVER(in_recv, recv(pair[0], byte, 1, 0))
FOREVER(in_recv_timed, recv(pair[1], byte, 1, 0))
FOREVER(in_accept, accept(listener, NULL, NULL))
FOREVER(in_sigtimedwait, sigtimedwait(&none, NULL, &hour))
FOREVER(in_wait, waitpid(-1, NULL, 0))
FOREVER(in_flock, fcntl(locked, F_OFD_SETLKW, &(struct flock){.l_type = F_WRLCK}))
static void syscalls(void)
{
    MUST(pipe(pipes));
    MUST(epoll_fd = epoll_create1(0));
    MUST(timer_fd = timerfd_create(CLOCK_MONOTONIC, 0));
    MUST(timerfd_settime(timer_fd, 0, &(struct itimerspec){{0, 0}, {3600, 0}}, NULL));
    MUST(event_fd = eventfd(0, 0));
    MUST(message_queue = msgget(IPC_PRIVATE, 0600));
    MUST(semaphores = semget(IPC_PRIVATE, 1, 0600));
    MUST(socketpair(AF_UNIX, SOCK_STREAM, 0, pair));
    MUST(setsockopt(pair[1], SOL_SOCKET, SO_RCVTIMEO, &hour_v, sizeof hour_v));
    MUST(listener = socket(AF_UNIX, SOCK_STREAM, 0));
    struct sockaddr_un name = {.sun_family = AF_UNIX};
    MUST(bind(listener, (struct sockaddr *)&name, sizeof(sa_family_t)));
    MUST(listen(listener, 1));
    FILE *file = tmpfile();
    char path[64];
    snprintf(path, sizeof path, "/proc/self/fd/%d", fileno(file));
    int holder = open(path, O_RDWR);
    locked = open(path, O_RDWR);
    MUST(fcntl(holder, F_OFD_SETLK, &(struct flock){.l_type = F_WRLCK}));
    if (fork() == 0) {
        prctl(PR_SET_PDEATHSIG, SIGKILL);
        for (;;)
            pause();
    }
    void *(*all[])(void *) = {in_read, in_poll, in_poll_timed, in_ppoll, in_select, in_select_timed, in_pselect, in_epoll, in_epoll_timed,
        in_nanosleep, in_short_sleep, in_clock_nanosleep, in_futex, in_futex_timed, in_timerfd, in_eventfd, in_msgrcv, in_semop,
        in_semtimedop, in_recv, in_recv_timed, in_accept, in_sigtimedwait, in_wait, in_flock};
    int count = sizeof all / sizeof *all;
    for (int i = 0; i < count; i++)
        thread(all[i], NULL);
    while (__atomic_load_n(&waiting, __ATOMIC_SEQ_CST) < count)
        usleep(1000);
    usleep(50000);
}
static void leave(void)
{
    if (message_queue)
        msgctl(message_queue, IPC_RMID, NULL);
    if (semaphores)
        semctl(semaphores, 0, IPC_RMID);
}

/* A kernel thread of its own that polls a ring, and workers that block. */
static void uring(void)
{
    struct io_uring_params params = {.flags = IORING_SETUP_SQPOLL, .sq_thread_idle = 60000};
    int ring = (int)syscall(SYS_io_uring_setup, 8, &params);
    if (ring < 0) {
        printf("skip: io_uring_setup: %s\n", strerror(errno));
        exit(0);
    }
    MUST(pipe(pipes));
    size_t len = params.sq_off.array + params.sq_entries * sizeof(unsigned);
    char *queue = mmap(NULL, len, PROT_READ | PROT_WRITE, MAP_SHARED, ring, IORING_OFF_SQ_RING);
    struct io_uring_sqe *entries = mmap(NULL, params.sq_entries * sizeof *entries, PROT_READ | PROT_WRITE, MAP_SHARED, ring, IORING_OFF_SQES);
    entries[0] = (struct io_uring_sqe){.opcode = IORING_OP_READ, .flags = IOSQE_ASYNC, .fd = pipes[0], .addr = (unsigned long)byte, .len = 1};
    ((unsigned *)(queue + params.sq_off.array))[0] = 0;
    __atomic_store_n((unsigned *)(queue + params.sq_off.tail), 1, __ATOMIC_RELEASE);
    usleep(100000);
}

static void *idle(void *unused)
{
    for (;;)
        pause();
    return unused;
}
static void many(void)
{
    pthread_attr_t small;
    pthread_attr_init(&small);
    pthread_attr_setstacksize(&small, 65536);
    for (int i = 0; i < 2000; i++) {
        pthread_t id;
        if (pthread_create(&id, &small, idle, NULL))
            fail("pthread_create");
    }
}

static void *born_to_die(void *unused) { return unused; }
static void *breeder(void *unused)
{
    for (;;) {
        pthread_t id;
        if (!pthread_create(&id, NULL, born_to_die, NULL))
            pthread_join(id, NULL);
    }
    return unused;
}
static void births(void) { thread(breeder, NULL); }

/* The text as anonymous memory with huge pages asked for, as some programs make it; by code of a library. */
static void hugetext(void)
{
    void (*remap)(void *) = (void (*)(void *))dlsym(dlopen("./libhelp.so", RTLD_NOW), "remap_text");
    remap((void *)fee);
}

static int child_in, child_out;
static long child_fee(void)
{
    long answer;
    if (write(child_in, "?", 1) != 1 || read(child_out, &answer, sizeof answer) != sizeof answer)
        return -1;
    return answer;
}
static int forked(void)
{
    int down_[2], up[2];
    MUST(pipe(down_));
    MUST(pipe(up));
    int pid = fork();
    if (pid == 0) {
        char c;
        prctl(PR_SET_PDEATHSIG, SIGKILL);
        while (read(down_[0], &c, 1) == 1) {
            long answer = fee(thousand);
            if (write(up[1], &answer, sizeof answer) < 0)
                break;
        }
        _exit(0);
    }
    child_in = down_[1];
    child_out = up[0];
    return pid;
}

/* No room for one more page. */
static void nomemory(void)
{
    struct rlimit none_ = {1 << 20, RLIM_INFINITY};
    MUST(setrlimit(RLIMIT_AS, &none_));
}

static long (*price)(long);
static void *library;
static void load(void)
{
    library = dlopen("./libprice.so", RTLD_NOW);
    if (!library)
        fail(dlerror());
    price = (long (*)(long))dlsym(library, "price");
}
static void twice(void)
{
    load();
#ifdef __GLIBC__
    if (!dlmopen(LM_ID_NEWLM, "./libprice.so", RTLD_NOW))
        fail(dlerror());
#endif
}

static const struct {
    const char *name;
    void (*make)(void);
} kinds[] = {{"seccomp-errno", seccomp_errno}, {"seccomp-kill", seccomp_kill}, {"seccomp-other", seccomp_other}, {"seccomp-no-return", seccomp_no_return},
    {"mdwe", mdwe}, {"undumpable", undumpable}, {"vforks", vforks}, {"sharer", sharer}, {"handlers", handlers}, {"syscalls", syscalls}, {"uring", uring},
    {"many", many}, {"births", births}, {"hugetext", hugetext}, {"nomemory", nomemory}, {"load", load}, {"twice", twice}, {"plain", NULL}};

int main(int argc, char **argv)
{
    char line[64];
    size_t n = 0;
    unsigned long answers = 0;
    const char *kind = argc > 1 ? argv[1] : "plain";
    setvbuf(stdout, NULL, _IONBF, 0);
    alarm(120);
    sigemptyset(&none);
    sigaddset(&none, SIGWINCH);
    for (size_t i = 0; i < sizeof kinds / sizeof *kinds; i++)
        if (!strcmp(kinds[i].name, kind) && kinds[i].make)
            kinds[i].make();
    say("ready %d\n", getpid());
    while (read(0, line + n, 1) == 1) {
        if (line[n] != '\n') {
            n = (n + 1) % sizeof line;
            continue;
        }
        line[n] = 0;
        n = 0;
        answers++;
        if (!strcmp(line, "fork"))
            say("%lu %d\n", answers, forked());
        else if (!strcmp(line, "child"))
            say("%lu fee %ld\n", answers, child_fee());
        else if (!strcmp(line, "exec"))
            execl("/proc/self/exe", argv[0], "plain", NULL);
        else if (!strcmp(line, "interrupted"))
            say("%lu %d\n", answers, interrupted);
        else if (!strcmp(line, "load"))
            load(), say("%lu loaded\n", answers);
        else if (!strcmp(line, "unload"))
            dlclose(library), say("%lu unloaded\n", answers);
        else if (!strcmp(line, "price"))
            say("%lu price %ld\n", answers, price(thousand));
        else
            say("%lu fee %ld\n", answers, fee(thousand));
    }
    leave();
    return 0;
}
