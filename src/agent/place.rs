//! Where an agent's socket lies: who may reach it, and what may be there already.

use std::ffi::OsString;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::fs::{fchmod, openat, renameat_with, statat, unlinkat};
use rustix::fs::{AtFlags, FileType, Mode, OFlags, RenameFlags, Stat, CWD};
use rustix::io::Errno;
use rustix::net::{bind, connect, listen, socket_with, AddressFamily, SocketAddrUnix, SocketFlags, SocketType};

use super::peer::Peer;

/// How many connections wait to be taken.
const BACKLOG: i32 = 64;

/// Between its bind and its listen, another agent that starts looks like one that is gone.
const STARTING: Duration = Duration::from_millis(30);

/// For its owner alone.
const MODE: Mode = Mode::RUSR.union(Mode::WUSR);

/// Why there is no socket.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ServeError {
    /// Not at this path.
    #[error("{}: {why}", path.display())]
    Path {
        /// The path.
        path: PathBuf,
        /// Why not.
        why: String,
    },
    /// Somebody listens there.
    #[error("{}: process {pid} listens there", path.display())]
    InUse {
        /// The path.
        path: PathBuf,
        /// Who does; 0 if that is not to be seen from here.
        pid: i32,
    },
    /// A system call failed.
    #[error("{what}: {error}")]
    System {
        /// Which.
        what: String,
        /// How.
        error: std::io::Error,
    },
}

impl ServeError {
    pub(super) fn system(what: impl Into<String>) -> impl FnOnce(Errno) -> Self {
        let what = what.into();
        move |e| Self::System { what, error: e.into() }
    }
}

/// A socket's file: its folder, its name in there, and which file it is.
#[derive(Debug)]
pub(super) struct Place {
    pub path: PathBuf,
    folder: OwnedFd,
    name: OsString,
    /// Device and inode.
    file: (u64, u64),
    /// A child that this process forks has no business with the file.
    owner: u32,
}

/// A socket that listens at `path`.
pub(super) fn listen_at(path: &Path) -> Result<(OwnedFd, Place), ServeError> {
    let (path, folder, name) = checked(path)?;
    let no = |why: &str| ServeError::Path { path: path.clone(), why: why.into() };
    let address = SocketAddrUnix::new(&path).map_err(|_| no("the path of a socket has at most 107 bytes"))?;
    for _ in 0..3 {
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let socket = socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)
            .map_err(ServeError::system("a socket cannot be made"))?;
        // The file that bind makes takes its mode from the socket (unix_bind_bsd), less the umask: at no time may anybody else connect.
        fchmod(&socket, MODE).map_err(ServeError::system("the socket's mode cannot be set"))?;
        match bind(&socket, &address) {
            Ok(()) => {}
            Err(Errno::ADDRINUSE) => {
                clear(&path, &folder, &name, &address)?;
                continue;
            }
            Err(e) => return Err(ServeError::system(path.display().to_string())(e)),
        }
        let here = statat(&folder, &name, AtFlags::SYMLINK_NOFOLLOW)
            .map_err(ServeError::system(path.display().to_string()))?;
        let place = Place { path: path.clone(), folder, name, file: identity(&here), owner: std::process::id() };
        if Mode::from_raw_mode(here.st_mode) != MODE {
            // The umask took something away from the owner.
            rustix::fs::chmodat(&place.folder, &place.name, MODE, AtFlags::empty())
                .map_err(ServeError::system(path.display().to_string()))?;
        }
        listen(&socket, BACKLOG).map_err(ServeError::system("nothing can listen there"))?;
        return Ok((socket, place));
    }
    Err(no("others make sockets there all the time"))
}

impl Drop for Place {
    fn drop(&mut self) {
        let here = statat(&self.folder, &self.name, AtFlags::SYMLINK_NOFOLLOW);
        if self.owner == std::process::id() && here.is_ok_and(|s| identity(&s) == self.file) {
            let _ = unlinkat(&self.folder, &self.name, AtFlags::empty());
        }
    }
}

fn identity(stat: &Stat) -> (u64, u64) {
    (stat.st_dev, stat.st_ino)
}

/// The path without symbolic links, its folder and its name, if nobody else can put something in its place.
fn checked(path: &Path) -> Result<(PathBuf, OwnedFd, OsString), ServeError> {
    let no = |why: String| ServeError::Path { path: path.to_owned(), why };
    let (Some(parent), Some(name), true) = (path.parent(), path.file_name(), path.is_absolute()) else {
        return Err(no("a socket needs an absolute path".into()));
    };
    let parent = parent.canonicalize().map_err(|e| no(format!("its folder: {e}")))?;
    let own = rustix::process::geteuid().as_raw();
    for folder in parent.ancestors() {
        let meta = folder.metadata().map_err(|e| no(format!("{}: {e}", folder.display())))?;
        let (uid, mode) = (meta.uid(), meta.mode());
        if uid != own && uid != 0 {
            return Err(no(format!(
                "the folder {} belongs to user {uid}, who could put something else there",
                folder.display()
            )));
        }
        let (others, sticky) = (0o022, 0o1000);
        if mode & others != 0 && mode & sticky == 0 {
            return Err(no(format!("others may write to the folder {}", folder.display())));
        }
    }
    let folder = openat(CWD, &parent, OFlags::DIRECTORY | OFlags::PATH | OFlags::CLOEXEC, Mode::empty())
        .map_err(ServeError::system(parent.display().to_string()))?;
    Ok((parent.join(name), folder, name.to_owned()))
}

/// Takes away a socket of ours on which nobody listens any more; anything else stays, and is an error.
fn clear(path: &Path, folder: &OwnedFd, name: &OsString, address: &SocketAddrUnix) -> Result<(), ServeError> {
    let no = |why: String| ServeError::Path { path: path.to_owned(), why };
    let failed = |e: Errno| ServeError::system(path.display().to_string())(e);
    let there = match statat(folder, name, AtFlags::SYMLINK_NOFOLLOW) {
        Err(Errno::NOENT) => return Ok(()),
        other => other.map_err(failed)?,
    };
    if FileType::from_raw_mode(there.st_mode) != FileType::Socket {
        return Err(no("something is there that is no socket; it is left alone".into()));
    }
    if there.st_uid != rustix::process::geteuid().as_raw() {
        return Err(no(format!("the socket there belongs to user {}; it is left alone", there.st_uid)));
    }
    for _ in 0..2 {
        if let Some(pid) = listener(address).map_err(failed)? {
            return Err(ServeError::InUse { path: path.to_owned(), pid });
        }
        std::thread::sleep(STARTING);
    }
    // Aside first: what is there now may be the socket of another agent that has just done the same.
    let aside = format!(".livepatch-{}.old", std::process::id());
    match renameat_with(folder, name, folder, &aside, RenameFlags::NOREPLACE) {
        Err(Errno::NOENT) => return Ok(()),
        other => other.map_err(failed)?,
    }
    let moved = statat(folder, &aside, AtFlags::SYMLINK_NOFOLLOW).map_err(failed)?;
    if identity(&moved) == identity(&there) {
        return unlinkat(folder, &aside, AtFlags::empty()).map_err(failed);
    }
    renameat_with(folder, &aside, folder, name, RenameFlags::NOREPLACE).map_err(failed)
}

/// Who listens there; 0 if that is not to be seen from here. A listener that is dead listens no more, though a child may have inherited
/// the socket.
fn listener(address: &SocketAddrUnix) -> Result<Option<i32>, Errno> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let probe = socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
    match connect(&probe, address) {
        Err(Errno::CONNREFUSED | Errno::NOENT) => Ok(None),
        // A full queue.
        Err(Errno::AGAIN) => Ok(Some(0)),
        Err(e) => Err(e),
        Ok(()) => {
            let pid = Peer::of(&probe.as_fd()).map_or(0, |p| p.pid);
            let dead = pid > 0 && !Path::new(&format!("/proc/{pid}")).exists();
            Ok((!dead).then_some(pid))
        }
    }
}
