/* Hooks that allocate, so that a cycle has a thread of theirs, too. */
#include <stdlib.h>
#include <string.h>
static void *kept;
int livepatch_pre_apply(char *why, size_t room)
{
    (void)why;
    (void)room;
    kept = malloc(4096);
    if (kept) memset(kept, 1, 4096);
    return kept == NULL;
}
int livepatch_post_revert(void)
{
    free(kept);
    kept = NULL;
    return 0;
}
