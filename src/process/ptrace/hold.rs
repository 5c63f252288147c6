//! Holding every thread: sleepers first and the rarely woken first of all, running threads last; let go in
//! the opposite order. What happens in between costs each thread a few microseconds: stop, registers, top of
//! the stack, compare.

use std::fs::File;
use std::sync::OnceLock;
use std::time::{Duration, Instant};

use super::tracee::{self, Running, Stopped, Waited};
use super::{procfs, sys, PtraceProcess};
use crate::addr::{ProcAddr, ProcRange};
use crate::memory::{ReadMemory, Unreadable};
use crate::process::{Held, HeldThread, HoldError, HoldLimits, HoldTimes, ProcessError, StackCheck, Tid};

/// Bytes from the top of each stack that are read in one batch; more is read where the stack goes on.
const FIRST_BYTES: usize = 8 << 10;

/// Threads that are stopped and checked together.
const CHUNK: usize = 32;

/// How long the tool looks for running threads to stop before it sleeps: a CPU that goes idle is woken late, in a virtual machine above all.
const LOOK: Duration = Duration::from_micros(60);

/// A thread that ran more often than this, ever, is taken for one that is woken often.
const SELDOM: u64 = 32;

/// How soon a thread is likely to be wanted: those that are wanted first are held last.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Class {
    /// Asleep, and hardly ever woken.
    Seldom,
    /// Asleep, and woken often.
    Often,
    /// Running, or just born.
    Running,
}

/// A thread before the hold.
struct Ranked {
    tid: Tid,
    class: Class,
    /// Times it ran since we first looked, and ever.
    woken: (u64, u64),
}

/// A traced thread that is still to be stopped.
struct Waiting {
    thread: Running,
    class: Class,
    /// When it was asked to stop, if it was.
    asked: Option<Instant>,
}

struct HeldTracee {
    thread: Stopped,
    class: Class,
    asked: Instant,
}

/// A process all of whose threads stand still.
pub struct PtraceHeld<'a> {
    process: &'a mut PtraceProcess,
    /// In the order in which they were stopped.
    stopped: Vec<HeldTracee>,
    times: HoldTimes,
    _alarm: sys::Alarm,
    _priority: sys::Priority,
    /// Closed when they run again.
    _folder: File,
}

impl PtraceProcess {
    /// All threads, the rarely woken first and the running ones last.
    fn ranked(&self) -> Result<Vec<Ranked>, ProcessError> {
        let list = procfs::threads(self.pid).map_err(|e| self.os_error("list the threads", e))?;
        let mut out: Vec<Ranked> = list
            .into_iter()
            .map(|tid| {
                let lent = self.runs_before_loan.get(&tid).copied();
                let runs = lent.unwrap_or_else(|| procfs::run_count(self.pid, tid));
                let before = self.first_runs.get(&tid).copied().unwrap_or(0);
                let woken = (runs.saturating_sub(before), runs);
                let class = match procfs::blocked_in(self.pid, tid) {
                    None => Class::Running,
                    Some(_) if woken.0 > 0 || runs > SELDOM => Class::Often,
                    Some(_) => Class::Seldom,
                };
                Ranked { tid, class, woken }
            })
            .collect();
        out.sort_by_key(|r| (r.class, r.woken));
        Ok(out)
    }

    /// Starts tracing one thread; `None` if it has ended.
    pub(super) fn seize(&self, tid: Tid) -> Result<Option<Running>, ProcessError> {
        match Running::seize(tid) {
            Ok(running) => Ok(Some(running)),
            Err(e) if e.raw_os_error() == Some(libc::ESRCH) => Ok(None),
            Err(e) => match procfs::Status::of_thread(self.pid, tid) {
                // Born of a traced thread, it is traced already.
                Ok(s) if s.tracer == sys::own_tid() => Ok(Some(Running::inherited(tid))),
                Ok(s) if matches!(s.state, 'Z' | 'X') || procfs::is_io_worker(self.pid, tid) => Ok(None),
                Err(_) => Ok(None),
                Ok(_) => Err(self.os_error("trace", e)),
            },
        }
    }

    /// Lets go of threads that could not be stopped before, if they stand still now.
    pub(super) fn release_lingering(&mut self) {
        for running in std::mem::take(&mut self.lingering) {
            match running.poll() {
                Waited::Stopped(stopped) => self.let_go(stopped),
                Waited::Gone => {}
                Waited::Late(running) => self.lingering.push(running),
            }
        }
    }

    /// Lets one thread go, and keeps in mind the one that it has just made: that is traced, too, and waits for us.
    fn let_go(&mut self, stopped: Stopped) {
        if let Ok(mut raw) = stopped.raw_registers() {
            tracee::hide_eintr(&stopped, &mut raw);
        }
        self.lingering.extend(stopped.born().map(Running::inherited));
        stopped.detach();
    }

    /// Lets go of threads that are traced but not stopped: that takes a stop.
    pub(super) fn release_running(&mut self, running: Vec<Running>) {
        let mut next = running;
        // A thread that was let go may have made another; that one cannot have made a third untraced.
        while !next.is_empty() {
            let deadline = Instant::now() + Duration::from_millis(20);
            let Ok(_alarm) = sys::Alarm::after(Duration::from_millis(20)) else {
                self.lingering.append(&mut next);
                return;
            };
            for r in &next {
                r.interrupt();
            }
            let mut late = Vec::new();
            for r in std::mem::take(&mut next) {
                match r.wait(deadline) {
                    Waited::Stopped(stopped) => {
                        next.extend(stopped.born().map(Running::inherited));
                        self.let_go(stopped);
                    }
                    Waited::Gone => {}
                    Waited::Late(r) => late.push(r),
                }
            }
            // Those that `let_go` kept in mind are in `next`.
            self.lingering.retain(|l| !next.iter().any(|n| n.tid() == l.tid()));
            self.lingering.append(&mut late);
        }
    }

    /// Traces all threads, in `order` as far as it knows them, until a listing brings no news.
    fn seize_all(&mut self, order: Vec<Ranked>) -> Result<Vec<Waiting>, ProcessError> {
        let mut seized: Vec<Waiting> = Vec::with_capacity(order.len() + 16);
        let lingering: Vec<Tid> = self.lingering.iter().map(Running::tid).collect();
        let mut result = Ok(());
        for r in order.iter().filter(|r| !lingering.contains(&r.tid)) {
            match self.seize(r.tid) {
                Ok(Some(running)) => seized.push(Waiting { thread: running, class: r.class, asked: None }),
                Ok(None) => {}
                Err(e) => {
                    result = Err(e);
                    break;
                }
            }
        }
        while result.is_ok() {
            let list = procfs::threads(self.pid).map_err(|e| self.os_error("list the threads", e));
            let known = seized.len();
            match list {
                Ok(list) => {
                    for tid in list {
                        if seized.iter().any(|w| w.thread.tid() == tid) || lingering.contains(&tid) {
                            continue;
                        }
                        match self.seize(tid) {
                            Ok(Some(thread)) => seized.push(Waiting { thread, class: Class::Running, asked: None }),
                            Ok(None) => {}
                            Err(e) => result = Err(e),
                        }
                    }
                }
                Err(e) => result = Err(e),
            }
            if seized.len() == known {
                break;
            }
        }
        let lingering = std::mem::take(&mut self.lingering).into_iter();
        seized.extend(lingering.map(|thread| Waiting { thread, class: Class::Seldom, asked: None }));
        if result.is_ok() && !self.is_alive() {
            result = Err(ProcessError::Gone(self.pid));
        }
        if let Err(e) = result {
            self.release_running(seized.into_iter().map(|w| w.thread).collect());
            return Err(e);
        }
        Ok(seized)
    }

    pub(super) fn hold_all(
        &mut self,
        limits: HoldLimits,
        check: &mut dyn StackCheck,
    ) -> Result<PtraceHeld<'_>, HoldError> {
        stay_in_memory();
        self.release_lingering();
        let ranked = self.ranked()?;
        let count = ranked.len();
        let mut buffers = vec![1u8; FIRST_BYTES * CHUNK];
        let os = |e| ProcessError::from_os(self.pid, "set a timer for", e);
        let mut stopped: Vec<HeldTracee> = Vec::with_capacity(count + 16);
        let folder = procfs::task_folder(self.pid).map_err(|e| self.os_error("list the threads", e))?;
        let alarm = sys::Alarm::after(limits.deadline).map_err(os)?;
        let mut waiting = self.seize_all(ranked)?;
        waiting.reverse();
        let priority = sys::Priority::raise();
        let deadline = Instant::now() + limits.deadline;
        let result = self.stop_every_one(&folder, &mut waiting, &mut stopped, deadline, check, &mut buffers);
        let left: Vec<Running> = waiting.into_iter().map(|w| w.thread).collect();
        let times = HoldTimes { threads: stopped.len(), ..HoldTimes::default() };
        if let Err(e) = result {
            release(&mut stopped);
            drop(priority);
            self.release_running(left);
            return Err(e);
        }
        Ok(PtraceHeld { process: self, stopped, times, _alarm: alarm, _priority: priority, _folder: folder })
    }

    /// Stops and checks all of `waiting`, and then whatever a thread made that had begun to before it was traced.
    fn stop_every_one(
        &self,
        folder: &File,
        waiting: &mut Vec<Waiting>,
        stopped: &mut Vec<HeldTracee>,
        deadline: Instant,
        check: &mut dyn StackCheck,
        buffers: &mut [u8],
    ) -> Result<(), HoldError> {
        loop {
            self.stop_all(waiting, stopped, deadline, check, buffers)?;
            let count = procfs::thread_count(folder).map_err(|e| self.os_error("count the threads", e))?;
            if count == stopped.len() {
                return Ok(());
            }
            for tid in procfs::threads(self.pid).map_err(|e| self.os_error("list the threads", e))? {
                if !stopped.iter().any(|s| s.thread.tid() == tid) {
                    if let Some(thread) = self.seize(tid)? {
                        waiting.push(Waiting { thread, class: Class::Running, asked: None });
                    }
                }
            }
            if waiting.is_empty() {
                return Ok(());
            }
        }
    }

    /// Stops and checks all of `waiting`, the last first.
    fn stop_all(
        &self,
        waiting: &mut Vec<Waiting>,
        stopped: &mut Vec<HeldTracee>,
        deadline: Instant,
        check: &mut dyn StackCheck,
        buffers: &mut [u8],
    ) -> Result<(), HoldError> {
        loop {
            let asked = ask_next(waiting);
            if asked == 0 {
                break;
            }
            let first = stopped.len();
            // As long as each has a CPU beside ours: a thread that waits for ours would not stop while we look.
            let look = (asked < cpus()).then(|| Instant::now() + LOOK);
            while waiting.last().is_some_and(|w| w.asked.is_some()) {
                let Some(Waiting { thread, class, asked }) = waiting.pop() else { break };
                let asked = asked.unwrap_or_else(Instant::now);
                if let Some(until) = look.filter(|_| class == Class::Running) {
                    thread.look(until);
                }
                match thread.wait(deadline) {
                    Waited::Stopped(thread) => {
                        if let Some(born) = thread.born() {
                            let born = Waiting { thread: Running::inherited(born), class: Class::Running, asked: None };
                            waiting.insert(0, born);
                        }
                        stopped.push(HeldTracee { thread, class, asked });
                    }
                    Waited::Gone => {}
                    Waited::Late(thread) => {
                        let tid = thread.tid();
                        waiting.push(Waiting { thread, class, asked: Some(asked) });
                        return Err(HoldError::Deadline(tid));
                    }
                }
            }
            self.check_chunk(stopped.get(first..).unwrap_or(&[]), check, buffers)?;
            if Instant::now() >= deadline {
                let tid = stopped.last().map_or(Tid(self.pid.0), |s| s.thread.tid());
                return Err(HoldError::Deadline(tid));
            }
        }
        Ok(())
    }

    fn check_chunk(
        &self,
        chunk: &[HeldTracee],
        check: &mut dyn StackCheck,
        buffers: &mut [u8],
    ) -> Result<(), HoldError> {
        let mut threads: Vec<(HeldThread, Option<ProcRange>)> = Vec::with_capacity(CHUNK);
        let mut parts: Vec<(ProcAddr, &mut [u8])> = Vec::with_capacity(CHUNK);
        for (held, buffer) in chunk.iter().zip(buffers.chunks_exact_mut(FIRST_BYTES)) {
            // Killed while stopped: it executes nothing any more, and its end is reaped with the release.
            let Ok(mut raw) = held.thread.raw_registers() else { continue };
            tracee::hide_eintr(&held.thread, &mut raw);
            let tid = held.thread.tid();
            // A worker of io_uring: the kernel marks it so, and it executes nothing of the process.
            if raw.rip == 0 && raw.rsp == 0 && procfs::is_io_worker(self.pid, tid) {
                continue;
            }
            let thread = HeldThread { tid, is_main: tid.0 == self.pid.0, registers: tracee::registers(&raw) };
            let extent = check.extent(&thread);
            let len = extent.map_or(0, |e| usize::try_from(e.len_bytes()).unwrap_or(0).min(FIRST_BYTES));
            let (part, _) = buffer.split_at_mut(len);
            parts.push((extent.map_or(ProcAddr(0), |e| e.start), part));
            threads.push((thread, extent));
        }
        let mut ok = [false; CHUNK];
        let ok = &mut ok[..parts.len().min(CHUNK)];
        sys::read_parts(self.pid.0, &mut parts, ok);
        for (((thread, extent), (_, part)), ok) in threads.iter().zip(&parts).zip(ok) {
            // An unread stack is an unknown stack.
            let (extent, part) = if *ok { (*extent, &**part) } else { (None, &[][..]) };
            if !check.is_clear(thread, extent, part, self) {
                return Err(HoldError::NotClear(thread.tid));
            }
        }
        Ok(())
    }
}

/// On how many CPUs the tool may run.
fn cpus() -> usize {
    static CPUS: OnceLock<usize> = OnceLock::new();
    *CPUS.get_or_init(|| std::thread::available_parallelism().map_or(1, std::num::NonZero::get))
}

/// Fetches the pages of the tool itself, and what it will ask for, before threads wait for it.
fn stay_in_memory() {
    cpus();
    let own = std::fs::read("/proc/self/maps").ok().and_then(|text| crate::maps::parse(&text).ok());
    for m in own.unwrap_or_default().iter().filter(|m| m.read && m.inode != 0) {
        sys::populate(m.range.start, m.range.len_bytes());
    }
}

/// Asks the next threads of one class, at the end of the list, to stop; how many.
fn ask_next(waiting: &mut [Waiting]) -> usize {
    let Some(class) = waiting.last().map(|w| w.class) else { return 0 };
    let next = waiting.iter_mut().rev().take_while(|w| w.class == class).take(CHUNK);
    next.map(|w| {
        w.asked = Some(Instant::now());
        w.thread.interrupt();
    })
    .count()
}

/// Lets threads go, the last stopped first; how long running and sleeping threads were held.
fn release(stopped: &mut Vec<HeldTracee>) -> (Duration, Duration) {
    let (mut pause, mut sleepers) = (Duration::ZERO, Duration::ZERO);
    while let Some(held) = stopped.pop() {
        held.thread.detach();
        let longest = if held.class == Class::Running { &mut pause } else { &mut sleepers };
        *longest = (*longest).max(held.asked.elapsed());
    }
    (pause, sleepers)
}

impl ReadMemory for PtraceHeld<'_> {
    fn read_exact(&self, at: ProcAddr, buf: &mut [u8]) -> Result<(), Unreadable> {
        self.process.read_exact(at, buf)
    }

    fn read_many(&self, parts: &mut [(ProcAddr, &mut [u8])]) -> Vec<bool> {
        self.process.read_many(parts)
    }
}

impl PtraceHeld<'_> {
    /// The process.
    #[must_use]
    pub fn process(&self) -> &PtraceProcess {
        self.process
    }

    fn release_now(&mut self) {
        let (pause, sleepers) = release(&mut self.stopped);
        self.times.pause_ns = self.times.pause_ns.max(u64::try_from(pause.as_nanos()).unwrap_or(u64::MAX));
        self.times.sleepers_ns = self.times.sleepers_ns.max(u64::try_from(sleepers.as_nanos()).unwrap_or(u64::MAX));
    }
}

impl Held for PtraceHeld<'_> {
    fn write_code(&mut self, at: ProcAddr, bytes: &[u8]) -> Result<(), ProcessError> {
        let stopped = self.stopped.first().map(|s| s.thread.tid());
        self.process.write_any(at, bytes, stopped)
    }

    fn register_bytes(&mut self) -> Result<Vec<u8>, ProcessError> {
        let mut out = Vec::new();
        for held in &self.stopped {
            // Killed while stopped: it executes nothing any more.
            let Ok(raw) = held.thread.raw_registers() else { continue };
            let vector = sys::vector_state(held.thread.tid().0);
            let vector = vector.map_err(|e| self.process.os_error("read the vector registers of", e))?;
            out.extend(tracee::words(&raw).into_iter().flat_map(u64::to_le_bytes));
            out.extend(vector);
            out.resize(out.len().next_multiple_of(8), 0);
        }
        Ok(out)
    }

    fn release(mut self) -> HoldTimes {
        self.release_now();
        self.times
    }
}

impl Drop for PtraceHeld<'_> {
    fn drop(&mut self) {
        self.release_now();
    }
}
