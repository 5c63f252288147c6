//! What the patch must carry, and what each reference in it is bound to.
//!
//! Code and constants that changed are carried; everything else is bound to
//! the old image: existing data always, unchanged functions, and the address
//! of any function that the old build has, so that a function keeps one identity.

mod after;
mod bind;
mod hooks;
mod imports;
mod jumps;
mod slots;

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};

use livepatch::patch::{HookKind, Import, PatchFile};

use crate::build::{demangle, FastMap, Fde, FuncId, ObjFrame, ObjId, Personality, Relocatable};
use crate::compare::{Comparer, LineProof};
use crate::diff::{companions, Diff};
use crate::lift::{Access, Field, Target};
use crate::pairing::Pairing;
use crate::report::Refusal;
use crate::side::Side;

pub use jumps::EntryPlan;

/// What a reference of the patch is bound to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Bound {
    /// An address of the old image.
    Image(u64),
    /// A function of the patch, and how far behind its start.
    Func(FuncId, i64),
    /// A piece of data of the patch, and how far behind its start.
    Piece(usize, i64),
    /// An import that the engine finds, by its index in [`Selection::imports`], and an addend.
    Import(usize, i64),
    /// An offset in the previous patch.
    Previous(u64),
    /// Nothing: an undefined weak symbol.
    Null,
}

/// How a bound reference is stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Store {
    /// Four bytes relative to the place, plus this addend.
    Pc32(i64),
    /// One byte relative to its end; through an island behind the function.
    Pc8,
    /// Eight bytes absolute.
    Abs64,
    /// Four bytes absolute: only an address of an image that is not relocated.
    Abs32,
}

/// A reference within a function or a piece of data.
#[derive(Clone, Copy, Debug)]
pub struct Fixup {
    /// Where, from the start.
    pub at: u64,
    /// How it is stored.
    pub store: Store,
    /// What.
    pub to: Bound,
}

/// What a piece of data is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PieceKind {
    /// A constant.
    Constant,
    /// A slot that holds an address.
    Slot,
    /// A language-specific data area.
    Lsda,
    /// New static data.
    Static,
    /// A jump through a slot.
    Stub,
    /// Code of a hook object.
    HookCode,
}

/// A piece of data that the patch carries.
#[derive(Clone, Debug)]
pub struct Piece {
    /// What it is.
    pub kind: PieceKind,
    /// Its symbol, or a description.
    pub name: String,
    /// The source file, for a local static.
    pub file: Option<String>,
    /// Where it is in the new build; `None` if it is of another object.
    pub from: Option<u64>,
    /// Alignment in bytes, a power of two.
    pub align: u64,
    /// Its bytes; all zero for `.bss`.
    pub bytes: Vec<u8>,
    /// References in it.
    pub fixups: Vec<Fixup>,
}

/// A function that the patch carries.
#[derive(Clone, Debug)]
pub struct Carried {
    /// The function, in the new build.
    pub new: FuncId,
    /// The old versions that it replaces.
    pub olds: Vec<FuncId>,
    /// Why it is in the patch.
    pub reason: String,
    /// Its bytes, references zeroed.
    pub bytes: Vec<u8>,
    /// Its references.
    pub fixups: Vec<Fixup>,
    /// Its language-specific data area.
    pub lsda: Option<usize>,
    /// Its personality routine: an address of the old image, and whether that is a slot.
    pub personality: Option<(u64, bool)>,
    /// Whether it is an out-of-line part of another function.
    pub part: bool,
}

/// Bytes of an island: a `jmp rel32` behind a function that a short branch is led over.
const ISLAND_LEN: u64 = 5;

impl Carried {
    /// Its length with the islands of its short branches behind it.
    #[must_use]
    pub fn len_with_islands(&self) -> u64 {
        let islands = self.fixups.iter().filter(|f| f.store == Store::Pc8).count() as u64;
        self.bytes.len() as u64 + islands * ISLAND_LEN
    }
}

/// An entry of the unwind table for code of a hook object.
#[derive(Clone, Debug)]
pub struct ForeignFrame {
    /// The piece that holds the code.
    pub piece: usize,
    /// How it is unwound; its places are those of the object.
    pub frame: ObjFrame,
    /// Its personality routine, and whether that is a slot.
    pub personality: Option<(Bound, bool)>,
    /// Piece and offset of its language-specific data area.
    pub lsda: Option<(usize, u64)>,
}

impl ForeignFrame {
    /// As the unwind table of a build has it.
    #[must_use]
    pub fn fde(&self) -> Fde<'_> {
        let f = &self.frame;
        Fde {
            start: 0,
            len: f.len,
            initial: &f.instructions[0],
            instructions: &f.instructions[1],
            code_align: f.code_align,
            data_align: f.data_align,
            return_register: f.return_register,
            signal: f.signal,
            personality: None,
            lsda: None,
        }
    }
}

/// A function of a hook object.
#[derive(Clone, Debug)]
pub struct HookFunction {
    /// Its symbol.
    pub name: String,
    /// The piece that holds it, and where in it.
    pub piece: usize,
    /// Its offset in the piece.
    pub offset: u64,
    /// Its length.
    pub size: u64,
}

/// What goes into a patch besides what two builds differ in.
#[derive(Clone, Copy, Default)]
pub struct Extras<'x> {
    /// The object with hooks.
    pub hooks: Option<&'x Relocatable>,
    /// The patch that this one takes the place of.
    pub after: Option<&'x PatchFile>,
}

/// Everything that goes into the patch.
pub struct Selection {
    /// Functions, by the new build's order.
    pub functions: BTreeMap<FuncId, Carried>,
    /// Data.
    pub pieces: Vec<Piece>,
    /// What the engine must find in the libraries of the process.
    pub imports: Vec<Import>,
    /// The carried functions whose new address the patch takes.
    pub taken: BTreeSet<FuncId>,
    /// The hooks.
    pub hooks: Vec<(HookKind, Bound)>,
    /// Whether the hooks need the agent.
    pub hooks_need_agent: bool,
    /// The functions of the hook object.
    pub hook_functions: Vec<HookFunction>,
    /// Pieces that no build holds.
    pub foreign: Vec<usize>,
    /// The unwind table's entries for them.
    pub frames: Vec<ForeignFrame>,
    /// Functions of the previous patch, by index in its manifest, that lead to carried ones.
    pub redirects: Vec<(usize, FuncId)>,
    /// Statics of the previous patch, by index in its manifest, and what they are in the new build.
    pub living: Vec<(usize, ObjId)>,
    /// How each replaced old function's entry is treated.
    pub entries: BTreeMap<FuncId, EntryPlan>,
    /// Reasons not to write it.
    pub refusals: Vec<Refusal>,
}

/// Works out the selection.
#[must_use]
pub fn select(old: &Side<'_>, new: &Side<'_>, pairing: &Pairing, diff: &Diff, extras: Extras<'_>) -> Selection {
    let mut s = Selector {
        old,
        new,
        pairing,
        diff,
        comparer: Comparer::new(old, new, pairing, LineProof::Tables(&diff.lines.0, &diff.lines.1)),
        functions: BTreeMap::new(),
        queue: Vec::new(),
        pieces: Vec::new(),
        open: Vec::new(),
        piece_at: HashMap::new(),
        stub_of: HashMap::new(),
        bodies: None,
        address_taken: BTreeSet::new(),
        taken: BTreeSet::new(),
        imports: imports::import_slots(old),
        wanted: Vec::new(),
        old_type_slots: None,
        hooks: Vec::new(),
        hook_functions: Vec::new(),
        foreign: Vec::new(),
        frames: Vec::new(),
        redirects: Vec::new(),
        after: None,
        refusals: Vec::new(),
        current: String::new(),
    };
    s.after = extras.after.map(after::Previous::new);
    s.seed();
    s.hooks_of_build();
    s.held_functions();
    s.carry_all();
    if let Some(object) = extras.hooks {
        s.hooks_of_object(object);
        s.carry_all();
    }
    let living = s.living_statics();
    let entries = jumps::plan(old, new, diff, &s.functions, &s.address_taken, &mut s.refusals);
    s.refusals.sort_by(|a, b| (&a.rule, &a.symbol, &a.message).cmp(&(&b.rule, &b.symbol, &b.message)));
    s.refusals.dedup();
    let marks = |o: &Relocatable| o.symbols.iter().any(|s| s.name == AGENT_MARK && s.section.is_some());
    let has_mark = |side: &Side<'_>| side.build.objects.iter().any(|o| o.names.iter().any(|n| n.text == AGENT_MARK));
    let hooks_need_agent = extras.hooks.is_some_and(marks) || !s.hooks.is_empty() && has_mark(new) && !has_mark(old);
    Selection {
        functions: s.functions,
        pieces: s.pieces,
        imports: s.wanted,
        taken: s.taken,
        hooks: s.hooks,
        hooks_need_agent,
        hook_functions: s.hook_functions,
        foreign: s.foreign,
        frames: s.frames,
        redirects: s.redirects,
        living,
        entries,
        refusals: s.refusals,
    }
}

/// Hooks whose object, or new build, defines this symbol need the agent.
const AGENT_MARK: &str = "livepatch_hooks_need_agent";
/// The data symbols into which a function takes an address that may be walked on from.
fn walked(side: &Side<'_>, lifted: &crate::lift::Lifted<'_>) -> HashSet<ObjId> {
    let walks = |r: &crate::lift::Ref<'_>| match (r.access, r.target) {
        (Access::Branch | Access::Exact(_), _) => None,
        (_, Target::Object(id, offset)) => {
            (offset >= 0 && offset.cast_unsigned() < side.build.object(id).size).then_some(id)
        }
        _ => None,
    };
    lifted.refs.iter().filter_map(walks).collect()
}

struct Selector<'a, 'd> {
    old: &'a Side<'d>,
    new: &'a Side<'d>,
    pairing: &'a Pairing,
    diff: &'a Diff,
    comparer: Comparer<'a, 'd>,
    functions: BTreeMap<FuncId, Carried>,
    queue: Vec<FuncId>,
    pieces: Vec<Piece>,
    /// Pieces that are not whole yet, each but the first begun by the one before it.
    open: Vec<bind::Filling>,
    piece_at: HashMap<(u64, bool), (usize, i64)>,
    /// The stub of each import that has one.
    stub_of: HashMap<&'d str, usize>,
    /// The old functions of each body, once somebody asks.
    bodies: Option<FastMap<&'a [u8], Vec<FuncId>>>,
    /// Old functions whose address the patch takes.
    address_taken: BTreeSet<FuncId>,
    /// New functions whose address the patch takes.
    taken: BTreeSet<FuncId>,
    imports: imports::ImportSlots<'d>,
    /// Imports that the engine must find.
    wanted: Vec<Import>,
    /// The old image's slots with addresses of types, once they were needed.
    old_type_slots: Option<Vec<u64>>,
    hooks: Vec<(HookKind, Bound)>,
    hook_functions: Vec<HookFunction>,
    /// Pieces that no build holds.
    foreign: Vec<usize>,
    frames: Vec<ForeignFrame>,
    redirects: Vec<(usize, FuncId)>,
    after: Option<after::Previous<'a>>,
    refusals: Vec<Refusal>,
    /// The function that is being carried, for messages.
    current: String,
}

impl<'d> Selector<'_, 'd> {
    fn refuse(&mut self, rule: &str, symbol: &str, message: String, remedy: &str) {
        let symbol = demangle(symbol);
        self.refusals.push(Refusal { rule: rule.into(), symbol, message, remedy: remedy.into(), ..Refusal::default() });
    }

    fn seed(&mut self) {
        let mut seeds: BTreeMap<FuncId, (Vec<FuncId>, String)> = BTreeMap::new();
        for (f, why) in &self.diff.changed {
            let Some(g) = self.pairing.func_pair(*f) else { continue };
            let seed = seeds.entry(g).or_insert_with(|| (Vec::new(), why.clone()));
            seed.0.push(*f);
        }
        for (g, (olds, why)) in seeds {
            let reason = if why.starts_with("it ") { why } else { format!("{why} changed") };
            self.enter(g, olds, reason);
        }
    }

    fn carry_all(&mut self) {
        while let Some(id) = self.queue.pop() {
            self.carry(id);
        }
    }

    fn enter(&mut self, g: FuncId, olds: Vec<FuncId>, reason: String) {
        if self.functions.contains_key(&g) {
            return;
        }
        let part = self.new.build.func(g).cold_parent().is_some();
        let carried = Carried {
            new: g,
            olds,
            reason,
            bytes: Vec::new(),
            fixups: Vec::new(),
            lsda: None,
            personality: None,
            part,
        };
        self.functions.insert(g, carried);
        self.queue.push(g);
        for c in companions(self.new, g) {
            let olds =
                self.pairing.func_olds(c).iter().copied().filter(|f| self.diff.changed.contains_key(f)).collect();
            self.enter(c, olds, "its parent function changed".into());
        }
    }

    fn carry(&mut self, g: FuncId) {
        let new = self.new;
        let lifted = &new.lifted[g as usize];
        let func = new.build.func(g);
        self.current = demangle(func.name());
        if func.ifunc {
            let message = format!("{} chooses an implementation at start-up (IFUNC)", self.current);
            self.refuse("unsupported", func.name(), message, "change the implementation, not the resolver");
        }
        if let Some(why) = &lifted.unexplained {
            let message = format!("{} holds {why}", self.current);
            self.refuse("unknown-relocation", func.name(), message, "build it with a supported linker and code model");
        }
        if func.unsized_ || func.size == 0 {
            let message = format!("{} is assembly without a size", self.current);
            self.refuse("overlap", func.name(), message, "give it a .size directive in both builds");
        }
        self.join_touching(lifted);
        let walked = walked(new, lifted);
        let mut fixups = Vec::new();
        let mut bytes = lifted.masked.clone();
        for r in &lifted.refs {
            let at = u64::from(r.at);
            if matches!(r.field, Field::TpOff32 | Field::DtpOff32 | Field::TlsSize32) {
                if let Some(value) = self.bind_tls(r.target, r.field) {
                    bytes[r.at as usize..r.at as usize + 4].copy_from_slice(&value.to_le_bytes());
                }
                continue;
            }
            let Some(to) = self.bind_ref(r, g) else { continue };
            self.check_end(g, r, to, &walked);
            let store = match r.field {
                Field::Rel32 => Store::Pc32(-i64::from(r.end - r.at)),
                Field::Rel8 => Store::Pc8,
                Field::Abs32 => Store::Abs32,
                Field::Abs64 | Field::TpOff32 | Field::DtpOff32 | Field::TlsSize32 => Store::Abs64,
            };
            if store == Store::Abs32 && new.build.pie {
                let message = format!("{} holds an address in 32 bits in a position-independent build", self.current);
                self.refuse("unsupported", func.name(), message, "build it with -fPIE");
            }
            fixups.push(Fixup { at, store, to });
        }
        let (mut lsda, mut personality) = (None, None);
        if let Some(fde) = new.build.unwind.fde_at(func.addr) {
            lsda = fde.lsda.and_then(|at| self.lsda_piece(at, g));
            personality = fde.personality.and_then(|p| self.bind_personality(p));
        }
        if let Some(c) = self.functions.get_mut(&g) {
            (c.bytes, c.fixups, c.lsda, c.personality) = (bytes, fixups, lsda, personality);
        }
    }

    /// Joins the unnamed constants of a function that touch each other.
    fn join_touching(&mut self, lifted: &crate::lift::Lifted<'d>) {
        let mut ends: BTreeMap<u64, u64> = BTreeMap::new();
        for r in &lifted.refs {
            if let (Target::Data(at), Access::Extent) = (r.target, r.access) {
                if !self.new.is_mutable(at) {
                    let end = ends.entry(at).or_insert_with(|| self.new.extent_end(at));
                    *end = (*end).max(at.saturating_add_signed(r.bias));
                }
            }
        }
        let starts: Vec<u64> = ends.keys().copied().collect();
        let mut from = 0;
        while from < starts.len() {
            let mut to = from;
            while to + 1 < starts.len() && ends[&starts[to]] >= starts[to + 1] {
                to += 1;
            }
            let end = starts[from..=to].iter().map(|at| ends[at]).max().unwrap_or(0);
            self.touching(&starts[from..=to], end);
            from = to + 1;
        }
    }

    /// An address without a name that is the start of one thing may be meant as the end of the one before it, if
    /// the function walks that one. Fine where both readings give the same address, refused otherwise.
    fn check_end(&mut self, g: FuncId, r: &crate::lift::Ref<'d>, to: Bound, walked: &HashSet<ObjId>) {
        let new = self.new;
        let start = new.build.func(g).addr;
        let named = new
            .build
            .relocs_in(start + u64::from(r.at), 1)
            .iter()
            .any(|k| !matches!(new.build.rel_sym(k).target, crate::build::SymTarget::Place));
        let at = match r.target {
            Target::Object(id, offset) => new.build.object(id).addr.wrapping_add_signed(offset),
            Target::Data(at) if r.bias == 0 => at,
            _ => return, // it is known what it belongs to
        };
        let own_table =
            matches!(crate::compare::place(new, at, at), crate::compare::Place::Pointer(Target::Func(f, _)) if f == g);
        if r.access == Access::Indexed && !matches!(r.target, Target::Object(_, 0)) && !named && !own_table {
            let message = format!(
                "{} adds an index to an address that may belong to the table before or behind it",
                self.current
            );
            let name = self.current.clone();
            self.refuse("ambiguous", &name, message, "build a position-independent executable (-pie)");
        }
        if named || r.access != Access::Extent || at == 0 {
            return;
        }
        let Some(before) = new.build.object_at(at - 1) else { return };
        let object = new.build.object(before);
        let walks = walked.contains(&before);
        let steps_back =
            u32::try_from(object.size).is_ok_and(|n| new.lifted[g as usize].numbers.binary_search(&n).is_ok());
        // A number as large as a small variable may be anything.
        let steps_back = steps_back && object.size > 16;
        if !(walks || steps_back) || object.size == 0 || object.addr + object.size != at {
            return;
        }
        let as_end = self.bind_object(before, object.size.cast_signed(), Access::Branch);
        if as_end != Some(to) {
            let message = format!(
                "{} takes an address that is the end of {} or the start of what follows it",
                self.current,
                object.name()
            );
            let name = object.name().to_owned();
            self.refuse(
                "ambiguous",
                &name,
                message,
                "keep the order of variables, or use an index in place of an end pointer",
            );
        }
    }

    fn bind_personality(&mut self, new: Personality) -> Option<(u64, bool)> {
        let holds = |side: &Side<'d>, p: Personality| match p {
            Personality::Direct(at) => crate::compare::place_of_address(side, at),
            Personality::Indirect(at) => crate::compare::place_of_slot(side, at),
        };
        let wanted = holds(self.new, new);
        let mut olds: Vec<Personality> = self.old.build.unwind.personalities().collect();
        olds.sort_by_key(|p| match p {
            Personality::Direct(a) | Personality::Indirect(a) => *a,
        });
        olds.dedup();
        for p in olds {
            if self.comparer.places(holds(self.old, p), wanted) {
                return Some(match p {
                    Personality::Direct(at) => (at, false),
                    Personality::Indirect(at) => (at, true),
                });
            }
        }
        let (message, name) =
            (format!("{} handles exceptions, which the old build does not", self.current), self.current.clone());
        self.refuse("import", &name, message, "link the old build with exception support, or restart");
        None
    }

    /// Whether a new function without old version has the body of an unchanged old one.
    fn same_body(&mut self, g: FuncId) -> Option<FuncId> {
        let old = self.old;
        let bodies = self.bodies.get_or_insert_with(|| {
            let mut bodies: FastMap<&[u8], Vec<FuncId>> = FastMap::default();
            for (f, lifted) in old.lifted.iter().enumerate() {
                bodies.entry(&lifted.masked).or_default().push(f as FuncId);
            }
            bodies
        });
        let equal = bodies.get(&self.new.lifted[g as usize].masked[..]).cloned().unwrap_or_default();
        equal.into_iter().filter(|f| !self.diff.changed.contains_key(f)).find(|f| self.comparer.func_bodies(*f, g))
    }

    fn branch_or_address(access: Access) -> bool {
        access == Access::Branch
    }
}
