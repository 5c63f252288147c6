//! Reads the finished patch back with the reader that the engine uses, and compares what it would do with the new build:
//! every instruction of every carried function, every reference, every piece of data, the unwind table.
//!
//! *Invariant:* nothing here looks at what was selected or laid out, but for the places of functions; what a reference
//! of the patch leads to is read from the file, and must be what the new build's reference means in the old image.

mod frames;
mod meaning;
mod words;

use std::collections::{BTreeMap, HashMap, HashSet};

use livepatch::patch::{Manifest, PatchError, PatchFile};
use sha2::{Digest, Sha256};

use crate::build::{FuncId, ObjId};
use crate::compare::{Comparer, LineProof};
use crate::diff::Diff;
use crate::lift::{Access, Field, Target};
use crate::pairing::Pairing;
use crate::side::Side;
use words::{Actual, Words};

/// Why a patch that was just written is not good.
#[derive(Debug)]
#[non_exhaustive]
pub enum VerifyError {
    /// The engine's reader rejects it.
    Rejected(PatchError),
    /// It reads back as something else.
    Different(String),
}

impl std::fmt::Display for VerifyError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Rejected(e) => write!(f, "the patch does not read back: {e}"),
            Self::Different(what) => write!(f, "the patch reads back as something else: {what}"),
        }
    }
}

impl std::error::Error for VerifyError {}

type Verdict = Result<(), VerifyError>;

fn different(what: impl Into<String>) -> VerifyError {
    VerifyError::Different(what.into())
}

/// What a patch is held against.
#[derive(Clone, Copy)]
pub struct Meant<'a, 'd> {
    /// The old build.
    pub old: &'a Side<'d>,
    /// The new build.
    pub new: &'a Side<'d>,
    /// Which is which.
    pub pairing: &'a Pairing,
    /// What changed.
    pub diff: &'a Diff,
    /// The manifest that was meant.
    pub manifest: &'a Manifest,
    /// Where each carried function of the new build begins.
    pub placed: &'a BTreeMap<FuncId, u64>,
    /// The previous patch.
    pub after: Option<&'a PatchFile>,
    /// Code and data of a hook object, which no build holds: ranges of the patch.
    pub foreign: &'a [(u64, u64)],
}

/// Reads `bytes` back and compares with what was meant.
///
/// # Errors
///
/// Any difference; then the patch must not be used.
pub fn verify(bytes: &[u8], meant: Meant<'_, '_>) -> Verdict {
    let patch = PatchFile::parse(bytes).map_err(VerifyError::Rejected)?;
    if patch.manifest != *meant.manifest {
        return Err(different("the manifest"));
    }
    let Meant { old, new, pairing, diff, .. } = meant;
    let proof = LineProof::Tables(&diff.lines.0, &diff.lines.1);
    let mut check = Check {
        meant,
        words: Words::new(&patch),
        comparer: Comparer::new(old, new, pairing, proof),
        jumps: meant
            .manifest
            .functions
            .iter()
            .filter_map(|f| f.old.as_ref())
            .filter(|o| o.entry.is_some())
            .map(|o| o.at.0)
            .collect(),
        objects: HashMap::new(),
        data: HashSet::new(),
        open: Vec::new(),
        comparing: false,
    };
    check.manifest()?;
    for (id, at) in meant.placed {
        check.function(*id, *at)?;
    }
    check.frames(&patch)?;
    check.statics()?;
    match check.words.unexplained(meant.foreign) {
        Some(at) => Err(different(format!("a relocation at {at:#x} that nothing in the new build explains"))),
        None => Ok(()),
    }
}

struct Check<'a, 'd> {
    meant: Meant<'a, 'd>,
    words: Words<'a>,
    comparer: Comparer<'a, 'd>,
    /// The old functions whose entries lead to new code.
    jumps: HashSet<u64>,
    /// Where each carried data symbol is: one place for each.
    objects: HashMap<ObjId, u64>,
    /// Data that was compared already: place in the patch, address in the new build, length.
    data: HashSet<(u64, u64, u64)>,
    /// Data that is still to be compared.
    open: Vec<(u64, u64, u64)>,
    /// Whether somebody is at it.
    comparing: bool,
}

impl<'d> Check<'_, 'd> {
    /// Old functions are what the manifest says of them, and everything that changed is there.
    fn manifest(&self) -> Verdict {
        let Meant { old, new, pairing, diff, manifest, placed, .. } = self.meant;
        let sha = |id: FuncId| Sha256::digest(old.build.code(id)).to_vec();
        let mut replaced: HashMap<FuncId, u64> = HashMap::new();
        let by_place: HashMap<u64, FuncId> = placed.iter().rev().map(|(g, at)| (*at, *g)).collect();
        for f in &manifest.functions {
            let carried = by_place.get(&f.new_at);
            let foreign = f.old.is_none() && self.is_foreign(f.new_at);
            if !foreign && carried.is_none_or(|g| f.new_size < new.build.func(*g).size) {
                return Err(different(format!("{} in the manifest is not where it was placed", f.demangled)));
            }
            let Some(o) = &f.old else { continue };
            let bad = |what: &str| Err(different(format!("{what} of the old {} in the manifest", f.demangled)));
            let Some(id) = old.build.func_at(o.at.0).filter(|id| old.build.func(*id).addr == o.at.0) else {
                return bad("the address");
            };
            if o.size != old.build.func(id).size || o.sha256.0 != sha(id) {
                return bad("size or digest");
            }
            for c in &o.companions {
                let part = old.build.func_at(c.at.0).filter(|id| old.build.func(*id).addr == c.at.0);
                if part.is_none_or(|p| old.build.func(p).size != c.size || sha(p) != c.sha256.0) {
                    return bad("a companion");
                }
            }
            if let Some(e) = &o.entry {
                if old.build.bytes(e.at.0, e.original.0.len() as u64) != Some(&e.original.0[..]) {
                    return bad("the entry");
                }
            }
            replaced.insert(id, f.new_at);
        }
        for f in diff.changed.keys() {
            let Some(g) = pairing.func_pair(*f) else { continue };
            let place = placed.get(&g);
            let part = new.build.func(g).cold_parent().is_some();
            if place.is_none() || !part && replaced.get(f) != place {
                let name = crate::build::demangle(old.build.func(*f).name());
                return Err(different(format!("{name} changed, and the patch does not replace it")));
            }
        }
        Ok(())
    }

    /// One function: its bytes but for the references, then each reference.
    fn function(&mut self, id: FuncId, at: u64) -> Verdict {
        let new = self.meant.new;
        let (func, lifted) = (new.build.func(id), &new.lifted[id as usize]);
        let name = || crate::build::demangle(func.name());
        let mut code = self.words.bytes(at, func.size).ok_or_else(|| different(format!("{} is cut off", name())))?;
        for r in &lifted.refs {
            let width = match r.field {
                Field::Rel8 => 1,
                Field::Abs64 => 8,
                _ => 4,
            };
            if let Some(field) = code.get_mut(r.at as usize..r.at as usize + width) {
                field.fill(0);
            }
        }
        if code != lifted.masked {
            let first = code.iter().zip(&lifted.masked).position(|(a, b)| a != b).unwrap_or(0);
            return Err(different(format!("the instruction at {}+{first:#x}", name())));
        }
        for r in &lifted.refs {
            let field = at + u64::from(r.at);
            let end = u64::from(r.end - r.at);
            let actual = match r.field {
                Field::Rel32 => self.words.relative(field, field + end),
                Field::Abs32 => self.words.short(field),
                Field::Abs64 => self.words.long(field),
                Field::Rel8 => self.words.island(field, at + func.size),
                Field::TpOff32 | Field::DtpOff32 | Field::TlsSize32 => {
                    let wanted = self.thread_offset(r.target, r.field);
                    if wanted.is_none() || self.words.number(field) != wanted {
                        return Err(different(format!("the thread-local at {}+{:#x}", name(), r.at)));
                    }
                    continue;
                }
            };
            let right = match actual {
                Some(actual) => self.means_ref(actual, r)?,
                None => false,
            };
            if !right {
                let wanted = crate::compare::describe(new, r.target);
                let what = actual.map_or_else(|| "nothing".into(), |a| self.describe(a));
                return Err(different(format!("{}+{:#x} refers to {what}, not to {wanted}", name(), r.at)));
            }
        }
        Ok(())
    }

    /// The offset, from the thread pointer or in the segment, that a thread-local has in the running process.
    fn thread_offset(&self, target: Target<'d>, field: Field) -> Option<i32> {
        let Meant { old, pairing, .. } = self.meant;
        if field == Field::TlsSize32 {
            return i32::try_from(old.build.tls_segment?.aligned_len).ok();
        }
        let Target::Tls(id, offset) = target else { return None };
        let variable = &old.build.tls[pairing.tls_old(id)? as usize];
        let at = variable.addr.wrapping_add_signed(offset).cast_signed();
        let below = if field == Field::TpOff32 { old.build.tls_segment?.aligned_len.cast_signed() } else { 0 };
        i32::try_from(at - below).ok()
    }

    /// Every static of the manifest is new data of the new build, under its name, and none is missing.
    fn statics(&self) -> Verdict {
        let Meant { new, manifest, .. } = self.meant;
        let by_place: HashMap<u64, ObjId> = self.objects.iter().map(|(id, at)| (*at, *id)).collect();
        let listed: HashSet<u64> = manifest.statics.iter().map(|s| s.at).collect();
        // Those that an earlier patch brought are that one's, one step further back.
        let (own, earlier): (Vec<_>, Vec<_>) =
            manifest.statics.iter().partition(|s| livepatch::patch::in_chain(s.at).0 == 0);
        let brought = self.meant.after.map_or(&[][..], |p| &p.manifest.statics);
        for s in earlier {
            let is = |b: &livepatch::patch::Static| {
                livepatch::patch::further_back(b.at) == Some(s.at)
                    && (&b.name, &b.file, b.size) == (&s.name, &s.file, s.size)
            };
            if !brought.iter().any(is) {
                return Err(different(format!("the static {} of an earlier patch in the manifest", s.name)));
            }
        }
        for s in own {
            let object = by_place.get(&s.at).map(|id| new.build.object(*id));
            let foreign = self.is_foreign(s.at);
            let same = object.is_some_and(|o| o.size == s.size && crate::build::demangle(o.name()) == s.name);
            if !foreign && !same {
                return Err(different(format!("the static {} in the manifest", s.name)));
            }
        }
        for (id, at) in &self.objects {
            if new.is_mutable(new.build.object(*id).addr) && !listed.contains(at) {
                return Err(different(format!("{} is not in the manifest's statics", new.build.object(*id).name())));
            }
        }
        Ok(())
    }

    fn describe(&self, actual: Actual) -> String {
        let old = self.meant.old;
        match actual {
            Actual::Image(at) => crate::compare::describe(old, crate::lift::resolve(&old.build, at, None)),
            Actual::Patch(at) => format!("{at:#x} of the patch"),
            Actual::Import(index, _) => {
                self.meant.manifest.imports.get(index).map_or_else(|| "an import".into(), |i| i.symbol())
            }
            Actual::Previous(at) => format!("{at:#x} of the previous patch"),
            Actual::Null => "nothing".into(),
        }
    }

    /// Whether a place of the patch comes from a hook object.
    fn is_foreign(&self, at: u64) -> bool {
        self.meant.foreign.iter().any(|(from, to)| (*from..*to).contains(&at))
    }

    fn is_branch(access: Access) -> bool {
        access == Access::Branch
    }
}
