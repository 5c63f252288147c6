/* Calls a function of the C library from four threads all the time, and says for each line on its input what comes of it. */
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>

static volatile unsigned long calls;

static void *load(void *unused)
{
    for (;;) {
        if (random() < 0)
            abort();
        if (__atomic_add_fetch(&calls, 1, __ATOMIC_RELAXED) % 16 == 0)
            usleep(50);
    }
    return unused;
}

int main(void)
{
    char c, text[128];
    unsigned long answers = 0;
    for (int i = 0; i < 4; i++) {
        pthread_t id;
        if (pthread_create(&id, NULL, load, NULL))
            return 1;
    }
    while (read(0, &c, 1) == 1) {
        int odd = 0;
        if (c != '\n')
            continue;
        for (int i = 0; i < 200; i++)
            odd += random() & 1;
        int n = snprintf(text, sizeof text, "%lu %s\n", ++answers, odd == 200 ? "odd" : "mixed");
        if (write(1, text, (size_t)n) != n)
            return 1;
    }
    fprintf(stderr, "%lu calls\n", calls);
    return 0;
}
