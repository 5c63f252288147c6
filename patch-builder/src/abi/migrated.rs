//! Types whose objects a migration takes over: those that belong to states of a table, and to nobody else.
//!
//! While a patch with a migration is applied, a thread runs old or new code by the version of the state that it has been given. A type that
//! changes is safe then if only such code ever has an object of it: every function that mentions it (or what holds one, or points to
//! one) is called by functions like it alone, and in the end by livepatch's own, which choose the arm; and no static, no trait object
//! and no future keeps one. What other code hands over to a state and gets back must not change.

use std::collections::{BTreeSet, HashMap, HashSet};

use livepatch::patch::StateVersion;

use super::alive::{Alive, Calls, Lead};
use crate::build::{Build, FuncId};
use crate::types::{NameId, Role, Types};

/// How the type of a declaration is called, before the name of the state's type.
const DECLARED: &str = "livepatch::state::Declared<";

/// Whatever depends on a state's type is called by these.
const SHIMS: &str = "livepatch::state::shims::";

/// Bytes of a declaration: the id, filled up with zeros, and the version.
const ID_BYTES: u64 = 60;

/// A state that a build declares.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Declared {
    /// Its id.
    pub id: String,
    /// Its version.
    pub version: u32,
    /// The name of its type.
    pub of: String,
}

/// What a build declares.
pub fn declared(types: &Types, build: &Build<'_>) -> Vec<Declared> {
    let of = |s: &crate::types::Static| {
        let name = types.name(types.name_of(s.ty)?);
        let of = super::bare(name).strip_prefix(DECLARED)?.strip_suffix('>')?;
        let bytes = build.bytes(s.addr, ID_BYTES + 4)?;
        let (id, version) = bytes.split_at_checked(ID_BYTES as usize)?;
        let end = id.iter().position(|b| *b == 0).unwrap_or(id.len());
        let id = String::from_utf8(id.get(..end)?.to_vec()).ok()?;
        Some(Declared { id, version: u32::from_le_bytes(version.try_into().ok()?), of: of.to_owned() })
    };
    let mut out: Vec<Declared> = types.statics.iter().filter_map(of).collect();
    out.sort();
    out.dedup();
    out
}

/// What the patch says of the states that the new build declares.
pub fn versions(old: &[Declared], new: &[Declared]) -> Vec<StateVersion> {
    let of = |d: &Declared| {
        let from = old.iter().find(|o| o.id == d.id).map(|o| o.version);
        StateVersion { id: d.id.clone(), version: d.version, from }
    };
    new.iter().map(of).collect()
}

/// Why old and new code could meet objects of a type of each other's; `None` if the version of a state keeps them apart. With `owned`, the
/// type has to belong to one of the states that are migrated (`of`, names of types).
pub fn why_not(alive: &Alive<'_, '_>, calls: &Calls, root: NameId, of: &HashSet<&str>, owned: bool) -> Option<String> {
    let types = alive.types();
    let kept = keepers(alive, root);
    if owned && !kept.iter().any(|n| of.contains(super::bare(types.name(*n)))) {
        return Some("it belongs to no state that is migrated".into());
    }
    let mut names: Vec<NameId> = kept.iter().copied().collect();
    names.sort_unstable_by(|a, b| types.name(*a).cmp(types.name(*b)));
    alive
        .in_state_machine(&names)
        .or_else(|| alive.in_statics(&kept, &names, &BTreeSet::new()))
        .or_else(|| outside(alive, calls, &kept))
}

/// The type, and everything that holds one, borrows one or points to one.
fn keepers(alive: &Alive<'_, '_>, root: NameId) -> HashSet<NameId> {
    let types = alive.types();
    let mut kept = HashSet::from([root]);
    let mut rest: Vec<NameId> = types.defined();
    // What livepatch keeps, it keeps by version; what has no bytes keeps nothing.
    rest.retain(|n| {
        let name = super::bare(types.name(*n));
        !name.starts_with("livepatch::state::") && types.defs(*n).iter().any(|d| d.layout.size > 0)
    });
    loop {
        let before = kept.len();
        rest.retain(|name| {
            let keeps = types.defs(*name).iter().any(|d| {
                super::alive::fields(&d.layout)
                    .map(|f| f.ty)
                    .chain(d.layout.params.iter().copied())
                    .any(|ty| matches!(alive.lead(ty, &kept, 0), Lead::Held | Lead::Borrowed | Lead::Pointed))
            });
            if keeps {
                kept.insert(*name);
            }
            !keeps
        });
        if kept.len() == before {
            return kept;
        }
    }
}

/// A function that has one of them, and is not called by functions of states alone.
fn outside(alive: &Alive<'_, '_>, calls: &Calls, kept: &HashSet<NameId>) -> Option<String> {
    let types = alive.types();
    let build = alive.build();
    let mut starts: HashMap<u32, Vec<FuncId>> = HashMap::new();
    for (addr, f) in &types.by_addr {
        starts.entry(*f).or_default().extend(build.func_at(*addr));
    }
    let mut known: HashMap<u32, bool> = HashMap::new();
    let mut leads =
        |ty| *known.entry(ty).or_insert_with(|| !matches!(alive.lead(ty, kept, 0), Lead::No | Lead::Through));
    let (mut mention, mut given) = (Vec::new(), HashSet::<FuncId>::new());
    let mut shims: HashSet<FuncId> = HashSet::new();
    for (id, f) in types.functions.iter().enumerate() {
        let ids = starts.get(&(id as u32)).map_or(&[][..], Vec::as_slice);
        if types.name(f.name).starts_with(SHIMS) {
            shims.extend(ids);
            continue;
        }
        let mut mentions = false;
        for m in &f.mentions {
            if leads(m.ty) {
                mentions = true;
                if m.role == Role::Param {
                    given.extend(ids);
                }
            }
        }
        // The compiler gives glue that does the same one body; whoever has an object to end has it from a function that is looked at.
        if mentions && !types.name(f.name).starts_with("core::ptr::drop_in_place<") {
            mention.push((f, ids));
        }
    }
    // The greatest set of functions that only functions of the set call. One whose address is held is called by whoever has an object.
    let mut within: HashSet<FuncId> = (0..build.funcs.len() as FuncId)
        .filter(|f| shims.contains(f) || !calls.held.contains(f) || given.contains(f))
        .collect();
    loop {
        let out: Vec<FuncId> = within
            .iter()
            .copied()
            .filter(|f| !shims.contains(f))
            .filter(|f| calls.callers.get(f).is_some_and(|by| by.iter().any(|c| !within.contains(c))))
            .collect();
        if out.is_empty() {
            break;
        }
        out.iter().for_each(|f| {
            within.remove(f);
        });
    }
    let stray = mention.into_iter().find(|(_, ids)| ids.iter().any(|f| !within.contains(f)));
    stray.map(|(f, _)| format!("{} ({}) has one outside of any state", types.name(f.name), types.place(f.at)))
}
