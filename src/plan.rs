//! Pure: image, patch and free room in, what to map, relocate and write out. No I/O.

use crate::addr::{LoadBias, ProcAddr, ProcRange};
use crate::insn;
use crate::maps::{self, Mapping, PAGE};
use crate::patch::{in_chain, Function, PatchFile, RelocKind, RelocTarget, SegmentKind, ENTRY_JUMP_LEN};
use crate::process::Access;

pub mod beside;
mod refusal;
pub mod sites;

pub use refusal::Refusal;

/// A `rel32` reaches so far either way; a page is left for instructions that end behind the place.
const REACH: u64 = (1 << 31) - PAGE;

/// Distance to the image that is kept below it.
const BELOW: u64 = 64 << 20;

/// Distance to the neighbours of a new mapping, so that the kernel never merges it with one.
const GAP: u64 = 16 * PAGE;

/// Lowest address that is used; mmap_min_addr is lower everywhere.
const LOWEST: u64 = 1 << 20;

/// First address that user space does not have.
const HIGHEST: u64 = 0x7fff_ffff_f000;
/// Where 32-bit absolute addresses end that may be sign-extended or zero-extended.
const SHORT_LIMIT: u64 = 1 << 31;

/// Part of the new mapping.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Piece {
    /// Where; whole pages.
    pub range: ProcRange,
    /// How it may be used.
    pub access: Access,
    /// What it begins with; the rest is zero.
    pub bytes: Vec<u8>,
}

/// A change of code: only where `expected` stands is `new` written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CodeEdit {
    /// Whose entry it is.
    pub function: String,
    /// Where.
    pub at: ProcAddr,
    /// What must be there.
    pub expected: [u8; ENTRY_JUMP_LEN as usize],
    /// What replaces it.
    pub new: [u8; ENTRY_JUMP_LEN as usize],
}

/// Where the parts of a patch are to be: record, stub, segments, in this order.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Layout {
    /// The whole mapping.
    pub region: ProcRange,
    /// Where [`insn::CALL_STUB`] goes; the switch stubs are on the pages behind it.
    pub stub: ProcAddr,
    /// The patch's own address zero.
    pub base: ProcAddr,
}

impl Layout {
    /// In the region that begins at `start`, behind a record of `record_bytes`, with room for stubs.
    #[must_use]
    pub fn at(start: ProcAddr, record_bytes: u64, stub_bytes: u64, patch: &PatchFile) -> Option<Self> {
        let stub = start.checked_add(record_bytes.checked_next_multiple_of(PAGE)?)?;
        let stubs = stub_bytes.checked_next_multiple_of(PAGE)?;
        let base = stub.checked_add(PAGE)?.checked_add(stubs)?;
        let end = base.checked_add(patch.len_bytes())?;
        Some(Self { region: ProcRange { start, end }, stub, base })
    }

    /// Near the image, so that each reaches every byte of the other: below it where there is room, for the heap
    /// grows above it; otherwise as far above as can be reached.
    ///
    /// # Errors
    ///
    /// No room.
    pub fn near(
        image: ProcRange,
        maps: &[Mapping],
        record_bytes: u64,
        stub_bytes: u64,
        patch: &PatchFile,
    ) -> Result<Self, Refusal> {
        let len_bytes =
            Self::at(ProcAddr(0), record_bytes, stub_bytes, patch).map_or(u64::MAX, |l| l.region.len_bytes());
        let no_room = || Refusal::NoRoom { len_bytes };
        let short = patch.relocs.iter().any(|r| r.kind == RelocKind::Abs32);
        let highest = if short { SHORT_LIMIT } else { HIGHEST };
        let window = ProcRange {
            start: ProcAddr(image.end.0.saturating_sub(REACH).max(LOWEST)),
            end: ProcAddr(image.start.0.saturating_add(REACH).min(highest)),
        };
        let wanted = len_bytes.checked_add(2 * GAP).ok_or_else(no_room)?;
        let mut best: Option<u64> = None;
        for hole in maps::holes(maps, window) {
            let below = hole.start < image.start;
            let top = if below { hole.end.0.min(image.start.0.saturating_sub(BELOW)) } else { hole.end.0 };
            let Some(start) = top.checked_sub(wanted).filter(|s| *s >= hole.start.0) else { continue };
            // Holes ascend: the last one below the image is the nearest; one above counts only without it.
            if below || best.is_none_or(|b| b > image.start.0) {
                best = Some(start + GAP);
            }
        }
        best.and_then(|start| Self::at(ProcAddr(start & !(PAGE - 1)), record_bytes, stub_bytes, patch))
            .ok_or_else(no_room)
    }
}

/// What a patch refers to outside of itself, in the process.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Links {
    /// Where the old image is.
    pub bias: LoadBias,
    /// Where each of the manifest's imports is.
    pub imports: Vec<ProcAddr>,
    /// Address zero of the patch that this one takes the place of, and of those before it.
    pub previous: Vec<ProcAddr>,
}

impl Links {
    fn resolve(&self, target: RelocTarget, base: ProcAddr) -> Option<ProcAddr> {
        match target {
            RelocTarget::Image(at) => self.bias.to_process(at),
            RelocTarget::Patch(at) => base.checked_add(at),
            RelocTarget::Import(index) => self.imports.get(index).copied(),
            RelocTarget::Previous(at) => {
                let (back, offset) = in_chain(at);
                self.previous.get(back)?.checked_add(offset)
            }
        }
    }
}

/// The patch's segments, relocated, and the stub pages with the switch stubs.
///
/// # Errors
///
/// A relocation does not reach its target.
pub fn pieces(patch: &PatchFile, layout: &Layout, links: &Links, stubs: &sites::Stubs) -> Result<Vec<Piece>, Refusal> {
    let stub_range = ProcRange { start: layout.stub, end: layout.base };
    let mut bytes = insn::CALL_STUB.to_vec();
    for (i, code) in stubs.code.iter().enumerate() {
        bytes.resize((PAGE + i as u64 * stubs.each) as usize, 0xcc);
        bytes.extend(code);
    }
    let mut out = vec![Piece { range: stub_range, access: Access::Execute, bytes }];
    for segment in &patch.segments {
        let mut bytes = segment.data.clone();
        let first = patch.relocs.partition_point(|r| r.at < segment.at);
        for reloc in patch.relocs.get(first..).unwrap_or(&[]) {
            let Some(offset) = reloc.at.checked_sub(segment.at).filter(|o| *o < bytes.len() as u64) else { break };
            let place = layout.base.checked_add(reloc.at);
            let symbol = links.resolve(reloc.target, layout.base);
            let value = symbol.zip(place).and_then(|(symbol, place)| relocate(reloc.kind, symbol, reloc.addend, place));
            let unreachable = || Refusal::OutOfReach { at: place.unwrap_or_default(), to: symbol.unwrap_or_default() };
            let value = value.ok_or_else(unreachable)?;
            let len = if reloc.kind == RelocKind::Abs64 { 8 } else { 4 };
            let start = usize::try_from(offset).unwrap_or(usize::MAX);
            let slot = start.checked_add(len).and_then(|end| bytes.get_mut(start..end)).ok_or_else(unreachable)?;
            slot.copy_from_slice(value.get(..len).ok_or_else(unreachable)?);
        }
        let access = match segment.kind {
            SegmentKind::Rodata => Access::Read,
            SegmentKind::Text => Access::Execute,
            SegmentKind::Data => Access::Write,
        };
        let range = layout
            .base
            .checked_add(segment.at)
            .and_then(|start| ProcRange::new(start, segment.len_bytes.checked_next_multiple_of(PAGE)?));
        let range = range.ok_or(Refusal::NoRoom { len_bytes: segment.len_bytes })?;
        out.push(Piece { range, access, bytes });
    }
    Ok(out)
}

/// The bytes that a relocation stores (System V psABI, table 4.10), or `None` if the value does not fit.
fn relocate(kind: RelocKind, symbol: ProcAddr, addend: i64, place: ProcAddr) -> Option<[u8; 8]> {
    let sum = i128::from(symbol.0) + i128::from(addend);
    match kind {
        RelocKind::Abs64 => Some(u64::try_from(sum).ok()?.to_le_bytes()),
        RelocKind::Abs32 => Some(u64::from(u32::try_from(sum).ok().filter(|v| *v < 1 << 31)?).to_le_bytes()),
        RelocKind::Pc32 => {
            let value = i32::try_from(sum - i128::from(place.0)).ok()?;
            Some(i64::from(value).to_le_bytes())
        }
    }
}

/// What must be read to judge one old function: its body with the padding that the jump needs, and its companions.
#[must_use]
pub fn old_code(function: &Function, bias: LoadBias) -> Option<Vec<ProcRange>> {
    let Some(old) = &function.old else { return Some(Vec::new()) };
    let padding = old.entry.as_ref().map_or(0, |e| e.padding);
    let mut out = vec![ProcRange::new(bias.to_process(old.at)?, old.size.checked_add(padding)?)?];
    for c in &old.companions {
        out.push(ProcRange::new(bias.to_process(c.at)?, c.size)?);
    }
    Some(out)
}

/// What an old function is like, by its bytes in memory.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct OldFacts {
    /// Whether its body branches back to its entry.
    pub branches_to_entry: bool,
    /// Its code from the entry on, as far as the entry jump may reach into it.
    pub overwritten: Vec<u8>,
    /// All of its body, if that branches back to its entry.
    pub looping: Vec<u8>,
}

/// Judges one old function by its bytes in memory, as [`old_code`] asked for them.
///
/// # Errors
///
/// It is not the code that the patch was built for, or its entry cannot take a jump.
pub fn check_old_code(function: &Function, bias: LoadBias, code: &[Vec<u8>]) -> Result<OldFacts, Refusal> {
    let mut facts = OldFacts::default();
    let Some(old) = &function.old else { return Ok(facts) };
    let name = &function.demangled;
    let at = bias.to_process(old.at).unwrap_or_default();
    let damaged = || Refusal::CodeChanged { function: name.clone(), at, breakpoint: false };
    let whole = code.first().ok_or_else(damaged)?;
    let (body, padding) =
        whole.split_at_checked(usize::try_from(old.size).unwrap_or(usize::MAX)).ok_or_else(damaged)?;
    same_code(name, body, at, &old.sha256.0)?;
    for (companion, bytes) in old.companions.iter().zip(code.get(1..).unwrap_or(&[])) {
        same_code(&companion.name, bytes, bias.to_process(companion.at).unwrap_or_default(), &companion.sha256.0)?;
    }
    if !insn::is_padding(padding) {
        return Err(Refusal::EntryTooShort { function: name.clone(), at });
    }
    let window = old.entry.as_ref().and_then(|e| ProcRange::new(bias.to_process(e.at)?, ENTRY_JUMP_LEN));
    if let (Some(entry), Some(window)) = (&old.entry, window) {
        let offset = window.start.offset_from(at).and_then(|o| usize::try_from(o).ok()).ok_or_else(damaged)?;
        if whole.get(offset..offset + ENTRY_JUMP_LEN as usize) != Some(&*entry.original.0) {
            return Err(damaged());
        }
        facts.overwritten = whole.iter().skip(offset).take(insn::OVERWRITTEN).copied().collect();
    }
    let entries = [Some(at), window.map(|w| w.start)].map(|a| a.unwrap_or(at));
    let starts = std::iter::once(at).chain(old.companions.iter().filter_map(|c| bias.to_process(c.at)));
    for (i, start) in starts.enumerate() {
        let bytes = if i == 0 { body } else { code.get(i).map_or(&[][..], Vec::as_slice) };
        let found = insn::survey(bytes, start, &entries, window);
        if let Some(at) = found.undecodable {
            return Err(Refusal::Undecodable { function: name.clone(), at });
        }
        if let Some((from, to)) = found.into_window {
            return Err(Refusal::BranchIntoEntry { function: name.clone(), from, to });
        }
        facts.branches_to_entry |= found.branches_to_entry;
    }
    if facts.branches_to_entry {
        facts.looping = body.to_vec();
    }
    Ok(facts)
}

fn same_code(name: &str, bytes: &[u8], at: ProcAddr, sha256: &[u8]) -> Result<(), Refusal> {
    use sha2::Digest;
    if sha2::Sha256::digest(bytes).as_slice() == sha256 {
        return Ok(());
    }
    Err(Refusal::CodeChanged { function: name.to_owned(), at, breakpoint: bytes.first() == Some(&0xcc) })
}

#[cfg(test)]
mod tests;
