//! What is applied where.

use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use super::recover::Entries;
use super::{Error, Patcher};
use crate::process::ptrace::procfs;
use crate::process::{Pid, Process, ProcessError};
use crate::registry::{Arm, Confirmation, Payload, State, Unwind};
use crate::symbols::{self, SymbolFile};
use crate::transaction::Applied;
#[cfg(feature = "agent")]
use crate::{addr::ProcRange, maps::Mapping, memory::ReadMemory, shadow};

/// One patch in one process.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct PatchStatus {
    /// Its name.
    pub patch: String,
    /// SHA-256 of its file.
    pub digest: String,
    /// The image that it patches, if that is no longer loaded or another than the executable: its name, or its build-id.
    pub image: Option<String>,
    /// Whether its entries lead to it: as they are, whatever the record says.
    pub state: State,
    /// Whether an interrupted command left it so: `livepatch recover` finishes or undoes.
    pub unfinished: bool,
    /// Whether it is meant to stay, if it is applied.
    pub confirmation: Option<Confirmed>,
    /// What share of the calls runs it, in percent, if that is chosen by a key.
    pub canary_percent: Option<f64>,
    /// What the old arm and the new one did since it was applied, if messages tell their session: only the agent knows.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub arms: Option<[Arm; 2]>,
    /// Which of the canaries by session it is, in its own process.
    #[serde(skip)]
    pub(crate) slot: Option<u8>,
    /// The functions that it replaces.
    pub functions: Vec<String>,
    /// How many entries it has.
    pub entries: usize,
    /// Bytes of its mapping, which stays after a revert.
    pub bytes: u64,
    /// When it was applied last, Unix time in seconds.
    pub applied_at: u64,
    /// What that cost, in µs.
    pub pause_us: f64,
    /// Whether the unwinder knows its tables.
    pub unwind_registered: bool,
    /// What is wrong with it, if something is.
    pub damage: Option<String>,
}

/// What is attached to objects under one number.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ShadowStatus {
    /// The number.
    pub id: u64,
    /// The type.
    pub type_name: String,
    /// To how many objects.
    pub objects: usize,
    /// Bytes of the values, without what they point to.
    pub bytes: usize,
    /// The applied patches, and the images of the process, in whose code or constants the number stands. Where there are none, nobody will
    /// ever detach it.
    pub named_by: Vec<String>,
}

/// Whether an applied patch is meant to stay.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", tag = "is")]
pub enum Confirmed {
    /// Somebody confirmed it.
    Permanent,
    /// Nobody did, and nobody has to.
    Current,
    /// Somebody is to confirm it.
    Unconfirmed {
        /// Until then, Unix time in seconds.
        by: u64,
        /// The command that reverts it otherwise, if it still runs.
        watcher: Option<u32>,
    },
}

impl Confirmed {
    /// As the record of a patch in process `own` says.
    fn of(c: Confirmation, own: Pid) -> Self {
        // What has its number now need not be it: only another livepatch is taken for it, and the process's own agent.
        let lives = |pid: &u32| {
            if pid.cast_signed() == own.0 {
                return true;
            }
            let name = std::fs::read_to_string(format!("/proc/{pid}/comm"));
            name.is_ok_and(|n| n.trim_end() == "livepatch")
        };
        match c {
            Confirmation { confirmed: true, .. } => Self::Permanent,
            Confirmation { by_s: 0, .. } => Self::Current,
            Confirmation { by_s, watcher, .. } => {
                Self::Unconfirmed { by: by_s, watcher: Some(watcher).filter(|w| *w != 0).filter(lives) }
            }
        }
    }
}

/// One process.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ProcessStatus {
    /// The process.
    pub pid: i32,
    /// Its name.
    pub name: String,
    /// Its executable's path, as the process sees it.
    pub exe: String,
    /// Its executable's build-id.
    pub build_id: String,
    /// Its patches, in the order of their apply.
    pub patches: Vec<PatchStatus>,
    /// Whether traps of its agent stand, for a switch that could neither be done nor taken back yet. Calls are right, and slower.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub transitioning: bool,
    /// Shadow variables, of a process with an agent.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub shadows: Vec<ShadowStatus>,
}

impl Patcher {
    /// What is applied to this process; reads only.
    ///
    /// # Errors
    ///
    /// The process is gone or a record is damaged.
    pub fn status(&self) -> Result<ProcessStatus, Error> {
        let status = self.unless_ended(self.try_status())?;
        // Damage, too, may be no more than its end.
        if status.patches.iter().any(|p| p.damage.is_some()) && self.process.has_ended() {
            return Err(ProcessError::Gone(self.process.pid()).into());
        }
        Ok(status)
    }

    /// What both arms of a canary by session did, from inside.
    fn arms(&self, payload: &Payload) -> Option<[Arm; 2]> {
        let session = payload.canary.as_ref()?.session?;
        #[cfg(feature = "agent")]
        if self.by_threads {
            return Some(crate::session::arms(session.slot));
        }
        let _ = session;
        None
    }

    /// The shadow variables of the own process, and who names them. Reads all code and constants, if there are any.
    ///
    /// # Errors
    ///
    /// A record is damaged.
    #[cfg(feature = "agent")]
    pub fn shadows(&self) -> Result<Vec<ShadowStatus>, Error> {
        let attached = if self.by_threads { shadow::report() } else { Vec::new() };
        if attached.is_empty() {
            return Ok(Vec::new());
        }
        let records = self.records()?;
        let constant = |m: &&Mapping| m.read && !m.write && !m.name.is_empty();
        let images = self.images.iter().flat_map(|image| {
            let of = self.maps.iter().filter(constant).filter(|m| m.range.overlaps(&image.range));
            of.map(|m| (image.short_name(), m.range))
        });
        let applied = records.iter().filter(|r| r.mutable.state == State::Applied);
        // Behind the record, which names nothing.
        let patches = applied.filter_map(|r| {
            let range = ProcRange { start: r.payload.base, end: r.region.end };
            (range.start < range.end).then_some((r.payload.patch.as_str(), range))
        });
        let finders: Vec<_> = attached.iter().map(|a| finder(a.id)).collect();
        let mut named_by = vec![Vec::new(); attached.len()];
        for (name, range) in patches.chain(images) {
            let Ok(bytes) = self.process.read_vec(range.start, range.len_bytes()) else { continue };
            for (finder, named_by) in finders.iter().zip(&mut named_by) {
                if named_by.last().is_none_or(|last| last != name) && finder.find(&bytes).is_some() {
                    named_by.push(name.to_owned());
                }
            }
        }
        let of = |(a, named_by): (shadow::Attached, _)| ShadowStatus {
            id: a.id,
            type_name: a.type_name.into(),
            objects: a.objects,
            bytes: a.bytes,
            named_by,
        };
        Ok(attached.into_iter().zip(named_by).map(of).collect())
    }

    /// Symbols for debuggers and profilers of every patch that lies in the process, applied or not.
    ///
    /// # Errors
    ///
    /// The process is gone or a record is damaged.
    pub fn symbols(&self) -> Result<Vec<SymbolFile>, Error> {
        let records = self.unless_ended(self.records())?;
        Ok(records.iter().map(|found| symbols::of_patch(&self.process, found)).collect())
    }

    fn try_status(&self) -> Result<ProcessStatus, Error> {
        let pid = self.process.pid();
        let image = self.executable()?;
        let records = self.records()?;
        let patches = records.iter().map(|found| {
            let lead = self.lead(found, &records);
            let unfinished = lead.as_ref().is_ok_and(|lead| !lead.is_finished(found));
            let state = match lead.as_ref().map(|lead| lead.to) {
                Ok(Entries::New) => State::Applied,
                Ok(Entries::Old) if unfinished && found.mutable.state == State::Applied => State::Reverted,
                _ => found.mutable.state,
            };
            let payload = found.payload.clone();
            let entries = payload.jumps();
            let mutable = found.mutable;
            let damage = match Applied::new(found.clone()) {
                _ if found.mutable.state == State::Applied && !self.is_loaded(found) => {
                    Some("the library that it patches is no longer loaded (livepatch recover)".into())
                }
                Ok(_) => lead.err().map(|e| e.to_string()),
                Err(e) => Some(e.to_string()),
            };
            let of = self.images.iter().find(|i| i.build_id.as_ref() == Some(&payload.build_id.0));
            let other = of.is_none_or(|of| of.range != image.range);
            let named = || of.map_or_else(|| payload.build_id.to_string(), |of| of.short_name().to_owned());
            let canary = payload.canary.is_some() && state == State::Applied;
            PatchStatus {
                arms: self.arms(&payload).filter(|_| state == State::Applied),
                slot: payload.canary.as_ref().and_then(|c| c.session).map(|s| s.slot),
                canary_percent: canary.then(|| f64::from(mutable.share.value()) / 100.0),
                image: other.then(named),
                patch: payload.patch,
                digest: payload.digest.to_string(),
                state,
                unfinished,
                confirmation: (state == State::Applied).then(|| Confirmed::of(mutable.confirmation, pid)),
                functions: payload.functions.iter().filter(|f| f.old.is_some()).map(|f| f.demangled.clone()).collect(),
                entries,
                bytes: found.region.len_bytes(),
                applied_at: mutable.applied_at_s,
                pause_us: (mutable.pause_ns as f64 / 100.0).round() / 10.0,
                unwind_registered: mutable.unwind == Unwind::Registered,
                damage,
            }
        });
        Ok(ProcessStatus {
            shadows: Vec::new(),
            transitioning: false,
            pid: pid.0,
            name: procfs::thread_name(pid, crate::process::Tid(pid.0)),
            exe: image.name.clone(),
            build_id: image.build_id_hex(),
            patches: patches.collect(),
        })
    }
}

/// Looks for a number as instructions and constants hold it.
#[cfg(feature = "agent")]
fn finder(id: u64) -> memchr::memmem::Finder<'static> {
    let bytes = id.to_le_bytes();
    let short = u32::try_from(id).is_ok();
    memchr::memmem::Finder::new(if short { &bytes[..4] } else { &bytes[..] }).into_owned()
}

/// How long another command is waited for: it traces the process, and leaves it soon.
const OTHER_COMMAND: Duration = Duration::from_secs(2);

/// What is applied to a process; another livepatch command that is at work on it is waited for, a moment.
///
/// # Errors
///
/// As [`Patcher::open`] and [`Patcher::status`].
pub fn status_of(pid: Pid) -> Result<ProcessStatus, Error> {
    let until = Instant::now() + OTHER_COMMAND;
    loop {
        match Patcher::open(pid).and_then(|p| p.status()) {
            Err(Error::Process(ProcessError::Busy { .. })) if Instant::now() < until => {
                std::thread::sleep(Duration::from_millis(5));
            }
            other => return other,
        }
    }
}

/// Every process of this host that holds a patch, and how many could not be looked at for want of permission.
#[must_use]
pub fn patched_processes() -> (Vec<ProcessStatus>, usize) {
    let (mut out, mut hidden) = (Vec::new(), 0);
    let own = Pid(std::process::id().cast_signed());
    for pid in procfs::processes().into_iter().filter(|p| *p != own) {
        match status_of(pid) {
            Ok(s) if !s.patches.is_empty() => out.push(s),
            Err(Error::Process(crate::process::ProcessError::Permission { .. })) => hidden += 1,
            _ => {}
        }
    }
    (out, hidden)
}
