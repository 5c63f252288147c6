//! The wait-free switch: from inside a process, from one version of functions to another, with no thread held or waiting for another.
//!
//! A trap (`int3`) stands over every entry while it lasts. A thread that traps judges itself: one that has no frame in the code that is left
//! enters the other from then on; else it goes on in the code that it is in. The rest are looked at while they sleep, or asked by a
//! signal to look at themselves. Once all have been seen clear the entry jumps are written, last byte first byte last, and no trap stands.
//!
//! *Invariant:* a thread that was seen clear stays clear: no code that is left can be entered but through a trap.
//!
//! *Invariant:* bytes of an entry behind the first are written only while the first is a trap and every thread is clear.

use std::time::{Duration, Instant};

use crate::addr::ProcAddr;
use crate::maps::Mapping;
use crate::memory::ReadMemory;
use crate::plan::sites::Trap;
use crate::process::own::OwnProcess;
use crate::process::ptrace::{procfs, Priority};
use crate::process::{Process, ProcessError, Tid};
use crate::quiesce::StackMap;
use crate::stack::{Cfi, WatchList, Watched};

mod look;
mod marks;
mod sys;
mod trap;

pub use sys::can_look;
pub use trap::PassOn;

use look::Looker;
use marks::Marks;
use trap::{Called, OwnedTable, Table, INT3};

/// A thread that may be in code that is left.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Inside {
    /// Which.
    pub tid: Tid,
    /// The function, if that can be told.
    pub function: Option<String>,
    /// Whether its stack could be followed to where it stands.
    pub certain: bool,
}

impl Inside {
    fn at(tid: Tid, what: &str) -> Self {
        Self { tid, function: Some(what.into()), certain: true }
    }
}

/// What a switch took.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SwitchTimes {
    /// How long traps stood, in nanoseconds.
    pub trapping_ns: u64,
    /// How many calls trapped.
    pub trapped: u64,
    /// How many of those went on in the code that was left.
    pub stayed: u64,
    /// How many threads there were.
    pub threads: usize,
    /// How often all were looked at.
    pub passes: u32,
    /// How many signals asked a thread to look at itself.
    pub signals: u64,
    /// How many system calls such a signal interrupted that were made again.
    pub restarted: u64,
    /// How many it interrupted that ended with EINTR.
    pub interrupted: u64,
    /// How many barriers it took (membarrier(2)).
    pub barriers: u32,
}

/// Why a switch did not happen.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SwitchError {
    /// Nothing was done.
    #[error(transparent)]
    Process(#[from] ProcessError),
    /// An entry does not hold what it should; nothing was done.
    #[error("the entry of {function} at {at} does not hold the bytes that it should")]
    Changed {
        /// The function.
        function: String,
        /// Where.
        at: ProcAddr,
    },
    /// Threads block a signal that the switch needs; nothing was done.
    #[error("thread {tid} blocks SIGTRAP or the signal of the agent")]
    Blocked {
        /// One of them.
        tid: Tid,
    },
    /// Somebody took a signal away that the switch needs; nothing was done.
    #[error("the handler of SIGTRAP or of the agent's signal is another")]
    Taken,
    /// The kernel lets this process not do what the switch needs (seccomp); nothing was done.
    #[error("this process may not {what}")]
    Forbidden {
        /// What.
        what: &'static str,
    },
    /// Another process shares the memory and may be in any code; nothing was done.
    #[error("another process shares the memory of this one")]
    Shared,
    /// A thread stayed in the code that was to be left; the switch was taken back, and the other code may have run.
    #[error("taken back, some calls may have run the other version: {}", said(.0.as_ref()))]
    TakenBack(Option<Inside>, SwitchTimes),
    /// Not even taking back came to its end: traps stand.
    #[error("neither done nor taken back: {}", said(.0.as_ref()))]
    Unfinished(Option<Inside>, SwitchTimes),
}

fn said(inside: Option<&Inside>) -> String {
    match inside {
        None => "not all threads could be looked at".into(),
        Some(Inside { tid, function: Some(f), certain: true }) => format!("thread {tid} is inside {f}"),
        Some(Inside { tid, function: Some(f), .. }) => format!("thread {tid} may be inside {f}"),
        Some(Inside { tid, .. }) => format!("the stack of thread {tid} could not be followed"),
    }
}

/// What to switch.
#[derive(Clone, Debug)]
pub struct Plan {
    /// The entries, in any order.
    pub traps: Vec<Trap>,
    /// What no thread may be in for the switch.
    pub leave: Vec<Watched>,
    /// What no thread may be in for the switch to be taken back.
    pub back: Vec<Watched>,
}

impl Plan {
    /// The way back.
    fn turned(&self) -> Self {
        let traps = self.traps.iter().map(Trap::turned).collect();
        Self { traps, leave: self.back.clone(), back: self.leave.clone() }
    }
}

/// Switches this process. There is one in a process at most.
#[derive(Debug)]
pub struct Switcher {
    look: i32,
    /// A switch that could not even be taken back: what is still to be done.
    unfinished: Option<Unfinished>,
}

struct Unfinished {
    plan: Plan,
    table: OwnedTable,
}

impl std::fmt::Debug for Unfinished {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Unfinished").field("entries", &self.plan.traps.len()).finish_non_exhaustive()
    }
}

impl Switcher {
    /// Takes the two signals, for good; `look` is the one that asks threads to look at themselves, `pass_on` gets every SIGTRAP that is not
    /// of a switch.
    ///
    /// # Errors
    ///
    /// The kernel has no membarrier(2) for code, or does not count how often threads run.
    pub fn install(look: i32, pass_on: PassOn) -> std::io::Result<Self> {
        sys::register_barrier()?;
        let own = procfs::own_tid();
        if procfs::run_count(crate::process::Pid(std::process::id().cast_signed()), own) == 0 {
            return Err(std::io::Error::other("the kernel does not count how often threads run (schedstat)"));
        }
        trap::install(look, pass_on)?;
        Ok(Self { look, unfinished: None })
    }

    /// Whether traps of a switch stand that could not be taken back.
    #[must_use]
    pub fn is_unfinished(&self) -> bool {
        self.unfinished.is_some()
    }

    /// Leads every thread from the one code to the other, by `deadline`; taking back may take as long again.
    ///
    /// `cfi` has the unwind tables of all images, patches included.
    ///
    /// # Errors
    ///
    /// It did not happen; the error says what is left of it.
    pub fn run(
        &mut self,
        process: &mut OwnProcess<'_>,
        plan: Plan,
        deadline: Instant,
        cfi: &Cfi,
    ) -> Result<SwitchTimes, SwitchError> {
        let patience = deadline.saturating_duration_since(Instant::now());
        check(process, &plan.traps)?;
        if !trap::is_installed(self.look) {
            return Err(SwitchError::Taken);
        }
        sys::can_look().map_err(|what| SwitchError::Forbidden { what })?;
        let turned = plan.turned();
        // Both before anything is done, so that nothing of what can fail is needed to go back.
        let (to, back) = (table(process, &plan)?, table(process, &turned)?);
        let mut times = SwitchTimes::default();
        wait_until_left(process, &to, self.look, cfi, Instant::now() + patience / 4);
        // Children of vfork and posix_spawn go by; one that stays could be in any code.
        let waits = Instant::now() + patience / 4;
        while process.has_sharers() {
            if Instant::now() >= waits {
                return Err(SwitchError::Shared);
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        // Last, for a mask may be any thread's next system call.
        self.check_masks(process)?;
        // Calls trap until this thread has looked at all others: it should not have to wait for a CPU, where that is allowed.
        let _priority = Priority::raise();
        trap::publish(&to);
        let began = Instant::now();
        let done = lead(process, &plan, &to, self.look, cfi, deadline, &mut times);
        let failed = match done {
            Ok(()) => {
                trap::withdraw(None);
                times.trapping_ns = nanoseconds(began);
                times.count_traps(&to);
                return Ok(times);
            }
            Err(failed) => failed,
        };
        if matches!(failed, Failed::Written) && set_traps(process, &plan.traps).is_err() {
            // Some entries lead straight on, and no trap could be set there again: every thread goes on the new way.
            self.unfinished = Some(Unfinished { plan, table: to });
            return Err(SwitchError::Unfinished(None, times));
        }
        back.armed.store(true, std::sync::atomic::Ordering::SeqCst);
        trap::withdraw(Some(&back));
        times.count_traps(&to);
        drop(to);
        self.unfinished = Some(Unfinished { plan: turned, table: back });
        self.try_to_finish(process, Instant::now() + patience, cfi, &mut times);
        times.trapping_ns = nanoseconds(began);
        Err(match failed {
            Failed::Looked(inside) if self.is_unfinished() => SwitchError::Unfinished(inside, times),
            Failed::Looked(inside) => SwitchError::TakenBack(inside, times),
            Failed::Trapped(_) | Failed::Written if self.is_unfinished() => SwitchError::Unfinished(None, times),
            Failed::Trapped(e) => SwitchError::Process(e),
            Failed::Written => SwitchError::TakenBack(None, times),
        })
    }

    /// Goes on with what could not be taken back before; whether that is done, [`is_unfinished`](Self::is_unfinished) tells.
    pub fn try_to_finish(
        &mut self,
        process: &mut OwnProcess<'_>,
        deadline: Instant,
        cfi: &Cfi,
        times: &mut SwitchTimes,
    ) {
        let Some(left) = &self.unfinished else { return };
        let mut looker = Looker::new(process, &left.table, self.look, cfi);
        let looked = looker.until_clear(deadline);
        times.count(&looker);
        // What is written again is what stands there already.
        if looked.is_err() || finish(process, &left.plan.traps).is_err() {
            return;
        }
        times.barriers += 2;
        trap::withdraw(None);
        times.count_traps(&left.table);
        self.unfinished = None;
    }

    /// A thread that blocks SIGTRAP would be killed by a trap.
    fn check_masks(&self, process: &OwnProcess<'_>) -> Result<(), SwitchError> {
        const TRIES: u32 = 200;
        let wanted = 1u64 << (libc::SIGTRAP - 1) | 1u64 << (self.look - 1);
        let pid = process.pid();
        let blocks = |tid: &Tid| procfs::blocked_signals(pid, *tid).is_some_and(|set| set & wanted != 0);
        let threads = procfs::threads(pid).map_err(|e| ProcessError::from_os(pid, "list the threads", e))?;
        let mut blocking: Vec<Tid> = threads.into_iter().filter(blocks).collect();
        // The C library blocks all signals for a moment around the birth of a thread. With births all the time there is always one such: only
        // those count that never leave off.
        for _ in 0..TRIES {
            if blocking.is_empty() {
                return Ok(());
            }
            std::thread::sleep(Duration::from_millis(1));
            blocking.retain(blocks);
        }
        blocking.first().map_or(Ok(()), |tid| Err(SwitchError::Blocked { tid: *tid }))
    }
}

/// Whether a frame on the stack of the calling thread may be of what is watched: a word says so. For a normal context, and for a report.
#[must_use]
pub fn is_on_own_stack(watch: &WatchList) -> bool {
    let marker = 0u64;
    let here = ProcAddr(std::ptr::from_ref(&marker) as u64 & !7);
    let maps =
        std::fs::read("/proc/self/maps").ok().and_then(|text| crate::maps::parse(&text).ok()).unwrap_or_default();
    let Some(mut at) = crate::maps::find(&maps, here).map(|m| (here, m.range.end)) else { return false };
    let mut buffer = [0u8; 4096];
    while at.0 < at.1 {
        let left = usize::try_from(at.1 .0 - at.0 .0).unwrap_or(usize::MAX).min(buffer.len());
        let Some(part) = buffer.get_mut(..left) else { return false };
        if !sys::read_own(at.0, part) {
            return false;
        }
        if watch.hits_stack(part) {
            return true;
        }
        at.0 = ProcAddr(at.0 .0 + left as u64);
    }
    false
}

fn nanoseconds(since: Instant) -> u64 {
    u64::try_from(since.elapsed().as_nanos()).unwrap_or(u64::MAX)
}

impl SwitchTimes {
    fn count(&mut self, looker: &Looker<'_>) {
        self.passes += looker.passes;
        self.signals += looker.signals;
    }

    fn count_traps(&mut self, table: &Table) {
        use std::sync::atomic::Ordering::Relaxed;
        self.trapped += table.trapped.load(Relaxed);
        self.stayed += table.stayed.load(Relaxed);
        self.restarted += table.restarted.load(Relaxed);
        self.interrupted += table.interrupted.load(Relaxed);
    }
}

fn table(process: &OwnProcess<'_>, plan: &Plan) -> Result<OwnedTable, ProcessError> {
    let (traps, watch) = (&plan.traps, &plan.leave);
    let pid = process.pid();
    let mut traps: Vec<Called> = traps.iter().map(|t| Called::new(t, watch)).collect();
    traps.sort_by_key(|t| t.trap.at);
    let maps: Vec<Mapping> = process.mappings()?;
    Ok(OwnedTable::new(Table {
        pid,
        traps,
        watch: WatchList::new(watch.iter().cloned().chain([trap::returns()]).collect()),
        stacks: StackMap::new(&maps),
        marks: Marks::new().map_err(|e| ProcessError::from_os(pid, "map memory", e))?,
        armed: false.into(),
        ends: false.into(),
        trapped: 0.into(),
        stayed: 0.into(),
        restarted: 0.into(),
        interrupted: 0.into(),
    }))
}

/// Every entry holds what it should.
fn check(process: &OwnProcess<'_>, traps: &[Trap]) -> Result<(), SwitchError> {
    for t in traps {
        let there = process.read_vec(t.at, t.before.len() as u64);
        if there.as_deref() != Ok(&t.before) {
            return Err(SwitchError::Changed { function: t.function.clone(), at: t.at });
        }
    }
    Ok(())
}

/// Waits until no sleeping thread is inside, without a trap: calls cost what they always do meanwhile. Proves nothing.
fn wait_until_left(process: &OwnProcess<'_>, table: &Table, look: i32, cfi: &Cfi, deadline: Instant) {
    let mut looker = Looker::new(process, table, look, cfi);
    while looker.some_sleep_inside() && Instant::now() < deadline {
        std::thread::sleep(Duration::from_millis(2));
    }
}

fn barrier(process: &OwnProcess<'_>) -> Result<(), ProcessError> {
    sys::make_code_seen().map_err(|e| ProcessError::from_os(process.pid(), "membarrier", e))
}

/// Sets all traps. Where that fails, some stand.
fn set_traps(process: &mut OwnProcess<'_>, traps: &[Trap]) -> Result<(), ProcessError> {
    let set = traps.iter().try_for_each(|t| process.write_code(t.at, &[INT3]));
    let seen = barrier(process);
    set.and(seen)
}

/// What came in the way of leading all threads to other code.
enum Failed {
    /// Not all traps could be set; nobody has entered the other code.
    Trapped(ProcessError),
    /// A thread was not clear, if it can be told which.
    Looked(Option<Inside>),
    /// All were, but what is to stand at the entries could not be written, or only some of it.
    Written,
}

/// Sets the traps, looks until all threads are clear, and writes the entries. Handlers go by `table` already.
fn lead(
    process: &mut OwnProcess<'_>,
    plan: &Plan,
    table: &Table,
    look: i32,
    cfi: &Cfi,
    deadline: Instant,
    times: &mut SwitchTimes,
) -> Result<(), Failed> {
    set_traps(process, &plan.traps).map_err(Failed::Trapped)?;
    times.barriers += 1;
    table.armed.store(true, std::sync::atomic::Ordering::SeqCst);
    let mut looker = Looker::new(process, table, look, cfi);
    let looked = looker.until_clear(deadline);
    times.count(&looker);
    times.threads = looked.map_err(Failed::Looked)?;
    finish(process, &plan.traps).map_err(|_| Failed::Written)?;
    times.barriers += 2;
    Ok(())
}

/// Writes what is to stand at each entry, whose first byte is a trap and where no thread is.
fn finish(process: &mut OwnProcess<'_>, traps: &[Trap]) -> Result<(), ProcessError> {
    for t in traps {
        let behind = ProcAddr(t.at.0 + 1);
        process.write_code(behind, &t.after[1..])?;
    }
    barrier(process)?;
    for t in traps {
        process.write_code(t.at, &t.after[..1])?;
    }
    barrier(process)
}
