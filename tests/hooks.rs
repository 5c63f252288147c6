//! Hooks run in the process, on a thread of their own: before and after an apply and a revert; the first may say no.

mod support;

use std::path::PathBuf;
use std::process::Command;

use support::program::Program;
use support::{build_patch_with, livepatch, run, scratch, Ran};

type Outcome = Result<(), String>;

/// Its answer tells what the hooks left: which ran, in order, and whether each was alone on a thread that is not the program's.
const SOURCE: &str = r#"
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>
char trace[256] = "-";
volatile long limit = 5;
pthread_t main_thread;
static long calls;
__attribute__((noipa)) long version(void) { return V; }
/* old and new threads all the time: some are borrowed, some are in the way */
static void *sleeper(void *p) { for (;;) usleep(2000); return p; }
int main(void)
{
    char line[64];
    main_thread = pthread_self();
    /* what the hooks import, the program does */
    void *volatile imported[] = { (void *)strdup, (void *)free, (void *)strcat, (void *)usleep };
    (void)imported;
    pthread_t t;
    for (int i = 0; i < 3; i++) pthread_create(&t, 0, sleeper, 0);
    while (read(0, line, 1) == 1) {
        size_t n = 0;
        while (line[n] != '\n' && read(0, line + ++n, 1) == 1) {}
        line[n] = 0;
        if (!strncmp(line, "limit ", 6)) limit = atol(line + 6);
        char out[400];
        int len = snprintf(out, sizeof out, "%ld v%ld %s\n", ++calls, version(), trace);
        if (write(1, out, (size_t)len) != len) return 1;
    }
    return 0;
}
"#;

const HOOKS: &str = r#"
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>
extern char trace[256];
extern volatile long limit;
extern pthread_t main_thread;
static int ran;
static int at(const char *what)
{
    /* an allocation and a lock of the library: a thread of its own may */
    char *copy = strdup(what);
    strcat(trace, pthread_equal(pthread_self(), main_thread) ? "MAIN" : copy);
    free(copy);
    ran++;
    return 0;
}
int livepatch_pre_apply(void) { if (limit == 99) for (;;) usleep(1000); at("a"); return limit > 0 ? 0 : 7; }
int livepatch_post_apply(void) { at("A"); return limit == 6 ? 3 : 0; }
int livepatch_pre_revert(void) { return at("r"); }
int livepatch_post_revert(void) { return at("R"); }
"#;

struct Place {
    fix: PathBuf,
    program: Program,
}

impl Place {
    fn new(name: &str) -> Result<Self, String> {
        let dir = scratch("hooks").join(name);
        std::fs::create_dir_all(&dir).map_err(|e| e.to_string())?;
        let write = |file: &str, text: &str| std::fs::write(dir.join(file), text).map_err(|e| e.to_string());
        write("program.c", SOURCE)?;
        write("hooks.c", HOOKS)?;
        for version in ["1", "2"] {
            let flags = ["-g", "-O2", "-w", "-pthread", "-Wl,--emit-relocs", "-Wl,--build-id", "program.c", "-o"];
            let mut command = Command::new("gcc");
            command.args(flags).arg(format!("v{version}")).arg(format!("-DV={version}"));
            run(command.current_dir(&dir)).expect_code(0)?;
        }
        let mut command = Command::new("gcc");
        run(command.args(["-c", "-O2", "-fPIC", "hooks.c"]).current_dir(&dir)).expect_code(0)?;
        let (fix, hooks) = (dir.join("fix.so"), dir.join("hooks.o"));
        let more = ["--hooks".as_ref(), hooks.as_os_str()];
        build_patch_with(&dir.join("v1"), &dir.join("v2"), &fix, &more).expect_code(0)?;
        Ok(Self { fix, program: Program::start(&dir.join("v1")) })
    }

    fn run(&self, command: &str, more: &[&str]) -> Ran {
        let pid = self.program.pid().to_string();
        livepatch(&[&[command, &pid], more].concat())
    }

    fn apply(&self, more: &[&str]) -> Ran {
        self.run("apply", &[&[self.fix.to_str().unwrap_or_default()], more].concat())
    }

    fn maps(&self) -> Result<usize, String> {
        let maps = std::fs::read_to_string(format!("/proc/{}/maps", self.program.pid())).map_err(|e| e.to_string())?;
        // Stacks and heaps of threads come and go.
        Ok(maps.lines().filter(|l| l.contains("r-xp") && l.ends_with(" 0 ")).count())
    }
}

#[test]
fn hooks_run_around_apply_and_revert() -> Outcome {
    let mut p = Place::new("around")?;
    p.program.tell("?", "v1 -")?;
    p.apply(&[]).expect_code(0)?;
    p.program.tell("?", "v2 -aA")?;
    p.run("revert", &[]).expect_code(0)?;
    p.program.tell("?", "v1 -aArR")?;
    // What a hook that may not refuse returns is told, and changes nothing.
    p.program.tell("limit 6", "v1 -aArR")?;
    p.apply(&[]).expect_code(0)?.expect_says(&["livepatch_post_apply returned 3"])?;
    p.program.tell("?", "v2 -aArRaA")?;
    p.run("revert", &["--reclaim"]);
    p.program.tell("?", "v1 -aArRaArR")?;
    p.program.finish()
}

#[test]
fn the_first_hook_may_say_no() -> Outcome {
    let mut p = Place::new("no")?;
    p.program.tell("limit 0", "v1 -")?;
    let before = p.maps()?;
    for _ in 0..3 {
        p.apply(&[]).expect_code(3)?.expect_says(&["livepatch_pre_apply says no", "returned 7"])?;
    }
    assert_eq!(p.maps()?, before, "nothing of the patch is left");
    p.program.tell("limit 5", "v1 -aaa")?;
    p.apply(&[]).expect_code(0)?;
    p.program.tell("?", "v2 -aaaaA")?;
    p.program.finish()
}

#[test]
fn a_hook_that_does_not_return_is_left_alone() -> Outcome {
    let mut p = Place::new("late")?;
    p.program.tell("limit 99", "v1 -")?;
    p.apply(&["--timeout", "500ms"]).expect_code(4)?.expect_says(&["livepatch_pre_apply had not returned"])?;
    p.program.tell("?", "v1 -")?;
    // While it runs, its code stays.
    p.apply(&["--timeout", "500ms"]).expect_code(4)?.expect_says(&["a hook of fix still runs"])?;
    p.run("status", &[]).expect_code(0)?;
    p.program.tell("?", "v1 -")?;
    Ok(())
}
