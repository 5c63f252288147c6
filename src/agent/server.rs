//! The agent's end of the control socket: one thread, any number of commands, none of which can keep it busy.

use std::io::{IoSliceMut, Result as IoResult};
use std::mem::MaybeUninit;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::event::{eventfd, poll, EventfdFlags, PollFd, PollFlags, Timespec};
use rustix::io::Errno;
use rustix::net::{accept_with, recvmsg, send, SocketFlags};
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendFlags};

use super::peer::Peer;
pub use super::place::ServeError;
use super::place::{listen_at, Place};
use super::sealed::SealedPatch;
use super::wire::{Answer, Failure, Inbox, Request, WireError, MAX_REQUEST};

/// How many commands are connected at once; the oldest has to go when one more comes.
pub const MAX_CLIENTS: usize = 32;

/// How long a command may take to send its request.
pub const REQUEST_TIME: Duration = Duration::from_secs(2);

/// How long a command may take to read its answer.
pub const ANSWER_TIME: Duration = Duration::from_secs(5);

/// How many bytes of answers wait to be read, of all commands together.
const MAX_UNREAD: usize = 32 << 20;

/// How much is read of one command before the others get their turn.
const TURN_BYTES: usize = 64 << 10;

/// How long nobody is let in after the process ran out of descriptors or memory.
const SHORT_OF_DESCRIPTORS: Duration = Duration::from_millis(100);

/// The exit code for no permission.
const NO_PERMISSION: u8 = 6;

/// Ends a [`Server::serve`], from any thread.
#[derive(Clone, Debug)]
pub struct Stop(Arc<OwnedFd>);

impl Stop {
    /// One that has not been used.
    ///
    /// # Errors
    ///
    /// There is no descriptor left.
    pub fn new() -> IoResult<Self> {
        Ok(Self(Arc::new(eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?)))
    }

    /// Ends it, once the request that is being handled is answered. It stays so.
    pub fn stop(&self) {
        // It fails only where the counter is full: then it has been said often enough.
        let _ = rustix::io::write(&*self.0, &1_u64.to_ne_bytes());
    }
}

/// A control socket.
///
/// It belongs to the process that made it: a child that is forked neither serves it nor removes it.
#[derive(Debug)]
pub struct Server {
    listener: OwnedFd,
    place: Place,
}

impl Server {
    /// Listens at `path`. Commands find it without being told where if the file is named `livepatch*.sock`.
    ///
    /// The path is absolute; nobody but this user and root may be able to put something else in any folder on the way. The socket has mode
    /// 0600 from the start, whatever the umask says. One that an agent which is gone left behind is replaced, anything else that is there
    /// is left alone.
    ///
    /// # Errors
    ///
    /// The path is none of these, it is too long, or somebody listens there.
    pub fn bind(path: &Path) -> Result<Self, ServeError> {
        let (listener, place) = listen_at(path)?;
        Ok(Self { listener, place })
    }

    /// Where it is, without symbolic links.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.place.path
    }

    /// Answers requests, one after the other, until `stop` is used. A patch comes with [`Request::Check`] and [`Request::Apply`], and
    /// with no other.
    ///
    /// # Errors
    ///
    /// The kernel does not let it wait.
    pub fn serve(&self, stop: &Stop, handler: &mut Handler<'_>) -> Result<(), ServeError> {
        let mut clients: Vec<Client> = Vec::new();
        let mut closed_until = Instant::now();
        loop {
            let now = Instant::now();
            clients.retain(|c| c.deadline > now);
            let ready = self.wait(stop, closed_until, &clients)?;
            if ready.stop {
                return Ok(());
            }
            let mut each = ready.clients.into_iter();
            clients.retain_mut(|client| !each.next().unwrap_or(false) || client.go_on() == Next::Wait);
            if ready.listener {
                closed_until = self.let_in(&mut clients);
            }
            answer(&mut clients, handler);
        }
    }

    /// Until somebody can go on, or a deadline passes.
    fn wait(&self, stop: &Stop, closed_until: Instant, clients: &[Client]) -> Result<Ready, ServeError> {
        let now = Instant::now();
        let is_open = closed_until <= now;
        let deadlines = clients.iter().map(|c| c.deadline).chain((!is_open).then_some(closed_until));
        let timeout = deadlines.min().map(|at| {
            // Rounded up: not to look a moment too early, and again, and again.
            let left = at.saturating_duration_since(now) + Duration::from_millis(1);
            Timespec::try_from(left).unwrap_or(Timespec { tv_sec: 1, tv_nsec: 0 })
        });
        let door = if is_open { PollFlags::IN } else { PollFlags::empty() };
        let mut polled = vec![PollFd::new(&*stop.0, PollFlags::IN), PollFd::new(&self.listener, door)];
        polled.extend(clients.iter().map(|c| PollFd::new(&c.stream, c.waits_for())));
        match poll(&mut polled, timeout.as_ref()) {
            Ok(_) => {}
            Err(Errno::INTR) => return Ok(Ready::default()),
            Err(e) => return Err(ServeError::system("the agent cannot wait for commands")(e)),
        }
        let mut is_ready = polled.iter().map(|p| !p.revents().is_empty());
        let (stop, listener) = (is_ready.next().unwrap_or(false), is_ready.next().unwrap_or(false));
        Ok(Ready { stop, listener: listener && is_open, clients: is_ready.collect() })
    }

    /// Takes those who wait at the door; says until when nobody else is let in.
    fn let_in(&self, clients: &mut Vec<Client>) -> Instant {
        for _ in 0..MAX_CLIENTS {
            // Whoever has asked already is answered first.
            let idle = clients.iter().position(|c| !c.has_asked());
            if clients.len() >= MAX_CLIENTS && idle.is_none() {
                break;
            }
            match accept_with(&self.listener, SocketFlags::CLOEXEC | SocketFlags::NONBLOCK) {
                Ok(stream) => {
                    let Some(mut client) = Client::new(stream) else { continue };
                    if client.go_on() == Next::End {
                        continue;
                    }
                    if clients.len() >= MAX_CLIENTS {
                        idle.map(|oldest| clients.remove(oldest));
                    }
                    clients.push(client);
                }
                Err(Errno::INTR | Errno::CONNABORTED) => {}
                Err(Errno::AGAIN) => break,
                Err(_) => {
                    idle.map(|oldest| clients.remove(oldest));
                    return Instant::now() + SHORT_OF_DESCRIPTORS;
                }
            }
        }
        Instant::now()
    }
}

/// What a server does with a request.
pub type Handler<'h> = dyn FnMut(Request, Option<SealedPatch>, Peer) -> Answer + 'h;

/// Hands over the requests that are complete.
fn answer(clients: &mut Vec<Client>, handler: &mut Handler<'_>) {
    let began = Instant::now();
    for client in clients.iter_mut() {
        let State::Asked(asked) = &mut client.state else { continue };
        let answer = match std::mem::replace(asked, Err(WireError::CutOff)) {
            // A command that was ended while it waited for its turn asks for nothing any more.
            Ok(_) if has_left(&client.stream) => {
                client.deadline = began;
                continue;
            }
            Ok((request, patch)) => handler(request, patch, client.peer),
            Err(e) => Answer::Failed(Failure::other(1, e.to_string())),
        };
        client.state = State::Replying { frame: answer.encode(), sent: 0 };
        client.deadline = Instant::now() + ANSWER_TIME;
    }
    // While one was served, the others could not do their part.
    let busy = began.elapsed();
    clients.retain(|c| c.deadline > began);
    clients.iter_mut().for_each(|c| c.deadline += busy);
    clients.retain_mut(|c| c.unread() == 0 || c.go_on() == Next::Wait);
    let mut unread: usize = clients.iter().map(Client::unread).sum();
    clients.retain(|c| {
        let goes = unread > MAX_UNREAD && c.unread() > 0;
        unread -= if goes { c.unread() } else { 0 };
        !goes
    });
}

/// Whether nobody would read an answer.
fn has_left(stream: &OwnedFd) -> bool {
    let mut polled = [PollFd::new(stream, PollFlags::empty())];
    let now = Timespec { tv_sec: 0, tv_nsec: 0 };
    poll(&mut polled, Some(&now)).is_ok_and(|n| n > 0)
}

/// Where something can be done.
#[derive(Default)]
struct Ready {
    stop: bool,
    listener: bool,
    clients: Vec<bool>,
}

#[derive(PartialEq, Eq)]
enum Next {
    Wait,
    End,
}

/// How far a command has come.
enum State {
    Asking { inbox: Inbox, sent: Vec<OwnedFd> },
    Asked(Result<(Request, Option<SealedPatch>), WireError>),
    Replying { frame: Vec<u8>, sent: usize },
}

/// One connected command.
struct Client {
    stream: OwnedFd,
    peer: Peer,
    deadline: Instant,
    state: State,
}

impl Client {
    /// Somebody who may ask: root, or the user of this process.
    fn new(stream: OwnedFd) -> Option<Self> {
        let peer = Peer::of(&stream).ok()?;
        let own = rustix::process::geteuid().as_raw();
        if peer.uid != 0 && peer.uid != own {
            let why = format!("user {} may not command the agent of a process of user {own}", peer.uid);
            let refused = Answer::Failed(Failure::other(NO_PERMISSION, why)).encode();
            // So little always fits; and who does not read it is not waited for.
            let _ = send(&stream, &refused, SendFlags::NOSIGNAL | SendFlags::DONTWAIT);
            return None;
        }
        let state = State::Asking { inbox: Inbox::new(MAX_REQUEST), sent: Vec::new() };
        Some(Self { stream, peer, deadline: Instant::now() + REQUEST_TIME, state })
    }

    fn waits_for(&self) -> PollFlags {
        match self.state {
            State::Asking { .. } => PollFlags::IN,
            State::Asked(_) => PollFlags::empty(),
            State::Replying { .. } => PollFlags::OUT,
        }
    }

    fn has_asked(&self) -> bool {
        !matches!(self.state, State::Asking { .. })
    }

    /// How many bytes of its answer are kept for it.
    fn unread(&self) -> usize {
        match &self.state {
            State::Replying { frame, sent } => frame.len() - sent,
            _ => 0,
        }
    }

    /// Reads or writes what is possible now.
    fn go_on(&mut self) -> Next {
        match &mut self.state {
            State::Asking { .. } => self.read(),
            State::Asked(_) => Next::Wait,
            State::Replying { frame, sent } => {
                while let Some(rest) = frame.get(*sent..).filter(|rest| !rest.is_empty()) {
                    match send(&self.stream, rest, SendFlags::NOSIGNAL | SendFlags::DONTWAIT) {
                        Ok(n) => *sent += n,
                        Err(Errno::INTR) => {}
                        Err(Errno::AGAIN) => return Next::Wait,
                        Err(_) => break,
                    }
                }
                Next::End
            }
        }
    }

    fn read(&mut self) -> Next {
        let State::Asking { inbox, sent } = &mut self.state else { return Next::Wait };
        let mut bytes = [0; 8 << 10];
        for _ in 0..TURN_BYTES / bytes.len() {
            let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(4))];
            let mut control = RecvAncillaryBuffer::new(&mut space);
            let flags = RecvFlags::CMSG_CLOEXEC | RecvFlags::DONTWAIT;
            let received = match recvmsg(&self.stream, &mut [IoSliceMut::new(&mut bytes)], &mut control, flags) {
                Ok(received) => received,
                Err(Errno::INTR) => continue,
                Err(Errno::AGAIN) => return Next::Wait,
                Err(_) => return Next::End,
            };
            for message in control.drain() {
                if let RecvAncillaryMessage::ScmRights(descriptors) = message {
                    sent.extend(descriptors);
                }
            }
            let asked = if sent.len() > 1 || received.flags.contains(ReturnFlags::CTRUNC) {
                Err(WireError::Descriptor(TOO_MANY.into()))
            } else if received.bytes == 0 {
                if inbox.is_empty() {
                    return Next::End;
                }
                Err(WireError::CutOff)
            } else {
                match inbox.push(bytes.get(..received.bytes).unwrap_or_default()) {
                    Ok(None) => continue,
                    Ok(Some(body)) => complete(&body, std::mem::take(sent)),
                    Err(e) => Err(e),
                }
            };
            self.state = State::Asked(asked);
            break;
        }
        Next::Wait
    }
}

const TOO_MANY: &str = "more descriptors came than the request takes";

/// A request with what came along.
fn complete(body: &[u8], mut sent: Vec<OwnedFd>) -> Result<(Request, Option<SealedPatch>), WireError> {
    let request = Request::decode(body)?;
    let patch = match (request.takes_patch(), sent.pop()) {
        (true, Some(patch)) => Some(SealedPatch::check(patch)?),
        (true, None) => return Err(WireError::Descriptor("the patch has to come with the request".into())),
        (false, Some(_)) => return Err(WireError::Descriptor(TOO_MANY.into())),
        (false, None) => None,
    };
    Ok((request, patch))
}
