//! The symbol table: functions and data with all their names.

use iced_x86::{Decoder, DecoderOptions, FlowControl, Mnemonic};
use object::read::elf::Sym;
use object::{elf, LittleEndian as Le};
use rayon::prelude::*;

use super::elf::{damaged, RawElf, Section};
use super::{has_identity, BuildError, FastMap};

/// Index of a function in its build.
pub type FuncId = u32;
/// Index of a data symbol in its build.
pub type ObjId = u32;

/// One name of a function or of a piece of data.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Name<'d> {
    /// The symbol, without its version.
    pub text: &'d str,
    /// For a local symbol, the `STT_FILE` symbol before it.
    pub file: Option<&'d str>,
}

/// A function.
#[derive(Clone, Debug)]
pub struct Func<'d> {
    /// Its first byte.
    pub addr: u64,
    /// Its length; for a symbol without size, up to the next symbol.
    pub size: u64,
    /// Every symbol at this address.
    pub names: Vec<Name<'d>>,
    /// Whether the length was guessed from the next symbol.
    pub unsized_: bool,
    /// Whether it is a resolver (`STT_GNU_IFUNC`).
    pub ifunc: bool,
    /// Whether another function's symbol lies inside it.
    pub overlapped: bool,
}

impl<'d> Func<'d> {
    /// The name to show.
    #[must_use]
    pub fn name(&self) -> &'d str {
        self.names.first().map_or("?", |n| n.text)
    }

    /// The function that this is an out-of-line cold part of, by name.
    #[must_use]
    pub fn cold_parent(&self) -> Option<&'d str> {
        let name = self.name();
        name.find(".cold").map(|at| &name[..at]).filter(|p| !p.is_empty())
    }
}

/// A data symbol.
#[derive(Clone, Debug)]
pub struct Object<'d> {
    /// Its first byte; for a thread-local, its offset in the segment.
    pub addr: u64,
    /// Its length; zero for a mere label.
    pub size: u64,
    /// Every symbol at this address that has an identity.
    pub names: Vec<Name<'d>>,
}

impl<'d> Object<'d> {
    /// The name to show.
    #[must_use]
    pub fn name(&self) -> &'d str {
        self.names.first().map_or("?", |n| n.text)
    }
}

/// What a symbol stands for when a relocation names it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SymTarget {
    /// Nothing but an address (section symbols, `.L*`, unknown).
    Place,
    /// A function.
    Func(FuncId),
    /// A data symbol with an identity.
    Object(ObjId),
    /// A thread-local variable.
    Tls(u32),
    /// The start of a section without content.
    Empty,
    /// Defined elsewhere, or nowhere.
    Undefined,
    /// A number, not an address.
    Absolute,
}

/// A symbol as relocations use it.
#[derive(Clone, Copy, Debug)]
pub struct RelSym<'d> {
    /// `st_value`.
    pub value: u64,
    /// What it stands for.
    pub target: SymTarget,
    /// Its name.
    pub name: &'d str,
}

pub struct Symbols<'d> {
    pub funcs: Vec<Func<'d>>,
    pub objects: Vec<Object<'d>>,
    pub tls: Vec<Object<'d>>,
    pub rel_syms: Vec<RelSym<'d>>,
    pub bounds: Vec<u64>,
    pub labels: Vec<u64>,
    pub nameless: Vec<(u64, u64)>,
}

struct Raw<'d> {
    index: usize,
    name: Name<'d>,
    value: u64,
    size: u64,
    kind: u8,
    global: bool,
}

pub fn read<'d>(raw: &RawElf<'d>, sections: &[Section<'d>]) -> Result<Symbols<'d>, BuildError> {
    let missing = || {
        BuildError::Incomplete {
        rule: "no-symbols",
        what: "it is stripped of its symbols".into(),
        remedy: "diff the unstripped build (the running process may be the stripped one; eu-unstrip joins a stripped file with its .debug file)",
    }
    };
    let table = raw.table.symbols(Le, raw.bytes, elf::SHT_SYMTAB).map_err(damaged)?;
    let strings = table.strings();
    let mut rel_syms = Vec::with_capacity(table.len());
    let (mut code, mut data, mut tls) = (Vec::new(), Vec::new(), Vec::new());
    let (mut bounds, mut labels, mut nameless) = (Vec::new(), Vec::new(), Vec::new());
    let mut file = None;
    for (index, sym) in table.symbols().iter().enumerate() {
        let name = sym.name(Le, strings).map_err(damaged)?;
        let name = std::str::from_utf8(name).map_err(|_| damaged("a symbol's name is not text"))?;
        let (value, size, kind) = (sym.st_value(Le), sym.st_size(Le), sym.st_type().0);
        rel_syms.push(RelSym { value, target: SymTarget::Place, name });
        if kind == elf::STT_FILE.0 {
            file = (!name.is_empty()).then_some(name);
            continue;
        }
        let shndx = sym.st_shndx(Le);
        if shndx == elf::SHN_UNDEF {
            rel_syms[index].target = SymTarget::Undefined;
            continue;
        }
        if kind == elf::STT_SECTION.0 {
            let section = shndx.index().and_then(|i| raw.sections.get(usize::from(i)));
            if let Some(section) = section.filter(|s| s.alloc && s.size == 0) {
                rel_syms[index] = RelSym { value, target: SymTarget::Empty, name: section.name };
            }
        }
        if kind == elf::STT_SECTION.0 || name.is_empty() || shndx == elf::SHN_ABS {
            if shndx == elf::SHN_ABS {
                rel_syms[index].target = SymTarget::Absolute;
            }
            continue;
        }
        let global = sym.st_bind() != elf::STB_LOCAL;
        let text = name.split_once('@').map_or(name, |(n, _)| n);
        let entry =
            Raw { index, name: Name { text, file: if global { None } else { file } }, value, size, kind, global };
        if kind == elf::STT_TLS.0 {
            tls.push(entry);
            continue;
        }
        let home = shndx.index().and_then(|i| raw.sections.get(usize::from(i))).filter(|s| s.alloc);
        let Some(section) = section_of(sections, value).or(home) else { continue };
        if section.exec {
            code.push(entry);
        } else {
            // A label such as `.LC5` may stand inside a string that ends like another.
            if size > 0 || has_identity(name) || is_piece(name) {
                bounds.push(value);
                bounds.push(value.saturating_add(size));
            } else {
                labels.push(value);
            }
            if size > 0 && !has_identity(name) {
                nameless.push((value, value.saturating_add(size)));
            }
            data.push(entry);
        }
    }
    let funcs = functions(code, sections, &mut rel_syms);
    if funcs.iter().filter(|f| !f.unsized_).count() == 0 {
        return Err(missing());
    }
    let objects = grouped(data, &mut rel_syms, SymTarget::Object);
    let tls = grouped(tls, &mut rel_syms, SymTarget::Tls);
    nameless.sort_unstable();
    Ok(Symbols { funcs, objects, tls, rel_syms, bounds, labels, nameless })
}

/// Names that rustc gives to constants of their own, one for each.
fn is_piece(name: &str) -> bool {
    [".Lanon", "anon.", "alloc_", ".Lalloc_", "vtable.", ".Lvtable"].iter().any(|p| name.starts_with(p))
}

/// The section at `addr`, its end included: labels such as `_end` stand there.
fn section_of<'a, 'd>(sections: &'a [Section<'d>], addr: u64) -> Option<&'a Section<'d>> {
    let index = sections.partition_point(|s| s.addr <= addr).checked_sub(1)?;
    sections.get(index).filter(|s| addr <= s.addr + s.size)
}

fn functions<'d>(mut code: Vec<Raw<'d>>, sections: &[Section<'d>], rel_syms: &mut [RelSym<'d>]) -> Vec<Func<'d>> {
    const FUNC: u8 = 2;
    const IFUNC: u8 = 10;
    code.par_sort_by(|a, b| (a.value, b.size, !a.global, a.name.text).cmp(&(b.value, a.size, !b.global, b.name.text)));
    let mut out: Vec<Func<'d>> = Vec::new();
    let mut rest = &code[..];
    while let Some(first) = rest.first() {
        let addr = first.value;
        let here;
        (here, rest) = rest.split_at(rest.iter().take_while(|r| r.value == addr).count());
        let mut raws: Vec<&Raw<'d>> = here.iter().collect();
        let typed = raws.iter().any(|r| r.kind == FUNC || r.kind == IFUNC);
        if typed {
            // labels at a function's start (`.text` markers and the like) are no names of it
            for label in raws.iter().filter(|r| r.kind != FUNC && r.kind != IFUNC) {
                rel_syms[label.index].target = SymTarget::Func(out.len() as FuncId);
            }
            raws.retain(|r| r.kind == FUNC || r.kind == IFUNC);
        }
        let size = raws.iter().map(|r| r.size).max().unwrap_or(0);
        let inside = out.last().is_some_and(|f| !f.unsized_ && addr < f.addr + f.size);
        if inside && !typed {
            continue; // a label within a function
        }
        if inside {
            if let Some(f) = out.last_mut() {
                f.overlapped = true;
            }
        }
        let end = section_of(sections, addr).map_or(addr, |s| s.addr + s.size);
        let next = rest.first().map_or(end, |r| r.value).min(end);
        let unsized_ = size == 0;
        let size = if unsized_ { without_padding(sections, addr, next) } else { size.min(end - addr.min(end)) };
        let id = out.len() as FuncId;
        let ifunc = raws.iter().any(|r| r.kind == IFUNC);
        for r in &raws {
            rel_syms[r.index].target = SymTarget::Func(id);
        }
        let names = raws.iter().map(|r| r.name).collect();
        out.push(Func { addr, size, names, unsized_, ifunc, overlapped: inside });
    }
    out
}

/// The length of code without a size: up to `next`, but for what the linker put behind its last instruction, which another link need not put
/// there.
fn without_padding(sections: &[Section<'_>], addr: u64, next: u64) -> u64 {
    let all = next.saturating_sub(addr);
    let Some(section) = section_of(sections, addr) else { return all };
    let from = (addr - section.addr) as usize;
    let Some(code) = section.data.get(from..from + all as usize) else { return all };
    let mut farthest = 0;
    for ins in Decoder::with_ip(64, code, 0, DecoderOptions::NONE) {
        let flow = ins.flow_control();
        if matches!(flow, FlowControl::ConditionalBranch | FlowControl::UnconditionalBranch)
            && ins.near_branch_target() < all
        {
            farthest = farthest.max(ins.near_branch_target());
        }
        let ends = matches!(flow, FlowControl::UnconditionalBranch | FlowControl::IndirectBranch | FlowControl::Return);
        // Nothing goes on behind it, and nothing leads there.
        if ends && farthest < ins.next_ip() && code.get(ins.next_ip() as usize..).is_some_and(is_padding) {
            return ins.next_ip();
        }
        if ins.is_invalid() {
            return all;
        }
    }
    all
}

/// Zeros, or instructions that do nothing.
fn is_padding(code: &[u8]) -> bool {
    let nothing = |ins: iced_x86::Instruction| matches!(ins.mnemonic(), Mnemonic::Nop | Mnemonic::Int3);
    code.iter().all(|b| *b == 0) || Decoder::new(64, code, DecoderOptions::NONE).into_iter().all(nothing)
}

fn grouped<'d>(raws: Vec<Raw<'d>>, rel_syms: &mut [RelSym<'d>], target: fn(u32) -> SymTarget) -> Vec<Object<'d>> {
    let mut by_place: FastMap<(u64, bool), Vec<Raw<'d>>> = FastMap::default();
    for raw in raws.into_iter().filter(|r| has_identity(r.name.text)) {
        by_place.entry((raw.value, raw.size > 0)).or_default().push(raw);
    }
    let mut groups: Vec<_> = by_place.into_iter().collect();
    groups.sort_by_key(|((addr, sized), _)| (*addr, !sized));
    let mut out = Vec::with_capacity(groups.len());
    for ((addr, _), mut raws) in groups {
        raws.sort_by(|a, b| (!a.global, a.name.text).cmp(&(!b.global, b.name.text)));
        for r in &raws {
            rel_syms[r.index].target = target(out.len() as u32);
        }
        // A damaged symbol may claim more than there are addresses.
        let size = raws.iter().map(|r| r.size).max().unwrap_or(0).min(u64::MAX - addr);
        out.push(Object { addr, size, names: raws.into_iter().map(|r| r.name).collect() });
    }
    out
}
