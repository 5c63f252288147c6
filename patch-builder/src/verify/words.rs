//! What the words of a patch refer to, by its bytes and its relocations alone.

use std::cell::Cell;

use livepatch::patch::{PatchFile, RelocKind, RelocTarget};

/// What a field leads to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Actual {
    /// An address of the old image.
    Image(u64),
    /// An offset in the patch.
    Patch(u64),
    /// An import of the manifest, and an addend.
    Import(usize, i64),
    /// An offset in the previous patch.
    Previous(u64),
    /// Zero.
    Null,
}

/// A patch's bytes and relocations, and which of these were looked at.
pub(super) struct Words<'p> {
    patch: &'p PatchFile,
    seen: Vec<Cell<bool>>,
}

impl<'p> Words<'p> {
    pub fn new(patch: &'p PatchFile) -> Self {
        Self { patch, seen: vec![Cell::new(false); patch.relocs.len()] }
    }

    /// The bytes at `at`, with zeros where the file has none.
    pub fn bytes(&self, at: u64, len: u64) -> Option<Vec<u8>> {
        let end = at.checked_add(len)?;
        let segment = self.patch.segments.iter().find(|s| s.at <= at && end <= s.at + s.len_bytes)?;
        let from = usize::try_from(at - segment.at).ok()?;
        let to = usize::try_from(end - segment.at).ok()?;
        let mut out = segment.data.get(from..to.min(segment.data.len())).unwrap_or(&[]).to_vec();
        out.resize(to - from, 0);
        Some(out)
    }

    /// The signed number at `at`.
    pub fn number(&self, at: u64) -> Option<i32> {
        let bytes = self.bytes(at, 4)?;
        self.untouched(at, 4).then(|| bytes.first_chunk().map(|b| i32::from_le_bytes(*b)))?
    }

    /// Whether no relocation changes any of these bytes.
    pub fn untouched(&self, at: u64, len: u64) -> bool {
        let from = self.patch.relocs.partition_point(|r| r.at + 8 <= at);
        !self.patch.relocs[from..].iter().take_while(|r| r.at < at + len).any(|r| {
            let width = if r.kind == RelocKind::Abs64 { 8 } else { 4 };
            r.at + width > at
        })
    }

    /// What the relocation at exactly `at` refers to: itself, and its addend.
    fn reloc(&self, at: u64, kind: RelocKind) -> Option<(RelocTarget, i64)> {
        let index = self.patch.relocs.binary_search_by_key(&at, |r| r.at).ok()?;
        let r = self.patch.relocs.get(index).filter(|r| r.kind == kind)?;
        self.seen.get(index)?.set(true);
        Some((r.target, r.addend))
    }

    fn moved(target: RelocTarget, addend: i64) -> Option<Actual> {
        Some(match target {
            RelocTarget::Image(at) => Actual::Image(at.0.checked_add_signed(addend)?),
            RelocTarget::Patch(at) => Actual::Patch(at.checked_add_signed(addend)?),
            RelocTarget::Previous(at) => Actual::Previous(at.checked_add_signed(addend)?),
            RelocTarget::Import(index) => Actual::Import(index, addend),
        })
    }

    /// Four bytes at `at`, a distance from `base`.
    pub fn relative(&self, at: u64, base: u64) -> Option<Actual> {
        if let Some((target, addend)) = self.reloc(at, RelocKind::Pc32) {
            let distance = base.wrapping_sub(at).cast_signed();
            return Self::moved(target, addend.checked_add(distance)?);
        }
        Some(Actual::Patch(base.checked_add_signed(i64::from(self.number(at)?))?))
    }

    /// Eight bytes at `at`, an address.
    pub fn long(&self, at: u64) -> Option<Actual> {
        if let Some((target, addend)) = self.reloc(at, RelocKind::Abs64) {
            return Self::moved(target, addend);
        }
        let zero = self.untouched(at, 8) && self.bytes(at, 8)?.iter().all(|b| *b == 0);
        zero.then_some(Actual::Null)
    }

    /// Four bytes at `at`, an address.
    pub fn short(&self, at: u64) -> Option<Actual> {
        if let Some((target, addend)) = self.reloc(at, RelocKind::Abs32) {
            return Self::moved(target, addend);
        }
        Some(match self.number(at)?.cast_unsigned() {
            0 => Actual::Null,
            to => Actual::Image(u64::from(to)),
        })
    }

    /// One byte at `at`, the distance of a `jmp rel32` behind the function, which ends at `end`.
    pub fn island(&self, at: u64, end: u64) -> Option<Actual> {
        let distance = i8::from_le_bytes(*self.bytes(at, 1)?.first_chunk()?);
        let to = (at + 1).checked_add_signed(i64::from(distance)).filter(|to| *to >= end)?;
        let jump = self.untouched(at, 1) && self.untouched(to, 1) && self.bytes(to, 1)? == [0xe9];
        jump.then(|| self.relative(to + 1, to + 5))?
    }

    /// The first relocation that nobody has looked at, outside of `foreign` ranges.
    pub fn unexplained(&self, foreign: &[(u64, u64)]) -> Option<u64> {
        let unseen = self.patch.relocs.iter().zip(&self.seen).filter(|(_, seen)| !seen.get());
        unseen.map(|(r, _)| r.at).find(|at| !foreign.iter().any(|(from, to)| (from..to).contains(&at)))
    }
}
