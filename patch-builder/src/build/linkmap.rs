//! The linker's map, for the one thing that it alone knows: where each input
//! section begins and ends.

/// Starts and ends of everything with an address and a length in a map of GNU ld, lld or mold.
/// Lines that are something else are passed over; what is no address of the image does no harm.
pub fn bounds(map: &str) -> Vec<u64> {
    let mut out = Vec::new();
    for line in map.lines() {
        let fields: Vec<&str> = line.split_ascii_whitespace().collect();
        let gnu = fields.windows(2).find_map(|w| Some((prefixed(w[0])?, prefixed(w[1])?)));
        let lld = || match fields[..] {
            // VMA LMA Size Align Out/In/Symbol
            [vma, _, size, align, _, ..] if align.bytes().all(|b| b.is_ascii_digit()) => {
                Some((bare(vma)?, bare(size)?))
            }
            _ => None,
        };
        if let Some((at, len)) = gnu.or_else(lld).filter(|(at, len)| *at > 0 && *len > 0) {
            out.push(at);
            out.extend(at.checked_add(len));
        }
    }
    out
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
        assert_eq!(super::bounds(gnu), [0x2004, 0x2017, 0x1000, 0x1020]);
        let lld = "             VMA              LMA     Size Align Out     In      Symbol\n            2004             2004       13     1         main.o:(.rodata)\n";
        assert_eq!(super::bounds(lld), [0x2004, 0x2017]);
        assert!(super::bounds("no map at all\n\u{0}").is_empty());
    }
}
