//! A core file as memory.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;

use goblin::elf::{header, program_header, Elf};

use crate::addr::{ProcAddr, ProcRange};
use crate::maps::Mapping;
use crate::memory::{ReadMemory, Unreadable};

/// Bytes of the front of a core file that hold its headers.
const FRONT: u64 = 64 << 20;

/// Why a file is no core file that can be read.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum CoreError {
    /// It can't be read.
    #[error("{0}")]
    Io(#[from] std::io::Error),
    /// It is something else.
    #[error("it is no core file of an x86-64 process")]
    NotACore,
}

/// A core file.
#[derive(Debug)]
pub struct Core {
    file: File,
    /// What is in the file, with where it is.
    segments: Vec<(ProcRange, u64)>,
    maps: Vec<Mapping>,
}

impl Core {
    /// Opens a core file.
    ///
    /// # Errors
    ///
    /// It can't be read, or is none.
    pub fn open(path: &Path) -> Result<Self, CoreError> {
        let file = File::open(path)?;
        let len = file.metadata()?.len();
        let mut front = vec![0; usize::try_from(len.min(FRONT)).unwrap_or(0)];
        file.read_exact_at(&mut front, 0)?;
        let elf = Elf::parse_header(&front).map_err(|_| CoreError::NotACore)?;
        if elf.e_type != header::ET_CORE || elf.e_machine != header::EM_X86_64 {
            return Err(CoreError::NotACore);
        }
        let ctx = goblin::container::Ctx::new(goblin::container::Container::Big, goblin::container::Endian::Little);
        let at = usize::try_from(elf.e_phoff).map_err(|_| CoreError::NotACore)?;
        let headers = program_header::ProgramHeader::parse(&front, at, elf.e_phnum.into(), ctx);
        let headers = headers.map_err(|_| CoreError::NotACore)?;
        let (mut segments, mut maps) = (Vec::new(), Vec::new());
        for h in headers.iter().filter(|h| h.p_type == program_header::PT_LOAD) {
            let whole = ProcRange::new(ProcAddr(h.p_vaddr), h.p_memsz).ok_or(CoreError::NotACore)?;
            maps.push(Mapping {
                range: whole,
                read: h.p_flags & program_header::PF_R != 0,
                write: h.p_flags & program_header::PF_W != 0,
                execute: h.p_flags & program_header::PF_X != 0,
                shared: false,
                offset: 0,
                inode: 0,
                name: String::new(),
            });
            segments.extend(ProcRange::new(ProcAddr(h.p_vaddr), h.p_filesz).map(|range| (range, h.p_offset)));
        }
        maps.sort_by_key(|m| m.range.start);
        Ok(Self { file, segments, maps })
    }

    /// What was mapped.
    #[must_use]
    pub fn mappings(&self) -> &[Mapping] {
        &self.maps
    }
}

impl ReadMemory for Core {
    fn read_exact(&self, at: ProcAddr, buf: &mut [u8]) -> Result<(), Unreadable> {
        let bad = Unreadable { at, len_bytes: buf.len() as u64 };
        let end = at.checked_add(buf.len() as u64).ok_or(bad)?;
        let holds = |(range, _): &&(ProcRange, u64)| range.start <= at && end <= range.end;
        let (range, offset) = self.segments.iter().find(holds).ok_or(bad)?;
        let from = at.offset_from(range.start).and_then(|o| offset.checked_add(o)).ok_or(bad)?;
        self.file.read_exact_at(buf, from).map_err(|_| bad)
    }
}
