//! What a later diff needs of a release, kept by build-id.
//!
//! A store is a folder. In it, `BUILD-ID/` holds the unstripped image, its link map, a stripped copy to ship and a
//! `record.json` that says how it was made. A record appears whole or not at all, and is never changed afterwards.

mod files;
mod ident;

use std::fs;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

pub use files::{digest_of, FileInfo};
pub use ident::{build_id, build_id_of_process};

/// The name of the file that describes a record.
const RECORD: &str = "record.json";
/// The format of `record.json`.
const FORMAT: u32 = 1;
/// The fewest digits of a build-id that name a record.
const MIN_PREFIX: usize = 4;

/// How one image was made.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Record {
    /// The version of this description.
    pub format: u32,
    /// The image's GNU build-id.
    pub build_id: String,
    /// The image's file name.
    pub name: String,
    /// When it was recorded, in milliseconds since 1970.
    pub recorded_ms: u64,
    /// The unstripped image.
    pub image: FileInfo,
    /// The linker's map of it.
    pub map: Option<FileInfo>,
    /// The stripped copy, below `ship/`.
    pub ship: Option<FileInfo>,
    /// The lock file of the build.
    pub lock: Option<FileInfo>,
    /// Where the build wrote it.
    pub output: PathBuf,
    /// The folder that the link ran in.
    pub cwd: PathBuf,
    /// The command that linked it.
    pub command: Vec<String>,
    /// What the compiler says of itself.
    pub compiler: String,
    /// The objects, archives and sources that were linked.
    pub inputs: Vec<String>,
    /// What cargo was asked; `None` for other builds.
    pub cargo: Option<CargoBuild>,
    /// The source's revision, where it is known.
    pub git: Option<GitState>,
}

/// What cargo was asked to build.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CargoBuild {
    /// The package.
    pub package: String,
    /// The target of the package.
    pub target: String,
    /// Its kind: `bin`, `cdylib`, …
    pub kind: String,
    /// The profile.
    pub profile: String,
    /// Features and other choices, as cargo's arguments.
    pub args: Vec<String>,
    /// The code generation flags of the link, without paths.
    pub flags: Vec<String>,
    /// The paths that the image was made to show.
    pub paths: ShownPaths,
}

/// Paths as they stand in the image: those of the machine that built it first.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ShownPaths {
    /// The top folder of the sources.
    pub source: PathBuf,
    /// The folder of the build's intermediate files.
    pub build: PathBuf,
    /// Cargo's home.
    pub cargo_home: PathBuf,
}

/// The state of the sources.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct GitState {
    /// The commit.
    pub commit: String,
    /// Whether files differed from the commit.
    pub dirty: bool,
}

/// Why a store cannot serve.
#[derive(Debug)]
#[non_exhaustive]
pub enum StoreError {
    /// No record has such a build-id.
    NotFound {
        /** What was asked for. */
        wanted: String,
        /** Where. */
        root: PathBuf,
    },
    /// Several records begin like this.
    Ambiguous {
        /** What was asked for. */
        wanted: String,
        /** The build-ids that fit. */
        fit: Vec<String>,
    },
    /// A record that is not what it was when it was written.
    Damaged {
        /** Its folder. */
        dir: PathBuf,
        /** What is wrong. */
        what: String,
    },
    /// The image cannot be recorded.
    Image {
        /** The image. */
        path: PathBuf,
        /** Why. */
        what: String,
    },
    /// A file that cannot be read or written.
    Io {
        /** The file. */
        path: PathBuf,
        /** Why. */
        error: std::io::Error,
    },
}

impl std::fmt::Display for StoreError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::NotFound { wanted, root } => {
                write!(f, "no record of build-id {wanted} in {}", root.display())
            }
            Self::Ambiguous { wanted, fit } => {
                write!(f, "{wanted} is the beginning of several build-ids: {}", fit.join(", "))
            }
            Self::Damaged { dir, what } => write!(
                f,
                "the record {} is damaged: {what}; remove the folder and record the build again",
                dir.display()
            ),
            Self::Image { path, what } => write!(f, "{}: {what}", path.display()),
            Self::Io { path, error } => write!(f, "{}: {error}", path.display()),
        }
    }
}

impl std::error::Error for StoreError {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        match self {
            Self::Io { error, .. } => Some(error),
            _ => None,
        }
    }
}

fn io(path: &Path) -> impl FnOnce(std::io::Error) -> StoreError + '_ {
    move |error| StoreError::Io { path: path.to_owned(), error }
}

/// A record in its place.
#[derive(Clone, Debug)]
pub struct Entry {
    /// Its folder.
    pub dir: PathBuf,
    /// What it says.
    pub record: Record,
}

impl Entry {
    /// The unstripped image.
    #[must_use]
    pub fn image(&self) -> PathBuf {
        self.dir.join(&self.record.image.name)
    }

    /// The link map.
    #[must_use]
    pub fn map(&self) -> Option<PathBuf> {
        self.record.map.as_ref().map(|m| self.dir.join(&m.name))
    }

    /// The stripped copy.
    #[must_use]
    pub fn ship(&self) -> Option<PathBuf> {
        self.record.ship.as_ref().map(|s| self.dir.join(&s.name))
    }

    /// Compares every file with the digest that was recorded.
    ///
    /// # Errors
    ///
    /// A file is missing or differs, or the image has another build-id.
    pub fn verify(&self) -> Result<(), StoreError> {
        let damaged = |what| StoreError::Damaged { dir: self.dir.clone(), what };
        let r = &self.record;
        for file in [Some(&r.image), r.map.as_ref(), r.ship.as_ref(), r.lock.as_ref()].into_iter().flatten() {
            file.verify(&self.dir).map_err(damaged)?;
        }
        match build_id(&self.image()) {
            Ok(Some(id)) if id == r.build_id => Ok(()),
            _ => Err(damaged(format!("{} has not the build-id {}", r.image.name, r.build_id))),
        }
    }
}

/// The files of a new record.
#[derive(Debug)]
pub struct Parts<'a> {
    /// The unstripped image.
    pub image: &'a Path,
    /// The linker's map.
    pub map: Option<&'a Path>,
    /// The lock file.
    pub lock: Option<&'a Path>,
    /// Make a stripped copy.
    pub ship: bool,
}

impl<'a> Parts<'a> {
    /// The image alone.
    #[must_use]
    pub fn of(image: &'a Path) -> Self {
        Self { image, map: None, lock: None, ship: false }
    }
}

/// A folder of records.
#[derive(Clone, Debug)]
pub struct Store {
    root: PathBuf,
}

impl Store {
    /// The store in that folder, which need not exist yet.
    #[must_use]
    pub fn at(root: impl Into<PathBuf>) -> Self {
        Self { root: root.into() }
    }

    /// Its folder.
    #[must_use]
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// The folders that could be records, by build-id.
    fn folders(&self) -> Result<Vec<(String, PathBuf)>, StoreError> {
        let list = match fs::read_dir(&self.root) {
            Ok(list) => list,
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
            Err(e) => return Err(io(&self.root)(e)),
        };
        let mut out = Vec::new();
        for entry in list {
            let entry = entry.map_err(io(&self.root))?;
            let name = entry.file_name().to_string_lossy().into_owned();
            if is_hex(&name) && name.len() >= 8 && entry.path().is_dir() {
                out.push((name, entry.path()));
            }
        }
        out.sort();
        Ok(out)
    }

    /// Every record, newest first, and those that cannot be read.
    ///
    /// # Errors
    ///
    /// The folder cannot be read.
    pub fn list(&self) -> Result<(Vec<Entry>, Vec<StoreError>), StoreError> {
        let (mut good, mut bad) = (Vec::new(), Vec::new());
        for (id, dir) in self.folders()? {
            match load(&id, &dir) {
                Ok(entry) => good.push(entry),
                Err(e) => bad.push(e),
            }
        }
        good.sort_by(|a, b| {
            (b.record.recorded_ms, &a.record.build_id).cmp(&(a.record.recorded_ms, &b.record.build_id))
        });
        Ok((good, bad))
    }

    /// The one record whose build-id begins like that, verified.
    ///
    /// # Errors
    ///
    /// None, several, or a damaged one.
    pub fn find(&self, prefix: &str) -> Result<Entry, StoreError> {
        let wanted = prefix.to_ascii_lowercase();
        let missing = || StoreError::NotFound { wanted: wanted.clone(), root: self.root.clone() };
        if !is_hex(&wanted) || wanted.len() < MIN_PREFIX {
            return Err(missing());
        }
        let fit: Vec<_> = self.folders()?.into_iter().filter(|(id, _)| id.starts_with(&wanted)).collect();
        match fit.as_slice() {
            [] => Err(missing()),
            [(id, dir)] => {
                let entry = load(id, dir)?;
                entry.verify()?;
                Ok(entry)
            }
            more => Err(StoreError::Ambiguous { wanted, fit: more.iter().map(|(id, _)| id.clone()).collect() }),
        }
    }

    /// Records an image; one that is recorded already stays as it is. Says whether it is new.
    ///
    /// # Errors
    ///
    /// The image has no build-id, or a file cannot be read or written.
    pub fn put(&self, mut record: Record, parts: &Parts<'_>) -> Result<(Entry, bool), StoreError> {
        let image = |what: &str| StoreError::Image { path: parts.image.to_owned(), what: what.into() };
        let id = build_id(parts.image)
            .map_err(|e| image(&e))?
            .ok_or_else(|| image("has no build-id (link with -Wl,--build-id)"))?;
        let dir = self.root.join(&id);
        if let Ok(there) = load(&id, &dir) {
            if there.verify().is_ok() {
                return Ok((there, false));
            }
        }
        let partial = self.root.join(format!(".{id}.{}.partial", std::process::id()));
        let _ = fs::remove_dir_all(&partial);
        fs::create_dir_all(&partial).map_err(io(&partial))?;
        record.build_id.clone_from(&id);
        record.format = FORMAT;
        record.recorded_ms = now_ms();
        let written = fill(&partial, record, parts).and_then(|record| self.settle(&partial, &dir).map(|()| record));
        if written.is_err() {
            let _ = fs::remove_dir_all(&partial);
        }
        Ok((Entry { dir, record: written? }, true))
    }

    /// Puts a filled folder into its place.
    fn settle(&self, partial: &Path, dir: &Path) -> Result<(), StoreError> {
        if fs::rename(partial, dir).is_ok() {
            return Ok(());
        }
        // Something is there: a damaged record, or a whole one that came meanwhile from the same build.
        let id = dir.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let whole = load(&id, dir).is_ok_and(|e| e.verify().is_ok());
        if whole {
            return fs::remove_dir_all(partial).map_err(io(partial));
        }
        let aside = self.root.join(format!(".{id}.{}.damaged", std::process::id()));
        fs::rename(dir, &aside).map_err(io(dir))?;
        fs::rename(partial, dir).map_err(io(dir))?;
        fs::remove_dir_all(&aside).map_err(io(&aside))
    }

    /// Removes a record.
    ///
    /// # Errors
    ///
    /// A file cannot be removed.
    pub fn remove(&self, entry: &Entry) -> Result<(), StoreError> {
        // Out of sight first: a record is whole or not there.
        let aside = self.root.join(format!(".{}.{}.removed", entry.record.build_id, std::process::id()));
        fs::rename(&entry.dir, &aside).map_err(io(&entry.dir))?;
        fs::remove_dir_all(&aside).map_err(io(&aside))
    }
}

/// Copies the files into the folder and describes them.
fn fill(dir: &Path, mut record: Record, parts: &Parts<'_>) -> Result<Record, StoreError> {
    let name = parts.image.file_name().unwrap_or_default().to_string_lossy().into_owned();
    // Names of our own files are not for images.
    let name = if [RECORD, "ship", "Cargo.lock"].contains(&name.as_str()) { format!("{name}.image") } else { name };
    record.image = FileInfo::copy(parts.image, dir, &name)?;
    record.map = parts.map.map(|m| FileInfo::copy(m, dir, &format!("{name}.map"))).transpose()?;
    record.lock = parts.lock.map(|l| FileInfo::copy(l, dir, "Cargo.lock")).transpose()?;
    if parts.ship {
        record.ship = Some(files::ship(dir, &name)?);
    }
    record.name = name;
    let text = serde_json::to_vec_pretty(&record).unwrap_or_default();
    let path = dir.join(RECORD);
    files::write_synced(&path, &text).map_err(io(&path))?;
    Ok(record)
}

fn load(id: &str, dir: &Path) -> Result<Entry, StoreError> {
    let damaged = |what: String| StoreError::Damaged { dir: dir.to_owned(), what };
    let text = fs::read(dir.join(RECORD)).map_err(|e| damaged(format!("{RECORD}: {e}")))?;
    let record: Record = serde_json::from_slice(&text).map_err(|e| damaged(format!("{RECORD}: {e}")))?;
    if record.format != FORMAT {
        return Err(damaged(format!("{RECORD}: format {}, this version reads {FORMAT}", record.format)));
    }
    if record.build_id != id {
        return Err(damaged(format!("{RECORD}: is of build-id {}", record.build_id)));
    }
    let files = [Some(&record.image), record.map.as_ref(), record.ship.as_ref(), record.lock.as_ref()];
    if let Some(outside) = files.into_iter().flatten().find(|f| !f.is_inside()) {
        return Err(damaged(format!("{RECORD}: {:?} is not a file of the record", outside.name)));
    }
    Ok(Entry { dir: dir.to_owned(), record })
}

fn is_hex(text: &str) -> bool {
    !text.is_empty() && text.bytes().all(|b| b.is_ascii_hexdigit() && !b.is_ascii_uppercase())
}

fn now_ms() -> u64 {
    std::time::SystemTime::now()
        .duration_since(std::time::UNIX_EPOCH)
        .map_or(0, |d| u64::try_from(d.as_millis()).unwrap_or(u64::MAX))
}

#[cfg(test)]
mod tests;
