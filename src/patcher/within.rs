//! Apply and revert from inside the process: no thread is held, each switches for itself.

use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use nix::sys::signal::{SigSet, SigmaskHow};

use super::hooks::{self, Hooks, MakesThreads};
use super::{replaced, Canary, Error, NotQuiescent, Options, Patcher, Report};
use crate::addr::{ProcAddr, ProcRange};
use crate::image::Image;
use crate::memory::ReadMemory;
use crate::patch::{HookKind, PatchFile};
use crate::plan::Refusal;
use crate::process::own::OwnProcess;
use crate::process::ptrace::procfs;
use crate::process::{FunctionCall, HeldThread, IdleCheck, Pid, Process, ProcessError, Tid};
use crate::registry::{self, CanaryRecord, Confirmation, SessionKey, Share, State, SHARES_AT, WHICH_AT};
use crate::session::{self, Words};
use crate::stack::{Cfi, Part, Watched};
use crate::switch::{self, Inside, Plan, SwitchError, SwitchTimes, Switcher};
use crate::transaction::{Applied, Stamp, TransactionError};

/// The thread that asks is the one that calls: nobody is borrowed.
struct Own;

impl IdleCheck for Own {
    fn is_idle(&mut self, _thread: &HeldThread, _memory: &dyn ReadMemory) -> bool {
        true
    }
}

impl MakesThreads for OwnProcess<'_> {
    fn create(&mut self, _hooks: &Hooks<'_>, call: FunctionCall, deadline: Instant) -> Result<(), ProcessError> {
        // The new thread takes the mask over.
        let before = SigSet::all().thread_swap_mask(SigmaskHow::SIG_SETMASK);
        let done = self.call(call, &mut Own, deadline);
        if let Ok(before) = before {
            let _ = before.thread_set_mask();
        }
        done
    }

    fn let_go(&mut self) {}

    fn is_out(&mut self, _hooks: &Hooks<'_>, _: ProcRange, tid: Option<Tid>, _: &str) -> Result<bool, Error> {
        const TURNS: u32 = 1_000;
        let Some(tid) = tid else { return Ok(false) };
        let pid = self.pid();
        Ok((0..TURNS).any(|turn| {
            if turn > 0 {
                std::thread::sleep(Duration::from_millis(1));
            }
            !procfs::thread_exists(pid, tid)
        }))
    }
}

/// Why this must be done from outside.
fn outside(why: impl Into<String>) -> Error {
    Error::Outside { why: why.into() }
}

impl Patcher {
    /// Opens the process that this code runs in.
    ///
    /// # Errors
    ///
    /// /proc is not there, or a debugger traces it.
    pub fn open_own() -> Result<Self, Error> {
        let id = std::process::id();
        // The numbers there would be those of other processes.
        if !std::fs::read_link("/proc/self").is_ok_and(|name| name.as_os_str() == id.to_string().as_str()) {
            return Err(outside("/proc is missing, or that of another PID namespace"));
        }
        // Without that, nothing of it can be read, and it would look like no program at all.
        switch::can_look().map_err(|what| outside(format!("this process may not {what}")))?;
        let mut own = match Self::open(Pid(id.cast_signed())) {
            Err(Error::Process(ProcessError::Permission { .. })) => {
                return Err(outside("it may not read its own /proc files (PR_SET_DUMPABLE, or a change of user)"))
            }
            other => other?,
        };
        own.by_threads = true;
        Ok(own)
    }

    /// As [`apply`](Self::apply), of the own process and without a hold.
    ///
    /// # Errors
    ///
    /// It was not applied. After [`NotQuiescent`], some calls may have run the new code before it was taken back;
    /// [`Error::Outside`] says that nothing was done, and that it can be done from outside.
    pub fn apply_within(
        &mut self,
        patch: &PatchFile,
        options: &Options,
        switcher: &mut Switcher,
    ) -> Result<Report, Error> {
        self.where_free(|p| p.try_apply_within(patch, options, switcher))
    }

    fn try_apply_within(
        &mut self,
        patch: &PatchFile,
        options: &Options,
        switcher: &mut Switcher,
    ) -> Result<Report, Error> {
        let by_session = options.canary.as_ref().is_some_and(Canary::is_by_session);
        if options.canary.is_none() {
            if let Some(state) = patch.manifest.states.iter().find(|s| s.migrates()) {
                let why = format!("the state {} has to be migrated", state.id);
                return Err(Refusal::State { why }.into());
            }
        }
        let patch = &*options.adapt(patch);
        let pid = self.process.pid();
        let _lock = self.process.lock()?;
        self.ready(options, switcher)?;
        let deadline = Instant::now() + options.timeout;
        self.remove_unused(deadline)?;
        self.session = if by_session { Some(self.free_session()?) } else { None };
        let mut report = self.report("apply", &patch.manifest.name);
        let inspected = self.inspect_alone(patch, options, deadline).map_err(|e| match e {
            // A hold moves nothing where a patch has one entry.
            Error::Refused { refusal: refusal @ Refusal::EntryImmovable { .. } } => outside(refusal.to_string()),
            other => other,
        })?;
        report.functions = replaced(patch);
        let Some(planned) = inspected.planned else {
            report.already = true;
            return Ok(report);
        };
        let replaced = patch.manifest.functions.iter().filter(|f| f.old.is_some());
        let names = replaced.map(|f| f.demangled.as_str());
        self.may_trap(names, &planned.watched())?;
        let returns = super::signal_returns(&self.process, &self.images, &self.maps);
        let mut own = OwnProcess::new(&mut self.process)?;
        let mut staged = planned.stage(&mut own, deadline)?;
        if staged.wants_registration() {
            match inspected.register_frame {
                Some(function) => staged.register(function, &mut Own, deadline)?,
                None => report.warnings.push(
                    "unwind tables not registered: the process has no __register_frame; a backtrace ends at the patch"
                        .into(),
                ),
            }
        }
        let Some(traps) = staged.traps() else { return Err(outside("it was applied from outside before")) };
        let consistency = options.of_apply();
        let with_returns = |w: Vec<Watched>| w.into_iter().chain(returns.iter().cloned()).collect();
        // A stub leads some calls to the new function and the others on in the old one: so nobody has to leave anything.
        let (old, new) = if options.canary.is_some() {
            (staged.before_stubs(), staged.windows_and_stubs())
        } else {
            (crate::transaction::relax(&consistency, staged.watched()), staged.watched_new())
        };
        let (leave, back) = (with_returns(old), with_returns(new));
        let plan = Plan { traps, leave, back };
        let cfi = load_tables(staged.process(), &self.images)?;
        let hooks = Hooks { images: &self.images, maps: &self.maps, timeout: options.timeout };
        let (payload, region) = (staged.payload().clone(), staged.region());
        if let Err((e, runs)) = hooks::first(hooks.run(staged.process(), &payload, region, HookKind::PreApply)) {
            // It runs in the mapping.
            staged.set_led(runs);
            return Err(e);
        }
        let switched = switcher.run(staged.process(), plan, Instant::now() + options.timeout, &cfi);
        match switched {
            Ok(times) => {
                let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
                let confirmation = options.confirm_within.map_or_else(Confirmation::default, |within| Confirmation {
                    confirmed: false,
                    // Whoever confirms it has all the time that was promised.
                    by_s: (now + within).as_millis().div_ceil(1_000).try_into().unwrap_or(u64::MAX),
                    watcher: std::process::id(),
                });
                let sequence = inspected.sequence;
                let share = options.canary.as_ref().map_or_else(Share::default, |c| Share::of(c.share));
                let stamp = Stamp { sequence, applied_at_s: now.as_secs(), confirmation, share };
                report.entries = staged.switched(stamp)?.entries;
                if let Some(canary) = &payload.canary {
                    begin(region, canary);
                }
                report.fill_within(times);
                let hooked = hooks.run(&mut own, &payload, region, HookKind::PostApply);
                report.warnings.extend(hooks::said(HookKind::PostApply, hooked));
                Ok(report)
            }
            Err(e) if switcher.is_unfinished() => {
                // New code may be entered, and needs what the first hook made, until a later command has finished this.
                staged.keep()?;
                Err(not_switched(pid, e))
            }
            Err(e) => {
                let is_taken_back = matches!(e, SwitchError::TakenBack(..));
                let (runs, e) = hooks.undo(staged.process(), &payload, region, not_switched(pid, e));
                if is_taken_back {
                    // New code has run, and what it made may lead into it.
                    staged.keep()?;
                } else {
                    staged.set_led(runs);
                }
                Err(e)
            }
        }
    }

    /// As [`revert`](Self::revert), of the own process and without a hold.
    ///
    /// # Errors
    ///
    /// As of [`apply_within`](Self::apply_within).
    pub fn revert_within(
        &mut self,
        name: Option<&str>,
        options: &Options,
        switcher: &mut Switcher,
    ) -> Result<Report, Error> {
        let pid = self.process.pid();
        let _lock = self.process.lock()?;
        self.ready(options, switcher)?;
        let newest = self.newest(name)?;
        let canary = newest.payload.canary.clone();
        let mut report = self.report("revert", &newest.payload.patch);
        report.functions =
            super::names(newest.payload.functions.iter().filter(|f| f.old.is_some()).map(|f| &f.demangled));
        let replaced = newest.payload.functions.iter().filter(|f| f.old.is_some());
        let names = replaced.map(|f| f.demangled.as_str());
        let code = newest.payload.entries.iter().filter_map(|e| ProcRange::new(e.at, e.original.0.len() as u64));
        let part = Part::Window;
        let code: Vec<Watched> = code.map(|range| Watched { name: String::new(), range, part }).collect();
        self.may_trap(names, &code)?;
        let applied = Applied::new(newest)?;
        applied.may_revert(&options.consistency)?;
        applied.check_entries(&self.process)?;
        let traps = match applied.traps(&self.process).filter(|t| t.len() == applied.entries()) {
            Some(traps) => Some(traps),
            None => {
                let of_one = applied.trap_of_one(&mut OwnProcess::new(&mut self.process)?);
                of_one.map_err(|e| match e {
                    TransactionError::Refused(refusal) => outside(refusal.to_string()),
                    other => other.into(),
                })?
            }
        };
        let Some(traps) = traps else { return Err(outside("its entries have no stubs")) };
        let returns = super::signal_returns(&self.process, &self.images, &self.maps);
        let with_returns = |w: Vec<Watched>| w.into_iter().chain(returns.iter().cloned()).collect();
        let leave = with_returns(crate::transaction::relax(&options.consistency, applied.watched()));
        let plan = Plan { traps, leave, back: with_returns(applied.watched_old()) };
        let (payload, region) = (applied.payload().clone(), applied.found().region);
        let hooks = Hooks { images: &self.images, maps: &self.maps, timeout: options.timeout };
        let hooked = hooks.run(&mut OwnProcess::new(&mut self.process)?, &payload, region, HookKind::PreRevert);
        report.warnings.extend(hooks::said(HookKind::PreRevert, hooked));
        let share = super::canary::close(&mut self.process, applied.found())?;
        if let Some(canary) = &canary {
            if let Err(e) = end(pid, canary, Instant::now() + options.timeout) {
                super::canary::reopen(&mut self.process, share)?;
                begin(region, canary);
                return Err(e);
            }
        }
        let mut own = OwnProcess::new(&mut self.process)?;
        let cfi = load_tables(&own, &self.images)?;
        let switched = switcher.run(&mut own, plan, Instant::now() + options.timeout, &cfi);
        match switched {
            Ok(times) => {
                report.entries = applied.switched(&mut own)?.entries;
                report.fill_within(times);
                let hooked = hooks.run(&mut own, &payload, region, HookKind::PostRevert);
                report.warnings.extend(hooks::said(HookKind::PostRevert, hooked));
                Ok(report)
            }
            Err(e) => {
                if let Some(canary) = canary.filter(|_| !switcher.is_unfinished()) {
                    super::canary::reopen(&mut self.process, share)?;
                    begin(region, &canary);
                }
                Err(not_switched(pid, e))
            }
        }
    }

    /// The patch that a revert would take, and the slot of its stubs if its states have to be taken back before.
    ///
    /// # Errors
    ///
    /// There is none, or not of this name.
    pub fn to_revert(&self, name: Option<&str>) -> Result<(String, Option<u8>), Error> {
        let newest = self.newest(name)?;
        let canary = newest.payload.canary.filter(|c| super::is_by_state(&c.keys));
        Ok((newest.payload.patch, canary.and_then(|c| c.session).map(|key| key.slot)))
    }

    /// The slot of the stubs of an apply by session, once it is done.
    #[must_use]
    pub fn slot(&self) -> Option<u8> {
        self.session.map(|key| key.slot)
    }

    /// Whether traps may stand over this code of these functions.
    fn may_trap<'n>(&self, mut functions: impl Iterator<Item = &'n str>, code: &[Watched]) -> Result<(), Error> {
        // What runs in the handlers of a switch must not trap itself.
        if let Some(own) = functions.find(|f| f.replace("livepatch::state::", "").contains("livepatch::")) {
            return Err(outside(format!("{own} is the agent's own code")));
        }
        if is_c_library(&self.images, code) {
            return Err(outside("the C library blocks signals by itself"));
        }
        Ok(())
    }

    /// How stubs of another canary by session tell the arm of a message.
    fn free_session(&self) -> Result<SessionKey, Error> {
        let no = |why: &str| Error::from(Refusal::Canary { why: why.into() });
        let offset = session::offset();
        let offset = offset.ok_or_else(|| no("the agent lies in a library that was loaded later"))?;
        let mut applied = self.records()?;
        applied.retain(|r| r.mutable.state == State::Applied);
        let used = applied.iter().filter_map(|r| Some(r.payload.canary.as_ref()?.session?.slot)).collect::<Vec<_>>();
        let slot = session::free_slot(&used);
        let slot = slot.ok_or_else(|| no("as many canaries by session as there can be are applied"))?;
        // One that was reverted from outside left it open.
        if !session::close(slot) {
            return Err(no("messages of a canary that was reverted are still being handled"));
        }
        Ok(SessionKey { offset, slot })
    }

    /// Where applied patches are mapped, with their names.
    #[must_use]
    pub fn mapped_code(&self) -> Vec<(u64, u64, String)> {
        let mut applied = self.records().unwrap_or_default();
        applied.retain(|r| r.mutable.state == State::Applied);
        applied.into_iter().map(|r| (r.region.start.0, r.region.end.0, r.payload.patch)).collect()
    }

    /// The code of applied patches that are not permanent.
    ///
    /// # Errors
    ///
    /// A record is damaged.
    pub fn current_code(&self) -> Result<Vec<Watched>, Error> {
        let mut applied = self.records()?;
        applied.retain(|r| r.mutable.state == State::Applied && !r.mutable.confirmation.confirmed);
        let part = Part::Body { branches_to_entry: true };
        let code = applied.iter().flat_map(|r| &r.payload.functions);
        Ok(code.filter_map(|f| Some(Watched { name: f.demangled.clone(), range: f.new.range()?, part })).collect())
    }

    /// Goes on with a switch that could not be taken back before.
    ///
    /// # Errors
    ///
    /// It could not be within `timeout`.
    pub fn finish_within(&mut self, timeout: Duration, switcher: &mut Switcher) -> Result<(), Error> {
        let _lock = self.process.lock()?;
        self.ready(&Options { timeout, ..Options::default() }, switcher)
    }

    /// The own process is one that can be switched now: what is left of a switch before is done, and the images are known.
    fn ready(&mut self, options: &Options, switcher: &mut Switcher) -> Result<(), Error> {
        if switcher.is_unfinished() {
            let mut own = OwnProcess::new(&mut self.process)?;
            let cfi = load_tables(&own, &self.images)?;
            let until = Instant::now() + options.timeout;
            switcher.try_to_finish(&mut own, until, &cfi, &mut SwitchTimes::default());
            if switcher.is_unfinished() {
                return Err(NotQuiescent {
                    reason: "a switch before it is still to be taken back".into(),
                    attempts: 1,
                    ..NotQuiescent::default()
                }
                .into());
            }
        }
        self.finished()
    }
}

/// Whether any of this code is the C library's: it blocks all signals now and then, past everybody who might see to SIGTRAP.
fn is_c_library(images: &[Image], code: &[Watched]) -> bool {
    let libc = |i: &Image| ["libc.", "libc-", "ld-", "libpthread"].iter().any(|p| i.short_name().starts_with(p));
    let statics = !images.iter().any(Image::has_interpreter);
    statics || images.iter().filter(|i| libc(i)).any(|i| code.iter().any(|w| i.range.overlaps(&w.range)))
}

/// Lets messages run a canary by session.
fn begin(region: ProcRange, canary: &CanaryRecord) {
    let Some(key) = canary.session else { return };
    let word = |offset| ProcAddr(region.start.0 + offset);
    session::open(key.slot, Words { shares: word(SHARES_AT), which: word(WHICH_AT), salt: canary.salt });
}

/// Waits until no message runs a canary any more; none begins to.
fn end(pid: Pid, canary: &CanaryRecord, deadline: Instant) -> Result<(), Error> {
    let Some(key) = canary.session else { return Ok(()) };
    while !session::close(key.slot) {
        if Instant::now() >= deadline {
            let reason = format!(
                "{} messages that run the new arm are still being handled by process {pid}",
                session::handled(key.slot)
            );
            return Err(NotQuiescent { reason, attempts: 1, ..NotQuiescent::default() }.into());
        }
        std::thread::sleep(Duration::from_micros(200));
    }
    Ok(())
}

/// The unwind tables of everything, patches included.
fn load_tables(process: &OwnProcess<'_>, images: &[Image]) -> Result<Cfi, Error> {
    let mut cfi = Cfi::load(process, images);
    for found in registry::find(process, &process.mappings()?).unwrap_or_default() {
        if let Some(table) = found.payload.eh_frame.and_then(|t| t.range()) {
            cfi.add_patch(process, found.region, table.start, table.len_bytes());
        }
    }
    Ok(cfi)
}

/// What is the matter with a thread, if it is known which.
fn stays(inside: &Option<Inside>) -> String {
    match inside {
        None => "not all threads could be looked at".into(),
        Some(Inside { function: Some(f), certain: true, .. }) => format!("is inside {f}"),
        Some(Inside { function: Some(f), .. }) => format!("may be inside {f}"),
        Some(_) => "has a stack that could not be followed".into(),
    }
}

fn not_switched(pid: Pid, error: SwitchError) -> Error {
    let (inside, reason) = match &error {
        SwitchError::Process(_) => (None, String::new()),
        SwitchError::Changed { function, at } => {
            return Refusal::CodeChanged { function: function.clone(), at: *at, breakpoint: false }.into()
        }
        SwitchError::Blocked { tid } => {
            let name = procfs::thread_name(pid, *tid);
            return outside(format!("thread {tid} ({name}) blocks SIGTRAP or the signal of the agent"));
        }
        SwitchError::Taken | SwitchError::Shared | SwitchError::Forbidden { .. } => return outside(error.to_string()),
        SwitchError::TakenBack(inside, _) => (
            inside.clone(),
            format!("{}; it was taken back, and some calls may have run the other version", stays(inside)),
        ),
        SwitchError::Unfinished(inside, _) => (
            inside.clone(),
            format!("{}; it is neither done nor taken back, and the next command goes on with it", stays(inside)),
        ),
    };
    if let SwitchError::Process(e) = error {
        return e.into();
    }
    NotQuiescent {
        tid: inside.as_ref().map(|i| i.tid.0),
        thread: inside.as_ref().map(|i| procfs::thread_name(pid, i.tid)),
        function: inside.and_then(|i| i.function),
        taken_back: true,
        reason,
        backtrace: Vec::new(),
        attempts: 1,
    }
    .into()
}
