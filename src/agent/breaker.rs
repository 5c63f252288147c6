//! When the process takes a patch back by itself: on panics in patched code, and on what the program says of its own work.
//!
//! *No data is not good news*: a bound that nothing was observed for is not kept. It never trips by itself; but a patch that waits for its
//! confirmation is reverted at its time, whatever was or was not observed.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::Duration;

/// Bounds that a patch has to keep until it is confirmed.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Bounds {
    /// So many panics with patched code on their stack are too many.
    pub panics: Option<u64>,
    /// The largest share of observed work that may have failed, 0 to 1.
    pub error_rate: Option<f64>,
    /// The longest that 99 of 100 pieces of observed work may take.
    pub p99: Option<Duration>,
    /// So many observations there have to be before a rate means anything; 100 if it is 0.
    pub observations: u64,
}

/// Powers of two of nanoseconds.
const BUCKETS: usize = 48;

/// What was observed since a patch was applied.
#[derive(Debug)]
pub struct Observed {
    panics: AtomicU64,
    failed: AtomicU64,
    all: AtomicU64,
    took: [AtomicU64; BUCKETS],
}

impl Default for Observed {
    fn default() -> Self {
        let zero = || AtomicU64::new(0);
        Self { panics: zero(), failed: zero(), all: zero(), took: std::array::from_fn(|_| zero()) }
    }
}

impl Observed {
    /// From zero again.
    pub fn reset(&self) {
        [&self.panics, &self.failed, &self.all].into_iter().chain(&self.took).for_each(|n| n.store(0, Relaxed));
    }

    /// A panic with patched code on its stack.
    pub fn panic(&self) {
        self.panics.fetch_add(1, Relaxed);
    }

    /// A piece of the program's work.
    pub fn work(&self, failed: bool, took: Duration) {
        let ns = u64::try_from(took.as_nanos()).unwrap_or(u64::MAX);
        let bucket = (64 - ns.leading_zeros() as usize).min(BUCKETS - 1);
        self.took[bucket].fetch_add(1, Relaxed);
        self.failed.fetch_add(u64::from(failed), Relaxed);
        self.all.fetch_add(1, Relaxed);
    }

    /// How many panics there were.
    pub fn panics(&self) -> u64 {
        self.panics.load(Relaxed)
    }

    /// The bound that is not kept, in words.
    pub fn broken(&self, bounds: &Bounds) -> Option<String> {
        let panics = self.panics();
        if bounds.panics.is_some_and(|most| panics >= most.max(1)) {
            return Some(format!("{panics} panics in patched code"));
        }
        let (all, failed) = (self.all.load(Relaxed), self.failed.load(Relaxed));
        let enough = if bounds.observations == 0 { 100 } else { bounds.observations };
        if all < enough {
            return None;
        }
        let rate = failed as f64 / all as f64;
        if bounds.error_rate.is_some_and(|most| rate > most) {
            return Some(format!("{failed} of {all} failed"));
        }
        let bound = bounds.p99?;
        // What lies in the bucket of the bound may have kept it.
        let ns = u64::try_from(bound.as_nanos()).unwrap_or(u64::MAX);
        let first = (64 - ns.leading_zeros() as usize).min(BUCKETS - 1) + 1;
        let late: u64 = self.took.iter().skip(first).map(|n| n.load(Relaxed)).sum();
        (late * 100 > all).then(|| format!("{late} of {all} took longer than {bound:?}"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn panics_are_counted() {
        let (seen, bounds) = (Observed::default(), Bounds { panics: Some(2), ..Bounds::default() });
        seen.panic();
        assert_eq!(seen.broken(&bounds), None);
        seen.panic();
        assert_eq!(seen.broken(&bounds).unwrap(), "2 panics in patched code");
        seen.reset();
        assert_eq!(seen.broken(&bounds), None);
    }

    #[test]
    fn rates_need_data() {
        let (seen, bounds) = (Observed::default(), Bounds { error_rate: Some(0.1), ..Bounds::default() });
        (0..99).for_each(|_| seen.work(true, Duration::ZERO));
        assert_eq!(seen.broken(&bounds), None, "99 are too few");
        seen.work(true, Duration::ZERO);
        assert_eq!(seen.broken(&bounds).unwrap(), "100 of 100 failed");
        (0..900).for_each(|_| seen.work(false, Duration::ZERO));
        assert_eq!(seen.broken(&bounds), None, "exactly the bound");
    }

    #[test]
    fn one_in_a_hundred_may_be_late() {
        let bounds = Bounds { p99: Some(Duration::from_millis(1)), observations: 10, ..Bounds::default() };
        let seen = Observed::default();
        (0..198).for_each(|_| seen.work(false, Duration::from_micros(900)));
        (0..2).for_each(|_| seen.work(false, Duration::from_millis(9)));
        assert_eq!(seen.broken(&bounds), None);
        seen.work(false, Duration::from_millis(9));
        assert_eq!(seen.broken(&bounds).unwrap(), "3 of 201 took longer than 1ms");
    }
}
