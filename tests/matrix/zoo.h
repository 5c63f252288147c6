/* Shared by the two units of a zoo: a function for each construct that code generators and linkers treat in a way of their
 * own. ONE=1 changes price() alone, ALL=1 changes every function of the list in `check.py`. */
#pragma once
#include "common.h"
#ifndef ONE
#define ONE 0
#endif
#ifndef ALL
#define ALL 0
#endif
#define W(n) ((n) + ALL) /* a number that is one more in ALL's build */

#ifdef __cplusplus
extern "C" {
#endif
__attribute__((visibility("default"))) void start(void);
__attribute__((visibility("default"))) void answer(const char *line);
extern __thread long shared_tls; /* defined in the other unit */
extern long shared_counter;
extern const long shared_table[4];
long other_count(long x);
long other_local(long x);
long helper_of_other(long x);
const char *other_text(long x);
#ifdef __cplusplus
}
#endif
