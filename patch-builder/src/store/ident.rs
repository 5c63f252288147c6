//! The build-id of a file or of what a process runs.

use std::path::{Path, PathBuf};

use object::Object as _;

/// The GNU build-id of an ELF file, in hex; `None` if it has none.
///
/// # Errors
///
/// It cannot be read, or is no ELF file.
pub fn build_id(path: &Path) -> Result<Option<String>, String> {
    let file = std::fs::File::open(path).map_err(|e| e.to_string())?;
    let cache = object::ReadCache::new(file);
    let elf = object::read::elf::ElfFile64::<object::Endianness, _>::parse(&cache).map_err(|e| e.to_string())?;
    let id = elf.build_id().map_err(|e| e.to_string())?;
    Ok(id.filter(|id| !id.is_empty()).map(|id| id.iter().map(|b| format!("{b:02x}")).collect()))
}

/// The build-id of the executable that a process runs, even if its file was replaced.
///
/// # Errors
///
/// No such process, no permission, or no build-id.
pub fn build_id_of_process(pid: u32) -> Result<String, String> {
    let exe = PathBuf::from(format!("/proc/{pid}/exe"));
    let said = |e: String| format!("process {pid}: {e}");
    build_id(&exe).map_err(said)?.ok_or_else(|| said("its executable has no build-id".into()))
}
