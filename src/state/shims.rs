//! The functions through which everything that depends on a state's type is reached.
//!
//! A table calls them by pointers that the optimizer cannot see through, so each such call arrives at the function's own entry, where a
//! patch has its stub. Their signatures name no type of the program, and are the same in all builds.
//!
//! Contract of the `unsafe` in this module:
//! 1. `state` is a value of the version that goes with it, made by [`build`] or [`ops`], locked by the caller, and given to nobody else;
//! 2. `args` points to a value of the argument's type, which is taken once, `result` to room for one of the result's;
//! 3. a closure without captures has no bytes, so a value of it can be made from nothing; there was one, and it is `Copy`.
#![allow(unsafe_code)]

use std::ptr::NonNull;

use super::{State, StateError};

/// Something to do with a locked state.
pub type Work = unsafe fn(state: *mut u8, version: u32, args: *mut u8, result: *mut u8);

/// Makes one.
pub type Build = unsafe fn(args: *mut u8) -> Built;

/// What tables and migrations do with any state.
pub type Ops = unsafe fn(call: &mut Call);

/// A state with the version of the code that made it.
#[derive(Clone, Copy)]
#[repr(C)]
pub struct Built {
    pub state: *mut u8,
    pub version: u32,
}

/// What [`ops`] is to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum What {
    /// Says which version it is.
    Version,
    /// Writes the state as that version writes it.
    Save,
    /// Reads a state from what that version wrote.
    Load,
    /// Ends a state.
    Drop,
    /// Says what is lost on the way to that version.
    Loses,
}

/// A call of [`ops`]: what comes in and what goes out.
#[repr(C)]
pub struct Call {
    pub what: What,
    /// The version that is meant.
    pub other: u32,
    pub state: *mut u8,
    /// The version of the state.
    pub version: u32,
    pub bytes: Vec<u8>,
    pub failed: Option<StateError>,
    pub said: Option<&'static str>,
}

impl Call {
    pub fn new(what: What, other: u32, Built { state, version }: Built, bytes: Vec<u8>) -> Self {
        Self { what, other, state, version, bytes, failed: None, said: None }
    }
}

/// Code of one version and a state of another have met: the memory is not touched.
#[cold]
fn apart<S: State>(version: u32) -> ! {
    panic!(
        "code for version {} of the state {} was given version {version}: nothing of it was touched",
        S::VERSION,
        S::ID
    )
}

const fn no_captures<F>() {
    assert!(size_of::<F>() == 0, "the closure captures something: give it to `with` as an argument");
}

/// Runs a closure on a state.
///
/// # Safety
///
/// Points 1, 2 and 3 of the contract.
#[inline(never)]
pub unsafe fn work<S: State, A, R, F: FnOnce(&mut S, A) -> R + Copy>(
    state: *mut u8,
    version: u32,
    args: *mut u8,
    result: *mut u8,
) {
    const { no_captures::<F>() };
    if version != S::VERSION {
        apart::<S>(version);
    }
    // SAFETY: 1 to 3.
    unsafe {
        let run = NonNull::<F>::dangling().read();
        let args: A = args.cast::<A>().read();
        result.cast::<R>().write(run(&mut *state.cast::<S>(), args));
    }
}

/// Makes a state by a closure.
///
/// # Safety
///
/// Points 2 and 3 of the contract.
#[inline(never)]
pub unsafe fn build<S: State, A, F: FnOnce(A) -> S + Copy>(args: *mut u8) -> Built {
    const { no_captures::<F>() };
    // SAFETY: 2 and 3.
    let state = unsafe {
        let make = NonNull::<F>::dangling().read();
        make(args.cast::<A>().read())
    };
    Built { state: Box::into_raw(Box::new(state)).cast(), version: S::VERSION }
}

/// What does not depend on what the program does with a state.
///
/// # Safety
///
/// Point 1 of the contract, where there is a state.
#[inline(never)]
pub unsafe fn ops<S: State>(call: &mut Call) {
    std::hint::black_box(S::declared());
    if call.what == What::Version {
        call.version = S::VERSION;
        return;
    }
    if matches!(call.what, What::Save | What::Drop) && call.version != S::VERSION {
        apart::<S>(call.version);
    }
    let done = match call.what {
        What::Version => Ok(()),
        What::Save => {
            // SAFETY: 1.
            let state = unsafe { &*call.state.cast::<S>() };
            let written = if call.other == S::VERSION { S::FORMAT.write(state) } else { state.downgrade(call.other) };
            written.map(|bytes| call.bytes = bytes)
        }
        What::Load => {
            let read = if call.other == S::VERSION {
                S::FORMAT.read::<S>(&call.bytes)
            } else {
                S::upgrade(call.other, &call.bytes)
            };
            read.map(|state| (call.state, call.version) = (Box::into_raw(Box::new(state)).cast(), S::VERSION))
        }
        What::Drop => {
            // SAFETY: 1; nobody has it any more.
            drop(unsafe { Box::from_raw(call.state.cast::<S>()) });
            Ok(())
        }
        What::Loses => {
            call.said = S::loses(call.other);
            Ok(())
        }
    };
    call.failed = done.err();
}
