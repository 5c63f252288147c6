//! A linker's map, taken for that of a real build.
#![no_main]

use patch_builder::build::Build;
use patch_builder::side::Side;

const OLD: &[u8] = include_bytes!("../pairs/old");

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    let mut build = Build::parse("old", OLD).expect("the stored build is whole");
    build.add_link_map(&String::from_utf8_lossy(data));
    let _ = Side::new(build);
});
