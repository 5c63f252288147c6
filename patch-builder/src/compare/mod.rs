//! Are two functions, or two pieces of data, the same? When unsure, they are not.
//!
//! Equality of what has no name is by content, followed recursively; a cycle
//! counts as equal unless something on it differs.

mod data;
mod drift;
mod padding;

use std::collections::HashSet;

pub use data::{place, slot, type_slot, Place};

use crate::build::{FastMap, FuncId, Lines, TlsFound};
use crate::lift::{Access, Ref, Target};
use crate::pairing::Pairing;
use crate::side::Side;

/// A difference that is recognised as noise.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Noise {
    /// `location`, `line-immediate` or `padding`.
    pub rule: &'static str,
    /// What was seen.
    pub detail: String,
}

/// What is known of lines while comparing.
#[derive(Clone, Copy)]
pub enum LineProof<'a> {
    /// Nothing: a different line is a different program.
    None,
    /// Accept any line and column of a `core::panic::Location`: to find which function is which, not what is the same.
    Locations,
    /// The line tables of both builds.
    Tables(&'a Lines, &'a Lines),
}

#[derive(Clone, Copy, PartialEq, Eq, Hash)]
enum Key {
    Func(FuncId, FuncId),
    Data(u64, u64, u64),
}

/// Recursion deeper than this is not followed: different.
const MAX_DEPTH: u32 = 48;

/// Compares across two builds under one pairing; one per thread, for its memory of answers.
pub struct Comparer<'a, 'd> {
    old: &'a Side<'d>,
    new: &'a Side<'d>,
    pairing: &'a Pairing,
    proof: LineProof<'a>,
    memo: FastMap<Key, bool>,
    /// Keys answered `true` while something is still open, oldest first.
    trail: Vec<Key>,
    depth: u32,
    /// The function pair that is being compared, for line proofs.
    context: Option<(FuncId, FuncId)>,
    noise: Vec<Noise>,
    why: Option<String>,
    /// Old unnamed data that is known to differ.
    doubtful: Option<&'a HashSet<u64>>,
    /// What is known to be equal byte by byte.
    equal: data::Stretches,
    /// Old unnamed data that was found to differ.
    pub unequal: Vec<u64>,
}

impl<'a, 'd> Comparer<'a, 'd> {
    /// A comparer that has seen nothing yet.
    #[must_use]
    pub fn new(old: &'a Side<'d>, new: &'a Side<'d>, pairing: &'a Pairing, proof: LineProof<'a>) -> Self {
        let (memo, trail, noise) = (FastMap::default(), Vec::new(), Vec::new());
        Self {
            old,
            new,
            pairing,
            proof,
            memo,
            trail,
            depth: 0,
            context: None,
            noise,
            why: None,
            doubtful: None,
            equal: data::Stretches::default(),
            unequal: Vec::new(),
        }
    }

    /// Takes the old unnamed data that is known to differ, so that what lies before it is doubted.
    #[must_use]
    pub fn doubting(mut self, doubtful: &'a HashSet<u64>) -> Self {
        self.doubtful = Some(doubtful);
        self
    }

    /// Compares a pair of functions: `Ok` with the noise that was ignored, or the first difference.
    ///
    /// # Errors
    ///
    /// The first difference, in words.
    pub fn functions(&mut self, f: FuncId, g: FuncId) -> Result<Vec<Noise>, String> {
        self.noise.clear();
        self.why = None;
        // Noise is reported for each function: look again even if some other function's answer is known.
        self.memo.remove(&Key::Func(f, g));
        if self.func_bodies(f, g) {
            self.noise.sort();
            self.noise.dedup();
            Ok(std::mem::take(&mut self.noise))
        } else {
            Err(self.why.take().unwrap_or_else(|| "its code".into()))
        }
    }

    /// Compares named data over its whole length.
    pub fn objects(&mut self, a: u64, b: u64, len: u64) -> bool {
        self.data(a, b, Some(len))
    }

    /// Whether two pieces of writable data without a name start with the same content.
    pub fn unnamed(&mut self, a: u64, b: u64) -> bool {
        self.data(a, b, None)
    }

    /// Whether two references mean the same.
    pub fn targets(&mut self, a: Target<'d>, b: Target<'d>, access: Access) -> bool {
        match (a, b) {
            (Target::Func(f, 0), Target::Func(g, 0)) => self.func_refs(f, g),
            (Target::Func(f, x), Target::Func(g, y)) => {
                self.same_offset((f, x), (g, y))
                    && (self.context == Some((f, g)) || self.func_refs(f, g) && self.func_bodies(f, g))
            }
            (Target::Plt(x), Target::Plt(y)) => self.same_import(x, y),
            (Target::Empty(x), Target::Empty(y)) => x == y,
            (Target::Number(x), Target::Number(y)) => x == y,
            (Target::Slot(s), Target::Slot(t)) => self.slots(s, t),
            (Target::TlsSlots(m, s), Target::TlsSlots(n, t)) => {
                m == n
                    && match (s, t) {
                        (TlsFound::Own(s, x), TlsFound::Own(t, y)) => x == y && self.pairing.tls_pair(s) == Some(t),
                        (s, t) => s == t,
                    }
            }
            (Target::Tls(s, x), Target::Tls(t, y)) => x == y && self.pairing.tls_pair(s) == Some(t),
            (Target::Object(o, x), Target::Object(p, y)) => x == y && self.object_refs(o, p, x, access),
            (Target::Unknown(x), Target::Unknown(y)) => {
                x == 0 && y == 0 || self.old.build.edge(x).is_some() && self.old.build.edge(x) == self.new.build.edge(y)
            }
            (Target::Data(_) | Target::Object(..), Target::Data(_) | Target::Object(..)) => {
                let (a, b) = (self.address(true, a), self.address(false, b));
                self.anonymous(a, b, access)
            }
            _ => false,
        }
    }

    /// Whether two references of two functions mean the same.
    fn refs(&mut self, r: &Ref<'d>, s: &Ref<'d>) -> bool {
        let (Target::Data(a), Target::Data(b), true) = (r.target, s.target, r.bias != 0) else {
            return r.bias == s.bias && self.targets(r.target, s.target, r.access);
        };
        if r.bias != s.bias {
            return false;
        }
        let (to, other) = (a.wrapping_add_signed(r.bias), b.wrapping_add_signed(r.bias));
        if r.access == Access::Extent && self.is_str(to, other) {
            return self.anonymous(to, other, r.access);
        }
        // All of the thing; where something else is referred to before the address, also what goes on behind it.
        let whole = self.old.extent_end(a) >= to && self.new.extent_end(b) >= other;
        let before = u64::try_from(r.bias).ok().filter(|_| !whole && !self.old.is_mutable(a));
        before.is_none_or(|len| self.data(a, b, Some(len)) && self.anonymous(to, other, r.access))
            && self.anonymous(a, b, r.access)
    }

    fn address(&self, old: bool, target: Target<'d>) -> u64 {
        let side = if old { self.old } else { self.new };
        match target {
            Target::Data(at) => at,
            Target::Object(id, offset) => side.build.object(id).addr.wrapping_add_signed(offset),
            _ => 0,
        }
    }

    fn anonymous(&mut self, a: u64, b: u64, access: Access) -> bool {
        if self.old.is_mutable(a) || self.new.is_mutable(b) {
            return self.pairing.is_unnamed_pair(a, b);
        }
        match access {
            Access::Exact(len) => self.data(a, b, Some(u64::from(len))),
            Access::Extent if self.is_str(a, b) => {
                let len = self.old.str_end(a).map(|end| end - a);
                self.data(a, b, len)
            }
            _ => {
                let equal = self.data(a, b, self.doubted(a));
                if !equal {
                    self.unequal.push(a);
                }
                equal
            }
        }
    }

    /// How much of the unnamed data at `a` to compare, if it may go on behind its end, where something differs: as far as to
    /// something that is not in doubt. What is the same up to there is the same wherever it ends.
    fn doubted(&self, a: u64) -> Option<u64> {
        let doubtful = self.doubtful?;
        let (mut end, open) = self.old.compare_end(a);
        if !open || !doubtful.contains(&end) {
            return None;
        }
        let hard = self.old.build.next_bound(a);
        while end < hard && doubtful.contains(&end) {
            end = self.old.next_soft(end).min(hard);
        }
        Some(end - a)
    }

    /// Whether both are text of one length, and both functions hold that length as a number.
    fn is_str(&self, a: u64, b: u64) -> bool {
        let (Some((f, g)), Some(x), Some(y)) = (self.context, self.old.str_end(a), self.new.str_end(b)) else {
            return false;
        };
        let holds = |side: &Side<'d>, id: FuncId| {
            // The length of a `&str`, or of the text of a `fmt::Arguments` (doubled, with the lowest bit set).
            let numbers = &side.lifted[id as usize].numbers;
            u32::try_from(x - a).is_ok_and(|len| [len, len * 2 + 1].iter().any(|n| numbers.binary_search(n).is_ok()))
        };
        x - a == y - b && holds(self.old, f) && holds(self.new, g)
    }

    fn object_refs(&mut self, o: u32, p: u32, offset: i64, access: Access) -> bool {
        let (x, y) = (self.old.build.object(o), self.new.build.object(p));
        let (a, b, len, other) = (x.addr, y.addr, x.size, y.size);
        let paired = self.pairing.object_pair(o) == Some(p);
        let constant = len > 0 && !self.old.is_mutable(a) && !self.new.is_mutable(b);
        if !constant {
            return paired;
        }
        if len == other && (paired || offset >= 0) {
            return self.data(a, b, Some(len));
        }
        let (a, b) = (a.wrapping_add_signed(offset), b.wrapping_add_signed(offset));
        matches!(access, Access::Exact(_)) && self.anonymous(a, b, access) && !paired
    }

    /// Whether a reference to `f` in the old build means what one to `g` means in the new one.
    fn func_refs(&mut self, f: FuncId, g: FuncId) -> bool {
        if self.pairing.is_pair(f, g) {
            return true;
        }
        // Another name for the same body, provided that the old function keeps its meaning.
        match self.pairing.func_pair(f) {
            Some(own) => self.func_bodies(f, own) && self.func_bodies(f, g),
            None => self.func_bodies(f, g),
        }
    }

    /// Whether two functions have the same body.
    pub fn func_bodies(&mut self, f: FuncId, g: FuncId) -> bool {
        self.remembered(Key::Func(f, g), |this| {
            let context = this.context.replace((f, g));
            let equal = this.func_bodies_now(f, g);
            this.context = context;
            equal
        })
    }

    fn func_bodies_now(&mut self, f: FuncId, g: FuncId) -> bool {
        let (old, new) = (self.old, self.new);
        let (x, y) = (&old.lifted[f as usize], &new.lifted[g as usize]);
        if x.masked.len() != y.masked.len() || x.refs.len() != y.refs.len() {
            if self.padding_drift(f, g) {
                return true;
            }
            return self.differ(|| "its code".into());
        }
        if x.unexplained.is_some() || y.unexplained.is_some() {
            // Nothing is known of its references: only identical bytes at identical addresses would do.
            let same = old.build.code(f) == new.build.code(g) && x.unexplained == y.unexplained;
            if !same {
                let why = x.unexplained.clone().or_else(|| y.unexplained.clone()).unwrap_or_default();
                return self.differ(|| format!("its code, which is not understood ({why})"));
            }
        }
        let shape = |r: &Ref<'_>| (r.at, r.end, r.field, r.access, r.bias);
        if x.refs.iter().zip(&y.refs).any(|(r, s)| shape(r) != shape(s)) {
            if self.padding_drift(f, g) {
                return true;
            }
            return self.differ(|| "its code".into());
        }
        if x.masked != y.masked && !self.line_drift(f, g) {
            if self.padding_drift(f, g) {
                return true;
            }
            return self.differ(|| "its code".into());
        }
        for (r, s) in x.refs.iter().zip(&y.refs) {
            if !self.refs(r, s) {
                let (a, b) = (describe(old, r.target), describe(new, s.target));
                return self.differ(|| {
                    if a == b {
                        format!("the constant or data that it uses: {a}")
                    } else {
                        format!("it refers to {b}, no longer to {a}")
                    }
                });
            }
        }
        if !self.exception_tables(f, g) {
            return self.differ(|| "its exception table".into());
        }
        true
    }

    fn differ(&mut self, why: impl FnOnce() -> String) -> bool {
        if self.depth == 1 {
            self.why.get_or_insert_with(why);
        }
        false
    }

    /// Answers from memory, or asks. While an answer is being worked out, the same question is answered
    /// with yes; if the answer turns out to be no, every yes that may have rested on it is forgotten.
    fn remembered(&mut self, key: Key, ask: impl FnOnce(&mut Self) -> bool) -> bool {
        if let Some(known) = self.memo.get(&key) {
            return *known;
        }
        if self.depth >= MAX_DEPTH {
            return false;
        }
        self.memo.insert(key, true);
        let mark = self.trail.len();
        self.trail.push(key);
        self.depth += 1;
        let equal = ask(self);
        self.depth -= 1;
        if equal {
            if self.depth == 0 {
                self.trail.clear();
            }
        } else {
            for k in self.trail.drain(mark..) {
                self.memo.remove(&k);
            }
            self.memo.insert(key, false);
        }
        equal
    }
}

/// What is meant by an address that is used directly.
#[must_use]
pub fn place_of_address<'d>(side: &Side<'d>, at: u64) -> Place<'d> {
    Place::Pointer(crate::lift::resolve(&side.build, at, None))
}

/// What the slot at `at` holds, wherever it lies.
#[must_use]
pub fn place_of_slot<'d>(side: &Side<'d>, at: u64) -> Place<'d> {
    place(side, at, at)
}

impl<'d> Comparer<'_, 'd> {
    /// Whether the same address stands in two places.
    pub fn places(&mut self, a: Place<'d>, b: Place<'d>) -> bool {
        match (a, b) {
            (Place::Pointer(s), Place::Pointer(t)) => self.targets(s, t, Access::Extent),
            (Place::Import(m, x), Place::Import(n, y)) => x == y && self.same_import(m, n),
            _ => false,
        }
    }

    /// Whether both builds mean the same symbol of a library: name and version.
    pub(crate) fn same_import(&self, m: &str, n: &str) -> bool {
        m == n && self.old.build.import_version(m) == self.new.build.import_version(n)
    }
}

/// A target in words.
#[must_use]
pub fn describe(side: &Side<'_>, target: Target<'_>) -> String {
    match target {
        Target::Func(id, 0) => crate::build::demangle(side.build.func(id).name()),
        Target::Func(id, off) => format!("{}+{off:#x}", crate::build::demangle(side.build.func(id).name())),
        Target::Object(id, 0) => crate::build::demangle(side.build.object(id).name()),
        Target::Object(id, off) => format!("{}{off:+#x}", crate::build::demangle(side.build.object(id).name())),
        Target::Plt(name) | Target::Empty(name) => name.to_owned(),
        Target::Tls(id, _) => crate::build::demangle(side.build.tls[id as usize].name()),
        Target::Slot(at) => match side.build.dynamic.get(&at).map(|d| d.kind) {
            Some(crate::build::DynKind::Import(name, _)) => name.to_owned(),
            Some(crate::build::DynKind::Relative(to)) => describe(side, crate::lift::resolve(&side.build, to, None)),
            _ => "a slot of the global offset table".into(),
        },
        Target::Data(at) => {
            let len = side.extent_end(at).saturating_sub(at);
            let text = side.build.bytes(at, len.min(48)).map(|b| b.split(|c| *c == 0).next().unwrap_or(b));
            match text.filter(|t| t.len() > 2 && t.iter().all(|c| (0x20..0x7f).contains(c))) {
                Some(t) => format!("{:?}", String::from_utf8_lossy(t)),
                None => "unnamed data".into(),
            }
        }
        Target::TlsSlots(_, TlsFound::Own(id, _)) => crate::build::demangle(side.build.tls[id as usize].name()),
        Target::TlsSlots(_, TlsFound::Import(name, _)) => crate::build::demangle(name),
        Target::TlsSlots(_, TlsFound::Segment) => "its own thread-locals".into(),
        Target::Number(n) => format!("the number {n}"),
        Target::Unknown(at) => format!("the address {at:#x}"),
    }
}
