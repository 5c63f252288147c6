//! Saying that an applied patch stays.

use super::{Error, Patcher};
use crate::addr::ProcAddr;
use crate::process::ptrace::Undisturbed;
use crate::process::Process;
use crate::registry::{encode_mutable, Confirmation, Mutable, MUTABLE_AT};

impl Patcher {
    /// Makes an applied patch permanent: whoever waits to revert it no longer does. Nothing is stopped.
    ///
    /// # Errors
    ///
    /// No patch of that name is applied, or another command is at work.
    pub fn confirm(&mut self, name: &str) -> Result<(), Error> {
        let result = self.try_confirm(name);
        self.unless_ended(result)
    }

    fn try_confirm(&mut self, name: &str) -> Result<(), Error> {
        let _undisturbed = Undisturbed::begin();
        let _lock = self.process.lock()?;
        self.finished()?;
        let found = self.applied(name)?;
        let confirmation = Confirmation { confirmed: true, ..Confirmation::default() };
        self.process.adopt(found.region);
        let at = ProcAddr(found.region.start.0 + MUTABLE_AT);
        Ok(self.process.write_own(at, &encode_mutable(&Mutable { confirmation, ..found.mutable }))?)
    }
}
