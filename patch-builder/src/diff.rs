//! Which functions changed, and what is only noise.

use std::collections::{BTreeMap, BTreeSet, HashSet};

use rayon::prelude::*;

use crate::build::{FuncId, Lines};
use crate::compare::{Comparer, LineProof, Noise};
use crate::lift::Target;
use crate::pairing::Pairing;
use crate::side::Side;

/// What differs between two builds.
pub struct Diff {
    /// Old functions whose new version differs, with the first difference in words.
    pub changed: BTreeMap<FuncId, String>,
    /// Functions that differ by noise alone, by old id.
    pub noise: BTreeMap<FuncId, Vec<Noise>>,
    /// Lines of what changed.
    pub lines: (Lines, Lines),
}

/// How to compare.
#[derive(Clone, Copy, Debug, Default)]
pub struct DiffOptions {
    /// Count a moved line as a change.
    pub strict_locations: bool,
}

type Verdicts = Vec<(FuncId, Result<Vec<Noise>, String>)>;

/// What comparing needs besides the functions.
#[derive(Clone, Copy)]
struct Frame<'a, 'd> {
    old: &'a Side<'d>,
    new: &'a Side<'d>,
    pairing: &'a Pairing,
    proof: LineProof<'a>,
}

impl Frame<'_, '_> {
    /// One pass over `which`; what was found to differ among unnamed data is added to `doubtful`.
    fn pass(self, which: &[FuncId], doubtful: &mut HashSet<u64>) -> Verdicts {
        let known: &HashSet<u64> = doubtful;
        let found: Vec<_> = which
            .par_iter()
            .map_init(
                || Comparer::new(self.old, self.new, self.pairing, self.proof).doubting(known),
                |comparer, f| {
                    let verdict = match self.pairing.func_pair(*f) {
                        Some(g) => comparer.functions(*f, g),
                        None => Ok(Vec::new()),
                    };
                    (*f, verdict, std::mem::take(&mut comparer.unequal))
                },
            )
            .collect();
        let mut out = Vec::with_capacity(found.len());
        for (f, verdict, unequal) in found {
            doubtful.extend(unequal);
            if verdict.is_err() {
                // Whatever else it refers to was perhaps not looked at.
                let refs = self.old.lifted[f as usize].refs.iter();
                doubtful.extend(refs.filter_map(|r| match r.target {
                    Target::Data(at) => Some(at),
                    _ => None,
                }));
            }
            out.push((f, verdict));
        }
        out
    }

    /// The unnamed data of old functions without a partner: nobody compares it.
    fn of_unpaired(self) -> impl Iterator<Item = u64> {
        let unpaired =
            self.old.lifted.iter().enumerate().filter(move |(f, _)| self.pairing.func_pair(*f as FuncId).is_none());
        let data: Vec<u64> = unpaired
            .flat_map(|(_, lifted)| &lifted.refs)
            .filter_map(|r| match r.target {
                Target::Data(at) => Some(at),
                _ => None,
            })
            .collect();
        data.into_iter()
    }

    /// Passes until nothing more is doubted.
    fn compare(self, which: &[FuncId], doubtful: &mut HashSet<u64>) -> Verdicts {
        doubtful.extend(self.of_unpaired());
        loop {
            let before = doubtful.len();
            let verdicts = self.pass(which, doubtful);
            if doubtful.len() == before || !self.old.build.rust {
                return verdicts;
            }
        }
    }
}

/// Compares every pair of functions.
#[must_use]
pub fn diff(old: &Side<'_>, new: &Side<'_>, bytes: (&[u8], &[u8]), pairing: &Pairing, options: DiffOptions) -> Diff {
    let all: Vec<FuncId> = (0..old.build.funcs.len() as FuncId).filter(|f| pairing.func_pair(*f).is_some()).collect();
    let frame = Frame { old, new, pairing, proof: LineProof::None };
    let mut changed: BTreeMap<FuncId, String> =
        frame.compare(&all, &mut HashSet::new()).into_iter().filter_map(|(f, v)| v.err().map(|why| (f, why))).collect();
    let mut noise = BTreeMap::new();
    let candidates: Vec<FuncId> = changed.keys().copied().collect();
    let lines = {
        let range = |side: &Side<'_>, f: FuncId| (side.build.func(f).addr, side.build.func(f).size);
        let olds: Vec<_> = candidates.iter().map(|f| range(old, *f)).collect();
        let news: Vec<_> = candidates.iter().filter_map(|f| pairing.func_pair(*f)).map(|g| range(new, g)).collect();
        rayon::join(|| Lines::load(bytes.0, &olds), || Lines::load(bytes.1, &news))
    };
    if !options.strict_locations {
        let proof = LineProof::Tables(&lines.0, &lines.1);
        for (f, verdict) in (Frame { proof, ..frame }).compare(&candidates, &mut HashSet::new()) {
            if let Ok(seen) = verdict {
                changed.remove(&f);
                noise.insert(f, seen);
            }
        }
    }
    with_companions(old, new, pairing, &mut changed);
    noise.retain(|f, _| !changed.contains_key(f));
    Diff { changed, noise, lines }
}

/// The cold parts of a function: named after it, and branched to by it.
#[must_use]
pub fn companions(side: &Side<'_>, f: FuncId) -> Vec<FuncId> {
    let parent = side.build.func(f);
    let mut out: BTreeSet<FuncId> = BTreeSet::new();
    for r in &side.lifted[f as usize].refs {
        if let Target::Func(c, _) = r.target {
            if !side.is_cold(c) {
                continue;
            }
            let cold = side.build.func(c).cold_parent();
            if cold.is_some_and(|name| parent.names.iter().any(|n| n.text == name)) {
                out.insert(c);
            }
        }
    }
    out.into_iter().collect()
}

/// A function and its cold parts change together.
fn with_companions(old: &Side<'_>, new: &Side<'_>, pairing: &Pairing, changed: &mut BTreeMap<FuncId, String>) {
    let mut more = Vec::new();
    for f in 0..old.build.funcs.len() as FuncId {
        let Some(g) = pairing.func_pair(f) else { continue };
        let parts = companions(old, f);
        let new_parts = companions(new, g);
        if parts.is_empty() && new_parts.is_empty() {
            continue;
        }
        let part_changed = parts.iter().any(|c| changed.contains_key(c) || pairing.func_pair(*c).is_none());
        if !changed.contains_key(&f) && part_changed {
            more.push((f, "its cold part".to_owned()));
        }
        if changed.contains_key(&f) || part_changed {
            more.extend(
                parts.iter().filter(|c| !changed.contains_key(c)).map(|c| (*c, "its parent function".to_owned())),
            );
        }
    }
    changed.extend(more);
}
