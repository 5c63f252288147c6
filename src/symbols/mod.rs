//! What a debugger or a profiler needs to name a patch's functions: it is no file that the process has mapped, so they
//! find no symbols and no unwind table for it. From a process, or from its core file.

mod core;

pub use core::{Core, CoreError};

use goblin::elf::{header, section_header, sym};

use crate::addr::ProcRange;
use crate::memory::ReadMemory;
use crate::registry::Found;

/// A file of symbols for one patch.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SymbolFile {
    /// The patch.
    pub patch: String,
    /// An ELF file: its functions at their addresses, and its unwind table.
    pub elf: Vec<u8>,
    /// The lines of a perf map: start, length and name, in hex where they are numbers.
    pub perf_map: String,
}

/// Writes the symbols of a patch that lies in `memory`.
pub fn of_patch<M: ReadMemory + ?Sized>(memory: &M, found: &Found) -> SymbolFile {
    let functions: Vec<(&str, ProcRange)> =
        found.payload.functions.iter().filter_map(|f| Some((f.name.as_str(), f.new.range()?))).collect();
    let table = found.payload.eh_frame.and_then(|t| t.range());
    let table = table.and_then(|t| Some((t.start.0, memory.read_vec(t.start, t.len_bytes()).ok()?)));
    let line = |f: &crate::registry::FunctionRecord| {
        let range = f.new.range()?;
        Some(format!("{:x} {:x} {} [{}]\n", range.start.0, range.len_bytes(), f.demangled, found.payload.patch))
    };
    SymbolFile {
        patch: found.payload.patch.clone(),
        elf: elf(&functions, table.as_ref().map(|(at, bytes)| (*at, bytes.as_slice()))),
        perf_map: found.payload.functions.iter().filter_map(line).collect(),
    }
}

const EHDR: usize = 64;
const SHDR: u64 = 64;
const SYM: u64 = 24;

/// One section header.
#[derive(Clone, Copy, Default)]
struct Section {
    name: &'static str,
    kind: u32,
    flags: u64,
    at: u64,
    offset: u64,
    size: u64,
    link: u32,
    info: u32,
    align: u64,
    entry: u64,
}

/// An ET_EXEC without segments: `.text` without bytes, `.eh_frame`, and symbols.
fn elf(functions: &[(&str, ProcRange)], table: Option<(u64, &[u8])>) -> Vec<u8> {
    let start = functions.iter().map(|(_, r)| r.start.0).min().unwrap_or(0);
    let end = functions.iter().map(|(_, r)| r.end.0).max().unwrap_or(start);
    let mut out = vec![0u8; EHDR];
    let align = |out: &mut Vec<u8>| out.resize(out.len().next_multiple_of(16), 0);
    let mut sections = vec![
        Section::default(),
        Section {
            name: ".text",
            kind: section_header::SHT_NOBITS,
            flags: u64::from(section_header::SHF_ALLOC | section_header::SHF_EXECINSTR),
            at: start,
            offset: EHDR as u64,
            size: end - start,
            align: 16,
            ..Section::default()
        },
    ];
    if let Some((at, bytes)) = table {
        align(&mut out);
        sections.push(Section {
            name: ".eh_frame",
            kind: section_header::SHT_PROGBITS,
            flags: u64::from(section_header::SHF_ALLOC),
            at,
            offset: out.len() as u64,
            size: bytes.len() as u64,
            align: 8,
            ..Section::default()
        });
        out.extend(bytes);
    }
    align(&mut out);
    let (symbols_at, mut names) = (out.len() as u64, vec![0u8]);
    out.extend([0; SYM as usize]);
    for (name, range) in functions {
        out.extend((names.len() as u32).to_le_bytes());
        out.extend([sym::STB_GLOBAL << 4 | sym::STT_FUNC, 0]);
        out.extend(1u16.to_le_bytes());
        out.extend(range.start.0.to_le_bytes());
        out.extend(range.len_bytes().to_le_bytes());
        names.extend(name.bytes().filter(|b| *b != 0).chain([0]));
    }
    let strings = sections.len() as u32 + 1;
    let size = out.len() as u64 - symbols_at;
    let symbols = Section {
        name: ".symtab",
        kind: section_header::SHT_SYMTAB,
        offset: symbols_at,
        size,
        link: strings,
        info: 1,
        align: 8,
        entry: SYM,
        ..Section::default()
    };
    sections.push(symbols);
    let text = |name, offset: usize, size: usize| Section {
        name,
        kind: section_header::SHT_STRTAB,
        offset: offset as u64,
        size: size as u64,
        align: 1,
        ..Section::default()
    };
    sections.push(text(".strtab", out.len(), names.len()));
    out.extend(&names);
    let mut own_names = vec![0u8];
    let mut name_at: Vec<u32> = Vec::new();
    for name in sections.iter().map(|s| s.name).chain([".shstrtab"]) {
        name_at.push(if name.is_empty() { 0 } else { own_names.len() as u32 });
        own_names.extend(name.bytes().chain([0]));
    }
    sections.push(text(".shstrtab", out.len(), own_names.len()));
    out.extend(&own_names);
    align(&mut out);
    let headers_at = out.len() as u64;
    for (s, name) in sections.iter().zip(&name_at) {
        out.extend(name.to_le_bytes());
        out.extend(s.kind.to_le_bytes());
        [s.flags, s.at, s.offset, s.size].iter().for_each(|w| out.extend(w.to_le_bytes()));
        [s.link, s.info].iter().for_each(|w| out.extend(w.to_le_bytes()));
        [s.align, s.entry].iter().for_each(|w| out.extend(w.to_le_bytes()));
    }
    let mut head = Vec::with_capacity(EHDR);
    head.extend(b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0");
    [header::ET_EXEC, header::EM_X86_64].iter().for_each(|w| head.extend(w.to_le_bytes()));
    head.extend(1u32.to_le_bytes());
    [0, 0, headers_at].iter().for_each(|w| head.extend(w.to_le_bytes()));
    head.extend(0u32.to_le_bytes());
    let counts = [EHDR as u16, 0, 0, SHDR as u16, sections.len() as u16, sections.len() as u16 - 1];
    counts.iter().for_each(|w| head.extend(w.to_le_bytes()));
    out.splice(..EHDR, head);
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::addr::ProcAddr;

    #[test]
    fn the_file_reads_back() {
        let range = ProcRange { start: ProcAddr(0x7000_1000), end: ProcAddr(0x7000_1020) };
        let file = elf(&[("fee", range)], Some((0x7000_2000, &[1, 2, 3, 4])));
        let read = goblin::elf::Elf::parse(&file).unwrap();
        let symbols: Vec<_> = read.syms.iter().skip(1).map(|s| (s.st_value, s.st_size)).collect();
        assert_eq!(symbols, [(0x7000_1000, 0x20)]);
        assert_eq!(read.strtab.get_at(read.syms.get(1).unwrap().st_name), Some("fee"));
        let names: Vec<_> = read.section_headers.iter().filter_map(|s| read.shdr_strtab.get_at(s.sh_name)).collect();
        assert_eq!(names, ["", ".text", ".eh_frame", ".symtab", ".strtab", ".shstrtab"]);
        let frames = &read.section_headers[2];
        assert_eq!((frames.sh_addr, &file[frames.file_range().unwrap()]), (0x7000_2000, &[1u8, 2, 3, 4][..]));
    }
}
