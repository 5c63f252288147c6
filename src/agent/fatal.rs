//! The last word of a process that dies in patched code: which patch it was.
//!
//! A thread whose code is wrong does not go on: it gets the fate that it would have had, after one line on standard error and in the audit file
//! that names the patch.
//!
//! Contract of the `unsafe` in this module: handlers use atomics and write(2) only; the kernel hands them a `ucontext_t` that is theirs until they
//! return; actions are plain data, valid for any bytes.
#![allow(unsafe_code)]

use std::io;
use std::mem::zeroed;
use std::sync::atomic::{AtomicBool, AtomicI32, AtomicU64, AtomicU8, Ordering};
use std::sync::OnceLock;

use libc::{c_int, c_void, siginfo_t, ucontext_t};

/// What kills.
const SIGNALS: [c_int; 4] = [libc::SIGSEGV, libc::SIGBUS, libc::SIGILL, libc::SIGFPE];

/// So many patches are known at once; more are not named.
const PLACES: usize = 64;

/// Bytes of a name that are kept.
const NAME: usize = 64;

struct Place {
    start: AtomicU64,
    end: AtomicU64,
    name: [AtomicU8; NAME],
}

static PATCHES: [Place; PLACES] =
    [const { Place { start: AtomicU64::new(0), end: AtomicU64::new(0), name: [const { AtomicU8::new(0) }; NAME] } };
        PLACES];
static AUDIT: AtomicI32 = AtomicI32::new(-1);
static BEFORE: OnceLock<[libc::sigaction; 4]> = OnceLock::new();
static INSTALLED: AtomicBool = AtomicBool::new(false);

/// Installs the handlers, in front of those that are there. `audit` is a descriptor that stays open, or -1.
pub fn install(audit: c_int) -> io::Result<()> {
    AUDIT.store(audit, Ordering::SeqCst);
    if INSTALLED.swap(true, Ordering::SeqCst) {
        return Ok(());
    }
    // SAFETY: actions are plain data.
    let mut before: [libc::sigaction; 4] = unsafe { zeroed() };
    for (signal, old) in SIGNALS.into_iter().zip(&mut before) {
        // SAFETY: `old` is a local.
        if unsafe { libc::sigaction(signal, std::ptr::null(), old) } != 0 {
            return Err(io::Error::last_os_error());
        }
    }
    // Before a handler can run that asks for it.
    let _ = BEFORE.set(before);
    for signal in SIGNALS {
        // SAFETY: an action of locals; the handler keeps to the contract.
        unsafe {
            let mut action: libc::sigaction = zeroed();
            action.sa_sigaction = on_fatal as *const () as usize;
            action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK | libc::SA_NODEFER;
            if libc::sigaction(signal, &raw const action, std::ptr::null_mut()) != 0 {
                return Err(io::Error::last_os_error());
            }
        }
    }
    Ok(())
}

/// The patches whose code may run: where each is mapped, and its name.
pub fn set(patches: &[(u64, u64, String)]) {
    for (i, place) in PATCHES.iter().enumerate() {
        place.end.store(0, Ordering::SeqCst);
        let Some((start, end, name)) = patches.get(i) else { continue };
        let mut bytes = name.bytes().chain(std::iter::repeat(0));
        for to in place.name.iter().take(NAME - 1) {
            to.store(bytes.next().unwrap_or(0), Ordering::SeqCst);
        }
        place.start.store(*start, Ordering::SeqCst);
        place.end.store(*end, Ordering::SeqCst);
    }
}

/// A line without an allocation.
struct Line {
    bytes: [u8; 256],
    len: usize,
}

impl Line {
    fn push(&mut self, bytes: &[u8]) {
        for b in bytes {
            if let Some(to) = self.bytes.get_mut(self.len) {
                *to = *b;
                self.len += 1;
            }
        }
    }

    fn number(&mut self, mut n: u64, base: u64) {
        let mut digits = [0u8; 20];
        let mut at = digits.len();
        while let Some(to) = at.checked_sub(1).and_then(|i| digits.get_mut(i)) {
            *to = b"0123456789abcdef"[(n % base) as usize];
            at -= 1;
            n /= base;
            if n == 0 {
                break;
            }
        }
        self.push(digits.get(at..).unwrap_or(&[]));
    }
}

fn say(signal: c_int, pc: u64, place: &Place) {
    let mut line = Line { bytes: [0; 256], len: 0 };
    line.push(b"livepatch: signal ");
    line.number(u64::from(signal.unsigned_abs()), 10);
    line.push(b" in code of patch ");
    for b in &place.name {
        match b.load(Ordering::SeqCst) {
            0 => break,
            b => line.push(&[b]),
        }
    }
    line.push(b", at 0x");
    line.number(pc, 16);
    line.push(b", ");
    line.number(pc - place.start.load(Ordering::SeqCst), 10);
    line.push(b" bytes into its mapping; process ");
    // SAFETY: it takes nothing and cannot fail.
    line.number(u64::from(unsafe { libc::getpid() }.unsigned_abs()), 10);
    line.push(b"\n");
    for fd in [2, AUDIT.load(Ordering::SeqCst)] {
        if fd >= 0 {
            // SAFETY: a local of that length.
            let _ = unsafe { libc::write(fd, line.bytes.as_ptr().cast(), line.len) };
        }
    }
}

extern "C" fn on_fatal(signal: c_int, info: *mut siginfo_t, context: *mut c_void) {
    // SAFETY: the kernel's, until this returns.
    let pc = unsafe { (*context.cast::<ucontext_t>()).uc_mcontext.gregs[libc::REG_RIP as usize] }.cast_unsigned();
    let hit = PATCHES.iter().find(|p| p.start.load(Ordering::SeqCst) <= pc && pc < p.end.load(Ordering::SeqCst));
    if let Some(place) = hit {
        say(signal, pc, place);
    }
    // What was there before gets it: the instruction is executed once more, and fails once more. A signal that somebody sent is not lost, for
    // the kernel's own come with a positive code.
    let before = SIGNALS.iter().position(|s| *s == signal).and_then(|i| BEFORE.get()?.get(i));
    if let Some(before) = before {
        // SAFETY: what the kernel gave for this signal.
        unsafe {
            libc::sigaction(signal, before, std::ptr::null_mut());
            if (*info).si_code <= 0 {
                libc::raise(signal);
            }
        }
    }
}
