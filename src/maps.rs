//! /proc/PID/maps: what is mapped where, and what room is left.

use crate::addr::{ProcAddr, ProcRange};

/// Bytes of a page.
pub const PAGE: u64 = 4096;

/// One line of /proc/PID/maps.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mapping {
    /// Its addresses.
    pub range: ProcRange,
    /// Readable.
    pub read: bool,
    /// Writable.
    pub write: bool,
    /// Executable.
    pub execute: bool,
    /// Shared rather than private.
    pub shared: bool,
    /// Offset of its first byte in the file.
    pub offset: u64,
    /// Inode of the file, 0 if there is none.
    pub inode: u64,
    /// Path, `[stack]` and the like, or empty.
    pub name: String,
}

/// A line of the maps file that is not as proc(5) says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MapsError(pub String);

impl std::fmt::Display for MapsError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "/proc/PID/maps has an unknown line: {:?}", self.0)
    }
}

impl std::error::Error for MapsError {}

/// Reads the whole file, in ascending order as the kernel writes it.
///
/// # Errors
///
/// A line that is not as proc(5) says.
pub fn parse(text: &[u8]) -> Result<Vec<Mapping>, MapsError> {
    let mut out: Vec<Mapping> = Vec::with_capacity(text.len() / 64);
    for line in text.split(|b| *b == b'\n').filter(|l| !l.is_empty()) {
        let mapping = parse_line(line).filter(|m| out.last().is_none_or(|last| last.range.end <= m.range.start));
        out.push(mapping.ok_or_else(|| MapsError(String::from_utf8_lossy(line).into_owned()))?);
    }
    Ok(out)
}

fn parse_line(line: &[u8]) -> Option<Mapping> {
    let mut rest = line;
    let mut field = || {
        let end = rest.iter().position(|b| *b == b' ').unwrap_or(rest.len());
        let (head, tail) = rest.split_at(end);
        rest = tail.get(1..).unwrap_or(&[]);
        std::str::from_utf8(head).ok()
    };
    let (start, end) = field()?.split_once('-')?;
    let perms = field()?.as_bytes().first_chunk::<4>().copied()?;
    let offset = u64::from_str_radix(field()?, 16).ok()?;
    let _device = field()?;
    let inode = field()?.parse().ok()?;
    let name = String::from_utf8_lossy(rest.trim_ascii_start()).into_owned();
    let start = ProcAddr(u64::from_str_radix(start, 16).ok()?);
    let end = ProcAddr(u64::from_str_radix(end, 16).ok()?);
    if start > end {
        return None;
    }
    let [read, write, execute, shared] = perms;
    Some(Mapping {
        range: ProcRange { start, end },
        read: read == b'r',
        write: write == b'w',
        execute: execute == b'x',
        shared: shared == b's',
        offset,
        inode,
        name,
    })
}

/// The mapping that holds `addr`; `maps` in ascending order.
#[must_use]
pub fn find(maps: &[Mapping], addr: ProcAddr) -> Option<&Mapping> {
    let after = maps.partition_point(|m| m.range.start <= addr);
    maps.get(after.checked_sub(1)?).filter(|m| m.range.contains(addr))
}

/// The unmapped ranges within `window`, ascending; `maps` in ascending order.
#[must_use]
pub fn holes(maps: &[Mapping], window: ProcRange) -> Vec<ProcRange> {
    let mut out = Vec::new();
    let mut from = window.start;
    for m in maps {
        if m.range.start >= window.end {
            break;
        }
        if m.range.start > from {
            out.push(ProcRange { start: from, end: m.range.start });
        }
        from = from.max(m.range.end);
    }
    if from < window.end {
        out.push(ProcRange { start: from, end: window.end });
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    const TEXT: &[u8] =
        b"555555554000-555555556000 r-xp 00001000 fe:00 1234                       /tmp/a b (deleted)\n\
        7ffff7fc1000-7ffff7fc5000 r--p 00000000 00:00 0                          [vvar]\n\
        7ffff7ffe000-7ffff7fff000 rw-s 00000000 00:00 0 \n\
        ffffffffff600000-ffffffffff601000 --xp 00000000 00:00 0                  [vsyscall]\n";

    #[test]
    fn lines_are_read_whole() {
        let maps = parse(TEXT).unwrap();
        assert_eq!(maps.len(), 4);
        assert_eq!(maps[0].name, "/tmp/a b (deleted)");
        assert!(maps[0].execute && !maps[0].write && maps[0].offset == 0x1000 && maps[0].inode == 1234);
        assert!(maps[2].shared && maps[2].name.is_empty());
        assert_eq!(find(&maps, ProcAddr(0x5555_5555_5fff)), Some(&maps[0]));
        assert_eq!(find(&maps, ProcAddr(0x5555_5555_6000)), None);
        assert_eq!(find(&maps, ProcAddr(0)), None);
    }

    #[test]
    fn damaged_lines_are_errors() {
        for bad in ["x", "1-", "2000-1000 r-xp 0 0 0", "1000-2000 r-x 0 0 0", "1000-2000 r-xp 0 0 x"] {
            assert!(parse(bad.as_bytes()).is_err(), "{bad}");
        }
        assert!(parse(b"2000-3000 r-xp 0 0:0 0\n1000-2000 r-xp 0 0:0 0\n").is_err(), "descending");
    }

    #[test]
    fn holes_lie_between_mappings() {
        let maps = parse(b"2000-3000 r-xp 0 0:0 0\n3000-4000 rw-p 0 0:0 0\n6000-7000 rw-p 0 0:0 0\n").unwrap();
        let range = |a, b| ProcRange { start: ProcAddr(a), end: ProcAddr(b) };
        assert_eq!(
            holes(&maps, range(0x1000, 0x8000)),
            [range(0x1000, 0x2000), range(0x4000, 0x6000), range(0x7000, 0x8000)]
        );
        assert_eq!(holes(&maps, range(0x2800, 0x5000)), [range(0x4000, 0x5000)]);
        assert_eq!(holes(&[], range(1, 2)), [range(1, 2)]);
    }
}
