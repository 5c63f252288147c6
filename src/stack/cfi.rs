//! The unwind tables of a process's images, read from its memory.

use gimli::{
    BaseAddresses, CieOrFde, EhFrame, EhFrameHdr, EndianSlice, FrameDescriptionEntry, LittleEndian, UnwindSection,
};

use crate::addr::{ProcAddr, ProcRange};
use crate::elf;
use crate::image::Image;
use crate::memory::ReadMemory;

/// Bytes of unwind table that are read at most for one image.
const MAX_LEN_BYTES: u64 = 256 << 20;

pub(super) type Bytes<'a> = EndianSlice<'a, LittleEndian>;
pub(super) type Fde<'a> = FrameDescriptionEntry<Bytes<'a>>;

/// The tables of one image or patch.
#[derive(Debug)]
struct Table {
    /// Code that it may describe.
    code: ProcRange,
    index: Index,
    /// `.eh_frame` with its address.
    frames: (ProcAddr, Vec<u8>),
}

/// Where to find the description of an address.
#[derive(Debug)]
enum Index {
    /// `.eh_frame_hdr` with its address.
    Header(ProcAddr, Vec<u8>),
    /// Start, end and offset in the table of each description, ascending.
    Sorted(Vec<(u64, u64, usize)>),
}

/// The unwind tables of all images.
#[derive(Debug, Default)]
pub struct Cfi(Vec<Table>);

/// A description of the code at one address, with what it is to be read with.
pub(super) struct Found<'a> {
    pub fde: Fde<'a>,
    pub section: EhFrame<Bytes<'a>>,
    pub bases: BaseAddresses,
}

impl Cfi {
    /// Reads the tables of all `images` that have one.
    pub fn load<M: ReadMemory + ?Sized>(memory: &M, images: &[Image]) -> Self {
        Self(images.iter().filter_map(|i| Table::of_image(memory, i)).collect())
    }

    /// Adds the unwind table of a patch.
    pub fn add_patch<M: ReadMemory + ?Sized>(&mut self, memory: &M, code: ProcRange, at: ProcAddr, len_bytes: u64) {
        if let Ok(bytes) = memory.read_vec(at, len_bytes) {
            self.0.push(Table::sorted(code, at, bytes));
        }
    }

    /// The description of the code at `pc`.
    pub(super) fn find(&self, pc: ProcAddr) -> Option<Found<'_>> {
        self.0.iter().filter(|t| t.code.contains(pc)).find_map(|t| t.find(pc))
    }
}

impl Table {
    /// A table without an index of its own.
    fn sorted(code: ProcRange, at: ProcAddr, bytes: Vec<u8>) -> Self {
        let mut all = Vec::new();
        let section = EhFrame::new(&bytes, LittleEndian);
        let bases = BaseAddresses::default().set_eh_frame(at.0).set_text(code.start.0);
        let mut entries = section.entries(&bases);
        // What follows damage is not described.
        while let Ok(Some(entry)) = entries.next() {
            let CieOrFde::Fde(partial) = entry else { continue };
            let Ok(fde) = partial.parse(EhFrame::cie_from_offset) else { continue };
            all.push((fde.initial_address(), fde.end_address(), fde.offset()));
        }
        all.sort_unstable();
        Self { code, index: Index::Sorted(all), frames: (at, bytes) }
    }

    fn of_image<M: ReadMemory + ?Sized>(memory: &M, image: &Image) -> Option<Self> {
        let Some(header) = image.head.of_kind(elf::PT_GNU_EH_FRAME).next() else {
            let (at, len_bytes) = image.eh_frame?;
            let at = image.to_process(at, len_bytes)?;
            return Some(Self::sorted(image.range, at, memory.read_vec(at, len_bytes.min(MAX_LEN_BYTES)).ok()?));
        };
        let index_at = image.to_process(header.at, header.len_bytes)?;
        let index = memory.read_vec(index_at, header.len_bytes.min(MAX_LEN_BYTES)).ok()?;
        let bases = BaseAddresses::default().set_eh_frame_hdr(index_at.0);
        let parsed = EhFrameHdr::new(&index, LittleEndian).parse(&bases, 8).ok()?;
        let gimli::Pointer::Direct(frames_at) = parsed.eh_frame_ptr() else { return None };
        let frames_at = ProcAddr(frames_at);
        // Its length is written nowhere: it goes on at most to the end of its segment.
        let end = image.head.of_kind(elf::PT_LOAD).find_map(|s| {
            let start = image.to_process(s.at, s.len_bytes)?;
            let range = ProcRange::new(start, s.len_bytes)?;
            range.contains(frames_at).then_some(range.end)
        })?;
        let len_bytes = end.offset_from(frames_at)?.min(MAX_LEN_BYTES);
        let frames = memory.read_vec(frames_at, len_bytes).ok()?;
        Some(Self { code: image.range, index: Index::Header(index_at, index), frames: (frames_at, frames) })
    }

    fn find(&self, pc: ProcAddr) -> Option<Found<'_>> {
        let section = EhFrame::new(&self.frames.1, LittleEndian);
        let mut bases = BaseAddresses::default().set_eh_frame(self.frames.0 .0).set_text(self.code.start.0);
        let fde = match &self.index {
            Index::Header(at, index) => {
                bases = bases.set_eh_frame_hdr(at.0);
                let parsed = EhFrameHdr::new(index, LittleEndian).parse(&bases, 8).ok()?;
                parsed.table()?.fde_for_address(&section, &bases, pc.0, EhFrame::cie_from_offset).ok()?
            }
            Index::Sorted(all) => {
                let (_, end, offset) = all.get(all.partition_point(|(start, ..)| *start <= pc.0).checked_sub(1)?)?;
                let fde = || section.fde_from_offset(&bases, (*offset).into(), EhFrame::cie_from_offset).ok();
                (pc.0 < *end).then(fde)??
            }
        };
        Some(Found { fde, section, bases })
    }
}
