//! What a patch brought that the new one takes the place of: objects of its
//! types are alive, and neither of the two builds knows of them.

use std::collections::{BTreeMap, BTreeSet};

use livepatch::patch::Manifest;

use crate::build::{Build, ObjId};
use crate::report::Refusal;
use crate::types::{TyId, Types};

/// Refuses each type that `previous` brought and that the new build lays out otherwise or does not have: its objects may
/// be alive, and a type of another name may be what takes them over.
#[must_use]
pub fn after(previous: &Manifest, new: &Types) -> Vec<Refusal> {
    let mut out: Vec<Refusal> = Vec::new();
    for brought in &previous.layouts {
        let records: Vec<_> = new
            .name_id(&brought.name)
            .into_iter()
            .flat_map(|id| new.defs(id).iter().map(move |def| new.record(id, def)))
            .collect();
        let known = |digest: &str| digest == brought.digest.to_string();
        // Several units may have brought one name each with a layout of its own; one is enough to be the same.
        if records.iter().any(|r| known(&r.digest)) || out.iter().any(|r| r.symbol == brought.name) {
            continue;
        }
        out.push(Refusal {
            rule: "layout".into(),
            symbol: brought.name.clone(),
            message: format!(
                "{}, which patch {} brought, {}, and objects of it may be alive",
                brought.name,
                previous.name,
                if records.is_empty() { "is gone from the new build" } else { "changes its layout" }
            ),
            remedy: format!(
                "keep the layout (a new field can be a shadow variable), or restart; if none of its objects is alive: --allow 'layout:{}'",
                brought.name
            ),
            old: Some(brought.layout.clone()),
            new: records.first().map(|r| r.text.clone()),
        });
    }
    out
}

/// The types of the variables that begin at these places, where exactly one is said to.
pub(super) fn types_at(types: &Types, places: BTreeSet<u64>) -> BTreeMap<u64, TyId> {
    let mut found: BTreeMap<u64, Option<TyId>> = BTreeMap::new();
    for s in types.statics.iter().filter(|s| !s.tls && places.contains(&s.addr)) {
        let digest = |ty| types.type_digest(ty);
        let known = found.entry(s.addr).or_insert(Some(s.ty));
        *known = known.filter(|k| *k == s.ty || digest(*k) == digest(s.ty));
    }
    found.into_iter().filter_map(|(at, ty)| Some((at, ty?))).collect()
}

/// Refuses each variable that `previous` brought and that has another type in the new build: it keeps its bits.
#[must_use]
pub fn living(previous: &Manifest, new: &Types, build: &Build<'_>, living: &[(usize, ObjId)]) -> Vec<Refusal> {
    let places = types_at(new, living.iter().map(|(_, id)| build.object(*id).addr).collect());
    let mut out = Vec::new();
    for (index, id) in living {
        let Some((s, digest)) = previous.statics.get(*index).and_then(|s| Some((s, s.type_digest.as_ref()?))) else {
            continue; // built without types, which somebody allowed
        };
        let ty = places.get(&build.object(*id).addr).copied();
        if ty.is_some_and(|ty| new.type_digest(ty) == digest.to_string()) {
            continue;
        }
        let is = ty.map_or_else(|| "an unknown type".to_owned(), |ty| format!("another type, {}", new.show(ty)));
        out.push(Refusal {
            rule: "layout".into(),
            symbol: s.name.clone(),
            message: format!(
                "the variable {}, which patch {} brought and whose value is alive, has {is} in the new build",
                s.name, previous.name
            ),
            remedy: format!(
                "keep its type and add a new variable, or restart; if its value means the same: --allow 'layout:{}'",
                s.name
            ),
            ..Refusal::default()
        });
    }
    out
}
