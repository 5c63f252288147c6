//! Which functions truly changed, by a way of its own: both versions compiled once more with a section for each function and with
//! every line number the same, and the relocatable objects compared. Nothing of patch-builder is used.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use object::read::elf::ElfFile64;
use object::{Object, ObjectSection, ObjectSymbol, RelocationTarget, SectionKind, SymbolKind};

type File<'d> = ElfFile64<'d, object::LittleEndian>;

/// The name of the function in the source: without what compilers append to its clones and parts, and without the hash of
/// Rust's legacy names.
pub fn source_name(name: &str) -> String {
    let end = [".cold", ".part", ".constprop", ".isra", ".lto_priv", ".llvm", ".localalias"]
        .iter()
        .filter_map(|s| name.find(s))
        .min();
    let name = &name[..end.unwrap_or(name.len())];
    match rustc_demangle::try_demangle(name) {
        Ok(name) => without_numbers(&format!("{name:#}")),
        Err(_) => name.to_owned(),
    }
}

/// Without the numbers of closures, which change when another one is written before them.
fn without_numbers(name: &str) -> String {
    let mut parts = name.split("{closure#");
    let first = parts.next().unwrap_or("").to_owned();
    parts.fold(first, |out, part| out + "{closure" + part.trim_start_matches(|c: char| c.is_ascii_digit()))
}

/// Every function of the objects in a folder by source name: everything that it does, as text.
pub fn functions(dir: &Path, names: &[String]) -> BTreeMap<String, BTreeSet<String>> {
    let mut out: BTreeMap<String, BTreeSet<String>> = BTreeMap::new();
    for name in names {
        let bytes = std::fs::read(dir.join(name)).expect("an object that was just compiled");
        let file = File::parse(&*bytes).expect("an object of the compiler");
        for symbol in file.symbols().filter(|s| s.kind() == SymbolKind::Text && s.size() > 0) {
            let (Ok(text), Some(section)) = (symbol.name(), symbol.section_index()) else { continue };
            let Ok(section) = file.section_by_index(section) else { continue };
            let from = symbol.address();
            let what = describe(&file, &section, from, from + symbol.size(), 0);
            out.entry(source_name(text)).or_default().insert(what);
        }
    }
    out
}

/// Functions that are not the same in both builds.
pub struct Truth {
    /// Those that do something else: they must be in the patch.
    pub certain: BTreeSet<String>,
    /// These, and those that differ in the lines where they panic: no other may be in it, where that is known.
    pub possible: Option<BTreeSet<String>>,
}

/// Compares the objects of both builds.
pub fn changed(old: &Path, new: &Path, names: &[String]) -> Truth {
    let (a, b) = (functions(old, names), functions(new, names));
    // Of several of one name in Rust (instances, closures), one more or one less changes none.
    let differ = |name: &str, x: &BTreeSet<String>, y: &BTreeSet<String>| match name.contains("::") {
        true => !x.is_subset(y) && !y.is_subset(x),
        false => x != y,
    };
    let both = || b.iter().filter_map(|(name, y)| Some((name, a.get(name)?, y)));
    let plain = |all: &BTreeSet<String>| all.iter().map(|text| without_places(text)).collect();
    let certain = both().filter(|(name, x, y)| differ(name, &plain(x), &plain(y)));
    let possible = both().filter(|(name, x, y)| differ(name, x, y));
    Truth {
        certain: certain.map(|(name, ..)| name.clone()).collect(),
        possible: Some(possible.map(|(name, ..)| name.clone()).collect()),
    }
}

/// What a function does, without the lines and columns of its places.
fn without_places(text: &str) -> String {
    let mut parts = text.split(PLACE);
    let first = parts.next().unwrap_or("").to_owned();
    parts.fold(first, |out, part| out + part.split_once(']').map_or("", |(_, rest)| rest))
}

/// Before the line and column of a Rust `Location`, a list of bytes.
const PLACE: &str = " place [";

/// Bytes and relocations from `from` to `to`, with what has no name by content.
fn describe<'d>(file: &File<'d>, section: &impl ObjectSection<'d>, from: u64, to: u64, depth: u32) -> String {
    let data = section.data().unwrap_or(&[]);
    let bytes = data.get(from as usize..to as usize).unwrap_or(&[]);
    let mut relocations = Vec::new();
    for (at, r) in section.relocations().filter(|(at, _)| (from..to).contains(at)) {
        let RelocationTarget::Symbol(index) = r.target() else { continue };
        let Ok(symbol) = file.symbol_by_index(index) else { continue };
        let target = target(file, &symbol, r.addend(), depth);
        relocations.push(format!(" {}:{:?}:{target}", at - from, r.flags()));
    }
    // Rust's `Location`: a file's name and its length, line and column.
    let is_file = |text: &String| text.contains(".rs\"") || text.contains("2e, 72, 73");
    let is_place = depth > 0 && bytes.len() == 24 && matches!(&relocations[..], [file] if is_file(file));
    let relocations = relocations.concat();
    match bytes.split_at_checked(16) {
        Some((file, place)) if is_place => format!("{file:02x?}{relocations} place {place:02x?}"),
        _ => format!("{bytes:02x?}{relocations}"),
    }
}

/// Without the numbers that compilers append to the parts of a variable.
fn trimmed(name: &str) -> &str {
    name.trim_end_matches(|c: char| c.is_ascii_digit() || c == '.')
}

fn target<'d>(file: &File<'d>, symbol: &impl ObjectSymbol<'d>, addend: i64, depth: u32) -> String {
    let name = symbol.name().unwrap_or("");
    let Some(section) = symbol.section_index().and_then(|i| file.section_by_index(i).ok()) else {
        return format!("{}{addend:+}", source_name(name));
    };
    let section_name = section.name().unwrap_or("").to_owned();
    let constant = matches!(section.kind(), SectionKind::ReadOnlyData | SectionKind::ReadOnlyString)
        || section_name.starts_with(".data.rel.ro");
    // Of functions of Rust with equal code, which LLVM merges, any may stand in the table of a trait object.
    if depth > 0 && [".text._R", ".text._ZN"].iter().any(|p| section_name.starts_with(p)) {
        return "a function".into();
    }
    if !constant {
        let section_name = section_name.strip_prefix(".text.").map_or(section_name.clone(), source_name);
        let plain = trimmed(name);
        return format!(
            "{}{addend:+}",
            if name.is_empty() {
                trimmed(&section_name)
            } else if name.contains('.') {
                plain
            } else {
                name
            }
        );
    }
    if depth > 3 {
        return "deep".into();
    }
    if symbol.size() > 0 {
        let from = symbol.address();
        return format!("({addend:+} of {})", describe(file, &section, from, from + symbol.size(), depth + 1));
    }
    // Relative to the end of the field, in code; from the start of a table, in data.
    let at = symbol.address().wrapping_add_signed(addend + if depth == 0 { 4 } else { 0 });
    if section_name.contains(".str") {
        let data = section.data().unwrap_or(&[]);
        let rest = data.get(at as usize..).unwrap_or(&[]);
        return format!("{:?}", String::from_utf8_lossy(rest.split(|b| *b == 0).next().unwrap_or(rest)));
    }
    if let Some((_, width)) = section_name.rsplit_once(".cst") {
        let width = width.parse().unwrap_or(16);
        // An immediate behind the field makes the place seem to lie before the constant.
        let at = at.checked_next_multiple_of(width).unwrap_or(0);
        let end = at.saturating_add(width).min(section.size());
        return describe(file, &section, at.min(end), end, depth + 1);
    }
    format!("({:+} in {})", at, describe(file, &section, 0, section.size(), depth + 1))
}
