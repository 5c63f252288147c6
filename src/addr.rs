//! The two kinds of address, and the one way from one to the other.
//!
//! An [`ImageAddr`] is an address as the linker wrote it into an ELF image. A
//! [`ProcAddr`] is an address in one process. They never mix: only a
//! [`LoadBias`] converts. Both are integers, not pointers: nothing here can be
//! dereferenced.

use std::fmt;

use serde::{Deserialize, Deserializer, Serialize, Serializer};

macro_rules! address {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
        pub struct $name(pub u64);

        impl $name {
            /// The address `len_bytes` further on, or `None` past the end of the address space.
            #[must_use]
            pub fn checked_add(self, len_bytes: u64) -> Option<Self> {
                self.0.checked_add(len_bytes).map(Self)
            }

            /// The address `len_bytes` before, or `None` below zero.
            #[must_use]
            pub fn checked_sub(self, len_bytes: u64) -> Option<Self> {
                self.0.checked_sub(len_bytes).map(Self)
            }

            /// How many bytes this address lies after `start`, or `None` if it lies before it.
            #[must_use]
            pub fn offset_from(self, start: Self) -> Option<u64> {
                self.0.checked_sub(start.0)
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{:#x}", self.0)
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{:#x}", self.0)
            }
        }

        impl Serialize for $name {
            fn serialize<S: Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
                s.collect_str(self)
            }
        }

        impl<'de> Deserialize<'de> for $name {
            fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
                let text = String::deserialize(d)?;
                text.strip_prefix("0x")
                    .and_then(|hex| u64::from_str_radix(hex, 16).ok())
                    .map(Self)
                    .ok_or_else(|| serde::de::Error::custom(format!("{text:?} is not an address such as 0x1040")))
            }
        }
    };
}

address! {
    /// An address as linked: what an ELF symbol or relocation of an image says.
    ImageAddr
}

address! {
    /// An address as mapped, in one process.
    ProcAddr
}

/// What to add to an [`ImageAddr`] to get the [`ProcAddr`]: zero for a non-PIE executable.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct LoadBias(pub u64);

impl LoadBias {
    /// The bias of an image whose address `linked` is found at `mapped`.
    #[must_use]
    pub fn between(linked: ImageAddr, mapped: ProcAddr) -> Self {
        Self(mapped.0.wrapping_sub(linked.0))
    }

    /// Where `addr` is mapped, or `None` if the sum leaves the address space.
    #[must_use]
    pub fn to_process(self, addr: ImageAddr) -> Option<ProcAddr> {
        addr.0.checked_add(self.0).map(ProcAddr)
    }

    /// The linked address of what is mapped at `addr`, or `None` if it lies below the image.
    #[must_use]
    pub fn to_image(self, addr: ProcAddr) -> Option<ImageAddr> {
        addr.0.checked_sub(self.0).map(ImageAddr)
    }
}

/// A range of addresses of one process, `start` inclusive, `end` exclusive, never empty upside down.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ProcRange {
    /// First address.
    pub start: ProcAddr,
    /// First address after it.
    pub end: ProcAddr,
}

impl ProcRange {
    /// The `len_bytes` bytes from `start`, or `None` if they leave the address space.
    #[must_use]
    pub fn new(start: ProcAddr, len_bytes: u64) -> Option<Self> {
        Some(Self { start, end: start.checked_add(len_bytes)? })
    }

    /// Its length in bytes.
    #[must_use]
    pub fn len_bytes(&self) -> u64 {
        self.end.0 - self.start.0
    }

    /// Whether `addr` is one of its addresses.
    #[must_use]
    pub fn contains(&self, addr: ProcAddr) -> bool {
        self.start <= addr && addr < self.end
    }

    /// Whether the two ranges share an address.
    #[must_use]
    pub fn overlaps(&self, other: &Self) -> bool {
        self.start < other.end && other.start < self.end
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bias_converts_there_and_back() {
        let bias = LoadBias::between(ImageAddr(0x1000), ProcAddr(0x5555_0000_1000));
        let mapped = bias.to_process(ImageAddr(0x1234)).unwrap();
        assert_eq!(mapped, ProcAddr(0x5555_0000_1234));
        assert_eq!(bias.to_image(mapped), Some(ImageAddr(0x1234)));
        assert_eq!(bias.to_image(ProcAddr(1)), None);
        assert_eq!(bias.to_process(ImageAddr(u64::MAX)), None);
    }

    #[test]
    fn addresses_are_written_in_hex() {
        assert_eq!(serde_json::to_string(&ImageAddr(0x1040)).unwrap(), "\"0x1040\"");
        assert_eq!(serde_json::from_str::<ImageAddr>("\"0x1040\"").unwrap(), ImageAddr(0x1040));
        assert!(serde_json::from_str::<ImageAddr>("\"1040\"").is_err());
        assert!(serde_json::from_str::<ImageAddr>("4160").is_err());
    }
}
