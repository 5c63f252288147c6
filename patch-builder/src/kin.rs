//! Whether the two files are builds of one program, made in one way.

use std::collections::{BTreeMap, BTreeSet};

use crate::build::{units, Unit};
use crate::pairing::Pairing;
use crate::report::Refusal;
use crate::side::Side;

/// What is to be said of the pair as a whole.
#[derive(Debug, Default)]
pub struct Kin {
    /// Reasons to refuse.
    pub refusals: Vec<Refusal>,
    /// What the user should know.
    pub warnings: Vec<String>,
}

/// Compares the builds as a whole; `debug` is where their DWARF is.
#[must_use]
pub fn check(old: &Side<'_>, new: &Side<'_>, pairing: &Pairing, debug: (&[u8], &[u8])) -> Kin {
    let mut out = Kin::default();
    if old.build.pie != new.build.pie {
        let how = |pie| if pie { "position-independent" } else { "linked to fixed addresses" };
        out.refusals.push(Refusal {
            rule: "unsupported".into(),
            symbol: new.build.path.clone(),
            message: format!("the old build is {}, the new one {}", how(old.build.pie), how(new.build.pie)),
            remedy: "build both with the same flags (-pie or -no-pie)".into(),
            ..Refusal::default()
        });
    }
    let (a, b) = rayon::join(|| units(debug.0), || units(debug.1));
    if let Some(message) = no_unit_in_common(&a, &b) {
        out.refusals.push(Refusal {
            rule: "other-program".into(),
            symbol: new.build.path.clone(),
            message,
            remedy: "give two builds of one program; if all its files were renamed: --allow other-program".into(),
            ..Refusal::default()
        });
    }
    out.warnings.extend(other_producers(&a, &b));
    let paired = (0..old.build.funcs.len()).filter(|f| pairing.func_pair(*f as u32).is_some()).count();
    if out.refusals.is_empty() && 2 * paired < old.build.funcs.len() {
        let all = old.build.funcs.len();
        out.warnings.push(format!("only {paired} of {all} functions of the old build are in the new one, too: are they builds of one program?"));
    }
    out
}

/// Units of the program's own: the library's come precompiled, and every program has them.
fn own(units: &[Unit]) -> BTreeSet<&str> {
    let precompiled =
        |name: &str| ["/rustc/", "library/", "../sysdeps/", "/build/glibc"].iter().any(|p| name.starts_with(p));
    units.iter().map(|u| u.name.as_str()).filter(|n| !precompiled(n) && *n != "<artificial>").collect()
}

fn no_unit_in_common(old: &[Unit], new: &[Unit]) -> Option<String> {
    let (a, b) = (own(old), own(new));
    let (x, y) = (a.first()?, b.first()?);
    let file = |name: &str| name.rsplit('/').next().unwrap_or(name).to_owned();
    let known: BTreeSet<String> = a.iter().map(|n| file(n)).collect();
    (!b.iter().any(|n| known.contains(&file(n))))
        .then(|| format!("the two builds have no source file in common ({x}, … and {y}, …)"))
}

/// Units of one name that were compiled by another compiler or with other flags.
fn other_producers(old: &[Unit], new: &[Unit]) -> Option<String> {
    let by_name = |units: &[Unit]| -> BTreeMap<String, BTreeSet<String>> {
        let mut out: BTreeMap<_, BTreeSet<_>> = BTreeMap::new();
        for u in units {
            out.entry(u.name.clone()).or_default().insert(u.producer.clone());
        }
        out
    };
    let (a, b) = (by_name(old), by_name(new));
    let differ: Vec<_> = a.iter().filter_map(|(n, x)| Some((n, x, b.get(n).filter(|y| *y != x)?))).collect();
    let (name, x, y) = differ.first()?;
    let only = |of: &BTreeSet<String>, not: &BTreeSet<String>| of.difference(not).next().or(of.first()).cloned();
    let (x, y) = (only(x, y)?, only(y, x)?);
    let (mut was, mut is) = (x.clone(), y.clone());
    if x.split(' ').next() == y.split(' ').next() {
        (was, is) = (words_only_in(&x, &y), words_only_in(&y, &x));
    }
    Some(format!(
        "{} of {} source files were compiled in another way, {name} for one: old `{was}`, new `{is}`. Functions whose source is \
         the same differ, too, and are in the patch; build both with the same compiler and flags",
        differ.len(),
        a.len(),
    ))
}

/// The words of a producer that the other has not.
fn words_only_in(text: &str, other: &str) -> String {
    let known: BTreeSet<&str> = other.split(' ').collect();
    let words: Vec<&str> = text.split(' ').filter(|w| !known.contains(w)).collect();
    if words.is_empty() {
        text.to_owned()
    } else {
        words.join(" ")
    }
}
