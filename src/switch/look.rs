//! Looks at threads from the agent's thread, without waking them: the others while they sleep, those that never do by a signal.

use std::collections::HashMap;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use super::marks::Mark;
use super::trap::{self, Answer, Table};
use super::{sys, Inside};
use crate::addr::ProcAddr;
use crate::memory::ReadMemory;
use crate::process::own::OwnProcess;
use crate::process::ptrace::procfs;
use crate::process::{HeldThread, Pid, Registers, StackCheck, Tid, RSP};
use crate::quiesce::{Checker, Snapshot};
use crate::stack::{Cfi, Frame, Unwinder};

/// DWARF numbers of the registers that hold a system call's arguments: `rdi`, `rsi`, `rdx`, `r10`, `r8`, `r9`.
const ARGUMENTS: [usize; 6] = [5, 4, 1, 10, 8, 9];

/// How long a thread may take to answer a signal in one pass.
const ANSWER: Duration = Duration::from_millis(10);

/// So many times some 70 µs those that were asked have to mark themselves, before each is asked for its stack.
const TURNS: u32 = 20;

/// A sleeping thread whose stack could not be followed so often is asked by a signal.
const PATIENCE: u32 = 2;

/// What a look at a thread found.
enum Seen {
    Clear,
    Gone,
    Runs,
    Inside(Inside),
}

/// Looks at the threads of this process for one switch.
pub struct Looker<'a> {
    process: &'a OwnProcess<'a>,
    pub table: &'a Table,
    pub look: i32,
    pub cfi: &'a Cfi,
    pub signals: u64,
    pub passes: u32,
    /// How often a sleeping thread's stack could not be followed.
    unproven: HashMap<Tid, u32>,
    scan: Checker<'a>,
    /// Threads that were there when the traps stood and are not known to be clear; `None` before they have been listed.
    roster: Option<Vec<Tid>>,
}

impl<'a> Looker<'a> {
    pub fn new(process: &'a OwnProcess<'a>, table: &'a Table, look: i32, cfi: &'a Cfi) -> Self {
        let scan = Checker::new(&table.watch, &table.stacks, None);
        Self { process, table, look, cfi, signals: 0, passes: 0, unproven: HashMap::new(), scan, roster: None }
    }

    fn pid(&self) -> Pid {
        self.table.pid
    }

    /// Looks at all threads until all are clear.
    ///
    /// # Errors
    ///
    /// One was not by `deadline`, if that can be told.
    pub fn until_clear(&mut self, deadline: Instant) -> Result<usize, Option<Inside>> {
        let mut pause = Duration::from_micros(20);
        let mut blamed = None;
        loop {
            self.passes += 1;
            let (count, last) = self.pass(deadline)?;
            match last {
                None if self.all_are_clear()? => return Ok(count),
                // A thread that was seen inside says more than one that could not be followed.
                Some(inside) if inside.certain || blamed.is_none() => blamed = Some(inside),
                _ => {}
            }
            if Instant::now() >= deadline {
                return Err(blamed);
            }
            std::thread::sleep(pause);
            pause = (pause * 2).min(Duration::from_millis(5));
        }
    }

    fn threads(&self) -> Result<Vec<Tid>, Option<Inside>> {
        procfs::threads(self.pid()).map_err(|_| None)
    }

    /// Whether a thread will never run again. A file that can't be opened proves nothing.
    fn has_ended(&self, tid: Tid) -> bool {
        !sys::is_thread(self.pid(), tid) || procfs::is_zombie(self.pid(), tid)
    }

    /// Whether a thread that has a mark may run: one of this process, or a child of vfork.
    fn may_run(&self, tid: Tid) -> bool {
        if sys::is_thread(self.pid(), tid) {
            !procfs::is_zombie(self.pid(), tid)
        } else {
            sys::is_there(tid) && self.process.is_sharer(Pid(tid.0))
        }
    }

    /// All threads that were looked at are clear. Is one that was there before, or was born meanwhile, not?
    fn all_are_clear(&mut self) -> Result<bool, Option<Inside>> {
        let table = self.table;
        let is_clear = |tid: &Tid| table.marks.get(*tid) == Mark::Clear;
        if self.roster.is_none() || !self.threads()?.iter().all(is_clear) {
            return Ok(false);
        }
        // Whoever is born from here on was born by a thread that is clear, and is.
        table.ends.store(true, Ordering::SeqCst);
        let clear = !table.marks.not_clear().into_iter().any(|tid| self.may_run(tid)) && !self.process.has_sharers();
        if !clear {
            table.ends.store(false, Ordering::SeqCst);
        }
        Ok(clear)
    }

    /// Looks once at each thread that is not known to be clear: how many threads there are, and one that is not clear.
    fn pass(&mut self, deadline: Instant) -> Result<(usize, Option<Inside>), Option<Inside>> {
        let mut threads = self.threads()?;
        let count = threads.len();
        if self.roster.is_none() {
            // A listing of a folder that changes may leave a thread out. One that does not is enough: whoever is born while the traps stand comes
            // to the code that is left by a trap only.
            let pid = self.pid();
            self.roster = procfs::all_threads(pid, &|tid| sys::is_thread(pid, tid)).map_err(|_| None)?;
        }
        if let Some(roster) = &mut self.roster {
            roster.retain(|tid| self.table.marks.get(*tid) != Mark::Clear);
            threads.extend(roster.iter());
        }
        threads.extend(self.table.marks.not_clear());
        threads.sort_unstable_by_key(|tid| tid.0);
        threads.dedup();
        let (mut last, mut runs) = (None, Vec::new());
        for tid in threads {
            let Some(slot) = self.table.marks.slot(tid) else { return Err(None) };
            let before = slot.get();
            if before == Mark::Clear {
                continue;
            }
            match self.asleep(tid) {
                Seen::Clear => {
                    slot.change(before, Mark::Clear);
                }
                // Whoever gets its number is new.
                Seen::Gone => {
                    slot.change(before, Mark::Clear);
                }
                Seen::Runs => runs.push(tid),
                Seen::Inside(inside) => {
                    let times = self.unproven.entry(tid).or_default();
                    *times += 1;
                    if !inside.certain && times.is_multiple_of(PATIENCE) {
                        runs.push(tid);
                    }
                    last = Some(inside);
                }
            }
        }
        Ok((count, self.ask(&runs, deadline).or(last)))
    }

    /// Asks running threads to look at themselves; one that is not clear.
    fn ask(&mut self, tids: &[Tid], deadline: Instant) -> Option<Inside> {
        let pid = self.pid();
        let until = deadline.min(Instant::now() + ANSWER);
        let is_clear = |tid: &&Tid| self.table.marks.slot(**tid).is_some_and(|s| s.get() == Mark::Clear);
        let own = procfs::own_tid();
        // All at once: those that find nothing mark themselves, and nothing has to be copied.
        for tid in tids.iter().filter(|t| **t != own) {
            self.signals += u64::from(sys::send(pid, *tid, self.look).is_ok());
        }
        let mut turns = 0u32;
        // This very thread has addresses of what is watched on its stack: it is asked below, and unwound.
        while !tids.iter().all(|t| *t == own || is_clear(&t)) && Instant::now() < until && turns < TURNS {
            turns += 1;
            std::thread::sleep(Duration::from_micros(20));
        }
        let left: Vec<Tid> = tids.iter().filter(|t| !is_clear(t)).copied().collect();
        let mut last = None;
        for tid in left {
            let slot = self.table.marks.slot(tid)?;
            let before = slot.get();
            if before == Mark::Clear {
                continue;
            }
            self.signals += 1;
            let unproven = |function| Some(Inside { tid, function, certain: false });
            match trap::ask(pid, tid, self.look, Instant::now() + ANSWER) {
                Answer::Clear => {}
                Answer::Perhaps(thread, stack) => match self.unwound(&thread, &stack) {
                    None => {
                        slot.change(before, Mark::Clear);
                    }
                    Some(inside) => last = Some(inside),
                },
                Answer::Unknown => last = unproven(None),
                Answer::Late if self.has_ended(tid) => {}
                Answer::Late => last = unproven(None),
            }
        }
        last
    }

    /// A thread that sleeps, by what /proc says of it and its stack: it did not run between two counts that are the same.
    fn asleep(&mut self, tid: Tid) -> Seen {
        let pid = self.pid();
        if tid == procfs::own_tid() {
            return Seen::Runs;
        }
        let runs = procfs::run_count(pid, tid);
        let Some(blocked) = procfs::blocked_in(pid, tid) else {
            return match (sys::is_thread(pid, tid), self.may_run(tid)) {
                (_, false) => Seen::Gone,
                (true, true) => Seen::Runs,
                (false, true) => Seen::Inside(Inside::at(tid, "what another process with this memory runs")),
            };
        };
        // A first thread that has ended is in no system call.
        if blocked.number == -1 && blocked.sp == 0 && self.has_ended(tid) {
            return Seen::Gone;
        }
        // In the kernel for another reason than a call, such as a page: its registers are its own, may hold a frame, and are not told.
        if blocked.number < 0 {
            return Seen::Runs;
        }
        if [libc::SYS_vfork, libc::SYS_clone, libc::SYS_clone3].contains(&blocked.number) {
            return Seen::Inside(Inside::at(tid, "a child of vfork"));
        }
        if procfs::is_io_worker(pid, tid) {
            return Seen::Clear;
        }
        let mut general = [0; 16];
        for (to, from) in ARGUMENTS.iter().zip(blocked.arguments) {
            general[*to] = from;
        }
        general[RSP] = blocked.sp;
        // As good as the control block itself: both lie above the stack, in one mapping with it.
        let fs_base = sys::control_block(tid).unwrap_or(ProcAddr(0));
        let registers = Registers { general, pc: ProcAddr(blocked.pc), fs_base };
        let thread = HeldThread { tid, is_main: self.table.stacks.is_main(registers.sp()), registers };
        let extent = self.scan.extent(&thread);
        let clear = self.scan.is_clear(&thread, extent, &[], self.process);
        let found = if clear { None } else { self.inside(&thread) };
        let Some(inside) = found else {
            return if runs != 0 && procfs::run_count(pid, tid) == runs { Seen::Clear } else { Seen::Runs };
        };
        Seen::Inside(inside)
    }

    /// Whether a sleeping thread, of which few registers are known, has a frame in what is watched.
    fn inside(&self, thread: &HeldThread) -> Option<Inside> {
        let (watch, mut live) = (&self.table.watch, None);
        let mut look = |frame: Frame| {
            let found = if frame.exact { watch.live_at(frame.pc) } else { watch.live_return(frame.pc) };
            live = found.map(|w| w.name.clone()).or(live.take());
        };
        let walked =
            Unwinder::new(self.cfi, self.process).walk_blocked(thread.registers.sp(), thread.registers.pc, &mut look);
        match (live, walked) {
            (None, Ok(())) => None,
            (function, _) => Some(Inside { tid: thread.tid, certain: function.is_some(), function }),
        }
    }

    /// Whether a thread that copied its registers and stack had a frame in what is watched.
    fn unwound(&self, thread: &HeldThread, stack: &[u8]) -> Option<Inside> {
        let snapshot = Snapshot { at: thread.registers.sp(), bytes: stack.to_vec() };
        let memory = snapshot.over(self.process);
        let mut checker = Checker::new(&self.table.watch, &self.table.stacks, Some(self.cfi));
        let extent = checker.extent(thread);
        if checker.is_clear(thread, extent, stack, &memory) {
            return None;
        }
        // A thread that goes on in old code by a trap is seen in the stub behind it: whose frames are below says more.
        let mut named = None;
        let mut look = |frame: Frame| {
            let found =
                if frame.exact { self.table.watch.live_at(frame.pc) } else { self.table.watch.live_return(frame.pc) };
            // The outermost stays longest.
            named = found.filter(|w| !w.is_stub()).map(|w| w.name.clone()).or(named.take());
        };
        // At the beginning of a way through a stub nothing has been pushed yet.
        let mut registers = thread.registers;
        let mut caller = [0; 8];
        if self.table.begins_way(registers.pc) && memory.read_exact(registers.sp(), &mut caller).is_ok() {
            registers.pc = ProcAddr(u64::from_le_bytes(caller));
            registers.general[RSP] += 8;
        }
        let _ = Unwinder::new(self.cfi, &memory).walk(&registers, &mut look);
        let certain = named.is_some();
        let function = named.or_else(|| checker.into_blocked().and_then(|b| b.function().map(str::to_owned)));
        Some(Inside { tid: thread.tid, certain, function })
    }
}

impl Looker<'_> {
    /// Whether a thread that sleeps is inside what is watched, or may be. Marks nothing.
    pub fn some_sleep_inside(&mut self) -> bool {
        let threads = procfs::threads(self.pid()).unwrap_or_default();
        threads.into_iter().any(|tid| matches!(self.asleep(tid), Seen::Inside(i) if i.certain))
    }
}
