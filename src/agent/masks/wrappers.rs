//! The C library's functions about signal masks and handlers, as the program and its libraries call them.
//!
//! They are symbols of the executable, which the linker exports because the C library defines the same names; the
//! dynamic loader then binds every library's calls to them. In a static program the linker takes them instead of the
//! archive's. The waiting ones are `C-unwind`, because a cancelled thread unwinds through them, and have nothing to
//! drop.
//!
//! Contract of the `unsafe` in this module:
//! 1. each is called with what its manual page allows; a pointer that it leads to is null where the page says so;
//! 2. of a signal set only the first eight bytes are read or written, as the C library and the kernel do.
#![allow(unsafe_code)]

use std::ffi::CStr;
use std::mem::zeroed;
use std::ptr::null;
use std::sync::atomic::Ordering::SeqCst;

use libc::{c_int, epoll_event, fd_set, nfds_t, pollfd, sigset_t, timespec};

use super::{bit, chain_of, low_word, packed, real, set_of, unpacked, Chained, ASKED, BELIEVED, MAX_SIGNAL, OWNED};

/// The names that libraries have to find here.
const NAMES: &[&CStr] = &[
    c"sigaction",
    c"signal",
    c"sigprocmask",
    c"pthread_sigmask",
    c"sigsuspend",
    c"ppoll",
    c"pselect",
    c"epoll_pwait",
    c"sigset",
];

/// A function by whose address this object is known; its name is nobody else's.
#[inline(never)]
fn anchor() {
    std::hint::black_box(());
}

/// A name that calls from libraries would find elsewhere, if there is one.
pub(super) fn passed_by() -> Option<&'static str> {
    let here = real::object_of(anchor as *const () as usize);
    NAMES.iter().find_map(|name| {
        let found = real::seen_by_libraries(name)?;
        (here.is_none() || real::object_of(found) != here).then(|| name.to_str().unwrap_or("a function"))
    })
}

/// A set without the owned signals, or nothing if there is nothing to change.
unsafe fn without(set: *const sigset_t) -> Option<sigset_t> {
    let owned = OWNED.load(SeqCst);
    if owned == 0 || set.is_null() {
        return None;
    }
    // SAFETY: 1, 2.
    let asked = unsafe { set.cast::<u64>().read_unaligned() };
    (asked & owned != 0).then(|| set_of(asked & !owned))
}

fn pointer(own: &Option<sigset_t>, given: *const sigset_t) -> *const sigset_t {
    own.as_ref().map_or(given, |s| s)
}

type Mask = unsafe fn(c_int, *const sigset_t, *mut sigset_t) -> c_int;

/// A thread's mask, asked for or changed; `real` does it.
unsafe fn change_mask(real: Mask, how: c_int, set: *const sigset_t, old: *mut sigset_t) -> c_int {
    let owned = OWNED.load(SeqCst);
    // SAFETY: 1, 2.
    unsafe {
        if owned == 0 {
            return real(how, set, old);
        }
        let asked = (!set.is_null()).then(|| set.cast::<u64>().read_unaligned());
        let allowed = asked.map(|a| set_of(if how == libc::SIG_UNBLOCK { a } else { a & !owned }));
        let mut before: sigset_t = zeroed();
        let result = real(how, allowed.as_ref().map_or(null(), |s| s), &raw mut before);
        if result != 0 {
            return result;
        }
        let before = low_word(&before);
        let believed = (BELIEVED.get() | before) & owned;
        if let Some(asked) = asked {
            BELIEVED.set(match how {
                libc::SIG_BLOCK => believed | asked & owned,
                libc::SIG_UNBLOCK => believed & !asked,
                _ => asked & owned,
            });
            if how == libc::SIG_BLOCK && before & owned != 0 {
                // blocked since before there was an owner
                real::change_mask(libc::SIG_UNBLOCK, owned);
            }
        }
        if !old.is_null() {
            old.cast::<u64>().write_unaligned(before | believed);
        }
        0
    }
}

/// `sigprocmask(2)`.
///
/// # Safety
/// As the manual page says.
#[no_mangle]
pub unsafe extern "C" fn sigprocmask(how: c_int, set: *const sigset_t, old: *mut sigset_t) -> c_int {
    // SAFETY: 1.
    unsafe { change_mask(real::sigprocmask, how, set, old) }
}

/// `pthread_sigmask(3)`.
///
/// # Safety
/// As the manual page says.
#[no_mangle]
pub unsafe extern "C" fn pthread_sigmask(how: c_int, set: *const sigset_t, old: *mut sigset_t) -> c_int {
    // SAFETY: 1.
    unsafe { change_mask(real::pthread_sigmask, how, set, old) }
}

/// `sigaction(2)`.
///
/// # Safety
/// As the manual page says.
#[no_mangle]
pub unsafe extern "C" fn sigaction(signal: c_int, new: *const libc::sigaction, old: *mut libc::sigaction) -> c_int {
    let owned = OWNED.load(SeqCst);
    // SAFETY: 1.
    unsafe {
        if owned == 0 {
            return real::sigaction(signal, new, old);
        }
        let asked = (!new.is_null()).then(|| *new);
        if let Some(chain) = chain_of(signal, owned) {
            let before = match asked {
                Some(action) => chain.swap(Chained::from_libc(&action)),
                None => chain.read().value,
            };
            if !old.is_null() {
                *old = before.to_libc();
            }
            return 0;
        }
        let allowed = asked.map(|mut action| {
            action.sa_mask = set_of(low_word(&action.sa_mask) & !owned);
            action
        });
        let result = real::sigaction(signal, allowed.as_ref().map_or(null(), |a| a), old);
        if result == 0 && (1..=MAX_SIGNAL).contains(&signal) {
            let place = &ASKED[signal as usize - 1];
            let before = match asked {
                Some(action) => place.swap(packed(low_word(&action.sa_mask), owned), SeqCst),
                None => place.load(SeqCst),
            };
            if !old.is_null() {
                (*old).sa_mask = set_of(low_word(&(*old).sa_mask) | unpacked(before, owned));
            }
        }
        result
    }
}

/// Installs a plain handler by way of `sigaction`, and gives the one before it.
unsafe fn plain(signal: c_int, handler: usize, flags: c_int, mask: u64) -> usize {
    if handler == libc::SIG_ERR || !(1..=MAX_SIGNAL).contains(&signal) {
        real::set_errno(libc::EINVAL);
        return libc::SIG_ERR;
    }
    let new = Chained { handler, flags, mask }.to_libc();
    // SAFETY: 1.
    unsafe {
        let mut old: libc::sigaction = zeroed();
        if sigaction(signal, &raw const new, &raw mut old) == 0 {
            old.sa_sigaction
        } else {
            libc::SIG_ERR
        }
    }
}

/// `signal(2)`.
///
/// # Safety
/// As the manual page says.
#[no_mangle]
pub unsafe extern "C" fn signal(signal: c_int, handler: usize) -> usize {
    let owned = OWNED.load(SeqCst);
    // SAFETY: 1.
    unsafe {
        if handler != libc::SIG_ERR && chain_of(signal, owned).is_some() {
            return plain(signal, handler, libc::SA_RESTART, bit(signal));
        }
        let before = real::signal(signal, handler);
        if owned != 0 && before != libc::SIG_ERR && (1..=MAX_SIGNAL).contains(&signal) {
            ASKED[signal as usize - 1].store(0, SeqCst);
        }
        before
    }
}

/// `bsd_signal(3)`.
///
/// # Safety
/// As the manual page says.
#[no_mangle]
pub unsafe extern "C" fn bsd_signal(number: c_int, handler: usize) -> usize {
    // SAFETY: 1: another name of it.
    unsafe { signal(number, handler) }
}

/// `ssignal(3)`.
///
/// # Safety
/// As the manual page says.
#[no_mangle]
pub unsafe extern "C" fn ssignal(number: c_int, handler: usize) -> usize {
    // SAFETY: 1: another name of it.
    unsafe { signal(number, handler) }
}

/// `sysv_signal(3)`: `signal` as programs get it that ask for X/Open's.
///
/// # Safety
/// As the manual page says.
#[no_mangle]
pub unsafe extern "C" fn __sysv_signal(signal: c_int, handler: usize) -> usize {
    // SAFETY: 1.
    unsafe { plain(signal, handler, libc::SA_RESETHAND | libc::SA_NODEFER, 0) }
}

/// `sysv_signal(3)`.
///
/// # Safety
/// As the manual page says.
#[no_mangle]
pub unsafe extern "C" fn sysv_signal(signal: c_int, handler: usize) -> usize {
    // SAFETY: 1: another name of it.
    unsafe { __sysv_signal(signal, handler) }
}

/// Blocks or unblocks one signal; was it blocked?
unsafe fn block_one(how: c_int, signal: c_int) -> Option<bool> {
    if !(1..=MAX_SIGNAL).contains(&signal) {
        real::set_errno(libc::EINVAL);
        return None;
    }
    let set = set_of(bit(signal));
    // SAFETY: 1, 2.
    unsafe {
        let mut old: sigset_t = zeroed();
        (sigprocmask(how, &raw const set, &raw mut old) == 0).then(|| low_word(&old) & bit(signal) != 0)
    }
}

/// `sigset(3)`.
///
/// # Safety
/// As the manual page says.
#[no_mangle]
pub unsafe extern "C" fn sigset(signal: c_int, handler: usize) -> usize {
    const SIG_HOLD: usize = 2;
    // SAFETY: 1.
    unsafe {
        if handler == SIG_HOLD {
            let mut now: libc::sigaction = zeroed();
            return match block_one(libc::SIG_BLOCK, signal) {
                Some(true) => SIG_HOLD,
                Some(false) if sigaction(signal, null(), &raw mut now) == 0 => now.sa_sigaction,
                _ => libc::SIG_ERR,
            };
        }
        let before = plain(signal, handler, 0, 0);
        if before == libc::SIG_ERR {
            return before;
        }
        match block_one(libc::SIG_UNBLOCK, signal) {
            Some(true) => SIG_HOLD,
            Some(false) => before,
            None => libc::SIG_ERR,
        }
    }
}

/// `sigignore(3)`.
///
/// # Safety
/// As the manual page says.
#[no_mangle]
pub unsafe extern "C" fn sigignore(signal: c_int) -> c_int {
    // SAFETY: 1.
    -c_int::from(unsafe { plain(signal, libc::SIG_IGN, 0, 0) } == libc::SIG_ERR)
}

/// `sighold(3)`.
///
/// # Safety
/// As the manual page says.
#[no_mangle]
pub unsafe extern "C" fn sighold(signal: c_int) -> c_int {
    // SAFETY: 1.
    -c_int::from(unsafe { block_one(libc::SIG_BLOCK, signal) }.is_none())
}

/// A BSD mask, of the first 32 signals.
unsafe fn bsd_mask(how: c_int, mask: c_int) -> c_int {
    let set = set_of(u64::from(mask as u32));
    // SAFETY: 1, 2.
    unsafe {
        let mut old: sigset_t = zeroed();
        match sigprocmask(how, &raw const set, &raw mut old) {
            0 => low_word(&old) as u32 as c_int,
            failed => failed,
        }
    }
}

/// `sigblock(3)`.
///
/// # Safety
/// As the manual page says.
#[no_mangle]
pub unsafe extern "C" fn sigblock(mask: c_int) -> c_int {
    // SAFETY: 1.
    unsafe { bsd_mask(libc::SIG_BLOCK, mask) }
}

/// `sigsetmask(3)`.
///
/// # Safety
/// As the manual page says.
#[no_mangle]
pub unsafe extern "C" fn sigsetmask(mask: c_int) -> c_int {
    // SAFETY: 1.
    unsafe { bsd_mask(libc::SIG_SETMASK, mask) }
}

/// `sigsuspend(2)`.
///
/// # Safety
/// As the manual page says.
#[no_mangle]
pub unsafe extern "C-unwind" fn sigsuspend(mask: *const sigset_t) -> c_int {
    // SAFETY: 1, 2.
    unsafe {
        let own = without(mask);
        real::sigsuspend(pointer(&own, mask))
    }
}

/// `ppoll(2)`.
///
/// # Safety
/// As the manual page says.
#[no_mangle]
pub unsafe extern "C-unwind" fn ppoll(
    fds: *mut pollfd,
    count: nfds_t,
    timeout: *const timespec,
    mask: *const sigset_t,
) -> c_int {
    // SAFETY: 1, 2.
    unsafe {
        let own = without(mask);
        real::ppoll(fds, count, timeout, pointer(&own, mask))
    }
}

/// `ppoll` of programs compiled with `_FORTIFY_SOURCE`.
///
/// # Safety
/// As the manual page of `ppoll(2)` says; `fds_bytes` is the size of what `fds` leads to.
#[no_mangle]
pub unsafe extern "C-unwind" fn __ppoll_chk(
    fds: *mut pollfd,
    count: nfds_t,
    timeout: *const timespec,
    mask: *const sigset_t,
    fds_bytes: usize,
) -> c_int {
    // SAFETY: 1, 2.
    unsafe {
        let own = without(mask);
        real::ppoll_checked(fds, count, timeout, pointer(&own, mask), fds_bytes)
    }
}

/// `pselect(2)`.
///
/// # Safety
/// As the manual page says.
#[no_mangle]
pub unsafe extern "C-unwind" fn pselect(
    count: c_int,
    read: *mut fd_set,
    write: *mut fd_set,
    except: *mut fd_set,
    timeout: *const timespec,
    mask: *const sigset_t,
) -> c_int {
    // SAFETY: 1, 2.
    unsafe {
        let own = without(mask);
        real::pselect(count, [read, write, except], timeout, pointer(&own, mask))
    }
}

/// `epoll_pwait(2)`. Not in a static program of musl, whose archive has it in one piece with `epoll_create`.
///
/// # Safety
/// As the manual page says.
#[cfg(not(all(target_env = "musl", target_feature = "crt-static")))]
#[no_mangle]
pub unsafe extern "C-unwind" fn epoll_pwait(
    fd: c_int,
    events: *mut epoll_event,
    count: c_int,
    timeout_ms: c_int,
    mask: *const sigset_t,
) -> c_int {
    // SAFETY: 1, 2.
    unsafe {
        let own = without(mask);
        real::epoll_pwait(fd, events, count, timeout_ms, pointer(&own, mask))
    }
}

/// `epoll_pwait2(2)`.
///
/// # Safety
/// As the manual page says.
#[no_mangle]
pub unsafe extern "C-unwind" fn epoll_pwait2(
    fd: c_int,
    events: *mut epoll_event,
    count: c_int,
    timeout: *const timespec,
    mask: *const sigset_t,
) -> c_int {
    // SAFETY: 1, 2.
    unsafe {
        let own = without(mask);
        real::epoll_pwait2(fd, events, count, timeout, pointer(&own, mask))
    }
}

/// `pthread_attr_setsigmask_np(3)`: the mask with which a new thread begins. Not in a static program.
///
/// # Safety
/// As the manual page says.
#[cfg(not(target_feature = "crt-static"))]
#[no_mangle]
pub unsafe extern "C" fn pthread_attr_setsigmask_np(attr: *mut libc::pthread_attr_t, mask: *const sigset_t) -> c_int {
    // SAFETY: 1, 2.
    unsafe {
        let own = without(mask);
        real::attr_mask(attr, pointer(&own, mask))
    }
}
