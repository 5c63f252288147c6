//! What a use case did, or found.

use std::borrow::Cow;

use serde::{Deserialize, Serialize};

use super::Inside;
use crate::process::HoldTimes;

/// What an apply or a revert did.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Report {
    /// The process.
    pub pid: i32,
    /// `apply` or `revert`.
    pub action: Cow<'static, str>,
    /// The patch's name.
    pub patch: String,
    /// Whether there was nothing to do.
    pub already: bool,
    /// The functions replaced, or given back.
    pub functions: Vec<String>,
    /// How many entries were written.
    pub entries: usize,
    /// The longest that a running thread was held, in µs.
    pub pause_us: f64,
    /// The longest that a sleeping thread was held, in µs.
    pub sleepers_us: f64,
    /// How many threads there were.
    pub threads: usize,
    /// How many holds it took.
    pub attempts: u32,
    /// What it took from inside, where nobody was held.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub within: Option<Within>,
    /// What it took to migrate states.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub migrated: Option<Migrated>,
    /// What went less well than it could.
    pub warnings: Vec<String>,
}

/// What a migration took.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Migrated {
    /// How many entries went over.
    pub sessions: usize,
    /// How long half of them at most were locked, in µs.
    pub freeze_p50_us: f64,
    /// How long 99 of 100 at most were.
    pub freeze_p99_us: f64,
    /// How long the longest was.
    pub freeze_max_us: f64,
    /// How many were in use again and again, and were loaded under their lock.
    pub under_lock: usize,
    /// How long the trial took, in ms.
    pub trial_ms: f64,
    /// How long the commit took, in ms.
    pub commit_ms: f64,
    /// How many bytes the saved entries have together.
    pub bytes: u64,
}

/// What a switch from inside the process took.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Within {
    /// How long traps stood over the entries, in µs.
    pub trapping_us: f64,
    /// How many calls trapped in that time.
    pub trapped: u64,
    /// How many of them went on in the version that was left, for their thread was in it.
    pub stayed: u64,
    /// How many signals asked a running thread to look at itself.
    pub signals: u64,
    /// How many system calls these interrupted and made again.
    pub restarted: u64,
    /// How many ended with EINTR for them.
    pub interrupted: u64,
    /// How many barriers it took.
    pub barriers: u32,
}

/// What a check found.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct CheckReport {
    /// The process.
    pub pid: i32,
    /// The patch's name.
    pub patch: String,
    /// Whether it is applied already.
    pub already: bool,
    /// The functions that it would replace.
    pub functions: Vec<String>,
    /// How many entries it would write.
    pub entries: usize,
    /// What to expect.
    pub warnings: Vec<String>,
    /// Threads that are inside functions of the patch now: they would have to leave first.
    pub inside: Vec<Inside>,
    /// Threads that run, so that nobody can say where without stopping them.
    pub running: usize,
}

impl Report {
    #[cfg(feature = "agent")]
    pub(super) fn fill_within(&mut self, times: crate::switch::SwitchTimes) {
        self.threads = times.threads;
        self.attempts = times.passes;
        self.within = Some(Within {
            trapping_us: (times.trapping_ns as f64 / 100.0).round() / 10.0,
            trapped: times.trapped,
            stayed: times.stayed,
            signals: times.signals,
            restarted: times.restarted,
            interrupted: times.interrupted,
            barriers: times.barriers,
        });
    }

    pub(super) fn fill(&mut self, times: HoldTimes, attempts: u32) {
        let us = |ns: u64| (ns as f64 / 100.0).round() / 10.0;
        (self.pause_us, self.sleepers_us) = (us(times.pause_ns), us(times.sleepers_ns));
        (self.threads, self.attempts) = (times.threads, attempts);
    }
}
