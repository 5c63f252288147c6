//! FIX 4.4 in its tag=value form: framing, parsing, writing.
//!
//! A small parser of our own. The crate that serves the purpose best, fefix (ferrumfix) with its fork rustyfix, calls
//! itself "not a FIX engine" and is built around a dictionary that is looked up at run time; what an acceptor needs
//! of it is framing, a checksum and a field list, which are the files of this folder, are strict in the acceptor's sense
//! (garbled messages are told from wrong ones), allocate nothing per message and never panic on any bytes (a property
//! test says so). The session logic, which neither crate has, is in `state`.

mod decode;
mod encode;
pub mod msg_type;
pub mod tag;
mod time;

pub use decode::{frame, Frame, Message, Parser, SyntaxError, MAX_MESSAGE_BYTES};
pub use encode::{Encoder, Header};
pub use time::{format_utc, parse_utc_ms, UTC_LEN};

/// The only version spoken.
pub const BEGIN_STRING: &[u8] = b"FIX.4.4";
