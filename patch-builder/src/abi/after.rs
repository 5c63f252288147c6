//! What a patch brought that the new one takes the place of: objects of its
//! types are alive, and neither of the two builds knows of them.

use livepatch::patch::Manifest;

use crate::report::Refusal;
use crate::types::Types;

/// Refuses each type that `previous` brought and that the new build lays out otherwise. One that the new build does
/// not have is used by nobody any more.
#[must_use]
pub fn after(previous: &Manifest, new: &Types) -> Vec<Refusal> {
    let mut out: Vec<Refusal> = Vec::new();
    for brought in &previous.layouts {
        let Some(id) = new.name_id(&brought.name) else { continue };
        let records: Vec<_> = new.defs(id).iter().map(|def| new.record(id, def)).collect();
        let known = |digest: &str| digest == brought.digest.to_string();
        let Some(other) = records.iter().find(|r| !known(&r.digest)) else { continue };
        // Several units may have brought one name each with a layout of its own; one is enough to be the same.
        if records.iter().any(|r| known(&r.digest)) || out.iter().any(|r| r.symbol == brought.name) {
            continue;
        }
        out.push(Refusal {
            rule: "layout".into(),
            symbol: brought.name.clone(),
            message: format!(
                "{}, which patch {} brought, changes its layout, and objects of it may be alive",
                brought.name, previous.name
            ),
            remedy: format!(
                "keep the layout (a new field can be a shadow variable), or restart; if none of its objects is alive: --allow 'layout:{}'",
                brought.name
            ),
            old: Some(brought.layout.clone()),
            new: Some(other.text.clone()),
        });
    }
    out
}
