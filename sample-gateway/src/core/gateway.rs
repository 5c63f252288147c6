//! Start, signals, orderly end.

use super::config::{Acknowledge, Config};
use super::journal::{Journal, Store, StoreError};
use super::metrics::Metrics;
use super::record::decode_all;
use super::recover::Recovered;
use super::shared::{keep_bytes, Directory, Mailbox, Shared};
use super::worker::{Worker, WAKER};
use super::{http, worker::now_ms};
use gateway_interface::{Business, CompId, FeeSchedule, RiskLimits};
use mio::{Poll, Waker};
use std::net::{SocketAddr, TcpListener};
use std::sync::atomic::AtomicBool;
use std::sync::Arc;
use std::time::Duration;

/// Pause between two commits when nobody waits for them.
const LINGER: Duration = Duration::from_millis(5);

/// The gateway can't start, or could not go on.
#[derive(Debug)]
#[non_exhaustive]
pub enum StartError {
    /// `--comp-id` is not printable or too long.
    CompId(String),
    /// The journal.
    Store(StoreError),
    /// A socket, an event loop or a thread.
    Io(&'static str, std::io::Error),
    /// The disk failed while the gateway ran.
    JournalFailed,
    /// The agent.
    Agent(livepatch::agent::StartError),
}

impl std::fmt::Display for StartError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::CompId(text) => {
                write!(f, "--comp-id {text:?}: 1 to 31 printable characters without blanks are needed")
            }
            Self::Store(error) => error.fmt(f),
            Self::Io(what, error) => write!(f, "{what}: {error}"),
            Self::Agent(error) => write!(f, "--agent: {error}"),
            Self::JournalFailed => f.write_str("the order journal failed; nothing more was acknowledged"),
        }
    }
}

impl std::error::Error for StartError {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        match self {
            Self::Store(error) => Some(error),
            Self::Io(_, error) => Some(error),
            Self::Agent(error) => Some(error),
            Self::CompId(_) | Self::JournalFailed => None,
        }
    }
}

impl From<StoreError> for StartError {
    fn from(error: StoreError) -> Self {
        Self::Store(error)
    }
}

/// Runs the gateway until SIGTERM or SIGINT.
///
/// # Errors
/// [`StartError`], with what could not be had.
pub fn run(config: Config, business: Box<dyn Business>) -> Result<(), StartError> {
    let agent = config.agent.start().map_err(StartError::Agent)?;
    let us = CompId::new(config.comp_id.as_bytes()).ok_or_else(|| StartError::CompId(config.comp_id.clone()))?;
    raise_open_files();
    let mut store = Store::open(&config.data)?;
    let recovered = recover(&config, &mut store, business.as_ref(), us)?;

    let listener = listen(&config, config.port)?;
    let metrics_listener = config.metrics_port.map(|port| listen(&config, port)).transpose()?;
    let workers = usize::from(config.workers);
    let polls: Vec<Poll> = (0..workers).map(|_| Poll::new()).collect::<Result<_, _>>().map_err(io("epoll"))?;
    let mail = polls
        .iter()
        .map(|poll| Waker::new(poll.registry(), WAKER).map(Mailbox::new))
        .collect::<Result<_, _>>()
        .map_err(io("eventfd"))?;

    let known = recovered.sessions.values().map(|s| (s.comp, s.id)).collect();
    let (books, sessions) = recovered.into_state(config.max_symbols);
    let linger = if config.acknowledge == Acknowledge::Received { LINGER } else { Duration::ZERO };
    let shared = Arc::new(Shared {
        business,
        agent,
        limits: RiskLimits::default(),
        fees: FeeSchedule::default(),
        books,
        journal: Journal::default(),
        metrics: Metrics::new(workers),
        directory: Directory::new(known),
        mail,
        stopping: AtomicBool::new(false),
        config,
    });
    let mut homes: Vec<Vec<_>> = (0..workers).map(|_| Vec::new()).collect();
    for session in sessions.into_values() {
        homes[shared.home(session.id)].push(session);
    }

    let address = listener.local_addr().map_err(io("listening socket"))?;
    println!("listening {address}");
    if let Some(metrics) = metrics_listener {
        println!("metrics {}", metrics.local_addr().map_err(io("metrics socket"))?);
        let shared = Arc::downgrade(&shared);
        spawn("metrics", move || http::serve(&metrics, &shared))?;
    }
    watch_signals(&shared)?;

    let persistence = {
        let shared = Arc::clone(&shared);
        spawn("journal", move || persist(&shared, &mut store, linger))?
    };
    let mut threads = Vec::new();
    for (index, (poll, sessions)) in polls.into_iter().zip(homes).enumerate() {
        let own_listener = listener.try_clone().map_err(io("listening socket"))?;
        let worker = Worker::new(index, poll, own_listener, Arc::clone(&shared), sessions).map_err(io("worker"))?;
        threads.push(spawn(&format!("worker-{index}"), move || worker.run())?);
    }
    drop(listener);
    for thread in threads {
        if thread.join().is_err() {
            eprintln!("sample-gateway: a worker panicked");
        }
    }
    shared.journal.close();
    match persistence.join() {
        Ok(true) => Ok(()),
        _ => Err(StartError::JournalFailed),
    }
}

/// Reads the journal back and replaces it by its snapshot.
fn recover(config: &Config, store: &mut Store, business: &dyn Business, us: CompId) -> Result<Recovered, StartError> {
    let mut recovered = Recovered::new(keep_bytes(config, 0));
    store.replay(|entry| decode_all(entry, |record| recovered.apply(record, business)))?;
    let late = recovered.report_the_rest(business, us.as_bytes(), now_ms());
    if late > 0 {
        eprintln!("sample-gateway: {late} executions had no report yet; their sessions can ask for them now");
    }
    store.replace(&recovered.snapshot())?;
    Ok(recovered)
}

fn persist(shared: &Shared, store: &mut Store, linger: Duration) -> bool {
    let result = shared.journal.persist(store, linger, |commit| {
        shared.metrics.journal.commit(commit.bytes, commit.took);
        shared.mail.iter().for_each(Mailbox::wake);
    });
    if let Err(error) = result {
        eprintln!("sample-gateway: {error}; stopping, because nothing more can be acknowledged");
        shared.stop();
        return false;
    }
    true
}

/// A thread of its own takes SIGTERM and SIGINT from a pipe: no signal is blocked, and no other signal is touched.
fn watch_signals(shared: &Arc<Shared>) -> Result<(), StartError> {
    let wanted = [signal_hook::consts::SIGTERM, signal_hook::consts::SIGINT];
    let mut signals = signal_hook::iterator::Signals::new(wanted).map_err(io("signal handler"))?;
    let shared = Arc::downgrade(shared);
    spawn("signals", move || {
        for _ in signals.forever() {
            if let Some(shared) = shared.upgrade() {
                shared.stop();
            }
        }
    })?;
    Ok(())
}

fn listen(config: &Config, port: u16) -> Result<TcpListener, StartError> {
    let address = SocketAddr::new(config.bind, port);
    let listener = TcpListener::bind(address)
        .map_err(|e| StartError::Io("listening socket", std::io::Error::new(e.kind(), format!("{address}: {e}"))))?;
    // The backlog of std is 128; a wave of logons is larger.
    rustix::net::listen(&listener, 4_096).map_err(|e| StartError::Io("listening socket", e.into()))?;
    Ok(listener)
}

/// Each session needs a descriptor.
fn raise_open_files() {
    use rustix::process::{getrlimit, setrlimit, Resource, Rlimit};
    let limit = getrlimit(Resource::Nofile);
    // Not reaching the hard limit is no reason not to start: fewer sessions fit.
    let _ = setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, maximum: limit.maximum });
}

fn spawn<R: Send + 'static>(
    name: &str,
    run: impl FnOnce() -> R + Send + 'static,
) -> Result<std::thread::JoinHandle<R>, StartError> {
    std::thread::Builder::new().name(name.to_owned()).spawn(run).map_err(io("thread"))
}

fn io(what: &'static str) -> impl Fn(std::io::Error) -> StartError {
    move |error| StartError::Io(what, error)
}
