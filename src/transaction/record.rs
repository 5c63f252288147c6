//! The record of a patch at its place, and the code that it means no thread to be in.

use crate::addr::{LoadBias, ProcRange};
use crate::maps::PAGE;
use crate::patch::{HexBytes, Hook, PatchFile};
use crate::plan::beside::Consistency;
use crate::plan::sites::{Jump, Site, Written};
use crate::plan::{Layout, OldFacts};
use crate::registry::{EntryRecord, FunctionRecord, HookRecord, OldRecord, Payload, RangeRecord};
use crate::stack::{Part, Watched};

fn range_record(bias: LoadBias, at: crate::addr::ImageAddr, len_bytes: u64) -> Option<RangeRecord> {
    ProcRange::new(bias.to_process(at)?, len_bytes).map(Into::into)
}

/// What a record says of a patch at its place; the entries come later.
pub(super) fn payload(patch: &PatchFile, layout: &Layout, bias: LoadBias, facts: &[OldFacts]) -> Option<Payload> {
    let manifest = &patch.manifest;
    let mut functions = Vec::with_capacity(manifest.functions.len());
    for (i, f) in manifest.functions.iter().enumerate() {
        let old = match &f.old {
            None => None,
            Some(old) => Some(OldRecord {
                body: range_record(bias, old.at, old.size)?,
                branches_to_entry: facts.get(i).is_none_or(|f| f.branches_to_entry),
                companions: old.companions.iter().map(|c| range_record(bias, c.at, c.size)).collect::<Option<_>>()?,
            }),
        };
        functions.push(FunctionRecord {
            name: f.name.clone(),
            demangled: f.demangled.clone(),
            new: ProcRange::new(layout.base.checked_add(f.new_at)?, f.new_size)?.into(),
            old,
        });
    }
    let eh_frame = match patch.eh_frame {
        None => None,
        Some((at, len_bytes)) => Some(ProcRange::new(layout.base.checked_add(at)?, len_bytes)?.into()),
    };
    let hook =
        |h: &Hook| Some(HookRecord { symbol: h.symbol.clone(), kind: h.kind, at: layout.base.checked_add(h.at)? });
    Some(Payload {
        hooks: manifest.hooks.iter().map(hook).collect::<Option<_>>()?,
        patch: manifest.name.clone(),
        digest: HexBytes(patch.digest.to_vec()),
        build_id: manifest.target.build_id.clone(),
        base: layout.base,
        stub: layout.stub,
        eh_frame,
        record_bytes: layout.stub.offset_from(layout.region.start)?,
        beside: crate::plan::beside::agree(patch).is_ok(),
        revision: None,
        canary: None,
        entries: Vec::new(),
        functions,
    })
}

/// With the entries.
pub(super) fn with_entries(mut payload: Payload, sites: &[Site], written: &[Written]) -> Payload {
    let hex = |j: Jump| HexBytes(j.to_vec());
    payload.entries = sites
        .iter()
        .zip(written)
        .map(|(s, w)| EntryRecord {
            function: s.function.clone(),
            at: s.at,
            original: hex(s.original),
            jump: hex(w.jump),
            lead: w.lead.map(hex),
            before: (s.before != s.original).then(|| hex(s.before)),
            back: w.back.map(hex),
        })
        .collect();
    payload
}

pub(super) fn windows(payload: &Payload) -> impl Iterator<Item = Watched> + '_ {
    payload.entries.iter().filter_map(|e| {
        let start = e.at.checked_add(1)?;
        let range = ProcRange::new(start, e.original.0.len() as u64 - 1)?;
        Some(Watched { name: e.function.clone(), range, part: Part::Window })
    })
}

/// Where in the page of the call stub the overwritten instructions of a single entry are moved to, if it has no switch stub.
pub(super) const THUNK_AT: u64 = PAGE / 2;

/// The switch stubs: a thread in one is on its way, and nobody knows which.
pub(super) fn stubs(payload: &Payload) -> Option<Watched> {
    let range = ProcRange { start: payload.stub.checked_add(THUNK_AT)?, end: payload.base };
    (range.start < range.end).then_some(())?;
    Some(Watched { name: Watched::STUBS.into(), range, part: Part::Companion })
}

/// Old bodies, their companions, all entry windows and switch stubs.
pub(super) fn watch_old(payload: &Payload) -> Vec<Watched> {
    let mut out: Vec<Watched> = windows(payload).chain(stubs(payload)).collect();
    for f in &payload.functions {
        let Some(old) = &f.old else { continue };
        let part = Part::Body { branches_to_entry: old.branches_to_entry };
        let ranges = std::iter::once((old.body, part)).chain(old.companions.iter().map(|c| (*c, Part::Companion)));
        let name = &f.demangled;
        out.extend(ranges.filter_map(|(r, part)| Some(Watched { name: name.clone(), range: r.range()?, part })));
    }
    out
}

/// Old bodies that branch back to their entry.
pub(super) fn watch_loops(payload: &Payload) -> Vec<Watched> {
    let loops = payload.functions.iter().filter_map(|f| Some((f, f.old.as_ref().filter(|o| o.branches_to_entry)?)));
    let part = Part::Body { branches_to_entry: true };
    loops.filter_map(|(f, o)| Some(Watched { name: f.demangled.clone(), range: o.body.range()?, part })).collect()
}

/// New functions, any place of which may be in the middle of a call, all entry windows and switch stubs.
pub(super) fn watch_new(payload: &Payload) -> Vec<Watched> {
    let part = Part::Body { branches_to_entry: true };
    let new = payload
        .functions
        .iter()
        .filter_map(|f| Some(Watched { name: f.demangled.clone(), range: f.new.range()?, part }));
    new.chain(windows(payload)).chain(stubs(payload)).collect()
}

/// Leaves out of `watched` the bodies that threads may be inside of.
#[must_use]
pub fn relax(consistency: &Consistency, mut watched: Vec<Watched>) -> Vec<Watched> {
    let body = |w: &Watched| matches!(w.part, Part::Body { .. } | Part::Companion) && !w.is_stub();
    watched.retain(|w| !(body(w) && consistency.leaves(&w.name)));
    watched
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::addr::ProcAddr;

    fn watched(name: &str, part: Part) -> Watched {
        Watched { name: name.into(), range: ProcRange { start: ProcAddr(1), end: ProcAddr(2) }, part }
    }

    #[test]
    fn what_is_written_stays_watched() {
        let body = Part::Body { branches_to_entry: false };
        let all = vec![
            watched("f", body),
            watched("f", Part::Companion),
            watched("f", Part::Window),
            watched("g", body),
            watched(Watched::STUBS, Part::Companion),
        ];
        let left = |c: Consistency| relax(&c, all.clone()).len();
        assert_eq!(left(Consistency::Stack), 5);
        assert_eq!(left(Consistency::StackBut(vec!["f".into()])), 3);
        assert_eq!(left(Consistency::Entry), 2);
    }
}
