//! What patch-builder says: one structure, as JSON or as text.

mod text;

use serde::Serialize;

pub use text::Look;

/// The refusals that may be overruled: what they protect is the meaning of data and the contract between old and new
/// code, which somebody may know better.
pub const ALLOWABLE: [&str; 10] = [
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
    /// Why it is in the patch.
    pub reason: String,
    /// The old version's address, as linked.
    pub old_addr: Option<String>,
    /// The old version's length in bytes.
    pub old_size: Option<u64>,
    /// The new version's length in bytes.
    pub new_size: u64,
    /// Whether its old entry gets a jump.
    pub entry_jump: bool,
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
    /// What of the types was compared.
    pub types: String,
    /// What differs in types and does no harm.
    pub type_notes: Vec<String>,
}
