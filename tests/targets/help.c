/* Puts the text mapping that holds an address into anonymous memory, and asks for huge pages; and a library to be patched. */
#define _GNU_SOURCE
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

void remap_text(void *code)
{
    FILE *maps = fopen("/proc/self/maps", "r");
    char line[512];
    unsigned long start, end;
    while (fgets(line, sizeof line, maps)) {
        if (sscanf(line, "%lx-%lx", &start, &end) != 2 || (unsigned long)code < start || (unsigned long)code >= end)
            continue;
        size_t len = end - start;
        char *copy = mmap(NULL, len, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        memcpy(copy, (void *)start, len);
        madvise(copy, len, MADV_HUGEPAGE);
        if (mprotect(copy, len, PROT_READ | PROT_EXEC) || mremap(copy, len, len, MREMAP_MAYMOVE | MREMAP_FIXED, start) == MAP_FAILED)
            abort();
        break;
    }
    fclose(maps);
}
