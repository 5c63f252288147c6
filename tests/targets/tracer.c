/* Another tracer: attaches, says so, and keeps the process until it is killed. */
#include <stdio.h>
#include <stdlib.h>
#include <sys/ptrace.h>
#include <sys/wait.h>
#include <unistd.h>

int main(int argc, char **argv)
{
    int pid = argc > 1 ? atoi(argv[1]) : 0;
    if (ptrace(PTRACE_SEIZE, pid, 0, 0))
        return 1;
    puts("attached");
    fflush(stdout);
    for (;;)
        pause();
}
