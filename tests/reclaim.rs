//! Reverted patches are taken out of memory, once nothing leads to them; whatever holds an address of them keeps them.

mod support;

use std::path::PathBuf;
use std::process::Command;

use support::program::Program;
use support::{build_patch, livepatch, run, scratch, Ran};

type Outcome = Result<(), String>;

/// The fix hands out addresses of its own in every way that a program has; `drop` of either version forgets them.
const SOURCE: &str = r#"
#include <setjmp.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/mman.h>
#include <unistd.h>
static const char *volatile held;
static char *heap, *locked;
static int epoll, end[2];
long calls;
#if V == 2
static int table[4] = { 2, 2, 2, 2 };
__attribute__((noipa)) static void handler(int s) { table[s & 3]++; }
__attribute__((noipa)) static void at_exit(void) { table[0]++; }
#endif
__attribute__((noipa)) long version(void) { return V; }
__attribute__((noipa)) void answer(const char *what)
{
    if (!strcmp(what, "drop")) {
        held = 0;
        memset(heap, 0, 64);
        mprotect(locked, 4096, PROT_READ | PROT_WRITE);
        memset(locked, 0, 64);
        signal(SIGUSR1, SIG_DFL);
        epoll_ctl(epoll, EPOLL_CTL_DEL, end[0], 0);
    }
#if V == 2
    const char *text = (const char *)table;
    if (!strcmp(what, "global")) held = text;
    if (!strcmp(what, "heap")) memcpy(heap + 3, &text, 8);
    if (!strcmp(what, "locked")) { memcpy(locked, &text, 8); mprotect(locked, 4096, PROT_NONE); }
    if (!strcmp(what, "signal")) signal(SIGUSR1, handler);
    if (!strcmp(what, "epoll")) {
        struct epoll_event e = { .events = EPOLLIN, .data.ptr = table + 1 };
        epoll_ctl(epoll, EPOLL_CTL_ADD, end[0], &e);
        memset(&e, 0, sizeof e);
        __asm__ volatile("" :: "r"(&e) : "memory");
    }
    if (!strcmp(what, "atexit")) atexit(at_exit);
#endif
    char line[64];
    int n = snprintf(line, sizeof line, "%ld v%ld\n", ++calls, version());
    if (write(1, line, (size_t)n) != n)
        _exit(1);
}
int main(void)
{
    char line[64];
    heap = calloc(1, 64);
    locked = mmap(0, 4096, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    epoll = epoll_create1(0);
    if (pipe(end) || locked == MAP_FAILED)
        return 1;
    for (size_t n = 0; read(0, line + n, 1) == 1;) {
        if (line[n] != '\n') { n = n < 60 ? n + 1 : n; continue; }
        line[n] = 0;
        n = 0;
        answer(line);
    }
    return 0;
}
"#;

struct Place {
    fix: PathBuf,
    program: Program,
}

impl Place {
    fn new(name: &str, flags: &[&str]) -> Result<Self, String> {
        let dir = scratch("reclaim").join(name);
        std::fs::create_dir_all(&dir).map_err(|e| e.to_string())?;
        std::fs::write(dir.join("held.c"), SOURCE).map_err(|e| e.to_string())?;
        for version in ["1", "2"] {
            let common = ["-g", "-O2", "-w", "-Wl,--emit-relocs", "-Wl,--build-id", "held.c", "-o"];
            let mut command = Command::new("gcc");
            command.args(common).arg(format!("v{version}")).arg(format!("-DV={version}")).args(flags);
            run(command.current_dir(&dir)).expect_code(0)?;
        }
        let fix = dir.join("fix.so");
        build_patch(&dir.join("v1"), &dir.join("v2"), &fix).expect_code(0)?;
        Ok(Self { fix, program: Program::start(&dir.join("v1")) })
    }

    fn run(&self, command: &str, more: &[&str]) -> Ran {
        let pid = self.program.pid().to_string();
        livepatch(&[&[command, &pid], more].concat())
    }

    fn apply(&self) -> Result<(), String> {
        self.run("apply", &[&self.fix.display().to_string()]).expect_code(0).map(drop)
    }

    fn maps(&self) -> Result<usize, String> {
        let maps = std::fs::read_to_string(format!("/proc/{}/maps", self.program.pid())).map_err(|e| e.to_string())?;
        Ok(maps.lines().count())
    }

    /// The fix does `what`; then it can't be taken away, for `why`, until that is undone.
    fn kept(&mut self, what: &str, why: &str) -> Result<(), String> {
        self.apply()?;
        self.program.tell(what, "v2")?;
        self.run("revert", &["--reclaim"]).expect_code(3)?.expect_says(&["patch fix", why])?;
        self.program.tell("on", "v1")?;
        let before = self.maps()?;
        self.run("revert", &["--reclaim"]).expect_code(3)?.expect_says(&[why])?;
        assert_eq!(self.maps()?, before, "{what}: nothing of ours may stay behind");
        Ok(())
    }
}

#[test]
fn nothing_that_is_held_is_taken_away() -> Outcome {
    let mut p = Place::new("held", &["-Wl,--no-as-needed", "-lgcc_s"])?;
    p.program.tell("on", "v1")?;
    let fresh = p.maps()?;
    p.run("revert", &["--reclaim"]).expect_code(0)?.expect_prints(&["nothing to reclaim"])?;
    p.apply()?;
    p.run("revert", &["nobody", "--reclaim"]).expect_code(1)?;
    for (what, why) in [
        ("global", "held.c"),
        ("heap", "[heap]"),
        ("locked", "anonymous memory"),
        ("signal", "signal 10"),
        ("epoll", "epoll"),
    ] {
        let why = if what == "global" { "an address is held" } else { why };
        p.kept(what, why)?;
        p.program.tell("drop", "v1")?;
        let ran = p.run("revert", &["--reclaim"]);
        ran.expect_code(0)?.expect_prints(&["reclaimed", "of fix"])?;
        assert_eq!(p.maps()?, fresh, "{what}: all of it is gone");
        let status = p.run("status", &["--json"]);
        status.expect_code(0)?.expect_prints(&["\"patches\":[]"])?;
    }
    // In disguise, and for good.
    p.kept("atexit", "an address is held")?;
    p.program.tell("drop", "v1")?;
    p.run("revert", &["--reclaim"]).expect_code(3)?.expect_says(&["an address is held"])?;
    p.program.finish()
}

#[test]
fn memory_does_not_grow_with_other_patches() -> Outcome {
    let mut p = Place::new("cycles", &[])?;
    p.program.tell("on", "v1")?;
    let fresh = p.maps()?;
    for _ in 0..20 {
        p.apply()?;
        p.program.tell("on", "v2")?;
        p.run("revert", &["--all", "--reclaim"]).expect_code(0)?.expect_prints(&["reverted patch fix", "reclaimed"])?;
        p.program.tell("on", "v1")?;
        assert_eq!(p.maps()?, fresh);
    }
    p.program.finish()
}
