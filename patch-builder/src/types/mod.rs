//! The types of one build, read from its DWARF (versions 4 and 5, split units,
//! type units and compressed sections included).
//!
//! Kept is what the contract between old state and new code consists of:
//! layouts, signatures, and which function and which static has which type.
//! Names of typedefs, qualifiers and positions of names are not part of a type.
//! Types with a name are referred to by name, so equal definitions of many
//! units become one, and no type is a cycle.
//!
//! Nothing here compares or decides. Damaged DWARF gives fewer facts, never
//! a wrong one: a function without facts has no type information.

mod dies;
mod intern;
mod load;
mod text;

use std::collections::{BTreeSet, HashMap};
use std::path::Path;

pub use text::{DefText, Digests, LayoutRecord};

/// Index of a type expression.
pub type TyId = u32;
/// Index of a name.
pub type NameId = u32;

/// How a pointer is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum PointerKind {
    /// `T *`, `*const T`, or the pointer inside a wide one.
    Raw,
    /// `&T` of Rust.
    Borrow,
    /// `T &` or `T &&` of C++.
    Reference,
}

/// A type expression.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Ty {
    /// No value.
    Void,
    /// A scalar: its `DW_ATE_*` and its size in bytes.
    Base(NameId, u8, u64),
    /// A pointer.
    Pointer(PointerKind, TyId),
    /// An array with its element counts; `None` where it is not constant.
    Array(TyId, Vec<Option<u64>>),
    /// A function.
    Function(Box<Signature>),
    /// A pointer to a member: of what type, in what class.
    Member(TyId, TyId),
    /// A struct, union, class or enum with a name.
    Named(NameId),
    /// One without.
    Inline(Box<Layout>),
    /// Something that DWARF only names (`decltype(nullptr)`, an unknown tag).
    Opaque(NameId),
}

/// A function's contract.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub struct Signature {
    /// Parameters in order.
    pub params: Vec<TyId>,
    /// What it returns.
    pub returns: TyId,
    /// Takes more arguments than named.
    pub variadic: bool,
    /// Never returns.
    pub noreturn: bool,
    /// The first parameter is the object.
    pub method: bool,
}

/// What kind of definition it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Keyword {
    /// `struct` or `class`.
    Struct,
    /// `union`.
    Union,
    /// An enumeration of numbers.
    Enum,
}

/// A field, a base class, or a variant's content.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Field {
    /// Its name; of a base class, nothing.
    pub name: NameId,
    /// Its place in bits from the start.
    pub bit_at: u64,
    /// Its width, if it is a bit-field.
    pub bits: Option<u64>,
    /// Its type.
    pub ty: TyId,
    /// Whether it is a base class.
    pub base: bool,
    /// Whether the place is an expression (virtual base); `bit_at` is its hash then.
    pub computed: bool,
}

/// One variant of a Rust enum or of a state machine.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Arm {
    /// The discriminant's value; `None` for the one that every other value means.
    pub value: Option<u64>,
    /// Its content.
    pub field: Field,
}

/// The variants of an enum.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub struct Variants {
    /// Where the discriminant is.
    pub discr: Option<Field>,
    /// The variants, in the compiler's order.
    pub arms: Vec<Arm>,
}

/// The layout of a struct, union or enum.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Layout {
    /// What it is.
    pub keyword: Keyword,
    /// Its size in bytes.
    pub size: u64,
    /// Its alignment, where DWARF says it; else 0.
    pub align: u64,
    /// Fields and bases, in order of declaration.
    pub fields: Vec<Field>,
    /// Variants, if it has any.
    pub variants: Vec<Variants>,
    /// Names and values of an enumeration.
    pub values: Vec<(NameId, u64)>,
    /// Virtual functions: slot and name.
    pub slots: Vec<(u64, NameId)>,
    /// Type parameters: mentioned, not part of the layout.
    pub params: Vec<TyId>,
}

/// A definition and where it stands.
#[derive(Clone, Debug)]
pub struct Def {
    /// The layout.
    pub layout: Layout,
    /// The files that define it so, and the line.
    pub files: Vec<(NameId, u32)>,
    /// The units that define it so; empty unless bodies were read.
    pub units: BTreeSet<u32>,
}

/// A function.
#[derive(Clone, Debug)]
pub struct Function {
    /// Its path.
    pub name: NameId,
    /// Its contract.
    pub signature: Signature,
    /// The names of its parameters.
    pub param_names: Vec<NameId>,
    /// File and line.
    pub at: (NameId, u32),
    /// Its unit.
    pub unit: u32,
    /// Whether its unit (or that of its source) has types at all.
    pub typed: bool,
    /// What its body mentions, inlined functions included; empty unless bodies were read.
    pub mentions: Vec<Mention>,
}

/// How a function mentions a type.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Role {
    /// As a parameter.
    Param,
    /// As a variable.
    Local,
    /// As what it returns.
    Return,
}

/// One mention.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Mention {
    /// The type.
    pub ty: TyId,
    /// As what.
    pub role: Role,
}

/// A variable that lives as long as the program or a thread.
#[derive(Clone, Debug)]
pub struct Static {
    /// Its path.
    pub name: NameId,
    /// Its type.
    pub ty: TyId,
    /// Its address; of a thread-local, its offset.
    pub addr: u64,
    /// Its unit.
    pub unit: u32,
    /// Whether it is thread-local.
    pub tls: bool,
    /// File and line.
    pub at: (NameId, u32),
}

/// How much to read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Depth {
    /// Layouts, signatures, statics.
    Contracts,
    /// Also what every body mentions.
    Bodies,
}

/// The types of one build.
#[derive(Debug, Default)]
pub struct Types {
    names: Vec<String>,
    name_ids: HashMap<String, NameId>,
    tys: Vec<Ty>,
    ty_ids: HashMap<Ty, TyId>,
    defs: HashMap<NameId, Vec<Def>>,
    /// Functions.
    pub functions: Vec<Function>,
    /// The function at each address where one, or a part of one, begins.
    pub by_addr: HashMap<u64, u32>,
    /// Statics.
    pub statics: Vec<Static>,
    /// Code of units with types: start, end; ascending.
    typed_code: Vec<(u64, u64)>,
    /// Types that a unit defines and no declaration in it uses: something is cast to them.
    pub cast_to: std::collections::HashSet<NameId>,
    /// Units that name a split file which was not found.
    pub missing_splits: Vec<String>,
    /// The file that part of the debug information was moved to, and which is not read.
    pub elsewhere: Option<String>,
    /// Whether the build has any DWARF.
    pub present: bool,
}

impl Types {
    /// Reads the types of the build in `bytes`; `path` says where split files lie.
    #[must_use]
    pub fn read(path: &Path, bytes: &[u8], depth: Depth) -> Self {
        load::read(path, bytes, depth)
    }

    /// A name.
    #[must_use]
    pub fn name(&self, id: NameId) -> &str {
        self.names.get(id as usize).map_or("", String::as_str)
    }

    /// The id of a name, if the build has it.
    #[must_use]
    pub fn name_id(&self, name: &str) -> Option<NameId> {
        self.name_ids.get(name).copied()
    }

    /// A type expression.
    #[must_use]
    pub fn ty(&self, id: TyId) -> &Ty {
        self.tys.get(id as usize).unwrap_or(&Ty::Void)
    }

    /// The definitions that go by a name: several where units disagree.
    #[must_use]
    pub fn defs(&self, name: NameId) -> &[Def] {
        self.defs.get(&name).map_or(&[], Vec::as_slice)
    }

    /// Every name with definitions, in the order of names.
    #[must_use]
    pub fn defined(&self) -> Vec<NameId> {
        let mut out: Vec<NameId> = self.defs.keys().copied().collect();
        out.sort_unstable_by(|a, b| self.name(*a).cmp(self.name(*b)));
        out
    }

    /// Every type expression.
    pub fn all_tys(&self) -> impl Iterator<Item = (TyId, &Ty)> {
        self.tys.iter().enumerate().map(|(id, t)| (id as TyId, t))
    }

    /// The function that begins at an address.
    #[must_use]
    pub fn function_at(&self, addr: u64) -> Option<&Function> {
        self.functions.get(*self.by_addr.get(&addr)? as usize)
    }

    /// Whether the code at an address has type information: its own, or its unit's.
    #[must_use]
    pub fn is_typed(&self, addr: u64) -> bool {
        if let Some(f) = self.function_at(addr) {
            return f.typed;
        }
        let index = self.typed_code.partition_point(|(start, _)| *start <= addr);
        self.typed_code[..index].iter().rev().take(16).any(|(_, end)| addr < *end)
    }

    /// `file:line`.
    #[must_use]
    pub fn place(&self, at: (NameId, u32)) -> String {
        match (self.name(at.0), at.1) {
            ("", _) => "an unknown place".into(),
            (file, 0) => file.into(),
            (file, line) => format!("{file}:{line}"),
        }
    }

    pub(crate) fn intern_name(&mut self, name: &str) -> NameId {
        if let Some(id) = self.name_ids.get(name) {
            return *id;
        }
        let id = self.names.len() as NameId;
        self.names.push(name.to_owned());
        self.name_ids.insert(name.to_owned(), id);
        id
    }

    pub(crate) fn intern_ty(&mut self, ty: Ty) -> TyId {
        if let Some(id) = self.ty_ids.get(&ty) {
            return *id;
        }
        let id = self.tys.len() as TyId;
        self.tys.push(ty.clone());
        self.ty_ids.insert(ty, id);
        id
    }

    pub(crate) fn define(&mut self, name: NameId, layout: Layout, at: (NameId, u32), unit: Option<u32>) {
        let defs = self.defs.entry(name).or_default();
        let index = defs.iter().position(|d| d.layout == layout).unwrap_or_else(|| {
            defs.push(Def { layout, files: Vec::new(), units: BTreeSet::new() });
            defs.len() - 1
        });
        let def = &mut defs[index];
        if !def.files.contains(&at) {
            def.files.push(at);
        }
        def.units.extend(unit);
    }
}
