//! Inside the process: an agent that patches the program it is linked into, and what commands say to it.

pub mod sealed;
pub mod wire;

#[cfg(test)]
mod tests;
