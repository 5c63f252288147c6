//! The raw file: headers, sections, kept relocations.

use object::read::elf::{FileHeader, ProgramHeader, Rela, SectionHeader, SectionTable};
use object::{elf, LittleEndian as Le};

use super::file::is_unread;
use super::{BuildError, TlsSegment};

type Header = elf::FileHeader64<Le>;

/// One section.
#[derive(Clone, Copy, Debug)]
pub struct Section<'d> {
    /// Its name.
    pub name: &'d str,
    /// Its linked address.
    pub addr: u64,
    /// Its length in memory.
    pub size: u64,
    /// `sh_type`.
    pub kind: u32,
    /// Its bytes in the file; empty for `.bss`.
    pub data: &'d [u8],
    /// Mapped into memory.
    pub alloc: bool,
    /// Writable at run time (relro sections say yes, too).
    pub write: bool,
    /// Code.
    pub exec: bool,
    /// Thread-local.
    pub tls: bool,
    /// Starts as zeros.
    pub zero_fill: bool,
}

impl Section<'_> {
    /// Writable in the file's terms, but constant once relocated.
    #[must_use]
    pub fn is_relro(&self) -> bool {
        self.write
            && (self.name.starts_with(".data.rel.ro")
                || matches!(
                    self.name,
                    ".init_array" | ".fini_array" | ".preinit_array" | ".dynamic" | ".ctors" | ".dtors"
                ))
    }

    /// Data that the program may change.
    #[must_use]
    pub fn is_mutable(&self) -> bool {
        self.write && !self.is_relro()
    }
}

/// One relocation that the linker kept.
#[derive(Clone, Copy, Debug)]
pub struct Reloc {
    /// The place.
    pub at: u64,
    /// `r_type`.
    pub kind: u32,
    /// Index in the symbol table.
    pub sym: u32,
    /// Addend.
    pub addend: i64,
}

/// Headers and sections, bounds-checked.
pub struct RawElf<'d> {
    pub bytes: &'d [u8],
    pub table: SectionTable<'d, Header>,
    pub sections: Vec<Section<'d>>,
    pub build_id: Vec<u8>,
    pub pie: bool,
    pub is_static: bool,
    pub entry: u64,
    pub rust: bool,
    pub tls: Option<TlsSegment>,
}

pub(super) fn damaged(what: impl std::fmt::Display) -> BuildError {
    BuildError::NotElf(format!("damaged ELF file: {what}"))
}

impl<'d> RawElf<'d> {
    pub fn parse(bytes: &'d [u8]) -> Result<Self, BuildError> {
        if !bytes.starts_with(b"\x7fELF") {
            return Err(BuildError::NotElf("not an ELF file".into()));
        }
        let header = Header::parse(bytes).map_err(|_| BuildError::NotElf("not a 64-bit ELF file".into()))?;
        if header.e_machine(Le) != elf::EM_X86_64 || !header.is_little_endian() {
            return Err(BuildError::NotElf(format!(
                "for another architecture (machine {}); x86-64 is needed",
                header.e_machine(Le).0
            )));
        }
        let pie = match header.e_type(Le) {
            elf::ET_EXEC => false,
            elf::ET_DYN => true,
            elf::ET_REL => {
                return Err(BuildError::NotElf("an object file; a linked executable or library is needed".into()))
            }
            other => {
                return Err(BuildError::NotElf(format!(
                    "ELF type {}; a linked executable or library is needed",
                    other.0
                )))
            }
        };
        let table = header.sections(Le, bytes).map_err(damaged)?;
        let mut sections = Vec::new();
        for sh in table.iter() {
            sections.push(section(&table, sh, bytes)?);
        }
        if sections.iter().any(|s| s.name == ".text" && s.zero_fill) {
            let what = "it holds debug information only (objcopy --only-keep-debug); give the image itself".into();
            return Err(BuildError::NotElf(what));
        }
        let segments = header.program_headers(Le, bytes).map_err(damaged)?;
        let mut tls = None;
        for ph in segments.iter().filter(|p| p.p_type(Le) == elf::PT_TLS) {
            let align = ph.p_align(Le).max(1);
            let len = ph.p_memsz(Le).checked_next_multiple_of(align).ok_or_else(|| damaged("PT_TLS"))?;
            tls = Some(TlsSegment { addr: ph.p_vaddr(Le), aligned_len: len });
        }
        let interpreted = segments.iter().any(|p| p.p_type(Le) == elf::PT_INTERP);
        let is_static = !interpreted && (!pie || is_pie_executable(&sections));
        let rust = sections.iter().any(|s| s.name == ".comment" && s.data.windows(5).any(|w| w == b"rustc"));
        let build_id = build_id(&sections)?;
        Ok(Self { bytes, table, sections, build_id, pie, is_static, entry: header.e_entry(Le), rust, tls })
    }

    pub fn alloc_sections(&self) -> Vec<Section<'d>> {
        let mut out: Vec<_> =
            self.sections.iter().copied().filter(|s| s.alloc && s.size > 0 && !(s.tls && s.zero_fill)).collect();
        out.sort_by_key(|s| s.addr);
        out
    }
}

fn section<'d>(
    table: &SectionTable<'d, Header>,
    sh: &'d elf::SectionHeader64<Le>,
    bytes: &'d [u8],
) -> Result<Section<'d>, BuildError> {
    let name = table.section_name(Le, sh).map_err(damaged)?;
    let name = std::str::from_utf8(name).map_err(|_| damaged("a section name is not text"))?;
    let flags = sh.sh_flags(Le).0;
    let has = |bit: u64| flags & bit != 0;
    let zero_fill = sh.sh_type(Le) == elf::SHT_NOBITS;
    let mut data =
        if zero_fill { &[][..] } else { sh.data(Le, bytes).map_err(|e| damaged(format!("section {name}: {e}")))? };
    if is_unread(name.as_bytes()) && !has(2) {
        data = &[]; // perhaps it was not read
    }
    let (addr, size) = (sh.sh_addr(Le), sh.sh_size(Le));
    if addr.checked_add(size).is_none() {
        return Err(damaged(format!("section {name} leaves the address space")));
    }
    Ok(Section {
        name,
        addr,
        size,
        kind: sh.sh_type(Le).0,
        data,
        alloc: has(2),
        write: has(1),
        exec: has(4),
        tls: has(0x400),
        zero_fill,
    })
}

/// DF_1_PIE in DT_FLAGS_1: an executable, not a library.
fn is_pie_executable(sections: &[Section<'_>]) -> bool {
    const DT_FLAGS_1: u64 = 0x6fff_fffb;
    const DF_1_PIE: u64 = 0x0800_0000;
    let Some(dynamic) = sections.iter().find(|s| s.name == ".dynamic") else { return false };
    let (words, _) = dynamic.data.as_chunks::<8>();
    let mut pairs = words.chunks_exact(2).map(|p| (u64::from_le_bytes(p[0]), u64::from_le_bytes(p[1])));
    pairs.any(|(tag, value)| tag == DT_FLAGS_1 && value & DF_1_PIE != 0)
}

fn build_id(sections: &[Section<'_>]) -> Result<Vec<u8>, BuildError> {
    let missing = || BuildError::Incomplete {
        rule: "no-build-id",
        what: "it has no GNU build-id".into(),
        remedy: "link with -Wl,--build-id",
    };
    let note = sections.iter().find(|s| s.name == ".note.gnu.build-id").ok_or_else(missing)?;
    let word = |at: usize| note.data.get(at..at + 4).and_then(|b| b.try_into().ok()).map(u32::from_le_bytes);
    match (word(0), word(4), word(8)) {
        (Some(4), Some(len), Some(3)) if len > 0 && len <= 64 => {
            note.data.get(16..16 + len as usize).map(<[u8]>::to_vec).ok_or_else(missing)
        }
        _ => Err(missing()),
    }
}

/// The relocations that `--emit-relocs` kept, sorted by place.
pub fn kept_relocs(raw: &RawElf<'_>) -> Result<Vec<Reloc>, BuildError> {
    let mut out = Vec::new();
    let mut text = false;
    for sh in raw.table.iter() {
        let flags = sh.sh_flags(Le).0;
        if sh.sh_type(Le) != elf::SHT_RELA || flags & 2 != 0 {
            continue;
        }
        let name = raw.table.section_name(Le, sh).map_err(damaged)?;
        let Some(applies_to) = raw.sections.get(sh.sh_info(Le) as usize) else { continue };
        // .eh_frame is decoded on its own: linkers drop or misplace its relocations.
        if !applies_to.alloc || is_unread(name) {
            continue;
        }
        let (entries, _) =
            sh.rela(Le, raw.bytes).map_err(damaged)?.ok_or_else(|| damaged("a relocation section without entries"))?;
        text |= applies_to.exec && !entries.is_empty();
        let inside = |at: u64| applies_to.addr <= at && at - applies_to.addr < applies_to.size;
        if let Some(r) = entries.iter().find(|r| r.r_type(Le, false).0 != 0 && !inside(r.r_offset(Le))) {
            return Err(damaged(format!(
                "a relocation of {} for a place outside it, {:#x}",
                applies_to.name,
                r.r_offset(Le)
            )));
        }
        out.extend(entries.iter().map(|r| Reloc {
            at: r.r_offset(Le),
            kind: r.r_type(Le, false).0,
            sym: r.r_sym(Le, false),
            addend: r.r_addend(Le),
        }));
    }
    if !text {
        return Err(BuildError::Incomplete {
            rule: "no-relocations",
            what: "it keeps no relocations".into(),
            remedy: "link with -Wl,--emit-relocs and diff the unstripped file (strip only the shipped copy)",
        });
    }
    out.sort_by_key(|r| r.at);
    Ok(out)
}
