//! From accepted connections to messages, and the end of both.

use super::{Worker, FIRST_CONNECTION};
use crate::core::connection::Connection;
use crate::core::metrics::Counter;
use crate::core::record::Record;
use crate::fix::{frame, msg_type, tag, Frame, Message, SyntaxError};
use crate::state::{Session, Step};
use gateway_interface::CompId;
use mio::net::TcpStream;
use mio::{Interest, Token};
use std::hash::{Hash, Hasher};
use std::io::ErrorKind;
use std::time::Instant;

/// After that many full buffers it is another connection's turn.
const READS_PER_TURN: usize = 4;
const ACCEPTS_PER_TURN: usize = 256;

/// What becomes of the rest of the input.
enum Next {
    Continue,
    /// The connection belongs to another worker, with this message and all after it.
    HandOver(usize),
    Stop,
}

impl Worker {
    pub(super) fn accept(&mut self) {
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

    pub(super) fn adopt(&mut self, stream: TcpStream, bytes: Vec<u8>) {
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

    pub(super) fn connection(&mut self, index: usize) -> Option<&mut Connection> {
        self.connections.get_mut(index)?.as_mut()
    }

    /// Reads what is there. `to_the_end`: until the socket says that there is no more.
    pub(super) fn readable(&mut self, index: usize, to_the_end: bool) {
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
                self.observed(slot, |worker| worker.application(slot, message));
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

    /// Tells the agent whose message is handled, and how that went.
    fn observed(&mut self, slot: usize, handle: impl FnOnce(&mut Self)) {
        if self.shared.agent.is_none() {
            return handle(self);
        }
        // By its name, so that a counterparty that connects again stays in its arm of a canary.
        let name = self.home(slot).map(|home| home.session.comp);
        let _scope = name.map(|comp| livepatch::session::enter(key(comp)));
        let (failures, began) = (self.metrics().failures(), Instant::now());
        handle(self);
        if let Some(agent) = &self.shared.agent {
            agent.observe(self.metrics().failures() > failures, began.elapsed());
        }
    }

    /// The session is over; the connection is closed when it has taken what was written.
    pub(super) fn end_session(&mut self, slot: usize, why: &str) {
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
    pub(super) fn lost(&mut self, index: usize) {
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

    pub(super) fn close(&mut self, index: usize) {
        if let Some(connection) = self.connections.get_mut(index).and_then(Option::take) {
            self.drop_connection(index, connection);
        }
    }

    fn drop_connection(&mut self, index: usize, mut connection: Connection) {
        let _ = self.poll.registry().deregister(connection.stream());
        self.free.push(index);
    }
}

/// A number for a counterparty, the same in every run.
fn key(comp: CompId) -> u64 {
    let mut hasher = std::hash::DefaultHasher::new();
    comp.as_bytes().hash(&mut hasher);
    hasher.finish()
}
