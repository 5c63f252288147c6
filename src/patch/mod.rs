//! The patch file's contract, shared by patch-builder and the engine: what
//! docs/patch-format.md describes. patch-builder writes it (with `object`), and
//! everybody reads it through [`PatchFile::parse`], patch-builder included.

mod manifest;
mod read;
mod v1;

pub use manifest::{
    After, BuildRef, Companion, Entry, Function, HexBytes, Hook, HookKind, Import, ImportKind, Manifest, OldFunction,
    Redirect, StateVersion, Static, Status, TypeLayout,
};
pub use read::{PatchError, PatchFile, Reloc, RelocKind, RelocTarget, Segment, SegmentKind};

/// The version of the format that this code writes, and the newest that it reads. It reads all from 1 on.
pub const FORMAT_VERSION: u32 = 2;

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

/// Section that holds the manifest.
pub const MANIFEST_SECTION: &str = ".livepatch.manifest";

/// Bytes of the entry jump, `jmp rel32`.
pub const ENTRY_JUMP_LEN: u64 = 5;
