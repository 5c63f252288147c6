//! Patches that take each other's place, one after the other: V1→V2, V1→V3 after it, V1→V4 after that. What each brought stays alive:
//! its statics keep their values, functions whose address it handed out lead to the newest.

mod support;

use std::path::{Path, PathBuf};
use std::process::Command;

use support::program::Program;
use support::{build_patch_with, livepatch, run, scratch, Ran};

type Outcome = Result<(), String>;

/// From the second version on a counter, and a callback that is registered once; from the third on another counter.
const SOURCE: &str = r#"
#include <stdio.h>
#include <unistd.h>
static volatile long thousand = 1000;
static long calls;
long (*callback)(long);
#if V >= 2
static long twos;
__attribute__((noipa)) static long bonus(long x) { return x * thousand / 1000 + V; }
#endif
#if V >= 3
static long threes;
#endif
__attribute__((noipa)) void answer(void)
{
    char line[128];
    int n = snprintf(line, sizeof line, "%ld v%d", ++calls, V);
#if V >= 2
    if (!callback)
        callback = bonus;
    n += snprintf(line + n, sizeof line - n, " twos %ld held %ld same %d", ++twos, callback(thousand), callback == bonus);
#else
    if (callback)
        n += snprintf(line + n, sizeof line - n, " held %ld", callback(thousand));
#endif
#if V >= 3
    n += snprintf(line + n, sizeof line - n, " threes %ld", ++threes);
#endif
    n += snprintf(line + n, sizeof line - n, "\n");
    if (write(1, line, (size_t)n) != n)
        _exit(1);
}
int main(void)
{
    char c;
    while (read(0, &c, 1) == 1)
        if (c == '\n')
            answer();
    return 0;
}
"#;

fn build(dir: &Path, version: u32) -> Result<PathBuf, String> {
    std::fs::write(dir.join("chain.c"), SOURCE).map_err(|e| e.to_string())?;
    let out = dir.join(format!("v{version}"));
    let flags = ["-g", "-O2", "-Wl,--emit-relocs", "-Wl,--build-id", "chain.c", "-o"];
    let mut command = Command::new("gcc");
    run(command.args(flags).arg(&out).arg(format!("-DV={version}")).current_dir(dir)).expect_code(0)?;
    Ok(out)
}

struct Chain {
    dir: PathBuf,
    program: Program,
}

impl Chain {
    fn start(name: &str) -> Result<Self, String> {
        let dir = scratch("chain").join(name);
        std::fs::create_dir_all(&dir).map_err(|e| e.to_string())?;
        for version in 1..=4 {
            build(&dir, version)?;
        }
        let program = Program::start(&dir.join("v1"));
        Ok(Self { dir, program })
    }

    /// From the first version to this one, in the place of that patch.
    fn patch(&self, version: u32, after: Option<&Path>) -> Result<PathBuf, String> {
        let fix = self.dir.join(format!("fix{version}.so"));
        let after: Vec<&std::ffi::OsStr> =
            after.into_iter().flat_map(|p| ["--after".as_ref(), p.as_os_str()]).collect();
        build_patch_with(&self.dir.join("v1"), &self.dir.join(format!("v{version}")), &fix, &after).expect_code(0)?;
        Ok(fix)
    }

    fn run(&self, command: &str, fix: Option<&Path>) -> Ran {
        let (pid, fix) = (self.program.pid().to_string(), fix.map(|f| f.display().to_string()));
        let args: Vec<&str> = [command, &pid].into_iter().chain(fix.as_deref()).collect();
        livepatch(&args)
    }
}

#[test]
fn what_each_brought_stays_alive() -> Outcome {
    let mut c = Chain::start("alive")?;
    let second = c.patch(2, None)?;
    let third = c.patch(3, Some(&second))?;
    let fourth = c.patch(4, Some(&third))?;
    c.program.ask("v1")?;
    c.run("apply", Some(&fourth)).expect_code(3)?.expect_says(&["fix3"])?;
    c.run("apply", Some(&second)).expect_code(0)?;
    c.program.ask("v2 twos 1 held 1002 same 1")?;
    c.run("apply", Some(&third)).expect_code(0)?;
    c.program.ask("v3 twos 2 held 1003 same 1 threes 1")?;
    c.run("apply", Some(&fourth)).expect_code(0)?;
    c.program.ask("v4 twos 3 held 1004 same 1 threes 2")?;
    c.program.ask("v4 twos 4 held 1004 same 1 threes 3")?;
    // All the way back, and forth again: the values are where they were.
    c.run("revert", None).expect_code(0)?;
    c.program.ask("v1 held 1002")?;
    c.run("apply", Some(&second)).expect_code(0)?;
    c.program.ask("v2 twos 5 held 1002 same 1")?;
    c.run("apply", Some(&third)).expect_code(0)?;
    c.program.ask("v3 twos 6 held 1003 same 1 threes 4")?;
    c.program.finish()
}

#[test]
fn the_library_does_what_the_commands_do() -> Outcome {
    let mut c = Chain::start("library")?;
    let second = c.patch(2, None)?;
    let guarded = support::example("guarded");
    let (pid, fix) = (c.program.pid().to_string(), second.display().to_string());
    c.program.ask("v1")?;
    run(Command::new(&guarded).args([&pid, &fix, "false"]))
        .expect_code(5)?
        .expect_prints(&["applied fix2", "reverted fix2"])?;
    c.program.ask("v1")?;
    run(Command::new(&guarded).args([&pid, &fix, "true"])).expect_code(0)?.expect_prints(&["applied fix2"])?;
    c.program.ask("v2 twos 1 held 1002 same 1")?;
    c.program.finish()
}
