//! Which functions truly changed, by a way of its own: both versions compiled once more with a section for each function and with
//! every line number the same, and the relocatable objects compared. Nothing of patch-builder is used.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use object::read::elf::ElfFile64;
use object::{Object, ObjectSection, ObjectSymbol, RelocationTarget, SectionKind, SymbolKind};

type File<'d> = ElfFile64<'d, object::LittleEndian>;

/// The name of the function in the source: without what compilers append to its clones and parts.
pub fn source_name(name: &str) -> &str {
    let end = [".cold", ".part", ".constprop", ".isra", ".lto_priv", ".llvm", ".localalias"]
        .iter()
        .filter_map(|s| name.find(s))
        .min();
    &name[..end.unwrap_or(name.len())]
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
            out.entry(source_name(text).to_owned()).or_default().insert(what);
        }
    }
    out
}

/// Functions that are not the same in both, and those only the new one has.
pub fn changed(old: &Path, new: &Path, names: &[String]) -> (BTreeSet<String>, BTreeSet<String>) {
    let (a, b) = (functions(old, names), functions(new, names));
    let differs = |name: &&String| a.get(*name).is_some_and(|x| Some(x) != b.get(*name));
    let changed = b.keys().filter(differs).cloned().collect();
    (changed, b.keys().filter(|n| !a.contains_key(*n)).cloned().collect())
}

/// Bytes and relocations from `from` to `to`, with what has no name by content.
fn describe<'d>(file: &File<'d>, section: &impl ObjectSection<'d>, from: u64, to: u64, depth: u32) -> String {
    let data = section.data().unwrap_or(&[]);
    let bytes = data.get(from as usize..to as usize).unwrap_or(&[]);
    let mut out = format!("{bytes:02x?}");
    for (at, r) in section.relocations().filter(|(at, _)| (from..to).contains(at)) {
        let RelocationTarget::Symbol(index) = r.target() else { continue };
        let Ok(symbol) = file.symbol_by_index(index) else { continue };
        let target = target(file, &symbol, r.addend(), depth);
        out += &format!(" {}:{:?}:{target}", at - from, r.flags());
    }
    out
}

fn target<'d>(file: &File<'d>, symbol: &impl ObjectSymbol<'d>, addend: i64, depth: u32) -> String {
    let name = symbol.name().unwrap_or("");
    let Some(section) = symbol.section_index().and_then(|i| file.section_by_index(i).ok()) else {
        return format!("{name}{addend:+}");
    };
    let section_name = section.name().unwrap_or("").to_owned();
    let constant = matches!(section.kind(), SectionKind::ReadOnlyData | SectionKind::ReadOnlyString)
        || section_name.starts_with(".data.rel.ro");
    if !constant {
        let plain = name.trim_end_matches(|c: char| c.is_ascii_digit() || c == '.');
        return format!(
            "{}{addend:+}",
            if name.is_empty() {
                &section_name
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
        let end = at.saturating_add(width.parse().unwrap_or(16)).min(section.size());
        return describe(file, &section, at.min(end), end, depth + 1);
    }
    format!("({:+} in {})", at, describe(file, &section, 0, section.size(), depth + 1))
}
