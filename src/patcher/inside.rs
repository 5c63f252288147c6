//! Who is inside functions of a patch now, told without stopping anybody: for a check, never for an apply.

use serde::{Deserialize, Serialize};

use super::{Error, Patcher};
use crate::addr::ProcAddr;
use crate::maps;
use crate::memory::ReadMemory;
use crate::process::ptrace::procfs::{self, Blocked};
use crate::process::{Process, Tid};
use crate::stack::{Cfi, Frame, Part, Unwinder, WatchList, Watched};

/// Bytes of a stack that are looked at.
const MAX_LOOKED_AT: u64 = 1 << 20;

/// A thread inside a function of the patch.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Inside {
    /// The thread.
    pub tid: i32,
    /// Its name.
    pub thread: String,
    /// The function.
    pub function: String,
    /// Whether its stack could be followed to its end; otherwise a word on it looks like a frame.
    pub certain: bool,
}

impl Patcher {
    /// The threads that are inside of `watched`, and how many run, so that they can't be looked at.
    pub(super) fn inside(&self, watched: &[Watched]) -> Result<(Vec<Inside>, usize), Error> {
        let pid = self.process.pid();
        let watch = WatchList::new(watched.to_vec());
        let maps = self.process.mappings()?;
        let threads =
            procfs::threads(pid).map_err(|e| crate::process::ProcessError::from_os(pid, "list the threads", e))?;
        let (mut out, mut running, mut cfi) = (Vec::new(), 0, None);
        // From inside, the thread that looks is none of the program's, and has addresses of the patch on its stack.
        let own = self.by_threads.then(procfs::own_tid);
        for tid in threads.into_iter().filter(|t| Some(*t) != own) {
            let Some(blocked) = procfs::blocked_in(pid, tid) else {
                running += 1;
                continue;
            };
            let sp = ProcAddr(blocked.sp);
            let Some(stack) = maps::find(&maps, sp) else { continue };
            let len = stack.range.end.offset_from(sp).unwrap_or(0).min(MAX_LOOKED_AT) & !7;
            let Ok(bytes) = self.process.read_vec(sp, len) else { continue };
            if !watch.hits_stack(&bytes) && !watch.hits_pc(ProcAddr(blocked.pc)) {
                continue;
            }
            let cfi = cfi.get_or_insert_with(|| Cfi::load(&self.process, &self.images));
            if let Some((function, certain)) = self.function(cfi, &watch, blocked, &bytes) {
                out.push(Inside { tid: tid.0, thread: procfs::thread_name(pid, Tid(tid.0)), function, certain });
            }
        }
        Ok((out, running))
    }

    /// The function that a blocked thread is inside of, and whether that is certain.
    fn function(&self, cfi: &Cfi, watch: &WatchList, blocked: Blocked, stack: &[u8]) -> Option<(String, bool)> {
        let mut live: Option<&Watched> = None;
        let mut look = |frame: Frame| {
            let found = if frame.exact { watch.live_at(frame.pc) } else { watch.live_return(frame.pc) };
            live = live.or(found);
        };
        let walked =
            Unwinder::new(cfi, &self.process).walk_blocked(ProcAddr(blocked.sp), ProcAddr(blocked.pc), &mut look);
        if let Some(w) = live {
            return Some((w.name.clone(), true));
        }
        if walked.is_ok() {
            return None;
        }
        let words = stack.as_chunks::<8>().0.iter().map(|w| ProcAddr(u64::from_le_bytes(*w)));
        let body = |w: &&Watched| matches!(w.part, Part::Body { .. } | Part::Companion);
        words.filter_map(|word| watch.live_return(word)).find(body).map(|w| (w.name.clone(), false))
    }
}
