//! A patch that is applied, and its way back.

use super::record::{stubs, watch_new, watch_old, windows, THUNK_AT};
use super::{hold_and_swap, straight, swap, RecordEdit, TransactionError};
use crate::addr::ProcAddr;
use crate::insn;
use crate::maps::PAGE;
use crate::memory::ReadMemory;
use crate::plan::beside::Consistency;
use crate::plan::sites::Trap;
use crate::plan::{CodeEdit, Refusal};
use crate::process::{HoldLimits, HoldTimes, Process, StackCheck};
use crate::registry::{encode_mutable, EntryRecord, Found, Payload};
use crate::stack::Watched;

/// An applied patch, about to be reverted.
pub struct Applied {
    found: Found,
    pub(super) edits: Vec<CodeEdit>,
    /// From the jumps back to the switch stubs.
    leads: Vec<CodeEdit>,
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
        let own = || found.payload.entries.iter().filter(|e| !e.is_given_back());
        let edits = own().map(edit).collect::<Option<_>>();
        let damaged = || Refusal::Damaged {
            name: found.payload.patch.clone(),
            at: found.region.start,
            what: "its entries are not those of a patch".into(),
        };
        let edits: Vec<CodeEdit> = edits.ok_or_else(damaged)?;
        let lead = |(edit, e): (&CodeEdit, &EntryRecord)| {
            let new = e.back.as_ref().or(e.lead.as_ref())?.0.first_chunk().copied()?;
            Some(CodeEdit { new, ..edit.clone() })
        };
        let leads: Option<Vec<CodeEdit>> = edits.iter().zip(own()).map(lead).collect();
        Ok(Self { found, edits, leads: leads.unwrap_or_default() })
    }

    /// The whole of what was found.
    #[must_use]
    pub fn found(&self) -> &Found {
        &self.found
    }

    /// Its record.
    #[must_use]
    pub fn payload(&self) -> &Payload {
        &self.found.payload
    }

    /// Whether it may be reverted with this consistency.
    ///
    /// # Errors
    ///
    /// Old and new code do not agree, or the patch replaces no function of that name.
    pub fn may_revert(&self, consistency: &Consistency) -> Result<(), Refusal> {
        let why = match consistency {
            Consistency::Stack => return Ok(()),
            _ if !self.found.payload.beside => "old and new code do not agree on all that they share".into(),
            Consistency::Entry => return Ok(()),
            Consistency::StackBut(names) => {
                let known = |n: &&String| !self.found.payload.functions.iter().any(|f| f.demangled == **n);
                let Some(name) = names.iter().find(known) else { return Ok(()) };
                format!("the patch replaces no function {name}")
            }
        };
        Err(Refusal::Beside { why })
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

    /// The jumps back to the switch stubs; empty if the entries are written in one hold. To be written with [`rewrite`](super::rewrite) before
    /// [`revert`](Self::revert).
    #[must_use]
    pub fn leads(&self) -> &[CodeEdit] {
        &self.leads
    }

    /// From the switch stubs to the original bytes.
    #[must_use]
    pub fn rest(&self) -> Vec<CodeEdit> {
        straight(&self.leads, &self.edits)
    }

    /// What no thread may be in while entries are rewritten without a switch.
    #[must_use]
    pub fn windows(&self) -> Vec<Watched> {
        windows(&self.found.payload).collect()
    }

    /// The same, with the switch stubs: for when they are to go.
    #[must_use]
    pub fn windows_and_stubs(&self) -> Vec<Watched> {
        windows(&self.found.payload).chain(stubs(&self.found.payload)).collect()
    }

    /// The edits that put the original bytes back, for a patch that they change nothing for: a canary whose share is zero. They are to be
    /// written before the revert, which then writes its record only.
    #[must_use]
    pub fn give_back(&mut self) -> Vec<CodeEdit> {
        self.leads.clear();
        std::mem::take(&mut self.edits)
    }

    /// The traps that revert it from inside; `None` if it has no stubs for them.
    #[must_use]
    pub fn traps<M: ReadMemory + ?Sized>(&self, memory: &M) -> Option<Vec<Trap>> {
        let trap = |(edit, lead): (&CodeEdit, &CodeEdit)| {
            let stub = insn::jump_target(edit.at, lead.new)?;
            let code = memory.read_vec(stub, insn::STUB_BYTES).ok()?;
            let to = insn::second_way(stub, &code)?;
            let from = insn::jump_target(edit.at, edit.expected)?;
            let CodeEdit { function, at, expected, new } = edit.clone();
            Some(Trap { function, at, before: expected, after: new, from, to })
        };
        if self.found.payload.canary.is_some() {
            let trap = |edit: &CodeEdit| {
                let from = insn::jump_target(edit.at, edit.expected)?;
                let to = insn::canary_old_way(from, &memory.read_vec(from, insn::CANARY_BYTES).ok()?)?;
                let CodeEdit { function, at, expected, new } = edit.clone();
                Some(Trap { function, at, before: expected, after: new, from, to })
            };
            return self.edits.iter().map(trap).collect();
        }
        let all: Vec<Trap> = self.edits.iter().zip(&self.leads).filter_map(trap).collect();
        (all.len() == self.edits.len()).then_some(all)
    }

    /// The trap that reverts a patch of one entry that has no stub: the overwritten instructions are moved to a place in its mapping that is free.
    ///
    /// # Errors
    ///
    /// They can't be moved, or not be written.
    pub fn trap_of_one<P: Process>(&self, process: &mut P) -> Result<Option<Vec<Trap>>, TransactionError> {
        let [edit] = &self.edits[..] else { return Ok(None) };
        let Some(from) = insn::jump_target(edit.at, edit.expected) else { return Ok(None) };
        let Some(to) = self.found.payload.stub.checked_add(THUNK_AT) else { return Ok(None) };
        let behind = ProcAddr(edit.at.0 + edit.new.len() as u64);
        let mut code = edit.new.to_vec();
        let to_page = PAGE - behind.0 % PAGE;
        let more = (insn::OVERWRITTEN as u64 - code.len() as u64).min(to_page);
        code.extend(process.read_vec(behind, more).unwrap_or_default());
        let thunk = insn::original_thunk(to, edit.at, &code)
            .map_err(|e| Refusal::EntryImmovable { function: edit.function.clone(), why: e.to_string() })?;
        process.adopt(self.found.region);
        process.write_own(to, &thunk)?;
        let CodeEdit { function, at, expected, new } = edit.clone();
        Ok(Some(vec![Trap { function, at, before: expected, after: new, from, to }]))
    }

    /// What no thread may be in for the revert to be taken back.
    #[must_use]
    pub fn watched_old(&self) -> Vec<Watched> {
        watch_old(&self.found.payload)
    }

    /// Writes the record of a patch that no entry leads to any more.
    ///
    /// # Errors
    ///
    /// It could not be written; `recover` makes it agree with the entries.
    pub fn switched<P: Process>(self, process: &mut P) -> Result<Reverted, TransactionError> {
        let edit = RecordEdit::reverted(&self.found);
        process.adopt(self.found.region);
        process.write_own(edit.at, &encode_mutable(&edit.after))?;
        Ok(Reverted { times: HoldTimes::default(), entries: self.found.payload.jumps() })
    }

    /// Leaves out the entries that do not lead into the patch, and gives up the switch stubs: a command died between
    /// two entries, so that no word tells where they lead. What is left is written back in one hold.
    pub fn keep_written<M: ReadMemory + ?Sized>(&mut self, memory: &M) {
        self.edits.retain(|e| memory.read_vec(e.at, e.expected.len() as u64).is_ok_and(|there| there == e.expected));
        self.leads.clear();
    }

    /// Whether every entry still holds the patch's jump.
    ///
    /// # Errors
    ///
    /// The first one that does not.
    pub fn check_entries<M: ReadMemory + ?Sized>(&self, memory: &M) -> Result<(), Refusal> {
        swap::check(memory, &self.edits).map_err(|e| e.refusal(&self.found.payload.patch))
    }

    /// Holds, checks, writes the original bytes back and lets go. The mapping stays. With switch stubs it writes the one word that
    /// they follow; the original bytes are then to be written by [`rest`](Self::rest).
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
        let edits = if self.leads.is_empty() { &*self.edits } else { &[] };
        match hold_and_swap(process, limits, check, edits, &[record]) {
            Ok(times) => Ok(Reverted { times, entries: self.found.payload.jumps() }),
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
