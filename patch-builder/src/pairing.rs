//! Which old symbol is which new one: the answer, as [`pair`](crate::pair) works
//! it out and everybody else reads it.

use std::collections::{HashMap, HashSet};

use crate::build::{FuncId, ObjId};

/// The pairs.
#[derive(Clone, Debug, Default)]
pub struct Pairing {
    pub(crate) funcs: Vec<Option<FuncId>>,
    pub(crate) funcs_back: Vec<Vec<FuncId>>,
    pub(crate) objects: Vec<Option<ObjId>>,
    pub(crate) objects_back: Vec<Option<ObjId>>,
    /// Writable data without a name: old address to new, and back.
    pub(crate) unnamed: HashMap<u64, u64>,
    pub(crate) unnamed_back: HashMap<u64, u64>,
    pub(crate) tls: Vec<Option<u32>>,
    pub(crate) tls_back: Vec<Option<u32>>,
    /// Old functions whose names now belong to different functions: (old, one new, another new).
    pub splits: Vec<(FuncId, FuncId, FuncId)>,
    /// Names of which it can't be said which variable is which.
    pub ambiguous: HashSet<String>,
    /// Old functions without new version whose name unpaired new functions have, too.
    pub ambiguous_functions: Vec<(FuncId, String)>,
}

impl Pairing {
    /// The new version of an old function.
    #[must_use]
    pub fn func_pair(&self, old: FuncId) -> Option<FuncId> {
        self.funcs.get(old as usize).copied().flatten()
    }

    /// The old versions of a new function (several after folding).
    #[must_use]
    pub fn func_olds(&self, new: FuncId) -> &[FuncId] {
        self.funcs_back.get(new as usize).map_or(&[], Vec::as_slice)
    }

    /// Whether the two are versions of one function.
    #[must_use]
    pub fn is_pair(&self, old: FuncId, new: FuncId) -> bool {
        self.func_pair(old) == Some(new)
    }

    /// The new version of an old data symbol.
    #[must_use]
    pub fn object_pair(&self, old: ObjId) -> Option<ObjId> {
        self.objects.get(old as usize).copied().flatten()
    }

    /// The old version of a new data symbol.
    #[must_use]
    pub fn object_old(&self, new: ObjId) -> Option<ObjId> {
        self.objects_back.get(new as usize).copied().flatten()
    }

    /// The new version of an old thread-local variable.
    #[must_use]
    pub fn tls_pair(&self, old: u32) -> Option<u32> {
        self.tls.get(old as usize).copied().flatten()
    }

    /// The old version of a new thread-local variable.
    #[must_use]
    pub fn tls_old(&self, new: u32) -> Option<u32> {
        self.tls_back.get(new as usize).copied().flatten()
    }

    /// Whether two pieces of writable data without a name are versions of each other.
    #[must_use]
    pub fn is_unnamed_pair(&self, old: u64, new: u64) -> bool {
        self.unnamed.get(&old) == Some(&new)
    }

    /// The old version of a piece of writable data without a name.
    #[must_use]
    pub fn unnamed_old(&self, new: u64) -> Option<u64> {
        self.unnamed_back.get(&new).copied()
    }

    /// Records a pair, unless the old function has one.
    pub(crate) fn set_func(&mut self, old: FuncId, new: FuncId) {
        if self.funcs[old as usize].is_none() {
            self.funcs[old as usize] = Some(new);
            self.funcs_back[new as usize].push(old);
        }
    }
}
