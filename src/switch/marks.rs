//! Which version each thread runs: a table that signal handlers read and write, without a lock and without an allocation.

use std::io;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};

use super::sys::Zeroed;
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
    fn word(self) -> u32 {
        match self {
            Self::Unknown => 1,
            // Saturates below the value that means clear.
            Self::Stays(times) => times.clamp(1, CLEAR - 2) + 1,
            Self::Clear => CLEAR,
        }
    }

    fn of(word: u32) -> Self {
        match word {
            0 | 1 => Self::Unknown,
            CLEAR => Self::Clear,
            times => Self::Stays(times - 1),
        }
    }
}

/// A mark in the table.
pub struct Slot<'t>(&'t AtomicU32);

impl Slot<'_> {
    /// What is known now.
    pub fn get(&self) -> Mark {
        Mark::of(self.0.load(Ordering::SeqCst))
    }

    /// `to`, if it is still `from`.
    pub fn change(&self, from: Mark, to: Mark) -> bool {
        self.0.compare_exchange(from.word(), to.word(), Ordering::SeqCst, Ordering::SeqCst).is_ok()
    }
}

/// The highest number of a thread, and one: PID_MAX_LIMIT of a 64-bit kernel (proc(5), pid_max).
const NUMBERS: usize = 1 << 22;

/// Threads whose marks are looked at together.
const TOGETHER: usize = 1 << 10;

/// A mark for each thread that there can be: however many are born while a switch lasts, each finds its own. A number that is given again
/// finds the mark of a thread that has ended; the new one has no frame yet, so that it is as clear as the mark says, or more.
pub struct Marks {
    /// By the thread's number; 0 where there is none. Memory that nobody touches is none.
    words: Zeroed,
    /// Of so many marks together, whether there may be one.
    touched: Box<[AtomicBool]>,
}

impl Marks {
    /// None yet.
    ///
    /// # Errors
    ///
    /// There is no memory for them.
    pub fn new() -> io::Result<Self> {
        let touched = (0..NUMBERS / TOGETHER).map(|_| AtomicBool::new(false)).collect();
        Ok(Self { words: Zeroed::map(NUMBERS)?, touched })
    }

    /// The mark of a thread, which is made if there is none.
    pub fn slot(&self, tid: Tid) -> Option<Slot<'_>> {
        let at = usize::try_from(tid.0).ok()?;
        let word = self.words.get(at)?;
        if word.load(Ordering::SeqCst) == 0 {
            // First the hint, then the mark: who sees no hint sees the state before the mark.
            self.touched.get(at / TOGETHER)?.store(true, Ordering::SeqCst);
            let _ = word.compare_exchange(0, Mark::Unknown.word(), Ordering::SeqCst, Ordering::SeqCst);
        }
        Some(Slot(word))
    }

    /// What is known of a thread, without making a mark.
    pub fn get(&self, tid: Tid) -> Mark {
        let word = usize::try_from(tid.0).ok().and_then(|at| self.words.get(at));
        word.map_or(Mark::Unknown, |w| Mark::of(w.load(Ordering::SeqCst)))
    }

    /// The threads that have a mark and are not known to be clear.
    pub fn not_clear(&self) -> Vec<Tid> {
        let mut out = Vec::new();
        for (i, _) in self.touched.iter().enumerate().filter(|(_, t)| t.load(Ordering::SeqCst)) {
            for at in i * TOGETHER..(i + 1) * TOGETHER {
                let word = self.words.get(at).map_or(0, |w| w.load(Ordering::SeqCst));
                if word != 0 && word != CLEAR {
                    out.extend(i32::try_from(at).ok().map(Tid));
                }
            }
        }
        out
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_look_that_was_overtaken_proves_nothing() {
        let marks = Marks::new().unwrap();
        let slot = marks.slot(Tid(7)).unwrap();
        let before = slot.get();
        assert_eq!(before, Mark::Unknown);
        // Meanwhile the thread trapped, and stayed.
        let own = marks.slot(Tid(7)).unwrap();
        assert!(own.change(Mark::Unknown, Mark::Stays(1)));
        assert!(!slot.change(before, Mark::Clear));
        assert_eq!(marks.not_clear(), [Tid(7)]);
        assert!(slot.change(Mark::Stays(1), Mark::Clear));
        assert!(marks.not_clear().is_empty());
    }

    #[test]
    fn every_thread_that_there_can_be_has_its_own_mark() {
        let marks = Marks::new().unwrap();
        let highest = i32::try_from(NUMBERS).unwrap() - 1;
        for tid in (1..=highest).step_by(37).chain([highest]) {
            let slot = marks.slot(Tid(tid)).unwrap();
            assert_eq!(slot.get(), Mark::Unknown);
            assert!(slot.change(Mark::Unknown, Mark::Clear));
        }
        assert!(marks.not_clear().is_empty());
        assert!(marks.slot(Tid(-1)).is_none() && marks.slot(Tid(highest + 1)).is_none());
        assert_eq!((marks.get(Tid(1)), marks.get(Tid(2))), (Mark::Clear, Mark::Unknown));
    }

    #[test]
    fn marks_are_what_they_were_made_of() {
        for mark in [Mark::Unknown, Mark::Stays(1), Mark::Stays(2), Mark::Stays(u32::MAX - 2), Mark::Clear] {
            assert_eq!(Mark::of(mark.word()), mark);
        }
        assert_eq!(Mark::of(Mark::Stays(u32::MAX).word()), Mark::Stays(u32::MAX - 2));
    }

    #[test]
    fn threads_that_meet_make_one_mark() {
        let marks = Marks::new().unwrap();
        std::thread::scope(|s| {
            for _ in 0..4 {
                s.spawn(|| (1..500).for_each(|tid| assert!(marks.slot(Tid(tid)).is_some())));
            }
        });
        assert_eq!(marks.not_clear().len(), 499);
    }
}
