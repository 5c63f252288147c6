//! The system calls of ptrace(2) and its neighbours, as safe functions.
//!
//! Contract of the `unsafe` in this module:
//! 1. every pointer that a call gets is to a local value or to a slice of the caller that outlives the call,
//!    with the length that the value or slice has;
//! 2. addresses of the target are integers to the kernel and are never dereferenced here;
//! 3. structs that the kernel fills are plain data, valid for any bytes.
#![allow(unsafe_code)]

use std::io;
use std::mem::{size_of, zeroed};
use std::time::Duration;

use libc::{c_int, c_long, c_void, pid_t};

use crate::addr::ProcAddr;

/// The registers as the kernel has them.
pub type RawRegisters = libc::user_regs_struct;

const PTRACE_EVENT_STOP_FLAG: usize = libc::PTRACE_O_TRACECLONE as usize | libc::PTRACE_O_TRACESYSGOOD as usize;

fn check(result: c_long) -> io::Result<c_long> {
    if result == -1 {
        Err(io::Error::last_os_error())
    } else {
        Ok(result)
    }
}

fn request(what: libc::c_uint, tid: pid_t, addr: usize, data: usize) -> io::Result<c_long> {
    // SAFETY: 1, 2: `addr` and `data` are integers, or pointers to the callers' locals below.
    check(unsafe { libc::ptrace(what, tid, addr as *mut c_void, data as *mut c_void) })
}

/// PTRACE_SEIZE with clone events and marked system-call stops.
pub fn seize(tid: pid_t) -> io::Result<()> {
    request(libc::PTRACE_SEIZE, tid, 0, PTRACE_EVENT_STOP_FLAG).map(drop)
}

/// The seccomp filters of a stopped thread, the newest first; needs CAP_SYS_ADMIN.
pub fn seccomp_filters(tid: pid_t) -> io::Result<Vec<Vec<libc::sock_filter>>> {
    const PTRACE_SECCOMP_GET_FILTER: libc::c_uint = 0x420c;
    let mut out = Vec::new();
    loop {
        let count = match request(PTRACE_SECCOMP_GET_FILTER, tid, out.len(), 0) {
            Err(e) if e.raw_os_error() == Some(libc::ENOENT) => return Ok(out),
            other => usize::try_from(other?).unwrap_or(0),
        };
        let mut filter = vec![libc::sock_filter { code: 0, jt: 0, jf: 0, k: 0 }; count];
        request(PTRACE_SECCOMP_GET_FILTER, tid, out.len(), filter.as_mut_ptr() as usize)?;
        out.push(filter);
    }
}

/// Lets no seccomp filter look at what a stopped thread does, until it is let go; needs CAP_SYS_ADMIN.
pub fn suspend_seccomp(tid: pid_t) -> io::Result<()> {
    const PTRACE_O_SUSPEND_SECCOMP: usize = 1 << 21;
    request(libc::PTRACE_SETOPTIONS, tid, 0, PTRACE_EVENT_STOP_FLAG | PTRACE_O_SUSPEND_SECCOMP).map(drop)
}

/// PTRACE_INTERRUPT.
pub fn interrupt(tid: pid_t) -> io::Result<()> {
    request(libc::PTRACE_INTERRUPT, tid, 0, 0).map(drop)
}

/// PTRACE_CONT.
pub fn cont(tid: pid_t, signal: c_int) -> io::Result<()> {
    request(libc::PTRACE_CONT, tid, 0, signal as usize).map(drop)
}

/// PTRACE_SYSCALL.
pub fn cont_to_syscall(tid: pid_t, signal: c_int) -> io::Result<()> {
    request(libc::PTRACE_SYSCALL, tid, 0, signal as usize).map(drop)
}

/// PTRACE_DETACH.
pub fn detach(tid: pid_t, signal: c_int) -> io::Result<()> {
    request(libc::PTRACE_DETACH, tid, 0, signal as usize).map(drop)
}

/// PTRACE_GETREGS.
pub fn registers(tid: pid_t) -> io::Result<RawRegisters> {
    // SAFETY: 3.
    let mut regs: RawRegisters = unsafe { zeroed() };
    request(libc::PTRACE_GETREGS, tid, 0, std::ptr::from_mut(&mut regs) as usize)?;
    Ok(regs)
}

/// PTRACE_SETREGS.
pub fn set_registers(tid: pid_t, regs: &RawRegisters) -> io::Result<()> {
    request(libc::PTRACE_SETREGS, tid, 0, std::ptr::from_ref(regs) as usize).map(drop)
}

/// Sets `rax` alone.
pub fn set_rax(tid: pid_t, value: u64) -> io::Result<()> {
    let offset = std::mem::offset_of!(RawRegisters, rax);
    request(libc::PTRACE_POKEUSER, tid, offset, value as usize).map(drop)
}

/// PTRACE_GETEVENTMSG.
pub fn event_message(tid: pid_t) -> io::Result<u64> {
    let mut value: libc::c_ulong = 0;
    request(libc::PTRACE_GETEVENTMSG, tid, 0, std::ptr::from_mut(&mut value) as usize)?;
    Ok(value)
}

/// PTRACE_GETSIGMASK.
pub fn signal_mask(tid: pid_t) -> io::Result<u64> {
    let mut mask: u64 = 0;
    request(libc::PTRACE_GETSIGMASK, tid, size_of::<u64>(), std::ptr::from_mut(&mut mask) as usize)?;
    Ok(mask)
}

/// PTRACE_SETSIGMASK.
pub fn set_signal_mask(tid: pid_t, mask: u64) -> io::Result<()> {
    request(libc::PTRACE_SETSIGMASK, tid, size_of::<u64>(), std::ptr::from_ref(&mask) as usize).map(drop)
}

const NT_X86_XSTATE: usize = 0x202;

/// The whole vector state (NT_X86_XSTATE).
pub fn vector_state(tid: pid_t) -> io::Result<Vec<u8>> {
    let mut buf = vec![0u8; 16 << 10];
    let mut io = libc::iovec { iov_base: buf.as_mut_ptr().cast(), iov_len: buf.len() };
    request(libc::PTRACE_GETREGSET, tid, NT_X86_XSTATE, std::ptr::from_mut(&mut io) as usize)?;
    buf.truncate(io.iov_len);
    Ok(buf)
}

/// Puts back what [`vector_state`] gave.
pub fn set_vector_state(tid: pid_t, state: &[u8]) -> io::Result<()> {
    let mut io = libc::iovec { iov_base: state.as_ptr().cast_mut().cast(), iov_len: state.len() };
    request(libc::PTRACE_SETREGSET, tid, NT_X86_XSTATE, std::ptr::from_mut(&mut io) as usize).map(drop)
}

/// Bytes of an XSAVE image, in its standard form, that holds these features: x87 and SSE with the header always.
pub fn vector_extent(features: u64) -> usize {
    const HEADER_END: usize = 512 + 64;
    let more = (2..63).filter(|i| features >> i & 1 == 1).map(|i| {
        // CPUID leaf 0xD, sub-leaf i: size in eax, offset in ebx (Intel SDM 1, 13.4.2).
        let leaf = std::arch::x86_64::__cpuid_count(0xd, i);
        (leaf.eax + leaf.ebx) as usize
    });
    more.max().unwrap_or(0).max(HEADER_END)
}

/// Writes one word, by PTRACE_POKETEXT.
pub fn poke(tid: pid_t, at: ProcAddr, word: u64) -> io::Result<()> {
    request(libc::PTRACE_POKETEXT, tid, at.0 as usize, word as usize).map(drop)
}

/// Address of the thread's rseq area, if it has registered one (PTRACE_GET_RSEQ_CONFIGURATION).
pub fn rseq_area(tid: pid_t) -> Option<ProcAddr> {
    #[repr(C)]
    struct Configuration {
        pointer: u64,
        size: u32,
        signature: u32,
        flags: u32,
        pad: u32,
    }
    let mut c = Configuration { pointer: 0, size: 0, signature: 0, flags: 0, pad: 0 };
    request(0x420f, tid, size_of::<Configuration>(), std::ptr::from_mut(&mut c) as usize).ok()?;
    (c.pointer != 0).then_some(ProcAddr(c.pointer))
}

/// What waitid(2) says of a tracee.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Event {
    /// It stopped; the status as ptrace(2) codes it, without the low `0x7f`.
    Stopped(c_int),
    /// It ended.
    Ended,
}

/// Waits for `tid` without taking the event away, so that a signal in it survives our own death.
/// `None` without `block` if there is none. EINTR is an error.
pub fn wait(tid: pid_t, block: bool) -> io::Result<Option<Event>> {
    let mut flags = libc::WEXITED | libc::WSTOPPED | libc::__WALL | libc::WNOWAIT;
    if !block {
        flags |= libc::WNOHANG;
    }
    // SAFETY: 3.
    let mut info: libc::siginfo_t = unsafe { zeroed() };
    // SAFETY: 1.
    check(unsafe { libc::waitid(libc::P_PID, tid as libc::id_t, &raw mut info, flags) }.into())?;
    // SAFETY: 3: waitid(2) fills these fields, or leaves them zero.
    let (pid, status) = unsafe { (info.si_pid(), info.si_status()) };
    Ok(match info.si_code {
        _ if pid == 0 => None,
        libc::CLD_TRAPPED | libc::CLD_STOPPED => Some(Event::Stopped(status)),
        _ => Some(Event::Ended),
    })
}

/// Takes the end of a thread away, so that its process can end.
pub fn reap(tid: pid_t) {
    // SAFETY: 3.
    let mut info: libc::siginfo_t = unsafe { zeroed() };
    let flags = libc::WEXITED | libc::__WALL | libc::WNOHANG;
    // SAFETY: 1. A failure means that there is nothing to take.
    let _ = unsafe { libc::waitid(libc::P_PID, tid as libc::id_t, &raw mut info, flags) };
}

/// Most parts that one process_vm_readv(2) takes.
const IOV_MAX: usize = 1024;

/// Reads the parts, in few calls; `true` for each that was read whole.
pub fn read_parts(pid: pid_t, parts: &mut [(ProcAddr, &mut [u8])], ok: &mut [bool]) {
    ok.fill(false);
    let mut done = 0;
    while done < parts.len() {
        let end = (done + IOV_MAX).min(parts.len());
        let chunk = &mut parts[done..end];
        let mut local = [libc::iovec { iov_base: std::ptr::null_mut(), iov_len: 0 }; IOV_MAX];
        let mut remote = local;
        let mut count = 0;
        for ((at, buf), (l, r)) in chunk.iter_mut().zip(local.iter_mut().zip(&mut remote)) {
            *l = libc::iovec { iov_base: buf.as_mut_ptr().cast(), iov_len: buf.len() };
            *r = libc::iovec { iov_base: at.0 as usize as *mut c_void, iov_len: buf.len() };
            count += 1;
        }
        // SAFETY: 1: the local parts are the callers' slices, borrowed for this call; 2.
        let got =
            unsafe { libc::process_vm_readv(pid, local.as_ptr(), count as u64, remote.as_ptr(), count as u64, 0) };
        let mut left = usize::try_from(got).unwrap_or(0);
        let mut whole = 0;
        for (i, part) in remote.iter().take(count).enumerate() {
            if part.iov_len > left {
                break;
            }
            left -= part.iov_len;
            whole = i + 1;
            if let Some(flag) = ok.get_mut(done + i) {
                *flag = true;
            }
        }
        // What stopped the batch is left out; the rest goes on behind it.
        done += whole + usize::from(whole < count);
    }
}

/// The calling thread: what `TracerPid` calls a tracer.
pub fn own_tid() -> pid_t {
    // SAFETY: it takes nothing and cannot fail.
    unsafe { libc::gettid() }
}

/// pidfd_open(2).
pub fn open_pidfd(pid: pid_t) -> io::Result<std::os::fd::OwnedFd> {
    use std::os::fd::FromRawFd;
    // SAFETY: 1.
    let fd = check(unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) })?;
    // SAFETY: the kernel has just given us this descriptor, and nobody else has it.
    Ok(unsafe { std::os::fd::OwnedFd::from_raw_fd(fd as c_int) })
}

/// flock(2), exclusive, without waiting; `false` if somebody else has it. It ends with the descriptor.
pub fn lock(file: &std::fs::File) -> io::Result<bool> {
    use std::os::fd::AsRawFd;
    // SAFETY: 1.
    match check(unsafe { libc::flock(file.as_raw_fd(), libc::LOCK_EX | libc::LOCK_NB) }.into()) {
        Ok(_) => Ok(true),
        Err(e) if e.kind() == io::ErrorKind::WouldBlock => Ok(false),
        Err(e) => Err(e),
    }
}

/// Gives up what [`lock`] got, for every process that has the open file.
pub fn unlock(file: &std::fs::File) {
    use std::os::fd::AsRawFd;
    // SAFETY: 1. It cannot fail for a file that is open.
    unsafe { libc::flock(file.as_raw_fd(), libc::LOCK_UN) };
}

/// Whether the process of a pidfd has not ended.
pub fn is_alive(pidfd: &std::os::fd::OwnedFd) -> bool {
    use std::os::fd::AsRawFd;
    let mut poll = libc::pollfd { fd: pidfd.as_raw_fd(), events: libc::POLLIN, revents: 0 };
    // SAFETY: 1. A pidfd becomes readable when its process ends.
    unsafe { libc::poll(&raw mut poll, 1, 0) == 0 }
}

/// Whether two processes share their memory (kcmp(2)); `None` if the kernel does not tell.
pub fn share_memory(a: pid_t, b: pid_t) -> Option<bool> {
    const KCMP_VM: c_int = 1;
    // SAFETY: 1.
    let order = unsafe { libc::syscall(libc::SYS_kcmp, a, b, KCMP_VM, 0, 0) };
    (order >= 0).then_some(order == 0)
}

/// Interrupts blocking calls of this thread from a point in time on, again and again: SIGALRM to a handler
/// that does nothing.
pub struct Alarm(libc::timer_t);

impl Alarm {
    /// Starts it.
    pub fn after(delay: Duration) -> io::Result<Self> {
        extern "C" fn ignore(_: c_int) {}
        static HANDLER: std::sync::Once = std::sync::Once::new();
        HANDLER.call_once(|| {
            // SAFETY: 3; the handler does nothing, so it may run anywhere.
            unsafe {
                let mut action: libc::sigaction = zeroed();
                action.sa_sigaction = ignore as extern "C" fn(c_int) as usize;
                libc::sigaction(libc::SIGALRM, &raw const action, std::ptr::null_mut());
            }
        });
        // SAFETY: 3.
        let mut event: libc::sigevent = unsafe { zeroed() };
        event.sigev_notify = libc::SIGEV_THREAD_ID;
        event.sigev_signo = libc::SIGALRM;
        event.sigev_notify_thread_id = own_tid();
        let mut timer: libc::timer_t = std::ptr::null_mut();
        // SAFETY: 1.
        check(unsafe { libc::timer_create(libc::CLOCK_MONOTONIC, &raw mut event, &raw mut timer) }.into())?;
        let alarm = Self(timer);
        let spec =
            |d: Duration| libc::timespec { tv_sec: d.as_secs().cast_signed(), tv_nsec: i64::from(d.subsec_nanos()) };
        let spec = libc::itimerspec {
            it_interval: spec(Duration::from_millis(5)),
            it_value: spec(delay.max(Duration::from_nanos(1))),
        };
        // SAFETY: 1.
        check(unsafe { libc::timer_settime(timer, 0, &raw const spec, std::ptr::null_mut()) }.into())?;
        Ok(alarm)
    }
}

impl Drop for Alarm {
    fn drop(&mut self) {
        // SAFETY: the timer was created by `after` and is deleted only here.
        unsafe { libc::timer_delete(self.0) };
    }
}

/// The calling thread ahead of all ordinary ones, where that is permitted, until dropped.
#[must_use = "dropped, it is as before"]
pub struct Priority(Option<(c_int, libc::sched_param)>);

impl Priority {
    /// Raises it.
    pub fn raise() -> Self {
        // SAFETY: 1, 3.
        unsafe {
            let mut old: libc::sched_param = zeroed();
            let policy = libc::sched_getscheduler(0);
            libc::sched_getparam(0, &raw mut old);
            let mut wanted: libc::sched_param = zeroed();
            wanted.sched_priority = 60;
            if policy < 0 || libc::sched_setscheduler(0, libc::SCHED_FIFO, &raw const wanted) != 0 {
                return Self(None);
            }
            Self(Some((policy, old)))
        }
    }
}

impl Drop for Priority {
    fn drop(&mut self) {
        if let Some((policy, old)) = &self.0 {
            // SAFETY: 1.
            unsafe { libc::sched_setscheduler(0, *policy, &raw const *old) };
        }
    }
}

/// Has the kernel fetch pages of our own that are mapped from a file, so that none of them is missing while threads
/// are held. Where that fails, a hold takes a little longer.
pub fn populate(start: ProcAddr, len_bytes: u64) {
    let Ok(len) = usize::try_from(len_bytes) else { return };
    // SAFETY: MADV_POPULATE_READ changes no memory's content; a range that is not mapped is an error of the call.
    unsafe { libc::madvise(start.0 as *mut libc::c_void, len, libc::MADV_POPULATE_READ) };
}

/// While it lives, the signals with which people end a command wait: what was begun is finished or undone first.
pub struct Undisturbed(Option<libc::sigset_t>);

impl Undisturbed {
    /// Blocks SIGINT, SIGTERM, SIGHUP and SIGQUIT for this thread.
    pub fn begin() -> Self {
        // SAFETY: an all-zero sigset_t is a valid value to initialise.
        let (mut ends, mut before): (libc::sigset_t, libc::sigset_t) =
            unsafe { (std::mem::zeroed(), std::mem::zeroed()) };
        // SAFETY: both sets are ours and live through the calls.
        let blocked = unsafe {
            libc::sigemptyset(&raw mut ends);
            for signal in [libc::SIGINT, libc::SIGTERM, libc::SIGHUP, libc::SIGQUIT] {
                libc::sigaddset(&raw mut ends, signal);
            }
            libc::pthread_sigmask(libc::SIG_BLOCK, &raw const ends, &raw mut before)
        };
        Self((blocked == 0).then_some(before))
    }
}

impl Drop for Undisturbed {
    fn drop(&mut self) {
        if let Some(before) = &self.0 {
            // SAFETY: the set is the one that the kernel gave us; where the old one is stored is not wanted.
            unsafe { libc::pthread_sigmask(libc::SIG_SETMASK, before, std::ptr::null_mut()) };
        }
    }
}
