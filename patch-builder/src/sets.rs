//! Sets that the linker collects: sections that code walks from `__start_NAME` to `__stop_NAME`.

use crate::compare::{Comparer, LineProof};
use crate::diff::Diff;
use crate::pairing::Pairing;
use crate::report::Refusal;
use crate::side::Side;

/// The running process keeps its sets: one that grew, shrank or changed is refused.
#[must_use]
pub fn check(old: &Side<'_>, new: &Side<'_>, pairing: &Pairing, diff: &Diff) -> Vec<Refusal> {
    let sets = |side: &Side<'_>| -> Vec<(String, u64, u64)> {
        let labels =
            side.build.rel_syms.iter().filter_map(|s| s.name.strip_prefix("__start_")).filter(|n| is_walked(side, n));
        let mut names: Vec<&str> = labels.collect();
        names.sort_unstable();
        names.dedup();
        let section =
            |n: &str| side.build.sections.iter().find(|s| s.name == n).map(|s| (n.to_owned(), s.addr, s.size));
        names.into_iter().filter_map(section).collect()
    };
    let mut comparer = Comparer::new(old, new, pairing, LineProof::Tables(&diff.lines.0, &diff.lines.1));
    let (before, after) = (sets(old), sets(new));
    let mut out = Vec::new();
    for (name, at, len) in &after {
        let same = before
            .iter()
            .find(|(n, ..)| n == name)
            .is_some_and(|(_, from, old_len)| old_len == len && comparer.objects(*from, *at, *len));
        if !same {
            out.push(Refusal {
                rule: "initial-value".into(),
                symbol: name.clone(),
                message: format!("the set that the linker collects in section {name} changed"),
                remedy: "the running process keeps its set: restart".into(),
                ..Refusal::default()
            });
        }
    }
    out
}

/// Whether anything refers to the labels of the set in section `name`: mold defines those of sets that nothing walks,
/// such as `__patchable_function_entries`. Code refers to them by these names only, as the linker makes them. What has no
/// relocations to tell is walked.
fn is_walked(side: &Side<'_>, name: &str) -> bool {
    let build = &side.build;
    let label = |n: &str| ["__start_", "__stop_"].iter().any(|l| n.strip_prefix(l) == Some(name));
    let exported = || build.sections.iter().any(|s| s.name == name && build.exported.contains(&s.addr));
    build.relocs.is_empty() || build.relocs.iter().any(|r| label(build.rel_sym(r).name)) || exported()
}

/// Constants of an image that is linked to fixed addresses are reached through addresses that may lie before or
/// behind them (`table - 80 + index`): one that changed, and that nothing seems to use, is used in a way not seen.
#[must_use]
pub fn unseen_users(old: &Side<'_>, new: &Side<'_>, pairing: &Pairing, diff: &Diff) -> Vec<Refusal> {
    let mut out = Vec::new();
    if old.build.pie {
        return out;
    }
    let mut comparer = Comparer::new(old, new, pairing, LineProof::Tables(&diff.lines.0, &diff.lines.1));
    for id in 0..old.build.objects.len() as u32 {
        let Some(new_id) = pairing.object_pair(id).filter(|_| old.users(id).is_empty()) else { continue };
        let (a, b) = (old.build.object(id), new.build.object(new_id));
        let constant = a.size > 0 && a.size == b.size && !old.is_mutable(a.addr) && !new.is_mutable(b.addr);
        if constant && !comparer.objects(a.addr, b.addr, a.size) {
            let symbol = crate::build::demangle(a.name());
            out.push(Refusal {
                rule: "initial-value".into(),
                message: format!("{symbol} changed, and the code that uses it can't be told in a build without -fPIE"),
                symbol,
                remedy: "build a position-independent executable (-pie)".into(),
                ..Refusal::default()
            });
        }
    }
    out
}
