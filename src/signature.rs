//! Who says that a patch may go into a process: detached minisign signatures over the whole file.
//!
//! A signature is `FIX.so.minisig` beside the patch, as minisign(1) and `patch-builder sign` write it. Its trusted comment may hold
//! `revision:N`; a patch of a lower revision than one that the process has seen is refused (replay).

use std::path::{Path, PathBuf};

use minisign_verify::{PublicKey, Signature};
use serde::{Deserialize, Serialize};

/// What stands before the number in a trusted comment.
pub const REVISION: &str = "revision:";

/// Why a patch is not taken for signed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SignatureError {
    /// There is no signature.
    #[error("it is not signed: there is no {}", .0.display())]
    Missing(PathBuf),
    /// The signature is none.
    #[error("{} is no signature of minisign: {why}", file.display())]
    Damaged {
        /// The file.
        file: PathBuf,
        /// What is wrong with it.
        why: String,
    },
    /// No known key made it, or the patch is not what was signed.
    #[error("no known key ({keys}) signed this patch as it is: it was altered, or signed by somebody else")]
    Unknown {
        /// The known keys.
        keys: String,
    },
    /// There are no keys to hold it against.
    #[error("there is no public key in {}", .0.display())]
    NoKeys(PathBuf),
    /// A file can't be read.
    #[error("{}: {error}", file.display())]
    Unreadable {
        /// The file.
        file: PathBuf,
        /// Why.
        error: String,
    },
}

/// What a good signature says.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Signed {
    /// The name of the key's file.
    pub key: String,
    /// The trusted comment.
    pub comment: String,
    /// The revision in it.
    pub revision: Option<u64>,
}

/// The public keys whose patches are taken.
pub struct Keys(Vec<(String, PublicKey)>);

impl std::fmt::Debug for Keys {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_list().entries(self.0.iter().map(|(name, _)| name)).finish()
    }
}

impl Keys {
    /// From a file of one key, or a folder of `*.pub` files.
    ///
    /// # Errors
    ///
    /// A file can't be read or holds no key; there is none.
    pub fn load(path: &Path) -> Result<Self, SignatureError> {
        let unreadable = |file: &Path, error: String| SignatureError::Unreadable { file: file.to_owned(), error };
        let mut files = vec![path.to_owned()];
        if path.is_dir() {
            let list = std::fs::read_dir(path).map_err(|e| unreadable(path, e.to_string()))?;
            files = list
                .filter_map(|e| Some(e.ok()?.path()))
                .filter(|p| p.extension().is_some_and(|e| e == "pub"))
                .collect();
            files.sort();
        }
        let mut keys = Vec::new();
        for file in files {
            let text = std::fs::read_to_string(&file).map_err(|e| unreadable(&file, e.to_string()))?;
            let key = PublicKey::decode(text.trim()).or_else(|_| PublicKey::from_base64(text.trim()));
            let name = file.file_stem().unwrap_or_default().to_string_lossy().into_owned();
            keys.push((name, key.map_err(|e| unreadable(&file, format!("no public key of minisign: {e}")))?));
        }
        if keys.is_empty() {
            return Err(SignatureError::NoKeys(path.to_owned()));
        }
        Ok(Self(keys))
    }

    /// Whether one of the keys signed these bytes.
    ///
    /// # Errors
    ///
    /// The signature is none, or no key of these made it for these bytes.
    pub fn verify(&self, patch: &[u8], file: &Path, signature: &str) -> Result<Signed, SignatureError> {
        let damaged = |why: String| SignatureError::Damaged { file: file.to_owned(), why };
        let signature = Signature::decode(signature).map_err(|e| damaged(e.to_string()))?;
        let good = self.0.iter().find(|(_, key)| key.verify(patch, &signature, false).is_ok());
        let Some((name, _)) = good else {
            let keys = self.0.iter().map(|(n, _)| n.as_str()).collect::<Vec<_>>().join(", ");
            return Err(SignatureError::Unknown { keys });
        };
        let comment = signature.trusted_comment().to_owned();
        let revision = comment.split_whitespace().find_map(|w| w.strip_prefix(REVISION)?.parse().ok());
        Ok(Signed { key: name.clone(), comment, revision })
    }

    /// The same with the signature that lies beside the patch.
    ///
    /// # Errors
    ///
    /// There is none, or as [`verify`](Self::verify).
    pub fn verify_file(&self, patch: &[u8], path: &Path) -> Result<Signed, SignatureError> {
        let file = beside(path);
        let signature = std::fs::read_to_string(&file).map_err(|e| match e.kind() {
            std::io::ErrorKind::NotFound => SignatureError::Missing(file.clone()),
            _ => SignatureError::Unreadable { file: file.clone(), error: e.to_string() },
        })?;
        self.verify(patch, &file, &signature)
    }
}

/// Where the signature of a patch is: `FIX.so.minisig`.
#[must_use]
pub fn beside(patch: &Path) -> PathBuf {
    let mut name = patch.as_os_str().to_owned();
    name.push(".minisig");
    PathBuf::from(name)
}

#[cfg(test)]
mod tests {
    use super::*;

    // The example of minisign(1)'s own documentation.
    const KEY: &str = "RWQf6LRCGA9i53mlYecO4IzT51TGPpvWucNSCh1CBM0QTaLn73Y7GFO3";
    const SIGNATURE: &str = "untrusted comment: signature from minisign secret key
RUQf6LRCGA9i559r3g7V1qNyJDApGip8MfqcadIgT9CuhV3EMhHoN1mGTkUidF/z7SrlQgXdy8ofjb7bNJJylDOocrCo8KLzZwo=
trusted comment: timestamp:1633700835\tfile:test\tprehashed
wLMDjy9FLAuxZ3q4NlEvkgtyhrr0gtTu6KC4KBJdITbbOeAi1zBIYo0v4iTgt8jJpIidRJnp94ABQkJAgAooBQ==";

    fn keys() -> Keys {
        Keys(vec![("desk".into(), PublicKey::from_base64(KEY).unwrap())])
    }

    #[test]
    fn only_what_was_signed_is_signed() {
        let file = Path::new("test.minisig");
        let signed = keys().verify(b"test", file, SIGNATURE).unwrap();
        assert_eq!((signed.key.as_str(), signed.revision), ("desk", None));
        assert!(matches!(keys().verify(b"tesT", file, SIGNATURE), Err(SignatureError::Unknown { .. })));
        let turned = SIGNATURE.replace("timestamp:1633700835", "timestamp:1633700836");
        assert!(keys().verify(b"test", file, &turned).is_err(), "the trusted comment is signed, too");
        assert!(matches!(keys().verify(b"test", file, "nothing"), Err(SignatureError::Damaged { .. })));
    }
}
