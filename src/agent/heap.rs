//! A heap of the agent's own, so that patching leaves the program's heap as it was.
//!
//! ```no_run
//! #[global_allocator]
//! static HEAP: livepatch::agent::heap::Heap = livepatch::agent::heap::Heap::new();
//! ```
//!
//! Memory that a thread asks for between [`enter`] and the end of its guard comes from one arena, which is reserved
//! once ([`reserve`]); everything else comes from the program's allocator. Freeing goes by address, whoever frees. A
//! full arena is no error: the program's allocator serves then, and [`usage`] counts it.
//!
//! What the C library allocates for itself (`opendir`, `pthread_create`) does not come here.
//!
//! The arena is [`talc`]'s, behind a lock of two words that allocates nothing. The lock is held over `fork`, so a
//! child can free what its parent's agent made.
//!
//! Contract of the `unsafe` in this module:
//! 1. a block whose address lies in the arena was given out by it, with the layout that comes back with it (the
//!    caller of a `GlobalAlloc` promises that), and every other block by the inner allocator;
//! 2. the arena is touched only while its lock is held;
//! 3. the arena's memory is a mapping of its own that is never given back and that nobody else knows.
#![allow(unsafe_code)]

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::{Cell, UnsafeCell};
use std::io;
use std::marker::PhantomData;
use std::ptr::{self, null_mut, NonNull};
use std::sync::atomic::{AtomicU32, AtomicUsize, Ordering};

use talc::{ErrOnOom, Span, Talc};
use thiserror::Error;

thread_local! {
    /// Whether this thread works for the agent. Constant at first and never dropped: readable in an allocator.
    static INSIDE: Cell<bool> = const { Cell::new(false) };
}

/// The least that an arena can be: its own tables take about one KiB.
const MIN_BYTES: usize = 64 << 10;

static ARENA: Arena = Arena {
    lock: Lock::new(),
    heap: UnsafeCell::new(Talc::new(ErrOnOom)),
    base: AtomicUsize::new(0),
    len_bytes: AtomicUsize::new(0),
    used: AtomicUsize::new(0),
    peak: AtomicUsize::new(0),
    fallbacks: AtomicUsize::new(0),
};

/// Why there is no arena.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum HeapError {
    /// There is one.
    #[error("the agent's heap is reserved already")]
    Twice,
    /// Too little was asked for.
    #[error("{bytes} bytes are too little for the agent's heap, which needs {MIN_BYTES}")]
    TooSmall {
        /// What was asked for.
        bytes: usize,
    },
    /// The kernel gave no memory, or no way to keep it whole over `fork`.
    #[error("no memory for the agent's heap: {0}")]
    Refused(#[from] io::Error),
}

/// What [`reserve`] got.
#[derive(Debug)]
pub struct Reserved {
    /// The size of the arena.
    pub bytes: usize,
    /// Why it is not held in memory although that was asked for: mostly RLIMIT_MEMLOCK. Everything works, but the
    /// first use of a page costs a fault.
    pub not_locked: Option<io::Error>,
}

/// The arena in figures.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Usage {
    /// The size of the arena in bytes; 0 before [`reserve`].
    pub reserved: usize,
    /// What is given out, in bytes as asked for.
    pub used: usize,
    /// The most that was ever given out at once.
    pub peak: usize,
    /// How often the agent got memory of the program's allocator, because the arena had none.
    pub fallbacks: usize,
}

/// While it lives, its thread allocates from the arena, or from the program's heap again: see [`enter`], [`leave`].
#[derive(Debug)]
#[must_use = "the thread goes back at once"]
pub struct Inside {
    before: bool,
    /// The flag is the thread's own.
    stays: PhantomData<*const ()>,
}

impl Drop for Inside {
    fn drop(&mut self) {
        INSIDE.set(self.before);
    }
}

/// From here on this thread allocates from the arena, until the guard is dropped. Guards nest.
pub fn enter() -> Inside {
    Inside { before: INSIDE.replace(true), stays: PhantomData }
}

/// Within [`enter`]: code of the program is called, whose memory is the program's.
pub fn leave() -> Inside {
    Inside { before: INSIDE.replace(false), stays: PhantomData }
}

/// Reserves the arena, once for the life of the process: one mapping of `bytes`, rounded up to whole pages, held in
/// memory if `lock` says so and the kernel permits. Handlers of `pthread_atfork` that allocate or free in the arena are
/// to be registered after this.
///
/// # Errors
/// Where there is one already, where `bytes` are too few, and where the kernel has none.
pub fn reserve(bytes: usize, lock: bool) -> Result<Reserved, HeapError> {
    const PAGE: usize = 4096;
    if bytes < MIN_BYTES {
        return Err(HeapError::TooSmall { bytes });
    }
    let bytes = bytes.checked_next_multiple_of(PAGE).ok_or(HeapError::TooSmall { bytes })?;
    let _held = ARENA.lock.hold();
    if ARENA.len_bytes.load(Ordering::Acquire) != 0 {
        return Err(HeapError::Twice);
    }
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
    // SAFETY: 3: a new mapping, of which nothing else can know.
    let base = unsafe {
        let base = libc::mmap(null_mut(), bytes, libc::PROT_READ | libc::PROT_WRITE, flags, -1, 0);
        if base == libc::MAP_FAILED {
            return Err(io::Error::last_os_error().into());
        }
        // a name in /proc/PID/maps, where the kernel gives any
        libc::prctl(libc::PR_SET_VMA, libc::PR_SET_VMA_ANON_NAME, base, bytes, c"livepatch-agent".as_ptr());
        base
    };
    // SAFETY: the functions only take and give back the lock.
    let failed = unsafe { libc::pthread_atfork(Some(before_fork), Some(after_fork), Some(after_fork)) };
    // SAFETY: 2, 3: readable, writable, nobody else's, and long enough for its tables.
    let claimed = failed == 0 && unsafe { (*ARENA.heap.get()).claim(Span::from_base_size(base.cast(), bytes)).is_ok() };
    if !claimed {
        // SAFETY: 3: nothing of it was given out.
        unsafe { libc::munmap(base, bytes) };
        let why = if failed == 0 { libc::ENOMEM } else { failed };
        return Err(io::Error::from_raw_os_error(why).into());
    }
    // SAFETY: 3: the mapping from above.
    let locked = !lock || unsafe { libc::syscall(libc::SYS_mlock2, base, bytes, 0) } == 0;
    let not_locked = (!locked).then(io::Error::last_os_error);
    ARENA.base.store(base as usize, Ordering::Release);
    ARENA.len_bytes.store(bytes, Ordering::Release);
    Ok(Reserved { bytes, not_locked })
}

/// The figures of the arena.
pub fn usage() -> Usage {
    Usage {
        reserved: ARENA.len_bytes.load(Ordering::Acquire),
        used: ARENA.used.load(Ordering::Relaxed),
        peak: ARENA.peak.load(Ordering::Relaxed),
        fallbacks: ARENA.fallbacks.load(Ordering::Relaxed),
    }
}

/// Does this program allocate through a [`Heap`] with an arena? Without one, [`enter`] does nothing.
pub fn is_installed() -> bool {
    let _inside = enter();
    ARENA.contains(&raw const *Box::new(std::hint::black_box(0_u64)) as usize)
}

extern "C" fn before_fork() {
    ARENA.lock.take();
}

extern "C" fn after_fork() {
    ARENA.lock.give_back();
}

/// A lock that waits in the kernel and allocates nothing: 0 free, 1 taken, 2 taken and waited for.
struct Lock(AtomicU32);

struct Held<'a>(&'a Lock);

impl Drop for Held<'_> {
    fn drop(&mut self) {
        self.0.give_back();
    }
}

impl Lock {
    const fn new() -> Self {
        Self(AtomicU32::new(0))
    }

    fn hold(&self) -> Held<'_> {
        self.take();
        Held(self)
    }

    fn take(&self) {
        for _ in 0..100 {
            if self.0.compare_exchange_weak(0, 1, Ordering::Acquire, Ordering::Relaxed).is_ok() {
                return;
            }
            std::hint::spin_loop();
        }
        while self.0.swap(2, Ordering::Acquire) != 0 {
            self.futex(libc::FUTEX_WAIT, 2);
        }
    }

    fn give_back(&self) {
        if self.0.swap(0, Ordering::Release) == 2 {
            self.futex(libc::FUTEX_WAKE, 1);
        }
    }

    fn futex(&self, what: libc::c_int, value: u32) {
        let what = what | libc::FUTEX_PRIVATE_FLAG;
        // SAFETY: a word of this lock, and no timeout.
        unsafe { libc::syscall(libc::SYS_futex, self.0.as_ptr(), what, value, ptr::null::<libc::timespec>()) };
    }
}

struct Arena {
    lock: Lock,
    heap: UnsafeCell<Talc<ErrOnOom>>,
    base: AtomicUsize,
    /// Stored last: as long as it is 0, no address lies in the arena.
    len_bytes: AtomicUsize,
    used: AtomicUsize,
    peak: AtomicUsize,
    fallbacks: AtomicUsize,
}

// SAFETY: 2.
unsafe impl Sync for Arena {}

impl Arena {
    fn contains(&self, address: usize) -> bool {
        let len_bytes = self.len_bytes.load(Ordering::Acquire);
        len_bytes != 0 && address.wrapping_sub(self.base.load(Ordering::Relaxed)) < len_bytes
    }

    /// Does a request of this thread come here?
    fn is_asked(&self) -> bool {
        INSIDE.get() && self.len_bytes.load(Ordering::Acquire) != 0
    }

    /// The figures, under the lock.
    fn count(&self, less: usize, more: usize) {
        let used = self.used.load(Ordering::Relaxed) - less + more;
        self.used.store(used, Ordering::Relaxed);
        self.peak.fetch_max(used, Ordering::Relaxed);
    }

    /// A block, or none if the arena has no room for it.
    fn alloc(&self, layout: Layout) -> Option<NonNull<u8>> {
        let layout = never_empty(layout);
        let _held = self.lock.hold();
        // SAFETY: 2; the size is not zero.
        let block = unsafe { (*self.heap.get()).malloc(layout).ok()? };
        self.count(0, layout.size());
        Some(block)
    }

    /// # Safety
    /// The block is the arena's, with this layout (1).
    unsafe fn free(&self, block: NonNull<u8>, layout: Layout) {
        let layout = never_empty(layout);
        let _held = self.lock.hold();
        // SAFETY: 2; the block by the caller's promise.
        unsafe { (*self.heap.get()).free(block, layout) };
        self.count(layout.size(), 0);
    }

    /// Another size for a block; it may move inside of the arena. None if there is no room: the block stays.
    ///
    /// # Safety
    /// The block is the arena's, with this layout (1).
    unsafe fn resize(&self, block: NonNull<u8>, layout: Layout, size: usize) -> Option<NonNull<u8>> {
        let (layout, size) = (never_empty(layout), size.max(1));
        let _held = self.lock.hold();
        // SAFETY: 2; the block by the caller's promise, the sizes compared here and not zero.
        let block = unsafe {
            let heap = &mut *self.heap.get();
            if size <= layout.size() {
                heap.shrink(block, layout, size);
                block
            } else {
                heap.grow(block, layout, size).ok()?
            }
        };
        self.count(layout.size(), size);
        Some(block)
    }
}

/// A layout of at least one byte.
fn never_empty(layout: Layout) -> Layout {
    if layout.size() == 0 {
        Layout::from_size_align(1, layout.align()).unwrap_or(layout)
    } else {
        layout
    }
}

/// The allocator that a program installs: the agent's threads get memory of the arena, all others of `A`.
#[derive(Debug, Default)]
pub struct Heap<A = System> {
    inner: A,
}

impl Heap {
    /// Over the system's allocator.
    pub const fn new() -> Self {
        Self { inner: System }
    }
}

impl<A> Heap<A> {
    /// Over an allocator of the program's choice.
    pub const fn over(inner: A) -> Self {
        Self { inner }
    }
}

// SAFETY: a block comes from the arena or from the inner allocator, and its address says from which (1), so each
// gets back what it gave out. Nothing here unwinds.
unsafe impl<A: GlobalAlloc> GlobalAlloc for Heap<A> {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        if ARENA.is_asked() {
            if let Some(block) = ARENA.alloc(layout) {
                return block.as_ptr();
            }
            ARENA.fallbacks.fetch_add(1, Ordering::Relaxed);
        }
        // SAFETY: the caller's promise.
        unsafe { self.inner.alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        if ARENA.is_asked() {
            if let Some(block) = ARENA.alloc(layout) {
                // SAFETY: a new block of this size.
                unsafe { block.as_ptr().write_bytes(0, layout.size()) };
                return block.as_ptr();
            }
            ARENA.fallbacks.fetch_add(1, Ordering::Relaxed);
        }
        // SAFETY: the caller's promise.
        unsafe { self.inner.alloc_zeroed(layout) }
    }

    unsafe fn dealloc(&self, block: *mut u8, layout: Layout) {
        match NonNull::new(block) {
            // SAFETY: 1.
            Some(own) if ARENA.contains(block as usize) => unsafe { ARENA.free(own, layout) },
            // SAFETY: 1, and the caller's promise.
            _ => unsafe { self.inner.dealloc(block, layout) },
        }
    }

    unsafe fn realloc(&self, block: *mut u8, layout: Layout, new_size: usize) -> *mut u8 {
        let Some(own) = NonNull::new(block).filter(|b| ARENA.contains(b.as_ptr() as usize)) else {
            // SAFETY: 1, and the caller's promise.
            return unsafe { self.inner.realloc(block, layout, new_size) };
        };
        // SAFETY: 1.
        if let Some(moved) = unsafe { ARENA.resize(own, layout, new_size) } {
            return moved.as_ptr();
        }
        ARENA.fallbacks.fetch_add(1, Ordering::Relaxed);
        // SAFETY: the caller promises that the new size fits the alignment; both blocks are at least as long as what
        // is copied, and the old one is the arena's (1).
        unsafe {
            let outside = self.inner.alloc(Layout::from_size_align_unchecked(new_size, layout.align()));
            if !outside.is_null() {
                outside.copy_from_nonoverlapping(block, layout.size().min(new_size));
                ARENA.free(own, layout);
            }
            outside
        }
    }
}
