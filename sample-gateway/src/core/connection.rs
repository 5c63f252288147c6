//! One TCP connection: bytes in, bytes out.

use gateway_interface::SessionId;
use mio::net::TcpStream;
use std::io::{ErrorKind, Read, Write};

/// A peer that lets this much pile up is cut off.
pub const MAX_BACKLOG_BYTES: usize = 8 << 20;

/// Output memory above this is given back once it has been sent.
const KEPT_CAPACITY_BYTES: usize = 64 << 10;

/// A connection, logged on or not.
#[derive(Debug)]
pub struct Connection {
    /// Told apart from an earlier one with the same token.
    pub serial: u64,
    /// Once logged on.
    pub session: Option<SessionId>,
    /// When the connection was made.
    pub since_ms: u64,
    /// Close as soon as all output is sent.
    pub closing: bool,
    /// Something was written since the end of the last turn.
    pub dirty: bool,
    /// The beginning of a message whose end has not come yet.
    pub rest: Vec<u8>,
    /// Written and not sent; the session writes here.
    pub output: Vec<u8>,
    stream: TcpStream,
    sent: usize,
    /// How much of the output may be sent: what it says is durable.
    released: usize,
    /// Position of the first byte of `output`, counted from the beginning of the connection.
    base: u64,
}

impl Connection {
    /// A new connection.
    pub fn new(stream: TcpStream, serial: u64, since_ms: u64) -> Self {
        Self {
            serial,
            session: None,
            since_ms,
            closing: false,
            dirty: false,
            rest: Vec::new(),
            output: Vec::new(),
            stream,
            sent: 0,
            released: 0,
            base: 0,
        }
    }

    /// The socket, to be registered with an event loop.
    pub fn stream(&mut self) -> &mut TcpStream {
        &mut self.stream
    }

    /// Gives the socket and the unread bytes to another worker.
    pub fn into_parts(self) -> (TcpStream, Vec<u8>) {
        (self.stream, self.rest)
    }

    /// Reads once. `Ok(None)`: nothing there now. `Ok(Some(0))`: the peer has closed.
    ///
    /// # Errors
    /// That of the socket.
    pub fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<Option<usize>> {
        loop {
            match self.stream.read(buffer) {
                Ok(n) => return Ok(Some(n)),
                Err(e) if e.kind() == ErrorKind::WouldBlock => return Ok(None),
                Err(e) if e.kind() == ErrorKind::Interrupted => {}
                Err(e) => return Err(e),
            }
        }
    }

    /// Where the output ends, counted from the beginning of the connection.
    pub fn end(&self) -> u64 {
        self.base + self.output.len() as u64
    }

    /// Allows what was written before this position to be sent.
    pub fn release(&mut self, end: u64) {
        let released = usize::try_from(end.saturating_sub(self.base)).unwrap_or(usize::MAX);
        self.released = self.released.max(released.min(self.output.len()));
    }

    /// Sends what may be sent, as far as the socket takes it.
    ///
    /// # Errors
    /// That of the socket.
    pub fn flush(&mut self) -> std::io::Result<()> {
        while self.sent < self.released {
            match self.stream.write(&self.output[self.sent..self.released]) {
                Ok(0) => return Err(ErrorKind::WriteZero.into()),
                Ok(n) => self.sent += n,
                Err(e) if e.kind() == ErrorKind::WouldBlock => break,
                Err(e) if e.kind() == ErrorKind::Interrupted => {}
                Err(e) => return Err(e),
            }
        }
        if self.sent == self.output.len() {
            self.forget(self.sent);
            if self.output.capacity() > KEPT_CAPACITY_BYTES {
                self.output = Vec::new();
            }
        } else if self.sent > KEPT_CAPACITY_BYTES {
            self.forget(self.sent);
        }
        Ok(())
    }

    /// How much has piled up.
    pub fn backlog(&self) -> usize {
        self.output.len() - self.sent
    }

    fn forget(&mut self, bytes: usize) {
        self.output.drain(..bytes);
        self.base += bytes as u64;
        self.sent -= bytes;
        self.released -= bytes;
    }
}
