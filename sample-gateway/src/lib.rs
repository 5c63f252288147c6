//! A FIX 4.4 acceptor that a stranger would believe in, to be patched while it runs.
//!
//! | floor | layer | one line |
//! | --- | --- | --- |
//! | 0 | `gateway-interface` | a crate of its own: the types and traits that the layers share, locked by a digest |
//! | 0 | [`fix`] | FIX in its tag=value form: framing, parsing, writing |
//! | 1 | [`business`] | risk, fees, conversion: what gets patched; keeps nothing |
//! | 1 | [`state`] | sessions and order books; no input or output; owned by the core |
//! | 2 | [`core`] | event loops, sockets, persistence, metrics; hardly ever changes |
//!
//! A layer imports only from floors below it; `business` and `state` do not know each other (a test reads the imports).

pub mod business;
pub mod core;
pub mod fix;
pub mod state;
