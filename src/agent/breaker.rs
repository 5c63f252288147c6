//! When the process takes a patch back by itself: on panics in patched code, on what the program says of its own work, and on what the new
//! arm of a canary does worse than the old one.
//!
//! Panics count from the apply on. Rates are those of the last while (a *window*), so that what goes wrong an hour after the apply is not
//! hidden by what went right before.
//!
//! *No data is not good news*: a bound that nothing was observed for is not kept. It never trips by itself; but a patch that waits for its
//! confirmation is reverted at its time, whatever was or was not observed.

use std::cell::Cell;
use std::collections::VecDeque;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering::Relaxed};
use std::time::{Duration, Instant};

use crate::tally::{bucket, Tally, BUCKETS};

/// Bounds that a patch has to keep until it is confirmed.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Bounds {
    /// So many panics with patched code on their stack are too many.
    pub panics: Option<u64>,
    /// The largest share of observed work that may have failed, 0 to 1.
    pub error_rate: Option<f64>,
    /// The longest that 99 of 100 pieces of observed work may take.
    pub p99: Option<Duration>,
    /// Of a canary by session: the new arm may fail and panic at most so many times as often as the old one, and its 99th percentile be at
    /// most so many times the old one's.
    pub than_old: Option<f64>,
    /// Rates are taken over so long; 10 s if it is zero.
    pub window: Duration,
    /// So many observations there have to be before a rate means anything; 100 if it is 0. A window with fewer reaches further back, down to
    /// the apply.
    pub observations: u64,
}

impl Bounds {
    fn window(&self) -> Duration {
        if self.window.is_zero() {
            Duration::from_secs(10)
        } else {
            self.window
        }
    }

    fn enough(&self) -> u64 {
        if self.observations == 0 {
            100
        } else {
            self.observations
        }
    }
}

/// Counters that threads share: none waits for another's.
const SHARDS: usize = 16;

thread_local! {
    /// Which counters are this thread's, plus one.
    static SHARD: Cell<usize> = const { Cell::new(0) };
}

#[repr(align(128))]
#[derive(Debug)]
struct Shard {
    failed: AtomicU64,
    took: [AtomicU64; BUCKETS],
}

/// What was observed since the process began.
#[derive(Debug)]
pub struct Observed {
    panics: AtomicU64,
    shards: [Shard; SHARDS],
}

impl Default for Observed {
    fn default() -> Self {
        let shard = |_| Shard { failed: AtomicU64::new(0), took: std::array::from_fn(|_| AtomicU64::new(0)) };
        Self { panics: AtomicU64::new(0), shards: std::array::from_fn(shard) }
    }
}

impl Observed {
    /// A panic with patched code on its stack.
    pub fn panic(&self) {
        self.panics.fetch_add(1, Relaxed);
    }

    /// A piece of the program's work.
    pub fn work(&self, failed: bool, took: Duration) {
        static NEXT: AtomicUsize = AtomicUsize::new(0);
        let mut mine = SHARD.get();
        if mine == 0 {
            mine = NEXT.fetch_add(1, Relaxed) % SHARDS + 1;
            SHARD.set(mine);
        }
        let shard = &self.shards[mine - 1];
        shard.took[bucket(took)].fetch_add(1, Relaxed);
        if failed {
            shard.failed.fetch_add(1, Relaxed);
        }
    }

    /// All of it.
    pub fn tally(&self) -> Tally {
        let mut out = Tally { panics: self.panics.load(Relaxed), ..Tally::default() };
        for shard in &self.shards {
            out.failed += shard.failed.load(Relaxed);
            out.took.iter_mut().zip(&shard.took).for_each(|(sum, n)| *sum += n.load(Relaxed));
        }
        out.all = out.timed();
        out
    }
}

/// How many looks are kept.
const LOOKS: usize = 128;
/// How many there are in a window.
const STEPS: u32 = 32;

/// Figures as they were, for what has come since.
#[derive(Debug)]
struct Window {
    /// The first is the beginning, or the last one that is older than the window.
    looks: VecDeque<(Instant, Tally)>,
}

impl Window {
    fn new(now: Instant, first: Tally) -> Self {
        let mut looks = VecDeque::with_capacity(LOOKS + 1);
        looks.push_back((now, first));
        Self { looks }
    }

    /// Of the last `long`, or of as much longer as it takes to have `enough`; never of more than since the beginning.
    fn last(&mut self, now: Instant, tally: &Tally, long: Duration, enough: u64) -> Tally {
        while let Some((at, next)) = self.looks.get(1) {
            if now.saturating_duration_since(*at) < long || tally.since(next).all < enough {
                break;
            }
            self.looks.pop_front();
        }
        let recent = tally.since(&self.looks.front().map(|l| l.1).unwrap_or_default());
        if self.looks.back().is_none_or(|l| now.saturating_duration_since(l.0) >= long / STEPS) {
            if self.looks.len() == LOOKS {
                // A long wait for enough: every other look will do.
                let mut keep = false;
                self.looks.retain(|_| {
                    keep = !keep;
                    keep
                });
            }
            self.looks.push_back((now, *tally));
        }
        recent
    }
}

/// Holds what happens since one apply against the bounds.
#[derive(Debug)]
pub struct Judge {
    panics: u64,
    work: Window,
    arms: Option<[Window; 2]>,
}

impl Judge {
    /// From now on.
    pub fn new(now: Instant, observed: &Observed) -> Self {
        let first = observed.tally();
        Self { panics: first.panics, work: Window::new(now, first), arms: None }
    }

    /// Panics since then.
    pub fn panics(&self, observed: &Observed) -> u64 {
        observed.panics.load(Relaxed).saturating_sub(self.panics)
    }

    /// The bound that is not kept, in words. `arms` are the old one and the new one of a canary by session.
    pub fn broken(
        &mut self,
        bounds: &Bounds,
        now: Instant,
        observed: &Observed,
        arms: Option<[Tally; 2]>,
    ) -> Option<String> {
        let (long, enough) = (bounds.window(), bounds.enough());
        let all = observed.tally();
        let panics = self.panics(observed);
        if bounds.panics.is_some_and(|most| panics >= most.max(1)) {
            return Some(format!("{panics} panics in patched code"));
        }
        let recent = self.work.last(now, &all, long, enough);
        if let Some(why) = too_bad(bounds, &recent, enough) {
            return Some(why);
        }
        let Some(arms) = arms else {
            self.arms = None;
            return None;
        };
        // An arm counts from zero when the canary begins.
        let windows = self.arms.get_or_insert_with(|| [0, 1].map(|_| Window::new(now, Tally::default())));
        let [old, new] = [0, 1].map(|i| windows[i].last(now, &arms[i], long, enough));
        worse(bounds.than_old?, &old, &new, enough)
    }
}

fn too_bad(bounds: &Bounds, seen: &Tally, enough: u64) -> Option<String> {
    let Tally { all, failed, .. } = *seen;
    if all < enough {
        return None;
    }
    if bounds.error_rate.is_some_and(|most| failed as f64 > all as f64 * most) {
        return Some(format!("{failed} of {all} failed"));
    }
    let bound = bounds.p99?;
    let late = seen.later_than(bound);
    (late * 100 > all).then(|| format!("{late} of {all} took longer than {bound:?}"))
}

/// What the new arm does worse than the old one, beyond `times` and beyond chance.
fn worse(times: f64, old: &Tally, new: &Tally, enough: u64) -> Option<String> {
    if old.all < enough || new.all < enough {
        return None;
    }
    for (what, of_old, of_new) in [("failed", old.failed, new.failed), ("panicked", old.panics, new.panics)] {
        let allowed = of_old as f64 / old.all as f64 * times;
        let there = of_new as f64 / new.all as f64;
        // Four standard errors of a difference of two shares, each taken as one more than was seen: none of a few proves little.
        let share = |n: u64, all: u64| (n + 1) as f64 / (all + 2) as f64;
        let variance = |n, all: u64| share(n, all) * (1.0 - share(n, all)) / all as f64;
        let error = (variance(of_new, new.all) + times * times * variance(of_old, old.all)).sqrt();
        if there > allowed + 4.0 * error {
            return Some(format!(
                "{of_new} of {} messages of the new arm {what}, and {of_old} of {} of the old one",
                new.all, old.all
            ));
        }
    }
    if old.timed() < enough || new.timed() < enough {
        return None;
    }
    // Both are upper bounds of a power of two: a bucket more may be nothing.
    let (p99_old, p99_new) = (old.quantile_ns(99), new.quantile_ns(99));
    let late = p99_new as f64 / 2.0 > p99_old as f64 * times;
    late.then(|| {
        format!(
            "the 99th percentile of the new arm is over {} ns, and that of the old one at most {p99_old} ns",
            p99_new / 2
        )
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    struct Patch(Judge, Observed, Instant);

    impl Patch {
        fn new() -> Self {
            let (seen, now) = (Observed::default(), Instant::now());
            Self(Judge::new(now, &seen), seen, now)
        }

        /// What is broken some seconds after the apply.
        fn after(&mut self, seconds: u64, bounds: &Bounds) -> Option<String> {
            self.0.broken(bounds, self.2 + Duration::from_secs(seconds), &self.1, None)
        }

        fn works(&self, times: u64, failed: bool, took: Duration) {
            (0..times).for_each(|_| self.1.work(failed, took));
        }
    }

    #[test]
    fn panics_are_counted_from_the_apply_on() {
        let (mut patch, bounds) = (Patch::new(), Bounds { panics: Some(2), ..Bounds::default() });
        patch.1.panic();
        assert_eq!(patch.after(0, &bounds), None);
        patch.1.panic();
        assert_eq!(patch.after(1000, &bounds).unwrap(), "2 panics in patched code");
        patch.0 = Judge::new(patch.2, &patch.1);
        assert_eq!(patch.after(0, &bounds), None);
    }

    #[test]
    fn rates_need_data() {
        let (mut patch, bounds) = (Patch::new(), Bounds { error_rate: Some(0.1), ..Bounds::default() });
        patch.works(99, true, Duration::ZERO);
        assert_eq!(patch.after(0, &bounds), None, "99 are too few");
        patch.works(1, true, Duration::ZERO);
        assert_eq!(patch.after(1, &bounds).unwrap(), "100 of 100 failed");
        patch.works(900, false, Duration::ZERO);
        assert_eq!(patch.after(2, &bounds), None, "exactly the bound");
    }

    #[test]
    fn one_in_a_hundred_may_be_late() {
        let bounds = Bounds { p99: Some(Duration::from_millis(1)), observations: 10, ..Bounds::default() };
        let mut patch = Patch::new();
        patch.works(198, false, Duration::from_micros(900));
        patch.works(2, false, Duration::from_millis(9));
        assert_eq!(patch.after(0, &bounds), None);
        patch.works(1, false, Duration::from_millis(9));
        assert_eq!(patch.after(1, &bounds).unwrap(), "3 of 201 took longer than 1ms");
    }

    #[test]
    fn what_went_right_for_long_does_not_hide_what_goes_wrong_now() {
        let (mut patch, bounds) = (Patch::new(), Bounds { error_rate: Some(0.5), ..Bounds::default() });
        for second in 0..3600 {
            patch.works(200, false, Duration::ZERO);
            assert_eq!(patch.after(second, &bounds), None);
        }
        for second in 3600..3605 {
            patch.works(200, true, Duration::ZERO);
            assert_eq!(patch.after(second, &bounds), None, "at most half of the last ten seconds");
        }
        patch.works(400, true, Duration::ZERO);
        assert!(patch.after(3605, &bounds).is_some());
    }

    #[test]
    fn little_work_is_looked_at_for_longer() {
        let (mut patch, bounds) = (Patch::new(), Bounds { error_rate: Some(0.5), ..Bounds::default() });
        for second in 0..990 {
            // One in ten seconds.
            patch.works(u64::from(second % 10 == 0), true, Duration::ZERO);
            assert_eq!(patch.after(second, &bounds), None);
        }
        patch.works(1, true, Duration::ZERO);
        assert_eq!(patch.after(990, &bounds).unwrap(), "100 of 100 failed");
        assert!(patch.0.work.looks.len() <= LOOKS);
    }

    fn arm(all: u64, failed: u64, place: usize) -> Tally {
        let mut out = Tally { all, failed, ..Tally::default() };
        out.took[place] = all;
        out
    }

    #[test]
    fn the_new_arm_is_held_against_the_old_one() {
        let bounds = Bounds { than_old: Some(2.0), ..Bounds::default() };
        let mut patch = Patch::new();
        let mut broken = |old, new| {
            patch.0.arms = None;
            patch.0.broken(&bounds, patch.2, &patch.1, Some([old, new]))
        };
        assert_eq!(broken(arm(10_000, 100, 10), arm(1_000, 20, 10)), None, "twice as often");
        assert_eq!(broken(arm(10_000, 100, 10), arm(1_000, 24, 10)), None, "may be chance");
        assert!(broken(arm(10_000, 100, 10), arm(1_000, 60, 10))
            .unwrap()
            .contains("60 of 1000 messages of the new arm failed"));
        assert_eq!(broken(arm(10_000, 0, 10), arm(99, 99, 10)), None, "too few");
        assert_eq!(broken(arm(99, 0, 10), arm(10_000, 10_000, 10)), None, "nothing to compare with");
        assert_eq!(broken(arm(1_000, 0, 10), arm(1_000, 0, 12)), None, "it may be twice as long and a bit");
        assert!(broken(arm(1_000, 0, 10), arm(1_000, 0, 13)).unwrap().contains("99th percentile"));
        let panics = Tally { panics: 30, ..arm(1_000, 0, 10) };
        assert!(broken(arm(10_000, 0, 10), panics).unwrap().contains("panicked"));
        assert_eq!(broken(panics, panics), None, "the old one panics as often");
    }

    proptest! {
        #[test]
        fn equal_arms_are_not_told_apart(seed: u64, rate in 0.0..0.5f64) {
            // A binomial count by a small generator: 2,000 and 500 messages that fail with the same probability.
            let mut state = seed | 1;
            let mut failed = |n: u64| (0..n).filter(|_| {
                state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                ((state >> 33) as f64 / (1u64 << 31) as f64) < rate
            }).count() as u64;
            let (old, new) = (arm(2_000, failed(2_000), 9), arm(500, failed(500), 9));
            prop_assert_eq!(worse(1.5, &old, &new, 100), None);
        }

        #[test]
        fn looks_stay_few(gaps in proptest::collection::vec(0u64..5_000, 1..600)) {
            let (mut patch, bounds) = (Patch::new(), Bounds::default());
            let mut at = 0;
            for gap in gaps {
                at += gap;
                patch.works(gap % 3, false, Duration::ZERO);
                let _ = patch.0.broken(&bounds, patch.2 + Duration::from_millis(at), &patch.1, None);
                prop_assert!(patch.0.work.looks.len() <= LOOKS + 1);
            }
        }
    }
}
