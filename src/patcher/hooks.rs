//! Running a patch's hooks from outside: each on a thread of its own, which a borrowed thread creates with `pthread_create`.
//!
//! The thread begins in code of ours, calls the hook, detaches itself, says that it is done, and ends. That code and its
//! words lie in two pages behind the patch's mapping, which go when no thread is in them any more. A command that dies meanwhile
//! leaves these pages; the hook runs to its end.

use std::time::{Duration, Instant};

use super::idle::Idle;
use super::rewrite::Place;
use super::{Error, NotQuiescent, Patcher, Retry};
use crate::addr::{ProcAddr, ProcRange};
use crate::image::Image;
use crate::insn::HOOK_STUB;
use crate::maps::{Mapping, PAGE};
use crate::memory::ReadMemory;
use crate::patch::HookKind;
use crate::plan::Refusal;
use crate::process::ptrace::PtraceProcess;
use crate::process::{Access, FunctionCall, Process, ProcessError, RemoteCall};
use crate::registry::{Found, Payload};
use crate::stack::{Cfi, Part, Watched};

/// Where the thread writes what the hook returned, and behind it that it is done.
const RESULT_AT: u64 = 24;
/// Where `pthread_create` writes the thread's identity.
const THREAD_AT: u64 = 64;

/// How often it is looked whether the hook has returned.
const LOOK: Duration = Duration::from_millis(1);

/// How a hook ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Hooked {
    /// It returned this.
    Returned(i32),
    /// It had not returned by the deadline, and runs on.
    Late,
}

/// A process in which hooks run.
pub(super) struct Hooks<'a> {
    pub(super) images: &'a [Image],
    pub(super) maps: &'a [Mapping],
    /// How long each may take.
    pub(super) timeout: Duration,
}

impl Hooks<'_> {
    /// Runs the hook of this kind, if the patch of this record has one: `None` if it has not.
    pub(super) fn run(
        &self,
        process: &mut PtraceProcess,
        payload: &Payload,
        region: ProcRange,
        kind: HookKind,
    ) -> Result<Option<Hooked>, Error> {
        let Some(hook) = payload.hooks.iter().find(|h| h.kind == kind) else { return Ok(None) };
        let deadline = Instant::now() + self.timeout;
        let functions = ["pthread_self", "pthread_detach", "pthread_create"].map(|n| self.find_in_libc(process, n));
        let [Some(own), Some(detach), Some(create)] = functions else {
            let what = format!("the hook {} in a program whose C library exports no pthread_create", hook.symbol);
            return Err(Refusal::Unsupported { what }.into());
        };
        let (code, room, both) = pages(region);
        process.remote(&[RemoteCall::Map(both), RemoteCall::Protect(room, Access::Write)], deadline)?;
        let words: Vec<u8> = [hook.at, own, detach].iter().flat_map(|a| a.0.to_le_bytes()).collect();
        process.write_own(code.start, &HOOK_STUB)?;
        process.write_own(room.start, &words)?;
        let cfi = Cfi::load(process, self.images);
        let mut idle = Idle::new(process, self.images, self.maps, &cfi, None);
        let arguments = [room.start.0 + THREAD_AT, 0, code.start.0, room.start.0];
        let call = FunctionCall { stub: payload.stub, function: create, arguments };
        let unmap =
            |process: &mut PtraceProcess| process.remote(&[RemoteCall::Unmap(both)], Instant::now() + self.timeout);
        if let Err(e) = process.call(call, &mut idle, deadline) {
            // Where no thread was borrowed, none can be in there.
            if matches!(e, ProcessError::NoIdleThread { .. }) {
                unmap(process)?;
            }
            return Err(e.into());
        }
        let pid = process.pid();
        let thread = process.read_vec(ProcAddr(room.start.0 + THREAD_AT), 8).map_err(|_| ProcessError::Gone(pid))?;
        if thread.iter().all(|b| *b == 0) {
            unmap(process)?;
            let source = std::io::Error::from_raw_os_error(libc::EAGAIN);
            return Err(ProcessError::Remote { pid, call: "pthread_create", source }.into());
        }
        let result = loop {
            if let Some(result) = done(process, room).ok_or(ProcessError::Gone(pid))? {
                break result;
            }
            if Instant::now() >= deadline {
                return Ok(Some(Hooked::Late));
            }
            process.release_born();
            std::thread::sleep(LOOK);
        };
        self.nobody_in(process, both, &hook.symbol)?;
        unmap(process)?;
        Ok(Some(Hooked::Returned(result)))
    }

    /// Waits until no thread is in these pages, as what stands there is to go.
    pub(super) fn nobody_in(&self, process: &mut PtraceProcess, pages: ProcRange, name: &str) -> Result<(), Error> {
        let place = Place::new(process, self.images, self.maps, name);
        let part = Part::Body { branches_to_entry: true };
        let watched = vec![Watched { name: name.to_owned(), range: pages, part }];
        let mut retry = Retry::new(Instant::now() + Duration::from_secs(1), Duration::from_millis(100));
        place.look(process, watched, &mut retry)
    }

    /// Where a function of the C library is.
    fn find_in_libc(&self, memory: &dyn ReadMemory, name: &str) -> Option<ProcAddr> {
        let known = |n: &str| ["libc.so", "libc-", "libpthread", "ld-musl"].iter().any(|p| n.starts_with(p));
        self.images.iter().filter(|i| known(i.short_name())).find_map(|image| {
            let symbols = image.dynamic_symbols(memory);
            let at = symbols.iter().find(|s| s.name == name && s.at.is_some())?.at?;
            image.to_process(at, 1)
        })
    }
}

impl Patcher {
    /// Waits until no hook runs any more in the mapping of a patch that is to go, nor is about to: a command may have died after it
    /// made a thread for one. Takes away the pages that such a command left.
    pub(super) fn no_hook_in(&mut self, found: &Found) -> Result<(), Error> {
        if found.payload.hooks.is_empty() {
            return Ok(());
        }
        let (code, room, both) = pages(found.region);
        let left = self.process.read_vec(code.start, HOOK_STUB.len() as u64).is_ok_and(|b| b == HOOK_STUB);
        if left && done(&self.process, room).is_none_or(|result| result.is_none()) {
            let reason = format!("a hook of {} still runs, of a command that ended before it", found.payload.patch);
            return Err(NotQuiescent { reason, attempts: 1, ..NotQuiescent::default() }.into());
        }
        let timeout = Duration::from_secs(1);
        let hooks = Hooks { images: &self.images, maps: &self.maps, timeout };
        if left {
            hooks.nobody_in(&mut self.process, both, &found.payload.patch)?;
            self.process.remote(&[RemoteCall::Unmap(both)], Instant::now() + timeout)?;
        }
        hooks.nobody_in(&mut self.process, found.region, &found.payload.patch)
    }
}

/// Where the thread's code and its words lie, and both: behind the mapping 16 pages are free (plan::GAP).
fn pages(region: ProcRange) -> (ProcRange, ProcRange, ProcRange) {
    let page = |n: u64| ProcAddr(region.end.0 + n * PAGE);
    let range = |from, to| ProcRange { start: page(from), end: page(to) };
    (range(1, 2), range(2, 3), range(1, 3))
}

/// What the hook returned, if it is done; `None` if the words can't be read.
fn done(memory: &dyn ReadMemory, room: ProcRange) -> Option<Option<i32>> {
    let bytes = memory.read_vec(ProcAddr(room.start.0 + RESULT_AT), 8).ok()?;
    let [result, done] = bytes.as_chunks::<4>().0 else { return None };
    Some((u32::from_le_bytes(*done) != 0).then(|| i32::from_le_bytes(*result)))
}

/// A hook that ought to say yes or no, and says nothing.
pub(super) fn late(kind: HookKind) -> Error {
    let reason = format!("the hook {} had not returned by then; it runs on, and the patch stays mapped", kind.symbol());
    NotQuiescent { reason, attempts: 1, ..NotQuiescent::default() }.into()
}

/// What is to be said of a hook that may not refuse.
pub(super) fn said(kind: HookKind, hooked: Result<Option<Hooked>, Error>) -> Option<String> {
    let symbol = kind.symbol();
    match hooked {
        Ok(None | Some(Hooked::Returned(0))) => None,
        Ok(Some(Hooked::Returned(n))) => Some(format!("the hook {symbol} returned {n}")),
        Ok(Some(Hooked::Late)) => Some(format!("the hook {symbol} had not returned by the deadline, and runs on")),
        Err(e) => Some(format!("the hook {symbol} did not run: {e}")),
    }
}
