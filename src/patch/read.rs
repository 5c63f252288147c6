//! Reads a patch file. Strict: what it does not know, it rejects.

use std::collections::{HashMap, HashSet};
use std::fmt;

use goblin::elf::{header, program_header, reloc, section_header, sym, Elf};

use super::{
    Manifest, ENTRY_JUMP_LEN, FORMAT_VERSION, MANIFEST_SECTION, NOTE_NAME, NOTE_TYPE_DIGEST, NOTE_TYPE_TARGET,
    SHN_PREVIOUS_PATCH, SHN_TARGET_IMAGE,
};
use crate::addr::ImageAddr;

/// Why a file is not a patch that this version can use.
#[derive(Debug)]
#[non_exhaustive]
pub enum PatchError {
    /// Not an x86-64 ELF shared object.
    NotElf(String),
    /// An ELF file, but without the note or the manifest of a patch.
    NotAPatch(&'static str),
    /// A format version that this reader does not know.
    Version(u32),
    /// The manifest is no valid JSON of its format.
    Manifest(serde_json::Error),
    /// Something in the file contradicts the format.
    Malformed(String),
}

impl fmt::Display for PatchError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NotElf(why) => write!(f, "not an x86-64 ELF shared object: {why}"),
            Self::NotAPatch(what) => write!(f, "not a live patch: it has no {what}"),
            Self::Version(v) => write!(f, "patch format {v}; this version reads formats 1 to {FORMAT_VERSION}"),
            Self::Manifest(e) => write!(f, "the patch's manifest is damaged: {e}"),
            Self::Malformed(why) => write!(f, "the patch is damaged: {why}"),
        }
    }
}

impl std::error::Error for PatchError {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        match self {
            Self::Manifest(e) => Some(e),
            _ => None,
        }
    }
}

/// What a segment may be used for; never writable and executable at once.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SegmentKind {
    /// Read-only.
    Rodata,
    /// Read and execute.
    Text,
    /// Read and write.
    Data,
}

/// One part of the patch as it is to be mapped, page-aligned in the patch's own address space.
#[derive(Clone, Debug)]
pub struct Segment {
    /// How it is mapped.
    pub kind: SegmentKind,
    /// Its first byte in the patch's address space (from 0); a multiple of 4096.
    pub at: u64,
    /// Its length in memory; what `data` leaves is zero.
    pub len_bytes: u64,
    /// Its bytes in the file, before relocation.
    pub data: Vec<u8>,
}

/// What is stored at a relocated place.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RelocKind {
    /// `R_X86_64_64`: 8 bytes, `S + A`.
    Abs64,
    /// `R_X86_64_PC32`: 4 bytes, `S + A - P`, signed.
    Pc32,
    /// `R_X86_64_32S`: 4 bytes, `S + A`; the value must be below 2 GiB, so that it may be extended either way.
    Abs32,
}

/// What a relocation refers to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RelocTarget {
    /// An address of the old image.
    Image(ImageAddr),
    /// An offset in the patch's own address space.
    Patch(u64),
    /// An import, by its index in the manifest's list.
    Import(usize),
    /// An offset in the address space of the patch that this one takes the place of.
    Previous(u64),
}

/// One relocation.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Reloc {
    /// Where to store, as an offset in the patch's address space.
    pub at: u64,
    /// What to store.
    pub kind: RelocKind,
    /// `S`.
    pub target: RelocTarget,
    /// `A`.
    pub addend: i64,
}

/// A patch, read and checked.
#[derive(Clone, Debug)]
pub struct PatchFile {
    /// The manifest.
    pub manifest: Manifest,
    /// In ascending order, without overlap.
    pub segments: Vec<Segment>,
    /// All within the segments.
    pub relocs: Vec<Reloc>,
    /// Offset and length in the patch's address space of the unwind table, zero terminator included.
    pub eh_frame: Option<(u64, u64)>,
    /// SHA-256 of the whole file: the patch's identity.
    pub digest: [u8; 32],
}

fn malformed(why: impl Into<String>) -> PatchError {
    PatchError::Malformed(why.into())
}

/// `data[at..at + len]`, checked.
fn slice<'a>(data: &'a [u8], at: u64, len: u64, what: &str) -> Result<&'a [u8], PatchError> {
    let end = at.checked_add(len).ok_or_else(|| malformed(format!("{what} at {at:#x} is too long")))?;
    usize::try_from(at)
        .ok()
        .zip(usize::try_from(end).ok())
        .and_then(|(a, e)| data.get(a..e))
        .ok_or_else(|| malformed(format!("{what} at {at:#x}, {len} bytes, lies outside the file")))
}

/// Longest patch address space that is accepted.
const MAX_LEN_BYTES: u64 = 1 << 30;
const PAGE: u64 = 4096;

impl PatchFile {
    /// Reads a patch from the bytes of its file.
    ///
    /// # Errors
    ///
    /// Whatever is not exactly as docs/patch-format.md says.
    pub fn parse(bytes: &[u8]) -> Result<Self, PatchError> {
        let elf = Elf::parse(bytes).map_err(|e| PatchError::NotElf(e.to_string()))?;
        if !elf.is_64 || !elf.little_endian || elf.header.e_machine != header::EM_X86_64 {
            return Err(PatchError::NotElf("another architecture".into()));
        }
        if elf.header.e_type != header::ET_DYN {
            return Err(PatchError::NotElf(format!("type {} instead of ET_DYN", elf.header.e_type)));
        }
        check_digest(&elf, bytes)?;
        let (version, note_build_id) = target_note(&elf, bytes)?;
        let json = section(&elf, bytes, MANIFEST_SECTION)?.ok_or(PatchError::NotAPatch("manifest"))?;
        let manifest = match version {
            1 => super::v1::read(json),
            2 => serde_json::from_slice(json).and_then(only_of_version_2),
            _ => serde_json::from_slice(json),
        };
        let manifest: Manifest = manifest.map_err(PatchError::Manifest)?;
        if manifest.format != version {
            return Err(PatchError::Version(manifest.format));
        }
        if manifest.target.build_id.0 != note_build_id {
            return Err(malformed("note and manifest name different targets"));
        }
        let segments = segments(&elf, bytes)?;
        let relocs = relocs(&elf, bytes, &segments, &manifest)?;
        let eh_frame = eh_frame(&elf, bytes, &segments)?;
        check_manifest(&manifest, &segments)?;
        Ok(Self { manifest, segments, relocs, eh_frame, digest: sha256(bytes) })
    }

    /// Length of the patch's address space in bytes, a multiple of 4096.
    #[must_use]
    pub fn len_bytes(&self) -> u64 {
        self.segments.last().map_or(0, |s| (s.at + s.len_bytes).next_multiple_of(PAGE))
    }
}

fn sha256(bytes: &[u8]) -> [u8; 32] {
    use sha2::Digest;
    sha2::Sha256::digest(bytes).into()
}

fn section<'a>(elf: &Elf<'_>, bytes: &'a [u8], name: &str) -> Result<Option<&'a [u8]>, PatchError> {
    let mut found = elf.section_headers.iter().filter(|s| elf.shdr_strtab.get_at(s.sh_name) == Some(name));
    let Some(header) = found.next() else { return Ok(None) };
    if found.next().is_some() {
        return Err(malformed(format!("two sections {name}")));
    }
    if header.sh_type == section_header::SHT_NOBITS {
        return Err(malformed(format!("section {name} has no bytes")));
    }
    slice(bytes, header.sh_offset, header.sh_size, name).map(Some)
}

/// The format version and the target's build-id.
fn target_note(elf: &Elf<'_>, bytes: &[u8]) -> Result<(u32, Vec<u8>), PatchError> {
    let notes = elf.iter_note_headers(bytes).ok_or(PatchError::NotAPatch("note"))?;
    let mut found = None;
    for note in notes {
        let note = note.map_err(|e| malformed(e.to_string()))?;
        if note.name != NOTE_NAME || note.n_type != NOTE_TYPE_TARGET {
            continue;
        }
        let (version, build_id) =
            note.desc.split_first_chunk::<4>().ok_or_else(|| malformed("its note is too short"))?;
        let version = u32::from_le_bytes(*version);
        if !(1..=FORMAT_VERSION).contains(&version) {
            return Err(PatchError::Version(version));
        }
        if build_id.is_empty() || found.replace((version, build_id.to_vec())).is_some() {
            return Err(malformed("it must name exactly one target build-id"));
        }
    }
    found.ok_or(PatchError::NotAPatch("note"))
}

/// The file must be, byte for byte, the one that was written.
fn check_digest(elf: &Elf<'_>, bytes: &[u8]) -> Result<(), PatchError> {
    let notes = elf.iter_note_headers(bytes).ok_or(PatchError::NotAPatch("note"))?;
    let mut found = None;
    for note in notes {
        let note = note.map_err(|e| malformed(e.to_string()))?;
        if note.name != NOTE_NAME || note.n_type != NOTE_TYPE_DIGEST {
            continue;
        }
        // The descriptor is a part of `bytes`: its place is the distance of the two.
        let at = (note.desc.as_ptr() as usize).checked_sub(bytes.as_ptr() as usize);
        if note.desc.len() != 32 || found.replace((at, note.desc)).is_some() {
            return Err(malformed("it must have exactly one digest"));
        }
    }
    let Some((at, digest)) = found else { return Err(PatchError::NotAPatch("digest")) };
    let right = at.and_then(|at| super::file_digest(bytes, at));
    if right.is_none_or(|r| r[..] != *digest) {
        return Err(malformed("its digest does not match: the file was changed or cut after it was written"));
    }
    Ok(())
}

fn segments(elf: &Elf<'_>, bytes: &[u8]) -> Result<Vec<Segment>, PatchError> {
    let mut segments: Vec<Segment> = Vec::new();
    for ph in &elf.program_headers {
        match ph.p_type {
            program_header::PT_LOAD => {}
            program_header::PT_NOTE | program_header::PT_GNU_STACK => continue,
            other => return Err(malformed(format!("program header of unknown type {other:#x}"))),
        }
        let kind = match ph.p_flags & 7 {
            program_header::PF_R => SegmentKind::Rodata,
            f if f == program_header::PF_R | program_header::PF_X => SegmentKind::Text,
            f if f == program_header::PF_R | program_header::PF_W => SegmentKind::Data,
            f => return Err(malformed(format!("a segment with access flags {f}"))),
        };
        let floor = segments.last().map_or(0, |s| (s.at + s.len_bytes).next_multiple_of(PAGE));
        let end = ph.p_vaddr.checked_add(ph.p_memsz).filter(|e| *e <= MAX_LEN_BYTES);
        if !ph.p_vaddr.is_multiple_of(PAGE) || ph.p_vaddr < floor || end.is_none() || ph.p_filesz > ph.p_memsz {
            return Err(malformed(format!(
                "a segment at {:#x} that overlaps, is too long or is not page-aligned",
                ph.p_vaddr
            )));
        }
        let data = match ph.p_filesz {
            0 => Vec::new(),
            len => slice(bytes, ph.p_offset, len, "a segment")?.to_vec(),
        };
        segments.push(Segment { kind, at: ph.p_vaddr, len_bytes: ph.p_memsz, data });
    }
    if segments.is_empty() {
        return Err(malformed("it has no segments"));
    }
    Ok(segments)
}

/// The segment in which all of `at..at + len` has bytes from the file.
fn holder(segments: &[Segment], at: u64, len: u64) -> Option<&Segment> {
    let end = at.checked_add(len)?;
    segments.iter().find(|s| s.at <= at && end <= s.at + s.data.len() as u64)
}

fn relocs(elf: &Elf<'_>, bytes: &[u8], segments: &[Segment], manifest: &Manifest) -> Result<Vec<Reloc>, PatchError> {
    let mut out: Vec<Reloc> = Vec::new();
    let imports: HashMap<String, usize> = manifest.imports.iter().enumerate().map(|(i, m)| (m.symbol(), i)).collect();
    let context = Context { elf, segments, imports, after: manifest.after.is_some() };
    for header in &elf.section_headers {
        match header.sh_type {
            section_header::SHT_RELA => {}
            section_header::SHT_REL | section_header::SHT_DYNAMIC => {
                return Err(malformed("a relocation or dynamic section of a kind that patches do not have"));
            }
            _ => continue,
        }
        let table = slice(bytes, header.sh_offset, header.sh_size, "relocations")?;
        let (entries, rest) = table.as_chunks::<24>();
        if !rest.is_empty() {
            return Err(malformed("a relocation section of odd length"));
        }
        for entry in entries {
            out.push(one_reloc(&context, entry)?);
        }
    }
    out.sort_by_key(|r| r.at);
    for pair in out.windows(2) {
        let len = match pair[0].kind {
            RelocKind::Abs64 => 8,
            RelocKind::Pc32 | RelocKind::Abs32 => 4,
        };
        if pair[1].at - pair[0].at < len {
            return Err(malformed(format!("overlapping relocations at {:#x}", pair[1].at)));
        }
    }
    Ok(out)
}

/// What a relocation is judged by.
struct Context<'a> {
    elf: &'a Elf<'a>,
    segments: &'a [Segment],
    /// The manifest's imports, by symbol.
    imports: HashMap<String, usize>,
    /// Whether there is a previous patch to refer to.
    after: bool,
}

fn one_reloc(context: &Context<'_>, entry: &[u8; 24]) -> Result<Reloc, PatchError> {
    let Context { elf, segments, .. } = context;
    let word = |i: usize| u64::from_le_bytes(std::array::from_fn(|k| entry[i + k]));
    let (at, info, addend) = (word(0), word(8), word(16).cast_signed());
    let (kind, len) = match (info & 0xffff_ffff) as u32 {
        reloc::R_X86_64_64 => (RelocKind::Abs64, 8),
        reloc::R_X86_64_PC32 => (RelocKind::Pc32, 4),
        reloc::R_X86_64_32S => (RelocKind::Abs32, 4),
        other => return Err(malformed(format!("relocation of unknown type {other} at {at:#x}"))),
    };
    if holder(segments, at, len).is_none() {
        return Err(malformed(format!("relocation at {at:#x} outside the segments")));
    }
    let symbol = usize::try_from(info >> 32).ok().and_then(|i| elf.syms.get(i));
    let symbol = symbol.ok_or_else(|| malformed(format!("relocation at {at:#x} without its symbol")))?;
    let target = match u16::try_from(symbol.st_shndx).unwrap_or(0) {
        SHN_TARGET_IMAGE => RelocTarget::Image(ImageAddr(symbol.st_value)),
        SHN_PREVIOUS_PATCH if context.after => RelocTarget::Previous(symbol.st_value),
        0 => {
            let import = elf.strtab.get_at(symbol.st_name).and_then(|name| context.imports.get(name));
            let import = import.filter(|_| symbol.st_type() != sym::STT_TLS);
            let unknown = || malformed(format!("relocation at {at:#x} to an undefined symbol"));
            RelocTarget::Import(*import.ok_or_else(unknown)?)
        }
        index if usize::from(index) < elf.section_headers.len() && symbol.st_type() != sym::STT_TLS => {
            if !segments.iter().any(|s| s.at <= symbol.st_value && symbol.st_value <= s.at + s.len_bytes) {
                return Err(malformed(format!("relocation at {at:#x} to {:#x}, outside the patch", symbol.st_value)));
            }
            RelocTarget::Patch(symbol.st_value)
        }
        other => return Err(malformed(format!("relocation at {at:#x} to a symbol of unknown section {other:#x}"))),
    };
    Ok(Reloc { at, kind, target, addend })
}

fn eh_frame(elf: &Elf<'_>, bytes: &[u8], segments: &[Segment]) -> Result<Option<(u64, u64)>, PatchError> {
    let Some(data) = section(elf, bytes, ".eh_frame")? else { return Ok(None) };
    if data.len() < 4 || data[data.len() - 4..] != [0; 4] {
        return Err(malformed(".eh_frame does not end with a terminator"));
    }
    let header = elf.section_headers.iter().find(|s| elf.shdr_strtab.get_at(s.sh_name) == Some(".eh_frame"));
    let at = header.map_or(0, |h| h.sh_addr);
    match holder(segments, at, data.len() as u64) {
        Some(s) if s.kind == SegmentKind::Rodata => Ok(Some((at, data.len() as u64))),
        _ => Err(malformed(".eh_frame lies outside the read-only segment")),
    }
}

/// Imports, hooks and what refers to the previous patch.
fn check_additions(manifest: &Manifest, segments: &[Segment]) -> Result<(), PatchError> {
    let code = |at: u64| holder(segments, at, 1).is_some_and(|s| s.kind == SegmentKind::Text);
    let mut symbols = HashSet::new();
    for i in &manifest.imports {
        if i.name.is_empty() || i.version.is_none() && i.library.is_some() || !symbols.insert(i.symbol()) {
            return Err(malformed(format!("the import {:?} is described wrongly", i.symbol())));
        }
    }
    let mut kinds = HashSet::new();
    for h in &manifest.hooks {
        if !code(h.at) || h.symbol != h.kind.symbol() || !kinds.insert(h.kind) {
            return Err(malformed(format!("the hook {:?} is described wrongly", h.symbol)));
        }
    }
    if manifest.after.as_ref().is_some_and(|a| a.digest.0.len() != 32) {
        return Err(malformed("the digest of the previous patch has another length"));
    }
    for r in &manifest.redirects {
        let fits = super::in_chain(r.at).1.checked_add(r.size).is_some_and(|end| end <= MAX_LEN_BYTES)
            && r.size >= ENTRY_JUMP_LEN;
        if manifest.after.is_none() || !fits || !code(r.new_at) {
            return Err(malformed(format!("the redirect of {:?} is described wrongly", r.name)));
        }
    }
    let outside = |s: &&super::Static| {
        let end = s.at.checked_add(s.size);
        !segments
            .iter()
            .any(|g| g.kind == SegmentKind::Data && g.at <= s.at && end.is_some_and(|e| e <= g.at + g.len_bytes))
    };
    let chain = manifest.after.as_ref().map_or(0, |a| a.before.len() + 1);
    let own = |s: &&super::Static| super::in_chain(s.at).0 == 0;
    let beyond = |at: u64, from: usize| super::in_chain(at).0 > chain.saturating_sub(from);
    if let Some(s) = manifest.statics.iter().find(|s| !own(s) && beyond(s.at, 0)) {
        return Err(malformed(format!("the static {:?} is in a patch that is not named", s.name)));
    }
    if let Some(r) = manifest.redirects.iter().find(|r| beyond(r.at, 1)) {
        return Err(malformed(format!("the redirect of {:?} is in a patch that is not named", r.name)));
    }
    if manifest.after.iter().flat_map(|a| &a.before).any(|b| b.digest.0.len() != 32) {
        return Err(malformed("the digest of an earlier patch has another length"));
    }
    if let Some(s) = manifest.statics.iter().filter(own).find(outside) {
        return Err(malformed(format!("the static {:?} lies outside the writable segment", s.name)));
    }
    Ok(())
}

/// A manifest of format 2 has nothing that came with format 3.
fn only_of_version_2(m: Manifest) -> Result<Manifest, serde_json::Error> {
    let beside = m.functions.iter().filter_map(|f| f.old.as_ref()).any(|o| o.entry_beside.is_some());
    let held = m.redirects.iter().any(|r| r.held.is_some());
    let before = m.after.as_ref().is_some_and(|a| !a.before.is_empty());
    if m.linked.is_some() || m.together.is_some() || beside || held || before {
        return Err(serde::de::Error::custom("a field of format 3"));
    }
    Ok(m)
}

fn check_manifest(manifest: &Manifest, segments: &[Segment]) -> Result<(), PatchError> {
    check_additions(manifest, segments)?;
    let bad = |name: &str, why: &str| Err(malformed(format!("function {name}: {why}")));
    for f in &manifest.functions {
        let text = holder(segments, f.new_at, f.new_size).is_some_and(|s| s.kind == SegmentKind::Text);
        if f.new_size == 0 || !text {
            return bad(&f.name, "its new code is not in the text segment");
        }
        if f.old.is_some() != (f.status == super::Status::Changed) {
            return bad(&f.name, "status and old version contradict each other");
        }
        let Some(old) = &f.old else { continue };
        if old.at.checked_add(old.size).is_none() || old.sha256.0.len() != 32 || old.size == 0 {
            return bad(&f.name, "its old version is described wrongly");
        }
        if old.companions.iter().any(|c| c.at.checked_add(c.size).is_none() || c.sha256.0.len() != 32) {
            return bad(&f.name, "a companion is described wrongly");
        }
        if old.entry.is_some() && old.entry_beside.is_some() {
            return bad(&f.name, "it has two entry jumps");
        }
        let Some(entry) = old.any_entry() else { continue };
        let offset = entry.at.offset_from(old.at);
        let inside = offset == Some(0) || offset == Some(4);
        let past_end = offset.map(|o| (o + ENTRY_JUMP_LEN).saturating_sub(old.size));
        if !inside || entry.original.0.len() as u64 != ENTRY_JUMP_LEN || past_end != Some(entry.padding) {
            return bad(&f.name, "its entry jump is described wrongly");
        }
    }
    let mut entries: Vec<_> =
        manifest.functions.iter().filter_map(|f| f.old.as_ref()?.any_entry()).map(|e| e.at).collect();
    entries.sort_unstable();
    if entries.windows(2).any(|w| w[1].0 - w[0].0 < ENTRY_JUMP_LEN) {
        return Err(malformed("two entry jumps overlap"));
    }
    Ok(())
}
