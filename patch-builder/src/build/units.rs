//! What a build says of how its units were compiled. For refusals and warnings about the pair as a whole.

use std::borrow::Cow;

use gimli::{Dwarf, EndianSlice, LittleEndian};
use object::{Object as _, ObjectSection as _};
use rayon::prelude::*;

type Reader<'a> = EndianSlice<'a, LittleEndian>;

/// One compilation unit.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Unit {
    /// Its main source file as the compiler was given it; of Rust with the crate's name behind it, without hash and number.
    pub name: String,
    /// The compiler, and the flags if it notes them.
    pub producer: String,
}

/// The units of the DWARF in `bytes`; damaged DWARF and split units without a producer in the image say nothing.
#[must_use]
pub fn units(bytes: &[u8]) -> Vec<Unit> {
    let Ok(file) = object::File::parse(bytes) else { return Vec::new() };
    let load = |id: gimli::SectionId| -> Result<Cow<'_, [u8]>, gimli::Error> {
        Ok(file.section_by_name(id.name()).and_then(|s| s.uncompressed_data().ok()).unwrap_or(Cow::Borrowed(&[])))
    };
    let Ok(sections) = gimli::DwarfSections::load(load) else { return Vec::new() };
    let dwarf = sections.borrow(|s| EndianSlice::new(s, LittleEndian));
    let mut headers = Vec::new();
    let mut iter = dwarf.units();
    while let Ok(Some(header)) = iter.next() {
        headers.push(header);
    }
    let mut out: Vec<Unit> = headers.into_par_iter().filter_map(|h| unit(&dwarf, h)).collect();
    out.sort_unstable();
    out.dedup();
    out
}

fn unit<'a>(dwarf: &Dwarf<Reader<'a>>, header: gimli::UnitHeader<Reader<'a>>) -> Option<Unit> {
    let abbreviations = dwarf.abbreviations(&header).ok()?;
    let root = header.entry(&abbreviations, gimli::UnitOffset(header.header_size())).ok()?;
    if root.tag() != gimli::DW_TAG_compile_unit {
        return None;
    }
    let unit = dwarf.unit(header).ok()?;
    let text = |at| {
        let value = root.attr_value(at)?;
        Some(dwarf.attr_string(&unit, value).ok()?.to_string_lossy().into_owned())
    };
    Some(Unit { name: lasting_name(&text(gimli::DW_AT_name)?), producer: text(gimli::DW_AT_producer)? })
}

/// `src/main.rs/@/gw.2cd5f1d0a9-cgu.3` is `src/main.rs/@/gw` in every build.
fn lasting_name(name: &str) -> String {
    match name.split_once("/@/") {
        Some((file, unit)) => format!("{file}/@/{}", unit.split('.').next().unwrap_or(unit)),
        None => name.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    #[test]
    fn hashes_and_numbers_are_no_names() {
        assert_eq!(super::lasting_name("src/main.rs/@/gw.2cd5f1d0a9-cgu.3"), "src/main.rs/@/gw");
        assert_eq!(super::lasting_name("net/a.c"), "net/a.c");
    }
}
