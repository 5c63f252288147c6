//! Bytes to messages.
//!
//! Two steps, because they fail differently. [`frame`] finds where a message ends: what it rejects is *garbled* in the
//! specification's sense, is skipped and leaves the sequence number alone, so that a resend brings it again. [`Parser`]
//! then reads the fields: what it rejects was received intact and is wrong, and is answered with a session-level Reject.

use super::{tag, BEGIN_STRING};
use gateway_interface::{FieldSource, SOH};

/// Longest message that is taken.
pub const MAX_MESSAGE_BYTES: usize = 16 * 1024;

const CHECKSUM_FIELD_BYTES: usize = 7;

/// What stands at the beginning of a buffer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Frame {
    /// More bytes are needed.
    Incomplete,
    /// A whole message of this many bytes, length and checksum correct.
    Message(usize),
    /// This many bytes are not a message.
    Garbled(usize),
}

/// Finds the first message in a buffer.
pub fn frame(buffer: &[u8]) -> Frame {
    let Some(rest) = strip_begin(buffer) else {
        return match buffer {
            _ if begins_like_a_message(buffer) => Frame::Incomplete,
            _ => Frame::Garbled(next_start(buffer)),
        };
    };
    let mut body_len = 0usize;
    let mut digits = 0;
    loop {
        match rest.get(digits) {
            None => return Frame::Incomplete,
            Some(&SOH) if digits > 0 => break,
            Some(b) if b.is_ascii_digit() && digits < 6 => body_len = body_len * 10 + usize::from(b - b'0'),
            Some(_) => return Frame::Garbled(next_start(buffer)),
        }
        digits += 1;
    }
    let body_start = buffer.len() - rest.len() + digits + 1;
    let total = body_start + body_len + CHECKSUM_FIELD_BYTES;
    if total > MAX_MESSAGE_BYTES {
        return Frame::Garbled(next_start(buffer));
    }
    let Some(message) = buffer.get(..total) else {
        return Frame::Incomplete;
    };
    let (covered, trailer) = message.split_at(total - CHECKSUM_FIELD_BYTES);
    let sum = checksum(covered);
    let expected = [b'1', b'0', b'=', b'0' + sum / 100, b'0' + sum / 10 % 10, b'0' + sum % 10, SOH];
    // The field before the checksum must have ended, or the length is wrong.
    if trailer == expected && covered.last() == Some(&SOH) {
        Frame::Message(total)
    } else {
        Frame::Garbled(next_start(buffer))
    }
}

/// The sum of all bytes, modulo 256.
pub(super) fn checksum(bytes: &[u8]) -> u8 {
    bytes.iter().fold(0, |sum, b| sum.wrapping_add(*b))
}

const BEGIN: &[u8] = b"8=FIX.4.4\x019=";

fn strip_begin(buffer: &[u8]) -> Option<&[u8]> {
    if let Some(rest) = buffer.strip_prefix(BEGIN) {
        return Some(rest);
    }
    // Another version is a whole message too: it is refused where it can be answered.
    let value = buffer.strip_prefix(b"8=FIX")?;
    let end = value.iter().take(8).position(|&b| b == SOH)?;
    value[end + 1..].strip_prefix(b"9=")
}

fn begins_like_a_message(buffer: &[u8]) -> bool {
    let prefix = b"8=FIX";
    if buffer.len() <= prefix.len() {
        return prefix.starts_with(buffer);
    }
    buffer.len() < 16 && buffer.starts_with(prefix)
}

/// Where, after the first byte, the next message may begin.
fn next_start(buffer: &[u8]) -> usize {
    let found = buffer.windows(6).skip(1).position(|w| w == b"\x018=FIX").map(|at| at + 2);
    found
        .unwrap_or_else(|| {
            // The beginning of a beginning may be cut off by the end of the buffer.
            let tail = (1..6.min(buffer.len())).rev().find(|&n| b"\x018=FIX".starts_with(&buffer[buffer.len() - n..]));
            buffer.len() - tail.unwrap_or(0)
        })
        .max(1)
}

/// A message that was received intact and can't be read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SyntaxError {
    /// Where it shows, when a tag is known.
    pub tag: Option<u32>,
    /// SessionRejectReason (373).
    pub reason: u16,
    /// For people.
    pub text: &'static str,
}

#[derive(Clone, Copy, Debug)]
struct Field {
    tag: u32,
    start: u32,
    end: u32,
}

/// Reads messages; keeps its field list from one message to the next, so that reading allocates nothing.
#[derive(Debug, Default)]
pub struct Parser {
    fields: Vec<Field>,
}

/// The fields of one message, in order.
#[derive(Clone, Copy, Debug)]
pub struct Message<'a> {
    bytes: &'a [u8],
    fields: &'a [Field],
}

impl Parser {
    /// A parser with room for usual messages.
    pub fn new() -> Self {
        Self { fields: Vec::with_capacity(64) }
    }

    /// Splits a framed message into fields. The message comes back even when there is an error, with the fields before it:
    /// a Reject quotes its sequence number.
    pub fn parse<'a>(&'a mut self, bytes: &'a [u8]) -> (Message<'a>, Result<(), SyntaxError>) {
        self.fields.clear();
        let verdict = self.split(bytes);
        (Message { bytes, fields: &self.fields }, verdict)
    }

    fn split(&mut self, bytes: &[u8]) -> Result<(), SyntaxError> {
        let mut at = 0;
        let mut header_seen = 0u64;
        let mut data_len: Option<usize> = None;
        while at < bytes.len() {
            let equals = bytes[at..].iter().position(|&b| b == b'=').map(|n| at + n);
            let equals = equals.ok_or(error(None, 0, "field without '='"))?;
            let tag = parse_tag(&bytes[at..equals]).ok_or(error(None, 0, "invalid tag number"))?;
            let start = equals + 1;
            let end = match data_len.take() {
                Some(len) if bytes.get(start + len) == Some(&SOH) => start + len,
                Some(_) => return Err(error(Some(tag), 5, "data length does not fit the data")),
                None => bytes[start..].iter().position(|&b| b == SOH).map(|n| start + n).ok_or(error(
                    Some(tag),
                    0,
                    "field without delimiter",
                ))?,
            };
            if start == end {
                return Err(error(Some(tag), 4, "tag specified without a value"));
            }
            if let Some(bit) = once_only(tag) {
                if header_seen & bit != 0 {
                    return Err(error(Some(tag), 13, "tag appears more than once"));
                }
                header_seen |= bit;
            }
            if is_data_length(tag) {
                let len = std::str::from_utf8(&bytes[start..end]).ok().and_then(|t| t.parse::<usize>().ok());
                let len = len.filter(|&n| n <= bytes.len());
                data_len = Some(len.ok_or(error(Some(tag), 6, "incorrect data format for value"))?);
            }
            // Messages are at most MAX_MESSAGE_BYTES long where they come from a socket; longer ones are refused here.
            let (Ok(first), Ok(last)) = (u32::try_from(start), u32::try_from(end)) else {
                return Err(error(None, 99, "message too long"));
            };
            self.fields.push(Field { tag, start: first, end: last });
            at = end + 1;
        }
        let order = self.fields.iter().take(3).map(|f| f.tag);
        if !order.eq([tag::BEGIN_STRING, tag::BODY_LENGTH, tag::MSG_TYPE]) {
            return Err(error(Some(tag::MSG_TYPE), 14, "tag specified out of required order"));
        }
        Ok(())
    }
}

impl<'a> Message<'a> {
    /// The value of the first field with this tag.
    pub fn get(&self, tag: u32) -> Option<&'a [u8]> {
        let field = self.fields.iter().find(|f| f.tag == tag)?;
        self.bytes.get(field.start as usize..field.end as usize)
    }

    /// A field that holds a whole number.
    pub fn number(&self, tag: u32) -> Option<u64> {
        let text = self.get(tag)?;
        if text.len() > 18 || text.is_empty() {
            return None;
        }
        text.iter().try_fold(0u64, |n, b| b.is_ascii_digit().then(|| n * 10 + u64::from(b - b'0')))
    }

    /// Whether a Boolean field is there and says `Y`.
    pub fn flag(&self, tag: u32) -> bool {
        self.get(tag) == Some(b"Y")
    }

    /// MsgType (35), or nothing.
    pub fn msg_type(&self) -> &'a [u8] {
        self.get(tag::MSG_TYPE).unwrap_or_default()
    }

    /// Whether this is FIX 4.4.
    pub fn version_is_ours(&self) -> bool {
        self.get(tag::BEGIN_STRING) == Some(BEGIN_STRING)
    }
}

impl FieldSource for Message<'_> {
    fn field(&self, tag: u32) -> Option<&[u8]> {
        self.get(tag)
    }
}

fn error(tag: Option<u32>, reason: u16, text: &'static str) -> SyntaxError {
    SyntaxError { tag, reason, text }
}

fn parse_tag(text: &[u8]) -> Option<u32> {
    if text.is_empty() || text.len() > 9 || text[0] == b'0' {
        return None;
    }
    text.iter().try_fold(0u32, |n, b| b.is_ascii_digit().then(|| n * 10 + u32::from(b - b'0')))
}

/// Fields outside repeating groups that the session depends on.
fn once_only(tag: u32) -> Option<u64> {
    matches!(tag, 8..=11 | 34..=36 | 43 | 49 | 52 | 56).then(|| 1 << tag)
}

/// Fields that give the length of the data field after them, which may hold delimiters.
fn is_data_length(tag: u32) -> bool {
    matches!(tag, 90 | 93 | 95 | 212 | 348 | 350 | 352 | 354 | 356 | 358 | 360 | 362 | 364 | 445 | 618 | 621)
}

#[cfg(test)]
#[path = "decode_tests.rs"]
mod tests;
