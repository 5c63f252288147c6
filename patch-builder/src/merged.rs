//! Functions that the compiler merged and whose names it dropped. LLVM keeps one of several equal bodies of a Rust
//! unit; what is left of the others is that their addresses are the one's. If one of them changes, the new build has
//! a function that the old one seems to lack, and whoever stored its address holds that of another.

use std::collections::{BTreeMap, BTreeSet};

use crate::build::{canonical, demangle, FuncId};
use crate::compare::{slot, Comparer, LineProof, Place};
use crate::diff::Diff;
use crate::lift::Target;
use crate::pairing::Pairing;
use crate::report::Refusal;
use crate::side::Side;

/// Refuses a new function whose address is held where the old build held that of another, of which it can't be told
/// whether it stood for both.
#[must_use]
pub fn check(old: &Side<'_>, new: &Side<'_>, pairing: &Pairing, diff: &Diff) -> Vec<Refusal> {
    if !old.build.rust {
        return Vec::new();
    }
    let mut comparer = Comparer::new(old, new, pairing, LineProof::Tables(&diff.lines.0, &diff.lines.1));
    let mut found: BTreeMap<FuncId, FuncId> = BTreeMap::new();
    for f in diff.changed.keys() {
        let Some(g) = pairing.func_pair(*f) else { continue };
        let brought = held_by(new, g).into_iter().filter(|h| pairing.func_olds(*h).is_empty());
        let brought: Vec<FuncId> = brought.filter(|h| is_storable(new, *h)).collect();
        if brought.is_empty() {
            continue;
        }
        let held: Vec<FuncId> = held_by(old, *f).into_iter().filter(|x| is_storable(old, *x)).collect();
        for h in brought {
            // A new function with the body of an old one is that one.
            let known = held.iter().any(|x| !diff.changed.contains_key(x) && comparer.func_bodies(*x, h));
            if let Some(x) = held.first().filter(|_| !known) {
                found.entry(h).or_insert(*x);
            }
        }
    }
    for (h, x) in split_pointers(old, new, pairing) {
        if !comparer.func_bodies(x, h) {
            found.entry(h).or_insert(x);
        }
    }
    found.into_iter().map(|(h, x)| refusal(old, new, x, h)).collect()
}

fn refusal(old: &Side<'_>, new: &Side<'_>, x: FuncId, h: FuncId) -> Refusal {
    let (symbol, other) = (demangle(new.build.func(h).name()), demangle(old.build.func(x).name()));
    let remedy = format!(
        "make the change in what calls through the address, or restart with the new build; if the old build had no such \
         function: --allow 'merged:{symbol}'"
    );
    Refusal {
        rule: "merged".into(),
        message: format!(
            "{symbol} is held by its address, and the old build may have merged it with {other}, which had the same code: \
             an address stored already leads there"
        ),
        symbol,
        remedy,
        ..Refusal::default()
    }
}

/// The functions whose address a function takes, in code or through a slot.
fn held_by(side: &Side<'_>, f: FuncId) -> BTreeSet<FuncId> {
    let code = &side.lifted[f as usize];
    // `call [slot]` and `jmp [slot]` (ff /2, ff /4) call; they hold nothing.
    let calls = |at: u32| {
        let opcode = (at as usize).checked_sub(2).and_then(|from| code.masked.get(from..at as usize));
        matches!(opcode, Some([0xff, 0x15 | 0x25]))
    };
    let refs = code.refs.iter().filter(|r| Side::takes_address(r.access) && !calls(r.at));
    refs.filter_map(|r| match r.target {
        Target::Func(g, 0) => Some(g),
        Target::Slot(at) => match slot(side, at) {
            Place::Pointer(Target::Func(g, 0)) => Some(g),
            _ => None,
        },
        _ => None,
    })
    .filter(|g| *g != f)
    .collect()
}

/// Whether somebody may keep its address: not so for what formats a value, which lives as long as one call.
fn is_storable(side: &Side<'_>, f: FuncId) -> bool {
    let func = side.build.func(f);
    let name = func.name();
    let rust = name.starts_with("_R") || name.starts_with("_ZN");
    let spelled = canonical(name);
    let formats = spelled.ends_with("::fmt") && (spelled.contains(" as core::fmt::") || spelled.contains("core::fmt"));
    rust && !formats && func.cold_parent().is_none() && !side.is_cold(f)
}

/// New functions that pointers in data lead to, each with an old one that fewer pointers lead to than before.
fn split_pointers(old: &Side<'_>, new: &Side<'_>, pairing: &Pairing) -> Vec<(FuncId, FuncId)> {
    let pointers = |side: &Side<'_>, f: FuncId| {
        let at = side.build.func(f).addr;
        side.pointers_to(at, at.saturating_add(1)).iter().filter(|p| side.build.func_at(p.at).is_none()).count()
    };
    let method = |side: &Side<'_>, f: FuncId| last(&canonical(side.build.func(f).name())).to_owned();
    let mut fewer: BTreeMap<String, FuncId> = BTreeMap::new();
    for f in 0..old.build.funcs.len() as FuncId {
        let Some(g) = pairing.func_pair(f).filter(|_| is_storable(old, f)) else { continue };
        let before = pointers(old, f);
        if before > 1 && pointers(new, g) < before {
            fewer.entry(method(old, f)).or_insert(f);
        }
    }
    if fewer.is_empty() {
        return Vec::new();
    }
    let all = 0..new.build.funcs.len() as FuncId;
    let brought = all.filter(|h| pairing.func_olds(*h).is_empty() && pointers(new, *h) > 0);
    brought.filter_map(|h| Some((h, *fewer.get(&method(new, h))?))).collect()
}

/// The last part of a path, without what tells closures apart.
fn last(name: &str) -> &str {
    let name = name.rsplit("::").next().unwrap_or(name);
    name.split_once('#').map_or(name, |(kind, _)| kind)
}
