//! Padding between the instructions of a function: assemblers choose its length by where the function happens to lie.
//! Two functions that differ in nothing else are the same, and it is reported.

use iced_x86::{Decoder, DecoderOptions, Instruction, Mnemonic, OpKind};

use super::{Comparer, LineProof, Noise};
use crate::build::FuncId;
use crate::lift::{Lifted, Ref};
use crate::side::Side;

/// One instruction that does something.
struct Step<'l, 'd> {
    ins: Instruction,
    /// Its bytes without what its references say.
    masked: &'l [u8],
    refs: &'l [Ref<'d>],
    /// Where it branches to within the function, as a number of steps.
    branch: Option<usize>,
}

impl<'d> Comparer<'_, 'd> {
    /// Whether two functions do the same step by step, and differ in the padding between the steps.
    pub(super) fn padding_drift(&mut self, f: FuncId, g: FuncId) -> bool {
        if !matches!(self.proof, LineProof::Tables(..)) {
            return false;
        }
        let has_table = |side: &Side<'d>, id| {
            side.build.unwind.fde_at(side.build.func(id).addr).is_some_and(|fde| fde.lsda.is_some())
        };
        let (old, new) = (self.old, self.new);
        let (x, y) = (&old.lifted[f as usize], &new.lifted[g as usize]);
        if x.unexplained.is_some() || y.unexplained.is_some() || has_table(old, f) || has_table(new, g) {
            return false;
        }
        let (Some(a), Some(b)) = (steps(old.build.code(f), x), steps(new.build.code(g), y)) else { return false };
        if a.len() != b.len() || !a.iter().zip(&b).all(|(p, q)| same_step(p, q)) {
            return false;
        }
        let equal = a.iter().zip(&b).all(|(p, q)| p.refs.iter().zip(q.refs).all(|(r, s)| self.refs(r, s)));
        if equal {
            let detail = format!("{} bytes with padding are now {}", x.masked.len(), y.masked.len());
            self.noise.push(Noise { rule: "padding", detail });
        }
        equal
    }

    /// Whether offset `x` of one function is the same place as offset `y` of another whose body is the same.
    pub(super) fn same_offset(&self, (f, x): (FuncId, i64), (g, y): (FuncId, i64)) -> bool {
        let (a, b) = (&self.old.lifted[f as usize], &self.new.lifted[g as usize]);
        if x == 0 || y == 0 || a.masked == b.masked {
            return x == y;
        }
        // Padding is where the step behind it is; the middle of an instruction is nowhere.
        let step = |side: &Side<'d>, id, lifted, at: i64| {
            let (all, at) = (steps(side.build.code(id), lifted)?, u64::try_from(at).ok()?);
            let next = all.partition_point(|s| s.ins.ip() < at);
            let before = next.checked_sub(1).map_or(0, |i| all[i].ins.next_ip());
            (next < all.len() && before <= at).then_some(next)
        };
        let (p, q) = (step(self.old, f, a, x), step(self.new, g, b, y));
        p.is_some() && p == q
    }
}

/// The instructions of a function but for its padding; `None` if one can't be read.
fn steps<'l, 'd>(code: &[u8], lifted: &'l Lifted<'d>) -> Option<Vec<Step<'l, 'd>>> {
    let mut out: Vec<Step<'l, 'd>> = Vec::new();
    let mut refs = &lifted.refs[..];
    for ins in Decoder::with_ip(64, code, 0, DecoderOptions::NONE) {
        if ins.is_invalid() {
            return None;
        }
        let here = refs.iter().take_while(|r| u64::from(r.at) < ins.next_ip()).count();
        let (own, rest) = refs.split_at(here);
        refs = rest;
        let masked = lifted.masked.get(ins.ip() as usize..ins.next_ip() as usize)?;
        if ins.mnemonic() != Mnemonic::Nop {
            out.push(Step { ins, masked, refs: own, branch: None });
        } else if !own.is_empty() {
            return None;
        }
    }
    // A branch to padding goes to what is behind it.
    let starts: Vec<u64> = out.iter().map(|s| s.ins.ip()).collect();
    for step in &mut out {
        let near = step.ins.op_count() > 0 && step.ins.op0_kind() == OpKind::NearBranch64;
        let to = step.ins.near_branch_target();
        if near && step.refs.is_empty() && to < code.len() as u64 {
            step.branch = Some(starts.partition_point(|s| *s < to));
        }
    }
    Some(out)
}

fn same_step(p: &Step<'_, '_>, q: &Step<'_, '_>) -> bool {
    if p.branch.is_some() || q.branch.is_some() {
        // Over other padding it may be a longer branch.
        return p.ins.mnemonic() == q.ins.mnemonic() && p.branch == q.branch;
    }
    let shape = |s: &Step<'_, '_>, r: &Ref<'_>| {
        (u64::from(r.at) - s.ins.ip(), u64::from(r.end) - s.ins.ip(), r.field, r.access, r.bias)
    };
    p.masked == q.masked
        && p.refs.len() == q.refs.len()
        && p.refs.iter().zip(q.refs).all(|(r, s)| shape(p, r) == shape(q, s))
}
