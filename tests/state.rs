//! A program whose accounts are states: tests/state, built once per version, migrated by its agent while threads trade.

mod support;

use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdout, Command, Stdio};
use std::time::Duration;

use support::{build_patch, livepatch, root, run_within, scratch};

/// The program with another `account.rs`.
fn build(version: &str, account: &str) -> PathBuf {
    let (from, work) = (root().join("tests/state"), scratch("state").join("work"));
    std::fs::create_dir_all(work.join("src")).unwrap();
    let manifest = std::fs::read_to_string(from.join("Cargo.toml")).unwrap();
    let manifest = manifest.replace("../..", root().to_str().unwrap());
    std::fs::write(work.join("Cargo.toml"), manifest).unwrap();
    std::fs::copy(root().join("Cargo.lock"), work.join("Cargo.lock")).unwrap();
    std::fs::copy(from.join("src/main.rs"), work.join("src/main.rs")).unwrap();
    std::fs::write(work.join("src/account.rs"), account).unwrap();
    let flags = "-Csymbol-mangling-version=v0 -Clink-arg=-Wl,--emit-relocs -Clink-arg=-Wl,--build-id=sha1";
    let mut cargo = Command::new(env!("CARGO"));
    cargo.current_dir(&work).env("RUSTFLAGS", flags).args(["build", "--quiet", "--release", "--target-dir"]);
    run_within(cargo.arg(scratch("state").join("target")), Duration::from_secs(600)).expect_code(0).unwrap();
    let out = scratch("state").join(version);
    // Replaced, not written over: the old file may be running.
    let _ = std::fs::remove_file(&out);
    std::fs::copy(scratch("state").join("target/release/ledger"), &out).unwrap();
    out
}

struct Ledger {
    child: Child,
    lines: std::io::Lines<BufReader<ChildStdout>>,
}

impl Ledger {
    fn start(program: &Path) -> Self {
        let socket = std::env::temp_dir().join(format!("livepatch-state-{}.sock", std::process::id()));
        let mut command = Command::new(program);
        command.arg(socket).args(["1000", "2"]).stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut child = command.spawn().unwrap();
        let lines = BufReader::new(child.stdout.take().unwrap()).lines();
        let mut ledger = Self { child, lines };
        assert_eq!(ledger.line(), "ready");
        ledger
    }

    fn line(&mut self) -> String {
        self.lines.next().expect("the program answers").unwrap()
    }

    fn ask(&mut self, question: &str) -> String {
        writeln!(self.child.stdin.as_mut().unwrap(), "{question}").unwrap();
        self.line()
    }

    /// Trades, orders, accounts of version 1 and of version 2.
    fn figures(&mut self) -> [u64; 4] {
        let said = self.ask("figures");
        let words: Vec<&str> = said.split(' ').collect();
        [1, 3, 7, 9].map(|i| words[i].parse().unwrap())
    }

    fn pid(&self) -> String {
        self.child.id().to_string()
    }
}

impl Drop for Ledger {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[test]
#[ignore = "builds its program anew for each version: ./ci/migrate"]
fn accounts_are_migrated_forth_and_back_or_stay_as_they_are() {
    let v1 = std::fs::read_to_string(root().join("tests/state/src/account.rs")).unwrap();
    let v2 = std::fs::read_to_string(root().join("tests/state/2.rs")).unwrap();
    let fails = |how: &str| v2.replace("/* @FAIL@ */", how);
    let old = build("1", &v1);
    let patch = |name: &str, account: &str| {
        let (new, fix) = (build(name, account), scratch("state").join(format!("fix-{name}.so")));
        build_patch(&old, &new, &fix).expect_code(0).unwrap();
        fix.to_str().unwrap().to_owned()
    };
    let good = patch("2", &v2);
    let bad = [
        ("error", fails("if id == 131 { return Err(StateError::new(\"odd\")); }"), "131 in the trial"),
        ("panic", fails("assert!(id != 131, \"odd\");"), "131 in the trial"),
        (
            "commit",
            fails(
                "static N: std::sync::atomic::AtomicU64 = std::sync::atomic::AtomicU64::new(0); \
                 if id == 131 && N.fetch_add(1, std::sync::atomic::Ordering::Relaxed) == 1 { return Err(StateError::new(\"odd\")); }",
            ),
            "131 in the commit",
        ),
    ];
    // The same layout change without a version is refused.
    let unraised = build("unraised", &v2.replace("\"account\", 2", "\"account\", 1"));
    build_patch(&old, &unraised, &scratch("state").join("none.so")).expect_code(3).unwrap();

    let mut ledger = Ledger::start(&old);
    let pid = ledger.pid();
    livepatch(&["apply", &pid, &good, "--hold"]).expect_code(3).unwrap().expect_says(&["needs the agent"]).unwrap();
    for (name, account, says) in bad {
        let fix = patch(name, &account);
        livepatch(&["apply", &pid, &fix]).expect_code(3).unwrap().expect_says(&[says]).unwrap();
        assert_eq!(ledger.figures()[2..], [1000, 0], "{name}");
    }
    for _ in 0..5 {
        let applied = livepatch(&["apply", &pid, &good, "--json"]);
        applied.expect_code(0).unwrap().expect_says(&["the limits of accounts"]).unwrap();
        assert_eq!(ledger.figures()[2..], [0, 1000]);
        assert_eq!(ledger.ask("open 5000"), "true");
        livepatch(&["revert", &pid, "--hold"]).expect_code(3).unwrap();
        livepatch(&["revert", &pid]).expect_code(0).unwrap();
        assert_eq!(ledger.figures()[2..], [1001, 0]);
        assert_eq!(ledger.ask("close 5000"), "true");
    }
    ledger.ask("stop");
    std::thread::sleep(Duration::from_millis(100));
    let [trades, orders, ..] = ledger.figures();
    assert!(trades == orders && trades > 0, "{trades} trades, {orders} orders in the accounts");
}
