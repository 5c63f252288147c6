//! What a name proves. Compilers number what shares a name within one function
//! or file; the numbers shift when something is added, so members of one such
//! family can't be told apart by their names alone.

use crate::build::{canonical, split_suffix, Name};

/// A name without its numbers, and the source file where that tells symbols apart.
pub type Key = (String, Option<String>);

/// What is compared of one name.
pub struct Kin {
    /// Without numbers, but with hashes of crates: whoever shares it with nobody is known by it.
    pub exact: String,
    /// Without numbers and hashes.
    pub family: String,
    /// With numbers, without hashes.
    pub own: String,
    /// The source file, for a local symbol of C or C++.
    pub file: Option<String>,
    /// Rust before v0: the hash is the only thing that tells instances of a generic function apart.
    pub legacy: bool,
}

impl Kin {
    pub fn new(name: &Name<'_>) -> Self {
        let text = name.text;
        let (core, suffix) = split_suffix(text);
        let numbers = suffix.split_once(".llvm").map_or(suffix, |(numbers, _)| numbers);
        let suffix = canonical(&format!("x{suffix}")).split_off(1);
        let plain = canonical(text);
        let rust = rustc_demangle::try_demangle(core).ok();
        let file = if rust.is_some() { None } else { name.file.map(str::to_owned) };
        let legacy = rust.is_some() && !core.starts_with("_R");
        let (exact, family, own) = match rust {
            Some(d) if !legacy => (
                format!("{}@{}{suffix}", unnumbered(&format!("{d}")), v0_text(core, true, false)),
                unnumbered(&plain),
                format!("{plain}@{}{numbers}", v0_text(core, false, true)),
            ),
            Some(_) => (plain.clone(), plain, text.to_owned()),
            None => {
                let family = cpp_family(core).map_or(plain, |f| f + &suffix);
                (family.clone(), family, text.to_owned())
            }
        };
        Self { exact, family, own, file, legacy }
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

    fn kin(text: &'static str) -> Kin {
        Kin::new(&Name { text, file: None })
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
