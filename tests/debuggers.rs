//! gdb and perf name the functions of a patch: in the process, and in its core file; and backtraces go on to main.

mod support;

use std::fs;
use std::process::Command;

use support::program::Program;
use support::{build_patch, livepatch, run, scratch};

type Outcome = Result<(), String>;

/// The changed function waits for a line in a callee that is unchanged.
const SOURCE: &str = r#"
#include <stdio.h>
#include <unistd.h>
static volatile long thousand = 1000;
long answers;
__attribute__((noipa)) int next_line(void)
{
    char c;
    while (read(0, &c, 1) == 1)
        if (c == '\n')
            return 1;
    return 0;
}
__attribute__((noipa)) int serve_one(volatile long *amount)
{
    char line[64];
    volatile long fee = *amount * FEE / 1000;
    if (!next_line())
        return 0;
    int n = snprintf(line, sizeof line, "%ld fee %ld\n", ++answers, fee);
    return write(1, line, (size_t)n) == n;
}
int main(void)
{
    while (serve_one(&thousand))
        ;
    return 0;
}
"#;

#[test]
fn debuggers_name_what_a_patch_brought() -> Outcome {
    if run(Command::new("sh").args(["-c", "command -v gdb"])).code != 0 {
        println!("skip: no gdb");
        return Ok(());
    }
    let dir = scratch("debuggers");
    fs::write(dir.join("serve.c"), SOURCE).map_err(|e| e.to_string())?;
    for (out, fee) in [("old", "-DFEE=70"), ("new", "-DFEE=75")] {
        let flags = ["-g", "-O2", "-Wl,--emit-relocs", "-Wl,--build-id", "serve.c", "-o", out, fee];
        run(Command::new("gcc").args(flags).current_dir(&dir)).expect_code(0)?;
    }
    let fix = dir.join("fix.so");
    build_patch(&dir.join("old"), &dir.join("new"), &fix).expect_code(0)?;
    let mut program = Program::start(&dir.join("old"));
    program.ask("fee 70")?;
    let pid = program.pid().to_string();
    livepatch(&["apply", &pid, &fix.display().to_string(), "--consistency", "entry"]).expect_code(0)?;
    program.ask("fee 70")?; // the call that had begun
    program.ask("fee 75")?;

    let place = dir.display().to_string();
    let names = |text: &str, where_: &str| {
        let wanted = ["next_line", "serve_one", "main"];
        let lines: Vec<&str> = text.lines().filter(|l| l.starts_with('#')).collect();
        let at: Vec<_> = wanted.iter().map(|w| lines.iter().position(|l| l.contains(w))).collect();
        match at.iter().all(Option::is_some) && at.is_sorted() {
            true => Ok(()),
            false => Err(format!("{where_}: the backtrace does not name {wanted:?} in order:\n{text}")),
        }
    };
    let script = dir.join("patch.gdb");
    let commands = livepatch(&["symbols", &pid, "--dir", &place]).expect_code(0)?.stdout.clone();
    fs::write(&script, &commands).map_err(|e| e.to_string())?;
    let gdb = |more: &[&str]| {
        let mut command = Command::new("gdb");
        run(command
            .args(["-batch", "-nx", "-ex", "set confirm off"])
            .args(more)
            .arg("-x")
            .arg(&script)
            .args(["-ex", "backtrace"]))
    };
    let live = gdb(&["-p", &pid]);
    names(&live.stdout, "the process")?;

    let core = dir.join("core");
    let dump =
        ["-batch", "-nx", "-p", &pid, "-ex", &format!("generate-core-file {}", core.display())].map(str::to_owned);
    run(Command::new("gdb").args(dump)).expect_code(0)?;
    program.ask("fee 75")?;
    let core = core.display().to_string();
    let commands = livepatch(&["symbols", &core, "--dir", &place]).expect_code(0)?.stdout.clone();
    fs::write(&script, &commands).map_err(|e| e.to_string())?;
    let old = dir.join("old").display().to_string();
    names(&gdb(&[&old, &core]).stdout, "the core file")?;

    let perf = livepatch(&["symbols", &pid, "--perf"]).expect_code(0)?.stdout.clone();
    let line = perf.lines().find(|l| l.contains("serve_one [fix]")).ok_or(format!("the perf map says {perf:?}"))?;
    let words: Vec<&str> = line.split(' ').collect();
    if words[..2].iter().any(|w| u64::from_str_radix(w, 16).is_err()) {
        return Err(format!("no line of a perf map: {line}"));
    }
    livepatch(&["symbols", &fix.display().to_string()]).expect_code(1)?.expect_says(&["no core file"])?;
    program.finish()
}
