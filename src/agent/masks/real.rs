//! The C library's own functions behind ours.
//!
//! In a dynamic program they are found with `dlsym(RTLD_NEXT)`, so the waiting ones stay cancellation points and
//! whatever was preloaded still has its turn. The look-up takes the loader's lock, so it is done before `main`
//! ([`resolve_all`] stands in `.init_array`); a call that comes even earlier does its own. In a static program there
//! is nothing to look up: there it is the system call itself, with what the C library does around it, except that
//! it is no cancellation point.
//!
//! Contract of the `unsafe` in this module:
//! 1. every function here passes its arguments on as they are, and is called with what its namesake's manual page
//!    allows;
//! 2. a symbol is called with the type that its manual page gives;
//! 3. the kernel is given pointers of the caller, or to local values that outlive the call, with their sizes.
#![allow(unsafe_code)]

use std::ffi::CStr;
use std::mem::{size_of, transmute_copy, zeroed};
use std::ptr::{null, null_mut};
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};

use libc::{c_int, c_long, c_ulong, c_void, epoll_event, fd_set, nfds_t, pollfd, sigset_t, timespec};

use super::{bit, low_word, set_of};

/// What the kernel takes as the size of a signal set.
const KERNEL_SET_BYTES: usize = 8;

/// A function of the C library, looked up once.
struct Next {
    name: &'static CStr,
    /// 0: not looked up; [`ABSENT`]: there is none.
    address: AtomicUsize,
}

const ABSENT: usize = 1;

impl Next {
    const fn new(name: &'static CStr) -> Self {
        Self { name, address: AtomicUsize::new(0) }
    }

    fn address(&self) -> usize {
        match self.address.load(Relaxed) {
            0 => self.resolve(),
            known => known,
        }
    }

    fn resolve(&self) -> usize {
        let found = if cfg!(target_feature = "crt-static") {
            0
        } else {
            // SAFETY: 2: the name is a string with its end, and the loader keeps no pointer to it.
            unsafe { libc::dlsym(libc::RTLD_NEXT, self.name.as_ptr()) as usize }
        };
        let found = if found == 0 { ABSENT } else { found };
        self.address.store(found, Relaxed);
        found
    }

    /// The function as a pointer of the type `F`, which has to be the symbol's type.
    ///
    /// # Safety
    /// `F` is a function pointer of the type that the symbol has.
    unsafe fn get<F: Copy>(&self) -> Option<F> {
        const { assert!(size_of::<F>() == size_of::<usize>()) };
        let address = self.address();
        // SAFETY: 2: an address that dlsym gave for this symbol, and `F` is its type.
        (address != ABSENT).then(|| unsafe { transmute_copy(&address) })
    }
}

type Action = unsafe extern "C" fn(c_int, *const libc::sigaction, *mut libc::sigaction) -> c_int;
type Signal = unsafe extern "C" fn(c_int, usize) -> usize;
type Mask = unsafe extern "C" fn(c_int, *const sigset_t, *mut sigset_t) -> c_int;
type Suspend = unsafe extern "C-unwind" fn(*const sigset_t) -> c_int;
type Ppoll = unsafe extern "C-unwind" fn(*mut pollfd, nfds_t, *const timespec, *const sigset_t) -> c_int;
type PpollChecked = unsafe extern "C-unwind" fn(*mut pollfd, nfds_t, *const timespec, *const sigset_t, usize) -> c_int;
type Pselect = unsafe extern "C-unwind" fn(
    c_int,
    *mut fd_set,
    *mut fd_set,
    *mut fd_set,
    *const timespec,
    *const sigset_t,
) -> c_int;
#[cfg(not(all(target_env = "musl", target_feature = "crt-static")))]
type EpollPwait = unsafe extern "C-unwind" fn(c_int, *mut epoll_event, c_int, c_int, *const sigset_t) -> c_int;
type EpollPwait2 =
    unsafe extern "C-unwind" fn(c_int, *mut epoll_event, c_int, *const timespec, *const sigset_t) -> c_int;
#[cfg(not(target_feature = "crt-static"))]
type AttrMask = unsafe extern "C" fn(*mut libc::pthread_attr_t, *const sigset_t) -> c_int;

static SIGACTION: Next = Next::new(c"sigaction");
static SIGNAL: Next = Next::new(c"signal");
static SIGPROCMASK: Next = Next::new(c"sigprocmask");
static PTHREAD_SIGMASK: Next = Next::new(c"pthread_sigmask");
static SIGSUSPEND: Next = Next::new(c"sigsuspend");
static PPOLL: Next = Next::new(c"ppoll");
static PPOLL_CHECKED: Next = Next::new(c"__ppoll_chk");
static PSELECT: Next = Next::new(c"pselect");
static EPOLL_PWAIT: Next = Next::new(c"epoll_pwait");
static EPOLL_PWAIT2: Next = Next::new(c"epoll_pwait2");
static ATTR_MASK: Next = Next::new(c"pthread_attr_setsigmask_np");

/// Looks all functions up, so that later calls, also those in signal handlers, find them known.
pub(super) extern "C" fn resolve_all() {
    for next in [
        &SIGACTION,
        &SIGNAL,
        &SIGPROCMASK,
        &PTHREAD_SIGMASK,
        &SIGSUSPEND,
        &PPOLL,
        &PPOLL_CHECKED,
        &PSELECT,
        &EPOLL_PWAIT,
        &EPOLL_PWAIT2,
        &ATTR_MASK,
    ] {
        next.address();
    }
}

#[used]
#[link_section = ".init_array"]
static BEFORE_MAIN: extern "C" fn() = resolve_all;

/// The signals that C libraries keep for themselves: 32 and 33 of glibc, 34 too of musl.
pub(super) const RESERVED: u64 = 1 << 31 | 1 << 32 | if cfg!(target_env = "musl") { 1 << 33 } else { 0 };

/// `sigaction(2)`.
pub(super) unsafe fn sigaction(signal: c_int, new: *const libc::sigaction, old: *mut libc::sigaction) -> c_int {
    // SAFETY: 1, 2.
    unsafe {
        if let Some(f) = SIGACTION.get::<Action>() {
            return f(signal, new, old);
        }
        let linked = linked_sigaction();
        if linked != 0 {
            // SAFETY: the name under which glibc and musl both define what `sigaction` is another name of.
            let f: Action = transmute_copy(&linked);
            return f(signal, new, old);
        }
        raw_sigaction(signal, new, old)
    }
}

/// The address of `__sigaction` if the program has one: in a static program `sigaction` itself is ours.
fn linked_sigaction() -> usize {
    let address: usize;
    // SAFETY: reads a slot of the global offset table; a weak name that nobody defines is 0 there.
    unsafe {
        core::arch::asm!(
            ".weak __sigaction",
            "mov {}, qword ptr [rip + __sigaction@GOTPCREL]",
            out(reg) address,
            options(pure, readonly, nostack, preserves_flags)
        );
    }
    address
}

// What a handler returns to. Unwinders and debuggers know a signal's frame by these bytes.
core::arch::global_asm!(
    ".pushsection .text.livepatch_restore_rt,\"ax\",@progbits",
    "nop",
    ".balign 16",
    "livepatch_restore_rt:",
    ".byte 0x48, 0xc7, 0xc0, 0x0f, 0, 0, 0", // mov rax, 15 (rt_sigreturn)
    "syscall",
    ".popsection",
);

#[repr(C)]
#[derive(Clone, Copy)]
struct KernelAction {
    handler: usize,
    flags: c_ulong,
    restorer: usize,
    mask: u64,
}

const SA_RESTORER: c_ulong = 0x0400_0000;

unsafe fn raw_sigaction(signal: c_int, new: *const libc::sigaction, old: *mut libc::sigaction) -> c_int {
    if signal <= 0 || signal > 64 || bit(signal) & RESERVED != 0 {
        set_errno(libc::EINVAL);
        return -1;
    }
    let restorer: usize;
    // SAFETY: computes an address.
    unsafe {
        core::arch::asm!("lea {}, [rip + livepatch_restore_rt]", out(reg) restorer, options(pure, nomem, nostack, preserves_flags));
    }
    // SAFETY: 1, 3: `new` and `old` are null or actions of the caller; the structs are plain data.
    unsafe {
        let mut before: KernelAction = zeroed();
        let action = (!new.is_null()).then(|| KernelAction {
            handler: (*new).sa_sigaction,
            flags: (*new).sa_flags as u32 as c_ulong | SA_RESTORER,
            restorer,
            mask: low_word(&(*new).sa_mask),
        });
        let action = action.as_ref().map_or(null(), |a| a as *const KernelAction);
        let result = libc::syscall(libc::SYS_rt_sigaction, signal, action, &raw mut before, KERNEL_SET_BYTES);
        if result == 0 && !old.is_null() {
            *old = libc::sigaction {
                sa_sigaction: before.handler,
                sa_mask: set_of(before.mask),
                sa_flags: (before.flags & !SA_RESTORER) as c_int,
                sa_restorer: None,
            };
        }
        result as c_int
    }
}

/// `signal(2)`; what is asked for does not outlive the next `siginterrupt` in a static program.
pub(super) unsafe fn signal(signal: c_int, handler: usize) -> usize {
    // SAFETY: 1, 2, 3.
    unsafe {
        if let Some(f) = SIGNAL.get::<Signal>() {
            return f(signal, handler);
        }
        let mut new: libc::sigaction = zeroed();
        new.sa_sigaction = handler;
        new.sa_flags = libc::SA_RESTART;
        if cfg!(target_env = "gnu") && (1..=64).contains(&signal) {
            new.sa_mask = set_of(bit(signal));
        }
        let mut old: libc::sigaction = zeroed();
        if handler == libc::SIG_ERR {
            set_errno(libc::EINVAL);
            return libc::SIG_ERR;
        }
        if sigaction(signal, &raw const new, &raw mut old) == 0 {
            old.sa_sigaction
        } else {
            libc::SIG_ERR
        }
    }
}

/// `sigprocmask(2)`.
pub(super) unsafe fn sigprocmask(how: c_int, set: *const sigset_t, old: *mut sigset_t) -> c_int {
    // SAFETY: 1, 2.
    unsafe {
        match SIGPROCMASK.get::<Mask>() {
            Some(f) => f(how, set, old),
            None => raw_mask(how, set, old),
        }
    }
}

/// `pthread_sigmask(3)`.
pub(super) unsafe fn pthread_sigmask(how: c_int, set: *const sigset_t, old: *mut sigset_t) -> c_int {
    // SAFETY: 1, 2.
    unsafe {
        match PTHREAD_SIGMASK.get::<Mask>() {
            Some(f) => f(how, set, old),
            None if raw_mask(how, set, old) == 0 => 0,
            None => std::io::Error::last_os_error().raw_os_error().unwrap_or(libc::EINVAL),
        }
    }
}

unsafe fn raw_mask(how: c_int, set: *const sigset_t, old: *mut sigset_t) -> c_int {
    // SAFETY: 1, 3: the kernel reads and writes eight bytes, a part of what the pointers lead to.
    unsafe {
        let asked = (!set.is_null()).then(|| set.cast::<u64>().read_unaligned() & !RESERVED);
        let asked = asked.as_ref().map_or(null(), |a| a as *const u64);
        libc::syscall(libc::SYS_rt_sigprocmask, how, asked, old, KERNEL_SET_BYTES) as c_int
    }
}

/// Changes the calling thread's mask by the system call alone, and gives the mask before. Fit for signal handlers.
pub(super) fn change_mask(how: c_int, set: u64) -> u64 {
    let mut before = 0_u64;
    // SAFETY: 3: two words of this function.
    unsafe { libc::syscall(libc::SYS_rt_sigprocmask, how, &raw const set, &raw mut before, KERNEL_SET_BYTES) };
    before
}

/// `sigsuspend(2)`.
pub(super) unsafe fn sigsuspend(mask: *const sigset_t) -> c_int {
    // SAFETY: 1, 2, 3.
    unsafe {
        match SIGSUSPEND.get::<Suspend>() {
            Some(f) => f(mask),
            None => libc::syscall(libc::SYS_rt_sigsuspend, mask, KERNEL_SET_BYTES) as c_int,
        }
    }
}

/// A copy of a timeout, for the kernel writes into it what is left.
unsafe fn copy(timeout: *const timespec) -> Option<timespec> {
    // SAFETY: 1: null or a time of the caller.
    (!timeout.is_null()).then(|| unsafe { *timeout })
}

fn pointer(timeout: &mut Option<timespec>) -> *mut timespec {
    timeout.as_mut().map_or(null_mut(), |t| t as *mut timespec)
}

/// `ppoll(2)`.
pub(super) unsafe fn ppoll(fds: *mut pollfd, count: nfds_t, timeout: *const timespec, mask: *const sigset_t) -> c_int {
    // SAFETY: 1, 2, 3.
    unsafe {
        if let Some(f) = PPOLL.get::<Ppoll>() {
            return f(fds, count, timeout, mask);
        }
        let mut timeout = copy(timeout);
        libc::syscall(libc::SYS_ppoll, fds, count, pointer(&mut timeout), mask, KERNEL_SET_BYTES) as c_int
    }
}

/// `ppoll` as a program calls it that was compiled with `_FORTIFY_SOURCE`.
pub(super) unsafe fn ppoll_checked(
    fds: *mut pollfd,
    count: nfds_t,
    timeout: *const timespec,
    mask: *const sigset_t,
    fds_bytes: usize,
) -> c_int {
    // SAFETY: 1, 2.
    unsafe {
        if let Some(f) = PPOLL_CHECKED.get::<PpollChecked>() {
            return f(fds, count, timeout, mask, fds_bytes);
        }
        if (fds_bytes / size_of::<pollfd>()) < count as usize {
            libc::abort();
        }
        ppoll(fds, count, timeout, mask)
    }
}

/// `pselect(2)`.
pub(super) unsafe fn pselect(
    count: c_int,
    [read, write, except]: [*mut fd_set; 3],
    timeout: *const timespec,
    mask: *const sigset_t,
) -> c_int {
    // SAFETY: 1, 2, 3: the kernel takes the mask as a pointer to its address and size.
    unsafe {
        if let Some(f) = PSELECT.get::<Pselect>() {
            return f(count, read, write, except, timeout, mask);
        }
        let mut timeout = copy(timeout);
        let mask = [mask as usize, KERNEL_SET_BYTES];
        let timeout = pointer(&mut timeout);
        libc::syscall(libc::SYS_pselect6, count, read, write, except, timeout, mask.as_ptr()) as c_int
    }
}

/// `epoll_pwait(2)`.
#[cfg(not(all(target_env = "musl", target_feature = "crt-static")))]
pub(super) unsafe fn epoll_pwait(
    fd: c_int,
    events: *mut epoll_event,
    count: c_int,
    timeout_ms: c_int,
    mask: *const sigset_t,
) -> c_int {
    // SAFETY: 1, 2, 3.
    unsafe {
        match EPOLL_PWAIT.get::<EpollPwait>() {
            Some(f) => f(fd, events, count, timeout_ms, mask),
            None => {
                libc::syscall(libc::SYS_epoll_pwait, fd, events, count, timeout_ms, mask, KERNEL_SET_BYTES) as c_int
            }
        }
    }
}

/// `epoll_pwait2(2)`.
pub(super) unsafe fn epoll_pwait2(
    fd: c_int,
    events: *mut epoll_event,
    count: c_int,
    timeout: *const timespec,
    mask: *const sigset_t,
) -> c_int {
    const SYS_EPOLL_PWAIT2: c_long = 441;
    // SAFETY: 1, 2, 3.
    unsafe {
        match EPOLL_PWAIT2.get::<EpollPwait2>() {
            Some(f) => f(fd, events, count, timeout, mask),
            None => libc::syscall(SYS_EPOLL_PWAIT2, fd, events, count, timeout, mask, KERNEL_SET_BYTES) as c_int,
        }
    }
}

/// `pthread_attr_setsigmask_np(3)`, or `ENOSYS` where the C library has none.
#[cfg(not(target_feature = "crt-static"))]
pub(super) unsafe fn attr_mask(attr: *mut libc::pthread_attr_t, mask: *const sigset_t) -> c_int {
    // SAFETY: 1, 2.
    unsafe { ATTR_MASK.get::<AttrMask>().map_or(libc::ENOSYS, |f| f(attr, mask)) }
}

/// Sets `errno`.
pub(super) fn set_errno(value: c_int) {
    // SAFETY: the calling thread's own `errno`.
    unsafe { *libc::__errno_location() = value };
}

/// In which loaded object an address lies, by where that object begins; `None` in a static program.
pub(super) fn object_of(address: usize) -> Option<usize> {
    // SAFETY: 3: plain data that the loader fills.
    unsafe {
        let mut info: libc::Dl_info = zeroed();
        (libc::dladdr(address as *const c_void, &raw mut info) != 0).then_some(info.dli_fbase as usize)
    }
}

/// What a call of this name from a library would reach; `None` in a static program.
pub(super) fn seen_by_libraries(name: &CStr) -> Option<usize> {
    if cfg!(target_feature = "crt-static") {
        return None;
    }
    // SAFETY: 2: the name is a string with its end.
    let found = unsafe { libc::dlsym(libc::RTLD_DEFAULT, name.as_ptr()) } as usize;
    (found != 0).then_some(found)
}

/// Queues the signal for the calling thread again, with what is known of it.
pub(super) fn send_to_self(signal: c_int, info: *mut libc::siginfo_t) {
    // SAFETY: 3: `info` is what the kernel gave our handler; where it is refused, the signal goes without it.
    unsafe {
        let (pid, tid) = (libc::syscall(libc::SYS_getpid), libc::syscall(libc::SYS_gettid));
        if info.is_null() || libc::syscall(libc::SYS_rt_tgsigqueueinfo, pid, tid, signal, info) != 0 {
            libc::syscall(libc::SYS_tgkill, pid, tid, signal);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    static RUNS: AtomicUsize = AtomicUsize::new(0);

    extern "C" fn handler(_: c_int) {
        RUNS.fetch_add(1, Relaxed);
    }

    #[test]
    fn without_a_library_the_handler_still_comes_back() {
        // SAFETY: the handler only counts, and is taken away again.
        unsafe {
            let mut new: libc::sigaction = zeroed();
            new.sa_sigaction = handler as *const () as usize;
            new.sa_mask = set_of(bit(libc::SIGHUP));
            new.sa_flags = libc::SA_RESTART;
            let mut old: libc::sigaction = zeroed();
            assert_eq!(raw_sigaction(libc::SIGWINCH, &new, &mut old), 0);
            let default = old;
            libc::raise(libc::SIGWINCH);
            assert_eq!(RUNS.load(Relaxed), 1);
            assert_eq!(raw_sigaction(libc::SIGWINCH, &default, &mut old), 0);
            assert_eq!((old.sa_sigaction, old.sa_flags), (new.sa_sigaction, libc::SA_RESTART));
            assert_eq!(low_word(&old.sa_mask), bit(libc::SIGHUP));
            assert_eq!(raw_sigaction(33, null(), &mut old), -1);
            assert_eq!(raw_sigaction(libc::SIGKILL, &new, null_mut()), -1);
        }
    }

    #[test]
    fn system_calls_do_what_the_library_does() {
        // SAFETY: sets and times of this test.
        unsafe {
            let set = set_of(bit(libc::SIGUSR1) | RESERVED);
            let mut old: sigset_t = zeroed();
            assert_eq!(raw_mask(libc::SIG_BLOCK, &set, null_mut()), 0);
            assert_eq!(raw_mask(libc::SIG_UNBLOCK, &set, &mut old), 0);
            assert_eq!(low_word(&old) & (bit(libc::SIGUSR1) | RESERVED), bit(libc::SIGUSR1));
            assert_eq!(change_mask(libc::SIG_BLOCK, 0) & bit(libc::SIGUSR1), 0);
            assert_eq!(raw_mask(99, &set, null_mut()), -1);
            assert_eq!(copy(null()).is_none(), pointer(&mut None).is_null());
        }
    }
}
