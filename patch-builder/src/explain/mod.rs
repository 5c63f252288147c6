//! What to say of a patch: why each function is in it, what may go wrong, what was noise and what nobody looked at.

mod code;
mod detail;
mod flow;
mod functions;
mod skipped;
mod source;
mod stays;
mod values;
mod warnings;
mod why;

use std::collections::BTreeMap;
use std::path::Path;

use crate::build::{demangle, FuncId};
use crate::diff::Diff;
use crate::emit::Emitted;
use crate::pairing::Pairing;
use crate::report::{BuildInfo, DataInfo, Detail, NoiseInfo, Refusal, Report};
use crate::select::{PieceKind, Selection};
use crate::side::Side;

/// Both builds, and what was found.
#[derive(Clone, Copy)]
pub struct Both<'a, 'd> {
    /// The build that runs.
    pub old: &'a Side<'d>,
    /// The build with the change.
    pub new: &'a Side<'d>,
    /// The bytes of their files.
    pub bytes: (&'d [u8], &'d [u8]),
    /// Folders of their sources, if not where the builds say.
    pub sources: (Option<&'a Path>, Option<&'a Path>),
    /// Whether listings and the call graph are wanted.
    pub detailed: bool,
    /// Which old symbol is which new one.
    pub pairing: &'a Pairing,
    /// What differs.
    pub found: &'a Diff,
    /// What the patch carries.
    pub selection: &'a Selection,
    /// Types with another layout that functions of the patch use, by new id.
    pub layouts: &'a BTreeMap<FuncId, Vec<String>>,
}

fn hex(bytes: &[u8]) -> String {
    livepatch::patch::HexBytes(bytes.to_vec()).to_string()
}

/// The report, and its detail if that is wanted.
#[must_use]
pub fn explain(
    both: &Both<'_, '_>,
    name: &str,
    refusals: Vec<Refusal>,
    emitted: Option<&Emitted>,
    (types, type_notes): (String, Vec<String>),
) -> (Report, Option<Detail>) {
    let Both { old, new, found, selection, .. } = *both;
    let asker = why::Asker::new(both);
    let functions = functions::functions(&asker);
    let detail = both.detailed.then(|| detail::detail(&asker, &functions.iter().map(|(f, g, _)| (*f, *g)).collect()));
    let may_never_leave = warnings::may_never_leave(both, &functions);
    let data = selection.pieces.iter().map(|p| {
        let kind = match p.kind {
            PieceKind::Static => "static",
            PieceKind::Slot | PieceKind::Stub => "slot",
            PieceKind::HookCode => "hook",
            PieceKind::Constant | PieceKind::Lsda => "constant",
        };
        DataInfo { name: p.name.clone(), kind, size: p.bytes.len() as u64 }
    });
    let noise = found.noise.iter().flat_map(|(f, all)| {
        let function = demangle(old.build.func(*f).name());
        all.iter().map(move |n| NoiseInfo { function: function.clone(), rule: n.rule, detail: n.detail.clone() })
    });
    let warnings = warnings::warnings(both, &may_never_leave, emitted);
    let report = Report {
        name: name.to_owned(),
        target: BuildInfo { build_id: hex(&old.build.build_id), path: old.build.path.clone() },
        new: BuildInfo { build_id: hex(&new.build.build_id), path: new.build.path.clone() },
        functions: functions.into_iter().map(|(.., info)| info).collect(),
        data: data.collect(),
        noise: noise.collect(),
        refusals,
        warnings,
        may_never_leave,
        not_compared: skipped::not_compared(both, &types),
        types,
        type_notes,
    };
    (report, detail)
}
