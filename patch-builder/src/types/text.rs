//! Layouts as text for people, and as digests that do not depend on the build.

use std::collections::BTreeSet;

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
        let name = self.name(name).to_owned();
        let text = self.flat(&name, &def.layout);
        let digest = self.digest(&text, self.held(&def.layout));
        let source = def.files.first().map_or_else(String::new, |at| self.place(*at));
        LayoutRecord { name, digest, text, source }
    }

    /// 32 hex digits over a type and everything that it holds by value: equal for equal types in any build.
    #[must_use]
    pub fn type_digest(&self, ty: TyId) -> String {
        let mut text = self.show(ty);
        if let Ty::Base(_, encoding, size) = self.ty(ty) {
            text += &format!(", {size} bytes of kind {encoding}");
        }
        self.digest(&text, self.held_in(vec![ty]))
    }

    fn flat(&self, name: &str, layout: &Layout) -> String {
        let text = self.layout_text(name, layout);
        text.lines.iter().fold(text.head, |out, (at, what)| format!("{out}\n{at} {what}"))
    }

    /// Of a text and of everything that its types consist of, each once.
    fn digest(&self, text: &str, mut open: Vec<NameId>) -> String {
        let mut hasher = Sha256::new_with_prefix(text.as_bytes());
        let mut seen = BTreeSet::new();
        while let Some(part) = open.pop() {
            if !seen.insert(part) {
                continue;
            }
            for d in self.defs(part) {
                hasher.update(self.flat(self.name(part), &d.layout));
                open.extend(self.held(&d.layout));
            }
        }
        hasher.finalize().iter().take(16).map(|b| format!("{b:02x}")).collect()
    }
}

fn keyword(k: Keyword) -> &'static str {
    match k {
        Keyword::Struct => "struct",
        Keyword::Union => "union",
        Keyword::Enum => "enum",
    }
}
