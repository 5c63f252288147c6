//! One unit's debugging information entries as a compact table: only the ones
//! and only the attributes that types, signatures and statics consist of.

use gimli::{AttributeValue, Dwarf, EndianSlice, LittleEndian, Operation, Unit};

use super::Depth;

pub type Reader<'d> = EndianSlice<'d, LittleEndian>;

/// A reference to an entry.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Ref {
    #[default]
    None,
    /// In the same unit, by offset.
    Unit(u32),
    /// In the same `.debug_info`.
    Info(u64),
    /// In a type unit.
    Signature(u64),
}

pub const DECLARATION: u16 = 1;
pub const VARIADIC: u16 = 2;
pub const NORETURN: u16 = 4;
pub const ARTIFICIAL: u16 = 8;
pub const HAS_VALUE: u16 = 16;
pub const COMPUTED: u16 = 32;
pub const BIT_FIELD: u16 = 64;
pub const TLS: u16 = 128;
pub const VIRTUAL: u16 = 256;
pub const METHOD: u16 = 512;
pub const INLINE_BODY: u16 = 1024;

/// An entry.
#[derive(Clone, Copy, Debug)]
pub struct Die<'d> {
    pub offset: u32,
    pub parent: u32,
    pub tag: gimli::DwTag,
    pub flags: u16,
    pub file: u32,
    pub line: u32,
    pub name: &'d [u8],
    /// Of a function only.
    pub linkage: &'d [u8],
    pub ty: Ref,
    /// Abstract origin or specification; of a variant part its discriminant.
    pub origin: Ref,
    /// Size in bytes; of a bit-field its width.
    pub size: u64,
    /// Place, value, address or encoding, as the tag says.
    pub value: u64,
    pub align: u64,
}

/// A unit's table.
pub struct Table<'d> {
    /// Entries in the order of the file.
    pub dies: Vec<Die<'d>>,
    /// More places at which a function's code begins: entry index, address.
    pub starts: Vec<(u32, u64)>,
    /// Code of the unit.
    pub ranges: Vec<(u64, u64)>,
    /// Whether it describes types at all.
    pub typed: bool,
    pub c_like: bool,
    pub rust: bool,
    /// Names of the files that entries refer to.
    pub files: Vec<String>,
    /// Which file's sections it is in: references do not leave a file.
    pub group: u32,
    /// Offset in `.debug_info`, or the signature of a type unit.
    pub base: Option<u64>,
    pub signature: Option<u64>,
}

impl<'d> Table<'d> {
    /// The entry at an offset of this unit.
    pub fn index_of(&self, offset: u32) -> Option<u32> {
        self.dies.binary_search_by_key(&offset, |d| d.offset).ok().map(|i| i as u32)
    }
}

fn wanted(tag: gimli::DwTag, depth: Depth) -> bool {
    match tag {
        gimli::DW_TAG_inlined_subroutine => depth == Depth::Bodies,
        gimli::DW_TAG_compile_unit
        | gimli::DW_TAG_partial_unit
        | gimli::DW_TAG_type_unit
        | gimli::DW_TAG_namespace
        | gimli::DW_TAG_module
        | gimli::DW_TAG_structure_type
        | gimli::DW_TAG_class_type
        | gimli::DW_TAG_union_type
        | gimli::DW_TAG_interface_type
        | gimli::DW_TAG_enumeration_type
        | gimli::DW_TAG_enumerator
        | gimli::DW_TAG_base_type
        | gimli::DW_TAG_unspecified_type
        | gimli::DW_TAG_pointer_type
        | gimli::DW_TAG_reference_type
        | gimli::DW_TAG_rvalue_reference_type
        | gimli::DW_TAG_ptr_to_member_type
        | gimli::DW_TAG_typedef
        | gimli::DW_TAG_const_type
        | gimli::DW_TAG_volatile_type
        | gimli::DW_TAG_restrict_type
        | gimli::DW_TAG_atomic_type
        | gimli::DW_TAG_array_type
        | gimli::DW_TAG_subrange_type
        | gimli::DW_TAG_subroutine_type
        | gimli::DW_TAG_subprogram
        | gimli::DW_TAG_formal_parameter
        | gimli::DW_TAG_unspecified_parameters
        | gimli::DW_TAG_member
        | gimli::DW_TAG_inheritance
        | gimli::DW_TAG_variant_part
        | gimli::DW_TAG_variant
        | gimli::DW_TAG_template_type_parameter
        | gimli::DW_TAG_variable => true,
        _ => false,
    }
}

fn is_type(tag: gimli::DwTag) -> bool {
    matches!(
        tag,
        gimli::DW_TAG_base_type
            | gimli::DW_TAG_structure_type
            | gimli::DW_TAG_class_type
            | gimli::DW_TAG_union_type
            | gimli::DW_TAG_enumeration_type
            | gimli::DW_TAG_pointer_type
            | gimli::DW_TAG_subroutine_type
            | gimli::DW_TAG_formal_parameter
            | gimli::DW_TAG_unspecified_type
    )
}

/// Reads a unit.
pub fn table<'d>(dwarf: &Dwarf<Reader<'d>>, unit: &Unit<Reader<'d>>, depth: Depth) -> Option<Table<'d>> {
    let mut out = Table {
        dies: Vec::new(),
        starts: Vec::new(),
        ranges: Vec::new(),
        typed: false,
        c_like: false,
        rust: false,
        group: 0,
        base: unit.header.debug_info_offset().map(|o| o.0 as u64),
        signature: match unit.header.type_() {
            gimli::UnitType::Type { type_signature, .. } | gimli::UnitType::SplitType { type_signature, .. } => {
                Some(type_signature.0)
            }
            _ => None,
        },
        files: Vec::new(),
    };
    let mut declared = false;
    // Innermost kept entry of each depth, and whether it is the entry of that depth itself.
    let mut parents: Vec<(u32, bool)> = Vec::new();
    let mut entries = unit.entries_raw(None).ok()?;
    // Damage ends the table: what was read so far would be half a truth.
    while !entries.is_empty() {
        let offset = entries.next_offset().0 as u32;
        let level = usize::try_from(entries.next_depth()).unwrap_or(0);
        let Some(abbrev) = entries.read_abbreviation().ok()? else { continue };
        let tag = abbrev.tag();
        parents.truncate(level);
        let (parent, exact) = parents.last().copied().unwrap_or((u32::MAX, true));
        // Parameters of what is inlined belong to what is inlined.
        let foreign = !exact && matches!(tag, gimli::DW_TAG_formal_parameter | gimli::DW_TAG_unspecified_parameters);
        if !wanted(tag, depth) || foreign {
            entries.skip_attributes(abbrev.attributes()).ok()?;
            parents.resize(level + 1, (parent, exact && tag == gimli::DW_TAG_GNU_formal_parameter_pack));
            continue;
        }
        let mut die = Die {
            offset,
            parent,
            tag,
            flags: 0,
            file: 0,
            line: 0,
            name: &[],
            linkage: &[],
            ty: Ref::None,
            origin: Ref::None,
            size: 0,
            value: 0,
            align: 0,
        };
        let mut extra = Extra::default();
        for spec in abbrev.attributes() {
            let attr = entries.read_attribute(*spec).ok()?;
            attribute(dwarf, unit, &mut die, &mut extra, attr.name(), attr.value());
        }
        extra.finish(&mut die);
        let in_body = tag == gimli::DW_TAG_variable && die.flags & HAS_VALUE == 0 && die.flags & TLS == 0;
        if in_body && depth == Depth::Contracts && die.origin == Ref::None && !is_declared_static(&out, parent) {
            parents.resize(level + 1, (parent, false));
            continue;
        }
        let index = out.dies.len() as u32;
        if tag == gimli::DW_TAG_subprogram || tag == gimli::DW_TAG_inlined_subroutine {
            if let Some(at) = extra.ranges.take() {
                if let Ok(Some(mut ranges)) = dwarf.attr_ranges(unit, at) {
                    while let Ok(Some(r)) = ranges.next() {
                        if r.begin < r.end && tag == gimli::DW_TAG_subprogram {
                            out.starts.push((index, r.begin));
                        }
                    }
                }
            } else if die.flags & HAS_VALUE != 0 && tag == gimli::DW_TAG_subprogram {
                out.starts.push((index, die.value));
            }
        }
        declared |= tag == gimli::DW_TAG_subprogram && extra.prototyped;
        out.typed |= is_type(tag);
        if level == 0 {
            if let Some(language) = extra.language {
                out.rust = language == gimli::DW_LANG_Rust;
                out.c_like = matches!(
                    language,
                    gimli::DW_LANG_C
                        | gimli::DW_LANG_C89
                        | gimli::DW_LANG_C99
                        | gimli::DW_LANG_C11
                        | gimli::DW_LANG_C17
                );
            }
        }
        out.dies.push(die);
        parents.resize(level + 1, (index, true));
    }
    // A unit whose functions take nothing needs no types; `prototyped` is what tables of lines alone leave out.
    out.typed |= declared;
    if let Ok(mut ranges) = dwarf.unit_ranges(unit) {
        while let Ok(Some(r)) = ranges.next() {
            if r.begin < r.end {
                out.ranges.push((r.begin, r.end));
            }
        }
    }
    files(dwarf, unit, &mut out);
    Some(out)
}

fn files<'d>(dwarf: &Dwarf<Reader<'d>>, unit: &Unit<Reader<'d>>, out: &mut Table<'d>) {
    let Some(program) = &unit.line_program else { return };
    let header = program.header();
    let last = out.dies.iter().map(|d| d.file).max().unwrap_or(0);
    let text = |value| dwarf.attr_string(unit, value).map(|s| s.to_string_lossy().into_owned()).unwrap_or_default();
    for index in 0..=u64::from(last.min(1 << 16)) {
        let name = header.file(index).map_or_else(String::new, |file| {
            let name = text(file.path_name());
            let folder = file.directory(header).map(text).unwrap_or_default();
            let relative = !folder.is_empty() && !folder.starts_with('/') && !name.starts_with('/');
            if relative {
                format!("{folder}/{name}")
            } else {
                name
            }
        });
        out.files.push(name);
    }
}

/// A variable outside of functions, or the declaration of one, to which a definition refers.
fn is_declared_static(table: &Table<'_>, parent: u32) -> bool {
    table.dies.get(parent as usize).is_none_or(|p| p.tag != gimli::DW_TAG_subprogram)
}

#[derive(Default)]
struct Extra<'d> {
    bit_size: Option<u64>,
    /// DWARF 3: from the most significant bit of the storage unit.
    old_bit_offset: Option<u64>,
    ranges: Option<AttributeValue<Reader<'d>>>,
    language: Option<gimli::DwLang>,
    prototyped: bool,
    count: Option<u64>,
}

impl Extra<'_> {
    fn finish(&self, die: &mut Die<'_>) {
        if let Some(bits) = self.bit_size {
            if let Some(from_top) = self.old_bit_offset {
                let unit = if die.size == 0 { 4 } else { die.size };
                die.value = die.value.wrapping_add((unit * 8).wrapping_sub(from_top).wrapping_sub(bits));
            }
            die.size = bits;
            die.flags |= BIT_FIELD;
        }
        if let Some(count) = self.count {
            die.value = count;
            die.flags |= HAS_VALUE;
        }
    }
}

fn number(value: &AttributeValue<Reader<'_>>) -> Option<u64> {
    match value {
        AttributeValue::Block(b) if b.len() <= 16 => {
            // A 128-bit discriminant: both halves folded.
            let mut out = 0u64;
            for (i, byte) in b.slice().iter().enumerate() {
                out ^= u64::from(*byte) << (8 * (i % 8));
            }
            Some(out)
        }
        v => v.sdata_value().map(i64::cast_unsigned).or_else(|| v.udata_value()),
    }
}

fn reference(value: &AttributeValue<Reader<'_>>) -> Ref {
    match value {
        AttributeValue::UnitRef(o) => Ref::Unit(o.0 as u32),
        AttributeValue::DebugInfoRef(o) => Ref::Info(o.0 as u64),
        AttributeValue::DebugTypesRef(s) => Ref::Signature(s.0),
        _ => Ref::None,
    }
}

fn attribute<'d>(
    dwarf: &Dwarf<Reader<'d>>,
    unit: &Unit<Reader<'d>>,
    die: &mut Die<'d>,
    extra: &mut Extra<'d>,
    at: gimli::DwAt,
    value: AttributeValue<Reader<'d>>,
) {
    let set = |die: &mut Die<'d>, bit: u16| {
        if !matches!(value, AttributeValue::Flag(false)) {
            die.flags |= bit;
        }
    };
    let is_function = die.tag == gimli::DW_TAG_subprogram || die.tag == gimli::DW_TAG_inlined_subroutine;
    match at {
        gimli::DW_AT_name => die.name = dwarf.attr_string(unit, value).map_or(&[], |s| s.slice()),
        gimli::DW_AT_linkage_name if is_function => {
            die.linkage = dwarf.attr_string(unit, value).map_or(&[], |s| s.slice())
        }
        gimli::DW_AT_type => die.ty = reference(&value),
        gimli::DW_AT_abstract_origin | gimli::DW_AT_specification | gimli::DW_AT_discr => {
            die.origin = reference(&value)
        }
        gimli::DW_AT_containing_type if die.tag == gimli::DW_TAG_ptr_to_member_type => die.origin = reference(&value),
        gimli::DW_AT_signature => die.origin = reference(&value),
        gimli::DW_AT_byte_size => die.size = number(&value).unwrap_or(0),
        gimli::DW_AT_bit_size => extra.bit_size = number(&value),
        gimli::DW_AT_bit_offset => extra.old_bit_offset = number(&value),
        gimli::DW_AT_data_bit_offset => die.value = number(&value).unwrap_or(0),
        gimli::DW_AT_data_member_location => match (&value, number(&value)) {
            (AttributeValue::Exprloc(e), _) => match plus_constant(*e, unit) {
                Some(bytes) => die.value = bytes.wrapping_mul(8),
                None => {
                    die.value = hash(e.0.slice());
                    die.flags |= COMPUTED;
                }
            },
            (_, Some(bytes)) => die.value = bytes.wrapping_mul(8),
            _ => die.flags |= COMPUTED,
        },
        gimli::DW_AT_const_value | gimli::DW_AT_discr_value
            if die.tag == gimli::DW_TAG_enumerator || die.tag == gimli::DW_TAG_variant =>
        {
            if let Some(n) = number(&value) {
                die.value = n;
                die.flags |= HAS_VALUE;
            }
        }
        gimli::DW_AT_discr_list => {
            if let AttributeValue::Block(b) = value {
                die.value = hash(b.slice());
                die.flags |= HAS_VALUE;
            }
        }
        gimli::DW_AT_count => extra.count = number(&value),
        gimli::DW_AT_upper_bound => {
            let constant = !matches!(value, AttributeValue::Exprloc(_) | AttributeValue::UnitRef(_));
            extra.count = extra.count.or(number(&value).filter(|_| constant).map(|n| n.wrapping_add(1)));
        }
        gimli::DW_AT_encoding => {
            if let AttributeValue::Encoding(e) = value {
                die.value = u64::from(e.0);
            }
        }
        gimli::DW_AT_alignment => die.align = number(&value).unwrap_or(0),
        gimli::DW_AT_decl_file => {
            die.file = match value {
                AttributeValue::FileIndex(n) => n as u32,
                v => v.udata_value().unwrap_or(0) as u32,
            };
        }
        gimli::DW_AT_decl_line => die.line = value.udata_value().unwrap_or(0) as u32,
        gimli::DW_AT_declaration => set(die, DECLARATION),
        gimli::DW_AT_artificial => set(die, ARTIFICIAL),
        gimli::DW_AT_noreturn => set(die, NORETURN),
        gimli::DW_AT_object_pointer => die.flags |= METHOD,
        gimli::DW_AT_inline => die.flags |= INLINE_BODY,
        gimli::DW_AT_prototyped | gimli::DW_AT_external => extra.prototyped |= at == gimli::DW_AT_prototyped,
        gimli::DW_AT_virtuality if !matches!(value, AttributeValue::Virtuality(gimli::DW_VIRTUALITY_none)) => {
            die.flags |= VIRTUAL;
        }
        gimli::DW_AT_vtable_elem_location => {
            if let AttributeValue::Exprloc(e) = value {
                die.size = constant(e, unit).unwrap_or_else(|| hash(e.0.slice()));
            }
        }
        gimli::DW_AT_low_pc if is_function => {
            if let Ok(Some(addr)) = dwarf.attr_address(unit, value) {
                if addr != 0 && addr < u64::MAX - 1 {
                    die.value = addr;
                    die.flags |= HAS_VALUE;
                }
            }
        }
        gimli::DW_AT_ranges if is_function => extra.ranges = Some(value),
        gimli::DW_AT_location if die.tag == gimli::DW_TAG_variable => {
            if let AttributeValue::Exprloc(e) = value {
                location(dwarf, unit, die, e);
            }
        }
        gimli::DW_AT_language => {
            if let AttributeValue::Language(l) = value {
                extra.language = Some(l);
            }
        }
        _ => {}
    }
}

/// The address of a static or the offset of a thread-local.
fn location<'d>(
    dwarf: &Dwarf<Reader<'d>>,
    unit: &Unit<Reader<'d>>,
    die: &mut Die<'d>,
    e: gimli::Expression<Reader<'d>>,
) {
    let mut operations = e.operations(unit.encoding());
    let first = operations.next().ok().flatten();
    let Ok(second) = operations.next() else { return };
    let tls = matches!(second, Some(Operation::TLS));
    if second.is_some() && !tls {
        return; // the value itself, or something at a distance
    }
    let value = match first {
        Some(Operation::Address { address }) => Some(address),
        Some(Operation::AddressIndex { index } | Operation::ConstantIndex { index }) => dwarf.address(unit, index).ok(),
        Some(Operation::UnsignedConstant { value }) if tls => Some(value),
        _ => None,
    };
    if let Some(value) = value.filter(|v| tls || *v != 0) {
        die.value = value;
        die.flags |= HAS_VALUE | if tls { TLS } else { 0 };
    }
}

fn constant(e: gimli::Expression<Reader<'_>>, unit: &Unit<Reader<'_>>) -> Option<u64> {
    let mut operations = e.operations(unit.encoding());
    match (operations.next().ok()??, operations.next().ok()?) {
        (Operation::UnsignedConstant { value }, None) => Some(value),
        (Operation::SignedConstant { value }, None) => Some(value.cast_unsigned()),
        _ => None,
    }
}

fn plus_constant(e: gimli::Expression<Reader<'_>>, unit: &Unit<Reader<'_>>) -> Option<u64> {
    let mut operations = e.operations(unit.encoding());
    match (operations.next().ok()??, operations.next().ok()?) {
        (Operation::PlusConstant { value }, None) => Some(value),
        _ => None,
    }
}

/// FNV-1a.
pub fn hash(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0xcbf2_9ce4_8422_2325, |h, b| (h ^ u64::from(*b)).wrapping_mul(0x0100_0000_01b3))
}
