//! What an agent did: an audit line for each change, events for the program's log, and figures.

use std::collections::BTreeMap;
use std::fs::{File, OpenOptions};
use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::time::{SystemTime, UNIX_EPOCH};

use serde_json::{json, Value};

use super::peer::Peer;
use crate::patcher::{Confirmed, Error, PatchStatus, Report};
use crate::registry::{Arm, State};
use crate::shadow::Attached;

/// Who asks: for the log.
#[derive(Clone, Copy, Debug)]
pub enum By {
    /// A command, over the socket.
    Peer(Peer),
    /// The program.
    Program,
    /// The agent itself.
    Breaker,
}

/// Something that is to be remembered.
#[derive(Debug)]
pub struct Event {
    action: &'static str,
    patch: Option<String>,
    result: Result<(), String>,
    /// What went less well than it could.
    warnings: Vec<String>,
}

impl Event {
    /// What came of something that was asked.
    pub fn of(action: &'static str, patch: Option<&str>, result: Result<(), &Error>) -> Self {
        Self {
            action,
            patch: patch.map(str::to_owned),
            result: result.map_err(ToString::to_string),
            warnings: Vec::new(),
        }
    }

    /// With what an apply or a revert warns of: nobody may be there to read its report.
    pub fn with(mut self, done: &Result<Report, Error>) -> Self {
        self.warnings = done.as_ref().map(|report| report.warnings.clone()).unwrap_or_default();
        self
    }

    /// A no before anything was looked at.
    pub fn refused(action: &'static str, patch: Option<&str>, why: &str) -> Self {
        Self { action, patch: patch.map(str::to_owned), result: Err(why.to_owned()), warnings: Vec::new() }
    }

    /// A bound that a patch does not keep.
    pub fn breaks(patch: &str, why: &str) -> Self {
        Self { action: "breaker", patch: Some(patch.to_owned()), result: Err(why.to_owned()), warnings: Vec::new() }
    }
}

/// Where it is written.
#[derive(Debug, Default)]
pub struct Log {
    audit: Option<File>,
    applies: u64,
    reverts: u64,
    failures: BTreeMap<&'static str, u64>,
    trips: u64,
    trapping_us: f64,
    trapped: u64,
}

impl Log {
    /// With an audit file, which is only ever appended to.
    ///
    /// # Errors
    ///
    /// It can't be opened.
    pub fn new(audit: Option<&Path>) -> std::io::Result<Self> {
        let open = |p| OpenOptions::new().append(true).create(true).mode(0o600).open(p);
        Ok(Self { audit: audit.map(open).transpose()?, ..Self::default() })
    }

    /// The descriptor of the audit file, or -1.
    pub fn descriptor(&self) -> i32 {
        use std::os::fd::AsRawFd;
        self.audit.as_ref().map_or(-1, AsRawFd::as_raw_fd)
    }

    /// One line: when, who, what, which patch, how it ended.
    pub fn write(&mut self, by: By, event: &Event) {
        let who = match by {
            By::Peer(peer) => json!({"uid": peer.uid, "gid": peer.gid, "pid": peer.pid}),
            By::Program => Value::from("program"),
            By::Breaker => Value::from("breaker"),
        };
        let time = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs());
        let (result, why) = match &event.result {
            Ok(()) => ("done", None),
            Err(why) => ("failed", Some(why)),
        };
        let mut line = json!({"time": time, "by": who, "action": event.action, "patch": event.patch, "result": result, "why": why});
        if !event.warnings.is_empty() {
            line["warnings"] = event.warnings.clone().into();
        }
        match &event.result {
            Ok(()) => tracing::info!(target: "livepatch", %line, "{}", event.action),
            Err(_) => tracing::warn!(target: "livepatch", %line, "{}", event.action),
        }
        if let Some(file) = &mut self.audit {
            // In one write, so that lines of several processes do not mix.
            if let Err(e) = file.write_all(format!("{line}\n").as_bytes()) {
                self.say(&format!("the audit file can't be written: {e}"));
            }
        }
    }

    /// For the program's log only.
    pub fn say(&self, what: &str) {
        tracing::warn!(target: "livepatch", "{what}");
    }

    /// Counts what came of an apply or a revert.
    pub fn count(&mut self, done: &Result<Report, Error>) {
        match done {
            Ok(report) => {
                *(if report.action == "apply" { &mut self.applies } else { &mut self.reverts }) +=
                    u64::from(!report.already);
                if let Some(within) = report.within {
                    self.trapping_us = within.trapping_us;
                    self.trapped += within.trapped;
                }
            }
            Err(e) => {
                let kind = match e.first() {
                    Error::Refused { refusal } => refusal.kind(),
                    Error::RefusedFor(list) => list.first().map_or("refused", crate::plan::Refusal::kind),
                    Error::NotQuiescent(_) => "not-quiescent",
                    _ => "error",
                };
                *self.failures.entry(kind).or_default() += 1;
            }
        }
    }

    /// A bound was not kept.
    pub fn tripped(&mut self) {
        self.trips += 1;
    }

    /// In Prometheus' text format.
    pub fn metrics(&self, panics: u64, patches: &[PatchStatus]) -> String {
        use std::fmt::Write as _;
        let mut out = String::new();
        let mut metric = |name: &str, kind: &str, help: &str, values: &[(String, f64)]| {
            let _ = writeln!(out, "# HELP livepatch_{name} {help}\n# TYPE livepatch_{name} {kind}");
            for (labels, value) in values {
                let _ = writeln!(out, "livepatch_{name}{labels} {value}");
            }
        };
        let one = |value: u64| [(String::new(), value as f64)];
        metric("applies_total", "counter", "Patches applied.", &one(self.applies));
        metric("reverts_total", "counter", "Patches reverted.", &one(self.reverts));
        let failures: Vec<_> = self.failures.iter().map(|(k, n)| (format!("{{reason=\"{k}\"}}"), *n as f64)).collect();
        metric("failures_total", "counter", "Applies and reverts that were refused or failed.", &failures);
        metric("breaker_trips_total", "counter", "Bounds that a patch did not keep.", &one(self.trips));
        metric("panics", "gauge", "Panics in patched code since the last apply or revert.", &one(panics));
        metric("trapped_calls_total", "counter", "Calls that trapped during switches.", &one(self.trapped));
        let shadows = crate::shadow::report();
        let by_id = |value: fn(&Attached) -> usize| -> Vec<_> {
            shadows.iter().map(|a| (format!("{{id=\"{:#x}\"}}", a.id), value(a) as f64)).collect()
        };
        metric("shadows", "gauge", "Objects with a shadow variable.", &by_id(|a| a.objects));
        metric("shadow_bytes", "gauge", "Bytes of shadow variables.", &by_id(|a| a.bytes));
        let seconds = [(String::new(), self.trapping_us / 1e6)];
        metric("transition_seconds", "gauge", "How long traps stood in the last switch.", &seconds);
        let applied: Vec<&PatchStatus> = patches.iter().filter(|p| p.state == State::Applied).collect();
        let named = |p: &PatchStatus| p.patch.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', " ");
        let permanent = |p: &&PatchStatus| {
            let permanent = p.confirmation == Some(Confirmed::Permanent);
            (format!("{{patch=\"{}\"}}", named(p)), f64::from(u8::from(permanent)))
        };
        let all: Vec<_> = applied.iter().map(permanent).collect();
        metric("patch_permanent", "gauge", "Whether an applied patch was confirmed.", &all);
        let arms = |of: &dyn Fn(&Arm) -> Vec<(&'static str, f64)>| {
            let mut out = Vec::new();
            for p in &applied {
                for (arm, figures) in p.arms.iter().flat_map(|[old, new]| [("old", old), ("new", new)]) {
                    let label = |more: &str| format!("{{patch=\"{}\",arm=\"{arm}\"{more}}}", named(p));
                    out.extend(of(figures).into_iter().map(|(more, value)| (label(more), value)));
                }
            }
            out
        };
        let single = |value: u64| vec![("", value as f64)];
        let messages = arms(&|a| single(a.messages));
        metric("arm_messages_total", "counter", "Messages that an arm of a canary by session has handled.", &messages);
        metric("arm_failed_total", "counter", "Those that failed.", &arms(&|a| single(a.failed)));
        metric("arm_panics_total", "counter", "Those that panicked.", &arms(&|a| single(a.panics)));
        let _ = writeln!(out, "# HELP livepatch_arm_seconds How long messages took, of those that were timed.");
        let _ = writeln!(out, "# TYPE livepatch_arm_seconds histogram");
        for p in &applied {
            let tallies = p.slot.filter(|_| p.arms.is_some()).map(crate::session::tallies);
            for (arm, tally) in tallies.iter().flat_map(|[old, new]| [("old", old), ("new", new)]) {
                let labels = format!("patch=\"{}\",arm=\"{arm}\"", named(p));
                let mut below = 0;
                for (i, n) in tally.took.iter().enumerate() {
                    below += n;
                    // From a quarter of a microsecond to a minute; what lies outside is in the next one.
                    if (8..=36).contains(&i) {
                        let bound = 2f64.powi(i32::try_from(i).unwrap_or(0)) / 1e9;
                        let _ = writeln!(out, "livepatch_arm_seconds_bucket{{{labels},le=\"{bound}\"}} {below}");
                    }
                }
                let (sum, all) = (tally.ns as f64 / 1e9, tally.timed());
                let _ = writeln!(out, "livepatch_arm_seconds_bucket{{{labels},le=\"+Inf\"}} {all}");
                let _ = writeln!(out, "livepatch_arm_seconds_sum{{{labels}}} {sum}");
                let _ = writeln!(out, "livepatch_arm_seconds_count{{{labels}}} {all}");
            }
        }
        out
    }
}
