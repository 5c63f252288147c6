//! What an interrupted command left, and how it is finished or undone.
//!
//! The entries tell the truth, for they are what threads run; a record that contradicts them is put right. A mapping that
//! no entry leads to and that was never applied is taken away, unless the unwinder may know its tables.

use std::time::Instant;

use serde::Serialize;

use super::rewrite::Place;
use super::{Error, Options, Patcher, Retry};
use crate::addr::ProcRange;
use crate::memory::ReadMemory;
use crate::patch::HexBytes;
use crate::plan::{CodeEdit, Refusal};
use crate::process::ptrace::Undisturbed;
use crate::process::{Process, RemoteCall};
use crate::registry::{encode_mutable, EntryRecord, Found, Mutable, State, Unwind, MUTABLE_AT};
use crate::transaction::Applied;

/// Where the entries of a patch lead.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Entries {
    /// All into the patch.
    New,
    /// None into the patch.
    Old,
    /// Some: a command died between two of them.
    Mixed,
}

/// What was done about a patch.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Outcome {
    /// It is applied, and its record says so now.
    Applied,
    /// It is reverted, and its record says so now.
    Reverted,
    /// It was never applied; its mapping is gone.
    Removed,
    /// It was never applied; its mapping stays, for the unwinder may know its tables.
    Kept,
}

/// One patch that needed something.
#[derive(Clone, Debug, Serialize)]
pub struct Recovered {
    /// Its name.
    pub patch: String,
    /// What is true of it now.
    pub outcome: Outcome,
}

/// Where a patch's entries lead, and how many of them by a switch stub.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Lead {
    pub(super) to: Entries,
    by_stub: usize,
}

impl Lead {
    /// Reads the entries of `found`. What another of `records` wrote there is not its own, and no damage: a command died
    /// while one patch took the place of another.
    pub(super) fn read<'r, M: ReadMemory + ?Sized>(
        memory: &M,
        found: &Found,
        records: &'r [Found],
    ) -> Result<Self, Refusal> {
        let applied = found.mutable.state == State::Applied;
        let (mut old, mut new, mut by_stub) = (0, 0, 0);
        for e in &found.payload.entries {
            let there = memory.read_vec(e.at, e.jump.0.len() as u64).unwrap_or_default();
            let holds = |bytes: &HexBytes| bytes.0 == there;
            let others = || {
                let entries = |r: &'r Found| r.payload.entries.iter().filter(|o| o.at == e.at).map(move |o| (r, o));
                records.iter().filter(|r| r.region != found.region).flat_map(entries)
            };
            // Another patch was about to take its place: its stubs lead here until its word says otherwise.
            let on_the_way = |(r, o): (&Found, &EntryRecord)| {
                let leads_here = o.before.as_ref() == Some(&e.jump) && o.lead.as_ref().is_some_and(holds);
                leads_here && r.mutable.state != State::Applied
            };
            let of_another = |(_, o): (&Found, &EntryRecord)| holds(&o.jump) || o.lead.as_ref().is_some_and(holds);
            // The entries of a canary are written first, while its share is zero.
            let waits = !applied && found.payload.canary.is_some() && holds(&e.jump);
            if waits || e.by_stub(&there) {
                by_stub += 1;
                *if applied { &mut new } else { &mut old } += 1;
            } else if e.is_given_back() {
                old += usize::from(e.before.as_ref().is_some_and(holds));
            } else if holds(&e.jump) || others().any(on_the_way) {
                new += 1;
            } else if applied && !holds(&e.original) && !others().any(of_another) {
                let what = format!("the entry of {} holds neither its own bytes nor the patch's jump", e.function);
                return Err(Refusal::Damaged { name: found.payload.patch.clone(), at: e.at, what });
            } else {
                old += 1;
            }
        }
        let to = match (old, new) {
            (0, n) if n > 0 => Entries::New,
            (_, 0) => Entries::Old,
            _ => Entries::Mixed,
        };
        Ok(Self { to, by_stub })
    }

    /// Whether the record says the same, and nothing goes through a switch stub.
    pub(super) fn is_finished(self, found: &Found) -> bool {
        self.by_stub == 0
            && match (found.mutable.state, self.to) {
                (State::Applied, Entries::New) | (State::Reverted, Entries::Old) => true,
                // A patch without entries has nothing but its record.
                (State::Applied, Entries::Old) => found.payload.entries.is_empty(),
                _ => false,
            }
    }

    /// Whether it is a mapping that nothing was ever led to.
    fn is_unused(self, found: &Found) -> bool {
        self.by_stub == 0 && self.to == Entries::Old && found.mutable.state == State::Staged
    }
}

impl Patcher {
    /// Finishes or undoes what an interrupted command left; all that is to be done is done.
    ///
    /// # Errors
    ///
    /// A patch is damaged, or threads are inside the code of one that is applied in part.
    pub fn recover(&mut self, options: &Options) -> Result<Vec<Recovered>, Error> {
        let result = self.try_recover(options);
        self.unless_ended(result)
    }

    fn try_recover(&mut self, options: &Options) -> Result<Vec<Recovered>, Error> {
        let _undisturbed = Undisturbed::begin();
        let _lock = self.process.lock()?;
        let records = self.records()?;
        let sequence = records.iter().map(|r| r.mutable.sequence).max().unwrap_or(0) + 1;
        let mut out = Vec::new();
        for found in &records {
            let lead = self.lead(found, &records)?;
            if lead.is_finished(found) {
                continue;
            }
            let patch = found.payload.patch.clone();
            let outcome = self.finish(found.clone(), lead, sequence, options)?;
            out.push(Recovered { patch, outcome });
        }
        Ok(out)
    }

    /// Where the entries of a patch lead: nowhere if the library that had them is unloaded.
    pub(super) fn lead(&self, found: &Found, records: &[Found]) -> Result<Lead, Refusal> {
        if found.mutable.state == State::Applied && !self.is_loaded(found) {
            return Ok(Lead { to: Entries::Old, by_stub: 0 });
        }
        Lead::read(&self.process, found, records)
    }

    /// An interrupted command's work must be finished before another begins.
    pub(super) fn finished(&mut self) -> Result<(), Error> {
        let records = self.records()?;
        for found in &records {
            if found.mutable.state == State::Applied && !self.is_loaded(found) {
                self.record(found, Mutable { state: State::Reverted, ..found.mutable })?;
                continue;
            }
            let lead = self.lead(found, &records)?;
            if !(lead.is_unused(found) || lead.is_finished(found)) {
                return Err(Refusal::Unfinished { name: found.payload.patch.clone() }.into());
            }
        }
        Ok(())
    }

    /// Takes away mappings that an apply made and died before it used them: they may be written in part.
    pub(super) fn remove_unused(&mut self, deadline: Instant) -> Result<(), Error> {
        let records = self.records()?;
        for found in &records {
            let lead = self.lead(found, &records)?;
            if lead.is_unused(found) && found.mutable.unwind == Unwind::None {
                self.no_hook_in(found)?;
                self.unmap(found.region, deadline)?;
                self.maps = self.process.mappings()?;
            }
        }
        Ok(())
    }

    fn unmap(&mut self, region: ProcRange, deadline: Instant) -> Result<(), Error> {
        let call = [RemoteCall::Unmap(region)];
        #[cfg(feature = "agent")]
        if self.by_threads {
            let mut own = crate::process::own::OwnProcess::new(&mut self.process)?;
            own.adopt(region);
            return Ok(own.remote(&call, deadline)?);
        }
        Ok(self.process.remote(&call, deadline)?)
    }

    fn finish(&mut self, found: Found, lead: Lead, sequence: u64, options: &Options) -> Result<Outcome, Error> {
        if lead.by_stub > 0 {
            self.straighten(&found, options)?;
            if found.mutable.state == State::Applied {
                return Ok(Outcome::Applied);
            }
        }
        match (found.mutable.state, lead.to) {
            (State::Staged, Entries::Old) if found.mutable.unwind == Unwind::None => {
                self.no_hook_in(&found)?;
                let deadline = Instant::now() + options.timeout;
                self.process.remote(&[RemoteCall::Unmap(found.region)], deadline)?;
                Ok(Outcome::Removed)
            }
            (State::Staged, Entries::Old) => Ok(Outcome::Kept),
            (_, Entries::New) => {
                self.record(&found, Mutable { state: State::Applied, sequence, ..found.mutable })?;
                Ok(Outcome::Applied)
            }
            (_, Entries::Old) => {
                self.record(&found, Mutable { state: State::Reverted, ..found.mutable })?;
                Ok(Outcome::Reverted)
            }
            (_, Entries::Mixed) => self.undo(found, options),
        }
    }

    /// Points entries that lead to switch stubs to where those lead.
    fn straighten(&mut self, found: &Found, options: &Options) -> Result<(), Error> {
        let applied = found.mutable.state == State::Applied;
        let edit = |e: &EntryRecord| {
            let there = self.process.read_vec(e.at, e.jump.0.len() as u64).ok()?;
            let waits = !applied && found.payload.canary.is_some() && there == e.jump.0;
            (waits || e.by_stub(&there)).then_some(())?;
            let by_lead = e.lead.as_ref().is_some_and(|l| l.0 == there);
            let old = e.before.as_ref().filter(|_| by_lead).unwrap_or(&e.original);
            let new = if applied { &e.jump } else { old };
            let (expected, new) = (*there.first_chunk()?, *new.0.first_chunk()?);
            Some(CodeEdit { function: e.function.clone(), at: e.at, expected, new })
        };
        let edits: Vec<CodeEdit> = found.payload.entries.iter().filter_map(edit).collect();
        let watched = Applied::new(found.clone())?.windows_and_stubs();
        let place = Place::new(&self.process, &self.images, &self.maps, &found.payload.patch);
        let mut retry = Retry::new(Instant::now() + options.timeout, options.hold);
        place.rewrite(&mut self.process, &edits, watched, &mut retry)?;
        Ok(())
    }

    fn record(&mut self, found: &Found, mutable: Mutable) -> Result<(), Error> {
        self.process.adopt(found.region);
        let at = crate::addr::ProcAddr(found.region.start.0 + MUTABLE_AT);
        Ok(self.process.write_own(at, &encode_mutable(&mutable))?)
    }

    /// Takes back the entries that lead into the patch, in one hold.
    fn undo(&mut self, found: Found, options: &Options) -> Result<Outcome, Error> {
        let patch = found.payload.patch.clone();
        let mut applied = Applied::new(found)?;
        applied.keep_written(&self.process);
        let place = Place::new(&self.process, &self.images, &self.maps, &patch);
        let mut retry = Retry::new(Instant::now() + options.timeout, options.hold);
        place.revert(&mut self.process, applied, &options.consistency, &mut retry)?;
        Ok(Outcome::Reverted)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::addr::{ProcAddr, ProcRange};
    use crate::process::fake::FakeProcess;
    use crate::process::Access;
    use crate::registry::{Confirmation, Payload, Share};

    const AT: u64 = 0x1000;

    /// A patch at `region` with entries at `AT` and 16 bytes on, whose jumps are full of `jump`.
    fn record(region: u64, state: State, jump: u8) -> Found {
        let entry = |at| EntryRecord {
            function: "f".into(),
            at: ProcAddr(at),
            original: HexBytes(vec![1; 5]),
            jump: HexBytes(vec![jump; 5]),
            lead: Some(HexBytes(vec![jump + 1; 5])),
            before: None,
            back: None,
        };
        let region = ProcRange::new(ProcAddr(region), 0x1000).unwrap();
        let payload = Payload {
            patch: "p".into(),
            digest: HexBytes(Vec::new()),
            build_id: HexBytes(Vec::new()),
            base: region.end,
            stub: region.end,
            eh_frame: None,
            record_bytes: 0,
            beside: false,
            revision: None,
            canary: None,
            hooks: Vec::new(),
            entries: vec![entry(AT), entry(AT + 16)],
            functions: Vec::new(),
        };
        let mutable = Mutable {
            state,
            unwind: Unwind::None,
            sequence: 0,
            applied_at_s: 0,
            pause_ns: 0,
            confirmation: Confirmation::default(),
            share: Share::default(),
        };
        Found { region, mutable, payload }
    }

    fn lead(there: [u8; 2], found: &Found, records: &[Found]) -> Result<(Entries, bool), Refusal> {
        let mut p = FakeProcess::default();
        let code = [[there[0]; 16], [there[1]; 16]].concat();
        p.insert(ProcAddr(AT), code, Access::Execute);
        Lead::read(&p, found, records).map(|l| (l.to, l.is_finished(found)))
    }

    #[test]
    fn entries_tell_what_is_true() {
        let applied = record(0x9000, State::Applied, 7);
        let staged = record(0x9000, State::Staged, 7);
        assert_eq!(lead([7, 7], &applied, &[]), Ok((Entries::New, true)));
        assert_eq!(lead([7, 8], &applied, &[]), Ok((Entries::New, false)), "a stub leads to the new code");
        assert_eq!(lead([1, 8], &staged, &[]), Ok((Entries::Old, false)), "and to the old one");
        assert_eq!(lead([7, 1], &applied, &[]), Ok((Entries::Mixed, false)));
        assert_eq!(lead([1, 1], &record(0x9000, State::Reverted, 7), &[]), Ok((Entries::Old, true)));
        assert!(lead([7, 0xcc], &applied, &[]).is_err(), "something else wrote there");
    }

    #[test]
    fn a_jump_of_the_patch_that_takes_the_place_is_no_damage() {
        let below = record(0x9000, State::Applied, 7);
        let above = record(0xa000, State::Staged, 20);
        let both = [above.clone(), below.clone()];
        assert_eq!(lead([20, 7], &below, &both), Ok((Entries::Mixed, false)));
        assert_eq!(lead([20, 20], &below, &both), Ok((Entries::Old, false)));
        assert_eq!(lead([20, 7], &above, &both), Ok((Entries::Mixed, false)));
    }

    #[test]
    fn stubs_of_a_patch_on_its_way_lead_to_the_one_below() {
        let below = record(0x9000, State::Applied, 7);
        // It takes the first entry, and gives the second one back.
        let mut above = record(0xa000, State::Staged, 20);
        above.payload.entries.iter_mut().for_each(|e| e.before = Some(HexBytes(vec![7; 5])));
        above.payload.entries[0].back = Some(HexBytes(vec![30; 5]));
        above.payload.entries[1].jump = HexBytes(vec![1; 5]);
        let mut both = [above, below.clone()];
        assert_eq!(lead([21, 7], &below, &both), Ok((Entries::New, true)));
        assert_eq!(lead([21, 21], &below, &both), Ok((Entries::New, true)));
        assert_eq!(lead([21, 7], &both[0], &both), Ok((Entries::Old, false)));
        assert_eq!(lead([7, 7], &both[0], &both), Ok((Entries::Old, false)), "nothing done yet");
        both[0].mutable.state = State::Applied;
        assert_eq!(lead([21, 21], &below, &both), Ok((Entries::Old, false)), "its record comes second");
        assert_eq!(lead([21, 21], &both[0], &both), Ok((Entries::New, false)));
        assert_eq!(lead([20, 1], &both[0], &both), Ok((Entries::New, true)));
        assert_eq!(lead([30, 1], &both[0], &both), Ok((Entries::New, false)), "on its way back");
    }
}
