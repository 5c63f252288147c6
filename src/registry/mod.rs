//! What is applied, kept in the patched process's own memory: each patch's mapping begins with its record, so
//! a command that is started fresh finds it, with the original bytes and all.

use crate::addr::{ProcAddr, ProcRange};
use crate::maps::Mapping;
use crate::memory::ReadMemory;

mod codec;
mod payload;

pub use codec::{
    decode, encode, encode_mutable, CodecError, Confirmation, Header, Mutable, Share, State, Unwind, APPLIED,
    HEADER_BYTES, MUTABLE_AT, SHARES_AT, WHICH_AT,
};
pub use payload::{
    Arm, CanaryRecord, EntryRecord, FunctionRecord, HookRecord, OldRecord, Payload, RangeRecord, SessionKey,
};

/// A record that was found in a process.
#[derive(Clone, Debug)]
pub struct Found {
    /// The whole mapping: record, stub, segments.
    pub region: ProcRange,
    /// The part that changes.
    pub mutable: Mutable,
    /// The part that does not.
    pub payload: Payload,
}

/// A record that is there but cannot be read.
#[derive(Clone, Debug)]
pub struct Broken {
    /// Where it begins.
    pub at: ProcAddr,
    /// Why.
    pub error: CodecError,
}

/// All records, in the order in which the patches were applied.
///
/// # Errors
///
/// A mapping has the mark of a record but is none.
pub fn find<M: ReadMemory + ?Sized>(memory: &M, maps: &[Mapping]) -> Result<Vec<Found>, Broken> {
    let candidates: Vec<&Mapping> =
        maps.iter().filter(|m| m.read && !m.write && !m.shared && m.inode == 0 && m.name.is_empty()).collect();
    let mut heads = vec![[0u8; HEADER_BYTES]; candidates.len()];
    let mut parts: Vec<_> = candidates.iter().zip(&mut heads).map(|(m, h)| (m.range.start, h.as_mut_slice())).collect();
    let read = memory.read_many(&mut parts);
    let mut out = Vec::new();
    for ((mapping, head), ok) in candidates.iter().zip(&heads).zip(read) {
        if !ok || !Header::is_marked(head) {
            continue;
        }
        let at = mapping.range.start;
        let broken = |error| Broken { at, error };
        let header = Header::decode(head).map_err(broken)?;
        let record = memory.read_vec(at, header.record_bytes()).map_err(|_| broken(CodecError::Truncated))?;
        let (header, payload) = decode(&record).map_err(broken)?;
        let region = ProcRange::new(at, header.region_bytes).ok_or(broken(CodecError::Truncated))?;
        out.push(Found { region, mutable: header.mutable, payload });
    }
    out.sort_by_key(|f| f.mutable.sequence);
    Ok(out)
}
