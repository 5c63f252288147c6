//! How types are laid out, and the text that says it; all of it at compile time.
#![allow(unsafe_code)]

use std::mem::{align_of, size_of};

/// A type that may be an argument or a result of a function of an interface, or a field of one.
///
/// # Safety
///
/// 1. `LAYOUT` says of the type what the compiler made of it.
/// 2. It says so of everything that can be reached through it.
pub unsafe trait Crosses {
    /// How it is laid out.
    const LAYOUT: &'static Layout;
    /// Never called: does not compile if a field is left out of a description.
    #[doc(hidden)]
    fn every_field_is_described(&self) {}
}

/// How one type is laid out.
#[derive(Debug)]
pub struct Layout {
    /// Its name, without a path.
    pub name: &'static str,
    /// In bytes.
    pub size: usize,
    /// In bytes.
    pub align: usize,
    /// What is in it.
    pub shape: Shape,
}

/// What is in a type.
#[derive(Debug)]
pub enum Shape {
    /// The name says it.
    Plain,
    /// A pointer or a reference.
    Pointer {
        /// `&`, `&mut `, `*const `, `*mut `.
        mark: &'static str,
        /// To what.
        to: &'static Layout,
    },
    /// An array.
    Array {
        /// Of what.
        of: &'static Layout,
        /// How many.
        len: usize,
    },
    /// Fields, at their offsets.
    Struct(&'static [Field]),
    /// Variants without fields, with their values.
    Enum(&'static [(&'static str, i64)]),
    /// A type of Rust's library, which only the compiler that made it knows.
    Rust {
        /// What is in it.
        of: Option<&'static Layout>,
        /// Whether it frees memory when it is dropped.
        owns: bool,
    },
}

/// One field.
#[derive(Debug)]
pub struct Field {
    /// Its name.
    pub name: &'static str,
    /// In bytes.
    pub offset: usize,
    /// Its type.
    pub layout: &'static Layout,
}

/// One function of an interface.
#[derive(Debug)]
pub struct Function {
    name: &'static str,
    arguments: &'static [(&'static str, &'static Layout)],
    returns: &'static Layout,
}

impl Layout {
    /// Of a type that its name says all about.
    #[must_use]
    pub const fn of<T>(name: &'static str, shape: Shape) -> Self {
        Self { name, size: size_of::<T>(), align: align_of::<T>(), shape }
    }

    const fn owns(&self) -> bool {
        match &self.shape {
            Shape::Plain | Shape::Pointer { .. } | Shape::Enum(_) => false,
            Shape::Array { of, .. } => of.owns(),
            Shape::Struct(fields) => {
                let mut i = 0;
                while i < fields.len() {
                    if fields[i].layout.owns() {
                        return true;
                    }
                    i += 1;
                }
                false
            }
            Shape::Rust { of, owns } => {
                *owns
                    || match of {
                        Some(of) => of.owns(),
                        None => false,
                    }
            }
        }
    }
}

impl Function {
    /// # Panics
    ///
    /// When something that owns memory crosses by value: the other side would free it with another allocator. It is a compile-time error.
    #[must_use]
    pub const fn new(
        name: &'static str,
        arguments: &'static [(&'static str, &'static Layout)],
        returns: &'static Layout,
    ) -> Self {
        let mut i = 0;
        while i < arguments.len() {
            assert!(!arguments[i].1.owns(), "what owns memory may cross an interface by shared reference only");
            i += 1;
        }
        assert!(!returns.owns(), "what owns memory may cross an interface by shared reference only");
        Self { name, arguments, returns }
    }
}

const fn pointer<P>(mark: &'static str, to: &'static Layout, may_write: bool) -> Layout {
    assert!(!(may_write && to.owns()), "what owns memory may cross an interface by shared reference only");
    Layout::of::<P>("", Shape::Pointer { mark, to })
}

macro_rules! plain {
    ($($ty:ty),*) => { $(
        // SAFETY: the name says all about it (1, 2).
        unsafe impl Crosses for $ty {
            const LAYOUT: &'static Layout = &Layout::of::<$ty>(stringify!($ty), Shape::Plain);
        }
    )* };
}
plain!((), u8, u16, u32, u64, u128, usize, i8, i16, i32, i64, i128, isize, f32, f64, bool, char, std::ffi::c_void);

macro_rules! pointers {
    ($($ty:ty, $mark:literal, $may_write:literal;)*) => { $(
        // SAFETY: a thin pointer, and what it leads to is described, too (1, 2).
        unsafe impl<T: Crosses> Crosses for $ty {
            const LAYOUT: &'static Layout = &pointer::<$ty>($mark, T::LAYOUT, $may_write);
        }
    )* };
}
pointers! { &T, "&", false; &mut T, "&mut ", true; *const T, "*const ", false; *mut T, "*mut ", true; }

// SAFETY: as its elements (1, 2).
unsafe impl<T: Crosses, const N: usize> Crosses for [T; N] {
    const LAYOUT: &'static Layout = &Layout::of::<Self>("", Shape::Array { of: T::LAYOUT, len: N });
}

// SAFETY: the text names the compiler, which lays it out alike on both sides (1); its elements are described (2).
unsafe impl<T: Crosses> Crosses for Vec<T> {
    const LAYOUT: &'static Layout = &Layout::of::<Self>("Vec", Shape::Rust { of: Some(T::LAYOUT), owns: true });
}

// SAFETY: as above.
unsafe impl<T: Crosses> Crosses for Option<T> {
    const LAYOUT: &'static Layout = &Layout::of::<Self>("Option", Shape::Rust { of: Some(T::LAYOUT), owns: false });
}

// SAFETY: as above.
unsafe impl<T: Crosses> Crosses for &[T] {
    const LAYOUT: &'static Layout = &Layout::of::<Self>("slice", Shape::Rust { of: Some(T::LAYOUT), owns: false });
}

// SAFETY: as above.
unsafe impl Crosses for String {
    const LAYOUT: &'static Layout = &Layout::of::<Self>("String", Shape::Rust { of: None, owns: true });
}

// SAFETY: as above.
unsafe impl Crosses for &str {
    const LAYOUT: &'static Layout = &Layout::of::<Self>("str", Shape::Rust { of: None, owns: false });
}

macro_rules! functions {
    ($(($($arg:ident),*))*) => { $(
        // SAFETY: a code pointer; what its arguments are is described in its own line (1, 2).
        unsafe impl<$($arg: Crosses,)* R: Crosses> Crosses for extern "C" fn($($arg),*) -> R {
            const LAYOUT: &'static Layout = &Layout::of::<Self>(
                concat!("extern fn of ", $(stringify!($arg)),*),
                Shape::Struct(&[
                    $(Field { name: stringify!($arg), offset: 0, layout: $arg::LAYOUT },)*
                    Field { name: "returns", offset: 0, layout: R::LAYOUT },
                ]),
            );
        }
    )* };
}
functions! { () (A) (A, B) (A, B, C) (A, B, C, D) }

/// A text that is being written; with `N` too small it only counts.
struct Out<const N: usize> {
    bytes: [u8; N],
    len: usize,
}

impl<const N: usize> Out<N> {
    const fn put(mut self, text: &str) -> Self {
        let bytes = text.as_bytes();
        let mut i = 0;
        while i < bytes.len() {
            if self.len < N {
                self.bytes[self.len] = bytes[i];
            }
            self.len += 1;
            i += 1;
        }
        self
    }

    const fn number(self, value: i64) -> Self {
        let mut out = if value < 0 { self.put("-") } else { self };
        let value = value.unsigned_abs();
        let mut unit = 1;
        while value / unit >= 10 {
            unit *= 10;
        }
        while unit > 0 {
            const DIGITS: [&str; 10] = ["0", "1", "2", "3", "4", "5", "6", "7", "8", "9"];
            out = out.put(DIGITS[(value / unit % 10) as usize]);
            unit /= 10;
        }
        out
    }

    /// How a type is spelled where it is used.
    const fn name(self, layout: &Layout) -> Self {
        match &layout.shape {
            Shape::Pointer { mark, to } => self.put(mark).name(to),
            Shape::Array { of, len } => self.put("[").name(of).put("; ").number(*len as i64).put("]"),
            Shape::Rust { of: Some(of), .. } => self.put(layout.name).put("<").name(of).put(">"),
            _ => self.put(layout.name),
        }
    }

    /// A line for it and for each type in it.
    const fn types(self, layout: &Layout) -> Self {
        let line = match &layout.shape {
            Shape::Plain => return self,
            Shape::Pointer { to, .. } => return self.types(to),
            Shape::Array { of, .. } => return self.types(of),
            _ => {
                self.put("type ").name(layout).put(" ").number(layout.size as i64).put(" ").number(layout.align as i64)
            }
        };
        match &layout.shape {
            Shape::Struct(fields) => {
                let (mut out, mut i) = (line.put(" {"), 0);
                while i < fields.len() {
                    let field = &fields[i];
                    out = out.put(if i == 0 { " " } else { ", " });
                    out = out.put(field.name).put(": ").name(field.layout).put(" @").number(field.offset as i64);
                    i += 1;
                }
                out = out.put(" }\n");
                i = 0;
                while i < fields.len() {
                    out = out.types(fields[i].layout);
                    i += 1;
                }
                out
            }
            Shape::Enum(variants) => {
                let (mut out, mut i) = (line.put(" {"), 0);
                while i < variants.len() {
                    out = out.put(if i == 0 { " " } else { ", " }).put(variants[i].0).put(" = ").number(variants[i].1);
                    i += 1;
                }
                out.put(" }\n")
            }
            Shape::Rust { of, .. } => {
                let out = line.put(" of ").put(env!("LIVEPATCH_RUSTC")).put("\n");
                match of {
                    Some(of) => out.types(of),
                    None => out,
                }
            }
            _ => line.put("\n"),
        }
    }
}

/// The text of an interface, and its length; with `N` of that length the text is whole. A type that several functions use stands in
/// it several times.
#[must_use]
pub const fn describe<const N: usize>(
    (name, version): (&str, &str),
    functions: &[Function],
    more: &[(&str, &str)],
    state: Option<u32>,
) -> ([u8; N], usize) {
    let mut out = Out { bytes: [0; N], len: 0 }.put(crate::TEXT_HEAD).put("\n");
    out = out.put("interface ").put(name).put(" ").put(version).put("\n");
    let mut i = 0;
    while i < functions.len() {
        let function = &functions[i];
        out = out.put("fn ").put(function.name).put("(");
        let mut k = 0;
        while k < function.arguments.len() {
            let (name, layout) = function.arguments[k];
            out = out.put(if k == 0 { "" } else { ", " }).put(name).put(": ").name(layout);
            k += 1;
        }
        out = out.put(") -> ").name(function.returns).put("\n").types(function.returns);
        k = 0;
        while k < function.arguments.len() {
            out = out.types(function.arguments[k].1);
            k += 1;
        }
        i += 1;
    }
    i = 0;
    while i < more.len() {
        out = out.put(more[i].0).put(" ").put(more[i].1).put("\n");
        i += 1;
    }
    if let Some(state) = state {
        out = out.put("state ").number(state as i64).put("\n");
    }
    (out.bytes, out.len)
}
