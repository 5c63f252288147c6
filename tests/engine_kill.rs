//! The tool is killed at each of its system calls: the target must run on, all old or all new, and miss nothing, no signal either.
//!
//! The one thing that a kill may show: between a stop and the write that hides it, a blocked call may return EINTR.
//!
//! `KILL_STEP=n` tries every n-th place only (default 17; `./ci/kill-matrix --full` tries all).
#![allow(unsafe_code)]

mod engine_support;

use std::os::unix::process::CommandExt;
use std::process::{Command, Stdio};

use engine_support::{folder, gcc, livepatch, object, write_patch, Recipe, Target};

/// Threads in every kind of wait check what they see; one sends signals that are counted at both ends.
const SERVER: &str = include_str!("engine_server.c");

/// Two functions: half of it would answer 1502.
const FIX: &str = r#"
extern int calls;
__attribute__((noinline)) int plain(int x) { __asm__ volatile("" ::: "memory"); return x + 500; }
__attribute__((noinline)) int answer(int x) { calls++; return plain(x) + 1501; }
"#;

/// In the place of that: `plain` is given back. Half of it would answer 3502.
const NEXT: &str = r#"
extern int calls;
int plain(int);
__attribute__((noinline)) int answer(int x) { calls++; return plain(x) + 3001; }
"#;

/// Runs a command under a tracer that kills it at its `kill_at`-th stop at a system call, entries and exits counted.
/// Gives the number of stops and, if it lived, its exit code.
fn traced(args: &[&str], kill_at: Option<u64>) -> (u64, Option<i32>) {
    let mut command = Command::new(env!("CARGO_BIN_EXE_livepatch"));
    command.args(args).stdout(Stdio::null()).stderr(Stdio::null()).stdin(Stdio::null());
    // SAFETY: ptrace(2) with PTRACE_TRACEME takes nothing and may be called between fork and exec.
    unsafe {
        command.pre_exec(|| {
            libc::ptrace(libc::PTRACE_TRACEME, 0, 0, 0);
            Ok(())
        })
    };
    #[expect(clippy::zombie_processes, reason = "it is waited for by waitpid(2), stop by stop")]
    let child = command.spawn().unwrap();
    let pid = child.id().cast_signed();
    let wait = || {
        let mut status = 0;
        // SAFETY: the status is ours; the child is waited for here only.
        assert_eq!(unsafe { libc::waitpid(pid, &raw mut status, 0) }, pid);
        status
    };
    let mut status = wait();
    assert!(libc::WIFSTOPPED(status), "it stops at its start");
    // SAFETY: a request about our own tracee, with numbers only.
    unsafe { libc::ptrace(libc::PTRACE_SETOPTIONS, pid, 0, libc::PTRACE_O_TRACESYSGOOD | libc::PTRACE_O_EXITKILL) };
    let (mut stops, mut signal) = (0, 0);
    loop {
        // SAFETY: as above.
        unsafe { libc::ptrace(libc::PTRACE_SYSCALL, pid, 0, signal) };
        status = wait();
        if libc::WIFEXITED(status) {
            return (stops, Some(libc::WEXITSTATUS(status)));
        }
        if libc::WIFSIGNALED(status) {
            return (stops, None);
        }
        signal = match libc::WSTOPSIG(status) {
            s if s == libc::SIGTRAP | 0x80 => {
                stops += 1;
                if Some(stops) == kill_at {
                    // SAFETY: as above.
                    unsafe { libc::kill(pid, libc::SIGKILL) };
                    while !libc::WIFSIGNALED(wait()) {}
                    return (stops, None);
                }
                0
            }
            libc::SIGTRAP => 0,
            other => other,
        };
    }
}

/// Of how many places one is tried.
fn step() -> u64 {
    std::env::var("KILL_STEP").ok().and_then(|s| s.parse().ok()).unwrap_or(17)
}

struct Place {
    target: Target,
    pid: String,
}

impl Place {
    fn state(&mut self, context: &str) -> String {
        let answer = self.target.ask("answer 1");
        let name = match answer.as_str() {
            "1002" => None,
            "2002" => Some("fix"),
            "3002" => Some("next"),
            other => panic!("{context}: {other}"),
        };
        assert_eq!(self.target.ask("torn"), "0", "{context}: a thread saw what it must not see");
        assert_eq!(self.target.ask("lost"), "0", "{context}: signals are lost");
        let out = livepatch(&["status", &self.pid, "--json"]);
        assert_eq!(out.code, 0, "{context}: {}", out.stderr);
        let status: serde_json::Value = serde_json::from_str(&out.stdout).unwrap();
        let patches = status[0]["patches"].as_array().unwrap();
        let applied: Vec<_> = patches.iter().filter(|p| p["state"] == "applied").map(|p| p["patch"].as_str()).collect();
        assert_eq!(applied, Vec::from_iter(name.map(Some)), "{context}: status says {patches:?}");
        assert!(patches.iter().all(|p| p["damage"].is_null()), "{context}: {patches:?}");
        answer
    }

    fn run(&self, args: &[&str], context: &str) {
        let out = livepatch(args);
        assert_eq!(out.code, 0, "{context}: {args:?}: {}{}", out.stdout, out.stderr);
    }
}

#[test]
fn a_tool_that_is_killed_anywhere_leaves_old_or_new() {
    let folder = folder("kill");
    let old = gcc(&folder, "old", SERVER, &[]);
    let object = object(&folder, "fix.o", FIX);
    let recipe = Recipe {
        name: "fix",
        old: &old,
        object: &object,
        replace: &["answer", "plain"],
        may_unwind: false,
        after: None,
    };
    let fix = write_patch(&recipe, &folder.join("fix.so"));
    let fix = fix.to_str().unwrap();
    let mut killed = 0;
    for action in ["apply", "revert", "apply-again", "reclaim", "canary"] {
        let mut place = begin(&old);
        let (mut at, mut here) = (1, 0);
        loop {
            let context = format!("{action} killed at stop {at}");
            // Each place is reached from the same state: nothing in the process, or the patch applied, or reverted.
            if !["apply", "canary"].contains(&action) {
                place.run(&["apply", &place.pid, fix], &context);
                assert_eq!(place.state(&context), "2002");
            }
            if ["apply-again", "reclaim"].contains(&action) {
                place.run(&["revert", &place.pid], &context);
            }
            let args = match action {
                "revert" => vec!["revert", &place.pid],
                "reclaim" => vec!["revert", &place.pid, "--reclaim"],
                "canary" => {
                    let keys = ["--canary", "100%", "--key", "answer:arg1", "--key", "plain:arg1"];
                    [&["apply", &place.pid, fix][..], &keys].concat()
                }
                _ => vec!["apply", &place.pid, fix],
            };
            let (stops, ended) = traced(&args, Some(at));
            place.state(&context);
            place.run(&["recover", &place.pid], &context);
            let now = place.state(&context);
            if now == "2002" {
                place.run(&["revert", &place.pid], &context);
            }
            place.run(&["apply", &place.pid, fix], &context);
            assert_eq!(place.state(&context), "2002");
            place.run(&["revert", &place.pid], &context);
            assert_eq!(place.state(&context), "1002");
            if ended.is_some() {
                println!("{action:12} {stops:6} places  {here:6} kills  {here:6} survived");
                break;
            }
            (killed, here) = (killed + 1, here + 1);
            at += step();
            if ["apply", "canary"].contains(&action) {
                place = begin(&old);
            }
        }
    }
    println!("{killed} kills: every target ran on, all old or all new");
    assert!(killed > 30, "only {killed} kills");
}

#[test]
fn a_tool_that_is_killed_while_one_patch_takes_the_place_of_another_leaves_either() {
    let folder = folder("kill-replace");
    let old = gcc(&folder, "old", SERVER, &[]);
    let (first, second) = (object(&folder, "fix.o", FIX), object(&folder, "next.o", NEXT));
    let recipe = Recipe {
        name: "fix",
        old: &old,
        object: &first,
        replace: &["answer", "plain"],
        may_unwind: false,
        after: None,
    };
    let fix = write_patch(&recipe, &folder.join("fix.so"));
    let recipe = Recipe { name: "next", object: &second, replace: &["answer"], after: Some(&fix), ..recipe };
    let next = write_patch(&recipe, &folder.join("next.so"));
    let (fix, next) = (fix.to_str().unwrap(), next.to_str().unwrap());
    let mut killed = 0;
    for action in ["replace", "replace-again", "revert"] {
        let mut place = begin(&old);
        let mut at = 1;
        loop {
            let context = format!("{action} killed at stop {at}");
            place.run(&["apply", &place.pid, fix], &context);
            if action != "replace" {
                place.run(&["apply", &place.pid, next], &context);
                assert_eq!(place.state(&context), "3002");
            }
            if action == "replace-again" {
                place.run(&["revert", &place.pid], &context);
                place.run(&["apply", &place.pid, fix], &context);
            }
            let args = if action == "revert" { vec!["revert", &place.pid] } else { vec!["apply", &place.pid, next] };
            let (stops, ended) = traced(&args, Some(at));
            let seen = place.state(&context);
            place.run(&["recover", &place.pid], &context);
            assert_eq!(place.state(&context), seen, "{context}: a recovery changes nothing that calls see");
            assert_eq!(seen == "1002", action == "revert" && seen != "3002", "{context}: {seen}");
            if seen == "2002" {
                place.run(&["apply", &place.pid, next], &context);
                assert_eq!(place.state(&context), "3002");
            }
            if seen != "1002" {
                place.run(&["revert", &place.pid], &context);
            }
            assert_eq!(place.state(&context), "1002");
            if ended.is_some() {
                println!("{action:14} {stops:6} places  {killed:6} kills so far");
                break;
            }
            killed += 1;
            at += step();
            if action == "replace" {
                place = begin(&old);
            }
        }
    }
    println!("{killed} kills: every target ran on, in one version or the other");
    assert!(killed > 30, "only {killed} kills");
}

fn begin(old: &std::path::Path) -> Place {
    let mut target = Target::start(old, &[]);
    let pid = target.pid().to_string();
    assert_eq!(target.ask("hammer"), "on");
    Place { target, pid }
}

#[test]
fn the_second_of_two_commands_names_the_first() {
    use livepatch::patch::PatchFile;
    use livepatch::patcher::{Options, Patcher};
    use livepatch::process::Pid;

    let folder = folder("kill-lock");
    let old = gcc(&folder, "old", SERVER, &[]);
    let object = object(&folder, "fix.o", FIX);
    let recipe = Recipe {
        name: "fix",
        old: &old,
        object: &object,
        replace: &["answer", "plain"],
        may_unwind: false,
        after: None,
    };
    let fix = write_patch(&recipe, &folder.join("fix.so"));
    let target = Target::start(&old, &[]);
    let pid = target.pid().to_string();
    let mut first = Patcher::open(Pid(target.pid())).unwrap();
    let patch = PatchFile::parse(&std::fs::read(&fix).unwrap()).unwrap();
    first.apply(&patch, &Options::default()).unwrap();
    let lock = first.process().lock().unwrap();
    for args in [&["revert", &pid][..], &["apply", &pid, fix.to_str().unwrap()], &["recover", &pid]] {
        let out = livepatch(args);
        assert_eq!(out.code, 1, "{args:?}: {}", out.stderr);
        let own = format!("(PID {})", std::process::id());
        assert!(out.stderr.contains("another livepatch command") && out.stderr.contains(&own), "{}", out.stderr);
    }
    assert_eq!(livepatch(&["status", &pid]).code, 0);
    drop(lock);
    assert_eq!(livepatch(&["recover", &pid]).stdout, format!("process {pid}: nothing to recover\n"));
    assert_eq!(livepatch(&["revert", &pid]).code, 0);
}

/// What a command leaves that dies between two entries of one hold: made here by hand, one entry put back.
#[test]
fn a_patch_that_is_applied_in_part_is_taken_back_whole() {
    use std::os::unix::fs::FileExt;

    use object::{Object as _, ObjectSymbol as _};

    let folder = folder("kill-part");
    let old = gcc(&folder, "old", SERVER, &[]);
    let object = object(&folder, "fix.o", FIX);
    let recipe = Recipe {
        name: "fix",
        old: &old,
        object: &object,
        replace: &["answer", "plain"],
        may_unwind: false,
        after: None,
    };
    let fix = write_patch(&recipe, &folder.join("fix.so"));
    let mut target = Target::start(&old, &[]);
    let (pid, fix) = (target.pid().to_string(), fix.to_str().unwrap());
    assert_eq!(livepatch(&["apply", &pid, fix]).code, 0);
    assert_eq!(target.ask("answer 1"), "2002");

    let bytes = std::fs::read(&old).unwrap();
    let file = object::File::parse(&*bytes).unwrap();
    let at = file.symbols().find(|s| s.name() == Ok("plain")).unwrap().address();
    let maps = std::fs::read_to_string(format!("/proc/{pid}/maps")).unwrap();
    let image = maps.lines().find(|l| l.ends_with(old.to_str().unwrap())).unwrap();
    let base = u64::from_str_radix(image.split('-').next().unwrap(), 16).unwrap();
    let memory = std::fs::OpenOptions::new().write(true).open(format!("/proc/{pid}/mem")).unwrap();
    // The program's text has the same place in file and memory.
    memory.write_all_at(&bytes[at as usize..at as usize + 5], base + at).unwrap();

    assert!(livepatch(&["status", &pid]).stdout.contains("livepatch recover"));
    for args in [&["revert", &pid][..], &["apply", &pid, fix]] {
        let out = livepatch(args);
        assert_eq!(out.code, 3, "{args:?}: {}{}", out.stdout, out.stderr);
    }
    let out = livepatch(&["recover", &pid]);
    assert_eq!((out.code, out.stdout), (0, format!("process {pid}: patch fix is reverted\n")), "{}", out.stderr);
    assert_eq!(target.ask("answer 1"), "1002");
    assert_eq!(livepatch(&["recover", &pid]).stdout, format!("process {pid}: nothing to recover\n"));
    assert_eq!(livepatch(&["apply", &pid, fix]).code, 0);
    assert_eq!(target.ask("answer 1"), "2002");
    assert_eq!(livepatch(&["revert", &pid]).code, 0);
    assert_eq!(target.ask("answer 1"), "1002");
}
