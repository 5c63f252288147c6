//! Entries rewritten without a switch, in short holds: to the switch stubs before one, and away from them after it.

use super::{signal_returns, Error, Retry};
use crate::image::Image;
use crate::maps::Mapping;
use crate::plan::beside::Consistency;
use crate::plan::CodeEdit;
use crate::process::ptrace::PtraceProcess;
use crate::process::{HoldTimes, Process};
use crate::quiesce::{Checker, NotClear, StackMap};
use crate::stack::{WatchList, Watched};
use crate::transaction::{relax, rewrite, undone, Applied, Reverted, TransactionError};

/// How many entries one hold writes: some 2 µs each.
const AT_ONCE: usize = 32;

/// A process and what is known of it.
pub(super) struct Place<'a> {
    images: &'a [Image],
    /// The patch, for messages.
    pub(super) patch: &'a str,
    /// Where signal handlers return to: watched in every hold.
    returns: Vec<Watched>,
}

impl<'a> Place<'a> {
    pub(super) fn new(process: &PtraceProcess, images: &'a [Image], maps: &[Mapping], patch: &'a str) -> Self {
        Self { images, patch, returns: signal_returns(process, images, maps) }
    }

    /// What no thread may be in.
    pub(super) fn watch(&self, mut watched: Vec<Watched>) -> WatchList {
        watched.extend(self.returns.iter().cloned());
        WatchList::new(watched)
    }

    /// Writes all of `edits` while no thread is in `watched`; the longest hold counts.
    pub(super) fn rewrite(
        &self,
        process: &mut PtraceProcess,
        edits: &[CodeEdit],
        watched: Vec<Watched>,
        retry: &mut Retry,
    ) -> Result<HoldTimes, Error> {
        let mut longest = HoldTimes::default();
        let watch = self.watch(watched);
        for some in edits.chunks(AT_ONCE) {
            loop {
                let stacks = StackMap::new(&process.mappings()?);
                retry.tables_if_wanted(process, self.images)?;
                let mut checker = Checker::new(&watch, &stacks, retry.cfi.as_ref());
                match rewrite(process, some, retry.limits(), &mut checker) {
                    Ok(times) => {
                        longest = longer(longest, times);
                        break;
                    }
                    Err(e) => {
                        let blocked = checker.into_blocked();
                        self.again(retry, process, e, blocked)?;
                    }
                }
            }
        }
        Ok(longest)
    }

    /// Waits until a hold finds no thread in `watched`.
    pub(super) fn look(
        &self,
        process: &mut PtraceProcess,
        watched: Vec<Watched>,
        retry: &mut Retry,
    ) -> Result<(), Error> {
        let watch = self.watch(watched);
        loop {
            let stacks = StackMap::new(&process.mappings()?);
            retry.tables_if_wanted(process, self.images)?;
            let mut checker = Checker::new(&watch, &stacks, retry.cfi.as_ref());
            let Err(e) = rewrite(process, &[], retry.limits(), &mut checker) else { return Ok(()) };
            let blocked = checker.into_blocked();
            self.again(retry, process, e, blocked)?;
        }
    }

    /// Reverts as soon as no thread is in the way.
    pub(super) fn revert(
        &self,
        process: &mut PtraceProcess,
        mut applied: Applied,
        consistency: &Consistency,
        retry: &mut Retry,
    ) -> Result<Reverted, Error> {
        let watch = self.watch(relax(consistency, applied.watched()));
        loop {
            let stacks = StackMap::new(&process.mappings()?);
            retry.tables_if_wanted(process, self.images)?;
            let mut checker = Checker::new(&watch, &stacks, retry.cfi.as_ref());
            match applied.revert(process, retry.limits(), &mut checker) {
                Ok(reverted) => return Ok(reverted),
                Err(failed) => {
                    let (back, error) = *failed;
                    applied = back;
                    let blocked = checker.into_blocked();
                    self.again(retry, process, error, blocked)?;
                }
            }
        }
    }

    /// Decides on another attempt after `error`, and waits for it.
    pub(super) fn again(
        &self,
        retry: &mut Retry,
        process: &PtraceProcess,
        error: TransactionError,
        blocked: Option<NotClear>,
    ) -> Result<(), Error> {
        retry.again(error, blocked, process, self.images, process.pid(), self.patch)
    }

    /// Puts back those of `edits` that were made; whether that worked.
    pub(super) fn take_back(
        &self,
        process: &mut PtraceProcess,
        edits: &[CodeEdit],
        watched: Vec<Watched>,
        mut retry: Retry,
    ) -> bool {
        let back = undone(process, edits);
        self.rewrite(process, &back, watched, &mut retry).is_ok()
    }
}

/// The longer of two holds, each part for itself.
pub(super) fn longer(a: HoldTimes, b: HoldTimes) -> HoldTimes {
    HoldTimes {
        pause_ns: a.pause_ns.max(b.pause_ns),
        sleepers_ns: a.sleepers_ns.max(b.sleepers_ns),
        threads: a.threads.max(b.threads),
    }
}
