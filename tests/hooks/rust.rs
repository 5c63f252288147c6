//! A program, or with `--cfg library` a library of examples/inside.rs, with hooks that are written with `#[livepatch::hook]`.
use std::sync::atomic::{AtomicI64, Ordering::Relaxed};

static MODE: AtomicI64 = AtomicI64::new(0);
static RAN: AtomicI64 = AtomicI64::new(0);

#[inline(never)]
pub fn version(of: i64) -> i64 {
    std::hint::black_box(of) * if cfg!(new) { 2 } else { 1 }
}

#[cfg(new)]
mod hooks {
    use super::{Relaxed, MODE, RAN};

    #[derive(Debug)]
    pub struct Cold(i64);

    impl std::fmt::Display for Cold {
        fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
            write!(f, "the cache is cold: {}", self.0)
        }
    }

    #[livepatch::hook(pre_apply)]
    fn check() -> Result<(), String> {
        RAN.fetch_add(1, Relaxed);
        match MODE.load(Relaxed) {
            1 => Err("no limits are loaded: größer als nötig".into()),
            2 => panic!("index {} of {}", MODE.load(Relaxed), 0),
            3 => Err("ä".repeat(2000)),
            _ => Ok(()),
        }
    }

    #[cfg_attr(agent, livepatch::hook(post_apply, agent))]
    #[cfg_attr(not(agent), livepatch::hook(post_apply))]
    fn warm() -> Result<(), Cold> {
        RAN.fetch_add(10, Relaxed);
        if MODE.load(Relaxed) == 4 { Err(Cold(4)) } else { Ok(()) }
    }

    #[livepatch::hook(pre_revert)]
    fn before() {
        RAN.fetch_add(100, Relaxed);
        if MODE.load(Relaxed) == 4 { panic!("not warm") }
    }

    #[livepatch::hook(post_revert)]
    fn after() {
        RAN.fetch_add(1000, Relaxed);
    }
}

#[inline(never)]
fn answer(line: &str) -> String {
    if let Some(mode) = line.strip_prefix("mode ") {
        MODE.store(mode.parse().unwrap(), Relaxed);
    }
    std::hint::black_box((&MODE, &RAN));
    let version = std::hint::black_box(version as fn(i64) -> i64);
    format!("v{} {}", version(1), RAN.load(Relaxed))
}

#[cfg(not(library))]
fn main() {
    for (n, line) in std::io::stdin().lines().enumerate() {
        println!("{} {}", n + 1, answer(&line.unwrap()));
    }
}

#[cfg(library)]
mod library {
    use std::ffi::{c_char, c_void, CStr, CString};

    #[no_mangle]
    extern "C" fn start(_enter: *const c_void, _leave: *const c_void) {}

    #[no_mangle]
    extern "C" fn ask(line: *const c_char) -> *const c_char {
        let line = unsafe { CStr::from_ptr(line) }.to_str().unwrap();
        CString::new(super::answer(line)).unwrap().into_raw()
    }
}
