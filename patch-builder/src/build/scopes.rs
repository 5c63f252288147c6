//! What DWARF says of chosen functions: where they are declared, which line each
//! address belongs to, and what was inlined where. For explanations only:
//! nothing here proves anything, and damaged DWARF says nothing.

use std::borrow::Cow;
use std::collections::HashMap;

use gimli::{AttributeValue, Dwarf, EndianSlice, LittleEndian, UnitOffset};
use object::{Object as _, ObjectSection as _};
use rayon::prelude::*;

type Reader<'a> = EndianSlice<'a, LittleEndian>;
type Unit<'a> = gimli::Unit<Reader<'a>>;
type Entry<'a> = gimli::DebuggingInformationEntry<Reader<'a>>;

/// A source file as the compiler recorded it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct SourceFile {
    /// Its path, with the compilation folder before it if it was relative.
    pub path: String,
    /// The MD5 of its text, if the compiler recorded one.
    pub md5: Option<[u8; 16]>,
}

/// A line of a source file; the file is an index into [`Scopes::files`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct SourceLine {
    /// The file.
    pub file: u32,
    /// The line, from 1.
    pub line: u32,
}

/// A function that the compiler put into another one.
#[derive(Clone, Debug)]
pub struct Inlined {
    /// Its symbol if it has one, else its name.
    pub symbol: String,
    /// Where it is declared.
    pub declared: Option<SourceLine>,
    /// Where it is called.
    pub called: Option<SourceLine>,
    /// How deep: 1 for what the function itself calls.
    pub depth: u32,
    /// Its code (begin, end).
    pub ranges: Vec<(u64, u64)>,
}

/// What is known of one function.
#[derive(Clone, Debug, Default)]
pub struct Scope {
    /// Where it is declared.
    pub declared: Option<SourceLine>,
    /// What was inlined into it, outer before inner.
    pub inlined: Vec<Inlined>,
    /// From which address on which line holds, ascending.
    pub rows: Vec<(u64, SourceLine)>,
}

impl Scope {
    /// The line of the instruction at `addr`.
    #[must_use]
    pub fn line(&self, addr: u64) -> Option<SourceLine> {
        let end = self.rows.partition_point(|(from, _)| *from <= addr);
        self.rows[..end].last().map(|(_, line)| *line)
    }

    /// The innermost inlined function whose code `addr` is, among those that `counts`.
    #[must_use]
    pub fn inlined_at(&self, addr: u64, counts: impl Fn(&Inlined) -> bool) -> Option<usize> {
        let holds = |i: &Inlined| i.ranges.iter().any(|(from, to)| (*from..*to).contains(&addr)) && counts(i);
        (0..self.inlined.len()).filter(|i| holds(&self.inlined[*i])).max_by_key(|i| self.inlined[*i].depth)
    }
}

/// What is known of the functions that were asked for, by address.
#[derive(Debug, Default)]
pub struct Scopes {
    functions: HashMap<u64, Scope>,
    /// The source files.
    pub files: Vec<SourceFile>,
}

impl Scopes {
    /// Reads what the DWARF in `bytes` says of the functions at `wanted` (start, length).
    #[must_use]
    pub fn load(bytes: &[u8], wanted: &[(u64, u64)]) -> Self {
        let mut wanted = wanted.to_vec();
        wanted.sort_unstable();
        Self::try_load(bytes, &wanted).unwrap_or_default()
    }

    fn try_load(bytes: &[u8], wanted: &[(u64, u64)]) -> Option<Self> {
        if wanted.is_empty() {
            return None;
        }
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
        let parts: Vec<_> = headers
            .into_par_iter()
            .filter_map(|header| UnitReader::of(&dwarf, header, wanted))
            .map(UnitReader::read)
            .collect();
        let mut out = Self::default();
        for (functions, files) in parts {
            let base = out.files.len() as u32;
            out.files.extend(files);
            for (addr, mut scope) in functions {
                scope.rebase(base);
                out.functions.entry(addr).or_insert(scope);
            }
        }
        Some(out)
    }

    /// What is known of the function at `addr`.
    #[must_use]
    pub fn at(&self, addr: u64) -> Option<&Scope> {
        self.functions.get(&addr)
    }

    /// The file of a line.
    #[must_use]
    pub fn file(&self, line: SourceLine) -> Option<&SourceFile> {
        self.files.get(line.file as usize).filter(|f| !f.path.is_empty())
    }
}

impl Scope {
    fn rebase(&mut self, base: u32) {
        let inlined = self.inlined.iter_mut().flat_map(|i| [&mut i.declared, &mut i.called]).flatten();
        self.declared.iter_mut().chain(inlined).for_each(|l| l.file = l.file.saturating_add(base));
        self.rows.iter_mut().for_each(|(_, l)| l.file = l.file.saturating_add(base));
    }
}

struct UnitReader<'a, 'w> {
    dwarf: &'w Dwarf<Reader<'a>>,
    unit: Unit<'a>,
    /// The wanted functions in it: start and length.
    wanted: Vec<(u64, u64)>,
    files: Vec<SourceFile>,
}

impl<'a, 'w> UnitReader<'a, 'w> {
    /// A reader, if the unit covers anything that is wanted.
    fn of(dwarf: &'w Dwarf<Reader<'a>>, header: gimli::UnitHeader<Reader<'a>>, wanted: &[(u64, u64)]) -> Option<Self> {
        let unit = dwarf.unit(header).ok()?;
        let mut ranges = dwarf.unit_ranges(&unit).ok()?;
        let mut mine = Vec::new();
        while let Ok(Some(r)) = ranges.next() {
            let from = wanted.partition_point(|(start, _)| *start < r.begin);
            mine.extend(wanted[from..].iter().take_while(|(start, _)| *start < r.end));
        }
        mine.sort_unstable();
        mine.dedup();
        (!mine.is_empty()).then(|| Self { dwarf, unit, wanted: mine, files: Vec::new() })
    }

    fn read(mut self) -> (HashMap<u64, Scope>, Vec<SourceFile>) {
        let mut functions: HashMap<u64, Scope> = HashMap::new();
        self.rows(&mut functions);
        self.entries(&mut functions);
        (functions, self.files)
    }

    fn wanted_at(&self, addr: u64) -> Option<u64> {
        let index = self.wanted.partition_point(|(start, _)| *start <= addr).checked_sub(1)?;
        let (start, len) = self.wanted[index];
        (addr - start < len.max(1)).then_some(start)
    }

    fn rows(&mut self, functions: &mut HashMap<u64, Scope>) {
        let Some(program) = self.unit.line_program.clone() else { return };
        let header = program.header().clone();
        for index in 0..=header.file_names().len() as u64 {
            let file = header.file(index).map(|entry| self.source_file(&header, entry)).unwrap_or_default();
            self.files.push(file);
        }
        let mut rows = program.rows();
        while let Ok(Some((_, row))) = rows.next_row() {
            let (Some(line), false) = (row.line(), row.end_sequence()) else { continue };
            let Some(start) = self.wanted_at(row.address()) else { continue };
            let line = SourceLine { file: row.file_index() as u32, line: line.get() as u32 };
            let rows = &mut functions.entry(start).or_default().rows;
            match rows.last_mut() {
                Some(last) if last.0 == row.address() => last.1 = line,
                _ => rows.push((row.address(), line)),
            }
        }
        functions.values_mut().for_each(|f| f.rows.sort_by_key(|(at, _)| *at));
    }

    fn source_file(
        &self,
        header: &gimli::LineProgramHeader<Reader<'a>>,
        entry: &gimli::FileEntry<Reader<'a>>,
    ) -> SourceFile {
        let text = |value| self.dwarf.attr_string(&self.unit, value).ok().map(|s| s.to_string_lossy().into_owned());
        let mut path = String::new();
        let compiled_in = self.unit.comp_dir.map(|d| d.to_string_lossy().into_owned());
        for part in [compiled_in, entry.directory(header).and_then(text), text(entry.path_name())].into_iter().flatten()
        {
            if part.starts_with('/') {
                path.clear();
            }
            if !path.is_empty() && !path.ends_with('/') {
                path.push('/');
            }
            path += &part;
        }
        let md5 = header.file_has_md5().then(|| *entry.md5()).filter(|sum| *sum != [0; 16]);
        SourceFile { path, md5 }
    }

    /// Walks the functions of the unit; descends only into those that are wanted.
    fn entries(&self, functions: &mut HashMap<u64, Scope>) {
        let mut cursor = self.unit.entries();
        // The wanted function that the cursor is in, and its depth in the tree.
        let mut inside: Option<(u64, isize)> = None;
        let mut nesting: Vec<isize> = Vec::new();
        while let Ok(Some(entry)) = cursor.next_dfs() {
            let depth = entry.depth();
            if inside.is_some_and(|(_, d)| depth <= d) {
                inside = None;
            }
            match entry.tag() {
                gimli::DW_TAG_subprogram => {
                    let start = self
                        .ranges(entry)
                        .iter()
                        .find_map(|(from, _)| self.wanted.binary_search_by_key(from, |w| w.0).ok());
                    let Some(index) = start else { continue };
                    let (start, _) = self.wanted[index];
                    inside = Some((start, depth));
                    nesting.clear();
                    functions.entry(start).or_default().declared = self.origin(entry).declared;
                }
                gimli::DW_TAG_inlined_subroutine => {
                    let Some((start, _)) = inside else { continue };
                    nesting.retain(|d| *d < depth);
                    nesting.push(depth);
                    let origin = self.origin(entry);
                    let called = source_line(entry, gimli::DW_AT_call_file, gimli::DW_AT_call_line);
                    let inlined = Inlined {
                        symbol: origin.symbol,
                        declared: origin.declared,
                        called,
                        depth: nesting.len() as u32,
                        ranges: self.ranges(entry),
                    };
                    functions.entry(start).or_default().inlined.push(inlined);
                }
                _ => {}
            }
        }
    }

    fn ranges(&self, entry: &Entry<'a>) -> Vec<(u64, u64)> {
        let mut out = Vec::new();
        if let Ok(mut ranges) = self.dwarf.die_ranges(&self.unit, entry) {
            while let Ok(Some(r)) = ranges.next() {
                out.push((r.begin, r.end));
            }
        }
        out
    }

    /// The name and the declaration of a function, its abstract origins followed.
    fn origin(&self, entry: &Entry<'a>) -> Origin {
        let mut out = Origin::default();
        self.follow(&self.unit, entry, true, 0, &mut out);
        out
    }

    fn follow(&self, unit: &Unit<'a>, entry: &Entry<'a>, own_unit: bool, depth: u32, out: &mut Origin) {
        let text = |at| {
            let value = entry.attr_value(at)?;
            self.dwarf.attr_string(unit, value).ok().map(|s| s.to_string_lossy().into_owned())
        };
        if out.symbol.is_empty() || !out.linkage {
            if let Some(name) = text(gimli::DW_AT_linkage_name) {
                (out.symbol, out.linkage) = (name, true);
            } else if let Some(name) = text(gimli::DW_AT_name).filter(|_| out.symbol.is_empty()) {
                out.symbol = name;
            }
        }
        // Files of another unit have numbers of their own.
        if own_unit && out.declared.is_none() {
            out.declared = source_line(entry, gimli::DW_AT_decl_file, gimli::DW_AT_decl_line);
        }
        if depth > 8 {
            return;
        }
        for at in [gimli::DW_AT_abstract_origin, gimli::DW_AT_specification] {
            match entry.attr_value(at) {
                Some(AttributeValue::UnitRef(offset)) => self.follow_to(unit, offset, own_unit, depth, out),
                Some(AttributeValue::DebugInfoRef(offset)) => {
                    if let Some(offset) = offset.to_unit_offset(&unit.header) {
                        self.follow_to(unit, offset, own_unit, depth, out);
                    } else if let Some((other, offset)) = self.unit_of(offset) {
                        self.follow_to(&other, offset, false, depth, out);
                    }
                }
                _ => {}
            }
        }
    }

    fn follow_to(&self, unit: &Unit<'a>, offset: UnitOffset, own_unit: bool, depth: u32, out: &mut Origin) {
        if let Ok(entry) = unit.entry(offset) {
            self.follow(unit, &entry, own_unit, depth + 1, out);
        }
    }

    fn unit_of(&self, offset: gimli::DebugInfoOffset) -> Option<(Unit<'a>, UnitOffset)> {
        let mut units = self.dwarf.units();
        while let Ok(Some(header)) = units.next() {
            if let Some(inside) = offset.to_unit_offset(&header) {
                return Some((self.dwarf.unit(header).ok()?, inside));
            }
        }
        None
    }
}

fn source_line(entry: &Entry<'_>, file: gimli::DwAt, line: gimli::DwAt) -> Option<SourceLine> {
    let file = match entry.attr_value(file)? {
        AttributeValue::FileIndex(index) => index,
        other => other.udata_value()?,
    };
    let line = entry.attr_value(line)?.udata_value()?;
    Some(SourceLine { file: file as u32, line: line as u32 })
}

#[derive(Default)]
struct Origin {
    symbol: String,
    /// Whether that is a symbol, not only a name.
    linkage: bool,
    declared: Option<SourceLine>,
}
