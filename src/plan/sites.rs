//! The places whose code a patch changes, and the switch stubs behind them.
//!
//! A patch that takes the place of another (`--after`) meets three kinds of them: where the other's jump stands and its own is to stand,
//! where the image's code stands, and where the other's jump stands and the image's code is to stand again. One word switches all
//! of them, whatever their kind; see [`insn::switch_stub`].

use super::{CodeEdit, Layout, OldFacts, Refusal};
use crate::addr::{LoadBias, ProcAddr};
use crate::insn::{self, Edit, OutOfReach, StubError, Way};
use crate::maps::PAGE;
use crate::patch::{PatchFile, ENTRY_JUMP_LEN};

/// The bytes of an entry jump.
pub type Jump = [u8; ENTRY_JUMP_LEN as usize];

/// One place whose code a patch changes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Site {
    /// Whose entry it is.
    pub function: String,
    /// Where.
    pub at: ProcAddr,
    /// What stands there with no patch applied.
    pub original: Jump,
    /// The same, and what follows as far as a jump may reach into it.
    pub code: Vec<u8>,
    /// What stands there before the apply: the jump of the patch whose place this one takes, or `original`.
    pub before: Jump,
    /// Where its new function is in the patch, or `None` if it only gets `original` back.
    pub new_at: Option<u64>,
}

impl Site {
    /// Whether its way back after a revert is another than before the apply.
    fn wants_back(&self) -> bool {
        self.new_at.is_some() && self.before != self.original
    }
}

/// What is written at a site.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Written {
    /// The jump to the new function; `original` where the site is given back.
    pub jump: Jump,
    /// The jump to the switch stub of an apply, where one word switches several sites.
    pub lead: Option<Jump>,
    /// The jump to the switch stub of a revert, where it is another.
    pub back: Option<Jump>,
}

/// How many switch stubs these sites need: none for a single one, which is switched by its own bytes.
#[must_use]
pub fn stubs(sites: &[Site]) -> u64 {
    match sites.len() {
        0 | 1 => 0,
        n => (n + sites.iter().filter(|s| s.wants_back()).count()) as u64,
    }
}

/// As long as what [`switch`] returns, before there is a layout.
#[must_use]
pub fn draft(sites: &[Site]) -> Vec<Written> {
    let several = stubs(sites) > 0;
    let of = |s: &Site| Written {
        lead: several.then(Jump::default),
        back: (several && s.wants_back()).then(Jump::default),
        ..Written::default()
    };
    sites.iter().map(of).collect()
}

/// The entries of the patch's functions in the image. `facts` tells for each function what its old body is like.
///
/// # Errors
///
/// One is out of reach.
pub fn entries(patch: &PatchFile, bias: LoadBias, facts: &[OldFacts]) -> Result<Vec<Site>, Refusal> {
    let mut out = Vec::new();
    for (f, facts) in patch.manifest.functions.iter().zip(facts) {
        let Some(entry) = f.old.as_ref().and_then(|o| o.entry.as_ref()) else { continue };
        let far = || Refusal::OutOfReach { at: ProcAddr(entry.at.0), to: ProcAddr(f.new_at) };
        let original = entry.original.0.first_chunk().copied().ok_or_else(far)?;
        out.push(Site {
            function: f.demangled.clone(),
            at: bias.to_process(entry.at).ok_or_else(far)?,
            original,
            code: facts.overwritten.clone(),
            before: original,
            new_at: Some(f.new_at),
        });
    }
    Ok(out)
}

/// What is written at each of `sites`, and the code of the switch stubs, which follow the word at `word`: one way while it is
/// `applied`, the other otherwise.
///
/// # Errors
///
/// A jump does not reach, lies across two pages, or overwrites what cannot be moved.
pub fn switch(sites: &[Site], layout: &Layout, word: (ProcAddr, u8)) -> Result<(Vec<Written>, Vec<Vec<u8>>), Refusal> {
    let several = stubs(sites) > 0;
    let jump = |at, to| {
        let encoded = Edit::Jump { at, to }.encode();
        encoded.map_err(|OutOfReach { at, to }| Refusal::OutOfReach { at, to })
    };
    let (mut out, mut code) = (Vec::with_capacity(sites.len()), Vec::new());
    for site in sites {
        let far = || Refusal::OutOfReach { at: site.at, to: layout.base };
        // A kill between its two pages would leave half a jump.
        if site.at.0 % PAGE > PAGE - ENTRY_JUMP_LEN {
            return Err(Refusal::EntryAcrossPages { function: site.function.clone(), at: site.at });
        }
        let new = site.new_at.map(|at| layout.base.checked_add(at).ok_or_else(far)).transpose()?;
        let mut written = Written { jump: site.original, ..Written::default() };
        if let Some(new) = new {
            written.jump = jump(site.at, new)?;
        }
        if several {
            let own = Way::On(&site.code);
            let applied = new.map_or(own, Way::To);
            let before = match insn::jump_target(site.at, site.before) {
                Some(to) if site.before != site.original => Way::To(to),
                _ => own,
            };
            let mut stub = |otherwise| {
                let at = layout.stub.checked_add(PAGE + code.len() as u64 * insn::STUB_BYTES).ok_or_else(far)?;
                let built = insn::switch_stub(at, word, site.at, [applied, otherwise]);
                let no = |e: StubError| Refusal::EntryImmovable { function: site.function.clone(), why: e.to_string() };
                code.push(built.map_err(no)?);
                jump(site.at, at)
            };
            written.lead = Some(stub(before)?);
            written.back = if site.wants_back() { Some(stub(own)?) } else { None };
        }
        out.push(written);
    }
    Ok((out, code))
}

/// The edits that make `sites` what `to` chooses of what is written there.
#[must_use]
pub fn edits(sites: &[Site], written: &[Written], to: impl Fn(&Written) -> Option<Jump>) -> Vec<CodeEdit> {
    let edit = |(s, w): (&Site, &Written)| {
        Some(CodeEdit { function: s.function.clone(), at: s.at, expected: s.before, new: to(w)? })
    };
    sites.iter().zip(written).filter_map(edit).collect()
}
