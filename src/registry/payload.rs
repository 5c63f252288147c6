//! The part of a record that does not change.

use serde::{Deserialize, Serialize};

use crate::addr::{ProcAddr, ProcRange};
use crate::patch::{HexBytes, HookKind};

/// A range, in JSON.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RangeRecord {
    /// First address.
    pub start: ProcAddr,
    /// First address after it.
    pub end: ProcAddr,
}

impl From<ProcRange> for RangeRecord {
    fn from(r: ProcRange) -> Self {
        Self { start: r.start, end: r.end }
    }
}

impl RangeRecord {
    /// The range, or `None` if it is upside down.
    #[must_use]
    pub fn range(&self) -> Option<ProcRange> {
        (self.start <= self.end).then_some(ProcRange { start: self.start, end: self.end })
    }
}

/// One entry jump: the undo journal.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct EntryRecord {
    /// Whose entry it is.
    pub function: String,
    /// Where.
    pub at: ProcAddr,
    /// What stood there.
    pub original: HexBytes,
    /// The jump; the same as `original` where the patch only gives back what another had taken.
    pub jump: HexBytes,
    /// The jump to the switch stub, where one word switches several entries.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub lead: Option<HexBytes>,
    /// What stood there before the apply, if it was the jump of the patch whose place this one took.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub before: Option<HexBytes>,
    /// The jump to the switch stub of a revert, where it is another: it goes on in the original, not in what was there before.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub back: Option<HexBytes>,
}

impl EntryRecord {
    /// Whether the patch has nothing of its own there.
    #[must_use]
    pub fn is_given_back(&self) -> bool {
        self.jump == self.original
    }

    /// Whether the bytes that stand there lead to a switch stub of the patch.
    #[must_use]
    pub fn by_stub(&self, there: &[u8]) -> bool {
        [&self.lead, &self.back].into_iter().flatten().any(|l| l.0 == there)
    }
}

/// The old version of a function, as mapped.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct OldRecord {
    /// Its body.
    pub body: RangeRecord,
    /// Whether the body branches back to its entry.
    pub branches_to_entry: bool,
    /// Its out-of-line parts.
    pub companions: Vec<RangeRecord>,
}

/// One function of the patch, as mapped.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FunctionRecord {
    /// Its symbol.
    pub name: String,
    /// The same, readable.
    pub demangled: String,
    /// The new code.
    pub new: RangeRecord,
    /// What it replaces.
    pub old: Option<OldRecord>,
}

/// A function of the patch that runs around an apply or a revert.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct HookRecord {
    /// Its symbol.
    pub symbol: String,
    /// When.
    pub kind: HookKind,
    /// Where.
    pub at: ProcAddr,
}

/// How a canary tells calls apart.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CanaryRecord {
    /// What the key is mixed with.
    pub salt: u64,
    /// Each function with the argument that is its key, counted from 1.
    pub keys: Vec<(String, u8)>,
    /// Where a thread says which arm the message runs that it handles, where the key is the message's session.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub session: Option<SessionKey>,
}

/// How a stub tells the arm of the message that its thread handles.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SessionKey {
    /// Where the byte is, from the thread's control block.
    pub offset: i32,
    /// Which of its bits.
    pub slot: u8,
}

/// One arm of a canary by session, since it began.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Arm {
    /// Messages whose handling has ended.
    pub messages: u64,
    /// Panics in them.
    pub panics: u64,
    /// Those of which the program said that they failed (`Agent::observe`).
    #[serde(default)]
    pub failed: u64,
    /// How many were timed: one in some.
    #[serde(default)]
    pub timed: u64,
    /// Half of the timed messages took at most so long, in nanoseconds; 0 if none was timed. Upper bounds of powers of two.
    pub p50_ns: u64,
    /// 99 of 100 did.
    pub p99_ns: u64,
}

/// The part of a record that does not change.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Payload {
    /// The patch's name.
    pub patch: String,
    /// SHA-256 of the patch file.
    pub digest: HexBytes,
    /// Build-id of the image.
    pub build_id: HexBytes,
    /// The patch's own address zero.
    pub base: ProcAddr,
    /// The stub page.
    pub stub: ProcAddr,
    /// The unwind table, terminator included.
    pub eh_frame: Option<RangeRecord>,
    /// Bytes of the record's part of the mapping: whole pages.
    pub record_bytes: u64,
    /// Whether old and new code agree on all that they share, so that they may run side by side.
    #[serde(default)]
    pub beside: bool,
    /// The revision that its signature gave.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub revision: Option<u64>,
    /// How calls are told apart, if only a share of them goes to the new code.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub canary: Option<CanaryRecord>,
    /// Its hooks.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub hooks: Vec<HookRecord>,
    /// The entry jumps.
    pub entries: Vec<EntryRecord>,
    /// The functions.
    pub functions: Vec<FunctionRecord>,
}

impl Payload {
    /// How many entries lead into the patch when it is applied.
    #[must_use]
    pub fn jumps(&self) -> usize {
        self.entries.iter().filter(|e| !e.is_given_back()).count()
    }
}
