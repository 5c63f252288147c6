//! How often something was done, how often it failed, and how long it took: figures that are added up, and compared with earlier ones.

use std::time::Duration;

/// Times are kept by powers of two of nanoseconds, so many of them: the last is for all from 39 hours on.
pub const BUCKETS: usize = 48;

/// Where a time is counted.
#[must_use]
pub fn bucket(took: Duration) -> usize {
    let ns = u64::try_from(took.as_nanos()).unwrap_or(u64::MAX);
    (64 - ns.leading_zeros() as usize).min(BUCKETS - 1)
}

/// Figures since some beginning.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Tally {
    /// How often.
    pub all: u64,
    /// How often it failed.
    pub failed: u64,
    /// How often it panicked.
    pub panics: u64,
    /// How long all that were timed took together, in nanoseconds.
    pub ns: u64,
    /// How long it took, by [`bucket`]; of those that were timed.
    pub took: [u64; BUCKETS],
}

impl Default for Tally {
    fn default() -> Self {
        Self { all: 0, failed: 0, panics: 0, ns: 0, took: [0; BUCKETS] }
    }
}

impl Tally {
    /// What came since `before`, which was read from the same figures. Threads add while others read: what seems to have shrunk has not grown.
    #[must_use]
    pub fn since(&self, before: &Self) -> Self {
        let mut took = self.took;
        took.iter_mut().zip(&before.took).for_each(|(now, then)| *now = now.saturating_sub(*then));
        Self {
            all: self.all.saturating_sub(before.all),
            failed: self.failed.saturating_sub(before.failed),
            panics: self.panics.saturating_sub(before.panics),
            ns: self.ns.saturating_sub(before.ns),
            took,
        }
    }

    /// How many were timed.
    #[must_use]
    pub fn timed(&self) -> u64 {
        self.took.iter().sum()
    }

    /// How many certainly took longer: what lies in the bucket of `bound` may have kept it.
    #[must_use]
    pub fn later_than(&self, bound: Duration) -> u64 {
        self.took.iter().skip(bucket(bound) + 1).sum()
    }

    /// So many hundredths of the timed ones took at most so many nanoseconds, an upper bound that is a power of two; 0 if none was timed.
    #[must_use]
    pub fn quantile_ns(&self, hundredths: u64) -> u64 {
        let (all, mut seen) = (self.timed(), 0);
        let place = self.took.iter().position(|n| {
            seen += n;
            all > 0 && seen * 100 >= all * hundredths
        });
        place.map_or(0, |i| 1 << i)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_came_since() {
        let mut before = Tally { all: 5, failed: 1, ..Tally::default() };
        before.took[3] = 5;
        let mut now = Tally { all: 9, failed: 1, panics: 2, ..Tally::default() };
        now.took[3] = 6;
        now.took[10] = 3;
        let new = now.since(&before);
        assert_eq!((new.all, new.failed, new.panics, new.timed()), (4, 0, 2, 4));
        assert_eq!((new.quantile_ns(25), new.quantile_ns(26), new.quantile_ns(100)), (8, 1024, 1024));
        assert_eq!((new.later_than(Duration::from_nanos(7)), new.later_than(Duration::from_nanos(600))), (3, 0));
        assert_eq!(Tally::default().quantile_ns(99), 0);
    }

    #[test]
    fn long_times_have_a_bucket() {
        assert_eq!(
            (bucket(Duration::ZERO), bucket(Duration::from_nanos(1)), bucket(Duration::MAX)),
            (0, 1, BUCKETS - 1)
        );
    }
}
