//! What an interrupted command left, and how it is finished or undone.
//!
//! The entries tell the truth, for they are what threads run; a record that contradicts them is put right. A mapping that
//! no entry leads to and that was never applied is taken away, unless the unwinder may know its tables.

use std::time::Instant;

use serde::Serialize;

use super::rewrite::Place;
use super::{signal_returns, Error, Options, Patcher, Retry};
use crate::memory::ReadMemory;
use crate::plan::{CodeEdit, Refusal};
use crate::process::ptrace::Undisturbed;
use crate::process::{Process, RemoteCall};
use crate::quiesce::{Checker, StackMap};
use crate::registry::{encode_mutable, Found, Mutable, State, Unwind, MUTABLE_AT};
use crate::stack::WatchList;
use crate::transaction::{undone, Applied};

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

/// Where a patch's entries lead.
pub(super) fn entries<M: ReadMemory + ?Sized>(memory: &M, found: &Found) -> Result<Entries, Refusal> {
    let (mut old, mut new) = (0, 0);
    for e in &found.payload.entries {
        let there = memory.read_vec(e.at, e.jump.0.len() as u64).unwrap_or_default();
        let led = e.lead.as_ref().is_some_and(|l| there == l.0);
        if led && found.mutable.state == State::Applied || there == e.jump.0 {
            new += 1;
        } else if led {
            old += 1;
        } else if found.mutable.state == State::Applied && there != e.original.0 {
            let what = format!("the entry of {} holds neither its own bytes nor the patch's jump", e.function);
            return Err(Refusal::Damaged { name: found.payload.patch.clone(), at: e.at, what });
        } else {
            old += 1;
        }
    }
    Ok(match (old, new) {
        (0, n) if n > 0 => Entries::New,
        (_, 0) => Entries::Old,
        _ => Entries::Mixed,
    })
}

/// The entries that lead to a switch stub.
fn led<M: ReadMemory + ?Sized>(memory: &M, found: &Found) -> usize {
    let leads = found.payload.entries.iter().filter_map(|e| Some((e.at, &e.lead.as_ref()?.0)));
    leads.filter(|(at, lead)| memory.read_vec(*at, lead.len() as u64).is_ok_and(|there| there == **lead)).count()
}

/// Whether record and entries agree, and nothing goes through a switch stub.
pub(super) fn is_finished<M: ReadMemory + ?Sized>(memory: &M, found: &Found, entries: Entries) -> bool {
    if led(memory, found) > 0 {
        return false;
    }
    match (found.mutable.state, entries) {
        (State::Applied, Entries::New) | (State::Reverted, Entries::Old) => true,
        // A patch without entries has nothing but its record.
        (State::Applied, Entries::Old) => found.payload.entries.is_empty(),
        _ => false,
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
        for found in records {
            let lead = entries(&self.process, &found)?;
            if is_finished(&self.process, &found, lead) {
                continue;
            }
            let patch = found.payload.patch.clone();
            let outcome = self.finish(found, lead, sequence, options)?;
            out.push(Recovered { patch, outcome });
        }
        Ok(out)
    }

    /// An interrupted command's work must be finished before another begins.
    pub(super) fn finished(&mut self) -> Result<(), Error> {
        for found in self.records()? {
            let lead = entries(&self.process, &found)?;
            let unused =
                found.mutable.state == State::Staged && lead == Entries::Old && led(&self.process, &found) == 0;
            if !(unused || is_finished(&self.process, &found, lead)) {
                return Err(Refusal::Unfinished { name: found.payload.patch }.into());
            }
        }
        Ok(())
    }

    /// Takes away mappings that an apply made and died before it used them: they may be written in part.
    pub(super) fn remove_unused(&mut self, deadline: Instant) -> Result<(), Error> {
        for found in self.records()? {
            let mutable = found.mutable;
            if mutable.state == State::Staged && mutable.unwind == Unwind::None && led(&self.process, &found) == 0 {
                self.process.remote(&[RemoteCall::Unmap(found.region)], deadline)?;
                self.maps = self.process.mappings()?;
            }
        }
        Ok(())
    }

    fn finish(&mut self, found: Found, lead: Entries, sequence: u64, options: &Options) -> Result<Outcome, Error> {
        if led(&self.process, &found) > 0 {
            self.straighten(&found, options)?;
            if found.mutable.state == State::Applied {
                return Ok(Outcome::Applied);
            }
        }
        match (found.mutable.state, lead) {
            (State::Staged, Entries::Old) if found.mutable.unwind == Unwind::None => {
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
        let applied = Applied::new(found.clone())?;
        let leads = applied.leads();
        // From the stubs to the jumps, or to the original bytes.
        let edits: Vec<CodeEdit> = if found.mutable.state == State::Applied {
            undone(&self.process, leads)
        } else {
            let rest = applied.rest();
            let there =
                |e: &CodeEdit| self.process.read_vec(e.at, e.expected.len() as u64).is_ok_and(|b| b == e.expected);
            rest.into_iter().filter(there).collect()
        };
        let place = Place { images: &self.images, maps: &self.maps, patch: &found.payload.patch };
        let mut retry = Retry::new(Instant::now() + options.timeout, options.hold);
        place.rewrite(&mut self.process, &edits, applied.windows_and_stubs(), &mut retry)?;
        Ok(())
    }

    fn record(&mut self, found: &Found, mutable: Mutable) -> Result<(), Error> {
        self.process.adopt(found.region);
        let at = crate::addr::ProcAddr(found.region.start.0 + MUTABLE_AT);
        Ok(self.process.write_own(at, &encode_mutable(&mutable))?)
    }

    /// Takes back the entries that lead into the patch.
    fn undo(&mut self, found: Found, options: &Options) -> Result<Outcome, Error> {
        let (pid, patch) = (self.process.pid(), found.payload.patch.clone());
        let mut applied = Applied::new(found)?;
        applied.keep_written(&self.process);
        let mut watched = applied.watched();
        watched.extend(signal_returns(&self.process, &self.images, &self.maps));
        let watch = WatchList::new(watched);
        let mut retry = Retry::new(Instant::now() + options.timeout, options.hold);
        loop {
            let stacks = StackMap::new(&self.process.mappings()?);
            if retry.wants_tables {
                retry.load_tables(&self.process, &self.images)?;
            }
            let mut checker = Checker::new(&watch, &stacks, retry.cfi.as_ref());
            match applied.revert(&mut self.process, retry.limits(), &mut checker) {
                Ok(_) => return Ok(Outcome::Reverted),
                Err(failed) => {
                    let (back, error) = *failed;
                    applied = back;
                    retry.again(error, checker.into_blocked(), &self.process, &self.images, pid, &patch)?;
                }
            }
        }
    }
}
