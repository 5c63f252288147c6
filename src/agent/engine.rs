//! What an agent does when it is asked: the use cases of the engine, by the wait-free switch.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use parking_lot::Mutex;

use super::breaker::{Bounds, Judge, Observed};
use super::fatal;
use super::log::{By, Event, Log};
use super::migrate::{self, Deadlines};
use super::peer::Peer;
use super::sealed::SealedPatch;
use super::wire::{Answer, Failure, FailureKind, Given, Info, Request};
use crate::patch::PatchFile;
use crate::patcher::{Confirmed, Error, Options, PatchStatus, Patcher, ProcessStatus, Report};
use crate::registry::State;
use crate::signature::{Keys, Signed};
use crate::stack::WatchList;
use crate::switch::Switcher;

/// Everything behind the socket.
#[derive(Debug)]
pub struct Engine {
    switcher: Switcher,
    keys: Option<Keys>,
    bounds: Bounds,
    deadlines: Deadlines,
    shared: Arc<Shared>,
    log: Log,
    /// The patch that is observed: its digest, and when it was applied.
    observing: Option<(String, u64)>,
    judge: Judge,
    /// What the watch saw last.
    known: Option<Known>,
    /// It broke a bound, which was told, and is still to be reverted.
    tripped: bool,
}

/// The newest applied patch, as the watch saw it: its name, whether it is to stay, and its slot as a canary by session.
#[derive(Clone, Debug)]
struct Known {
    since: Instant,
    newest: Option<(String, Option<Confirmed>, Option<u8>)>,
}

/// What other threads of the program need of the engine.
#[derive(Debug, Default)]
pub struct Shared {
    /// What was observed.
    pub observed: Observed,
    /// The code of applied patches that are not permanent.
    pub patched: Mutex<Option<WatchList>>,
    /// Something is to be looked at before the next turn of the watch.
    pub hurry: Mutex<bool>,
    pub woken: parking_lot::Condvar,
    /// The figures when they were asked for last.
    pub figures: Mutex<String>,
    stopped: AtomicBool,
}

impl Shared {
    /// Ends the watch.
    pub fn stop(&self) {
        self.stopped.store(true, Ordering::SeqCst);
        self.wake();
    }

    /// Whether it is to end.
    pub fn stopped(&self) -> bool {
        self.stopped.load(Ordering::SeqCst)
    }

    /// Has the watch look now.
    pub fn wake(&self) {
        *self.hurry.lock() = true;
        self.woken.notify_one();
    }
}

impl Engine {
    pub fn new(
        switcher: Switcher,
        keys: Option<Keys>,
        (bounds, deadlines): (Bounds, Deadlines),
        shared: Arc<Shared>,
        log: Log,
    ) -> Self {
        let judge = Judge::new(Instant::now(), &shared.observed);
        Self { switcher, keys, bounds, deadlines, shared, log, observing: None, judge, known: None, tripped: false }
    }

    /// Answers a request.
    pub fn answer(&mut self, request: Request, patch: Option<SealedPatch>, peer: Peer) -> Answer {
        let by = By::Peer(peer);
        let done = match request {
            Request::Info => return Answer::Info(self.info()),
            Request::Status => {
                let transitioning = self.switcher.is_unfinished();
                let shadows = || Patcher::open_own().and_then(|p| p.shadows());
                status().and_then(|status| {
                    Ok(Answer::Status(ProcessStatus { transitioning, shadows: shadows()?, ..status }))
                })
            }
            Request::Check(given) => match self.patch_of(&given, patch) {
                Ok((patch, options)) => Patcher::open_own().and_then(|p| p.check(&patch, &options)).map(Answer::Check),
                Err(failure) => return Answer::Failed(*failure),
            },
            Request::Apply(given) => match self.patch_of(&given, patch) {
                Ok((patch, options)) => self.apply(&patch, &options, by).map(|r| Answer::Reports(vec![r])),
                Err(failure) => {
                    self.log.write(by, &Event::refused("apply", None, &failure.message));
                    return Answer::Failed(*failure);
                }
            },
            Request::Revert { name, all, options } => {
                self.revert(name.as_deref(), all, &options, by).map(Answer::Reports)
            }
            Request::Canary { name, share } => {
                let done = migrate::may_set_share(&name).and_then(|mut p| p.set_share(&name, share));
                self.log.write(by, &Event::of("canary", Some(&name), done.as_ref().map(drop)));
                done.map(|()| Answer::Done)
            }
            Request::Confirm { name } => self.confirm(&name, by).map(|()| Answer::Done),
        };
        done.unwrap_or_else(|e| match e {
            Error::Outside { why } => Answer::Outside { why },
            other => Answer::Failed(Failure::of(own_pid(), &other)),
        })
    }

    fn info(&self) -> Info {
        let outside = self.switcher.is_unfinished().then(|| "a switch is still to be taken back".to_owned());
        Info {
            pid: own_pid(),
            version: env!("CARGO_PKG_VERSION").into(),
            requires_signature: self.keys.is_some(),
            outside,
        }
    }

    /// The patch that came, once its signature is good: nothing of it is looked at before.
    fn patch_of(&self, given: &Given, patch: Option<SealedPatch>) -> Result<(PatchFile, Options), Box<Failure>> {
        let no = |exit, kind, what: String| Box::new(Failure { kind, ..Failure::other(exit, what) });
        let damaged = |e: String| no(1, FailureKind::Other, e);
        let sent = patch.ok_or_else(|| damaged("no patch came with the request".into()))?;
        let bytes = sent.read().map_err(|e| damaged(e.to_string()))?;
        let mut options = given.options.clone();
        if let Some(keys) = &self.keys {
            let signed = self.signed(keys, &bytes, given.signature.as_deref());
            options.signed = Some(signed.map_err(|why| no(3, FailureKind::Refused, format!("refused: {why}")))?);
        }
        let patch = PatchFile::parse(&bytes).map_err(|e| damaged(e.to_string()))?;
        Ok((patch, options))
    }

    fn signed(&self, keys: &Keys, patch: &[u8], signature: Option<&str>) -> Result<Signed, String> {
        let signature = signature.ok_or("the patch is not signed: patch-builder sign makes a signature")?;
        keys.verify(patch, std::path::Path::new("the signature"), signature).map_err(|e| e.to_string())
    }

    /// Applies a patch.
    pub fn apply(&mut self, patch: &PatchFile, options: &Options, by: By) -> Result<Report, Error> {
        let done = migrate::apply(patch, options, self.deadlines, &mut self.switcher);
        if !matches!(done, Err(Error::Outside { .. })) {
            let event = Event::of("apply", Some(&patch.manifest.name), done.as_ref().map(drop));
            self.log.write(by, &event.with(&done));
            self.log.count(&done);
        }
        // What failed or was there already changes nothing for the patch that is being observed.
        if done.as_ref().is_ok_and(|report| !report.already) {
            self.begin_observing();
        }
        done
    }

    /// Reverts the newest patch, or all.
    pub fn revert(&mut self, name: Option<&str>, all: bool, options: &Options, by: By) -> Result<Vec<Report>, Error> {
        let mut out = Vec::new();
        loop {
            let done = migrate::revert(name, options, self.deadlines, &mut self.switcher);
            if all && !out.is_empty() && matches!(done, Err(Error::NothingApplied { .. })) {
                break;
            }
            if !matches!(done, Err(Error::Outside { .. })) {
                let patch = done.as_ref().ok().map(|r| r.patch.clone());
                let event = Event::of("revert", patch.as_deref().or(name), done.as_ref().map(drop));
                self.log.write(by, &event.with(&done));
                self.log.count(&done);
            }
            out.push(done?);
            // A patch below it is not to answer for it.
            self.begin_observing();
            if !all {
                break;
            }
        }
        Ok(out)
    }

    /// Makes a patch permanent.
    pub fn confirm(&mut self, name: &str, by: By) -> Result<(), Error> {
        let done = Patcher::open_own().and_then(|mut p| p.confirm(name));
        self.log.write(by, &Event::of("confirm", Some(name), done.as_ref().map(drop)));
        self.renew();
        done
    }

    /// The newest patch is another.
    fn begin_observing(&mut self) {
        self.judge = Judge::new(Instant::now(), &self.shared.observed);
        self.tripped = false;
        self.observing = status().ok().as_ref().and_then(newest).map(identity);
        self.renew();
    }

    /// What applied patches there are that may still have to go.
    fn renew(&mut self) {
        self.known = None;
        let own = Patcher::open_own();
        fatal::set(&own.as_ref().map(Patcher::mapped_code).unwrap_or_default());
        let current = own.and_then(|p| p.current_code()).unwrap_or_default();
        *self.shared.patched.lock() = (!current.is_empty()).then(|| WatchList::new(current));
    }

    /// One turn of the watch: reverts what breaks a bound or was not confirmed in time. When it is to be called again.
    pub fn watch(&mut self) -> Duration {
        const SOON: Duration = Duration::from_millis(20);
        const IDLE: Duration = Duration::from_secs(1);
        if self.switcher.is_unfinished() {
            // Calls trap until then.
            let done = Patcher::open_own().and_then(|mut p| p.finish_within(SOON, &mut self.switcher));
            if let Err(e) = done {
                self.log.say(&format!("the switch before is not taken back yet: {e}"));
                return IDLE;
            }
            self.log.say("the switch before is taken back");
        }
        // That reads all that is mapped: often enough for commands that go in from outside, and tell nobody.
        if self.known.as_ref().is_none_or(|k| k.since.elapsed() >= IDLE) {
            let Ok(status) = status() else { return IDLE };
            let newest = newest(&status);
            if newest.map(identity) != self.observing {
                self.begin_observing();
            }
            let newest = newest.map(|p| (p.patch.clone(), p.confirmation, p.arms.as_ref().and(p.slot)));
            self.known = Some(Known { since: Instant::now(), newest });
        }
        let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs());
        let Some((name, confirmation, slot)) = self.known.as_ref().and_then(|k| k.newest.clone()) else { return IDLE };
        if matches!(confirmation, Some(Confirmed::Permanent)) {
            return IDLE;
        }
        let overdue = match confirmation {
            // A command that waits for it from outside does so itself.
            Some(Confirmed::Unconfirmed { by, watcher }) if watcher.is_none_or(|w| w == std::process::id()) => {
                by <= now
            }
            _ => false,
        };
        let arms = slot.map(crate::session::tallies);
        let broken = self.judge.broken(&self.bounds, Instant::now(), &self.shared.observed, arms);
        let why = broken.or_else(|| overdue.then(|| "nobody confirmed it".to_owned()));
        let Some(why) = why else { return SOON };
        if !std::mem::replace(&mut self.tripped, true) {
            self.log.write(By::Breaker, &Event::breaks(&name, &why));
            self.log.tripped();
        }
        match self.revert(Some(&name), false, &Options::default(), By::Breaker) {
            Ok(_) => SOON,
            // It is tried again: a thread leaves what it is in, or another command ends.
            Err(e) => {
                self.log.say(&format!("patch {name} could not be reverted yet: {e}"));
                IDLE
            }
        }
    }

    /// Figures for Prometheus.
    pub fn metrics(&self) -> String {
        let patches = status().map(|s| s.patches).unwrap_or_default();
        self.log.metrics(self.judge.panics(&self.shared.observed), &patches)
    }
}

fn status() -> Result<ProcessStatus, Error> {
    Patcher::open_own().and_then(|p| p.status())
}

/// The newest patch that is applied.
fn newest(status: &ProcessStatus) -> Option<&PatchStatus> {
    status.patches.iter().rfind(|p| p.state == State::Applied)
}

fn identity(patch: &PatchStatus) -> (String, u64) {
    (patch.digest.clone(), patch.applied_at)
}

fn own_pid() -> i32 {
    std::process::id().cast_signed()
}
