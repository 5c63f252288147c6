//! A mapped image: ELF, load bias, identity. All of it read from the process's
//! memory, never from a path: the file may have been replaced or lie in another
//! mount namespace.

use crate::addr::{ImageAddr, LoadBias, ProcAddr, ProcRange};
use crate::elf::{self, DynSymbol, Head};
use crate::maps::Mapping;
use crate::memory::ReadMemory;

/// One ELF object mapped in a process.
#[derive(Clone, Debug)]
pub struct Image {
    /// Where it is relative to where it was linked.
    pub bias: LoadBias,
    /// From its first to its last loaded byte.
    pub range: ProcRange,
    /// Its program headers.
    pub head: Head,
    /// Its GNU build-id.
    pub build_id: Option<Vec<u8>>,
    /// What /proc/PID/maps calls it; for people.
    pub name: String,
    /// Its `.eh_frame`, where no program header tells of an index to it and its file was at hand: some static programs.
    pub eh_frame: Option<(ImageAddr, u64)>,
}

/// Every image that begins in one of `maps`. What cannot be read or is no ELF image is left out, and so is a file that somebody only reads, as
/// symbolizers do with the executable for a backtrace.
pub fn find_images<M: ReadMemory + ?Sized>(memory: &M, maps: &[Mapping]) -> Vec<Image> {
    let candidates: Vec<&Mapping> = maps
        .iter()
        .filter(|m| m.read && m.offset == 0 && (m.inode != 0 || m.name == "[vdso]"))
        .filter(|m| m.range.len_bytes() >= elf::HEAD_BYTES as u64)
        .collect();
    let mut heads = vec![[0u8; elf::HEAD_BYTES]; candidates.len()];
    let mut parts: Vec<_> =
        candidates.iter().zip(&mut heads).map(|(m, buf)| (m.range.start, buf.as_mut_slice())).collect();
    let read = memory.read_many(&mut parts);
    let mut out: Vec<Image> = Vec::new();
    for ((mapping, head), ok) in candidates.into_iter().zip(&heads).zip(read) {
        if !ok || !head.starts_with(b"\x7fELF") {
            continue;
        }
        // Segments of a small file share its first page: each of their mappings begins with the same header.
        if out.iter().any(|i| i.name == mapping.name && i.range.contains(mapping.range.start)) {
            continue;
        }
        if let Some(image) = Image::at(memory, mapping, head) {
            out.push(image);
        }
    }
    out
}

impl Image {
    fn at<M: ReadMemory + ?Sized>(memory: &M, mapping: &Mapping, head: &[u8]) -> Option<Self> {
        let head = Head::parse(head).ok()?;
        if head.segments.is_empty() {
            // Another class or machine: known to be there, nothing more.
            let (range, name) = (mapping.range, mapping.name.clone());
            return Some(Self { bias: LoadBias(0), range, head, build_id: None, name, eh_frame: None });
        }
        let (first, last) = head.extent()?;
        let page = ImageAddr(first.0 & !(crate::maps::PAGE - 1));
        let bias = LoadBias::between(page, mapping.range.start);
        let range = ProcRange::new(mapping.range.start, last.offset_from(page)?)?;
        let mut image = Self { bias, range, head, build_id: None, name: mapping.name.clone(), eh_frame: None };
        // Such a file is one mapping, code and all, and none of it is executable.
        let code = image.head.of_kind(elf::PT_LOAD).find(|s| s.flags & elf::PF_X != 0);
        let place = code.and_then(|s| image.to_process(s.at, 1));
        if !mapping.execute && place.is_some_and(|at| mapping.range.contains(at)) {
            return None;
        }
        let notes: Vec<_> = image.head.of_kind(elf::PT_NOTE).copied().collect();
        image.build_id = notes.iter().find_map(|s| {
            let at = image.to_process(s.at, s.len_bytes)?;
            elf::build_id(&memory.read_vec(at, s.len_bytes.min(1 << 16)).ok()?)
        });
        Some(image)
    }

    /// Where `len_bytes` bytes at `at` are mapped, if all of them lie in the image.
    #[must_use]
    pub fn to_process(&self, at: ImageAddr, len_bytes: u64) -> Option<ProcAddr> {
        let start = ProcAddr(at.0.wrapping_add(self.bias.0));
        let end = start.checked_add(len_bytes)?;
        (self.range.start <= start && end <= self.range.end).then_some(start)
    }

    /// Whether some loader starts it: it has an interpreter.
    #[must_use]
    pub fn has_interpreter(&self) -> bool {
        self.head.of_kind(elf::PT_INTERP).next().is_some()
    }

    /// The file's name without its folder, and without the kernel's word that it is deleted.
    #[must_use]
    pub fn short_name(&self) -> &str {
        let name = self.name.strip_suffix(" (deleted)").unwrap_or(&self.name);
        name.rsplit('/').next().unwrap_or(name)
    }

    /// Its build-id in hex, or `none`.
    #[must_use]
    pub fn build_id_hex(&self) -> String {
        self.build_id.as_ref().map_or_else(|| "none".into(), |id| id.iter().map(|b| format!("{b:02x}")).collect())
    }

    /// Its dynamic symbols, exports and imports; empty if it has none or they cannot be read.
    pub fn dynamic_symbols<M: ReadMemory + ?Sized>(&self, memory: &M) -> Vec<DynSymbol> {
        self.try_dynamic_symbols(memory).unwrap_or_default()
    }

    fn try_dynamic_symbols<M: ReadMemory + ?Sized>(&self, memory: &M) -> Option<Vec<DynSymbol>> {
        let (bytes, strings) = self.dynamic(memory)?.symbol_bytes(memory)?;
        Some(elf::dynamic_symbols(&bytes, &strings))
    }

    /// Its dynamic section; `None` if it has none or it cannot be read.
    pub fn dynamic<M: ReadMemory + ?Sized>(&self, memory: &M) -> Option<Dynamic> {
        let dynamic = self.head.of_kind(elf::PT_DYNAMIC).next()?;
        let table = memory.read_vec(self.to_process(dynamic.at, dynamic.len_bytes)?, dynamic.len_bytes).ok()?;
        let words = table.as_chunks::<16>().0.iter().map(|e| {
            let word = |i: usize| u64::from_le_bytes(std::array::from_fn(|k| e[i + k]));
            (word(0), word(8))
        });
        Some(Dynamic { entries: words.take_while(|(tag, _)| *tag != 0).collect(), range: self.range, bias: self.bias })
    }

    /// For an executable: where the dynamic section of every image is, in the order in which the loader took them
    /// (`struct r_debug` of link.h); empty if it does not say.
    pub fn load_order<M: ReadMemory + ?Sized>(&self, memory: &M) -> Vec<ProcAddr> {
        const DT_DEBUG: u64 = 21;
        let mut out = Vec::new();
        let debug = self.dynamic(memory).and_then(|d| d.get(DT_DEBUG)).filter(|at| *at != 0);
        let word = |at: u64, offset: u64| memory.read_u64(ProcAddr(at).checked_add(offset)?).ok();
        let mut next = debug.and_then(|at| word(at, 8));
        while let Some(map) = next.filter(|at| *at != 0 && out.len() < 1 << 16) {
            out.extend(word(map, 16).map(ProcAddr));
            next = word(map, 24);
        }
        out
    }
}

/// The dynamic section of an image.
#[derive(Clone, Debug)]
pub struct Dynamic {
    entries: Vec<(u64, u64)>,
    range: ProcRange,
    bias: LoadBias,
}

impl Dynamic {
    /// The values of every entry with this tag.
    pub fn all(&self, tag: u64) -> impl Iterator<Item = u64> + '_ {
        self.entries.iter().filter(move |(t, _)| *t == tag).map(|(_, v)| *v)
    }

    /// The value of the first entry with this tag.
    #[must_use]
    pub fn get(&self, tag: u64) -> Option<u64> {
        self.all(tag).next()
    }

    /// Where the first entry with this tag points. The loader of glibc adds the bias in place, others do not.
    #[must_use]
    pub fn place(&self, tag: u64) -> Option<ProcAddr> {
        let value = ProcAddr(self.get(tag)?);
        let moved = ProcAddr(value.0.wrapping_add(self.bias.0));
        [value, moved].into_iter().find(|at| self.range.contains(*at))
    }

    /// The bytes of its symbol table and of its strings.
    pub fn symbol_bytes<M: ReadMemory + ?Sized>(&self, memory: &M) -> Option<(Vec<u8>, Vec<u8>)> {
        const DT_HASH: u64 = 4;
        const DT_STRTAB: u64 = 5;
        const DT_SYMTAB: u64 = 6;
        const DT_STRSZ: u64 = 10;
        const DT_GNU_HASH: u64 = 0x6fff_fef5;
        let count = match self.place(DT_HASH) {
            Some(hash) => memory.read_u64(hash).ok()? >> 32,
            None => gnu_hash_count(memory, self.place(DT_GNU_HASH)?)?,
        };
        let symbols = memory.read_vec(self.place(DT_SYMTAB)?, count.checked_mul(elf::SYM_BYTES)?).ok()?;
        let strings = memory.read_vec(self.place(DT_STRTAB)?, self.get(DT_STRSZ)?).ok()?;
        Some((symbols, strings))
    }
}

/// How many symbols a DT_GNU_HASH table covers: the end of the chain of its highest bucket.
fn gnu_hash_count<M: ReadMemory + ?Sized>(memory: &M, at: ProcAddr) -> Option<u64> {
    let head = memory.read_vec(at, 16).ok()?;
    let word = |b: &[u8], i: usize| Some(u64::from(u32::from_le_bytes(*b.get(i * 4..)?.first_chunk()?)));
    let (buckets, first, bloom) = (word(&head, 0)?, word(&head, 1)?, word(&head, 2)?);
    let buckets_at = at.checked_add(16)?.checked_add(bloom.checked_mul(8)?)?;
    let bytes = memory.read_vec(buckets_at, buckets.checked_mul(4)?).ok()?;
    let highest = (0..bytes.len() / 4).filter_map(|i| word(&bytes, i)).max()?;
    if highest < first {
        return Some(first);
    }
    let chains_at = buckets_at.checked_add(buckets * 4)?;
    for index in highest..highest + (1 << 16) {
        let link = memory.read_vec(chains_at.checked_add((index - first) * 4)?, 4).ok()?;
        if word(&link, 0)? & 1 == 1 {
            return Some(index + 1);
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::Unreadable;

    /// This very process.
    struct Own;

    impl ReadMemory for Own {
        fn read_exact(&self, at: ProcAddr, buf: &mut [u8]) -> Result<(), Unreadable> {
            use std::os::unix::fs::FileExt;
            let bad = Unreadable { at, len_bytes: buf.len() as u64 };
            let file = std::fs::File::open("/proc/self/mem").map_err(|_| bad)?;
            file.read_exact_at(buf, at.0).map_err(|_| bad)
        }
    }

    #[test]
    fn our_own_images_are_found() {
        let maps = crate::maps::parse(&std::fs::read("/proc/self/maps").unwrap()).unwrap();
        let images = find_images(&Own, &maps);
        let libc = images.iter().find(|i| i.short_name().starts_with("libc.so")).expect("libc");
        assert!(libc.build_id.is_some());
        let symbols = libc.dynamic_symbols(&Own);
        let read = symbols.iter().find(|s| s.name == "epoll_wait").expect("epoll_wait");
        assert!(read.at.is_some_and(|at| libc.to_process(at, 1).is_some()));
        assert!(images.iter().any(|i| i.name == "[vdso]"));
        let own = our_address();
        assert!(images.iter().any(|i| i.range.contains(own) && i.has_interpreter()));
    }

    /// A file's bytes at an address.
    struct File(Vec<u8>, ProcAddr);

    impl ReadMemory for File {
        fn read_exact(&self, at: ProcAddr, buf: &mut [u8]) -> Result<(), Unreadable> {
            let bad = Unreadable { at, len_bytes: buf.len() as u64 };
            let from = usize::try_from(at.0.wrapping_sub(self.1 .0)).map_err(|_| bad)?;
            let there = self.0.get(from..).and_then(|b| b.get(..buf.len())).ok_or(bad)?;
            buf.copy_from_slice(there);
            Ok(())
        }
    }

    #[test]
    fn a_file_that_is_read_is_no_image() {
        let bytes = std::fs::read("/proc/self/exe").unwrap();
        let start = ProcAddr(0x7000_0000_0000);
        let end = ProcAddr(start.0 + (bytes.len() as u64).next_multiple_of(crate::maps::PAGE));
        let mapping = |execute| Mapping {
            range: ProcRange::new(start, end.0 - start.0).unwrap(),
            read: true,
            write: false,
            execute,
            shared: false,
            offset: 0,
            inode: 1,
            name: "program".into(),
        };
        let memory = File(bytes, start);
        assert_eq!(find_images(&memory, &[mapping(false)]).len(), 0);
        assert_eq!(find_images(&memory, &[mapping(true)]).len(), 1, "code that lies in one mapping with its header");
    }

    fn our_address() -> ProcAddr {
        let f: fn() = our_own_images_are_found;
        ProcAddr(f as usize as u64)
    }
}
