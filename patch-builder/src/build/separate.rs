//! Debug information in a file of its own (`objcopy --only-keep-debug`, Debian's `-dbgsym`).

use std::path::{Path, PathBuf};

use object::Object as _;

use super::FileBytes;

/// Where the debug information of an image is, if it has none itself.
pub enum Separate {
    /// In the image, or nowhere.
    No,
    /// In this file.
    Found(FileBytes),
    /// In a file of this name, which is in none of the usual places.
    Missing(String),
}

/// Looks for the separate debug information of the image at `path`: beside it, in `.debug` there, and by build-id.
/// A file with another build-id is another build's.
#[must_use]
pub fn separate(path: &Path, bytes: &[u8]) -> Separate {
    let Ok(file) = object::File::parse(bytes) else { return Separate::No };
    let has = |name| file.section_by_name(name).is_some();
    if has(".debug_info") || has(".zdebug_info") {
        return Separate::No;
    }
    let id = file.build_id().ok().flatten().unwrap_or_default();
    let link = file.gnu_debuglink().ok().flatten().map(|(name, _)| String::from_utf8_lossy(name).into_owned());
    let beside = path.parent().unwrap_or_else(|| Path::new("."));
    let mut places: Vec<PathBuf> = Vec::new();
    if let Some(name) = link.as_deref().map(Path::new).and_then(Path::file_name) {
        places.extend([beside.join(name), beside.join(".debug").join(name)]);
    }
    if let [first, rest @ ..] = id {
        let hex: String = rest.iter().map(|b| format!("{b:02x}")).collect();
        places.push(format!("/usr/lib/debug/.build-id/{first:02x}/{hex}.debug").into());
    }
    let of_this_build = |bytes: &FileBytes| {
        let file = object::File::parse(&bytes[..]).ok();
        file.and_then(|f| f.build_id().ok().flatten().map(|other| other == id)).unwrap_or(false)
    };
    match places.iter().filter_map(|p| FileBytes::read(p).ok()).find(of_this_build) {
        Some(found) => Separate::Found(found),
        None => link.map_or(Separate::No, Separate::Missing),
    }
}
