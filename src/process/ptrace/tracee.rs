//! One traced thread as a typestate: [`Running`] may run, [`Stopped`] does not.
//!
//! Registers exist on [`Stopped`] only, and every way out of it takes `self`.
//! A thread of somebody else's process may die at any moment, a stopped one by
//! SIGKILL: ESRCH always means that (ptrace(2), "Death under ptrace"), and its
//! end is then reaped, so that its process can end.

use std::io;
use std::time::Instant;

use super::sys::{self, Event, RawRegisters};
use crate::addr::ProcAddr;
use crate::process::{Registers, Tid};

/// Why a tracee stopped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stop {
    /// By PTRACE_INTERRUPT, or newly born.
    Interrupt,
    /// By a job-control signal: it would stand still without us, too.
    Group,
    /// It is about to receive this signal.
    Signal(i32),
    /// At the entry or exit of a system call.
    Syscall,
    /// It made a thread.
    Clone,
    /// Another event.
    Other,
}

impl Stop {
    fn from_status(status: i32) -> Self {
        let (signal, event) = (status & 0xff, status >> 8);
        match (signal, event) {
            (libc::SIGTRAP, libc::PTRACE_EVENT_STOP) => Self::Interrupt,
            (_, libc::PTRACE_EVENT_STOP) => Self::Group,
            (_, libc::PTRACE_EVENT_CLONE) => Self::Clone,
            (s, 0) if s == libc::SIGTRAP | 0x80 => Self::Syscall,
            (s, 0) => Self::Signal(s),
            _ => Self::Other,
        }
    }
}

/// A traced thread that may run.
#[derive(Debug)]
#[must_use = "a tracee that is dropped stays traced until this process ends"]
pub struct Running(Tid);

/// A traced thread that stands still.
#[derive(Debug)]
#[must_use = "a tracee that is dropped stays stopped until this process ends"]
pub struct Stopped {
    tid: Tid,
    stop: Stop,
}

/// What waiting for a thread brought.
#[derive(Debug)]
pub enum Waited {
    /// It stands still.
    Stopped(Stopped),
    /// It has ended.
    Gone,
    /// It still runs, or sleeps where it cannot be stopped.
    Late(Running),
}

impl Running {
    /// Starts tracing without stopping the thread.
    pub fn seize(tid: Tid) -> io::Result<Self> {
        sys::seize(tid.0).map(|()| Self(tid))
    }

    /// A thread that is traced already: born of one that is.
    pub fn inherited(tid: Tid) -> Self {
        Self(tid)
    }

    /// Which.
    pub fn tid(&self) -> Tid {
        self.0
    }

    /// Asks it to stop.
    pub fn interrupt(&self) {
        // Its death is found by waiting.
        let _ = sys::interrupt(self.0 .0);
    }

    /// Looks, without sleeping, until it stands still, has ended, or `until` has come.
    pub fn look(&self, until: Instant) {
        while matches!(sys::wait(self.0 .0, false), Ok(None)) && Instant::now() < until {}
    }

    /// Waits until it stands still. Blocks past `deadline` unless an [`Alarm`](sys::Alarm) is set.
    pub fn wait(self, deadline: Instant) -> Waited {
        loop {
            match sys::wait(self.0 .0, true) {
                Ok(Some(Event::Stopped(status))) => {
                    return Waited::Stopped(Stopped { tid: self.0, stop: Stop::from_status(status) })
                }
                Ok(Some(Event::Ended)) => {
                    sys::reap(self.0 .0);
                    return Waited::Gone;
                }
                Err(e) if e.raw_os_error() == Some(libc::EINTR) => {
                    if Instant::now() >= deadline {
                        return Waited::Late(self);
                    }
                }
                Ok(None) => {}
                Err(_) => return Waited::Gone,
            }
        }
    }

    /// Whether it stands still now.
    pub fn poll(self) -> Waited {
        match sys::wait(self.0 .0, false) {
            Ok(Some(Event::Stopped(status))) => {
                Waited::Stopped(Stopped { tid: self.0, stop: Stop::from_status(status) })
            }
            Ok(Some(Event::Ended)) => {
                sys::reap(self.0 .0);
                Waited::Gone
            }
            Ok(None) => Waited::Late(self),
            Err(_) => Waited::Gone,
        }
    }
}

impl Stopped {
    /// Which.
    pub fn tid(&self) -> Tid {
        self.tid
    }

    /// Why.
    pub fn stop(&self) -> Stop {
        self.stop
    }

    /// The registers as the kernel has them.
    pub fn raw_registers(&self) -> io::Result<RawRegisters> {
        sys::registers(self.tid.0)
    }

    /// The thread that it has just made, at [`Stop::Clone`].
    pub fn born(&self) -> Option<Tid> {
        (self.stop == Stop::Clone).then_some(())?;
        sys::event_message(self.tid.0).ok().and_then(|m| i32::try_from(m).ok()).map(Tid)
    }

    /// The signal that it is still to receive.
    fn pending(&self) -> i32 {
        match self.stop {
            Stop::Signal(s) => s,
            _ => 0,
        }
    }

    /// Lets it run on, traced, with its signal.
    pub fn resume(self) -> Running {
        let _ = sys::cont(self.tid.0, self.pending());
        Running(self.tid)
    }

    /// Lets it go on only to where it would return to user mode: the stop is asked for before it moves.
    pub fn resume_to_interrupt(self) -> Running {
        let _ = sys::interrupt(self.tid.0);
        self.resume()
    }

    /// Lets it run to the next system call, traced, with its signal.
    pub fn resume_to_syscall(self) -> Running {
        let _ = sys::cont_to_syscall(self.tid.0, self.pending());
        Running(self.tid)
    }

    /// Lets it go, with its signal. A thread stopped by job control stays so.
    pub fn detach(self) {
        let _ = sys::detach(self.tid.0, self.pending());
    }
}

/// Every register of a thread.
pub fn words(raw: &RawRegisters) -> [u64; 21] {
    [
        raw.r15,
        raw.r14,
        raw.r13,
        raw.r12,
        raw.rbp,
        raw.rbx,
        raw.r11,
        raw.r10,
        raw.r9,
        raw.r8,
        raw.rax,
        raw.rcx,
        raw.rdx,
        raw.rsi,
        raw.rdi,
        raw.orig_rax,
        raw.rip,
        raw.rsp,
        raw.fs_base,
        raw.gs_base,
        raw.eflags,
    ]
}

/// The registers that a stack check needs.
pub fn registers(raw: &RawRegisters) -> Registers {
    let r = raw;
    Registers {
        general: [
            r.rax, r.rdx, r.rcx, r.rbx, r.rsi, r.rdi, r.rbp, r.rsp, r.r8, r.r9, r.r10, r.r11, r.r12, r.r13, r.r14,
            r.r15,
        ],
        pc: ProcAddr(r.rip),
        fs_base: ProcAddr(r.fs_base),
    }
}

const EINTR: i64 = -(libc::EINTR as i64);
const ERESTARTNOHAND: i64 = -514;

/// System calls that return EINTR when interrupted by nothing but us, and that may simply be restarted
/// (field measurement on kernel 6.18; never `close`).
fn leaks_eintr(nr: i64) -> bool {
    matches!(
        nr,
        libc::SYS_epoll_wait
            | libc::SYS_epoll_pwait
            | libc::SYS_epoll_pwait2
            | libc::SYS_recvmsg
            | libc::SYS_recvfrom
            | libc::SYS_recvmmsg
            | libc::SYS_accept
            | libc::SYS_accept4
            | libc::SYS_semop
            | libc::SYS_semtimedop
            | libc::SYS_rt_sigtimedwait
            | libc::SYS_io_uring_enter
            | libc::SYS_io_getevents
    )
}

/// At an interrupt's stop: a call that our interrupt would end with EINTR goes on instead. With a signal that
/// has a handler, the handler runs and the call returns EINTR as it would have without us.
pub fn hide_eintr(stopped: &Stopped, raw: &mut RawRegisters) {
    let nr = raw.orig_rax.cast_signed();
    let eligible = matches!(stopped.stop, Stop::Interrupt) && nr >= 0 && raw.rax.cast_signed() == EINTR;
    if eligible && leaks_eintr(nr) && sys::set_rax(stopped.tid.0, ERESTARTNOHAND as u64).is_ok() {
        raw.rax = ERESTARTNOHAND as u64;
    }
}

/// `rip` and `rax` with which a thread stopped by an interrupt makes its interrupted call again, as the kernel would
/// have it do; without a call, what they are. A call with a rest of its time left (-516) starts from its whole.
pub fn restarted(raw: &RawRegisters) -> (u64, u64) {
    match raw.orig_rax.cast_signed() {
        nr if nr >= 0 && restarts(raw) => (raw.rip.wrapping_sub(2), raw.orig_rax),
        _ => (raw.rip, raw.rax),
    }
}

/// Whether a system call that was interrupted at an [`Stop::Interrupt`] goes on unseen when the same registers come back.
pub fn restarts(raw: &RawRegisters) -> bool {
    // -512 ERESTARTSYS, -513 ERESTARTNOINTR, -514 ERESTARTNOHAND, -516 ERESTART_RESTARTBLOCK
    let nr = raw.orig_rax.cast_signed();
    nr < 0 || matches!(raw.rax.cast_signed(), -512 | -513 | -514 | -516)
}
