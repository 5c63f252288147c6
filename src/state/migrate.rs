//! Taking every entry of some tables from one version to the other: first a trial that changes nothing, then each by itself.
//!
//! What goes over is always what the *old* version writes: saved by it and read by the new one on the way up, written by the new one
//! ([`downgrade`](super::State::downgrade)) and read by it on the way down. Whoever read it writes it again, and that has to be the same
//! bytes.
//!
//! An entry is locked while it is saved and while it is exchanged; it is loaded in between, and once more if it was used meanwhile. So a
//! message waits for a save at most, unless the entry is in use all the time.

use std::panic::{catch_unwind, AssertUnwindSafe};
use std::ptr::null_mut;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{mpsc, Arc};
use std::time::{Duration, Instant};

use super::shims::{Built, Call, What};
use super::table::{tables, Arms, Inner, Slot};
use crate::patch::StateVersion;

/// So often an entry is loaded beside its messages before it is under its lock.
const BESIDE: u32 = 3;

/// The longest that a migration may take.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Limits {
    pub session: Duration,
    pub total: Duration,
}

/// To the new version, or back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Direction {
    /// Old to new.
    Up,
    /// New to old.
    Down,
}

impl Direction {
    fn other(self) -> Self {
        match self {
            Self::Up => Self::Down,
            Self::Down => Self::Up,
        }
    }
}

/// What a migration took.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(crate) struct Figures {
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

/// Why there was no migration.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{}{} in the {}: {why}{}", state, session.map_or_else(String::new, |s| format!(" {s}")),
    if *trial { "trial" } else { "commit" }, if *stuck { "; its thread is still at it" } else { "" })]
pub(crate) struct MigrationError {
    /// The state's id.
    pub state: String,
    /// The first entry that failed.
    pub session: Option<u64>,
    /// Nothing was changed yet.
    pub trial: bool,
    /// Why.
    pub why: String,
    /// Code of the patch has not returned, so the patch can't be taken back yet.
    pub stuck: bool,
    /// How many entries could not be taken back, with the reason of the first.
    pub left: Option<(usize, String)>,
}

/// Tables that change their version together.
#[derive(Clone)]
pub(crate) struct Migration {
    tables: Vec<(Arc<Inner>, Arms)>,
}

/// What a patch that declares these versions has to migrate; none where the process has them.
///
/// # Errors
///
/// Why the patch does not fit what the process has.
pub(crate) fn planned(declared: &[StateVersion]) -> Result<Option<Migration>, String> {
    let all = tables();
    let mut out = Vec::new();
    for StateVersion { id, version, from } in declared {
        let mine: Vec<_> = all.iter().filter(|t| t.id == id.as_str()).collect();
        if mine.is_empty() && from.is_some_and(|from| from != *version) {
            return Err(format!("no table of the process keeps the state {id}, which the patch changes"));
        }
        for table in mine {
            let has = *table.births.read();
            if has > *version {
                return Err(format!(
                    "the process has version {has} of the state {id}, and the patch knows version {version}"
                ));
            }
            if has == *version {
                continue;
            }
            if *from != Some(has) {
                let from = from.map_or_else(|| "none".to_owned(), |v| v.to_string());
                return Err(format!(
                    "the process has version {has} of the state {id}, and the patch comes from version {from}"
                ));
            }
            if table.arms().is_some() {
                return Err(format!("another patch with a migration of the state {id} is applied"));
            }
            out.push((Arc::clone(table), Arms { mask: 0, new: *version, old: has }));
        }
    }
    Ok((!out.is_empty()).then_some(Migration { tables: out }))
}

/// What a patch that was applied with this slot has migrated.
pub(crate) fn of_slot(slot: u8) -> Option<Migration> {
    let mask = 1u8.checked_shl(slot.into())?;
    let with = |t: Arc<Inner>| t.arms().filter(|a| a.mask == mask).map(|a| (t, a));
    let tables: Vec<_> = tables().into_iter().filter_map(with).collect();
    (!tables.is_empty()).then_some(Migration { tables })
}

/// What the thread that migrates tells the one that waits for it.
#[derive(Default)]
struct Progress {
    /// Counts the entries.
    step: AtomicU64,
    session: AtomicU64,
    /// Nobody waits any more: nothing may be changed.
    given_up: AtomicBool,
}

/// One table on its way.
struct Way<'m> {
    table: &'m Inner,
    arms: Arms,
    direction: Direction,
    progress: &'m Progress,
    limits: Limits,
}

impl Migration {
    /// From here on the version of an entry decides which code it gets: with stubs of this slot at the entries, and until [`end`](Self::end).
    pub fn begin(&mut self, slot: u8) {
        for (table, arms) in &mut self.tables {
            arms.mask = 1u8.checked_shl(slot.into()).unwrap_or(0);
            table.set_arms(Some(*arms));
        }
    }

    /// All entries are of one version, and no stub stands any more.
    pub fn end(&self) {
        self.tables.iter().for_each(|(table, _)| table.set_arms(None));
    }

    /// What can't be carried back, as the new code says.
    pub fn loses(&self) -> Vec<String> {
        let ask = |(table, arms): &(Arc<Inner>, Arms)| {
            let none = Built { state: null_mut(), version: arms.new };
            let mut call = Call::new(What::Loses, arms.old, none, Vec::new());
            catch_unwind(AssertUnwindSafe(|| table.call(arms.new, &mut call))).ok()?;
            let (id, old) = (table.id, arms.old);
            call.said.map(|said| format!("version {old} of the state {id} will not have: {said}"))
        };
        self.tables.iter().filter_map(ask).collect()
    }

    /// Whether no entry is of this direction's new version, nor will be.
    pub fn is_back(&self) -> bool {
        let is = |(table, arms): &(Arc<Inner>, Arms)| {
            *table.births.read() == arms.old && table.all().iter().all(|(_, s)| s.held.lock().built.version != arms.new)
        };
        self.tables.iter().all(is)
    }

    /// Takes all entries over. After a failure they are as before, but for those that [`left`](MigrationError::left) counts.
    ///
    /// # Errors
    ///
    /// The first one that did not, and why.
    pub fn run(&self, direction: Direction, limits: Limits) -> Result<Figures, MigrationError> {
        let progress = Arc::new(Progress::default());
        let (send, receive) = mpsc::channel();
        let (own, theirs) = (self.clone(), Arc::clone(&progress));
        // A thread of its own, with the program's heap: what it loads belongs to the program.
        let work = move || {
            let _ = send.send(own.all_steps(direction, limits, &theirs));
        };
        let failed = |why: String, stuck: bool| MigrationError {
            state: self.tables.first().map_or("", |(t, _)| t.id).to_owned(),
            session: stuck.then(|| progress.session.load(Ordering::Relaxed)),
            trial: true,
            why,
            stuck,
            left: None,
        };
        let thread = std::thread::Builder::new().name("livepatch-state".into()).spawn(work);
        thread.map_err(|e| failed(format!("no thread can be made for it: {e}"), false))?;
        let (mut step, mut since) = (0, Instant::now());
        loop {
            match receive.recv_timeout(limits.session.min(Duration::from_millis(20))) {
                Ok(done) => return done,
                Err(mpsc::RecvTimeoutError::Disconnected) => {
                    return Err(failed("the thread that migrates has ended".into(), false))
                }
                Err(mpsc::RecvTimeoutError::Timeout) => {}
            }
            let now = progress.step.load(Ordering::Acquire);
            if now != step {
                (step, since) = (now, Instant::now());
            } else if since.elapsed() > limits.session.max(Duration::from_millis(20)) * 2 {
                progress.given_up.store(true, Ordering::SeqCst);
                // It may have come to its end in this moment.
                return match receive.recv_timeout(Duration::from_millis(20)) {
                    Ok(done) => done,
                    Err(_) => Err(failed(format!("it has not come to its end within {:?}", limits.session), true)),
                };
            }
        }
    }

    fn all_steps(&self, direction: Direction, limits: Limits, progress: &Progress) -> Result<Figures, MigrationError> {
        let began = Instant::now();
        let until = began + limits.total;
        let mut figures = Figures::default();
        let mut frozen = Vec::new();
        let way = |(table, arms): &'_ (Arc<Inner>, Arms), direction| (Arc::clone(table), *arms, direction);
        let each = |direction: Direction, trial: bool, step: &mut dyn FnMut(&Way<'_>, &Slot) -> Result<(), String>| {
            for of in &self.tables {
                let (table, arms, direction) = way(of, direction);
                let way = Way { table: &table, arms, direction, progress, limits };
                for (session, slot) in table.all() {
                    progress.session.store(session, Ordering::Relaxed);
                    progress.step.fetch_add(1, Ordering::Release);
                    let done = if Instant::now() > until {
                        Err(format!("all of it takes longer than {:?}", limits.total))
                    } else {
                        step(&way, &slot)
                    };
                    done.map_err(|why| {
                        let state = table.id.to_owned();
                        MigrationError { state, session: Some(session), trial, why, stuck: false, left: None }
                    })?;
                }
            }
            Ok(())
        };
        each(direction, true, &mut |way, slot| way.try_one(slot))?;
        figures.trial_ms = ms(began.elapsed());
        let began = Instant::now();
        self.births(direction);
        let done = each(direction, false, &mut |way, slot| way.take_over(slot, &mut figures, &mut frozen));
        if let Err(mut e) = done {
            if !progress.given_up.load(Ordering::SeqCst) {
                e.left = self.back(direction.other(), progress, limits);
            }
            return Err(e);
        }
        figures.commit_ms = ms(began.elapsed());
        frozen.sort_unstable();
        let us = |share: f64| {
            let at = (frozen.len() as f64 * share) as usize;
            frozen
                .get(at.min(frozen.len().saturating_sub(1)))
                .map_or(0.0, |d| (d.as_nanos() as f64 / 100.0).round() / 10.0)
        };
        (figures.freeze_p50_us, figures.freeze_p99_us, figures.freeze_max_us) = (us(0.5), us(0.99), us(1.0));
        Ok(figures)
    }

    /// Which version new entries get.
    fn births(&self, direction: Direction) {
        for (table, arms) in &self.tables {
            *table.births.write() = if direction == Direction::Up { arms.new } else { arms.old };
        }
    }

    /// Takes back what went over already; how many could not be, and why.
    fn back(&self, direction: Direction, progress: &Progress, limits: Limits) -> Option<(usize, String)> {
        self.births(direction);
        let mut left: Option<(usize, String)> = None;
        for (table, arms) in &self.tables {
            let way = Way { table, arms: *arms, direction, progress, limits };
            for (session, slot) in table.all() {
                progress.session.store(session, Ordering::Relaxed);
                progress.step.fetch_add(1, Ordering::Release);
                if let Err(why) = way.take_over(&slot, &mut Figures::default(), &mut Vec::new()) {
                    left.get_or_insert((0, format!("{} {session}: {why}", table.id))).0 += 1;
                }
            }
        }
        left
    }
}

fn ms(d: Duration) -> f64 {
    (d.as_micros() as f64 / 100.0).round() / 10.0
}

impl Way<'_> {
    /// From and to.
    fn versions(&self) -> (u32, u32) {
        match self.direction {
            Direction::Up => (self.arms.old, self.arms.new),
            Direction::Down => (self.arms.new, self.arms.old),
        }
    }

    /// An operation in the code of a version; a panic is an error.
    fn ask(&self, by: u32, call: &mut Call) -> Result<(), String> {
        catch_unwind(AssertUnwindSafe(|| self.table.call(by, call))).map_err(|panic| {
            let text = panic.downcast_ref::<&str>().map(|s| (*s).to_owned());
            let text = text.or_else(|| panic.downcast_ref::<String>().cloned());
            format!("version {by} panicked: {}", text.unwrap_or_default())
        })?;
        call.failed.take().map_or(Ok(()), |e| Err(format!("version {by}: {e}")))
    }

    fn save(&self, built: Built) -> Result<Vec<u8>, String> {
        let mut call = Call::new(What::Save, self.arms.old, built, Vec::new());
        self.ask(built.version, &mut call)?;
        Ok(call.bytes)
    }

    /// A state of the version that it goes to, and the bytes again. If nobody waits any more, it is left where it is: its code may be gone.
    fn load(&self, bytes: Vec<u8>) -> Result<(Built, Vec<u8>), String> {
        let (_, to) = self.versions();
        let mut call = Call::new(What::Load, self.arms.old, Built { state: null_mut(), version: 0 }, bytes);
        let began = Instant::now();
        self.ask(to, &mut call)?;
        let built = Built { state: call.state, version: call.version };
        self.alive()?;
        let took = began.elapsed();
        let wrong = if built.version != to {
            Some(format!("the patch's code makes version {} of it, not {to}", built.version))
        } else {
            (took > self.limits.session)
                .then(|| format!("it took {took:?} to load it, longer than {:?}", self.limits.session))
        };
        match wrong {
            None => Ok((built, call.bytes)),
            Some(why) => {
                self.table.end(built);
                Err(why)
            }
        }
    }

    fn alive(&self) -> Result<(), String> {
        let given_up = self.progress.given_up.load(Ordering::SeqCst);
        if given_up {
            Err("it was given up".into())
        } else {
            Ok(())
        }
    }

    /// Saves an entry, loads it in the other version and has that one write it again.
    fn try_one(&self, slot: &Slot) -> Result<(), String> {
        let (from, to) = self.versions();
        let bytes = {
            let held = slot.held.lock();
            // One that was removed, or was made since.
            if held.built.state.is_null() || held.built.version != from {
                return Ok(());
            }
            self.save(held.built)?
        };
        let (copy, bytes) = self.load(bytes)?;
        let again = self.save(copy);
        self.alive()?;
        self.table.end(copy);
        let again = again?;
        if again != bytes {
            let at = again.iter().zip(&bytes).position(|(a, b)| a != b).unwrap_or(again.len().min(bytes.len()));
            return Err(format!(
                "version {to} does not write what version {from} wrote: {} bytes, {} then, the first difference at byte {at}",
                again.len(),
                bytes.len()
            ));
        }
        Ok(())
    }

    /// Takes an entry over.
    fn take_over(&self, slot: &Slot, figures: &mut Figures, frozen: &mut Vec<Duration>) -> Result<(), String> {
        let (from, _) = self.versions();
        let mut frozen_for = Duration::ZERO;
        for attempt in 0.. {
            let mut held = slot.held.lock();
            let began = Instant::now();
            if held.built.state.is_null() || held.built.version != from {
                return Ok(());
            }
            let (was, uses) = (held.built, held.uses);
            let bytes = self.save(was)?;
            let len = bytes.len() as u64;
            let loaded = if attempt < BESIDE {
                drop(held);
                frozen_for = frozen_for.max(began.elapsed());
                let (loaded, _) = self.load(bytes)?;
                held = slot.held.lock();
                let began = Instant::now();
                if held.built.state.is_null() || held.uses != uses {
                    drop(held);
                    self.table.end(loaded);
                    continue;
                }
                held.built = loaded;
                drop(held);
                frozen_for = frozen_for.max(began.elapsed());
                loaded
            } else {
                let (loaded, _) = self.load(bytes)?;
                held.built = loaded;
                drop(held);
                figures.under_lock += 1;
                frozen_for = frozen_for.max(began.elapsed());
                loaded
            };
            debug_assert_ne!(loaded.version, from);
            // Nobody has the old one any more.
            self.table.end(was);
            frozen.push(frozen_for);
            figures.sessions += 1;
            figures.bytes += len;
            break;
        }
        Ok(())
    }
}
