//! The agent as a program has it: three lines.

use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

use nix::sys::signal::SigSet;
use parking_lot::Mutex;

use super::breaker::Bounds;
use super::engine::{Engine, Shared};
use super::fatal;
use super::heap::{self, HeapError};
use super::log::{By, Log};
use super::masks::{self, OwnError};
use super::migrate::Deadlines;
use super::server::{ServeError, Server, Stop};
use crate::patch::PatchFile;
use crate::patcher::{Error, Options, Report};
use crate::signature::{Keys, SignatureError};
use crate::switch::{self, Switcher};

/// Why an agent could not be started.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum StartError {
    /// There is one already: it owns signals of the whole process.
    #[error("this process has an agent already")]
    Twice,
    /// The signals can't be had.
    #[error(transparent)]
    Signals(#[from] OwnError),
    /// The kernel lacks something, or a thread could not be made.
    #[error("the agent can't be started: {0}")]
    Os(#[from] io::Error),
    /// The memory can't be had.
    #[error(transparent)]
    Arena(#[from] HeapError),
    /// The socket can't be had.
    #[error(transparent)]
    Socket(#[from] ServeError),
    /// The keys can't be had.
    #[error(transparent)]
    Keys(#[from] SignatureError),
}

/// What an agent is to be.
#[derive(Debug, Default)]
pub struct Builder {
    socket: Option<PathBuf>,
    keys: Option<PathBuf>,
    audit: Option<PathBuf>,
    look: Option<i32>,
    arena_bytes: usize,
    bounds: Bounds,
    deadlines: Deadlines,
}

impl Builder {
    /// Where commands reach it; they find it by themselves if the file is named `livepatch*.sock`. Without one, only the program uses it.
    #[must_use]
    pub fn socket(mut self, path: impl Into<PathBuf>) -> Self {
        self.socket = Some(path.into());
        self
    }

    /// Takes only patches that are signed by one of these keys: a public key of minisign, or a folder of `*.pub` files.
    #[must_use]
    pub fn keys(mut self, path: impl Into<PathBuf>) -> Self {
        self.keys = Some(path.into());
        self
    }

    /// Appends a line to this file for each change that was asked for.
    #[must_use]
    pub fn audit(mut self, path: impl Into<PathBuf>) -> Self {
        self.audit = Some(path.into());
        self
    }

    /// The real-time signal by which threads that never block are asked to look at themselves; `SIGRTMAX - 3` without this.
    #[must_use]
    pub fn signal(mut self, signal: i32) -> Self {
        self.look = Some(signal);
        self
    }

    /// Reserves so much memory at the start, locked where that is allowed, for all that the agent allocates: so the program's heap stays as it
    /// was. It takes the program to have [`Heap`](super::heap::Heap) for its global allocator.
    #[must_use]
    pub fn arena(mut self, bytes: usize) -> Self {
        self.arena_bytes = bytes;
        self
    }

    /// Reverts a patch that is not permanent when it does not keep these bounds.
    #[must_use]
    pub fn bounds(mut self, bounds: Bounds) -> Self {
        self.bounds = bounds;
        self
    }

    /// How long the migration of one entry of a state may take, and that of all; 500 ms and 60 s without this.
    #[must_use]
    pub fn migration(mut self, entry: Duration, total: Duration) -> Self {
        self.deadlines = Deadlines { session: entry, total };
        self
    }

    /// Starts it.
    ///
    /// # Errors
    ///
    /// The signals or the socket can't be had, or the kernel lacks what it takes.
    pub fn start(self) -> Result<Agent, StartError> {
        static STARTED: Mutex<bool> = Mutex::new(false);
        let mut started = STARTED.lock();
        if *started {
            return Err(StartError::Twice);
        }
        crate::shadow::keep();
        let look = self.look.unwrap_or_else(|| libc::SIGRTMAX() - 3);
        let keys = self.keys.as_deref().map(Keys::load).transpose()?;
        let log = Log::new(self.audit.as_deref())?;
        if self.arena_bytes > 0 {
            let reserved = heap::reserve(self.arena_bytes, true)?;
            if let Some(why) = reserved.not_locked {
                tracing::warn!(target: "livepatch", "the agent's memory is not locked: {why}");
            }
        }
        let server = self.socket.as_deref().map(Server::bind).transpose()?;
        masks::own(look)?;
        let switcher = Switcher::install(look, masks::pass_on)?;
        fatal::install(log.descriptor())?;
        let shared = Arc::new(Shared::default());
        let engine =
            Arc::new(Mutex::new(Engine::new(switcher, keys, (self.bounds, self.deadlines), Arc::clone(&shared), log)));
        count_panics(Arc::clone(&shared));
        *started = true;
        let stop = Stop::new()?;
        let mut threads = Vec::new();
        let mut spawn = |name: &str, run: Box<dyn FnOnce() + Send>| {
            let of_agent = move || {
                let _heap = heap::enter();
                // The program's handlers run on its own threads; the agent's two signals are never blocked (`masks`).
                let _ = SigSet::all().thread_block();
                run();
            };
            threads.push(std::thread::Builder::new().name(name.into()).spawn(of_agent)?);
            io::Result::Ok(())
        };
        if let Some(server) = server {
            let (engine, stop, shared) = (Arc::clone(&engine), stop.clone(), Arc::clone(&shared));
            spawn(
                "livepatch",
                Box::new(move || {
                    let mut handler = |request, patch, peer| {
                        let answer = engine.lock().answer(request, patch, peer);
                        shared.wake();
                        answer
                    };
                    if let Err(e) = server.serve(&stop, &mut handler) {
                        tracing::error!(target: "livepatch", "the control socket is closed: {e}");
                    }
                }),
            )?;
        }
        {
            let (engine, shared) = (Arc::clone(&engine), Arc::clone(&shared));
            spawn("livepatch-watch", Box::new(move || watch(&engine, &shared)))?;
        }
        Ok(Agent { engine, shared, stop, threads })
    }
}

/// Until the agent is gone, looks at what is not permanent.
fn watch(engine: &Mutex<Engine>, shared: &Shared) {
    loop {
        let pause = engine.lock().watch();
        let mut hurry = shared.hurry.lock();
        if !*hurry {
            shared.woken.wait_for(&mut hurry, pause);
        }
        *hurry = false;
        drop(hurry);
        if shared.stopped() {
            return;
        }
    }
}

/// Counts panics that have patched code on their stack, before the hook that is there: that one may take seconds to print where they came from.
fn count_panics(shared: Arc<Shared>) {
    let before = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |info| {
        let patched = shared.patched.lock().as_ref().is_some_and(switch::is_on_own_stack);
        if patched {
            shared.observed.panic();
            shared.wake();
        }
        before(info);
    }));
}

/// An agent in this process. Dropped, it no longer answers; what is applied stays.
#[derive(Debug)]
pub struct Agent {
    engine: Arc<Mutex<Engine>>,
    shared: Arc<Shared>,
    stop: Stop,
    threads: Vec<JoinHandle<()>>,
}

impl Agent {
    /// What is to be started.
    ///
    /// ```no_run
    /// let agent = livepatch::Agent::builder().socket("/run/gateway/livepatch.sock").start()?;
    /// # Ok::<(), livepatch::agent::StartError>(())
    /// ```
    #[must_use]
    pub fn builder() -> Builder {
        Builder::default()
    }

    /// The engine, for this thread: what it allocates is the agent's.
    fn engine(&self) -> EngineGuard<'_> {
        let heap = heap::enter();
        EngineGuard { engine: self.engine.lock(), _heap: heap }
    }

    /// Applies a patch from a file, for the program itself. No key is asked for: the program may do what it likes.
    ///
    /// # Errors
    ///
    /// It is no patch, or was not applied.
    pub fn apply(&self, patch: &[u8], options: &Options) -> Result<Report, Error> {
        let mut engine = self.engine();
        let patch = PatchFile::parse(patch)?;
        let done = engine.apply(&patch, options, By::Program);
        self.shared.wake();
        done
    }

    /// Reverts the newest patch.
    ///
    /// # Errors
    ///
    /// It was not reverted.
    pub fn revert(&self, options: &Options) -> Result<Report, Error> {
        let mut done = self.engine().revert(None, false, options, By::Program)?;
        done.pop().ok_or(Error::NothingApplied { pid: crate::process::Pid(std::process::id().cast_signed()) })
    }

    /// Makes a patch permanent.
    ///
    /// # Errors
    ///
    /// No such patch is applied.
    pub fn confirm(&self, name: &str) -> Result<(), Error> {
        self.engine().confirm(name, By::Program)
    }

    /// Tells of a piece of the program's work: whether it failed, and how long it took. The [bounds](Builder::bounds) are held against that.
    /// Within [`session::enter`](crate::session::enter) a failure also counts for the arm that handles the message. Costs an addition, which no other
    /// thread waits for, and two more for a failure.
    pub fn observe(&self, failed: bool, took: Duration) {
        if failed {
            crate::session::failed();
        }
        self.shared.observed.work(failed, took);
    }

    /// Figures in Prometheus' text format, to be added to the program's own. While a switch or a command takes longer, those of the last call:
    /// a scrape does not wait for it.
    #[must_use]
    pub fn metrics(&self) -> String {
        const PATIENCE: Duration = Duration::from_millis(50);
        let _heap = heap::enter();
        let mut last = self.shared.figures.lock();
        if let Some(engine) = self.engine.try_lock_for(PATIENCE) {
            *last = engine.metrics();
        }
        last.clone()
    }
}

struct EngineGuard<'a> {
    engine: parking_lot::MutexGuard<'a, Engine>,
    _heap: heap::Inside,
}

impl std::ops::Deref for EngineGuard<'_> {
    type Target = Engine;

    fn deref(&self) -> &Engine {
        &self.engine
    }
}

impl std::ops::DerefMut for EngineGuard<'_> {
    fn deref_mut(&mut self) -> &mut Engine {
        &mut self.engine
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        self.shared.stop();
        self.stop.stop();
        for thread in self.threads.drain(..) {
            // A panic in it was told by its own message.
            let _ = thread.join();
        }
    }
}
