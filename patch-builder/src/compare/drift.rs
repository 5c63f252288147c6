//! Lines and columns that moved: recognised only where the line tables of both
//! builds show them, and always reported.

use iced_x86::{Decoder, DecoderOptions, FlowControl, Mnemonic};

use super::data::{place, Place};
use super::{Comparer, LineProof, Noise};
use crate::build::{FuncId, Lines, Row};
use crate::side::Side;

/// Rows of both versions of one function.
struct Rows<'a> {
    old: &'a [Row],
    new: &'a [Row],
    old_start: u64,
    new_start: u64,
}

impl<'a> Rows<'a> {
    fn of(old: &Side<'_>, new: &Side<'_>, lines: (&'a Lines, &'a Lines), f: FuncId, g: FuncId) -> Self {
        let (x, y) = (old.build.func(f), new.build.func(g));
        Self {
            old: lines.0.rows_in(x.addr, x.size),
            new: lines.1.rows_in(y.addr, y.size),
            old_start: x.addr,
            new_start: y.addr,
        }
    }

    /// Whether the code from offset `from` to `to` (where the call stands that takes the number) is at line `a` in
    /// the old build and at line `b` in the new one, by rows at the same offset.
    fn moved(&self, a: u32, b: u32, from: u64, to: u64) -> bool {
        let within = |rows: &[Row], start: u64, line: u32| -> Vec<u64> {
            // Rows ascend by address: those of the covering one and those in range are next to each other, or nearly.
            let begun = rows.partition_point(|r| r.addr <= start + from);
            let covering = rows[..begun].iter().rposition(|r| r.file != u32::MAX);
            let covering = covering.map_or(u64::MAX, |i| rows[i].addr);
            let first = rows.partition_point(|r| r.addr < covering.min(start + from));
            let end = rows.partition_point(|r| r.addr <= start + to).max(begun).max(first);
            let near = rows[first..end].iter();
            let near = near.filter(|r| r.addr == covering || (start + from..=start + to).contains(&r.addr));
            near.filter(|r| r.line == line).map(|r| r.addr - start).collect()
        };
        if a == 0 || b == 0 {
            return false;
        }
        let new = within(self.new, self.new_start, b);
        within(self.old, self.old_start, a).iter().any(|offset| new.contains(offset))
    }
}

impl<'d> Comparer<'_, 'd> {
    /// Whether the only bytes in which the two functions differ are line numbers that are moved into registers or memory.
    pub(super) fn line_drift(&mut self, f: FuncId, g: FuncId) -> bool {
        let LineProof::Tables(old_lines, new_lines) = self.proof else { return false };
        let (x, y) = (&self.old.lifted[f as usize].masked, &self.new.lifted[g as usize].masked);
        let rows = Rows::of(self.old, self.new, (old_lines, new_lines), f, g);
        let calls = calls(x);
        let mut seen = Vec::new();
        let mut decoders =
            (Decoder::with_ip(64, x, 0, DecoderOptions::NONE), Decoder::with_ip(64, y, 0, DecoderOptions::NONE));
        while decoders.0.can_decode() && decoders.1.can_decode() {
            let (p, q) = (decoders.0.decode(), decoders.1.decode());
            let range = p.ip() as usize..p.next_ip() as usize;
            if p.len() != q.len() || p.code() != q.code() || p.ip() != q.ip() {
                return false;
            }
            let (Some(a), Some(b)) = (x.get(range.clone()), y.get(range)) else { return false };
            if a == b {
                continue;
            }
            let field = decoders.0.get_constant_offsets(&p);
            let (from, width) = (field.immediate_offset(), field.immediate_size());
            let carries_a_number = matches!(p.mnemonic(), Mnemonic::Mov | Mnemonic::Push) && width >= 2;
            if !carries_a_number || a[..from] != b[..from] || a[from + width..] != b[from + width..] {
                return false;
            }
            for half in (0..width).step_by(4) {
                let value = |bytes: &[u8]| {
                    bytes[from + half..(from + half + 4).min(from + width)]
                        .iter()
                        .rev()
                        .fold(0u32, |v, b| v << 8 | u32::from(*b))
                };
                let (a, b) = (value(a), value(b));
                if a != b {
                    let call = calls.get(calls.partition_point(|c| *c < p.ip())).copied().unwrap_or(p.ip());
                    if !rows.moved(a, b, p.ip(), call) {
                        return false;
                    }
                    seen.push(Noise { rule: "line-immediate", detail: format!("line {a} is now line {b}") });
                }
            }
        }
        self.noise.append(&mut seen);
        true
    }

    /// The bytes at `offset` differ. Fine if both are a `core::panic::Location` of the same file, the
    /// difference is in its line or column, and the line tables have both lines in the functions at hand. The file
    /// of a published crate has the crate's version in its path, and is the same file in another version.
    pub(super) fn location_drift(&mut self, a: u64, b: u64, offset: u64, x: &[u8], y: &[u8]) -> bool {
        let (Some((p, _)), Some((q, _))) = (x.split_first_chunk::<24>(), y.split_first_chunk::<24>()) else {
            return false;
        };
        let assume = match self.proof {
            LineProof::None => return false,
            LineProof::Locations => true,
            LineProof::Tables(..) => false,
        };
        let tail_is_zero = |v: &[u8]| v[24..].iter().all(|b| *b == 0) && v.len() < 32;
        if offset >= 24 || !tail_is_zero(x) || !tail_is_zero(y) {
            return false;
        }
        let (Place::Pointer(s), Place::Pointer(t)) = (place(self.old, a, a), place(self.new, b, b)) else {
            return false;
        };
        let path = |side: &Side<'d>, at: u64, location: &[u8; 24]| {
            let len = u64::from_le_bytes(std::array::from_fn(|i| location[8 + i]));
            let constant = len <= 4096 && !side.is_mutable(at);
            side.build.bytes(at, len).filter(|text| constant && text.ends_with(b".rs"))
        };
        let (old_path, new_path) =
            (path(self.old, self.address(true, s), p), path(self.new, self.address(false, t), q));
        let (Some(old_path), Some(new_path)) = (old_path, new_path) else { return false };
        let bumped = old_path != new_path;
        if bumped && (crate_file(old_path).is_none() || crate_file(old_path) != crate_file(new_path)) {
            return false;
        }
        let number = |v: &[u8; 24], i: usize| u32::from_le_bytes(std::array::from_fn(|k| v[i + k]));
        let ((line_a, col_a), (line_b, col_b)) = ((number(p, 16), number(p, 20)), (number(q, 16), number(q, 20)));
        // The place is the same, and only the crate has another version.
        let same_place = bumped && (line_a, col_a) == (line_b, col_b);
        let proven = assume
            || same_place
            || match (self.proof, self.context) {
                (LineProof::Tables(l, m), Some((f, g))) => {
                    let rows = Rows::of(self.old, self.new, (l, m), f, g);
                    let has = |rows: &[Row], line, column| rows.iter().any(|r| r.line == line && r.column == column);
                    has(rows.old, line_a, col_a) && has(rows.new, line_b, col_b)
                }
                _ => false,
            };
        if proven {
            let file = |path: &[u8]| String::from_utf8_lossy(path).into_owned();
            let detail = match bumped {
                false => format!("{line_a}:{col_a} is now {line_b}:{col_b}"),
                true => format!("{}:{line_a}:{col_a} is now {}:{line_b}:{col_b}", file(old_path), file(new_path)),
            };
            self.noise.push(Noise { rule: "location", detail });
        }
        proven
    }
}

/// The name of a published crate and the file in it, by a path such as `…/registry/src/INDEX/NAME-1.2.3/src/lib.rs`.
fn crate_file(path: &[u8]) -> Option<(&str, &str)> {
    let (_, published) = std::str::from_utf8(path).ok()?.split_once("registry/src/")?;
    let (_index, path) = published.split_once('/')?;
    let (package, file) = path.split_once('/')?;
    let is_version = |rest: &str| {
        let digits = rest.bytes().take_while(u8::is_ascii_digit).count();
        digits > 0 && rest[digits..].starts_with('.')
    };
    let dash = package.match_indices('-').find(|(at, _)| is_version(&package[at + 1..]))?.0;
    Some((&package[..dash], file))
}

/// The offsets of the calls in a function, ascending.
fn calls(code: &[u8]) -> Vec<u64> {
    let decoder = Decoder::with_ip(64, code, 0, DecoderOptions::NONE);
    let is_call = |i: &iced_x86::Instruction| matches!(i.flow_control(), FlowControl::Call | FlowControl::IndirectCall);
    decoder.into_iter().filter(is_call).map(|i| i.ip()).collect()
}

#[cfg(test)]
mod tests {
    use super::crate_file;

    #[test]
    fn a_crate_has_a_version_in_its_path_and_a_name_of_its_own() {
        let file = |text: &'static str| crate_file(text.as_bytes());
        let of = |version: &str| format!("/root/.cargo/registry/src/index-1949/a-2d-b-{version}/src/lib.rs");
        assert_eq!(crate_file(of("1.2.3").as_bytes()), Some(("a-2d-b", "src/lib.rs")));
        assert_eq!(crate_file(of("1.2.4-rc.1").as_bytes()), crate_file(of("1.2.3").as_bytes()));
        assert_eq!(file("/home/a/src/lib.rs"), None);
        assert_eq!(file("registry/src/i/nameless/src/lib.rs"), None);
    }
}
