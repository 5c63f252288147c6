//! The command's end of the control socket: finds the agent of a process, and asks it.

use std::ffi::OsStr;
use std::io::IoSlice;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::event::{poll, PollFd, PollFlags, Timespec};
use rustix::fs::{open, openat2, Mode, OFlags, ResolveFlags};
use rustix::io::Errno;
use rustix::net::{connect, recv, sendmsg, socket_with, AddressFamily, RecvFlags, SendFlags};
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SocketAddrUnix, SocketFlags, SocketType};
use rustix::process::{pidfd_getfd, pidfd_open, PidfdFlags, PidfdGetfdFlags};

use super::peer::Peer;
use super::sealed::SealedPatch;
use super::wire::{Answer, Inbox, Request, WireError, MAX_ANSWER};

/// How long a full queue is waited for before the next look.
const FULL: Duration = Duration::from_millis(5);

/// Why an agent could not be asked. What was asked of it may have been done all the same, but for [`Unreachable`](Self::Unreachable).
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ClientError {
    /// There is no way to its socket.
    #[error("its agent cannot be reached at {}: {error}", path.display())]
    Unreachable {
        /// Where it listens.
        path: PathBuf,
        /// Why.
        error: std::io::Error,
    },
    /// Somebody else answers there.
    #[error("process {found} listens at {}, in place of its agent", path.display())]
    Another {
        /// Where.
        path: PathBuf,
        /// Who.
        found: i32,
    },
    /// It did not answer in time.
    #[error("its agent has not answered within {} s; it may still be at work: livepatch status tells", within.as_secs_f64())]
    Silent {
        /// How long it was given.
        within: Duration,
    },
    /// It closed the connection.
    #[error("its agent went away without an answer")]
    Closed,
    /// A system call failed.
    #[error("its agent could not be asked: {0}")]
    System(#[from] std::io::Error),
    /// Question or answer are none.
    #[error("its agent could not be asked: {0}")]
    Wire(#[from] WireError),
}

impl From<Errno> for ClientError {
    fn from(e: Errno) -> Self {
        Self::System(e.into())
    }
}

/// A way to the agent of a process.
#[derive(Debug)]
pub struct Client {
    pid: i32,
    /// As the process sees it.
    path: PathBuf,
}

/// The agent of this process, if one listens: a socket of the process itself, named `livepatch*.sock`.
///
/// A child that inherited the socket is not taken for the agent, nor is another process at the same path: the kernel has noted who
/// listens.
#[must_use]
pub fn find(pid: i32) -> Option<Client> {
    let table = std::fs::read(format!("/proc/{pid}/net/unix")).ok()?;
    let listed: Vec<(&[u8], &Path)> = table.split(|b| *b == b'\n').filter_map(listening).collect();
    // A process with 20,000 connections has as many descriptors; without such a name in the table they are not looked at.
    if listed.is_empty() {
        return None;
    }
    let descriptors = std::fs::read_dir(format!("/proc/{pid}/fd")).ok()?.filter_map(|d| {
        let d = d.ok()?;
        let target = std::fs::read_link(d.path()).ok()?;
        let inode = target.as_os_str().as_bytes().strip_prefix(b"socket:[")?.strip_suffix(b"]")?.to_owned();
        Some((d.file_name().to_str()?.parse::<i32>().ok()?, inode))
    });
    descriptors.filter_map(|(number, inode)| Some((number, listed.iter().find(|(i, _)| *i == inode)?.1))).find_map(
        |(number, path)| {
            let client = Client::at(pid, path);
            match client.connect_now() {
                Ok(_) | Err(ClientError::System(_)) => Some(client),
                // Its file may have been removed: then only its descriptor says whose it is.
                Err(ClientError::Unreachable { .. }) => (listener_of(pid, number) == Some(pid)).then_some(client),
                Err(_) => None,
            }
        },
    )
}

/// Inode and path of a line of /proc/PID/net/unix that is of a listening socket with the name of an agent's.
fn listening(line: &[u8]) -> Option<(&[u8], &Path)> {
    const LISTENS: u32 = 1 << 16; // __SO_ACCEPTCON
    let mut rest = line;
    let mut field = || {
        let from = rest.iter().position(|b| *b != b' ')?;
        let to = rest.iter().skip(from).position(|b| *b == b' ').map_or(rest.len(), |n| from + n);
        let (field, after) = (rest.get(from..to)?, rest.get(to..)?);
        rest = after;
        Some(field)
    };
    let [_, _, _, flags, _, _, inode] = [field()?, field()?, field()?, field()?, field()?, field()?, field()?];
    let path = Path::new(OsStr::from_bytes(rest.strip_prefix(b" ")?));
    let flags = u32::from_str_radix(std::str::from_utf8(flags).ok()?, 16).ok()?;
    let name = path.file_name()?.as_bytes();
    let is_agent = name.starts_with(b"livepatch") && name.ends_with(b".sock") && path.is_absolute();
    (flags & LISTENS != 0 && is_agent).then_some((inode, path))
}

/// Who began to listen on a socket of the process.
fn listener_of(pid: i32, number: i32) -> Option<i32> {
    let process = pidfd_open(rustix::process::Pid::from_raw(pid)?, PidfdFlags::empty()).ok()?;
    let socket = pidfd_getfd(&process, number, PidfdGetfdFlags::empty()).ok()?;
    Peer::of(&socket).ok().map(|p| p.pid)
}

impl Client {
    /// The agent of a process that listens at this path, as the process sees it.
    #[must_use]
    pub fn at(pid: i32, path: &Path) -> Self {
        Self { pid, path: path.to_owned() }
    }

    /// Where the agent listens, as its process sees it.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Asks, and waits for the answer. The patch goes along with [`Request::Check`] and [`Request::Apply`].
    ///
    /// # Errors
    ///
    /// There is no answer within that time. What was asked may be done all the same, unless the agent was
    /// [unreachable](ClientError::Unreachable).
    pub fn ask(&self, request: &Request, patch: Option<&[u8]>, within: Duration) -> Result<Answer, ClientError> {
        let frame = request.encode()?;
        let until = Instant::now() + within;
        let sealed = patch.map(SealedPatch::new).transpose()?;
        let silent = || ClientError::Silent { within };
        let stream = loop {
            match self.connect_now() {
                Err(ClientError::System(e)) if e.kind() == std::io::ErrorKind::WouldBlock => {
                    if Instant::now() >= until {
                        return Err(silent());
                    }
                    std::thread::sleep(FULL);
                }
                other => break other?,
            }
        };
        let wait = |flags| match ready(&stream, flags, until) {
            Ok(true) => Ok(()),
            Ok(false) => Err(silent()),
            Err(e) => Err(e.into()),
        };
        let mut sent = 0;
        while let Some(rest) = frame.get(sent..).filter(|rest| !rest.is_empty()) {
            // The descriptor goes with the first byte.
            match send(&stream, rest, sealed.as_ref().filter(|_| sent == 0)) {
                Ok(n) => sent += n,
                Err(Errno::AGAIN) => wait(PollFlags::OUT)?,
                // It may have answered before it closed: that it will not read this.
                Err(Errno::PIPE | Errno::CONNRESET) => break,
                Err(e) => return Err(e.into()),
            }
        }
        let mut inbox = Inbox::new(MAX_ANSWER);
        let mut bytes = vec![0; 64 << 10];
        loop {
            wait(PollFlags::IN)?;
            let received = match recv(&stream, &mut bytes[..], RecvFlags::DONTWAIT) {
                Ok((_, received)) => received,
                Err(Errno::AGAIN | Errno::INTR) => continue,
                Err(Errno::CONNRESET) => 0,
                Err(e) => return Err(e.into()),
            };
            if received == 0 {
                return Err(if inbox.is_empty() { ClientError::Closed } else { WireError::CutOff.into() });
            }
            if let Some(body) = inbox.push(bytes.get(..received).unwrap_or_default())? {
                return Ok(Answer::decode(&body)?.of_process(self.pid));
            }
        }
    }

    /// A connection to the process itself; where the queue is full, an error that says that it would block.
    fn connect_now(&self) -> Result<OwnedFd, ClientError> {
        let unreachable = |e: Errno| ClientError::Unreachable { path: self.path.clone(), error: e.into() };
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let stream = socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
        let (folder, name) = self.folder().map_err(unreachable)?;
        // A path of any length, in any mount namespace, becomes a short one of ours.
        let way = Path::new("/proc/self/fd").join(folder.as_raw_fd().to_string()).join(name);
        let address = SocketAddrUnix::new(&way).map_err(unreachable)?;
        match connect(&stream, &address) {
            Ok(()) => {}
            Err(Errno::AGAIN) => return Err(Errno::AGAIN.into()),
            Err(e) => return Err(unreachable(e)),
        }
        match Peer::of(&stream)?.pid {
            pid if pid == self.pid => Ok(stream),
            found => Err(ClientError::Another { path: self.path.clone(), found }),
        }
    }

    /// The socket's folder, as the process sees it, and its name in there.
    fn folder(&self) -> Result<(OwnedFd, &OsStr), Errno> {
        let (parent, name) = self.path.parent().zip(self.path.file_name()).ok_or(Errno::INVAL)?;
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let root = open(format!("/proc/{}/root", self.pid), flags, Mode::empty())?;
        // A link in there leads to where the process would get, never to a file of ours.
        let resolve = ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS;
        Ok((openat2(&root, parent, flags, Mode::empty(), resolve)?, name))
    }
}

fn send(stream: &OwnedFd, bytes: &[u8], patch: Option<&SealedPatch>) -> Result<usize, Errno> {
    let descriptors: Vec<_> = patch.iter().map(|p| p.as_fd()).collect();
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if !descriptors.is_empty() && !control.push(SendAncillaryMessage::ScmRights(&descriptors)) {
        return Err(Errno::NOBUFS);
    }
    loop {
        match sendmsg(stream, &[IoSlice::new(bytes)], &mut control, SendFlags::NOSIGNAL | SendFlags::DONTWAIT) {
            Err(Errno::INTR) => {}
            other => return other,
        }
    }
}

/// Whether the stream was ready before the time was up.
fn ready(stream: &OwnedFd, flags: PollFlags, until: Instant) -> Result<bool, Errno> {
    loop {
        let left = until.saturating_duration_since(Instant::now());
        let timeout = Timespec::try_from(left).map_err(|_| Errno::INVAL)?;
        match poll(&mut [PollFd::new(stream, flags)], Some(&timeout)) {
            Ok(0) if left.is_zero() => return Ok(false),
            Ok(0) | Err(Errno::INTR) => {}
            Ok(_) => return Ok(true),
            Err(e) => return Err(e),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_listening_sockets_with_an_agents_name_are_listed() {
        let line = b"0000000000000000: 00000002 00000000 00010000 0001 01 262834 /run/my gw/livepatch-7.sock";
        let found = (&b"262834"[..], Path::new("/run/my gw/livepatch-7.sock"));
        assert_eq!(listening(line), Some(found));
        let text = std::str::from_utf8(line).unwrap();
        for (from, to) in [("00010000", "00000000"), ("livepatch", "gateway"), (".sock", ".old"), (" /run", " @run")] {
            assert_eq!(listening(text.replace(from, to).as_bytes()), None, "{to}");
        }
        for other in [&b""[..], b"Num       RefCount Protocol Flags    Type St Inode Path", b"0: 2 0 00010000 1 01 7"] {
            assert_eq!(listening(other), None);
        }
    }
}
