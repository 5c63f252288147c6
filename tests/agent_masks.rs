//! Ownership of SIGTRAP. Signals belong to a whole process, so each case runs in a process of its own: this program
//! starts itself once for every case.
//!
//! `cargo test --features agent --test agent_masks [NAME]`
#![allow(unsafe_code)]

use std::ffi::{c_int, c_void, CString};
use std::mem::zeroed;
use std::os::unix::process::ExitStatusExt;
use std::process::{Command, Stdio};
use std::ptr::{null, null_mut};
use std::sync::atomic::{AtomicI32, AtomicU32, Ordering::SeqCst};
use std::thread;
use std::time::{Duration, Instant};

use livepatch::agent::masks::{self, Chained, OwnError};

#[path = "agent_masks/support.rs"]
mod support;
use support::*;

/// How a case ends: 0, or by the signal.
type Case = (&'static str, fn(), Option<c_int>);

const CASES: &[Case] = &[
    ("nothing changes before there is an owner", unowned, None),
    ("a thread that blocks everything meets an int3", blocked_thread, None),
    ("masks are reported as they were asked for", reported, None),
    ("a library's calls arrive", library, None),
    ("a library's ppoll, fortified", fortified, None),
    ("a cancelled thread unwinds through a wait", cancelled, None),
    ("a handler from before is chained", chained_before, None),
    ("a handler from later is chained", chained_after, None),
    ("a chained handler's mask holds, but for SIGTRAP", chained_mask, None),
    ("a chained handler's changes of the context", chained_context, None),
    ("a chained handler that jumps out", chained_jump, None),
    ("the other signal is passed on", look_passed_on, None),
    ("a chained handler that resets itself", resets, Some(libc::SIGTRAP)),
    ("the default action kills", default_int3, Some(libc::SIGTRAP)),
    ("the default action kills after kill", default_kill, Some(libc::SIGTRAP)),
    ("an ignored int3 kills", ignored_int3, Some(libc::SIGTRAP)),
    ("an ignored signal is ignored", ignored_kill, None),
    ("other handlers do not block it", other_handlers, None),
    ("waits with full masks are looked at", waits, None),
    ("a mask set by the system call is found", direct, None),
    ("a mask from before is found, and healed", earlier, None),
    ("children of fork", forked, None),
    ("everything is given back", disowned, None),
    ("a handler displaced by the system call is noticed", displaced, None),
    ("threads come and go", storm, None),
    ("handlers change while traps come", changing, None),
    ("what cannot be owned", refused, None),
];

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    if let [flag, name] = &arguments[..] {
        if flag == "--case" {
            let (_, case, _) = CASES.iter().find(|(n, _, _)| n == name).expect("a case of this name");
            // SAFETY: a limit of this process.
            unsafe { libc::setrlimit(libc::RLIMIT_CORE, &libc::rlimit { rlim_cur: 0, rlim_max: 0 }) };
            return case();
        }
    }
    // What asks for the list of tests gets one, of all cases.
    if arguments.iter().any(|a| a == "--list") {
        if !arguments.iter().any(|a| a == "--ignored") {
            println!("cases: test");
        }
        return;
    }
    let one = arguments.iter().find(|a| !a.starts_with('-') && *a != "cases");
    let filter = one.cloned().unwrap_or_default();
    let mut failed = 0;
    for (name, _, dies_of) in CASES.iter().filter(|(n, _, _)| n.contains(&filter)) {
        let own = std::env::current_exe().expect("the path of this program");
        let output = Command::new(own).args(["--case", name]).stdin(Stdio::null()).output().expect("a started case");
        let right = match dies_of {
            Some(signal) => output.status.signal() == Some(*signal),
            None => output.status.success(),
        };
        println!("{name}: {}", if right { "ok" } else { "FAILED" });
        if !right {
            failed += 1;
            println!("{}\n{}", output.status, String::from_utf8_lossy(&output.stderr));
        }
    }
    assert!(failed == 0, "{failed} cases failed");
}

fn unowned() {
    block_all();
    assert_ne!(kernel_mask() & bit(libc::SIGTRAP), 0);
    assert!(has(&mask(), libc::SIGTRAP));
    direct_mask(libc::SIG_SETMASK, 0);
    handle(libc::SIGTRAP, Some(action(plain_handler as *const () as usize, 0, full())));
    assert!(has(&handle(libc::SIGTRAP, None).sa_mask, LOOK));
    int3();
    assert_eq!(FOREIGN.load(SeqCst), 1);
    assert!(!masks::is_owned());
}

fn blocked_thread() {
    own();
    thread::spawn(|| {
        block_all();
        int3();
    })
    .join()
    .unwrap();
    assert_eq!(traps(), 1);
    block_all();
    int3();
    thread::spawn(int3).join().unwrap();
    assert_eq!(traps(), 3);
    assert!(masks::blocked_threads(&[libc::SIGTRAP, LOOK]).unwrap().is_empty());
}

fn reported() {
    own();
    assert!(!has(&mask(), libc::SIGTRAP));
    block_all();
    assert_eq!(kernel_mask() & BOTH, 0);
    assert_ne!(kernel_mask() & bit(libc::SIGUSR1), 0);
    assert!(has(&mask(), libc::SIGTRAP) && has(&mask(), LOOK) && has(&mask(), libc::SIGUSR1));
    // SAFETY: sets that live.
    unsafe {
        let (mut one, mut old): (libc::sigset_t, libc::sigset_t) = (zeroed(), zeroed());
        libc::sigaddset(&mut one, libc::SIGTRAP);
        assert_eq!(libc::sigprocmask(libc::SIG_UNBLOCK, &one, &mut old), 0);
        assert!(has(&old, libc::SIGTRAP));
        assert!(!has(&mask(), libc::SIGTRAP) && has(&mask(), LOOK));
        assert_eq!(libc::sigprocmask(libc::SIG_BLOCK, &one, &mut old), 0);
        assert!(!has(&old, libc::SIGTRAP) && has(&mask(), libc::SIGTRAP));
        let empty = zeroed();
        assert_eq!(libc::sigprocmask(libc::SIG_SETMASK, &empty, &mut old), 0);
        assert!(has(&old, libc::SIGTRAP) && !has(&mask(), libc::SIGTRAP));
        assert_eq!(libc::sigprocmask(99, &empty, null_mut()), -1);
        assert_eq!(libc::pthread_sigmask(99, &empty, null_mut()), libc::EINVAL);
    }
    int3();
    assert_eq!(traps(), 1);
}

/// A function of the shared library, which is built on first use; `None` in a static program.
fn library_function(name: &str) -> Option<*mut c_void> {
    if cfg!(target_feature = "crt-static") {
        return None;
    }
    static BUILT: AtomicU32 = AtomicU32::new(0);
    let path = std::env::temp_dir().join(format!("agent_masks-{}.so", std::process::id()));
    if BUILT.swap(1, SeqCst) == 0 {
        let source = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/agent_masks/library.c");
        let mut cc = Command::new("cc");
        cc.args(["-shared", "-fPIC", "-O2", "-D_FORTIFY_SOURCE=2", "-Wno-deprecated-declarations", "-pthread", source]);
        assert!(cc.arg("-o").arg(&path).status().expect("cc").success());
    }
    let (path_c, name) = (CString::new(path.to_str().unwrap()).unwrap(), CString::new(name).unwrap());
    // SAFETY: strings with their ends; the library has no constructors.
    let function = unsafe { libc::dlsym(libc::dlopen(path_c.as_ptr(), libc::RTLD_NOW), name.as_ptr()) };
    assert!(!function.is_null(), "{name:?}");
    Some(function)
}

fn call_library(name: &str) -> bool {
    let Some(function) = library_function(name) else { return false };
    // SAFETY: the type that the library's source says.
    let function: extern "C" fn() -> c_int = unsafe { std::mem::transmute(function) };
    assert_eq!(function(), 0, "{name}");
    true
}

fn library() {
    library_function("lib_sigaction"); // built before everything is blocked
    own();
    let names =
        ["lib_sigprocmask", "lib_pthread_sigmask", "lib_sigblock", "lib_sigaction", "lib_attributes", "lib_creator"];
    for (n, name) in names.into_iter().enumerate() {
        let called = thread::spawn(move || call_library(name)).join().unwrap();
        assert!(!called || traps() == n as u32 + 1, "{name}");
    }
    remove_library();
}

fn remove_library() {
    let _ = std::fs::remove_file(std::env::temp_dir().join(format!("agent_masks-{}.so", std::process::id())));
}

fn cancelled() {
    own();
    call_library("lib_cancel");
    remove_library();
    assert!(masks::blocked_threads(&[libc::SIGTRAP, LOOK]).unwrap().is_empty());
}

fn fortified() {
    let Some(function) = library_function("lib_ppoll") else { return };
    remove_library();
    own();
    // SAFETY: the type that the library's source says.
    let function: extern "C" fn(*mut libc::pollfd, c_int) -> c_int = unsafe { std::mem::transmute(function) };
    looked_at("ppoll of a library", move || {
        let mut none = libc::pollfd { fd: -1, events: 0, revents: 0 };
        function(&mut none, 1)
    });
}

fn chained_before() {
    handle(libc::SIGTRAP, Some(action(info_handler as *const () as usize, libc::SA_SIGINFO, full())));
    own_and_pass_on();
    int3();
    assert_eq!((FOREIGN.load(SeqCst), CODE.load(SeqCst)), (1, 0x80));
    let now = handle(libc::SIGTRAP, None);
    assert_eq!(now.sa_sigaction, info_handler as *const () as usize);
    assert!(has(&now.sa_mask, libc::SIGTRAP) && has(&now.sa_mask, LOOK));
    assert_eq!(masks::chained().handler, now.sa_sigaction);
    assert_eq!(kernel_mask(), 0);
}

fn chained_after() {
    own_and_pass_on();
    let plain = plain_handler as *const () as usize;
    // SAFETY: a handler of this program.
    assert_eq!(unsafe { libc::signal(libc::SIGTRAP, plain) }, libc::SIG_DFL);
    int3();
    assert_eq!(FOREIGN.load(SeqCst), 1);
    let before = handle(libc::SIGTRAP, Some(action(info_handler as *const () as usize, libc::SA_SIGINFO, full())));
    assert_eq!(before.sa_sigaction, plain);
    int3();
    assert_eq!((FOREIGN.load(SeqCst), CODE.load(SeqCst)), (2, 0x80));
    assert!(masks::is_installed(libc::SIGTRAP));
    // the other signal, too
    handle(LOOK, Some(action(plain, 0, full())));
    assert_eq!(masks::chained_of(LOOK).map(|c| c.handler), Some(plain));
    assert!(masks::is_installed(LOOK));
    assert_eq!(masks::chained_of(libc::SIGUSR1), None);
}

extern "C" fn nested_handler(_: c_int) {
    assert_ne!(kernel_mask() & bit(libc::SIGUSR1), 0);
    assert_eq!(kernel_mask() & BOTH, 0);
    PASSES.store(0, SeqCst);
    int3(); // of the agent, in a function that the handler calls
    FOREIGN.fetch_add(1, SeqCst);
}

fn chained_mask() {
    own_and_pass_on();
    handle(libc::SIGTRAP, Some(action(nested_handler as *const () as usize, 0, full())));
    int3();
    assert_eq!((traps(), FOREIGN.load(SeqCst), kernel_mask()), (1, 1, 0));
}

extern "C" fn blocking_handler(_: c_int, _: *mut libc::siginfo_t, context: *mut c_void) {
    // SAFETY: what the kernel told.
    unsafe { (*context.cast::<libc::ucontext_t>()).uc_sigmask = full() };
}

fn chained_context() {
    own_and_pass_on();
    handle(libc::SIGTRAP, Some(action(blocking_handler as *const () as usize, libc::SA_SIGINFO, full())));
    int3();
    assert_eq!(kernel_mask() & (BOTH | bit(libc::SIGUSR1)), bit(libc::SIGUSR1));
    int3();
}

fn chained_jump() {
    own_and_pass_on();
    call_library("lib_jump");
    remove_library();
    assert_eq!(kernel_mask(), 0);
}

fn look_passed_on() {
    own();
    // SAFETY: it only passes on.
    unsafe { masks::install(LOOK, on_trap, 0).unwrap() };
    PASSES.store(1, SeqCst);
    let look = || {
        // SAFETY: a signal to this thread.
        unsafe { libc::raise(LOOK) };
    };
    look(); // whose default is to be ignored
    assert!(masks::is_installed(LOOK));
    handle(LOOK, Some(action(plain_handler as *const () as usize, 0, full())));
    look();
    assert_eq!(FOREIGN.load(SeqCst), 1);
    masks::disown();
    look();
    assert_eq!((FOREIGN.load(SeqCst), handle(LOOK, None).sa_sigaction), (2, plain_handler as *const () as usize));
}

fn resets() {
    own_and_pass_on();
    handle(libc::SIGTRAP, Some(action(plain_handler as *const () as usize, libc::SA_RESETHAND, full())));
    int3();
    assert_eq!((FOREIGN.load(SeqCst), handle(libc::SIGTRAP, None).sa_sigaction), (1, libc::SIG_DFL));
    int3();
}

fn default_int3() {
    own_and_pass_on();
    block_all();
    int3();
}

fn default_kill() {
    own_and_pass_on();
    // SAFETY: a signal to this process.
    unsafe { libc::kill(libc::getpid(), libc::SIGTRAP) };
    thread::sleep(Duration::from_secs(10));
}

fn ignore() {
    own_and_pass_on();
    handle(libc::SIGTRAP, Some(action(libc::SIG_IGN, 0, full())));
    assert_eq!(masks::chained(), Chained { handler: libc::SIG_IGN, flags: 0, mask: masks::chained().mask });
}

fn ignored_int3() {
    ignore();
    int3();
}

fn ignored_kill() {
    ignore();
    // SAFETY: a signal to this thread.
    unsafe { libc::raise(libc::SIGTRAP) };
}

extern "C" fn trapping_handler(_: c_int) {
    assert_eq!(kernel_mask() & BOTH, 0);
    int3();
}

fn other_handlers() {
    let handler = trapping_handler as *const () as usize;
    handle(libc::SIGUSR1, Some(action(handler, libc::SA_RESTART, full())));
    own();
    let before = handle(libc::SIGUSR2, Some(action(handler, 0, full())));
    assert_eq!(before.sa_sigaction, libc::SIG_DFL);
    for signal in [libc::SIGUSR1, libc::SIGUSR2] {
        // SAFETY: a signal to this thread.
        unsafe { libc::raise(signal) };
        let now = handle(signal, None);
        assert!(has(&now.sa_mask, libc::SIGTRAP) && has(&now.sa_mask, LOOK) && has(&now.sa_mask, libc::SIGHUP));
        assert_eq!(now.sa_sigaction, handler);
    }
    assert_ne!(handle(libc::SIGUSR1, None).sa_flags & libc::SA_RESTART, 0);
    assert_eq!(traps(), 2);
}

/// A thread waits with a full mask; looked at, it comes back with EINTR.
fn looked_at(name: &str, wait: impl FnOnce() -> c_int + Send + 'static) {
    let tid = std::sync::Arc::new(AtomicI32::new(0));
    let (seen, theirs) = (LOOKS.load(SeqCst), tid.clone());
    let waiter = thread::spawn(move || {
        // SAFETY: the number of this thread.
        theirs.store(unsafe { libc::gettid() }, SeqCst);
        let result = wait();
        (result, std::io::Error::last_os_error().raw_os_error())
    });
    let start = Instant::now();
    while LOOKS.load(SeqCst) == seen {
        assert!(start.elapsed() < Duration::from_secs(5), "{name}: never looked at");
        thread::sleep(Duration::from_millis(20));
        // SAFETY: a signal to a thread of this process.
        unsafe { libc::syscall(libc::SYS_tgkill, libc::getpid(), tid.load(SeqCst), LOOK) };
    }
    while !waiter.is_finished() && start.elapsed() < Duration::from_secs(5) {
        thread::sleep(Duration::from_millis(20));
        // SAFETY: as above; the first one may have come before the wait.
        unsafe { libc::syscall(libc::SYS_tgkill, libc::getpid(), tid.load(SeqCst), LOOK) };
    }
    assert_eq!(waiter.join().unwrap(), (-1, Some(libc::EINTR)), "{name}");
}

fn waits() {
    own();
    // SAFETY: each call gets null or values that live while it waits.
    unsafe {
        let mut none = libc::pollfd { fd: -1, events: 0, revents: 0 };
        looked_at("sigsuspend", || libc::sigsuspend(&full()));
        looked_at("ppoll", move || libc::ppoll(&mut none, 1, null(), &full()));
        looked_at("pselect", || libc::pselect(0, null_mut(), null_mut(), null_mut(), null(), &full()));
        let epoll = libc::epoll_create1(0);
        let mut event = libc::epoll_event { events: 0, u64: 0 };
        if !cfg!(all(target_env = "musl", target_feature = "crt-static")) {
            looked_at("epoll_pwait", move || libc::epoll_pwait(epoll, &mut event, 1, -1, &full()));
        }
        #[cfg(target_env = "gnu")]
        {
            extern "C" {
                fn epoll_pwait2(
                    fd: c_int,
                    events: *mut libc::epoll_event,
                    count: c_int,
                    timeout: *const libc::timespec,
                    mask: *const libc::sigset_t,
                ) -> c_int;
            }
            looked_at("epoll_pwait2", move || epoll_pwait2(epoll, &mut event, 1, null(), &full()));
        }
        // a timeout is kept, and is the caller's own
        let short = libc::timespec { tv_sec: 0, tv_nsec: 20_000_000 };
        let start = Instant::now();
        assert_eq!(libc::ppoll(&mut none, 1, &short, &full()), 0);
        assert_eq!(libc::pselect(0, null_mut(), null_mut(), null_mut(), &short, &full()), 0);
        assert!(start.elapsed() >= Duration::from_millis(40));
        assert_eq!((short.tv_sec, short.tv_nsec), (0, 20_000_000));
    }
    assert_eq!(kernel_mask(), 0);
}

/// The threads that have SIGTRAP blocked, by name.
fn blocked() -> Vec<String> {
    masks::blocked_threads(&[libc::SIGTRAP]).unwrap().into_iter().map(|(_, name)| name).collect()
}

/// Runs a thread of this name that does the first thing, waits, does the second, and waits again.
fn in_steps(name: &str, first: fn(), second: fn(), between: impl FnOnce(), after: impl FnOnce()) {
    let gate = std::sync::Arc::new(std::sync::Barrier::new(2));
    let theirs = gate.clone();
    let body = move || {
        first();
        theirs.wait();
        theirs.wait();
        second();
        theirs.wait();
        theirs.wait();
    };
    let worker = thread::Builder::new().name(name.into()).spawn(body).unwrap();
    gate.wait();
    between();
    gate.wait();
    gate.wait();
    after();
    gate.wait();
    worker.join().unwrap();
}

fn direct() {
    own();
    let block = || {
        direct_mask(libc::SIG_SETMASK, !0);
    };
    in_steps("direct", block, block_all, || assert_eq!(blocked(), ["direct"]), || assert!(blocked().is_empty()));
    assert!(blocked().is_empty());
}

fn earlier() {
    let one_more = || {
        // SAFETY: sets that live.
        unsafe {
            let (mut set, mut old) = (zeroed(), zeroed());
            libc::sigaddset(&mut set, libc::SIGUSR1);
            assert_eq!(libc::pthread_sigmask(libc::SIG_BLOCK, &set, &mut old), 0);
            assert!(has(&old, libc::SIGTRAP) && has(&mask(), libc::SIGTRAP));
        }
        int3();
    };
    let owned = || {
        own();
        assert_eq!(blocked(), ["earlier"]);
    };
    in_steps("earlier", block_all, one_more, owned, || assert!(blocked().is_empty()));
    assert_eq!(traps(), 1);
}

fn forked() {
    own();
    block_all();
    // SAFETY: the child only traps and ends.
    unsafe {
        let child = libc::fork();
        if child == 0 {
            int3();
            libc::_exit(if traps() == 1 && has(&mask(), libc::SIGTRAP) { 7 } else { 1 });
        }
        let mut status = 0;
        assert_eq!(libc::waitpid(child, &mut status, 0), child);
        assert_eq!(libc::WEXITSTATUS(status), 7);
    }
    assert!(Command::new("true").status().unwrap().success());
}

fn disowned() {
    let plain = plain_handler as *const () as usize;
    handle(libc::SIGUSR1, Some(action(plain, 0, full())));
    own();
    handle(libc::SIGTRAP, Some(action(plain, 0, full())));
    int3();
    masks::disown();
    assert!(!masks::is_owned() && !masks::is_installed(libc::SIGTRAP));
    int3();
    assert_eq!((traps(), FOREIGN.load(SeqCst)), (1, 1));
    assert!(has(&handle(libc::SIGUSR1, None).sa_mask, libc::SIGTRAP));
    assert_eq!(handle(LOOK, None).sa_sigaction, libc::SIG_DFL);
    block_all();
    assert_ne!(kernel_mask() & bit(libc::SIGTRAP), 0);
    own();
    assert_eq!(kernel_mask() & BOTH, 0);
    assert!(has(&mask(), libc::SIGTRAP));
    assert_eq!(masks::chained().handler, plain);
}

fn storm() {
    own();
    let end = Instant::now() + Duration::from_millis(1500);
    let makers: Vec<_> = (0..3)
        .map(|_| {
            thread::spawn(move || {
                block_all();
                let mut made = 0;
                while Instant::now() < end {
                    thread::spawn(|| {
                        block_all();
                        int3();
                    })
                    .join()
                    .unwrap();
                    made += 1;
                }
                made
            })
        })
        .collect();
    while Instant::now() < end {
        assert!(blocked().is_empty());
    }
    let made: u32 = makers.into_iter().map(|m| m.join().unwrap()).sum();
    assert_eq!(traps(), made);
}

fn refused() {
    for signal in [0, -1, 32, 33, 65, libc::SIGKILL, libc::SIGSTOP, libc::SIGTRAP, libc::SIGSEGV] {
        assert!(matches!(masks::own(signal), Err(OwnError::UnfitSignal { .. })), "{signal}");
    }
    assert!(!masks::is_owned());
    // SAFETY: refused, for there is no owner.
    assert!(unsafe { masks::install(libc::SIGTRAP, on_trap, 0) }.is_err());
    own();
    assert!(matches!(masks::own(LOOK), Err(OwnError::AlreadyOwned)));
}

fn displaced() {
    own();
    #[repr(C)]
    struct Action([usize; 4]);
    let ignore = Action([libc::SIG_IGN, 0, 0, 0]);
    // SAFETY: the kernel's own form of an action.
    unsafe { libc::syscall(libc::SYS_rt_sigaction, libc::SIGTRAP, &ignore, 0, 8) };
    assert!(!masks::is_installed(libc::SIGTRAP) && masks::is_installed(LOOK));
    assert!(!masks::is_installed(libc::SIGUSR1));
}

fn changing() {
    own_and_pass_on();
    let handlers = [
        action(plain_handler as *const () as usize, 0, full()),
        action(info_handler as *const () as usize, libc::SA_SIGINFO, full()),
    ];
    handle(libc::SIGTRAP, Some(handlers[0]));
    let end = Instant::now() + Duration::from_millis(700);
    let trapping = || {
        let mut count = 0;
        while Instant::now() < end {
            int3();
            count += 1;
        }
        count
    };
    let traps: u32 = thread::scope(|s| {
        s.spawn(|| {
            for n in (0..2).cycle().take_while(|_| Instant::now() < end) {
                let before = handle(libc::SIGTRAP, Some(handlers[n]));
                let known = handlers.iter().find(|h| h.sa_sigaction == before.sa_sigaction).expect("a whole action");
                assert_eq!(before.sa_flags, known.sa_flags);
            }
        });
        [s.spawn(trapping), s.spawn(trapping)].into_iter().map(|t| t.join().unwrap()).sum()
    });
    assert_eq!(FOREIGN.load(SeqCst), traps);
}
