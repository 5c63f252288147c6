//! The contract between what runs and what comes: signatures, layouts, virtual
//! tables and state machines of both builds, from their debug information.
//!
//! A change is refused unless it is proven that no object and no call of the
//! old contract meets the new code. What a type is called, where it stands and
//! how the compiler numbers it is no part of the contract.

mod after;
mod alive;
mod beside;
mod layout;
mod migrated;
mod numbered;
mod same;
mod signature;
mod vtable;

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::path::Path;

use livepatch::patch::StateVersion;

use crate::build::{demangle, FuncId};
use crate::diff::Diff;
use crate::pairing::Pairing;
use crate::report::Refusal;
use crate::select::{PieceKind, Selection};
use crate::side::Side;
use crate::types::{Depth, Digests, LayoutRecord, NameId, Static, Types};
pub use after::{after, living};
use numbered::Numbered;
use same::Compare;

/// Everything that the guard looks at.
#[derive(Clone, Copy)]
pub struct Inputs<'a, 'd> {
    /// The old build.
    pub old: &'a Side<'d>,
    /// The new build.
    pub new: &'a Side<'d>,
    /// Which is which.
    pub pairing: &'a Pairing,
    /// What changed.
    pub diff: &'a Diff,
    /// What the patch carries.
    pub selection: &'a Selection,
    /// Path and bytes of both files.
    pub files: [(&'a Path, &'a [u8]); 2],
    /// The types of both builds.
    pub types: [&'a Types; 2],
}

/// What the guard says.
#[derive(Clone, Debug, Default)]
pub struct Contract {
    /// Reasons to refuse.
    pub refusals: Vec<Refusal>,
    /// What differs and does no harm.
    pub notes: Vec<String>,
    /// Old functions whose new version has another signature; only the patch calls them.
    pub unlike: BTreeSet<FuncId>,
    /// Every type with another layout, whoever mentions it.
    pub changed_layouts: BTreeSet<String>,
    /// Types with another layout that functions of the patch mention, by the function's id in the new build.
    pub layouts_used: BTreeMap<FuncId, Vec<String>>,
    /// How many types were compared.
    pub compared_types: usize,
    /// How many signatures were compared.
    pub compared_signatures: usize,
    /// Layouts that the new build has and the old one has not: what the patch brings.
    pub layouts: Vec<LayoutRecord>,
    /// The digest of the type of each new static, by its place in the new build; without those whose type is unknown.
    pub statics: BTreeMap<u64, String>,
    /// The states that the new build declares.
    pub states: Vec<StateVersion>,
}

impl Contract {
    /// The types on which old and new functions of the patch do not agree, each once.
    #[must_use]
    pub fn together(&self) -> Vec<String> {
        let all: BTreeSet<&String> = self.layouts_used.values().flatten().chain(&self.changed_layouts).collect();
        all.into_iter().map(|name| format!("the layout of {name}")).collect()
    }

    /// One line for the report and the manifest; `allowed` are the refusals that somebody answers for.
    #[must_use]
    pub fn summary(&self, allowed: &[String]) -> String {
        let untyped = allowed.iter().filter(|a| a.starts_with("no-types")).count();
        match (self.compared_types, untyped) {
            (0, 0) => "nothing to compare".into(),
            (0, _) => "not compared (allowed)".into(),
            (types, 0) => format!("compared: {types} types, {} signatures", self.compared_signatures),
            (types, n) => format!(
                "compared: {types} types, {} signatures; {n} functions not compared (allowed)",
                self.compared_signatures
            ),
        }
    }
}

/// Reads the types of a build as far as the guard needs them.
#[must_use]
pub fn read(path: &Path, bytes: &[u8]) -> Types {
    Types::read(path, bytes, Depth::Contracts)
}

/// Whether a type is the state of an `async` function or block, or of another coroutine of Rust.
pub(crate) fn is_state_machine(name: &str) -> bool {
    let last = name.rsplit("::").next().unwrap_or(name);
    ["{async_", "{coroutine", "{gen_", "{generator"].iter().any(|p| last.starts_with(p))
}

/// The type's name as a person writes it.
fn bare(name: &str) -> &str {
    ["struct ", "union ", "enum "].iter().find_map(|k| name.strip_prefix(k)).unwrap_or(name)
}

/// Checks the contract.
#[must_use]
pub fn check(inputs: Inputs<'_, '_>) -> Contract {
    let [old, new] = inputs.types;
    let compare = Compare::new(old, new, learn(inputs));
    let states = [(old, inputs.old), (new, inputs.new)].map(|(types, side)| migrated::declared(types, &side.build));
    let mut guard = Guard { inputs, compare, changed: BTreeSet::new(), states, out: Contract::default() };
    guard.out.states = migrated::versions(&guard.states[0], &guard.states[1]);
    if inputs.selection.functions.is_empty() {
        return guard.out;
    }
    guard.no_types();
    guard.signatures();
    guard.statics();
    guard.trait_tables();
    layout::check(&mut guard);
    guard.out.changed_layouts = guard.changed.iter().map(|id| bare(new.name(*id)).to_owned()).collect();
    guard.coroutines();
    guard.brought();
    let out = &mut guard.out;
    out.refusals.sort_by(|a, b| (&a.rule, &a.symbol).cmp(&(&b.rule, &b.symbol)));
    out.notes.sort();
    out.notes.dedup();
    guard.out
}

/// Learns from paired functions which numbered names belong together.
fn learn(inputs: Inputs<'_, '_>) -> Numbered {
    let [old, new] = inputs.types;
    let mut out = Numbered::default();
    for (id, f) in inputs.old.build.funcs.iter().enumerate() {
        let Some(g) = inputs.pairing.func_pair(id as u32) else { continue };
        let g = inputs.new.build.func(g);
        if let (Some(a), Some(b)) = (old.function_at(f.addr), new.function_at(g.addr)) {
            out.learn(old.name(a.name), new.name(b.name));
        }
    }
    out
}

struct Guard<'a, 'd> {
    inputs: Inputs<'a, 'd>,
    compare: Compare<'a>,
    /// Types of the new build whose layout differs from the old one's.
    changed: BTreeSet<NameId>,
    /// The states that both builds declare.
    states: [Vec<migrated::Declared>; 2],
    out: Contract,
}

impl Guard<'_, '_> {
    /// The types of the states that the patch migrates, in the old build and in the new one.
    fn migrated(&self) -> [HashSet<String>; 2] {
        let migrates = |id: &str| self.out.states.iter().any(|s| s.id == id && s.migrates());
        let of = |all: &[migrated::Declared]| all.iter().filter(|d| migrates(&d.id)).map(|d| d.of.clone()).collect();
        [of(&self.states[0]), of(&self.states[1])]
    }
}

impl Guard<'_, '_> {
    fn refuse(&mut self, rule: &str, symbol: &str, message: String, both: (String, String), remedy: &str) {
        let (old, new) = both;
        let text = |t: String| Some(t).filter(|t| !t.is_empty());
        let remedy = format!("{remedy}; if the change does not matter to what runs: --allow '{rule}:{symbol}'");
        self.out.refusals.push(Refusal {
            rule: rule.into(),
            symbol: symbol.into(),
            message,
            remedy,
            old: text(old),
            new: text(new),
        });
    }

    /// Every replaced function must have type information in both builds.
    fn no_types(&mut self) {
        let [old, new] = self.inputs.types;
        let (old_side, new_side) = (self.inputs.old, self.inputs.new);
        let mut untyped = Vec::new();
        for carried in self.inputs.selection.functions.values().filter(|c| !c.part) {
            for f in &carried.olds {
                let (a, b) = (old_side.build.func(*f), new_side.build.func(carried.new));
                let missing: Vec<&str> = [(old, a.addr, "old"), (new, b.addr, "new")]
                    .iter()
                    .filter(|(types, addr, _)| !types.is_typed(*addr))
                    .map(|(_, _, which)| *which)
                    .collect();
                if !missing.is_empty() {
                    untyped.push((demangle(a.name()), missing.join(" and the ")));
                }
            }
        }
        let lost = old.missing_splits.iter().chain(&new.missing_splits).next();
        let elsewhere = old.elsewhere.as_ref().or(new.elsewhere.as_ref());
        let remedy = match lost {
            _ if elsewhere.is_some() => format!(
                "part of the debug information is in {}, which this version does not read: give the builds as they were before dwz -m",
                elsewhere.map_or("", String::as_str)
            ),
            Some(name) => format!("keep the split debug information beside the build ({name} is not found)"),
            None => "build both with -g (Rust: debug = 2)".to_owned(),
        };
        for (name, which) in untyped {
            let message =
                format!("{name} has no type information in the {which} build: what it and its callers agree on can't be compared");
            self.refuse("no-types", &name, message, Default::default(), &remedy);
        }
    }

    /// Whoever is called from outside the patch keeps its contract.
    fn signatures(&mut self) {
        let [old, new] = self.inputs.types;
        for carried in self.inputs.selection.functions.values().filter(|c| !c.part) {
            let g = self.inputs.new.build.func(carried.new);
            for f in &carried.olds {
                let jumped_to = self.inputs.selection.entries.get(f).is_some_and(|e| e.at.is_some());
                let func = self.inputs.old.build.func(*f);
                let (Some(a), Some(b)) = (old.function_at(func.addr), new.function_at(g.addr)) else { continue };
                self.out.compared_signatures += 1;
                let found = signature::compare(&mut self.compare, a, b);
                let name = demangle(func.name());
                if !jumped_to {
                    if !found.wrong.is_empty() {
                        self.out.unlike.insert(*f);
                        self.out.notes.push(format!("{name} changes its signature; only the patch calls it"));
                    }
                    continue;
                }
                self.out.notes.extend(found.notes.iter().map(|n| format!("{name}: {n}")));
                if found.wrong.is_empty() {
                    continue;
                }
                let short = |types: &Types, f: &crate::types::Function| {
                    let path = types.name(f.name);
                    format!(
                        "{}\n         {}",
                        types.show_signature(path, &f.signature, &f.param_names),
                        types.place(f.at)
                    )
                };
                let message = format!(
                    "{name} is called by code that is not in the patch, or its address is held, and its signature changes: {}",
                    found.wrong.join("; ")
                );
                let both = (short(old, a), short(new, b));
                self.refuse(
                    "signature",
                    &name,
                    message,
                    both,
                    "keep the signature and give the new one another name, or change every caller",
                );
            }
        }
    }

    /// Statics of both builds that are versions of each other.
    fn static_pairs(&self) -> Vec<(Static, Static)> {
        let [old, new] = self.inputs.types;
        let (a, b) = (&self.inputs.old.build, &self.inputs.new.build);
        type Places<'t> = HashMap<(u64, bool), Vec<&'t Static>>;
        fn places(types: &Types) -> Places<'_> {
            let mut out = Places::new();
            for s in &types.statics {
                out.entry((s.addr, s.tls)).or_default().push(s);
            }
            out
        }
        let (olds, news) = (places(old), places(new));
        let mut out = Vec::new();
        for s in &old.statics {
            let to = if s.tls {
                let id = a.tls.iter().position(|t| t.addr == s.addr);
                id.and_then(|id| self.inputs.pairing.tls_pair(id as u32)).map(|id| {
                    let (x, y) = (a.tls.iter().find(|t| t.addr == s.addr), &b.tls[id as usize]);
                    (y.addr, x.is_some_and(|x| x.size == y.size))
                })
            } else {
                let id = a.object_at(s.addr).filter(|id| a.object(*id).addr == s.addr);
                id.and_then(|id| self.inputs.pairing.object_pair(id).map(|new| (id, new)))
                    .map(|(id, new)| (b.object(new).addr, a.object(id).size == b.object(new).size))
            };
            // Another size is refused by a rule of its own.
            if let Some((addr, true)) = to {
                let there = news.get(&(addr, s.tls)).map_or(&[][..], Vec::as_slice);
                // What the linker dropped is said to lie where something else does: only the name tells.
                let alone = there.len() == 1 && olds.get(&(s.addr, s.tls)).is_some_and(|o| o.len() == 1);
                let (name, _) = self.compare.translate(old.name(s.name));
                let other = there.iter().find(|n| alone || new.name(n.name) == name);
                out.extend(other.map(|n| (s.clone(), (*n).clone())));
            }
        }
        out
    }

    /// Existing data keeps its bits, so it must keep its type.
    fn statics(&mut self) {
        let [old, new] = self.inputs.types;
        for (a, b) in self.static_pairs() {
            let mutable = a.tls || self.inputs.old.is_mutable(a.addr) || self.inputs.new.is_mutable(b.addr);
            if !mutable || self.compare.tys(a.ty, b.ty) {
                continue;
            }
            let name = old.name(a.name).to_owned();
            let message = format!("the variable {name} keeps its bits and changes its type");
            let both = (
                format!("{}\n{}", old.place(a.at), old.show(a.ty)),
                format!("{}\n{}", new.place(b.at), new.show(b.ty)),
            );
            self.refuse(
                "layout",
                &name,
                message,
                both,
                "keep the old variable and add a new one of the new type, or restart",
            );
        }
    }

    /// Trait objects made before the patch keep their tables.
    fn trait_tables(&mut self) {
        const MARK: &str = "::{vtable}";
        let [old, new] = self.inputs.types;
        // Each unit may have a table of its own, with other copies of the methods, or bodies merged with others.
        let mut news: HashMap<&str, Vec<&Static>> = HashMap::new();
        for s in new.statics.iter().filter(|s| new.name(s.name).ends_with(MARK)) {
            news.entry(new.name(s.name)).or_default().push(s);
        }
        let mut found = BTreeMap::new();
        for s in old.statics.iter().filter(|s| old.name(s.name).ends_with(MARK)) {
            let name = old.name(s.name);
            let (translated, certain) = self.compare.translate(name);
            let Some(others) = news.get(translated.as_str()).filter(|_| certain) else { continue };
            let sides = (self.inputs.old, self.inputs.new);
            let compare = |other| vtable::compare(&self.compare, sides, self.inputs.pairing, (s, other));
            let nearest = others.iter().map(|other| compare(other)).min_by_key(Vec::len).unwrap_or_default();
            if !nearest.is_empty() {
                found.entry(name.trim_end_matches(MARK).to_owned()).or_insert(nearest);
            }
        }
        for (name, differs) in found {
            let message = format!(
                "the table of methods of {name} changes, and objects that exist keep the old one: {}",
                differs.join("; ")
            );
            self.refuse(
                "vtable",
                &name,
                message,
                Default::default(),
                "keep the methods of the trait and their order, or restart",
            );
        }
    }

    /// A C++20 coroutine that changes must keep its frame.
    fn coroutines(&mut self) {
        let [old, new] = self.inputs.types;
        let mut refused = BTreeSet::new();
        for carried in self.inputs.selection.functions.values() {
            for f in &carried.olds {
                let func = self.inputs.old.build.func(*f);
                let name = func.name();
                let resumed = [".actor", ".resume", ".destroy", ".cleanup"].iter().any(|s| name.ends_with(s));
                if !resumed || !name.starts_with("_Z") {
                    continue;
                }
                let stem = &name[..name.rfind('.').unwrap_or(name.len())];
                let g = self.inputs.new.build.func(carried.new);
                let frame = |types: &Types, addr: u64| {
                    let f = types.function_at(addr)?;
                    f.signature.params.iter().find_map(|p| match types.ty(*p) {
                        crate::types::Ty::Pointer(_, to) => types.name_of(*to).filter(|n| !types.defs(*n).is_empty()),
                        _ => None,
                    })
                };
                let equal = match (frame(old, func.addr), frame(new, g.addr)) {
                    (Some(a), Some(b)) => {
                        let (x, y) = (old.defs(a), new.defs(b));
                        x.len() == y.len()
                            && x.iter().all(|d| {
                                y.iter().any(|e| {
                                    let difference = self.compare.layouts(&d.layout, &e.layout);
                                    difference.is_none()
                                })
                            })
                    }
                    _ => false,
                };
                if !equal && refused.insert(stem.to_owned()) {
                    let symbol = demangle(stem);
                    let message = format!(
                        "the coroutine {symbol} changes, and it can't be proven that a frame that is suspended fits the new code"
                    );
                    self.refuse(
                        "coroutine",
                        &symbol,
                        message,
                        Default::default(),
                        "patch what it calls instead, or restart",
                    );
                }
            }
        }
    }

    /// The layouts that the new build brings: of types that are new, or that changed.
    fn brought(&mut self) {
        let [old, new] = self.inputs.types;
        let mut digests = Digests::new(new);
        for name in new.defined() {
            let known = old.name_id(new.name(name)).is_some_and(|n| !old.defs(n).is_empty());
            if !known || self.changed.contains(&name) {
                let records = new.defs(name).iter().map(|def| digests.record(name, def));
                self.out.layouts.extend(records);
            }
        }
        self.out.layouts.sort_by(|a, b| (&a.name, &a.digest).cmp(&(&b.name, &b.digest)));
        self.out.layouts.dedup_by(|a, b| (&a.name, &a.digest) == (&b.name, &b.digest));
        let pieces = self.inputs.selection.pieces.iter().filter(|p| p.kind == PieceKind::Static);
        let digests = after::types_at(new, pieces.filter_map(|p| p.from).collect());
        self.out.statics = digests.into_iter().map(|(at, ty)| (at, new.type_digest(ty))).collect();
    }
}
