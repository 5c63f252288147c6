//! What the integration tests share: where the tools are, a command with a deadline, a program that answers line by line.
#![allow(dead_code)] // each test binary uses its own part

pub mod fixture;
pub mod inside;
pub mod modules;
pub mod program;

use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::Value;

/// The folder of the package.
pub fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// A tool of the workspace: from `$LIVEPATCH_BIN_DIR`, else from `target/release`.
pub fn tool(name: &str) -> PathBuf {
    let dir = std::env::var_os("LIVEPATCH_BIN_DIR").map_or_else(|| root().join("target/release"), PathBuf::from);
    let path = dir.join(name);
    assert!(
        path.is_file(),
        "{} is missing: cargo build --release --workspace, or set LIVEPATCH_BIN_DIR",
        path.display()
    );
    path
}

/// An example of the package, which `cargo test` builds; with `--test NAME` it does not, so then it is built here.
pub fn example(name: &str) -> PathBuf {
    let own = std::env::current_exe().expect("a test has a path");
    let path = own.parent().and_then(Path::parent).expect("below target/").join("examples").join(name);
    if !path.is_file() {
        let release: &[&str] = if cfg!(debug_assertions) { &[] } else { &["--release"] };
        let mut cargo = Command::new(env!("CARGO"));
        cargo.current_dir(root()).args(["build", "--quiet", "--example", name]).args(release);
        assert!(cargo.status().is_ok_and(|s| s.success()), "{cargo:?}");
    }
    path
}

/// A folder of this test run's own, under `target/`.
pub fn scratch(name: &str) -> PathBuf {
    let dir = root().join("target/tests").join(name);
    std::fs::create_dir_all(&dir).expect("a folder under target/");
    dir
}

/// What a command did.
#[derive(Debug)]
pub struct Ran {
    pub line: String,
    /// The exit code, or minus the signal that ended it.
    pub code: i32,
    pub stdout: String,
    pub stderr: String,
}

impl Ran {
    /// Its standard output as JSON.
    pub fn json(&self) -> Result<Value, String> {
        serde_json::from_str(&self.stdout)
            .map_err(|e| format!("{}: stdout is not JSON ({e})\n{}", self.line, self.both()))
    }

    /// Both streams, for a message; a long report is cut.
    pub fn both(&self) -> String {
        let cut = |s: &str| {
            s.lines().take(30).map(|l| format!("{}\n", l.chars().take(300).collect::<String>())).collect::<String>()
        };
        format!("--- stderr\n{}--- stdout\n{}", cut(&self.stderr), cut(&self.stdout))
    }

    /// An error unless it ended with `code`.
    pub fn expect_code(&self, code: i32) -> Result<&Self, String> {
        if self.code == code {
            return Ok(self);
        }
        Err(format!("{}: exit {}, expected {code}\n{}", self.line, self.code, self.both()))
    }

    /// An error unless stderr holds every one of `texts` (upper and lower case alike).
    pub fn expect_says(&self, texts: &[&str]) -> Result<&Self, String> {
        let said = self.stderr.to_lowercase();
        match texts.iter().find(|t| !said.contains(&t.to_lowercase())) {
            None => Ok(self),
            Some(text) => Err(format!("{}: stderr does not say {text:?}\n{}", self.line, self.both())),
        }
    }

    /// An error unless stdout holds every one of `texts`.
    pub fn expect_prints(&self, texts: &[&str]) -> Result<&Self, String> {
        match texts.iter().find(|t| !self.stdout.contains(**t)) {
            None => Ok(self),
            Some(text) => Err(format!("{}: stdout does not say {text:?}\n{}", self.line, self.both())),
        }
    }

    /// An error if it was ended by a signal or by a Rust panic: no input may do that.
    pub fn expect_no_crash(&self) -> Result<&Self, String> {
        if self.code < 0 || self.code == 101 || self.stderr.contains("panicked at") {
            return Err(format!("{}: crashed, exit {}\n{}", self.line, self.code, self.both()));
        }
        Ok(self)
    }
}

/// Runs a command to its end; a command that takes longer than a minute is killed and fails.
pub fn run(command: &mut Command) -> Ran {
    run_within(command, Duration::from_secs(60))
}

/// Runs a command to its end; a command that takes longer is killed and fails.
pub fn run_within(command: &mut Command, limit: Duration) -> Ran {
    use std::os::unix::process::ExitStatusExt;
    let line = format!("{command:?}").replace('"', "");
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().unwrap_or_else(|e| panic!("{line}: {e}"));
    let drain = |pipe: Option<Box<dyn Read + Send>>| {
        std::thread::spawn(move || {
            let mut bytes = Vec::new();
            if let Some(mut pipe) = pipe {
                let _ = pipe.read_to_end(&mut bytes);
            }
            String::from_utf8_lossy(&bytes).into_owned()
        })
    };
    let out = drain(child.stdout.take().map(|p| Box::new(p) as _));
    let err = drain(child.stderr.take().map(|p| Box::new(p) as _));
    let deadline = Instant::now() + limit;
    let status = loop {
        match child.try_wait().expect("waiting for a child") {
            Some(status) => break status,
            None if Instant::now() > deadline => {
                let _ = child.kill();
                break child.wait().expect("waiting for a killed child");
            }
            None => std::thread::sleep(Duration::from_millis(2)),
        }
    };
    let code = status.code().unwrap_or_else(|| -status.signal().unwrap_or(0));
    Ran { line, code, stdout: out.join().unwrap_or_default(), stderr: err.join().unwrap_or_default() }
}

/// `patch-builder OLD NEW -o FIX --json`.
pub fn build_patch(old: &Path, new: &Path, fix: &Path) -> Ran {
    build_patch_with(old, new, fix, &[])
}

/// As [`build_patch`], with more arguments.
pub fn build_patch_with(old: &Path, new: &Path, fix: &Path, more: &[&std::ffi::OsStr]) -> Ran {
    run(Command::new(tool("patch-builder")).args([old, new]).arg("-o").arg(fix).arg("--json").args(more))
}

/// `livepatch ARGS`.
pub fn livepatch(args: &[&str]) -> Ran {
    run(Command::new(tool("livepatch")).args(args))
}
