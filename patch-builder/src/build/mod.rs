//! Reads one linked build: its sections, symbols, relocations, unwind tables
//! and lines, as facts about addresses. Nothing here compares or decides.
//!
//! Everything borrows the file's bytes; nothing in a file is trusted to be in
//! range.

mod dynamic;
mod elf;
mod file;
mod lines;
mod linkmap;
mod names;
mod relocatable;
mod scopes;
mod separate;
mod symbols;
mod tls;
mod units;
mod unwind;

use std::collections::HashSet;

pub use dynamic::{DynKind, DynRel, ImportSym, TlsSym};
pub use elf::{Reloc, Section};
pub use file::FileBytes;
pub use lines::{Lines, Row};
pub use names::{canonical, demangle, has_identity, split_suffix};
pub use relocatable::{ObjFrame, ObjPlace, ObjReloc, ObjSymbol, Relocatable};
pub use scopes::{Inlined, Scope, Scopes, SourceFile, SourceLine};
pub use separate::{separate, Separate};
pub use symbols::{Func, FuncId, Name, ObjId, Object, RelSym, SymTarget};
pub use tls::{TlsFound, TlsModel};
pub use units::{units, Unit};
pub use unwind::{Fde, Personality, Unwind};

/// A hash map that is seeded anew in every run, and faster than the standard one.
pub type FastMap<K, V> = std::collections::HashMap<K, V, foldhash::fast::RandomState>;

/// Why a file is no build that can be diffed.
#[derive(Debug)]
#[non_exhaustive]
pub enum BuildError {
    /// The file can't be read.
    Io(std::io::Error),
    /// Not an x86-64 ELF executable or shared object, or damaged.
    NotElf(String),
    /// A refusal: the file is fine but says too little.
    Incomplete {
        /// The refusal's rule.
        rule: &'static str,
        /// What is missing.
        what: String,
        /// What to do about it.
        remedy: &'static str,
    },
}

impl std::fmt::Display for BuildError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Io(e) => write!(f, "{e}"),
            Self::NotElf(why) => f.write_str(why),
            Self::Incomplete { what, remedy, .. } => write!(f, "{what}; {remedy}"),
        }
    }
}

impl std::error::Error for BuildError {}

/// The thread-local segment.
#[derive(Clone, Copy, Debug)]
pub struct TlsSegment {
    /// Where its initial image is linked.
    pub addr: u64,
    /// Its length, rounded up to its alignment: the distance of its start below the thread pointer.
    pub aligned_len: u64,
}

/// One linked build.
pub struct Build<'d> {
    /// As given on the command line.
    pub path: String,
    /// The GNU build-id.
    pub build_id: Vec<u8>,
    /// Whether it is position-independent.
    pub pie: bool,
    /// Whether it is a static program, position-independent or not: its libraries are in it.
    pub is_static: bool,
    /// Entry point.
    pub entry: u64,
    /// Whether any of it was compiled by rustc.
    pub rust: bool,
    /// Allocated sections, by address; thread-local NOBITS left out.
    pub sections: Vec<Section<'d>>,
    /// Every section, with its bytes, for DWARF.
    pub all_sections: Vec<Section<'d>>,
    /// Functions, by address.
    pub funcs: Vec<Func<'d>>,
    /// Data symbols, by address; the ones without size after those with.
    pub objects: Vec<Object<'d>>,
    /// Thread-local variables; the address is the offset in the thread-local segment.
    pub tls: Vec<Object<'d>>,
    /// The thread-local segment.
    pub tls_segment: Option<TlsSegment>,
    /// Relocations that the linker kept, by address.
    pub relocs: Vec<Reloc>,
    /// What each index of the symbol table stands for.
    pub rel_syms: Vec<RelSym<'d>>,
    /// Dynamic relocations by the address they change.
    pub dynamic: FastMap<u64, DynRel<'d>>,
    /// The keys of `dynamic`, ascending.
    pub dynamic_at: Vec<u64>,
    /// What libraries define for it, by name.
    pub imports: FastMap<&'d str, ImportSym<'d>>,
    /// Stubs of the procedure linkage table: address to import.
    pub plt: FastMap<u64, &'d str>,
    /// Addresses that the dynamic symbol table exports.
    pub exported: HashSet<u64>,
    /// Addresses at which unnamed data certainly begins or ends, ascending.
    pub hard_bounds: Vec<u64>,
    /// Addresses that data or labels refer to: perhaps the middle of something.
    pub soft_bounds: Vec<u64>,
    /// Start and end of sized data whose names say nothing across builds, by start.
    pub nameless: Vec<(u64, u64)>,
    /// Unwind tables.
    pub unwind: Unwind<'d>,
}

/// An address further than this from its label belongs to something else.
const MAX_BIAS: u64 = 1 << 20;

impl<'d> Build<'d> {
    /// Reads a build from the bytes of its file.
    ///
    /// # Errors
    ///
    /// Not an x86-64 ELF image, damaged, or without build-id, symbols or kept relocations.
    pub fn parse(path: &str, bytes: &'d [u8]) -> Result<Self, BuildError> {
        let raw = elf::RawElf::parse(bytes)?;
        let sections: Vec<Section<'d>> = raw.alloc_sections();
        let ((symbols, dynamic), (relocs, unwind)) = rayon::join(
            || rayon::join(|| symbols::read(&raw, &sections), || dynamic::read(&raw, &sections)),
            || rayon::join(|| elf::kept_relocs(&raw), || unwind::read(&sections)),
        );
        let (symbols, dynamic, relocs, unwind) = (symbols?, dynamic?, relocs?, unwind?);
        let plt = dynamic::plt_stubs(&sections, &dynamic.relocs);
        let mut dynamic_at: Vec<u64> = dynamic.relocs.keys().copied().collect();
        dynamic_at.sort_unstable();
        let mut build = Self {
            path: path.to_owned(),
            build_id: raw.build_id.clone(),
            pie: raw.pie,
            is_static: raw.is_static,
            entry: raw.entry,
            rust: raw.rust,
            tls_segment: raw.tls,
            all_sections: raw.sections,
            sections,
            funcs: symbols.funcs,
            objects: symbols.objects,
            tls: symbols.tls,
            rel_syms: symbols.rel_syms,
            relocs,
            dynamic: dynamic.relocs,
            dynamic_at,
            exported: dynamic.exported,
            imports: dynamic.imports,
            plt,
            hard_bounds: symbols.bounds,
            soft_bounds: symbols.labels,
            nameless: symbols.nameless,
            unwind,
        };
        build.add_thread_local_slots();
        build.check_distances()?;
        build.add_pointer_bounds();
        build.name_resolver_stubs();
        match build.sanitizer() {
            Some(name) => Err(BuildError::Incomplete {
                rule: "unsupported",
                what: format!(
                    "it is instrumented by {name}, which keeps records of its own about every function and variable"
                ),
                remedy: "build without -fsanitize for what is to be patched",
            }),
            None => Ok(build),
        }
    }

    /// A table of distances to code (a jump table) must hold what its relocations say: a damaged one would send the
    /// patch anywhere.
    fn check_distances(&self) -> Result<(), BuildError> {
        const PC32: u32 = 2;
        for s in self.sections.iter().filter(|s| !s.exec && !s.zero_fill) {
            for r in self.relocs_in(s.addr, s.size).iter().filter(|r| r.kind == PC32) {
                let symbol = self.rel_sym(r);
                let to_code = matches!(symbol.target, SymTarget::Place | SymTarget::Func(_))
                    && self.section_at(symbol.value).is_some_and(|s| s.exec);
                let to = symbol.value.wrapping_add_signed(r.addend);
                let distance = self.bytes(r.at, 4).and_then(|b| b.try_into().ok()).map(i32::from_le_bytes);
                let there = distance.map(|d| r.at.wrapping_add_signed(i64::from(d)));
                if to_code && there != Some(to) {
                    return Err(elf::damaged(format!(
                        "a relocation at {:#x} that does not give what stands there",
                        r.at
                    )));
                }
            }
        }
        Ok(())
    }

    /// A sanitizer whose tables a patch can't extend: unnamed writable data that its runtime has registered.
    fn sanitizer(&self) -> Option<&'static str> {
        let known = [
            ("__asan_register_", "AddressSanitizer"),
            ("__hwasan_init", "HWAddressSanitizer"),
            ("__ubsan_handle_", "UndefinedBehaviorSanitizer"),
        ];
        let named = self.funcs.iter().flat_map(|f| f.names.iter().map(|n| n.text)).chain(self.imports.keys().copied());
        let names: Vec<&str> = named.filter(|n| n.starts_with("__")).collect();
        known.into_iter().find(|(prefix, _)| names.iter().any(|n| n.starts_with(prefix))).map(|(_, name)| name)
    }

    /// Stubs of functions that are chosen at start-up go by the name of their resolver.
    fn name_resolver_stubs(&mut self) {
        for (at, resolver) in dynamic::resolver_stubs(&self.sections, &self.dynamic) {
            if let Some(f) = self.func_at(resolver).map(|id| self.func(id)).filter(|f| f.addr == resolver) {
                let name = f.name();
                self.plt.insert(at, name);
            }
        }
    }

    /// Sections bound what lies in them; what a pointer refers to may be the middle of something.
    fn add_pointer_bounds(&mut self) {
        let mut bounds = std::mem::take(&mut self.hard_bounds);
        self.soft_bounds.extend(self.dynamic.values().filter_map(|r| match r.kind {
            DynKind::Relative(to) => Some(to),
            _ => None,
        }));
        // In an image that is linked to fixed addresses, pointers in data need no dynamic relocation.
        let absolute = |r: &&Reloc| matches!(r.kind, 1 | 10 | 11) && self.section_at(r.at).is_some_and(|s| !s.exec);
        let pointed = self.relocs.iter().filter(absolute).map(|r| self.rel_sym(r).value.wrapping_add_signed(r.addend));
        self.soft_bounds.extend(pointed.collect::<Vec<u64>>());
        for section in &self.sections {
            bounds.push(section.addr);
            bounds.push(section.addr + section.size);
        }
        bounds.sort_unstable();
        bounds.dedup();
        self.hard_bounds = bounds;
    }

    /// Takes the extents of unnamed data from the linker's map (`-Wl,-Map=FILE`).
    pub fn add_link_map(&mut self, map: &str) {
        let bounds = linkmap::bounds(map);
        let data: Vec<u64> = bounds.into_iter().filter(|at| self.section_at(*at).is_some_and(|s| !s.exec)).collect();
        self.hard_bounds.extend(data);
        self.hard_bounds.sort_unstable();
        self.hard_bounds.dedup();
    }

    /// The section that holds `addr`.
    #[must_use]
    pub fn section_at(&self, addr: u64) -> Option<&Section<'d>> {
        let index = self.sections.partition_point(|s| s.addr <= addr);
        let section = self.sections.get(index.checked_sub(1)?)?;
        (addr < section.addr + section.size).then_some(section)
    }

    /// The `len` bytes at `addr`, if the file has them; zeros for `.bss` are [`Self::is_zero_fill`].
    #[must_use]
    pub fn bytes(&self, addr: u64, len: u64) -> Option<&'d [u8]> {
        let section = self.section_at(addr)?;
        let from = usize::try_from(addr - section.addr).ok()?;
        section.data.get(from..from.checked_add(usize::try_from(len).ok()?)?)
    }

    /// Whether `addr` lies in memory that starts as zeros.
    #[must_use]
    pub fn is_zero_fill(&self, addr: u64) -> bool {
        self.section_at(addr).is_some_and(|s| s.zero_fill)
    }

    /// Whether the dynamic linker writes anything in `addr..addr + len`.
    #[must_use]
    pub fn has_dynamic_in(&self, addr: u64, len: u64) -> bool {
        let first = self.dynamic_at.partition_point(|at| *at < addr);
        self.dynamic_at.get(first).is_some_and(|at| at - addr < len)
    }

    /// The function that holds `addr`.
    #[must_use]
    pub fn func_at(&self, addr: u64) -> Option<FuncId> {
        let index = self.funcs.partition_point(|f| f.addr <= addr).checked_sub(1)?;
        let f = &self.funcs[index];
        (addr < f.addr + f.size || addr == f.addr).then_some(index as FuncId)
    }

    /// The sized data symbol that holds `addr`, else the one without size at exactly `addr`.
    #[must_use]
    pub fn object_at(&self, addr: u64) -> Option<ObjId> {
        let end = self.objects.partition_point(|o| o.addr <= addr);
        let mut exact = None;
        // Objects may nest or touch; a handful back is enough to find the holder.
        for index in (end.saturating_sub(8)..end).rev() {
            let o = &self.objects[index];
            if o.size > 0 && addr < o.addr + o.size {
                return Some(index as ObjId);
            }
            if o.size == 0 && o.addr == addr {
                exact = Some(index as ObjId);
            }
        }
        exact
    }

    /// Kept relocations whose place lies in `addr..addr + len`.
    #[must_use]
    pub fn relocs_in(&self, addr: u64, len: u64) -> &[Reloc] {
        let rest = &self.relocs[self.relocs.partition_point(|r| r.at < addr)..];
        let end = addr.saturating_add(len);
        // Nearly always one or none.
        let few = rest.iter().take(8).take_while(|r| r.at < end).count();
        &rest[..if few < 8 { few } else { rest.partition_point(|r| r.at < end) }]
    }

    /// What the symbol of a relocation stands for.
    #[must_use]
    pub fn rel_sym(&self, reloc: &Reloc) -> &RelSym<'d> {
        const NONE: RelSym<'static> = RelSym { value: 0, target: SymTarget::Place, name: "" };
        self.rel_syms.get(reloc.sym as usize).unwrap_or(&NONE)
    }

    /// Where the unnamed data begins that the relocation behind the address `to` names by a label. (Assemblers keep
    /// the labels of what linkers merge.)
    #[must_use]
    pub fn base_of(&self, to: u64, reloc: &Reloc) -> Option<u64> {
        let sym = self.rel_sym(reloc);
        let near = sym.value.abs_diff(to) < MAX_BIAS;
        let section = self.section_at(sym.value).filter(|s| !s.exec && !s.name.starts_with(".got"))?;
        let same = (section.addr..=section.addr + section.size).contains(&to);
        (sym.target == SymTarget::Place && !sym.name.is_empty() && near && same).then_some(sym.value)
    }

    /// The start of the sized data without a lasting name that holds `addr`.
    #[must_use]
    pub fn nameless_at(&self, addr: u64) -> Option<u64> {
        let index = self.nameless.partition_point(|(start, _)| *start <= addr);
        let (start, end) = self.nameless.get(index.checked_sub(1)?)?;
        (addr < *end).then_some(*start)
    }

    /// The name of the section that ends at `addr`: labels such as `__TMC_END__` stand there.
    #[must_use]
    pub fn edge(&self, addr: u64) -> Option<&'d str> {
        self.sections.iter().find(|s| s.addr + s.size == addr).map(|s| s.name)
    }

    /// The next hard bound after `addr`.
    #[must_use]
    pub fn next_bound(&self, addr: u64) -> u64 {
        let index = self.hard_bounds.partition_point(|b| *b <= addr);
        self.hard_bounds.get(index).copied().unwrap_or(addr)
    }

    /// The bytes of a section by name, whether allocated or not.
    #[must_use]
    pub fn section_named(&self, name: &str) -> Option<&Section<'d>> {
        self.all_sections.iter().find(|s| s.name == name)
    }

    /// A function by its id.
    #[must_use]
    pub fn func(&self, id: FuncId) -> &Func<'d> {
        &self.funcs[id as usize]
    }

    /// A data symbol by its id.
    #[must_use]
    pub fn object(&self, id: ObjId) -> &Object<'d> {
        &self.objects[id as usize]
    }

    /// The version of an import; `None` also for what is none.
    #[must_use]
    pub fn import_version(&self, name: &str) -> Option<&'d str> {
        self.imports.get(name)?.version
    }

    /// The bytes of a function.
    #[must_use]
    pub fn code(&self, id: FuncId) -> &'d [u8] {
        let f = self.func(id);
        self.bytes(f.addr, f.size).unwrap_or(&[])
    }

    /// Where the language-specific data area at `lsda` ends: as its tables say, at the latest where the next begins.
    #[must_use]
    pub fn lsda_end(&self, lsda: u64) -> u64 {
        let end = self.section_at(lsda).map_or(lsda, |s| s.addr + s.size);
        let limit = self.unwind.next_lsda(lsda).unwrap_or(end).min(end);
        let data = self.bytes(lsda, limit - lsda).unwrap_or(&[]);
        unwind::lsda_len(data).map_or(limit, |len| lsda + len)
    }
}
