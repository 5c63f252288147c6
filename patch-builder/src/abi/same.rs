//! Whether an old type and a new one are laid out alike, and where not.

use std::collections::{HashMap, HashSet};

use super::numbered::{is_lambda, is_numbered, skeleton, Numbered};
use crate::types::{Def, Field, Keyword, Layout, NameId, Signature, Ty, TyId, Types, Variants};

/// Both builds' types, under a pairing of their names.
pub struct Compare<'a> {
    pub old: &'a Types,
    pub new: &'a Types,
    numbered: Numbered,
    tys: HashMap<(TyId, TyId), bool>,
    names: HashMap<(NameId, NameId), bool>,
}

/// What differs between two layouts.
#[derive(Clone, Debug, Default)]
pub struct Difference {
    /// Places, sizes, types: each in words.
    pub layout: Vec<String>,
    /// Enumerators whose value changed.
    pub values: Vec<String>,
    /// Virtual functions.
    pub vtable: Vec<String>,
    /// Variants that are new.
    pub more_variants: Vec<String>,
    /// What does no harm.
    pub notes: Vec<String>,
    /// Whether the definition itself changed, rather than that of something in it.
    pub own: bool,
}

impl Difference {
    /// Whether it matters.
    pub fn matters(&self) -> bool {
        !(self.layout.is_empty() && self.values.is_empty() && self.vtable.is_empty())
    }

    /// Whether nothing differs at all.
    pub fn is_none(&self) -> bool {
        !self.matters() && self.notes.is_empty() && self.more_variants.is_empty()
    }

    fn own(&mut self, what: String) {
        self.own = true;
        self.layout.push(what);
    }
}

const SIGNED: [u8; 2] = [5, 6]; // DW_ATE_signed, _signed_char
const UNSIGNED: [u8; 2] = [7, 8];

fn same_encoding(a: u8, b: u8) -> bool {
    a == b || SIGNED.contains(&a) && SIGNED.contains(&b) || UNSIGNED.contains(&a) && UNSIGNED.contains(&b)
}

impl<'a> Compare<'a> {
    pub fn new(old: &'a Types, new: &'a Types, numbered: Numbered) -> Self {
        Self { old, new, numbered, tys: HashMap::new(), names: HashMap::new() }
    }

    /// The new name of an old type, and whether that is certain.
    pub fn translate(&self, name: &str) -> (String, bool) {
        self.numbered.translate(name)
    }

    /// Whether values of one are values of the other.
    pub fn tys(&mut self, a: TyId, b: TyId) -> bool {
        if let Some(known) = self.tys.get(&(a, b)) {
            return *known;
        }
        self.tys.insert((a, b), true); // what depends on itself does not differ by that
        let same = self.compare_tys(a, b);
        self.tys.insert((a, b), same);
        same
    }

    fn compare_tys(&mut self, a: TyId, b: TyId) -> bool {
        let (old, new) = (self.old, self.new);
        match (old.ty(a), new.ty(b)) {
            (Ty::Void, Ty::Void) => true,
            (Ty::Base(_, x, size), Ty::Base(_, y, new_size)) => size == new_size && same_encoding(*x, *y),
            (Ty::Pointer(_, x), Ty::Pointer(_, y)) => self.tys(*x, *y),
            (Ty::Array(x, counts), Ty::Array(y, new_counts)) => counts == new_counts && self.tys(*x, *y),
            (Ty::Function(x), Ty::Function(y)) => self.signatures(x, y),
            (Ty::Member(x, class), Ty::Member(y, new_class)) => self.tys(*x, *y) && self.tys(*class, *new_class),
            (Ty::Named(x), Ty::Named(y)) => self.names(*x, *y),
            (Ty::Inline(x), Ty::Inline(y)) => !self.layouts(x, y).matters(),
            // a struct that got a name, or lost it
            (Ty::Inline(x), Ty::Named(y)) => match new.defs(*y) {
                [def] => old.name_id(new.name(*y)).is_none() && !self.layouts(x, &def.layout).matters(),
                _ => false,
            },
            (Ty::Named(x), Ty::Inline(y)) => match old.defs(*x) {
                [def] => new.name_id(old.name(*x)).is_none() && !self.layouts(&def.layout, y).matters(),
                _ => false,
            },
            (Ty::Opaque(x), Ty::Opaque(y)) => old.name(*x) == new.name(*y),
            _ => false,
        }
    }

    fn signatures(&mut self, x: &Signature, y: &Signature) -> bool {
        x.params.len() == y.params.len()
            && x.variadic == y.variadic
            && self.tys(x.returns, y.returns)
            && x.params.iter().zip(&y.params).all(|(a, b)| self.tys(*a, *b))
    }

    /// Whether two names mean the same type. What is in it is compared once, under its own name.
    pub fn names(&mut self, x: NameId, y: NameId) -> bool {
        let (name, new_name) = (self.old.name(x), self.new.name(y));
        let (translated, certain) = self.translate(name);
        if translated == new_name && certain {
            return true;
        }
        // Renamed: neither name means anything in the other build. Numbered: the number proves nothing.
        let is_defined = |types: &Types, name: &str| types.name_id(name).is_some_and(|id| !types.defs(id).is_empty());
        let renamed = !is_defined(self.new, name) && !is_defined(self.old, new_name);
        let numbered = is_numbered(name) && skeleton(name) == skeleton(new_name);
        if !renamed && !numbered {
            return false;
        }
        if let Some(known) = self.names.get(&(x, y)) {
            return *known;
        }
        self.names.insert((x, y), true);
        let (olds, news) = (self.old.defs(x), self.new.defs(y));
        let same = match (olds, news) {
            ([], []) => numbered || translated == new_name,
            _ => olds.iter().all(|a| news.iter().any(|b| self.renamed(&a.layout, &b.layout))),
        };
        self.names.insert((x, y), same);
        same
    }

    /// Whether a definition that goes by another name is the same: by layout, and by what it was made for. A container
    /// says only by its parameters what is in it.
    fn renamed(&mut self, x: &Layout, y: &Layout) -> bool {
        x.params.len() == y.params.len()
            && x.params.iter().zip(&y.params).all(|(a, b)| self.tys(*a, *b))
            && !self.layouts(x, y).matters()
    }

    /// The new definition that an old one of the same name became: that of the same file, else an equal one.
    /// `None` if it is among them unchanged, and the file has no other that none of `olds` is: units of which only some
    /// were compiled again have both.
    pub fn changed_into<'n>(&mut self, def: &Def, olds: &[Def], news: &'n [Def], anywhere: bool) -> Option<&'n Def> {
        let file = |types: &Types, d: &Def| -> HashSet<String> {
            d.files.iter().filter_map(|f| types.name(f.0).rsplit('/').next().map(str::to_owned)).collect()
        };
        let files = file(self.old, def);
        let near: Vec<&Def> = news.iter().filter(|n| !files.is_disjoint(&file(self.new, n))).collect();
        let among: Vec<&Def> = if near.is_empty() || anywhere { news.iter().collect() } else { near.clone() };
        let equal = |compare: &mut Self, old: &Def, new: &Def| {
            let difference = compare.layouts(&old.layout, &new.layout);
            difference.is_none()
        };
        if among.iter().any(|n| equal(self, def, n)) {
            let mut others = near.iter().filter(|_| !anywhere);
            return others.find(|n| !olds.iter().any(|old| equal(self, old, n))).copied();
        }
        near.first().copied().or(news.first())
    }

    /// Where two layouts differ.
    pub fn layouts(&mut self, x: &Layout, y: &Layout) -> Difference {
        let mut out = Difference::default();
        if x.keyword != y.keyword {
            out.own(format!("it was a {:?} and is a {:?}", x.keyword, y.keyword).to_lowercase());
        }
        if x.size != y.size {
            out.layout.push(format!("its size changes from {} to {} bytes", x.size, y.size));
        }
        if x.align != y.align {
            out.layout.push(format!("its alignment changes from {} to {}", x.align.max(1), y.align.max(1)));
        }
        if x.keyword == Keyword::Enum {
            self.values(x, y, &mut out);
        }
        self.fields(&x.fields, &y.fields, &mut out);
        if x.variants.len() != y.variants.len() {
            out.own("it has variants in one build only".into());
        }
        for (v, w) in x.variants.iter().zip(&y.variants) {
            self.variants(v, w, &mut out);
        }
        self.slots(x, y, &mut out);
        out
    }

    fn values(&self, x: &Layout, y: &Layout, out: &mut Difference) {
        let olds: HashMap<&str, u64> = x.values.iter().map(|(n, v)| (self.old.name(*n), *v)).collect();
        let news: HashMap<&str, u64> = y.values.iter().map(|(n, v)| (self.new.name(*n), *v)).collect();
        for (name, value) in x.values.iter().map(|(n, v)| (self.old.name(*n), *v)) {
            match news.get(name) {
                Some(new) if *new == value => {}
                Some(new) => {
                    out.own = true;
                    out.values.push(format!("{name} changes from {} to {}", value.cast_signed(), new.cast_signed()));
                }
                None => match y.values.iter().find(|(n, v)| *v == value && !olds.contains_key(self.new.name(*n))) {
                    Some((n, _)) => out.notes.push(format!("{name} is now called {}", self.new.name(*n))),
                    None => {
                        out.own = true;
                        out.values.push(format!("{name} ({}) is gone", value.cast_signed()));
                    }
                },
            }
        }
        for (name, value) in y.values.iter().map(|(n, v)| (self.new.name(*n), *v)) {
            let renamed = x.values.iter().any(|(n, v)| *v == value && !news.contains_key(self.old.name(*n)));
            if !olds.contains_key(name) && !renamed {
                out.notes.push(format!("{name} ({}) is new", value.cast_signed()));
            }
        }
    }

    fn same_field(&mut self, f: &Field, g: &Field) -> bool {
        (f.bit_at, f.bits, f.base, f.computed) == (g.bit_at, g.bits, g.base, g.computed) && self.tys(f.ty, g.ty)
    }

    fn fields(&mut self, x: &[Field], y: &[Field], out: &mut Difference) {
        let (old, new) = (self.old, self.new);
        let mut left: Vec<&Field> = y.iter().collect();
        let mut unmatched = Vec::new();
        for f in x {
            let at = left.iter().position(|g| old.name(f.name) == new.name(g.name) && self.same_field(f, g));
            match at {
                Some(at) => drop(left.remove(at)),
                None => unmatched.push(f),
            }
        }
        let has = |fields: &[Field], types: &Types, name: &str| fields.iter().any(|f| types.name(f.name) == name);
        for f in unmatched {
            let name = old.name(f.name);
            let shown = if f.base { format!("base class {}", old.show(f.ty)) } else { format!("field {name}") };
            if let Some(at) = left.iter().position(|g| new.name(g.name) == name && g.base == f.base && !f.base) {
                let g = left.remove(at);
                let same_ty = self.tys(f.ty, g.ty);
                let place = |f: &Field| match f.bits {
                    Some(bits) => format!("bit {}, {bits} wide", f.bit_at),
                    None => format!("+{}", f.bit_at / 8),
                };
                if place(f) != place(g) {
                    out.layout.push(format!("{shown} moves from {} to {}", place(f), place(g)));
                    out.own |= f.bits != g.bits;
                }
                if !same_ty {
                    out.own(format!("{shown} changes from {} to {}", old.show(f.ty), new.show(g.ty)));
                } else if f.computed != g.computed {
                    out.own(format!("{shown} is found in another way"));
                }
                continue;
            }
            let renamed = left
                .iter()
                .position(|g| !has(y, new, name) && !has(x, old, new.name(g.name)) && self.same_field(f, g) && !f.base);
            if let Some(at) = renamed {
                let g = left.remove(at);
                out.notes.push(format!("{shown} is now called {}", new.name(g.name)));
                continue;
            }
            // A base class at another place.
            if let Some(at) = left.iter().position(|g| f.base && g.base && self.tys(f.ty, g.ty)) {
                let g = left.remove(at);
                out.layout.push(format!("{shown} moves from +{} to +{}", f.bit_at / 8, g.bit_at / 8));
                continue;
            }
            out.own(format!("{shown} is gone"));
        }
        for g in left {
            let shown = if g.base { "base class".to_owned() } else { format!("field {}", new.name(g.name)) };
            out.own(format!("{shown} ({}) is new at +{}", new.show(g.ty), g.bit_at / 8));
        }
    }

    fn variants(&mut self, x: &Variants, y: &Variants, out: &mut Difference) {
        let (old, new) = (self.old, self.new);
        match (&x.discr, &y.discr) {
            (Some(f), Some(g)) if self.same_field(f, g) => {}
            (None, None) => {}
            _ => out.layout.push("its discriminant is another one, or elsewhere".into()),
        }
        let last = |name: &str| name.rsplit("::").next().unwrap_or(name).to_owned();
        let arm_name =
            |types: &Types, ty: TyId| types.name_of(ty).map_or_else(|| types.show(ty), |n| last(types.name(n)));
        let mut left: Vec<_> = y.arms.iter().collect();
        for arm in &x.arms {
            let name = arm_name(old, arm.field.ty);
            let Some(at) = left.iter().position(|b| arm_name(new, b.field.ty) == name) else {
                out.own(format!("variant {name} is gone"));
                continue;
            };
            let other = left.remove(at);
            if arm.value != other.value {
                let show = |v: Option<u64>| v.map_or_else(|| "any other".to_owned(), |v| format!("{v:#x}"));
                out.layout.push(format!(
                    "variant {name} has discriminant {}, in the new build {}",
                    show(arm.value),
                    show(other.value)
                ));
            }
            if let (Some(n), Some(m)) = (old.name_of(arm.field.ty), new.name_of(other.field.ty)) {
                if let (Some(d), Some(e)) = (old.defs(n).first(), new.defs(m).first()) {
                    let inner = self.layouts(&d.layout, &e.layout);
                    out.own |= inner.own;
                    out.layout.extend(inner.layout.into_iter().map(|w| format!("variant {name}: {w}")));
                    out.notes.extend(inner.notes.into_iter().map(|w| format!("variant {name}: {w}")));
                }
            }
        }
        for arm in left {
            out.more_variants.push(format!("variant {} is new", arm_name(new, arm.field.ty)));
        }
    }

    fn slots(&self, x: &Layout, y: &Layout, out: &mut Difference) {
        let mut news: Vec<(u64, &str)> = y.slots.iter().map(|(s, n)| (*s, self.new.name(*n))).collect();
        for (slot, name) in x.slots.iter().map(|(s, n)| (*s, self.old.name(*n))) {
            if let Some(at) = news.iter().position(|n| *n == (slot, name)) {
                news.remove(at);
                continue;
            }
            let shown = crate::build::demangle(name);
            match news.iter().position(|(_, n)| *n == name) {
                Some(at) => {
                    let (to, _) = news.remove(at);
                    out.vtable.push(format!("virtual {shown} moves from slot {slot} to {to}"));
                }
                None => out.vtable.push(format!("virtual {shown} (slot {slot}) is gone")),
            }
        }
        for (slot, name) in news {
            out.vtable.push(format!("virtual {} is new in slot {slot}", crate::build::demangle(name)));
        }
        out.own |= !out.vtable.is_empty();
    }

    /// Whether several definitions under one name are to be told apart by what they are only.
    pub fn by_content(name: &str) -> bool {
        is_lambda(name)
    }
}
