//! From tables of entries to types: names resolved, equal definitions made one.

use std::borrow::Cow;
use std::collections::{BTreeSet, HashMap};

use super::dies::{
    Die, Ref, Table, BIT_FIELD, COMPUTED, DECLARATION, HAS_VALUE, METHOD, NORETURN, TLS, VARIADIC, VIRTUAL,
};
use super::{
    Arm, Depth, Field, Function, Keyword, Layout, Mention, NameId, PointerKind, Role, Signature, Static, Ty, TyId,
    Types, Variants,
};

/// An entry of some unit.
type At = (u32, u32);

/// How deep a type expression may nest before it is taken for damage.
const MAX_DEPTH: u32 = 200;

pub fn build(tables: &[Table<'_>], depth: Depth) -> Types {
    let mut b = Builder {
        tables,
        types: Types::default(),
        ends: tables.iter().map(ends).collect(),
        tys: tables.iter().map(|t| vec![None; t.dies.len()]).collect(),
        paths: HashMap::new(),
        typedefs: HashMap::new(),
        bases: HashMap::new(),
        signatures: HashMap::new(),
        bodies: HashMap::new(),
        depth: 0,
    };
    b.types.intern_name("");
    b.types.intern_ty(Ty::Void);
    b.index();
    for unit in 0..tables.len() as u32 {
        b.unit(unit, depth);
    }
    let mut code: Vec<(u64, u64)> = tables.iter().filter(|t| t.typed).flat_map(|t| t.ranges.iter().copied()).collect();
    code.sort_unstable();
    code.dedup();
    b.types.typed_code = code;
    b.types
}

/// For each entry, the index behind its last descendant.
fn ends(table: &Table<'_>) -> Vec<u32> {
    let mut out = vec![0; table.dies.len()];
    for i in (0..table.dies.len()).rev() {
        out[i] = out[i].max(i as u32 + 1);
        let parent = table.dies[i].parent as usize;
        if parent < i {
            out[parent] = out[parent].max(out[i]);
        }
    }
    out
}

struct Builder<'a, 'd> {
    tables: &'a [Table<'d>],
    types: Types,
    ends: Vec<Vec<u32>>,
    tys: Vec<Vec<Option<TyId>>>,
    paths: HashMap<At, NameId>,
    /// Structs without a name that a typedef names.
    typedefs: HashMap<At, &'d [u8]>,
    /// Units of each file by their offset, ascending.
    bases: HashMap<u32, Vec<(u64, u32)>>,
    signatures: HashMap<u64, u32>,
    bodies: HashMap<At, Vec<Mention>>,
    depth: u32,
}

fn text(bytes: &[u8]) -> Cow<'_, str> {
    String::from_utf8_lossy(bytes)
}

fn is_aggregate(tag: gimli::DwTag) -> bool {
    matches!(
        tag,
        gimli::DW_TAG_structure_type
            | gimli::DW_TAG_class_type
            | gimli::DW_TAG_interface_type
            | gimli::DW_TAG_union_type
            | gimli::DW_TAG_enumeration_type
    )
}

impl<'d> Builder<'_, 'd> {
    fn die(&self, at: At) -> &Die<'d> {
        &self.tables[at.0 as usize].dies[at.1 as usize]
    }

    fn children(&self, at: At) -> Vec<At> {
        let (dies, ends) = (&self.tables[at.0 as usize].dies, &self.ends[at.0 as usize]);
        let mut out = Vec::new();
        let mut i = at.1 + 1;
        while i < ends[at.1 as usize] {
            if dies[i as usize].parent == at.1 {
                out.push((at.0, i));
            }
            i = ends[i as usize].max(i + 1);
        }
        out
    }

    fn index(&mut self) {
        for (unit, table) in self.tables.iter().enumerate() {
            let unit = unit as u32;
            if let Some(base) = table.base {
                self.bases.entry(table.group).or_default().push((base, unit));
            }
            if let Some(signature) = table.signature {
                self.signatures.entry(signature).or_insert(unit);
            }
            for die in table.dies.iter().filter(|d| d.tag == gimli::DW_TAG_typedef && !d.name.is_empty()) {
                let Ref::Unit(to) = die.ty else { continue };
                let Some(to) = table.index_of(to) else { continue };
                let target = &table.dies[to as usize];
                if is_aggregate(target.tag) && target.name.is_empty() {
                    self.typedefs.entry((unit, to)).or_insert(die.name);
                }
            }
        }
        self.bases.values_mut().for_each(|v| v.sort_unstable());
    }

    fn resolve(&self, unit: u32, to: Ref) -> Option<At> {
        let table = &self.tables[unit as usize];
        match to {
            Ref::None => None,
            Ref::Unit(offset) => Some((unit, table.index_of(offset)?)),
            Ref::Info(offset) => {
                let bases = self.bases.get(&table.group)?;
                let (base, other) = *bases.get(bases.partition_point(|(b, _)| *b <= offset).checked_sub(1)?)?;
                let inside = u32::try_from(offset - base).ok()?;
                Some((other, self.tables[other as usize].index_of(inside)?))
            }
            Ref::Signature(signature) => {
                let unit = *self.signatures.get(&signature)?;
                // The one type of the unit that is its own: the first with a definition.
                let dies = &self.tables[unit as usize].dies;
                let first = dies.iter().position(|d| is_aggregate(d.tag) && d.flags & DECLARATION == 0)?;
                Some((unit, first as u32))
            }
        }
    }

    /// The entry and those that it stands for: abstract instance, then declaration.
    fn chain(&self, at: At) -> Vec<At> {
        let mut out = vec![at];
        let mut from = at;
        while let Some(next) = self.resolve(from.0, self.die(from).origin) {
            if out.contains(&next) || out.len() > 8 {
                break;
            }
            out.push(next);
            from = next;
        }
        out
    }

    fn own_name(&self, at: At) -> Option<String> {
        let die = self.die(at);
        if !die.name.is_empty() {
            return Some(text(die.name).into_owned());
        }
        let typedef = self.typedefs.get(&at).map(|n| text(n).into_owned());
        typedef.or_else(|| self.is_lambda(at).then(|| "<lambda>".to_owned()))
    }

    /// A class without a name that can be called.
    fn is_lambda(&self, at: At) -> bool {
        let (die, table) = (self.die(at), &self.tables[at.0 as usize]);
        let calls = |c: At| self.die(c).tag == gimli::DW_TAG_subprogram && self.die(c).name == b"operator()";
        is_aggregate(die.tag) && !table.c_like && !table.rust && self.children(at).into_iter().any(calls)
    }

    /// The name with everything that it is nested in.
    fn path(&mut self, at: At) -> NameId {
        if let Some(id) = self.paths.get(&at) {
            return *id;
        }
        self.paths.insert(at, 0); // ends a cycle of damaged references
        let chain = self.chain(at);
        let named = chain.iter().rev().find_map(|at| self.own_name(*at).map(|n| (*at, n)));
        let id = match named {
            Some((at, name)) => {
                let mut prefix = self.scope(at);
                let table = &self.tables[at.0 as usize];
                let keyword = match self.die(at).tag {
                    _ if !table.c_like || self.die(at).name.is_empty() => "",
                    gimli::DW_TAG_structure_type => "struct ",
                    gimli::DW_TAG_union_type => "union ",
                    gimli::DW_TAG_enumeration_type => "enum ",
                    _ => "",
                };
                prefix.insert_str(0, keyword);
                prefix.push_str(&name);
                self.types.intern_name(&prefix)
            }
            None if self.die(at).tag == gimli::DW_TAG_namespace => {
                let scope = self.scope(at);
                self.types.intern_name(&format!("{scope}(anonymous namespace)"))
            }
            None => 0,
        };
        self.paths.insert(at, id);
        id
    }

    /// What an entry is nested in, with `::` behind it, or nothing.
    fn scope(&mut self, at: At) -> String {
        let mut parent = self.die(at).parent;
        while let Some(die) = self.tables[at.0 as usize].dies.get(parent as usize) {
            let counts = match die.tag {
                gimli::DW_TAG_namespace | gimli::DW_TAG_module | gimli::DW_TAG_subprogram => true,
                tag => is_aggregate(tag) && !self.tables[at.0 as usize].c_like,
            };
            if counts {
                let id = self.path((at.0, parent));
                return match self.types.name(id) {
                    "" => String::new(),
                    name => format!("{name}::"),
                };
            }
            parent = die.parent;
        }
        String::new()
    }

    fn type_of(&mut self, unit: u32, to: Ref) -> TyId {
        match (self.resolve(unit, to), to) {
            (Some(at), _) => self.ty(at),
            (None, Ref::None) => 0,
            (None, _) => self.opaque("a type that DWARF does not describe"),
        }
    }

    fn opaque(&mut self, name: &str) -> TyId {
        let name = self.types.intern_name(name);
        self.types.intern_ty(Ty::Opaque(name))
    }

    fn ty(&mut self, at: At) -> TyId {
        if let Some(ty) = self.tys[at.0 as usize][at.1 as usize] {
            return ty;
        }
        if self.depth > MAX_DEPTH {
            return self.opaque("a type without end");
        }
        let cycle = self.opaque("a type that contains itself");
        self.tys[at.0 as usize][at.1 as usize] = Some(cycle);
        self.depth += 1;
        let ty = self.make_ty(at);
        self.depth -= 1;
        self.tys[at.0 as usize][at.1 as usize] = Some(ty);
        ty
    }

    fn make_ty(&mut self, at: At) -> TyId {
        let die = *self.die(at);
        let ty = match die.tag {
            gimli::DW_TAG_typedef
            | gimli::DW_TAG_const_type
            | gimli::DW_TAG_volatile_type
            | gimli::DW_TAG_restrict_type
            | gimli::DW_TAG_atomic_type => return self.type_of(at.0, die.ty),
            gimli::DW_TAG_base_type => {
                let name = self.types.intern_name(&text(die.name));
                Ty::Base(name, die.value as u8, die.size)
            }
            gimli::DW_TAG_pointer_type | gimli::DW_TAG_reference_type | gimli::DW_TAG_rvalue_reference_type => {
                let kind = match die.tag {
                    gimli::DW_TAG_pointer_type if die.name.starts_with(b"&") => PointerKind::Borrow,
                    gimli::DW_TAG_pointer_type => PointerKind::Raw,
                    _ => PointerKind::Reference,
                };
                Ty::Pointer(kind, self.type_of(at.0, die.ty))
            }
            gimli::DW_TAG_array_type => {
                let of = self.type_of(at.0, die.ty);
                let subranges = self.children(at).into_iter().map(|c| *self.die(c));
                let counts = subranges
                    .filter(|d| d.tag == gimli::DW_TAG_subrange_type)
                    .map(|d| (d.flags & HAS_VALUE != 0).then_some(d.value))
                    .collect();
                Ty::Array(of, counts)
            }
            gimli::DW_TAG_subroutine_type => Ty::Function(Box::new(self.signature(&[at]).0)),
            gimli::DW_TAG_ptr_to_member_type => {
                let of = self.type_of(at.0, die.ty);
                Ty::Member(of, self.type_of(at.0, die.origin))
            }
            tag if is_aggregate(tag) => {
                if let Ref::Signature(_) = die.origin {
                    return self.type_of(at.0, die.origin);
                }
                match self.path(at) {
                    0 => Ty::Inline(Box::new(self.layout(at))),
                    name if self.own_name(at).is_some() || die.origin != Ref::None => Ty::Named(name),
                    _ => Ty::Inline(Box::new(self.layout(at))),
                }
            }
            _ => Ty::Opaque(self.types.intern_name(&text(die.name))),
        };
        self.types.intern_ty(ty)
    }

    fn field(&mut self, at: At) -> Field {
        let die = *self.die(at);
        Field {
            name: self.types.intern_name(&text(die.name)),
            bit_at: die.value,
            bits: (die.flags & BIT_FIELD != 0).then_some(die.size),
            ty: self.type_of(at.0, die.ty),
            base: die.tag == gimli::DW_TAG_inheritance,
            computed: die.flags & COMPUTED != 0,
        }
    }

    fn layout(&mut self, at: At) -> Layout {
        let die = *self.die(at);
        let keyword = match die.tag {
            gimli::DW_TAG_union_type => Keyword::Union,
            gimli::DW_TAG_enumeration_type => Keyword::Enum,
            _ => Keyword::Struct,
        };
        let mut out = Layout {
            keyword,
            size: die.size,
            align: die.align,
            fields: Vec::new(),
            variants: Vec::new(),
            values: Vec::new(),
            slots: Vec::new(),
            params: Vec::new(),
        };
        for child in self.children(at) {
            let c = *self.die(child);
            match c.tag {
                gimli::DW_TAG_member | gimli::DW_TAG_inheritance if c.flags & DECLARATION == 0 => {
                    let field = self.field(child);
                    out.fields.push(field);
                }
                gimli::DW_TAG_enumerator => {
                    let name = self.types.intern_name(&text(c.name));
                    out.values.push((name, c.value));
                }
                gimli::DW_TAG_variant_part => {
                    let variants = self.variants(child);
                    out.variants.push(variants);
                }
                gimli::DW_TAG_subprogram if c.flags & VIRTUAL != 0 => {
                    let name = if c.linkage.is_empty() { c.name } else { c.linkage };
                    let name = self.types.intern_name(&text(name));
                    out.slots.push((c.size, name));
                }
                gimli::DW_TAG_template_type_parameter => {
                    let ty = self.type_of(child.0, c.ty);
                    out.params.push(ty);
                }
                _ => {}
            }
        }
        out.slots.sort_unstable();
        out
    }

    fn variants(&mut self, at: At) -> Variants {
        let discr = self.resolve(at.0, self.die(at).origin);
        let mut out = Variants { discr: discr.map(|d| self.field(d)), arms: Vec::new() };
        for arm in self.children(at) {
            let die = *self.die(arm);
            if die.tag != gimli::DW_TAG_variant {
                continue;
            }
            for member in self.children(arm) {
                if self.die(member).tag == gimli::DW_TAG_member {
                    let field = self.field(member);
                    out.arms.push(Arm { value: (die.flags & HAS_VALUE != 0).then_some(die.value), field });
                }
            }
        }
        out
    }

    /// The contract that a function's entries state together, and its parameters' names.
    fn signature(&mut self, chain: &[At]) -> (Signature, Vec<NameId>) {
        let mut out = Signature::default();
        let mut names: Vec<NameId> = Vec::new();
        for at in chain {
            let die = *self.die(*at);
            if out.returns == 0 {
                out.returns = self.type_of(at.0, die.ty);
            }
            out.noreturn |= die.flags & NORETURN != 0;
            out.method |= die.flags & METHOD != 0;
            let (mut params, mut own_names) = (Vec::new(), Vec::new());
            for child in self.children(*at) {
                let c = *self.die(child);
                if c.tag == gimli::DW_TAG_unspecified_parameters {
                    out.variadic = true;
                } else if c.tag == gimli::DW_TAG_formal_parameter {
                    let (ty, name) = self.declared(child);
                    params.push(ty);
                    own_names.push(name);
                }
                out.variadic |= c.flags & VARIADIC != 0;
            }
            if params.len() > out.params.len() {
                out.params = params;
            }
            if own_names.len() > names.len() || names.iter().all(|n| *n == 0) {
                names = own_names;
            }
        }
        names.resize(out.params.len(), 0);
        (out, names)
    }

    /// Type and name of a parameter or variable.
    fn declared(&mut self, at: At) -> (TyId, NameId) {
        let chain = self.chain(at);
        let ty = chain.iter().find(|a| self.die(**a).ty != Ref::None).map(|a| (a.0, self.die(*a).ty));
        let name = chain.iter().map(|a| self.die(*a).name).find(|n| !n.is_empty()).unwrap_or(&[]);
        let name = self.types.intern_name(&text(name));
        (ty.map_or(0, |(unit, ty)| self.type_of(unit, ty)), name)
    }

    fn place(&mut self, chain: &[At]) -> (NameId, u32) {
        let Some(at) = chain.iter().find(|a| self.die(**a).line != 0) else { return (0, 0) };
        let (file, line) = (self.die(*at).file as usize, self.die(*at).line);
        let tables = self.tables;
        let name = tables[at.0 as usize].files.get(file).map_or("", String::as_str);
        (self.types.intern_name(name), line)
    }

    fn unit(&mut self, unit: u32, depth: Depth) {
        let table = &self.tables[unit as usize];
        let mut starts: HashMap<u32, Vec<u64>> = HashMap::new();
        for (die, addr) in &table.starts {
            starts.entry(*die).or_default().push(*addr);
        }
        for i in 0..table.dies.len() as u32 {
            let (at, die) = ((unit, i), table.dies[i as usize]);
            if is_aggregate(die.tag) && die.flags & DECLARATION == 0 && !matches!(die.origin, Ref::Signature(_)) {
                let ty = self.ty(at);
                if let Ty::Named(name) = *self.types.ty(ty) {
                    let layout = self.layout(at);
                    let place = self.place(&[at]);
                    self.types.define(name, layout, place, (depth == Depth::Bodies).then_some(unit));
                }
            } else if die.tag == gimli::DW_TAG_subprogram {
                if let Some(addrs) = starts.remove(&i) {
                    self.function(at, &addrs, depth);
                }
            } else if die.tag == gimli::DW_TAG_variable && die.flags & (HAS_VALUE | TLS) != 0 {
                let chain = self.chain(at);
                let (ty, _) = self.declared(at);
                let name = self.path(at);
                let place = self.place(&chain);
                let tls = die.flags & TLS != 0;
                self.types.statics.push(Static { name, ty, addr: die.value, unit, tls, at: place });
            }
        }
        if depth == Depth::Bodies && !table.rust {
            self.casts(unit);
        }
    }

    fn function(&mut self, at: At, addrs: &[u64], depth: Depth) {
        let chain = self.chain(at);
        let (signature, param_names) = self.signature(&chain);
        let name = self.path(at);
        let place = self.place(&chain);
        let typed = chain.iter().any(|a| self.tables[a.0 as usize].typed);
        let mentions = if depth == Depth::Bodies { self.body(&chain) } else { Vec::new() };
        let id = self.types.functions.len() as u32;
        for addr in addrs {
            self.types.by_addr.entry(*addr).or_insert(id);
        }
        self.types.functions.push(Function { name, signature, param_names, at: place, unit: at.0, typed, mentions });
    }

    /// What a body mentions, inlined functions included.
    fn body(&mut self, chain: &[At]) -> Vec<Mention> {
        let mut out = BTreeSet::new();
        for at in chain {
            out.extend(self.own_body(*at));
        }
        out.into_iter().collect()
    }

    fn own_body(&mut self, at: At) -> Vec<Mention> {
        if let Some(known) = self.bodies.get(&at) {
            return known.clone();
        }
        self.bodies.insert(at, Vec::new()); // ends a cycle
        let mut out = BTreeSet::new();
        let returns = self.type_of(at.0, self.die(at).ty);
        if returns != 0 {
            out.insert(Mention { ty: returns, role: Role::Return });
        }
        let end = self.ends[at.0 as usize][at.1 as usize];
        let mut i = at.1 + 1;
        while i < end {
            let (here, die) = ((at.0, i), *self.die((at.0, i)));
            match die.tag {
                gimli::DW_TAG_formal_parameter | gimli::DW_TAG_variable => {
                    let role = if die.tag == gimli::DW_TAG_variable { Role::Local } else { Role::Param };
                    let (ty, _) = self.declared(here);
                    out.insert(Mention { ty, role });
                }
                gimli::DW_TAG_inlined_subroutine => {
                    for origin in self.chain(here).into_iter().skip(1) {
                        out.extend(self.own_body(origin));
                    }
                }
                // What is declared here has bodies of its own.
                tag if is_aggregate(tag) || tag == gimli::DW_TAG_subprogram => {
                    i = self.ends[at.0 as usize][i as usize];
                    continue;
                }
                _ => {}
            }
            i += 1;
        }
        let out: Vec<Mention> = out.into_iter().collect();
        self.bodies.insert(at, out.clone());
        out
    }

    /// Definitions that no declaration of their unit uses, not even through a pointer: something is cast to them.
    fn casts(&mut self, unit: u32) {
        let table = &self.tables[unit as usize];
        let wrapper = |tag| {
            matches!(
                tag,
                gimli::DW_TAG_pointer_type
                    | gimli::DW_TAG_const_type
                    | gimli::DW_TAG_volatile_type
                    | gimli::DW_TAG_restrict_type
                    | gimli::DW_TAG_typedef
            )
        };
        let target = |d: &Die<'_>| match d.ty {
            Ref::Unit(to) => table.index_of(to),
            _ => None,
        };
        let mut used = vec![false; table.dies.len()];
        let mut open: Vec<u32> = table.dies.iter().filter(|d| !wrapper(d.tag)).filter_map(target).collect();
        while let Some(i) = open.pop() {
            if !std::mem::replace(&mut used[i as usize], true) && wrapper(table.dies[i as usize].tag) {
                open.extend(target(&table.dies[i as usize]));
            }
        }
        for i in 0..table.dies.len() as u32 {
            let die = table.dies[i as usize];
            if is_aggregate(die.tag) && die.flags & DECLARATION == 0 && !used[i as usize] {
                let ty = self.ty((unit, i));
                if let Ty::Named(name) = *self.types.ty(ty) {
                    self.types.cast_to.insert(name);
                }
            }
        }
    }
}
