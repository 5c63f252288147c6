//! The engine against real processes: apply and revert, what the target must not notice, and every refusal.

mod engine_support;

use engine_support::{folder, gcc, livepatch, object, write_patch, Recipe, Target};
use std::path::PathBuf;

/// Answers each line with a number; threads wait in every way that a thread can wait.
const SERVER: &str = include_str!("engine_server.c");

const FIX: &str = r#"
extern int calls;
extern int plain(int);
static int fixed_calls = 40;
__attribute__((noinline)) int answer(int x) { calls++; fixed_calls++; return plain(x) + 2000 + fixed_calls; }
int slow(int x) { calls++; return x + 7; }
"#;

struct Case {
    folder: PathBuf,
    old: PathBuf,
    fix: PathBuf,
}

fn case(name: &str, flags: &[&str]) -> Case {
    let folder = folder(name);
    let old = gcc(&folder, "old", SERVER, flags);
    let fix = object(&folder, "fix.o", FIX);
    let recipe =
        Recipe { name: "fix", old: &old, object: &fix, replace: &["answer", "slow"], may_unwind: false, after: None };
    let fix = write_patch(&recipe, &folder.join("fix.so"));
    Case { folder, old, fix }
}

#[track_caller]
fn run(args: &[&str], code: i32) -> engine_support::Outcome {
    let out = livepatch(args);
    assert_eq!(out.code, code, "livepatch {args:?}\n{}{}", out.stdout, out.stderr);
    out
}

fn round_trip(case: &Case) {
    let mut target = Target::start(&case.old, &[]);
    let (pid, fix) = (target.pid().to_string(), case.fix.to_str().unwrap());
    assert_eq!(target.ask("answer 1"), "1002");
    run(&["check", &pid, fix], 0);
    let out = run(&["apply", &pid, fix, "--json"], 0);
    let report: serde_json::Value = serde_json::from_str(&out.stdout).unwrap();
    assert_eq!(report["entries"], 2);
    assert_eq!(report["functions"], serde_json::json!(["answer", "slow"]));
    assert_eq!(target.ask("answer 1"), "2042");
    assert!(run(&["apply", &pid, fix], 0).stdout.contains("already applied"));
    assert!(run(&["check", &pid, fix], 0).stdout.contains("already applied"));
    assert!(run(&["status", &pid], 0).stdout.contains("applied  fix"));
    run(&["revert", &pid, "other"], 1);
    let out = run(&["revert", &pid, "fix", "--json"], 0);
    let report: serde_json::Value = serde_json::from_str(&out.stdout).unwrap();
    assert_eq!((&report["action"], &report["entries"]), (&"revert".into(), &2.into()));
    assert_eq!(target.ask("answer 1"), "1002");
    assert!(run(&["revert", &pid], 1).stderr.contains("no patch is applied"));
    // The patch's own data keep their values in the same mapping.
    run(&["apply", &pid, fix], 0);
    assert_eq!(target.ask("answer 1"), "2043");
    run(&["revert", &pid, "--all"], 0);
    assert_eq!(target.ask("answer 1"), "1002");
    assert_eq!(target.ask("errors"), "0", "no thread may see a spurious EINTR or a damaged register");
    assert_eq!(target.ask("calls"), "5", "the old image's data are used by old and new code");
}

#[test]
fn a_pie_is_patched_and_reverted() {
    round_trip(&case("engine-pie", &["-pie", "-fpie"]));
}

#[test]
fn a_program_at_a_fixed_address_is_patched_and_reverted() {
    round_trip(&case("engine-no-pie", &["-no-pie", "-fno-pie"]));
}

#[test]
fn endbr64_stays_at_the_entry() {
    round_trip(&case("engine-cet", &["-fcf-protection=full"]));
}

#[test]
fn many_cycles_leave_the_target_alone() {
    let case = case("engine-cycles", &[]);
    let mut target = Target::start(&case.old, &[]);
    let (pid, fix) = (target.pid().to_string(), case.fix.to_str().unwrap());
    let maps = |pid: &str| std::fs::read_to_string(format!("/proc/{pid}/maps")).unwrap().lines().count();
    run(&["apply", &pid, fix], 0);
    run(&["revert", &pid], 0);
    let before = maps(&pid);
    for _ in 0..25 {
        run(&["apply", &pid, fix], 0);
        run(&["revert", &pid], 0);
    }
    assert_eq!(maps(&pid), before, "one patch, one mapping");
    assert_eq!(target.ask("errors"), "0");
    assert!(target.is_alive());
}

#[test]
fn a_thread_inside_is_named_with_its_backtrace() {
    let case = case("engine-inside", &[]);
    let mut target = Target::start(&case.old, &[]);
    let (pid, fix) = (target.pid().to_string(), case.fix.to_str().unwrap());
    assert_eq!(target.ask("enter slow"), "in");
    let out = run(&["apply", &pid, fix, "--timeout", "300ms"], 4);
    assert!(out.stderr.contains("(slowpoke) is inside slow"), "{}", out.stderr);
    assert!(out.stderr.contains("slow_thread+"), "{}", out.stderr);
    let maps = std::fs::read_to_string(format!("/proc/{pid}/maps")).unwrap();
    assert_eq!(target.ask("answer 1"), "1002");
    let out = run(&["apply", &pid, fix, "--timeout", "300ms", "--json"], 4);
    let refusal: serde_json::Value = serde_json::from_str(&out.stdout).unwrap();
    assert_eq!(refusal["refusal"]["kind"], "not-quiescent");
    assert_eq!(std::fs::read_to_string(format!("/proc/{pid}/maps")).unwrap().lines().count(), maps.lines().count());
    // It is applied when the thread has left.
    let late = std::thread::spawn({
        let (pid, fix) = (pid.clone(), fix.to_owned());
        move || livepatch(&["apply", &pid, &fix, "--timeout", "10s"]).code
    });
    std::thread::sleep(std::time::Duration::from_millis(200));
    assert_eq!(target.ask("leave slow"), "out");
    assert_eq!(late.join().unwrap(), 0);
    assert_eq!(target.ask("answer 1"), "2042");
}

#[test]
fn refusals_name_what_and_why() {
    let case = case("engine-refusals", &[]);
    let mut target = Target::start(&case.old, &[]);
    let (pid, fix) = (target.pid().to_string(), case.fix.to_str().unwrap());
    let other = gcc(&case.folder, "other", &format!("{SERVER}\nint more = 5;\n"), &["-DOTHER"]);
    let stranger = Target::start(&other, &[]);
    let out = run(&["apply", &stranger.pid().to_string(), fix], 3);
    for id in [engine_support::build_id(&case.old), engine_support::build_id(&other)] {
        let hex: String = id.iter().map(|b| format!("{b:02x}")).collect();
        assert!(out.stderr.contains(&hex), "{}", out.stderr);
    }
    // A second patch, and the same name again.
    let second = object(&case.folder, "second.o", "int answer(int x) { return x + 3000; }");
    let recipe = Recipe {
        name: "second",
        old: &case.old,
        object: &second,
        replace: &["answer"],
        may_unwind: false,
        after: None,
    };
    let second = write_patch(&recipe, &case.folder.join("second.so"));
    run(&["apply", &pid, fix], 0);
    let out = run(&["apply", &pid, second.to_str().unwrap(), "--json"], 3);
    assert!(out.stderr.contains("patch fix is applied") && out.stderr.contains("revert"), "{}", out.stderr);
    assert!(out.stdout.contains(r#""kind":"other-patch""#), "{}", out.stdout);
    run(&["revert", &pid], 0);
    run(&["apply", &pid, second.to_str().unwrap()], 0);
    assert_eq!(target.ask("answer 1"), "3001");
    run(&["revert", &pid], 0);
    // Unwinding wanted, but no unwinder in the process.
    let recipe = Recipe { name: "throws", may_unwind: true, ..recipe };
    let object_path = case.folder.join("second.o");
    let throws = write_patch(&Recipe { object: &object_path, ..recipe }, &case.folder.join("throws.so"));
    assert!(run(&["apply", &pid, throws.to_str().unwrap()], 3).stderr.contains("__register_frame"));
    // Code that something else changed.
    assert_eq!(target.ask("scribble"), "done");
    let out = run(&["apply", &pid, fix], 3);
    assert!(out.stderr.contains("breakpoint") && out.stderr.contains("answer"), "{}", out.stderr);
}

#[test]
fn processes_that_cannot_be_patched_are_told_apart() {
    let case = case("engine-kinds", &[]);
    let fix = case.fix.to_str().unwrap();
    run(&["apply", "4194305", fix], 6);
    run(&["apply", "0", fix], 6);
    run(&["apply", "x", fix], 2);
    run(&["apply", "1"], 2);
    run(&["canary", "1", "x", "much"], 2);
    run(&["watch", "x"], 2);
    run(&["console", "1"], 2);
    run(&["revert"], 2);
    let text = case.folder.join("text");
    std::fs::write(&text, "no patch").unwrap();
    run(&["apply", "1", text.to_str().unwrap()], 1);
    run(&["apply", "1", case.old.to_str().unwrap()], 1);
    let fixed = |flags: &[&str], name: &str| {
        let old = gcc(&case.folder, name, SERVER, flags);
        let object = case.folder.join("fix.o");
        let recipe =
            Recipe { name: "fix", old: &old, object: &object, replace: &["answer"], may_unwind: false, after: None };
        let fix = write_patch(&recipe, &case.folder.join(format!("{name}.so")));
        (old, fix)
    };
    for (flags, name) in [(&["-static"][..], "static"), (&["-static-pie"], "static-pie")] {
        let (old, fix) = fixed(flags, name);
        let target = Target::start(&old, &[]);
        let out = run(&["apply", &target.pid().to_string(), fix.to_str().unwrap()], 3);
        assert!(out.stderr.contains("does not tell"), "a patch that says nothing of contexts: {}", out.stderr);
    }
    let (old, fix_contexts) = fixed(&["-DCONTEXTS"], "contexts");
    let contexts = Target::start(&old, &[]);
    let pid = contexts.pid().to_string();
    assert!(run(&["apply", &pid, fix_contexts.to_str().unwrap()], 3).stderr.contains("swapcontext"));
    run(&["apply", &pid, fix_contexts.to_str().unwrap(), "--allow", "contexts"], 0);
    // Another tracer.
    let mut traced = Target::start(&case.old, &[]);
    assert_eq!(traced.ask("traceme"), "done");
    let out = run(&["apply", &traced.pid().to_string(), fix], 6);
    assert!(out.stderr.contains("is traced by"), "{}", out.stderr);
    // A memory sharer.
    let mut sharing = Target::start(&case.old, &[]);
    assert_eq!(sharing.ask("share"), "done");
    let out = run(&["apply", &sharing.pid().to_string(), fix], 3);
    assert!(out.stderr.contains("shares the memory"), "{}", out.stderr);
    // A process stopped by job control is patched and stays stopped.
    let mut stopped = Target::start(&case.old, &[]);
    let pid = stopped.pid().to_string();
    signal(&pid, "STOP");
    std::thread::sleep(std::time::Duration::from_millis(50));
    run(&["apply", &pid, fix], 0);
    assert_stopped(&pid);
    signal(&pid, "CONT");
    assert_eq!(stopped.ask("answer 1"), "2042");
    signal(&pid, "STOP");
    std::thread::sleep(std::time::Duration::from_millis(50));
    run(&["revert", &pid], 0);
    assert_stopped(&pid);
    signal(&pid, "CONT");
    assert_eq!(stopped.ask("answer 1"), "1002");
}

fn signal(pid: &str, name: &str) {
    assert!(std::process::Command::new("kill").args([&format!("-{name}"), pid]).status().unwrap().success());
}

/// A thread that is let go while stopped by job control runs for a moment to stop again.
fn assert_stopped(pid: &str) {
    let state = || std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
    for _ in 0..200 {
        if state().contains(") T ") {
            return;
        }
        std::thread::sleep(std::time::Duration::from_millis(5));
    }
    panic!("{}", state());
}
