//! What the user should know before applying.

use super::stays::Stays;
use super::why::MAX_EXPLAINED;
use super::Both;
use crate::build::{demangle, FuncId};
use crate::emit::Emitted;
use crate::report::{FunctionInfo, NeverLeft, Why};

const WAY_OUT: &str =
    "or apply with --consistency entry: calls that begin after it run the new code, the one that is running stays old";

/// Functions of the patch that a thread may never leave.
pub(super) fn may_never_leave(
    both: &Both<'_, '_>,
    functions: &[(Option<FuncId>, FuncId, FunctionInfo)],
) -> Vec<NeverLeft> {
    if functions.is_empty() {
        return Vec::new();
    }
    let stays = Stays::new(both.old);
    let mut out = Vec::new();
    let real: Vec<FuncId> = functions.iter().filter(|(_, _, i)| is_real(i)).filter_map(|(f, ..)| *f).collect();
    for (f, _, info) in functions.iter().take(MAX_EXPLAINED) {
        let Some(verdict) = f.and_then(|f| stays.verdict(f)) else { continue };
        let name = |id: FuncId| demangle(both.old.build.func(id).name());
        let calls = f.map_or_else(Vec::new, |f| stays.calls(f));
        let own = info.why.iter().any(|w| matches!(w, Why::Source { .. }));
        let changed: Vec<String> = calls.iter().filter(|c| real.contains(c)).map(|c| name(*c)).collect();
        let inlined: Vec<String> = info
            .why
            .iter()
            .filter_map(|w| match w {
                Why::Inlined { callee, .. } => Some(callee.clone()),
                _ => None,
            })
            .collect();
        let called: Vec<String> = verdict.loop_calls.iter().take(4).map(|c| name(*c)).collect();
        let (instead, what) = if !own && !inlined.is_empty() {
            let list = inlined.join(", ");
            let what =
                format!("the change is in {list}, inlined here: keep it out of line (noinline) and patch it there");
            (inlined, what)
        } else if !own && !changed.is_empty() {
            let what = format!("patch {} alone, which it calls and where the change is", changed.join(", "));
            (changed, what)
        } else if !called.is_empty() {
            let what = format!("move the change into what it calls ({})", called.join(", "));
            (called, what)
        } else {
            (Vec::new(), "move the change into a function that its loop calls".to_owned())
        };
        out.push(NeverLeft {
            function: info.demangled.clone(),
            kind: verdict.kind,
            reason: verdict.reason,
            instead,
            remedy: format!("{what}; {WAY_OUT}"),
        });
    }
    out
}

/// Whether more than the compiler's choice changed it.
fn is_real(info: &FunctionInfo) -> bool {
    info.why.iter().any(|w| !matches!(w, Why::CodeGeneration { .. } | Why::Clone { .. } | Why::Unknown { .. }))
}

/// All warnings, the gravest first.
pub(super) fn warnings(both: &Both<'_, '_>, never: &[NeverLeft], emitted: Option<&Emitted>) -> Vec<String> {
    let mut out: Vec<String> = never
        .iter()
        .map(|n| format!("{} may never be off the stack: {}. {}", n.function, n.reason, capital(&n.remedy)))
        .collect();
    if emitted.is_some_and(|e| e.manifest.functions.iter().all(|f| f.old.as_ref().is_none_or(|o| o.entry.is_none()))) {
        out.push("no entry gets a jump: nothing outside the patch calls what changed".into());
    }
    for (lines, side) in [(&both.found.lines.0, both.old), (&both.found.lines.1, both.new)] {
        if !lines.present {
            out.push(format!(
                "{} has no debug information: lines that moved count as changes (build with -g)",
                side.build.path
            ));
        }
    }
    out
}

fn capital(text: &str) -> String {
    let mut chars = text.chars();
    chars.next().map_or_else(String::new, |c| c.to_uppercase().chain(chars).collect())
}
