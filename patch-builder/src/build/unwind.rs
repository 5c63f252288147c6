//! `.eh_frame`, decoded by hand: linkers drop or misplace its relocations.

use std::collections::hash_map::{Entry, HashMap};

use gimli::{BaseAddresses, CieOrFde, EhFrame, Pointer, UnwindSection};

use super::elf::{damaged, Section};
use super::BuildError;

/// How a function's frames are unwound.
#[derive(Clone, Debug)]
pub struct Fde<'d> {
    /// First address.
    pub start: u64,
    /// Length.
    pub len: u64,
    /// Call-frame instructions of its CIE.
    pub initial: &'d [u8],
    /// Its own call-frame instructions.
    pub instructions: &'d [u8],
    /// Code alignment factor.
    pub code_align: u64,
    /// Data alignment factor.
    pub data_align: i64,
    /// Return address register.
    pub return_register: u16,
    /// A signal frame.
    pub signal: bool,
    /// Its personality routine.
    pub personality: Option<Personality>,
    /// Its language-specific data area.
    pub lsda: Option<u64>,
}

/// Where a personality routine is found.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Personality {
    /// At this address.
    Direct(u64),
    /// In the slot at this address.
    Indirect(u64),
}

/// The unwind tables of a build.
#[derive(Default)]
pub struct Unwind<'d> {
    /// By first address.
    fdes: Vec<Fde<'d>>,
    lsdas: Vec<u64>,
}

impl<'d> Unwind<'d> {
    /// Reads an `.eh_frame` that lies at `addr`.
    ///
    /// # Errors
    ///
    /// It is damaged.
    pub fn parse(addr: u64, data: &'d [u8]) -> Result<Self, BuildError> {
        parse(addr, data)
    }

    /// Where the functions start that it has entries for.
    pub fn starts(&self) -> impl Iterator<Item = u64> + '_ {
        self.fdes.iter().map(|f| f.start)
    }

    /// The entry of the function that starts at `addr`.
    #[must_use]
    pub fn fde_at(&self, addr: u64) -> Option<&Fde<'d>> {
        self.fdes.binary_search_by_key(&addr, |f| f.start).ok().map(|i| &self.fdes[i])
    }

    /// The language-specific data area after the one at `addr`.
    #[must_use]
    pub fn next_lsda(&self, addr: u64) -> Option<u64> {
        self.lsdas.get(self.lsdas.partition_point(|l| *l <= addr)).copied()
    }

    /// Where every language-specific data area begins, ascending.
    #[must_use]
    pub fn lsdas(&self) -> &[u64] {
        &self.lsdas
    }

    /// The functions that name a personality: something there may unwind.
    pub fn with_personality(&self) -> impl Iterator<Item = &Fde<'d>> + '_ {
        self.fdes.iter().filter(|f| f.personality.is_some())
    }

    /// Every personality in use.
    pub fn personalities(&self) -> impl Iterator<Item = Personality> + '_ {
        self.fdes.iter().filter_map(|f| f.personality)
    }
}

pub fn read<'d>(sections: &[Section<'d>]) -> Result<Unwind<'d>, BuildError> {
    match sections.iter().find(|s| s.name == ".eh_frame") {
        Some(s) => parse(s.addr, s.data),
        None => Ok(Unwind::default()),
    }
}

fn parse(addr: u64, data: &[u8]) -> Result<Unwind<'_>, BuildError> {
    let mut eh = EhFrame::new(data, gimli::LittleEndian);
    eh.set_address_size(8);
    let bases = BaseAddresses::default().set_eh_frame(addr);
    let mut fdes: Vec<Fde<'_>> = Vec::new();
    let mut cies = HashMap::new();
    let mut entries = eh.entries(&bases);
    let bad = |e: gimli::Error| damaged(format!(".eh_frame: {e}"));
    while let Some(entry) = entries.next().map_err(bad)? {
        let CieOrFde::Fde(partial) = entry else { continue };
        let fde = partial
            .parse(|eh, bases, at| match cies.entry(at) {
                Entry::Occupied(known) => Ok(gimli::CommonInformationEntry::clone(known.get())),
                Entry::Vacant(free) => Ok(free.insert(eh.cie_from_offset(bases, at)?).clone()),
            })
            .map_err(bad)?;
        let cie = fde.cie();
        let direct = |p: Pointer| match p {
            Pointer::Direct(a) => Personality::Direct(a),
            Pointer::Indirect(a) => Personality::Indirect(a),
        };
        let lsda = match fde.lsda() {
            Some(Pointer::Direct(a)) if a != 0 => Some(a),
            Some(Pointer::Indirect(_)) => return Err(damaged(".eh_frame: an indirect language-specific data area")),
            _ => None,
        };
        let entry = Fde {
            start: fde.initial_address(),
            len: fde.len(),
            initial: cie_instructions(data, cie.offset()).ok_or_else(|| damaged(".eh_frame: a CIE"))?,
            instructions: fde_instructions(
                data,
                fde.offset(),
                cie.fde_address_encoding(),
                cie.augmentation().is_some(),
            )
            .ok_or_else(|| damaged(".eh_frame: an FDE"))?,
            code_align: cie.code_alignment_factor(),
            data_align: cie.data_alignment_factor(),
            return_register: cie.return_address_register().0,
            signal: cie.is_signal_trampoline(),
            personality: cie.personality().map(direct),
            lsda,
        };
        fdes.push(entry);
    }
    // Of several for one address the last counts.
    fdes.reverse();
    fdes.sort_by_key(|f| f.start);
    fdes.dedup_by_key(|f| f.start);
    let mut lsdas: Vec<u64> = fdes.iter().filter_map(|f| f.lsda).collect();
    lsdas.sort_unstable();
    Ok(Unwind { fdes, lsdas })
}

/// A cursor over a table's bytes; every step is checked.
struct Cursor<'d> {
    data: &'d [u8],
}

impl<'d> Cursor<'d> {
    fn skip(&mut self, len: usize) -> Option<&'d [u8]> {
        let (head, rest) = self.data.split_at_checked(len)?;
        self.data = rest;
        Some(head)
    }

    fn leb(&mut self) -> Option<u64> {
        let mut value = 0u64;
        for shift in (0..63).step_by(7) {
            let byte = self.skip(1)?[0];
            value |= u64::from(byte & 0x7f) << shift;
            if byte & 0x80 == 0 {
                return Some(value);
            }
        }
        None
    }

    fn signed_leb(&mut self) -> Option<i64> {
        let mut value = 0i64;
        for shift in (0..63).step_by(7) {
            let byte = self.skip(1)?[0];
            value |= i64::from(byte & 0x7f) << shift;
            if byte & 0x80 == 0 {
                // sign-extend from bit `shift + 6`
                let unused = 57u32.saturating_sub(shift);
                return Some(value << unused >> unused);
            }
        }
        None
    }

    /// The body of the entry at `offset`, after its length and its id.
    fn entry(data: &'d [u8], offset: usize) -> Option<Self> {
        let mut cursor = Self { data: data.get(offset..)? };
        let len = u32::from_le_bytes(cursor.skip(4)?.try_into().ok()?);
        if len == u32::MAX {
            return None; // 64-bit DWARF in .eh_frame: nobody writes it
        }
        let mut body = Self { data: cursor.skip(len as usize)? };
        body.skip(4)?;
        Some(body)
    }
}

fn cie_instructions(data: &[u8], offset: usize) -> Option<&[u8]> {
    let mut c = Cursor::entry(data, offset)?;
    let version = c.skip(1)?[0];
    let len = c.data.iter().position(|b| *b == 0)?;
    let augmentation = c.skip(len + 1)?;
    c.leb()?;
    c.leb()?;
    if version == 1 {
        c.skip(1)?;
    } else {
        c.leb()?;
    }
    if augmentation.first() == Some(&b'z') {
        let len = c.leb()?;
        c.skip(usize::try_from(len).ok()?)?;
    }
    Some(c.data)
}

fn fde_instructions(data: &[u8], offset: usize, encoding: Option<gimli::DwEhPe>, augmented: bool) -> Option<&[u8]> {
    let mut c = Cursor::entry(data, offset)?;
    let width = match encoding.map_or(0, |e| e.0 & 7) {
        0 | 4 => 8,
        2 => 2,
        3 => 4,
        _ => return None,
    };
    c.skip(2 * width)?;
    if augmented {
        let len = c.leb()?;
        c.skip(usize::try_from(len).ok()?)?;
    }
    Some(c.data)
}

/// Length of the language-specific data area that `data` begins with, as far as its header and its
/// tables tell; `None` if they do not (exception specifications follow the types without a length).
pub(super) fn lsda_len(data: &[u8]) -> Option<u64> {
    let mut c = Cursor { data };
    if c.skip(1)?[0] != 0xff {
        return None; // a landing-pad base of its own
    }
    let types = c.skip(1)?[0];
    let types_end = if types == 0xff {
        None
    } else {
        let len = usize::try_from(c.leb()?).ok()?;
        Some((data.len() - c.data.len()).checked_add(len)?)
    };
    let call_encoding = c.skip(1)?[0];
    let calls = usize::try_from(c.leb()?).ok()?;
    let mut calls = Cursor { data: c.skip(calls)? };
    let tables_end = data.len() - c.data.len();
    let Some(types_end) = types_end else { return Some(tables_end as u64) };
    if types_end > data.len() || types_end < tables_end || call_encoding != 1 {
        return None;
    }
    // A negative filter names an exception specification: a list behind the types that a zero ends.
    let mut end = types_end;
    while !calls.data.is_empty() {
        let (_, _, _, action) = (calls.leb()?, calls.leb()?, calls.leb()?, calls.leb()?);
        let mut at = tables_end.checked_add(usize::try_from(action).ok()?)?;
        for _ in 0..64 {
            if action == 0 {
                break;
            }
            let mut record = Cursor { data: data.get(at - 1..types_end)? };
            let filter = record.signed_leb()?;
            let next_at = types_end - record.data.len();
            let next = record.signed_leb()?;
            if filter < 0 {
                let from = types_end.checked_add(usize::try_from(filter.unsigned_abs() - 1).ok()?)?;
                let list = data.get(from..)?;
                end = end.max(from + list.iter().position(|b| *b == 0)? + 1);
            }
            if next == 0 {
                break;
            }
            at = next_at.checked_add_signed(isize::try_from(next).ok()?)?.checked_add(1)?;
        }
    }
    Some(end as u64)
}
