/* hold PID: seizes a process as a debugger would, says "held", and keeps it until its own input ends. */
#include <stdio.h>
#include <stdlib.h>
#include <sys/ptrace.h>
int main(int argc, char **argv)
{
    if (argc != 2 || ptrace(PTRACE_SEIZE, atoi(argv[1]), 0, 0)) {
        perror("hold");
        return 1;
    }
    puts("held");
    fflush(stdout);
    getchar();
    return 0;
}
