//! Line tables.
#![no_main]

use patch_builder::build::Lines;

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    let all = [(0, u64::MAX / 2)];
    let lines = Lines::load(data, &all);
    let _ = lines.rows_in(0x1000, 0x10000).len();
    let _ = lines.source(0x1139);
});
