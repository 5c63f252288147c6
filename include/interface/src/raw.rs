//! What passes between a program and a module beneath an interface: C's calling convention, and memory that stays its owner's.
#![allow(unsafe_code)]

use std::any::Any;
use std::ffi::c_void;
use std::mem::MaybeUninit;
use std::panic::{catch_unwind, AssertUnwindSafe};

use crate::Function;

/// The section of a module's file that holds its text.
pub const SECTION: &str = ".livepatch.module";

/// The first line of the text: a loader that knows another is not to read on.
pub const TEXT_HEAD: &str = "livepatch module 1";

/// The one symbol that a module exports.
pub const FACTORY: &str = "livepatch_module_1";

/// A text that a module writes into the caller's memory: why something failed.
#[repr(C)]
#[derive(Debug)]
pub struct Message {
    len: usize,
    bytes: [MaybeUninit<u8>; 240],
}

impl Default for Message {
    fn default() -> Self {
        Self { len: 0, bytes: [MaybeUninit::uninit(); 240] }
    }
}

impl Message {
    /// Cut to the room that there is.
    pub fn set(&mut self, text: &str) {
        self.len = text.len().min(self.bytes.len());
        self.bytes.iter_mut().zip(text.as_bytes()).for_each(|(to, from)| {
            to.write(*from);
        });
    }

    /// What was written.
    #[must_use]
    pub fn text(&self) -> String {
        let written = self.bytes.iter().take(self.len);
        // SAFETY: `set` wrote so many of them, on whichever side.
        let bytes: Vec<u8> = written.map(|b| unsafe { b.assume_init() }).collect();
        String::from_utf8_lossy(&bytes).into_owned()
    }
}

/// Takes bytes from a module: the first argument is the caller's own.
pub type PutBytes = unsafe extern "C" fn(*mut c_void, *const u8, usize);

/// What a module's factory fills in.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct Instance {
    /// The object.
    pub this: *mut c_void,
    /// The functions of the interface; null where the object is C++'s and brings its own.
    pub table: *const c_void,
    /// The text in the module's memory.
    pub text: *const u8,
    /// The version of its state.
    pub state: u32,
    /// Hands over the object's state in the form of a version; says whether it could.
    pub save: unsafe extern "C" fn(*const c_void, u32, PutBytes, *mut c_void) -> bool,
    /// Ends the object.
    pub drop: unsafe extern "C" fn(*mut c_void),
}

/// State that an object handed over.
#[derive(Clone, Copy, Debug)]
pub struct Saved<'a> {
    /// In the form of which version.
    pub version: u32,
    /// The state.
    pub bytes: &'a [u8],
}

/// What a module's object is, beside the interface that it implements.
pub trait Module: Sized + Send + Sync {
    /// The version of its state.
    const STATE: u32 = 0;

    /// Makes the object, from what another handed over if there is something.
    ///
    /// # Errors
    ///
    /// Why not: the module is not taken.
    fn create(saved: Option<Saved<'_>>) -> Result<Self, String>;

    /// Its state in the form of `version`, an older one for going back; `None` if it has none or can't say it so.
    fn save(&self, version: u32) -> Option<Vec<u8>> {
        let _ = version;
        None
    }
}

/// A table of functions.
///
/// # Safety
///
/// It is `#[repr(C)]` and its functions are `FUNCTIONS`, in that order. [`interface!`](crate::interface) sees to it.
pub unsafe trait Table: Sized + 'static {
    /// The interface's name.
    const NAME: &'static str;
    /// Its version.
    const VERSION: &'static str;
    /// What is in the table.
    const FUNCTIONS: &'static [Function];
    /// The text of the interface.
    fn text() -> String;
}

/// An object behind an interface, for as long as it may be called. The interface's trait is implemented for it.
#[derive(Debug)]
pub struct Call<'a, T> {
    table: &'a T,
    this: *const c_void,
}

impl<'a, T> Call<'a, T> {
    /// # Safety
    ///
    /// `this` is an object that the table's functions are for, and may be called by any thread for `'a`.
    #[must_use]
    pub unsafe fn new(table: &'a T, this: *const c_void) -> Self {
        Self { table, this }
    }

    /// Its functions.
    #[must_use]
    pub fn table(&self) -> &'a T {
        self.table
    }

    /// The object.
    #[must_use]
    pub fn this(&self) -> *const c_void {
        self.this
    }
}

fn words(panic: &(dyn Any + Send)) -> &str {
    let text = panic.downcast_ref::<&str>().copied();
    text.or_else(|| panic.downcast_ref::<String>().map(String::as_str)).unwrap_or("panic without a message")
}

/// A function of a module: no panic leaves it, for the program has another copy of Rust's runtime. `false` means that it panicked.
///
/// # Safety
///
/// Both pointers may be written to.
pub unsafe fn returned<R>(out: *mut MaybeUninit<R>, why: *mut Message, call: impl FnOnce() -> R) -> bool {
    match catch_unwind(AssertUnwindSafe(call)) {
        Ok(value) => {
            // SAFETY: the caller's contract.
            unsafe { (*out).write(value) };
            true
        }
        Err(panic) => {
            // SAFETY: the caller's contract.
            unsafe { (*why).set(words(&*panic)) };
            // Its destructor may panic in turn.
            std::mem::forget(panic);
            false
        }
    }
}

/// The module's panic goes on as one of the program's.
#[cold]
pub fn panicked(why: &Message) -> ! {
    std::panic::resume_unwind(Box::new(why.text()))
}

unsafe extern "C" fn save<M: Module>(this: *const c_void, version: u32, put: PutBytes, to: *mut c_void) -> bool {
    let done = catch_unwind(AssertUnwindSafe(|| {
        // SAFETY: the program hands in what `create` gave it.
        let state = unsafe { &*this.cast::<M>() }.save(version)?;
        // SAFETY: the bytes live until it returns.
        unsafe { put(to, state.as_ptr(), state.len()) };
        Some(())
    }));
    matches!(done, Ok(Some(())))
}

unsafe extern "C" fn end<M>(this: *mut c_void) {
    // SAFETY: the program hands in what `create` gave it, once.
    let object = unsafe { Box::from_raw(this.cast::<M>()) };
    if let Err(panic) = catch_unwind(AssertUnwindSafe(|| drop(object))) {
        std::mem::forget(panic);
    }
}

/// What a module's factory does: see [`export!`](crate::export).
///
/// # Safety
///
/// `saved` is null or leads to `len` bytes; the others may be written to.
pub unsafe fn create<M: Module, T: Table>(
    (table, text): (&'static T, &'static [u8]),
    (saved, len, version): (*const u8, usize, u32),
    instance: *mut Instance,
    why: *mut Message,
) -> bool {
    let made = catch_unwind(AssertUnwindSafe(|| {
        // SAFETY: the caller's contract.
        let bytes = (!saved.is_null()).then(|| unsafe { std::slice::from_raw_parts(saved, len) });
        M::create(bytes.map(|bytes| Saved { version, bytes }))
    }));
    let error = match made {
        Ok(Ok(object)) => {
            let made = Instance {
                this: Box::into_raw(Box::new(object)).cast(),
                table: std::ptr::from_ref(table).cast(),
                text: text.as_ptr(),
                state: M::STATE,
                save: save::<M>,
                drop: end::<M>,
            };
            // SAFETY: the caller's contract.
            unsafe { instance.write(made) };
            return true;
        }
        Ok(Err(error)) => error,
        Err(panic) => {
            let text = format!("it panicked: {}", words(&*panic));
            std::mem::forget(panic);
            text
        }
    };
    // SAFETY: the caller's contract.
    unsafe { (*why).set(&error) };
    false
}
