//! What to map and to write, before anything has happened.

use std::time::Instant;

use super::record::{payload, watch_new, watch_old, with_entries};
use super::{Applied, Staged, TransactionError, FRESH};
use crate::addr::{ProcAddr, ProcRange};
use crate::maps::Mapping;
use crate::patch::{in_chain, PatchFile};
use crate::plan::sites::{self, Site, Switch, Trap};
use crate::plan::{self, CodeEdit, Layout, Links, OldFacts, Piece, Refusal};
use crate::process::Process;
use crate::registry::{encode, Found, Mutable, Payload};
use crate::stack::Watched;

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
    pub(super) layout: Layout,
    pub(super) pieces: Vec<Piece>,
    pub(super) edits: Vec<CodeEdit>,
    /// The jumps to the switch stubs, if one word switches several entries.
    pub(super) leads: Vec<CodeEdit>,
    /// The traps of a switch from inside; empty without stubs.
    pub(super) traps: Vec<Trap>,
    pub(super) payload: Payload,
    /// The record of an earlier apply whose mapping is used again.
    earlier: Option<Mutable>,
    /// The applied patch whose place it takes.
    pub(super) replaces: Option<Replaced>,
}

/// An applied patch whose place another takes by the same switch.
#[derive(Clone, Debug)]
pub struct Replaced {
    /// Its record.
    pub found: Found,
    /// Address zero of it, and of those whose places it and they took in turn.
    pub chain: Vec<ProcAddr>,
    /// The code at each of its entries and of the new patch's redirects, as it is with no patch applied: as far as a jump may reach
    /// into it.
    pub code: Vec<(ProcAddr, Vec<u8>)>,
}

impl Replaced {
    /// The places that the new patch changes: its own `entries`, its redirects, and what it gives back.
    fn sites(&self, patch: &PatchFile, mut entries: Vec<Site>) -> Option<Vec<Site>> {
        let applied = Applied::new(self.found.clone()).ok()?.edits;
        let jump = |at| applied.iter().find(|e| e.at == at);
        let code = |at| self.code.iter().find(|(a, _)| *a == at).map(|(_, code)| code.clone());
        for entry in &mut entries {
            entry.before = jump(entry.at).map_or(entry.before, |j| j.expected);
        }
        for r in &patch.manifest.redirects {
            let (back, offset) = in_chain(r.at);
            let at = self.chain.get(back)?.checked_add(offset)?;
            let code = code(at)?;
            let original = code.first_chunk().copied()?;
            let before = jump(at).map_or(original, |j| j.expected);
            entries.push(Site {
                function: r.name.clone(),
                at,
                original,
                code,
                before,
                new_at: Some(r.new_at),
                looping: None,
            });
        }
        for given in &applied {
            if entries.iter().all(|s| s.at != given.at) {
                let (function, before) = (given.function.clone(), given.expected);
                let code = code(given.at)?;
                let original = given.new;
                entries.push(Site { function, at: given.at, original, code, before, new_at: None, looping: None });
            }
        }
        Some(entries)
    }
}

/// The places that a patch changes.
fn sites(
    patch: &PatchFile,
    links: &Links,
    facts: &[OldFacts],
    replaces: Option<&Replaced>,
) -> Result<Vec<Site>, Refusal> {
    let entries = sites::entries(patch, links.bias, facts)?;
    let Some(replaced) = replaces else { return Ok(entries) };
    replaced.sites(patch, entries).ok_or_else(|| Refusal::Damaged {
        name: replaced.found.payload.patch.clone(),
        at: replaced.found.region.start,
        what: "its entries are not those of a patch".into(),
    })
}

impl Planned {
    /// A new mapping near the image. `facts` tells for each function what its old body is like.
    ///
    /// # Errors
    ///
    /// No room, or something does not reach its target.
    pub fn new(
        patch: &PatchFile,
        target: &Target,
        maps: &[Mapping],
        facts: &[OldFacts],
        replaces: Option<Replaced>,
        how: Switch<'_>,
    ) -> Result<Self, Refusal> {
        let sites = sites(patch, &target.links, facts, replaces.as_ref())?;
        let stubs = sites::stub_bytes(&sites, how);
        // An address is longest at the top of the address space: so the record can only get shorter.
        let far = || Refusal::OutOfReach { at: target.range.start, to: target.range.end };
        let dummy = Layout::at(ProcAddr(0x7000_0000_0000), 0, stubs, patch).ok_or_else(far)?;
        let draft = payload(patch, &dummy, target.links.bias, facts).ok_or_else(far)?;
        let canary = if let Switch::Canary(canary) = how { Some(canary.clone()) } else { None };
        let draft = Payload { canary, ..draft };
        let draft = with_entries(draft, &sites, &sites::draft(&sites, how));
        let slack = 64;
        let record_bytes = encode(&draft, &FRESH, u64::MAX).len() as u64 + slack;
        let layout = Layout::near(target.range, maps, record_bytes, stubs, patch)?;
        Self::at(patch, &target.links, layout, (&sites, how), facts, None, replaces)
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
        facts: &[OldFacts],
        replaces: Option<Replaced>,
    ) -> Result<Self, Refusal> {
        let sites = sites(patch, links, facts, replaces.as_ref())?;
        let stubs = found.payload.entries.iter().any(|e| e.lead.is_some());
        let word = if stubs { Switch::Threads } else { Switch::All };
        let how = found.payload.canary.as_ref().map_or(word, Switch::Canary);
        let stubs = sites::stub_bytes(&sites, how);
        let layout = Layout::at(found.region.start, found.payload.record_bytes, stubs, patch);
        let planned = layout.map(|l| Self::at(patch, links, l, (&sites, how), facts, Some(found.mutable), replaces));
        let planned = planned.transpose()?;
        // A signature may have been looked at then and not now, or now and not then.
        let revision = found.payload.revision;
        let planned = planned.map(|p| Self { payload: Payload { revision, ..p.payload }, ..p });
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
        (sites, how): (&[Site], Switch<'_>),
        facts: &[OldFacts],
        earlier: Option<Mutable>,
        replaces: Option<Replaced>,
    ) -> Result<Self, Refusal> {
        let (written, stubs) = sites::switch(sites, &layout, layout.region.start, how)?;
        let pieces = plan::pieces(patch, &layout, links, &stubs)?;
        let far = || Refusal::OutOfReach { at: layout.region.start, to: layout.region.end };
        let mut payload = with_entries(payload(patch, &layout, links.bias, facts).ok_or_else(far)?, sites, &written);
        if let Switch::Canary(canary) = how {
            payload.canary = Some(canary.clone());
        }
        let record_bytes = encode(&payload, &FRESH, u64::MAX).len() as u64;
        if record_bytes > payload.record_bytes {
            return Err(Refusal::NoRoom { len_bytes: record_bytes });
        }
        let edits = sites::edits(sites, &written, |w| Some(w.jump));
        // The stubs of a canary change nothing while its share is zero, and stay.
        let leads = match how {
            Switch::All | Switch::Threads => sites::edits(sites, &written, |w| w.lead),
            Switch::Canary(_) => edits.clone(),
        };
        let traps = sites::traps(sites, &written).unwrap_or_default();
        Ok(Self { layout, pieces, edits, leads, traps, payload, earlier, replaces })
    }

    /// With the revision that its signature gives; a mapping of an earlier apply keeps the one of then.
    #[must_use]
    pub fn of_revision(mut self, revision: Option<u64>) -> Self {
        if self.earlier.is_none() {
            self.payload.revision = revision;
        }
        self
    }

    /// How many entry jumps it will write.
    #[must_use]
    pub fn entries(&self) -> usize {
        self.payload.jumps()
    }

    /// The code that no thread may be in when the patch is applied.
    #[must_use]
    pub fn watched(&self) -> Vec<Watched> {
        let mut out = watch_old(&self.payload);
        out.extend(self.replaces.iter().flat_map(|r| watch_new(&r.found.payload)));
        out
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
        let mut staged = Staged { process, planned: self, mutable, fresh, mapped: false, led: false };
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
