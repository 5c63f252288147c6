//! Binding one reference, and cutting out the data that it needs.

use super::imports::DIRECT_IMPORT;
use super::{Bound, Fixup, Piece, PieceKind, Selector, Store};
use crate::build::{canonical, demangle, DynKind, FuncId, ObjId};
use crate::compare::{place, type_slot, Place};
use crate::lift::{Access, Ref, Target};

/// A piece whose references are being looked for.
pub(super) struct Filling {
    index: usize,
    /// Where its data is in the new build, and how long.
    at: u64,
    len: u64,
    /// Where the tables in it begin, ascending.
    bases: Vec<u64>,
    /// How far it was looked at.
    offset: u64,
    fixups: Vec<Fixup>,
}

impl<'d> Selector<'_, 'd> {
    /// What a function's reference is bound to.
    pub(super) fn bind_ref(&mut self, r: &Ref<'d>, g: FuncId) -> Option<Bound> {
        let (Target::Data(at), true) = (r.target, r.bias != 0) else { return self.bind(r.target, r.access, Some(g)) };
        let least = u64::try_from(r.bias).map_or(0, |bias| bias);
        Some(match self.bind_data(at, r.access, least)? {
            Bound::Image(start) => Bound::Image(start.wrapping_add_signed(r.bias)),
            Bound::Piece(piece, offset) => Bound::Piece(piece, offset + r.bias),
            other => other,
        })
    }

    /// What `target` of the new build is in the patched process; `None` after a refusal.
    pub(super) fn bind(&mut self, target: Target<'d>, access: Access, context: Option<FuncId>) -> Option<Bound> {
        match target {
            Target::Func(g, offset) => self.bind_func(g, offset, access, context),
            Target::Object(id, offset) => self.bind_object(id, offset, access),
            Target::Plt(name) => self.bind_import(name, access),
            Target::Slot(at) => self.bind_slot(at),
            Target::Data(at) => self.bind_data(at, access, 0),
            Target::TlsSlots(model, found) => self.bind_tls_slots(model, found),
            Target::Unknown(0) => Some(Bound::Null),
            Target::Tls(..) | Target::Unknown(_) | Target::Empty(_) | Target::Number(_) => {
                let what = crate::compare::describe(self.new, target);
                let message = format!("{} refers to {what}, of which nothing is known", self.current);
                let name = self.current.clone();
                self.refuse("unknown-relocation", &name, message, "build with symbols and --emit-relocs");
                None
            }
        }
    }

    fn bind_func(&mut self, g: FuncId, offset: i64, access: Access, context: Option<FuncId>) -> Option<Bound> {
        let own = context == Some(g) && offset != 0;
        let olds = self.pairing.func_olds(g).to_vec();
        let carried = self.functions.contains_key(&g);
        if self.new.build.func(g).ifunc && offset == 0 && !Self::branch_or_address(access) {
            return self.no_choice(g); // the symbol's address is its resolver's
        }
        if offset == 0 && !Self::branch_or_address(access) {
            // A function has one address: the old one, whose entry leads to the new code.
            if let Some(f) = olds.first() {
                self.address_taken.insert(*f);
                return Some(Bound::Image(self.old.build.func(*f).addr));
            }
            if let Some(known) = self.known_address(g) {
                return Some(known);
            }
            self.taken.insert(g);
        }
        if own || carried {
            return Some(Bound::Func(g, offset));
        }
        if let Some(f) = olds.iter().find(|f| !self.diff.changed.contains_key(f)) {
            return Some(Bound::Image(self.old.build.func(*f).addr.wrapping_add_signed(offset)));
        }
        // In C a new function must have an address of its own; Rust promises no such thing.
        if olds.is_empty() && (Self::branch_or_address(access) || self.new.build.rust) {
            if let Some(f) = self.same_body(g) {
                return Some(Bound::Image(self.old.build.func(f).addr.wrapping_add_signed(offset)));
            }
        }
        let reason = format!("the old build has no such function; {} needs it", self.current);
        let current = self.current.clone();
        self.enter(g, Vec::new(), reason);
        self.current = current;
        Some(Bound::Func(g, offset))
    }

    pub(super) fn bind_object(&mut self, id: ObjId, offset: i64, access: Access) -> Option<Bound> {
        let object = self.new.build.object(id).clone();
        let mutable = self.new.is_mutable(object.addr);
        if let Some(old_id) = self.pairing.object_old(id) {
            let old = self.old.build.object(old_id).clone();
            let same = mutable
                || object.size == 0
                || old.size == object.size && self.comparer.objects(old.addr, object.addr, old.size);
            if same {
                return Some(Bound::Image(old.addr.wrapping_add_signed(offset)));
            }
            let is_vtable = object.name().starts_with("_ZTV"); // refused by the guard
            if access != Access::Branch && !is_vtable && self.holds_functions(object.addr, object.size) {
                // What lives already holds the old one's address, and is told apart by it.
                let message = format!(
                    "{} takes the address of {}, a table of functions that changed",
                    self.current,
                    object.name()
                );
                self.refuse("initial-value", object.name(), message, "change the functions in it, not the table");
            }
            let piece = self.piece(object.addr, object.size, PieceKind::Constant, object.name(), None);
            return Some(Bound::Piece(piece, offset));
        }
        if matches!(self.new.build.dynamic.get(&object.addr).map(|r| r.kind), Some(DynKind::Copy(_))) {
            let message = format!(
                "{} uses the variable {} of a library in the place into which the new build copies it, and the old build has no such copy",
                self.current,
                object.name()
            );
            self.refuse("import", object.name(), message, DIRECT_IMPORT);
            return None;
        }
        if object.size == 0 {
            let message = format!(
                "{} refers to {}, a symbol without size that the old build does not have",
                self.current,
                object.name()
            );
            self.refuse("unknown-relocation", object.name(), message, "give the symbol a size, or restart");
            return None;
        }
        if mutable && self.pairing.ambiguous.contains(&canonical(object.name())) {
            let message =
                format!("it can't be told which old variable {} of {} is", demangle(object.name()), self.current);
            self.refuse("ambiguous", object.name(), message, "give the static locals different names");
            return None;
        }
        if let Some(at) = self.living_copy(id).filter(|_| mutable) {
            return Some(Bound::Previous(at.wrapping_add_signed(offset)));
        }
        let kind = if mutable { PieceKind::Static } else { PieceKind::Constant };
        let file = object.names.first().and_then(|n| n.file).map(str::to_owned);
        let piece = self.piece(object.addr, object.size, kind, object.name(), file);
        Some(Bound::Piece(piece, offset))
    }

    /// Whether a constant holds the address of a function.
    fn holds_functions(&self, at: u64, len: u64) -> bool {
        (0..len).any(|i| matches!(place(self.new, at + i, at), Place::Pointer(Target::Func(_, 0))))
    }

    /// Unnamed data; at least `least` bytes of it.
    fn bind_data(&mut self, at: u64, access: Access, least: u64) -> Option<Bound> {
        if let Some(old) = self.pairing.unnamed_old(at) {
            return Some(Bound::Image(old));
        }
        if self.new.is_mutable(at) {
            let message = format!("{} refers to writable data without a name", self.current);
            let name = self.current.clone();
            self.refuse("ambiguous", &name, message, "keep the symbols of static data (do not strip local symbols)");
            return None;
        }
        if let Some((piece, offset)) = self.piece_at.get(&(at, false)).filter(|(_, offset)| *offset > 0) {
            return Some(Bound::Piece(*piece, *offset));
        }
        let end = match access {
            // What an instruction reads is known; what stands behind it may be anything.
            Access::Exact(len) => at + u64::from(len).max(least),
            _ => self.new.extent_end(at).max(at + least),
        };
        let piece = self.piece(at, end - at, PieceKind::Constant, "constant", None);
        Some(Bound::Piece(piece, 0))
    }

    /// Cuts out `len` bytes at `at` of the new build, with everything that they refer to.
    pub(super) fn piece(&mut self, at: u64, len: u64, kind: PieceKind, name: &str, file: Option<String>) -> usize {
        self.piece_of(at, len, kind, name, file, &[at])
    }

    /// Data without a name that touches: carried as one, so that the end of one is the start of the next there, too.
    /// Whether an address is meant as the one or as the other can't be told from code.
    pub(super) fn touching(&mut self, starts: &[u64], end: u64) {
        let (Some(first), true) = (starts.first().copied(), starts.len() > 1) else { return };
        let piece = self.piece_of(first, end - first, PieceKind::Constant, "constants", None, starts);
        for at in starts {
            self.piece_at.insert((*at, false), (piece, (at - first).cast_signed()));
        }
        self.piece_at.insert((first, false), (piece, 0));
    }

    fn piece_of(
        &mut self,
        at: u64,
        len: u64,
        kind: PieceKind,
        name: &str,
        file: Option<String>,
        bases: &[u64],
    ) -> usize {
        if let Some((known, 0)) = self.piece_at.get(&(at, false)) {
            if self.pieces[*known].bytes.len() as u64 >= len {
                return *known;
            }
        }
        let build = &self.new.build;
        let bytes =
            if build.is_zero_fill(at) { Some(vec![0; len as usize]) } else { build.bytes(at, len).map(<[u8]>::to_vec) };
        let index = self.pieces.len();
        // A static may ask for up to a page; more than an address shows, no constant needs.
        let align = 1u64 << at.trailing_zeros().min(if kind == PieceKind::Static { 12 } else { 6 });
        let bytes = bytes.unwrap_or_default();
        let short = (bytes.len() as u64) < len || len == 0;
        let piece = Piece { kind, name: demangle(name), file, from: Some(at), align, bytes, fixups: Vec::new() };
        self.pieces.push(piece);
        self.piece_at.insert((at, false), (index, 0));
        if short {
            let message = format!("{} refers to data at {at:#x} whose extent is unknown", self.current);
            let name = self.current.clone();
            self.refuse("overlap", &name, message, "build with -fdata-sections, or give it a name and a size");
            return index;
        }
        self.open.push(Filling { index, at, len, bases: bases.to_vec(), offset: 0, fixups: Vec::new() });
        if self.open.len() == 1 {
            self.fill();
        }
        index
    }

    /// Finds what the pieces that were begun refer to. A piece that another one needs is filled before the rest of that,
    /// as by recursion; but constants may be chained deeper than a stack reaches.
    fn fill(&mut self) {
        while let Some(top) = self.open.len().checked_sub(1) {
            let Filling { index, at, offset, .. } = self.open[top];
            if offset >= self.open[top].len {
                self.pieces[index].fixups = self.open.pop().map(|f| f.fixups).unwrap_or_default();
                continue;
            }
            let here = at + offset;
            let base_is_place = self.pieces[index].kind == PieceKind::Lsda;
            // A table of distances counts from where it begins.
            let base = self.open[top].bases.iter().rev().find(|b| **b <= here).copied().unwrap_or(at);
            let what = place(self.new, here, if base_is_place { here } else { base });
            let from_base = if base_is_place { 0 } else { here - base };
            let mut fixups = std::mem::take(&mut self.open[top].fixups);
            let step = self.piece_place(index, offset, what, from_base, &mut fixups);
            let filling = &mut self.open[top];
            (filling.fixups, filling.offset) = (fixups, offset + step);
        }
    }

    /// One place of a piece; how many bytes it takes.
    fn piece_place(
        &mut self,
        index: usize,
        offset: u64,
        what: Place<'d>,
        from_base: u64,
        fixups: &mut Vec<Fixup>,
    ) -> u64 {
        let clear = |s: &mut Self, width: usize| {
            let from = offset as usize;
            if let Some(bytes) = s.pieces[index].bytes.get_mut(from..from + width) {
                bytes.fill(0);
            }
        };
        match what {
            Place::Bytes => 1,
            Place::Pointer(to) => {
                clear(self, 8);
                if let Some(to) = self.bind(to, Access::Extent, None) {
                    fixups.push(Fixup { at: offset, store: Store::Abs64, to });
                }
                8
            }
            Place::Relative(to) if self.pieces[index].kind == PieceKind::Lsda => {
                clear(self, 4);
                let bound = match type_slot(self.new, to) {
                    Some(at) => self.bind_type_slot(at),
                    None => self.bind(to, Access::Extent, None),
                };
                if let Some(to) = bound {
                    fixups.push(Fixup { at: offset, store: Store::Pc32(0), to });
                }
                4
            }
            Place::Relative(to) => {
                clear(self, 4);
                // A jump table's entries are branches: within the patch they stay within the patch.
                let access = if matches!(to, Target::Func(..)) { Access::Branch } else { Access::Extent };
                if let Some(to) = self.bind(to, access, None) {
                    fixups.push(Fixup { at: offset, store: Store::Pc32(from_base.cast_signed()), to });
                }
                4
            }
            Place::Short(to) => {
                clear(self, 4);
                if let Some(to) = self.bind(to, Access::Extent, None) {
                    fixups.push(Fixup { at: offset, store: Store::Abs32, to });
                }
                4
            }
            Place::Import(name, addend) => {
                clear(self, 8);
                if let Some(import) = self.want(name) {
                    fixups.push(Fixup { at: offset, store: Store::Abs64, to: Bound::Import(import, addend) });
                }
                8
            }
            Place::Strange => {
                let message = format!("{} uses data with a relocation that is not understood", self.current);
                let name = self.current.clone();
                self.refuse("unknown-relocation", &name, message, "build with a supported linker");
                8
            }
        }
    }

    /// The language-specific data area of a function.
    pub(super) fn lsda_piece(&mut self, at: u64, _of: FuncId) -> Option<usize> {
        let end = self.new.build.lsda_end(at);
        Some(self.piece(at, end.checked_sub(at)?, PieceKind::Lsda, "exception table", None))
    }
}
