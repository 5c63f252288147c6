//! Plan and stacks in, clear or not clear out.
//!
//! A thread is clear if no word of its home stack, no register and not its program counter hits a watched range,
//! and its root is known to lie within what was looked at; or if a strict unwind reached its root without a
//! frame in a watched range. Everything else is not clear.

use crate::addr::{ProcAddr, ProcRange};
use crate::maps::Mapping;
use crate::memory::{ReadMemory, Unreadable};
use crate::process::{HeldThread, StackCheck, Tid};
use crate::stack::{Cfi, UnwindError, Unwinder, WatchList, Watched};

/// Longest stack that is scanned; a longer one is not clear.
const MAX_STACK_BYTES: u64 = 64 << 20;

/// How far below its mapping the main thread's stack may have grown since that was read.
const GROWTH: u64 = 8 << 20;

/// Where the threads of a process have their stacks.
#[derive(Clone, Debug, Default)]
pub struct StackMap {
    main: Option<ProcRange>,
    writable: Vec<ProcRange>,
}

impl StackMap {
    /// From what is mapped.
    #[must_use]
    pub fn new(maps: &[Mapping]) -> Self {
        let private = |m: &&Mapping| m.read && m.write && !m.shared;
        Self {
            main: maps.iter().find(|m| m.name == "[stack]").map(|m| m.range),
            writable: maps.iter().filter(private).map(|m| m.range).collect(),
        }
    }

    /// Whether this is on the stack that the kernel gave the process.
    #[must_use]
    pub fn is_main(&self, sp: ProcAddr) -> bool {
        self.main.is_some_and(|m| m.start.0.saturating_sub(GROWTH) <= sp.0 && sp < m.end)
    }

    /// From the thread's stack pointer to the end of its home stack; `None` if it stands on another stack.
    ///
    /// A thread's control block lies above all its frames, so a mapping that holds both also holds the root.
    #[must_use]
    pub fn home(&self, thread: &HeldThread) -> Option<ProcRange> {
        let sp = thread.registers.sp();
        let end = if thread.is_main {
            let main = self.main?;
            let lowest = main.start.checked_sub(GROWTH)?;
            (lowest <= sp && sp < main.end).then_some(main.end)?
        } else {
            let fs = thread.registers.fs_base;
            let after = self.writable.partition_point(|r| r.start <= sp);
            let home = self.writable.get(after.checked_sub(1)?)?;
            (home.contains(sp) && home.contains(fs) && sp < fs).then_some(home.end)?
        };
        Some(ProcRange { start: sp, end }).filter(|r| r.len_bytes() <= MAX_STACK_BYTES)
    }
}

/// Why a thread is not clear.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Why {
    /// A frame of this function is on its stack.
    Inside {
        /// The function.
        function: String,
    },
    /// A word may be a frame of this function, and an unwind could not clear it.
    Unproven {
        /// The function, if the word tells.
        function: Option<String>,
        /// Why the unwind proves nothing.
        error: UnwindError,
    },
    /// A word may be a frame, and the unwind tables have not been read yet.
    TablesWanted,
}

/// A thread that is not clear, with what is needed to show where it stands.
#[derive(Clone, Debug)]
pub struct NotClear {
    /// The thread.
    pub thread: HeldThread,
    /// Why.
    pub why: Why,
    /// The top of its stack at the time.
    pub stack: Snapshot,
}

/// Part of a stack, kept.
#[derive(Clone, Debug, Default)]
pub struct Snapshot {
    /// Where it was.
    pub at: ProcAddr,
    /// What it held.
    pub bytes: Vec<u8>,
}

impl Snapshot {
    /// Reads from the copy where it can and from `memory` otherwise.
    pub fn over<'a>(&'a self, memory: &'a dyn ReadMemory) -> impl ReadMemory + 'a {
        Over { snapshot: self, memory }
    }
}

struct Over<'a> {
    snapshot: &'a Snapshot,
    memory: &'a dyn ReadMemory,
}

impl ReadMemory for Over<'_> {
    fn read_exact(&self, at: ProcAddr, buf: &mut [u8]) -> Result<(), Unreadable> {
        let offset = at.offset_from(self.snapshot.at).and_then(|o| usize::try_from(o).ok());
        let part = offset.and_then(|o| self.snapshot.bytes.get(o..o.checked_add(buf.len())?));
        match part {
            Some(part) => buf.copy_from_slice(part),
            None => self.memory.read_exact(at, buf)?,
        }
        Ok(())
    }
}

/// Checks threads against watched ranges.
pub struct Checker<'a> {
    watch: &'a WatchList,
    stacks: &'a StackMap,
    cfi: Option<&'a Cfi>,
    buffer: Vec<u8>,
    blocked: Option<NotClear>,
}

impl<'a> Checker<'a> {
    /// Without `cfi` a hit is not clear.
    #[must_use]
    pub fn new(watch: &'a WatchList, stacks: &'a StackMap, cfi: Option<&'a Cfi>) -> Self {
        Self { watch, stacks, cfi, buffer: vec![1; 64 << 10], blocked: None }
    }

    /// The thread that was not clear, if one was.
    #[must_use]
    pub fn into_blocked(self) -> Option<NotClear> {
        self.blocked
    }

    /// Whether anything of the thread hits; an unknown stack does.
    fn hits(&mut self, thread: &HeldThread, extent: Option<ProcRange>, first: &[u8], memory: &dyn ReadMemory) -> bool {
        let registers = &thread.registers;
        if self.watch.hits_pc(registers.pc) || registers.general.iter().any(|r| self.watch.hits_word(*r)) {
            return true;
        }
        let Some(extent) = extent else { return true };
        if extent.start.0 % 8 != 0 || self.watch.hits_stack(first) {
            return true;
        }
        let mut at = extent.start.0 + first.len() as u64;
        while at < extent.end.0 {
            let len = usize::try_from(extent.end.0 - at).unwrap_or(usize::MAX).min(self.buffer.len());
            let Some(part) = self.buffer.get_mut(..len) else { return true };
            if memory.read_exact(ProcAddr(at), part).is_err() || self.watch.hits_stack(part) {
                return true;
            }
            at += len as u64;
        }
        false
    }

    /// Whether a strict unwind clears the thread.
    fn unwind(&self, cfi: &Cfi, thread: &HeldThread, memory: &dyn ReadMemory) -> Result<(), Why> {
        let mut live: Option<&Watched> = None;
        let mut look = |frame: crate::stack::Frame| {
            let found = if frame.exact { self.watch.live_at(frame.pc) } else { self.watch.live_return(frame.pc) };
            live = live.or(found);
        };
        let result = Unwinder::new(cfi, memory).walk(&thread.registers, &mut look);
        match (live, result) {
            (Some(w), _) => Err(Why::Inside { function: w.name.clone() }),
            (None, Err(error)) => Err(Why::Unproven { function: self.suspect(thread), error }),
            (None, Ok(())) => Ok(()),
        }
    }

    fn suspect(&self, thread: &HeldThread) -> Option<String> {
        let r = &thread.registers;
        let mut words = std::iter::once(r.pc.0).chain(r.general);
        let hit = words.find(|w| self.watch.hits_word(*w))?;
        self.watch.live_return(ProcAddr(hit)).map(|w| w.name.clone())
    }
}

impl StackCheck for Checker<'_> {
    fn extent(&self, thread: &HeldThread) -> Option<ProcRange> {
        self.stacks.home(thread)
    }

    fn is_clear(
        &mut self,
        thread: &HeldThread,
        extent: Option<ProcRange>,
        first: &[u8],
        memory: &dyn ReadMemory,
    ) -> bool {
        if !self.hits(thread, extent, first, memory) {
            return true;
        }
        let why = match self.cfi {
            None => Why::TablesWanted,
            Some(cfi) => match self.unwind(cfi, thread, memory) {
                Ok(()) => return true,
                Err(why) => why,
            },
        };
        let stack = Snapshot { at: thread.registers.sp(), bytes: first.to_vec() };
        self.blocked = Some(NotClear { thread: *thread, why, stack });
        false
    }
}

impl NotClear {
    /// The function that it is in, or may be in, if that can be told.
    #[must_use]
    pub fn function(&self) -> Option<&str> {
        match &self.why {
            Why::Inside { function } => Some(function),
            Why::Unproven { function, .. } => function.as_deref(),
            Why::TablesWanted => None,
        }
    }

    /// The thread.
    #[must_use]
    pub fn tid(&self) -> Tid {
        self.thread.tid
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::process::{Registers, RSP};
    use crate::stack::Part;

    struct Flat(u64, Vec<u8>);

    impl ReadMemory for Flat {
        fn read_exact(&self, at: ProcAddr, buf: &mut [u8]) -> Result<(), Unreadable> {
            let bad = Unreadable { at, len_bytes: buf.len() as u64 };
            let start = at.0.checked_sub(self.0).ok_or(bad)? as usize;
            buf.copy_from_slice(self.1.get(start..start + buf.len()).ok_or(bad)?);
            Ok(())
        }
    }

    fn range(start: u64, end: u64) -> ProcRange {
        ProcRange { start: ProcAddr(start), end: ProcAddr(end) }
    }

    fn thread(sp: u64, pc: u64) -> HeldThread {
        let mut registers = Registers { pc: ProcAddr(pc), fs_base: ProcAddr(0x8f00), ..Registers::default() };
        registers.general[RSP] = sp;
        HeldThread { tid: Tid(7), is_main: false, registers }
    }

    fn watch() -> WatchList {
        let part = Part::Body { branches_to_entry: false };
        WatchList::new(vec![Watched { name: "f".into(), range: range(0x1000, 0x1040), part }])
    }

    fn stacks() -> StackMap {
        StackMap { main: None, writable: vec![range(0x7000, 0x9000), range(0xa000, 0xb000)] }
    }

    #[test]
    fn a_thread_is_clear_only_without_a_hit() {
        let (watch, stacks) = (watch(), stacks());
        let mut memory = Flat(0x7000, vec![0; 0x2000]);
        let clear = |t: &HeldThread, memory: &Flat, first: usize| {
            let mut checker = Checker::new(&watch, &stacks, None);
            let extent = checker.extent(t);
            let bytes = extent.map(|e| memory.read_vec(e.start, e.len_bytes()).unwrap()).unwrap_or_default();
            checker.is_clear(t, extent, bytes.get(..first.min(bytes.len())).unwrap(), memory)
        };
        let t = thread(0x8000, 0x5000);
        assert!(clear(&t, &memory, 0x1000) && clear(&t, &memory, 64));
        assert!(!clear(&thread(0x8000, 0x1001), &memory, 64), "pc");
        let mut held = t;
        held.registers.general[5] = 0x1010;
        assert!(!clear(&held, &memory, 64), "a parent in vfork holds its return address in rdi");
        memory.1[0x1ff8..].copy_from_slice(&0x1040u64.to_le_bytes());
        assert!(!clear(&t, &memory, 64), "the last word, beyond what was read first");
        memory.1[0x1ff8..].copy_from_slice(&0x1000u64.to_le_bytes());
        assert!(clear(&t, &memory, 64), "a function pointer");
        memory.1[0x0ff0..0x0ff8].copy_from_slice(&0x1010u64.to_le_bytes());
        assert!(clear(&t, &memory, 64), "below the stack pointer");
    }

    #[test]
    fn a_foreign_stack_is_not_clear() {
        let (watch, stacks) = (watch(), stacks());
        let memory = Flat(0xa000, vec![0; 0x1000]);
        for sp in [0xa800, 0x9800, 0x8ff8, 0x8001] {
            let t = thread(sp, 0x5000);
            let mut checker = Checker::new(&watch, &stacks, None);
            let extent = checker.extent(&t);
            assert!(!checker.is_clear(&t, extent, &[], &memory), "{sp:#x}");
            assert_eq!(checker.into_blocked().unwrap().why, Why::TablesWanted);
        }
    }

    #[test]
    fn an_unwind_that_ends_early_proves_nothing() {
        let (watch, stacks, cfi) = (watch(), stacks(), Cfi::default());
        let memory = Flat(0x7000, vec![0; 0x2000]);
        let t = thread(0xa800, 0x5000);
        let mut checker = Checker::new(&watch, &stacks, Some(&cfi));
        assert!(!checker.is_clear(&t, None, &[], &memory));
        assert!(matches!(checker.into_blocked().unwrap().why, Why::Unproven { .. }));
    }
}
