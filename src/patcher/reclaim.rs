//! Taking the mappings of reverted patches away, once nothing in the process leads to them.
//!
//! A reverted patch stays mapped, for objects of the process may hold addresses of it: of its tables of virtual functions, its
//! texts, its callbacks. Only a scan of everything that can hold one shows that none does: all memory that the process can have
//! written and every register, while no thread runs; and what the kernel keeps for it. All go, or none: one may refer to
//! another.

use std::time::Instant;

use serde::Serialize;

use super::{Error, Options, Patcher};
use crate::addr::{ProcAddr, ProcRange};
use crate::maps::{Mapping, PAGE};
use crate::memory::ReadMemory;
use crate::plan::Refusal;
use crate::process::ptrace::{kept, PtraceProcess, Undisturbed};
use crate::process::{
    Access, FunctionCall, Held, HeldThread, HoldError, HoldLimits, Process, ProcessError, RemoteCall, StackCheck,
};
use crate::registry::{encode_mutable, Found, Mutable, State, Unwind, MUTABLE_AT};
use crate::scan::{Scanner, OVERLAP};
use crate::stack::Cfi;

/// Memory is read in parts of this many bytes.
const PART: usize = 1 << 20;

/// Bytes below a stack pointer that are still in use (System V psABI).
const RED_ZONE: u64 = 128;

/// Where a thread's control block holds the secret that disguises addresses (glibc, `tcbhead_t.pointer_guard`).
const POINTER_GUARD: u64 = 0x30;

/// What was taken away.
#[derive(Clone, Debug, Serialize)]
pub struct Reclaimed {
    /// The process.
    pub pid: i32,
    /// The patches, by name.
    pub patches: Vec<String>,
    /// Bytes of their mappings.
    pub bytes: u64,
    /// Bytes that were looked through.
    pub scanned: u64,
    /// How long threads were held for it, in µs.
    pub held_us: f64,
}

/// What to look for.
struct Wanted {
    anywhere: Scanner,
    /// Just below a stack pointer, where a function that calls nothing has its variables, or returns have left their addresses: these
    /// lead nowhere any more.
    red_zone: Scanner,
}

impl Wanted {
    fn new(ranges: &[ProcRange], guard: Option<u64>, harmless: &[ProcRange], records: &[Found]) -> Self {
        let scanner = || Scanner::new(ranges.to_vec(), guard).but_for(harmless.to_vec());
        let code = records.iter().flat_map(|r| &r.payload.functions).filter_map(|f| f.new.range());
        let inside = code.map(|c| ProcRange { start: ProcAddr(c.start.0 + 1), end: ProcAddr(c.end.0 + 1) });
        Self { anywhere: scanner(), red_zone: scanner().but_for(inside.collect()) }
    }
}

/// Takes every thread as it stands, and keeps where its stack ends and where its control block is.
#[derive(Default)]
struct Anywhere {
    threads: Vec<HeldThread>,
}

impl StackCheck for Anywhere {
    fn extent(&self, _: &HeldThread) -> Option<ProcRange> {
        None
    }

    fn is_clear(&mut self, thread: &HeldThread, _: Option<ProcRange>, _: &[u8], _: &dyn ReadMemory) -> bool {
        self.threads.push(*thread);
        true
    }
}

impl Patcher {
    /// Takes away the mappings of all reverted patches: `None` if there are none.
    ///
    /// # Errors
    ///
    /// A patch is applied, or something may lead to one of them; then all stay.
    pub fn reclaim(&mut self, options: &Options) -> Result<Option<Reclaimed>, Error> {
        let result = self.try_reclaim(options);
        self.unless_ended(result)
    }

    fn try_reclaim(&mut self, options: &Options) -> Result<Option<Reclaimed>, Error> {
        let _undisturbed = Undisturbed::begin();
        let _lock = self.process.lock()?;
        self.finished()?;
        let deadline = Instant::now() + options.timeout;
        self.remove_unused(deadline)?;
        let records = self.records()?;
        if records.is_empty() {
            return Ok(None);
        }
        let in_use = |found: &Found, what: String| Refusal::InUse { patch: found.payload.patch.clone(), what };
        for found in &records {
            if found.mutable.state == State::Applied {
                return Err(in_use(found, "the code is in use: it is applied".into()).into());
            }
            if found.mutable.unwind == Unwind::Registering {
                let what = "nobody knows whether the unwind tables are registered: a command died meanwhile";
                return Err(in_use(found, what.into()).into());
            }
        }
        if let Some(other) = self.process.sharers().first() {
            return Err(Refusal::SharedMemory { pid: other.0 }.into());
        }
        // Also what lies just behind the end of one: a pointer past an array.
        let ranges = records.iter().map(|r| ProcRange { start: r.region.start, end: ProcAddr(r.region.end.0 + PAGE) });
        let ranges: Vec<ProcRange> = ranges.collect();
        self.kernel_keeps_none(&ranges, &records, deadline)?;
        // Without stopping anyone first: what is found now need not be looked for while threads wait.
        let mut all = Anywhere::default();
        let guard = self.pointer_guard(&mut all);
        let tables: Vec<ProcRange> = records.iter().filter_map(table).collect();
        let known: Vec<ProcRange> = tables.iter().copied().chain(records.iter().flat_map(known_to_unwinder)).collect();
        let began = Instant::now();
        let first = Wanted::new(&ranges, guard, &known, &records);
        look_through(&self.process, &self.process, &first, &records, &all.threads)?;
        let took = began.elapsed();
        if took > options.hold {
            let what = format!(
                "nothing can be said: to look through the memory of the process takes {} ms, and threads may be held for {} ms",
                took.as_millis(),
                options.hold.as_millis()
            );
            return Err(in_use(&records[0], what).into());
        }
        let mut forgotten = Vec::new();
        let mut scan = || {
            for found in &records {
                if self.tell_unwinder(found, "__deregister_frame", Unwind::None, deadline)? {
                    forgotten.push(found);
                }
            }
            self.scan_held(&Wanted::new(&ranges, guard, &tables, &records), &records, options)
        };
        let (scanned, times) = match scan() {
            Ok(done) => done,
            Err(e) => {
                // What stays may be called, and throw.
                let until = Instant::now() + options.timeout;
                for found in forgotten {
                    let found = Found { mutable: Mutable { unwind: Unwind::None, ..found.mutable }, ..found.clone() };
                    self.tell_unwinder(&found, "__register_frame", Unwind::Registered, until)?;
                }
                return Err(e);
            }
        };
        self.kernel_keeps_none(&ranges, &records, deadline)?;
        let calls: Vec<RemoteCall> = records.iter().rev().map(|r| RemoteCall::Unmap(r.region)).collect();
        self.process.remote(&calls, deadline)?;
        self.maps = self.process.mappings()?;
        Ok(Some(Reclaimed {
            pid: self.process.pid().0,
            patches: records.iter().map(|r| r.payload.patch.clone()).collect(),
            bytes: records.iter().map(|r| r.region.len_bytes()).sum(),
            scanned,
            held_us: (times as f64 / 100.0).round() / 10.0,
        }))
    }

    /// Holds all threads and looks through all that they can reach; bytes, and nanoseconds of the longest hold.
    fn scan_held(&mut self, wanted: &Wanted, records: &[Found], options: &Options) -> Result<(u64, u64), Error> {
        let limits = HoldLimits { deadline: options.hold.saturating_mul(2) };
        let pid = self.process.pid();
        let mut all = Anywhere::default();
        let mut held = self.process.hold(limits, &mut all).map_err(|e| match e {
            HoldError::Process(e) => Error::from(e),
            _ => Error::from(ProcessError::NoIdleThread { pid, what: "look through its memory" }),
        })?;
        let registers = held.register_bytes()?;
        if wanted.anywhere.find(&registers).is_some() {
            let what = "a thread holds an address in a register".into();
            return Err(Refusal::InUse { patch: records[0].payload.patch.clone(), what }.into());
        }
        let scanned = look_through(&held, held.process(), wanted, records, &all.threads)?;
        let times = held.release();
        Ok((scanned + registers.len() as u64, times.pause_ns.max(times.sleepers_ns)))
    }

    /// What the kernel keeps for the process, and gives back to it later.
    fn kernel_keeps_none(&mut self, ranges: &[ProcRange], records: &[Found], deadline: Instant) -> Result<(), Error> {
        let pid = self.process.pid();
        let scanner = Scanner::new(ranges.to_vec(), None);
        let in_use = |what: String| Error::from(Refusal::InUse { patch: records[0].payload.patch.clone(), what });
        let os = |e| ProcessError::from_os(pid, "look at what the kernel keeps for", e);
        if let Some(what) = kept::by_kernel(pid, &|address| scanner.is_inside(address)).map_err(os)? {
            return Err(in_use(what));
        }
        // Signal handlers: only the process can ask. Behind one of the mappings 16 pages are free (plan::GAP).
        let at = ProcAddr(records[0].region.end.0 + PAGE);
        let page = ProcRange { start: at, end: ProcAddr(at.0 + PAGE) };
        let mut calls = vec![RemoteCall::Map(page), RemoteCall::Protect(page, Access::Write)];
        calls.extend(kept::SIGNALS.map(|signal| RemoteCall::AskHandler {
            signal,
            to: ProcAddr(at.0 + u64::from(signal.unsigned_abs()) * kept::HANDLER_BYTES),
        }));
        let asked = self.process.remote(&calls, deadline);
        let answers = self.process.read_vec(at, PAGE);
        if !matches!(asked, Err(ProcessError::Remote { call: "mmap", .. })) {
            self.process.remote(&[RemoteCall::Unmap(page)], deadline)?;
        }
        asked?;
        let answers = answers.map_err(|_| ProcessError::Gone(pid))?;
        match scanner.find(&answers) {
            Some(at) => Err(in_use(format!("an address handles signal {}", at as u64 / kept::HANDLER_BYTES))),
            None => Ok(()),
        }
    }

    /// The secret of the process, if its C library has one, as a thread's control block tells; and where all threads are.
    fn pointer_guard(&mut self, all: &mut Anywhere) -> Option<u64> {
        let limits = HoldLimits { deadline: std::time::Duration::from_millis(100) };
        drop(self.process.hold(limits, all).ok()?);
        let control = all.threads.iter().map(|t| t.registers.fs_base).find(|at| at.0 != 0)?;
        let bytes = self.process.read_vec(control.checked_add(POINTER_GUARD)?, 8).ok()?;
        Some(u64::from_le_bytes(bytes.try_into().ok()?))
    }

    /// Lets the unwinder forget the tables of a patch, or know them again: what its record says then is `after`. Whether anything was to be
    /// done.
    fn tell_unwinder(
        &mut self,
        found: &Found,
        function: &str,
        after: Unwind,
        deadline: Instant,
    ) -> Result<bool, Error> {
        let Some(table) = table(found).filter(|_| found.mutable.unwind != after) else { return Ok(false) };
        let Some(function) = self.executable().ok().and_then(|main| self.find_unwinder(main, function)) else {
            let what = format!("the unwind tables are registered, and the process exports no {function}");
            return Err(Refusal::InUse { patch: found.payload.patch.clone(), what }.into());
        };
        let cfi = Cfi::load(&self.process, &self.images);
        let mut idle = super::idle::Idle::new(&self.process, &self.images, &self.maps, &cfi, None);
        let record = |unwind| encode_mutable(&Mutable { unwind, ..found.mutable });
        let at = ProcAddr(found.region.start.0 + MUTABLE_AT);
        // Before the call: nobody may believe later that they are known, or unknown, and have it done twice.
        self.process.adopt(found.region);
        self.process.write_own(at, &record(Unwind::Registering))?;
        let call = FunctionCall { stub: found.payload.stub, function, arguments: [table.start.0, 0, 0, 0] };
        if let Err(e) = self.process.call(call, &mut idle, deadline) {
            if matches!(e, ProcessError::NoIdleThread { .. }) {
                self.process.write_own(at, &record(found.mutable.unwind))?;
            }
            return Err(e.into());
        }
        self.process.write_own(at, &record(after))?;
        Ok(true)
    }
}

/// The unwind table of a patch. Nothing but the unwinder has any use for an address in it, and that forgets it first: what it
/// leaves behind, in memory that it has given back, leads nowhere.
fn table(found: &Found) -> Option<ProcRange> {
    found.payload.eh_frame.and_then(|t| t.range())
}

/// Addresses by which the unwinder knows a patch while its tables are registered: the first of its code, and the last.
fn known_to_unwinder(found: &Found) -> Vec<ProcRange> {
    let code = || found.payload.functions.iter().filter_map(|f| f.new.range());
    let first = code().map(|c| c.start).min();
    let last = code().map(|c| ProcAddr(c.end.0 - 1)).max();
    let of = |at: Option<ProcAddr>, len| at.and_then(|at| ProcRange::new(at, len));
    of(first, 1).into_iter().chain(of(last, 2)).collect()
}

/// Looks through all memory that the process can have written, but the patches themselves and what lies below the stack pointers of
/// `threads`; how many bytes that was.
fn look_through(
    memory: &dyn ReadMemory,
    process: &PtraceProcess,
    wanted: &Wanted,
    records: &[Found],
    threads: &[HeldThread],
) -> Result<u64, Error> {
    let pid = process.pid();
    let in_use = |what: String| Error::from(Refusal::InUse { patch: records[0].payload.patch.clone(), what });
    let maps = process.mappings()?;
    let os = |e| ProcessError::from_os(pid, "read /proc/PID/pagemap of", e);
    let pages = kept::Pages::open(pid).map_err(os)?;
    let mut buffer = vec![0u8; PART + 8];
    let mut total = 0;
    for (i, m) in maps.iter().enumerate().filter(|(_, m)| is_writable_once(m)) {
        if records.iter().any(|r| r.region.overlaps(&m.range)) {
            continue;
        }
        let mut range = m.range;
        if let Some(sp) = only_stack(m, i.checked_sub(1).and_then(|i| maps.get(i)), threads) {
            range.start = sp;
            let red = ProcAddr(sp.0.saturating_sub(RED_ZONE).max(m.range.start.0));
            let below = memory.read_vec(red, sp.0 - red.0).unwrap_or_default();
            if let Some(found) = wanted.red_zone.find(&below) {
                return Err(in_use(format!("an address is held at {} ({})", ProcAddr(red.0 + found as u64), name(m))));
            }
        }
        // What is shared may be there without having been touched here.
        let parts = if m.shared { vec![range] } else { pages.touched(range).map_err(os)? };
        for part in parts {
            let mut at = part.start;
            while at < part.end {
                let want = usize::try_from(part.end.0 - at.0).unwrap_or(usize::MAX).min(PART);
                let more = if at.0 + (want as u64) < part.end.0 { OVERLAP } else { 0 };
                let Some(bytes) = buffer.get_mut(..want + more) else { break };
                if memory.read_exact(at, bytes).is_err() {
                    return Err(in_use(format!(
                        "nothing can be said: {} bytes at {at} ({}) can't be read",
                        want,
                        name(m)
                    )));
                }
                if let Some(found) = wanted.anywhere.find(bytes) {
                    let place = ProcAddr(at.0 + found as u64);
                    return Err(in_use(format!("an address is held at {place} ({})", name(m))));
                }
                total += want as u64;
                at = ProcAddr(at.0 + want as u64);
            }
        }
    }
    Ok(total)
}

/// Whether the process may have written there: what is its own need not be writable any more.
fn is_writable_once(m: &Mapping) -> bool {
    let of_kernel = m.name.starts_with("[v") || m.name == "[uprobes]";
    (m.write || !m.shared) && !of_kernel
}

fn name(m: &Mapping) -> &str {
    if m.name.is_empty() {
        "anonymous memory"
    } else {
        &m.name
    }
}

/// The stack pointer of the thread whose stack is all that can be in this mapping: what lies below it is not in use.
fn only_stack(m: &Mapping, below: Option<&Mapping>, threads: &[HeldThread]) -> Option<ProcAddr> {
    let guarded = below.is_some_and(|b| b.range.end == m.range.start && !b.read && !b.write);
    let on_it: Vec<ProcAddr> = threads.iter().map(|t| t.registers.sp()).filter(|sp| m.range.contains(*sp)).collect();
    match on_it[..] {
        [sp] if guarded || m.name == "[stack]" => Some(ProcAddr(sp.0 & !7)),
        _ => None,
    }
}
