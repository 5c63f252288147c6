//! Who is at the other end of a Unix socket.

use std::os::fd::AsFd;

use nix::sys::socket::{getsockopt, sockopt::PeerCredentials};

/// The process at the other end, as the kernel noted it when it connected, or began to listen.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Peer {
    /// Its PID; 0 where this process cannot see it, for it is in another PID namespace.
    pub pid: i32,
    /// Its effective user.
    pub uid: u32,
    /// Its effective group.
    pub gid: u32,
}

impl Peer {
    /// The peer of this socket.
    ///
    /// # Errors
    ///
    /// It is no connected or listening Unix socket.
    pub fn of(socket: &impl AsFd) -> std::io::Result<Self> {
        let found = getsockopt(socket, PeerCredentials)?;
        Ok(Self { pid: found.pid(), uid: found.uid(), gid: found.gid() })
    }
}
