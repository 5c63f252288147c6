//! Which arm of a canary handles a message: decided once, where its handling begins, and the same for every function of the patch until it ends.
//!
//! ```no_run
//! # fn handle(_: &[u8]) {}
//! # let (session_id, message) = (7_u64, [0_u8]);
//! let _scope = livepatch::session::enter(session_id);
//! handle(&message);
//! ```
//!
//! A stub of such a canary looks at one byte of the thread, so what it costs does not depend on the share. The key is mixed with a salt of the
//! patch, and compared with the share in the patch's record: a greater share takes nobody back.
//!
//! Contract of the `unsafe` in this module: a slot points to nothing, or to the shares in the record of a patch. A record is unmapped only by
//! `--reclaim`, which first looks for its address in all memory and all registers, while no thread runs.
#![allow(unsafe_code)]

use std::cell::Cell;
use std::future::Future;
use std::marker::PhantomData;
use std::pin::Pin;
use std::sync::atomic::{fence, AtomicU64, AtomicU8, AtomicUsize, Ordering};
use std::task::{Context, Poll};
use std::time::Instant;

use crate::addr::ProcAddr;
use crate::insn::bucket;
use crate::registry::Arm;
use crate::tally::{self, Tally, BUCKETS};

/// So many canaries by session there can be at once.
pub const SLOTS: usize = 8;

/// Counters of one kind that threads share: none waits for another's.
const SHARDS: usize = 16;

/// One message in so many is timed.
const SAMPLED: u8 = 16;

thread_local! {
    /// A bit for each slot: whether the message that is handled runs the new arm. Constant at first and never dropped: stubs read it.
    static ARMS: Cell<u8> = const { Cell::new(0) };
    /// A bit for each slot that was active when the message that is handled began.
    static ACTIVE_THEN: Cell<u8> = const { Cell::new(0) };
    /// The bits that a state's version decides for now ([`by_version`]): a message that begins within changes none of them.
    static FIXED: Cell<u8> = const { Cell::new(0) };
    /// Which counters are this thread's, plus one; and how many messages it has seen.
    static SHARD: Cell<(u8, u8)> = const { Cell::new((0, 0)) };
}

/// Counters of one thread among some, on cache lines of their own.
#[repr(align(128))]
struct Shard {
    /// Messages in the new arm that are being handled.
    handled: AtomicU64,
    arms: [ArmShard; 2],
}

struct ArmShard {
    messages: AtomicU64,
    panics: AtomicU64,
    failed: AtomicU64,
    ns: AtomicU64,
    took: [AtomicU64; BUCKETS],
}

struct Slot {
    shares: AtomicUsize,
    which: AtomicUsize,
    salt: AtomicU64,
    shards: [Shard; SHARDS],
}

impl Slot {
    const fn new() -> Self {
        const fn zeros<const N: usize>() -> [AtomicU64; N] {
            [const { AtomicU64::new(0) }; N]
        }
        const fn arm() -> ArmShard {
            ArmShard {
                messages: AtomicU64::new(0),
                panics: AtomicU64::new(0),
                failed: AtomicU64::new(0),
                ns: AtomicU64::new(0),
                took: zeros(),
            }
        }
        Self {
            shares: AtomicUsize::new(0),
            which: AtomicUsize::new(0),
            salt: AtomicU64::new(0),
            shards: [const { Shard { handled: AtomicU64::new(0), arms: [arm(), arm()] } }; SHARDS],
        }
    }

    /// Whether a session runs the new arm now.
    fn decide(&self, id: u64) -> bool {
        let (shares, which) = (self.shares.load(Ordering::Acquire), self.which.load(Ordering::Acquire));
        if shares == 0 || which == 0 {
            return false;
        }
        // SAFETY: they point to the words of a record that is mapped: whoever unmaps one (`--reclaim`) does so while no thread runs, and
        // not while a register or memory has such an address.
        let share = unsafe {
            let which = usize::from((which as *const u8).read_volatile() != 0);
            (shares as *const u32).add(which).read_volatile()
        };
        bucket(id, self.salt.load(Ordering::Relaxed)) < share
    }
}

static TABLE: [Slot; SLOTS] = [const { Slot::new() }; SLOTS];
static ACTIVE: AtomicU8 = AtomicU8::new(0);

fn shard() -> (usize, bool) {
    static NEXT: AtomicUsize = AtomicUsize::new(0);
    let (mut mine, seen) = SHARD.get();
    if mine == 0 {
        mine = (NEXT.fetch_add(1, Ordering::Relaxed) % SHARDS) as u8 + 1;
    }
    let seen = seen.wrapping_add(1);
    SHARD.set((mine, seen));
    (usize::from(mine - 1), seen % SAMPLED == 0)
}

/// The arms of one message, for as long as it is handled.
#[derive(Debug)]
struct Decided {
    arms: u8,
    /// The slots that were active when it began.
    active: u8,
    shard: usize,
    began: Option<Instant>,
}

fn bits(set: u8) -> impl Iterator<Item = (u8, &'static Slot)> {
    TABLE.iter().enumerate().map(|(i, slot)| (1u8 << i, slot)).filter(move |(bit, _)| set & bit != 0)
}

impl Decided {
    fn new(id: u64) -> Self {
        let active = ACTIVE.load(Ordering::SeqCst);
        if active == 0 {
            return Self { arms: 0, active, shard: 0, began: None };
        }
        let (shard, timed) = shard();
        let mut arms = 0;
        for (bit, slot) in bits(active) {
            if !slot.decide(id) {
                continue;
            }
            // Whoever ends a canary takes its bit away and then counts: either he sees this message, or it sees that the bit is gone.
            let Some(own) = slot.shards.get(shard) else { continue };
            own.handled.fetch_add(1, Ordering::SeqCst);
            fence(Ordering::SeqCst);
            if ACTIVE.load(Ordering::SeqCst) & bit == 0 {
                own.handled.fetch_sub(1, Ordering::SeqCst);
            } else {
                arms |= bit;
            }
        }
        Self { arms, active, shard, began: timed.then(Instant::now) }
    }

    /// From now on the thread handles this message.
    fn begin(&self) -> Before {
        Before { arms: ARMS.replace(unless_fixed(self.arms)), active: ACTIVE_THEN.replace(self.active) }
    }
}

impl Drop for Decided {
    fn drop(&mut self) {
        if self.active == 0 {
            return;
        }
        let took = self.began.map(|b| b.elapsed());
        let panics = u64::from(std::thread::panicking());
        for (bit, slot) in bits(self.active) {
            let Some(own) = slot.shards.get(self.shard) else { continue };
            let new = self.arms & bit != 0;
            let arm = &own.arms[usize::from(new)];
            arm.messages.fetch_add(1, Ordering::Relaxed);
            arm.panics.fetch_add(panics, Ordering::Relaxed);
            if let Some(took) = took {
                arm.took[tally::bucket(took)].fetch_add(1, Ordering::Relaxed);
                arm.ns.fetch_add(u64::try_from(took.as_nanos()).unwrap_or(0), Ordering::Relaxed);
            }
            if new {
                own.handled.fetch_sub(1, Ordering::SeqCst);
            }
        }
    }
}

/// The handling of one message, on one thread, until it is dropped.
#[derive(Debug)]
#[must_use = "dropped, the message is no longer handled"]
pub struct Scope {
    _decided: Decided,
    _before: Before,
    /// It stays on its thread.
    _thread: PhantomData<*const ()>,
}

/// Begins to handle a message of a session: which arm of each canary it runs is decided now, and stays.
///
/// Within another scope it counts until it ends. Costs a load where no canary by session is applied.
pub fn enter(id: u64) -> Scope {
    let decided = Decided::new(id);
    Scope { _before: decided.begin(), _decided: decided, _thread: PhantomData }
}

/// The arms of a message, but for those that a state's version decides.
fn unless_fixed(arms: u8) -> u8 {
    let fixed = FIXED.get();
    arms & !fixed | ARMS.get() & fixed
}

/// The arms and what was fixed of them before [`by_version`].
#[derive(Debug)]
#[must_use = "dropped, the arms are as before"]
pub(crate) struct ByVersion {
    before: (u8, u8),
    /// It stays on its thread.
    _thread: PhantomData<*const ()>,
}

/// Until it is dropped, the arms of the slots in `mask` are new or old, whatever message is handled.
pub(crate) fn by_version(mask: u8, new: bool) -> ByVersion {
    let before = (ARMS.get(), FIXED.get());
    ARMS.set(if new { before.0 | mask } else { before.0 & !mask });
    FIXED.set(before.1 | mask);
    ByVersion { before, _thread: PhantomData }
}

impl Drop for ByVersion {
    fn drop(&mut self) {
        ARMS.set(self.before.0);
        FIXED.set(self.before.1);
    }
}

/// The message around the one that begins, put back when that one ends, or panics.
#[derive(Debug)]
struct Before {
    arms: u8,
    active: u8,
}

impl Drop for Before {
    fn drop(&mut self) {
        ARMS.set(self.arms);
        ACTIVE_THEN.set(self.active);
    }
}

/// The message that this thread handles has failed, for the figures of its arms.
pub(crate) fn failed() {
    let active = ACTIVE_THEN.get();
    if active == 0 {
        return;
    }
    let (shard, _) = shard();
    for (bit, slot) in bits(active) {
        let Some(own) = slot.shards.get(shard) else { continue };
        own.arms[usize::from(ARMS.get() & bit != 0)].failed.fetch_add(1, Ordering::Relaxed);
    }
}

pin_project_lite::pin_project! {
    /// A future that handles one message of a session, whatever threads poll it.
    #[derive(Debug)]
    pub struct Scoped<F> {
        #[pin]
        inner: F,
        decided: Decided,
    }
}

/// Handles a message of a session in a future: its arm is decided now, and is that of every poll.
pub fn scope<F: Future>(id: u64, future: F) -> Scoped<F> {
    Scoped { inner: future, decided: Decided::new(id) }
}

impl<F: Future> Future for Scoped<F> {
    type Output = F::Output;

    fn poll(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<F::Output> {
        let this = self.project();
        let _before = this.decided.begin();
        this.inner.poll(context)
    }
}

/// Where the byte is that stubs look at, from the thread's control block; `None` where that differs from thread to thread, as in a library
/// that was loaded later.
#[must_use]
pub fn offset() -> Option<i32> {
    fn here() -> i64 {
        let base: i64;
        // SAFETY: the first word of a thread's control block is its own address (ELF handling for thread-local storage, x86-64).
        unsafe { core::arch::asm!("mov {}, fs:[0]", out(reg) base, options(nostack, preserves_flags, readonly)) };
        ARMS.with(|arms| (std::ptr::from_ref(arms) as i64).wrapping_sub(base))
    }
    let there = std::thread::spawn(here).join().ok()?;
    (there == here()).then_some(there).and_then(|o| i32::try_from(o).ok())
}

/// Takes a slot that none of `used` has.
#[must_use]
pub fn free_slot(used: &[u8]) -> Option<u8> {
    (0..SLOTS as u8).find(|slot| !used.contains(slot))
}

/// Where the record of a canary has its shares, and what its keys are mixed with.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Words {
    /// Two words of four bytes.
    pub shares: ProcAddr,
    /// The byte that says which of them counts.
    pub which: ProcAddr,
    /// The salt.
    pub salt: u64,
}

/// Lets messages that begin from now on run the canary of this slot.
pub(crate) fn open(slot: u8, Words { shares, which, salt }: Words) {
    let Some(place) = TABLE.get(usize::from(slot)) else { return };
    place.shares.store(shares.0 as usize, Ordering::SeqCst);
    place.which.store(which.0 as usize, Ordering::SeqCst);
    place.salt.store(salt, Ordering::SeqCst);
    for shard in &place.shards {
        for arm in &shard.arms {
            [&arm.messages, &arm.panics, &arm.failed, &arm.ns]
                .into_iter()
                .chain(&arm.took)
                .for_each(|n| n.store(0, Ordering::Relaxed));
        }
    }
    ACTIVE.fetch_or(1 << slot, Ordering::SeqCst);
}

/// No message that begins from now on runs the canary; whether none that began before still does.
#[must_use]
pub fn close(slot: u8) -> bool {
    ACTIVE.fetch_and(!(1u8.checked_shl(slot.into()).unwrap_or(0)), Ordering::SeqCst);
    fence(Ordering::SeqCst);
    let ended = handled(slot) == 0;
    if let Some(place) = TABLE.get(usize::from(slot)).filter(|_| ended) {
        place.shares.store(0, Ordering::SeqCst);
        place.which.store(0, Ordering::SeqCst);
    }
    ended
}

/// How many messages are being handled in the new arm.
#[must_use]
pub fn handled(slot: u8) -> u64 {
    let place = TABLE.get(usize::from(slot));
    place.map_or(0, |p| p.shards.iter().map(|s| s.handled.load(Ordering::SeqCst)).fold(0, u64::wrapping_add))
}

/// What the old arm and the new one did, since the canary began.
#[must_use]
pub fn tallies(slot: u8) -> [Tally; 2] {
    let Some(place) = TABLE.get(usize::from(slot)) else { return [Tally::default(); 2] };
    [0, 1].map(|arm| {
        let mut out = Tally::default();
        for shard in &place.shards {
            let from = &shard.arms[arm];
            out.all += from.messages.load(Ordering::Relaxed);
            out.panics += from.panics.load(Ordering::Relaxed);
            out.failed += from.failed.load(Ordering::Relaxed);
            out.ns += from.ns.load(Ordering::Relaxed);
            out.took.iter_mut().zip(&from.took).for_each(|(sum, n)| *sum += n.load(Ordering::Relaxed));
        }
        out
    })
}

/// The same, as it is reported.
#[must_use]
pub fn arms(slot: u8) -> [Arm; 2] {
    tallies(slot).map(|t| Arm {
        messages: t.all,
        panics: t.panics,
        failed: t.failed,
        timed: t.timed(),
        p50_ns: t.quantile_ns(50),
        p99_ns: t.quantile_ns(99),
    })
}

/// [`enter`] for C: what [`livepatch_session_leave`] has to get.
#[no_mangle]
pub extern "C" fn livepatch_session_enter(id: u64) -> *mut Scope {
    Box::into_raw(Box::new(enter(id)))
}

/// Ends what [`livepatch_session_enter`] began.
///
/// # Safety
///
/// `scope` came from it, on this thread, and was not given back before.
#[no_mangle]
pub unsafe extern "C" fn livepatch_session_leave(scope: *mut Scope) {
    if !scope.is_null() {
        // SAFETY: the caller's.
        drop(unsafe { Box::from_raw(scope) });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Shares and which, as in a record. Slots are the process's: each test has its own.
    fn record(share: u32) -> &'static (Cell<[u32; 2]>, Cell<u8>) {
        Box::leak(Box::new((Cell::new([share, 0]), Cell::new(0))))
    }

    fn open_at(slot: u8, record: &'static (Cell<[u32; 2]>, Cell<u8>), salt: u64) {
        let [shares, which] = [record.0.as_ptr() as u64, record.1.as_ptr() as u64];
        open(slot, Words { shares: ProcAddr(shares), which: ProcAddr(which), salt });
    }

    #[test]
    fn a_message_keeps_its_arm() {
        let words = record(10_000);
        open_at(7, words, 1);
        let scope = enter(5);
        assert_eq!(ARMS.get() & 1 << 7, 1 << 7);
        words.0.set([0, 0]);
        assert_eq!(ARMS.get() & 1 << 7, 1 << 7, "the share changed while it is handled");
        {
            let _other = enter(6);
            assert_eq!(ARMS.get() & 1 << 7, 0);
        }
        assert_eq!(ARMS.get() & 1 << 7, 1 << 7);
        assert!(!close(7) && handled(7) == 1);
        failed();
        drop(scope);
        failed();
        assert!(close(7));
        assert_eq!(ARMS.get() & 1 << 7, 0);
        let [old, new] = arms(7);
        assert_eq!((old.messages, new.messages), (1, 1));
        assert_eq!((old.failed, new.failed), (0, 1), "outside of a message nothing is counted");
    }

    #[test]
    fn the_version_of_a_state_goes_before_the_share() {
        let words = record(10_000);
        open_at(3, words, 1);
        let bit = 1 << 3;
        {
            let _old = by_version(bit, false);
            let _message = enter(5);
            assert_eq!(ARMS.get() & bit, 0, "the share says new, the state is old");
            {
                let _new = by_version(bit, true);
                assert_eq!(ARMS.get() & bit, bit);
            }
            assert_eq!(ARMS.get() & bit, 0);
        }
        {
            let _message = enter(5);
            assert_eq!(ARMS.get() & bit, bit);
        }
        assert!(close(3));
    }

    #[test]
    fn a_growing_share_takes_nobody_back() {
        let words = record(0);
        open_at(6, words, 99);
        let mut before = vec![false; 10_000];
        for share in [1u32, 10, 100, 2_500, 10_000] {
            words.0.set([share, 0]);
            let now: Vec<bool> = (0..10_000)
                .map(|id| {
                    let _s = enter(id);
                    ARMS.get() & 1 << 6 != 0
                })
                .collect();
            assert!(before.iter().zip(&now).all(|(b, n)| !b || *n), "{share}");
            before = now;
        }
        assert!(before.iter().all(|b| *b) && close(6));
    }

    #[test]
    fn a_future_has_its_arm_in_every_poll() {
        let words = record(10_000);
        open_at(5, words, 3);
        let mut polls = 0;
        let inner = std::future::poll_fn(|_| {
            polls += 1;
            assert_eq!(ARMS.get() & 1 << 5, 1 << 5);
            if polls == 3 {
                Poll::Ready(())
            } else {
                Poll::Pending
            }
        });
        let mut future = Box::pin(scope(1, inner));
        words.0.set([0, 0]);
        let mut context = Context::from_waker(std::task::Waker::noop());
        while future.as_mut().poll(&mut context).is_pending() {
            assert_eq!(ARMS.get() & 1 << 5, 0);
        }
        assert_eq!(handled(5), 1);
        drop(future);
        assert!(close(5));
    }

    #[test]
    fn the_byte_is_where_every_thread_has_it() {
        assert!(offset().is_some());
        assert_eq!(free_slot(&[0, 1, 3]), Some(2));
        assert_eq!(free_slot(&[0, 1, 2, 3, 4, 5, 6, 7]), None);
    }

    #[test]
    fn ends_and_beginnings_meet() {
        let words = record(10_000);
        for _ in 0..200 {
            open_at(4, words, 0);
            std::thread::scope(|s| {
                let worker = s.spawn(|| (0..200).for_each(|id| drop(enter(id))));
                while !close(4) {
                    std::hint::spin_loop();
                }
                // Whoever begins now runs the old arm.
                worker.join().unwrap();
                assert_eq!(handled(4), 0);
            });
        }
    }
}
