//! The handle: which version answers whom, and when one may go.
//!
//! A call reads one word and writes memory of its own thread only (seize: the writer pays with a membarrier). A switch stores that word.
//!
//! *Invariant:* a version lives as long as any set of arms that names it, and a set of arms until the last call that read it has left.
#![allow(unsafe_code)]

use std::collections::BTreeMap;
use std::fmt;
use std::marker::PhantomData;
use std::ops::Deref;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicPtr, Ordering};
use std::sync::Arc;
use std::time::Duration;

use livepatch_interface::{Call, Saved, Table};
use parking_lot::{Condvar, Mutex};
use seize::{Collector, Guard, LocalGuard};

use super::check::check;
use super::load::{self, Kept, LoadError, Loaded};
use super::text::Description;
use crate::insn::{bucket, WHOLE};
use crate::signature::Keys;

/// How often the keeper looks for last calls to have left, while it waits for some.
const LOOK: Duration = Duration::from_millis(1);

/// Which version of a module; counted from 1 in each handle.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct VersionId(u32);

impl fmt::Display for VersionId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// What is known of one version.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Status {
    /// Which.
    pub id: VersionId,
    /// The file's name.
    pub name: String,
    /// SHA-256 of the file.
    pub digest: [u8; 32],
    /// Whether there is an object of it.
    pub alive: bool,
    /// Its part of the sessions, in 1 / 10,000.
    pub share: u32,
    /// Whether any of its library is still mapped: after a release only if a thread keeps something of it (a `thread_local` with a destructor).
    pub mapped: bool,
}

struct Arm {
    /// Buckets below this one are its own, as far as no arm before has them.
    upto: u32,
    table: *const std::ffi::c_void,
    this: *const std::ffi::c_void,
    version: VersionId,
    _alive: Arc<Loaded>,
}

/// Who answers whom.
struct Arms {
    salt: u64,
    list: Vec<Arm>,
    left: AtomicBool,
}

impl Arms {
    fn of(&self, session: u64) -> Option<&Arm> {
        match &self.list[..] {
            [] => None,
            [all] => Some(all),
            list => {
                let bucket = bucket(session, self.salt);
                list.iter().find(|a| bucket < a.upto).or(list.last())
            }
        }
    }
}

struct Known {
    kept: Kept,
    alive: Option<Arc<Loaded>>,
    leaving: bool,
    /// The keeper is at it.
    ending: bool,
    saved: Option<(u32, Vec<u8>)>,
    /// The version of its state.
    state: u32,
}

#[derive(Default)]
struct State {
    versions: BTreeMap<VersionId, Known>,
    shares: Vec<(VersionId, u32)>,
    retired: Vec<*mut Arms>,
    ended: bool,
}

impl State {
    /// What the keeper still waits for.
    fn waits(&self) -> bool {
        !self.retired.is_empty() || self.versions.values().any(|k| k.leaving)
    }
}

struct Inner {
    arms: AtomicPtr<Arms>,
    collector: Collector,
    state: Mutex<State>,
    wake: Condvar,
    ended: Condvar,
}

// SAFETY: the pointers lead to `Arms`, which threads share: its objects may be used by any thread (`Module: Send + Sync`), and it is freed
// by the keeper alone.
unsafe impl Send for Inner {}
// SAFETY: as above.
unsafe impl Sync for Inner {}

/// What a program holds instead of an object.
pub struct Handle<T: Table> {
    inner: Arc<Inner>,
    program: Description,
    keys: Option<Keys>,
    /// One load or change at a time.
    changing: Mutex<()>,
    keeper: Option<std::thread::JoinHandle<()>>,
    table: PhantomData<fn() -> T>,
}

impl<T: Table> fmt::Debug for Handle<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Handle").field("interface", &T::NAME).field("versions", &self.status()).finish()
    }
}

/// A version of the module, held for one message: the interface's functions are called on it.
pub struct Entered<'h, T: Table> {
    call: Call<'h, T>,
    version: VersionId,
    _held: LocalGuard<'h>,
}

impl<T: Table> Entered<'_, T> {
    /// Which version answers.
    #[must_use]
    pub fn version(&self) -> VersionId {
        self.version
    }
}

impl<'h, T: Table> Deref for Entered<'h, T> {
    type Target = Call<'h, T>;
    fn deref(&self) -> &Self::Target {
        &self.call
    }
}

impl<T: Table> fmt::Debug for Entered<'_, T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Entered").field("version", &self.version).finish_non_exhaustive()
    }
}

impl<T: Table> Default for Handle<T> {
    fn default() -> Self {
        Self::new()
    }
}

impl<T: Table> Handle<T> {
    /// A handle without a module.
    ///
    /// # Panics
    ///
    /// No thread can be started for what has to be released.
    #[must_use]
    pub fn new() -> Self {
        let program = Description::parse(T::text().as_bytes()).expect("the program's own text");
        let inner = Arc::new(Inner {
            arms: AtomicPtr::new(Box::into_raw(Box::new(Arms {
                salt: 0,
                list: Vec::new(),
                left: AtomicBool::new(false),
            }))),
            collector: Collector::new().batch_size(1),
            state: Mutex::default(),
            wake: Condvar::new(),
            ended: Condvar::new(),
        });
        let own = Arc::clone(&inner);
        let keeper = std::thread::Builder::new().name("livepatch-modules".into()).spawn(move || keep(&own));
        let keeper = Some(keeper.expect("a thread for what has to be released"));
        Self { inner, program, keys: None, changing: Mutex::new(()), keeper, table: PhantomData }
    }

    /// Only modules that one of these keys signed are loaded from now on: `FILE.minisig` beside each.
    #[must_use]
    pub fn signed_by(mut self, keys: Keys) -> Self {
        self.keys = Some(keys);
        self
    }

    /// Loads a module beside those that are loaded. No call is led to it yet. Its object is made from the state that the newest arm's object
    /// hands over, if it has some.
    ///
    /// # Errors
    ///
    /// The file can't be read, is refused, does not load, or its factory fails; everything is as it was.
    pub fn load(&self, file: &Path) -> Result<VersionId, LoadError> {
        let _changing = self.changing.lock();
        let name = file.file_name().unwrap_or(file.as_os_str()).to_string_lossy().into_owned();
        let unreadable = |error| LoadError::File { file: file.to_owned(), error };
        let bytes = std::fs::read(file).map_err(unreadable)?;
        if let Some(keys) = &self.keys {
            let not_signed = |why| LoadError::NotSigned { name: name.clone(), why };
            keys.verify_file(&bytes, file).map_err(not_signed)?;
        }
        let text = check(&bytes, &self.program).map_err(|why| LoadError::Refused { name: name.clone(), why })?;
        let kept = Kept::new(&name, &bytes, text.bytes().to_vec()).map_err(unreadable)?;
        // An older module gets it in its own form; what is newer than the state reads the older form.
        let saved = self.current_state(text.state()).or_else(|| self.current_state(None));
        let loaded = self.make(&kept, saved.as_ref())?;
        let mut state = self.inner.state.lock();
        let id = VersionId(state.versions.keys().last().map_or(1, |last| last.0 + 1));
        let version = loaded.instance.state;
        let known =
            Known { kept, alive: Some(Arc::new(loaded)), leaving: false, ending: false, saved: None, state: version };
        state.versions.insert(id, known);
        Ok(id)
    }

    /// What the first arm's object hands over, in the form of a version or in its own.
    fn current_state(&self, form: Option<u32>) -> Option<(u32, Vec<u8>)> {
        let from = {
            let state = self.inner.state.lock();
            let (first, _) = state.shares.first()?;
            state.versions.get(first)?.alive.clone()?
        };
        let form = form.unwrap_or(from.instance.state);
        std::thread::scope(|scope| scope.spawn(|| load::save(&from, form)).join().ok().flatten())
            .map(|bytes| (form, bytes))
    }

    /// On a thread of its own.
    fn make(&self, kept: &Kept, saved: Option<&(u32, Vec<u8>)>) -> Result<Loaded, LoadError> {
        let saved = saved.map(|(version, bytes)| Saved { version: *version, bytes });
        let failed = |why: String| LoadError::Factory { name: kept.name.clone(), why };
        let loaded = std::thread::scope(|scope| {
            let thread = std::thread::Builder::new().name("livepatch-load".into());
            let thread = thread.spawn_scoped(scope, || load::load(kept, saved)).map_err(|e| failed(e.to_string()))?;
            thread.join().map_err(|_| failed("it ended the thread".into()))?
        })?;
        if loaded.instance.table.is_null() {
            return Err(failed("it made no table of functions".into()));
        }
        Ok(loaded)
    }

    /// Leads every call that begins from now on to one version. If it was released, its kept file is loaded again, with the state that the
    /// present version hands over in the form of the old one, else with what it had itself when it was released.
    ///
    /// # Errors
    ///
    /// There is no such version, or it does not load again; everything is as it was.
    pub fn switch(&self, to: VersionId) -> Result<(), LoadError> {
        self.weigh(&[(to, WHOLE)])
    }

    /// Leads the calls to several versions by session, each with its share in 1 / 10,000; the last gets the rest. Raising the share of the first
    /// never moves a session back.
    ///
    /// # Errors
    ///
    /// As [`switch`](Self::switch); nobody is to be led to a version that is not there.
    pub fn weigh(&self, shares: &[(VersionId, u32)]) -> Result<(), LoadError> {
        let _changing = self.changing.lock();
        if shares.is_empty() {
            return Err(LoadError::NotLoaded(VersionId(0)));
        }
        for (id, _) in shares {
            self.revive(*id)?;
        }
        let mut state = self.inner.state.lock();
        let (mut upto, mut list) = (0u32, Vec::new());
        for (i, (id, share)) in shares.iter().enumerate() {
            let share = if i + 1 == shares.len() { WHOLE } else { *share };
            let next = upto.saturating_add(share).min(WHOLE);
            let known = state.versions.get(id).ok_or(LoadError::NotLoaded(*id))?;
            let alive = Arc::clone(known.alive.as_ref().ok_or(LoadError::NotLoaded(*id))?);
            let (table, this) = (alive.instance.table, alive.instance.this);
            list.push((Arm { upto: next, table, this, version: *id, _alive: alive }, next - upto));
            upto = next;
        }
        // The first arm's digest: as long as it is the first, each session keeps its bucket.
        let digest = shares.first().and_then(|(id, _)| state.versions.get(id)).map_or([0; 32], |k| k.kept.digest);
        let salt = u64::from_le_bytes(std::array::from_fn(|i| digest[i]));
        state.shares = list.iter().map(|(arm, share)| (arm.version, *share)).collect();
        let list = list.into_iter().map(|(arm, _)| arm).collect();
        let new = Box::into_raw(Box::new(Arms { salt, list, left: AtomicBool::new(false) }));
        let old = self.inner.arms.swap(new, Ordering::AcqRel);
        state.retired.push(old);
        drop(state);
        // SAFETY: no new call reads `old`; it was made by `Box` and is retired once. `left` is the last that seize does with it.
        unsafe { self.inner.collector.retire(old, |arms, _| (*arms).left.store(true, Ordering::Release)) };
        // Seize waits for as many things to be retired as threads may be in a call. These are nothing.
        let threads = std::fs::read_dir("/proc/self/task").map_or(256, Iterator::count);
        for _ in 0..threads + 8 {
            // SAFETY: nothing is read or freed.
            unsafe { self.inner.collector.retire(std::ptr::dangling_mut::<u8>(), |_, _| ()) };
        }
        self.inner.wake.notify_one();
        Ok(())
    }

    fn revive(&self, id: VersionId) -> Result<(), LoadError> {
        let wanted = {
            let mut state = self.inner.state.lock();
            while state.versions.get(&id).is_some_and(|k| k.ending) {
                self.inner.ended.wait(&mut state);
            }
            let known = state.versions.get_mut(&id).ok_or(LoadError::NotLoaded(id))?;
            known.leaving = false;
            if known.alive.is_some() {
                return Ok(());
            }
            known.state
        };
        let handed = self.current_state(Some(wanted));
        // The keeper changes a version only while it is alive, so this one stays as it is.
        let taken = self.inner.state.lock().versions.remove(&id);
        let Some(mut known) = taken else { return Err(LoadError::NotLoaded(id)) };
        let made = self.make(&known.kept, handed.as_ref().or(known.saved.as_ref()));
        let result = made.map(|loaded| known.alive = Some(Arc::new(loaded)));
        self.inner.state.lock().versions.insert(id, known);
        result
    }

    /// Ends a version's object and unloads its library when the last call has left it; until then everything stays. The file is kept, so that
    /// [`switch`](Self::switch) can go back to it.
    ///
    /// # Errors
    ///
    /// Calls are led to it, or there is none.
    pub fn release(&self, id: VersionId) -> Result<(), LoadError> {
        let _changing = self.changing.lock();
        let mut state = self.inner.state.lock();
        if state.shares.iter().any(|(s, _)| *s == id) {
            return Err(LoadError::InUse(id));
        }
        let known = state.versions.get_mut(&id).ok_or(LoadError::NotLoaded(id))?;
        known.leaving = known.alive.is_some();
        drop(state);
        self.inner.wake.notify_one();
        Ok(())
    }

    /// Releases a version and forgets its file.
    ///
    /// # Errors
    ///
    /// Calls are led to it, or there is none; or its last call has not left, or its library is still mapped.
    pub fn forget(&self, id: VersionId) -> Result<(), LoadError> {
        let _changing = self.changing.lock();
        let mut state = self.inner.state.lock();
        while state.versions.get(&id).is_some_and(|k| k.ending) {
            self.inner.ended.wait(&mut state);
        }
        let known = state.versions.get(&id).ok_or(LoadError::NotLoaded(id))?;
        // What is still mapped has a name in the linker's list, which is that of the descriptor: nobody else may get the descriptor.
        if known.alive.is_some() || known.ending || known.kept.is_mapped() {
            return Err(LoadError::InUse(id));
        }
        state.versions.remove(&id);
        Ok(())
    }

    /// Holds the version that answers a session, for the handling of one message; `None` before the first switch.
    #[must_use]
    pub fn try_enter(&self, session: u64) -> Option<Entered<'_, T>> {
        let held = self.inner.collector.enter();
        let arms = held.protect(&self.inner.arms, Ordering::Acquire);
        // SAFETY: `held` keeps it: it was current when `protect` read it, and is freed only after `held` has gone.
        let arm = unsafe { &*arms }.of(session)?;
        // SAFETY: the object is of this table (its text was compared); it lives as long as `arms`. The lifetime is that of the
        // handle, but both are only lent out through `Entered`, which has `held`.
        let call = unsafe { Call::new(&*arm.table.cast::<T>(), arm.this) };
        Some(Entered { call, version: arm.version, _held: held })
    }

    /// The same.
    ///
    /// # Panics
    ///
    /// Before the first [`switch`](Self::switch).
    #[must_use]
    pub fn enter(&self, session: u64) -> Entered<'_, T> {
        self.try_enter(session).expect("a module was switched to")
    }

    /// All versions that are known.
    #[must_use]
    pub fn status(&self) -> Vec<Status> {
        let state = self.inner.state.lock();
        let share = |id| state.shares.iter().filter(|(s, _)| *s == id).map(|(_, n)| n).sum();
        let versions = state.versions.iter();
        versions
            .map(|(id, k)| Status {
                id: *id,
                name: k.kept.name.clone(),
                digest: k.kept.digest,
                alive: k.alive.is_some(),
                share: share(*id),
                mapped: k.kept.is_mapped(),
            })
            .collect()
    }
}

impl<T: Table> Drop for Handle<T> {
    fn drop(&mut self) {
        self.inner.state.lock().ended = true;
        self.inner.wake.notify_one();
        if let Some(keeper) = self.keeper.take() {
            // It ends by itself; a panic in it has been reported.
            let _ = keeper.join();
        }
    }
}

/// Frees what the last call has left.
fn keep(inner: &Inner) {
    loop {
        let mut state = inner.state.lock();
        while !state.waits() && !state.ended {
            inner.wake.wait(&mut state);
        }
        if state.ended {
            break;
        }
        // SAFETY: made by `Box`, freed here only, after seize's last touch.
        let gone: Vec<*mut Arms> =
            state.retired.extract_if(.., |a| unsafe { (**a).left.load(Ordering::Acquire) }).collect();
        // SAFETY: as above.
        gone.into_iter().for_each(|a| drop(unsafe { Box::from_raw(a) }));
        let mut ended = Vec::new();
        for (id, known) in &mut state.versions {
            if known.leaving && known.alive.as_ref().is_some_and(|a| Arc::strong_count(a) == 1) {
                ended.extend(known.alive.take().map(|loaded| (*id, loaded)));
                (known.leaving, known.ending) = (false, true);
            }
        }
        let looks = state.waits();
        drop(state);
        for (id, loaded) in ended {
            let saved = load::save(&loaded, loaded.instance.state).map(|bytes| (loaded.instance.state, bytes));
            drop(loaded);
            if let Some(known) = inner.state.lock().versions.get_mut(&id) {
                (known.saved, known.ending) = (saved, false);
            }
            inner.ended.notify_all();
        }
        if looks {
            std::thread::sleep(LOOK);
        }
    }
    // The handle is gone, and with it whoever could call; a guard that was leaked holds nothing that is still used.
    // SAFETY: no thread loads from the handle any more, and what seize was given is marked only, not freed.
    unsafe { inner.collector.reclaim_all() };
    let mut state = inner.state.lock();
    let current = inner.arms.swap(std::ptr::null_mut(), Ordering::AcqRel);
    let all = state.retired.drain(..).chain(Some(current).filter(|a| !a.is_null())).collect::<Vec<_>>();
    // SAFETY: nobody can call any more, and seize has touched what was retired when no thread was in a call.
    all.into_iter().for_each(|a| drop(unsafe { Box::from_raw(a) }));
    state.versions.clear();
}
