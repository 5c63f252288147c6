//! What libraries define: through the old image's slots where it imports the same, else by name, for the engine to find.

use std::collections::BTreeMap;

use livepatch::patch::{Import, ImportKind};

use super::{Bound, Fixup, Piece, PieceKind, Selector, Store};
use crate::build::DynKind;
use crate::lift::Access;
use crate::side::Side;

/// Where the old image keeps the address of each import: slots and stubs.
#[derive(Default)]
pub struct ImportSlots<'d> {
    slots: BTreeMap<&'d str, u64>,
    stubs: BTreeMap<&'d str, u64>,
}

/// Collects the old image's slots and stubs.
pub fn import_slots<'d>(old: &Side<'d>) -> ImportSlots<'d> {
    let mut out = ImportSlots::default();
    for (at, r) in &old.build.dynamic {
        let in_got = old.build.section_at(*at).is_some_and(|s| s.name.starts_with(".got"));
        if let (DynKind::Import(name, 0), true) = (r.kind, in_got) {
            let slot = out.slots.entry(name).or_insert(*at);
            *slot = (*slot).min(*at);
        }
    }
    for (at, name) in &old.build.plt {
        let stub = out.stubs.entry(name).or_insert(*at);
        *stub = (*stub).min(*at);
    }
    out
}

pub(super) const DIRECT_IMPORT: &str =
    "compile the new build so that it reaches variables of libraries through a slot (gcc: -fPIC or -mno-direct-extern-access), or restart";

impl<'d> Selector<'_, 'd> {
    /// The stub of an import.
    pub(super) fn bind_import(&mut self, name: &'d str, access: Access) -> Option<Bound> {
        let same = self.comparer.same_import(name, name);
        if let Some(stub) = self.imports.stubs.get(name).filter(|_| same) {
            return Some(Bound::Image(*stub));
        }
        if access != Access::Branch && !(same && self.imports.slots.contains_key(name)) {
            // A stub has an address of its own, and the process knows the function by another.
            let message =
                format!("{} takes the address of {name}, a function of a library, by way of a stub", self.current);
            self.refuse("import", name, message, "build a position-independent executable (-pie), or restart");
            return None;
        }
        let slot = self.import_slot(name)?;
        let piece = self.stub_of.get(name).copied().unwrap_or_else(|| {
            let fixups = vec![Fixup { at: 2, store: Store::Pc32(-4), to: slot }];
            // jmp qword ptr [rip + slot]
            let bytes = vec![0xff, 0x25, 0, 0, 0, 0];
            self.pieces.push(Piece {
                kind: PieceKind::Stub,
                name: name.into(),
                file: None,
                from: None,
                align: 16,
                bytes,
                fixups,
            });
            self.pieces.len() - 1
        });
        self.stub_of.insert(name, piece);
        Some(Bound::Piece(piece, 0))
    }

    /// A slot that holds the address of an import: the old image's, or a new one.
    pub(super) fn import_slot(&mut self, name: &'d str) -> Option<Bound> {
        let same = self.comparer.same_import(name, name);
        if let Some(slot) = self.imports.slots.get(name).filter(|_| same) {
            return Some(Bound::Image(*slot));
        }
        let import = self.want(name)?;
        let known = self.pieces.iter().position(|p| p.kind == PieceKind::Slot && p.name == name);
        let piece = known.unwrap_or_else(|| {
            let fixups = vec![Fixup { at: 0, store: Store::Abs64, to: Bound::Import(import, 0) }];
            let bytes = vec![0; 8];
            self.pieces.push(Piece {
                kind: PieceKind::Slot,
                name: name.into(),
                file: None,
                from: None,
                align: 8,
                bytes,
                fixups,
            });
            self.pieces.len() - 1
        });
        Some(Bound::Piece(piece, 0))
    }

    /// Asks the engine to find an import of the new build.
    pub(super) fn want(&mut self, name: &str) -> Option<usize> {
        if let Some(known) = self.wanted.iter().position(|i| i.name == name) {
            return Some(known);
        }
        let known = self.new.build.imports.get(name).or_else(|| self.old.build.imports.get(name));
        let symbol = known.copied().unwrap_or_default();
        let refusal = if symbol.thread_local {
            Some((
                "is thread-local, and every library has its own of these",
                "use a function of the library that returns its address",
            ))
        } else if symbol.twice {
            Some(("is imported in two versions", "link the new build to one version of it"))
        } else {
            None
        };
        if let Some((why, remedy)) = refusal {
            let message = format!("{} uses {name} of a library, which {why}", self.current);
            self.refuse("import", name, message, remedy);
            return None;
        }
        let text = |s: Option<&str>| s.map(str::to_owned);
        self.wanted.push(Import {
            name: name.to_owned(),
            version: text(symbol.version),
            library: text(symbol.library),
            kind: if symbol.variable { ImportKind::Variable } else { ImportKind::Function },
            weak: symbol.weak,
        });
        Some(self.wanted.len() - 1)
    }
}
