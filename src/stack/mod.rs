//! Which functions a held thread may still be inside.
//!
//! Bias: a thread is proven clear or it is not clear. [`WatchList`] is sound: a thread without a hit has no
//! frame of a watched function. [`Unwinder`] is precise: it may clear a hit, but only by an unwind, with full CFI, that
//! reaches the thread's root.

mod cfi;
mod unwind;
mod watch;

pub use cfi::Cfi;
pub use unwind::{Frame, UnwindError, Unwinder};
pub use watch::{Part, WatchList, Watched};
