//! What the program asked for a signal that is ours: kept here instead of in the kernel.
//!
//! A handler, its flags and its mask are three words, read inside of signal handlers and changed by `sigaction`,
//! which may itself be called from a handler. So nothing here waits: a new value is written to a free slot and made
//! the current one with one compare-and-swap, whose count tells a reader that what it read belongs together.

use std::sync::atomic::{AtomicI32, AtomicU64, AtomicUsize, Ordering::SeqCst};

use libc::c_int;

use super::bit;

/// How many calls of `sigaction` may be under way at once before one of them has to try again.
const SLOTS: usize = 64;
const SLOT_BITS: u64 = SLOTS as u64 - 1;

/// What the program wants done at a signal that the agent owns.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Chained {
    /// The handler's address, or `SIG_DFL`, or `SIG_IGN`.
    pub handler: usize,
    /// The `SA_` flags.
    pub flags: c_int,
    /// The signals 1 to 64 that are to be blocked meanwhile, as the program asked; bit 0 is signal 1.
    pub mask: u64,
}

impl Chained {
    /// Nothing was asked for: the signal's default action.
    pub const DEFAULT: Self = Self { handler: libc::SIG_DFL, flags: 0, mask: 0 };

    /// Is there a function to call?
    pub fn is_handler(&self) -> bool {
        self.handler != libc::SIG_DFL && self.handler != libc::SIG_IGN
    }

    pub(super) fn from_libc(action: &libc::sigaction) -> Self {
        Self { handler: action.sa_sigaction, flags: action.sa_flags, mask: super::low_word(&action.sa_mask) }
    }

    pub(super) fn to_libc(self) -> libc::sigaction {
        libc::sigaction {
            sa_sigaction: self.handler,
            sa_mask: super::set_of(self.mask),
            sa_flags: self.flags,
            sa_restorer: None,
        }
    }

    /// The signals that are blocked while the handler runs: its mask, and the signal itself unless `SA_NODEFER`.
    pub(super) fn blocks(&self, signal: c_int) -> u64 {
        self.mask | if self.flags & libc::SA_NODEFER == 0 { bit(signal) } else { 0 }
    }
}

struct Slot {
    handler: AtomicUsize,
    flags: AtomicI32,
    mask: AtomicU64,
}

/// One current value, with places for those that are being written.
pub(super) struct Chain {
    /// The slot that counts, and above it how often that changed.
    current: AtomicU64,
    /// A bit for each slot that counts or is being written.
    taken: AtomicU64,
    slots: [Slot; SLOTS],
}

/// What was read, and at which count.
#[derive(Clone, Copy)]
pub(super) struct Seen {
    pub value: Chained,
    current: u64,
}

impl Chain {
    pub const fn new() -> Self {
        Self {
            current: AtomicU64::new(0),
            taken: AtomicU64::new(1),
            slots: [const { Slot { handler: AtomicUsize::new(0), flags: AtomicI32::new(0), mask: AtomicU64::new(0) } };
                SLOTS],
        }
    }

    fn slot(&self, current: u64) -> &Slot {
        &self.slots[(current & SLOT_BITS) as usize]
    }

    /// The value that counts. Ends at once unless it is changed at this very moment.
    pub fn read(&self) -> Seen {
        loop {
            let current = self.current.load(SeqCst);
            let slot = self.slot(current);
            let value = Chained {
                handler: slot.handler.load(SeqCst),
                flags: slot.flags.load(SeqCst),
                mask: slot.mask.load(SeqCst),
            };
            // a slot is written only while it is not the current one, and the count never comes back
            if self.current.load(SeqCst) == current {
                return Seen { value, current };
            }
        }
    }

    /// Is this still what counts, and was it ever since it was read?
    pub fn is_current(&self, seen: Seen) -> bool {
        self.current.load(SeqCst) == seen.current
    }

    /// Takes a slot that nobody reads or writes.
    fn take(&self) -> u64 {
        loop {
            let taken = self.taken.load(SeqCst);
            let free = (!taken).trailing_zeros();
            if free as usize >= SLOTS {
                std::hint::spin_loop();
                continue;
            }
            if self.taken.compare_exchange(taken, taken | 1 << free, SeqCst, SeqCst).is_ok() {
                return u64::from(free);
            }
        }
    }

    fn give_back(&self, slot: u64) {
        self.taken.fetch_and(!(1 << (slot & SLOT_BITS)), SeqCst);
    }

    fn write(&self, value: Chained) -> u64 {
        let new = self.take();
        let slot = self.slot(new);
        slot.handler.store(value.handler, SeqCst);
        slot.flags.store(value.flags, SeqCst);
        slot.mask.store(value.mask, SeqCst);
        new
    }

    /// Makes a value the current one and gives the one before it; every value comes out exactly once.
    pub fn swap(&self, value: Chained) -> Chained {
        let new = self.write(value);
        loop {
            let seen = self.read();
            if self.put(seen, new) {
                return seen.value;
            }
        }
    }

    /// Makes a value the current one if what was seen still is.
    pub fn replace(&self, seen: Seen, value: Chained) -> bool {
        let new = self.write(value);
        let done = self.put(seen, new);
        if !done {
            self.give_back(new);
        }
        done
    }

    fn put(&self, seen: Seen, new: u64) -> bool {
        let next = ((seen.current | SLOT_BITS).wrapping_add(1)) | new;
        let done = self.current.compare_exchange(seen.current, next, SeqCst, SeqCst).is_ok();
        if done {
            self.give_back(seen.current);
        }
        done
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn value(n: usize) -> Chained {
        Chained { handler: n, flags: n as c_int, mask: n as u64 }
    }

    #[test]
    fn every_value_comes_out_once_and_whole() {
        static CHAIN: Chain = Chain::new();
        const THREADS: usize = 4;
        const EACH: usize = 20_000;
        let mut out: Vec<usize> = std::thread::scope(|s| {
            let threads: Vec<_> = (0..THREADS)
                .map(|t| {
                    s.spawn(move || {
                        let mut out = Vec::new();
                        for n in 0..EACH {
                            let old = CHAIN.swap(value(1 + t * EACH + n));
                            assert_eq!(old, value(old.handler));
                            let now = CHAIN.read().value;
                            assert_eq!(now, value(now.handler));
                            out.push(old.handler);
                        }
                        out
                    })
                })
                .collect();
            threads.into_iter().flat_map(|t| t.join().unwrap()).collect()
        });
        out.push(CHAIN.read().value.handler);
        out.sort_unstable();
        assert_eq!(out, (0..=THREADS * EACH).collect::<Vec<_>>());
        assert_eq!(CHAIN.taken.load(SeqCst).count_ones(), 1);
    }

    #[test]
    fn a_change_since_the_look_is_not_overwritten() {
        let chain = Chain::new();
        let seen = chain.read();
        assert!(chain.is_current(seen));
        chain.swap(value(1));
        assert!(!chain.is_current(seen));
        assert!(!chain.replace(seen, value(2)));
        assert_eq!(chain.read().value, value(1));
        assert!(chain.replace(chain.read(), value(3)));
        assert_eq!(chain.read().value, value(3));
        assert_eq!(chain.taken.load(SeqCst).count_ones(), 1);
    }
}
