/* A program, or with -DLIBRARY a library of examples/inside.rs, whose answers tell what hooks left: which ran, in order, and how. */
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>
char trace[256] = "-";
/* what the hooks are to do */
volatile long mode = 0;
pthread_t main_thread;
static volatile int stay;
__attribute__((noipa)) long version(int wait)
{
    while (wait && stay) usleep(1000);
    return V;
}
static void *sleeper(void *p) { for (;;) usleep(2000); return p; }
static void *stayer(void *p) { version(1); return p; }
static void begin(void)
{
    main_thread = pthread_self();
    /* what the hooks import, the program does */
    void *volatile imported[] = { (void *)strdup, (void *)free, (void *)strcat, (void *)usleep, (void *)snprintf, (void *)pthread_exit,
                                  (void *)pthread_sigmask, (void *)memset, (void *)sigismember, (void *)strlen };
    (void)imported;
    pthread_t t;
    for (int i = 0; i < 3; i++) pthread_create(&t, 0, sleeper, 0);
}
static const char *answer(const char *line)
{
    static char out[400];
    if (!strncmp(line, "mode ", 5)) mode = atol(line + 5);
    if (!strcmp(line, "stay")) {
        pthread_t t;
        stay = 1;
        pthread_create(&t, 0, stayer, 0);
        usleep(20000);
    }
    if (!strcmp(line, "leave")) stay = 0;
    snprintf(out, sizeof out, "v%ld %s", version(0), trace);
    return out;
}
#ifdef LIBRARY
void start(void *(*enter)(unsigned long), void (*leave)(void *)) { (void)enter; (void)leave; begin(); }
const char *ask(const char *line) { return answer(line); }
#else
int main(void)
{
    char line[64], out[500];
    static long calls;
    begin();
    while (read(0, line, 1) == 1) {
        size_t n = 0;
        while (line[n] != '\n' && read(0, line + ++n, 1) == 1) {}
        line[n] = 0;
        int len = snprintf(out, sizeof out, "%ld %s\n", ++calls, answer(line));
        if (write(1, out, (size_t)len) != len) return 1;
    }
    return 0;
}
#endif
