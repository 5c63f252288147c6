//! Live patching for Linux x86-64 processes.
//!
//! Two ordinary builds of a program go into patch-builder, which writes a patch; this library applies it to a
//! process that runs the old build, and takes it back:
//!
//! ```no_run
//! use livepatch::patch::PatchFile;
//! use livepatch::patcher::{Options, Patcher};
//! use livepatch::process::Pid;
//!
//! let patch = PatchFile::parse(&std::fs::read("fix.so")?)?;
//! let applied = Patcher::open(Pid(4711))?.apply(&patch, &Options::default())?;
//! println!("{} entry jumps, {} µs", applied.entries, applied.pause_us);
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! Duties of the caller: nobody else writes the process's code meanwhile. Not done: nothing is loaded with
//! dlopen, no library has to be in the process, and no thread is resumed in the middle of a changed function.
//!
//! Modules import only from floors below their own; docs/architecture.md has the table.

#[cfg(not(all(target_os = "linux", target_arch = "x86_64")))]
compile_error!("livepatch patches Linux x86-64 processes and runs on Linux x86-64 only");

pub mod addr;
pub mod patch;
#[cfg(feature = "signature")]
pub mod signature;

#[cfg(feature = "engine")]
pub mod agent;
#[cfg(feature = "agent")]
pub use agent::Agent;

#[cfg(feature = "hooks")]
pub use livepatch_macros::hook;

#[cfg(feature = "engine")]
pub mod elf;
#[cfg(feature = "engine")]
pub mod image;
#[cfg(feature = "engine")]
pub mod insn;
#[cfg(feature = "engine")]
pub mod link;
#[cfg(feature = "engine")]
pub mod maps;
#[cfg(feature = "engine")]
pub mod memory;
#[cfg(feature = "module")]
pub mod module;
#[cfg(feature = "engine")]
pub mod patcher;
#[cfg(feature = "engine")]
pub mod plan;
#[cfg(feature = "engine")]
pub mod process;
#[cfg(feature = "engine")]
pub mod quiesce;
#[cfg(feature = "engine")]
pub mod registry;
#[cfg(feature = "engine")]
pub mod scan;
#[cfg(feature = "agent")]
pub mod session;
#[cfg(feature = "agent")]
pub mod shadow;
#[cfg(feature = "engine")]
pub mod stack;
#[cfg(feature = "agent")]
pub mod state;
#[cfg(feature = "agent")]
pub mod switch;
#[cfg(feature = "engine")]
pub mod symbols;
#[cfg(feature = "agent")]
pub mod tally;
#[cfg(feature = "engine")]
pub mod transaction;
