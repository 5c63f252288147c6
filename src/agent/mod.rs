//! Inside the process: an agent that patches the program it is linked into, and what commands say to it.

#[cfg(feature = "agent")]
pub mod breaker;
pub mod client;
#[cfg(feature = "agent")]
mod engine;
#[cfg(feature = "agent")]
mod fatal;
#[cfg(feature = "agent")]
pub mod heap;
#[cfg(feature = "agent")]
mod log;
#[cfg(feature = "agent")]
pub mod masks;
#[cfg(feature = "agent")]
mod migrate;
pub mod peer;
#[cfg(feature = "agent")]
mod place;
#[cfg(feature = "agent")]
mod program;
pub mod sealed;
#[cfg(feature = "agent")]
pub mod server;
pub mod wire;

#[cfg(feature = "agent")]
pub use program::{Agent, Builder, StartError};

#[cfg(test)]
mod tests;
