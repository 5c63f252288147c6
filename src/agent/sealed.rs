//! A patch on its way into a process: memory that nobody can change any more.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::fs::{fcntl_add_seals, fcntl_get_seals, fstat, memfd_create, MemfdFlags, SealFlags};
use rustix::io::{pread, write, Errno};

use super::wire::WireError;

/// The largest patch that an agent reads.
pub const MAX_PATCH: usize = 128 << 20;

/// What the sender has given up, so that what is checked is what is applied, and reading it cannot fail half-way.
const GIVEN_UP: SealFlags = SealFlags::WRITE.union(SealFlags::SHRINK).union(SealFlags::GROW);

/// The bytes of a patch in memory that is sealed against writing and resizing.
#[derive(Debug)]
pub struct SealedPatch(OwnedFd);

impl SealedPatch {
    /// Puts a patch into sealed memory.
    ///
    /// # Errors
    ///
    /// There is no memory or no descriptor left.
    pub fn new(patch: &[u8]) -> std::io::Result<Self> {
        let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
        let memory = match memfd_create("livepatch", flags | MemfdFlags::NOEXEC_SEAL) {
            // Before Linux 6.3 that flag is not known, and not needed.
            Err(Errno::INVAL) => memfd_create("livepatch", flags),
            other => other,
        }?;
        let mut rest = patch;
        while !rest.is_empty() {
            let written = write(&memory, rest)?;
            rest = rest.get(written..).filter(|_| written > 0).ok_or(Errno::IO)?;
        }
        fcntl_add_seals(&memory, GIVEN_UP | SealFlags::SEAL)?;
        Ok(Self(memory))
    }

    /// Takes what somebody sent, if it is sealed.
    ///
    /// # Errors
    ///
    /// It is anything else: a file, a pipe, memory that its sender can still change.
    pub fn check(sent: OwnedFd) -> Result<Self, WireError> {
        match fcntl_get_seals(&sent) {
            Ok(seals) if seals.contains(GIVEN_UP) => Ok(Self(sent)),
            Ok(_) => Err(WireError::Descriptor(
                "the patch lies in memory that is not sealed: its sender may change it".into(),
            )),
            Err(_) => Err(WireError::Descriptor("the patch has to come in sealed memory (memfd_create)".into())),
        }
    }

    /// All of its bytes.
    ///
    /// # Errors
    ///
    /// It is too large, or it cannot be read.
    pub fn read(&self) -> Result<Vec<u8>, WireError> {
        let failed = |e: Errno| WireError::Descriptor(format!("the patch cannot be read: {e}"));
        let len = usize::try_from(fstat(&self.0).map_err(failed)?.st_size).unwrap_or(usize::MAX);
        if len > MAX_PATCH {
            return Err(WireError::TooLong { len_bytes: len, max_bytes: MAX_PATCH });
        }
        let mut patch = vec![0; len];
        let mut at = 0;
        // Its offset is shared with the sender.
        while let Some(rest) = patch.get_mut(at..).filter(|rest| !rest.is_empty()) {
            match pread(&self.0, rest, at as u64) {
                Ok(0) => return Err(failed(Errno::IO)),
                Ok(n) => at += n,
                Err(Errno::INTR) => {}
                Err(e) => return Err(failed(e)),
            }
        }
        Ok(patch)
    }
}

impl AsFd for SealedPatch {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}
