//! A process from outside: ptrace(2), process_vm_readv(2) and /proc/PID/mem.
//!
//! The tracer is one thread: what this module does must be called from the
//! thread that opened the process. While threads are held, SIGALRM serves as
//! the deadline.

use std::collections::HashMap;
use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;
use std::time::Instant;

use super::{FunctionCall, HoldError, HoldLimits, IdleCheck, Pid, Process, ProcessError, RemoteCall, StackCheck, Tid};
use crate::addr::{ProcAddr, ProcRange};
use crate::maps::{self, Mapping};
use crate::memory::{ReadMemory, Unreadable};

mod borrow;
mod frame;
mod hold;
pub mod kept;
pub mod procfs;
mod seccomp;
mod sys;
mod tracee;

pub use hold::PtraceHeld;
pub use sys::{Priority, Undisturbed};

/// A process, seen from outside.
#[derive(Debug)]
pub struct PtraceProcess {
    pid: Pid,
    pidfd: OwnedFd,
    start_time: u64,
    mem: File,
    own: Vec<ProcRange>,
    /// How often each thread had been put on a CPU when we first looked.
    first_runs: HashMap<Tid, u64>,
    /// The same of threads that we borrowed, before that: what they ran for us does not count.
    runs_before_loan: HashMap<Tid, u64>,
    gadgets: Option<frame::Gadgets>,
    /// Traced threads that could not be stopped and so not be let go.
    lingering: Vec<tracee::Running>,
    poke_only: bool,
    /// The seccomp mode of a thread that was not borrowed because of it.
    confined: Option<u32>,
}

/// The right to change a process, until dropped.
#[derive(Debug)]
#[must_use = "dropped, the process is anybody's"]
pub struct Lock(File);

impl Drop for Lock {
    /// Closing would not do: a child that was forked meanwhile has the file, too.
    fn drop(&mut self) {
        sys::unlock(&self.0);
    }
}

impl PtraceProcess {
    /// Opens a process without touching it.
    ///
    /// # Errors
    ///
    /// It is gone or a zombie, somebody else traces it, or we may not.
    pub fn open(pid: Pid) -> Result<Self, ProcessError> {
        if pid.0 <= 0 {
            return Err(ProcessError::Gone(pid));
        }
        let pidfd = sys::open_pidfd(pid.0).map_err(|e| match e.raw_os_error() {
            // EINVAL, newer kernels ENOENT: the number of a thread that leads no process.
            Some(libc::EINVAL) => ProcessError::Gone(pid),
            _ => ProcessError::from_os(pid, "open", e),
        })?;
        let os = |what| move |e| ProcessError::from_os(pid, what, e);
        let start_time = procfs::start_time(pid).map_err(os("read /proc/PID/stat"))?;
        let status = procfs::Status::of(pid).map_err(os("read /proc/PID/status"))?;
        if matches!(status.state, 'Z' | 'X') {
            return Err(ProcessError::Gone(pid));
        }
        if procfs::is_kernel_thread(pid) {
            return Err(ProcessError::KernelThread(pid));
        }
        if status.tracer != 0 {
            return Err(traced_by(pid, status.tracer));
        }
        let mem = OpenOptions::new().read(true).write(true).open(format!("/proc/{pid}/mem"));
        let mem = mem.map_err(os("write the memory"))?;
        let mut process = Self {
            pid,
            pidfd,
            start_time,
            mem,
            own: Vec::new(),
            first_runs: HashMap::new(),
            runs_before_loan: HashMap::new(),
            gadgets: None,
            lingering: Vec::new(),
            poke_only: false,
            confined: None,
        };
        for tid in procfs::threads(pid).map_err(os("list the threads"))? {
            process.first_runs.insert(tid, procfs::run_count(pid, tid));
        }
        Ok(process)
    }

    /// Keeps other commands off the process: a lock on its `/proc/PID/mem`, which ends at the latest with us.
    ///
    /// # Errors
    ///
    /// Another command has it.
    pub fn lock(&self) -> Result<Lock, ProcessError> {
        let mem = OpenOptions::new().read(true).write(true).open(format!("/proc/{}/mem", self.pid));
        let mem = mem.map_err(|e| self.os_error("lock", e))?;
        match sys::lock(&mem) {
            Ok(true) => Ok(Lock(mem)),
            Ok(false) => {
                let holder = procfs::lock_holder(&mem).unwrap_or(0);
                Err(ProcessError::Busy { pid: self.pid, tracer: Pid(holder) })
            }
            Err(e) => Err(self.os_error("lock", e)),
        }
    }

    /// Lets threads go that were born traced and could not be stopped at once.
    pub fn release_born(&mut self) {
        let born = std::mem::take(&mut self.lingering);
        self.release_running(born);
    }

    /// Writes by PTRACE_POKETEXT from now on, as on kernels whose /proc/PID/mem does not write code: for tests.
    pub fn without_proc_mem(&mut self) {
        self.poke_only = true;
    }

    /// Whether it is still the process that was opened, and alive.
    #[must_use]
    pub fn is_alive(&self) -> bool {
        sys::is_alive(&self.pidfd) && procfs::start_time(self.pid).is_ok_and(|t| t == self.start_time)
    }

    /// Whether it has ended or is about to, so that nothing else about it need be true any more.
    #[must_use]
    pub fn has_ended(&self) -> bool {
        !self.is_alive() || procfs::has_ended(self.pid)
    }

    /// Other processes that share its memory: children of vfork(2) and the like.
    #[must_use]
    pub fn sharers(&self) -> Vec<Pid> {
        let mut others = procfs::processes();
        // Having none is not sharing: kernel threads, and this process itself if it ends meanwhile.
        let has_memory = |p: Pid| procfs::Status::of(p).is_ok_and(|s| s.memory);
        others.retain(|p| *p != self.pid && sys::share_memory(self.pid.0, p.0) == Some(true) && has_memory(*p));
        others
    }

    /// Whether that is another process, not ended, that shares this memory or may.
    #[must_use]
    pub fn may_share(&self, other: Pid) -> bool {
        other != self.pid && sys::share_memory(self.pid.0, other.0) != Some(false) && !procfs::has_ended(other)
    }

    /// An error of the operating system about this process, told by what it means.
    fn os_error(&self, what: &'static str, source: io::Error) -> ProcessError {
        if !self.is_alive() {
            return ProcessError::Gone(self.pid);
        }
        if source.raw_os_error() == Some(libc::EPERM) {
            if let Ok(status) = procfs::Status::of(self.pid) {
                if status.tracer != 0 && status.tracer != sys::own_tid() {
                    return traced_by(self.pid, status.tracer);
                }
            }
        }
        ProcessError::from_os(self.pid, what, source)
    }

    /// Code of the process by which a borrowed thread finds back alone.
    fn gadgets(&mut self) -> Result<frame::Gadgets, ProcessError> {
        if let Some(known) = self.gadgets {
            return Ok(known);
        }
        let maps = self.mappings()?;
        let found = frame::Gadgets::find(self, &maps).ok_or_else(|| ProcessError::Proc {
            pid: self.pid,
            what: "its code (no `syscall; ret`, or no return from signal handlers)".into(),
        })?;
        self.gadgets = Some(found);
        Ok(found)
    }

    /// Whether a range is ours.
    pub(super) fn owns(&self, range: ProcRange) -> bool {
        self.own.iter().any(|o| o.start <= range.start && range.end <= o.end)
    }

    /// Forgets memory that was ours.
    #[cfg(feature = "agent")]
    pub(super) fn disown(&mut self, range: ProcRange) {
        self.own.retain(|o| *o != range);
    }

    /// Writes through /proc/PID/mem, or where the kernel does not let that write code, by way of a stopped thread.
    pub(super) fn write_any(&self, at: ProcAddr, bytes: &[u8], stopped: Option<Tid>) -> Result<(), ProcessError> {
        let failed = |source| ProcessError::Write { pid: self.pid, at, len_bytes: bytes.len(), source };
        let result = if self.poke_only {
            Err(io::Error::from_raw_os_error(libc::EIO))
        } else {
            self.mem.write_all_at(bytes, at.0)
        };
        match (result, stopped) {
            (Ok(()), _) => Ok(()),
            (Err(_), Some(tid)) => self.poke(tid, at, bytes).map_err(failed),
            (Err(e), None) => Err(failed(e)),
        }
    }

    fn poke(&self, tid: Tid, at: ProcAddr, bytes: &[u8]) -> io::Result<()> {
        let unreadable = |_| io::Error::from_raw_os_error(libc::EFAULT);
        let end = at.0.checked_add(bytes.len() as u64).ok_or_else(|| io::Error::from_raw_os_error(libc::EFAULT))?;
        let first = at.0 & !7;
        let mut words = self.read_vec(ProcAddr(first), (end - first).next_multiple_of(8)).map_err(unreadable)?;
        let skip = (at.0 - first) as usize;
        if let Some(part) = words.get_mut(skip..skip + bytes.len()) {
            part.copy_from_slice(bytes);
        }
        for (i, word) in words.as_chunks::<8>().0.iter().enumerate() {
            sys::poke(tid.0, ProcAddr(first + i as u64 * 8), u64::from_le_bytes(*word))?;
        }
        Ok(())
    }
}

impl Drop for PtraceProcess {
    fn drop(&mut self) {
        let lingering = std::mem::take(&mut self.lingering);
        self.release_running(lingering);
    }
}

fn traced_by(pid: Pid, tracer: i32) -> ProcessError {
    let status = procfs::Status::of(Pid(tracer)).unwrap_or_default();
    if status.name == "livepatch" {
        ProcessError::Busy { pid, tracer: Pid(tracer) }
    } else {
        ProcessError::Traced { pid, tracer: Pid(tracer), comm: status.name }
    }
}

impl ReadMemory for PtraceProcess {
    fn read_exact(&self, at: ProcAddr, buf: &mut [u8]) -> Result<(), Unreadable> {
        let len_bytes = buf.len() as u64;
        let mut ok = [false];
        sys::read_parts(self.pid.0, &mut [(at, &mut *buf)], &mut ok);
        if ok[0] || self.mem.read_exact_at(buf, at.0).is_ok() {
            Ok(())
        } else {
            Err(Unreadable { at, len_bytes })
        }
    }

    fn read_many(&self, parts: &mut [(ProcAddr, &mut [u8])]) -> Vec<bool> {
        let mut ok = vec![false; parts.len()];
        sys::read_parts(self.pid.0, parts, &mut ok);
        ok
    }
}

impl Process for PtraceProcess {
    type Held<'a> = PtraceHeld<'a>;

    fn pid(&self) -> Pid {
        self.pid
    }

    fn mappings(&self) -> Result<Vec<Mapping>, ProcessError> {
        // The kernel hands it out a page at a time: what changes in between may be in two of them, and differ.
        const TRIES: usize = 8;
        let path = format!("/proc/{}/maps", self.pid);
        let mut tries = 0..TRIES;
        loop {
            let text = std::fs::read(&path).map_err(|e| self.os_error("read /proc/PID/maps", e))?;
            if text.is_empty() {
                return Err(ProcessError::Gone(self.pid));
            }
            match maps::parse(&text) {
                Ok(maps) => return Ok(maps),
                Err(e) if tries.next().is_none() => {
                    return Err(ProcessError::Proc { pid: self.pid, what: e.to_string() });
                }
                Err(_) => std::thread::yield_now(),
            }
        }
    }

    fn remote(&mut self, calls: &[RemoteCall], deadline: Instant) -> Result<(), ProcessError> {
        self.remote_calls(calls, deadline)
    }

    fn call(&mut self, call: FunctionCall, idle: &mut dyn IdleCheck, deadline: Instant) -> Result<(), ProcessError> {
        self.call_function(call, idle, deadline)
    }

    fn adopt(&mut self, range: ProcRange) {
        self.own.push(range);
    }

    fn write_own(&mut self, at: ProcAddr, bytes: &[u8]) -> Result<(), ProcessError> {
        let range = ProcRange::new(at, bytes.len() as u64);
        if !range.is_some_and(|r| self.owns(r)) {
            return Err(ProcessError::NotOurs { pid: self.pid, at });
        }
        match self.write_any(at, bytes, None) {
            Err(ProcessError::Write { .. }) if self.is_alive() => self.poke_borrowed(at, bytes),
            other => other,
        }
    }

    fn make_private(&mut self, at: ProcAddr) -> Result<(), ProcessError> {
        let mut byte = [0];
        let source = || io::Error::from_raw_os_error(libc::EFAULT);
        self.read_exact(at, &mut byte).map_err(|_| ProcessError::Write {
            pid: self.pid,
            at,
            len_bytes: 1,
            source: source(),
        })?;
        // Where /proc/PID/mem does not write code, the page becomes private in the hold instead.
        let _ = self.write_any(at, &byte, None);
        Ok(())
    }

    fn hold(&mut self, limits: HoldLimits, check: &mut dyn StackCheck) -> Result<PtraceHeld<'_>, HoldError> {
        self.hold_all(limits, check)
    }
}
