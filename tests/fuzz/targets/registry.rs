//! The record that the engine keeps in the patched process: as bytes, and as a payload under a header that is right.
#![no_main]

use livepatch::registry::{decode, encode, Header};
use sha2::{Digest as _, Sha256};

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    let _ = Header::is_marked(data);
    if let Ok(header) = Header::decode(data) {
        let _ = header.record_bytes();
    }
    let _ = decode(data);
    // The same as a payload, so that the checksum hides nothing.
    let mut record = include_bytes!("../pairs/record-header").to_vec();
    record[24..32].copy_from_slice(&(1_u64 << 40).to_le_bytes());
    record[32..40].copy_from_slice(&(data.len() as u64).to_le_bytes());
    record[40..72].copy_from_slice(&Sha256::digest(data));
    record.extend(data);
    if let Ok((header, payload)) = decode(&record) {
        let again = encode(&payload, &header.mutable, header.region_bytes);
        let (_, same) = decode(&again).expect("what was read can be written");
        assert_eq!(payload, same, "what was written reads back");
    }
});
