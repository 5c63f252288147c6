//! An applied patch is current until somebody confirms it; with a limit it is reverted otherwise.

mod support;

use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use support::program::Program;
use support::{build_patch, livepatch, run, scratch, tool, Ran};

type Outcome = Result<(), String>;

const SOURCE: &str = r#"
#include <stdio.h>
__attribute__((noipa)) long fee(long n) { return n + V; }
int main(void)
{
    char line[64];
    for (long n = 1; fgets(line, sizeof line, stdin); n++) { printf("%ld %ld\n", n, fee(0)); fflush(stdout); }
    return 0;
}
"#;

struct Place {
    fix: PathBuf,
    program: Program,
}

impl Place {
    fn new(name: &str) -> Result<Self, String> {
        let dir = scratch("confirm").join(name);
        std::fs::create_dir_all(&dir).map_err(|e| e.to_string())?;
        std::fs::write(dir.join("fee.c"), SOURCE).map_err(|e| e.to_string())?;
        for version in ["1", "2"] {
            let flags = ["-g", "-O2", "-Wl,--emit-relocs", "-Wl,--build-id", "fee.c", "-o"];
            let mut command = Command::new("gcc");
            command.args(flags).arg(format!("v{version}")).arg(format!("-DV={version}"));
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

    /// Applies, and stays.
    fn watcher(&mut self, within: &str) -> Result<Child, String> {
        let mut command = Command::new(tool("livepatch"));
        command.arg("apply").arg(self.program.pid().to_string()).arg(&self.fix).args(["--confirm-within", within]);
        let child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().map_err(|e| e.to_string())?;
        self.until("unconfirmed")?;
        self.program.ask("2")?;
        Ok(child)
    }

    /// Until status says so.
    fn until(&self, words: &str) -> Result<String, String> {
        let deadline = Instant::now() + Duration::from_secs(10);
        loop {
            let status = self.run("status", &[]);
            status.expect_code(0)?;
            if status.stdout.contains(words) {
                return Ok(status.stdout);
            }
            if Instant::now() > deadline {
                return Err(format!("status does not say {words:?} within 10 s: {}", status.stdout));
            }
            std::thread::sleep(Duration::from_millis(10));
        }
    }
}

fn ended(watcher: Child, code: i32, says: &str) -> Outcome {
    let out = watcher.wait_with_output().map_err(|e| e.to_string())?;
    let both = format!("{}{}", String::from_utf8_lossy(&out.stdout), String::from_utf8_lossy(&out.stderr));
    if out.status.code() != Some(code) || !both.contains(says) {
        return Err(format!("the watcher: {}, expected {code} and {says:?}:\n{both}", out.status));
    }
    Ok(())
}

#[test]
fn what_nobody_confirms_is_reverted() -> Outcome {
    let mut p = Place::new("overdue")?;
    let fix = p.fix.display().to_string();
    p.program.ask("1")?;
    let ran = p.run("apply", &[&fix, "--confirm-within", "1s"]);
    ran.expect_code(5)?.expect_says(&["nobody confirmed"])?.expect_prints(&["reverted patch fix"])?;
    p.program.ask("1")?;
    p.program.finish()
}

#[test]
fn what_is_confirmed_stays() -> Outcome {
    let mut p = Place::new("confirmed")?;
    p.run("confirm", &["fix"]).expect_code(1)?.expect_says(&["no patch is applied"])?;
    let watcher = p.watcher("600s")?;
    p.until(&format!("unconfirmed: PID {} reverts it", watcher.id()))?;
    p.run("confirm", &["other"]).expect_code(1)?.expect_says(&["other is not applied"])?;
    p.run("confirm", &["fix"]).expect_code(0)?.expect_prints(&["is permanent"])?;
    ended(watcher, 0, "patch fix is permanent")?;
    p.until("permanent")?;
    p.program.ask("2")?;
    // It is a patch like any other.
    p.run("revert", &[]).expect_code(0)?;
    p.program.ask("1")?;
    let status = p.run("status", &[]);
    assert!(!status.stdout.contains("permanent"), "{}", status.stdout);
    let fix = p.fix.display().to_string();
    p.run("apply", &[&fix]).expect_code(0)?;
    p.until(", current")?;
    p.program.finish()
}

#[test]
fn a_watcher_that_dies_is_missed() -> Outcome {
    let mut p = Place::new("killed")?;
    let mut watcher = p.watcher("600s")?;
    watcher.kill().map_err(|e| e.to_string())?;
    watcher.wait().map_err(|e| e.to_string())?;
    p.until("would revert it is gone")?;
    p.run("confirm", &["fix"]).expect_code(0)?;
    p.until("permanent")?;
    p.program.ask("2")?;
    p.program.finish()
}

#[test]
fn a_watcher_ends_with_what_it_watches() -> Outcome {
    let mut p = Place::new("ends")?;
    let watcher = p.watcher("600s")?;
    p.run("revert", &[]).expect_code(0)?;
    ended(watcher, 0, "no longer applied")?;
    p.program.ask("1")?;
    let watcher = p.watcher("600s")?;
    p.program.finish()?;
    ended(watcher, 6, "")
}
