//! Inside the process: an agent that patches the program it is linked into, and what commands say to it.

pub mod client;
pub mod peer;
#[cfg(feature = "agent")]
mod place;
pub mod sealed;
#[cfg(feature = "agent")]
pub mod server;
pub mod wire;

#[cfg(test)]
mod tests;
