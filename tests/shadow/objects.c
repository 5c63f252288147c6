/* Objects that live on while patches give them a field: -DV=1 has none, 2 counts the calls of each, 3 tells twice the count. With -DLIBRARY a
   library of examples/inside.rs. It answers `new K`, `call K`, `free K` and `count` with `NUMBER TEXT`. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>
struct object { long id; };
/* the next object of a number is where the last one was */
static struct object pool[100];
static struct object *objects[100];
#if V > 1
#pragma GCC visibility push(hidden)
#include "livepatch.h"
#pragma GCC visibility pop
#define CALLS 0x0b1ec75ca115f1e1u
static int make(void *object, void *data, void *with)
{
    *(long *)data = (long)with;
    return object == NULL;
}
#endif
__attribute__((noipa)) long handle(struct object *o)
{
#if V > 1
    long *calls = livepatch_shadow_get_or_attach(o, CALLS, sizeof *calls, make, (void *)100);
    if (!calls) return -1;
    *calls += 1;
    return o->id * 1000 + *calls * (V - 1);
#else
    return o->id * 1000;
#endif
}
__attribute__((noipa)) void end(long k)
{
#if V > 1
    livepatch_shadow_drop_all_of(objects[k]);
#endif
    objects[k] = NULL;
}
__attribute__((noipa)) long count(void)
{
#if V > 1
    size_t objects, bytes;
    livepatch_shadow_count(CALLS, &objects, &bytes);
    return (long)(objects * 1000 + bytes);
#else
    static volatile long none;
    return none + none;
#endif
}
#if V > 2
/* with it the field goes */
int livepatch_post_revert(void)
{
    livepatch_shadow_detach_all(CALLS, NULL);
    return 0;
}
#endif
static const char *answer(const char *line)
{
    static char out[100];
    const char *space = strchr(line, ' ');
    long k = space ? atol(space + 1) % 100 : 0, said = 0;
    switch (line[0] * 256 + line[1]) {
    case 'n' * 256 + 'e': pool[k].id = k, objects[k] = &pool[k]; break;
    case 'c' * 256 + 'a': said = objects[k] ? handle(objects[k]) : -2; break;
    case 'f' * 256 + 'r': end(k); break;
    case 'c' * 256 + 'o': said = count(); break;
    }
    snprintf(out, sizeof out, "%ld", said);
    return out;
}
#ifdef LIBRARY
void start(void *(*enter)(unsigned long), void (*leave)(void *)) { (void)enter; (void)leave; }
const char *ask(const char *line) { return answer(line); }
#else
int main(void)
{
    char line[64], out[200];
    static long calls;
    /* what the store imports, the program does */
    void *volatile imported[] = { (void *)calloc, (void *)free };
    (void)imported;
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
