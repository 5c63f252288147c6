/* A library of examples/inside.rs whose threads allocate and free all the time, by code that is patched: as many bytes live as at the start,
   in blocks of ever other sizes. -DVERSION=1 is what runs; 2, 3 and 4 are what patches lead to. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <malloc.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum { THREADS = 3, SLOTS = 16384, TURN = 200 };

struct block {
    unsigned size;
    unsigned version;
    char text[];
};

static volatile long live, calls;
static struct block *slots[THREADS][SLOTS];

__attribute__((noipa)) unsigned version(void)
{
    return VERSION;
}

/* How long a block is to be: on average the same in each version. */
__attribute__((noipa)) unsigned size_of(unsigned random)
{
    unsigned small = 16 + random % 240, large = random % 16 == 0 ? random % (2048 * VERSION) / VERSION : 0;
    return small + large;
}

#if VERSION > 1
__attribute__((noipa)) static void label(struct block *b)
{
    static long labels;
    labels++;
    snprintf(b->text, b->size, "version %d", VERSION);
}
#endif

__attribute__((noipa)) struct block *make(unsigned random)
{
    unsigned size = size_of(random);
    struct block *b = malloc(sizeof *b + size);
    if (!b) abort();
    b->size = size;
    b->version = version();
#if VERSION > 1
    label(b);
#endif
    __atomic_fetch_add(&live, (long)(sizeof *b + size), __ATOMIC_RELAXED);
    return b;
}

__attribute__((noipa)) void end(struct block *b)
{
    __atomic_fetch_sub(&live, (long)(sizeof *b + b->size), __ATOMIC_RELAXED);
    free(b);
}

static unsigned next(unsigned *state)
{
    *state ^= *state << 13, *state ^= *state >> 17, *state ^= *state << 5;
    return *state;
}

static void *work(void *arg)
{
    long own = (long)arg;
    unsigned state = 12345 + 77 * (unsigned)own;
    for (;;) {
        for (int i = 0; i < TURN; i++) {
            unsigned random = next(&state);
            struct block **slot = &slots[own][random % SLOTS];
            if (*slot) end(*slot);
            *slot = make(next(&state));
        }
        __atomic_fetch_add(&calls, TURN, __ATOMIC_RELAXED);
        usleep(500);
    }
    return NULL;
}

void start(void *(*enter)(unsigned long), void (*leave)(void *))
{
    (void)enter;
    (void)leave;
    pthread_t t;
    void *volatile imported[] = { (void *)malloc, (void *)free, (void *)memset, (void *)snprintf };
    (void)imported;
    for (long i = 0; i < THREADS; i++) {
        unsigned state = 999 + (unsigned)i;
        for (int k = 0; k < SLOTS; k++) slots[i][k] = make(next(&state));
        pthread_create(&t, NULL, work, (void *)i);
    }
}

/* What the allocator has given out, and what it holds, as it says itself; -1 where it does not. */
static void figures(long *given, long *held)
{
    int (*mallctl)(const char *, void *, size_t *, void *, size_t) = dlsym(RTLD_DEFAULT, "mallctl");
    int (*property)(const char *, size_t *) = dlsym(RTLD_DEFAULT, "MallocExtension_GetNumericProperty");
    size_t g = 0, h = 0, len = sizeof g;
    *given = *held = -1;
    if (mallctl) {
        unsigned long epoch = 1;
        mallctl("epoch", NULL, NULL, &epoch, sizeof epoch);
        if (mallctl("stats.allocated", &g, &len, NULL, 0) || mallctl("stats.resident", &h, &len, NULL, 0)) return;
    } else if (property) {
        size_t unmapped = 0;
        if (!property("generic.current_allocated_bytes", &g) || !property("generic.heap_size", &h)) return;
        property("tcmalloc.pageheap_unmapped_bytes", &unmapped);
        h -= unmapped;
    } else if (dlsym(RTLD_DEFAULT, "mi_malloc")) {
        return;
    } else {
        struct mallinfo2 m = mallinfo2();
        g = m.uordblks + m.hblkhd, h = m.arena + m.hblkhd;
    }
    *given = (long)g, *held = (long)h;
}

const char *ask(const char *question)
{
    static char out[200];
    long given, held;
    (void)question;
    figures(&given, &held);
    snprintf(out, sizeof out, "%u %ld %ld %ld %ld", version(), live, calls, given, held);
    return out;
}
