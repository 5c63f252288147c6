//! States by number, each behind a lock of its own.
//!
//! Nothing of a table depends on the type of what it keeps: the map, the locks and this code are the same before, in and after a migration.
//!
//! Contract of the `unsafe` in this module, beside that of [`super::shims`]: a state is used by whoever has its slot's lock, as the
//! version that the slot says, with that version's arm.
#![allow(unsafe_code)]

use std::hint::black_box;
use std::marker::PhantomData;
use std::mem::MaybeUninit;
use std::ptr::null_mut;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Weak};

use parking_lot::{Mutex, RwLock};

use super::shims::{self, Build, Built, Call, Ops, What, Work};
use super::State;
use crate::session;

/// All tables of the process.
static TABLES: Mutex<Vec<Weak<Inner>>> = Mutex::new(Vec::new());

pub(super) fn tables() -> Vec<Arc<Inner>> {
    TABLES.lock().iter().filter_map(Weak::upgrade).collect()
}

/// What a slot holds; no state once it was removed.
pub(super) struct Held {
    pub built: Built,
    /// How often it was used: whether anything can have changed since it was looked at.
    pub uses: u64,
}

// SAFETY: a state is `Send`, and reached through the slot's lock only.
unsafe impl Send for Held {}

pub(super) struct Slot {
    pub held: Mutex<Held>,
}

/// Which code handles which version, while a patch with a migration is applied.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Arms {
    /// The bit of the thread's byte that the patch's stubs look at.
    pub mask: u8,
    /// The version that its new code handles.
    pub new: u32,
    /// The version that the old code handles.
    pub old: u32,
}

/// Versions have so many bits in [`Inner::arms`].
const VERSION_BITS: u32 = 28;

pub(super) struct Inner {
    pub id: &'static str,
    ops: Ops,
    pub slots: papaya::HashMap<u64, Arc<Slot>>,
    /// [`Arms`] as one word; 0 where there is one version only.
    arms: AtomicU64,
    /// The version that entries are made with. Held while one is made, so that a migration knows which it has to find.
    pub births: RwLock<u32>,
}

impl Inner {
    pub fn arms(&self) -> Option<Arms> {
        let word = self.arms.load(Ordering::Acquire);
        let version = |shift: u32| (word >> shift) as u32 & ((1 << VERSION_BITS) - 1);
        (word != 0).then(|| Arms { mask: word as u8, new: version(8), old: version(8 + VERSION_BITS) })
    }

    pub fn set_arms(&self, arms: Option<Arms>) {
        let word = |a: Arms| u64::from(a.old) << (8 + VERSION_BITS) | u64::from(a.new) << 8 | u64::from(a.mask);
        self.arms.store(arms.map_or(0, word), Ordering::Release);
    }

    /// Until it is dropped, this thread runs the code of a version.
    pub fn as_version(&self, version: u32) -> Option<session::ByVersion> {
        self.arms().map(|arms| session::by_version(arms.mask, version >= arms.new))
    }

    /// One of the operations, in the code of a version.
    pub fn call(&self, version: u32, call: &mut Call) {
        let _arm = self.as_version(version);
        // SAFETY: the caller has the lock, or the state is nobody else's.
        unsafe { black_box(self.ops)(call) }
    }

    /// The slots that there are now.
    pub fn all(&self) -> Vec<(u64, Arc<Slot>)> {
        self.slots.pin().iter().map(|(id, slot)| (*id, Arc::clone(slot))).collect()
    }

    pub fn end(&self, built: Built) {
        self.call(built.version, &mut Call::new(What::Drop, 0, built, Vec::new()));
    }

    /// Whether the work was done: without an entry the arguments are still the caller's.
    fn run(&self, id: u64, work: Work, args: *mut u8, result: *mut u8) -> bool {
        let Some(slot) = self.slots.pin().get(&id).map(Arc::clone) else { return false };
        let mut held = slot.held.lock();
        let Built { state, version } = held.built;
        if state.is_null() {
            return false;
        }
        held.uses += 1;
        let _arm = self.as_version(version);
        // SAFETY: the lock is held, and arms and version are the slot's.
        unsafe { work(state, version, args, result) };
        true
    }

    /// Whether the one that was made is in the table; `None` where there is one and nothing was done.
    fn put(&self, id: u64, build: Build, args: *mut u8) -> Option<bool> {
        if self.slots.pin().contains_key(&id) {
            return None;
        }
        // One may be made while another is.
        let births = self.births.read_recursive();
        let built = {
            let _arm = self.as_version(*births);
            // SAFETY: the arguments are the caller's.
            unsafe { build(args) }
        };
        let held = Mutex::new(Held { built, uses: 0 });
        let slots = self.slots.pin();
        if built.version == *births && slots.try_insert(id, Arc::new(Slot { held })).is_ok() {
            return Some(true);
        }
        self.end(built);
        assert_eq!(built.version, *births, "new entries of the state {} are of another version", self.id);
        Some(false)
    }

    fn remove(&self, id: u64) -> bool {
        let Some(slot) = self.slots.pin().remove(&id).map(Arc::clone) else { return false };
        let mut held = slot.held.lock();
        let built = std::mem::replace(&mut held.built, Built { state: null_mut(), version: 0 });
        if built.state.is_null() {
            return false;
        }
        self.end(built);
        true
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        for (_, slot) in self.all() {
            let built = std::mem::replace(&mut slot.held.lock().built, Built { state: null_mut(), version: 0 });
            if !built.state.is_null() {
                self.end(built);
            }
        }
    }
}

/// Values of a type by number, each behind a lock of its own, which a patch can migrate while the program runs.
///
/// What is done with a value is a closure that captures nothing, or the path of a function: it gets what it needs as an argument. Whatever
/// it does to the value of *another* number is done by the code of that one's version. Used within itself for the same number, it waits
/// for ever.
pub struct Table<S: State> {
    inner: Arc<Inner>,
    of: PhantomData<fn(S) -> S>,
}

impl<S: State> std::fmt::Debug for Table<S> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Table of {} {}", self.len(), self.inner.id)
    }
}

impl<S: State> Default for Table<S> {
    fn default() -> Self {
        Self::new()
    }
}

impl<S: State> Table<S> {
    /// An empty one. The agent finds it by the id of its states.
    #[must_use]
    pub fn new() -> Self {
        // The entry, whoever asks: code of a patch knows it under the same address.
        let ops = black_box(shims::ops::<S> as Ops);
        let mut asked = Call::new(What::Version, 0, Built { state: null_mut(), version: 0 }, Vec::new());
        // SAFETY: it has no state.
        unsafe { ops(&mut asked) };
        let inner = Arc::new(Inner {
            id: S::ID,
            ops,
            slots: papaya::HashMap::new(),
            arms: AtomicU64::new(0),
            births: RwLock::new(asked.version),
        });
        let mut tables = TABLES.lock();
        tables.retain(|t| t.strong_count() > 0);
        tables.push(Arc::downgrade(&inner));
        Self { inner, of: PhantomData }
    }

    /// Does something with the value of a number; `None` where there is none.
    ///
    /// # Panics
    ///
    /// As the closure. Also where old code meets a new value, which no patch that patch-builder made can do: the value is not touched.
    pub fn with<A, R, F: FnOnce(&mut S, A) -> R + Copy>(&self, id: u64, args: A, _do: F) -> Option<R> {
        let mut args = MaybeUninit::new(args);
        let mut result = MaybeUninit::<R>::uninit();
        let work = black_box(shims::work::<S, A, R, F> as Work);
        if self.inner.run(id, work, args.as_mut_ptr().cast(), result.as_mut_ptr().cast()) {
            // SAFETY: the closure ran: the arguments are taken and the result is there.
            return Some(unsafe { result.assume_init() });
        }
        // SAFETY: nobody took them.
        unsafe { args.assume_init_drop() };
        None
    }

    /// Makes the value of a number, unless there is one; whether it did.
    ///
    /// # Panics
    ///
    /// As the closure.
    pub fn insert<A, F: FnOnce(A) -> S + Copy>(&self, id: u64, args: A, _make: F) -> bool {
        let mut args = MaybeUninit::new(args);
        let build = black_box(shims::build::<S, A, F> as Build);
        let made = self.inner.put(id, build, args.as_mut_ptr().cast());
        if made.is_none() {
            // SAFETY: nobody took them.
            unsafe { args.assume_init_drop() };
        }
        made == Some(true)
    }

    /// Ends the value of a number; whether there was one.
    pub fn remove(&self, id: u64) -> bool {
        self.inner.remove(id)
    }

    /// How many there are.
    #[must_use]
    pub fn len(&self) -> usize {
        self.inner.slots.pin().len()
    }

    /// Whether there is none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The numbers that there are now, in no order.
    #[must_use]
    pub fn ids(&self) -> Vec<u64> {
        self.inner.slots.pin().keys().copied().collect()
    }

    #[cfg(test)]
    pub(super) fn inner(&self) -> &Arc<Inner> {
        &self.inner
    }
}
