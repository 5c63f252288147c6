//! A program that patches itself: it loads a library, lets it start threads of its own, and applies patches of that library while they run.
//!
//! ```text
//! inside LIBRARY.so [SOCKET [KEYS]]  then, on standard input: apply FIX.so | revert | flip COUNT FIX.so... | ask QUESTION | own | arena | quit
//! ```
//!
//! `flip` applies and reverts so often in all, each of the patches in turn; `arena` tells of the memory that the agent keeps for itself.
//! `own` asks the program itself: what is patched need not be a library.
//!
//! The library has `void start(void *(*enter)(unsigned long id), void (*leave)(void *))`, which gets what begins and ends the handling of a
//! session's message, and `const char *ask(const char *question)`.
#![allow(unsafe_code)]

use std::ffi::{c_char, c_void, CString};
use std::io::BufRead;
use std::time::Duration;

use livepatch::agent::heap::{self, Heap};
use livepatch::patcher::Options;
use livepatch::session::{self, Scope};
use livepatch::Agent;

#[global_allocator]
static HEAP: Heap = Heap::new();

/// What a patch of this executable replaces.
// SAFETY: no other function has this name.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn own_version(of: i32) -> i32 {
    std::hint::black_box(of) * 3 - 2
}

/// Applies and reverts so often, each of the patches in turn; the figures of all, in JSON. What else belongs to a cycle of a program that is
/// patched for weeks (a migration, a module that is loaded and let go) goes in here.
fn flip(
    count: u32,
    paths: &[&str],
    options: &Options,
    agent: &Agent,
) -> Result<serde_json::Value, Box<dyn std::error::Error>> {
    let patches = paths.iter().map(std::fs::read).collect::<Result<Vec<_>, _>>()?;
    let mut turn = patches.iter().cycle();
    let (mut trapping, mut failures, mut applied) = (Vec::new(), std::collections::BTreeMap::new(), false);
    let mut sums = [0u64; 5];
    for _ in 0..count {
        let done = if applied { agent.revert(options) } else { agent.apply(turn.next().ok_or("no patch")?, options) };
        match done.map(|report| report.within) {
            Ok(within) => {
                applied = !applied;
                let Some(w) = within else { continue };
                trapping.push(w.trapping_us);
                let more = [w.trapped, w.stayed, w.signals, w.restarted, w.interrupted];
                sums.iter_mut().zip(more).for_each(|(sum, more)| *sum += more);
            }
            Err(e) => *failures.entry(e.to_string()).or_insert(0u32) += 1,
        }
    }
    trapping.sort_by(f64::total_cmp);
    let at = |share: f64| trapping.get((trapping.len().saturating_sub(1) as f64 * share) as usize);
    let [trapped, stayed, signals, restarted, interrupted] = sums;
    Ok(serde_json::json!({
        "flips": trapping.len(), "failures": failures,
        "trapping_us": {"min": at(0.0), "median": at(0.5), "p99": at(0.99), "max": at(1.0)},
        "trapped": trapped, "stayed": stayed, "signals": signals, "restarted": restarted, "interrupted": interrupted,
    }))
}

type Start = extern "C" fn(extern "C" fn(u64) -> *mut Scope, unsafe extern "C" fn(*mut Scope));

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let path = CString::new(std::env::args().nth(1).ok_or("which library?")?)?;
    // SAFETY: the library is the user's, and so is what it runs.
    let (start, ask) = unsafe {
        let library = libc::dlopen(path.as_ptr(), libc::RTLD_NOW);
        assert!(!library.is_null(), "it can't be loaded");
        let find = |name: &std::ffi::CStr| libc::dlsym(library, name.as_ptr());
        let (start, ask) = (find(c"start"), find(c"ask"));
        assert!(!start.is_null() && !ask.is_null(), "it has no start or no ask");
        (
            std::mem::transmute::<*mut c_void, Start>(start),
            std::mem::transmute::<*mut c_void, extern "C" fn(*const c_char) -> *const c_char>(ask),
        )
    };
    let mut builder = Agent::builder().arena(64 << 20);
    if let Some(socket) = std::env::args().nth(2) {
        builder = builder.socket(socket);
    }
    if let Some(keys) = std::env::args().nth(3) {
        builder = builder.keys(keys);
    }
    let agent = builder.start()?;
    start(session::livepatch_session_enter, session::livepatch_session_leave);
    println!("ready");
    for line in std::io::stdin().lock().lines() {
        let line = line?;
        let (word, rest) = line.split_once(' ').unwrap_or((&line, ""));
        let options = Options { timeout: Duration::from_secs(5), ..Options::default() };
        let said = match word {
            "apply" => agent.apply(&std::fs::read(rest)?, &options),
            "flip" => {
                let (count, paths) = rest.split_once(' ').ok_or("flip COUNT FIX.so...")?;
                let paths: Vec<&str> = paths.split(' ').collect();
                println!("{}", flip(count.parse()?, &paths, &options, &agent)?);
                continue;
            }
            "arena" => {
                let usage = heap::usage();
                let json = serde_json::json!({
                    "reserved": usage.reserved, "used": usage.used, "peak": usage.peak, "fallbacks": usage.fallbacks,
                });
                println!("{json}");
                continue;
            }
            "revert" => agent.revert(&options),
            "own" => {
                println!("{}", own_version(std::hint::black_box(1)));
                continue;
            }
            "metrics" => {
                println!("{}", agent.metrics());
                continue;
            }
            "ask" => {
                let question = CString::new(rest)?;
                // SAFETY: it gives a text that ends with a zero byte, until it is asked again.
                println!("{}", unsafe { std::ffi::CStr::from_ptr(ask(question.as_ptr())) }.to_string_lossy());
                continue;
            }
            _ => break,
        };
        match said {
            Ok(report) => println!("{}", serde_json::to_string(&report)?),
            Err(e) => println!("error {}: {}", e.exit_code(), e.to_string().replace('\n', "; ")),
        }
    }
    Ok(())
}
