//! Which old entries get a jump, and whether one fits there.
//!
//! Every replaced function gets one that anything but the patch can reach.
//! One that is reached only by direct calls from replaced functions goes
//! without: its old copy may have another contract under the same name.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use super::Carried;
use crate::build::{demangle, DynKind, FuncId};
use crate::compare::{slot, Place};
use crate::diff::Diff;
use crate::lift::{Access, Target};
use crate::report::Refusal;
use crate::side::Side;

/// How the entry of a replaced function is treated.
#[derive(Clone, Debug, Default)]
pub struct EntryPlan {
    /// Where the jump goes; `None` if only the patch reaches the function.
    pub at: Option<u64>,
    /// Who reaches it, other than by direct calls from replaced functions.
    pub reached_by: Option<&'static str>,
    /// How many of its bytes lie in the padding behind the function.
    pub padding: u64,
    /// Where a jump could go and how much of it is padding, if only the patch reaches the function.
    pub beside: Option<(u64, u64)>,
    /// Whether the function branches back to its first instruction.
    pub branches_to_entry: bool,
    /// Its out-of-line parts.
    pub parts: Vec<FuncId>,
}

const JUMP_LEN: u64 = livepatch::patch::ENTRY_JUMP_LEN;
const ENDBR64: [u8; 4] = [0xf3, 0x0f, 0x1e, 0xfa];

/// References into the old image's functions, from code and data.
struct Reach {
    /// Functions whose address is taken, or that the dynamic symbol table exports.
    by_address: BTreeSet<FuncId>,
    /// Who branches to each function's start.
    callers: HashMap<FuncId, Vec<FuncId>>,
    /// Offsets behind the start that others refer to.
    inside: HashMap<FuncId, Vec<(i64, Option<FuncId>)>>,
}

fn reach(old: &Side<'_>) -> Reach {
    let build = &old.build;
    let mut out = Reach { by_address: BTreeSet::new(), callers: HashMap::new(), inside: HashMap::new() };
    for (h, lifted) in old.lifted.iter().enumerate() {
        let h = h as FuncId;
        for r in &lifted.refs {
            match (r.target, r.access) {
                (Target::Func(f, 0), Access::Branch) => out.callers.entry(f).or_default().push(h),
                (Target::Func(f, 0), _) => {
                    out.by_address.insert(f);
                }
                (Target::Func(f, offset), _) => out.inside.entry(f).or_default().push((offset, Some(h))),
                (Target::Slot(at), _) => {
                    if let Place::Pointer(Target::Func(f, _)) = slot(old, at) {
                        out.by_address.insert(f);
                    }
                }
                _ => {}
            }
        }
    }
    let mut pointed = |to: u64| {
        if let Some(f) = build.func_at(to).filter(|_| build.section_at(to).is_some_and(|s| s.exec)) {
            match to - build.func(f).addr {
                0 => {
                    out.by_address.insert(f);
                }
                offset => out.inside.entry(f).or_default().push((offset.cast_signed(), None)),
            }
        }
    };
    for r in build.dynamic.values() {
        match r.kind {
            DynKind::Relative(to) | DynKind::Own(to, _) | DynKind::Ifunc(to) => pointed(to),
            _ => {}
        }
    }
    for r in build.relocs.iter().filter(|r| r.kind == 1) {
        pointed(build.rel_sym(r).value.wrapping_add_signed(r.addend));
    }
    build.exported.iter().for_each(|at| pointed(*at));
    pointed(build.entry);
    out
}

/// Plans every entry.
pub fn plan(
    old: &Side<'_>,
    _new: &Side<'_>,
    diff: &Diff,
    functions: &BTreeMap<FuncId, Carried>,
    taken_by_patch: &BTreeSet<FuncId>,
    refusals: &mut Vec<Refusal>,
) -> BTreeMap<FuncId, EntryPlan> {
    let mut out = BTreeMap::new();
    if functions.is_empty() {
        return out;
    }
    let reach = reach(old);
    for f in functions.values().filter(|c| !c.part).flat_map(|c| c.olds.iter().copied()) {
        let func = old.build.func(f);
        let name = demangle(func.name());
        let mut refuse = |rule: &str, message: String, remedy: &str| {
            let symbol = name.clone();
            let (rule, remedy) = (rule.into(), remedy.into());
            refusals.push(Refusal { rule, symbol, message, remedy, ..Refusal::default() });
        };
        let lifted = &old.lifted[f as usize];
        if func.unsized_ || func.overlapped {
            refuse(
                "overlap",
                format!("{name} shares its code with another symbol, or has no size"),
                "give it a .size directive of its own",
            );
        }
        if let Some(why) = &lifted.unexplained {
            refuse("unknown-relocation", format!("the old {name} holds {why}"), "build it with a supported linker");
        }
        let parts = crate::diff::companions(old, f);
        let strangers = reach.inside.get(&f).into_iter().flatten();
        let second_ways: Vec<i64> = strangers
            .filter(|(_, from)| from.is_some_and(|h| h != f && !parts.contains(&h)))
            .map(|(o, _)| *o)
            .collect();
        if let Some(offset) = second_ways.first() {
            refuse(
                "overlap",
                format!("other code enters {name} at +{offset:#x}, not at its start"),
                "give that entry a function of its own",
            );
        }
        let called_by_others = reach.callers.get(&f).into_iter().flatten().any(|h| !diff.changed.contains_key(h));
        let reached_by = match () {
            () if called_by_others => Some("unchanged code calls it"),
            () if reach.by_address.contains(&f) => Some("its address is exported, stored or taken"),
            () if taken_by_patch.contains(&f) => Some("the patch takes its address"),
            () => None,
        };
        let mut plan = EntryPlan {
            reached_by,
            branches_to_entry: lifted.branch_targets.contains(&0),
            parts,
            ..EntryPlan::default()
        };
        if reached_by.is_some() {
            match window(old, f, &lifted.branch_targets) {
                Ok((at, padding)) => (plan.at, plan.padding) = (Some(at), padding),
                Err(why) => refuse(
                    "entry-window",
                    format!("there is no room for a jump at {name}: {why}"),
                    "patch its callers instead",
                ),
            }
        } else {
            plan.beside = window(old, f, &lifted.branch_targets).ok();
        }
        out.insert(f, plan);
    }
    out
}

/// Where five bytes can be overwritten, and how many of them are padding.
fn window(old: &Side<'_>, f: FuncId, branch_targets: &[u32]) -> Result<(u64, u64), String> {
    let func = old.build.func(f);
    let code = old.build.code(f);
    let skip = if code.starts_with(&ENDBR64) { 4 } else { 0 };
    let (at, end) = (func.addr + skip, func.addr + func.size);
    if let Some(t) = branch_targets.iter().find(|t| u64::from(**t) > skip && u64::from(**t) < skip + JUMP_LEN) {
        return Err(format!("it branches to its own byte +{t:#x}"));
    }
    let padding = (at + JUMP_LEN).saturating_sub(end);
    if padding > 0 {
        let next = old.build.funcs.get(f as usize + 1).map_or(u64::MAX, |n| n.addr);
        let section_end = old.build.section_at(func.addr).map_or(end, |s| s.addr + s.size);
        if at + JUMP_LEN > next.min(section_end) {
            return Err(format!("it is {} bytes long and the next function follows at once", func.size));
        }
        let bytes = old.build.bytes(end, padding).unwrap_or(&[]);
        // int3, the zeros that linkers fill with, or one of the assembler's nops
        let nops = bytes.iter().all(|b| matches!(b, 0xcc | 0x90 | 0x00)) || nops_cover(old, end, next.min(section_end));
        if bytes.len() as u64 != padding || !nops {
            return Err(format!("it is {} bytes long and no padding follows", func.size));
        }
    }
    Ok((at, padding))
}

/// Whether nothing but nops stands from `from` up to `to`.
fn nops_cover(old: &Side<'_>, from: u64, to: u64) -> bool {
    let Some(bytes) = old.build.bytes(from, (to - from).min(16)) else { return false };
    let mut decoder = iced_x86::Decoder::with_ip(64, bytes, from, iced_x86::DecoderOptions::NONE);
    let mut covered = 0;
    while decoder.can_decode() && covered < 5 {
        let ins = decoder.decode();
        if ins.mnemonic() != iced_x86::Mnemonic::Nop {
            return false;
        }
        covered += ins.len();
    }
    true
}
