//! The agent's own heap, in a program that installs it over a counting allocator. One arena and one allocator serve
//! the whole process, so the cases run one after the other.
#![allow(unsafe_code)]

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::collections::{BTreeMap, HashMap};
use std::sync::atomic::{AtomicIsize, Ordering::Relaxed};
use std::sync::mpsc;
use std::thread;

use livepatch::agent::heap::{self, Heap, HeapError, Usage};

thread_local! {
    /// Calls of the inner allocator that this thread made.
    static CALLS: Cell<u64> = const { Cell::new(0) };
}

/// Bytes of the inner allocator that are given out.
static OUTSIDE: AtomicIsize = AtomicIsize::new(0);

struct Counting;

// SAFETY: passes everything on to the system's allocator.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        CALLS.set(CALLS.get() + 1);
        OUTSIDE.fetch_add(layout.size() as isize, Relaxed);
        // SAFETY: the caller's promise.
        unsafe { System.alloc(layout) }
    }
    unsafe fn dealloc(&self, block: *mut u8, layout: Layout) {
        CALLS.set(CALLS.get() + 1);
        OUTSIDE.fetch_sub(layout.size() as isize, Relaxed);
        // SAFETY: the caller's promise.
        unsafe { System.dealloc(block, layout) }
    }
}

#[global_allocator]
static HEAP: Heap<Counting> = Heap::over(Counting);

const ARENA: usize = 4 << 20;

fn main() {
    // What asks for the list of tests gets one, for the cases need each other.
    if std::env::args().any(|a| a == "--list") {
        if !std::env::args().any(|a| a == "--ignored") {
            println!("cases: test");
        }
        return;
    }
    let cases: &[(&str, fn())] = &[
        ("reserved once", reserve),
        ("ten thousand rounds leave both heaps as they were", rounds),
        ("whoever frees", across_threads),
        ("odd layouts", odd_layouts),
        ("zeroed memory is zero", zeroed),
        ("a full arena", exhausted),
        ("growing out of a full arena", growth),
        ("guards nest", nesting),
        ("many threads", storm),
        ("children of fork", forked),
    ];
    for (name, case) in cases {
        let before = heap::usage().used;
        // in a thread of its own, whose end gives back what it had
        thread::spawn(*case).join().unwrap_or_else(|_| panic!("{name}"));
        assert_eq!(heap::usage().used, before, "{name}: something of the arena is still given out");
        println!("{name}: ok");
    }
}

fn calls() -> u64 {
    CALLS.get()
}

/// The bytes that glibc has given out in all its arenas.
fn glibc_used() -> usize {
    #[cfg(target_env = "gnu")]
    // SAFETY: figures only.
    return unsafe { libc::mallinfo2() }.uordblks;
    #[cfg(not(target_env = "gnu"))]
    0
}

fn reserve() {
    assert!(!heap::is_installed());
    {
        let _inside = heap::enter();
        let before = calls();
        drop(vec![1_u8; 100]);
        assert_eq!(calls(), before + 2);
    }
    assert_eq!(heap::usage(), Usage::default());
    assert!(matches!(heap::reserve(10, false), Err(HeapError::TooSmall { bytes: 10 })));
    assert!(matches!(heap::reserve(usize::MAX, false), Err(HeapError::TooSmall { .. })));
    let reserved = heap::reserve(ARENA - 1, true).expect("an arena");
    println!("locked: {:?}", reserved.not_locked.as_ref().map_or(Ok(()), Err));
    assert_eq!((reserved.bytes, heap::usage().reserved), (ARENA, ARENA));
    assert!(matches!(heap::reserve(ARENA, false), Err(HeapError::Twice)));
    assert!(heap::is_installed());
}

/// What a patch cycle might do: many kinds and sizes, grown, shrunk, kept for a while.
fn work(round: usize, kept: &mut Vec<Vec<u8>>) {
    let mut text = String::new();
    for n in 0..round % 40 {
        text.push_str(&format!("{n} of {round}, "));
    }
    text.shrink_to_fit();
    let map: HashMap<usize, String> = (0..round % 30).map(|n| (n, text.clone())).collect();
    let tree: BTreeMap<usize, Box<[u64]>> = (0..round % 20).map(|n| (n, vec![n as u64; n * 7].into())).collect();
    assert!(map.values().all(|v| *v == text));
    assert!(tree.iter().all(|(n, v)| v.iter().all(|w| *w == *n as u64)));
    if kept.len() > 20 {
        let old = kept.swap_remove(round % 20);
        assert!(old.iter().all(|b| *b == old[0]));
    }
    let mut bytes = vec![round as u8; 1 + round * 37 % 3000];
    bytes.resize(bytes.len() * 2, round as u8);
    bytes.shrink_to(bytes.len() / 3);
    kept.push(bytes);
}

fn rounds() {
    let _inside = heap::enter();
    let once = || {
        let mut kept = Vec::new();
        (0..10_000).for_each(|round| work(round, &mut kept));
    };
    let mut kept = Vec::new();
    work(1, &mut kept); // what std sets up once for a thread
    drop(kept);
    let before = (heap::usage().used, calls(), OUTSIDE.load(Relaxed), glibc_used());
    once();
    assert_eq!((heap::usage().used, calls(), OUTSIDE.load(Relaxed), glibc_used()), before);
    let usage = heap::usage();
    assert!(usage.peak > 10_000 && usage.peak < ARENA && usage.fallbacks == 0, "{usage:?}");
}

fn across_threads() {
    let make = || (0..500).map(|n| vec![n as u8; n + 1]).collect::<Vec<_>>();
    thread::spawn(|| ()).join().unwrap(); // what std sets up once for a thread
    let (start, outside) = (heap::usage().used, OUTSIDE.load(Relaxed));
    let agent = thread::spawn(move || {
        let _inside = heap::enter();
        make()
    });
    let (mine, theirs) = (agent.join().unwrap(), make());
    assert!(heap::usage().used > start + 500 * 250);
    // the program grows and frees what is the agent's: it stays in the arena
    let before = calls();
    let grown: usize = mine.into_iter().map(|mut v| v.splice(..0, [1, 2, 3]).count() + v.len()).sum();
    assert_eq!((grown, calls(), heap::usage().used), (500 * 501 / 2 + 500 * 3, before, start));
    // the agent frees what is the program's
    let agent = thread::spawn(|| {
        let _inside = heap::enter();
        drop(theirs);
    });
    agent.join().unwrap();
    assert_eq!((heap::usage().used, OUTSIDE.load(Relaxed)), (start, outside));
}

fn odd_layouts() {
    let _inside = heap::enter();
    let fallbacks = heap::usage().fallbacks;
    for align in (0..=20).map(|n| 1_usize << n) {
        for size in [0, 1, 7, 24, 4096, 100_000] {
            let layout = Layout::from_size_align(size, align).unwrap();
            // SAFETY: freed with the layout that it was made with, grown with its own.
            unsafe {
                let block = HEAP.alloc(layout);
                assert!(!block.is_null() && (block as usize).is_multiple_of(align));
                block.write_bytes(0xa5, size);
                let block = HEAP.realloc(block, layout, size * 2 + 1);
                assert!(!block.is_null() && (block as usize).is_multiple_of(align));
                assert!((0..size).all(|n| *block.add(n) == 0xa5));
                let block = HEAP.realloc(block, Layout::from_size_align(size * 2 + 1, align).unwrap(), 1);
                assert!(size == 0 || *block == 0xa5);
                HEAP.dealloc(block, Layout::from_size_align(1, align).unwrap());
            }
        }
    }
    assert_eq!(heap::usage().fallbacks, fallbacks);
    let layout = Layout::from_size_align(64, 32 << 20).unwrap();
    // SAFETY: as above.
    unsafe {
        let block = HEAP.alloc(layout);
        assert!(!block.is_null() && (block as usize).is_multiple_of(layout.align()));
        HEAP.dealloc(block, layout);
    }
}

fn zeroed() {
    let _inside = heap::enter();
    drop(vec![0xff_u8; ARENA / 2]);
    let zeros = vec![0_u8; ARENA / 2];
    assert!(zeros.iter().all(|b| *b == 0));
}

fn exhausted() {
    let _inside = heap::enter();
    let before = heap::usage();
    let blocks: Vec<Vec<u8>> = (0..100).map(|n| vec![n as u8; ARENA / 50]).collect();
    let full = heap::usage();
    assert!(full.fallbacks >= before.fallbacks + 50, "{full:?}");
    assert!(full.used > ARENA * 9 / 10 && full.used < ARENA && full.peak >= full.used);
    assert!(blocks.iter().enumerate().all(|(n, b)| b.iter().all(|x| *x == n as u8)));
    drop(blocks);
    assert_eq!(heap::usage().used, before.used);
    let whole: Vec<u8> = Vec::with_capacity(ARENA * 9 / 10);
    assert_eq!(heap::usage().fallbacks, full.fallbacks, "freed memory comes together again");
    drop(whole);
}

fn growth() {
    let _inside = heap::enter();
    let before = heap::usage();
    let mut bytes: Vec<u8> = Vec::new();
    while bytes.len() < ARENA * 2 {
        bytes.push((bytes.len() % 251) as u8);
    }
    let moved = heap::usage();
    assert!(moved.fallbacks > before.fallbacks);
    assert_eq!(moved.used, before.used, "it left the arena");
    assert!(bytes.iter().enumerate().all(|(n, b)| *b == (n % 251) as u8));
    bytes.truncate(10);
    bytes.shrink_to_fit();
    assert_eq!(heap::usage().used, before.used, "it stays where it is");
}

fn nesting() {
    let is_inside = || {
        let before = heap::usage().used;
        let block = std::hint::black_box(Box::new(1_u64));
        let inside = heap::usage().used != before;
        drop(block);
        inside
    };
    assert!(!is_inside());
    let outer = heap::enter();
    assert!(is_inside());
    {
        let _again = heap::enter();
        let _program = heap::leave();
        assert!(!is_inside());
    }
    assert!(is_inside());
    drop(outer);
    assert!(!is_inside());
    thread::spawn(move || assert!(!is_inside())).join().unwrap();
}

fn storm() {
    let before = heap::usage().used;
    let mut threads = Vec::new();
    for agent in [true, false, true, false] {
        let (sender, receiver) = mpsc::channel::<Vec<u8>>();
        threads.push(thread::spawn(move || {
            let _inside = agent.then(heap::enter);
            for n in 0..20_000_usize {
                sender.send(vec![n as u8; 1 + n * 31 % 700]).unwrap();
            }
        }));
        threads.push(thread::spawn(move || {
            let _inside = (!agent).then(heap::enter);
            for mut bytes in receiver {
                let first = bytes[0];
                bytes.extend_from_within(..bytes.len() / 2);
                assert!(bytes.iter().all(|b| *b == first));
            }
        }));
    }
    // joined, not only done: what a thread keeps for itself is freed at its end
    threads.into_iter().for_each(|t| t.join().unwrap());
    assert_eq!(heap::usage().used, before);
}

fn forked() {
    let stop = std::sync::atomic::AtomicBool::new(false);
    thread::scope(|s| {
        for _ in 0..2 {
            s.spawn(|| {
                let _inside = heap::enter();
                while !stop.load(Relaxed) {
                    drop(std::hint::black_box(vec![1_u8; 300]));
                }
            });
        }
        for _ in 0..200 {
            let of_the_agent = {
                let _inside = heap::enter();
                Box::new([7_u8; 64])
            };
            // SAFETY: the child uses the agent's heap, which is what is tried, and ends.
            unsafe {
                let child = libc::fork();
                if child == 0 {
                    libc::alarm(10);
                    drop(of_the_agent);
                    let _inside = heap::enter();
                    drop(std::hint::black_box(vec![1_u8; 300]));
                    libc::_exit(7);
                }
                let mut status = 0;
                assert_eq!(libc::waitpid(child, &mut status, 0), child);
                assert_eq!(status, 7 << 8);
            }
        }
        stop.store(true, Relaxed);
    });
}
