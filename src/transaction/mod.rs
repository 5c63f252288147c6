//! Apply and revert as typestates: [`Planned`] → [`Staged`] → [`Committed`], and [`Applied`] → [`Reverted`].
//! Every transition takes `self`; a [`Staged`] that is dropped takes its mapping away again.
//!
//! *Invariant:* everything that can fail happens before the first entry byte is written, but for the writes of
//! the entries themselves; if one of those fails, the ones before it are taken back within the same hold.

use std::time::Instant;

use crate::addr::{ProcAddr, ProcRange};
use crate::maps::Mapping;
use crate::memory::ReadMemory;
use crate::patch::PatchFile;
use crate::plan::{self, CodeEdit, Layout, Links, Piece, Refusal};
use crate::process::{
    Access, FunctionCall, Held, HoldError, HoldLimits, HoldTimes, IdleCheck, Process, ProcessError, RemoteCall,
    StackCheck,
};
use crate::registry::{encode, encode_mutable, EntryRecord, Found, Mutable, Payload, State, Unwind, MUTABLE_AT};
use crate::stack::Watched;

mod record;
mod swap;

use record::{payload, watch_new, watch_old, with_entries};
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

/// The image to patch, as the plan needs it.
#[derive(Clone, Debug)]
pub struct Target {
    /// Where it is, and what else the patch refers to.
    pub links: Links,
    /// Its bytes.
    pub range: ProcRange,
}

/// What to map and to write, before anything has happened.
#[derive(Clone, Debug)]
pub struct Planned {
    layout: Layout,
    pieces: Vec<Piece>,
    edits: Vec<CodeEdit>,
    payload: Payload,
    /// The record of an earlier apply whose mapping is used again.
    earlier: Option<Mutable>,
    /// The applied patch whose place it takes.
    replaces: Option<Replaced>,
}

/// An applied patch whose place another takes, in the same hold.
#[derive(Clone, Debug)]
pub struct Replaced {
    /// Its record.
    pub found: Found,
    /// What stands at each of the new patch's redirects.
    pub redirected: Vec<[u8; 5]>,
}

impl Replaced {
    /// Its mapping's end of the bargain: where each redirect is.
    fn places(&self, patch: &PatchFile) -> Option<Vec<ProcAddr>> {
        patch.manifest.redirects.iter().map(|r| self.found.payload.base.checked_add(r.at)).collect()
    }

    /// What the hold writes: `edits` expect the old image's bytes, but the replaced patch's jumps may stand there;
    /// its other entries get their original bytes back.
    fn switch(&self, edits: &[CodeEdit]) -> Option<Vec<CodeEdit>> {
        let applied = Applied::new(self.found.clone()).ok()?.edits;
        let jump = |at| applied.iter().find(|e| e.at == at);
        let mut out: Vec<CodeEdit> = edits
            .iter()
            .map(|e| CodeEdit { expected: jump(e.at).map_or(e.expected, |j| j.expected), ..e.clone() })
            .collect();
        out.extend(applied.iter().filter(|j| !edits.iter().any(|e| e.at == j.at)).cloned());
        Some(out)
    }
}

impl Planned {
    /// A new mapping near the image. `branches` tells for each function whether its old body branches to its entry.
    ///
    /// # Errors
    ///
    /// No room, or something does not reach its target.
    pub fn new(
        patch: &PatchFile,
        target: &Target,
        maps: &[Mapping],
        branches: &[bool],
        replaces: Option<Replaced>,
    ) -> Result<Self, Refusal> {
        // An address is longest at the top of the address space: so the record can only get shorter.
        let far = || Refusal::OutOfReach { at: target.range.start, to: target.range.end };
        let dummy = Layout::at(ProcAddr(0x7000_0000_0000), 0, patch).ok_or_else(far)?;
        let entries = patch.manifest.functions.iter().filter(|f| f.old.as_ref().is_some_and(|o| o.entry.is_some()));
        let names = entries.map(|f| &f.demangled).chain(patch.manifest.redirects.iter().map(|r| &r.name));
        let dummies: Vec<CodeEdit> = names
            .map(|name| CodeEdit { function: name.clone(), at: dummy.base, expected: [0; 5], new: [0; 5] })
            .collect();
        let draft = payload(patch, &dummy, target.links.bias, branches).ok_or_else(far)?;
        let draft = with_entries(draft, &dummies);
        let slack = 64;
        let record_bytes = encode(&draft, &FRESH, u64::MAX).len() as u64 + slack;
        let layout = Layout::near(target.range, maps, record_bytes, patch)?;
        Self::at(patch, &target.links, layout, branches, None, replaces)
    }

    /// The mapping of an earlier apply of the same patch: its data keep their values.
    ///
    /// # Errors
    ///
    /// The record does not fit the patch.
    pub fn again(
        patch: &PatchFile,
        links: &Links,
        found: &Found,
        branches: &[bool],
        replaces: Option<Replaced>,
    ) -> Result<Self, Refusal> {
        let layout = Layout::at(found.region.start, found.payload.record_bytes, patch);
        let planned = layout.map(|l| Self::at(patch, links, l, branches, Some(found.mutable), replaces)).transpose()?;
        let same = |p: &Self| p.layout.region == found.region && p.payload == found.payload;
        planned.filter(same).ok_or_else(|| Refusal::Damaged {
            name: found.payload.patch.clone(),
            at: found.region.start,
            what: "its record is not that of this patch file".into(),
        })
    }

    fn at(
        patch: &PatchFile,
        links: &Links,
        layout: Layout,
        branches: &[bool],
        earlier: Option<Mutable>,
        replaces: Option<Replaced>,
    ) -> Result<Self, Refusal> {
        let pieces = plan::pieces(patch, &layout, links)?;
        let mut edits = plan::entry_edits(patch, &layout, links.bias)?;
        let far = || Refusal::OutOfReach { at: layout.region.start, to: layout.region.end };
        if let Some(r) = &replaces {
            let places = r.places(patch).ok_or_else(far)?;
            edits.extend(plan::redirect_edits(patch, &layout, &places, &r.redirected)?);
        }
        let payload = with_entries(payload(patch, &layout, links.bias, branches).ok_or_else(far)?, &edits);
        let record_bytes = encode(&payload, &FRESH, u64::MAX).len() as u64;
        if record_bytes > payload.record_bytes {
            return Err(Refusal::NoRoom { len_bytes: record_bytes });
        }
        if let Some(r) = &replaces {
            edits = r.switch(&edits).ok_or_else(far)?;
        }
        Ok(Self { layout, pieces, edits, payload, earlier, replaces })
    }

    /// How many entry jumps it will write.
    #[must_use]
    pub fn entries(&self) -> usize {
        self.payload.entries.len()
    }

    /// Where it goes.
    #[must_use]
    pub fn region(&self) -> ProcRange {
        self.layout.region
    }

    /// Maps and writes the patch and its record; the process's threads run on.
    ///
    /// # Errors
    ///
    /// Something failed; the mapping is taken away again.
    pub fn stage<P: Process>(self, process: &mut P, deadline: Instant) -> Result<Staged<'_, P>, TransactionError> {
        let mutable = self.earlier.unwrap_or(FRESH);
        let fresh = self.earlier.is_none();
        let mut staged = Staged { process, planned: self, mutable, fresh, mapped: false };
        if fresh {
            staged.map(deadline)?;
        } else {
            staged.process.adopt(staged.planned.layout.region);
            staged.check_earlier()?;
        }
        // So that no page has to be copied while threads are held.
        let mut last_page = None;
        for edit in &staged.planned.edits {
            for at in [Some(edit.at), edit.at.checked_add(edit.new.len() as u64 - 1)].into_iter().flatten() {
                let page = at.0 / crate::maps::PAGE;
                if last_page.replace(page) != Some(page) {
                    staged.process.make_private(at)?;
                }
            }
        }
        Ok(staged)
    }
}

const FRESH: Mutable =
    Mutable { state: State::Staged, unwind: Unwind::None, sequence: 0, applied_at_s: 0, pause_ns: 0 };

/// A patch that lies in the process, with no entry leading to it. Dropped, it takes its mapping away.
#[must_use = "dropped, it is taken away again"]
pub struct Staged<'p, P: Process> {
    process: &'p mut P,
    planned: Planned,
    mutable: Mutable,
    /// Whether this transaction made the mapping.
    fresh: bool,
    mapped: bool,
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
        let call = FunctionCall { stub: self.planned.layout.stub, function, argument: table.start.0 };
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
        let mut out = watch_old(&self.planned.payload);
        if let Some(replaced) = &self.planned.replaces {
            out.extend(watch_new(&replaced.found.payload));
        }
        out
    }

    /// Holds, checks, writes the entry jumps and lets go.
    ///
    /// # Errors
    ///
    /// With the staged patch, to try again: a thread was not clear, or an entry could not be written.
    pub fn commit(
        mut self,
        limits: HoldLimits,
        check: &mut dyn StackCheck,
        sequence: u64,
        applied_at_s: u64,
    ) -> Result<Committed, Box<(Self, TransactionError)>> {
        let mutable = Mutable { state: State::Applied, sequence, applied_at_s, pause_ns: 0, ..self.mutable };
        let at = ProcAddr(self.planned.layout.region.start.0 + MUTABLE_AT);
        let mut records = vec![RecordEdit { at, before: self.mutable, after: mutable }];
        records.extend(self.planned.replaces.as_ref().map(|r| RecordEdit::reverted(&r.found)));
        let result = hold_and_swap(self.process, limits, check, &self.planned.edits, &records);
        match result {
            Err(e) => Err(Box::new((self, e))),
            Ok(times) => {
                self.mutable = Mutable { pause_ns: times.pause_ns, ..mutable };
                // From here on the mapping is in use. Its pause is for people only.
                let _ = self.write_mutable();
                self.mapped = false;
                Ok(Committed { times, entries: self.planned.payload.entries.len() })
            }
        }
    }
}

impl<P: Process> Drop for Staged<'_, P> {
    fn drop(&mut self) {
        // Registered tables must stay where they are: then the mapping waits, staged, for the next attempt.
        if self.mapped && self.fresh && self.mutable.unwind == Unwind::None {
            let deadline = Instant::now() + std::time::Duration::from_millis(500);
            let _ = self.process.remote(&[RemoteCall::Unmap(self.planned.layout.region)], deadline);
        }
    }
}

/// A patch that is applied.
#[derive(Clone, Copy, Debug)]
pub struct Committed {
    /// How long threads were held.
    pub times: HoldTimes,
    /// How many entry jumps were written.
    pub entries: usize,
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
        let after = Mutable { state: State::Reverted, ..found.mutable };
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

/// An applied patch, about to be reverted.
pub struct Applied {
    found: Found,
    edits: Vec<CodeEdit>,
}

impl Applied {
    /// From its record.
    ///
    /// # Errors
    ///
    /// The record is damaged.
    pub fn new(found: Found) -> Result<Self, Refusal> {
        let edit = |e: &EntryRecord| {
            Some(CodeEdit {
                function: e.function.clone(),
                at: e.at,
                expected: e.jump.0.first_chunk().copied()?,
                new: e.original.0.first_chunk().copied()?,
            })
        };
        let edits = found.payload.entries.iter().map(edit).collect::<Option<_>>();
        let damaged = || Refusal::Damaged {
            name: found.payload.patch.clone(),
            at: found.region.start,
            what: "its entries are not those of a patch".into(),
        };
        let edits = edits.ok_or_else(damaged)?;
        Ok(Self { found, edits })
    }

    /// Its record.
    #[must_use]
    pub fn payload(&self) -> &Payload {
        &self.found.payload
    }

    /// How many entries it has.
    #[must_use]
    pub fn entries(&self) -> usize {
        self.edits.len()
    }

    /// The code that no thread may be in when the patch is reverted.
    #[must_use]
    pub fn watched(&self) -> Vec<Watched> {
        watch_new(&self.found.payload)
    }

    /// Leaves out the entries that do not lead into the patch: a command died before it wrote them.
    pub fn keep_written<M: ReadMemory + ?Sized>(&mut self, memory: &M) {
        self.edits.retain(|e| memory.read_vec(e.at, e.expected.len() as u64).is_ok_and(|there| there == e.expected));
    }

    /// Whether every entry still holds the patch's jump.
    ///
    /// # Errors
    ///
    /// The first one that does not.
    pub fn check_entries<M: ReadMemory + ?Sized>(&self, memory: &M) -> Result<(), Refusal> {
        swap::check(memory, &self.edits).map_err(|e| e.refusal(&self.found.payload.patch))
    }

    /// Holds, checks, writes the original bytes back and lets go. The mapping stays.
    ///
    /// # Errors
    ///
    /// With the patch, to try again: a thread was not clear, or an entry could not be written.
    pub fn revert<P: Process>(
        self,
        process: &mut P,
        limits: HoldLimits,
        check: &mut dyn StackCheck,
    ) -> Result<Reverted, Box<(Self, TransactionError)>> {
        let record = RecordEdit::reverted(&self.found);
        match hold_and_swap(process, limits, check, &self.edits, &[record]) {
            Ok(times) => Ok(Reverted { times, entries: self.edits.len() }),
            Err(e) => Err(Box::new((self, e))),
        }
    }
}

/// A patch that was reverted.
#[derive(Clone, Copy, Debug)]
pub struct Reverted {
    /// How long threads were held.
    pub times: HoldTimes,
    /// How many entries were written back.
    pub entries: usize,
}

#[cfg(test)]
mod tests;
