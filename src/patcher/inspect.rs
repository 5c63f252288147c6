//! Looks at a process without stopping any of it: is this the build, can it be patched, is the code as built?

use std::time::{Duration, Instant};

use super::{Canary, Error, Inspected, Options, Patcher};
use crate::addr::{ProcAddr, ProcRange};
use crate::elf::EM_X86_64;
use crate::image::Image;
use crate::insn::{self, KeyArgument};
use crate::link::{LinkError, Scope};
use crate::maps::PAGE;
use crate::memory::ReadMemory;
use crate::patch::{in_chain, HexBytes, PatchFile, STACK_SWITCHES};
use crate::plan::sites::Switch;
use crate::plan::{self, Links, OldFacts, Refusal};
use crate::process::ptrace::procfs::{self, Status};
use crate::process::{Process, ProcessError};
use crate::registry::{CanaryRecord, EntryRecord, Found, FunctionRecord, SessionKey, State, Unwind};
use crate::transaction::{Applied, Planned, Replaced, Target};

/// Libraries that define such functions or are known not to switch.
const SYSTEM_LIBRARIES: [&str; 8] =
    ["libc.so", "libc-", "ld-", "libm.so", "libm-", "libgcc_s", "libstdc++", "libpthread"];

fn is_system(image: &Image) -> bool {
    image.name.starts_with('[') || SYSTEM_LIBRARIES.iter().any(|l| image.short_name().starts_with(l))
}

/// Every reason against it, so that all are told at once.
#[derive(Default)]
struct Noes(Vec<Refusal>);

impl Noes {
    /// What was found, or nothing for a no, which is kept.
    ///
    /// # Errors
    ///
    /// Another error than a refusal.
    fn ask<T>(&mut self, found: Result<T, Error>) -> Result<Option<T>, Error> {
        match found {
            Ok(found) => Ok(Some(found)),
            Err(Error::Refused { refusal }) => {
                self.0.push(refusal);
                Ok(None)
            }
            Err(other) => Err(other),
        }
    }

    /// # Errors
    ///
    /// There are some.
    fn none(self) -> Result<(), Error> {
        if self.0.is_empty() {
            return Ok(());
        }
        Err(self.error())
    }

    /// All of them.
    fn error(mut self) -> Error {
        match self.0.len() {
            1 => self.0.remove(0).into(),
            _ => Error::RefusedFor(self.0),
        }
    }
}

/// Each key of a canary is one of a function that the patch replaces and calls can reach.
fn check_keys(patch: &PatchFile, options: &Options, session: Option<SessionKey>) -> Result<(), Error> {
    let Some(canary) = &options.canary else { return Ok(()) };
    let no = |why: String| Err(Refusal::Canary { why }.into());
    if canary.is_by_session() {
        return match session {
            Some(_) => Ok(()),
            None => no("a key of the session needs an agent that is linked into the process".into()),
        };
    }
    for (function, argument) in &canary.keys {
        if KeyArgument::new(*argument).is_none() {
            return no(format!("argument {argument} of {function} is not in a register; 1 to 6 are"));
        }
        let entered = |f: &crate::patch::Function| f.old.as_ref().is_some_and(|o| o.entry.is_some());
        match patch.manifest.functions.iter().find(|f| f.demangled == *function) {
            None => return no(format!("the patch has no function {function}")),
            Some(f) if f.old.is_none() => return no(format!("{function} is new: nothing old calls it")),
            Some(f) if !entered(f) => {
                return no(format!("{function} is called by functions of the patch only: it needs no key"))
            }
            Some(_) => {}
        }
    }
    Ok(())
}

/// A canary with a salt of its own.
fn with_salt(canary: &Canary, session: Option<SessionKey>) -> Result<CanaryRecord, Refusal> {
    let mut salt = [0; 8];
    let read = std::fs::File::open("/dev/urandom").and_then(|mut f| std::io::Read::read_exact(&mut f, &mut salt));
    read.map_err(|e| Refusal::Canary { why: format!("/dev/urandom can't be read ({e})") })?;
    let session = session.filter(|_| canary.is_by_session());
    Ok(CanaryRecord { salt: u64::from_le_bytes(salt), keys: canary.keys.clone(), session })
}

/// How long a child of vfork may take to call exec before it counts as a sharer for good.
const VFORK: Duration = Duration::from_secs(1);

impl Patcher {
    /// As [`inspect`](Self::inspect), once no child of vfork is on its way.
    pub(super) fn inspect_alone(
        &self,
        patch: &PatchFile,
        options: &Options,
        deadline: Instant,
    ) -> Result<Inspected, Error> {
        let until = deadline.min(Instant::now() + VFORK);
        loop {
            match self.inspect(patch, options) {
                Err(Error::Refused { refusal: Refusal::SharedMemory { .. } }) if Instant::now() < until => {
                    std::thread::sleep(Duration::from_millis(5));
                }
                other => return other,
            }
        }
    }

    pub(super) fn inspect(&self, patch: &PatchFile, options: &Options) -> Result<Inspected, Error> {
        let image = self.target(patch)?;
        let mut noes = Noes::default();
        noes.ask(self.check_confinement())?;
        let manifest = &patch.manifest;
        let in_static = self.is_static(image)?;
        if let Some(hook) = manifest.hooks.iter().find(|h| h.agent && !self.by_threads) {
            noes.0
                .push(Refusal::Unsupported { what: format!("an agent in the process, for the hook {}", hook.symbol) });
        }
        if let Some(hook) = manifest.hooks.first().filter(|_| in_static) {
            noes.0.push(Refusal::Unsupported { what: format!("the hook {} in a static program", hook.symbol) });
        }
        if let Some(state) = manifest.states.iter().find(|s| s.migrates() && !self.by_threads) {
            noes.0.push(Refusal::State {
                why: format!("a migration of the state {} needs the agent, which takes its entries over", state.id),
            });
        }
        let records = self.records()?;
        let sequence = records.iter().map(|r| r.mutable.sequence).max().unwrap_or(0) + 1;
        let own = &manifest.target.build_id;
        let newest = records.iter().rfind(|r| r.mutable.state == State::Applied && r.payload.build_id == *own);
        if newest.is_some_and(|n| n.payload.digest.0 == patch.digest) {
            return Ok(Inspected {
                planned: None,
                already: true,
                register_frame: None,
                static_program: None,
                sequence,
            });
        }
        if let Some(signed) = options.signed.as_ref().filter(|_| !options.allow_replay) {
            let seen = records.iter().filter(|r| r.payload.build_id == *own).filter_map(|r| r.payload.revision).max();
            if let Some(seen) = seen.filter(|seen| signed.revision.is_none_or(|r| r < *seen)) {
                noes.0.push(Refusal::Replay { revision: signed.revision, seen });
            }
        }
        let Some(replaced) = noes.ask(self.replaced(patch, &records))? else {
            // Jumps of the patch that is applied are no changes by somebody else.
            return Err(noes.error());
        };
        if !options.allow_contexts {
            noes.ask(self.check_contexts(image, patch))?;
        }
        let facts = self.check_code(image, patch, replaced.as_ref(), &mut noes);
        let previous = replaced.as_ref().map_or_else(Vec::new, |r| r.chain.clone());
        let by_version = options.canary.as_ref().is_some_and(|c| super::is_by_state(&c.keys));
        let arms = options.canary.as_ref().map(|_| by_version);
        noes.ask(plan::beside::check(patch, &facts, &options.of_apply(), arms).map_err(Error::from))?;
        noes.ask(check_keys(patch, options, self.session))?;
        let imports = self.imports(image, patch, &mut noes)?;
        let links = Links { bias: image.bias, imports, previous };
        let static_program = self.is_static(image)?.then(|| image.clone());
        let register_frame = match (&static_program, &manifest.linked) {
            (Some(image), Some(linked)) => linked.register_frame.and_then(|at| image.to_process(at, 1)),
            _ => self.find_unwinder(image, "__register_frame"),
        };
        if manifest.may_unwind && register_frame.is_none() && !options.allow_unwind {
            noes.0.push(Refusal::NoUnwinder);
        }
        noes.none()?;
        // One whose tables may be registered or not is left alone for good, as is one of a library that was loaded elsewhere then.
        let known = |r: &&Found| {
            let usable = r.mutable.unwind != Unwind::Registering && self.is_loaded(r);
            // With another consistency it may have had other entries.
            let entered = manifest.functions.iter().filter(|f| f.old.as_ref().is_some_and(|o| o.entry.is_some()));
            let same = r.payload.jumps() == entered.count() + manifest.redirects.len();
            let keys = |c: &CanaryRecord| c.keys.clone();
            let alike = r.payload.canary.as_ref().map(keys) == options.canary.as_ref().map(|c| c.keys.clone())
                && r.payload.canary.as_ref().and_then(|c| c.session)
                    == self.session.filter(|_| options.canary.is_some());
            // What was applied from outside may have no stubs for a switch from inside.
            let stubs =
                !self.by_threads || r.payload.canary.is_some() || r.payload.entries.iter().all(|e| e.lead.is_some());
            r.payload.digest.0 == patch.digest && usable && same && alike && stubs
        };
        let earlier = records.iter().find(known);
        let planned = match earlier {
            Some(found) => Planned::again(patch, &links, found, &facts, replaced)?,
            None => {
                let canary = options.canary.as_ref().map(|c| with_salt(c, self.session)).transpose()?;
                let target = Target { links, range: image.range };
                let word = if self.by_threads { Switch::Threads } else { Switch::All };
                let how = canary.as_ref().map_or(word, Switch::Canary);
                Planned::new(patch, &target, &self.maps, &facts, replaced, how)?
            }
        };
        let planned = planned.of_revision(options.signed.as_ref().and_then(|s| s.revision));
        Ok(Inspected { planned: Some(planned), already: false, register_frame, static_program, sequence })
    }

    /// The main executable: the image that holds the program headers which the kernel told the process.
    pub(super) fn executable(&self) -> Result<&Image, Error> {
        const AT_PHDR: u64 = 3;
        let pid = self.process.pid();
        let headers = procfs::auxiliary(pid, AT_PHDR).map(ProcAddr);
        let found = headers.and_then(|at| self.images.iter().find(|i| i.range.contains(at)));
        let Some(image) = found else {
            if self.process.is_alive() {
                let first = self.images.first().map_or_else(|| "the executable".into(), |i| i.name.clone());
                return Err(Refusal::OtherArchitecture { image: first }.into());
            }
            return Err(ProcessError::Gone(pid).into());
        };
        if !image.head.is_64 || image.head.machine != EM_X86_64 {
            return Err(Refusal::OtherArchitecture { image: image.name.clone() }.into());
        }
        Ok(image)
    }

    /// The image that the patch was built for: the executable, or a library that it has loaded.
    fn target(&self, patch: &PatchFile) -> Result<&Image, Error> {
        let main = self.executable()?;
        let (old, new) = (&patch.manifest.target, &patch.manifest.new);
        let is = |i: &Image, wanted: &HexBytes| i.build_id.as_ref() == Some(&wanted.0);
        let found: Vec<&Image> = self.images.iter().filter(|i| is(i, &old.build_id)).collect();
        match found[..] {
            [image] => return Ok(image),
            [image, ..] => return Err(Refusal::MappedTwice { image: image.name.clone(), count: found.len() }.into()),
            [] => {}
        }
        if let Some(running) = self.images.iter().find(|i| is(i, &new.build_id)) {
            return Err(Refusal::Swapped { running: running.build_id_hex() }.into());
        }
        // Which image it was meant for, only its name tells.
        let (wanted, file) = (old.build_id.to_string(), old.file.clone());
        let library = file.ends_with(".so") || file.contains(".so.");
        let meant = self.images.iter().find(|i| i.short_name() == file);
        let image = match meant {
            None if library => return Err(Refusal::NotLoaded { wanted, file }.into()),
            meant => meant.unwrap_or(main),
        };
        if image.build_id.is_none() {
            return Err(Refusal::NoBuildId { image: image.name.clone() }.into());
        }
        Err(Refusal::OtherBuild { running: image.build_id_hex(), image: image.name.clone(), wanted, file }.into())
    }

    /// Whether the image that a patch was applied to is still where it was: a library may have been unloaded.
    pub(super) fn is_loaded(&self, found: &Found) -> bool {
        let holds = |image: &Image| {
            let mut bodies = found.payload.functions.iter().filter_map(|f| f.old.as_ref());
            image.build_id.as_ref() == Some(&found.payload.build_id.0)
                && bodies.all(|b| image.range.contains(b.body.start))
        };
        self.images.iter().any(holds)
    }

    /// Whether an image is a program that nothing was linked to at run time.
    fn is_static(&self, image: &Image) -> Result<bool, Error> {
        Ok(!image.has_interpreter() && image.range == self.executable()?.range)
    }

    fn check_confinement(&self) -> Result<(), Error> {
        let pid = self.process.pid();
        let os = |e| ProcessError::from_os(pid, "read /proc/PID/status", e);
        let status = Status::of(pid).map_err(os)?;
        // Filters can be looked at, and suspended, with CAP_SYS_ADMIN only. From inside, the calls are made, and fail or not.
        if status.seccomp != 0 && !self.by_threads && !procfs::may_administer() {
            return Err(Refusal::Seccomp { mode: status.seccomp }.into());
        }
        if status.shadow_stack {
            return Err(Refusal::ShadowStack.into());
        }
        if let Some(other) = self.process.sharers().first() {
            return Err(Refusal::SharedMemory { pid: other.0 }.into());
        }
        Ok(())
    }

    fn check_contexts(&self, target: &Image, patch: &PatchFile) -> Result<(), Error> {
        if self.is_static(target)? {
            // It has no table that would tell.
            let image = target.short_name().to_owned();
            let Some(linked) = &patch.manifest.linked else {
                let symbol = "what its build does not tell (a patch of an older format)".into();
                return Err(Refusal::Contexts { image, symbol }.into());
            };
            if let Some(symbol) = linked.stack_switches.first().cloned() {
                return Err(Refusal::Contexts { image, symbol }.into());
            }
        }
        for image in self.images.iter().filter(|i| !is_system(i)) {
            let symbols = image.dynamic_symbols(&self.process);
            if let Some(s) = symbols.into_iter().find(|s| STACK_SWITCHES.contains(&s.name.as_str())) {
                return Err(Refusal::Contexts { image: image.short_name().to_owned(), symbol: s.name }.into());
            }
        }
        Ok(())
    }

    /// The applied patch whose place this one takes: exactly the one that it was built after, and no other.
    fn replaced(&self, patch: &PatchFile, records: &[Found]) -> Result<Option<Replaced>, Error> {
        let own = |r: &&Found| r.payload.build_id == patch.manifest.target.build_id && self.is_loaded(r);
        let applied: Vec<&Found> = records.iter().filter(|r| r.mutable.state == State::Applied).filter(own).collect();
        let newest = applied.last();
        let Some(after) = &patch.manifest.after else {
            return match newest {
                Some(newest) => Err(Refusal::OtherPatch { applied: newest.payload.patch.clone() }.into()),
                None => Ok(None),
            };
        };
        let short = |name: &str, digest: &HexBytes| {
            format!("{name} ({})", digest.to_string().chars().take(12).collect::<String>())
        };
        let [found] = applied[..] else {
            let applied = newest.map(|n| short(&n.payload.patch, &n.payload.digest));
            return Err(Refusal::After { wanted: short(&after.name, &after.digest), applied }.into());
        };
        if found.payload.digest != after.digest {
            let applied = Some(short(&found.payload.patch, &found.payload.digest));
            return Err(Refusal::After { wanted: short(&after.name, &after.digest), applied }.into());
        }
        Applied::new(found.clone())?.check_entries(&self.process)?;
        // Those before it are reverted, and lie where they were.
        let mut chain: Vec<&Found> = vec![found];
        for before in &after.before {
            let is = |r: &&Found| r.payload.digest == before.digest && self.is_loaded(r);
            let Some(earlier) = records.iter().find(is) else {
                let wanted = short(&before.name, &before.digest);
                return Err(Refusal::After { wanted, applied: Some(found.payload.patch.clone()) }.into());
            };
            chain.push(earlier);
        }
        let mut places: Vec<ProcAddr> = found.payload.entries.iter().map(|e| e.at).collect();
        for r in &patch.manifest.redirects {
            let (back, offset) = in_chain(r.at);
            let of = chain.get(back).map(|f| &f.payload);
            let at = of.and_then(|p| p.base.checked_add(offset));
            let range = at.and_then(|at| ProcRange::new(at, r.size));
            let code = |f: &FunctionRecord| {
                f.new.range().is_some_and(|c| range.is_some_and(|r| c.start <= r.start && r.end <= c.end))
            };
            let known = of.is_some_and(|p| p.functions.iter().any(|f| f.name == r.name && code(f)));
            let Some(at) = at.filter(|_| known) else {
                let (name, what) = (found.payload.patch.clone(), format!("{} is not in its code", r.name));
                return Err(Refusal::Damaged { name, at: found.region.start, what }.into());
            };
            places.push(at);
        }
        let code = places.into_iter().map(|at| (at, self.unpatched(at, &found.payload.entries))).collect();
        let chain = chain.iter().map(|f| f.payload.base).collect();
        Ok(Some(Replaced { found: found.clone(), chain, code }))
    }

    /// The code at `at`, as far as an entry jump may reach into it, without the jumps of `entries`.
    fn unpatched(&self, at: ProcAddr, entries: &[EntryRecord]) -> Vec<u8> {
        let to_page = (PAGE - at.0 % PAGE).min(insn::OVERWRITTEN as u64);
        let read = |len| self.process.read_vec(at, len).ok();
        let mut code = read(insn::OVERWRITTEN as u64).or_else(|| read(to_page)).unwrap_or_default();
        for entry in entries {
            for (i, byte) in entry.original.0.iter().enumerate() {
                let place = entry.at.checked_add(i as u64).and_then(|p| p.offset_from(at));
                let place = place.and_then(|o| usize::try_from(o).ok());
                if let Some(there) = place.and_then(|o| code.get_mut(o)) {
                    *there = *byte;
                }
            }
        }
        code
    }

    /// Where everything is that the patch imports.
    fn imports(&self, image: &Image, patch: &PatchFile, noes: &mut Noes) -> Result<Vec<ProcAddr>, Error> {
        let imports = &patch.manifest.imports;
        if imports.is_empty() {
            return Ok(Vec::new());
        }
        let main = self.executable()?;
        let scope = Scope::read(&self.process, &self.images, main, image, &main.load_order(&self.process));
        let no = |e: LinkError| Refusal::Import { what: e.to_string(), remedy: e.remedy().into() };
        let find = |i| scope.find(&self.process, i).map_err(|e| noes.0.push(no(e))).ok();
        Ok(imports.iter().filter_map(find).collect())
    }

    /// Compares every old function with what the patch was built for; tells what each is like.
    fn check_code(
        &self,
        image: &Image,
        patch: &PatchFile,
        replaced: Option<&Replaced>,
        noes: &mut Noes,
    ) -> Vec<OldFacts> {
        let functions = &patch.manifest.functions;
        let mut ranges: Vec<ProcRange> = Vec::new();
        let mut counts = Vec::with_capacity(functions.len());
        for f in functions {
            let old = plan::old_code(f, image.bias).unwrap_or_default();
            let inside = old.iter().all(|r| image.range.start <= r.start && r.end <= image.range.end);
            if f.old.is_some() && (old.is_empty() || !inside) {
                let at = old.first().map_or(image.range.start, |r| r.start);
                noes.0.push(Refusal::OutOfReach { at: image.range.start, to: at });
                return Vec::new();
            }
            counts.push(old.len());
            ranges.extend(old);
        }
        let mut code: Vec<Vec<u8>> =
            ranges.iter().map(|r| vec![0; usize::try_from(r.len_bytes()).unwrap_or(0)]).collect();
        let mut parts: Vec<_> = ranges.iter().zip(&mut code).map(|(r, c)| (r.start, c.as_mut_slice())).collect();
        let read = self.process.read_many(&mut parts);
        // The code is to be as it was built, but for the jumps of the patch that is applied (which were checked).
        for entry in replaced.iter().flat_map(|r| &r.found.payload.entries) {
            for (range, bytes) in ranges.iter().zip(&mut code) {
                let Some(from) = entry.at.offset_from(range.start).and_then(|o| usize::try_from(o).ok()) else {
                    continue;
                };
                if let Some(place) = bytes.get_mut(from..from.saturating_add(entry.original.0.len())) {
                    place.copy_from_slice(&entry.original.0);
                }
            }
        }
        let mut next = 0;
        let mut facts = Vec::with_capacity(functions.len());
        for (f, count) in functions.iter().zip(counts) {
            let end = next + count;
            if let Some(i) = (next..end).find(|i| read.get(*i) != Some(&true)) {
                let at = ranges.get(i).map_or(ProcAddr(0), |r| r.start);
                noes.0.push(Refusal::CodeChanged { function: f.demangled.clone(), at, breakpoint: false });
                facts.push(OldFacts::default());
            } else {
                let found = plan::check_old_code(f, image.bias, code.get(next..end).unwrap_or(&[]));
                facts.push(found.unwrap_or_else(|no| {
                    noes.0.push(no);
                    OldFacts::default()
                }));
            }
            next = end;
        }
        facts
    }

    /// Where a function of libgcc's unwinder is: in its library, or linked into the executable or the target and exported.
    pub(super) fn find_unwinder(&self, target: &Image, name: &str) -> Option<ProcAddr> {
        let mut images: Vec<&Image> = self.images.iter().collect();
        images.sort_by_key(|i| !i.short_name().starts_with("libgcc_s"));
        let main = self.executable().ok().map(|i| i.range.start);
        let own = |i: &Image| Some(i.range.start) == main || i.range.start == target.range.start;
        images.retain(|i| i.short_name().starts_with("libgcc_s") || own(i));
        images.into_iter().find_map(|image| {
            let symbols = image.dynamic_symbols(&self.process);
            let at = symbols.iter().find(|s| s.name == name)?.at?;
            image.to_process(at, 1)
        })
    }
}
