//! How often a hold is tried, and when again.

use std::time::{Duration, Instant};

use super::{blame, Error};
use crate::image::Image;
use crate::process::ptrace::PtraceProcess;
use crate::process::{HoldError, HoldLimits, Pid, Process, ProcessError};
use crate::quiesce::{NotClear, Why};
use crate::registry;
use crate::stack::Cfi;
use crate::transaction::{SwapError, TransactionError};

/// When to hold again.
pub(super) struct Retry {
    deadline: Instant,
    hold: Duration,
    pause: Duration,
    pub attempts: u32,
    wants_tables: bool,
    pub cfi: Option<Cfi>,
}

impl Retry {
    pub fn new(deadline: Instant, hold: Duration) -> Self {
        Self { deadline, hold, pause: Duration::from_millis(2), attempts: 1, wants_tables: false, cfi: None }
    }

    pub fn limits(&self) -> HoldLimits {
        HoldLimits { deadline: self.hold }
    }

    /// Reads the unwind tables if an attempt asked for them.
    pub fn tables_if_wanted(&mut self, process: &PtraceProcess, images: &[Image]) -> Result<(), Error> {
        if self.wants_tables {
            self.load_tables(process, images)?;
        }
        Ok(())
    }

    /// Reads all unwind tables, those of patches included, while the threads run.
    pub fn load_tables(&mut self, process: &PtraceProcess, images: &[Image]) -> Result<(), Error> {
        let mut cfi = Cfi::load(process, images);
        for found in registry::find(process, &process.mappings()?).unwrap_or_default() {
            if let Some(table) = found.payload.eh_frame.and_then(|t| t.range()) {
                cfi.add_patch(process, found.region, table.start, table.len_bytes());
            }
        }
        self.cfi = Some(cfi);
        self.wants_tables = false;
        Ok(())
    }

    /// Decides on another attempt after `error`, and waits for it.
    pub fn again(
        &mut self,
        error: TransactionError,
        blocked: Option<NotClear>,
        process: &PtraceProcess,
        images: &[Image],
        pid: Pid,
        patch: &str,
    ) -> Result<(), Error> {
        let hold = match error {
            TransactionError::Hold(HoldError::Process(e)) => return Err(e.into()),
            TransactionError::Hold(hold) => hold,
            TransactionError::Swap(e @ SwapError::Changed { .. }) => return Err(e.refusal(patch).into()),
            other => return Err(other.into()),
        };
        if !process.is_alive() {
            return Err(ProcessError::Gone(pid).into());
        }
        if Instant::now() >= self.deadline {
            if self.cfi.is_none() {
                self.load_tables(process, images)?;
            }
            let cfi = self.cfi.as_ref();
            return Err(blame::not_quiescent(process, images, cfi, &hold, blocked, self.attempts).into());
        }
        // A hit that only unwinding can judge: read the tables and hold again at once.
        if blocked.as_ref().is_some_and(|b| b.why == Why::TablesWanted) && self.cfi.is_none() {
            self.wants_tables = true;
        } else {
            let left = self.deadline.saturating_duration_since(Instant::now());
            std::thread::sleep(self.pause.min(left));
            self.pause = (self.pause * 3 / 2).min(Duration::from_millis(100));
        }
        self.attempts += 1;
        Ok(())
    }
}
