//! Dynamic relocations and the stubs of the procedure linkage table.

use std::collections::HashSet;

use iced_x86::{Decoder, DecoderOptions, FlowControl, OpKind};
use object::read::elf::{Rela, SectionHeader, Sym};
use object::{elf, LittleEndian as Le};

use super::elf::{damaged, RawElf, Section};
use super::{BuildError, FastMap};

/// What the dynamic linker stores at a place.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DynKind<'d> {
    /// The run-time address of this linked address.
    Relative(u64),
    /// The address of an import, plus an addend.
    Import(&'d str, i64),
    /// The address of a symbol that this image defines and exports, plus an addend.
    Own(u64, i64),
    /// The result of the resolver at this address.
    Ifunc(u64),
    /// A copy of a library's data.
    Copy(&'d str),
    /// The offset from the thread pointer of this offset in this image's own thread-local segment.
    TpOff(u64),
    /// The module of a thread-local, for `__tls_get_addr`.
    TlsModule(TlsSym<'d>),
    /// The offset of a thread-local in its module, for `__tls_get_addr`.
    TlsOffset(TlsSym<'d>),
    /// A descriptor of a thread-local, two words.
    TlsDescriptor(TlsSym<'d>),
    /// Anything else.
    Other(u32),
}

/// The thread-local that the dynamic linker looks up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TlsSym<'d> {
    /// At this offset in this image's own segment.
    Own(u64),
    /// Of another image, plus an addend.
    Import(&'d str, i64),
}

/// One dynamic relocation.
#[derive(Clone, Copy, Debug)]
pub struct DynRel<'d> {
    /// What is stored.
    pub kind: DynKind<'d>,
}

/// A symbol that a library defines for this image.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ImportSym<'d> {
    /// The version that it was linked to, if any.
    pub version: Option<&'d str>,
    /// The library to which that version belongs.
    pub library: Option<&'d str>,
    /// Whether it may be missing.
    pub weak: bool,
    /// Whether it is known to be a variable.
    pub variable: bool,
    /// Whether it is thread-local.
    pub thread_local: bool,
    /// Whether the image imports two versions of this name.
    pub twice: bool,
}

pub struct Dynamic<'d> {
    pub relocs: FastMap<u64, DynRel<'d>>,
    pub exported: HashSet<u64>,
    pub imports: FastMap<&'d str, ImportSym<'d>>,
}

pub fn read<'d>(raw: &RawElf<'d>, sections: &[Section<'d>]) -> Result<Dynamic<'d>, BuildError> {
    let syms = raw.table.symbols(Le, raw.bytes, elf::SHT_DYNSYM).map_err(damaged)?;
    let versions = raw.table.versions(Le, raw.bytes).map_err(damaged)?.unwrap_or_default();
    let text = |bytes: &'d [u8]| std::str::from_utf8(bytes).map_err(|_| damaged("a symbol version that is not text"));
    let mut exported = HashSet::new();
    let mut imports: FastMap<&'d str, ImportSym<'d>> = FastMap::default();
    let mut resolved = Vec::with_capacity(syms.len());
    for (index, sym) in syms.enumerate() {
        let name = sym.name(Le, syms.strings()).map_err(damaged)?;
        let name = std::str::from_utf8(name).map_err(|_| damaged("a dynamic symbol's name is not text"))?;
        let defined = sym.st_shndx(Le) != elf::SHN_UNDEF;
        let value = sym.st_value(Le);
        if defined && sym.st_type() != elf::STT_TLS {
            exported.insert(value);
        }
        // A copy of a library's variable is defined here, and has the library's version.
        let index = versions.version_index(Le, index).index();
        let version = versions.version(index).map_err(damaged)?.filter(|v| v.file().is_some() || !defined);
        if !name.is_empty() && (!defined || version.is_some()) {
            let import = ImportSym {
                version: version.map(|v| text(v.name())).transpose()?,
                library: version.and_then(|v| v.file()).map(text).transpose()?,
                weak: sym.st_bind() == elf::STB_WEAK && !defined,
                variable: sym.st_type() == elf::STT_OBJECT,
                thread_local: sym.st_type() == elf::STT_TLS,
                twice: false,
            };
            let known = imports.entry(name).or_insert(import);
            known.twice |= known.version != import.version;
        }
        resolved.push((name, defined, value));
    }
    let mut relocs = FastMap::default();
    for sh in raw.table.iter() {
        let kind = sh.sh_type(Le);
        if sh.sh_flags(Le).0 & 2 == 0 {
            continue;
        }
        if kind == elf::SHT_RELA {
            let Some((entries, _)) = sh.rela(Le, raw.bytes).map_err(damaged)? else { continue };
            for r in entries {
                let sym = resolved.get(r.r_sym(Le, false) as usize).copied();
                let (at, kind) = (r.r_offset(Le), r.r_type(Le, false).0);
                let known = relocs.insert(at, DynRel { kind: kind_of(kind, sym, r.r_addend(Le)) });
                // R_X86_64_GLOB_DAT, R_X86_64_JUMP_SLOT: one for each slot of the table.
                if matches!(kind, 6 | 7) && (known.is_some() || !is_slot(sections, at)) {
                    return Err(damaged(format!("a dynamic relocation for a slot that can't be one, at {at:#x}")));
                }
            }
        } else if kind == elf::SHT_RELR {
            let Some(iter) = sh.relr(Le, raw.bytes).map_err(damaged)? else { continue };
            for at in iter {
                let to = word_at(sections, at).ok_or_else(|| damaged("a RELR entry outside the sections"))?;
                relocs.insert(at, DynRel { kind: DynKind::Relative(to) });
            }
        }
    }
    Ok(Dynamic { relocs, exported, imports })
}

fn kind_of<'d>(kind: u32, sym: Option<(&'d str, bool, u64)>, addend: i64) -> DynKind<'d> {
    match (kind, sym) {
        (8, _) => DynKind::Relative(addend.cast_unsigned()),
        (37, _) => DynKind::Ifunc(addend.cast_unsigned()),
        (1 | 6 | 7, Some((_, true, value))) => DynKind::Own(value, addend),
        (1 | 6 | 7, Some((name, false, _))) => DynKind::Import(name, addend),
        (5, Some((name, ..))) => DynKind::Copy(name),
        (18, Some(("", _, _))) | (18, None) => DynKind::TpOff(addend.cast_unsigned()),
        (18, Some((_, true, value))) => DynKind::TpOff(value.wrapping_add(addend.cast_unsigned())),
        (18, Some((name, false, _))) => DynKind::Import(name, addend),
        (16, sym) => DynKind::TlsModule(tls_sym(sym, addend)),
        (17, sym) => DynKind::TlsOffset(tls_sym(sym, addend)),
        (36, sym) => DynKind::TlsDescriptor(tls_sym(sym, addend)),
        (other, _) => DynKind::Other(other),
    }
}

fn tls_sym<'d>(sym: Option<(&'d str, bool, u64)>, addend: i64) -> TlsSym<'d> {
    match sym {
        Some((name, false, _)) if !name.is_empty() => TlsSym::Import(name, addend),
        Some((_, true, value)) => TlsSym::Own(value.wrapping_add_signed(addend)),
        _ => TlsSym::Own(addend.cast_unsigned()),
    }
}

/// Whether a word of the global offset table begins here.
fn is_slot(sections: &[Section<'_>], at: u64) -> bool {
    let holder = sections.iter().find(|s| s.addr <= at && at - s.addr < s.size);
    at.is_multiple_of(8) && holder.is_some_and(|s| s.name.starts_with(".got") && !s.exec)
}

fn word_at(sections: &[Section<'_>], at: u64) -> Option<u64> {
    let s = sections.iter().find(|s| s.addr <= at && at < s.addr + s.size)?;
    let from = usize::try_from(at - s.addr).ok()?;
    Some(u64::from_le_bytes(s.data.get(from..from + 8)?.try_into().ok()?))
}

/// Every stub of an import.
pub fn plt_stubs<'d>(sections: &[Section<'d>], relocs: &FastMap<u64, DynRel<'d>>) -> FastMap<u64, &'d str> {
    let import = |kind| match kind {
        DynKind::Import(name, _) => Some(name),
        _ => None,
    };
    stubs(sections, relocs, import).into_iter().collect()
}

/// Every stub of a function of this image that a resolver chooses: address of the stub, address of the resolver.
pub fn resolver_stubs<'d>(sections: &[Section<'d>], relocs: &FastMap<u64, DynRel<'d>>) -> Vec<(u64, u64)> {
    let resolver = |kind| match kind {
        DynKind::Ifunc(at) | DynKind::Own(at, 0) => Some(at),
        _ => None,
    };
    stubs(sections, relocs, resolver)
}

/// A stub is an indirect jump through a slot that the dynamic linker fills, perhaps after `endbr64`.
fn stubs<'d, T: Copy>(
    sections: &[Section<'d>],
    relocs: &FastMap<u64, DynRel<'d>>,
    wanted: impl Fn(DynKind<'d>) -> Option<T>,
) -> Vec<(u64, T)> {
    let mut out = Vec::new();
    for s in sections.iter().filter(|s| s.exec && (s.name.starts_with(".plt") || s.name.starts_with(".iplt"))) {
        let mut decoder = Decoder::with_ip(64, s.data, s.addr, DecoderOptions::NONE);
        let mut previous = None;
        while decoder.can_decode() {
            let ins = decoder.decode();
            let jump = ins.flow_control() == FlowControl::IndirectBranch && ins.op0_kind() == OpKind::Memory;
            if jump && ins.is_ip_rel_memory_operand() {
                if let Some(what) = relocs.get(&ins.ip_rel_memory_address()).and_then(|r| wanted(r.kind)) {
                    out.push((ins.ip(), what));
                    if let Some((ip, iced_x86::Mnemonic::Endbr64)) = previous {
                        out.push((ip, what));
                    }
                }
            }
            previous = Some((ins.ip(), ins.mnemonic()));
        }
    }
    out
}
