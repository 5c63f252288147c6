//! The kernel's list of mappings.
#![no_main]

use livepatch::addr::{ProcAddr, ProcRange};
use livepatch::maps::{find, holes, parse};

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    let Ok(maps) = parse(data) else { return };
    let _ = find(&maps, ProcAddr(0x7fff_0000_1000));
    if let Some(window) = ProcRange::new(ProcAddr(0x1000), 0x7fff_ffff_0000) {
        let _ = holes(&maps, window);
    }
});
