//! The flow of control in one function: its calls, its loops, and whether a loop leads out again.

use std::collections::{BTreeMap, BTreeSet};

use iced_x86::{Code, Decoder, DecoderOptions, FlowControl, Instruction, Mnemonic, OpKind, Register};

use crate::build::{DynKind, FuncId};
use crate::compare::{place, slot, Place};
use crate::lift::{Access, Ref, Target};
use crate::side::Side;

/// What a call leads to.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Callee {
    /// A function of the build.
    Func(FuncId),
    /// An import, by name.
    Import(String),
    /// A system call, by number if it is plain to see.
    System(Option<u32>),
    /// Not known: through a pointer.
    Pointer,
}

/// One call.
#[derive(Clone, Debug)]
pub(super) struct Call {
    /// What it calls.
    pub to: Callee,
    /// A jump out of the function in place of a call and a return.
    pub tail: bool,
    /// Functions whose address was put into an argument register before it: (argument from 0, function).
    pub arguments: Vec<(usize, FuncId)>,
    /// The first argument, if it is a number.
    pub number: Option<u32>,
}

/// A set of blocks that run again and again.
#[derive(Clone, Debug)]
pub(super) struct Loop {
    /// The calls in it: indices of [`Flow::calls`].
    pub calls: Vec<usize>,
    /// Whether the function can return after it.
    pub leads_out: bool,
}

/// One function.
#[derive(Clone, Debug, Default)]
pub(super) struct Flow {
    /// Its calls, in order.
    pub calls: Vec<Call>,
    /// Its loops, the outermost of those that nest.
    pub loops: Vec<Loop>,
    blocks: BTreeMap<u32, Block>,
}

/// Instructions that run one after the other; it goes on at any of `next`.
#[derive(Clone, Debug, Default)]
struct Block {
    calls: Vec<usize>,
    next: Vec<u32>,
    returns: bool,
}

/// The place that all jumps through the tables of a function share: what follows it is what the tables hold.
const SWITCH: u32 = u32::MAX;

impl Flow {
    /// Whether it can return without any of these calls.
    pub(super) fn can_return_without(&self, calls: &[usize]) -> bool {
        let (mut seen, mut open) = (BTreeSet::new(), vec![0u32]);
        while let Some(at) = open.pop() {
            let Some(block) = self.blocks.get(&at).filter(|b| !b.calls.iter().any(|c| calls.contains(c))) else {
                continue;
            };
            if block.returns {
                return true;
            }
            open.extend(block.next.iter().filter(|n| seen.insert(**n)));
        }
        false
    }
}

const ARGUMENTS: [Register; 6] =
    [Register::RDI, Register::RSI, Register::RDX, Register::RCX, Register::R8, Register::R9];

/// Functions that do not come back.
fn never_returns(to: &Callee, side: &Side<'_>) -> bool {
    match to {
        Callee::Import(name) => matches!(
            name.as_str(),
            "exit"
                | "_exit"
                | "_Exit"
                | "quick_exit"
                | "abort"
                | "__assert_fail"
                | "__stack_chk_fail"
                | "pthread_exit"
                | "thrd_exit"
                | "_Unwind_Resume"
                | "longjmp"
                | "__longjmp_chk"
                | "siglongjmp"
                | "__cxa_throw"
                | "__cxa_rethrow"
                | "_ZSt9terminatev"
                | "__fortify_fail"
                | "__chk_fail"
                | "err"
                | "errx"
        ),
        Callee::Func(id) => {
            let name = crate::build::canonical(side.build.func(*id).name());
            [
                "core::panicking::panic",
                "core::result::unwrap_failed",
                "core::option::expect_failed",
                "core::option::unwrap_failed",
                "std::process::exit",
                "std::process::abort",
                "alloc::alloc::handle_alloc_error",
                "alloc::raw_vec::handle_error",
            ]
            .iter()
            .any(|p| name.starts_with(p))
        }
        _ => false,
    }
}

/// Reads the flow of a function.
pub(super) fn flow(side: &Side<'_>, id: FuncId) -> Flow {
    let (func, code) = (side.build.func(id), side.build.code(id));
    let mut instructions = Vec::new();
    let mut decoder = Decoder::with_ip(64, code, 0, DecoderOptions::NONE);
    while decoder.can_decode() {
        instructions.push(decoder.decode());
    }
    let tables = switch_targets(side, id);
    let mut leaders: BTreeSet<u32> = BTreeSet::from([0]);
    leaders.extend(side.lifted[id as usize].branch_targets.iter().copied());
    leaders.extend(tables.iter().copied());
    let mut flow = Flow::default();
    let mut blocks: BTreeMap<u32, Block> = BTreeMap::new();
    let mut current = 0u32;
    let mut open = false;
    let mut known = Known::default();
    for ins in &instructions {
        let at = ins.ip() as u32;
        if leaders.contains(&at) || !open {
            if open {
                blocks.entry(current).or_default().next.push(at);
            }
            (current, open) = (at, true);
            known = Known::default();
        }
        let block = blocks.entry(current).or_default();
        let inside = |to: u64| to < func.size;
        match ins.flow_control() {
            FlowControl::ConditionalBranch => {
                match inside(ins.near_branch_target()) {
                    true => block.next.push(ins.near_branch_target() as u32),
                    false => block.returns = true, // through its cold part, perhaps
                }
                block.next.push(ins.next_ip() as u32);
                open = false;
            }
            FlowControl::UnconditionalBranch if inside(ins.near_branch_target()) => {
                block.next.push(ins.near_branch_target() as u32);
                open = false;
            }
            FlowControl::IndirectBranch if !tables.is_empty() && !ins.is_ip_rel_memory_operand() => {
                block.next.push(SWITCH);
                open = false;
            }
            FlowControl::UnconditionalBranch | FlowControl::IndirectBranch => {
                let to = callee(side, id, ins);
                // A jump to one's own cold part is no way out; that one is not followed.
                block.calls.push(flow.calls.len());
                block.returns = true;
                flow.calls.push(known.call(to, true));
                open = false;
            }
            FlowControl::Return => {
                block.returns = true;
                open = false;
            }
            FlowControl::Exception if ins.mnemonic() != Mnemonic::Int3 => open = false,
            FlowControl::Call | FlowControl::IndirectCall if ins.mnemonic() != Mnemonic::Syscall => {
                let to = callee(side, id, ins);
                block.calls.push(flow.calls.len());
                let stops = never_returns(&to, side);
                flow.calls.push(known.call(to, false));
                known = Known::default();
                if stops {
                    open = false;
                }
            }
            _ if ins.mnemonic() == Mnemonic::Syscall => {
                block.calls.push(flow.calls.len());
                let to = Callee::System(known.rax);
                flow.calls.push(known.call(to, false));
                known = Known::default();
            }
            _ => known.step(side, id, ins),
        }
    }
    if !tables.is_empty() {
        blocks.insert(SWITCH, Block { next: tables, ..Block::default() });
    }
    flow.loops = loops(&blocks);
    flow.blocks = blocks;
    flow
}

/// What the argument registers hold, as far as it is plain to see.
#[derive(Default)]
struct Known {
    functions: BTreeMap<usize, FuncId>,
    rdi: Option<u32>,
    rax: Option<u32>,
}

impl Known {
    fn call(&self, to: Callee, tail: bool) -> Call {
        Call { to, tail, arguments: self.functions.iter().map(|(a, f)| (*a, *f)).collect(), number: self.rdi }
    }

    fn step(&mut self, side: &Side<'_>, id: FuncId, ins: &Instruction) {
        if ins.op_count() == 0 || ins.op0_kind() != OpKind::Register {
            return;
        }
        let written = ins.op0_register().full_register();
        let number = (ins.mnemonic() == Mnemonic::Mov && ins.op_count() == 2)
            .then(|| {
                matches!(ins.op1_kind(), OpKind::Immediate32 | OpKind::Immediate32to64).then(|| ins.immediate(1) as u32)
            })
            .flatten();
        match written {
            Register::RAX => self.rax = number,
            Register::RDI => self.rdi = number,
            _ => {}
        }
        let Some(argument) = ARGUMENTS.iter().position(|r| *r == written) else { return };
        self.functions.remove(&argument);
        let target = reference(side, id, ins).map(|r| (r.target, r.access));
        let function = match target {
            Some((Target::Func(f, 0), Access::Extent | Access::Exact(_))) => Some(f),
            Some((Target::Slot(at), _)) => match slot(side, at) {
                Place::Pointer(Target::Func(f, 0)) => Some(f),
                _ => None,
            },
            _ => None,
        };
        if let (Some(f), Mnemonic::Lea | Mnemonic::Mov) = (function, ins.mnemonic()) {
            self.functions.insert(argument, f);
        }
    }
}

/// What an instruction of a function refers to. They are in the order of the code.
fn reference<'s>(side: &'s Side<'_>, id: FuncId, ins: &Instruction) -> Option<&'s Ref<'s>> {
    let refs = &side.lifted[id as usize].refs;
    refs.get(refs.partition_point(|r| u64::from(r.end) < ins.next_ip())).filter(|r| u64::from(r.end) == ins.next_ip())
}

fn callee(side: &Side<'_>, id: FuncId, ins: &Instruction) -> Callee {
    let Some(r) = reference(side, id, ins) else {
        return match ins.op0_kind() {
            OpKind::NearBranch64 => Callee::Func(id),
            _ => Callee::Pointer,
        };
    };
    match r.target {
        Target::Func(f, 0) => Callee::Func(f),
        Target::Plt(name) => Callee::Import(name.to_owned()),
        Target::Slot(at) => match slot(side, at) {
            Place::Import(name, _) => Callee::Import(name.to_owned()),
            Place::Pointer(Target::Func(f, 0)) => Callee::Func(f),
            _ => match side.build.dynamic.get(&at).map(|d| d.kind) {
                Some(DynKind::Import(name, _)) => Callee::Import(name.to_owned()),
                _ => Callee::Pointer,
            },
        },
        _ if ins.code() == Code::Call_rel32_64 => Callee::Pointer,
        _ => Callee::Pointer,
    }
}

/// The places in a function that its switch tables lead to.
fn switch_targets(side: &Side<'_>, id: FuncId) -> Vec<u32> {
    let mut out = BTreeSet::new();
    for r in &side.lifted[id as usize].refs {
        let Target::Data(table) = r.target else { continue };
        if side.is_mutable(table) {
            continue;
        }
        let relative = side.is_table_entry(table);
        let end = side.extent_end(table).min(table + 0x8000);
        let mut at = table;
        while at < end {
            match place(side, at, table) {
                Place::Relative(Target::Func(f, offset)) if f == id && relative => out.insert(offset as u32),
                Place::Pointer(Target::Func(f, offset)) if f == id && offset != 0 => out.insert(offset as u32),
                _ => break,
            };
            at += if relative { 4 } else { 8 };
        }
    }
    out.into_iter().collect()
}

/// The strongly connected parts of a flow that can run twice (Tarjan, without recursion).
fn loops(blocks: &BTreeMap<u32, Block>) -> Vec<Loop> {
    let ids: Vec<u32> = blocks.keys().copied().collect();
    let index_of = |at: u32| ids.binary_search(&at).ok();
    let next: Vec<Vec<usize>> =
        blocks.values().map(|b| b.next.iter().filter_map(|at| index_of(*at)).collect()).collect();
    let list: Vec<&Block> = blocks.values().collect();
    let mut leads_out: Vec<bool> = list.iter().map(|b| b.returns).collect();
    let mut before: Vec<Vec<usize>> = vec![Vec::new(); ids.len()];
    for (from, to) in next.iter().enumerate().flat_map(|(i, to)| to.iter().map(move |t| (i, *t))) {
        before[to].push(from);
    }
    let mut open: Vec<usize> = (0..ids.len()).filter(|i| leads_out[*i]).collect();
    while let Some(at) = open.pop() {
        open.extend(before[at].iter().filter(|from| !std::mem::replace(&mut leads_out[**from], true)));
    }
    let mut out = Vec::new();
    for part in components(&next) {
        let again = part.len() > 1 || next[part[0]].contains(&part[0]);
        if again {
            let mut calls: Vec<usize> = part.iter().flat_map(|i| list[*i].calls.iter().copied()).collect();
            calls.sort_unstable();
            out.push(Loop { calls, leads_out: part.iter().any(|i| leads_out[*i]) });
        }
    }
    out
}

fn components(next: &[Vec<usize>]) -> Vec<Vec<usize>> {
    const UNSEEN: usize = usize::MAX;
    let (mut number, mut low) = (vec![UNSEEN; next.len()], vec![0; next.len()]);
    let (mut on_stack, mut stack, mut out, mut count) = (vec![false; next.len()], Vec::new(), Vec::new(), 0);
    for root in 0..next.len() {
        if number[root] != UNSEEN {
            continue;
        }
        let mut work = vec![(root, 0)];
        while let Some((node, edge)) = work.pop() {
            if edge == 0 {
                (number[node], low[node]) = (count, count);
                count += 1;
                stack.push(node);
                on_stack[node] = true;
            }
            if let Some(&to) = next[node].get(edge) {
                work.push((node, edge + 1));
                if number[to] == UNSEEN {
                    work.push((to, 0));
                } else if on_stack[to] {
                    low[node] = low[node].min(number[to]);
                }
                continue;
            }
            if low[node] == number[node] {
                let from = stack.iter().rposition(|n| *n == node).unwrap_or(0);
                let part = stack.split_off(from);
                part.iter().for_each(|n| on_stack[*n] = false);
                out.push(part);
            }
            if let Some((parent, _)) = work.last() {
                low[*parent] = low[*parent].min(low[node]);
            }
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    fn block(next: &[u32], calls: &[usize], returns: bool) -> Block {
        Block { calls: calls.to_vec(), next: next.to_vec(), returns }
    }

    #[test]
    fn loops_are_found_and_whether_they_lead_out() {
        // 0 -> 1 -> 2 -> 1, 2 -> 3 returns; 4 -> 4 for ever
        let blocks = BTreeMap::from([
            (0, block(&[1, 4], &[0], false)),
            (1, block(&[2], &[1], false)),
            (2, block(&[1, 3], &[2], false)),
            (3, block(&[], &[3], true)),
            (4, block(&[4], &[4], false)),
        ]);
        let mut found: Vec<_> = loops(&blocks).into_iter().map(|l| (l.calls, l.leads_out)).collect();
        found.sort();
        assert_eq!(found, [(vec![1, 2], true), (vec![4], false)]);
    }

    #[test]
    fn nested_loops_are_one() {
        let next = vec![vec![1], vec![2], vec![2, 1, 3], vec![]];
        let mut parts = components(&next);
        parts.iter_mut().for_each(|p| p.sort_unstable());
        parts.sort();
        assert_eq!(parts, [vec![0], vec![1, 2], vec![3]]);
    }
}
