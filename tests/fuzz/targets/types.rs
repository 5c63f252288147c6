//! Debug information with bytes flipped: DWARF 5 of gcc, DWARF 4 with type units of clang++, and that of rustc.
#![no_main]

use std::path::Path;
use std::sync::OnceLock;

use object::{Object as _, ObjectSection as _};
use patch_builder::types::{Depth, Types};

const BUILDS: [&[u8]; 3] =
    [include_bytes!("../pairs/new"), include_bytes!("../pairs/types-cpp"), include_bytes!("../pairs/types-rust")];

/// Where the debug sections of a build lie in its file: start, length.
fn places(bytes: &[u8]) -> Vec<(usize, usize)> {
    let file = object::File::parse(bytes).expect("the stored build is whole");
    let debug = file.sections().filter(|s| s.name().is_ok_and(|n| n.starts_with(".debug_")));
    debug
        .filter_map(|s| s.file_range())
        .filter(|(_, len)| *len > 0)
        .map(|(at, len)| (at as usize, len as usize))
        .collect()
}

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    static PLACES: OnceLock<[Vec<(usize, usize)>; 3]> = OnceLock::new();
    let all = PLACES.get_or_init(|| BUILDS.map(places));
    let Some((which, flips)) = data.split_first() else { return };
    let which = usize::from(*which) % BUILDS.len();
    let mut bytes = BUILDS[which].to_vec();
    // Four bytes a flip: section, where, which bits.
    for flip in flips.chunks_exact(4).take(16) {
        let (at, len) = all[which][usize::from(flip[0]) % all[which].len()];
        bytes[at + usize::from(u16::from_le_bytes([flip[1], flip[2]])) % len] ^= flip[3];
    }
    for depth in [Depth::Contracts, Depth::Bodies] {
        let types = Types::read(Path::new("fuzz"), &bytes, depth);
        for name in types.defined() {
            for def in types.defs(name) {
                let record = types.record(name, def);
                assert!(!record.text.is_empty(), "{} has no layout", types.name(name));
            }
        }
        for f in &types.functions {
            let _ = types.place(f.at);
        }
    }
});
