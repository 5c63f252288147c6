//! Reads a file into private memory, but for the sections that nobody looks at.
//!
//! A mapping of the file itself would change under safe code when a linker
//! overwrites the build. What is left out reads as zeros and is given to nobody
//! ([`is_unread`]): half of a build with `--emit-relocs` and `-g` is relocations
//! of debug information.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt as _;
use std::path::Path;

use memmap2::{Mmap, MmapMut};
use object::read::elf::{FileHeader as _, SectionHeader as _};
use object::{elf, LittleEndian as Le};
use rayon::prelude::*;

/// How much one thread reads at a time, in bytes.
const CHUNK: usize = 4 << 20;

/// A build's bytes.
pub struct FileBytes {
    map: Mmap,
    /// How many of them were read.
    pub read_bytes: u64,
}

impl std::ops::Deref for FileBytes {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.map
    }
}

/// Whether the section's content is never looked at.
#[must_use]
pub fn is_unread(name: &[u8]) -> bool {
    let rest = match name {
        b".rela.eh_frame" | b".gdb_index" => return true,
        _ => name.strip_prefix(b".rela"),
    };
    rest.is_some_and(|applies_to| applies_to.starts_with(b".debug_"))
        || [&b".debug_loc"[..], b".debug_pub", b".debug_gnu_pub", b".debug_macro"].iter().any(|p| name.starts_with(p))
}

impl FileBytes {
    /// Reads what is needed of the file.
    ///
    /// # Errors
    ///
    /// The system's, and `UnexpectedEof` if the file shrinks meanwhile.
    pub fn read(path: &Path) -> io::Result<Self> {
        let file = File::open(path)?;
        let len = usize::try_from(file.metadata()?.len()).map_err(io::Error::other)?;
        let mut map = MmapMut::map_anon(len.max(1))?;
        let needless = needless(&file, len as u64).unwrap_or_default();
        let (mut rest, mut at) = (&mut map[..len], 0);
        let mut chunks: Vec<(u64, &mut [u8])> = Vec::new();
        for skip in needless.into_iter().chain(std::iter::once(len..len)) {
            let (wanted, tail) = rest.split_at_mut(skip.start.saturating_sub(at));
            chunks.extend(wanted.chunks_mut(CHUNK).enumerate().map(|(i, c)| ((at + i * CHUNK) as u64, c)));
            let gap = skip.end - skip.start.max(at);
            at = skip.end;
            rest = &mut tail[gap..];
        }
        let read_bytes = chunks.iter().map(|(_, c)| c.len() as u64).sum();
        chunks.into_par_iter().try_for_each(|(at, chunk)| file.read_exact_at(chunk, at))?;
        Ok(Self { map: map.make_read_only()?, read_bytes })
    }
}

/// Where the content lies that nobody looks at: ascending, disjoint, within the file. `None` where the headers are
/// not plain: then all is read, and whoever parses it says what is wrong.
fn needless(file: &File, len: u64) -> Option<Vec<Range<usize>>> {
    let mut head = [0; 64];
    file.read_exact_at(&mut head, 0).ok()?;
    let header = elf::FileHeader64::<Le>::parse(&head[..]).ok()?;
    let count = u64::from(header.e_shnum.get(Le));
    if count == 0 || usize::from(header.e_shentsize.get(Le)) != size_of::<elf::SectionHeader64<Le>>() {
        return None;
    }
    let table_at = header.e_shoff.get(Le);
    let table_len = count * u64::from(header.e_shentsize.get(Le));
    let programs_len = u64::from(header.e_phnum.get(Le)) * u64::from(header.e_phentsize.get(Le));
    let programs_at = header.e_phoff.get(Le);
    let read = |at: u64, length: u64| -> Option<Vec<u8>> {
        let end = at.checked_add(length).filter(|end| *end <= len)?;
        let mut bytes = vec![0; usize::try_from(end - at).ok()?];
        file.read_exact_at(&mut bytes, at).ok()?;
        Some(bytes)
    };
    let table = read(table_at, table_len)?;
    let (sections, _) = object::pod::slice_from_bytes::<elf::SectionHeader64<Le>>(&table, count as usize).ok()?;
    let names = sections.get(usize::from(header.e_shstrndx.get(Le).0))?;
    let names = read(names.sh_offset(Le), names.sh_size(Le))?;
    let mut kept = vec![0..64, table_at..table_at + table_len, programs_at..programs_at.checked_add(programs_len)?];
    let mut out: Vec<Range<u64>> = Vec::new();
    for s in sections.iter().filter(|s| s.sh_type(Le) != elf::SHT_NOBITS && s.sh_size(Le) > 0) {
        let name = names.get(s.sh_name.get(Le) as usize..)?.split(|b| *b == 0).next()?;
        let range = s.sh_offset(Le)..s.sh_offset(Le).checked_add(s.sh_size(Le)).filter(|end| *end <= len)?;
        let list = if is_unread(name) && s.sh_flags(Le).0 & 2 == 0 { &mut out } else { &mut kept };
        list.push(range);
    }
    // Whatever shares a byte with something needed is read.
    out.retain(|r| !kept.iter().any(|k| k.start < r.end && r.start < k.end));
    out.sort_by_key(|r| r.start);
    let mut from = 0;
    let disjoint = out.into_iter().filter_map(|r| {
        let start = r.start.max(from);
        from = from.max(r.end);
        Some(usize::try_from(start).ok()?..usize::try_from(r.end).ok()?).filter(|r| !r.is_empty())
    });
    Some(disjoint.collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_relocations_of_debug_information_and_tables_of_nobody_are_left_out() {
        for name in [".rela.debug_info", ".rela.eh_frame", ".debug_loclists", ".debug_loc", ".debug_gnu_pubnames"] {
            assert!(is_unread(name.as_bytes()), "{name}");
        }
        for name in [".rela.text", ".debug_info", ".debug_line", ".debug_str", ".eh_frame", ".rela.dyn", ".symtab"] {
            assert!(!is_unread(name.as_bytes()), "{name}");
        }
    }

    #[test]
    fn what_is_read_is_what_is_in_the_file() {
        let path = std::env::current_exe().expect("a path");
        let (read, whole) = (FileBytes::read(&path).expect("readable"), std::fs::read(&path).expect("readable"));
        let file = File::open(&path).expect("readable");
        let skipped = needless(&file, whole.len() as u64).expect("an ordinary ELF file");
        assert!(!skipped.is_empty(), "a test binary has debug information that nobody looks at");
        let mut at = 0;
        for skip in skipped.iter().cloned().chain(std::iter::once(whole.len()..whole.len())) {
            assert!(read[at..skip.start] == whole[at..skip.start], "from {at:#x}");
            at = skip.end;
        }
        let left_out: usize = skipped.iter().map(|s| s.len()).sum();
        assert_eq!(read.read_bytes as usize, whole.len() - left_out);
    }
}
