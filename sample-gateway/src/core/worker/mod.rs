//! A worker: one epoll loop, its connections, and the sessions that belong to it.
//!
//! Work is done in turns. A turn reads what is there, lets sessions and books act, and collects what is to be sent; at its
//! end the turn's records are appended to the journal, and the output is released as soon as the journal's position at
//! that moment is durable (see [`crate::core::journal`] for what that promises). So one fsync pays for the orders of a turn, and
//! of all turns of all workers while it lasts.
//!
//! *Invariant:* a session's messages are sent in the order of their numbers, and none before the records are durable that
//! it depends on.

mod intake;

use crate::core::config::Acknowledge;
use crate::core::connection::{Connection, MAX_BACKLOG_BYTES};
use crate::core::metrics::{Counter, ThreadMetrics};
use crate::core::record::Record;
use crate::core::shared::{Adoption, Shared};
use crate::fix::{Encoder, Parser};
use crate::state::{Output, Session, Step};
use gateway_interface::{Execution, SessionId};
use mio::net::TcpListener;
use mio::{Events, Interest, Poll, Token};
use std::collections::VecDeque;
use std::io::ErrorKind;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

/// The token that mail arrives with.
pub const WAKER: Token = Token(0);
const LISTENER: Token = Token(1);
const FIRST_CONNECTION: usize = 2;

/// How long a loop sleeps at most.
const TICK: Duration = Duration::from_millis(50);
/// A round over all sessions is spread over this many ticks, so that no tick takes long.
const TICKS_PER_ROUND: usize = 20;
const READ_BUFFER_BYTES: usize = 64 << 10;
/// A connection that has not logged on, or not taken its last output, by then is closed.
const HANDSHAKE_PATIENCE_MS: u64 = 10_000;
const LOGOUT_PATIENCE_MS: u64 = 2_000;
const STOP_PATIENCE: Duration = Duration::from_secs(3);

/// Milliseconds since 1970.
pub fn now_ms() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
}

/// A session and where it is connected.
pub(in crate::core) struct Home {
    pub(in crate::core) session: Session,
    pub(in crate::core) connection: Option<usize>,
    dirty: bool,
}

/// Output that waits for the journal.
struct Release {
    position: u64,
    index: usize,
    serial: u64,
    end: u64,
    since: Instant,
    orders: u64,
}

/// A worker thread's whole state.
pub struct Worker {
    pub(in crate::core) index: usize,
    pub(in crate::core) shared: Arc<Shared>,
    pub(in crate::core) now_ms: u64,
    pub(in crate::core) happened: Vec<Execution>,
    pub(in crate::core) body: Vec<u8>,
    pub(in crate::core) group: Vec<u8>,
    /// Records of this turn.
    pub(in crate::core) log: Vec<u8>,
    /// Workers that have mail and don't know it, one bit each.
    pub(in crate::core) to_wake: u64,
    /// New orders in this turn.
    pub(in crate::core) turn_orders: u64,
    sessions: Vec<Option<Box<Home>>>,
    poll: Poll,
    listener: Option<TcpListener>,
    connections: Vec<Option<Connection>>,
    free: Vec<usize>,
    next_serial: u64,
    parser: Parser,
    encoder: Encoder,
    buffer: Vec<u8>,
    adoptions: Vec<Adoption>,
    arrived: Vec<Execution>,
    dirty_connections: Vec<usize>,
    dirty_sessions: Vec<usize>,
    /// Connections with input left to read.
    again: Vec<usize>,
    accept_again: bool,
    waiting: VecDeque<Release>,
    turn_start: Instant,
    keep_bytes: usize,
    next_tick: Instant,
    tick: usize,
    stop_at: Option<Instant>,
}

impl Worker {
    /// A worker with the sessions that the journal knows of.
    ///
    /// # Errors
    /// When the listening socket can't be watched.
    pub fn new(
        index: usize,
        poll: Poll,
        listener: std::net::TcpListener,
        shared: Arc<Shared>,
        known: Vec<Session>,
    ) -> std::io::Result<Self> {
        listener.set_nonblocking(true)?;
        let mut listener = TcpListener::from_std(listener);
        poll.registry().register(&mut listener, LISTENER, Interest::READABLE)?;
        let mut worker = Self {
            index,
            now_ms: now_ms(),
            happened: Vec::with_capacity(64),
            body: Vec::with_capacity(512),
            group: Vec::with_capacity(1024),
            log: Vec::with_capacity(64 << 10),
            to_wake: 0,
            turn_orders: 0,
            sessions: Vec::new(),
            poll,
            listener: Some(listener),
            connections: Vec::new(),
            free: Vec::new(),
            next_serial: 0,
            parser: Parser::new(),
            encoder: Encoder::new(),
            buffer: vec![0; READ_BUFFER_BYTES],
            adoptions: Vec::new(),
            arrived: Vec::new(),
            dirty_connections: Vec::new(),
            dirty_sessions: Vec::new(),
            again: Vec::new(),
            accept_again: false,
            waiting: VecDeque::new(),
            turn_start: Instant::now(),
            keep_bytes: shared.keep_bytes(),
            next_tick: Instant::now() + TICK,
            tick: 0,
            stop_at: None,
            shared,
        };
        known.into_iter().for_each(|session| worker.adopt_session(session));
        Ok(worker)
    }

    /// Works until the gateway stops.
    pub fn run(mut self) {
        let mut events = Events::with_capacity(1_024);
        loop {
            let wait = if self.again.is_empty() { TICK } else { Duration::ZERO };
            match self.poll.poll(&mut events, Some(wait)) {
                Err(e) if e.kind() != ErrorKind::Interrupted => {
                    eprintln!("sample-gateway: worker {}: epoll: {e}", self.index);
                    return;
                }
                _ => {}
            }
            self.turn_start = Instant::now();
            self.now_ms = now_ms();
            self.keep_bytes = self.shared.keep_bytes();
            for index in std::mem::take(&mut self.again) {
                self.readable(index, true);
            }
            for event in &events {
                match event.token() {
                    WAKER => {}
                    LISTENER => self.accept(),
                    Token(n) => {
                        let index = n - FIRST_CONNECTION;
                        if event.is_writable() {
                            self.flush(index);
                        }
                        if event.is_readable() || event.is_error() || event.is_read_closed() {
                            self.readable(index, event.is_read_closed() || event.is_error());
                        }
                    }
                }
            }
            self.read_mail();
            if self.turn_start >= self.next_tick {
                self.next_tick = self.turn_start + TICK;
                self.on_tick();
            }
            self.end_turn();
            if self.shared.is_stopping() && self.has_stopped() {
                return;
            }
        }
    }

    pub(in crate::core) fn metrics(&self) -> &ThreadMetrics {
        &self.shared.metrics.threads[self.index]
    }

    /// A session of this worker.
    pub(in crate::core) fn home(&mut self, slot: usize) -> Option<&mut Home> {
        self.sessions.get_mut(slot)?.as_deref_mut()
    }

    /// Lets a session act; notes what it wrote and whether its numbers moved.
    pub(in crate::core) fn with_session<R>(
        &mut self,
        slot: usize,
        act: impl FnOnce(&mut Session, &mut Output<'_>) -> R,
    ) -> Option<R> {
        let home = self.sessions.get_mut(slot)?.as_deref_mut()?;
        let index = home.connection;
        let connection = index.and_then(|i| self.connections.get_mut(i)?.as_mut());
        let before = home.session.sequence();
        let mut output = Output {
            bytes: None,
            encoder: &mut self.encoder,
            us: self.shared.config.comp_id.as_bytes(),
            now_ms: self.now_ms,
            keep_bytes: self.keep_bytes,
        };
        let result = match (connection, index) {
            (Some(connection), Some(index)) => {
                let end = connection.output.len();
                output.bytes = Some(&mut connection.output);
                let result = act(&mut home.session, &mut output);
                if connection.output.len() > end && !connection.dirty {
                    connection.dirty = true;
                    self.dirty_connections.push(index);
                }
                result
            }
            _ => act(&mut home.session, &mut output),
        };
        if home.session.sequence() != before && !home.dirty {
            home.dirty = true;
            self.dirty_sessions.push(slot);
        }
        Some(result)
    }

    fn adopt_session(&mut self, session: Session) {
        let slot = self.shared.slot(session.id);
        if self.sessions.len() <= slot {
            self.sessions.resize_with(slot + 1, || None);
        }
        self.sessions[slot] = Some(Box::new(Home { session, connection: None, dirty: false }));
    }

    fn flush(&mut self, index: usize) {
        let Some(connection) = self.connection(index) else { return };
        match connection.flush() {
            Err(_) => self.lost(index),
            Ok(()) if connection.closing && connection.backlog() == 0 => self.close(index),
            Ok(()) if connection.backlog() > MAX_BACKLOG_BYTES => {
                self.metrics().add(Counter::SlowConsumers, 1);
                self.lost(index);
            }
            Ok(()) => {}
        }
    }

    fn read_mail(&mut self) {
        let mut adoptions = std::mem::take(&mut self.adoptions);
        self.shared.mail[self.index].adoptions(&mut adoptions);
        for (stream, bytes) in adoptions.drain(..) {
            self.adopt(stream, bytes);
        }
        self.adoptions = adoptions;
        self.read_executions();
    }

    /// What has happened to orders of this worker's sessions, in the order of their books.
    pub(in crate::core) fn read_executions(&mut self) {
        let mut arrived = std::mem::take(&mut self.arrived);
        self.shared.mail[self.index].executions(&mut arrived);
        for execution in arrived.drain(..) {
            self.happened_to(&execution);
        }
        self.arrived = arrived;
    }

    /// A slice of all sessions and connections.
    fn on_tick(&mut self) {
        if self.accept_again {
            self.accept();
        }
        let part = self.tick % TICKS_PER_ROUND;
        self.tick += 1;
        for slot in (part..self.sessions.len()).step_by(TICKS_PER_ROUND) {
            if let Some(Step::Close(why)) = self.with_session(slot, |session, out| session.on_timer(out)) {
                self.end_session(slot, why);
            }
        }
        for index in (part..self.connections.len()).step_by(TICKS_PER_ROUND) {
            let now_ms = self.now_ms;
            let late = self
                .connection(index)
                .is_some_and(|c| c.session.is_none() && now_ms.saturating_sub(c.since_ms) > HANDSHAKE_PATIENCE_MS);
            if late {
                self.close(index);
            }
        }
    }

    fn end_turn(&mut self) {
        for slot in std::mem::take(&mut self.dirty_sessions) {
            let Some(home) = self.sessions.get_mut(slot).and_then(Option::as_mut) else { continue };
            home.dirty = false;
            let id: SessionId = home.session.id;
            let (next_in, next_out) = home.session.sequence();
            Record::Sequence { id, next_in, next_out }.encode(&mut self.log);
        }
        self.shared.journal.append(&self.log);
        self.log.clear();
        let at_once = self.shared.config.acknowledge == Acknowledge::Received;
        let position = if at_once { 0 } else { self.shared.journal.position() };
        let mut dirty = std::mem::take(&mut self.dirty_connections);
        for index in dirty.drain(..) {
            let since = self.turn_start;
            let Some(connection) = self.connection(index) else { continue };
            connection.dirty = false;
            let release =
                Release { position, index, serial: connection.serial, end: connection.end(), since, orders: 0 };
            self.waiting.push_back(release);
        }
        self.dirty_connections = dirty;
        // The turn's orders were all read at its start: its last release stands for them.
        let orders = std::mem::take(&mut self.turn_orders);
        if let Some(last) = self.waiting.back_mut() {
            last.orders += orders;
        }
        self.release();
    }

    fn release(&mut self) {
        let durable = self.shared.journal.durable();
        while self.waiting.front().is_some_and(|w| w.position <= durable) {
            let Some(ready) = self.waiting.pop_front() else { return };
            if let Some(connection) = self.connection(ready.index).filter(|c| c.serial == ready.serial) {
                connection.release(ready.end);
                self.flush(ready.index);
            }
            if ready.orders > 0 {
                self.metrics().latency(ready.since.elapsed(), ready.orders);
            }
        }
    }

    /// Takes no more connections, logs all sessions out, and says whether that is done.
    fn has_stopped(&mut self) -> bool {
        let deadline = match self.stop_at {
            Some(at) => at,
            None => {
                let at = Instant::now() + STOP_PATIENCE;
                self.stop_at = Some(at);
                self.listener = None;
                for slot in 0..self.sessions.len() {
                    self.with_session(slot, |session, out| {
                        session.begin_logout("the gateway stops", LOGOUT_PATIENCE_MS, out);
                    });
                }
                self.end_turn();
                at
            }
        };
        let quiet = self.waiting.is_empty() && self.connections.iter().all(Option::is_none);
        quiet || Instant::now() >= deadline
    }
}
