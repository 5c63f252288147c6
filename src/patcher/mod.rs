//! The use cases: check, apply, revert, status; and how often a hold is tried.

use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use crate::addr::ProcRange;
use crate::image::Image;
use crate::insn;
use crate::maps::Mapping;
use crate::memory::ReadMemory;
use crate::patch::{HookKind, PatchFile};
use crate::plan::{CodeEdit, Refusal};
use crate::process::ptrace::{procfs, PtraceProcess, Undisturbed};
use crate::process::{Pid, Process, ProcessError};
use crate::quiesce::{Checker, StackMap};
use crate::registry::{self, Confirmation, SessionKey, Share, State};
use crate::stack::{Cfi, Part, Watched};
use crate::transaction::{relax, Applied, Planned, Staged, Stamp, TransactionError};

mod blame;
mod canary;
mod confirm;
mod error;
mod hooks;
mod idle;
mod inside;
mod inspect;
mod options;
mod reclaim;
mod recover;
mod report;
mod retry;
mod rewrite;
mod status;
#[cfg(feature = "agent")]
mod within;

use hooks::Hooks;
use retry::Retry;
use rewrite::{longer, Place};

pub use error::{Error, NotQuiescent, TraceLine};
pub use inside::Inside;
pub use options::{is_by_state, Canary, Options, STATE};
pub use reclaim::Reclaimed;
pub use recover::{Outcome, Recovered};
pub use report::{CheckReport, Migrated, Report, Within};
pub use status::{patched_processes, status_of, Confirmed, PatchStatus, ProcessStatus, ShadowStatus};

/// How long a process may take to become another program.
const IN_EXEC: Duration = Duration::from_millis(100);

/// How long an apply looks for a thread that registers unwind tables which nothing depends on.
const MOMENT: Duration = Duration::from_millis(300);

/// A process to be patched: what the commands are made of.
///
/// Looking stops nothing and changes nothing:
///
/// ```
/// use livepatch::patcher::Patcher;
/// use livepatch::process::Pid;
///
/// let mut child = std::process::Command::new("sleep").arg("60").spawn()?;
/// let process = Patcher::open(Pid(child.id().cast_signed()));
/// let status = process.and_then(|p| p.status());
/// child.kill()?;
/// child.wait()?;
/// assert!(status?.patches.is_empty());
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
///
/// A patch goes in, and comes out again (`examples/guarded.rs` is a whole program):
///
/// ```no_run
/// use livepatch::patch::PatchFile;
/// use livepatch::patcher::{Error, Options, Patcher};
/// use livepatch::process::Pid;
///
/// let patch = PatchFile::parse(&std::fs::read("fix.so")?)?;
/// let mut process = Patcher::open(Pid(4711))?;
/// match process.apply(&patch, &Options::default()) {
///     Ok(report) => println!("{} threads waited at most {} µs", report.threads, report.pause_us),
///     // Waiting may help: a thread is inside one of the functions.
///     Err(Error::NotQuiescent(why)) => println!("{why:?}"),
///     // It does not help: the message says what would.
///     Err(Error::Refused { refusal }) => println!("{refusal}: {}", refusal.remedy()),
///     Err(other) => return Err(other.into()),
/// }
/// process.revert(None, &Options::default())?;
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub struct Patcher {
    process: PtraceProcess,
    maps: Vec<Mapping>,
    images: Vec<Image>,
    /// From inside, each thread switches for itself.
    by_threads: bool,
    /// Where a stub finds the arm of a message, for an apply by session.
    session: Option<SessionKey>,
}

impl Patcher {
    /// Opens a process without touching it.
    ///
    /// # Errors
    ///
    /// There is no such process, or we may not.
    pub fn open(pid: Pid) -> Result<Self, Error> {
        let until = Instant::now() + IN_EXEC;
        loop {
            let opened = Self::open_now(pid)?;
            // In the middle of exec it has no program; and what was opened belongs to the one before.
            if Instant::now() >= until || !matches!(opened.executable(), Err(Error::Refused { .. })) {
                return Ok(opened);
            }
            std::thread::sleep(Duration::from_millis(2));
        }
    }

    fn open_now(pid: Pid) -> Result<Self, Error> {
        let process = match PtraceProcess::open(pid) {
            Err(e) if !matches!(e, ProcessError::KernelThread(_)) => {
                unless_ended(pid, procfs::has_ended, Err(e.into()))
            }
            other => Ok(other?),
        }?;
        let maps = process.mappings();
        let maps = unless_ended(pid, |_| process.has_ended(), maps.map_err(Error::from))?;
        let mut images = crate::image::find_images(&process, &maps);
        // Without that, a hit on a stack could not be followed, and nothing could be applied.
        let silent =
            |i: &Image| i.name.starts_with('/') && i.head.of_kind(crate::elf::PT_GNU_EH_FRAME).next().is_none();
        for i in images.iter_mut().filter(|i| silent(i)) {
            i.eh_frame = blame::section_of(&process, i, ".eh_frame");
        }
        Ok(Self { process, maps, images, by_threads: false, session: None })
    }

    /// The process.
    pub fn process(&mut self) -> &mut PtraceProcess {
        &mut self.process
    }

    /// Whether one of its images is the build of this id, in hex.
    #[must_use]
    pub fn runs(&self, build_id: &str) -> bool {
        self.images.iter().any(|i| i.build_id.is_some() && i.build_id_hex().eq_ignore_ascii_case(build_id))
    }

    /// Would it apply now? Touches nothing.
    ///
    /// # Errors
    ///
    /// Why it would not.
    pub fn check(&self, patch: &PatchFile, options: &Options) -> Result<CheckReport, Error> {
        let patch = &*options.adapt(patch);
        let inspected = self.unless_ended(self.inspect(patch, options))?;
        let mut report = CheckReport {
            pid: self.process.pid().0,
            patch: patch.manifest.name.clone(),
            already: inspected.already,
            functions: replaced(patch),
            entries: 0,
            warnings: Vec::new(),
            inside: Vec::new(),
            running: 0,
        };
        if let Some(planned) = inspected.planned {
            report.entries = planned.entries();
            (report.inside, report.running) = self.inside(&relax(&options.of_apply(), planned.watched()))?;
        }
        Ok(report)
    }

    /// Applies a patch.
    ///
    /// # Errors
    ///
    /// It was not applied; nothing was changed.
    pub fn apply(&mut self, patch: &PatchFile, options: &Options) -> Result<Report, Error> {
        let result = self.where_free(|p| p.try_apply(patch, options));
        self.unless_ended(result)
    }

    /// Again, if the process has mapped something in the meantime where the patch was to go.
    fn where_free<T>(&mut self, mut attempt: impl FnMut(&mut Self) -> Result<T, Error>) -> Result<T, Error> {
        const TRIES: u32 = 8;
        let taken = |e: &Error| match e {
            Error::Process(ProcessError::Remote { call: "mmap", source, .. }) => {
                source.raw_os_error() == Some(libc::EEXIST)
            }
            _ => false,
        };
        let mut tries = 1;
        loop {
            match attempt(self) {
                Err(e) if taken(&e) && tries < TRIES => self.maps = self.process.mappings()?,
                other => return other,
            }
            tries += 1;
        }
    }

    fn try_apply(&mut self, patch: &PatchFile, options: &Options) -> Result<Report, Error> {
        let consistency = options.of_apply();
        let patch = &*options.adapt(patch);
        let _undisturbed = Undisturbed::begin();
        let _lock = self.process.lock()?;
        self.finished()?;
        let deadline = Instant::now() + options.timeout;
        self.remove_unused(deadline)?;
        let mut report = self.report("apply", &patch.manifest.name);
        let inspected = self.inspect_alone(patch, options, deadline)?;
        report.functions = replaced(patch);
        let Some(planned) = inspected.planned else {
            report.already = true;
            report.warnings.extend(self.canary_of(patch)?);
            return Ok(report);
        };
        let register_frame = inspected.register_frame;
        let place = Place::new(&self.process, &self.images, &self.maps, &patch.manifest.name);
        let mut staged = planned.stage(&mut self.process, deadline)?;
        if staged.wants_registration() {
            match register_frame {
                Some(function) => {
                    let cfi = Cfi::load(staged.process(), &self.images);
                    let linked = inspected.static_program.as_ref().zip(patch.manifest.linked.as_ref());
                    let mut idle = idle::Idle::new(staged.process(), &self.images, &self.maps, &cfi, linked);
                    // Where nothing can unwind, a backtrace that ends early is no reason to refuse.
                    let until =
                        if patch.manifest.may_unwind { deadline } else { deadline.min(Instant::now() + MOMENT) };
                    match staged.register(function, &mut idle, until) {
                        Err(TransactionError::Process(ProcessError::NoIdleThread { .. }))
                            if !patch.manifest.may_unwind =>
                        {
                            report.warnings.push(
                                "unwind tables not registered: no thread could be borrowed for it; a backtrace ends at the patch"
                                    .into(),
                            );
                        }
                        done => done?,
                    }
                }
                None => report.warnings.push(
                    "unwind tables not registered: the process has no __register_frame; a backtrace ends at the patch"
                        .into(),
                ),
            }
        }
        let hooks = Hooks { images: &self.images, maps: &self.maps, timeout: options.timeout };
        let (payload, region) = (staged.payload().clone(), staged.region());
        if let Err((e, runs)) = hooks::first(hooks.run(staged.process(), &payload, region, HookKind::PreApply)) {
            // It runs in the mapping.
            staged.set_led(runs);
            return Err(e);
        }
        let mut retry = Retry::new(Instant::now() + options.timeout, options.hold);
        let (leads, windows) = (staged.leads().to_vec(), staged.windows());
        if !leads.is_empty() {
            staged.set_led(true);
        }
        let before_stubs = staged.before_stubs();
        let led = place.rewrite(staged.process(), &leads, before_stubs, &mut retry);
        let mut longest = match led {
            Ok(times) => times,
            Err(e) => return Err(take_back(&place, staged, &leads, &hooks, e)),
        };
        // A thread in the stub of a canary goes one way or the other, whatever the share is by then.
        let watched = if options.canary.is_some() { Vec::new() } else { relax(&consistency, staged.watched()) };
        let watch = place.watch(watched);
        let committed = loop {
            let ready = retry.tables_if_wanted(staged.process(), &self.images);
            let ready = ready.and_then(|()| Ok(StackMap::new(&staged.process().mappings()?)));
            let stacks = match ready {
                Ok(stacks) => stacks,
                Err(e) => return Err(take_back(&place, staged, &leads, &hooks, e)),
            };
            let mut checker = Checker::new(&watch, &stacks, retry.cfi.as_ref());
            let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs());
            let confirmation = options.confirm_within.map_or_else(Confirmation::default, |within| Confirmation {
                confirmed: false,
                by_s: now + within.as_secs().max(1),
                watcher: std::process::id(),
            });
            let share = options.canary.as_ref().map_or_else(Share::default, |c| Share::of(c.share));
            let stamp = Stamp { sequence: inspected.sequence, applied_at_s: now, confirmation, share };
            match staged.commit(retry.limits(), &mut checker, stamp) {
                Ok(committed) => break committed,
                Err(failed) => {
                    let (back, error) = *failed;
                    staged = back;
                    let blocked = checker.into_blocked();
                    if let Err(e) = place.again(&mut retry, staged.process(), error, blocked) {
                        return Err(take_back(&place, staged, &leads, &hooks, e));
                    }
                }
            }
        };
        longest = longer(longest, committed.times);
        let mut after = Retry::new(Instant::now() + options.timeout, options.hold);
        match place.rewrite(&mut self.process, &committed.rest, windows, &mut after) {
            Ok(times) => longest = longer(longest, times),
            Err(e) => report.warnings.push(format!("calls go through switch stubs until `livepatch recover`: {e}")),
        }
        report.entries = committed.entries;
        report.fill(longest, retry.attempts);
        let hooked = hooks.run(&mut self.process, &payload, region, HookKind::PostApply);
        report.warnings.extend(hooks::said(HookKind::PostApply, hooked));
        Ok(report)
    }

    /// Reverts the newest applied patch, or the one named if it is the newest.
    ///
    /// # Errors
    ///
    /// It was not reverted; nothing was changed.
    pub fn revert(&mut self, name: Option<&str>, options: &Options) -> Result<Report, Error> {
        let result = self.try_revert(name, options);
        self.unless_ended(result)
    }

    fn try_revert(&mut self, name: Option<&str>, options: &Options) -> Result<Report, Error> {
        let _undisturbed = Undisturbed::begin();
        let _lock = self.process.lock()?;
        self.finished()?;
        let deadline = Instant::now() + options.timeout;
        let newest = self.newest(name)?;
        if newest.payload.canary.as_ref().is_some_and(|c| is_by_state(&c.keys)) {
            let why = format!(
                "states of the process were migrated for {}, and only the agent can take them back",
                newest.payload.patch
            );
            return Err(Refusal::State { why }.into());
        }
        let mut report = self.report("revert", &newest.payload.patch);
        let patch = newest.payload.patch.clone();
        report.functions = names(newest.payload.functions.iter().filter(|f| f.old.is_some()).map(|f| &f.demangled));
        let mut applied = Applied::new(newest)?;
        applied.may_revert(&options.consistency)?;
        applied.check_entries(&self.process)?;
        let place = Place::new(&self.process, &self.images, &self.maps, &patch);
        let hooks = Hooks { images: &self.images, maps: &self.maps, timeout: options.timeout };
        let (payload, region) = (applied.payload().clone(), applied.found().region);
        let hooked = hooks.run(&mut self.process, &payload, region, HookKind::PreRevert);
        report.warnings.extend(hooks::said(HookKind::PreRevert, hooked));
        let mut retry = Retry::new(deadline.max(Instant::now() + options.timeout), options.hold);
        let (mut leads, rest, windows) = (applied.leads().to_vec(), applied.rest(), applied.windows());
        // From here on no call begins in the new code of a canary: so its entries may go first, and nobody is in the stubs by and by.
        let share = canary::close(&mut self.process, applied.found())?;
        if share.is_some() {
            leads = applied.give_back();
        }
        let led = place.rewrite(&mut self.process, &leads, windows.clone(), &mut retry);
        let held = led
            .and_then(|times| Ok((times, place.revert(&mut self.process, applied, &options.consistency, &mut retry)?)));
        let (mut longest, reverted) = match held {
            Ok(done) => done,
            Err(e) => {
                // What stays leads to the new code as before: a canary once all its entries do, or some functions of it would run alone.
                let retry = Retry::new(Instant::now() + options.timeout, options.hold);
                if place.take_back(&mut self.process, &leads, windows, retry) {
                    canary::reopen(&mut self.process, share)?;
                }
                return Err(e);
            }
        };
        longest = longer(longest, reverted.times);
        let mut after = Retry::new(Instant::now() + options.timeout, options.hold);
        match place.rewrite(&mut self.process, &rest, windows, &mut after) {
            Ok(times) => longest = longer(longest, times),
            Err(e) => report.warnings.push(format!("calls go through switch stubs until `livepatch recover`: {e}")),
        }
        report.entries = reverted.entries;
        report.fill(longest, retry.attempts);
        let hooked = hooks.run(&mut self.process, &payload, region, HookKind::PostRevert);
        report.warnings.extend(hooks::said(HookKind::PostRevert, hooked));
        Ok(report)
    }

    /// The newest applied patch, which is the one named.
    fn newest(&self, name: Option<&str>) -> Result<registry::Found, Error> {
        let mut records = self.records()?;
        records.retain(|r| r.mutable.state == State::Applied);
        let pid = self.process.pid();
        let Some(newest) = records.pop() else { return Err(Error::NothingApplied { pid }) };
        match name {
            Some(name) if name != newest.payload.patch => {
                if records.iter().any(|r| r.payload.patch == name) {
                    let newest = newest.payload.patch;
                    return Err(Refusal::NotNewest { name: name.to_owned(), newest }.into());
                }
                Err(Error::NoSuchPatch { pid, name: name.to_owned(), applied: newest.payload.patch })
            }
            _ => Ok(newest),
        }
    }

    /// Reverts all applied patches, the newest first.
    ///
    /// # Errors
    ///
    /// One was not reverted; those before it were.
    pub fn revert_all(&mut self, options: &Options) -> Result<Vec<Report>, Error> {
        let mut out = vec![self.revert(None, options)?];
        loop {
            match self.revert(None, options) {
                Ok(report) => out.push(report),
                Err(Error::NothingApplied { .. }) => return Ok(out),
                Err(e) => return Err(e),
            }
        }
    }

    /// What failed because the process has ended did not fail for the reason that it seems to.
    fn unless_ended<T>(&self, result: Result<T, Error>) -> Result<T, Error> {
        unless_ended(self.process.pid(), |_| self.process.has_ended(), result)
    }

    /// The records of this process, in the order of their apply.
    fn records(&self) -> Result<Vec<registry::Found>, Error> {
        registry::find(&self.process, &self.process.mappings()?).map_err(|broken| {
            let (name, what) = ("(unknown)".into(), broken.error.to_string());
            Refusal::Damaged { name, at: broken.at, what }.into()
        })
    }

    fn report(&self, action: &'static str, patch: &str) -> Report {
        Report {
            pid: self.process.pid().0,
            action: action.into(),
            patch: patch.to_owned(),
            already: false,
            functions: Vec::new(),
            entries: 0,
            pause_us: 0.0,
            sleepers_us: 0.0,
            threads: 0,
            attempts: 0,
            within: None,
            migrated: None,
            warnings: Vec::new(),
        }
    }
}

/// `result`, or that the process has ended: its memory goes first, and looks like many other things then.
fn unless_ended<T>(pid: Pid, has_ended: impl Fn(Pid) -> bool, result: Result<T, Error>) -> Result<T, Error> {
    // A thread that was killed takes a moment until that shows.
    const MOMENT: Duration = Duration::from_millis(1);
    let later = || {
        std::thread::sleep(MOMENT);
        has_ended(pid)
    };
    let permission = |e: &Error| matches!(e, Error::Process(ProcessError::Permission { .. }));
    match result {
        Err(e) if has_ended(pid) || !permission(&e) && later() => Err(ProcessError::Gone(pid).into()),
        other => other,
    }
}

/// Takes the switch stubs out of the way of a patch that is not applied after all, and lets its hook undo what the one before the
/// apply did. Where the former fails, its mapping stays, and calls go through it to the old code until a recovery.
fn take_back(
    place: &Place<'_>,
    mut staged: Staged<'_, PtraceProcess>,
    leads: &[CodeEdit],
    hooks: &Hooks<'_>,
    error: Error,
) -> Error {
    let (payload, region) = (staged.payload().clone(), staged.region());
    if !leads.is_empty() {
        let retry = Retry::new(Instant::now() + hooks.timeout.max(Duration::from_secs(1)), Duration::from_millis(100));
        let watched = staged.windows_and_stubs();
        let done = place.take_back(staged.process(), leads, watched, retry);
        staged.set_led(!done);
    }
    let (stays, error) = hooks.undo(staged.process(), &payload, region, error);
    if stays {
        staged.set_led(true);
    }
    error
}

fn replaced(patch: &PatchFile) -> Vec<String> {
    names(patch.manifest.functions.iter().filter(|f| f.old.is_some()).map(|f| &f.demangled))
}

fn names<'a>(list: impl Iterator<Item = &'a String>) -> Vec<String> {
    list.cloned().collect()
}

/// What inspecting a process for a patch found.
struct Inspected {
    /// `None` if the patch is applied already.
    planned: Option<Planned>,
    already: bool,
    /// Where `__register_frame` is.
    register_frame: Option<crate::addr::ProcAddr>,
    /// The image, if it is a static program.
    static_program: Option<Image>,
    /// For the next apply.
    sequence: u64,
}

/// Where signal handlers return to: `mov rax, 15; syscall` in the C library, which hands the kernel this address
/// with each handler (sigaction(2), sa_restorer).
fn signal_returns<M: ReadMemory + ?Sized>(memory: &M, images: &[Image], maps: &[Mapping]) -> Vec<Watched> {
    // A static program has it in itself.
    let is_libc = |i: &&Image| {
        let known = ["libc.", "libc-", "ld-musl", "libpthread"].iter().any(|p| i.short_name().starts_with(p));
        known || !images.iter().any(Image::has_interpreter)
    };
    let mut out = Vec::new();
    for image in images.iter().filter(is_libc) {
        for code in maps.iter().filter(|m| m.execute && image.range.overlaps(&m.range)) {
            let Ok(bytes) = memory.read_vec(code.range.start, code.range.len_bytes()) else { continue };
            for at in memchr::memmem::find_iter(&bytes, insn::SIGRETURN[0]) {
                let start = code.range.start.checked_add(at as u64);
                let range = start.and_then(|s| ProcRange::new(s, insn::SIGRETURN[0].len() as u64));
                out.extend(range.map(|range| Watched {
                    name: "a signal frame".into(),
                    range,
                    part: Part::SignalReturn,
                }));
            }
        }
    }
    out
}
