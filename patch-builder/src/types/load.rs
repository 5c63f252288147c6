//! Finds the units of a build: in the image, in `.dwo` files beside it or in
//! its `.dwp`, compressed or not.

use std::borrow::Cow;
use std::path::{Path, PathBuf};

use gimli::{Dwarf, DwarfPackageSections, DwarfSections, EndianSlice, LittleEndian, SectionId, Unit};
use object::{Object as _, ObjectSection as _};
use rayon::prelude::*;

use super::dies::{table, Reader, Table};
use super::{intern, Depth, Types};

type Bytes<'d> = Cow<'d, [u8]>;

/// A unit whose content is in another file.
struct Split<'d> {
    /// What the image itself says of it.
    skeleton: Unit<Reader<'d>>,
    id: gimli::DwoId,
    name: String,
    folder: String,
}

pub fn read(path: &Path, bytes: &[u8], depth: Depth) -> Types {
    try_read(path, bytes, depth).unwrap_or_default()
}

fn sections<'d>(file: &object::File<'d>, split: bool) -> DwarfSections<Bytes<'d>> {
    let load = |id: SectionId| -> Result<Bytes<'d>, gimli::Error> {
        let name = if split { id.dwo_name() } else { Some(id.name()) };
        let Some(name) = name else { return Ok(Bytes::default()) };
        if !split {
            let section = file.section_by_name(name);
            return Ok(section.and_then(|s| s.uncompressed_data().ok()).unwrap_or_default());
        }
        // No linker has joined the parts of a .dwo file: type units are sections of their own.
        let mut parts = file.sections().filter(|s| s.name() == Ok(name)).filter_map(|s| s.uncompressed_data().ok());
        let mut all = parts.next().unwrap_or_default();
        parts.for_each(|part| all.to_mut().extend_from_slice(&part));
        Ok(all)
    };
    DwarfSections::load(load).unwrap_or_default()
}

/// The file that `dwz -m` moved what several programs share to. Without it half of the types have no members.
fn supplementary(file: &object::File<'_>) -> Option<String> {
    let name = match file.gnu_debugaltlink() {
        Ok(Some((name, _))) => String::from_utf8_lossy(name).into_owned(),
        _ => file.section_by_name(".debug_sup").map(|_| "a supplementary file".to_owned())?,
    };
    Some(name)
}

fn slice<'a>(bytes: &'a Bytes<'_>) -> Reader<'a> {
    EndianSlice::new(bytes, LittleEndian)
}

fn try_read(path: &Path, bytes: &[u8], depth: Depth) -> Option<Types> {
    let file = object::File::parse(bytes).ok()?;
    if let Some(name) = supplementary(&file) {
        return Some(Types { present: true, elsewhere: Some(name), ..Types::default() });
    }
    let own = sections(&file, false);
    let dwarf = own.borrow(slice);
    let mut headers = Vec::new();
    let mut iter = dwarf.units();
    while let Ok(Some(header)) = iter.next() {
        headers.push(header);
    }
    let mut iter = dwarf.type_units();
    while let Ok(Some(header)) = iter.next() {
        headers.push(header);
    }
    let read: Vec<(Option<Table<'_>>, Option<Split<'_>>)> = headers
        .into_par_iter()
        .filter_map(|header| {
            let unit = dwarf.unit(header).ok()?;
            let Some((id, name, folder)) = split_of(&dwarf, &unit) else {
                return Some((table(&dwarf, &unit, depth), None));
            };
            Some((None, Some(Split { skeleton: unit, id, name, folder })))
        })
        .collect();
    let mut tables = Vec::new();
    let mut splits = Vec::new();
    for (table, split) in read {
        tables.extend(table);
        splits.extend(split);
    }
    if tables.is_empty() && splits.is_empty() {
        return None;
    }
    let mut missing = Vec::new();
    if splits.is_empty() {
        let mut types = intern::build(&tables, depth);
        types.present = true;
        return Some(types);
    }
    let package = read_beside(path, "dwp");
    let package_sections = package.as_deref().and_then(|bytes| {
        let file = object::File::parse(bytes).ok()?;
        let load = |id: SectionId| -> Result<Bytes<'_>, gimli::Error> {
            let section = id.dwo_name().and_then(|n| file.section_by_name(n));
            Ok(section.and_then(|s| s.uncompressed_data().ok()).unwrap_or_default())
        };
        DwarfPackageSections::load(load).ok()
    });
    let package = package_sections.as_ref().and_then(|s| s.borrow(slice, EndianSlice::new(&[], LittleEndian)).ok());
    let mut files = Vec::new();
    let mut packaged = Vec::new();
    for split in splits {
        match package.as_ref().and_then(|p| p.find_cu(split.id, &dwarf).ok().flatten()) {
            Some(unit) => packaged.push((Some(split.skeleton), unit)),
            None => match find_split(path, &split) {
                Some(bytes) => files.push((split.skeleton, bytes)),
                None => missing.push(split.name),
            },
        }
    }
    if let Some(package) = &package {
        for row in 1..=package.tu_index.unit_count() {
            packaged.extend(package.tu_sections(row, &dwarf).ok().map(|d| (None, d)));
        }
    }
    let loaded: Vec<(&Unit<Reader<'_>>, DwarfSections<Bytes<'_>>)> = files
        .par_iter()
        .filter_map(|(skeleton, bytes)| Some((skeleton, sections(&object::File::parse(&bytes[..]).ok()?, true))))
        .collect();
    let linked: Vec<(&Unit<Reader<'_>>, Dwarf<Reader<'_>>)> = loaded
        .iter()
        .map(|(skeleton, s)| {
            let mut part = s.borrow(slice);
            part.make_dwo(&dwarf);
            (*skeleton, part)
        })
        .collect();
    let parts: Vec<(Option<&Unit<Reader<'_>>>, &Dwarf<Reader<'_>>)> = linked
        .iter()
        .map(|(skeleton, part)| (Some(*skeleton), part))
        .chain(packaged.iter().map(|(skeleton, part)| (skeleton.as_ref(), part)))
        .collect();
    let more: Vec<Vec<Table<'_>>> = parts
        .par_iter()
        .enumerate()
        .map(|(index, (skeleton, part))| {
            let mut out = split_tables(&dwarf, *skeleton, part, depth);
            out.iter_mut().for_each(|t| t.group = index as u32 + 1);
            out
        })
        .collect();
    tables.extend(more.into_iter().flatten());
    let mut types = intern::build(&tables, depth);
    types.present = true;
    types.missing_splits = missing;
    Some(types)
}

/// Id, name and folder of the file that a unit's content is in.
fn split_of(dwarf: &Dwarf<Reader<'_>>, unit: &Unit<Reader<'_>>) -> Option<(gimli::DwoId, String, String)> {
    let id = unit.dwo_id?;
    let name = unit.dwo_name().ok()??;
    let name = dwarf.attr_string(unit, name).ok()?.to_string_lossy().into_owned();
    let folder = unit.comp_dir.map(|s| s.to_string_lossy().into_owned()).unwrap_or_default();
    Some((id, name, folder))
}

/// The units of one split file, with what the unit in the image says of addresses.
fn split_tables<'d>(
    image: &Dwarf<Reader<'d>>,
    skeleton: Option<&Unit<Reader<'d>>>,
    part: &Dwarf<Reader<'d>>,
    depth: Depth,
) -> Vec<Table<'d>> {
    let mut headers = Vec::new();
    let mut iter = part.units();
    while let Ok(Some(header)) = iter.next() {
        headers.push(header);
    }
    let mut iter = part.type_units();
    while let Ok(Some(header)) = iter.next() {
        headers.push(header);
    }
    let mut out = Vec::new();
    for header in headers {
        let Ok(mut unit) = part.unit(header) else { continue };
        if let Some(skeleton) = skeleton {
            unit.copy_relocated_attributes(skeleton);
        }
        let Some(mut table) = table(part, &unit, depth) else { continue };
        if table.signature.is_none() {
            if let Some(mut ranges) = skeleton.and_then(|s| image.unit_ranges(s).ok()) {
                while let Ok(Some(r)) = ranges.next() {
                    if r.begin < r.end {
                        table.ranges.push((r.begin, r.end));
                    }
                }
            }
        }
        out.push(table);
    }
    out
}

fn read_beside(path: &Path, extension: &str) -> Option<Vec<u8>> {
    let mut beside = path.as_os_str().to_owned();
    beside.push(".");
    beside.push(extension);
    std::fs::read(PathBuf::from(beside)).ok().or_else(|| std::fs::read(path.with_extension(extension)).ok())
}

/// Where the compiler wrote it, or beside the image; only if its id is the right one.
fn find_split(path: &Path, split: &Split<'_>) -> Option<Vec<u8>> {
    let beside = path.parent().unwrap_or_else(|| Path::new("."));
    let name = Path::new(&split.name);
    let places = [beside.join(name.file_name()?), beside.join(name), Path::new(&split.folder).join(name)];
    places.iter().filter_map(|p| std::fs::read(p).ok()).find(|bytes| holds(bytes, split.id))
}

fn holds(bytes: &[u8], id: gimli::DwoId) -> bool {
    let Ok(file) = object::File::parse(bytes) else { return false };
    let own = sections(&file, true);
    let mut dwarf = own.borrow(slice);
    dwarf.file_type = gimli::DwarfFileType::Dwo;
    let mut iter = dwarf.units();
    while let Ok(Some(header)) = iter.next() {
        if dwarf.unit(header).is_ok_and(|u| u.dwo_id == Some(id)) {
            return true;
        }
    }
    false
}
