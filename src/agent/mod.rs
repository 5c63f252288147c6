//! Inside the process: an agent that patches the program it is linked into, and what commands say to it.

#[cfg(feature = "agent")]
pub mod heap;
#[cfg(feature = "agent")]
pub mod masks;
pub mod wire;
