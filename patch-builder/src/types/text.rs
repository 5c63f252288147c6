//! Layouts as text for people, and as digests that do not depend on the build.

use std::collections::{BTreeSet, HashMap};

use sha2::{Digest as _, Sha256};

use super::{Def, Field, Keyword, Layout, NameId, PointerKind, Signature, Ty, TyId, Types};

/// A definition, readable: one line per field, each with its place.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct DefText {
    /// `struct client, 40 bytes`.
    pub head: String,
    /// Place, name and type of each field; value and name of each enumerator; slot and name of each virtual function.
    pub lines: Vec<(String, String)>,
}

/// A type layout as a patch records it.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct LayoutRecord {
    /// The type's name.
    pub name: String,
    /// 32 hex digits over the layout and everything that it holds: equal for equal layouts in any build.
    pub digest: String,
    /// The layout, one field a line.
    pub text: String,
    /// `file:line` of the definition.
    pub source: String,
}

impl Types {
    /// A type expression, readable.
    #[must_use]
    pub fn show(&self, ty: TyId) -> String {
        self.show_to(ty, 0)
    }

    fn show_to(&self, ty: TyId, depth: u32) -> String {
        if depth > 12 {
            return "…".into();
        }
        let inner = |t: TyId| self.show_to(t, depth + 1);
        match self.ty(ty) {
            Ty::Void => "void".into(),
            Ty::Base(name, _, _) | Ty::Named(name) | Ty::Opaque(name) => self.name(*name).to_owned(),
            Ty::Pointer(kind, to) => match (kind, self.ty(*to)) {
                (PointerKind::Raw, Ty::Function(s)) => self.show_function(s, "(*)", depth + 1),
                (PointerKind::Raw, _) => format!("{} *", inner(*to)).replace("* *", "**"),
                (PointerKind::Borrow, _) => format!("&{}", inner(*to)),
                (PointerKind::Reference, _) => format!("{} &", inner(*to)),
            },
            Ty::Array(of, counts) => {
                let counts: String =
                    counts.iter().map(|c| c.map_or_else(|| "[]".to_owned(), |n| format!("[{n}]"))).collect();
                format!("{}{counts}", inner(*of))
            }
            Ty::Function(s) => self.show_function(s, "", depth + 1),
            Ty::Member(of, _) => format!("{} ::*", inner(*of)),
            Ty::Inline(layout) => {
                let keyword = keyword(layout.keyword);
                let fields: Vec<String> = match layout.keyword {
                    Keyword::Enum => layout.values.iter().map(|(n, v)| format!("{} = {v}", self.name(*n))).collect(),
                    _ => layout.fields.iter().map(|f| format!("{} {}", inner(f.ty), self.name(f.name))).collect(),
                };
                format!("{keyword} {{ {} }}", fields.join("; "))
            }
        }
    }

    fn show_function(&self, s: &Signature, name: &str, depth: u32) -> String {
        let mut params: Vec<String> = s.params.iter().map(|p| self.show_to(*p, depth + 1)).collect();
        if s.variadic {
            params.push("...".into());
        }
        format!("{} {name}({})", self.show_to(s.returns, depth + 1), params.join(", ")).replace(" (", " (")
    }

    /// A signature with the names of its parameters.
    #[must_use]
    pub fn show_signature(&self, name: &str, s: &Signature, names: &[NameId]) -> String {
        let mut params: Vec<String> = s
            .params
            .iter()
            .enumerate()
            .map(|(i, p)| match names.get(i).map_or("", |n| self.name(*n)) {
                "" => self.show(*p),
                name => format!("{} {name}", self.show(*p)).replace("* ", "*"),
            })
            .collect();
        if s.variadic {
            params.push("...".into());
        }
        let no_return = if s.noreturn { "noreturn " } else { "" };
        format!("{no_return}{} {name}({})", self.show(s.returns), params.join(", "))
    }

    /// The lines of a layout.
    #[must_use]
    pub fn layout_text(&self, name: &str, layout: &Layout) -> DefText {
        let head = match name.split_once(' ') {
            Some(("struct" | "union" | "enum", _)) => format!("{name}, {} bytes", layout.size),
            _ => format!("{} {name}, {} bytes", keyword(layout.keyword), layout.size),
        };
        let mut out = DefText { head, lines: Vec::new() };
        if layout.align != 0 {
            out.head += &format!(", aligned to {}", layout.align);
        }
        out.lines.extend(layout.fields.iter().map(|f| self.field_line(f)));
        for v in &layout.variants {
            if let Some(d) = &v.discr {
                let (at, what) = self.field_line(d);
                out.lines.push((at, format!("discriminant: {what}")));
            }
            for arm in &v.arms {
                let value = arm.value.map_or_else(|| "else".to_owned(), |v| format!("= {v:#x}"));
                let content = self.name_of(arm.field.ty).map(|n| self.defs(n));
                let text = self.show(arm.field.ty);
                out.lines.push((value, format!("variant {text}")));
                for f in content.into_iter().flatten().take(1).flat_map(|d| &d.layout.fields) {
                    let (at, what) = self.field_line(f);
                    out.lines.push((at, format!("  {what}")));
                }
            }
        }
        for (name, value) in &layout.values {
            out.lines.push((format!("= {}", value.cast_signed()), self.name(*name).to_owned()));
        }
        for (slot, name) in &layout.slots {
            out.lines.push((format!("virtual {slot}"), self.name(*name).to_owned()));
        }
        out
    }

    fn field_line(&self, f: &Field) -> (String, String) {
        let mut at = match f.computed {
            true => "+?".to_owned(),
            false => format!("+{}", f.bit_at / 8),
        };
        if let Some(bits) = f.bits {
            at += &format!(" bit {}:{bits}", f.bit_at % 8);
        }
        let name = if f.base { "base class" } else { self.name(f.name) };
        (at, format!("{name}: {}", self.show(f.ty)))
    }

    /// The name of a type that has one.
    #[must_use]
    pub fn name_of(&self, ty: TyId) -> Option<NameId> {
        match self.ty(ty) {
            Ty::Named(name) => Some(*name),
            _ => None,
        }
    }

    /// The names of what a layout holds by value.
    fn held(&self, layout: &Layout) -> Vec<NameId> {
        let arms = layout.variants.iter().flat_map(|v| v.arms.iter().map(|a| &a.field));
        self.held_in(layout.fields.iter().chain(arms).map(|f| f.ty).collect())
    }

    fn held_in(&self, mut open: Vec<TyId>) -> Vec<NameId> {
        let mut out = Vec::new();
        while let Some(ty) = open.pop() {
            match self.ty(ty) {
                Ty::Named(name) => out.push(*name),
                Ty::Array(of, _) => open.push(*of),
                Ty::Inline(inner) => out.extend(self.held(inner)),
                _ => {}
            }
        }
        out
    }

    /// A definition as a patch records it.
    #[must_use]
    pub fn record(&self, name: NameId, def: &Def) -> LayoutRecord {
        Digests::new(self).record(name, def)
    }

    /// 32 hex digits over a type and everything that it holds by value: equal for equal types in any build.
    #[must_use]
    pub fn type_digest(&self, ty: TyId) -> String {
        let mut text = self.show(ty);
        if let Ty::Base(_, encoding, size) = self.ty(ty) {
            text += &format!(", {size} bytes of kind {encoding}");
        }
        Digests::new(self).digest(&text, &self.held_in(vec![ty]))
    }

    fn flat(&self, name: &str, layout: &Layout) -> String {
        let text = self.layout_text(name, layout);
        text.lines.iter().fold(text.head, |out, (at, what)| format!("{out}\n{at} {what}"))
    }
}

/// Digests of layouts, each made once.
pub struct Digests<'t> {
    types: &'t Types,
    known: HashMap<NameId, [u8; 32]>,
}

impl<'t> Digests<'t> {
    /// None yet.
    #[must_use]
    pub fn new(types: &'t Types) -> Self {
        Self { types, known: HashMap::new() }
    }

    /// A definition as a patch records it.
    #[must_use]
    pub fn record(&mut self, name: NameId, def: &Def) -> LayoutRecord {
        let types = self.types;
        let name = types.name(name).to_owned();
        let text = types.flat(&name, &def.layout);
        let digest = self.digest(&text, &types.held(&def.layout));
        let source = def.files.first().map_or_else(String::new, |at| types.place(*at));
        LayoutRecord { name, digest, text, source }
    }

    /// Of a text and of the types that it names.
    fn digest(&mut self, text: &str, parts: &[NameId]) -> String {
        let mut hasher = Sha256::new_with_prefix(text.as_bytes());
        for part in parts {
            hasher.update(self.of(*part));
        }
        hasher.finalize().iter().take(16).map(|b| format!("{b:02x}")).collect()
    }

    /// Of all definitions of a name and what they hold. By a list, not by calls: types may nest as deep as they like.
    fn of(&mut self, name: NameId) -> [u8; 32] {
        let types = self.types;
        let mut open = vec![name];
        let mut begun = BTreeSet::new();
        while let Some(top) = open.last().copied() {
            let held: Vec<NameId> = types.defs(top).iter().flat_map(|d| types.held(&d.layout)).collect();
            // What holds itself, as only damaged types do, is begun already.
            let first = begun.insert(top);
            let missing = held.iter().filter(|h| !self.known.contains_key(h) && !begun.contains(h));
            let before = open.len();
            if first && !self.known.contains_key(&top) {
                open.extend(missing);
            }
            if open.len() > before {
                continue;
            }
            open.pop();
            if !self.known.contains_key(&top) {
                let mut hasher = Sha256::new();
                for d in types.defs(top) {
                    hasher.update(types.flat(types.name(top), &d.layout));
                }
                for h in &held {
                    hasher.update(self.known.get(h).copied().unwrap_or_default());
                }
                self.known.insert(top, hasher.finalize().into());
            }
        }
        self.known.get(&name).copied().unwrap_or_default()
    }
}

fn keyword(k: Keyword) -> &'static str {
    match k {
        Keyword::Struct => "struct",
        Keyword::Union => "union",
        Keyword::Enum => "enum",
    }
}
