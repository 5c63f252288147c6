//! Live patching for Linux x86-64 processes.
#![warn(missing_docs)]

#[cfg(not(all(target_os = "linux", target_arch = "x86_64")))]
compile_error!("livepatch patches Linux x86-64 processes and runs on Linux x86-64 only");

pub mod addr;
pub mod patch;
