//! What we need of an ELF image: its program headers, its build-id, its symbols (read with goblin).

use goblin::container::{Container, Ctx, Endian};
use goblin::elf::{header, note, program_header, sym, Elf};

use crate::addr::ImageAddr;

pub use goblin::elf::header::{EM_X86_64, ET_DYN, ET_EXEC};
pub use goblin::elf::program_header::{PF_X, PT_DYNAMIC, PT_GNU_EH_FRAME, PT_INTERP, PT_LOAD, PT_NOTE};

/// Bytes of an ELF file that hold its header and, in every file a linker writes, its program headers.
pub const HEAD_BYTES: usize = 4096;

/// Why bytes are not a usable ELF header.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ElfError(pub String);

impl std::fmt::Display for ElfError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "not a usable ELF image: {}", self.0)
    }
}

impl std::error::Error for ElfError {}

/// One program header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Segment {
    /// `PT_...`
    pub kind: u32,
    /// `PF_...`
    pub flags: u32,
    /// Offset in the file.
    pub offset: u64,
    /// Where it was linked.
    pub at: ImageAddr,
    /// Bytes in memory.
    pub len_bytes: u64,
}

/// The ELF header and the program headers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Head {
    /// `ET_...`
    pub kind: u16,
    /// `EM_...`
    pub machine: u16,
    /// Whether it is a 64-bit file.
    pub is_64: bool,
    /// Program headers.
    pub segments: Vec<Segment>,
}

impl Head {
    /// Reads the header from the first [`HEAD_BYTES`] bytes of an image.
    ///
    /// # Errors
    ///
    /// Not ELF, or program headers elsewhere. A 32-bit image is read without its program headers.
    pub fn parse(bytes: &[u8]) -> Result<Self, ElfError> {
        let header = Elf::parse_header(bytes).map_err(|e| ElfError(e.to_string()))?;
        let is_64 = header.container().is_ok_and(Container::is_big);
        let little = header.endianness().is_ok_and(|e| e == Endian::Little);
        let mut head = Self { kind: header.e_type, machine: header.e_machine, is_64, segments: Vec::new() };
        if !is_64 || !little || header.e_machine != header::EM_X86_64 {
            return Ok(head);
        }
        let ctx = Ctx::new(Container::Big, Endian::Little);
        let at = usize::try_from(header.e_phoff).map_err(|_| ElfError("program headers out of range".into()))?;
        let end = at.checked_add(usize::from(header.e_phnum) * usize::from(header.e_phentsize));
        if end.is_none_or(|end| end > bytes.len()) {
            return Err(ElfError("its program headers do not follow the header".into()));
        }
        let list = program_header::ProgramHeader::parse(bytes, at, header.e_phnum.into(), ctx)
            .map_err(|e| ElfError(e.to_string()))?;
        head.segments = list
            .iter()
            .map(|p| Segment {
                kind: p.p_type,
                flags: p.p_flags,
                offset: p.p_offset,
                at: ImageAddr(p.p_vaddr),
                len_bytes: p.p_memsz,
            })
            .collect();
        Ok(head)
    }

    /// The program headers of one kind.
    pub fn of_kind(&self, kind: u32) -> impl Iterator<Item = &Segment> {
        self.segments.iter().filter(move |s| s.kind == kind)
    }

    /// The lowest and the highest linked address that is loaded.
    #[must_use]
    pub fn extent(&self) -> Option<(ImageAddr, ImageAddr)> {
        let first = self.of_kind(PT_LOAD).map(|s| s.at).min()?;
        let mut last = first;
        for s in self.of_kind(PT_LOAD) {
            last = last.max(s.at.checked_add(s.len_bytes)?);
        }
        Some((first, last))
    }
}

/// A section of a file, by its name: where it was linked, and its length. `read` gives bytes of the file, by offset and length;
/// no more than the headers are asked for.
pub fn section(read: &dyn Fn(u64, usize) -> Option<Vec<u8>>, name: &str) -> Option<(ImageAddr, u64)> {
    const ENTRY_BYTES: usize = 64;
    let front = read(0, ENTRY_BYTES)?;
    let header = Elf::parse_header(&front).ok()?;
    let count = usize::from(header.e_shnum);
    let table = read(header.e_shoff, count.checked_mul(ENTRY_BYTES)?)?;
    let ctx = Ctx::new(Container::Big, Endian::Little);
    // At offset 0 goblin takes a table for none.
    let shifted = [&[0; ENTRY_BYTES][..], &table].concat();
    let all = goblin::elf::SectionHeader::parse(&shifted, ENTRY_BYTES, count, ctx).ok()?;
    let names = all.get(usize::from(header.e_shstrndx))?;
    let names = read(names.sh_offset, usize::try_from(names.sh_size).ok().filter(|len| *len < 1 << 20)?)?;
    let is = |s: &&goblin::elf::SectionHeader| {
        let text = names.get(s.sh_name..).and_then(|n| n.split(|b| *b == 0).next());
        text == Some(name.as_bytes())
    };
    all.iter().find(is).map(|s| (ImageAddr(s.sh_addr), s.sh_size))
}

/// The GNU build-id in the bytes of a note segment.
#[must_use]
pub fn build_id(notes: &[u8]) -> Option<Vec<u8>> {
    let mut rest = notes;
    while let Some((head, tail)) = rest.split_first_chunk::<12>() {
        let word = |i: usize| u32::from_le_bytes(std::array::from_fn(|k| head[i + k])) as usize;
        let (name_len, desc_len, kind) = (word(0), word(4), word(8));
        let name = tail.get(..name_len)?;
        let desc_at = name_len.checked_next_multiple_of(4)?;
        let desc = tail.get(desc_at..desc_at.checked_add(desc_len)?)?;
        if name == b"GNU\0" && kind == note::NT_GNU_BUILD_ID as usize && !desc.is_empty() {
            return Some(desc.to_vec());
        }
        rest = tail.get(desc_at + desc_len.checked_next_multiple_of(4)?..)?;
    }
    None
}

/// One entry of a dynamic symbol table.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DynSymbol {
    /// Its name, without version.
    pub name: String,
    /// Where it is, `None` for an import.
    pub at: Option<ImageAddr>,
    /// Its length in bytes, 0 if unknown.
    pub len_bytes: u64,
}

/// Bytes of one dynamic symbol.
pub const SYM_BYTES: u64 = 24;

/// Reads a dynamic symbol table and its strings; entries that make no sense are left out.
#[must_use]
pub fn dynamic_symbols(table: &[u8], strings: &[u8]) -> Vec<DynSymbol> {
    let (entries, _) = table.as_chunks::<{ SYM_BYTES as usize }>();
    let symbol = |e: &[u8; 24]| {
        let name_at = u32::from_le_bytes(std::array::from_fn(|k| e[k])) as usize;
        let kind = sym::st_type(e[4]);
        let section = u16::from_le_bytes([e[6], e[7]]);
        let word = |i: usize| u64::from_le_bytes(std::array::from_fn(|k| e[i + k]));
        let name = strings.get(name_at..)?.split(|b| *b == 0).next()?;
        let name = std::str::from_utf8(name).ok().filter(|n| !n.is_empty())?.to_owned();
        let at = (section != 0 && kind != sym::STT_TLS).then_some(ImageAddr(word(8)));
        Some(DynSymbol { name, at, len_bytes: word(16) })
    };
    entries.iter().filter_map(symbol).collect()
}

/// The functions that a file names, by address: for messages only.
#[derive(Clone, Debug, Default)]
pub struct FunctionNames(Vec<(ImageAddr, u64, String)>);

impl FunctionNames {
    /// Reads the symbol tables of a file; empty if it has none.
    #[must_use]
    pub fn parse(file: &[u8]) -> Self {
        let Ok(elf) = Elf::parse(file) else { return Self::default() };
        let mut out = Vec::new();
        for (table, strings) in [(&elf.dynsyms, &elf.dynstrtab), (&elf.syms, &elf.strtab)] {
            for s in table.iter().filter(|s| s.is_function() && s.st_shndx != 0) {
                if let Some(name) = strings.get_at(s.st_name) {
                    out.push((ImageAddr(s.st_value), s.st_size, name.to_owned()));
                }
            }
        }
        Self::from_list(out)
    }

    /// From (address, length, name), in any order.
    #[must_use]
    pub fn from_list(mut list: Vec<(ImageAddr, u64, String)>) -> Self {
        list.sort();
        list.dedup_by_key(|f| f.0);
        Self(list)
    }

    /// The function at `addr` and how far into it that is.
    #[must_use]
    pub fn find(&self, addr: ImageAddr) -> Option<(&str, u64)> {
        let after = self.0.partition_point(|f| f.0 <= addr);
        let (at, len_bytes, name) = self.0.get(after.checked_sub(1)?)?;
        let offset = addr.offset_from(*at)?;
        (offset <= *len_bytes).then_some((name.as_str(), offset))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_section_is_found_by_its_name() {
        let own = std::fs::read("/proc/self/exe").unwrap();
        let read = |at: u64, len: usize| own.get(at as usize..at as usize + len).map(<[u8]>::to_vec);
        let found = section(&read, ".eh_frame_hdr").expect("every program of Rust has it");
        let segment = Head::parse(&own[..HEAD_BYTES]).unwrap();
        let segment = segment.of_kind(PT_GNU_EH_FRAME).next().unwrap();
        assert_eq!(found, (segment.at, segment.len_bytes));
        assert_eq!(section(&read, ".no_such"), None);
        assert_eq!(section(&|_, _| None, ".text"), None);
    }

    #[test]
    fn a_build_id_is_found_behind_another_note() {
        let mut notes = Vec::new();
        notes.extend([4, 0, 0, 0, 4, 0, 0, 0, 5, 0, 0, 0]);
        notes.extend(b"GNU\0abcd");
        notes.extend([4, 0, 0, 0, 3, 0, 0, 0, 3, 0, 0, 0]);
        notes.extend(b"GNU\0\x01\x02\x03\0");
        assert_eq!(build_id(&notes), Some(vec![1, 2, 3]));
        for cut in 0..notes.len() - 1 {
            assert_eq!(build_id(&notes[..cut]), None, "cut at {cut}");
        }
    }

    #[test]
    fn our_own_header_is_read() {
        let file = std::fs::read("/proc/self/exe").unwrap();
        let head = Head::parse(&file[..HEAD_BYTES]).unwrap();
        assert!(head.is_64 && head.machine == EM_X86_64);
        assert!(head.of_kind(PT_LOAD).count() >= 2);
        assert!(head.extent().is_some());
        assert!(Head::parse(b"\x7fELF").is_err());
        assert!(Head::parse(&file[..64]).is_err(), "program headers cut off");
    }
}
