//! Patches with a migration: the stubs of a canary by session, whose arm is the version of the state that a call works on.
//!
//! *Invariant:* entries are given back only when every state is of the old version.

use std::time::Duration;

use crate::patch::PatchFile;
use crate::patcher::{Canary, Error, Migrated, Options, Patcher, Report};
use crate::plan::Refusal;
use crate::state::{self, Direction, Figures, Limits, MigrationError};
use crate::switch::Switcher;

/// How long one entry and all of them may take.
#[derive(Clone, Copy, Debug)]
pub struct Deadlines {
    pub session: Duration,
    pub total: Duration,
}

impl Default for Deadlines {
    fn default() -> Self {
        Self { session: Duration::from_millis(500), total: Duration::from_secs(60) }
    }
}

impl From<Deadlines> for Limits {
    fn from(d: Deadlines) -> Self {
        Self { session: d.session, total: d.total }
    }
}

fn migrated(f: Figures) -> Migrated {
    let Figures { sessions, freeze_p50_us, freeze_p99_us, freeze_max_us, under_lock, trial_ms, commit_ms, bytes } = f;
    Migrated { sessions, freeze_p50_us, freeze_p99_us, freeze_max_us, under_lock, trial_ms, commit_ms, bytes }
}

fn refused(why: impl Into<String>) -> Error {
    Refusal::State { why: why.into() }.into()
}

/// Applies a patch, with its migration if the process has older states.
pub fn apply(
    patch: &PatchFile,
    options: &Options,
    deadlines: Deadlines,
    switcher: &mut Switcher,
) -> Result<Report, Error> {
    let name = &patch.manifest.name;
    let Some(mut migration) = state::planned(&patch.manifest.states).map_err(refused)? else {
        return Patcher::open_own()?.apply_within(patch, options, switcher);
    };
    if options.canary.is_some() {
        return Err(refused("a patch with a migration goes to all sessions: without --canary"));
    }
    let options = Options { canary: Some(Canary::by_state()), ..options.clone() };
    let mut own = Patcher::open_own()?;
    let mut report = own.apply_within(patch, &options, switcher)?;
    let Some(slot) = own.slot().filter(|_| !report.already) else { return Ok(report) };
    migration.begin(slot);
    report
        .warnings
        .extend(migration.loses().into_iter().map(|what| format!("a revert can't carry all of it back: {what}")));
    let failed = match migration.run(Direction::Up, deadlines.into()) {
        Ok(figures) => {
            report.migrated = Some(migrated(figures));
            // What is handled outside of any state is new from its next message on.
            Patcher::open_own()?.set_share(name, crate::insn::WHOLE)?;
            return Ok(report);
        }
        Err(failed) => failed,
    };
    if failed.stuck || failed.left.is_some() {
        return Err(refused(format!("{failed}; {}", rest(&failed, name))));
    }
    match Patcher::open_own().and_then(|mut p| p.revert_within(Some(name), &options, switcher)) {
        Ok(_) => {
            migration.end();
            Err(refused(format!("{failed}; every state is as it was, and the patch is taken back")))
        }
        Err(e) => Err(refused(format!(
            "{failed}; every state is as it was; the patch stays, without effect, until it is reverted: {e}"
        ))),
    }
}

/// Whether a share decides who runs a patch, and not the version of states.
pub fn may_set_share(name: &str) -> Result<Patcher, Error> {
    let own = Patcher::open_own()?;
    match own.to_revert(Some(name)) {
        Ok((_, Some(_))) => {
            Err(Refusal::Canary { why: format!("{name} goes by the versions of states, not by a share") }.into())
        }
        _ => Ok(own),
    }
}

/// What is left of a migration that could not be taken back whole.
fn rest(failed: &MigrationError, name: &str) -> String {
    match &failed.left {
        Some((count, why)) => format!("{count} entries could not be taken back ({why}): they keep the new code; revert {name} to try again"),
        None => format!("every state is old; the patch stays mapped, without effect: revert {name} once the thread livepatch-state has ended"),
    }
}

/// Reverts a patch, once the states that it migrated are old again.
pub fn revert(
    name: Option<&str>,
    options: &Options,
    deadlines: Deadlines,
    switcher: &mut Switcher,
) -> Result<Report, Error> {
    let mut own = Patcher::open_own()?;
    let (patch, slot) = own.to_revert(name)?;
    let Some(migration) = slot.and_then(state::of_slot) else { return own.revert_within(name, options, switcher) };
    let (loses, mut took) = (migration.loses(), None);
    if !migration.is_back() {
        let down = migration.run(Direction::Down, deadlines.into());
        took = Some(migrated(down.map_err(|e| refused(format!("{e}; {patch} stays applied")))?));
    }
    let mut report = Patcher::open_own()?.revert_within(name, options, switcher)?;
    migration.end();
    report.migrated = took;
    report.warnings.extend(loses.into_iter().map(|what| format!("not carried back: {what}")));
    Ok(report)
}
