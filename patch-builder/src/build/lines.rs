//! Line tables and call lines, for a given set of functions.

use std::borrow::Cow;

use gimli::{AttributeValue, Dwarf, EndianSlice, LittleEndian};
use object::{Object as _, ObjectSection as _};
use rayon::prelude::*;

type Reader<'a> = EndianSlice<'a, LittleEndian>;

/// One row of a line table.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Row {
    /// The address from which it holds.
    pub addr: u64,
    /// Line, from 1; 0 for none.
    pub line: u32,
    /// Column, from 1; 0 for none.
    pub column: u32,
    /// Index into the files; `u32::MAX` for the call line of an inlined function.
    pub file: u32,
}

/// The rows of the functions that were asked for.
#[derive(Debug, Default)]
pub struct Lines {
    rows: Vec<Row>,
    files: Vec<String>,
    /// Start and end of all code that compilation units cover, ascending.
    units: Vec<(u64, u64)>,
    /// Whether the build has DWARF at all.
    pub present: bool,
}

impl Lines {
    /// Reads the line tables of the compilation units that cover any of the `wanted` ranges (start, length).
    /// Damaged DWARF gives no rows, and so proves nothing.
    #[must_use]
    pub fn load(bytes: &[u8], wanted: &[(u64, u64)]) -> Self {
        let mut wanted = wanted.to_vec();
        wanted.sort_unstable();
        Self::try_load(bytes, &wanted).unwrap_or_default()
    }

    fn try_load(bytes: &[u8], wanted: &[(u64, u64)]) -> Option<Self> {
        let file = object::File::parse(bytes).ok()?;
        let load = |id: gimli::SectionId| -> Result<Cow<'_, [u8]>, gimli::Error> {
            Ok(file.section_by_name(id.name()).and_then(|s| s.uncompressed_data().ok()).unwrap_or(Cow::Borrowed(&[])))
        };
        let sections = gimli::DwarfSections::load(load).ok()?;
        let dwarf = sections.borrow(|s| EndianSlice::new(s, LittleEndian));
        let mut headers = Vec::new();
        let mut iter = dwarf.units();
        while let Ok(Some(header)) = iter.next() {
            headers.push(header);
        }
        let present = !headers.is_empty();
        let parts: Vec<UnitLines> = headers.into_par_iter().filter_map(|h| unit_rows(&dwarf, h, wanted)).collect();
        let mut out = Self { present, ..Self::default() };
        for UnitLines { rows, files, ranges } in parts {
            out.units.extend(ranges);
            let base = out.files.len() as u32;
            out.rows.extend(rows.into_iter().map(|mut r| {
                if r.file != u32::MAX {
                    r.file += base;
                }
                r
            }));
            out.files.extend(files);
        }
        out.rows.sort_unstable();
        out.rows.dedup();
        out.units.sort_unstable();
        Some(out)
    }

    /// Rows within `addr..addr + len`, ascending.
    #[must_use]
    pub fn rows_in(&self, addr: u64, len: u64) -> &[Row] {
        let from = self.rows.partition_point(|r| r.addr < addr);
        let to = self.rows.partition_point(|r| r.addr < addr.saturating_add(len));
        &self.rows[from..to.max(from)]
    }

    /// Whether a compilation unit covers `addr`: what has none comes from elsewhere, a library compiled without debug information.
    #[must_use]
    pub fn covers(&self, addr: u64) -> bool {
        let after = self.units.partition_point(|(start, _)| *start <= addr);
        self.units[..after].iter().rev().take(64).any(|(_, end)| addr < *end)
    }

    /// `file:line` at `addr`.
    #[must_use]
    pub fn source(&self, addr: u64) -> Option<String> {
        let row = self.rows_in(addr, 1).iter().find(|r| r.file != u32::MAX && r.line > 0)?;
        Some(format!("{}:{}", self.files.get(row.file as usize)?, row.line))
    }
}

/// What one compilation unit says.
#[derive(Default)]
struct UnitLines {
    rows: Vec<Row>,
    files: Vec<String>,
    ranges: Vec<(u64, u64)>,
}

fn unit_rows<'a>(
    dwarf: &Dwarf<Reader<'a>>,
    header: gimli::UnitHeader<Reader<'a>>,
    wanted: &[(u64, u64)],
) -> Option<UnitLines> {
    let hit = |begin: u64, end: u64| {
        let index = wanted.partition_point(|(start, _)| *start < end);
        index
            .checked_sub(1)
            .is_some_and(|i| wanted[..=i].iter().rev().take(64).any(|(s, len)| s.saturating_add(*len) > begin))
    };
    let unit = dwarf.unit(header).ok()?;
    let mut own = dwarf.unit_ranges(&unit).ok()?;
    let mut ranges = Vec::new();
    while let Ok(Some(r)) = own.next() {
        ranges.push((r.begin, r.end));
    }
    if !ranges.iter().any(|(begin, end)| hit(*begin, *end)) {
        return Some(UnitLines { ranges, ..UnitLines::default() });
    }
    let mut rows = Vec::new();
    let mut files = Vec::new();
    if let Some(program) = unit.line_program.clone() {
        let mut iter = program.rows();
        while let Ok(Some((header, row))) = iter.next_row() {
            if row.end_sequence() || !hit(row.address(), row.address().saturating_add(1)) {
                continue;
            }
            // A row of a file that its table does not have proves nothing.
            let Some(index) = row.file(header).and_then(|_| usize::try_from(row.file_index()).ok()) else { continue };
            if files.len() <= index {
                files.resize(index + 1, String::new());
            }
            if files[index].is_empty() {
                files[index] = file_name(dwarf, &unit, header, row).unwrap_or_default();
            }
            rows.push(Row {
                addr: row.address(),
                line: row.line().map_or(0, |l| l.get() as u32),
                column: match row.column() {
                    gimli::ColumnType::LeftEdge => 0,
                    gimli::ColumnType::Column(c) => c.get() as u32,
                },
                file: index as u32,
            });
        }
    }
    call_lines(dwarf, &unit, &hit, &mut rows);
    Some(UnitLines { rows, files, ranges })
}

fn file_name<'a>(
    dwarf: &Dwarf<Reader<'a>>,
    unit: &gimli::Unit<Reader<'a>>,
    header: &gimli::LineProgramHeader<Reader<'a>>,
    row: &gimli::LineRow,
) -> Option<String> {
    let name = dwarf.attr_string(unit, row.file(header)?.path_name()).ok()?;
    Some(name.to_string_lossy().into_owned())
}

/// The lines at which inlined functions were called, each at its first address.
fn call_lines<'a>(
    dwarf: &Dwarf<Reader<'a>>,
    unit: &gimli::Unit<Reader<'a>>,
    hit: &dyn Fn(u64, u64) -> bool,
    rows: &mut Vec<Row>,
) {
    let mut entries = unit.entries();
    while let Ok(Some(entry)) = entries.next_dfs() {
        if entry.tag() != gimli::DW_TAG_inlined_subroutine {
            continue;
        }
        let number = |at| match entry.attr_value(at) {
            Some(AttributeValue::Udata(v)) => Some(v as u32),
            Some(v) => v.udata_value().map(|v| v as u32),
            None => None,
        };
        let Some(line) = number(gimli::DW_AT_call_line) else { continue };
        let column = number(gimli::DW_AT_call_column).unwrap_or(0);
        let Ok(mut ranges) = dwarf.die_ranges(unit, entry) else { continue };
        while let Ok(Some(r)) = ranges.next() {
            if hit(r.begin, r.begin.saturating_add(1)) {
                rows.push(Row { addr: r.begin, line, column, file: u32::MAX });
            }
        }
    }
}
