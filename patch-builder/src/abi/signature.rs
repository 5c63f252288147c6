//! What callers and callees agree on.

use super::same::Compare;
use crate::types::{Function, Signature, Ty, TyId};

/// How an old caller and a new callee disagree; and what differs without harm.
pub struct Disagreement {
    pub wrong: Vec<String>,
    pub notes: Vec<String>,
}

fn is_float(encoding: u8) -> bool {
    matches!(encoding, 3 | 4) // DW_ATE_complex_float, DW_ATE_float
}

/// Compares two versions of a function's contract.
pub fn compare(c: &mut Compare<'_>, old: &Function, new: &Function) -> Disagreement {
    let (x, y) = (&old.signature, &new.signature);
    let mut out = Disagreement { wrong: Vec::new(), notes: Vec::new() };
    if x.params.len() != y.params.len() {
        out.wrong.push(format!("it takes {} arguments, in the new build {}", x.params.len(), y.params.len()));
    } else {
        for (i, (a, b)) in x.params.iter().zip(&y.params).enumerate() {
            match passed_alike(c, *a, *b, 0) {
                Alike::Yes => {}
                Alike::Nearly => out.notes.push(format!(
                    "argument {} changes from {} to {}, which are passed alike",
                    i + 1,
                    c.old.show(*a),
                    c.new.show(*b)
                )),
                Alike::No => {
                    out.wrong.push(format!("argument {} changes from {} to {}", i + 1, c.old.show(*a), c.new.show(*b)))
                }
            }
        }
    }
    returns(c, x, y, &mut out);
    if x.variadic != y.variadic {
        out.wrong.push("it takes a varying number of arguments in one build only".into());
    }
    if x.method != y.method {
        out.wrong.push("it belongs to an object in one build only".into());
    }
    if x.noreturn && !y.noreturn {
        out.wrong.push("its callers rely on it never to return".into());
    }
    out
}

fn returns(c: &mut Compare<'_>, x: &Signature, y: &Signature, out: &mut Disagreement) {
    let (a, b) = (x.returns, y.returns);
    let (old, new) = (c.old, c.new);
    if matches!(old.ty(a), Ty::Void) && is_scalar(new.ty(b)) {
        out.notes.push(format!("it returns {} now, which its callers do not look at", new.show(b)));
        return;
    }
    match passed_alike(c, a, b, 0) {
        Alike::Yes => {}
        Alike::Nearly => out.notes.push(format!("it returns {} in place of {}", new.show(b), old.show(a))),
        Alike::No => out.wrong.push(format!("it returns {}, in the new build {}", old.show(a), new.show(b))),
    }
}

fn is_scalar(ty: &Ty) -> bool {
    matches!(ty, Ty::Base(_, encoding, size) if !is_float(*encoding) && *size <= 8) || matches!(ty, Ty::Pointer(..))
}

#[derive(PartialEq, Eq)]
enum Alike {
    Yes,
    /// The same bits in the same place, under another type.
    Nearly,
    No,
}

/// Whether what an old caller passes is what a new callee takes.
fn passed_alike(c: &mut Compare<'_>, a: TyId, b: TyId, depth: u32) -> Alike {
    if c.tys(a, b) {
        return Alike::Yes;
    }
    if depth > 8 {
        return Alike::No;
    }
    let (old, new) = (c.old, c.new);
    let enum_size = |types: &crate::types::Types, ty: &Ty| match ty {
        Ty::Named(n) => {
            types.defs(*n).first().filter(|d| d.layout.keyword == crate::types::Keyword::Enum).map(|d| d.layout.size)
        }
        Ty::Inline(l) if l.keyword == crate::types::Keyword::Enum => Some(l.size),
        _ => None,
    };
    match (old.ty(a), new.ty(b)) {
        (Ty::Base(_, x, size), Ty::Base(_, y, other)) if size == other && is_float(*x) == is_float(*y) => Alike::Nearly,
        (Ty::Pointer(_, x), Ty::Pointer(_, y)) => match (old.ty(*x), new.ty(*y)) {
            (Ty::Void, _) | (_, Ty::Void) => Alike::Nearly,
            (Ty::Pointer(..), Ty::Pointer(..)) | (Ty::Base(..), Ty::Base(..)) => passed_alike(c, *x, *y, depth + 1),
            _ => Alike::No,
        },
        (x, y) => match (enum_size(old, x), enum_size(new, y), x, y) {
            (Some(size), None, _, Ty::Base(_, e, other)) | (None, Some(size), Ty::Base(_, e, other), _)
                if size == *other && !is_float(*e) =>
            {
                Alike::Nearly
            }
            (Some(size), Some(other), _, _) if size == other => Alike::Nearly,
            _ => Alike::No,
        },
    }
}
