//! A worker: one epoll loop, its connections, and the sessions that belong to it.
//!
//! Work is done in turns. A turn reads what is there, lets sessions and books act, and collects what is to be sent; at its
//! end the turn's records are appended to the journal, and the output is released as soon as the journal's position at
//! that moment is durable (see [`super::journal`] for what that promises). So one fsync pays for the orders of a turn, and
//! of all turns of all workers while it lasts.
//!
//! *Invariant:* a session's messages are sent in the order of their numbers, and none before the records are durable that
//! it depends on.

use super::config::Acknowledge;
use super::connection::{Connection, MAX_BACKLOG_BYTES};
use super::metrics::{Counter, ThreadMetrics};
use super::record::Record;
use super::shared::{Adoption, Shared};
use crate::fix::{frame, msg_type, tag, Encoder, Frame, Message, Parser, SyntaxError};
use crate::state::{Output, Session, Step};
use gateway_interface::{CompId, Execution, SessionId};
use mio::net::{TcpListener, TcpStream};
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
/// After that many full buffers it is another connection's turn.
const READS_PER_TURN: usize = 4;
const ACCEPTS_PER_TURN: usize = 256;
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
pub(super) struct Home {
    pub(super) session: Session,
    pub(super) connection: Option<usize>,
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

/// What becomes of the rest of the input.
enum Next {
    Continue,
    /// The connection belongs to another worker, with this message and all after it.
    HandOver(usize),
    Stop,
}

/// A worker thread's whole state.
pub struct Worker {
    pub(super) index: usize,
    pub(super) shared: Arc<Shared>,
    pub(super) now_ms: u64,
    pub(super) happened: Vec<Execution>,
    pub(super) body: Vec<u8>,
    pub(super) group: Vec<u8>,
    /// Records of this turn.
    pub(super) log: Vec<u8>,
    /// Workers that have mail and don't know it, one bit each.
    pub(super) to_wake: u64,
    /// New orders in this turn.
    pub(super) turn_orders: u64,
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

    pub(super) fn metrics(&self) -> &ThreadMetrics {
        &self.shared.metrics.threads[self.index]
    }

    /// A session of this worker.
    pub(super) fn home(&mut self, slot: usize) -> Option<&mut Home> {
        self.sessions.get_mut(slot)?.as_deref_mut()
    }

    /// Lets a session act; notes what it wrote and whether its numbers moved.
    pub(super) fn with_session<R>(
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

    fn accept(&mut self) {
        self.accept_again = false;
        for _ in 0..ACCEPTS_PER_TURN {
            let Some(listener) = &self.listener else { return };
            match listener.accept() {
                Ok((stream, _)) => {
                    self.adopt(stream, Vec::new());
                }
                Err(e) if e.kind() == ErrorKind::WouldBlock => return,
                Err(e) if e.kind() == ErrorKind::ConnectionAborted => {}
                Err(e) => {
                    eprintln!("sample-gateway: accept: {e}; trying again");
                    break;
                }
            }
        }
        // Edge-triggered: what is left would not be announced again.
        self.accept_again = true;
    }

    fn adopt(&mut self, stream: TcpStream, bytes: Vec<u8>) {
        // Without it, answers wait for the peer's delayed acknowledgements.
        let _ = stream.set_nodelay(true);
        let index = self.free.pop().unwrap_or(self.connections.len());
        let mut connection = Connection::new(stream, self.next_serial, self.now_ms);
        self.next_serial += 1;
        let interest = Interest::READABLE | Interest::WRITABLE;
        let token = Token(index + FIRST_CONNECTION);
        if let Err(error) = self.poll.registry().register(connection.stream(), token, interest) {
            eprintln!("sample-gateway: epoll: {error}");
            self.free.push(index);
            return;
        }
        if index == self.connections.len() {
            self.connections.push(None);
        }
        self.connections[index] = Some(connection);
        if !bytes.is_empty() {
            self.input(index, &bytes);
        }
    }

    fn connection(&mut self, index: usize) -> Option<&mut Connection> {
        self.connections.get_mut(index)?.as_mut()
    }

    /// Reads what is there. `to_the_end`: until the socket says that there is no more.
    fn readable(&mut self, index: usize, to_the_end: bool) {
        let mut buffer = std::mem::take(&mut self.buffer);
        let mut full = 0;
        while let Some(connection) = self.connection(index) {
            match connection.read(&mut buffer) {
                Ok(None) => break,
                Ok(Some(0)) | Err(_) => {
                    self.lost(index);
                    break;
                }
                Ok(Some(n)) => {
                    self.input(index, &buffer[..n]);
                    // A short read has emptied the socket, and epoll(7) promises an event for what comes later; but an
                    // end of the stream that had come by then was announced together with the data.
                    if n < buffer.len() && !to_the_end {
                        break;
                    }
                }
            }
            full += 1;
            if full == READS_PER_TURN {
                self.again.push(index);
                break;
            }
        }
        self.buffer = buffer;
    }

    fn input(&mut self, index: usize, bytes: &[u8]) {
        let Some(connection) = self.connection(index) else { return };
        let mut joined = std::mem::take(&mut connection.rest);
        let data = if joined.is_empty() {
            bytes
        } else {
            joined.extend_from_slice(bytes);
            &joined
        };
        let mut at = 0;
        let mut new_home = None;
        while at < data.len() {
            match frame(&data[at..]) {
                Frame::Incomplete => break,
                Frame::Garbled(n) => {
                    self.metrics().add(Counter::Garbled, 1);
                    at += n;
                }
                Frame::Message(n) => match self.message(index, &data[at..at + n]) {
                    Next::Continue => at += n,
                    Next::Stop => return,
                    Next::HandOver(home) => {
                        new_home = Some(home);
                        break;
                    }
                },
            }
        }
        let rest = data[at..].to_vec();
        if let Some(connection) = self.connection(index) {
            connection.rest = rest;
        }
        if let Some(home) = new_home {
            if let Some(mut connection) = self.connections[index].take() {
                let _ = self.poll.registry().deregister(connection.stream());
                self.free.push(index);
                let (stream, bytes) = connection.into_parts();
                self.shared.mail[home].post_adoption((stream, bytes));
            }
        }
    }

    fn message(&mut self, index: usize, bytes: &[u8]) -> Next {
        let Some(connection) = self.connection(index) else { return Next::Stop };
        if connection.closing {
            return Next::Stop;
        }
        let session = connection.session;
        let mut parser = std::mem::take(&mut self.parser);
        let (message, syntax) = parser.parse(bytes);
        let next = match session {
            None => self.first_message(index, &message, syntax),
            Some(id) => {
                self.metrics().add(Counter::Messages, 1);
                self.next_message(self.shared.slot(id), &message, syntax)
            }
        };
        self.parser = parser;
        next
    }

    /// Until a Logon that is meant for us, nobody is owed an answer.
    fn first_message(&mut self, index: usize, message: &Message<'_>, syntax: Result<(), SyntaxError>) -> Next {
        let comp = message.get(tag::SENDER_COMP_ID).and_then(CompId::new);
        let for_us = message.version_is_ours()
            && message.msg_type() == msg_type::LOGON
            && message.get(tag::TARGET_COMP_ID) == Some(self.shared.config.comp_id.as_bytes());
        let (Some(comp), true, Ok(()), false) = (comp, for_us, syntax, self.shared.is_stopping()) else {
            self.close(index);
            return Next::Stop;
        };
        let id = self.shared.directory.find(comp, &self.shared.journal);
        let home = self.shared.home(id);
        if home != self.index {
            return Next::HandOver(home);
        }
        self.metrics().add(Counter::Messages, 1);
        let slot = self.shared.slot(id);
        if self.home(slot).is_none() {
            self.adopt_session(Session::new(id, comp));
        }
        let Some(home) = self.home(slot) else { return Next::Stop };
        if home.connection.is_some() {
            // The living connection keeps the session: nobody can take it over by knowing its name.
            self.close(index);
            return Next::Stop;
        }
        home.connection = Some(index);
        let step = self.with_session(slot, |session, out| session.on_logon(message, out));
        if step == Some(Step::Done) {
            if message.flag(tag::RESET_SEQ_NUM_FLAG) {
                Record::Reset { id }.encode(&mut self.log);
            }
            if let Some(connection) = self.connection(index) {
                connection.session = Some(id);
            }
            self.metrics().add(Counter::Logons, 1);
            self.metrics().sessions(1);
            return Next::Continue;
        }
        if let Some(home) = self.home(slot) {
            home.connection = None;
        }
        self.begin_close(index);
        Next::Stop
    }

    fn next_message(&mut self, slot: usize, message: &Message<'_>, syntax: Result<(), SyntaxError>) -> Next {
        let step = self.with_session(slot, |session, out| session.on_message(message, syntax, out));
        match step {
            Some(Step::Done) => Next::Continue,
            Some(Step::Application) => {
                self.application(slot, message);
                Next::Continue
            }
            Some(Step::Unsupported) => {
                self.unsupported(slot, message);
                Next::Continue
            }
            Some(Step::Close(why)) => {
                self.end_session(slot, why);
                Next::Stop
            }
            None => Next::Stop,
        }
    }

    /// The session is over; the connection is closed when it has taken what was written.
    fn end_session(&mut self, slot: usize, why: &str) {
        let Some(home) = self.home(slot) else { return };
        let comp = home.session.comp;
        home.session.disconnected();
        let Some(index) = home.connection.take() else { return };
        self.metrics().sessions(-1);
        if why != "logged out" {
            eprintln!("sample-gateway: {comp}: {why}");
            self.metrics().add(Counter::Disconnects, 1);
        }
        if let Some(connection) = self.connection(index) {
            connection.session = None;
        }
        self.begin_close(index);
    }

    fn begin_close(&mut self, index: usize) {
        let now_ms = self.now_ms;
        if let Some(connection) = self.connection(index) {
            connection.closing = true;
            connection.since_ms = now_ms;
            if !connection.dirty {
                connection.dirty = true;
                self.dirty_connections.push(index);
            }
        }
    }

    /// The peer is gone.
    fn lost(&mut self, index: usize) {
        let Some(connection) = self.connections.get_mut(index).and_then(Option::take) else { return };
        let session = connection.session;
        self.drop_connection(index, connection);
        let Some(id) = session else { return };
        self.metrics().add(Counter::Disconnects, 1);
        self.metrics().sessions(-1);
        let slot = self.shared.slot(id);
        if let Some(home) = self.home(slot) {
            home.connection = None;
            home.session.disconnected();
        }
    }

    fn close(&mut self, index: usize) {
        if let Some(connection) = self.connections.get_mut(index).and_then(Option::take) {
            self.drop_connection(index, connection);
        }
    }

    fn drop_connection(&mut self, index: usize, mut connection: Connection) {
        let _ = self.poll.registry().deregister(connection.stream());
        self.free.push(index);
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
    pub(super) fn read_executions(&mut self) {
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
