//! Short names stored in place: order, company and symbol identifiers without an allocation each.

use std::fmt;

/// A name of at most `N` bytes of printable ASCII, stored in place.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Name<const N: usize> {
    bytes: [u8; N],
    len: u8,
}

/// `ClOrdID`: the counterparty's name of an order or of a cancel request.
pub type ClOrdId = Name<31>;
/// `SenderCompID`: the counterparty's name.
pub type CompId = Name<31>;
/// `Symbol`: the instrument's name.
pub type Symbol = Name<15>;

impl<const N: usize> Name<N> {
    /// The name with no characters, which [`Name::new`] never yields.
    pub const EMPTY: Self = Self { bytes: [0; N], len: 0 };

    /// Takes 1 to `N` bytes of printable ASCII without blanks; `None` for anything else.
    pub fn new(text: &[u8]) -> Option<Self> {
        let len = u8::try_from(text.len()).ok()?;
        if text.is_empty() || text.len() > N || !text.iter().all(u8::is_ascii_graphic) {
            return None;
        }
        let mut bytes = [0; N];
        bytes[..text.len()].copy_from_slice(text);
        Some(Self { bytes, len })
    }

    /// The bytes of the name.
    pub fn as_bytes(&self) -> &[u8] {
        &self.bytes[..usize::from(self.len)]
    }

    /// Whether this is [`Name::EMPTY`].
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }
}

impl<const N: usize> fmt::Display for Name<N> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.as_bytes().iter().try_for_each(|&b| fmt::Write::write_char(f, char::from(b)))
    }
}

impl<const N: usize> fmt::Debug for Name<N> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "\"{self}\"")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn takes_what_fits_and_is_printable() {
        assert_eq!(Symbol::new(b"ACME").map(|s| s.to_string()).as_deref(), Some("ACME"));
        assert!(Symbol::new(b"").is_none());
        assert!(Symbol::new(b"0123456789abcdef").is_none());
        assert!(Symbol::new(b"A B").is_none());
        assert!(Symbol::new(b"A\x01").is_none());
    }
}
