//! The linker's map, for the one thing that it alone knows: where each input
//! section begins and ends.

/// Starts and ends of every input section with data, in a map of GNU ld, lld or mold. Inputs that are not
/// mapped (`.debug_*`, `.rela.*`) are listed with small "addresses", too: only the names of data count.
pub fn bounds(map: &str) -> Vec<u64> {
    let mut out = Vec::new();
    let mut before: Option<&str> = None;
    for line in map.lines() {
        let fields: Vec<&str> = line.split_ascii_whitespace().collect();
        let (name, at, len) = match fields[..] {
            // GNU ld: name, address, size, file; a long name stands on a line of its own
            [name, at, len, ..] if at.starts_with("0x") && len.starts_with("0x") => {
                (Some(name), prefixed(at), prefixed(len))
            }
            [at, len, ..] if at.starts_with("0x") && len.starts_with("0x") => (before, prefixed(at), prefixed(len)),
            // lld and mold: VMA, LMA (not mold's), size, alignment, then FILE:(SECTION)
            [vma, _, size, align, ..] if align.bytes().all(|b| b.is_ascii_digit()) => {
                (section_in(line), bare(vma), bare(size))
            }
            [vma, size, align, ..] if align.bytes().all(|b| b.is_ascii_digit()) => {
                (section_in(line), bare(vma), bare(size))
            }
            _ => (None, None, None),
        };
        before = if let [one] = fields[..] { Some(one) } else { None };
        if let (Some(at), Some(len)) = (at.filter(|a| *a > 0), len.filter(|l| *l > 0)) {
            if name.is_some_and(is_data) {
                out.push(at);
                out.extend(at.checked_add(len));
                out.extend(name.into_iter().flat_map(|name| merged(name, at, len)));
            }
        }
    }
    out
}

/// Where the constants of one width begin that the linker has merged: `.rodata.cst8` and its like hold nothing else.
fn merged(name: &str, at: u64, len: u64) -> impl Iterator<Item = u64> {
    let width = name.strip_prefix(".rodata.cst").and_then(|n| n.parse::<u64>().ok());
    let width = width.filter(|w| matches!(w, 4 | 8 | 16 | 32) && at.is_multiple_of(*w) && len < 1 << 24);
    let inside = width.map(|w| (1..len / w).filter_map(move |i| at.checked_add(i * w)));
    inside.into_iter().flatten()
}

/// `SECTION` of `FILE:(SECTION)`.
fn section_in(line: &str) -> Option<&str> {
    let (_, rest) = line.rsplit_once(":(")?;
    rest.trim_end().strip_suffix(')')
}

fn is_data(name: &str) -> bool {
    [".rodata", ".data", ".bss", ".lrodata", ".ldata", ".lbss", ".gcc_except_table"].iter().any(|p| name.starts_with(p))
}

fn prefixed(text: &str) -> Option<u64> {
    bare(text.strip_prefix("0x")?)
}

fn bare(text: &str) -> Option<u64> {
    u64::from_str_radix(text, 16).ok()
}

#[cfg(test)]
mod tests {
    #[test]
    fn both_kinds_of_map_give_bounds() {
        let gnu = " .rodata.str1.1\n                0x0000000000002004       0x13 main.o\n .text 0x1000 0x20 a.o\n";
        assert_eq!(super::bounds(gnu), [0x2004, 0x2017]);
        let lld = "             VMA              LMA     Size Align Out     In      Symbol\n\
            2004             2004       13     1         main.o:(.rodata..Lanon.1)\n\
            b688             b688      168     8         libstd.rlib(std.o):(.rela.text.lang_start)\n\
            1000             1000       20    16 .text\n";
        assert_eq!(super::bounds(lld), [0x2004, 0x2017]);
        let merged = "            2008             2008       18     8         <internal>:(.rodata.cst8)\n";
        assert_eq!(super::bounds(merged), [0x2008, 0x2020, 0x2010, 0x2018]);
        assert!(super::bounds("no map at all\n\u{0}").is_empty());
    }
}
