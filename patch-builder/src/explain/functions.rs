//! The functions of the patch, each with its reason.

use std::fmt::Write as _;

use super::why::{Answer, Asker, MAX_EXPLAINED};
use super::Both;
use crate::build::{demangle, FuncId};
use crate::diff::companions;
use crate::report::{FunctionInfo, Why};
use crate::select::Carried;

/// Every function of the patch, with its ids: the old one that it replaces, and its own.
pub(super) fn functions(asker: &Asker<'_, '_>) -> Vec<(Option<FuncId>, FuncId, FunctionInfo)> {
    let both = asker.both;
    let mut out = Vec::new();
    for (i, c) in both.selection.functions.values().enumerate().filter(|(_, c)| !c.part) {
        let base = base(both, c);
        if c.olds.is_empty() {
            out.push((None, c.new, with_answer(base, asker.new_function(c.new), &c.reason)));
            continue;
        }
        for f in &c.olds {
            if i >= MAX_EXPLAINED {
                out.push((Some(*f), c.new, with_answer(replaced(both, *f, &base), Answer::default(), &c.reason)));
                continue;
            }
            let mut answer = asker.changed(*f, c.new);
            let vague = |w: &Why| matches!(w, Why::CodeGeneration { .. } | Why::Unknown { .. });
            let better = match both.found.changed.get(f).map(String::as_str) {
                Some("its cold part") => Some(Why::Companion),
                Some("its exception table") => Some(Why::ExceptionTable),
                _ => None,
            };
            if let (Some(better), true) = (better, answer.why.iter().all(vague)) {
                answer.why = vec![better];
            }
            out.push((Some(*f), c.new, with_answer(replaced(both, *f, &base), answer, &c.reason)));
        }
    }
    out
}

fn base(both: &Both<'_, '_>, c: &Carried) -> FunctionInfo {
    let build = &both.new.build;
    let func = build.func(c.new);
    FunctionInfo {
        name: func.name().to_owned(),
        demangled: demangle(func.name()),
        aliases: func.names.iter().skip(1).map(|n| demangle(n.text)).collect(),
        status: "new",
        reason: String::new(),
        why: Vec::new(),
        difference: None,
        hunk: None,
        hunk_note: None,
        old_addr: None,
        old_size: None,
        new_size: func.size,
        entry_jump: false,
        entry: "new: called by this patch only".into(),
        companions: companions(both.new, c.new).iter().map(|p| build.func(*p).name().to_owned()).collect(),
        source: both.found.lines.1.source(func.addr),
    }
}

fn replaced(both: &Both<'_, '_>, f: FuncId, base: &FunctionInfo) -> FunctionInfo {
    let build = &both.old.build;
    let of = build.func(f);
    let plan = both.selection.entries.get(&f);
    let mut companions = base.companions.clone();
    companions.extend(plan.into_iter().flat_map(|p| &p.parts).map(|p| build.func(*p).name().to_owned()));
    companions.sort();
    companions.dedup();
    let jumps = plan.is_some_and(|p| p.at.is_some());
    let entry = match plan.map(|p| (p.at, p.reached_by)) {
        Some((Some(_), Some(why))) => format!("entry jump: {why}"),
        Some((None, Some(why))) => format!("no room for an entry jump, though {why}"),
        _ => "no entry jump: only this patch calls it".into(),
    };
    FunctionInfo {
        name: of.name().to_owned(),
        demangled: demangle(of.name()),
        aliases: of.names.iter().skip(1).map(|n| demangle(n.text)).collect(),
        status: "changed",
        old_addr: Some(format!("{:#x}", of.addr)),
        old_size: Some(of.size),
        entry_jump: jumps,
        entry,
        companions,
        ..base.clone()
    }
}

fn with_answer(info: FunctionInfo, answer: Answer, plain: &str) -> FunctionInfo {
    let mut reason = String::new();
    for why in &answer.why {
        let _ = write!(reason, "{}{why}", if reason.is_empty() { "" } else { "; " });
    }
    if reason.is_empty() {
        plain.clone_into(&mut reason);
    }
    let Answer { why, difference, hunk, hunk_note } = answer;
    FunctionInfo { reason, why, difference, hunk, hunk_note, ..info }
}
