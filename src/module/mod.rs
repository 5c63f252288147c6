//! Business logic in modules: shared libraries behind an interface, of which the program holds a handle and not the objects.
//!
//! ```no_run
//! use livepatch::module::{interface, Handle};
//!
//! interface! {
//!     /// What an order costs.
//!     pub trait Pricing, table PricingTable, version "1.0";
//!     /// In hundredths.
//!     fn fee(&self, qty: i64, price: i64) -> i64;
//! }
//!
//! let handle = Handle::<PricingTable>::new();
//! let first = handle.load("pricing-1.so".as_ref())?;
//! handle.switch(first)?;
//! println!("{}", handle.enter(4711).fee(100, 5_000));
//!
//! let second = handle.load("pricing-2.so".as_ref())?; // the first goes on
//! handle.weigh(&[(second, 500), (first, 10_000)])?; // 5 % of the sessions
//! handle.switch(second)?; // all of them
//! handle.release(first)?; // when its last call has left
//! # Ok::<(), livepatch::module::LoadError>(())
//! ```
//!
//! docs/modules.md says what a module may be, and what each of the two ways to deliver a fix costs.
//!
//! *Invariant:* a module's code first runs when its file was looked through and nothing was found (`check`).
//!
//! *Invariant:* nothing is loaded, ended or unloaded on a thread that calls.

mod check;
mod handle;
mod load;
mod text;

pub use check::{check, Refusal};
pub use handle::{Entered, Handle, Status, VersionId};
pub use livepatch_interface::{describe, export, interface, result, Call, Crosses, Module, Saved, Table};
pub use load::LoadError;
pub use text::{Description, Difference};
