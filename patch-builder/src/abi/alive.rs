//! Whether objects of a type can outlive the calls that the patch replaces.
//!
//! The answer is "no" only where it is proven: every function that mentions the
//! type, in either build, is in the patch (or runs only while one of the patch
//! runs), and the type occurs in no static, behind no stored pointer, in no
//! container and in no type-erased object. In C and C++ any pointer to it
//! other than a parameter denies it.

use std::cell::OnceCell;
use std::collections::{BTreeSet, HashMap, HashSet};

use crate::build::{DynKind, FuncId};
use crate::lift::{Access, Target};
use crate::side::Side;
use crate::types::{Def, Field, Layout, NameId, PointerKind, Role, Ty, TyId, Types};

/// One build, and which of its functions the patch replaces or brings.
pub struct Build<'a, 'd> {
    pub types: &'a Types,
    pub side: &'a Side<'d>,
    pub patched: BTreeSet<FuncId>,
    /// Those of them that are entered from outside of the patch.
    pub entered: BTreeSet<FuncId>,
}

/// How a type expression leads to a set of names.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Lead {
    No,
    /// As a parameter of a function type.
    Through,
    /// Behind a reference of Rust.
    Borrowed,
    /// Behind a pointer or a C++ reference.
    Pointed,
    /// It holds one.
    Held,
}

/// What every question about one build needs.
pub struct Alive<'a, 'd> {
    build: Build<'a, 'd>,
    /// Functions in whose frames no old object can be when the patch goes in.
    covered: BTreeSet<FuncId>,
    /// The definitions that mention each name, once somebody asks.
    mentioned_by: OnceCell<HashMap<NameId, Vec<NameId>>>,
}

impl<'a, 'd> Alive<'a, 'd> {
    pub fn new(build: Build<'a, 'd>) -> Self {
        let covered = covered(build.side, &build.patched);
        Self { build, covered, mentioned_by: OnceCell::new() }
    }

    /// The types of the build.
    pub(super) fn types(&self) -> &Types {
        self.build.types
    }

    /// The build.
    pub(super) fn build(&self) -> &crate::build::Build<'d> {
        &self.build.side.build
    }

    /// Who calls whom in it.
    pub(super) fn calls(&self) -> Calls {
        calls(self.build.side)
    }

    /// Why objects of the type `root`, defined at `place`, may be alive; `None` if that is ruled out.
    pub fn why(&self, root: NameId, place: &str) -> Option<String> {
        let types = self.build.types;
        // Units in which the name means another type.
        let (own, other): (Vec<&Def>, Vec<&Def>) =
            types.defs(root).iter().partition(|d| d.files.iter().any(|at| types.place(*at) == place));
        let own: BTreeSet<u32> = own.iter().flat_map(|d| d.units.iter().copied()).collect();
        let foreign: BTreeSet<u32> =
            other.iter().flat_map(|d| d.units.iter().copied()).filter(|u| !own.contains(u)).collect();
        // Types that hold one, and (in Rust) types that borrow one: they must not outlive the calls, either.
        let defined = types.defined();
        let within = self.holders(root, &defined);
        let mut names: Vec<NameId> = within.iter().copied().collect();
        names.sort_unstable_by(|a, b| types.name(*a).cmp(types.name(*b)));
        self.in_state_machine(&names)
            .or_else(|| self.in_statics(&within, &names, &foreign))
            .or_else(|| self.in_definitions(&defined, &within, &foreign))
            .or_else(|| self.in_functions(&within, &foreign))
            .or_else(|| {
                let cast = names.iter().find(|n| types.cast_to.contains(n))?;
                Some(format!("something is cast to {}", types.name(*cast)))
            })
    }

    /// The type and what holds one, directly or not.
    fn holders(&self, root: NameId, defined: &[NameId]) -> HashSet<NameId> {
        let types = self.build.types;
        let mut within: HashSet<NameId> = HashSet::from([root]);
        let mentioned_by = self.mentioned_by.get_or_init(|| mentioned_by(types, defined));
        // What was found since holders of it were looked for; at first, everything is looked at once.
        let mut open: Vec<NameId> = Vec::new();
        let look = |names: &[NameId], within: &mut HashSet<NameId>, open: &mut Vec<NameId>| {
            for name in names {
                let wide = types.name(*name).starts_with('&');
                if !within.contains(name) && types.defs(*name).iter().any(|d| self.holds(&d.layout, within, wide)) {
                    within.insert(*name);
                    open.push(*name);
                }
            }
        };
        look(defined, &mut within, &mut open);
        while let Some(found) = open.pop() {
            look(mentioned_by.get(&found).map_or(&[][..], |v| v), &mut within, &mut open);
        }
        within
    }

    pub(super) fn lead(&self, ty: TyId, within: &HashSet<NameId>, depth: u32) -> Lead {
        let types = self.build.types;
        if depth > 40 {
            return Lead::Held;
        }
        let inner = |t: TyId| self.lead(t, within, depth + 1);
        match types.ty(ty) {
            Ty::Named(name) if within.contains(name) => Lead::Held,
            Ty::Void | Ty::Base(..) | Ty::Opaque(_) | Ty::Named(_) => Lead::No,
            Ty::Pointer(kind, to) => match (kind, inner(*to)) {
                (_, Lead::No) => Lead::No,
                (_, Lead::Through) => Lead::Through,
                (PointerKind::Borrow, Lead::Held | Lead::Borrowed) => Lead::Borrowed,
                _ => Lead::Pointed,
            },
            Ty::Array(of, _) => inner(*of),
            // An offset into an object is as good as a pointer to it.
            Ty::Member(of, class) if inner(*of) == Lead::No && inner(*class) == Lead::No => Lead::No,
            Ty::Member(..) => Lead::Pointed,
            Ty::Function(s) => {
                let any = s.params.iter().chain([&s.returns]).any(|t| inner(*t) != Lead::No);
                if any {
                    Lead::Through
                } else {
                    Lead::No
                }
            }
            Ty::Inline(layout) => fields(layout).map(|f| self.lead(f.ty, within, depth + 1)).max().unwrap_or(Lead::No),
        }
    }

    /// Whether a definition holds or borrows one of them. A `wide` reference of Rust is a struct with a pointer.
    fn holds(&self, layout: &Layout, within: &HashSet<NameId>, wide: bool) -> bool {
        fields(layout).any(|f| match self.lead(f.ty, within, 0) {
            Lead::Held | Lead::Borrowed => true,
            Lead::Pointed => wide,
            Lead::No | Lead::Through => false,
        })
    }

    pub(super) fn in_state_machine(&self, names: &[NameId]) -> Option<String> {
        let name = names.iter().map(|n| self.build.types.name(*n)).find(|n| super::is_state_machine(n))?;
        Some(format!("the future {name} keeps one"))
    }

    pub(super) fn in_statics(
        &self,
        within: &HashSet<NameId>,
        names: &[NameId],
        foreign: &BTreeSet<u32>,
    ) -> Option<String> {
        let types = self.build.types;
        for s in types.statics.iter().filter(|s| !foreign.contains(&s.unit)) {
            let name = types.name(s.name);
            match self.lead(s.ty, within, 0) {
                Lead::No | Lead::Through => {}
                _ => return Some(format!("the static {name} ({}) refers to one", types.place(s.at))),
            }
            if let Some(object) = name.strip_suffix("::{vtable}").and_then(|n| n.strip_prefix('<')) {
                if let Some(n) = names
                    .iter()
                    .find(|n| object.strip_prefix(types.name(**n)).is_some_and(|rest| rest.starts_with(" as ")))
                {
                    return Some(format!("{} is used as a trait object ({name})", types.name(*n)));
                }
            }
        }
        None
    }

    fn in_definitions(&self, defined: &[NameId], within: &HashSet<NameId>, foreign: &BTreeSet<u32>) -> Option<String> {
        let types = self.build.types;
        for name in defined {
            for def in types.defs(*name).iter().filter(|d| foreign.is_empty() || !d.units.is_subset(foreign)) {
                let inside = within.contains(name);
                if inside && types.name(*name).starts_with('&') {
                    continue;
                }
                for f in fields(&def.layout) {
                    if self.lead(f.ty, within, 0) == Lead::Pointed {
                        let place = def.files.first().map_or_else(String::new, |at| types.place(*at));
                        return Some(format!(
                            "{} of {} ({place}) points to one",
                            types.name(f.name),
                            types.name(*name)
                        ));
                    }
                }
                // A container that keeps it out of sight.
                let kept = |t: &TyId| matches!(self.lead(*t, within, 0), Lead::Held | Lead::Pointed);
                if !inside && def.layout.params.iter().any(kept) {
                    return Some(format!("{} may keep one", types.name(*name)));
                }
            }
        }
        None
    }

    fn in_functions(&self, within: &HashSet<NameId>, foreign: &BTreeSet<u32>) -> Option<String> {
        let types = self.build.types;
        let mut known: HashMap<TyId, Lead> = HashMap::new();
        let mut starts: HashMap<u32, Vec<u64>> = HashMap::new();
        for (addr, f) in &types.by_addr {
            starts.entry(*f).or_default().push(*addr);
        }
        for (id, f) in types.functions.iter().enumerate().filter(|(_, f)| !foreign.contains(&f.unit)) {
            let mut mentioned = false;
            for m in &f.mentions {
                let lead = *known.entry(m.ty).or_insert_with(|| self.lead(m.ty, within, 0));
                mentioned |= !matches!(lead, Lead::No | Lead::Through);
                if lead == Lead::Pointed && m.role != Role::Param && !self.is_rust(m.ty) {
                    let what = if m.role == Role::Local { "a variable of" } else { "what is returned by" };
                    return Some(format!("{what} {} ({}) points to one", types.name(f.name), types.place(f.at)));
                }
            }
            if !mentioned {
                continue;
            }
            let here = || format!("{} ({})", types.name(f.name), types.place(f.at));
            let ids = starts.get(&(id as u32)).into_iter().flatten().filter_map(|a| self.build.side.build.func_at(*a));
            let ids: Vec<FuncId> = ids.collect();
            let takes = f.signature.params.iter().chain([&f.signature.returns]);
            let mut takes = takes.filter(|t| !matches!(self.lead(**t, within, 0), Lead::No | Lead::Through));
            if takes.next().is_some() && ids.iter().any(|f| self.build.entered.contains(f)) {
                return Some(format!("{} takes or returns one and is called from outside of the patch", here()));
            }
            if ids.iter().any(|f| !self.covered.contains(f)) {
                return Some(format!("{} uses it and is not in the patch", here()));
            }
        }
        None
    }

    /// Rust's inlined library code handles raw pointers to what lives on stacks; what keeps one is a type of its own.
    fn is_rust(&self, ty: TyId) -> bool {
        let types = self.build.types;
        match types.ty(ty) {
            Ty::Pointer(_, to) => self.is_rust(*to),
            Ty::Named(name) => types.defs(*name).iter().all(|d| d.layout.align != 0),
            _ => false,
        }
    }
}

/// Fields, discriminants and what variants hold.
pub(super) fn fields(layout: &Layout) -> impl Iterator<Item = &Field> {
    let arms = layout.variants.iter().flat_map(|v| v.arms.iter().map(|a| &a.field).chain(&v.discr));
    layout.fields.iter().chain(arms)
}

/// Who calls whom, and whose address is held.
pub(super) struct Calls {
    /// By a call or a jump.
    pub callers: HashMap<FuncId, BTreeSet<FuncId>>,
    /// Those that are jumped to: their caller has no frame then.
    pub jumped: HashSet<FuncId>,
    /// Those that data or code holds the address of, or that are exported.
    pub held: HashSet<FuncId>,
}

fn calls(side: &Side<'_>) -> Calls {
    let build = &side.build;
    let mut callers: HashMap<FuncId, BTreeSet<FuncId>> = HashMap::new();
    let (mut jumped, mut held) = (HashSet::new(), HashSet::new());
    for (h, lifted) in side.lifted.iter().enumerate() {
        let h = h as FuncId;
        for r in &lifted.refs {
            match r.target {
                Target::Func(f, 0) if r.access == Access::Branch => {
                    let opcode = (r.at as usize).checked_sub(1).and_then(|i| lifted.masked.get(i));
                    callers.entry(f).or_default().insert(h);
                    if opcode != Some(&0xe8) && f != h {
                        jumped.insert(f);
                    }
                }
                Target::Func(f, _) => {
                    held.insert(f);
                }
                Target::Slot(at) => {
                    if let crate::compare::Place::Pointer(Target::Func(f, _)) = crate::compare::slot(side, at) {
                        held.insert(f);
                    }
                }
                _ => {}
            }
        }
    }
    let mut pointed = |to: u64| held.extend(build.func_at(to));
    for r in build.dynamic.values() {
        match r.kind {
            DynKind::Relative(to) | DynKind::Own(to, _) | DynKind::Ifunc(to) => pointed(to),
            _ => {}
        }
    }
    build.relocs.iter().filter(|r| r.kind == 1).for_each(|r| {
        pointed(build.rel_sym(r).value.wrapping_add_signed(r.addend));
    });
    build.exported.iter().for_each(|at| pointed(*at));
    pointed(build.entry);
    Calls { callers, jumped, held }
}

/// The patched functions, and those that run only while one of these has a frame: called (never jumped to) by such
/// functions alone, and held by nobody.
fn covered(side: &Side<'_>, patched: &BTreeSet<FuncId>) -> BTreeSet<FuncId> {
    let Calls { mut callers, jumped, held } = calls(side);
    let open: HashSet<FuncId> = jumped.into_iter().chain(held).collect();
    callers.retain(|f, _| !open.contains(f));
    let mut out: BTreeSet<FuncId> = callers.keys().copied().collect();
    out.extend(patched);
    // One that anything outside calls is outside, and so are then those that it calls.
    let mut calls: HashMap<FuncId, Vec<FuncId>> = HashMap::new();
    for (f, by) in &callers {
        by.iter().for_each(|h| calls.entry(*h).or_default().push(*f));
    }
    let is_outside = |f: &FuncId, out: &BTreeSet<FuncId>| {
        !patched.contains(f) && callers.get(f).is_none_or(|by| by.iter().any(|h| !out.contains(h)))
    };
    let mut gone: Vec<FuncId> = out.iter().copied().filter(|f| is_outside(f, &out)).collect();
    gone.iter().for_each(|f| {
        out.remove(f);
    });
    while let Some(h) = gone.pop() {
        for f in calls.get(&h).into_iter().flatten() {
            if !patched.contains(f) && out.remove(f) {
                gone.push(*f);
            }
        }
    }
    out
}

/// For each name, the names whose definitions mention it in any way.
fn mentioned_by(types: &Types, defined: &[NameId]) -> HashMap<NameId, Vec<NameId>> {
    let mut out: HashMap<NameId, Vec<NameId>> = HashMap::new();
    for name in defined {
        let mut open: Vec<TyId> = types.defs(*name).iter().flat_map(|d| fields(&d.layout)).map(|f| f.ty).collect();
        let mut seen: HashSet<TyId> = HashSet::new();
        while let Some(ty) = open.pop() {
            if !seen.insert(ty) {
                continue;
            }
            match types.ty(ty) {
                Ty::Void | Ty::Base(..) | Ty::Opaque(_) => {}
                Ty::Named(part) => out.entry(*part).or_default().push(*name),
                Ty::Pointer(_, to) | Ty::Array(to, _) => open.push(*to),
                Ty::Member(of, class) => open.extend([*of, *class]),
                Ty::Function(s) => open.extend(s.params.iter().chain([&s.returns])),
                Ty::Inline(layout) => open.extend(fields(layout).map(|f| f.ty)),
            }
        }
    }
    out
}
