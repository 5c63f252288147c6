//! What can go wrong with a process.

use super::{Pid, Tid};
use crate::addr::ProcAddr;

/// Something about the process, not about the patch.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ProcessError {
    /// There is no such process, or it has ended.
    #[error("no process {0}: it has ended or never was; nothing was changed")]
    Gone(Pid),
    /// It is none: the kernel's own.
    #[error("{0} is a thread of the kernel, not a process")]
    KernelThread(Pid),
    /// The kernel does not let us.
    #[error("no permission to {what} of process {pid}: run as its user or as root, and see /proc/sys/kernel/yama/ptrace_scope")]
    Permission {
        /// The process.
        pid: Pid,
        /// What was tried.
        what: &'static str,
    },
    /// Somebody else traces it.
    #[error("process {pid} is traced by {comm:?} (PID {tracer}): detach it first")]
    Traced {
        /// The process.
        pid: Pid,
        /// Who traces it.
        tracer: Pid,
        /// The tracer's name.
        comm: String,
    },
    /// Another livepatch command is at work on it.
    #[error("{} is at work on process {pid}: try again when it has ended", at_work(*pid, *tracer))]
    Busy {
        /// The process.
        pid: Pid,
        /// The other command.
        tracer: Pid,
    },
    /// No thread that could be borrowed.
    #[error(
        "no thread of process {pid} could be borrowed to {what} before the timeout: none was idle in a blocking call"
    )]
    NoIdleThread {
        /// The process.
        pid: Pid,
        /// What for.
        what: &'static str,
    },
    /// Its seccomp filter may forbid what a borrowed thread must do, and we may not look at it or suspend it.
    #[error("process {pid} is confined by seccomp (mode {mode})")]
    Confined {
        /// The process.
        pid: Pid,
        /// The mode in /proc/PID/status.
        mode: u32,
    },
    /// A system call that a thread made for us failed.
    #[error("{call} in process {pid} failed: {source}")]
    Remote {
        /// The process.
        pid: Pid,
        /// Which.
        call: &'static str,
        /// Its error.
        source: std::io::Error,
    },
    /// A call on a borrowed thread did not return in time.
    #[error("thread {tid} of process {pid}, borrowed to {what}, did not come back before the deadline")]
    Stuck {
        /// The process.
        pid: Pid,
        /// The thread.
        tid: Tid,
        /// What for.
        what: &'static str,
    },
    /// Memory could not be written.
    #[error("{len_bytes} bytes at {at} of process {pid} could not be written: {source}")]
    Write {
        /// The process.
        pid: Pid,
        /// Where.
        at: ProcAddr,
        /// How many.
        len_bytes: usize,
        /// The error.
        source: std::io::Error,
    },
    /// A write to memory that is not ours.
    #[error("{at} of process {pid} is no memory of livepatch")]
    NotOurs {
        /// The process.
        pid: Pid,
        /// Where.
        at: ProcAddr,
    },
    /// Something of the operating system.
    #[error("{what} of process {pid}: {source}")]
    Os {
        /// The process.
        pid: Pid,
        /// What was tried.
        what: &'static str,
        /// The error.
        source: std::io::Error,
    },
    /// A file of /proc that is not as documented.
    #[error("process {pid}: {what} is not as documented")]
    Proc {
        /// The process.
        pid: Pid,
        /// The file.
        what: String,
    },
}

fn at_work(pid: Pid, other: Pid) -> String {
    if pid == other {
        "its own agent".into()
    } else {
        format!("another livepatch command (PID {other})")
    }
}

impl ProcessError {
    /// An operating system's error, told by what it means for a process.
    #[must_use]
    pub fn from_os(pid: Pid, what: &'static str, source: std::io::Error) -> Self {
        match source.raw_os_error() {
            Some(libc::ESRCH | libc::ENOENT) => Self::Gone(pid),
            Some(libc::EPERM | libc::EACCES) => Self::Permission { pid, what },
            _ => Self::Os { pid, what, source },
        }
    }
}

/// Why a hold was given up; every thread runs again.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum HoldError {
    /// The check said no to a thread; it knows why.
    #[error("thread {0} is not clear")]
    NotClear(Tid),
    /// A thread did not stop in time.
    #[error("thread {0} could not be stopped in time")]
    Deadline(Tid),
    /// The process failed.
    #[error(transparent)]
    Process(#[from] ProcessError),
}
