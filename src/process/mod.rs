//! A process as the engine needs it: memory that can be read, mapped and,
//! only while every thread is held, written.
//!
//! Code is written through [`Held`], which exists only while no thread runs. A
//! process that is not held has no such method:
//!
//! ```compile_fail
//! use livepatch::addr::ProcAddr;
//! fn patch<P: livepatch::process::Process>(process: &mut P) {
//!     process.write_code(ProcAddr(0x1000), &[0xe9]).unwrap();
//! }
//! ```
//!
//! ```
//! use livepatch::addr::ProcAddr;
//! use livepatch::process::{Held, ProcessError};
//! fn patch<H: Held>(held: &mut H) -> Result<(), ProcessError> {
//!     held.write_code(ProcAddr(0x1000), &[0xe9])
//! }
//! ```

use std::time::{Duration, Instant};

use crate::addr::{ProcAddr, ProcRange};
use crate::maps::Mapping;
use crate::memory::ReadMemory;

mod error;
pub mod fake;
#[cfg(feature = "agent")]
pub mod own;
pub mod ptrace;

pub use error::{HoldError, ProcessError};

/// A process.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Pid(pub i32);

/// One thread of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Tid(pub i32);

impl std::fmt::Display for Pid {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.0.fmt(f)
    }
}

impl std::fmt::Display for Tid {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.0.fmt(f)
    }
}

/// DWARF number of `rsp` (System V psABI for x86-64, figure 3.36).
pub const RSP: usize = 7;

/// The registers of a held thread.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct Registers {
    /// `rax`, `rdx`, `rcx`, `rbx`, `rsi`, `rdi`, `rbp`, `rsp`, `r8` to `r15`: DWARF order.
    pub general: [u64; 16],
    /// `rip`: interrupted at, not: returns to.
    pub pc: ProcAddr,
    /// Base of `fs`: the thread's control block.
    pub fs_base: ProcAddr,
}

impl Registers {
    /// `rsp`.
    #[must_use]
    pub fn sp(&self) -> ProcAddr {
        ProcAddr(self.general[RSP])
    }
}

/// A thread that is held.
#[derive(Clone, Copy, Debug)]
pub struct HeldThread {
    /// Which.
    pub tid: Tid,
    /// Whether it is the process's first thread.
    pub is_main: bool,
    /// Its registers.
    pub registers: Registers,
}

/// Decides for each held thread whether it may stay where it is while code changes.
///
/// Called while threads are held: no allocation, no I/O but reading the process, unless the answer is no.
pub trait StackCheck {
    /// The part of the thread's stack to look at, or `None` if its stack is unknown.
    fn extent(&self, thread: &HeldThread) -> Option<ProcRange>;

    /// Whether the thread is clear. `first` holds the first bytes of `extent`, perhaps not all.
    fn is_clear(
        &mut self,
        thread: &HeldThread,
        extent: Option<ProcRange>,
        first: &[u8],
        memory: &dyn ReadMemory,
    ) -> bool;
}

/// Decides whether a thread may be borrowed to call a function.
pub trait IdleCheck {
    /// Whether nothing that the thread is in the middle of could be disturbed.
    fn is_idle(&mut self, thread: &HeldThread, memory: &dyn ReadMemory) -> bool;
}

/// How a part of a mapping of ours may be used; never writable and executable at once.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// Read.
    Read,
    /// Read and execute.
    Execute,
    /// Read and write.
    Write,
}

/// A system call that a thread of the process makes for us.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RemoteCall {
    /// `mmap`: new private memory at exactly this place, readable and executable, zero.
    Map(ProcRange),
    /// `mprotect`.
    Protect(ProcRange, Access),
    /// `munmap`.
    Unmap(ProcRange),
    /// `rt_sigaction`: writes what handles a signal to memory of ours.
    AskHandler {
        /// The signal.
        signal: i32,
        /// Where to.
        to: ProcAddr,
    },
}

/// A function of the process to call on a borrowed thread, by way of [`insn::CALL_STUB`](crate::insn::CALL_STUB).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FunctionCall {
    /// Where the stub is.
    pub stub: ProcAddr,
    /// The function.
    pub function: ProcAddr,
    /// Its arguments; those that it does not have are ignored.
    pub arguments: [u64; 4],
}

/// Limits of a hold.
#[derive(Clone, Copy, Debug)]
pub struct HoldLimits {
    /// The longest that threads are held before all are let go.
    pub deadline: Duration,
}

/// How long threads were held.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct HoldTimes {
    /// The longest that a running thread was held, in nanoseconds.
    pub pause_ns: u64,
    /// The longest that a sleeping thread was held, in nanoseconds.
    pub sleepers_ns: u64,
    /// How many threads there were.
    pub threads: usize,
}

/// A process, from outside or faked.
pub trait Process: ReadMemory {
    /// The process while none of its threads runs.
    type Held<'a>: Held
    where
        Self: 'a;

    /// Its id.
    fn pid(&self) -> Pid;

    /// What is mapped now.
    ///
    /// # Errors
    ///
    /// The process is gone.
    fn mappings(&self) -> Result<Vec<Mapping>, ProcessError>;

    /// Lets one thread, whichever can best be spared, make system calls, in order, up to the first that fails.
    ///
    /// # Errors
    ///
    /// One failed, or no thread could be borrowed before `deadline`.
    fn remote(&mut self, calls: &[RemoteCall], deadline: Instant) -> Result<(), ProcessError>;

    /// Lets one thread that `idle` accepts call a function.
    ///
    /// # Errors
    ///
    /// No thread could be borrowed before `deadline`.
    fn call(&mut self, call: FunctionCall, idle: &mut dyn IdleCheck, deadline: Instant) -> Result<(), ProcessError>;

    /// Declares memory as ours, so that [`write_own`](Self::write_own) accepts it: a mapping found by its record.
    fn adopt(&mut self, range: ProcRange);

    /// Writes memory that is ours: mapped by [`remote`](Self::remote) or [adopted](Self::adopt), whatever its access.
    ///
    /// # Errors
    ///
    /// It is not ours or cannot be written.
    fn write_own(&mut self, at: ProcAddr, bytes: &[u8]) -> Result<(), ProcessError>;

    /// Gives the process its own copy of the page of `at`, by writing back a byte that it has.
    ///
    /// # Errors
    ///
    /// It cannot be written.
    fn make_private(&mut self, at: ProcAddr) -> Result<(), ProcessError>;

    /// Holds all threads, sleepers first, and asks `check` about each.
    ///
    /// # Errors
    ///
    /// A thread was not clear or could not be stopped in time; all are let go then.
    fn hold(&mut self, limits: HoldLimits, check: &mut dyn StackCheck) -> Result<Self::Held<'_>, HoldError>;
}

/// A process all of whose threads are held. Dropped or released, they run on, runners first.
pub trait Held: ReadMemory {
    /// Writes code or data, whatever its access.
    ///
    /// # Errors
    ///
    /// It cannot be written.
    fn write_code(&mut self, at: ProcAddr, bytes: &[u8]) -> Result<(), ProcessError>;

    /// All registers of all threads, those of vectors included; a multiple of eight bytes each.
    ///
    /// # Errors
    ///
    /// A thread's can't be read.
    fn register_bytes(&mut self) -> Result<Vec<u8>, ProcessError>;

    /// Lets all threads go.
    fn release(self) -> HoldTimes;
}
