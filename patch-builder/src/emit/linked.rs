//! What a static program has in itself of the libraries that other programs load: nothing in its memory tells.

use livepatch::addr::ImageAddr;
use livepatch::patch;

use crate::build::{Func, Lines};
use crate::side::Side;

/// Bytes between two functions that are no more than alignment.
const MAX_PADDING: u64 = 63;

/// Whether frames of this build can clean up, or catch. The C library of a static program has cleanups of its own, for cancelled threads; what
/// the program itself was compiled from has debug information.
pub(super) fn may_unwind(side: &Side<'_>, lines: &Lines) -> bool {
    let build = &side.build;
    // Linked in, these throw through code that has nothing to clean up, to be caught in a library without debug information.
    let throws = |f: &Func<'_>| f.names.iter().any(|n| ["__cxa_throw", "rust_eh_personality"].contains(&n.text));
    build.is_static && build.funcs.iter().any(throws)
        || build.unwind.with_personality().any(|f| !build.is_static || lines.covers(f.start))
}

/// What a static program has of the libraries that other programs load.
pub(super) fn linked(side: &Side<'_>, lines: &Lines) -> patch::Linked {
    if !side.build.is_static {
        return patch::Linked::default();
    }
    let funcs = &side.build.funcs;
    let named = |list: &'static [&'static str]| {
        funcs.iter().filter_map(move |f| Some((f, f.names.iter().find_map(|n| list.iter().find(|l| **l == n.text))?)))
    };
    let range = |f: &Func<'_>| patch::CodeRange { at: ImageAddr(f.addr), size: f.size };
    let mut stack_switches: Vec<String> = named(&patch::STACK_SWITCHES).map(|(_, name)| (*name).to_owned()).collect();
    stack_switches.sort_unstable();
    let mut runtime: Vec<patch::CodeRange> = Vec::new();
    // rustc writes `main` itself, and no unit covers that.
    let foreign = |f: &&Func<'_>| f.size > 0 && f.name() != "main" && !lines.covers(f.addr);
    for f in funcs.iter().filter(foreign) {
        match runtime.last_mut() {
            Some(last) if f.addr <= last.at.0 + last.size + MAX_PADDING => {
                last.size = last.size.max(f.addr + f.size - last.at.0);
            }
            _ => runtime.push(range(f)),
        }
    }
    patch::Linked {
        stack_switches,
        register_frame: named(&["__register_frame"]).next().map(|(f, _)| ImageAddr(f.addr)),
        waits: named(&patch::WAITS).map(|(f, _)| range(f)).collect(),
        runtime,
    }
}
