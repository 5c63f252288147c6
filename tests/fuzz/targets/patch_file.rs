//! The reader of patch files.
#![no_main]

use livepatch::patch::PatchFile;

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    let Ok(patch) = PatchFile::parse(data) else { return };
    // What was accepted can be asked about.
    let _ = (patch.len_bytes(), patch.manifest.functions.len(), patch.relocs.len());
});
