//! Lines and columns that moved: recognised only where the line tables of both
//! builds show them, and always reported.

use iced_x86::{Decoder, DecoderOptions, FlowControl, Mnemonic};

use super::data::{place, Place};
use super::{Comparer, LineProof, Noise};
use crate::build::{FuncId, Lines, Row};
use crate::lift::Access;
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
        let (assume, lines) = match self.proof {
            LineProof::None => return false,
            LineProof::Assume => (true, None),
            LineProof::Tables(a, b) => (false, Some((a, b))),
        };
        let (x, y) = (&self.old.lifted[f as usize].masked, &self.new.lifted[g as usize].masked);
        let rows = lines.map(|l| Rows::of(self.old, self.new, l, f, g));
        let moved = |a: u32, b: u32, from: u64, to: u64| match &rows {
            Some(rows) => rows.moved(a, b, from, to),
            None => assume && a.abs_diff(b) < 1 << 20,
        };
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
                    if !moved(a, b, p.ip(), call) {
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
    /// difference is in its line or column, and the line tables have both lines in the functions at hand.
    pub(super) fn location_drift(&mut self, a: u64, b: u64, offset: u64, x: &[u8], y: &[u8]) -> bool {
        let (Some((p, _)), Some((q, _))) = (x.split_first_chunk::<24>(), y.split_first_chunk::<24>()) else {
            return false;
        };
        let assume = match self.proof {
            LineProof::None => return false,
            LineProof::Assume => true,
            LineProof::Tables(..) => false,
        };
        let tail_is_zero = |v: &[u8]| v[24..].iter().all(|b| *b == 0) && v.len() < 32;
        if !(16..24).contains(&offset)
            || p[..16] != q[..16] && p[8..16] != q[8..16]
            || !tail_is_zero(x)
            || !tail_is_zero(y)
        {
            return false;
        }
        let (Place::Pointer(s), Place::Pointer(t)) = (place(self.old, a, a), place(self.new, b, b)) else {
            return false;
        };
        let len = u64::from_le_bytes(std::array::from_fn(|i| p[8 + i]));
        let at = self.address(true, s);
        let is_rust_file = self.old.build.bytes(at, len).is_some_and(|name| name.ends_with(b".rs"));
        if !is_rust_file || len > 4096 || !self.targets(s, t, Access::Exact(len as u32)) {
            return false;
        }
        let number = |v: &[u8; 24], i: usize| u32::from_le_bytes(std::array::from_fn(|k| v[i + k]));
        let ((line_a, col_a), (line_b, col_b)) = ((number(p, 16), number(p, 20)), (number(q, 16), number(q, 20)));
        let proven = assume
            || match (self.proof, self.context) {
                (LineProof::Tables(l, m), Some((f, g))) => {
                    let rows = Rows::of(self.old, self.new, (l, m), f, g);
                    let has = |rows: &[Row], line, column| rows.iter().any(|r| r.line == line && r.column == column);
                    has(rows.old, line_a, col_a) && has(rows.new, line_b, col_b)
                }
                _ => false,
            };
        if proven {
            let detail = format!("{line_a}:{col_a} is now {line_b}:{col_b}");
            self.noise.push(Noise { rule: "location", detail });
        }
        proven
    }
}

/// The offsets of the calls in a function, ascending.
fn calls(code: &[u8]) -> Vec<u64> {
    let decoder = Decoder::with_ip(64, code, 0, DecoderOptions::NONE);
    let is_call = |i: &iced_x86::Instruction| matches!(i.flow_control(), FlowControl::Call | FlowControl::IndirectCall);
    decoder.into_iter().filter(is_call).map(|i| i.ip()).collect()
}
