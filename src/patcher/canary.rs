//! Changing the share of a canary: one byte, at the next call, without a hold.

use super::{Error, Patcher};
use crate::addr::ProcAddr;
use crate::patch::PatchFile;
use crate::plan::Refusal;
use crate::process::ptrace::{PtraceProcess, Undisturbed};
use crate::process::Process;
use crate::registry::{Found, Share, State, SHARES_AT, WHICH_AT};

/// Writes the share into the word that does not count, and then says that it does.
fn write(process: &mut PtraceProcess, region: ProcAddr, was: Share, share: u32) -> Result<Share, Error> {
    let which = u8::from(was.which == 0);
    let word = ProcAddr(region.0 + SHARES_AT + 4 * u64::from(which));
    process.write_own(word, &share.to_le_bytes())?;
    process.write_own(ProcAddr(region.0 + WHICH_AT), &[which])?;
    let mut words = was.words;
    words[usize::from(which)] = share;
    Ok(Share { words, which })
}

/// A share that was taken to zero: where, what it is now, and what it was.
pub(super) struct Closed(ProcAddr, Share, u32);

/// Takes the share of a canary to zero; nothing for any other patch.
pub(super) fn close(process: &mut PtraceProcess, found: &Found) -> Result<Option<Closed>, Error> {
    if found.payload.canary.is_none() {
        return Ok(None);
    }
    process.adopt(found.region);
    let was = found.mutable.share;
    let now = write(process, found.region.start, was, 0)?;
    Ok(Some(Closed(found.region.start, now, was.value())))
}

/// Puts it back to what it was.
pub(super) fn reopen(process: &mut PtraceProcess, closed: Option<Closed>) -> Result<(), Error> {
    let Some(Closed(region, now, was)) = closed else { return Ok(()) };
    write(process, region, now, was).map(drop)
}

impl Patcher {
    /// Sets the share of an applied canary, in 1/10,000: from the next call on. Nothing is stopped. A call that went to the new
    /// code goes there with any greater share, too.
    ///
    /// # Errors
    ///
    /// No such patch is applied, or it is no canary.
    pub fn set_share(&mut self, name: &str, share: u32) -> Result<(), Error> {
        let result = self.try_set_share(name, share);
        self.unless_ended(result)
    }

    fn try_set_share(&mut self, name: &str, share: u32) -> Result<(), Error> {
        let _undisturbed = Undisturbed::begin();
        let _lock = self.process.lock()?;
        self.finished()?;
        let found = self.applied(name)?;
        if found.payload.canary.is_none() {
            let why = format!("{name} was applied to all calls");
            return Err(Refusal::Canary { why }.into());
        }
        if found.payload.canary.as_ref().is_some_and(|c| super::is_by_state(&c.keys)) && !self.by_threads {
            let why = format!("{name} goes by the versions of states, not by a share");
            return Err(Refusal::Canary { why }.into());
        }
        self.process.adopt(found.region);
        write(&mut self.process, found.region.start, found.mutable.share, share.min(crate::insn::WHOLE)).map(drop)
    }

    /// The applied patch of this name.
    pub(super) fn applied(&self, name: &str) -> Result<Found, Error> {
        let pid = self.process.pid();
        let mut applied = self.records()?;
        applied.retain(|r| r.mutable.state == State::Applied);
        match (applied.iter().rfind(|r| r.payload.patch == name), applied.last()) {
            (Some(found), _) => Ok(found.clone()),
            (None, None) => Err(Error::NothingApplied { pid }),
            (None, Some(newest)) => {
                let applied = newest.payload.patch.clone();
                Err(Error::NoSuchPatch { pid, name: name.to_owned(), applied })
            }
        }
    }

    /// What to say of a patch that is applied already, if only some calls run it.
    pub(super) fn canary_of(&self, patch: &PatchFile) -> Result<Option<String>, Error> {
        let found = self.records()?.into_iter().rfind(|r| r.payload.digest.0 == patch.digest);
        let share = found.filter(|f| f.payload.canary.is_some()).map(|f| f.mutable.share.value());
        let share = share.filter(|s| *s < crate::insn::WHOLE);
        Ok(share.map(|s| format!("it is a canary of {} % (livepatch canary)", f64::from(s) / 100.0)))
    }
}
