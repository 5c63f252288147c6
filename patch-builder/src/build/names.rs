//! What a symbol's name says, and what it does not.

/// Prefixes of names that number what has no name: equal names in two builds prove nothing.
const NAMELESS: &[&str] = &[
    ".L",
    "anon.",
    "alloc_",
    "CSWTCH.",
    "__func__.",
    "__FUNCTION__.",
    "__PRETTY_FUNCTION__.",
    "switch.table.",
    "str.",
    "vtable.",
    "C.",
    "__compound_literal.",
    "_ZTS_anon",
    "reltable.",
    "lookup_table.",
    "$",
];

/// Whether a data symbol's name identifies it across builds.
#[must_use]
pub fn has_identity(name: &str) -> bool {
    if matches!(name, "__func__" | "__FUNCTION__" | "__PRETTY_FUNCTION__" | "") {
        return false;
    }
    !NAMELESS.iter().any(|p| name.starts_with(p)) && !name.contains(".str.") && !name.ends_with(".str")
}

/// A symbol, readable: Rust without hash and disambiguators, C++ demangled, C as it is.
#[must_use]
pub fn demangle(name: &str) -> String {
    let (core, suffix) = split_suffix(name);
    if let Ok(d) = rustc_demangle::try_demangle(core) {
        return format!("{d:#}{suffix}");
    }
    if core.starts_with("_Z") {
        if let Ok(d) = cpp_demangle::Symbol::new(core) {
            if let Ok(text) = d.demangle() {
                return format!("{text}{suffix}");
            }
        }
    }
    name.to_owned()
}

/// A name and the suffixes that compilers append (`.cold`, `.part.0`, `.llvm.123`).
#[must_use]
pub fn split_suffix(name: &str) -> (&str, &str) {
    // A leading dot belongs to the name; Rust legacy names end with `E` before any suffix.
    match name.get(1..).and_then(|rest| rest.find('.')) {
        Some(at) if !name.starts_with("_ZN") || name[..=at].ends_with('E') => name.split_at(at + 1),
        Some(_) => match name.find("E.") {
            Some(at) => name.split_at(at + 1),
            None => (name, ""),
        },
        None => (name, ""),
    }
}

/// The suffix without what is renumbered from build to build: `.constprop.3` and
/// `.constprop.1` become the same; `.llvm.N` and a bare `.N` disappear.
#[must_use]
pub fn stable_suffix(suffix: &str) -> String {
    let mut out = String::new();
    for part in suffix.split('.').skip(1) {
        if part.bytes().all(|b| b.is_ascii_digit()) {
            continue;
        }
        if part == "llvm" || part == "lto_priv" {
            continue;
        }
        out.push('.');
        out.push_str(part);
    }
    out
}

/// The name by which versions of one function or variable in two builds are
/// recognised once exact names fail.
#[must_use]
pub fn canonical(name: &str) -> String {
    let (core, suffix) = split_suffix(name);
    let suffix = stable_suffix(suffix);
    match rustc_demangle::try_demangle(core) {
        Ok(d) => format!("{d:#}{suffix}"),
        Err(_) => format!("{}{suffix}", strip_linkage_hash(core)),
    }
}

/// `_rust_extern_with_linkage_<hash>___dso_handle` without its hash.
fn strip_linkage_hash(name: &str) -> String {
    const PREFIX: &str = "_rust_extern_with_linkage_";
    match name.strip_prefix(PREFIX).and_then(|rest| rest.split_once('_')) {
        Some((hash, rest)) if hash.bytes().all(|b| b.is_ascii_hexdigit()) => format!("{PREFIX}{rest}"),
        _ => name.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn suffixes_lose_their_numbers_and_keep_their_kinds() {
        assert_eq!(canonical("foo.constprop.3.isra.0"), "foo.constprop.isra");
        assert_eq!(canonical("foo.llvm.8711"), "foo");
        assert_eq!(canonical("counter.12"), "counter");
        assert_eq!(canonical("foo.cold"), "foo.cold");
        assert_eq!(split_suffix("foo.part.0"), ("foo", ".part.0"));
    }

    #[test]
    fn rust_names_lose_their_hashes() {
        assert_eq!(canonical("_ZN3foo3bar17h0123456789abcdefE"), "foo::bar");
        assert_eq!(canonical("_ZN3foo3bar17h0123456789abcdefE.llvm.77"), "foo::bar");
        assert_eq!(canonical("_RNvCs4fqI2P2rA04_3foo3bar"), "foo::bar");
    }

    #[test]
    fn numbered_constants_have_no_identity() {
        for name in [".LC5", "CSWTCH.12", "__func__.3", "anon.abc.1", "switch.table.f"] {
            assert!(!has_identity(name), "{name}");
        }
        assert!(has_identity("counter.12") && has_identity("server"));
    }
}
