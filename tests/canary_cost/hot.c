/* What a call costs: a function that does next to nothing, called a great many times with keys that look like sessions. */
#include <stdint.h>
#include <stdio.h>
#include <time.h>
__attribute__((noipa)) long fee(uint64_t session, long n) { return n + V + (long)(session & 1); }
static double now(void) { struct timespec t; clock_gettime(CLOCK_MONOTONIC, &t); return t.tv_sec * 1e9 + t.tv_nsec; }
int main(void)
{
    enum { CALLS = 20000000, ROUNDS = 9 };
    static uint64_t key[4096];
    uint64_t x = 88172645463325252ull;
    for (int i = 0; i < 4096; i++) { x ^= x << 13; x ^= x >> 7; x ^= x << 17; key[i] = x; }
    char line[16];
    while (fgets(line, sizeof line, stdin)) {
        double best = 1e9;
        volatile long sink = 0;
        for (int r = 0; r < ROUNDS; r++) {
            long sum = 0;
            double t = now();
            for (long i = 0; i < CALLS; i++) sum += fee(key[i & 4095], i);
            t = (now() - t) / CALLS;
            sink += sum;
            if (t < best) best = t;
        }
        printf("%.3f\n", best);
        fflush(stdout);
    }
    return 0;
}
