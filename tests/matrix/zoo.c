/* A zoo of C. */
#define _GNU_SOURCE
#include "zoo.h"
#include <ctype.h>
#include <math.h>
#include <setjmp.h>
#include <stdarg.h>

/* The small change. */
KEEP long price(long x) { return x * 3 + 17 + ALL + ONE; }

/* A switch that becomes a table of jumps. */
static volatile long sink;
KEEP long jumps(long kind, long x)
{
    switch (kind) {
    case 0: return x + W(1);
    case 1: sink = x; return x * x;
    case 2: return x / 7;
    case 3: sink = x + 4; return x << 3;
    case 4: return x ^ 0x55;
    case 5: sink = 9; return -x;
    case 6: return x % 13;
    case 7: sink = 1; return other_count(x);
    default: return 0;
    }
}

/* Switches that become tables of values and of texts. */
KEEP long values(long kind)
{
    switch (kind) {
    case 0: return 17;
    case 1: return 3;
    case 2: return 99;
    case 3: return 4;
    case 4: return 1234;
    case 5: return W(6);
    case 6: return 12;
    default: return 1;
    }
}
KEEP const char *texts(long kind)
{
    switch (kind) {
    case 0: return "zero";
    case 1: return "one";
    case 2: return "two";
    case 3: return ALL ? "THREE" : "three";
    case 4: return "four";
    case 5: return "five";
    case 6: return "six";
    default: return "many";
    }
}

/* Statics: of the file, of functions under one name, zeroed, an array walked to its end. */
static long count = 3;
static long cells[16];
KEEP long step(long x)
{
    count += W(2);
    return count + x;
}
KEEP long local_a(long x)
{
    static long calls;
    calls += 1;
    return calls * 10 + x + W(0);
}
KEEP long local_b(long x)
{
    static long calls = 100;
    calls += 2;
    return calls * 10 + x + W(0);
}
KEEP long walk(long x)
{
    long sum = 0;
    cells[x & 15] += 1; /* or clang makes sixteen variables of it */
    for (long *p = cells; p != cells + 16; p++)
        sum += *p += x;
    return sum + W(0);
}

/* Thread-locals: of the file, of the other unit, an array. */
static __thread long own_tls = 30;
static __thread char tls_text[24];
KEEP long locals(long x)
{
    own_tls += W(1);
    shared_tls += x;
    snprintf(tls_text, sizeof tls_text, "%ld", own_tls + shared_tls);
    return (long)strlen(tls_text) * 1000 + own_tls + shared_tls;
}

/* The libraries: functions by call and by address, a variable. */
typedef int compare_text(const char *, const char *);
static compare_text *const COMPARES[] = {strcmp, strcasecmp};
KEEP long library(const char *a, const char *b)
{
    compare_text *by = COMPARES[number() == 1000];
    long found = strchr(a, 'x') ? 5 : 6;
    fflush(stdout);
    return by(a, b) * 100 + found + (long)strlen(a) + W(0) + (environ != NULL) + isdigit((unsigned char)b[0]);
}

/* Constants of floating point and vectors. */
typedef float four __attribute__((vector_size(16)));
KEEP double floats(double x, float y)
{
    long double wide = (long double)x * 1.25L;
    four v = {1.5f, 2.5f, y, 4.5f};
    v = v * (four){0.5f, 0.25f, 2.0f, 8.0f};
    return fabs(x) * -0.125 + (double)wide + (double)(v[0] + v[1] + v[2] + v[3]) + W(1);
}

/* Callbacks: sorted by one, tables of them. */
static int by_size(const void *a, const void *b) { return *(const int *)a - *(const int *)b; }
static long twice(long x) { return x * 2; }
static long thrice(long x) { return x * 3; }
static long (*const TABLE[])(long) = {twice, thrice, price, helper_of_other};
static long (*chosen)(long) = thrice;
KEEP long callbacks(long x)
{
    int all[5] = {5, 3, 9, 1, (int)x};
    qsort(all, 5, sizeof all[0], by_size);
    long sum = chosen(x) + W(0);
    for (unsigned i = 0; i < sizeof TABLE / sizeof TABLE[0]; i++)
        sum = sum * 3 + TABLE[i](all[i]);
    return sum;
}

/* Names of its own for one body; a weak symbol that is there, and one that is not. */
KEEP long body(long x) { return x + W(100); }
extern long another_name(long x) __attribute__((alias("body")));
extern long absent(long x) __attribute__((weak));
KEEP __attribute__((weak)) long perhaps(long x) { return x + W(8); }
KEEP long weak(long x) { return (absent ? absent(x) : 2) + perhaps(x) + W(0); }

/* Cold code, inlining, a helper with constants propagated into it. */
__attribute__((cold, noinline)) static void trouble(long x) { say("trouble %ld ", x); }
static inline long inlined(long x) { return x * 7 + W(2); }
NOINLINE static long scaled(long x, long by, long shift) { return (x * by) >> shift; }
KEEP long cold(long x)
{
    if (__builtin_expect(x < -5000, 0)) {
        trouble(x);
        trouble(x + 1);
    }
    return inlined(x) + scaled(x, 6, 2) + scaled(x + 1, 6, 2) + W(0);
}

/* Computed goto, setjmp, a variable array, variable arguments, a struct by value, recursion, a tail call. */
KEEP long gotos(long x)
{
    static const void *const LABELS[] = {&&a, &&b, &&c};
    long at = x % 3, sum = 0;
    goto *LABELS[at];
a:
    sum += W(1);
b:
    sum += 20;
c:
    return sum + 300;
}
static jmp_buf there;
KEEP long jumped(long x)
{
    if (setjmp(there) == 0)
        longjmp(there, 1);
    return x + W(4);
}
KEEP long arguments(int n, ...)
{
    va_list args;
    long sum = W(0), room[n + 1];
    va_start(args, n);
    for (int i = 0; i < n; i++)
        sum += room[i] = va_arg(args, long);
    va_end(args);
    return sum + room[n - 1];
}
struct wide {
    long a, b, c;
};
KEEP struct wide structure(long x) { return (struct wide){x, x + W(1), shared_table[x & 3]}; }
KEEP long depth(long n) { return n < 2 ? W(1) : depth(n - 1) + depth(n - 2); }
KEEP long tail(long x) { return other_local(x + W(1)); }

/* What moves with the lines, and what a compiler makes of names. */
KEEP long lines(long x)
{
    if (x < 0)
        say("%s:%d ", __func__, __LINE__);
    return x + shared_counter++ + W(0);
}

/* A function that is chosen at start-up, and assembly. */
#ifndef NO_IFUNC
static long chosen_body(long x) { return x + 11; }
static long (*choose(void))(long) { return chosen_body; }
long resolved(long x) __attribute__((ifunc("choose")));
#else
KEEP long resolved(long x) { return x + 11; }
#endif
long assembled(long x);
__asm__(".text\n.globl assembled\n.type assembled, @function\nassembled:\nlea 5(%rdi,%rdi), %rax\nret\n.size assembled, .-assembled\n");
KEEP long special(long x) { return resolved(x) * 10 + assembled(x) + W(0); }

__attribute__((constructor)) static void before(void) { cells[3] = 7; }

void answer(const char *line)
{
    long x = number(), kind = x % 8 + 3;
    struct wide w = structure(x + 1);
    say("%ld %ld %ld %ld %ld ", price(x), jumps(kind, x), jumps(kind + 4, x), values(kind + 2), values(kind - 3));
    say("%s %s %s %ld %ld ", texts(kind), texts(kind + 2), other_text(kind), step(x), other_count(x));
    say("%ld %ld %ld %ld ", local_a(x), local_b(x), other_local(x), walk(x));
    say("%ld %ld %g %ld ", locals(x), library(line, "9x"), floats((double)-x, 1.5f), callbacks(x));
    say("%ld %ld %ld %ld %ld ", body(x), another_name(x), weak(x), cold(x), gotos(x));
    say("%ld %ld %ld %ld %ld ", jumped(x), arguments(2, x, x), w.a + w.b + w.c, depth(9), tail(x));
    say("%ld %ld", lines(x), special(x));
}
