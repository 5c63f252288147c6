//! What all threads reach.

use super::config::Config;
use super::journal::Journal;
use super::metrics::Metrics;
use super::record::Record;
use crate::state::Books;
use gateway_interface::{Business, CompId, Execution, FeeSchedule, RiskLimits, SessionId};
use livepatch::Agent;
use mio::net::TcpStream;
use mio::Waker;
use parking_lot::Mutex;
use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};

/// A connection whose session belongs to another worker, with the bytes it has sent.
pub type Adoption = (TcpStream, Vec<u8>);

/// Where a worker gets its mail.
///
/// *Invariant:* executions are posted under the lock of their book, also to the own worker, so that a session hears of
/// its orders in the order of the book.
#[derive(Debug)]
pub struct Mailbox {
    adoptions: Mutex<Vec<Adoption>>,
    executions: Mutex<Vec<Execution>>,
    waker: Waker,
}

impl Mailbox {
    /// An empty one; `waker` wakes its owner.
    pub fn new(waker: Waker) -> Self {
        Self { adoptions: Mutex::default(), executions: Mutex::default(), waker }
    }

    /// Gives a connection away.
    pub fn post_adoption(&self, adoption: Adoption) {
        self.adoptions.lock().push(adoption);
        self.wake();
    }

    /// Tells of something that happened to an order of the owner's. True when the owner has to be woken for it.
    pub fn post_execution(&self, execution: Execution) -> bool {
        let mut executions = self.executions.lock();
        executions.push(execution);
        executions.len() == 1
    }

    /// Wakes the owner.
    pub fn wake(&self) {
        if let Err(error) = self.waker.wake() {
            eprintln!("sample-gateway: can't wake a worker: {error}");
        }
    }

    /// Takes all connections, leaving `empty` in their place.
    pub fn adoptions(&self, empty: &mut Vec<Adoption>) {
        std::mem::swap(&mut *self.adoptions.lock(), empty);
    }

    /// Takes all executions, leaving `empty` in their place.
    pub fn executions(&self, empty: &mut Vec<Execution>) {
        std::mem::swap(&mut *self.executions.lock(), empty);
    }
}

/// Which number a counterparty has.
#[derive(Debug, Default)]
pub struct Directory {
    known: Mutex<HashMap<CompId, SessionId>>,
    count: AtomicU32,
}

impl Directory {
    /// The counterparties that are known from the journal.
    pub fn new(known: HashMap<CompId, SessionId>) -> Self {
        let next = known.values().map(|id| id.0 + 1).max().unwrap_or(0);
        Self { count: AtomicU32::new(next), known: Mutex::new(known) }
    }

    /// The number of a counterparty; a new one gets the next, and is put on record.
    pub fn find(&self, comp: CompId, journal: &Journal) -> SessionId {
        *self.known.lock().entry(comp).or_insert_with(|| {
            let id = SessionId(self.count.fetch_add(1, Ordering::Relaxed));
            let mut bytes = Vec::with_capacity(48);
            Record::Session { id, comp }.encode(&mut bytes);
            journal.append(&bytes);
            id
        })
    }

    /// How many counterparties there are.
    pub fn count(&self) -> usize {
        self.count.load(Ordering::Relaxed) as usize
    }
}

/// What all threads reach.
pub struct Shared {
    /// The command line.
    pub config: Config,
    /// The layer that is patched.
    pub business: Box<dyn Business>,
    /// By which this process is patched from inside.
    pub agent: Option<Agent>,
    /// Handed to it.
    pub limits: RiskLimits,
    /// Handed to it.
    pub fees: FeeSchedule,
    /// All order books.
    pub books: Books,
    /// The stream of records.
    pub journal: Journal,
    /// The counters.
    pub metrics: Metrics,
    /// The counterparties.
    pub directory: Directory,
    /// By worker.
    pub mail: Vec<Mailbox>,
    /// The gateway is to stop.
    pub stopping: AtomicBool,
}

impl Shared {
    /// The worker that a session belongs to.
    pub fn home(&self, id: SessionId) -> usize {
        id.0 as usize % self.mail.len()
    }

    /// Where a worker keeps a session of its own.
    pub fn slot(&self, id: SessionId) -> usize {
        id.0 as usize / self.mail.len()
    }

    /// How many bytes of sent messages each session may keep: all sessions share what the command line allows.
    pub fn keep_bytes(&self) -> usize {
        keep_bytes(&self.config, self.directory.count())
    }

    /// Whether the gateway is to stop.
    pub fn is_stopping(&self) -> bool {
        self.stopping.load(Ordering::Acquire)
    }

    /// Asks all workers to end.
    pub fn stop(&self) {
        self.stopping.store(true, Ordering::Release);
        self.mail.iter().for_each(Mailbox::wake);
    }
}

/// The share of one session in the memory for sent messages.
pub fn keep_bytes(config: &Config, sessions: usize) -> usize {
    ((config.resend_memory as usize) << 20) / sessions.max(64)
}
