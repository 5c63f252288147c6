//! Diffs two linked builds into a live patch.
#![warn(missing_docs)]
#![forbid(unsafe_code)]
pub mod build;
pub mod compare;
pub mod diff;
pub mod guard;
pub mod lift;
pub mod pair;
pub mod report;
pub mod select;
pub mod side;
