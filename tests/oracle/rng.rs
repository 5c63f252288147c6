//! A random number generator that gives the same numbers everywhere: SplitMix64.

/// Its whole state is the seed.
#[derive(Clone)]
pub struct Rng(pub u64);

impl Rng {
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// A number below `n`, which is not zero.
    pub fn below(&mut self, n: usize) -> usize {
        (self.next() % n as u64) as usize
    }

    /// True `percent` times of a hundred.
    pub fn chance(&mut self, percent: usize) -> bool {
        self.below(100) < percent
    }

    pub fn pick<'a, T>(&mut self, all: &'a [T]) -> &'a T {
        &all[self.below(all.len())]
    }

    /// A constant as programs have them: small, a power of two, a mask, or anything.
    pub fn constant(&mut self) -> u64 {
        match self.below(8) {
            0..=2 => self.next() % 32,
            3 => 1 << self.below(63),
            4 => (1 << self.below(40)) - 1,
            5 => self.next() % 65536,
            6 => self.next() & 0xffff_ffff,
            _ => self.next(),
        }
    }
}
