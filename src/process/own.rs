//! The process that this code runs in: what from outside takes a borrowed thread is a plain call here. It is never held.
//!
//! Contract of the `unsafe` in this module:
//! 1. memory is mapped where nothing is (MAP_FIXED_NOREPLACE), and changed or unmapped only where it was mapped by us: nothing of Rust's lies there;
//! 2. a function that is called is `__register_frame` or one of its kin, or `pthread_create`, found in the unwinder's or the C library's own
//!    symbol table, and its arguments are those of a borrowed thread's call.
#![allow(unsafe_code)]

use std::io;
use std::time::Instant;

use super::ptrace::PtraceProcess;
use super::{
    Access, FunctionCall, Held, HoldError, HoldLimits, HoldTimes, IdleCheck, Pid, Process, ProcessError, RemoteCall,
    StackCheck,
};
use crate::addr::{ProcAddr, ProcRange};
use crate::maps::Mapping;
use crate::memory::{ReadMemory, Unreadable};

/// The process that this code runs in, by what it looks like from outside.
#[derive(Debug)]
pub struct OwnProcess<'a>(&'a mut PtraceProcess);

impl<'a> OwnProcess<'a> {
    /// `process` opened as if from outside.
    ///
    /// # Errors
    ///
    /// It is another one.
    pub fn new(process: &'a mut PtraceProcess) -> Result<Self, ProcessError> {
        let pid = process.pid();
        if pid.0.cast_unsigned() == std::process::id() {
            Ok(Self(process))
        } else {
            Err(ProcessError::NotOurs { pid, at: ProcAddr(0) })
        }
    }

    /// Whether another process shares this memory: a child of vfork that has not called exec.
    #[must_use]
    pub fn has_sharers(&self) -> bool {
        !self.0.sharers().is_empty()
    }

    /// Whether this is another process that shares this memory, or may be.
    #[must_use]
    pub fn is_sharer(&self, pid: Pid) -> bool {
        self.0.may_share(pid)
    }

    /// Writes code while threads run. For a switch, which sees to it that none executes it half written.
    pub(crate) fn write_code(&mut self, at: ProcAddr, bytes: &[u8]) -> Result<(), ProcessError> {
        self.0.write_any(at, bytes, None)
    }
}

fn one(call: RemoteCall) -> (&'static str, io::Result<()>) {
    let len = |r: ProcRange| usize::try_from(r.len_bytes()).unwrap_or(0);
    let at = |r: ProcRange| r.start.0 as usize as *mut libc::c_void;
    let ok = |result: i32| if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) };
    match call {
        RemoteCall::Map(range) => {
            let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED_NOREPLACE;
            let access = libc::PROT_READ | libc::PROT_EXEC;
            // SAFETY: 1.
            let got = unsafe { libc::mmap(at(range), len(range), access, flags, -1, 0) };
            let result = if got == libc::MAP_FAILED {
                Err(io::Error::last_os_error())
            } else if got == at(range) {
                Ok(())
            } else {
                // A kernel older than the flag: it is elsewhere.
                // SAFETY: 1: it was mapped just now.
                let _ = unsafe { libc::munmap(got, len(range)) };
                Err(io::Error::from_raw_os_error(libc::EEXIST))
            };
            ("mmap", result)
        }
        RemoteCall::Protect(range, access) => {
            let access = match access {
                Access::Read => libc::PROT_READ,
                Access::Execute => libc::PROT_READ | libc::PROT_EXEC,
                Access::Write => libc::PROT_READ | libc::PROT_WRITE,
            };
            // SAFETY: 1.
            ("mprotect", ok(unsafe { libc::mprotect(at(range), len(range), access) }))
        }
        // SAFETY: 1.
        RemoteCall::Unmap(range) => ("munmap", ok(unsafe { libc::munmap(at(range), len(range)) })),
        RemoteCall::AskHandler { .. } => ("sigaction", Err(io::Error::from_raw_os_error(libc::ENOSYS))),
    }
}

impl ReadMemory for OwnProcess<'_> {
    fn read_exact(&self, at: ProcAddr, buf: &mut [u8]) -> Result<(), Unreadable> {
        self.0.read_exact(at, buf)
    }

    fn read_many(&self, parts: &mut [(ProcAddr, &mut [u8])]) -> Vec<bool> {
        self.0.read_many(parts)
    }
}

impl Process for OwnProcess<'_> {
    type Held<'h>
        = NeverHeld
    where
        Self: 'h;

    fn pid(&self) -> Pid {
        self.0.pid()
    }

    fn mappings(&self) -> Result<Vec<Mapping>, ProcessError> {
        self.0.mappings()
    }

    fn remote(&mut self, calls: &[RemoteCall], _deadline: Instant) -> Result<(), ProcessError> {
        for call in calls {
            match call {
                // Only what was mapped by us is changed: 1.
                RemoteCall::Protect(range, _) | RemoteCall::Unmap(range) if !self.0.owns(*range) => {
                    return Err(ProcessError::NotOurs { pid: self.pid(), at: range.start });
                }
                _ => {}
            }
            let (name, result) = one(*call);
            result.map_err(|source| ProcessError::Remote { pid: self.pid(), call: name, source })?;
            match call {
                RemoteCall::Map(range) => self.0.adopt(*range),
                RemoteCall::Unmap(range) => self.0.disown(*range),
                _ => {}
            }
        }
        Ok(())
    }

    fn call(&mut self, call: FunctionCall, _idle: &mut dyn IdleCheck, _deadline: Instant) -> Result<(), ProcessError> {
        let [a, b, c, d] = call.arguments;
        // SAFETY: 2: a C function that takes at most four words.
        unsafe {
            let function: extern "C" fn(u64, u64, u64, u64) = std::mem::transmute(call.function.0 as usize);
            function(a, b, c, d);
        }
        Ok(())
    }

    fn adopt(&mut self, range: ProcRange) {
        self.0.adopt(range);
    }

    fn write_own(&mut self, at: ProcAddr, bytes: &[u8]) -> Result<(), ProcessError> {
        let range = ProcRange::new(at, bytes.len() as u64);
        if !range.is_some_and(|r| self.0.owns(r)) {
            return Err(ProcessError::NotOurs { pid: self.pid(), at });
        }
        self.0.write_any(at, bytes, None)
    }

    fn make_private(&mut self, at: ProcAddr) -> Result<(), ProcessError> {
        let byte = self.read_vec(at, 1).unwrap_or_default();
        self.0.write_any(at, &byte, None)
    }

    fn hold(&mut self, _limits: HoldLimits, _check: &mut dyn StackCheck) -> Result<NeverHeld, HoldError> {
        Err(HoldError::Process(ProcessError::NotOurs { pid: self.pid(), at: ProcAddr(0) }))
    }
}

/// There is none: nobody holds all threads of the process that he runs in.
#[derive(Debug)]
pub enum NeverHeld {}

impl ReadMemory for NeverHeld {
    fn read_exact(&self, _at: ProcAddr, _buf: &mut [u8]) -> Result<(), Unreadable> {
        match *self {}
    }
}

impl Held for NeverHeld {
    fn write_code(&mut self, _at: ProcAddr, _bytes: &[u8]) -> Result<(), ProcessError> {
        match *self {}
    }

    fn register_bytes(&mut self) -> Result<Vec<u8>, ProcessError> {
        match *self {}
    }

    fn release(self) -> HoldTimes {
        match self {}
    }
}
