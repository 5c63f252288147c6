//! The values of constants, where they are short enough to be said.

use crate::build::ObjId;
use crate::lift::{Access, Target};
use crate::side::Side;

const MAX_TEXT: u64 = 120;

/// What a reference finds there at first.
pub(super) fn value(side: &Side<'_>, target: Target<'_>, access: Access) -> Option<String> {
    let Target::Data(at) = target else { return None };
    let len = match access {
        Access::Exact(len) => u64::from(len),
        _ => side.extent_end(at).saturating_sub(at),
    };
    let bytes = side.build.bytes(at, len.min(MAX_TEXT))?;
    match access {
        Access::Exact(_) => number(bytes),
        _ => text(bytes).or_else(|| number(bytes)).or_else(|| words(bytes)),
    }
}

/// The initial values of two versions of a variable: whole if short, else from the first byte that differs.
pub(super) fn objects(old: &Side<'_>, o: ObjId, new: &Side<'_>, n: ObjId) -> (Option<String>, Option<String>) {
    let (x, y) = (old.build.object(o), new.build.object(n));
    let (Some(a), Some(b)) = (old.build.bytes(x.addr, x.size), new.build.bytes(y.addr, y.size)) else {
        return (None, None);
    };
    if let (Some(old), Some(new)) = (text(a).or_else(|| number(a)), text(b).or_else(|| number(b))) {
        return (Some(old), Some(new));
    }
    let Some(at) = a.iter().zip(b).position(|(p, q)| p != q) else {
        return match x.size == y.size {
            true => (None, None),
            false => (Some(format!("{} bytes", x.size)), Some(format!("{} bytes", y.size))),
        };
    };
    let from = at - at % 8;
    let part = |bytes: &[u8]| {
        let hex: Vec<String> = bytes[from..].iter().take(8).map(|b| format!("{b:02x}")).collect();
        Some(format!("at byte {from}: {}", hex.join(" ")))
    };
    (part(a), part(b))
}

/// Text with its terminator, or without (Rust).
fn text(bytes: &[u8]) -> Option<String> {
    let end = bytes.iter().position(|b| *b == 0).unwrap_or(bytes.len());
    let rest_is_zero = bytes[end..].iter().all(|b| *b == 0);
    let text = std::str::from_utf8(&bytes[..end]).ok()?;
    let readable = text.chars().all(|c| !c.is_control() || matches!(c, '\n' | '\t' | '\r'));
    (end > 1 && rest_is_zero && readable).then(|| format!("{text:?}"))
}

/// The longest piece of text in it: formats are text between lengths and placeholders.
fn words(bytes: &[u8]) -> Option<String> {
    let longest = bytes.split(|b| !(0x20..0x7f).contains(b)).max_by_key(|run| run.len())?;
    (longest.len() > 3).then(|| format!("{:?}", String::from_utf8_lossy(longest)))
}

fn number(bytes: &[u8]) -> Option<String> {
    let value = bytes.iter().rev().fold(0u64, |v, b| v << 8 | u64::from(*b));
    match bytes.len() {
        1 | 2 => Some(value.to_string()),
        4 => Some((value as u32).cast_signed().to_string()),
        8 => Some(value.cast_signed().to_string()),
        _ => None,
    }
}

/// The numbers in which two instructions differ, if they differ in nothing else.
pub(super) fn numbers(old: &str, new: &str) -> Option<(String, String)> {
    let split = |c: char| matches!(c, ' ' | ',' | '[' | ']' | '+' | '-' | '*');
    let (a, b): (Vec<&str>, Vec<&str>) = (old.split(split).collect(), new.split(split).collect());
    if a.len() != b.len() {
        return None;
    }
    let mut differing = a.iter().zip(&b).filter(|(x, y)| x != y);
    let (x, y) = differing.next()?;
    let is_number = |s: &str| s.starts_with(|c: char| c.is_ascii_digit());
    let plain = |s: &str| match s.strip_prefix("0x").map(|hex| u64::from_str_radix(hex, 16)) {
        Some(Ok(n)) if n < 1 << 32 => n.to_string(),
        _ => s.to_owned(),
    };
    (differing.next().is_none() && is_number(x) && is_number(y)).then(|| (plain(x), plain(y)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_are_said_as_people_write_them() {
        assert_eq!(number(&[0xff, 0xff, 0xff, 0xff]).as_deref(), Some("-1"));
        assert_eq!(number(&[1, 2, 3]), None);
        assert_eq!(text(b"fee: %d\n\0\0").as_deref(), Some("\"fee: %d\\n\""));
        assert_eq!(text(&[1, 2, 0]), None);
    }

    #[test]
    fn a_number_is_named_only_if_nothing_else_differs() {
        assert_eq!(numbers("imul eax, edi, 3", "imul eax, edi, 5"), Some(("3".into(), "5".into())));
        assert_eq!(numbers("imul eax, edi, 3", "imul eax, esi, 5"), None);
        assert_eq!(numbers("mov eax, 3", "mov ebx, 3"), None);
        assert_eq!(numbers("mov eax, [rdi+8]", "mov eax, [rdi+0x10]"), Some(("8".into(), "16".into())));
    }
}
