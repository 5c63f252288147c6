//! What patch-builder says: one structure, as JSON or as text.

mod detail;
mod page;
mod reasons;
mod text;

use serde::Serialize;

pub use detail::{Cell, Detail, Graph, Listing, Node, NodeKind, Row, RowKind};
pub use page::page;
pub use reasons::{Difference, Evidence, Why};
pub use text::Look;

/// The refusals that may be overruled: what they protect is the meaning of data and the contract between old and new
/// code, which somebody may know better.
pub const ALLOWABLE: [&str; 12] = [
    "merged",
    "initial-value",
    "data-size",
    "constructor",
    "no-types",
    "signature",
    "layout",
    "enum-value",
    "vtable",
    "async-state",
    "coroutine",
    "other-program",
];

/// One build in the report.
#[derive(Clone, Debug, Serialize)]
pub struct BuildInfo {
    /// Its GNU build-id in hex.
    pub build_id: String,
    /// The path it was read from.
    pub path: String,
}

/// One function of the patch.
#[derive(Clone, Debug, Serialize)]
pub struct FunctionInfo {
    /// Its symbol.
    pub name: String,
    /// The same, readable.
    pub demangled: String,
    /// Its other symbols at the same address.
    pub aliases: Vec<String>,
    /// `changed` or `new`.
    pub status: &'static str,
    /// Why it is in the patch, in words.
    pub reason: String,
    /// The same for machines, the most telling first.
    pub why: Vec<Why>,
    /// The first instruction that differs in more than registers.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub difference: Option<Difference>,
    /// The change of its source lines, as a unified hunk; or lines of the new text whose code differs.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub hunk: Option<String>,
    /// What is to be known of the hunk, or why there is none.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub hunk_note: Option<String>,
    /// The old version's address, as linked.
    pub old_addr: Option<String>,
    /// The old version's length in bytes.
    pub old_size: Option<u64>,
    /// The new version's length in bytes.
    pub new_size: u64,
    /// Whether its old entry gets a jump.
    pub entry_jump: bool,
    /// Why it gets one, or why not.
    pub entry: String,
    /// The old version's out-of-line parts.
    pub companions: Vec<String>,
    /// `file:line` where the new version starts.
    pub source: Option<String>,
}

/// One piece of data that the patch carries.
#[derive(Clone, Debug, Serialize)]
pub struct DataInfo {
    /// Its symbol, or what it is.
    pub name: String,
    /// `constant`, `static` or `slot`.
    pub kind: &'static str,
    /// Its length in bytes.
    pub size: u64,
}

/// A function that differs by noise alone.
#[derive(Clone, Debug, Serialize)]
pub struct NoiseInfo {
    /// The function, readable.
    pub function: String,
    /// The rule that recognised it.
    pub rule: &'static str,
    /// What was seen.
    pub detail: String,
}

/// Something that was not compared, or only in part.
#[derive(Clone, Debug, Serialize, PartialEq, Eq)]
pub struct NotCompared {
    /// What it is: `types`, `debug-information`, `code-by-bytes`, `removed`, `data-by-use` or `sections`.
    pub what: &'static str,
    /// How many.
    pub count: u64,
    /// In words.
    pub text: String,
    /// The first few.
    pub examples: Vec<String>,
}

/// A function of the patch that a thread may never leave.
#[derive(Clone, Debug, Serialize, PartialEq, Eq)]
pub struct NeverLeft {
    /// The function, readable.
    pub function: String,
    /// `main`, `thread-start`, `event-loop` or `above-event-loop`.
    pub kind: &'static str,
    /// Why, in words.
    pub reason: String,
    /// Functions to patch in its place, the best first.
    pub instead: Vec<String>,
    /// What to do.
    pub remedy: String,
}

/// A reason not to write a patch.
#[derive(Clone, Debug, Default, Serialize, PartialEq, Eq)]
pub struct Refusal {
    /// The rule, as `--allow` takes it.
    pub rule: String,
    /// The symbol concerned.
    pub symbol: String,
    /// What is wrong.
    pub message: String,
    /// What to do about it.
    pub remedy: String,
    /// How it was, line by line, where two versions say it best (a layout, a signature).
    #[serde(skip_serializing_if = "Option::is_none")]
    pub old: Option<String>,
    /// How it is now.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub new: Option<String>,
}

/// Everything that a run found.
#[derive(Clone, Debug, Serialize)]
pub struct Report {
    /// The patch's name.
    pub name: String,
    /// The old build.
    pub target: BuildInfo,
    /// The new build.
    pub new: BuildInfo,
    /// Functions in the patch.
    pub functions: Vec<FunctionInfo>,
    /// Data in the patch.
    pub data: Vec<DataInfo>,
    /// Functions that differ by noise alone.
    pub noise: Vec<NoiseInfo>,
    /// Reasons not to write it.
    pub refusals: Vec<Refusal>,
    /// What the user should know.
    pub warnings: Vec<String>,
    /// Functions of the patch that a thread may never leave.
    pub may_never_leave: Vec<NeverLeft>,
    /// What was not compared.
    pub not_compared: Vec<NotCompared>,
    /// What of the types was compared.
    pub types: String,
    /// What differs in types and does no harm.
    pub type_notes: Vec<String>,
}
