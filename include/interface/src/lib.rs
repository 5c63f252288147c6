//! What a program and its modules share: an interface, and the layout of all that crosses it.
//!
//! An interface is declared once, in a crate of its own that both sides depend on. [`interface!`] makes a trait and a table of
//! functions of it, [`describe!`] says how a type that crosses it is laid out, [`export!`] makes a library a module. From these
//! comes a text that names every function and every layout; it lies in the module's file, and a program compares it with its own before it loads.
//!
//! *Invariant:* what is compared is what the compiler did. Offsets, sizes and values are asked of it, never written by hand; a type
//! that is not described does not compile in an interface, nor does a description that leaves a field out.
//!
//! *Invariant:* memory is freed by the side that allocated it. What owns memory crosses by shared reference only.

mod declare;
mod layout;
mod raw;

pub use layout::{describe, Crosses, Field, Function, Layout, Shape};
pub use raw::{
    create, panicked, returned, Call, Instance, Message, Module, PutBytes, Saved, Table, FACTORY, SECTION, TEXT_HEAD,
};
