//! A whole ELF file as a build, and everything that comparing needs of it.
#![no_main]

use patch_builder::build::Build;
use patch_builder::side::Side;

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    if let Ok(build) = Build::parse("fuzz", data) {
        let _ = Side::new(build);
    }
});
