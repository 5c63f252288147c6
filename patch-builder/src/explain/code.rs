//! A function's instructions as people and alignment read them: with names in place of addresses.

use std::cell::RefCell;
use std::rc::Rc;

use iced_x86::{
    ConstantOffsets, Decoder, DecoderOptions, FlowControl, Formatter as _, Instruction, IntelFormatter, Mnemonic,
    OpKind, Register, SymbolResolver, SymbolResult,
};

use crate::build::FuncId;
use crate::compare::describe;
use crate::lift::{Access, Ref, Target};
use crate::side::Side;

/// A text is shown up to this many characters.
const MAX_TEXT: usize = 64;

/// One instruction.
#[derive(Clone, Debug)]
pub(super) struct Ins {
    /// Its offset in the function.
    pub at: u32,
    /// As shown; a branch within the function shows no target.
    pub text: String,
    /// The same without what depends on the allocation of registers and stack slots.
    pub shape: String,
    /// The offset that it branches to, if that is in the function.
    pub local: Option<u32>,
    /// Whether it only moves things about.
    pub plumbing: bool,
    /// The function's references that it holds: a range of indices.
    pub refs: std::ops::Range<usize>,
}

impl Ins {
    /// What it reads or writes, as shown.
    pub(super) fn operand(&self) -> Option<String> {
        let (from, to) = (self.text.find('[')? + 1, self.text.rfind(']')?);
        self.text.get(from..to).map(str::to_owned)
    }
}

/// The instructions of a function.
pub(super) fn instructions(side: &Side<'_>, id: FuncId) -> Vec<Ins> {
    let (func, code, lifted) = (side.build.func(id), side.build.code(id), &side.lifted[id as usize]);
    let current = Rc::new(RefCell::new(Names::default()));
    let mut formatter = IntelFormatter::with_options(Some(Box::new(Resolver(Rc::clone(&current)))), None);
    let options = formatter.options_mut();
    options.set_space_after_operand_separator(true);
    options.set_rip_relative_addresses(false);
    options.set_show_branch_size(false);
    options.set_hex_prefix("0x");
    options.set_hex_suffix("");
    options.set_uppercase_hex(false);
    options.set_small_hex_numbers_in_decimal(true);
    let mut decoder = Decoder::with_ip(64, code, func.addr, DecoderOptions::NONE);
    let mut out = Vec::new();
    let mut next_ref = 0;
    let mut ins = Instruction::default();
    while decoder.can_decode() {
        decoder.decode_out(&mut ins);
        let at = (ins.ip() - func.addr) as u32;
        let end = at + ins.len() as u32;
        while lifted.refs.get(next_ref).is_some_and(|r| r.at < at) {
            next_ref += 1;
        }
        let from = next_ref;
        while lifted.refs.get(next_ref).is_some_and(|r| r.at < end) {
            next_ref += 1;
        }
        let refs = &lifted.refs[from..next_ref];
        let offsets = decoder.get_constant_offsets(&ins);
        let is_near = ins.op0_kind() == OpKind::NearBranch64;
        let local = is_near.then(|| ins.near_branch_target().wrapping_sub(func.addr)).filter(|to| *to < func.size);
        let names = Names::of(side, &ins, at, &offsets, refs, local.is_some());
        let shape = shape(&ins, &names);
        let mut text = String::new();
        current.replace(names);
        formatter.format(&ins, &mut text);
        let plumbing = is_plumbing(&ins);
        out.push(Ins { at, text, shape, local: local.map(|to| to as u32), plumbing, refs: from..next_ref });
    }
    out
}

/// The names of an instruction's operands.
#[derive(Default)]
struct Names {
    displacement: Option<String>,
    immediate: Option<String>,
}

impl Names {
    fn of(
        side: &Side<'_>,
        ins: &Instruction,
        at: u32,
        offsets: &ConstantOffsets,
        refs: &[Ref<'_>],
        local: bool,
    ) -> Self {
        let named = |place: usize| {
            let r = refs.get(refs.binary_search_by_key(&(at + place as u32), |r| r.at).ok()?)?;
            Some(operand(side, ins, r))
        };
        let displacement = offsets.has_displacement().then(|| named(offsets.displacement_offset())).flatten();
        let immediate = offsets.has_immediate().then(|| named(offsets.immediate_offset())).flatten();
        Self { displacement, immediate: if local { Some("local".into()) } else { immediate } }
    }
}

/// The formatter asks for a name for each address; here the names of the instruction at hand lie ready.
struct Resolver(Rc<RefCell<Names>>);

impl SymbolResolver for Resolver {
    fn symbol(
        &mut self,
        ins: &Instruction,
        _operand: u32,
        instruction_operand: Option<u32>,
        address: u64,
        _size: u32,
    ) -> Option<SymbolResult<'_>> {
        let is_memory = instruction_operand.is_some_and(|op| ins.op_kind(op) == OpKind::Memory);
        let names = self.0.borrow();
        let name = if is_memory { &names.displacement } else { &names.immediate };
        name.as_ref().map(|name| SymbolResult::with_string(address, name.clone()))
    }
}

/// What an operand refers to: a number from a constant pool by its value, anything else by its name.
fn operand(side: &Side<'_>, ins: &Instruction, r: &Ref<'_>) -> String {
    let Target::Data(at) = r.target else { return describe(side, r.target) };
    if side.is_table_entry(at) {
        return "switch table".into();
    }
    if let (Access::Exact(len @ (4 | 8)), false) = (r.access, side.is_mutable(at)) {
        let bytes = side.build.bytes(at, u64::from(len));
        if let Some(text) = bytes.and_then(|b| float(ins, b)) {
            return text;
        }
    }
    if let (Access::Exact(len @ 1..=16), false) = (r.access, side.is_mutable(at)) {
        if let Some(bytes) = side.build.bytes(at, u64::from(len)) {
            return format!("0x{}", bytes.iter().rev().map(|b| format!("{b:02x}")).collect::<String>());
        }
    }
    match super::values::value(side, r.target, r.access).filter(|v| v.starts_with('"')) {
        Some(text) if text.chars().count() > MAX_TEXT => {
            format!("{}…\"", text.chars().take(MAX_TEXT).collect::<String>())
        }
        Some(text) => text,
        None => describe(side, r.target),
    }
}

/// A constant of scalar floating-point arithmetic.
fn float(ins: &Instruction, bytes: &[u8]) -> Option<String> {
    let name = format!("{:?}", ins.mnemonic()).to_lowercase();
    if name.ends_with("sd") {
        return Some(format!("{:?}", f64::from_le_bytes(bytes.try_into().ok()?)));
    }
    name.ends_with("ss").then(|| bytes.try_into().ok().map(|b| format!("{:?}", f32::from_le_bytes(b)))).flatten()
}

fn is_plumbing(ins: &Instruction) -> bool {
    use Mnemonic as M;
    matches!(ins.flow_control(), FlowControl::UnconditionalBranch | FlowControl::Return)
        || matches!(
            ins.mnemonic(),
            M::Pop
                | M::Nop
                | M::Endbr64
                | M::Xchg
                | M::Cdqe
                | M::Movsxd
                | M::Movaps
                | M::Movups
                | M::Movdqa
                | M::Movdqu
        )
        || matches!(ins.mnemonic(), M::Mov | M::Push) && !has_immediate(ins)
        || matches!(ins.mnemonic(), M::Sub | M::Add | M::Lea)
            && ins.op0_kind() == OpKind::Register
            && ins.op0_register() == Register::RSP
        || ins.mnemonic() == M::Xor && ins.op0_kind() == OpKind::Register && ins.op0_register() == ins.op1_register()
}

fn has_immediate(ins: &Instruction) -> bool {
    (0..ins.op_count()).any(|i| ins.try_immediate(i).is_ok())
}

/// Mnemonic, numbers and names, without registers and stack offsets.
fn shape(ins: &Instruction, names: &Names) -> String {
    let mut out = format!("{:?}", ins.mnemonic());
    for i in 0..ins.op_count() {
        out.push(' ');
        match ins.op_kind(i) {
            OpKind::Register => out.push('r'),
            OpKind::Memory => match (&names.displacement, ins.memory_base()) {
                (Some(name), _) => out += &format!("[{name}]"),
                (None, Register::RSP | Register::RBP) => out += "[stack]",
                (None, _) => out += &format!("[{:#x}]", ins.memory_displacement64()),
            },
            OpKind::NearBranch16 | OpKind::NearBranch32 | OpKind::NearBranch64 => {
                out += names.immediate.as_deref().unwrap_or("?");
            }
            // A string instruction's operands are no immediates.
            _ => match (&names.immediate, ins.try_immediate(i)) {
                (Some(name), _) => out += name,
                (None, Ok(value)) => out += &format!("{value:#x}"),
                (None, Err(_)) => out.push('m'),
            },
        }
    }
    out
}
