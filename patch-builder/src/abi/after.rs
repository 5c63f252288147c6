//! What a patch brought that the new one takes the place of: objects of its
//! types are alive, and neither of the two builds knows of them.

use livepatch::patch::Manifest;

use crate::report::Refusal;
use crate::types::Types;

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
