//! Sessions and order books. No input or output happens here: the core owns these objects, feeds them messages and
//! time, and sends what they write.

mod book;
mod orders;
mod sent;
mod session;

pub use book::{Book, BookCell, Books, Ids, Resting};
pub use orders::{OpenOrder, OpenOrders};
pub use sent::{Sent, SentStore};
pub use session::{Output, Session, Step};
