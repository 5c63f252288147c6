//! What a name proves. Compilers number what shares a name within one function
//! or file; the numbers shift when something is added, so members of one such
//! family can't be told apart by their names alone.

use std::borrow::Cow;

use indexmap::IndexSet;
use rayon::prelude::*;

use crate::build::{canonical, split_suffix, Name};

/// A text, by its place in [`Names`]: equal texts have equal ones.
pub type Text = u32;
/// A name without its numbers, and the source file where that tells symbols apart.
pub type Key = (Text, Option<Text>);

/// The texts of all names of both builds, each once.
#[derive(Default)]
pub struct Names<'d> {
    texts: IndexSet<Cow<'d, str>, foldhash::fast::RandomState>,
}

impl<'d> Names<'d> {
    fn add(&mut self, text: Cow<'d, str>) -> Text {
        self.texts.insert_full(text).0 as Text
    }

    fn text(&self, text: Text) -> &str {
        &self.texts[text as usize]
    }

    /// A key in an order that does not depend on when its texts were first seen.
    pub fn order(&self, key: Key) -> (&str, Option<&str>) {
        (self.text(key.0), key.1.map(|file| self.text(file)))
    }
}

/// What is compared of one name.
#[derive(Clone, Copy, Debug)]
pub struct Kin {
    /// Without numbers, but with hashes of crates: whoever shares it with nobody is known by it.
    pub exact: Text,
    /// Without numbers and hashes.
    pub family: Text,
    /// With numbers, without hashes.
    pub own: Text,
    /// The source file, for a local symbol of C or C++.
    pub file: Option<Text>,
    /// Rust before v0: the hash is the only thing that tells instances of a generic function apart.
    pub legacy: bool,
}

/// What there is to compare of each name of each symbol of one build.
pub struct Kins {
    all: Vec<Kin>,
    /// Where each symbol's begin, and where the last one's end.
    starts: Vec<u32>,
}

impl Kins {
    /// Of symbols with these names.
    pub fn new<'d>(symbols: &[&[Name<'d>]], names: &mut Names<'d>) -> Self {
        let spelled: Vec<Vec<Spelled<'d>>> =
            symbols.par_iter().map(|all| all.iter().map(Spelled::new).collect()).collect();
        let (mut all, mut starts) = (Vec::with_capacity(symbols.len()), vec![0]);
        for symbol in spelled {
            all.extend(symbol.into_iter().map(|s| Kin {
                exact: names.add(s.exact),
                family: names.add(s.family),
                own: names.add(s.own),
                file: s.file.map(|file| names.add(file.into())),
                legacy: s.legacy,
            }));
            starts.push(all.len() as u32);
        }
        Self { all, starts }
    }

    /// Those of one symbol.
    pub fn of(&self, id: u32) -> &[Kin] {
        &self.all[self.starts[id as usize] as usize..self.starts[id as usize + 1] as usize]
    }

    /// Those of every symbol, in order.
    pub fn iter(&self) -> impl Iterator<Item = (u32, &[Kin])> {
        (0..self.starts.len() as u32 - 1).map(|id| (id, self.of(id)))
    }
}

/// One name, in words.
struct Spelled<'d> {
    exact: Cow<'d, str>,
    family: Cow<'d, str>,
    own: Cow<'d, str>,
    file: Option<&'d str>,
    legacy: bool,
}

/// Whether a name is neither mangled nor numbered: it is all that there is to it.
fn is_plain(text: &str) -> bool {
    !text.starts_with(['_', 'R', 'Z']) && !text.contains('.')
}

impl<'d> Spelled<'d> {
    fn new(name: &Name<'d>) -> Self {
        let text = name.text;
        if is_plain(text) {
            return Self { exact: text.into(), family: text.into(), own: text.into(), file: name.file, legacy: false };
        }
        let (core, suffix) = split_suffix(text);
        let numbers = suffix.split_once(".llvm").map_or(suffix, |(numbers, _)| numbers);
        let suffix = canonical(&format!("x{suffix}")).split_off(1);
        let plain = canonical(text);
        let rust = rustc_demangle::try_demangle(core).ok();
        let file = if rust.is_some() { None } else { name.file };
        let legacy = rust.is_some() && !core.starts_with("_R");
        let (exact, family, own): (String, String, Cow<'d, str>) = match rust {
            Some(d) if !legacy => (
                format!("{}@{}{suffix}", unnumbered(&format!("{d}")), v0_text(core, true, false)),
                unnumbered(&plain),
                format!("{plain}@{}{numbers}", v0_text(core, false, true)).into(),
            ),
            Some(_) => (plain.clone(), plain, text.into()),
            None => {
                let family = cpp_family(core).map_or(plain, |f| f + &suffix);
                (family.clone(), family, text.into())
            }
        };
        Self { exact: exact.into(), family: family.into(), own, file, legacy }
    }
}

/// A name that ends in a number of its own (`count.3`): not even alone does it say which function it belongs to.
pub fn is_dotted(name: &str) -> bool {
    let (_, suffix) = split_suffix(name);
    suffix.split('.').skip(1).any(|p| !p.is_empty() && p.bytes().all(|b| b.is_ascii_digit()))
}

/// `{closure#3}`, `{lambda(int)#2}`: without the number.
fn unnumbered(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(at) = rest.find('#') {
        let (head, tail) = rest.split_at(at);
        out.push_str(head);
        let digits = tail[1..].bytes().take_while(u8::is_ascii_digit).count();
        if digits == 0 || !tail[1 + digits..].starts_with('}') {
            out.push('#');
            rest = &tail[1..];
        } else {
            rest = &tail[1 + digits..];
        }
    }
    out.push_str(rest);
    out
}

/// What a C++ name that belongs to a function, or to a lambda or unnamed type, is without numbers and
/// discriminators; `None` for every other name.
fn cpp_family(core: &str) -> Option<String> {
    let rest = core.strip_prefix("_Z")?;
    if !["Z", "Ul", "Ut"].iter().any(|mark| rest.contains(mark)) {
        return None;
    }
    let Some(text) = cpp_demangle::Symbol::new(core).ok().and_then(|d| d.demangle().ok()) else {
        return Some(core.chars().filter(|c| !c.is_ascii_digit()).collect());
    };
    let variants = ["C1E", "C2E", "C3E", "D0E", "D1E", "D2E"].iter().filter(|v| core.contains(**v));
    Some(variants.fold(unnumbered(&text), |out, v| out + "@" + v))
}

/// A v0 name with its back references blanked, and with or without what tells crates, and what tells
/// equal names in one place, apart.
fn v0_text(core: &str, crates: bool, places: bool) -> String {
    let bytes = core.as_bytes();
    let base62 = |from: usize| -> Option<usize> {
        let len = bytes.get(from..)?.iter().take_while(|b| b.is_ascii_alphanumeric()).count();
        (bytes.get(from + len) == Some(&b'_')).then_some(from + len + 1)
    };
    let mut out = String::with_capacity(core.len());
    let mut at = 0;
    while let Some(byte) = bytes.get(at) {
        if byte.is_ascii_digit() {
            let digits = bytes[at..].iter().take_while(|b| b.is_ascii_digit()).count();
            let len: usize = core[at..at + digits].parse().unwrap_or(0);
            let end = (at + digits).saturating_add(len).min(bytes.len());
            out.push_str(core.get(at..end).unwrap_or(""));
            at = end.max(at + digits);
            continue;
        }
        match (byte, base62(at + 1)) {
            (b'B', Some(end)) => {
                out.push('B');
                at = end;
            }
            (b's', Some(end)) => {
                if if out.ends_with('C') { crates } else { places } {
                    out.push_str(core.get(at..end).unwrap_or(""));
                }
                at = end;
            }
            _ => {
                out.push(char::from(*byte));
                at += 1;
            }
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    fn kin(text: &'static str) -> Spelled<'static> {
        Spelled::new(&Name { text, file: None })
    }

    #[test]
    fn a_plain_name_is_spelled_as_it_would_be_anyway() {
        for text in ["main", "f0_240", "Rest", "memcpy", "ZSTD_compress", "_start", "x", "r", "héllo", "a$b"] {
            let s = kin(text);
            assert_eq!((&*s.exact, &*s.family, &*s.own), (text, text, text));
            assert_eq!(canonical(text), text);
        }
    }

    #[test]
    fn equal_texts_are_one_and_keep_their_order() {
        let mut names = Names::default();
        let (b, a) = (Name { text: "beta", file: None }, Name { text: "alpha", file: Some("a.c") });
        let kins = Kins::new(&[&[b], &[a, b], &[]], &mut names);
        assert_eq!(kins.of(0)[0].own, kins.of(1)[1].own);
        assert_eq!(kins.iter().map(|(_, k)| k.len()).collect::<Vec<_>>(), [1, 2, 0]);
        let key = |k: &Kin| (k.family, k.file);
        assert!(names.order(key(&kins.of(1)[0])) < names.order(key(&kins.of(0)[0])));
    }

    #[test]
    fn numbers_do_not_part_a_family() {
        for (a, b) in [
            ("_RNvNvCs56HGsqMBDvY_4prog1f1N", "_RNvNvCs56HGsqMBDvY_4prog1fs_1N"),
            ("_RNvNvCs56HGsqMBDvY_4prog1fs_1N", "_RNvNvCs56HGsqMBDvY_4prog1fs0_1N"),
            ("_RNCNvCs56HGsqMBDvY_4prog5setup0B3_", "_RNCNvCs56HGsqMBDvY_4prog5setups_0B3_"),
            ("_ZZ1fiE1n", "_ZZ1fiE1n_0"),
            ("_ZZ5setupiENKUliE_clEi", "_ZZ5setupiENKUliE0_clEi"),
            ("count.0", "count.1"),
            ("work.isra.0", "work.isra.1"),
            ("_RNvCs56HGsqMBDvY_4prog1f.0", "_RNvCs56HGsqMBDvY_4prog1f.1"),
        ] {
            assert_eq!(kin(a).exact, kin(b).exact, "{a} {b}");
            assert_eq!(kin(a).family, kin(b).family, "{a} {b}");
            assert_ne!(kin(a).own, kin(b).own, "{a} {b}");
        }
    }

    #[test]
    fn everything_else_does() {
        for (a, b) in [
            ("_ZN1AC1Ev", "_ZN1AC2Ev"),
            ("_ZZ1fiE1n", "_ZZ1giE1n"),
            ("_ZGVZ1fiE1n", "_ZZ1fiE1n"),
            ("work.cold", "work"),
            ("_RNvCs56HGsqMBDvY_4prog1f", "_RNvCs4fqI2P2rA04_4prog1f"),
        ] {
            assert_ne!(kin(a).exact, kin(b).exact, "{a} {b}");
        }
        assert_eq!(kin("_RNvCs56HGsqMBDvY_4prog1f").own, kin("_RNvCs4fqI2P2rA04_4prog1f").own);
    }
}
