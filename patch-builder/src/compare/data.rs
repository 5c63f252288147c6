//! Data by content: bytes, pointers, and tables of relative offsets.

use super::{Comparer, Key};
use crate::build::{DynKind, FastMap, SymTarget};
use crate::lift::{resolve, Access, Target};
use crate::side::{Marks, Side};

/// Data longer than this is not compared byte by byte: different.
const MAX_COMPARED: u64 = 1 << 30;

const R_64: u32 = 1;
const R_PC32: u32 = 2;
const R_32: u32 = 10;
const R_32S: u32 = 11;

/// What stands at a place in data, besides bytes.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Place<'d> {
    /// Nothing but bytes.
    Bytes,
    /// An 8-byte address.
    Pointer(Target<'d>),
    /// The address of an import, plus an addend.
    Import(&'d str, i64),
    /// A 4-byte distance from the start of the table to this target.
    Relative(Target<'d>),
    /// A 4-byte absolute address.
    Short(Target<'d>),
    /// Something that is not understood.
    Strange,
}

/// What stands at `at`, in a piece of data that begins at `base`.
#[must_use]
pub fn place<'d>(side: &Side<'d>, at: u64, base: u64) -> Place<'d> {
    let build = &side.build;
    let reloc = build.relocs_in(at, 1).iter().find(|r| r.kind != 0);
    let word = |len: u64| build.bytes(at, len).map(|b| b.iter().rev().fold(0u64, |v, byte| v << 8 | u64::from(*byte)));
    if let Some(dynamic) = build.dynamic.get(&at) {
        return match dynamic.kind {
            DynKind::Relative(to) => Place::Pointer(resolve(build, to, reloc)),
            DynKind::Own(value, addend) => Place::Pointer(resolve(build, value.wrapping_add_signed(addend), reloc)),
            DynKind::Ifunc(to) => Place::Pointer(resolve(build, to, None)),
            DynKind::Import(name, addend) => Place::Import(name, addend),
            DynKind::Copy(_) => Place::Bytes,
            DynKind::TpOff(_)
            | DynKind::TlsModule(_)
            | DynKind::TlsOffset(_)
            | DynKind::TlsDescriptor(_)
            | DynKind::Other(_) => Place::Strange,
        };
    }
    let Some(reloc) = reloc else { return Place::Bytes };
    let symbol = build.rel_sym(reloc);
    let stored = if reloc.kind == R_64 { word(8) } else { word(4) };
    let number = symbol.target == SymTarget::Absolute && matches!(reloc.kind, R_64 | R_32 | R_32S);
    if number && stored == Some(symbol.value.wrapping_add_signed(reloc.addend)) {
        return Place::Bytes;
    }
    match (reloc.kind, word(4), word(8)) {
        (R_64, _, Some(value)) => Place::Pointer(resolve(build, value, Some(reloc))),
        (R_32 | R_32S, Some(value), _) => Place::Short(resolve(build, value, Some(reloc))),
        (R_PC32, Some(value), _) => {
            let to = base.wrapping_add_signed(i64::from(value as u32 as i32));
            Place::Relative(resolve(build, to, None))
        }
        _ => Place::Strange,
    }
}

impl<'d> Comparer<'_, 'd> {
    /// Whether `len` bytes at `a` and `b` mean the same; without `len`, up to where each of them ends.
    pub(super) fn data(&mut self, a: u64, b: u64, len: Option<u64>) -> bool {
        self.remembered(Key::Data(a, b, len.unwrap_or(u64::MAX)), |this| this.data_now(a, b, len))
    }

    fn data_now(&mut self, a: u64, b: u64, len: Option<u64>) -> bool {
        let (old, new) = (self.old, self.new);
        let (len_a, len_b) = match len {
            Some(len) => (len, len),
            None => (old.compare_end(a).0.saturating_sub(a), new.compare_end(b).0.saturating_sub(b)),
        };
        // An object ends at the latest where the next one is known to begin, in either build.
        let common = len_a.min(len_b);
        let (zero_a, zero_b) = (old.build.is_zero_fill(a), new.build.is_zero_fill(b));
        if zero_a && zero_b {
            return true;
        }
        if common > MAX_COMPARED {
            return false;
        }
        let zeros = vec![0; if zero_a || zero_b { common as usize } else { 0 }];
        let bytes_of =
            |side: &Side<'d>, at, zero: bool| if zero { Some(None) } else { side.build.bytes(at, common).map(Some) };
        let (Some(x), Some(y)) = (bytes_of(old, a, zero_a), bytes_of(new, b, zero_b)) else { return false };
        let (x, y) = (x.unwrap_or(&zeros), y.unwrap_or(&zeros));
        let mut offset = 0u64;
        let (mut marks_a, mut marks_b) = (old.marks(a), new.marks(b));
        while offset < common {
            let plain = plain(&mut marks_a, a, offset).min(plain(&mut marks_b, b, offset)).min(common);
            if plain > offset {
                let run = offset as usize..plain as usize;
                let at = (a + offset, b + offset);
                if let Some(i) = self.equal.first_difference(at, &x[run.clone()], &y[run]) {
                    return self.location_drift(a, b, offset + i as u64, x, y);
                }
                offset = plain;
                continue;
            }
            let (p, q) = (place(old, a + offset, a), place(new, b + offset, b));
            let i = offset as usize;
            let step = match (p, q) {
                (Place::Bytes, Place::Bytes) => {
                    if x[i] != y[i] {
                        return self.location_drift(a, b, offset, x, y);
                    }
                    1
                }
                (Place::Pointer(Target::Data(s)), Place::Pointer(Target::Data(t))) if self.is_slice(s, t, i, x, y) => {
                    let len = self.old.str_end(s).map(|end| end - s);
                    if !self.data(s, t, len) {
                        return offset == 0 && self.location_drift(a, b, offset, x, y);
                    }
                    8
                }
                (Place::Pointer(s), Place::Pointer(t)) => {
                    if !self.targets(s, t, Access::Extent) {
                        return offset == 0 && self.location_drift(a, b, offset, x, y);
                    }
                    8
                }
                (Place::Relative(s), Place::Relative(t)) | (Place::Short(s), Place::Short(t)) => {
                    if !self.targets(s, t, Access::Extent) {
                        return false;
                    }
                    4
                }
                (Place::Import(m, s), Place::Import(n, t)) if s == t && self.same_import(m, n) => 8,
                _ => return false,
            };
            offset += step;
        }
        true
    }

    /// Whether behind two pointers to text stands its length, the same in both builds.
    fn is_slice(&self, s: u64, t: u64, at: usize, x: &[u8], y: &[u8]) -> bool {
        let len = |v: &[u8]| v.get(at + 8..at + 16).and_then(|b| b.try_into().ok()).map(u64::from_le_bytes);
        let (Some(p), Some(q)) = (self.old.str_end(s), self.new.str_end(t)) else { return false };
        len(x) == Some(p - s) && len(y) == Some(q - t) && p - s == q - t
    }

    /// Two slots of the global offset table, by what the dynamic linker puts there.
    pub(super) fn slots(&mut self, s: u64, t: u64) -> bool {
        match (slot(self.old, s), slot(self.new, t)) {
            (Place::Import(m, x), Place::Import(n, y)) => x == y && self.same_import(m, n),
            (Place::Pointer(x), Place::Pointer(y)) => self.targets(x, y, Access::Extent),
            _ => false,
        }
    }
}

/// Up to which offset behind `base` nothing but bytes stands.
fn plain(marks: &mut Marks<'_>, base: u64, offset: u64) -> u64 {
    marks.next(base + offset).map_or(u64::MAX, |at| at - base)
}

fn first_difference(x: &[u8], y: &[u8]) -> Option<usize> {
    if x == y {
        return None;
    }
    x.iter().zip(y).position(|(a, b)| a != b)
}

/// Bytes of the old build that are the same in the new one.
#[derive(Clone, Copy, Debug, Default)]
struct Stretch {
    from: u64,
    to: u64,
    /// Whether the byte at `to` differs.
    ends: bool,
}

/// The stretch last found equal, by how far apart it lies in the two builds: a text that is referred to everywhere is
/// compared once, not from each of these places to its end.
#[derive(Default)]
pub(super) struct Stretches(FastMap<u64, Stretch>);

impl Stretches {
    /// Shorter is compared faster than it is looked up.
    const LONG: usize = 128;

    /// Where `x`, which lies at `a` of the old build, first differs from `y`, at `b` of the new one.
    fn first_difference(&mut self, (a, b): (u64, u64), x: &[u8], y: &[u8]) -> Option<usize> {
        if x.len() < Self::LONG {
            return first_difference(x, y);
        }
        let known = self.0.entry(b.wrapping_sub(a)).or_default();
        let inside = known.from <= a && a < known.to;
        let done = if inside { ((known.to - a) as usize).min(x.len()) } else { 0 };
        if done == x.len() {
            return None;
        }
        let found =
            if inside && known.ends { Some(done) } else { first_difference(&x[done..], &y[done..]).map(|i| done + i) };
        let to = a + found.unwrap_or(x.len()) as u64;
        *known = Stretch { from: if inside { known.from } else { a }, to, ends: found.is_some() };
        found
    }
}

/// What a slot of the global offset table holds at run time.
#[must_use]
pub fn slot<'d>(side: &Side<'d>, at: u64) -> Place<'d> {
    let build = &side.build;
    match build.dynamic.get(&at).map(|d| d.kind) {
        Some(DynKind::TpOff(offset)) => match build.tls_at(offset) {
            Some((id, offset)) => Place::Pointer(Target::Tls(id, offset)),
            None => Place::Strange,
        },
        Some(_) => place(side, at, at),
        None => match build.bytes(at, 8).and_then(|b| b.try_into().ok()).map(u64::from_le_bytes) {
            Some(0) => Place::Pointer(Target::Unknown(0)),
            Some(value) if !build.pie => Place::Pointer(resolve(build, value, None)),
            _ => Place::Strange,
        },
    }
}

/// The slot that an entry of a type table refers to. Compilers put these in writable data, where the dynamic linker
/// fills them; nothing else writes there.
#[must_use]
pub fn type_slot(side: &Side<'_>, entry: Target<'_>) -> Option<u64> {
    let at = match entry {
        Target::Data(at) | Target::Slot(at) => at,
        Target::Object(id, offset) => side.build.object(id).addr.wrapping_add_signed(offset),
        _ => return None,
    };
    let named = match entry {
        Target::Object(id, _) => side.build.object(id).name().starts_with("DW.ref."),
        _ => true,
    };
    let held = matches!(place(side, at, at), Place::Pointer(_) | Place::Import(..));
    (named && side.is_mutable(at) && held).then_some(at)
}

/// Whether everything from `from` to `to` behind `at` is padding: zeros without meaning.
fn is_padding(side: &Side<'_>, at: u64, from: u64, to: u64) -> bool {
    if from == to || side.build.is_zero_fill(at) {
        return true;
    }
    // More than an alignment's worth is content.
    to - from < 64
        && side.build.bytes(at + from, to - from).is_some_and(|b| b.iter().all(|b| *b == 0))
        && (from..to).all(|i| place(side, at + i, at) == Place::Bytes)
}

impl<'d> Comparer<'_, 'd> {
    /// Whether two entries of type tables mean the same type: the address itself, or that of a slot that holds it.
    fn types(&mut self, s: Target<'d>, t: Target<'d>) -> bool {
        match (type_slot(self.old, s), type_slot(self.new, t)) {
            (Some(x), Some(y)) => {
                let (x, y) = (place(self.old, x, x), place(self.new, y, y));
                self.places(x, y)
            }
            (None, None) => self.targets(s, t, Access::Extent),
            _ => false,
        }
    }

    /// Whether two functions handle exceptions in the same way.
    pub(super) fn exception_tables(&mut self, f: crate::build::FuncId, g: crate::build::FuncId) -> bool {
        let lsda = |side: &Side<'d>, id| side.build.unwind.fde_at(side.build.func(id).addr).and_then(|e| e.lsda);
        let (a, b) = match (lsda(self.old, f), lsda(self.new, g)) {
            (None, None) => return true,
            (Some(a), Some(b)) => (a, b),
            _ => return false,
        };
        let (end_a, end_b) = (self.old.build.lsda_end(a), self.new.build.lsda_end(b));
        let len = (end_a - a).min(end_b - b);
        let (Some(x), Some(y)) = (self.old.build.bytes(a, len), self.new.build.bytes(b, len)) else { return false };
        // What is longer may only be padding before the next table.
        if !is_padding(self.old, a, len, end_a - a) || !is_padding(self.new, b, len, end_b - b) {
            return false;
        }
        let mut i = 0u64;
        let (mut marks_a, mut marks_b) = (self.old.marks(a), self.new.marks(b));
        while i < len {
            let plain = plain(&mut marks_a, a, i).min(plain(&mut marks_b, b, i)).min(len);
            if plain > i {
                let run = i as usize..plain as usize;
                if x[run.clone()] != y[run] {
                    return false;
                }
                i = plain;
                continue;
            }
            match (place(self.old, a + i, a + i), place(self.new, b + i, b + i)) {
                (Place::Bytes, Place::Bytes) if x[i as usize] == y[i as usize] => i += 1,
                (Place::Relative(s), Place::Relative(t)) | (Place::Short(s), Place::Short(t)) if self.types(s, t) => {
                    i += 4;
                }
                (Place::Pointer(s), Place::Pointer(t)) if self.targets(s, t, Access::Extent) => i += 8,
                _ => return false,
            }
        }
        true
    }
}

#[cfg(test)]
mod tests {
    use super::{first_difference, Stretches};
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn what_is_known_of_equal_stretches_changes_no_answer(
            flips in prop::collection::vec(0usize..2000, 0..4),
            runs in prop::collection::vec((0usize..2000, 0usize..2000), 1..40),
        ) {
            let old: Vec<u8> = (0..2000).map(|i| (i % 251) as u8).collect();
            let mut new = old.clone();
            flips.iter().for_each(|at| new[*at] ^= 1);
            let mut known = Stretches::default();
            for (from, len) in runs {
                let to = (from + len).min(old.len());
                let (x, y) = (&old[from..to], &new[from..to]);
                let at = (0x1000 + from as u64, 0x5000 + from as u64);
                prop_assert_eq!(known.first_difference(at, x, y), first_difference(x, y));
            }
        }
    }
}
