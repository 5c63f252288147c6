//! A program with an agent: examples/inside.rs with a library that it loads, asked over its socket.

use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{channel, Receiver};
use std::time::Duration;

use super::{build_patch, example, root, run, scratch, Ran};

/// A library of each version and the patch between them, in a folder of the test.
pub fn built(test: &str, source: &Path, flags: &[&str]) -> (PathBuf, PathBuf) {
    let folder = scratch(&format!("agent_switch/{test}"));
    let [old, new] = ["1", "2"].map(|version| {
        let folder = folder.join(version);
        std::fs::create_dir_all(&folder).unwrap();
        std::fs::copy(source, folder.join("work.c")).unwrap();
        let mut gcc = Command::new("gcc");
        gcc.current_dir(&folder).args([
            "-O2",
            "-g",
            "-shared",
            "-fPIC",
            "-pthread",
            "-Wl,--build-id",
            "-Wl,--emit-relocs",
        ]);
        gcc.arg(format!("-DVERSION={version}")).args(flags).args(["-o", "work.so", "work.c"]);
        run(&mut gcc).expect_code(0).unwrap();
        folder.join("work.so")
    });
    let fix = folder.join("fix.so");
    build_patch(&old, &new, &fix).expect_code(0).unwrap();
    (old, fix)
}

/// A program with an agent, and a patch for it.
pub struct Inside {
    pub child: Child,
    lines: Receiver<String>,
    pub pid: i32,
    pub fix: String,
    socket: PathBuf,
}

impl Inside {
    pub fn start(test: &str) -> Self {
        Self::start_by(test, Command::new(example("inside")))
    }

    /// By a command that becomes the program.
    pub fn start_by(test: &str, command: Command) -> Self {
        let (old, fix) = built(test, &root().join("tests/switch/work.c"), &[]);
        Self::start_with(test, &old, &fix, command)
    }

    pub fn start_with(test: &str, old: &Path, fix: &Path, mut command: Command) -> Self {
        let socket = std::env::temp_dir().join(format!("livepatch-{test}-{}.sock", std::process::id()));
        command.arg(old).arg(&socket).stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut child = command.spawn().unwrap();
        let out = BufReader::new(child.stdout.take().unwrap());
        let (send, lines) = channel();
        std::thread::spawn(move || out.lines().map_while(Result::ok).try_for_each(|line| send.send(line)));
        let pid = child.id().cast_signed();
        let mut inside = Self { child, lines, pid, fix: fix.to_str().unwrap().to_owned(), socket };
        assert_eq!(inside.line(), "ready");
        inside
    }

    pub fn line(&mut self) -> String {
        self.lines
            .recv_timeout(Duration::from_secs(90))
            .unwrap_or_else(|e| panic!("the program does not answer: {e}, {:?}", self.child.try_wait()))
    }

    /// Asks the library.
    pub fn ask(&mut self, question: &str) -> String {
        writeln!(self.child.stdin.as_mut().unwrap(), "ask {question}").unwrap();
        self.line()
    }

    /// One of the library's figures.
    pub fn figure(&mut self, name: &str) -> i64 {
        let said = self.ask("figures");
        let mut words = said.split(' ').skip_while(|w| *w != name).skip(1);
        words.next().and_then(|n| n.parse().ok()).unwrap_or_else(|| panic!("no {name} in {said}"))
    }

    /// Runs a command on it.
    pub fn run(&self, command: &str, more: &[&str]) -> Ran {
        run(Command::new(env!("CARGO_BIN_EXE_livepatch")).args([command, &self.pid.to_string()]).args(more))
    }

    pub fn apply(&self, more: &[&str]) -> Ran {
        self.run("apply", &[&[self.fix.as_str(), "--json"], more].concat())
    }

    /// An apply while the test goes on.
    pub fn apply_beside(&self, timeout: &str) -> std::thread::JoinHandle<Ran> {
        let mut command = Command::new(env!("CARGO_BIN_EXE_livepatch"));
        command.args(["apply", &self.pid.to_string(), &self.fix, "--timeout", timeout]);
        std::thread::spawn(move || run(&mut command))
    }

    pub fn revert(&self, more: &[&str]) -> Ran {
        self.run("revert", &[&["--json"], more].concat())
    }

    /// Applies and reverts so often. Every time it must be done, by the agent.
    pub fn cycles(&mut self, count: usize) {
        for cycle in 0..count {
            for version in [2, 1] {
                let ran = if version == 2 { self.apply(&[]) } else { self.revert(&[]) };
                let report = ran.expect_code(0).unwrap_or_else(|e| panic!("cycle {cycle}: {e}")).json().unwrap();
                assert_eq!(by(&report), "agent", "cycle {cycle}: {report} {}", ran.stderr);
                assert_eq!(self.figure("version"), version, "cycle {cycle}");
            }
        }
    }

    /// The threads that the library has end, and nothing was wrong; how much of it there was.
    pub fn finish(&mut self) -> i64 {
        self.ask("free");
        assert_eq!((self.figure("mixed"), self.figure("odd")), (0, 0));
        self.figure("seen")
    }
}

impl Drop for Inside {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        let _ = std::fs::remove_file(&self.socket);
    }
}

/// Who did it: of a report, or of the only one in a list.
pub fn by(report: &serde_json::Value) -> &str {
    report.get(0).unwrap_or(report)["by"].as_str().unwrap_or("a hold")
}

impl Inside {
    /// So many applies and reverts in turn, asked by the program itself.
    pub fn flip(&mut self, count: u32) {
        writeln!(self.child.stdin.as_mut().unwrap(), "flip {count} {}", self.fix).unwrap();
        let figures: serde_json::Value = serde_json::from_str(&self.line()).unwrap();
        assert_eq!((&figures["flips"], &figures["failures"]), (&count.into(), &serde_json::json!({})), "{figures}");
    }
}
