//! The ELF file around the parts.

use std::collections::BTreeMap;

use livepatch::patch::{Import, MANIFEST_SECTION, SHN_PREVIOUS_PATCH, SHN_TARGET_IMAGE};
use object::elf;
use object::write::elf::{Encoder, FileHeader, FileHeaderLayout, ProgramHeader, Rel, SectionHeader, Sym};
use object::Endianness;

use super::{OutKind, OutReloc, OutSymbol, OutTarget, Part, PAGE};

const TEXT: u32 = 5;
const WRITE: u32 = 6;
const READ: u32 = 4;

struct Strings {
    bytes: Vec<u8>,
    known: BTreeMap<String, u32>,
}

impl Strings {
    fn new() -> Self {
        Self { bytes: vec![0], known: BTreeMap::new() }
    }

    fn add(&mut self, text: &str) -> u32 {
        if let Some(at) = self.known.get(text) {
            return *at;
        }
        let at = self.bytes.len() as u32;
        self.bytes.extend(text.as_bytes());
        self.bytes.push(0);
        self.known.insert(text.to_owned(), at);
        at
    }
}

fn access(part: &Part) -> u32 {
    match part.name {
        ".text" => TEXT,
        ".data" | ".bss" => WRITE,
        _ => READ,
    }
}

/// Writes the file: one page of headers, then the parts at the offsets of their addresses, then the rest.
pub(super) fn write(
    parts: &[Part],
    symbols: &[OutSymbol],
    imports: &[Import],
    manifest: &[u8],
    image_name: &dyn Fn(u64) -> String,
) -> Vec<u8> {
    let encoder = Encoder::new(Endianness::Little, true, elf::EM_X86_64);
    let parts: Vec<&Part> = parts.iter().filter(|p| p.len > 0).collect();
    let file_at = |vaddr: u64| vaddr + PAGE;
    let mut out: Vec<u8> = vec![0; PAGE as usize];
    for p in &parts {
        if !p.bytes.is_empty() {
            out.resize(file_at(p.at) as usize, 0);
            out.extend(&p.bytes);
        }
    }
    let mut names = Strings::new();
    let mut headers = Vec::new();
    for p in &parts {
        let flags = 2 | match access(p) {
            TEXT => 4,
            WRITE => 1,
            _ => 0,
        };
        let kind = match p.name {
            ".note.livepatch" => elf::SHT_NOTE,
            ".bss" => elf::SHT_NOBITS,
            _ => elf::SHT_PROGBITS,
        };
        headers.push(SectionHeader {
            sh_name: names.add(p.name),
            sh_type: kind,
            sh_flags: elf::SectionFlags(flags),
            sh_addr: p.at,
            sh_offset: file_at(p.at).min(out.len() as u64),
            sh_size: p.len,
            sh_link: 0,
            sh_info: 0,
            sh_addralign: if p.name == ".note.livepatch" { 4 } else { 8 },
            sh_entsize: 0,
        });
    }
    let plain = |name: u32, kind, offset: u64, size: u64| SectionHeader {
        sh_name: name,
        sh_type: kind,
        sh_flags: elf::SectionFlags(0),
        sh_addr: 0,
        sh_offset: offset,
        sh_size: size,
        sh_link: 0,
        sh_info: 0,
        sh_addralign: 1,
        sh_entsize: 0,
    };
    headers.push(plain(names.add(MANIFEST_SECTION), elf::SHT_PROGBITS, out.len() as u64, manifest.len() as u64));
    out.extend(manifest);

    // Symbols: null, one for each section (local), functions and statics, addresses of the image, imports.
    let section_of = |at: u64| parts.iter().rposition(|p| p.at <= at && at <= p.at + p.len).unwrap_or(0);
    let mut strings = Strings::new();
    let mut syms = Vec::new();
    let info = |bind: u8, kind: u8| elf::SymbolInfo(bind << 4 | kind);
    let sym = |name: u32, st_info, shndx: u16, value: u64, size: u64| Sym {
        section: None,
        st_name: name,
        st_info,
        st_other: elf::SymbolOther(0),
        st_shndx: elf::SymbolSection(shndx),
        st_value: value,
        st_size: size,
    };
    for (i, p) in parts.iter().enumerate() {
        syms.push(sym(0, info(0, 3), i as u16 + 1, p.at, 0));
    }
    let locals = syms.len() as u32 + 1;
    for s in symbols {
        let kind = if s.func { 2 } else { 1 };
        syms.push(sym(strings.add(&s.name), info(1, kind), section_of(s.at) as u16 + 1, s.at, s.size));
    }
    let mut image: BTreeMap<u64, u32> = BTreeMap::new();
    for to in parts.iter().flat_map(|p| &p.relocs).map(|r| r.to) {
        if let OutTarget::Image(at) = to {
            image.entry(at).or_insert(0);
        }
    }
    for (at, index) in &mut image {
        *index = syms.len() as u32 + 1;
        syms.push(sym(strings.add(&image_name(*at)), info(1, 0), SHN_TARGET_IMAGE, *at, 0));
    }
    let mut previous: BTreeMap<u64, u32> = BTreeMap::new();
    for to in parts.iter().flat_map(|p| &p.relocs).map(|r| r.to) {
        if let OutTarget::Previous(at) = to {
            previous.entry(at).or_insert(0);
        }
    }
    for (at, index) in &mut previous {
        *index = syms.len() as u32 + 1;
        syms.push(sym(strings.add(&format!("previous+{at:#x}")), info(1, 0), SHN_PREVIOUS_PATCH, *at, 0));
    }
    let first_import = syms.len() as u32 + 1;
    for import in imports {
        let bind = if import.weak { 2 } else { 1 };
        syms.push(sym(strings.add(&import.symbol()), info(bind, 0), 0, 0, 0));
    }

    // Relocations.
    let first_rela = headers.len();
    let mut rela_headers = Vec::new();
    let mut relocations: Vec<(usize, Vec<OutReloc>)> = Vec::new();
    for (i, p) in parts.iter().enumerate().filter(|(_, p)| !p.relocs.is_empty()) {
        let mut sorted = p.relocs.clone();
        sorted.sort_by_key(|r| r.at);
        relocations.push((i, sorted));
    }
    let symtab_index = (first_rela + relocations.len() + 1) as u32;
    for (i, relocs) in &relocations {
        out.resize(out.len().next_multiple_of(8), 0);
        let name = names.add(&format!(".rela{}", parts[*i].name));
        let mut header = plain(name, elf::SHT_RELA, out.len() as u64, relocs.len() as u64 * 24);
        (header.sh_link, header.sh_info, header.sh_entsize, header.sh_addralign) = (symtab_index, *i as u32 + 1, 24, 8);
        header.sh_flags = elf::SectionFlags(0x40);
        rela_headers.push(header);
        for r in relocs {
            let (r_sym, r_addend) = match r.to {
                OutTarget::Image(at) => (image[&at], r.addend),
                OutTarget::Previous(at) => (previous[&at], r.addend),
                OutTarget::Import(index) => (first_import + index as u32, r.addend),
                OutTarget::Patch(at) => {
                    let section = section_of(at);
                    (section as u32 + 1, r.addend + (at - parts[section].at).cast_signed())
                }
            };
            let r_type = match r.kind {
                OutKind::Abs64 => elf::R_X86_64_64,
                OutKind::Abs32 => elf::R_X86_64_32S,
                OutKind::Pc32 => elf::R_X86_64_PC32,
            };
            encoder.relocation(&mut out, true, &Rel { r_offset: r.at, r_sym, r_type, r_addend });
        }
    }
    headers.extend(rela_headers);
    out.resize(out.len().next_multiple_of(8), 0);
    let symtab_at = out.len() as u64;
    out.extend([0; 24]);
    for s in &syms {
        encoder.symbol(&mut out, s);
    }
    let mut symtab = plain(names.add(".symtab"), elf::SHT_SYMTAB, symtab_at, (syms.len() as u64 + 1) * 24);
    (symtab.sh_link, symtab.sh_info, symtab.sh_entsize, symtab.sh_addralign) = (symtab_index + 1, locals, 24, 8);
    headers.push(symtab);
    headers.push(plain(names.add(".strtab"), elf::SHT_STRTAB, out.len() as u64, strings.bytes.len() as u64));
    out.extend(&strings.bytes);
    let shstrtab = names.add(".shstrtab");
    headers.push(plain(shstrtab, elf::SHT_STRTAB, out.len() as u64, names.bytes.len() as u64));
    out.extend(&names.bytes);
    out.resize(out.len().next_multiple_of(8), 0);

    let layout = FileHeaderLayout {
        e_phoff: 64,
        e_shoff: out.len() as u64,
        segment_num: 0,
        section_num: headers.len() as u32 + 1,
        shstrtab_index: headers.len() as u32,
    };
    let segments = segments(&parts, &file_at);
    let layout = FileHeaderLayout { segment_num: segments.len() as u32, ..layout };
    encoder.null_section_header(&mut out, &layout);
    for h in &headers {
        encoder.section_header(&mut out, h);
    }
    let header = FileHeader {
        os_abi: elf::ELFOSABI_NONE,
        abi_version: 0,
        e_type: elf::ET_DYN,
        e_machine: elf::EM_X86_64,
        e_entry: 0,
        e_flags: elf::FileFlags(0),
    };
    let mut front: Vec<u8> = Vec::new();
    if encoder.file_header(&mut front, &header, &layout).is_ok() {
        for s in &segments {
            encoder.program_header(&mut front, s);
        }
    }
    out[..front.len()].copy_from_slice(&front);
    out
}

fn segments(parts: &[&Part], file_at: &dyn Fn(u64) -> u64) -> Vec<ProgramHeader> {
    let mut out = Vec::new();
    let header = |kind, flags: u32, at: u64, file: u64, mem: u64, align| ProgramHeader {
        p_type: kind,
        p_flags: elf::ProgramFlags(flags),
        p_offset: file_at(at),
        p_vaddr: at,
        p_paddr: at,
        p_filesz: file,
        p_memsz: mem,
        p_align: align,
    };
    for flags in [READ, TEXT, WRITE] {
        let group: Vec<&&Part> = parts.iter().filter(|p| access(p) == flags).collect();
        let (Some(first), Some(last)) = (group.first(), group.last()) else { continue };
        let start = first.at / PAGE * PAGE;
        let file_end = group.iter().filter(|p| !p.bytes.is_empty()).map(|p| p.at + p.len).max().unwrap_or(start);
        out.push(header(elf::PT_LOAD, flags, start, file_end - start, last.at + last.len - start, PAGE));
    }
    if let Some(note) = parts.iter().find(|p| p.name == ".note.livepatch") {
        out.push(header(elf::PT_NOTE, READ, note.at, note.len, note.len, 4));
    }
    out
}
