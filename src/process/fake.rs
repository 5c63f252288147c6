//! A process that is none: memory and threads in our own memory, failing on demand at its n-th operation.

use std::cell::Cell;
use std::collections::BTreeMap;
use std::time::Instant;

use super::{
    Access, FunctionCall, Held, HeldThread, HoldError, HoldLimits, HoldTimes, IdleCheck, Pid, Process, ProcessError,
    RemoteCall, StackCheck,
};
use crate::addr::{ProcAddr, ProcRange};
use crate::maps::Mapping;
use crate::memory::{ReadMemory, Unreadable};

/// A process that is none.
#[derive(Debug, Default)]
pub struct FakeProcess {
    regions: BTreeMap<ProcAddr, (Vec<u8>, Access)>,
    /// Its threads.
    pub threads: Vec<HeldThread>,
    /// The functions that were called, with their first argument.
    pub called: Vec<(ProcAddr, u64)>,
    /// Whether a failing write leaves half of its bytes.
    pub torn_writes: bool,
    own: Vec<ProcRange>,
    operations: Cell<u32>,
    fail_at: Option<u32>,
}

/// The same while held.
#[derive(Debug)]
pub struct FakeHeld<'a>(&'a mut FakeProcess);

impl FakeProcess {
    /// Gives it memory.
    pub fn insert(&mut self, at: ProcAddr, bytes: Vec<u8>, access: Access) {
        self.regions.insert(at, (bytes, access));
    }

    /// Lets its `n`-th operation from now on fail, counted from 0, and only that one.
    pub fn fail_at(&mut self, n: u32) {
        self.operations.set(0);
        self.fail_at = Some(n);
    }

    /// Whether the failure has happened.
    #[must_use]
    pub fn has_failed(&self) -> bool {
        self.fail_at.is_some_and(|n| self.operations.get() > n)
    }

    fn operation(&self) -> Result<(), std::io::Error> {
        let n = self.operations.get();
        self.operations.set(n + 1);
        if self.fail_at == Some(n) {
            return Err(std::io::Error::other("injected failure"));
        }
        Ok(())
    }

    fn os(&self, what: &'static str) -> Result<(), ProcessError> {
        self.operation().map_err(|source| ProcessError::Os { pid: self.pid(), what, source })
    }

    fn region(&self, at: ProcAddr, len: usize) -> Option<(ProcAddr, usize)> {
        let (start, (bytes, _)) = self.regions.range(..=at).next_back()?;
        let offset = usize::try_from(at.offset_from(*start)?).ok()?;
        (offset.checked_add(len)? <= bytes.len()).then_some((*start, offset))
    }

    fn write(&mut self, at: ProcAddr, bytes: &[u8]) -> Result<(), ProcessError> {
        let failed = |source| ProcessError::Write { pid: Pid(1), at, len_bytes: bytes.len(), source };
        let result = self.operation();
        let len = match result {
            Ok(()) => bytes.len(),
            Err(_) if self.torn_writes => bytes.len() / 2,
            Err(_) => 0,
        };
        let place = self.region(at, bytes.len());
        let Some((start, offset)) = place else { return Err(failed(std::io::Error::other("not mapped"))) };
        if let Some((memory, _)) = self.regions.get_mut(&start) {
            memory[offset..offset + len].copy_from_slice(&bytes[..len]);
        }
        result.map_err(failed)
    }
}

impl ReadMemory for FakeProcess {
    fn read_exact(&self, at: ProcAddr, buf: &mut [u8]) -> Result<(), Unreadable> {
        let bad = Unreadable { at, len_bytes: buf.len() as u64 };
        self.operation().map_err(|_| bad)?;
        let (start, offset) = self.region(at, buf.len()).ok_or(bad)?;
        buf.copy_from_slice(&self.regions[&start].0[offset..offset + buf.len()]);
        Ok(())
    }
}

impl Process for FakeProcess {
    type Held<'a> = FakeHeld<'a>;

    fn pid(&self) -> Pid {
        Pid(1)
    }

    fn mappings(&self) -> Result<Vec<Mapping>, ProcessError> {
        self.os("read the maps")?;
        let mapping = |(at, (bytes, access)): (&ProcAddr, &(Vec<u8>, Access))| Mapping {
            range: ProcRange { start: *at, end: ProcAddr(at.0 + bytes.len() as u64) },
            read: true,
            write: *access == Access::Write,
            execute: *access == Access::Execute,
            shared: false,
            offset: 0,
            inode: 0,
            name: String::new(),
        };
        Ok(self.regions.iter().map(mapping).collect())
    }

    fn remote(&mut self, calls: &[RemoteCall], _deadline: Instant) -> Result<(), ProcessError> {
        for call in calls {
            self.os("make a system call")?;
            match call {
                RemoteCall::Map(r) => {
                    self.insert(r.start, vec![0; r.len_bytes() as usize], Access::Execute);
                    self.own.push(*r);
                }
                RemoteCall::Protect(..) | RemoteCall::AskHandler { .. } => {}
                RemoteCall::Unmap(r) => {
                    self.regions.remove(&r.start);
                    self.own.retain(|o| o != r);
                }
            }
        }
        Ok(())
    }

    fn call(&mut self, call: FunctionCall, idle: &mut dyn IdleCheck, _deadline: Instant) -> Result<(), ProcessError> {
        self.os("call a function")?;
        if !self.threads.iter().any(|t| idle.is_idle(t, self)) {
            return Err(ProcessError::NoIdleThread { pid: self.pid(), what: "call a function" });
        }
        self.called.push((call.function, call.arguments[0]));
        Ok(())
    }

    fn adopt(&mut self, range: ProcRange) {
        self.own.push(range);
    }

    fn write_own(&mut self, at: ProcAddr, bytes: &[u8]) -> Result<(), ProcessError> {
        if !self.own.iter().any(|o| o.contains(at)) {
            return Err(ProcessError::NotOurs { pid: self.pid(), at });
        }
        self.write(at, bytes)
    }

    fn make_private(&mut self, _at: ProcAddr) -> Result<(), ProcessError> {
        self.os("write back a byte")
    }

    fn hold(&mut self, _limits: HoldLimits, check: &mut dyn StackCheck) -> Result<FakeHeld<'_>, HoldError> {
        self.os("hold the threads")?;
        for thread in &self.threads {
            let extent = check.extent(thread);
            let first = extent.and_then(|e| self.read_vec(e.start, e.len_bytes()).ok()).unwrap_or_default();
            if !check.is_clear(thread, extent, &first, self) {
                return Err(HoldError::NotClear(thread.tid));
            }
        }
        Ok(FakeHeld(self))
    }
}

impl ReadMemory for FakeHeld<'_> {
    fn read_exact(&self, at: ProcAddr, buf: &mut [u8]) -> Result<(), Unreadable> {
        self.0.read_exact(at, buf)
    }
}

impl Held for FakeHeld<'_> {
    fn write_code(&mut self, at: ProcAddr, bytes: &[u8]) -> Result<(), ProcessError> {
        self.0.write(at, bytes)
    }

    fn register_bytes(&mut self) -> Result<Vec<u8>, ProcessError> {
        let words = self.0.threads.iter().flat_map(|t| t.registers.general.into_iter().chain([t.registers.pc.0]));
        Ok(words.flat_map(u64::to_le_bytes).collect())
    }

    fn release(self) -> HoldTimes {
        HoldTimes { threads: self.0.threads.len(), ..HoldTimes::default() }
    }
}
