//! What to say of a patch: puts the findings of every stage into the report.

use crate::build::demangle;
use crate::diff::Diff;
use crate::emit::Emitted;
use crate::pairing::Pairing;
use crate::report::{BuildInfo, DataInfo, FunctionInfo, NoiseInfo, Refusal, Report};
use crate::select::{PieceKind, Selection};
use crate::side::Side;

/// Both builds, and what was found.
#[derive(Clone, Copy)]
pub struct Both<'a, 'd> {
    /// The build that runs.
    pub old: &'a Side<'d>,
    /// The build with the change.
    pub new: &'a Side<'d>,
    /// Which old symbol is which new one.
    pub pairing: &'a Pairing,
    /// What differs.
    pub found: &'a Diff,
    /// What the patch carries.
    pub selection: &'a Selection,
}

fn hex(bytes: &[u8]) -> String {
    livepatch::patch::HexBytes(bytes.to_vec()).to_string()
}

/// The report.
#[must_use]
pub fn explain(
    both: &Both<'_, '_>,
    name: &str,
    refusals: Vec<Refusal>,
    emitted: Option<&Emitted>,
    (types, type_notes): (String, Vec<String>),
) -> Report {
    let Both { old, new, found, selection, .. } = *both;
    let mut functions = Vec::new();
    for c in selection.functions.values().filter(|c| !c.part) {
        let func = new.build.func(c.new);
        let base = FunctionInfo {
            name: func.name().to_owned(),
            demangled: demangle(func.name()),
            aliases: func.names.iter().skip(1).map(|n| demangle(n.text)).collect(),
            status: "new",
            reason: c.reason.clone(),
            old_addr: None,
            old_size: None,
            new_size: func.size,
            entry_jump: false,
            companions: crate::diff::companions(new, c.new)
                .iter()
                .map(|p| new.build.func(*p).name().to_owned())
                .collect(),
            source: found.lines.1.source(func.addr),
        };
        if c.olds.is_empty() {
            functions.push(base);
            continue;
        }
        for f in &c.olds {
            let of = old.build.func(*f);
            let plan = selection.entries.get(f);
            let mut companions = base.companions.clone();
            companions.extend(plan.into_iter().flat_map(|p| &p.parts).map(|p| old.build.func(*p).name().to_owned()));
            companions.sort();
            companions.dedup();
            functions.push(FunctionInfo {
                name: of.name().to_owned(),
                demangled: demangle(of.name()),
                aliases: of.names.iter().skip(1).map(|n| demangle(n.text)).collect(),
                status: "changed",
                old_addr: Some(format!("{:#x}", of.addr)),
                old_size: Some(of.size),
                entry_jump: plan.is_some_and(|p| p.at.is_some()),
                companions,
                ..base.clone()
            });
        }
    }
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
    let mut warnings = Vec::new();
    for (lines, side) in [(&found.lines.0, old), (&found.lines.1, new)] {
        if !lines.present {
            warnings.push(format!(
                "{} has no debug information: lines that moved count as changes (build with -g)",
                side.build.path
            ));
        }
    }
    if emitted.is_some_and(|e| e.manifest.functions.iter().all(|f| f.old.as_ref().is_none_or(|o| o.entry.is_none()))) {
        warnings.push("no entry gets a jump: nothing outside the patch calls what changed".into());
    }
    Report {
        name: name.to_owned(),
        target: BuildInfo { build_id: hex(&old.build.build_id), path: old.build.path.clone() },
        new: BuildInfo { build_id: hex(&new.build.build_id), path: new.build.path.clone() },
        functions,
        data: data.collect(),
        noise: noise.collect(),
        refusals,
        warnings,
        types,
        type_notes,
    }
}
