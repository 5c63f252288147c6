//! A program that patches itself: it loads a library, lets it start threads of its own, and applies patches of that library while they run.
//!
//! ```text
//! inside LIBRARY.so          then, on standard input: apply FIX.so | revert | ask QUESTION | quit
//! ```
//!
//! The library has `void start(void)` and `long ask(const char *question)`.
#![allow(unsafe_code)]

use std::ffi::{CString, c_char, c_int, c_void};
use std::io::BufRead;
use std::time::Duration;

use livepatch::patch::PatchFile;
use livepatch::patcher::{Options, Patcher};
use livepatch::switch::Switcher;

/// A trap that is not ours ends the program, as it would without us.
unsafe fn pass_on(_signal: c_int, _info: *mut libc::siginfo_t, _context: *mut c_void) {
    std::process::abort();
}

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
            std::mem::transmute::<*mut c_void, extern "C" fn()>(start),
            std::mem::transmute::<*mut c_void, extern "C" fn(*const c_char) -> i64>(ask),
        )
    };
    let mut switcher = Switcher::install(libc::SIGRTMAX() - 3, pass_on)?;
    start();
    println!("ready");
    for line in std::io::stdin().lock().lines() {
        let line = line?;
        let (word, rest) = line.split_once(' ').unwrap_or((&line, ""));
        let options = Options { timeout: Duration::from_secs(5), ..Options::default() };
        let said = match word {
            "apply" => {
                let patch = PatchFile::parse(&std::fs::read(rest)?)?;
                Patcher::open_own().and_then(|mut p| p.apply_within(&patch, &options, &mut switcher))
            }
            "revert" => Patcher::open_own().and_then(|mut p| p.revert_within(None, &options, &mut switcher)),
            "ask" => {
                println!("{}", ask(CString::new(rest)?.as_ptr()));
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
