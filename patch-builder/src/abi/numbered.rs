//! Names that compilers number: `{closure_env#3}`, `{impl#2}`, lambdas.
//!
//! A number is no identity: an inserted closure shifts those behind it. The
//! functions tell: where an old function is paired with a new one, the numbers
//! in their paths are those of the same thing.

use std::collections::HashMap;

/// Which old path of a numbered thing is which new one.
#[derive(Debug, Default)]
pub struct Numbered {
    map: HashMap<String, String>,
}

/// Whether a name has parts that compilers number.
pub fn is_numbered(name: &str) -> bool {
    name.contains("#") && name.contains('{') || is_lambda(name)
}

/// Whether it is a lambda of C++: several of one function go by one name.
pub fn is_lambda(name: &str) -> bool {
    name.contains("<lambda") || name.contains("(anonymous class)")
}

/// The places of `{kind#N}` in a name: start of its path, start of the brace, end.
fn occurrences(name: &str) -> Vec<(usize, usize, usize)> {
    let mut out = Vec::new();
    for (open, _) in name.match_indices('{') {
        let Some(len) = name[open..].find('}') else { break };
        let inside = &name[open + 1..open + len];
        let Some((_, number)) = inside.rsplit_once('#') else { continue };
        if number.bytes().all(|b| b.is_ascii_digit()) {
            out.push((path_start(name, open), open, open + len + 1));
        }
    }
    out
}

/// Where the path that leads to `at` begins: back over names, `::` and balanced brackets.
fn path_start(name: &str, at: usize) -> usize {
    let bytes = name.as_bytes();
    let (mut i, mut depth) = (at, 0u32);
    while i > 0 {
        match bytes[i - 1] {
            b'>' | b')' | b'}' | b']' if i >= 2 && bytes[i - 2] == b'-' && bytes[i - 1] == b'>' => {}
            b'>' | b')' | b'}' | b']' => depth += 1,
            b'<' | b'(' | b'{' | b'[' if depth > 0 => depth -= 1,
            b'<' | b'(' | b'{' | b'[' => break,
            b' ' | b',' | b'&' | b'*' if depth == 0 => break,
            _ => {}
        }
        i -= 1;
    }
    i
}

/// A closure and its state go by one number.
fn plain(path: &str) -> String {
    path.replace("_env#", "#")
}

/// The name without its numbers.
pub fn skeleton(name: &str) -> String {
    let mut out = String::with_capacity(name.len());
    let mut at = 0;
    for (_, open, end) in occurrences(name) {
        let number = name[open..end].rfind('#').map_or(end, |n| open + n);
        out.push_str(&name[at..number]);
        at = end - 1;
    }
    out.push_str(&name[at..]);
    out
}

impl Numbered {
    /// Learns from the paths of two functions that are versions of each other.
    pub fn learn(&mut self, old: &str, new: &str) {
        let (a, b) = (occurrences(old), occurrences(new));
        if a.len() != b.len() || a.is_empty() || skeleton(old) != skeleton(new) {
            return;
        }
        for ((from, _, end), (new_from, _, new_end)) in a.into_iter().zip(b) {
            self.map.entry(plain(&old[from..end])).or_insert_with(|| plain(&new[new_from..new_end]));
        }
    }

    /// The name that an old name has in the new build, and whether every number in it is known.
    pub fn translate(&self, name: &str) -> (String, bool) {
        let mut out = String::with_capacity(name.len());
        let (mut at, mut known) = (0, true);
        for (from, open, end) in occurrences(name) {
            let new = self.map.get(&plain(&name[from..end]));
            known &= new.is_some();
            let number = |path: &str| path.rfind('#').map(|n| path[n..path.len() - 1].to_owned());
            let hash = name[open..end].rfind('#').map_or(end, |n| open + n);
            out.push_str(&name[at..hash]);
            out.push_str(&new.and_then(|p| number(p)).unwrap_or_else(|| name[hash..end - 1].to_owned()));
            at = end - 1;
        }
        out.push_str(&name[at..]);
        (out, known && !is_lambda(name))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_follow_the_functions() {
        let mut n = Numbered::default();
        n.learn("fixture::main::{closure#0}", "fixture::main::{closure#1}");
        let boxed = "alloc::boxed::Box<fixture::main::{closure_env#0}, alloc::alloc::Global>";
        let want = "alloc::boxed::Box<fixture::main::{closure_env#1}, alloc::alloc::Global>";
        assert_eq!(n.translate(boxed), (want.to_owned(), true));
        assert_eq!(n.translate("a::{closure_env#4}"), ("a::{closure_env#4}".to_owned(), false));
        assert_eq!(n.translate("plain::Name<u8>"), ("plain::Name<u8>".to_owned(), true));
    }

    #[test]
    fn a_path_goes_back_over_generics() {
        let mut n = Numbered::default();
        n.learn("f::go<u8, (u8, &str)>::{closure#2}<i32>", "f::go<u8, (u8, &str)>::{closure#3}<i32>");
        let (name, known) = n.translate("core::iter::Map<X, f::go<u8, (u8, &str)>::{closure_env#2}<i32>>");
        assert!(known, "{name}");
        assert!(name.contains("{closure_env#3}"), "{name}");
    }

    #[test]
    fn skeletons_have_no_numbers() {
        assert_eq!(skeleton("a::{impl#3}::b::{closure_env#12}<u8>"), "a::{impl}::b::{closure_env}<u8>");
    }
}
