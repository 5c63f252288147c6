//! Entries rewritten without a switch, in short holds: to the switch stubs before one, and away from them after it.

use super::{signal_returns, Error, Retry};
use crate::image::Image;
use crate::maps::Mapping;
use crate::plan::CodeEdit;
use crate::process::ptrace::PtraceProcess;
use crate::process::{HoldTimes, Process};
use crate::quiesce::{Checker, StackMap};
use crate::stack::{WatchList, Watched};
use crate::transaction::{rewrite, undone};

/// How many entries one hold writes: some 2 µs each.
const AT_ONCE: usize = 32;

/// A process and what is known of it.
pub(super) struct Place<'a> {
    pub(super) images: &'a [Image],
    pub(super) maps: &'a [Mapping],
    /// The patch, for messages.
    pub(super) patch: &'a str,
}

impl Place<'_> {
    /// Writes all of `edits` while no thread is in `watched`; the longest hold counts.
    pub(super) fn rewrite(
        &self,
        process: &mut PtraceProcess,
        edits: &[CodeEdit],
        mut watched: Vec<Watched>,
        retry: &mut Retry,
    ) -> Result<HoldTimes, Error> {
        let mut longest = HoldTimes::default();
        watched.extend(signal_returns(process, self.images, self.maps));
        let watch = WatchList::new(watched);
        for some in edits.chunks(AT_ONCE) {
            loop {
                let stacks = StackMap::new(&process.mappings()?);
                if retry.wants_tables {
                    retry.load_tables(process, self.images)?;
                }
                let mut checker = Checker::new(&watch, &stacks, retry.cfi.as_ref());
                match rewrite(process, some, retry.limits(), &mut checker) {
                    Ok(times) => {
                        longest = longer(longest, times);
                        break;
                    }
                    Err(e) => {
                        let pid = process.pid();
                        retry.again(e, checker.into_blocked(), process, self.images, pid, self.patch)?;
                    }
                }
            }
        }
        Ok(longest)
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
