//! How to apply and revert.

use std::borrow::Cow;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::patch::PatchFile;
use crate::plan::beside::{self, Consistency};
use crate::signature::Signed;

/// A patch that only some calls run, chosen by a key.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Canary {
    /// In 1/10,000.
    pub share: u32,
    /// Each function of the patch with the argument that is its key, counted from 1.
    pub keys: Vec<(String, u8)>,
}

/// How to apply and revert.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Options {
    /// How long to try before giving up.
    pub timeout: Duration,
    /// The longest that threads are held in one attempt.
    pub hold: Duration,
    /// Go on although the process switches stacks by itself: `--allow contexts`.
    pub allow_contexts: bool,
    /// Go on although what the process may load later to unwind will know nothing of the patch: `--allow unwind`.
    pub allow_unwind: bool,
    /// What no thread may be inside of when the code switches.
    pub consistency: Consistency,
    /// What the patch's signature says, if that was looked at.
    pub signed: Option<Signed>,
    /// Only a share of the calls goes to the new code.
    pub canary: Option<Canary>,
    /// By when the patch is to be confirmed; the caller reverts it otherwise.
    pub confirm_within: Option<Duration>,
    /// Go on although the process has seen a patch of a higher revision: `--allow replay`.
    pub allow_replay: bool,
}

/// The key that stands for the session of a message.
pub const SESSION: &str = "session";

/// The key that stands for the version of the state that a call works on, which the agent migrates.
pub const STATE: &str = "state";

/// Whether what decides between old and new is the version of a state.
#[must_use]
pub fn is_by_state(keys: &[(String, u8)]) -> bool {
    keys.iter().any(|(key, argument)| key == STATE && *argument == 0)
}

impl Canary {
    /// Whether the key is the session of a message, which the program tells.
    #[must_use]
    pub fn is_by_session(&self) -> bool {
        self.keys.iter().any(|(function, argument)| function == SESSION && *argument == 0)
    }

    /// Of a patch with a migration: none of the messages, until states are new.
    #[must_use]
    pub fn by_state() -> Self {
        Self { share: 0, keys: vec![(SESSION.into(), 0), (STATE.into(), 0)] }
    }
}

impl Default for Options {
    fn default() -> Self {
        Self {
            timeout: Duration::from_secs(5),
            hold: Duration::from_millis(100),
            allow_contexts: false,
            allow_unwind: false,
            consistency: Consistency::Stack,
            signed: None,
            canary: None,
            confirm_within: None,
            allow_replay: false,
        }
    }
}

impl Options {
    /// What no thread may be inside of in an apply: with a canary old and new code run side by side from the first call on.
    pub(super) fn of_apply(&self) -> Consistency {
        if self.canary.is_some() {
            Consistency::Entry
        } else {
            self.consistency.clone()
        }
    }

    /// The patch with the entries that this asks for. The old functions that a canary leaves to old callers stay theirs.
    pub(super) fn adapt<'p>(&self, patch: &'p PatchFile) -> Cow<'p, PatchFile> {
        match self.canary {
            Some(_) => Cow::Borrowed(patch),
            None => beside::adapt(patch, &self.consistency),
        }
    }
}
