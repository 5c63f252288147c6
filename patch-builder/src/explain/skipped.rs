//! What nobody looked at, so that nobody takes silence for sameness.

use super::Both;
use crate::build::{demangle, FuncId};
use crate::lift::Target;
use crate::report::NotCompared;
use crate::side::Side;

const EXAMPLES: usize = 8;

/// Everything that was not compared, or only in part.
pub(super) fn not_compared(both: &Both<'_, '_>, types: &str) -> Vec<NotCompared> {
    let mut out = Vec::new();
    let mut add = |what: &'static str, text: &str, all: Vec<String>| {
        if !all.is_empty() {
            let examples = all.iter().take(EXAMPLES).cloned().collect();
            out.push(NotCompared { what, count: all.len() as u64, text: text.to_owned(), examples });
        }
    };
    if types.starts_with("not compared") {
        add("types", "types: a changed layout or signature is not seen", vec![types.to_owned()]);
    }
    let blind: Vec<String> = [(&both.found.lines.0, both.old), (&both.found.lines.1, both.new)]
        .into_iter()
        .filter(|(lines, _)| !lines.present)
        .map(|(_, side)| side.build.path.clone())
        .collect();
    add("debug-information", "builds without debug information: no lines, no types, no reasons from the source", blind);
    let (code, removed) = functions(both);
    add(
        "code-by-bytes",
        "functions whose references are not understood: only their bytes were compared, and are equal",
        code,
    );
    add(
        "removed",
        "functions of the old build without a new version: nothing to compare with; they stay as they are",
        removed,
    );
    add(
        "data-by-use",
        "data without symbols: compared only from where changed or unchanged code refers to it",
        unnamed_data(both),
    );
    add("sections", "sections that differ and that nobody interprets", sections(both));
    out
}

fn functions(both: &Both<'_, '_>) -> (Vec<String>, Vec<String>) {
    let (mut code, mut removed) = (Vec::new(), Vec::new());
    for (id, lifted) in both.old.lifted.iter().enumerate() {
        let id = id as FuncId;
        let name = || demangle(both.old.build.func(id).name());
        match both.pairing.func_pair(id) {
            None => removed.push(name()),
            Some(_) if lifted.unexplained.is_some() && !both.found.changed.contains_key(&id) => code.push(name()),
            Some(_) => {}
        }
    }
    (code, removed)
}

/// Bytes of constants and variables that belong to no symbol, by section of the new build.
fn unnamed_data(both: &Both<'_, '_>) -> Vec<String> {
    let build = &both.new.build;
    let mut out = Vec::new();
    for s in build.sections.iter().filter(|s| !s.exec && !is_tool_data(s.name)) {
        let end = s.addr + s.size;
        let from = build.objects.partition_point(|o| o.addr < s.addr);
        let (mut covered, mut at) = (0, s.addr);
        for o in build.objects[from..].iter().take_while(|o| o.addr < end) {
            let to = o.addr.saturating_add(o.size).min(end);
            covered += to.saturating_sub(o.addr.max(at));
            at = at.max(to);
        }
        if s.size > covered {
            out.push(format!("{} of {} bytes of {}", s.size - covered, s.size, s.name));
        }
    }
    out
}

/// Sections that other stages read on their own, or that follow from the rest.
fn is_tool_data(name: &str) -> bool {
    [
        ".got",
        ".eh_frame",
        ".gcc_except_table",
        ".dyn",
        ".gnu.",
        ".rel",
        ".note",
        ".interp",
        ".hash",
        ".plt",
        ".init",
        ".fini",
        ".preinit",
    ]
    .iter()
    .any(|p| name.starts_with(p))
}

fn content<'d>(side: &Side<'d>, name: &str) -> Option<&'d [u8]> {
    side.build.section_named(name).map(|s| s.data)
}

/// Sections outside of code and data whose content differs.
fn sections(both: &Both<'_, '_>) -> Vec<String> {
    let looked_at = |name: &str| {
        name.is_empty()
            || [
                ".debug",
                ".rel",
                ".symtab",
                ".strtab",
                ".shstrtab",
                ".note.gnu.build-id",
                ".gnu.hash",
                ".hash",
                ".gnu_debug",
            ]
            .iter()
            .any(|p| name.starts_with(p))
    };
    let mut out: Vec<String> = Vec::new();
    for s in both.old.build.all_sections.iter().chain(&both.new.build.all_sections) {
        let ours = !s.alloc || [".note", ".interp"].iter().any(|p| s.name.starts_with(p));
        if ours && !looked_at(s.name) && content(both.old, s.name) != content(both.new, s.name) {
            out.push(s.name.to_owned());
        }
    }
    // Code between the functions: what no symbol covers.
    let gap = |side: &Side<'_>| {
        let refs = side.lifted.iter().flat_map(|l| &l.refs);
        refs.filter(|r| matches!(r.target, Target::Unknown(at) if side.build.section_at(at).is_some_and(|s| s.exec)))
            .count()
    };
    if gap(both.new) > 0 {
        out.push(format!("code without symbols ({} references lead there)", gap(both.new)));
    }
    out.sort();
    out.dedup();
    out
}
