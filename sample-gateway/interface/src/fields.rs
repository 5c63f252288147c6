//! How fields are read and written, whatever stands behind them.

use std::io::Write;

/// The byte that ends every field.
pub const SOH: u8 = 1;

/// The fields of one received message.
pub trait FieldSource {
    /// The value of the first field with this tag, without its delimiter.
    fn field(&self, tag: u32) -> Option<&[u8]>;
}

/// Appends `tag=value<SOH>`.
pub fn put(out: &mut Vec<u8>, tag: u32, value: &[u8]) {
    put_tag(out, tag);
    out.extend_from_slice(value);
    out.push(SOH);
}

/// Appends `tag=value<SOH>` for anything that prints as text.
pub fn put_number(out: &mut Vec<u8>, tag: u32, value: impl std::fmt::Display) {
    put_tag(out, tag);
    // Writing into a Vec does not fail; a failing Display would leave a shorter value.
    let _ = write!(out, "{value}");
    out.push(SOH);
}

fn put_tag(out: &mut Vec<u8>, tag: u32) {
    let mut digits = [0u8; 10];
    let mut at = digits.len();
    let mut rest = tag;
    loop {
        at -= 1;
        digits[at] = b'0' + (rest % 10) as u8;
        rest /= 10;
        if rest == 0 {
            break;
        }
    }
    out.extend_from_slice(&digits[at..]);
    out.push(b'=');
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_are_written_with_their_delimiter() {
        let mut out = Vec::new();
        put(&mut out, 0, b"x");
        put_number(&mut out, 4_294_967_295, 17);
        assert_eq!(out, b"0=x\x014294967295=17\x01");
    }
}
