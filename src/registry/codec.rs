//! The record's bytes. Strict: what it does not know, it rejects; nothing in it makes it panic.
//!
//! | offset | bytes | |
//! | --- | --- | --- |
//! | 0 | 16 | mark |
//! | 16 | 4 | version |
//! | 20 | 4 | zero |
//! | 24 | 8 | bytes of the whole mapping |
//! | 32 | 8 | bytes of the payload |
//! | 40 | 32 | SHA-256 of the payload |
//! | 72 | 4 | state: 1 staged, 2 applied, 3 reverted |
//! | 76 | 4 | unwind tables: 0 not registered, 1 registered, 2 a thread is registering them, or was when the command died |
//! | 80 | 8 | sequence number of the last apply |
//! | 88 | 8 | Unix time of it, in seconds |
//! | 96 | 8 | its pause in nanoseconds |
//! | 104 | 8 | Unix time by which it is to be confirmed, or zero |
//! | 112 | 1 | 1 if it is confirmed |
//! | 113 | 1 | which of the two shares counts |
//! | 114 | 2 | zero |
//! | 116 | 4 | PID of the command that reverts it if it is not confirmed, or zero |
//! | 120 | 8 | two shares of a canary, each in 1/10,000: the canary stubs read them |
//! | 128 | | the payload, JSON |

use serde::{Deserialize, Serialize};
use sha2::Digest;

use super::{EntryRecord, Payload};
use crate::patch::HexBytes;

const MARK: [u8; 16] = *b"livepatch-record";
/// 1 had neither `before` nor `back`: a patch that took the place of another wrote all entries in one hold.
const VERSION: u32 = 2;
/// The oldest that is read.
const OLDEST: u32 = 1;

/// Bytes before the payload.
pub const HEADER_BYTES: usize = 128;

/// Offset of the part that changes. It begins with the state, which switch stubs read.
pub const MUTABLE_AT: u64 = 72;

/// Bytes of it.
const MUTABLE_BYTES: usize = 56;

/// The state's first byte of an applied patch.
pub const APPLIED: u8 = 2;

/// Longest payload that is accepted.
const MAX_PAYLOAD: u64 = 256 << 20;

/// Why bytes are no record.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum CodecError {
    /// The mark is missing.
    #[error("it does not begin as a record does")]
    Mark,
    /// Another version of livepatch wrote it.
    #[error("it is of version {0}; this livepatch knows versions {OLDEST} to {VERSION}")]
    Version(u32),
    /// It ends too soon.
    #[error("it is cut off")]
    Truncated,
    /// A field has a value that it cannot have.
    #[error("its field {0} is damaged")]
    Field(&'static str),
    /// The checksum is wrong.
    #[error("its checksum is wrong")]
    Checksum,
    /// The payload is not as expected.
    #[error("its payload is damaged: {0}")]
    Payload(String),
}

/// What a mapping is in.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum State {
    /// Everything is there, no entry leads to it.
    Staged,
    /// The entries lead to it.
    Applied,
    /// The entries are as they were before.
    Reverted,
}

/// Whether the process's unwinder knows the patch's tables.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Unwind {
    /// No.
    None,
    /// Yes.
    Registered,
    /// A thread was sent to register them, and nobody has seen it come back: they may be.
    Registering,
}

/// The part of a record that changes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Mutable {
    /// What the mapping is in.
    pub state: State,
    /// Whether its unwind tables are registered.
    pub unwind: Unwind,
    /// Orders the applies.
    pub sequence: u64,
    /// When it was applied last, Unix time.
    pub applied_at_s: u64,
    /// What that cost.
    pub pause_ns: u64,
    /// Whether it is meant to stay.
    pub confirmation: Confirmation,
    /// How much of the calls goes to the new code, for a canary.
    pub share: Share,
}

/// The share of a canary, as its stubs read it: of two words the one that `which` says, so that a change is one byte.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Share {
    /// In 1/10,000.
    pub words: [u32; 2],
    /// Which of the words counts.
    pub which: u8,
}

impl Share {
    /// All that counts.
    #[must_use]
    pub fn of(share: u32) -> Self {
        Self { words: [share, 0], which: 0 }
    }

    /// The word that counts.
    #[must_use]
    pub fn value(self) -> u32 {
        self.words[usize::from(self.which != 0)]
    }
}

/// Offset of the byte that says which share counts.
pub const WHICH_AT: u64 = 113;

/// Offset of the two shares.
pub const SHARES_AT: u64 = 120;

/// Whether an applied patch is meant to stay.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Confirmation {
    /// Somebody said so.
    pub confirmed: bool,
    /// Unix time until which somebody is to say so; 0: no limit.
    pub by_s: u64,
    /// The command that reverts it otherwise; 0: none.
    pub watcher: u32,
}

/// The fixed part of a record.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Header {
    /// Bytes of the whole mapping.
    pub region_bytes: u64,
    /// Bytes of the payload.
    pub payload_bytes: u64,
    checksum: [u8; 32],
    /// The part that changes.
    pub mutable: Mutable,
}

fn bytes<const N: usize>(from: &[u8], at: usize) -> Result<[u8; N], CodecError> {
    from.get(at..).and_then(|b| b.first_chunk::<N>()).copied().ok_or(CodecError::Truncated)
}

fn u32_at(from: &[u8], at: usize) -> Result<u32, CodecError> {
    bytes(from, at).map(u32::from_le_bytes)
}

fn u64_at(from: &[u8], at: usize) -> Result<u64, CodecError> {
    bytes(from, at).map(u64::from_le_bytes)
}

impl Header {
    /// Whether bytes begin as a record does.
    #[must_use]
    pub fn is_marked(head: &[u8]) -> bool {
        head.starts_with(&MARK)
    }

    /// Reads the first [`HEADER_BYTES`] bytes of a record.
    ///
    /// # Errors
    ///
    /// They are not as the table says.
    pub fn decode(head: &[u8]) -> Result<Self, CodecError> {
        if !Self::is_marked(head) {
            return Err(CodecError::Mark);
        }
        let version = u32_at(head, 16)?;
        if !(OLDEST..=VERSION).contains(&version) {
            return Err(CodecError::Version(version));
        }
        let state = match u32_at(head, 72)? {
            1 => State::Staged,
            2 => State::Applied,
            3 => State::Reverted,
            _ => return Err(CodecError::Field("state")),
        };
        let unwind = match u32_at(head, 76)? {
            0 => Unwind::None,
            1 => Unwind::Registered,
            2 => Unwind::Registering,
            _ => return Err(CodecError::Field("unwind")),
        };
        let flags: [u8; 4] = bytes(head, 112)?;
        if u32_at(head, 20)? != 0 || flags[2..] != [0; 2] {
            return Err(CodecError::Field("reserved"));
        }
        let (confirmed, which) = match flags {
            [confirmed @ 0..=1, which @ 0..=1, ..] => (confirmed == 1, which),
            _ => return Err(CodecError::Field("confirmed")),
        };
        let (region_bytes, payload_bytes) = (u64_at(head, 24)?, u64_at(head, 32)?);
        if payload_bytes > MAX_PAYLOAD || region_bytes < payload_bytes + HEADER_BYTES as u64 {
            return Err(CodecError::Field("length"));
        }
        let mutable = Mutable {
            state,
            unwind,
            sequence: u64_at(head, 80)?,
            applied_at_s: u64_at(head, 88)?,
            pause_ns: u64_at(head, 96)?,
            confirmation: Confirmation { confirmed, by_s: u64_at(head, 104)?, watcher: u32_at(head, 116)? },
            share: Share { words: [u32_at(head, 120)?, u32_at(head, 124)?], which },
        };
        Ok(Self { region_bytes, payload_bytes, checksum: bytes(head, 40)?, mutable })
    }

    /// Bytes of header and payload.
    #[must_use]
    pub fn record_bytes(&self) -> u64 {
        self.payload_bytes + HEADER_BYTES as u64
    }
}

/// The bytes of the part that changes; they belong at [`MUTABLE_AT`].
#[must_use]
pub fn encode_mutable(m: &Mutable) -> [u8; MUTABLE_BYTES] {
    let state: u32 = match m.state {
        State::Staged => 1,
        State::Applied => APPLIED.into(),
        State::Reverted => 3,
    };
    let unwind: u32 = match m.unwind {
        Unwind::None => 0,
        Unwind::Registered => 1,
        Unwind::Registering => 2,
    };
    let mut out = [0; MUTABLE_BYTES];
    out[..4].copy_from_slice(&state.to_le_bytes());
    out[4..8].copy_from_slice(&unwind.to_le_bytes());
    out[8..16].copy_from_slice(&m.sequence.to_le_bytes());
    out[16..24].copy_from_slice(&m.applied_at_s.to_le_bytes());
    out[24..32].copy_from_slice(&m.pause_ns.to_le_bytes());
    out[32..40].copy_from_slice(&m.confirmation.by_s.to_le_bytes());
    out[40..42].copy_from_slice(&[u8::from(m.confirmation.confirmed), m.share.which]);
    out[44..48].copy_from_slice(&m.confirmation.watcher.to_le_bytes());
    out[48..52].copy_from_slice(&m.share.words[0].to_le_bytes());
    out[52..56].copy_from_slice(&m.share.words[1].to_le_bytes());
    out
}

/// A record's bytes, for a mapping of `region_bytes`.
///
/// # Panics
///
/// Never: a payload is always valid JSON.
#[must_use]
pub fn encode(payload: &Payload, mutable: &Mutable, region_bytes: u64) -> Vec<u8> {
    let json = serde_json::to_vec(payload).expect("a struct of strings and numbers");
    let mut out = Vec::with_capacity(HEADER_BYTES + json.len());
    out.extend(MARK);
    out.extend(VERSION.to_le_bytes());
    out.extend([0; 4]);
    out.extend(region_bytes.to_le_bytes());
    out.extend((json.len() as u64).to_le_bytes());
    out.extend(sha2::Sha256::digest(&json));
    out.extend(encode_mutable(mutable));
    out.extend(json);
    out
}

/// Reads a whole record.
///
/// # Errors
///
/// It is not as the table says.
pub fn decode(record: &[u8]) -> Result<(Header, Payload), CodecError> {
    let header = Header::decode(record)?;
    let len = usize::try_from(header.payload_bytes).map_err(|_| CodecError::Truncated)?;
    let json = record.get(HEADER_BYTES..).and_then(|j| j.get(..len)).ok_or(CodecError::Truncated)?;
    if sha2::Sha256::digest(json).as_slice() != header.checksum {
        return Err(CodecError::Checksum);
    }
    let payload: Payload = serde_json::from_slice(json).map_err(|e| CodecError::Payload(e.to_string()))?;
    check(&payload, &header)?;
    Ok((header, payload))
}

fn check(payload: &Payload, header: &Header) -> Result<(), CodecError> {
    let ranges = payload.functions.iter().flat_map(|f| {
        let old = f.old.iter().flat_map(|o| std::iter::once(&o.body).chain(&o.companions));
        std::iter::once(&f.new).chain(old)
    });
    if ranges.chain(&payload.eh_frame).any(|r| r.range().is_none()) {
        return Err(CodecError::Field("range"));
    }
    let length = crate::patch::ENTRY_JUMP_LEN as usize;
    let fits = |b: &HexBytes| b.0.len() == length;
    let all = |e: &EntryRecord| {
        let more = [&e.lead, &e.before, &e.back];
        fits(&e.original) && fits(&e.jump) && more.into_iter().flatten().all(fits)
    };
    if !payload.entries.iter().all(all) {
        return Err(CodecError::Field("entry"));
    }
    let fits = header.record_bytes() <= payload.record_bytes && payload.record_bytes <= header.region_bytes;
    if !fits || !payload.record_bytes.is_multiple_of(crate::maps::PAGE) {
        return Err(CodecError::Field("length"));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::addr::ProcAddr;
    use crate::registry::{FunctionRecord, OldRecord, RangeRecord};
    use proptest::prelude::*;

    fn payload() -> Payload {
        let range = RangeRecord { start: ProcAddr(0x1000), end: ProcAddr(0x1040) };
        Payload {
            patch: "fee".into(),
            digest: HexBytes(vec![7; 32]),
            build_id: HexBytes(vec![1, 2, 3]),
            base: ProcAddr(0x9000),
            stub: ProcAddr(0x8000),
            eh_frame: Some(range),
            record_bytes: 4096,
            beside: true,
            revision: None,
            canary: None,
            hooks: Vec::new(),
            entries: vec![EntryRecord {
                function: "f".into(),
                at: ProcAddr(0x1000),
                original: HexBytes(vec![1; 5]),
                jump: HexBytes(vec![2; 5]),
                lead: None,
                before: None,
                back: None,
            }],
            functions: vec![FunctionRecord {
                name: "f".into(),
                demangled: "f".into(),
                new: range,
                old: Some(OldRecord { body: range, branches_to_entry: false, companions: vec![range] }),
            }],
        }
    }

    const MUTABLE: Mutable = Mutable {
        state: State::Applied,
        unwind: Unwind::Registered,
        sequence: 3,
        applied_at_s: 4,
        pause_ns: 5,
        confirmation: Confirmation { confirmed: true, by_s: 6, watcher: 7 },
        share: Share { words: [8, 9], which: 1 },
    };

    #[test]
    fn what_is_written_is_read() {
        let bytes = encode(&payload(), &MUTABLE, 8192);
        let (header, read) = decode(&bytes).unwrap();
        assert_eq!((header.mutable, read), (MUTABLE, payload()));
        assert_eq!(bytes[MUTABLE_AT as usize..][..MUTABLE_BYTES], encode_mutable(&MUTABLE));
        for cut in 0..bytes.len() {
            assert!(decode(&bytes[..cut]).is_err(), "cut at {cut}");
        }
    }

    #[test]
    fn contradictions_are_errors() {
        let mut upside_down = payload();
        upside_down.functions[0].new.end = ProcAddr(0);
        assert_eq!(decode(&encode(&upside_down, &MUTABLE, 8192)).unwrap_err(), CodecError::Field("range"));
        let mut short = payload();
        short.entries[0].jump.0.pop();
        assert_eq!(decode(&encode(&short, &MUTABLE, 8192)).unwrap_err(), CodecError::Field("entry"));
        assert_eq!(decode(&encode(&payload(), &MUTABLE, 100)).unwrap_err(), CodecError::Field("length"));
    }

    proptest! {
        #[test]
        fn a_damaged_record_never_panics_and_never_passes(at in 0usize..2000, flip in 1u8..) {
            let mut bytes = encode(&payload(), &MUTABLE, 8192);
            let at = at % bytes.len();
            bytes[at] ^= flip;
            let read = decode(&bytes);
            // The region's length and the part that changes carry no checksum.
            let guarded = !(24..32).contains(&at) && !(72..128).contains(&at);
            prop_assert!(read.is_err() || !guarded);
        }

        #[test]
        fn noise_never_panics(noise in proptest::collection::vec(any::<u8>(), 0..400)) {
            prop_assert!(decode(&noise).is_err());
            let mut marked = MARK.to_vec();
            marked.extend(noise);
            let _ = decode(&marked);
        }
    }
}
