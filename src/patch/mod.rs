//! The patch file's contract, shared by patch-builder and the engine: what
//! docs/patch-format.md describes. patch-builder writes it (with `object`), and
//! everybody reads it through [`PatchFile::parse`], patch-builder included.

mod manifest;
mod read;
mod v1;

pub use manifest::{
    After, Before, BuildRef, CodeRange, Companion, Entry, Function, HexBytes, Hook, HookKind, Import, ImportKind,
    Linked, Manifest, OldFunction, Redirect, StateVersion, Static, Status, TypeLayout, HOOK_TEXT_BYTES,
};
pub use read::{PatchError, PatchFile, Reloc, RelocKind, RelocTarget, Segment, SegmentKind};

/// The version of the format that this code writes, and the newest that it reads. It reads all from 1 on.
pub const FORMAT_VERSION: u32 = 3;

/// Functions that switch a thread to another stack.
pub const STACK_SWITCHES: [&str; 8] = [
    "makecontext",
    "swapcontext",
    "setcontext",
    "jump_fcontext",
    "ontop_fcontext",
    "make_fcontext",
    "co_switch",
    "swap_fcontext",
];

/// Functions of the C library in which a thread waits without a lock of the library's own.
pub const WAITS: [&str; 38] = [
    "epoll_wait",
    "epoll_pwait",
    "epoll_pwait2",
    "poll",
    "__poll",
    "ppoll",
    "select",
    "__select",
    "pselect",
    "nanosleep",
    "__nanosleep",
    "clock_nanosleep",
    "__clock_nanosleep",
    "usleep",
    "sleep",
    "pause",
    "sigsuspend",
    "sigwait",
    "sigwaitinfo",
    "sigtimedwait",
    "__sigtimedwait",
    "read",
    "__read",
    "recv",
    "__recv",
    "recvfrom",
    "recvmsg",
    "accept",
    "accept4",
    "syscall",
    "pthread_cond_wait",
    "pthread_cond_timedwait",
    "pthread_cond_clockwait",
    "sem_wait",
    "sem_timedwait",
    "sem_clockwait",
    "pthread_join",
    "waitpid",
];

/// Owner name of the note that marks a patch.
pub const NOTE_NAME: &str = "livepatch";

/// Type of that note: descriptor = format version (`u32`, little endian), then the target's build-id.
pub const NOTE_TYPE_TARGET: u32 = 1;

/// Type of the second note: descriptor = SHA-256 of the whole file with these 32 bytes taken as zero.
pub const NOTE_TYPE_DIGEST: u32 = 2;

/// The digest that belongs into a patch file whose digest stands at `at`.
#[must_use]
pub fn file_digest(bytes: &[u8], at: usize) -> Option<[u8; 32]> {
    use sha2::Digest;
    let (before, rest) = bytes.split_at_checked(at)?;
    let (_, after) = rest.split_at_checked(32)?;
    let mut hasher = sha2::Sha256::new();
    hasher.update(before);
    hasher.update([0; 32]);
    hasher.update(after);
    Some(hasher.finalize().into())
}

/// Section index of a symbol that lives in the target image: its value is an
/// [`ImageAddr`](crate::addr::ImageAddr). In the range that the ELF
/// specification leaves to processors; the kernel's livepatch modules use the
/// same number for the same purpose.
pub const SHN_TARGET_IMAGE: u16 = 0xff20;

/// Section index of a symbol that lives in the patch that this one takes the place of: its value is an offset in
/// that patch's address space.
pub const SHN_PREVIOUS_PATCH: u16 = 0xff21;

/// An address in one of the patches before this one: the low 48 bits are an offset in that patch's address space, the high 16
/// say how many patches further back it is. This splits it.
#[must_use]
pub const fn in_chain(at: u64) -> (usize, u64) {
    ((at >> CHAIN_SHIFT) as usize, at & ((1 << CHAIN_SHIFT) - 1))
}

/// The same address, as the next patch of the chain has it; `None` where the chain is too long.
#[must_use]
pub fn further_back(at: u64) -> Option<u64> {
    at.checked_add(1 << CHAIN_SHIFT)
}

const CHAIN_SHIFT: u32 = 48;

/// Section that holds the manifest.
pub const MANIFEST_SECTION: &str = ".livepatch.manifest";

/// Bytes of the entry jump, `jmp rel32`.
pub const ENTRY_JUMP_LEN: u64 = 5;
