//! What patch-builder says: one structure, as JSON or as text.

use std::fmt::Write as _;

use serde::Serialize;

/// The refusals that may be overruled: what they protect is the meaning of data, which somebody may know better.
pub const ALLOWABLE: [&str; 3] = ["initial-value", "data-size", "constructor"];

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
#[derive(Clone, Debug, Serialize, PartialEq, Eq)]
pub struct Refusal {
    /// The rule, as `--allow` takes it.
    pub rule: String,
    /// The symbol concerned.
    pub symbol: String,
    /// What is wrong.
    pub message: String,
    /// What to do about it.
    pub remedy: String,
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
    /// `not compared`: there is no contract guard yet.
    pub types: &'static str,
}

impl Report {
    /// The report for a terminal.
    #[must_use]
    pub fn text(&self) -> String {
        let mut out = String::new();
        let changed = self.functions.iter().filter(|f| f.status == "changed").count();
        let _ = writeln!(
            out,
            "{}: {changed} changed and {} new functions, {} bytes of code, {} bytes of data; types: {}",
            self.name,
            self.functions.len() - changed,
            self.functions.iter().map(|f| f.new_size).sum::<u64>(),
            self.data.iter().map(|d| d.size).sum::<u64>(),
            self.types
        );
        for f in &self.functions {
            let sizes = f.old_size.map_or(String::new(), |old| format!("{old} -> "));
            let jump = match (f.status, f.entry_jump) {
                ("changed", false) => "  (no entry jump: only this patch calls it)",
                _ => "",
            };
            let _ = writeln!(out, "  {:7} {}  [{sizes}{} bytes]{jump}", f.status, f.demangled, f.new_size);
            let at = f.source.as_ref().map_or(String::new(), |s| format!("{s}: "));
            let _ = writeln!(out, "          {at}{}", f.reason);
        }
        let statics: Vec<_> = self.data.iter().filter(|d| d.kind == "static").collect();
        for d in statics {
            let _ = writeln!(out, "  static  {}  [{} bytes]", d.name, d.size);
        }
        if !self.noise.is_empty() {
            let names: std::collections::BTreeSet<_> = self.noise.iter().map(|n| n.function.as_str()).collect();
            let _ = writeln!(out, "  not patched, only lines moved: {} functions", names.len());
            for n in &self.noise {
                let _ = writeln!(out, "          {} ({}): {}", n.function, n.rule, n.detail);
            }
        }
        for w in &self.warnings {
            let _ = writeln!(out, "  warning: {w}");
        }
        out
    }

    /// The refusals for a terminal.
    #[must_use]
    pub fn refusal_text(&self) -> String {
        self.refusals.iter().fold(String::new(), |mut out, r| {
            let _ = writeln!(out, "refused [{}]: {}\n    what to do: {}", r.rule, r.message, r.remedy);
            out
        })
    }
}
