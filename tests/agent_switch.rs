//! The wait-free switch under everything that a program may do meanwhile: examples/inside.rs patches tests/switch/work.c, asked over its socket.

mod support;

use std::io::Write;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use support::inside::{built, by, Inside};
use support::{example, root, run};

/// What the library does meanwhile, in one test each; so often.
fn under(test: &str, threads: &[&str], cycles: usize) -> i64 {
    let mut inside = Inside::start(test);
    for kind in threads {
        assert_eq!(inside.ask(kind), "started");
    }
    inside.cycles(cycles);
    inside.finish()
}

#[test]
fn callers_and_births_on_new_stacks() {
    under("births", &["call", "births", "births"], 15);
}

#[test]
fn births_that_run_for_longer_than_a_switch() {
    under("long", &["long births", "long births"], 8);
}

#[test]
fn forks_are_of_one_version() {
    assert!(under("forks", &["call", "forks", "forks"], 15) > 20);
}

#[test]
fn children_of_posix_spawn() {
    assert!(under("spawns", &["call", "spawns", "spawns"], 10) > 20);
}

#[test]
fn children_of_vfork_that_call() {
    assert!(under("vforks", &["vforks", "vforks"], 10) > 20);
}

#[test]
fn sleepers_see_no_interruption() {
    assert!(under("sleeps", &["call", "sleeps", "sleeps", "sleeps"], 15) > 20);
}

#[test]
fn handlers_of_the_program_call() {
    under("handlers", &["handlers", "call", "handlers"], 15);
}

#[test]
fn handlers_of_the_program_are_left_by_jumps() {
    let mut inside = Inside::start("jumps");
    inside.ask("jumps");
    inside.ask("jumps");
    inside.cycles(15);
    inside.finish();
    assert!(inside.figure("jumps") > 100);
}

#[test]
fn threads_are_cancelled_anywhere() {
    assert!(under("cancels", &["cancels", "cancels"], 15) > 50);
}

#[test]
fn without_its_first_thread_a_process_is_left_alone() {
    let mut inside = Inside::start("exit");
    inside.ask("call");
    writeln!(inside.child.stdin.as_mut().unwrap(), "ask exit").unwrap();
    std::thread::sleep(Duration::from_millis(50));
    // The kernel shows nothing of its memory any more.
    inside.apply(&[]).expect_code(6).unwrap();
    std::thread::sleep(Duration::from_millis(100));
    assert!(inside.child.try_wait().unwrap().is_none());
}

#[test]
fn the_first_thread_may_end_in_the_middle() {
    let mut inside = Inside::start("exits");
    inside.ask("nap");
    let apply = inside.apply_beside("3s");
    std::thread::sleep(Duration::from_millis(1200));
    writeln!(inside.child.stdin.as_mut().unwrap(), "ask free and exit").unwrap();
    let ran = apply.join().unwrap();
    ran.expect_code(0).unwrap();
}

/// A thread in the old function for long: the apply is taken back, says who, and works once the thread has left.
fn stays(test: &str, how: &str, function: &str) {
    let mut inside = Inside::start(test);
    inside.ask("call");
    inside.ask(how);
    let began = Instant::now();
    let ran = inside.apply(&["--timeout", "400ms"]);
    ran.expect_code(4).unwrap().expect_says(&["taken back", function, "thread"]).unwrap();
    assert!(began.elapsed() < Duration::from_secs(5), "{:?}", began.elapsed());
    assert_eq!(inside.figure("version"), 1);
    let status = inside.run("status", &[]);
    status.expect_code(0).unwrap();
    inside.ask("free");
    inside.cycles(2);
    inside.finish();
}

#[test]
fn a_thread_that_sleeps_in_old_code() {
    stays("nap", "nap", "nap");
}

#[test]
fn a_thread_that_sleeps_in_old_code_and_calls() {
    stays("nap-call", "nap and call", "nap");
}

#[test]
fn a_thread_that_never_leaves_old_code() {
    stays("spin", "spin", "spin");
}

#[test]
fn a_thread_that_never_leaves_old_code_and_calls() {
    stays("spin-call", "spin and call", "spin");
}

#[test]
fn a_switch_that_can_not_be_taken_back_is_finished_later() {
    let mut inside = Inside::start("stuck");
    inside.ask("nap and call");
    // One thread stays in the old code while another gets into the new.
    let apply = inside.apply_beside("1500ms");
    std::thread::sleep(Duration::from_millis(1000));
    inside.ask("nap and call");
    let ran = apply.join().unwrap();
    ran.expect_code(4).unwrap().expect_says(&["neither done nor taken back"]).unwrap();
    // Traps stand; calls are right all the same.
    for _ in 0..20 {
        assert_eq!(inside.figure("mixed"), 0);
    }
    let again = inside.apply(&["--timeout", "300ms"]);
    assert_ne!(again.code, 0, "{}", again.both());
    assert_eq!(inside.figure("mixed"), 0);
    inside.run("status", &[]).expect_code(0).unwrap().expect_prints(&["transitioning"]).unwrap();
    // Nobody goes past the agent meanwhile.
    let held = inside.apply(&["--hold", "--timeout", "300ms"]);
    assert!(held.code == 3 || held.code == 1, "refused, or the agent is at work: {}", held.both());
    let recover = inside.run("recover", &[]);
    assert!(recover.code == 0 || recover.code == 1, "nothing to do, or the agent is at work: {}", recover.both());
    assert_eq!(inside.figure("mixed"), 0);
    inside.ask("free");
    let until = Instant::now() + Duration::from_secs(5);
    while inside.run("status", &[]).stdout.contains("transitioning") {
        assert!(Instant::now() < until, "the agent goes on with it by itself");
        std::thread::sleep(Duration::from_millis(50));
    }
    inside.cycles(3);
    inside.finish();
}

#[test]
fn the_programs_own_traps_are_its_own() {
    let mut inside = Inside::start("trap");
    inside.ask("handle");
    inside.ask("call");
    for round in 1..=4 {
        inside.ask("trap");
        assert_eq!(inside.figure("seen"), 3 * round, "raise, int3 and int 3");
        inside.cycles(2);
    }
    assert_eq!(inside.finish(), 12);
}

#[test]
fn who_blocks_sigtrap_is_held_from_outside() {
    let mut inside = Inside::start("block");
    inside.ask("call");
    inside.ask("block");
    for version in [2, 1] {
        let ran = if version == 2 { inside.apply(&[]) } else { inside.revert(&[]) };
        ran.expect_code(0).unwrap().expect_says(&["asks for the hold from outside", "blocks SIGTRAP"]).unwrap();
        assert_eq!(by(&ran.json().unwrap()), "a hold");
        assert_eq!(inside.figure("version"), version);
    }
    inside.ask("free");
    inside.cycles(1);
    inside.finish();
}

#[test]
fn the_c_librarys_code_never_traps() {
    // It blocks all signals for moments: known by its name.
    let (old, fix) = built("libc", &root().join("tests/switch/work.c"), &[]);
    let library = old.with_file_name("libc-like.so");
    std::fs::copy(&old, &library).unwrap();
    let mut inside = Inside::start_with("libc", &library, &fix, Command::new(example("inside")));
    inside.ask("call");
    for version in [2, 1] {
        let ran = if version == 2 { inside.apply(&[]) } else { inside.revert(&[]) };
        ran.expect_code(0).unwrap().expect_says(&["asks for the hold from outside", "C library"]).unwrap();
        assert_eq!(by(&ran.json().unwrap()), "a hold");
        assert_eq!(inside.figure("version"), version);
    }
    inside.finish();
}

#[test]
fn the_hold_and_the_switch_follow_each_other() {
    let mut inside = Inside::start("both");
    inside.ask("call");
    for (apply, revert) in [(&["--hold"][..], &[][..]), (&[], &["--hold"]), (&[], &[])] {
        for version in [2, 1] {
            let ran = if version == 2 { inside.apply(apply) } else { inside.revert(revert) };
            ran.expect_code(0).unwrap();
            assert_eq!(inside.figure("version"), version);
        }
    }
    inside.finish();
}

#[test]
fn functions_with_endbr64() {
    let (old, fix) = built("endbr", &root().join("tests/switch/work.c"), &["-fcf-protection=full"]);
    let mut inside = Inside::start_with("endbr", &old, &fix, Command::new(example("inside")));
    inside.ask("call");
    inside.cycles(10);
    inside.finish();
}

#[test]
fn many_cycles_leave_nothing_behind() {
    let mut inside = Inside::start("many");
    inside.ask("call");
    inside.ask("sleeps");
    let pid = inside.pid;
    // Its threads open files for moments.
    let now = || std::fs::read_dir(format!("/proc/{pid}/fd")).unwrap().count();
    let descriptors = || (0..20).map(|_| (now(), std::thread::sleep(Duration::from_millis(3))).0).min();
    let resident = || {
        let statm = std::fs::read_to_string(format!("/proc/{pid}/statm")).unwrap();
        statm.split(' ').nth(1).unwrap().parse::<i64>().unwrap() * 4
    };
    inside.cycles(3);
    let before = (descriptors(), resident());
    inside.flip(400);
    let after = (descriptors(), resident());
    println!("descriptors and resident KiB: {before:?}, after 200 cycles {after:?}");
    assert_eq!(before.0, after.0);
    assert!(after.1 - before.1 < 1024, "{before:?} {after:?}");
    let status = inside.run("status", &[]);
    assert!(status.stdout.contains("no patch") || status.stdout.contains("reverted"), "{}", status.both());
    inside.finish();
}

#[test]
fn a_pid_namespace() {
    let mut command = Command::new("unshare");
    command.args(["--pid", "--fork", "--kill-child", "--mount-proc"]).arg(example("inside"));
    if !run(Command::new("unshare").args(["--pid", "--fork", "--mount-proc", "true"])).stderr.is_empty() {
        eprintln!("not tested, for want of root: a PID namespace");
        return;
    }
    let mut inside = Inside::start_by("namespace", command);
    let unshare = inside.pid;
    let children = std::fs::read_to_string(format!("/proc/{unshare}/task/{unshare}/children")).unwrap();
    inside.pid = children.trim().parse().unwrap();
    inside.ask("call");
    inside.ask("births");
    inside.cycles(5);
    inside.finish();
}

#[test]
fn a_pid_namespace_that_sees_the_proc_of_another() {
    let mut command = Command::new("unshare");
    command.args(["--pid", "--fork", "--kill-child"]).arg(example("inside"));
    if !run(Command::new("unshare").args(["--pid", "--fork", "true"])).stderr.is_empty() {
        eprintln!("not tested, for want of root: a PID namespace");
        return;
    }
    let (old, fix) = built("foreign", &root().join("tests/switch/work.c"), &[]);
    let socket = std::env::temp_dir().join(format!("livepatch-foreign-{}.sock", std::process::id()));
    let out =
        command.arg(old).arg(&socket).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().and_then(|mut child| {
            writeln!(child.stdin.as_mut().unwrap(), "apply {}", fix.display())?;
            child.wait_with_output()
        });
    let said = String::from_utf8_lossy(&out.unwrap().stdout).into_owned();
    println!("{said}");
    assert!(!said.contains("\"action\""), "{said}");
}

#[test]
fn a_process_that_may_not_be_dumped() {
    let mut inside = Inside::start("dumpable");
    inside.ask("call");
    inside.ask("not dumpable");
    inside.cycles(2);
    inside.finish();
}

#[test]
fn a_filter_of_system_calls_that_comes_later() {
    let mut inside = Inside::start("confined");
    inside.ask("call");
    inside.cycles(1);
    inside.ask("confine");
    for version in [2, 1] {
        let ran = if version == 2 { inside.apply(&[]) } else { inside.revert(&[]) };
        ran.expect_code(0).unwrap().expect_says(&["asks for the hold from outside", "process_vm_readv"]).unwrap();
        assert_eq!(inside.figure("version"), version);
    }
    inside.finish();
}

#[test]
fn an_ordinary_users_program() {
    use std::os::unix::process::CommandExt;
    const NOBODY: u32 = 65_534;
    let (old, fix) = built("nobody", &root().join("tests/switch/work.c"), &[]);
    let folder = std::env::temp_dir().join(format!("livepatch-nobody-switch-{}", std::process::id()));
    std::fs::create_dir_all(&folder).unwrap();
    for (from, to) in [(example("inside"), "inside"), (old, "work.so")] {
        std::fs::copy(from, folder.join(to)).unwrap();
    }
    let mut command = Command::new(folder.join("inside"));
    if run(Command::new("id").arg("-u")).stdout.trim() == "0" {
        command.uid(NOBODY).gid(NOBODY);
    }
    let mut inside = Inside::start_with("nobody", &folder.join("work.so"), &fix, command);
    for kind in ["call", "sleeps", "births", "forks"] {
        inside.ask(kind);
    }
    inside.cycles(6);
    inside.finish();
    // Its own files in /proc are root's then.
    inside.ask("not dumpable");
    let ran = inside.apply(&[]);
    if run(Command::new("id").arg("-u")).stdout.trim() == "0" {
        ran.expect_code(0).unwrap().expect_says(&["asks for the hold from outside"]).unwrap();
    } else {
        ran.expect_code(6).unwrap();
    }
    drop(inside);
    std::fs::remove_dir_all(&folder).unwrap();
}

#[test]
fn a_child_of_fork_in_a_switch_can_be_patched_from_outside() {
    let mut inside = Inside::start("child");
    inside.ask("nap");
    let apply = inside.apply_beside("1s");
    std::thread::sleep(Duration::from_millis(600));
    let child = inside.ask("child");
    apply.join().unwrap().expect_code(4).unwrap();
    let command = |args: &[&str]| run(Command::new(env!("CARGO_BIN_EXE_livepatch")).args(args));
    let status = command(&["status", &child]);
    println!("{}", status.both());
    println!("{}", command(&["recover", &child]).both());
    let fix = inside.fix.clone();
    println!("{}", command(&["apply", &child, &fix]).both());
    command(&["revert", &child]).expect_code(0).unwrap();
    inside.finish();
}
