//! What the cases of `agent_masks` share: an owner whose handlers count, and the kernel's own view of masks.

use std::ffi::{c_int, c_void};
use std::mem::zeroed;
use std::ptr::{null, null_mut};
use std::sync::atomic::{AtomicI32, AtomicU32, Ordering::SeqCst};

use livepatch::agent::masks;

/// The signal by which threads are looked at.
pub const LOOK: c_int = libc::SIGURG;

/// Traps that the handler of the "agent" took for its own.
pub static OWN: AtomicU32 = AtomicU32::new(0);
pub static LOOKS: AtomicU32 = AtomicU32::new(0);
/// Traps that the program's own handler got.
pub static FOREIGN: AtomicU32 = AtomicU32::new(0);
/// Whether the "agent" passes traps on.
pub static PASSES: AtomicU32 = AtomicU32::new(0);

pub unsafe extern "C-unwind" fn on_trap(signal: c_int, info: *mut libc::siginfo_t, context: *mut c_void) {
    if PASSES.load(SeqCst) == 0 {
        OWN.fetch_add(1, SeqCst);
    } else {
        // SAFETY: in the handler, with its arguments, and nothing to drop.
        unsafe { masks::pass_on(signal, info, context) };
    }
}

pub unsafe extern "C-unwind" fn on_look(_: c_int, _: *mut libc::siginfo_t, _: *mut c_void) {
    LOOKS.fetch_add(1, SeqCst);
}

pub fn own() {
    masks::own(LOOK).expect("ownership");
    // SAFETY: both handlers only count.
    unsafe {
        masks::install(libc::SIGTRAP, on_trap, 0).expect("a handler of SIGTRAP");
        masks::install(LOOK, on_look, 0).expect("a handler to look");
    }
    assert!(masks::is_owned() && masks::is_installed(libc::SIGTRAP));
}

/// An owner that passes everything on.
pub fn own_and_pass_on() {
    PASSES.store(1, SeqCst);
    own();
}

pub fn int3() {
    // SAFETY: a trap, whose handler comes back.
    unsafe { core::arch::asm!("int3") };
}

pub fn traps() -> u32 {
    OWN.load(SeqCst)
}

pub fn full() -> libc::sigset_t {
    // SAFETY: plain data.
    unsafe {
        let mut set = zeroed();
        libc::sigfillset(&mut set);
        set
    }
}

pub fn has(set: &libc::sigset_t, signal: c_int) -> bool {
    // SAFETY: a set that lives.
    unsafe { libc::sigismember(set, signal) == 1 }
}

pub fn block_all() {
    // SAFETY: a set that lives.
    assert_eq!(unsafe { libc::pthread_sigmask(libc::SIG_SETMASK, &full(), null_mut()) }, 0);
}

pub fn mask() -> libc::sigset_t {
    // SAFETY: plain data.
    unsafe {
        let mut set = zeroed();
        assert_eq!(libc::pthread_sigmask(libc::SIG_BLOCK, null(), &mut set), 0);
        set
    }
}

/// Changes the mask past every wrapper, and gives the one before.
pub fn direct_mask(how: c_int, set: u64) -> u64 {
    let mut old = 0_u64;
    // SAFETY: two words of this function.
    unsafe { libc::syscall(libc::SYS_rt_sigprocmask, how, &set, &mut old, 8) };
    old
}

pub fn kernel_mask() -> u64 {
    direct_mask(libc::SIG_BLOCK, 0)
}

pub const fn bit(signal: c_int) -> u64 {
    1 << (signal - 1)
}

pub const BOTH: u64 = bit(libc::SIGTRAP) | bit(LOOK);

pub fn action(handler: usize, flags: c_int, mask: libc::sigset_t) -> libc::sigaction {
    libc::sigaction { sa_sigaction: handler, sa_mask: mask, sa_flags: flags, sa_restorer: None }
}

/// `sigaction`, and what was there before.
pub fn handle(signal: c_int, new: Option<libc::sigaction>) -> libc::sigaction {
    // SAFETY: actions of this program.
    unsafe {
        let mut old = zeroed();
        let new = new.as_ref().map_or(null(), |a| a as *const _);
        assert_eq!(libc::sigaction(signal, new, &mut old), 0);
        old
    }
}

pub extern "C" fn plain_handler(_: c_int) {
    FOREIGN.fetch_add(1, SeqCst);
}

/// What the handler with information saw: the signal's code, and the address of the trap is in the context.
pub static CODE: AtomicI32 = AtomicI32::new(0);

pub extern "C" fn info_handler(signal: c_int, info: *mut libc::siginfo_t, context: *mut c_void) {
    assert_eq!(signal, libc::SIGTRAP);
    // SAFETY: what the kernel told.
    unsafe {
        CODE.store((*info).si_code, SeqCst);
        let rip = (*context.cast::<libc::ucontext_t>()).uc_mcontext.gregs[libc::REG_RIP as usize];
        assert_eq!(*((rip - 1) as *const u8), 0xcc);
    }
    FOREIGN.fetch_add(1, SeqCst);
}
