//! The ranges of code in which no thread may have a frame, and the quick test for a word of its stack.

use crate::addr::{ProcAddr, ProcRange};

/// What kind of code a watched range is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Part {
    /// A function's body: entered at its first byte by a call, which leaves no return address there.
    Body {
        /// Whether the body branches back to its entry: then a thread there may be in the middle of it.
        branches_to_entry: bool,
    },
    /// An out-of-line part: entered by a branch, so its first byte counts.
    Companion,
    /// The bytes that an entry jump covers after its first one.
    Window,
    /// The code that a signal handler returns to. A word of the stack that points there may be a signal frame, and
    /// what was interrupted may have its frames below (a signal stack inside a frame): only an unwind can tell.
    SignalReturn,
}

/// A watched range.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Watched {
    /// Whose code it is.
    pub name: String,
    /// Its bytes.
    pub range: ProcRange,
    /// Its kind.
    pub part: Part,
}

impl Watched {
    /// The name of the code that leads to old or new functions while a patch is switched.
    pub const STUBS: &'static str = "the switch stubs";

    /// Whether it is that code.
    #[must_use]
    pub fn is_stub(&self) -> bool {
        self.name == Self::STUBS
    }

    /// Whether a thread interrupted at `pc` stands in it.
    #[must_use]
    pub fn holds_pc(&self, pc: ProcAddr) -> bool {
        match self.part {
            Part::Body { branches_to_entry: false } => self.range.contains(pc) && pc != self.range.start,
            Part::SignalReturn => false,
            _ => self.range.contains(pc),
        }
    }

    /// Whether a call that returns to `to` was made in it: the byte before counts, since a call may be the last
    /// instruction.
    #[must_use]
    pub fn holds_return(&self, to: ProcAddr) -> bool {
        match self.part {
            // A jump that covers a call's end would be wrong whatever the unwinder says.
            Part::Window => self.range.contains(to),
            Part::SignalReturn => false,
            _ => to.checked_sub(1).is_some_and(|call| self.range.contains(call)),
        }
    }

    /// The lowest and highest word of a stack or register that counts as a hit.
    fn span(&self) -> (u64, u64) {
        let (start, end) = (self.range.start.0, self.range.end.0);
        match self.part {
            Part::Body { .. } => (start + 1, end),
            Part::Companion | Part::SignalReturn => (start, end),
            Part::Window => (start, end.saturating_sub(1)),
        }
    }
}

/// All watched ranges, sorted for the scan.
#[derive(Clone, Debug, Default)]
pub struct WatchList {
    watched: Vec<Watched>,
    /// (lowest, highest, highest of all up to here), by lowest.
    spans: Vec<(u64, u64, u64)>,
    lowest: u64,
    /// Highest minus lowest.
    width: u64,
}

impl WatchList {
    /// Sorts them.
    #[must_use]
    pub fn new(watched: Vec<Watched>) -> Self {
        let mut spans: Vec<_> =
            watched.iter().map(Watched::span).filter(|(a, b)| a <= b).map(|(a, b)| (a, b, b)).collect();
        spans.sort_unstable();
        let mut highest = 0;
        for s in &mut spans {
            highest = highest.max(s.1);
            s.2 = highest;
        }
        let lowest = spans.first().map_or(u64::MAX, |s| s.0);
        Self { watched, spans, lowest, width: highest.saturating_sub(lowest) }
    }

    /// The ranges.
    #[must_use]
    pub fn watched(&self) -> &[Watched] {
        &self.watched
    }

    /// Whether a word, of a stack or in a register, may be a return address into a watched range.
    #[must_use]
    #[inline]
    pub fn hits_word(&self, word: u64) -> bool {
        word.wrapping_sub(self.lowest) <= self.width && !self.spans.is_empty() && self.hits_span(word)
    }

    fn hits_span(&self, word: u64) -> bool {
        let mut after = self.spans.partition_point(|s| s.0 <= word);
        // Ranges may overlap (a window reaches past its function's end): go back while an earlier one may reach.
        while let Some((_, last, reach)) = after.checked_sub(1).and_then(|i| self.spans.get(i)) {
            if *last >= word {
                return true;
            }
            if *reach < word {
                return false;
            }
            after -= 1;
        }
        false
    }

    /// Whether a program counter may be in the middle of a watched function.
    #[must_use]
    pub fn hits_pc(&self, pc: ProcAddr) -> bool {
        let at_entry = |w: &Watched| w.part == Part::Body { branches_to_entry: true } && w.range.start == pc;
        self.hits_word(pc.0) || self.watched.iter().any(at_entry)
    }

    /// Whether any word of `stack` is a hit. A length that is no multiple of 8 is a hit.
    #[must_use]
    pub fn hits_stack(&self, stack: &[u8]) -> bool {
        let (words, rest) = stack.as_chunks::<8>();
        !rest.is_empty() || words.iter().any(|w| self.hits_word(u64::from_le_bytes(*w)))
    }

    /// The watched range that holds a frame interrupted at `pc`.
    #[must_use]
    pub fn live_at(&self, pc: ProcAddr) -> Option<&Watched> {
        self.watched.iter().find(|w| w.holds_pc(pc))
    }

    /// The watched range that holds a frame which a callee returns to at `to`.
    #[must_use]
    pub fn live_return(&self, to: ProcAddr) -> Option<&Watched> {
        self.watched.iter().find(|w| w.holds_return(to))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn watched(start: u64, end: u64, part: Part) -> Watched {
        Watched { name: format!("f{start:x}"), range: ProcRange { start: ProcAddr(start), end: ProcAddr(end) }, part }
    }

    const BODY: Part = Part::Body { branches_to_entry: false };

    #[test]
    fn the_entry_is_no_hit_and_the_end_is_one() {
        let list = WatchList::new(vec![watched(0x1000, 0x1040, BODY)]);
        assert!(!list.hits_word(0x1000), "a function pointer");
        assert!(list.hits_word(0x1001));
        assert!(list.hits_word(0x1040), "a call as the last instruction returns to the end");
        assert!(!list.hits_word(0x1041) && !list.hits_word(0xfff) && !list.hits_word(0) && !list.hits_word(u64::MAX));
        assert!(list.live_return(ProcAddr(0x1040)).is_some());
        assert!(list.live_return(ProcAddr(0x1000)).is_none(), "returns into the function before");
        assert!(list.live_at(ProcAddr(0x1040)).is_none(), "the next function's entry");
        assert!(list.live_at(ProcAddr(0x103f)).is_some() && list.live_at(ProcAddr(0x1000)).is_none());
    }

    #[test]
    fn a_pc_at_the_entry_counts_if_the_body_branches_back() {
        let plain = WatchList::new(vec![watched(0x1000, 0x1040, BODY)]);
        let looping = WatchList::new(vec![watched(0x1000, 0x1040, Part::Body { branches_to_entry: true })]);
        assert!(!plain.hits_pc(ProcAddr(0x1000)) && looping.hits_pc(ProcAddr(0x1000)));
        assert!(looping.live_at(ProcAddr(0x1000)).is_some());
        assert!(!looping.hits_word(0x1000));
    }

    #[test]
    fn companions_count_from_their_first_byte() {
        let list = WatchList::new(vec![watched(0x1000, 0x1010, Part::Companion)]);
        assert!(list.hits_word(0x1000) && list.hits_pc(ProcAddr(0x1000)) && list.live_at(ProcAddr(0x1000)).is_some());
    }

    #[test]
    fn a_signal_frame_is_a_hit_that_only_an_unwind_can_clear() {
        let list = WatchList::new(vec![watched(0x1000, 0x1009, Part::SignalReturn)]);
        assert!(list.hits_word(0x1000) && list.hits_pc(ProcAddr(0x1007)));
        assert!(list.live_at(ProcAddr(0x1000)).is_none() && list.live_return(ProcAddr(0x1001)).is_none());
    }

    #[test]
    fn overlapping_ranges_are_all_seen() {
        let list = WatchList::new(vec![
            watched(0x1000, 0x2000, BODY),
            watched(0x1100, 0x1110, Part::Companion),
            watched(0x1200, 0x1204, Part::Window),
        ]);
        for word in [0x1001, 0x1110, 0x1111, 0x1203, 0x1204, 0x1fff, 0x2000] {
            assert!(list.hits_word(word), "{word:#x}");
        }
        assert!(!list.hits_word(0x2001));
        assert!(!WatchList::new(Vec::new()).hits_word(5));
        assert!(!WatchList::default().hits_word(u64::MAX));
    }

    #[test]
    fn every_word_of_a_stack_is_looked_at() {
        let list = WatchList::new(vec![watched(0x1000, 0x1040, BODY)]);
        let mut stack = vec![0u8; 64];
        assert!(!list.hits_stack(&stack));
        stack[56..58].copy_from_slice(&[0x20, 0x10]);
        assert!(list.hits_stack(&stack));
        assert!(list.hits_stack(&[0; 7]), "half a word cannot be judged");
    }
}
