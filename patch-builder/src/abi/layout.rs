//! Types whose definition changes, and whether anything of them can be alive.

use std::collections::{BTreeSet, HashSet};

use super::alive::{Alive, Build};
use super::beside::beside;
use super::numbered::{is_numbered, skeleton};
use super::same::{Compare, Difference};
use super::{bare, is_state_machine, migrated, Guard};
use crate::types::{Def, Depth, Keyword, Layout, NameId, Ty, TyId, Types};

/// A definition that changes.
struct Change<'a> {
    old: (NameId, &'a Def),
    new: (NameId, &'a Def),
    what: Difference,
}

const REMEDY: &str =
    "keep the layout and store what is new elsewhere (a table keyed by the object), migrate, or restart";

pub fn check(guard: &mut Guard<'_, '_>) {
    let [old, new] = guard.inputs.types;
    let mut changes = changes(guard, old, new);
    for c in &changes {
        let name = bare(old.name(c.old.0)).to_owned();
        guard.out.notes.extend(c.what.notes.iter().map(|n| format!("{name}: {n}")));
    }
    changes.retain(|c| c.what.matters());
    if changes.is_empty() {
        return;
    }
    guard.changed.extend(changes.iter().map(|c| c.new.0));
    let names: HashSet<NameId> = changes.iter().map(|c| c.old.0).collect();
    // What changes only because something in it does, is said with that.
    let (followers, roots): (Vec<Change<'_>>, Vec<Change<'_>>) =
        changes.into_iter().partition(|c| !c.what.own && contains(old, &c.old.1.layout, c.old.0, &names));
    let [(old_path, old_bytes), (new_path, new_bytes)] = guard.inputs.files;
    let (old_bodies, new_bodies) = rayon::join(
        || Types::read(old_path, old_bytes, Depth::Bodies),
        || Types::read(new_path, new_bytes, Depth::Bodies),
    );
    let selection = guard.inputs.selection;
    for c in selection.functions.values() {
        let at = guard.inputs.new.build.func(c.new).addr;
        let used = mentioned(&new_bodies, at, &names, old);
        if !used.is_empty() {
            guard.out.layouts_used.insert(c.new, used);
        }
    }
    let replaced: BTreeSet<u32> = selection.functions.values().flat_map(|c| c.olds.iter().copied()).collect();
    let parts = selection.entries.values().flat_map(|e| e.parts.iter().copied());
    let entered: BTreeSet<u32> = selection.entries.iter().filter(|(_, e)| e.at.is_some()).map(|(f, _)| *f).collect();
    let entered_new = selection.functions.values().filter(|c| c.olds.iter().any(|f| entered.contains(f)));
    let in_new = Build {
        types: &new_bodies,
        side: guard.inputs.new,
        patched: selection.functions.keys().copied().collect(),
        entered: entered_new.map(|c| c.new).collect(),
    };
    let patched = replaced.into_iter().chain(parts).collect();
    let in_old = Build { types: &old_bodies, side: guard.inputs.old, patched, entered };
    let (in_old, in_new) = (Alive::new(in_old), Alive::new(in_new));
    let of = guard.migrated();
    let calls = (!of[0].is_empty()).then(|| [in_old.calls(), in_new.calls()]);
    for c in roots {
        let name = old.name(c.old.0);
        let why = if is_state_machine(name) {
            Some("a future that is suspended keeps it".to_owned())
        } else {
            let ask = |alive: &Alive<'_, '_>, (model, def): (&Types, &Def), types: &Types, name: &str, build: &str| {
                let place = def.files.first().map_or_else(String::new, |at| model.place(*at));
                let why = alive.why(types.name_id(name)?, &place)?;
                Some(format!("in the {build} build, {why}"))
            };
            ask(&in_old, (old, c.old.1), &old_bodies, name, "old")
                .or_else(|| ask(&in_new, (new, c.new.1), &new_bodies, new.name(c.new.0), "new"))
        };
        // With a migration no call of the patch is what it was for all: even what lives in calls only must not get from one to the other.
        let apart = calls.as_ref().map(|calls| {
            let ask = |alive: &Alive<'_, '_>, which: usize, name: &str, build: &str| {
                let root = alive.types().name_id(name)?;
                let of: HashSet<&str> = of[which].iter().map(String::as_str).collect();
                let why = migrated::why_not(alive, &calls[which], root, &of, why.is_some())?;
                Some(format!("in the {build} build, {why}"))
            };
            let not = ask(&in_old, 0, name, "old").or_else(|| ask(&in_new, 1, new.name(c.new.0), "new"));
            not.map_or(Ok(()), Err)
        });
        match (why, apart) {
            (_, Some(Ok(()))) => {
                guard
                    .out
                    .notes
                    .push(format!("{} changes, and is migrated with the state that it belongs to", bare(name)));
            }
            (Some(why), Some(Err(not))) => {
                refuse(guard, &c, &format!("{why}; no migration covers it: {not}"), &followers)
            }
            (None, Some(Err(not))) => {
                refuse(guard, &c, &format!("with a migration it can't change: {not}"), &followers)
            }
            (Some(why), None) => refuse(guard, &c, &why, &followers),
            (None, None) => {
                guard.out.notes.push(format!("{} changes, and lives in calls of the patch only", bare(name)))
            }
        }
    }
}

/// The type behind pointers and arrays.
fn named_by(types: &Types, mut ty: TyId) -> Option<NameId> {
    for _ in 0..8 {
        match types.ty(ty) {
            Ty::Pointer(_, to) | Ty::Array(to, _) => ty = *to,
            Ty::Named(name) => return Some(*name),
            _ => return None,
        }
    }
    None
}

/// The changed types that the function at `addr` mentions.
fn mentioned(bodies: &Types, addr: u64, changed: &HashSet<NameId>, old: &Types) -> Vec<String> {
    let named: HashSet<&str> = changed.iter().map(|n| old.name(*n)).collect();
    let mentions = bodies.function_at(addr).map_or(&[][..], |f| &f.mentions);
    let mut out: Vec<String> = mentions
        .iter()
        .filter_map(|m| named_by(bodies, m.ty))
        .map(|n| bodies.name(n))
        .filter(|n| named.contains(n))
        .map(|n| bare(n).to_owned())
        .collect();
    out.sort();
    out.dedup();
    out
}

/// Every definition of both builds that differs.
fn changes<'a>(guard: &mut Guard<'a, '_>, old: &'a Types, new: &'a Types) -> Vec<Change<'a>> {
    let arms = arms(old);
    let mut by_skeleton: std::collections::HashMap<String, Vec<NameId>> = std::collections::HashMap::new();
    for name in new.defined().into_iter().filter(|n| is_numbered(new.name(*n))) {
        by_skeleton.entry(skeleton(new.name(name))).or_default().push(name);
    }
    let mut out = Vec::new();
    for name in old.defined() {
        let text = old.name(name);
        if arms.contains(&name) || text.ends_with("{vtable_type}") {
            continue;
        }
        let (translated, certain) = guard.compare.translate(text);
        let same_name = new.name_id(&translated).filter(|n| !new.defs(*n).is_empty());
        guard.out.compared_types += usize::from(same_name.is_some());
        let like: Vec<NameId> = match (same_name, certain) {
            (Some(n), true) => vec![n],
            (first, _) => {
                let others = by_skeleton.get(&skeleton(text)).into_iter().flatten().copied();
                first.into_iter().chain(others.filter(|n| Some(*n) != first)).collect()
            }
        };
        let Some(first) = like.first().copied() else { continue };
        for def in old.defs(name) {
            let equal = |compare: &mut Compare<'_>, n: NameId| {
                new.defs(n).iter().any(|d| {
                    let difference = compare.layouts(&def.layout, &d.layout);
                    difference.is_none()
                })
            };
            if !certain && like.iter().any(|n| equal(&mut guard.compare, *n)) {
                continue;
            }
            if let Some(to) =
                guard.compare.changed_into(def, old.defs(name), new.defs(first), Compare::by_content(text))
            {
                let mut what = guard.compare.layouts(&def.layout, &to.layout);
                // Another suspend point renumbers nothing that is seen here, and still is another machine.
                let more = std::mem::take(&mut what.more_variants);
                if is_state_machine(text) {
                    // What is kept over a suspend point goes by the variable's name: another name, another value.
                    let renamed = std::mem::take(&mut what.notes);
                    what.own |= !(more.is_empty() && renamed.is_empty());
                    what.layout.extend(more.into_iter().chain(renamed));
                } else {
                    what.notes.extend(more);
                }
                out.push(Change { old: (name, def), new: (first, to), what });
            }
        }
    }
    out
}

/// Types that are the content of a variant: compared with the enum that they belong to.
fn arms(types: &Types) -> HashSet<NameId> {
    let mut out = HashSet::new();
    for name in types.defined() {
        for def in types.defs(name) {
            let fields = def.layout.variants.iter().flat_map(|v| &v.arms).map(|a| a.field.ty);
            let own = |n: &NameId| types.name(*n).starts_with(types.name(name));
            out.extend(fields.filter_map(|ty| types.name_of(ty)).filter(own));
        }
    }
    out
}

/// Whether a layout holds, by value, one of these types other than itself.
fn contains(types: &Types, layout: &Layout, own: NameId, names: &HashSet<NameId>) -> bool {
    fn held(types: &Types, ty: TyId, own: NameId, names: &HashSet<NameId>) -> bool {
        match types.ty(ty) {
            Ty::Named(name) if *name != own && names.contains(name) => true,
            Ty::Named(name) if types.name(*name).starts_with(types.name(own)) => {
                types.defs(*name).iter().any(|d| d.layout.fields.iter().any(|f| held(types, f.ty, own, names)))
            }
            Ty::Array(of, _) => held(types, *of, own, names),
            Ty::Inline(layout) => contains(types, layout, own, names),
            _ => false,
        }
    }
    let arms = layout.variants.iter().flat_map(|v| v.arms.iter().map(|a| &a.field));
    layout.fields.iter().chain(arms).any(|f| held(types, f.ty, own, names))
}

fn refuse(guard: &mut Guard<'_, '_>, c: &Change<'_>, why: &str, followers: &[Change<'_>]) {
    let [old, new] = guard.inputs.types;
    let (name, new_name) = (old.name(c.old.0), new.name(c.new.0));
    let texts = (old.layout_text(name, &c.old.1.layout), new.layout_text(new_name, &c.new.1.layout));
    let place = |types: &Types, d: &Def| {
        let known = d.files.iter().find(|at| at.1 != 0);
        known.map_or_else(String::new, |at| types.place(*at))
    };
    let both = beside(&texts.0, &place(old, c.old.1), &texts.1, &place(new, c.new.1));
    let symbol = bare(name).to_owned();
    let holders: Vec<&str> = followers
        .iter()
        .filter(|f| contains(old, &f.old.1.layout, f.old.0, &HashSet::from([c.old.0])))
        .map(|f| bare(old.name(f.old.0)))
        .collect();
    let with = match holders.as_slice() {
        [] => String::new(),
        [one] => format!(" (and with it {one})"),
        [one, rest @ ..] => format!(" (and with it {one} and {} more)", rest.len()),
    };
    let told = |list: &[String]| {
        let shown = list.iter().take(4).cloned().collect::<Vec<_>>().join("; ");
        if list.len() > 4 {
            format!("{shown}; and {} more", list.len() - 4)
        } else {
            shown
        }
    };
    if !c.what.vtable.is_empty() {
        let message = format!(
            "the virtual functions of {symbol} change{with}, and objects of it may be alive: {}; {why}",
            told(&c.what.vtable)
        );
        guard.refuse(
            "vtable",
            &symbol,
            message,
            both.clone(),
            "keep the virtual functions and their order, or restart",
        );
    }
    if !c.what.values.is_empty() {
        let message = format!(
            "values of the enum {symbol} change{with}, and values of it may be stored: {}; {why}",
            told(&c.what.values)
        );
        guard.refuse(
            "enum-value",
            &symbol,
            message,
            both.clone(),
            "give new enumerators new values at the end, or restart",
        );
    }
    if !c.what.layout.is_empty() {
        let (rule, remedy) = if is_state_machine(name) {
            ("async-state", "let the running futures end first (drain), patch what it calls instead, or restart")
        } else {
            ("layout", REMEDY)
        };
        let kind = if c.old.1.layout.keyword == Keyword::Enum { "the enum " } else { "" };
        let message = format!(
            "the layout of {kind}{symbol} changes{with}, and objects of it may be alive: {}; {why}",
            told(&c.what.layout)
        );
        guard.refuse(rule, &symbol, message, both.clone(), remedy);
    }
}
