//! The dynamic section of one mapped image, read from memory: names, versions, relocations.

use std::collections::HashMap;

use crate::addr::{ImageAddr, ProcAddr};
use crate::image::{Dynamic, Image};
use crate::memory::ReadMemory;

const DT_NEEDED: u64 = 1;
const DT_PLTRELSZ: u64 = 2;
const DT_RELA: u64 = 7;
const DT_RELASZ: u64 = 8;
const DT_SONAME: u64 = 14;
const DT_JMPREL: u64 = 23;
const DT_VERSYM: u64 = 0x6fff_fff0;
const DT_VERDEF: u64 = 0x6fff_fffc;
const DT_VERDEFNUM: u64 = 0x6fff_fffd;
const DT_VERNEED: u64 = 0x6fff_fffe;
const DT_VERNEEDNUM: u64 = 0x6fff_ffff;

/// Longest table that is read.
const MAX_BYTES: u64 = 256 << 20;

const R_X86_64_64: u32 = 1;
const R_X86_64_GLOB_DAT: u32 = 6;
const R_X86_64_JUMP_SLOT: u32 = 7;
const R_X86_64_IRELATIVE: u32 = 37;

/// Bit of a version index: not the default version of its name.
const HIDDEN: u16 = 0x8000;

/// One dynamic symbol, with its version.
#[derive(Clone, Copy, Debug)]
pub(super) struct Symbol<'t> {
    pub name: &'t str,
    pub kind: u8,
    pub bind: u8,
    pub defined: bool,
    pub value: ImageAddr,
    /// The version index without [`HIDDEN`]; 1 where the image has no versions.
    pub index: u16,
    /// Whether only who asks for this very version gets it.
    pub hidden: bool,
    /// The version's name; `None` for the base version.
    pub version: Option<&'t str>,
}

/// A place that the dynamic linker fills with an address.
#[derive(Clone, Copy, Debug)]
pub(super) enum Slot {
    /// With that of the symbol of this index.
    Symbol { at: ImageAddr, index: usize },
    /// With what the resolver at this address answers.
    Resolver { at: ImageAddr, resolver: ImageAddr },
}

/// What the dynamic section of an image leads to.
pub(super) struct Tables<'i> {
    pub image: &'i Image,
    dynamic: Dynamic,
    symbols: Vec<u8>,
    strings: Vec<u8>,
    versions: Vec<u8>,
    /// Names of versions by index, those that it defines and those that it needs, as offsets of `strings`.
    names: HashMap<u16, usize>,
    has_definitions: bool,
}

fn u16_at(bytes: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_le_bytes(*bytes.get(at..)?.first_chunk()?))
}

fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_le_bytes(*bytes.get(at..)?.first_chunk()?))
}

fn u64_at(bytes: &[u8], at: usize) -> Option<u64> {
    Some(u64::from_le_bytes(*bytes.get(at..)?.first_chunk()?))
}

impl<'i> Tables<'i> {
    /// Reads them; `None` if the image has no dynamic section or it makes no sense.
    pub fn read<M: ReadMemory + ?Sized>(memory: &M, image: &'i Image) -> Option<Self> {
        let dynamic = image.dynamic(memory)?;
        let (symbols, strings) = dynamic.symbol_bytes(memory)?;
        let count = symbols.len() as u64 / crate::elf::SYM_BYTES;
        let versions = match dynamic.place(DT_VERSYM) {
            Some(at) => memory.read_vec(at, count * 2).ok()?,
            None => Vec::new(),
        };
        let mut tables =
            Self { image, dynamic, symbols, strings, versions, names: HashMap::new(), has_definitions: false };
        if let (Some(at), Some(count)) = (tables.dynamic.place(DT_VERDEF), tables.dynamic.get(DT_VERDEFNUM)) {
            tables.has_definitions = true;
            tables.definitions(memory, at, count)?;
        }
        if let (Some(at), Some(count)) = (tables.dynamic.place(DT_VERNEED), tables.dynamic.get(DT_VERNEEDNUM)) {
            tables.needs(memory, at, count)?;
        }
        Some(tables)
    }

    /// The list of `Elf64_Verdef` (20 bytes) with their `Elf64_Verdaux` (8 bytes).
    fn definitions<M: ReadMemory + ?Sized>(&mut self, memory: &M, mut at: ProcAddr, count: u64) -> Option<()> {
        for _ in 0..count.min(1 << 16) {
            let def = memory.read_vec(at, 20).ok()?;
            let (flags, index) = (u16_at(&def, 2)?, u16_at(&def, 4)?);
            let aux = memory.read_vec(at.checked_add(u64::from(u32_at(&def, 12)?))?, 8).ok()?;
            const BASE: u16 = 1;
            if flags & BASE == 0 {
                self.names.insert(index & !HIDDEN, u32_at(&aux, 0)? as usize);
            }
            match u32_at(&def, 16)? {
                0 => break,
                next => at = at.checked_add(u64::from(next))?,
            }
        }
        Some(())
    }

    /// The list of `Elf64_Verneed` (16 bytes) with their `Elf64_Vernaux` (16 bytes).
    fn needs<M: ReadMemory + ?Sized>(&mut self, memory: &M, mut at: ProcAddr, count: u64) -> Option<()> {
        for _ in 0..count.min(1 << 16) {
            let need = memory.read_vec(at, 16).ok()?;
            let mut aux_at = at.checked_add(u64::from(u32_at(&need, 8)?))?;
            for _ in 0..u16_at(&need, 2)? {
                let aux = memory.read_vec(aux_at, 16).ok()?;
                self.names.insert(u16_at(&aux, 6)? & !HIDDEN, u32_at(&aux, 8)? as usize);
                aux_at = aux_at.checked_add(u64::from(u32_at(&aux, 12)?))?;
            }
            match u32_at(&need, 12)? {
                0 => break,
                next => at = at.checked_add(u64::from(next))?,
            }
        }
        Some(())
    }

    fn text(&self, at: usize) -> Option<&str> {
        std::str::from_utf8(self.strings.get(at..)?.split(|b| *b == 0).next()?).ok()
    }

    /// Whether it says which versions it defines.
    pub fn is_versioned(&self) -> bool {
        self.has_definitions
    }

    /// The symbol of this index.
    pub fn symbol(&self, index: usize) -> Option<Symbol<'_>> {
        let from = index.checked_mul(crate::elf::SYM_BYTES as usize)?;
        let entry = self.symbols.get(from..from.checked_add(crate::elf::SYM_BYTES as usize)?)?;
        let name = self.text(u32_at(entry, 0)? as usize)?;
        let versym = if self.versions.is_empty() { 1 } else { u16_at(&self.versions, index.checked_mul(2)?)? };
        let version = versym & !HIDDEN;
        Some(Symbol {
            name,
            kind: entry.get(4)? & 0xf,
            bind: entry.get(4)? >> 4,
            defined: u16_at(entry, 6)? != 0,
            value: ImageAddr(u64_at(entry, 8)?),
            index: version,
            hidden: versym & HIDDEN != 0,
            version: self.names.get(&version).and_then(|at| self.text(*at)),
        })
    }

    /// Every symbol of this name.
    pub fn named<'t>(&'t self, name: &'t str) -> impl Iterator<Item = Symbol<'t>> {
        let count = self.symbols.len() / crate::elf::SYM_BYTES as usize;
        (1..count).filter_map(|i| self.symbol(i)).filter(move |s| s.name == name)
    }

    /// The names of the libraries that it needs.
    pub fn needed(&self) -> impl Iterator<Item = &str> {
        self.dynamic.all(DT_NEEDED).filter_map(|at| self.text(usize::try_from(at).ok()?))
    }

    /// The name by which others need it.
    pub fn soname(&self) -> &str {
        let given = self.dynamic.get(DT_SONAME).and_then(|at| self.text(usize::try_from(at).ok()?));
        given.unwrap_or_else(|| self.image.short_name())
    }

    /// The places that the dynamic linker has filled, or will.
    pub fn slots<M: ReadMemory + ?Sized>(&self, memory: &M) -> Vec<Slot> {
        let mut out = Vec::new();
        for (table, size) in [(DT_RELA, DT_RELASZ), (DT_JMPREL, DT_PLTRELSZ)] {
            let (Some(at), Some(len)) = (self.dynamic.place(table), self.dynamic.get(size)) else { continue };
            let Ok(bytes) = memory.read_vec(at, len.min(MAX_BYTES)) else { continue };
            for entry in bytes.as_chunks::<24>().0 {
                let word = |i: usize| u64::from_le_bytes(std::array::from_fn(|k| entry[i + k]));
                let (at, info, addend) = (ImageAddr(word(0)), word(8), word(16));
                match (info & 0xffff_ffff) as u32 {
                    R_X86_64_IRELATIVE => out.push(Slot::Resolver { at, resolver: ImageAddr(addend) }),
                    R_X86_64_64 | R_X86_64_GLOB_DAT | R_X86_64_JUMP_SLOT if addend == 0 => {
                        out.push(Slot::Symbol { at, index: (info >> 32) as usize });
                    }
                    _ => {}
                }
            }
        }
        out
    }
}
