//! A module's file becomes an object in the process, and goes again.
//!
//! *Invariant:* the loader never answers with a library that it has already: a file is copied into sealed memory, whose descriptor, and so whose path,
//! is nobody else's while the library is loaded.
#![allow(unsafe_code)]

use std::ffi::{c_void, CStr, CString};
use std::io::Write;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::PathBuf;

use livepatch_interface::{Instance, Message, Saved, FACTORY};
use rustix::fs::{fcntl_add_seals, fstat, memfd_create, MemfdFlags, SealFlags};
use sha2::{Digest, Sha256};

use super::check::Refusal;
use super::handle::VersionId;
use crate::signature::SignatureError;

/// A module can't be had, or not be changed to.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum LoadError {
    /// Its file can't be read, or not be copied.
    #[error("{}: {error}", file.display())]
    File {
        /// Which.
        file: PathBuf,
        /// Why.
        error: std::io::Error,
    },
    /// Something in the file says that it must not be loaded.
    #[error("{name}: {why}")]
    Refused {
        /// The module.
        name: String,
        /// Why.
        why: Refusal,
    },
    /// It is not signed by a known key.
    #[error("{name}: {why}")]
    NotSigned {
        /// The module.
        name: String,
        /// Why.
        why: SignatureError,
    },
    /// The dynamic linker does not take it.
    #[error("{name}: the dynamic linker refuses: {why}")]
    Linker {
        /// The module.
        name: String,
        /// Its words.
        why: String,
    },
    /// Its factory made no object.
    #[error("{name}: its factory fails: {why}")]
    Factory {
        /// The module.
        name: String,
        /// Its words.
        why: String,
    },
    /// There is no such version, or it is released.
    #[error("version {0} is not loaded")]
    NotLoaded(VersionId),
    /// Sessions are led to it.
    #[error("version {0} can't be released: calls are led to it")]
    InUse(VersionId),
}

/// A file in memory that nobody can write any more.
#[derive(Debug)]
pub(super) struct Kept {
    pub name: String,
    pub digest: [u8; 32],
    pub text: Vec<u8>,
    memory: OwnedFd,
}

impl Kept {
    /// Copies the file.
    pub fn new(name: &str, file: &[u8], text: Vec<u8>) -> std::io::Result<Self> {
        let digest: [u8; 32] = Sha256::digest(file).into();
        let short: String = digest.iter().take(8).map(|b| format!("{b:02x}")).collect();
        let label = format!("livepatch-module-{short}");
        let memory = memfd_create(&*label, MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)?;
        let mut memory = std::fs::File::from(memory);
        memory.write_all(file)?;
        let memory = OwnedFd::from(memory);
        fcntl_add_seals(&memory, SealFlags::WRITE | SealFlags::GROW | SealFlags::SHRINK | SealFlags::SEAL)?;
        Ok(Self { name: name.to_owned(), digest, text, memory })
    }

    /// Whether any of it is mapped.
    pub fn is_mapped(&self) -> bool {
        let Ok(inode) = fstat(&self.memory).map(|s| s.st_ino.to_string()) else { return true };
        let Ok(maps) = std::fs::read_to_string("/proc/self/maps") else { return true };
        maps.lines().any(|l| l.contains("/memfd:livepatch-module-") && l.split_whitespace().nth(4) == Some(&inode))
    }
}

/// An object of a module, and the library that it lives in.
#[derive(Debug)]
pub(super) struct Loaded {
    pub instance: Instance,
    library: Library,
}

// SAFETY: a module's object may be used by any thread (`Module: Send + Sync`); the rest are addresses.
unsafe impl Send for Loaded {}
// SAFETY: as above.
unsafe impl Sync for Loaded {}

#[derive(Debug)]
struct Library(*mut c_void);

impl Drop for Library {
    fn drop(&mut self) {
        // SAFETY: `dlopen` gave it, and nothing of it is in use: the object was dropped before.
        unsafe { libc::dlclose(self.0) };
    }
}

impl Drop for Loaded {
    fn drop(&mut self) {
        // SAFETY: the factory gave both; this is the only owner, and no call is in it any more.
        unsafe { (self.instance.drop)(self.instance.this) };
        let _ = &self.library;
    }
}

type Factory = unsafe extern "C" fn(*const u8, usize, u32, *mut Instance, *mut Message) -> bool;

fn linker_words() -> String {
    // SAFETY: the text is this thread's until it calls the linker again.
    let words = unsafe { libc::dlerror() };
    if words.is_null() {
        return "no reason given".into();
    }
    // SAFETY: a string of C, by dlerror(3).
    unsafe { CStr::from_ptr(words) }.to_string_lossy().into_owned()
}

/// Loads it. To be called on a thread of livepatch's own: constructors of the module run here.
pub(super) fn load(kept: &Kept, saved: Option<Saved<'_>>) -> Result<Loaded, LoadError> {
    let linker = |why: String| LoadError::Linker { name: kept.name.clone(), why };
    let path = CString::new(format!("/proc/self/fd/{}", kept.memory.as_raw_fd())).map_err(|e| linker(e.to_string()))?;
    // SAFETY: the file was looked through (`check`); its runtime's constructors do what Rust's and C's always do.
    let library = unsafe { libc::dlopen(path.as_ptr(), libc::RTLD_NOW | libc::RTLD_LOCAL) };
    if library.is_null() {
        return Err(linker(linker_words()));
    }
    let library = Library(library);
    if !kept.is_mapped() {
        return Err(linker("the dynamic linker answers with a library that it had already".into()));
    }
    let name = CString::new(FACTORY).map_err(|e| linker(e.to_string()))?;
    // SAFETY: a library that is loaded, and a string of C.
    let factory = unsafe { libc::dlsym(library.0, name.as_ptr()) };
    if factory.is_null() {
        return Err(linker(linker_words()));
    }
    // SAFETY: the symbol is a function of this type: the text says that the module was made by `export!` of this version.
    let factory: Factory = unsafe { std::mem::transmute::<*mut c_void, Factory>(factory) };
    let (bytes, len, version) =
        saved.map_or((std::ptr::null(), 0, 0), |s| (s.bytes.as_ptr(), s.bytes.len(), s.version));
    let (mut instance, mut why) = (std::mem::MaybeUninit::<Instance>::uninit(), Message::default());
    // SAFETY: `bytes` leads to `len` bytes, and the others are this function's own.
    if !unsafe { factory(bytes, len, version, instance.as_mut_ptr(), &mut why) } {
        return Err(LoadError::Factory { name: kept.name.clone(), why: why.text() });
    }
    // SAFETY: the factory filled it in.
    let loaded = Loaded { instance: unsafe { instance.assume_init() }, library };
    // SAFETY: the text lies in the library, as long as the file says.
    let text = unsafe { std::slice::from_raw_parts(loaded.instance.text, kept.text.len()) };
    if text != kept.text {
        return Err(linker("what was loaded is not what was looked through".into()));
    }
    Ok(loaded)
}

unsafe extern "C" fn take(to: *mut c_void, bytes: *const u8, len: usize) {
    // SAFETY: `save` hands in its own vector; the module's bytes live until this returns.
    unsafe { (*to.cast::<Vec<u8>>()).extend_from_slice(std::slice::from_raw_parts(bytes, len)) }
}

/// The object's state in the form of a version.
pub(super) fn save(loaded: &Loaded, version: u32) -> Option<Vec<u8>> {
    let mut out = Vec::new();
    let i = &loaded.instance;
    // SAFETY: the object lives as long as `loaded`, and `take` fits the vector.
    unsafe { (i.save)(i.this, version, take, (&raw mut out).cast()) }.then_some(out)
}
