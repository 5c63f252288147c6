//! Apply and revert as typestates: [`Planned`] → [`Staged`] → [`Committed`], and [`Applied`] → [`Reverted`].
//! Every transition takes `self`; a [`Staged`] that is dropped takes its mapping away again.
//!
//! *Invariant:* everything that can fail happens before the first entry byte is written, but for the writes of
//! the entries themselves; if one of those fails, the ones before it are taken back within the same hold.

use std::time::Instant;

use crate::addr::{ProcAddr, ProcRange};
use crate::memory::ReadMemory;
use crate::plan::sites::Trap;
use crate::plan::{CodeEdit, Refusal};
use crate::process::{
    Access, FunctionCall, Held, HoldError, HoldLimits, HoldTimes, IdleCheck, Process, ProcessError, RemoteCall,
    StackCheck,
};
use crate::registry::{
    encode, encode_mutable, Confirmation, Found, Mutable, Payload, Share, State, Unwind, MUTABLE_AT,
};
use crate::stack::Watched;

mod planned;
mod record;
mod revert;
mod swap;

pub use planned::{Planned, Replaced, Target};
pub use record::relax;
use record::{stubs, watch_loops, watch_new, windows};
pub use revert::{Applied, Reverted};
pub use swap::SwapError;

/// Why a transition did not happen; the process is as it was.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TransactionError {
    /// A no with its reason.
    #[error(transparent)]
    Refused(#[from] Refusal),
    /// The process failed.
    #[error(transparent)]
    Process(#[from] ProcessError),
    /// The threads could not be held, or one was not clear.
    #[error(transparent)]
    Hold(#[from] HoldError),
    /// The entries could not be written.
    #[error(transparent)]
    Swap(#[from] SwapError),
}

const FRESH: Mutable = Mutable {
    state: State::Staged,
    unwind: Unwind::None,
    sequence: 0,
    applied_at_s: 0,
    pause_ns: 0,
    confirmation: Confirmation { confirmed: false, by_s: 0, watcher: 0 },
    share: Share { words: [0, 0], which: 0 },
};

/// A patch that lies in the process, with no entry leading to it. Dropped, it takes its mapping away.
#[must_use = "dropped, it is taken away again"]
pub struct Staged<'p, P: Process> {
    process: &'p mut P,
    planned: Planned,
    mutable: Mutable,
    /// Whether this transaction made the mapping.
    fresh: bool,
    mapped: bool,
    /// Whether entries may lead to the switch stubs: then the mapping must stay.
    led: bool,
}

impl<'p, P: Process> Staged<'p, P> {
    fn map(&mut self, deadline: Instant) -> Result<(), TransactionError> {
        let layout = self.planned.layout;
        let record = ProcRange { start: layout.region.start, end: layout.stub };
        let mut calls = vec![RemoteCall::Map(layout.region), RemoteCall::Protect(record, Access::Read)];
        let other = self.planned.pieces.iter().filter(|p| p.access != Access::Execute);
        calls.extend(other.map(|p| RemoteCall::Protect(p.range, p.access)));
        // Set before: a failure after the first call must still unmap.
        self.mapped = true;
        match self.process.remote(&calls, deadline) {
            Ok(()) => {}
            Err(ProcessError::Remote { call: "mmap", source, pid }) => {
                self.mapped = false;
                return Err(match source.raw_os_error() {
                    Some(libc::EPERM | libc::EACCES) => {
                        Refusal::NoExecutableMemory { error: source.to_string() }.into()
                    }
                    _ => ProcessError::Remote { call: "mmap", source, pid }.into(),
                });
            }
            Err(ProcessError::Remote { source, .. }) if source.raw_os_error() == Some(libc::EACCES) => {
                return Err(Refusal::NoExecutableMemory { error: source.to_string() }.into());
            }
            Err(e) => return Err(e.into()),
        }
        for piece in &self.planned.pieces {
            self.process.write_own(piece.range.start, &piece.bytes)?;
        }
        let record = encode(&self.planned.payload, &self.mutable, layout.region.len_bytes());
        self.process.write_own(layout.region.start, &record)?;
        self.verify(&record, true)
    }

    /// What was written must be what is there.
    fn verify(&self, record: &[u8], data_too: bool) -> Result<(), TransactionError> {
        let start = self.planned.layout.region.start;
        let fixed = self.planned.pieces.iter().filter(|p| data_too || p.access != Access::Write);
        let parts = fixed.map(|p| (p.range.start, p.bytes.as_slice())).chain([(start, record)]);
        for (at, bytes) in parts {
            let there = self.process.read_vec(at, bytes.len() as u64);
            if there.as_deref() != Ok(bytes) {
                let (name, what) = (self.planned.payload.patch.clone(), "its mapping holds other bytes".into());
                return Err(Refusal::Damaged { name, at, what }.into());
            }
        }
        Ok(())
    }

    fn check_earlier(&self) -> Result<(), TransactionError> {
        let region = self.planned.layout.region;
        let record = encode(&self.planned.payload, &self.mutable, region.len_bytes());
        self.verify(&record, false)
    }

    fn write_mutable(&mut self) -> Result<(), ProcessError> {
        let at = ProcAddr(self.planned.layout.region.start.0 + MUTABLE_AT);
        self.process.write_own(at, &encode_mutable(&self.mutable))
    }

    /// The process.
    pub fn process(&mut self) -> &mut P {
        self.process
    }

    /// Its mapping.
    #[must_use]
    pub fn region(&self) -> ProcRange {
        self.planned.layout.region
    }

    /// The patch's record.
    #[must_use]
    pub fn payload(&self) -> &Payload {
        &self.planned.payload
    }

    /// Whether the patch has unwind tables that the process's unwinder does not know yet.
    #[must_use]
    pub fn wants_registration(&self) -> bool {
        self.planned.payload.eh_frame.is_some() && self.mutable.unwind == Unwind::None
    }

    /// Lets a thread that `idle` accepts call `function` (`__register_frame`) on the patch's unwind table.
    ///
    /// # Errors
    ///
    /// No thread could be borrowed before the deadline.
    pub fn register(
        &mut self,
        function: ProcAddr,
        idle: &mut dyn IdleCheck,
        deadline: Instant,
    ) -> Result<(), TransactionError> {
        let Some(table) = self.planned.payload.eh_frame.filter(|_| self.mutable.unwind == Unwind::None) else {
            return Ok(());
        };
        // Before the call: whoever finds this record later must not believe that the tables are unknown.
        self.mutable.unwind = Unwind::Registering;
        self.write_mutable()?;
        let call = FunctionCall { stub: self.planned.layout.stub, function, arguments: [table.start.0, 0, 0, 0] };
        if let Err(e) = self.process.call(call, idle, deadline) {
            if matches!(e, ProcessError::NoIdleThread { .. }) {
                self.mutable.unwind = Unwind::None;
                self.write_mutable()?;
            }
            return Err(e.into());
        }
        self.mutable.unwind = Unwind::Registered;
        self.write_mutable()?;
        Ok(())
    }

    /// The code that no thread may be in when the patch is applied.
    #[must_use]
    pub fn watched(&self) -> Vec<Watched> {
        self.planned.watched()
    }

    /// The jumps to the switch stubs; empty if the entries are written in one hold. Until [`commit`](Self::commit) they
    /// change nothing. To be written with [`rewrite`] before it.
    #[must_use]
    pub fn leads(&self) -> &[CodeEdit] {
        &self.planned.leads
    }

    /// Says whether entries lead to the switch stubs, so that the mapping must stay.
    pub fn set_led(&mut self, led: bool) {
        self.led = led;
    }

    /// What no thread may be in while entries are rewritten without a switch.
    #[must_use]
    pub fn windows(&self) -> Vec<Watched> {
        windows(&self.planned.payload).collect()
    }

    /// The same, with what must not come to the stubs of a canary: a call whose loop goes back to the entry of the function that is left,
    /// and whose key, in an argument register, is another by then. Later calls loop in the copy that the stub leads to.
    #[must_use]
    pub fn before_stubs(&self) -> Vec<Watched> {
        let payload = &self.planned.payload;
        let by_argument = payload.canary.as_ref().is_some_and(|c| c.session.is_none());
        let loops = if by_argument { watch_loops(payload) } else { Vec::new() };
        windows(payload).chain(loops).collect()
    }

    /// The windows, with the switch stubs: for when they are to go.
    #[must_use]
    pub fn windows_and_stubs(&self) -> Vec<Watched> {
        windows(&self.planned.payload).chain(stubs(&self.planned.payload)).collect()
    }

    /// The traps that switch it from inside; `None` if it has no stubs for them.
    #[must_use]
    pub fn traps(&self) -> Option<Vec<Trap>> {
        (self.planned.traps.len() == self.planned.edits.len()).then(|| self.planned.traps.clone())
    }

    /// What no thread may be in for the patch to be taken back after it was entered.
    #[must_use]
    pub fn watched_new(&self) -> Vec<Watched> {
        watch_new(&self.planned.payload)
    }

    /// Writes the record of a patch whose entries lead to it already.
    ///
    /// # Errors
    ///
    /// It could not be written; `recover` makes it agree with the entries.
    pub fn switched(mut self, stamp: Stamp) -> Result<Committed, TransactionError> {
        // From here on the mapping is in use.
        self.mapped = false;
        let Stamp { sequence, applied_at_s, confirmation, share } = stamp;
        let state = State::Applied;
        self.mutable = Mutable { state, sequence, applied_at_s, pause_ns: 0, confirmation, share, ..self.mutable };
        if let Some(replaced) = self.planned.replaces.take() {
            let edit = RecordEdit::reverted(&replaced.found);
            self.process.adopt(replaced.found.region);
            self.process.write_own(edit.at, &encode_mutable(&edit.after))?;
        }
        self.write_mutable()?;
        let (times, rest) = (HoldTimes::default(), Vec::new());
        Ok(Committed { times, entries: self.planned.payload.jumps(), rest })
    }

    /// Leaves the mapping where it is, for its code has run, or still may; no entry leads to it any more.
    ///
    /// # Errors
    ///
    /// The record could not be written.
    pub fn keep(mut self) -> Result<(), TransactionError> {
        self.mapped = false;
        self.mutable.state = State::Reverted;
        Ok(self.write_mutable()?)
    }

    /// Holds, checks, writes the entry jumps and lets go. With switch stubs it writes the one word that they follow; the
    /// entries are then to be pointed straight at the new code, by [`Committed::rest`].
    ///
    /// # Errors
    ///
    /// With the staged patch, to try again: a thread was not clear, or an entry could not be written.
    pub fn commit(
        mut self,
        limits: HoldLimits,
        check: &mut dyn StackCheck,
        stamp: Stamp,
    ) -> Result<Committed, Box<(Self, TransactionError)>> {
        let Stamp { sequence, applied_at_s, confirmation, share } = stamp;
        let state = State::Applied;
        let mutable = Mutable { state, sequence, applied_at_s, pause_ns: 0, confirmation, share, ..self.mutable };
        let at = ProcAddr(self.planned.layout.region.start.0 + MUTABLE_AT);
        let mut records = vec![RecordEdit { at, before: self.mutable, after: mutable }];
        records.extend(self.planned.replaces.as_ref().map(|r| RecordEdit::reverted(&r.found)));
        let leads = &self.planned.leads;
        let edits = if leads.is_empty() { &*self.planned.edits } else { &[] };
        let result = hold_and_swap(self.process, limits, check, edits, &records);
        match result {
            Err(e) => Err(Box::new((self, e))),
            Ok(times) => {
                self.mutable = Mutable { pause_ns: times.pause_ns, ..mutable };
                // From here on the mapping is in use. Its pause is for people only.
                let _ = self.write_mutable();
                self.mapped = false;
                let rest = straight(&self.planned.leads, &self.planned.edits);
                Ok(Committed { times, entries: self.planned.payload.jumps(), rest })
            }
        }
    }
}

impl<P: Process> Drop for Staged<'_, P> {
    fn drop(&mut self) {
        // Registered tables must stay where they are: then the mapping waits, staged, for the next attempt.
        if self.mapped && self.fresh && !self.led && self.mutable.unwind == Unwind::None {
            let deadline = Instant::now() + std::time::Duration::from_millis(500);
            let _ = self.process.remote(&[RemoteCall::Unmap(self.planned.layout.region)], deadline);
        }
    }
}

/// What an apply leaves in the record.
#[derive(Clone, Copy, Debug, Default)]
pub struct Stamp {
    /// Orders the applies.
    pub sequence: u64,
    /// Unix time.
    pub applied_at_s: u64,
    /// Until when it is to be confirmed, and who waits for that.
    pub confirmation: Confirmation,
    /// The share of a canary.
    pub share: Share,
}

/// From the switch stubs to where `edits` lead.
fn straight(leads: &[CodeEdit], edits: &[CodeEdit]) -> Vec<CodeEdit> {
    let differ = |(l, e): &(&CodeEdit, &CodeEdit)| l.new != e.new;
    leads.iter().zip(edits).filter(differ).map(|(l, e)| CodeEdit { expected: l.new, ..e.clone() }).collect()
}

/// A patch that is applied.
#[derive(Clone, Debug)]
pub struct Committed {
    /// How long threads were held.
    pub times: HoldTimes,
    /// How many entry jumps were written.
    pub entries: usize,
    /// Entries that lead through switch stubs and may lead there straight.
    pub rest: Vec<CodeEdit>,
}

/// Rewrites entries in one hold, without a switch: both what stands there and what is written lead to the same code.
///
/// # Errors
///
/// A thread was in an entry window, or an entry could not be written: then all are as they were.
pub fn rewrite<P: Process>(
    process: &mut P,
    edits: &[CodeEdit],
    limits: HoldLimits,
    check: &mut dyn StackCheck,
) -> Result<HoldTimes, TransactionError> {
    hold_and_swap(process, limits, check, edits, &[])
}

/// The edits that were made, turned round: what they expected is written again.
#[must_use]
pub fn undone<M: ReadMemory + ?Sized>(memory: &M, edits: &[CodeEdit]) -> Vec<CodeEdit> {
    let there = |e: &&CodeEdit| memory.read_vec(e.at, e.new.len() as u64).is_ok_and(|b| b == e.new);
    edits.iter().filter(there).map(|e| CodeEdit { expected: e.new, new: e.expected, ..e.clone() }).collect()
}

/// A change of what a record says.
struct RecordEdit {
    at: ProcAddr,
    before: Mutable,
    after: Mutable,
}

impl RecordEdit {
    /// A patch is no longer applied.
    fn reverted(found: &Found) -> Self {
        let after = Mutable {
            state: State::Reverted,
            confirmation: Confirmation::default(),
            share: Share::default(),
            ..found.mutable
        };
        Self { at: ProcAddr(found.region.start.0 + MUTABLE_AT), before: found.mutable, after }
    }
}

/// Holds, checks, writes `edits` and the records' new states, and lets go.
fn hold_and_swap<P: Process>(
    process: &mut P,
    limits: HoldLimits,
    check: &mut dyn StackCheck,
    edits: &[CodeEdit],
    records: &[RecordEdit],
) -> Result<HoldTimes, TransactionError> {
    let mut held = process.hold(limits, check)?;
    swap::swap(&mut held, edits)?;
    for (i, record) in records.iter().enumerate() {
        let Err(e) = held.write_code(record.at, &encode_mutable(&record.after)) else { continue };
        // Entries and records must not contradict each other: back to where we were.
        for done in records.get(..=i).unwrap_or(records) {
            let _ = held.write_code(done.at, &encode_mutable(&done.before));
        }
        swap::undo(&mut held, edits)?;
        return Err(e.into());
    }
    Ok(held.release())
}

#[cfg(test)]
mod tests;
