//! The patch that this one takes the place of: what it brought is alive. Its new statics are used where they are, and
//! its new functions whose address somebody may hold lead to the new ones.

use std::collections::BTreeMap;

use livepatch::patch::{further_back, PatchFile, Static, Status, ENTRY_JUMP_LEN};

use super::{Bound, Selector};
use crate::build::{canonical, demangle, FuncId, ObjId};

/// The previous patch, as this one needs it.
pub(super) struct Previous<'a> {
    patch: &'a PatchFile,
    /// The new build's data symbols that were found in it.
    bound: BTreeMap<ObjId, usize>,
}

impl<'a> Previous<'a> {
    pub(super) fn new(patch: &'a PatchFile) -> Self {
        Self { patch, bound: BTreeMap::new() }
    }
}

/// What a static of a hook object has in place of its source file.
pub(super) const OF_HOOKS: &str = "the hook object";

const RESTART: &str = "keep what the applied patch brought as it is, or restart with the new build";

impl<'d> Selector<'_, 'd> {
    fn same_name(&self, s: &Static, id: ObjId) -> bool {
        let object = self.new.build.object(id);
        // The file of a Rust symbol has the code generation unit in its name.
        let file = |n: &crate::build::Name<'_>| self.new.build.rust || n.file == s.file.as_deref();
        object.names.iter().any(|n| demangle(n.text) == s.name && file(n))
    }

    /// Every static of the previous patch must be in the new build, the same and only once: its value is alive.
    pub(super) fn living_statics(&mut self) -> Vec<(usize, ObjId)> {
        let mut out = Vec::new();
        let Some(patch) = self.after.as_ref().map(|a| a.patch) else { return out };
        for (index, s) in patch.manifest.statics.iter().enumerate() {
            if s.file.as_deref() == Some(OF_HOOKS) {
                continue; // of its own hooks, which end with it
            }
            if let Some(id) = self.living(index) {
                let size = self.new.build.object(id).size;
                if size != s.size {
                    let message =
                        format!("{} has {} bytes in the applied patch and {size} in the new build", s.name, s.size);
                    self.refuse("after", &s.name, message, RESTART);
                } else {
                    out.push((index, id));
                }
            }
        }
        out
    }

    /// The new build's data symbol that a static of the previous patch is; refuses if there is none or several.
    fn living(&mut self, index: usize) -> Option<ObjId> {
        let patch = self.after.as_ref()?.patch;
        let s = patch.manifest.statics.get(index)?;
        let all = 0..self.new.build.objects.len() as ObjId;
        let found: Vec<ObjId> = all.filter(|id| self.same_name(s, *id)).collect();
        let twins = patch.manifest.statics.iter().filter(|t| t.name == s.name && t.file == s.file).count();
        let why = match (found.as_slice(), twins) {
            ([id], 1) if self.pairing.object_old(*id).is_some() => "is one of the old build's in the new build",
            ([id], 1) if !self.new.is_mutable(self.new.build.object(*id).addr) => "is a constant in the new build",
            ([id], 1) => return Some(*id),
            ([], _) => "is not in the new build",
            _ => "can't be told from another of the same name",
        };
        let message = format!("{}, which the applied patch brought and whose value is alive, {why}", s.name);
        let name = s.name.clone();
        self.refuse("after", &name, message, RESTART);
        None
    }

    /// Where the previous patch has a variable that the old build does not have.
    pub(super) fn living_copy(&mut self, id: ObjId) -> Option<u64> {
        let after = self.after.as_ref()?;
        let known = after.bound.get(&id).copied();
        let index = known.or_else(|| {
            let statics = &after.patch.manifest.statics;
            statics.iter().position(|s| s.file.as_deref() != Some(OF_HOOKS) && self.same_name(s, id))
        })?;
        let at = after.patch.manifest.statics.get(index)?.at;
        self.after.as_mut()?.bound.insert(id, index);
        Some(at)
    }

    /// New functions of the previous patch whose address somebody may hold.
    pub(super) fn held_functions(&mut self) {
        let Some(patch) = self.after.as_ref().map(|a| a.patch) else { return };
        for (index, f) in patch.manifest.functions.iter().enumerate() {
            // Or held by the address that a patch before that one gave it.
            let held = f.address_taken || patch.manifest.redirects.iter().any(|r| r.name == f.name);
            if f.status != Status::New || !held {
                continue;
            }
            let all = 0..self.new.build.funcs.len() as FuncId;
            let named = |g: &FuncId| self.new.build.func(*g).names.iter().any(|n| n.text == f.name);
            let found: Vec<FuncId> = all.filter(named).collect();
            // What compilers number may be something else under the same name.
            let numbered = f.demangled.contains("{closure")
                || f.demangled.contains("{{closure")
                || f.demangled.contains("lambda")
                || canonical(&f.name) != f.name && !self.new.build.rust;
            let why = match found.as_slice() {
                [g] if self.pairing.func_olds(*g).is_empty() && !numbered => {
                    let earlier = patch.manifest.redirects.iter().any(|r| r.name == f.name);
                    if !earlier && f.new_size < ENTRY_JUMP_LEN + 4 {
                        "is too short to lead to the new one"
                    } else {
                        let reason = "the applied patch brought it, and its address may be held".to_owned();
                        self.enter(*g, Vec::new(), reason);
                        self.redirects.push((index, *g));
                        continue;
                    }
                }
                [_] if numbered => "has a name that the compiler numbers, so it can't be told what became of it",
                [_] => "is one of the old build's in the new build",
                [] => "is not in the new build",
                _ => "can't be told from another of the same name",
            };
            let message =
                format!("{}, which the applied patch brought and whose address may be held, {why}", f.demangled);
            self.refuse("after", &f.name, message, RESTART);
        }
    }

    /// The address by which the process knows a function that the old build does not have.
    pub(super) fn known_address(&self, g: FuncId) -> Option<Bound> {
        let patch = self.after.as_ref()?.patch;
        let (index, _) = self.redirects.iter().find(|(_, f)| *f == g)?;
        let f = patch.manifest.functions.get(*index)?;
        // By the one that brought it first.
        let earlier = patch.manifest.redirects.iter().find(|r| r.name == f.name);
        let at = match earlier {
            Some(r) => further_back(r.held?)?,
            None => f.new_at,
        };
        Some(Bound::Previous(at))
    }
}
