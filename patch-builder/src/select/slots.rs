//! Slots that the dynamic linker filled: with addresses, with types for catching, with thread-locals.

use std::collections::BTreeSet;

use super::{Bound, Fixup, Piece, PieceKind, Selector, Store};
use crate::build::{demangle, DynKind, FuncId, TlsFound, TlsModel};
use crate::compare::{place, slot, type_slot, Place};
use crate::lift::{Access, Field, Target};
use crate::side::Side;

/// The slots that the old image's type tables refer to, ascending.
fn type_slots(old: &Side<'_>) -> Vec<u64> {
    let mut out = BTreeSet::new();
    for start in old.build.unwind.lsdas() {
        for at in *start..old.build.lsda_end(*start) {
            if let Place::Relative(to) = place(old, at, at) {
                out.extend(type_slot(old, to));
            }
        }
    }
    out.into_iter().collect()
}

impl<'d> Selector<'_, 'd> {
    pub(super) fn bind_slot(&mut self, at: u64) -> Option<Bound> {
        let fixups = match slot(self.new, at) {
            Place::Import(name, 0) => return self.import_slot(name),
            Place::Pointer(Target::Unknown(0)) => Vec::new(),
            Place::Pointer(Target::Tls(id, offset)) => return self.bind_tls_slot(id, offset),
            Place::Pointer(Target::Func(g, 0)) if self.new.build.func(g).ifunc => return self.bind_choice(g),
            Place::Pointer(to) => {
                let to = self.bind(to, Access::Extent, None)?;
                vec![Fixup { at: 0, store: Store::Abs64, to }]
            }
            _ => {
                let message = format!("{} uses a slot of the global offset table that is not understood", self.current);
                let name = self.current.clone();
                self.refuse("unknown-relocation", &name, message, "build with a supported linker");
                return None;
            }
        };
        Some(Bound::Piece(self.slot_piece(at, fixups), 0))
    }

    /// The old image's slot of a function that is chosen at start-up: it holds the choice, the symbol is the resolver's.
    fn bind_choice(&mut self, g: FuncId) -> Option<Bound> {
        let old = self.old;
        let in_got = |at: &u64| old.build.section_at(*at).is_some_and(|s| s.name.starts_with(".got"));
        let holds = |at: &u64| match slot(old, *at) {
            Place::Pointer(Target::Func(f, 0)) => old.build.func(f).ifunc && self.pairing.is_pair(f, g),
            _ => false,
        };
        match old.build.dynamic.keys().copied().filter(in_got).filter(holds).min() {
            Some(at) => Some(Bound::Image(at)),
            None => self.no_choice(g),
        }
    }

    pub(super) fn no_choice(&mut self, g: FuncId) -> Option<Bound> {
        let name = demangle(self.new.build.func(g).name());
        let message = format!(
            "{} takes the address of {name}, which is chosen at start-up (IFUNC), and no old slot holds the choice",
            self.current
        );
        self.refuse("unsupported", &name, message, "call it as the old build does, or restart");
        None
    }

    /// A slot with the address of a type: one of the old image that holds the same, else one of the patch.
    pub(super) fn bind_type_slot(&mut self, at: u64) -> Option<Bound> {
        let (old, new) = (self.old, self.new);
        let wanted = place(new, at, at);
        let slots = self.old_type_slots.get_or_insert_with(|| type_slots(old)).clone();
        let same = slots.iter().copied().find(|s| self.comparer.places(place(old, *s, *s), wanted));
        match (same, wanted) {
            (Some(slot), _) => Some(Bound::Image(slot)),
            (None, Place::Pointer(to)) => {
                let to = self.bind(to, Access::Extent, None)?;
                Some(Bound::Piece(self.slot_piece(at, vec![Fixup { at: 0, store: Store::Abs64, to }]), 0))
            }
            (None, Place::Import(name, 0)) => self.import_slot(name),
            _ => self.bind(crate::lift::resolve(&new.build, at, None), Access::Extent, None),
        }
    }

    /// A slot of the patch in place of the one at `at`.
    fn slot_piece(&mut self, at: u64, fixups: Vec<Fixup>) -> usize {
        if let Some((piece, _)) = self.piece_at.get(&(at, true)) {
            return *piece;
        }
        let index = self.pieces.len();
        let (kind, name) = (PieceKind::Slot, "slot".to_owned());
        self.pieces.push(Piece { kind, name, file: None, from: None, align: 8, bytes: vec![0; 8], fixups });
        self.piece_at.insert((at, true), (index, 0));
        index
    }

    fn bind_tls_slot(&mut self, id: u32, offset: i64) -> Option<Bound> {
        let old_id = self.old_tls(id)?;
        let wanted = self.old.build.tls[old_id as usize].addr.wrapping_add_signed(offset);
        let dynamic = self.old.build.dynamic.iter();
        let slots = dynamic.filter(|(_, r)| r.kind == DynKind::TpOff(wanted)).map(|(at, _)| *at);
        if let Some(at) = slots.min() {
            return Some(Bound::Image(at));
        }
        let name = self.new.build.tls[id as usize].name().to_owned();
        let message = format!(
            "{} reads the thread-local {} through a slot that the old build does not have",
            self.current,
            demangle(&name)
        );
        self.refuse("thread-local", &name, message, "restart");
        None
    }

    fn old_tls(&mut self, id: u32) -> Option<u32> {
        let old = self.pairing.tls_old(id);
        if old.is_none() {
            let name = self.new.build.tls[id as usize].name().to_owned();
            let message = format!(
                "{} uses the thread-local {}, which threads that run already do not have",
                self.current,
                demangle(&name)
            );
            self.refuse(
                "thread-local",
                &name,
                message,
                "keep the value elsewhere (a static keyed by thread), or restart",
            );
        }
        old
    }

    /// The offset, from the thread pointer or in the segment, at which the running process has a thread-local.
    pub(super) fn bind_tls(&mut self, target: Target<'d>, field: Field) -> Option<i32> {
        if field == Field::TlsSize32 {
            return self.bind_tls_size();
        }
        let Target::Tls(id, offset) = target else { return None };
        let old = self.old_tls(id)?;
        let segment = self.old.build.tls_segment?;
        let at = self.old.build.tls[old as usize].addr.wrapping_add_signed(offset).cast_signed();
        let below = if field == Field::TpOff32 { segment.aligned_len.cast_signed() } else { 0 };
        i32::try_from(at - below).ok()
    }

    fn bind_tls_size(&mut self) -> Option<i32> {
        let size = self.old.build.tls_segment.and_then(|s| i32::try_from(s.aligned_len).ok());
        if size.is_none() {
            let message = format!("{} uses thread-locals, of which the old build has none", self.current);
            self.refuse(
                "thread-local",
                &self.current.clone(),
                message,
                "keep the value elsewhere (a static keyed by thread), or restart",
            );
        }
        size
    }

    /// The slots of the old image that find the same thread-local.
    pub(super) fn bind_tls_slots(&mut self, model: TlsModel, found: TlsFound<'d>) -> Option<Bound> {
        let wanted = match found {
            TlsFound::Own(id, offset) => TlsFound::Own(self.old_tls(id)?, offset),
            other => other,
        };
        let old = &self.old.build;
        let in_got = |at: &u64| old.section_at(*at).is_some_and(|s| s.name.starts_with(".got"));
        let slots = old.dynamic.keys().copied().filter(in_got);
        let same = slots.filter(|at| old.tls_slots(model, *at) == Some(wanted)).min();
        if same.is_none() {
            let name = crate::compare::describe(self.new, Target::TlsSlots(model, found));
            let message = format!("{} reaches {name} through slots that the old build does not have", self.current);
            self.refuse("thread-local", &name, message, "use it in a way in which the old build does, or restart");
        }
        same.map(Bound::Image)
    }
}
