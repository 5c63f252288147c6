//! How a use case can end otherwise, and the exit codes that this means.

use serde::Serialize;
use serde_json::{json, Value};

use crate::patch::PatchError;
use crate::plan::Refusal;
use crate::process::{Pid, ProcessError};
use crate::transaction::{SwapError, TransactionError};

/// Why a use case did not do what was asked.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The patch file is none.
    #[error(transparent)]
    Patch(#[from] PatchError),
    /// The process cannot be worked on.
    #[error(transparent)]
    Process(ProcessError),
    /// A no with its reason.
    #[error("refused: {refusal}: {}", .refusal.remedy())]
    Refused {
        /// The reason.
        #[from]
        refusal: Refusal,
    },
    /// Several noes at once.
    #[error("refused for {} reasons:{}", .0.len(), .0.iter().map(|r| format!("\n  {r}: {}", r.remedy())).collect::<String>())]
    RefusedFor(Vec<Refusal>),
    /// Some thread stayed where it must not be.
    #[error(transparent)]
    NotQuiescent(#[from] Box<NotQuiescent>),
    /// Nothing to revert.
    #[error("no patch is applied to process {pid}")]
    NothingApplied {
        /// The process.
        pid: Pid,
    },
    /// No patch of that name.
    #[error("patch {name} is not applied to process {pid}; the newest that is: {applied}")]
    NoSuchPatch {
        /// The process.
        pid: Pid,
        /// The name that was asked for.
        name: String,
        /// The newest applied patch.
        applied: String,
    },
    /// The entries could not be written.
    #[error(transparent)]
    Swap(SwapError),
    /// It failed, and so did the hook that undoes what another one did before.
    #[error("{error}; {said}")]
    AndHook {
        /// What failed first.
        #[source]
        error: Box<Error>,
        /// What the hook says.
        said: String,
    },
    /// It can't be done from inside the process; nothing was changed.
    #[error("it takes a hold from outside: {why}")]
    Outside {
        /// Why.
        why: String,
    },
}

impl From<ProcessError> for Error {
    fn from(e: ProcessError) -> Self {
        match e {
            ProcessError::Confined { mode, .. } => Refusal::Seccomp { mode }.into(),
            other => Self::Process(other),
        }
    }
}

impl From<TransactionError> for Error {
    fn from(e: TransactionError) -> Self {
        match e {
            TransactionError::Refused(refusal) => Self::Refused { refusal },
            TransactionError::Process(e) => e.into(),
            TransactionError::Swap(e) => Self::Swap(e),
            TransactionError::Hold(crate::process::HoldError::Process(e)) => Self::Process(e),
            TransactionError::Hold(hold) => Self::NotQuiescent(Box::new(NotQuiescent {
                taken_back: false,
                tid: None,
                thread: None,
                function: None,
                reason: hold.to_string(),
                backtrace: Vec::new(),
                attempts: 1,
            })),
        }
    }
}

impl From<NotQuiescent> for Error {
    fn from(e: NotQuiescent) -> Self {
        Self::NotQuiescent(Box::new(e))
    }
}

impl Error {
    /// What failed first.
    #[must_use]
    pub fn first(&self) -> &Self {
        match self {
            Self::AndHook { error, .. } => error.first(),
            other => other,
        }
    }

    /// The exit code of a command that ends with this.
    #[must_use]
    pub fn exit_code(&self) -> u8 {
        match self {
            Self::AndHook { error, .. } => error.exit_code(),
            Self::Refused { .. } | Self::RefusedFor(_) | Self::Outside { .. } => 3,
            Self::NotQuiescent(_) | Self::Process(ProcessError::NoIdleThread { .. }) => 4,
            Self::Process(
                ProcessError::Gone(_)
                | ProcessError::KernelThread(_)
                | ProcessError::Permission { .. }
                | ProcessError::Traced { .. },
            ) => 6,
            _ => 1,
        }
    }

    /// What a command prints of it for programs.
    #[must_use]
    pub fn to_json(&self, pid: Option<i32>) -> Value {
        let each = |r: &Refusal| json!({"kind": r.kind(), "message": r.to_string(), "remedy": r.remedy(), "waiting_helps": false});
        match self {
            Self::AndHook { error, said } => {
                let mut json = error.to_json(pid);
                json["hook"] = said.as_str().into();
                json
            }
            Self::Refused { refusal } => json!({"pid": pid, "refusal": each(refusal)}),
            Self::RefusedFor(all) => {
                json!({"pid": pid, "refusal": all.first().map(each), "refusals": all.iter().map(each).collect::<Vec<_>>()})
            }
            Self::NotQuiescent(why) => json!({
                "pid": pid,
                "refusal": {"kind": "not-quiescent", "message": self.to_string(), "remedy": "try again, or with a longer --timeout",
                    "waiting_helps": true, "thread": why},
            }),
            other => json!({"pid": pid, "error": {"message": other.to_string(), "exit": other.exit_code()}}),
        }
    }
}

/// One line of a backtrace.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct TraceLine {
    /// Where it stands, or where its callee returns to.
    pub pc: String,
    /// The function and how far into it, or the image and the address in it.
    pub place: String,
}

/// Until the timeout, some thread stayed where it must not be; nothing was changed, or it was taken back.
#[derive(Clone, Debug, Default, Serialize)]
pub struct NotQuiescent {
    /// The thread.
    pub tid: Option<i32>,
    /// Its name.
    pub thread: Option<String>,
    /// The function that it is in.
    pub function: Option<String>,
    /// Whether some calls may have run the other version meanwhile.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub taken_back: bool,
    /// What is the matter with it.
    pub reason: String,
    /// Its stack, the innermost frame first.
    pub backtrace: Vec<TraceLine>,
    /// How many holds were tried.
    pub attempts: u32,
}

impl std::fmt::Display for NotQuiescent {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let changed = if self.taken_back { "" } else { ", nothing was changed" };
        write!(f, "not quiescent before the timeout{changed}: ")?;
        if let (Some(tid), Some(name)) = (self.tid, &self.thread) {
            write!(f, "thread {tid} ({name}) ")?;
        }
        write!(f, "{} ({} attempts). Try again, or with a longer --timeout", self.reason, self.attempts)?;
        for (i, line) in self.backtrace.iter().enumerate() {
            write!(f, "\n  #{i:<2} {} {}", line.pc, line.place)?;
        }
        Ok(())
    }
}

impl std::error::Error for NotQuiescent {}
