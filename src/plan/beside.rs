//! Whether old and new code of a patch may run side by side: threads that are inside an old function go on in it, while new
//! calls run the new one. So it is with `--consistency entry`, and with `--leave-running` for the functions that it names.

use std::borrow::Cow;

use serde::{Deserialize, Serialize};

use super::{OldFacts, Refusal};
use crate::patch::PatchFile;

/// What no thread may be inside of when the code switches.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub enum Consistency {
    /// No replaced function.
    #[default]
    Stack,
    /// None but these, which never return, perhaps.
    StackBut(Vec<String>),
    /// Only the bytes that are written.
    Entry,
}

impl Consistency {
    /// Whether a thread may be inside the function of this name.
    #[must_use]
    pub fn leaves(&self, function: &str) -> bool {
        match self {
            Self::Stack => false,
            Self::StackBut(names) => names.iter().any(|n| n == function),
            Self::Entry => true,
        }
    }
}

/// Whether old and new code of the patch agree on everything that they share.
///
/// # Errors
///
/// What they do not agree on, or that the patch does not tell.
pub fn agree(patch: &PatchFile) -> Result<(), String> {
    let manifest = &patch.manifest;
    let Some(together) = &manifest.together else {
        return Err("the patch does not tell what old and new code share (an older format)".into());
    };
    if let Some(first) = together.first() {
        return Err(format!("old and new code do not agree on {first}"));
    }
    if let Some(allowance) = manifest.allowances.first() {
        return Err(format!("the patch was built with --allow {allowance}"));
    }
    if let Some(after) = &manifest.after {
        return Err(format!("the patch takes the place of {}", after.name));
    }
    Ok(())
}

/// The patch with what this consistency asks for: where old callers may go on, the functions that only they reach lead to
/// the new ones, too.
#[must_use]
pub fn adapt<'p>(patch: &'p PatchFile, consistency: &Consistency) -> Cow<'p, PatchFile> {
    let olds = || patch.manifest.functions.iter().filter_map(|f| f.old.as_ref());
    if *consistency == Consistency::Stack || olds().all(|o| o.entry_beside.is_none()) {
        return Cow::Borrowed(patch);
    }
    let mut patch = patch.clone();
    for old in patch.manifest.functions.iter_mut().filter_map(|f| f.old.as_mut()) {
        old.entry = old.entry.take().or(old.entry_beside.take());
    }
    Cow::Owned(patch)
}

/// Whether the patch may be applied with this consistency, or as a canary. `facts` tells for each function what its old body is like.
///
/// `canary`: whether it is one, and then whether what old and new code don't agree on is kept in states whose version says which code handles
/// them.
///
/// # Errors
///
/// Why not.
pub fn check(
    patch: &PatchFile,
    facts: &[OldFacts],
    consistency: &Consistency,
    canary: Option<bool>,
) -> Result<(), Refusal> {
    if let Consistency::StackBut(names) = consistency {
        let known = |n: &&String| !patch.manifest.functions.iter().any(|f| f.old.is_some() && f.demangled == **n);
        if let Some(name) = names.iter().find(known) {
            return Err(Refusal::Beside { why: format!("the patch replaces no function {name}") });
        }
    }
    if *consistency == Consistency::Stack {
        return Ok(());
    }
    if canary != Some(true) {
        agree(patch).map_err(|why| Refusal::Beside { why })?;
    }
    if canary.is_some() {
        // A loop does not meet its stub, or meets the same arm.
        return Ok(());
    }
    // Its loop would go on in the new function, in the middle of a call of the old one.
    let left = patch.manifest.functions.iter().zip(facts).filter(|(f, _)| consistency.leaves(&f.demangled));
    let jumped = |f: &crate::patch::Function| f.old.as_ref().is_some_and(|o| o.entry.is_some());
    match left.into_iter().find(|(f, facts)| jumped(f) && facts.branches_to_entry) {
        Some((f, _)) => Err(Refusal::Beside { why: format!("{} branches back to its own entry", f.demangled) }),
        None => Ok(()),
    }
}
