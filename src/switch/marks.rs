//! Which version each thread runs: a table that signal handlers read and write, without a lock and without an allocation.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use crate::process::Tid;

/// What is known of a thread.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mark {
    /// Nothing yet.
    Unknown,
    /// It may be in the code that is left; so often that was found. A look that began before the last time proves nothing.
    Stays(u32),
    /// It has been seen clear: it enters the other code.
    Clear,
}

const CLEAR: u32 = u32::MAX;

impl Mark {
    fn word(self, tid: Tid) -> u64 {
        let state = match self {
            Self::Unknown => 0,
            // Saturates below the value that means clear.
            Self::Stays(times) => times.clamp(1, CLEAR - 1),
            Self::Clear => CLEAR,
        };
        u64::from(tid.0.cast_unsigned()) << 32 | u64::from(state)
    }

    fn of(word: u64) -> (Tid, Self) {
        let mark = match word as u32 {
            0 => Self::Unknown,
            CLEAR => Self::Clear,
            times => Self::Stays(times),
        };
        (Tid(((word >> 32) as u32).cast_signed()), mark)
    }
}

/// A mark in the table.
pub struct Slot<'t> {
    word: &'t AtomicU64,
    tid: Tid,
}

impl Slot<'_> {
    /// What is known now.
    pub fn get(&self) -> Mark {
        Mark::of(self.word.load(Ordering::SeqCst)).1
    }

    /// `to`, if it is still `from`.
    pub fn change(&self, from: Mark, to: Mark) -> bool {
        let (from, to) = (from.word(self.tid), to.word(self.tid));
        self.word.compare_exchange(from, to, Ordering::SeqCst, Ordering::SeqCst).is_ok()
    }
}

/// A mark for each thread.
pub struct Marks {
    /// The thread's number and its mark; 0 where there is none. No entry is ever taken out.
    words: Box<[AtomicU64]>,
    full: AtomicBool,
}

impl Marks {
    /// With room for some threads more than there are.
    pub fn new(threads: usize) -> Self {
        let room = threads.saturating_mul(4).saturating_add(4096).next_power_of_two();
        Self { words: (0..room).map(|_| AtomicU64::new(0)).collect(), full: AtomicBool::new(false) }
    }

    /// The mark of a thread, which is made if there is none; `None` if there is no more room.
    pub fn slot(&self, tid: Tid) -> Option<Slot<'_>> {
        let mask = self.words.len() - 1;
        let start = (tid.0.cast_unsigned().wrapping_mul(0x9e37_79b9) >> 8) as usize;
        for step in 0..self.words.len() / 2 {
            let word = self.words.get((start + step) & mask)?;
            let mut there = word.load(Ordering::SeqCst);
            if there == 0 {
                match word.compare_exchange(0, Mark::Unknown.word(tid), Ordering::SeqCst, Ordering::SeqCst) {
                    Ok(_) => return Some(Slot { word, tid }),
                    Err(other) => there = other,
                }
            }
            if Mark::of(there).0 == tid {
                return Some(Slot { word, tid });
            }
        }
        self.full.store(true, Ordering::SeqCst);
        None
    }

    /// Whether a thread found no room.
    pub fn is_full(&self) -> bool {
        self.full.load(Ordering::SeqCst)
    }

    /// The threads that are not known to be clear.
    pub fn not_clear(&self) -> Vec<Tid> {
        let words = self.words.iter().map(|w| w.load(Ordering::SeqCst)).filter(|w| *w != 0);
        words.map(Mark::of).filter(|(_, mark)| *mark != Mark::Clear).map(|(tid, _)| tid).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_look_that_was_overtaken_proves_nothing() {
        let marks = Marks::new(1);
        let slot = marks.slot(Tid(7)).unwrap();
        let before = slot.get();
        assert_eq!(before, Mark::Unknown);
        // Meanwhile the thread trapped, and stayed.
        let own = marks.slot(Tid(7)).unwrap();
        assert!(own.change(Mark::Unknown, Mark::Stays(1)));
        assert!(!slot.change(before, Mark::Clear));
        assert!(slot.change(Mark::Stays(1), Mark::Clear));
        assert!(marks.not_clear().is_empty());
    }

    #[test]
    fn every_thread_has_its_own_mark_until_there_is_no_room() {
        let marks = Marks::new(0);
        let mut last = 0;
        for tid in 1..10_000 {
            let Some(slot) = marks.slot(Tid(tid)) else { break };
            assert_eq!(slot.get(), Mark::Unknown);
            slot.change(Mark::Unknown, Mark::Clear);
            last = tid;
        }
        assert!(last >= 2048 && marks.is_full());
        assert!((1..=last).all(|tid| marks.slot(Tid(tid)).is_some_and(|s| s.get() == Mark::Clear)));
    }

    #[test]
    fn threads_that_meet_make_one_mark() {
        let marks = Marks::new(8);
        std::thread::scope(|s| {
            for _ in 0..4 {
                s.spawn(|| (1..500).for_each(|tid| assert!(marks.slot(Tid(tid)).is_some())));
            }
        });
        assert_eq!(marks.not_clear().len(), 499);
    }
}
