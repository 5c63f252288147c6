#define _GNU_SOURCE
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>
extern char trace[256];
extern volatile long mode;
extern pthread_t main_thread;
static int ran;
#ifdef AGENT
int livepatch_hooks_need_agent;
#endif
static int at(const char *what)
{
    /* an allocation and a lock of the library: a thread of its own may */
    char *copy = strdup(what);
    sigset_t blocked;
    pthread_sigmask(SIG_BLOCK, 0, &blocked);
    int ours = pthread_self() != main_thread && sigismember(&blocked, SIGTERM) == 1;
    strcat(trace, ours ? copy : "WRONG");
    free(copy);
    ran++;
    return 0;
}
int livepatch_pre_apply(char *why, size_t room)
{
    at("a");
    switch (mode) {
    case 1: return 7;
    case 2: snprintf(why, room, "no limits are loaded\n(ask \x1b[31mtrading\x01)"); return 1;
    case 3: while (mode == 3) usleep(1000); strcat(trace, "."); return 0;
    case 4: pthread_exit(0);
    case 5: *(volatile int *)8 = 1;
    case 8: for (size_t i = 0; i < room; i++) why[i] = 'x'; return 1;
    }
    return 0;
}
int livepatch_post_apply(char *why, size_t room)
{
    at("A");
    switch (mode) {
    case 6: snprintf(why, room, "the cache is cold"); return 3;
    case 7: return 4;
    case 9: while (mode == 9) usleep(1000); strcat(trace, "."); return 0;
    }
    return 0;
}
int livepatch_pre_revert(void) { at("r"); return mode == 6 ? 5 : 0; }
int livepatch_post_revert(void) { at("R"); return mode == 10 ? 8 : 0; }
