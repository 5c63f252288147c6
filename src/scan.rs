//! Does anything in these bytes lead into memory that is to go? Any eight bytes may be an address, whatever their alignment.
//!
//! The C library keeps some addresses of code in disguise: those of `atexit` and `setjmp` are combined with a secret of the process and
//! turned by 17 bits (glibc, sysdeps/unix/sysv/linux/x86_64/pointer_guard.h). These are looked for, too.

use crate::addr::ProcRange;

/// Bytes of an address.
const WORD: usize = 8;

/// How many bytes of one part must be looked at again with the next.
pub const OVERLAP: usize = WORD - 1;

/// Looks for addresses.
pub struct Scanner {
    /// Where they must not lead, ends included.
    ranges: Vec<ProcRange>,
    /// Where they may lead all the same.
    harmless: Vec<ProcRange>,
    /// The upper five bytes of such addresses; below 2⁴⁷, so the last two are zero.
    tops: Vec<memchr::memmem::Finder<'static>>,
    /// What disguises addresses of code.
    guard: Option<u64>,
}

impl Scanner {
    /// For addresses in `ranges`.
    #[must_use]
    pub fn new(ranges: Vec<ProcRange>, guard: Option<u64>) -> Self {
        let mut tops: Vec<u64> = ranges.iter().flat_map(|r| r.start.0 >> 24..=r.end.0 >> 24).collect();
        tops.sort_unstable();
        tops.dedup();
        let tops = tops.iter().map(|t| memchr::memmem::Finder::new(&t.to_le_bytes()[..5]).into_owned()).collect();
        Self { ranges, harmless: Vec::new(), tops, guard }
    }

    /// The same, but for addresses in `harmless`.
    #[must_use]
    pub fn but_for(mut self, harmless: Vec<ProcRange>) -> Self {
        self.harmless.extend(harmless);
        self
    }

    /// Whether an address leads there.
    #[must_use]
    pub fn is_inside(&self, address: u64) -> bool {
        let there = self.ranges.iter().any(|r| r.start.0 <= address && address <= r.end.0);
        there && !self.harmless.iter().any(|r| r.start.0 <= address && address < r.end.0)
    }

    /// The first place in `bytes` that holds such an address. The bytes must begin at a multiple of eight.
    #[must_use]
    pub fn find(&self, bytes: &[u8]) -> Option<usize> {
        let plain = self.tops.iter().filter_map(|top| {
            top.find_iter(bytes).filter_map(|at| at.checked_sub(3)).find(|at| {
                let word = bytes.get(*at..*at + WORD).and_then(|b| b.try_into().ok()).map(u64::from_le_bytes);
                word.is_some_and(|w| self.is_inside(w))
            })
        });
        plain.min().or_else(|| {
            let guard = self.guard?;
            let (words, _) = bytes.as_chunks::<WORD>();
            let found = words.iter().position(|w| self.is_inside(u64::from_le_bytes(*w).rotate_right(17) ^ guard));
            found.map(|i| i * WORD)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::addr::ProcAddr;
    use proptest::prelude::*;

    const GUARD: u64 = 0x1234_5678_9abc_def0;

    fn scanner() -> Scanner {
        // Across a boundary of 2²⁴.
        let range = ProcRange { start: ProcAddr(0x5555_54ff_f000), end: ProcAddr(0x5555_5500_2000) };
        Scanner::new(vec![range], Some(GUARD))
    }

    proptest! {
        #[test]
        fn an_address_is_found_wherever_it_stands(
            noise in prop::collection::vec(any::<u8>(), 64..300),
            at in 0usize..56,
            offset in 0u64..=0x3000,
        ) {
            let mut bytes = noise;
            let address = 0x5555_54ff_f000 + offset;
            bytes[at..at + 8].copy_from_slice(&address.to_le_bytes());
            prop_assert!(scanner().find(&bytes).is_some_and(|found| found <= at));
            bytes[at / 8 * 8..][..8].copy_from_slice(&(address ^ GUARD).rotate_left(17).to_le_bytes());
            prop_assert!(scanner().find(&bytes).is_some());
        }

        #[test]
        fn nothing_else_is_found(words in prop::collection::vec(0u64..0x5555_54ff_f000, 1..40)) {
            // Nor across words: their upper halves are zero.
            let bytes: Vec<u8> = words.iter().flat_map(|w| [w & 0xffff_ffff, 0]).flat_map(u64::to_le_bytes).collect();
            prop_assert_eq!(scanner().find(&bytes), None);
        }
    }
}
