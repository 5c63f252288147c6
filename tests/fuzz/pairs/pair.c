/* gcc -g -O2 -Wl,--emit-relocs -Wl,--build-id -DFACTOR=3 -o old pair.c; with -DFACTOR=5 -DEXTRA: new */
#include <stdio.h>
#include <stdlib.h>
long limit = 7;
static long calls;
static const double rates[4] = {0.5, 1.5, 2.5, FACTOR};
struct order { long quantity; int side; };
__attribute__((noinline)) static const char *side(int s)
{
    switch (s) {
    case 1: return "buy";
    case 2: return "sell";
    case 3: return "short";
    case 4: return "cross";
    case 5: return "quote";
    }
    return "none";
}
__attribute__((noinline)) static long twice(long n) { return calls & 1 ? n * FACTOR : limit; }
__attribute__((noinline)) long fee(struct order *o)
{
    calls++;
    printf("%s %ld\n", side(o->side), calls);
#ifdef EXTRA
    if (o->quantity > 1000)
        printf("large: %ld\n", o->quantity);
#endif
    return (long)(o->quantity * rates[o->side & 3]) + twice(limit);
}
__attribute__((noinline)) static int compare(const void *a, const void *b) { return *(const int *)a - *(const int *)b - FACTOR; }
int main(int argc, char **argv)
{
    int list[3] = {argc, 2, 1};
    qsort(list, 3, sizeof *list, compare);
    struct order o = {list[0], atoi(argv[argc - 1])};
    return (int)fee(&o);
}
