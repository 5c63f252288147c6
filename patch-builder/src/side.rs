//! One build with everything that comparing needs: its functions in symbolic
//! form and the places at which code refers to unnamed data.

use crate::build::{Build, DynKind, FuncId, ObjId};
use crate::lift::{lift_all, resolve, Access, Lifted, Target};

/// One of the two builds.
pub struct Side<'d> {
    /// The build.
    pub build: Build<'d>,
    /// Its functions in symbolic form, by id.
    pub lifted: Vec<Lifted<'d>>,
    /// Where anything refers to unnamed data, ascending: starts, or middles.
    soft_bounds: Vec<u64>,
    /// Where the text that is cut at each of them ends, in a program whose text ends with a zero.
    text_ends: Vec<u64>,
    /// Where code refers to unnamed data, ascending.
    named_by_code: Vec<u64>,
    /// The functions that refer to each data symbol.
    users: Vec<Vec<FuncId>>,
    /// The functions that refer to each function.
    callers: Vec<Vec<FuncId>>,
    /// Whether each function is an out-of-line part of another, by its name.
    cold: Vec<bool>,
    /// Addresses that data or code holds, by what they point to.
    pointers: Vec<Pointer>,
}

/// An address that something holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Pointer {
    /// What it points to.
    pub to: u64,
    /// Where it stands.
    pub at: u64,
    /// Whether it is found by an exported name, which a library may interpose.
    pub by_name: bool,
}

fn pointers(build: &Build<'_>) -> Vec<Pointer> {
    let dynamic = build.dynamic.iter().filter_map(|(at, r)| match r.kind {
        DynKind::Relative(to) => Some(Pointer { to, at: *at, by_name: false }),
        DynKind::Own(to, addend) => Some(Pointer { to: to.wrapping_add_signed(addend), at: *at, by_name: true }),
        _ => None,
    });
    let kept = build.relocs.iter().filter(|r| r.kind == R_64).map(|r| {
        let to = build.rel_sym(r).value.wrapping_add_signed(r.addend);
        Pointer { to, at: r.at, by_name: false }
    });
    let mut out: Vec<Pointer> = dynamic.chain(kept).collect();
    out.sort_unstable();
    out.dedup();
    out
}

const R_64: u32 = 1;
const R_PC32: u32 = 2;

/// Where something other than bytes stands, one after the other.
pub struct Marks<'a> {
    relocs: &'a [crate::build::Reloc],
    dynamic: &'a [u64],
}

impl Marks<'_> {
    /// The first such place at `addr` or behind it; what is asked for must not go back.
    pub fn next(&mut self, addr: u64) -> Option<u64> {
        while self.relocs.first().is_some_and(|r| r.at < addr || r.kind == 0) {
            self.relocs = &self.relocs[1..];
        }
        while self.dynamic.first().is_some_and(|at| *at < addr) {
            self.dynamic = &self.dynamic[1..];
        }
        let (reloc, dynamic) = (self.relocs.first().map(|r| r.at), self.dynamic.first().copied());
        reloc.into_iter().chain(dynamic).min()
    }
}

/// What the tables of distances that code refers to lead to, besides code: strings, for one.
fn pointed_by_tables(build: &Build<'_>, tables: &[u64]) -> Vec<u64> {
    let is_entry = |at: u64| build.relocs_in(at, 1).iter().any(|r| r.kind == R_PC32);
    let mut starts: Vec<u64> = tables.iter().copied().filter(|at| is_entry(*at)).collect();
    starts.sort_unstable();
    starts.dedup();
    let mut out = Vec::new();
    for (i, start) in starts.iter().enumerate() {
        let next = starts.get(i + 1).copied().unwrap_or(u64::MAX);
        for at in (*start..next).step_by(4).take_while(|at| is_entry(*at)) {
            let Some(entry) = build.bytes(at, 4).and_then(|b| b.try_into().ok()).map(i32::from_le_bytes) else { break };
            let to = start.wrapping_add_signed(i64::from(entry));
            if build.section_at(to).is_some_and(|s| !s.exec) {
                out.push(to);
            }
        }
    }
    out
}

/// Behind the terminator of the text at each of `bounds`, or 0 where its section has none. One pass from the end, so that a
/// text that is referred to everywhere is read once.
fn text_ends(build: &Build<'_>, bounds: &[u64]) -> Vec<u64> {
    let mut out = vec![0; bounds.len()];
    for (i, from) in bounds.iter().enumerate().rev() {
        let Some(end) = build.section_at(*from).map(|s| s.addr + s.size) else { continue };
        let next = bounds.get(i + 1).copied().filter(|next| *next < end);
        let bytes = build.bytes(*from, next.unwrap_or(end) - from).unwrap_or(&[]);
        out[i] = match (memchr::memchr(0, bytes), next) {
            (Some(at), _) => from + at as u64 + 1,
            (None, Some(_)) => out[i + 1],
            (None, None) => 0,
        };
    }
    out
}

impl<'d> Side<'d> {
    /// Lifts a build.
    #[must_use]
    pub fn new(build: Build<'d>) -> Self {
        let (lifted, (pointers, cold)) = rayon::join(
            || lift_all(&build),
            || (pointers(&build), build.funcs.iter().map(|f| f.cold_parent().is_some()).collect()),
        );
        let mut soft_bounds = build.soft_bounds.clone();
        let mut named_by_code = Vec::new();
        let mut users = vec![Vec::new(); build.objects.len()];
        let mut callers = vec![Vec::new(); build.funcs.len()];
        for (id, f) in lifted.iter().enumerate() {
            for r in &f.refs {
                match r.target {
                    Target::Func(callee, _) => callers[callee as usize].push(id as FuncId),
                    Target::Data(at) => {
                        soft_bounds.push(at);
                        named_by_code.push(at);
                    }
                    Target::Object(object, _) => users[object as usize].push(id as FuncId),
                    _ => {}
                }
            }
        }
        soft_bounds.extend(pointed_by_tables(&build, &named_by_code));
        soft_bounds.sort_unstable();
        soft_bounds.dedup();
        let text_ends = if build.rust { Vec::new() } else { text_ends(&build, &soft_bounds) };
        named_by_code.sort_unstable();
        named_by_code.dedup();
        users.iter_mut().chain(&mut callers).for_each(Vec::dedup);
        Self { build, lifted, soft_bounds, text_ends, named_by_code, users, callers, cold, pointers }
    }

    /// The functions that refer to a data symbol.
    #[must_use]
    pub fn users(&self, id: ObjId) -> &[FuncId] {
        &self.users[id as usize]
    }

    /// The functions that refer to a function.
    #[must_use]
    pub fn callers(&self, id: FuncId) -> &[FuncId] {
        &self.callers[id as usize]
    }

    /// Whether a function is an out-of-line part of another, by its name.
    #[must_use]
    pub fn is_cold(&self, id: FuncId) -> bool {
        self.cold[id as usize]
    }

    /// The addresses in data or code that point to `from..to`.
    #[must_use]
    pub fn pointers_to(&self, from: u64, to: u64) -> &[Pointer] {
        let start = self.pointers.partition_point(|p| p.to < from);
        let end = self.pointers.partition_point(|p| p.to < to);
        &self.pointers[start..end.max(start)]
    }

    /// The addresses from which on something other than bytes stands in data.
    #[must_use]
    pub fn marks(&self, from: u64) -> Marks<'_> {
        let build = &self.build;
        Marks {
            relocs: &build.relocs[build.relocs.partition_point(|r| r.at < from)..],
            dynamic: &build.dynamic_at[build.dynamic_at.partition_point(|at| *at < from)..],
        }
    }

    /// What runs at start-up and at the end, in the order of the arrays that say so.
    #[must_use]
    pub fn start_up(&self) -> Vec<Target<'d>> {
        const ARRAYS: [&str; 5] = [".init_array", ".fini_array", ".preinit_array", ".ctors", ".dtors"];
        let build = &self.build;
        let arrays = build.sections.iter().filter(|s| ARRAYS.iter().any(|n| s.name.starts_with(n)));
        let places = arrays.flat_map(|s| (s.addr..s.addr + s.size).step_by(8));
        let value = |at: u64| match build.dynamic.get(&at).map(|r| r.kind) {
            Some(DynKind::Relative(to)) => to,
            _ => build.bytes(at, 8).and_then(|b| b.try_into().ok()).map_or(0, u64::from_le_bytes),
        };
        places.map(|at| resolve(build, value(at), None)).collect()
    }

    /// Every address that data or code holds.
    #[must_use]
    pub fn pointers(&self) -> &[Pointer] {
        &self.pointers
    }

    /// Whether `addr` lies in data that the program may change.
    #[must_use]
    pub fn is_mutable(&self, addr: u64) -> bool {
        self.build.section_at(addr).is_none_or(crate::build::Section::is_mutable)
    }

    /// The places of writable data without a name that code refers to, ascending.
    #[must_use]
    pub fn unnamed_mutable(&self) -> Vec<u64> {
        self.named_by_code.iter().copied().filter(|at| self.is_mutable(*at)).collect()
    }

    /// Whether a 32-bit relative entry of a table stands at `addr`.
    #[must_use]
    pub fn is_table_entry(&self, addr: u64) -> bool {
        self.build.relocs_in(addr, 1).iter().any(|r| r.kind == R_PC32)
    }

    /// Where the unnamed data that begins at `addr` ends. Errs on the long side, except
    /// where names, maps or zero terminators prove an end.
    #[must_use]
    pub fn extent_end(&self, addr: u64) -> u64 {
        let hard = self.build.next_bound(addr);
        let index = self.soft_bounds.partition_point(|b| *b <= addr);
        let soft = self.soft_bounds.get(index).copied().unwrap_or(hard).min(hard);
        if self.is_table_entry(addr) {
            let mut end = addr;
            while end < soft && self.is_table_entry(end) {
                end += 4;
            }
            return end;
        }
        if self.is_text(addr, soft) {
            return soft;
        }
        let cut_text = !self.build.rust && self.is_unterminated_text(addr, soft);
        if cut_text {
            // A tail-merged string: its end is its terminator.
            let limit = self.build.section_at(addr).map_or(hard, |s| s.addr + s.size);
            let next = self.soft_bounds.get(index).copied().filter(|next| *next < limit);
            let bytes = self.build.bytes(addr, next.unwrap_or(limit) - addr).unwrap_or(&[]);
            let here = memchr::memchr(0, bytes).map(|at| addr + at as u64 + 1);
            let further = || next.map(|_| self.text_ends[index]).filter(|end| *end != 0);
            return here.or_else(further).unwrap_or(hard);
        }
        if soft == hard {
            return soft;
        }
        // Rust's constants with pointers in them are tables of trait objects, locations and slices of text.
        if self.build.rust && self.build.section_at(addr).is_some_and(crate::build::Section::is_relro) {
            return soft;
        }
        // A reference into the middle of something: take all of it, but no table that follows.
        let mut end = soft;
        while end < hard && !self.is_table_entry(end) {
            end += 4 - end % 4;
        }
        end.min(hard)
    }

    /// Where to stop comparing the unnamed data at `addr`, and whether something else is referred to just there,
    /// so that it can't be told whether the data goes on.
    #[must_use]
    pub fn compare_end(&self, addr: u64) -> (u64, bool) {
        if !self.build.rust || self.is_table_entry(addr) {
            return (self.extent_end(addr), false);
        }
        let hard = self.build.next_bound(addr);
        let index = self.soft_bounds.partition_point(|b| *b <= addr);
        let soft = self.soft_bounds.get(index).copied().unwrap_or(hard).min(hard);
        let relro = self.build.section_at(addr).is_some_and(crate::build::Section::is_relro);
        let proven = relro || soft == hard || self.rust_shape_end(addr, soft).is_some() || self.is_text(addr, soft);
        (soft, !proven)
    }

    /// The next place behind `addr` that anything refers to, or that bounds what lies there.
    pub(crate) fn next_soft(&self, addr: u64) -> u64 {
        let index = self.soft_bounds.partition_point(|b| *b <= addr);
        let hard = self.build.next_bound(addr);
        self.soft_bounds.get(index).copied().unwrap_or(hard).min(hard)
    }

    fn is_padding(&self, from: u64, to: u64) -> bool {
        from == to
            || from < to
                && to - from < 16
                && self.build.bytes(from, to - from).is_some_and(|b| b.iter().all(|b| *b == 0))
    }

    /// Where the template of a `format_args!` ends, which says so itself: pieces of text behind their lengths,
    /// placeholders behind their flags, and a zero (core::fmt::Arguments since Rust 1.93).
    fn template_end(&self, addr: u64) -> Option<u64> {
        if !self.build.rust {
            return None;
        }
        let mut at = addr;
        let (mut text, mut holes) = (0, 0);
        loop {
            let lead = *self.build.bytes(at, 1)?.first()?;
            at += 1;
            let len = match lead {
                0 => break,
                1..=0x7f => u64::from(lead),
                0x80 => {
                    let len = self.build.bytes(at, 2)?;
                    at += 2;
                    u64::from(u16::from_le_bytes([len[0], len[1]]))
                }
                0xc0..=0xcf => {
                    holes += 1;
                    let sizes = [4, 2, 2, 2];
                    at += (0..4).filter(|bit| lead >> bit & 1 == 1).map(|bit| sizes[bit as usize]).sum::<u64>();
                    continue;
                }
                _ => return None,
            };
            std::str::from_utf8(self.build.bytes(at, len)?).ok()?;
            (at, text) = (at + len, text + 1);
        }
        (text + holes > 0 && holes < 64).then_some(at)
    }

    /// Where a `core::panic::Location` or the table of a trait object ends: nothing refers into the middle of these.
    fn rust_shape_end(&self, addr: u64, soft: u64) -> Option<u64> {
        let build = &self.build;
        if let Some(end) = self.template_end(addr).filter(|end| self.is_padding(*end, soft)) {
            return Some(end);
        }
        let relro = build.rust && build.section_at(addr).is_some_and(crate::build::Section::is_relro);
        let word = |at: u64| build.bytes(at, 8).and_then(|b| b.try_into().ok()).map(u64::from_le_bytes);
        let pointer = |at: u64| match build.dynamic.get(&at).map(|r| r.kind) {
            Some(DynKind::Relative(to)) => Some(to),
            _ => None,
        };
        if !relro || !addr.is_multiple_of(8) {
            return None;
        }
        let is_code = |to: u64| build.section_at(to).is_some_and(|s| s.exec);
        let len = word(addr + 8)?;
        if let Some(file) = pointer(addr).filter(|to| !is_code(*to)) {
            // { file: &str, line: u32, column: u32 }
            let name = build.bytes(file, len).filter(|_| len < 4096)?;
            return (name.ends_with(b".rs") && addr + 24 <= soft).then_some(addr + 24);
        }
        // { drop or null, size, alignment, functions }
        let drop = pointer(addr).is_some_and(is_code) || word(addr) == Some(0);
        let align = word(addr + 16).is_some_and(|a| a.is_power_of_two() && a <= 4096 && len % a == 0);
        let methods = (addr + 24..soft).step_by(8).all(|at| pointer(at).is_some_and(is_code));
        let plain = pointer(addr + 8).is_none() && pointer(addr + 16).is_none();
        (drop && align && plain && methods && addr + 24 <= soft && soft.is_multiple_of(8)).then_some(soft)
    }

    /// Where the text at `addr` of a Rust program ends if it is a `str`: where the next thing begins that anything
    /// refers to. Only a length that stands beside the reference proves it.
    #[must_use]
    pub fn str_end(&self, addr: u64) -> Option<u64> {
        let hard = self.build.next_bound(addr);
        let index = self.soft_bounds.partition_point(|b| *b <= addr);
        let end = self.soft_bounds.get(index).copied().unwrap_or(hard).min(hard);
        let bytes = self.build.bytes(addr, end.checked_sub(addr)?)?;
        // Zeros behind it are padding: a length that stands beside the reference must say so.
        let end = bytes.iter().position(|b| *b == 0).map_or(end, |at| addr + at as u64);
        // The bytes of a table's distances may look like text: what is relocated is none.
        if self.marks(addr).next(addr).is_some_and(|at| at < end) {
            return None;
        }
        let text = std::str::from_utf8(bytes.get(..usize::try_from(end - addr).ok()?)?).ok()?;
        (self.build.rust && !text.is_empty() && !text.contains('\0')).then_some(end)
    }

    fn is_text(&self, from: u64, to: u64) -> bool {
        let Some(bytes) = self.build.bytes(from, to.saturating_sub(from)) else { return false };
        let trimmed = bytes.iter().rposition(|b| *b != 0).map_or(0, |at| at + 1);
        trimmed < bytes.len()
            && bytes[..trimmed].iter().all(|b| *b >= 0x20 || matches!(b, b'\t' | b'\n' | b'\r' | 0x1b))
    }

    fn is_unterminated_text(&self, from: u64, to: u64) -> bool {
        let Some(bytes) = self.build.bytes(from, to.saturating_sub(from)) else { return false };
        !bytes.is_empty() && bytes.iter().all(|b| *b >= 0x20 || matches!(b, b'\t' | b'\n' | b'\r' | 0x1b))
    }

    /// Whether a reference may be by address rather than by call.
    #[must_use]
    pub fn takes_address(access: Access) -> bool {
        access != Access::Branch
    }
}
