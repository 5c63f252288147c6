//! Old and new code side by side: `--consistency entry` and `--leave-running`, and when they are refused.

mod support;

use std::fs;
use std::path::PathBuf;
use std::process::Command;

use support::program::Program;
use support::{build_patch, livepatch, run, scratch, Ran};

type Outcome = Result<(), String>;

/// The main thread never leaves `serve`, which changes, too.
const LOOP: &str = r#"
#include <stdio.h>
#include <unistd.h>
__attribute__((noipa)) long fee(long x) { return x * FEE / 1000; }
__attribute__((noipa)) void serve(volatile long *amount)
{
    char c;
    for (long n = 0; read(0, &c, 1) == 1;)
        if (c == '\n') {
            char line[64];
            int len = snprintf(line, sizeof line, "%ld fee %ld by %d\n", ++n, fee(*amount), SERVE);
            if (write(1, line, (size_t)len) != len)
                return;
        }
}
int main(void)
{
    volatile long amount = 1000;
    serve(&amount);
    return 0;
}
"#;

/// A struct that lives on the stacks of functions that all change with it, one of which a thread is always in.
const LAYOUT: &str = r#"
#include <stdio.h>
#include <unistd.h>
struct quote { MORE long price; };
__attribute__((noipa)) static long fee(struct quote q) { return q.price * FEE / 1000; }
__attribute__((noipa)) void serve(volatile long *amount)
{
    char c;
    for (long n = 0; read(0, &c, 1) == 1;)
        if (c == '\n') {
            struct quote q = {.price = *amount};
            char line[64];
            int len = snprintf(line, sizeof line, "%ld fee %ld by %d\n", ++n, fee(q), SERVE);
            if (write(1, line, (size_t)len) != len)
                return;
        }
}
int main(void)
{
    volatile long amount = 1000;
    serve(&amount);
    return 0;
}
"#;

/// The loop of `count` begins with its first instruction.
const BRANCHES: &str = r#"
#include <stdio.h>
#include <unistd.h>
__attribute__((noipa, optimize("align-loops=1"))) void count(long n, volatile long *x)
{
    do
        *x += STEP;
    while (--n);
}
int main(void)
{
    char c;
    for (long n = 0; read(0, &c, 1) == 1;)
        if (c == '\n') {
            volatile long x;
            char line[64];
            int len = snprintf(line, sizeof line, "%ld count %ld\n", ++n, (x = 0, count(3, &x), x));
            if (write(1, line, (size_t)len) != len)
                return 1;
        }
    return 0;
}
"#;

struct Case {
    program: Program,
    fix: PathBuf,
}

impl Case {
    fn new(name: &str, source: &str, old: &[&str], new: &[&str]) -> Result<Self, String> {
        let dir = scratch("beside").join(name);
        fs::create_dir_all(&dir).map_err(|e| e.to_string())?;
        fs::write(dir.join("loop.c"), source).map_err(|e| e.to_string())?;
        for (out, more) in [("old", old), ("new", new)] {
            let common = ["-g", "-O2", "-Wl,--emit-relocs", "-Wl,--build-id", "loop.c", "-o", out];
            run(Command::new("gcc").args(common).args(more).current_dir(&dir)).expect_code(0)?;
        }
        let fix = dir.join("fix.so");
        build_patch(&dir.join("old"), &dir.join("new"), &fix).expect_code(0)?;
        Ok(Self { program: Program::start(&dir.join("old")), fix })
    }

    fn run(&self, command: &str, more: &[&str]) -> Ran {
        let (pid, fix) = (self.program.pid().to_string(), self.fix.display().to_string());
        let patch: &[&str] = if command == "apply" { &[&fix] } else { &[] };
        livepatch(&[&[command, &pid], patch, &["--timeout", "300ms"], more].concat())
    }
}

const OLD: [&str; 2] = ["-DFEE=70", "-DSERVE=1"];
const NEW: [&str; 2] = ["-DFEE=75", "-DSERVE=2"];

#[test]
fn a_loop_that_never_returns_is_left_running() -> Outcome {
    let mut case = Case::new("loop", LOOP, &OLD, &NEW)?;
    case.program.ask("fee 70 by 1")?;
    case.run("apply", &[]).expect_code(4)?.expect_says(&["serve"])?;
    let check = livepatch(&["check", &case.program.pid().to_string(), &case.fix.display().to_string()]);
    if !check.expect_code(0)?.stdout.contains("is inside serve") {
        return Err(format!("check does not tell who is inside: {}", check.both()));
    }
    for how in [&["--leave-running", "serve"][..], &["--consistency", "entry"]] {
        case.run("apply", how).expect_code(0)?;
        case.program.ask("fee 75 by 1")?;
        case.run("revert", &[]).expect_code(0)?;
        case.program.ask("fee 70 by 1")?;
    }
    case.run("apply", &["--leave-running", "fee"]).expect_code(4)?.expect_says(&["serve"])?;
    let nobody = case.run("apply", &["--leave-running", "nobody"]);
    nobody.expect_code(3)?.expect_says(&["replaces no function nobody"])?;
    case.run("apply", &["--consistency", "entry"]).expect_code(0)?;
    case.run("revert", &["--consistency", "entry"]).expect_code(0)?;
    case.program.ask("fee 70 by 1")
}

#[test]
fn a_layout_that_changed_must_change_at_once() -> Outcome {
    let (old, new) = ([&OLD[..], &["-DMORE="]].concat(), [&NEW[..], &["-DMORE=long id;"]].concat());
    let mut case = Case::new("layout", LAYOUT, &old, &new)?;
    case.program.ask("fee 70 by 1")?;
    for how in [&["--leave-running", "serve"][..], &["--consistency", "entry"]] {
        case.run("apply", how).expect_code(3)?.expect_says(&["quote", "--consistency stack"])?;
    }
    case.program.ask("fee 70 by 1")
}

#[test]
fn a_body_that_branches_to_its_entry_is_not_left() -> Outcome {
    let mut case = Case::new("branches", BRANCHES, &["-DSTEP=2"], &["-DSTEP=5"])?;
    case.program.ask("count 6")?;
    case.run("apply", &["--consistency", "entry"]).expect_code(3)?.expect_says(&["count", "its own entry"])?;
    case.run("apply", &[]).expect_code(0)?;
    case.program.ask("count 15")
}
