//! Why a function is in the patch.

use serde::Serialize;

/// What a reason rests on.
#[derive(Clone, Copy, Debug, Serialize, PartialEq, Eq, PartialOrd, Ord)]
#[serde(rename_all = "lowercase")]
pub enum Evidence {
    /// Both source texts.
    Text,
    /// The line tables of both builds.
    Lines,
    /// The instructions, sorted by the function that they come from.
    Code,
}

/// One reason for which a function is in the patch.
#[derive(Clone, Debug, Serialize, PartialEq, Eq, PartialOrd, Ord)]
#[serde(tag = "kind", rename_all = "kebab-case")]
#[non_exhaustive]
pub enum Why {
    /// Its own source changed.
    Source {
        /// `file:line` of its new version.
        at: Option<String>,
        /// What says so.
        evidence: Evidence,
    },
    /// The source of a function changed that the compiler put into this one.
    Inlined {
        /// That function.
        callee: String,
        /// `file:line` of the call.
        called_at: Option<String>,
        /// `file:line` of that function.
        declared_at: Option<String>,
        /// What says so.
        evidence: Evidence,
    },
    /// The layout of a type changed that it uses.
    Layout {
        /// The type.
        name: String,
    },
    /// A constant or the initial value of data changed.
    Constant {
        /// Its symbol, or where it stands.
        name: String,
        /// Its old value, if it is short.
        old: Option<String>,
        /// Its new value.
        new: Option<String>,
    },
    /// It refers to something else than before.
    Reference {
        /// To what it referred.
        old: String,
        /// To what it refers.
        new: String,
    },
    /// It is new, and a function of the patch needs it.
    NeededBy {
        /// That function.
        function: String,
    },
    /// The compiler made it out of another function.
    Clone {
        /// That function.
        of: String,
        /// `constprop`, `isra` or `part`.
        suffix: String,
    },
    /// Only its out-of-line part changed.
    Companion,
    /// Only what happens to exceptions in it changed.
    ExceptionTable,
    /// The compiler made other code of the same source; without the text, it may be a small change of the source, too.
    CodeGeneration {
        /// What says so.
        evidence: Evidence,
    },
    /// It can't be told.
    Unknown {
        /// Why not.
        reason: String,
    },
}

impl std::fmt::Display for Why {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let basis = |e: Evidence| match e {
            Evidence::Text => "",
            Evidence::Lines => ", by the line tables",
            Evidence::Code => ", by its instructions",
        };
        match self {
            Self::Source { at, evidence } => {
                write!(f, "its own source changed{}", basis(*evidence))?;
                at.iter().try_for_each(|at| write!(f, " ({at})"))
            }
            Self::Inlined { callee, called_at, declared_at, evidence } => {
                write!(f, "{callee}, which is inlined here, changed{}", basis(*evidence))?;
                declared_at.iter().try_for_each(|at| write!(f, " ({at})"))?;
                called_at.iter().try_for_each(|at| write!(f, ", called at {at}"))
            }
            Self::Layout { name } => write!(f, "the layout of {name} changed"),
            Self::Constant { name, old: Some(old), new: Some(new) } => write!(f, "{name} changed: {old} -> {new}"),
            Self::Constant { name, .. } => write!(f, "{name} changed"),
            Self::Reference { old, new } => write!(f, "it refers to {new}, no longer to {old}"),
            Self::NeededBy { function } => write!(f, "new; {function} needs it"),
            Self::Clone { of, suffix } => write!(f, "the compiler made it out of {of} ({suffix})"),
            Self::Companion => f.write_str("its out-of-line part changed"),
            Self::ExceptionTable => f.write_str("its exception table changed"),
            Self::CodeGeneration { evidence: Evidence::Text } => {
                f.write_str("code generation only: the text is the same; a macro, a type or the compiler's choice")
            }
            Self::CodeGeneration { .. } => f.write_str(
                "only registers, stack slots, moves or order differ: a small change of its source, or the compiler's choice \
                 (--old-source DIR --new-source DIR tell)",
            ),
            Self::Unknown { reason } => f.write_str(reason),
        }
    }
}

/// Two versions of one instruction.
#[derive(Clone, Debug, Serialize, PartialEq, Eq)]
pub struct Difference {
    /// The old one.
    pub old: String,
    /// The new one.
    pub new: String,
    /// `file:line` of the new one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub at: Option<String>,
}
