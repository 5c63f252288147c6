//! Reads the finished patch back with the reader that the engine uses.

use livepatch::patch::{Manifest, PatchError, PatchFile, RelocTarget};

use crate::side::Side;

/// Why a patch that was just written is not good.
#[derive(Debug)]
#[non_exhaustive]
pub enum VerifyError {
    /// The engine's reader rejects it.
    Rejected(PatchError),
    /// It reads back as something else.
    Different(String),
}

impl std::fmt::Display for VerifyError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Rejected(e) => write!(f, "the patch does not read back: {e}"),
            Self::Different(what) => write!(f, "the patch reads back as something else: {what}"),
        }
    }
}

impl std::error::Error for VerifyError {}

/// Reads `bytes` back and compares with what was meant.
///
/// # Errors
///
/// Any difference; then the patch must not be used.
pub fn verify(bytes: &[u8], manifest: &Manifest, old: &Side<'_>) -> Result<(), VerifyError> {
    let patch = PatchFile::parse(bytes).map_err(VerifyError::Rejected)?;
    if patch.manifest != *manifest {
        return Err(VerifyError::Different("the manifest".into()));
    }
    for r in &patch.relocs {
        if let RelocTarget::Image(at) = r.target {
            let known = old.build.section_at(at.0).is_some() || old.build.object_at(at.0).is_some();
            if !known {
                return Err(VerifyError::Different(format!("a relocation to {at}, outside the old image")));
            }
        }
    }
    Ok(())
}
