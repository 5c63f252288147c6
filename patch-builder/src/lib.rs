//! Diffs two linked builds into a live patch.
//!
//! In the order in which data flows: [`build`] reads one linked build,
//! [`lift`] brings its functions into symbolic form (a [`side`]), [`pair`] says
//! which old symbol is which new one, [`compare`] and [`diff`] what changed,
//! [`guard`] what may not change, [`select`] what the patch must carry,
//! [`emit`] writes it, [`verify`] reads it back, [`explain`] says why, and
//! [`report`] shows it.
//!
//! It never touches a process.
#![warn(missing_docs)]
#![forbid(unsafe_code)]

pub mod abi;
pub mod build;
pub mod cargo;
pub mod cli;
pub mod compare;
pub mod cost;
pub mod diff;
pub mod emit;
pub mod explain;
pub mod guard;
pub mod kin;
pub mod lift;
pub mod merged;
pub mod pair;
pub mod pairing;
mod pipeline;
pub mod report;
pub mod select;
pub mod sets;
pub mod side;
pub mod store;
pub mod types;
pub mod verify;
pub mod wrap;

pub use pipeline::{run, run_metered, run_with, Error, Options, Outcome};
