//! The places whose code a patch changes, and the switch stubs behind them.
//!
//! A patch that takes the place of another (`--after`) meets three kinds of them: where the other's jump stands and its own is to stand,
//! where the image's code stands, and where the other's jump stands and the image's code is to stand again. One word switches all
//! of them, whatever their kind; see [`insn::switch_stub`].

use super::{CodeEdit, Layout, OldFacts, Refusal};
use crate::addr::{LoadBias, ProcAddr};
use crate::insn::{self, Edit, KeyArgument, OutOfReach, ShareWords, StubError, Way};
use crate::maps::PAGE;
use crate::patch::{PatchFile, ENTRY_JUMP_LEN};
use crate::registry::{CanaryRecord, APPLIED, MUTABLE_AT, SHARES_AT, WHICH_AT};

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
    /// The function, if its body branches back to the entry.
    pub looping: Option<Loop>,
}

/// A function whose loop goes back to its first instruction.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Loop {
    /// Where it begins.
    pub start: ProcAddr,
    /// All of its code.
    pub body: Vec<u8>,
    /// Whether parts of it lie elsewhere, and may branch into it.
    pub companions: bool,
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
    /// Where the code behind it begins, with the patch and without: for a switch by traps.
    pub ways: Option<[ProcAddr; 2]>,
}

/// A place whose code changes by a trap, from inside: while a thread may be in the one code, it goes on there, else in the other.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Trap {
    /// Whose entry it is.
    pub function: String,
    /// Where.
    pub at: ProcAddr,
    /// What stands there.
    pub before: Jump,
    /// What is to stand there.
    pub after: Jump,
    /// Where the code begins that is left.
    pub from: ProcAddr,
    /// Where the code begins that is entered.
    pub to: ProcAddr,
}

impl Trap {
    /// The way back.
    #[must_use]
    pub fn turned(&self) -> Self {
        let Self { function, at, before, after, from, to } = self.clone();
        Self { function, at, before: after, after: before, from: to, to: from }
    }
}

/// The traps that make `sites` what is `written` there; `None` without stubs.
#[must_use]
pub fn traps(sites: &[Site], written: &[Written]) -> Option<Vec<Trap>> {
    let trap = |(s, w): (&Site, &Written)| {
        let [to, from] = w.ways?;
        Some(Trap { function: s.function.clone(), at: s.at, before: s.before, after: w.jump, from, to })
    };
    sites.iter().zip(written).map(trap).collect()
}

/// How the sites come to lead to the new code.
#[derive(Clone, Copy, Debug)]
pub enum Switch<'k> {
    /// All at once: by one word, or a single one by its own bytes.
    All,
    /// Each thread for itself, from inside: with the stubs of a switch by one word, also for a single one.
    Threads,
    /// For a share of the calls, by a key.
    Canary(&'k CanaryRecord),
}

/// Code behind entry jumps.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Stubs {
    /// One after the other.
    pub code: Vec<Vec<u8>>,
    /// Bytes from one to the next.
    pub each: u64,
}

/// Bytes of the stubs that these sites need: none for a single one that is switched by its own bytes.
#[must_use]
pub fn stub_bytes(sites: &[Site], how: Switch<'_>) -> u64 {
    match (how, sites.len()) {
        (Switch::Canary(canary), n) => n as u64 * canary_bytes(sites, canary),
        (_, 0) | (Switch::All, 1) => 0,
        (_, n) => (n + sites.iter().filter(|s| s.wants_back()).count()) as u64 * insn::STUB_BYTES,
    }
}

/// Bytes of each of a canary's stubs. With the session as its key no function is moved whole: a message has one arm, however often it loops.
fn canary_bytes(sites: &[Site], canary: &CanaryRecord) -> u64 {
    let moved = sites.iter().filter_map(|s| s.looping.as_ref()).filter(|_| canary.session.is_none());
    let longest = moved.map(|l| insn::whole_bytes(l.body.len().min(insn::WHOLE_BODY_BYTES))).max().unwrap_or(0);
    insn::CANARY_BYTES + longest.next_multiple_of(insn::CANARY_BYTES)
}

/// As long as what [`switch`] returns, before there is a layout.
#[must_use]
pub fn draft(sites: &[Site], how: Switch<'_>) -> Vec<Written> {
    let several = !matches!(how, Switch::Canary(_)) && stub_bytes(sites, how) > 0;
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
            looping: facts.branches_to_entry.then(|| Loop {
                start: f.old.as_ref().and_then(|o| bias.to_process(o.at)).unwrap_or_default(),
                body: facts.looping.clone(),
                companions: f.old.as_ref().is_some_and(|o| !o.companions.is_empty()),
            }),
        });
    }
    Ok(out)
}

/// What is written at each of `sites`, and the code of the stubs. `record` is where the patch's record is: its words are what
/// stubs follow.
///
/// # Errors
///
/// A jump does not reach, lies across two pages, or overwrites what cannot be moved; a canary has no key for a function.
pub fn switch(
    sites: &[Site],
    layout: &Layout,
    record: ProcAddr,
    how: Switch<'_>,
) -> Result<(Vec<Written>, Stubs), Refusal> {
    // A kill between its two pages would leave half a jump.
    if let Some(site) = sites.iter().find(|s| s.at.0 % PAGE > PAGE - ENTRY_JUMP_LEN) {
        return Err(Refusal::EntryAcrossPages { function: site.function.clone(), at: site.at });
    }
    match how {
        Switch::Canary(canary) => by_key(sites, layout, record, canary),
        Switch::All | Switch::Threads => by_word(sites, layout, record, stub_bytes(sites, how) > 0),
    }
}

fn jump(at: ProcAddr, to: ProcAddr) -> Result<Jump, Refusal> {
    Edit::Jump { at, to }.encode().map_err(|OutOfReach { at, to }| Refusal::OutOfReach { at, to })
}

fn immovable(site: &Site) -> impl Fn(StubError) -> Refusal + '_ {
    |e| Refusal::EntryImmovable { function: site.function.clone(), why: e.to_string() }
}

fn by_word(sites: &[Site], layout: &Layout, record: ProcAddr, stubs: bool) -> Result<(Vec<Written>, Stubs), Refusal> {
    let word = (ProcAddr(record.0 + MUTABLE_AT), APPLIED);
    let (mut out, mut code) = (Vec::with_capacity(sites.len()), Vec::new());
    for site in sites {
        let far = || Refusal::OutOfReach { at: site.at, to: layout.base };
        let new = site.new_at.map(|at| layout.base.checked_add(at).ok_or_else(far)).transpose()?;
        let mut written = Written { jump: site.original, ..Written::default() };
        if let Some(new) = new {
            written.jump = jump(site.at, new)?;
        }
        if stubs {
            let own = Way::On(&site.code);
            let applied = new.map_or(own, Way::To);
            let before = match insn::jump_target(site.at, site.before) {
                Some(to) if site.before != site.original => Way::To(to),
                _ => own,
            };
            let mut stub = |otherwise| {
                let at = layout.stub.checked_add(PAGE + code.len() as u64 * insn::STUB_BYTES).ok_or_else(far)?;
                let built = insn::switch_stub(at, word, site.at, [applied, otherwise]).map_err(immovable(site))?;
                code.push(built.code);
                Ok((jump(site.at, at)?, built.ways))
            };
            let (lead, ways) = stub(before)?;
            (written.lead, written.ways) = (Some(lead), Some(ways));
            written.back = if site.wants_back() { Some(stub(own)?.0) } else { None };
        }
        out.push(written);
    }
    Ok((out, Stubs { code, each: insn::STUB_BYTES }))
}

fn by_key(
    sites: &[Site],
    layout: &Layout,
    record: ProcAddr,
    canary: &CanaryRecord,
) -> Result<(Vec<Written>, Stubs), Refusal> {
    let words = ShareWords { shares: ProcAddr(record.0 + SHARES_AT), which: ProcAddr(record.0 + WHICH_AT) };
    let (mut out, mut code) = (Vec::with_capacity(sites.len()), Vec::new());
    let each = canary_bytes(sites, canary);
    for site in sites {
        let far = || Refusal::OutOfReach { at: site.at, to: layout.base };
        let argument = canary.keys.iter().find(|(f, _)| *f == site.function).and_then(|(_, n)| KeyArgument::new(*n));
        let no = |why: String| Refusal::Canary { why };
        let Some(new_at) = site.new_at.filter(|_| site.before == site.original) else {
            return Err(no("it takes the place of another patch".into()));
        };
        let new = layout.base.checked_add(new_at).ok_or_else(far)?;
        let at = layout.stub.checked_add(PAGE + code.len() as u64 * each).ok_or_else(far)?;
        let entry = (site.at, &*site.code);
        if let Some(l) = site.looping.as_ref().filter(|l| l.companions || !insn::calls_nothing(l.start, &l.body)) {
            // What it calls may end the message, or begin another, and its next turn would be in the other arm. And of a copy that is returned
            // to, or that a part elsewhere does not know, no unwind table tells.
            let (name, at) = (&site.function, l.start);
            let what = if l.companions { "parts of it lie elsewhere" } else { "it calls others in between" };
            return Err(no(format!("{name} at {at} branches back to its own entry, and {what}")));
        }
        let built = match (canary.session, argument) {
            (Some(s), _) => insn::session_stub(at, (s.offset, s.slot), new, entry, site.looping.is_some()),
            (None, Some(key)) => {
                let whole = site.looping.as_ref().map(|l| insn::Whole { start: l.start, body: &l.body });
                insn::canary_stub(at, words, (key, canary.salt), new, entry, whole)
            }
            (None, None) => return Err(no(format!("no key tells the calls of {} apart", site.function))),
        };
        let built = built.map_err(immovable(site))?;
        code.push(built.code);
        out.push(Written { jump: jump(site.at, at)?, ways: Some(built.ways), ..Written::default() });
    }
    Ok((out, Stubs { code, each }))
}

/// The edits that make `sites` what `to` chooses of what is written there.
#[must_use]
pub fn edits(sites: &[Site], written: &[Written], to: impl Fn(&Written) -> Option<Jump>) -> Vec<CodeEdit> {
    let edit = |(s, w): (&Site, &Written)| {
        Some(CodeEdit { function: s.function.clone(), at: s.at, expected: s.before, new: to(w)? })
    };
    sites.iter().zip(written).filter_map(edit).collect()
}
