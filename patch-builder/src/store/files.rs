//! The files of a record.

use std::fs::{self, File};
use std::io::{Read as _, Write as _};
use std::path::{Component, Path};
use std::process::Command;

use object::read::elf::{FileHeader as _, ProgramHeader as _};
use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};

use crate::store::{build_id, io, StoreError};

/// A file of a record.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FileInfo {
    /// Its path within the record.
    pub name: String,
    /// Its length.
    pub len_bytes: u64,
    /// Its SHA-256.
    pub sha256: String,
}

/// The SHA-256 of a file, and its length.
///
/// # Errors
///
/// It cannot be read.
pub fn digest_of(path: &Path) -> std::io::Result<(String, u64)> {
    let mut file = File::open(path)?;
    let (mut hash, mut buffer, mut len) = (Sha256::new(), vec![0; 1 << 20], 0);
    loop {
        let n = file.read(&mut buffer)?;
        if n == 0 {
            break;
        }
        hash.update(&buffer[..n]);
        len += n as u64;
    }
    Ok((hash.finalize().iter().map(|b| format!("{b:02x}")).collect(), len))
}

impl FileInfo {
    /// Describes a file of the folder.
    fn of(dir: &Path, name: &str) -> Result<Self, StoreError> {
        let path = dir.join(name);
        let (sha256, len_bytes) = digest_of(&path).map_err(io(&path))?;
        Ok(Self { name: name.into(), len_bytes, sha256 })
    }

    /// Copies a file into the folder.
    pub(super) fn copy(from: &Path, dir: &Path, name: &str) -> Result<Self, StoreError> {
        let to = dir.join(name);
        fs::copy(from, &to).map_err(io(from))?;
        File::open(&to).and_then(|f| f.sync_all()).map_err(io(&to))?;
        Self::of(dir, name)
    }

    /// Whether it lies in the record's own folder.
    pub(super) fn is_inside(&self) -> bool {
        let path = Path::new(&self.name);
        path.components().next().is_some() && path.components().all(|c| matches!(c, Component::Normal(_)))
    }

    /// Says what is wrong with the file.
    pub(super) fn verify(&self, dir: &Path) -> Result<(), String> {
        match digest_of(&dir.join(&self.name)) {
            Err(e) => Err(format!("{}: {e}", self.name)),
            Ok((sha256, _)) if sha256 != self.sha256 => Err(format!("{} is not what was recorded", self.name)),
            Ok(_) => Ok(()),
        }
    }
}

pub(super) fn write_synced(path: &Path, bytes: &[u8]) -> std::io::Result<()> {
    let mut file = File::create(path)?;
    file.write_all(bytes)?;
    file.sync_all()
}

/// Makes the stripped copy of an image of the folder, and proves that the same program would be loaded from it.
pub(super) fn ship(dir: &Path, name: &str) -> Result<FileInfo, StoreError> {
    let folder = dir.join("ship");
    fs::create_dir_all(&folder).map_err(io(&folder))?;
    let (from, to) = (dir.join(name), folder.join(name));
    strip(&from, &to)?;
    let wrong = |what: &str| StoreError::Image { path: to.clone(), what: what.into() };
    if build_id(&from) != build_id(&to) {
        return Err(wrong("stripping changed the build-id"));
    }
    if loaded(&from)? != loaded(&to)? {
        return Err(wrong("stripping changed what is loaded"));
    }
    FileInfo::of(dir, &format!("ship/{name}"))
}

fn strip(from: &Path, to: &Path) -> Result<(), StoreError> {
    let failed = |what: String| StoreError::Image { path: from.to_owned(), what };
    for tool in ["strip", "llvm-strip"] {
        match Command::new(tool).arg("-o").arg(to).arg(from).output() {
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => {}
            Err(e) => return Err(failed(format!("{tool}: {e}"))),
            Ok(out) if out.status.success() => return Ok(()),
            Ok(out) => return Err(failed(format!("{tool}: {}", String::from_utf8_lossy(&out.stderr).trim()))),
        }
    }
    Err(failed("cannot be stripped: neither strip nor llvm-strip is there (apt-get install binutils)".into()))
}

/// A loaded segment: address, flags, length in memory, content.
type Loaded = (u64, u32, u64, Vec<u8>);

/// What the kernel would map, but for the file header and the program headers, which say where in the file things lie.
fn loaded(path: &Path) -> Result<Vec<Loaded>, StoreError> {
    let bytes = fs::read(path).map_err(io(path))?;
    let bad = |e: object::read::Error| StoreError::Image { path: path.to_owned(), what: e.to_string() };
    let header = object::elf::FileHeader64::<object::Endianness>::parse(&*bytes).map_err(bad)?;
    let endian = header.endian().map_err(bad)?;
    let headers = header.program_headers(endian, &*bytes).map_err(bad)?;
    let head = header.e_phoff(endian) + u64::from(header.e_phentsize(endian)) * headers.len() as u64;
    let mut out = Vec::new();
    for p in headers.iter().filter(|p| p.p_type(endian) == object::elf::PT_LOAD) {
        let data = p.data(endian, &*bytes).map_err(|()| StoreError::Image {
            path: path.to_owned(),
            what: "a segment lies outside the file".into(),
        })?;
        let skip = usize::try_from(head.saturating_sub(p.p_offset(endian))).unwrap_or(usize::MAX).min(data.len());
        out.push((p.p_vaddr(endian), p.p_flags(endian).0, p.p_memsz(endian), data[skip..].to_vec()));
    }
    Ok(out)
}
