//! The event loop: one listener, many connections, lines in both directions.

use std::io::{self, Read, Write};

use book::Market;
use hashbrown::HashMap;
use mio::net::{TcpListener, TcpStream};
use mio::{Events, Interest, Poll, Token};

use crate::audit::{Auditor, Note};
use crate::protocol::{self, Session};

const LISTENER: Token = Token(0);

struct Connection {
    stream: TcpStream,
    session: Session,
    received: Vec<u8>,
    to_send: Vec<u8>,
}

/// Serves until the listener fails.
pub fn serve(port: u16, audit: &Auditor) -> io::Result<()> {
    let mut poll = Poll::new()?;
    let mut events = Events::with_capacity(256);
    let mut listener = TcpListener::bind(([127, 0, 0, 1], port).into())?;
    poll.registry().register(&mut listener, LISTENER, Interest::READABLE)?;
    println!("listening on {}", listener.local_addr()?);
    let mut connections: HashMap<Token, Connection> = HashMap::new();
    let mut market = Market::default();
    let mut next = 1;
    loop {
        match poll.poll(&mut events, None) {
            Err(e) if e.kind() == io::ErrorKind::Interrupted => continue,
            other => other?,
        }
        for event in &events {
            if event.token() == LISTENER {
                accept(&listener, &poll, &mut connections, &mut next)?;
                continue;
            }
            let Some(connection) = connections.get_mut(&event.token()) else { continue };
            if pump(connection, &mut market, audit).is_err() {
                connections.remove(&event.token());
                let _ = audit.send(Note::Closed(event.token().0));
            }
        }
    }
}

#[inline(never)]
fn accept(
    listener: &TcpListener,
    poll: &Poll,
    connections: &mut HashMap<Token, Connection>,
    next: &mut usize,
) -> io::Result<()> {
    loop {
        let mut stream = match listener.accept() {
            Ok((stream, peer)) => {
                log::debug!("{peer} is here");
                stream
            }
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => return Ok(()),
            Err(e) => return Err(e),
        };
        let token = Token(*next);
        *next += 1;
        poll.registry().register(&mut stream, token, Interest::READABLE | Interest::WRITABLE)?;
        connections.insert(
            token,
            Connection { stream, session: Session::default(), received: Vec::new(), to_send: Vec::new() },
        );
    }
}

/// Reads what is there, answers every whole line, writes what fits.
#[inline(never)]
fn pump(connection: &mut Connection, market: &mut Market, audit: &Auditor) -> io::Result<()> {
    let mut buffer = [0; 4096];
    loop {
        match connection.stream.read(&mut buffer) {
            Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(n) => connection.received.extend_from_slice(&buffer[..n]),
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => break,
            Err(e) => return Err(e),
        }
    }
    while let Some(end) = connection.received.iter().position(|b| *b == b'\n') {
        let line: Vec<u8> = connection.received.drain(..=end).collect();
        let answer = protocol::handle(String::from_utf8_lossy(&line).trim(), &mut connection.session, market, audit);
        serde_json::to_writer(&mut connection.to_send, &answer)?;
        connection.to_send.push(b'\n');
    }
    while !connection.to_send.is_empty() {
        match connection.stream.write(&connection.to_send) {
            Ok(n) => drop(connection.to_send.drain(..n)),
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => break,
            Err(e) => return Err(e),
        }
    }
    Ok(())
}
