//! State that outlives the code: a table whose entries can be of two versions at one time, each handled by the code that knows it.
//!
//! ```
//! use livepatch::state::{State, Table};
//!
//! #[derive(serde::Serialize, serde::Deserialize)]
//! struct Session {
//!     orders: u64,
//! }
//! livepatch::state!(Session, "session", 1);
//! impl State for Session {}
//!
//! let sessions: Table<Session> = Table::new();
//! sessions.insert(7, (), |()| Session { orders: 0 });
//! assert_eq!(sessions.with(7, 3, |session, more| { session.orders += more; session.orders }), Some(3));
//! ```
//!
//! The next build declares version 2 and how to come from 1 ([`State::upgrade`]) and back to it ([`State::downgrade`]). A patch between the
//! two goes in as a canary: stubs stand at the entries, and what decides which code a call runs is the version of the entry that is
//! locked. Each entry is then saved by the old code and loaded by the new.
//!
//! *Invariant:* whatever touches an entry is reached through the entry of one function (`shims`), which a patch replaces when the version
//! changes, and which compares the version that it was compiled for with the entry's before it touches it.

use std::fmt;

use serde::de::DeserializeOwned;
use serde::Serialize;

mod migrate;
mod shims;
mod table;
#[cfg(test)]
mod tests;

pub(crate) use migrate::{of_slot, planned, Direction, Figures, Limits, MigrationError};
pub use table::Table;

/// Why a state could not be saved or loaded.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct StateError(String);

impl StateError {
    /// For this reason.
    pub fn new(why: impl fmt::Display) -> Self {
        Self(why.to_string())
    }
}

impl From<postcard::Error> for StateError {
    fn from(e: postcard::Error) -> Self {
        Self::new(e)
    }
}

impl From<serde_json::Error> for StateError {
    fn from(e: serde_json::Error) -> Self {
        Self::new(e)
    }
}

/// How a state is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// Postcard: short and fast.
    Postcard,
    /// JSON, for people.
    Json,
}

impl Format {
    /// Writes a value.
    ///
    /// # Errors
    ///
    /// It can't be written so.
    pub fn write<T: Serialize>(self, value: &T) -> Result<Vec<u8>, StateError> {
        Ok(match self {
            Self::Postcard => postcard::to_stdvec(value)?,
            Self::Json => serde_json::to_vec(value)?,
        })
    }

    /// Reads one, and nothing more.
    ///
    /// # Errors
    ///
    /// The bytes are none.
    pub fn read<T: DeserializeOwned>(self, bytes: &[u8]) -> Result<T, StateError> {
        Ok(match self {
            Self::Postcard => match postcard::take_from_bytes(bytes)? {
                (value, []) => value,
                (_, rest) => return Err(StateError::new(format_args!("{} bytes are left over", rest.len()))),
            },
            Self::Json => serde_json::from_slice(bytes)?,
        })
    }
}

/// The longest that an id may be.
pub const ID_BYTES: usize = 60;

/// What a type declares to patch-builder: which state it is, and its version. Written by [`state!`](crate::state!).
///
/// patch-builder reads it from the image: the id, filled up with zeros, then the version.
#[derive(Debug)]
#[repr(C)]
pub struct Declared<S> {
    id: [u8; ID_BYTES],
    version: u32,
    of: std::marker::PhantomData<fn(S) -> S>,
}

impl<S> Declared<S> {
    /// Of this id and version.
    ///
    /// # Panics
    ///
    /// The id is empty or longer than [`ID_BYTES`], or the version is 0 or above 2^28. It is evaluated while the program is compiled.
    #[must_use]
    pub const fn new(id: &str, version: u32) -> Self {
        let from = id.as_bytes();
        assert!(!from.is_empty() && from.len() <= ID_BYTES, "a state's id has 1 to 60 bytes");
        assert!(version > 0 && version < 1 << 28, "versions begin with 1");
        let mut bytes = [0; ID_BYTES];
        let mut i = 0;
        while i < from.len() {
            bytes[i] = from[i];
            i += 1;
        }
        Self { id: bytes, version, of: std::marker::PhantomData }
    }
}

/// Which state a type is. Implemented by [`state!`](crate::state!).
pub trait Identity: Sized + 'static {
    /// The same in all builds.
    const ID: &'static str;
    /// Raised with every change of what the type, or anything that it owns, looks like in memory.
    const VERSION: u32;

    /// The declaration.
    #[doc(hidden)]
    fn declared() -> &'static Declared<Self>;
}

/// Declares a type as a state: its id and its version.
#[macro_export]
macro_rules! state {
    ($type:ty, $id:literal, $version:literal) => {
        impl $crate::state::Identity for $type {
            const ID: &'static str = $id;
            const VERSION: u32 = $version;

            fn declared() -> &'static $crate::state::Declared<Self> {
                // Apart from other constants: what refers to the one behind it does not seem to mean this one's end.
                #[allow(unsafe_code)] // where a static lies
                #[link_section = ".livepatch.states"]
                static DECLARED: $crate::state::Declared<$type> = $crate::state::Declared::new($id, $version);
                &DECLARED
            }
        }
    };
}

/// A type whose values live on while the code that knows them changes.
///
/// Everything that a value owns belongs to it: nothing else keeps a pointer to it, and it keeps none to what others own, but for what
/// is reference-counted and of a type that does not change.
pub trait State: Identity + Serialize + DeserializeOwned + Send {
    /// How it is written.
    const FORMAT: Format = Format::Postcard;

    /// Comes from what an older version wrote with its own `FORMAT`.
    ///
    /// # Errors
    ///
    /// It can't; without an implementation, from no version.
    fn upgrade(version: u32, _bytes: &[u8]) -> Result<Self, StateError> {
        let (id, own) = (Self::ID, Self::VERSION);
        Err(StateError::new(format_args!("version {own} of {id} does not say how to come from version {version}")))
    }

    /// Writes what an older version reads: byte for byte what that one would have written, had this one never come.
    ///
    /// # Errors
    ///
    /// It can't; without an implementation, for no version.
    fn downgrade(&self, version: u32) -> Result<Vec<u8>, StateError> {
        let (id, own) = (Self::ID, Self::VERSION);
        Err(StateError::new(format_args!("version {own} of {id} does not say how to go back to version {version}")))
    }

    /// What a downgrade can't carry back, for people: said before a migration begins, and before a revert.
    #[must_use]
    fn loses(_version: u32) -> Option<&'static str> {
        None
    }
}
