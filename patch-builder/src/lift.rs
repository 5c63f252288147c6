//! Turns a function into a symbolic form: its bytes with every reference
//! blanked out, and the references with what they mean.
//!
//! The instruction comes first: the target is taken from the decoded operand,
//! and a relocation only names it. (Linkers relax instructions and keep the
//! types of the relocations as they were.) A relocation that no operand
//! explains makes the function unexplained: it may be compared byte by byte,
//! but never be carried into a patch.

use iced_x86::{ConstantOffsets, Decoder, DecoderOptions, FlowControl, Instruction, Mnemonic, OpKind, Register};
use rayon::prelude::*;

use crate::build::{Build, FuncId, ObjId, Reloc, Section, SymTarget, TlsFound, TlsModel};

/// What a reference refers to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Target<'d> {
    /// A function, and how far behind its start.
    Func(FuncId, i64),
    /// A data symbol with an identity, and how far behind its start.
    Object(ObjId, i64),
    /// An import, through its stub.
    Plt(&'d str),
    /// A slot that the dynamic linker fills, at this address.
    Slot(u64),
    /// A thread-local variable, and how far behind its start.
    Tls(u32, i64),
    /// What is found through two slots, as the code of libraries finds thread-locals.
    TlsSlots(TlsModel, TlsFound<'d>),
    /// The start of a section without content, by the section's name; or a weak symbol that nobody defines.
    Empty(&'d str),
    /// A slot that holds this number, which is no address.
    Number(u64),
    /// Data without a name.
    Data(u64),
    /// An address that belongs to nothing known.
    Unknown(u64),
}

/// How a reference uses its target.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Access {
    /// Calls it or jumps to it.
    Branch,
    /// Reads or writes exactly so many bytes of it.
    Exact(u32),
    /// Takes its address, or reads an unknown part.
    Extent,
    /// Adds an index to it: what is meant may lie before or behind.
    Indexed,
}

/// How the reference is encoded.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Field {
    /// One byte, relative to the end of the instruction.
    Rel8,
    /// Four bytes, relative to the end of the instruction.
    Rel32,
    /// Four bytes, absolute.
    Abs32,
    /// Eight bytes, absolute.
    Abs64,
    /// Four bytes, relative to the thread pointer.
    TpOff32,
    /// Four bytes, relative to the start of the image's thread-local segment.
    DtpOff32,
    /// Four bytes, how far that segment's start lies below the thread pointer.
    TlsSize32,
}

/// One reference of an instruction.
#[derive(Clone, Copy, Debug)]
pub struct Ref<'d> {
    /// Where the field is, in bytes from the function's start.
    pub at: u32,
    /// Where the instruction ends, in bytes from the function's start.
    pub end: u32,
    /// How it is encoded.
    pub field: Field,
    /// How the target is used.
    pub access: Access,
    /// The target.
    pub target: Target<'d>,
    /// How far behind unnamed data's start the address lies: compilers reach a constant from its end, too.
    pub bias: i64,
}

/// A function in symbolic form.
#[derive(Clone, Debug, Default)]
pub struct Lifted<'d> {
    /// Its bytes, with the fields of `refs` zeroed.
    pub masked: Vec<u8>,
    /// Its references, ascending.
    pub refs: Vec<Ref<'d>>,
    /// Offsets that its own instructions branch to.
    pub branch_targets: Vec<u32>,
    /// The small numbers in its instructions, ascending: lengths of slices among them.
    pub numbers: Vec<u32>,
    /// Why it can't be carried, if it can't.
    pub unexplained: Option<String>,
}

const R_64: u32 = 1;
const R_PC32: u32 = 2;
const R_PLT32: u32 = 4;
const R_GOTPCREL: u32 = 9;
const R_32: u32 = 10;
const R_32S: u32 = 11;
const R_TLSGD: u32 = 19;
const R_TLSLD: u32 = 20;
const R_DTPOFF32: u32 = 21;
const R_GOTTPOFF: u32 = 22;
const R_TPOFF32: u32 = 23;
const R_PC64: u32 = 24;
const R_GOTPC32_TLSDESC: u32 = 34;
const R_TLSDESC_CALL: u32 = 35;
const R_GOTPCRELX: u32 = 41;
const R_REX_GOTPCRELX: u32 = 42;

/// Every function of a build in symbolic form, by id.
#[must_use]
pub fn lift_all<'d>(build: &Build<'d>) -> Vec<Lifted<'d>> {
    (0..build.funcs.len()).into_par_iter().map(|id| lift(build, id as FuncId)).collect()
}

fn lift<'d>(build: &Build<'d>, id: FuncId) -> Lifted<'d> {
    let f = build.func(id);
    let code = build.code(id);
    let mut lifter = Lifter {
        build,
        start: f.addr,
        end: f.addr + f.size,
        relocs: build.relocs_in(f.addr, f.size),
        pending_tls: Vec::new(),
        pending_size: None,
        out: Lifted { masked: code.to_vec(), ..Lifted::default() },
    };
    let mut decoder = Decoder::with_ip(64, code, f.addr, DecoderOptions::NONE);
    let mut ins = Instruction::default();
    while decoder.can_decode() {
        decoder.decode_out(&mut ins);
        if ins.is_invalid() {
            lifter.fail(format!("bytes at {:#x} that are no instruction", ins.ip()));
            break;
        }
        let offsets = decoder.get_constant_offsets(&ins);
        lifter.instruction(&ins, &offsets);
    }
    if code.is_empty() && f.size > 0 {
        lifter.fail("its bytes are not in the file".into());
    }
    lifter.out.numbers.sort_unstable();
    lifter.out.numbers.dedup();
    lifter.out.branch_targets.sort_unstable();
    lifter.out.branch_targets.dedup();
    lifter.out
}

/// Which relocations of an instruction an operand explains. There is rarely more than one.
struct Explained(u64);

impl Explained {
    fn set(&mut self, index: Option<usize>) {
        self.0 |= index.and_then(|i| 1u64.checked_shl(i as u32)).unwrap_or(0);
    }

    fn has(&self, index: usize) -> bool {
        1u64.checked_shl(index as u32).is_some_and(|bit| self.0 & bit != 0)
    }
}

struct Lifter<'a, 'd> {
    build: &'a Build<'d>,
    start: u64,
    end: u64,
    /// The function's relocations that lie behind the instructions seen so far.
    relocs: &'a [Reloc],
    /// Places at which a relaxed general-dynamic access keeps its thread-pointer offset.
    pending_tls: Vec<(u64, u32)>,
    /// The place at which a relaxed local-dynamic access keeps the size of the segment.
    pending_size: Option<u64>,
    out: Lifted<'d>,
}

impl<'a, 'd> Lifter<'a, 'd> {
    /// The relocations of the next instruction, which ends at `end`.
    fn take_relocs(&mut self, end: u64) -> &'a [Reloc] {
        let (here, rest) = self.relocs.split_at(self.relocs.iter().take_while(|r| r.at < end).count());
        self.relocs = rest;
        here
    }

    fn fail(&mut self, why: String) {
        self.out.unexplained.get_or_insert(why);
    }

    fn push(&mut self, ins: &Instruction, at: usize, field: Field, access: Access, target: Target<'d>) {
        let (target, bias) = match (target, access) {
            (Target::Data(to), Access::Extent | Access::Indexed) => {
                let place = ins.ip() + at as u64;
                let base = self.build.relocs_in(place, 1).first().and_then(|r| self.build.base_of(to, r));
                let base = base.or_else(|| self.build.nameless_at(to)).unwrap_or(to);
                (Target::Data(base), to.wrapping_sub(base).cast_signed())
            }
            _ => (target, 0),
        };
        let offset = (ins.ip() - self.start) as usize;
        let width = match field {
            Field::Rel8 => 1,
            Field::Abs64 => 8,
            _ => 4,
        };
        if let Some(bytes) = self.out.masked.get_mut(offset + at..offset + at + width) {
            bytes.fill(0);
        }
        let (at, end) = ((offset + at) as u32, (offset + ins.len()) as u32);
        self.out.refs.push(Ref { at, end, field, access, target, bias });
    }

    fn instruction(&mut self, ins: &Instruction, offsets: &ConstantOffsets) {
        let relocs = self.take_relocs(ins.next_ip());
        let mut explained = Explained(0);
        let at_field = |place: usize| relocs.iter().position(|r| r.at == ins.ip() + place as u64);

        if let OpKind::NearBranch64 = ins.op0_kind() {
            let to = ins.near_branch_target();
            let place = offsets.immediate_offset();
            // Unoptimised code may branch to its own end, where nothing is, in place of a mark for "never reached".
            let nowhere = to == self.end && self.build.func_at(to).is_none() && !self.build.plt.contains_key(&to);
            if nowhere || (self.start..self.end).contains(&to) {
                self.out.branch_targets.push((to - self.start) as u32);
            } else if offsets.immediate_size() == 4 || offsets.immediate_size() == 1 {
                let field = if offsets.immediate_size() == 4 { Field::Rel32 } else { Field::Rel8 };
                let reloc = at_field(place).map(|i| &relocs[i]);
                let target = self.resolve(to, reloc);
                self.push(ins, place, field, Access::Branch, target);
            } else {
                self.fail("a 16-bit branch".into());
            }
            explained = Explained(u64::MAX);
        }
        if is_thread_pointer(ins) {
            // What linkers make of a call of __tls_get_addr: what belongs to it has no field of its own.
            relocs.iter().for_each(|r| self.leftover(ins, r));
            return;
        }
        if ins.is_ip_rel_memory_operand() {
            let to = ins.ip_rel_memory_address();
            let place = offsets.displacement_offset();
            let index = at_field(place);
            explained.set(index);
            let target = self.rip_target(to, index.map(|i| &relocs[i]));
            let (field, access) = (Field::Rel32, access_of(ins));
            if let Target::Func(id, offset) = target {
                // `lea` into the function itself: a computed goto or a recursive address.
                if self.build.func(id).addr == self.start && offset != 0 {
                    self.out.branch_targets.push(offset as u32);
                }
            }
            self.push(ins, place, field, access, target);
        } else if offsets.has_displacement() && offsets.displacement_size() == 4 {
            self.constant(ins, offsets.displacement_offset(), 4, relocs, &mut explained, true);
        } else if offsets.has_displacement() && offsets.displacement_size() == 8 {
            self.constant(ins, offsets.displacement_offset(), 8, relocs, &mut explained, true);
        }
        if ins.mnemonic() == Mnemonic::Lea && !ins.is_ip_rel_memory_operand() {
            // from the end of an array back to its start
            let distance = ins.memory_displacement64().cast_signed().unsigned_abs();
            self.out.numbers.extend(u32::try_from(distance).ok().filter(|n| *n < 1 << 16));
        }
        if offsets.has_immediate() && ins.op0_kind() != OpKind::NearBranch64 {
            // The last operand need not be the immediate: `enter` has two, some vector instructions hide a register in it.
            let last = ins.op_count().checked_sub(1).and_then(|i| ins.try_immediate(i).ok());
            self.out.numbers.extend(last.and_then(|n| u32::try_from(n).ok()).filter(|n| *n < 1 << 16));
            let (place, width) = (offsets.immediate_offset(), offsets.immediate_size());
            self.constant(ins, place, width, relocs, &mut explained, false);
        }
        for (_, reloc) in relocs.iter().enumerate().filter(|(i, _)| !explained.has(*i)) {
            self.leftover(ins, reloc);
        }
    }

    /// A displacement or an immediate: if a relocation stands there, it is an address or a thread-pointer offset.
    fn constant(
        &mut self,
        ins: &Instruction,
        place: usize,
        width: usize,
        relocs: &[Reloc],
        explained: &mut Explained,
        displacement: bool,
    ) {
        let at = ins.ip() + place as u64;
        let value = match width {
            4 => read(&self.out.masked, ins.ip() - self.start, place, 4).map(|v| i64::from(v as u32 as i32)),
            8 => read(&self.out.masked, ins.ip() - self.start, place, 8).map(u64::cast_signed),
            _ => None,
        };
        let pending = self.pending_tls.iter().position(|(p, _)| *p == at).map(|i| self.pending_tls.swap_remove(i).1);
        let index = relocs.iter().position(|r| r.at == at);
        explained.set(index);
        let Some(value) = value else {
            if index.is_some() {
                self.fail(format!("a relocation on a {width}-byte field at {at:#x}"));
            }
            return;
        };
        if let Some(sym) = pending {
            return self.thread_local(ins, place, sym, value);
        }
        if self.pending_size == Some(at) {
            // The relocations of the call that stood here have no meaning any more.
            *explained = Explained(u64::MAX);
            return self.segment_size(ins, place, value);
        }
        let Some(reloc) = index.map(|i| &relocs[i]) else { return };
        let symbol = self.build.rel_sym(reloc);
        match symbol.target {
            // A number that the linker put in, the same wherever the code lies.
            SymTarget::Absolute if number(symbol.value, reloc) == value.cast_unsigned() => return,
            // A weak thread-local that nobody defines: whoever would use it asks first whether it is there.
            SymTarget::Undefined if matches!(reloc.kind, R_TPOFF32 | R_GOTTPOFF) && width == 4 => {
                return self.push(ins, place, Field::TpOff32, Access::Extent, Target::Empty(symbol.name));
            }
            _ => {}
        }
        // An immediate is the address itself, whatever the size of the place that it is stored in.
        let access =
            if displacement && ins.memory_index() != Register::None { Access::Indexed } else { Access::Extent };
        match (reloc.kind, width) {
            (R_TPOFF32 | R_GOTTPOFF | R_DTPOFF32 | R_GOTPC32_TLSDESC, 4) => {
                self.thread_local(ins, place, reloc.sym, value)
            }
            (R_32 | R_32S | R_GOTPCREL | R_GOTPCRELX | R_REX_GOTPCRELX, 4) => {
                let target = self.resolve(value.cast_unsigned(), Some(reloc));
                self.push(ins, place, Field::Abs32, access, target);
            }
            (R_64, 8) => {
                let target = self.resolve(value.cast_unsigned(), Some(reloc));
                self.push(ins, place, Field::Abs64, Access::Extent, target);
            }
            (kind, _) => self.fail(format!("relocation type {kind} at {at:#x}")),
        }
    }

    /// A relocation that no operand explains.
    fn leftover(&mut self, ins: &Instruction, reloc: &Reloc) {
        let thread_pointer = is_thread_pointer(ins);
        match reloc.kind {
            R_TLSLD if thread_pointer && ins.memory_base() == Register::RAX => self.pending_size = Some(reloc.at + 5),
            R_TLSGD if thread_pointer => self.pending_tls.push((reloc.at + 8, reloc.sym)),
            R_TLSLD | R_PLT32 | R_PC32 | R_GOTPCREL | R_GOTPCRELX if thread_pointer => {}
            R_TLSDESC_CALL if matches!(ins.mnemonic(), Mnemonic::Nop | Mnemonic::Xchg) || is_descriptor_call(ins) => {}
            0 => {}
            kind => self.fail(format!("relocation type {kind} at {:#x}, inside `{ins}`", reloc.at)),
        }
    }

    /// `sub rax, SIZE`, in what mold makes of a local-dynamic access: `xor eax, eax; mov rax, fs:[rax]; sub rax, SIZE`.
    fn segment_size(&mut self, ins: &Instruction, place: usize, value: i64) {
        let size = self.build.tls_segment.map(|s| s.aligned_len.cast_signed());
        if ins.mnemonic() != Mnemonic::Sub || ins.op0_register() != Register::RAX || size != Some(value) {
            return self.fail(format!("a thread-local access at {:#x} that is not understood", ins.ip()));
        }
        let segment = Target::TlsSlots(TlsModel::Module, TlsFound::Segment);
        self.push(ins, place, Field::TlsSize32, Access::Extent, segment);
    }

    fn thread_local(&mut self, ins: &Instruction, place: usize, sym: u32, value: i64) {
        let Some(segment) = self.build.tls_segment else {
            return self.fail("a thread-local access without segment".into());
        };
        let symbol = self.build.rel_syms.get(sym as usize);
        // Below the thread pointer in an executable; in a library, counted from the segment's start.
        let field = if value < 0 { Field::TpOff32 } else { Field::DtpOff32 };
        let below = if value < 0 { segment.aligned_len.cast_signed() } else { 0 };
        let in_segment = value.wrapping_add(below);
        let target = match symbol.map(|s| s.target) {
            Some(SymTarget::Tls(id)) => {
                Target::Tls(id, in_segment.wrapping_sub(self.build.tls[id as usize].addr.cast_signed()))
            }
            // Named through its section: find the variable by its place.
            _ => match self.build.tls_at(in_segment.cast_unsigned()) {
                Some((id, offset)) => Target::Tls(id, offset),
                None => return self.fail(format!("a thread-local access at {:#x} to no variable", ins.ip())),
            },
        };
        if let Target::Tls(id, offset) = target {
            let size = self.build.tls[id as usize].size.cast_signed();
            if offset < -4096 || offset > size.max(0) + 4096 {
                return self.fail(format!("a thread-local access at {:#x} that contradicts its relocation", ins.ip()));
            }
        }
        self.push(ins, place, field, Access::Extent, target);
    }

    fn rip_target(&mut self, to: u64, reloc: Option<&Reloc>) -> Target<'d> {
        if let Some(r) = reloc {
            let model = match r.kind {
                R_TLSGD => Some(TlsModel::Pair),
                R_TLSLD => Some(TlsModel::Module),
                R_GOTPC32_TLSDESC if self.build.rel_sym(r).name == "_TLS_MODULE_BASE_" => {
                    Some(TlsModel::ModuleDescriptor)
                }
                R_GOTPC32_TLSDESC => Some(TlsModel::Descriptor),
                _ => None,
            };
            match model.map(|model| (model, self.build.tls_slots(model, to))) {
                Some((model, Some(found))) => return Target::TlsSlots(model, found),
                // relaxed to a slot that holds the offset from the thread pointer
                Some((_, None)) if !self.build.dynamic.contains_key(&to) => {
                    self.fail("a thread-local access that is not understood".into());
                }
                _ => {}
            }
            if !matches!(
                r.kind,
                R_PC32
                    | R_PLT32
                    | R_GOTPCREL
                    | R_GOTPCRELX
                    | R_REX_GOTPCRELX
                    | R_GOTTPOFF
                    | R_TLSGD
                    | R_TLSLD
                    | R_GOTPC32_TLSDESC
                    | R_PC64
            ) {
                self.fail(format!("relocation type {} at {:#x}", r.kind, r.at));
            }
            if let Some(number) = self.number_in(to, r) {
                return number;
            }
        }
        self.resolve(to, reloc)
    }

    /// The number in a slot that belongs to a symbol which is one.
    fn number_in(&self, slot: u64, reloc: &Reloc) -> Option<Target<'d>> {
        let symbol = self.build.rel_sym(reloc);
        let by_slot = matches!(reloc.kind, R_GOTPCREL | R_GOTPCRELX | R_REX_GOTPCRELX);
        let held = self.build.bytes(slot, 8)?.first_chunk().map(|b| u64::from_le_bytes(*b))?;
        let plain = symbol.target == SymTarget::Absolute && !self.build.dynamic.contains_key(&slot);
        (by_slot && plain && held == symbol.value).then_some(Target::Number(held))
    }

    fn resolve(&self, to: u64, reloc: Option<&Reloc>) -> Target<'d> {
        resolve(self.build, to, reloc)
    }
}

/// What a relocation of a number puts in. One that was relaxed from a slot has an addend that meant the instruction's end.
fn number(value: u64, reloc: &Reloc) -> u64 {
    let relaxed = matches!(reloc.kind, R_GOTPCREL | R_GOTPCRELX | R_REX_GOTPCRELX);
    if relaxed {
        value
    } else {
        value.wrapping_add_signed(reloc.addend)
    }
}

/// `mov rax, fs:0`, or `mov rax, fs:[rax]`, which is the same where mold wrote it, behind `xor eax, eax`.
fn is_thread_pointer(ins: &Instruction) -> bool {
    ins.mnemonic() == Mnemonic::Mov
        && ins.memory_segment() == Register::FS
        && ins.memory_displacement64() == 0
        && matches!(ins.memory_base(), Register::None | Register::RAX)
        && ins.op0_register() == Register::RAX
}

/// `call [rax]`, what belongs to a thread-local's descriptor.
fn is_descriptor_call(ins: &Instruction) -> bool {
    ins.flow_control() == FlowControl::IndirectCall
        && ins.op0_kind() == OpKind::Memory
        && ins.memory_base() == Register::RAX
        && ins.memory_index() == Register::None
        && ins.memory_displacement64() == 0
}

fn read(code: &[u8], offset: u64, place: usize, width: usize) -> Option<u64> {
    let from = usize::try_from(offset).ok()? + place;
    let bytes = code.get(from..from + width)?;
    Some(bytes.iter().rev().fold(0, |v, b| v << 8 | u64::from(*b)))
}

fn access_of(ins: &Instruction) -> Access {
    if ins.mnemonic() == Mnemonic::Lea || ins.flow_control() == FlowControl::Next && ins.memory_size().size() == 0 {
        return Access::Extent;
    }
    match ins.memory_size().size() {
        0 => Access::Extent,
        size => Access::Exact(size as u32),
    }
}

/// What the address `to` means, with the relocation that produced it, if any.
#[must_use]
pub fn resolve<'d>(build: &Build<'d>, to: u64, reloc: Option<&Reloc>) -> Target<'d> {
    // A symbol with a name decides even when the address lies outside of it (`table - 8`).
    if let Some(r) = reloc.filter(|r| matches!(r.kind, R_64 | R_PC32 | R_PLT32 | R_32 | R_32S | R_PC64)) {
        let sym = build.rel_sym(r);
        let offset = to.wrapping_sub(sym.value).cast_signed();
        match sym.target {
            SymTarget::Object(id) if offset.unsigned_abs() <= build.object(id).size + 4096 => {
                return Target::Object(id, offset);
            }
            SymTarget::Func(id) if offset == 0 => return Target::Func(id, 0),
            SymTarget::Empty => return Target::Empty(sym.name),
            _ => {}
        }
    }
    let Some(section) = build.section_at(to) else {
        return match build.object_at(to) {
            Some(id) => Target::Object(id, to.wrapping_sub(build.object(id).addr).cast_signed()),
            None => Target::Unknown(to),
        };
    };
    if section.exec {
        if let Some(import) = build.plt.get(&to) {
            return Target::Plt(import);
        }
        return match build.func_at(to) {
            Some(id) => Target::Func(id, (to - build.func(id).addr).cast_signed()),
            None => Target::Unknown(to),
        };
    }
    if section.name.starts_with(".got") {
        return Target::Slot(to);
    }
    match build.object_at(to) {
        Some(id) => Target::Object(id, (to - build.object(id).addr).cast_signed()),
        None => match end_before_padding(build, section, to) {
            Some(id) => Target::Object(id, build.object(id).size.cast_signed()),
            None => Target::Data(to),
        },
    }
}

/// The variable whose end is at `to`, where nothing can begin: only what holds pointers is put into `.data.rel.ro`, so zeros
/// without a relocation up to the next symbol are padding.
fn end_before_padding(build: &Build<'_>, section: &Section<'_>, to: u64) -> Option<ObjId> {
    if !section.name.starts_with(".data.rel.ro") {
        return None;
    }
    let id = build.object_at(to.checked_sub(1)?)?;
    let object = build.object(id);
    let len = build.next_bound(to).min(section.addr + section.size).checked_sub(to).filter(|len| *len > 0)?;
    let ends = object.size > 0 && object.addr + object.size == to;
    let zeros = ends && build.bytes(to, len).is_some_and(|b| b.iter().all(|b| *b == 0));
    (zeros && build.relocs_in(to, len).is_empty() && !build.has_dynamic_in(to, len)).then_some(id)
}
