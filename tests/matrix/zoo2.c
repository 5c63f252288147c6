/* The other unit. */
#include "zoo.h"

__thread long shared_tls = 70;
long shared_counter = 5;
const long shared_table[4] = {1, 20, 300, 4000};

/* Statics that have the names of those in the first unit. */
static long count;
static long step(long x) { return x * 5 + 1; }
KEEP long other_count(long x)
{
    count += x;
    return count + step(x);
}
KEEP long other_local(long x)
{
    static long calls = 40;
    return x + ++calls + W(0);
}
KEEP long helper_of_other(long x) { return x ^ 0x55; }
KEEP const char *other_text(long x) { return x > 5 ? "text of both units" : "of both units"; }
