//! Running a patch's hooks: each on a thread of its own, which `pthread_create` makes. From outside a borrowed thread calls that, from
//! inside the thread that asks.
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
use crate::patch::{HookKind, HOOK_TEXT_BYTES};
use crate::plan::Refusal;
use crate::process::ptrace::{procfs, PtraceProcess};
use crate::process::{Access, FunctionCall, Process, ProcessError, RemoteCall, Tid};
use crate::registry::{Found, HookRecord, Payload};
use crate::stack::{Cfi, Part, Watched};

/// Where the thread writes what the hook returned, and behind it that it is done.
const RESULT_AT: u64 = 24;
/// Where it writes its number, if it is asked for.
const TID_AT: u64 = 32;
/// Where it is said whether it is.
const KNOWS_TID_AT: u64 = 48;
/// Where `pthread_create` writes the thread's identity.
const THREAD_AT: u64 = 64;
/// Where the hook may write why it says no.
const TEXT_AT: u64 = 128;

/// How often it is looked whether the hook has returned.
const LOOK: Duration = Duration::from_millis(1);

/// How long a thread may take to end once its hook has returned: what it left to be done at its end.
const LEAVES: Duration = Duration::from_secs(1);

/// How a hook ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Hooked {
    /// It returned this; with its own words.
    Returned(i32, String),
    /// It had not returned by the deadline, and runs on.
    Late,
    /// It ended its thread.
    Ended,
}

impl Hooked {
    /// What it says, unless that is yes.
    fn no(&self) -> Option<String> {
        match self {
            Self::Returned(0, _) => None,
            Self::Returned(n, why) if why.is_empty() => Some(format!("it returned {n}")),
            Self::Returned(_, why) => Some(why.clone()),
            Self::Late => Some("it had not returned by the deadline, and runs on".into()),
            Self::Ended => Some("it ended its thread, and returned nothing".into()),
        }
    }
}

/// A process in which a thread can be made for a hook.
pub(super) trait MakesThreads: Process {
    /// Has `pthread_create` called; the new thread blocks all signals.
    fn create(&mut self, hooks: &Hooks<'_>, call: FunctionCall, deadline: Instant) -> Result<(), ProcessError>;

    /// Lets go on what was born meanwhile.
    fn let_go(&mut self);

    /// Whether the pages of a hook that is done may go: once no thread is in them.
    fn is_out(&mut self, hooks: &Hooks<'_>, pages: ProcRange, tid: Option<Tid>, name: &str) -> Result<bool, Error>;
}

impl MakesThreads for PtraceProcess {
    fn create(&mut self, hooks: &Hooks<'_>, call: FunctionCall, deadline: Instant) -> Result<(), ProcessError> {
        let cfi = Cfi::load(self, hooks.images);
        let mut idle = Idle::new(self, hooks.images, hooks.maps, &cfi, None);
        self.call(call, &mut idle, deadline)
    }

    fn let_go(&mut self) {
        self.release_born();
    }

    fn is_out(&mut self, hooks: &Hooks<'_>, pages: ProcRange, _tid: Option<Tid>, name: &str) -> Result<bool, Error> {
        hooks.nobody_in(self, pages, name).map(|()| true)
    }
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
    pub(super) fn run<P: MakesThreads>(
        &self,
        process: &mut P,
        payload: &Payload,
        region: ProcRange,
        kind: HookKind,
    ) -> Result<Option<Hooked>, Error> {
        match payload.hooks.iter().find(|h| h.kind == kind) {
            Some(hook) => self.call(process, payload, region, hook).map(Some),
            None => Ok(None),
        }
    }

    /// After an apply that failed for `error`: the last hook undoes what the first one did, if there is a first. Whether a thread may be in
    /// the mapping after that, and the error with what the hook says.
    pub(super) fn undo<P: MakesThreads>(
        &self,
        process: &mut P,
        payload: &Payload,
        region: ProcRange,
        error: Error,
    ) -> (bool, Error) {
        if !payload.hooks.iter().any(|h| h.kind == HookKind::PreApply) {
            return (false, error);
        }
        let undone = self.run(process, payload, region, HookKind::PostRevert);
        let stays = !matches!(undone, Ok(None | Some(Hooked::Returned(..) | Hooked::Ended)));
        let error = match (said(HookKind::PostRevert, undone), error) {
            (None, error) => error,
            (Some(said), Error::NotQuiescent(mut why)) => {
                why.reason = format!("{}; {said}", why.reason);
                Error::NotQuiescent(why)
            }
            (Some(said), Error::Outside { why }) => Error::Outside { why: format!("{why}; {said}") },
            (Some(said), error) => Error::AndHook { error: Box::new(error), said },
        };
        (stays, error)
    }

    fn call<P: MakesThreads>(
        &self,
        process: &mut P,
        payload: &Payload,
        region: ProcRange,
        hook: &HookRecord,
    ) -> Result<Hooked, Error> {
        let deadline = Instant::now() + self.timeout;
        let functions = ["pthread_self", "pthread_detach", "pthread_create"].map(|n| self.find_in_libc(process, n));
        let [Some(own), Some(detach), Some(create)] = functions else {
            let what = format!("the hook {} in a program whose C library exports no pthread_create", hook.symbol);
            return Err(Refusal::Unsupported { what }.into());
        };
        let pid = process.pid();
        // A filter need not know the call.
        let gettid = self.find_in_libc(process, "gettid").filter(|_| procfs::shows_threads_of(pid));
        let pages = Pages::behind(region);
        match pages.hook(process, pid) {
            None => {}
            Some(Left::Runs) => return Err(still_runs(&payload.patch)),
            Some(Left::Done(tid)) => {
                if !process.is_out(self, pages.both, tid, &payload.patch)? {
                    return Err(still_runs(&payload.patch));
                }
                process.adopt(pages.both);
                process.remote(&[RemoteCall::Unmap(pages.both)], deadline)?;
            }
        }
        process.remote(&[RemoteCall::Map(pages.both), RemoteCall::Protect(pages.room, Access::Write)], deadline)?;
        let words = [hook.at.0, own.0, detach.0, 0, 0, gettid.unwrap_or(own).0, gettid.is_some().into()];
        let words: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
        process.write_own(pages.code.start, &HOOK_STUB)?;
        process.write_own(pages.room.start, &words)?;
        let arguments = [pages.word(THREAD_AT).0, 0, pages.code.start.0, pages.room.start.0];
        let unmap = |process: &mut P| {
            process.remote(&[RemoteCall::Unmap(pages.both)], Instant::now() + self.timeout.max(LEAVES))
        };
        if let Err(e) = process.create(self, FunctionCall { stub: payload.stub, function: create, arguments }, deadline)
        {
            // Where no thread was borrowed, none can be in there.
            if matches!(e, ProcessError::NoIdleThread { .. }) {
                unmap(process)?;
            }
            return Err(e.into());
        }
        let gone = || ProcessError::Gone(pid);
        let thread = process.read_vec(pages.word(THREAD_AT), 8).map_err(|_| gone())?;
        if thread.iter().all(|b| *b == 0) {
            unmap(process)?;
            let source = std::io::Error::from_raw_os_error(libc::EAGAIN);
            return Err(ProcessError::Remote { pid, call: "pthread_create", source }.into());
        }
        let hooked = loop {
            // In this order: who was gone before may have been done just before.
            let tid = pages.tid(process);
            let is_gone = tid.is_some_and(|tid| !procfs::thread_exists(pid, tid));
            if let Some(result) = pages.result(process).ok_or_else(gone)? {
                break Hooked::Returned(result, pages.text(process));
            }
            if is_gone {
                break Hooked::Ended;
            }
            if Instant::now() >= deadline {
                return Ok(Hooked::Late);
            }
            process.let_go();
            std::thread::sleep(LOOK);
        };
        let tid = pages.tid(process);
        if process.is_out(self, pages.both, tid, &hook.symbol)? {
            unmap(process)?;
        }
        Ok(hooked)
    }

    /// Waits until no thread is in these pages, as what stands there is to go.
    pub(super) fn nobody_in(&self, process: &mut PtraceProcess, pages: ProcRange, name: &str) -> Result<(), Error> {
        let place = Place::new(process, self.images, self.maps, name);
        let part = Part::Body { branches_to_entry: true };
        let watched = vec![Watched { name: name.to_owned(), range: pages, part }];
        let mut retry = Retry::new(Instant::now() + LEAVES, Duration::from_millis(100));
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
        let patch = &found.payload.patch;
        let pages = Pages::behind(found.region);
        let left = match pages.hook(&self.process, self.process.pid()) {
            None => None,
            Some(Left::Runs) => return Err(still_runs(patch)),
            Some(Left::Done(tid)) => Some(tid),
        };
        let hooks = Hooks { images: &self.images, maps: &self.maps, timeout: LEAVES };
        let deadline = Instant::now() + LEAVES;
        #[cfg(feature = "agent")]
        if self.by_threads {
            let Some(tid) = left else { return Ok(()) };
            let mut own = crate::process::own::OwnProcess::new(&mut self.process)?;
            if !own.is_out(&hooks, pages.both, tid, patch)? {
                return Err(still_runs(patch));
            }
            own.adopt(pages.both);
            return Ok(own.remote(&[RemoteCall::Unmap(pages.both)], deadline)?);
        }
        if left.is_some() {
            hooks.nobody_in(&mut self.process, pages.both, patch)?;
            self.process.remote(&[RemoteCall::Unmap(pages.both)], deadline)?;
        }
        hooks.nobody_in(&mut self.process, found.region, patch)
    }
}

/// What is known of a hook whose pages are still there.
enum Left {
    Runs,
    /// It has returned, or its thread has ended.
    Done(Option<Tid>),
}

/// Where the thread's code and its words lie.
struct Pages {
    code: ProcRange,
    room: ProcRange,
    both: ProcRange,
}

impl Pages {
    /// Behind the mapping 16 pages are free (plan::GAP).
    fn behind(region: ProcRange) -> Self {
        let page = |n: u64| ProcAddr(region.end.0 + n * PAGE);
        let range = |from, to| ProcRange { start: page(from), end: page(to) };
        Self { code: range(1, 2), room: range(2, 3), both: range(1, 3) }
    }

    fn word(&self, offset: u64) -> ProcAddr {
        ProcAddr(self.room.start.0 + offset)
    }

    /// The hook that was called in these pages, if they are there.
    fn hook(&self, memory: &dyn ReadMemory, pid: crate::process::Pid) -> Option<Left> {
        let code = memory.read_vec(self.code.start, HOOK_STUB.len() as u64).ok()?;
        if code != HOOK_STUB {
            return None;
        }
        let tid = self.tid(memory);
        let is_gone = tid.is_some_and(|tid| !procfs::thread_exists(pid, tid));
        match self.result(memory) {
            Some(Some(_)) => Some(Left::Done(tid)),
            _ if is_gone => Some(Left::Done(tid)),
            _ => Some(Left::Runs),
        }
    }

    /// What the hook returned, if it is done; `None` if the words can't be read.
    fn result(&self, memory: &dyn ReadMemory) -> Option<Option<i32>> {
        let bytes = memory.read_vec(self.word(RESULT_AT), 8).ok()?;
        let [result, done] = bytes.as_chunks::<4>().0 else { return None };
        Some((u32::from_le_bytes(*done) != 0).then(|| i32::from_le_bytes(*result)))
    }

    /// The thread's number, once it has begun, if it writes any.
    fn tid(&self, memory: &dyn ReadMemory) -> Option<Tid> {
        let read = |at| memory.read_vec(self.word(at), 4).ok()?.first_chunk().copied().map(i32::from_le_bytes);
        let tid = read(TID_AT)?;
        (read(KNOWS_TID_AT)? == 1 && tid > 0).then_some(Tid(tid))
    }

    /// What the hook wrote, as one line; nothing of the process's is trusted to be text.
    fn text(&self, memory: &dyn ReadMemory) -> String {
        let bytes = memory.read_vec(self.word(TEXT_AT), HOOK_TEXT_BYTES).unwrap_or_default();
        let text = bytes.split(|b| *b == 0).next().unwrap_or_default();
        let text = String::from_utf8_lossy(text);
        text.trim().chars().map(|c| if c.is_control() { ' ' } else { c }).collect()
    }
}

fn still_runs(patch: &str) -> Error {
    let reason = format!("a hook of {patch} still runs, which was called before");
    NotQuiescent { reason, attempts: 1, ..NotQuiescent::default() }.into()
}

/// What an apply makes of its first hook: may it go on? If not, why, and whether a thread may be in the mapping all the same.
pub(super) fn first(hooked: Result<Option<Hooked>, Error>) -> Result<(), (Error, bool)> {
    let symbol = HookKind::PreApply.symbol();
    match hooked {
        Ok(None) => Ok(()),
        Ok(Some(Hooked::Late)) => {
            let reason = format!("the hook {symbol} had not returned by then; it runs on, and the patch stays mapped");
            Err((NotQuiescent { reason, attempts: 1, ..NotQuiescent::default() }.into(), true))
        }
        Ok(Some(hooked)) => match hooked.no() {
            None => Ok(()),
            Some(said) => Err((Refusal::Hook { symbol: symbol.into(), said }.into(), false)),
        },
        // Unless it is sure that no thread was made for it, one may run there.
        Err(e) => {
            let sure = matches!(e, Error::Refused { .. } | Error::Process(ProcessError::NoIdleThread { .. }));
            Err((e, !sure))
        }
    }
}

/// What is to be said of a hook that may not refuse.
pub(super) fn said(kind: HookKind, hooked: Result<Option<Hooked>, Error>) -> Option<String> {
    let symbol = kind.symbol();
    match hooked {
        Ok(hooked) => {
            let no = hooked?.no()?;
            Some(format!("the hook {symbol} failed: {no}"))
        }
        Err(e) => Some(format!("the hook {symbol} did not run: {e}")),
    }
}
