//! The control socket between commands and an agent, with a stand-in behind it.

use std::io::{BufRead, BufReader, Read, Write};
use std::os::fd::AsFd;
use std::os::unix::fs::{symlink, MetadataExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use livepatch::agent::client::{find, Client, ClientError};
use livepatch::agent::peer::Peer;
use livepatch::agent::sealed::SealedPatch;
use livepatch::agent::server::{ServeError, Server, Stop, MAX_CLIENTS, REQUEST_TIME};
use livepatch::agent::wire::{Answer, Failure, Given, Inbox, Info, Request, HEADER_BYTES, MAX_ANSWER, MAX_REQUEST};
use livepatch::patcher::{Options, Report};

const SOON: Duration = Duration::from_secs(5);
const NOBODY: u32 = 65_534;

/// A folder of one test, which any user may look into.
struct Folder(PathBuf);

impl Folder {
    fn new() -> Self {
        static NEXT: AtomicUsize = AtomicUsize::new(0);
        let n = NEXT.fetch_add(1, Ordering::Relaxed);
        let path = std::env::temp_dir().join(format!("livepatch-socket-{}-{n}", std::process::id()));
        std::fs::create_dir(&path).unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).unwrap();
        Self(path.canonicalize().unwrap())
    }

    fn socket(&self) -> PathBuf {
        self.0.join("livepatch.sock")
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

fn report(pid: i32, entries: usize) -> Report {
    Report {
        pid,
        action: "apply".into(),
        patch: "fix".into(),
        already: false,
        functions: vec!["fee".into()],
        entries,
        pause_us: 0.0,
        sleepers_us: 0.0,
        threads: 3,
        attempts: 1,
        within: None,
        migrated: None,
        warnings: vec![],
    }
}

/// Stands in for the engine: tells by its answers what it was asked.
fn handle(request: Request, patch: Option<SealedPatch>, peer: Peer) -> Answer {
    match request {
        Request::Info => Answer::Info(Info {
            pid: peer.pid,
            version: "0".into(),
            requires_signature: false,
            outside: Some(format!("user {}", peer.uid)),
        }),
        Request::Apply(_) => match patch.map(|p| p.read()) {
            Some(Ok(patch)) => Answer::Reports(vec![report(1, patch.len())]),
            other => Answer::Failed(Failure::other(1, format!("{other:?}"))),
        },
        // The share says how long it takes.
        Request::Canary { share, .. } => {
            std::thread::sleep(Duration::from_millis(share.into()));
            Answer::Done
        }
        Request::Confirm { name } => Answer::Outside { why: name.repeat(1 << 16) },
        Request::Revert { all: true, .. } => std::process::exit(1),
        Request::Status | Request::Check(_) | Request::Revert { .. } => {
            Answer::Outside { why: "the trap is somebody else's".into() }
        }
    }
}

/// Runs `with` while a stand-in serves the socket.
fn served<R>(path: &Path, with: impl FnOnce() -> R) -> R {
    let (server, stop) = (Server::bind(path).unwrap(), Stop::new().unwrap());
    std::thread::scope(|s| {
        let serving = s.spawn(|| server.serve(&stop, &mut handle));
        // Even where `with` panics.
        struct Ends<'a>(&'a Stop);
        impl Drop for Ends<'_> {
            fn drop(&mut self) {
                self.0.stop();
            }
        }
        let ends = Ends(&stop);
        let result = with();
        drop(ends);
        serving.join().unwrap().unwrap();
        result
    })
}

fn read_answer(stream: &mut UnixStream) -> Result<Answer, String> {
    stream.set_read_timeout(Some(SOON)).unwrap();
    let (mut inbox, mut bytes) = (Inbox::new(MAX_ANSWER), vec![0; 1 << 16]);
    loop {
        let n = stream.read(&mut bytes).map_err(|e| e.to_string())?;
        if n == 0 {
            return Err("closed".into());
        }
        if let Some(body) = inbox.push(&bytes[..n]).map_err(|e| e.to_string())? {
            return Answer::decode(&body).map_err(|e| e.to_string());
        }
    }
}

/// What is answered to these bytes.
fn raw(path: &Path, bytes: &[u8]) -> Result<Answer, String> {
    let mut stream = UnixStream::connect(path).map_err(|e| e.to_string())?;
    let _ = stream.write_all(bytes);
    let _ = stream.shutdown(std::net::Shutdown::Write);
    read_answer(&mut stream)
}

fn failure(answer: Result<Answer, String>) -> Failure {
    match answer {
        Ok(Answer::Failed(failure)) => failure,
        other => panic!("{other:?} is no failure"),
    }
}

fn given() -> Given {
    Given { options: Options::default(), signature: None }
}

/// A copy of this test that plays a part in another process.
fn play(part: &str, path: &Path, uid: Option<u32>) -> Child {
    let mut command = Command::new("/proc/self/exe");
    command.args(["--exact", "a_part_in_another_process", "--nocapture", "--test-threads=1"]);
    command.env("PART", part).env("SOCKET", path).current_dir("/");
    command.stdin(Stdio::piped()).stdout(Stdio::piped());
    if let Some(uid) = uid {
        command.uid(uid).gid(uid);
    }
    command.spawn().unwrap()
}

/// The next line of a part that is meant for us.
fn told(child: &mut Child) -> String {
    let mut out = BufReader::new(child.stdout.as_mut().unwrap());
    let mut line = String::new();
    while out.read_line(&mut line).unwrap() > 0 {
        // It may stand behind what the harness prints.
        if let Some((_, told)) = line.split_once("tell: ") {
            return told.trim_end().to_owned();
        }
        line.clear();
    }
    panic!("it said nothing")
}

fn finish(mut child: Child) {
    drop(child.stdin.take());
    child.wait().unwrap();
}

#[test]
fn a_part_in_another_process() {
    let Ok(part) = std::env::var("PART") else { return };
    let path = PathBuf::from(std::env::var_os("SOCKET").unwrap());
    let until_told = || drop(std::io::stdin().read(&mut [0; 1]));
    match part.as_str() {
        // Bytes that are read by the stand-in; the file is left behind when it is killed.
        "agent" => served(&path, || {
            println!("tell: ready");
            until_told();
        }),
        "silent" => {
            let _server = Server::bind(&path).unwrap();
            println!("tell: ready");
            until_told();
        }
        "umask" => {
            rustix::process::umask(rustix::fs::Mode::from_raw_mode(0o277));
            let server = Server::bind(&path).unwrap();
            println!("tell: {:o}", server.path().metadata().unwrap().mode() & 0o7777);
        }
        "ask" => {
            println!("tell: {:?}", raw(&path, &Request::Info.encode().unwrap()));
        }
        // Inherits a socket that its parent listens on, as descriptor 0.
        "heir" => {
            println!("tell: ready");
            std::thread::sleep(Duration::from_secs(60));
        }
        other => panic!("{other}"),
    }
}

fn is_root() -> bool {
    rustix::process::geteuid().is_root()
}

#[test]
fn the_socket_is_for_its_owner_from_the_start_and_goes_with_the_server() {
    let folder = Folder::new();
    let server = Server::bind(&folder.socket()).unwrap();
    assert_eq!(server.path(), folder.socket());
    assert_eq!(folder.socket().metadata().unwrap().mode() & 0o7777, 0o600);
    drop(server);
    assert!(!folder.socket().exists());
    let mut child = play("umask", &folder.socket(), None);
    assert_eq!(told(&mut child), "600");
    finish(child);
}

#[test]
fn what_is_at_the_path_is_replaced_only_if_it_is_a_dead_socket() {
    let folder = Folder::new();
    let path = folder.socket();
    // A live one.
    let server = Server::bind(&path).unwrap();
    let inode = path.metadata().unwrap().ino();
    let own = std::process::id().cast_signed();
    assert!(matches!(Server::bind(&path), Err(ServeError::InUse { pid, .. }) if pid == own));
    assert_eq!(path.metadata().unwrap().ino(), inode);
    // Another's at the same path is not removed.
    std::fs::remove_file(&path).unwrap();
    let listener = UnixListener::bind(&path).unwrap();
    drop(server);
    assert!(path.exists());
    // A dead one.
    drop(listener);
    let server = Server::bind(&path).unwrap();
    assert!(UnixStream::connect(&path).is_ok());
    drop(server);
    // One that was killed.
    let mut child = play("agent", &path, None);
    assert_eq!(told(&mut child), "ready");
    child.kill().unwrap();
    child.wait().unwrap();
    assert!(path.exists());
    drop(Server::bind(&path).unwrap());
    // Anything else.
    std::fs::write(&path, "data").unwrap();
    assert!(matches!(Server::bind(&path), Err(ServeError::Path { .. })));
    assert_eq!(std::fs::read(&path).unwrap(), b"data");
    std::fs::remove_file(&path).unwrap();
    symlink("/dev/null", &path).unwrap();
    assert!(matches!(Server::bind(&path), Err(ServeError::Path { .. })));
    assert_eq!(std::fs::read_dir(&folder.0).unwrap().count(), 1, "nothing lies about");
}

#[test]
fn a_path_that_others_could_change_is_refused() {
    let folder = Folder::new();
    let no = |path: &Path| match Server::bind(path) {
        Err(ServeError::Path { why, .. }) => why,
        other => panic!("{}: {other:?}", path.display()),
    };
    assert!(no(Path::new("livepatch.sock")).contains("absolute"));
    assert!(no(Path::new("/")).contains("absolute"));
    assert!(no(&folder.0.join("x".repeat(120))).contains("107"));
    assert!(no(&folder.0.join("none/livepatch.sock")).contains("folder"));
    let inner = folder.0.join("inner");
    std::fs::create_dir(&inner).unwrap();
    let mode = |path: &Path, mode: u32| std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode)).unwrap();
    for open in [0o777, 0o775, 0o757] {
        mode(&inner, open);
        assert!(no(&inner.join("livepatch.sock")).contains("others may write"), "{open:o}");
        mode(&inner, 0o700);
        mode(&folder.0, open);
        assert!(no(&inner.join("livepatch.sock")).contains("others may write"), "{open:o} above");
        mode(&folder.0, 0o755);
    }
    mode(&inner, 0o1777);
    drop(Server::bind(&inner.join("livepatch.sock")).unwrap());
    // Through a link it is the folder behind it that counts, and that the kernel lists.
    symlink(&inner, folder.0.join("link")).unwrap();
    let server = Server::bind(&folder.0.join("link/livepatch.sock")).unwrap();
    assert_eq!(server.path(), inner.join("livepatch.sock"));
    drop(server);
    if !is_root() {
        eprintln!("not tested, for want of root: a folder and a socket of another user");
        return;
    }
    mode(&inner, 0o755);
    std::os::unix::fs::chown(&inner, Some(NOBODY), None).unwrap();
    assert!(no(&inner.join("livepatch.sock")).contains("belongs to user 65534"));
    drop(UnixListener::bind(folder.socket()).unwrap());
    std::os::unix::fs::chown(folder.socket(), Some(NOBODY), None).unwrap();
    assert!(no(&folder.socket()).contains("belongs to user 65534"));
}

#[test]
fn only_the_same_user_and_root_are_answered() {
    if !is_root() {
        eprintln!("not tested, for want of root: other users");
        return;
    }
    let folder = Folder::new();
    served(&folder.socket(), || {
        let ask = |uid| {
            let mut child = play("ask", &folder.socket(), uid);
            let answer = told(&mut child);
            finish(child);
            answer
        };
        assert!(ask(None).contains("user 0"));
        let refused = ask(Some(NOBODY));
        assert!(refused.contains("Permission denied"), "{refused}");
        std::fs::set_permissions(folder.socket(), std::fs::Permissions::from_mode(0o666)).unwrap();
        let refused = ask(Some(NOBODY));
        assert!(refused.contains("user 65534 may not command") && refused.contains("exit: 6"), "{refused}");
    });
}

#[test]
fn what_is_no_request_is_said_to_be_none() {
    let folder = Folder::new();
    let path = folder.socket();
    served(&path, || {
        let ok = Request::Info.encode().unwrap();
        assert!(matches!(raw(&path, &ok), Ok(Answer::Info(_))));
        let said = |bytes: &[u8]| failure(raw(&path, bytes)).message;
        assert!(said(b"GET / HTTP/1.1\r\n\r\n").contains("no message of livepatch"));
        assert!(said(&ok[..ok.len() - 1]).contains("ends in its middle"));
        assert!(said(&ok[..3]).contains("ends in its middle"));
        assert!(said(&[&ok[..], &ok[..]].concat()).contains("goes on after its end"));
        let changed = |at: usize, to: u8| {
            let mut frame = ok.clone();
            frame[at] = to;
            said(&frame)
        };
        assert!(changed(4, 9).contains("speaks version 9"));
        assert!(changed(11, 0xff).contains("are the most"));
        assert!(changed(HEADER_BYTES + 1, b'X').contains("cannot be understood"));
        assert_eq!(raw(&path, b""), Err("closed".into()));
        // The longest that there is: refused for what it says, not for its length.
        let mut long = vec![b' '; HEADER_BYTES + MAX_REQUEST];
        long[..HEADER_BYTES].copy_from_slice(&ok[..HEADER_BYTES]);
        long[8..12].copy_from_slice(&(MAX_REQUEST as u32).to_le_bytes());
        assert!(said(&long).contains("cannot be understood"));
        assert!(matches!(raw(&path, &ok), Ok(Answer::Info(_))), "it goes on");
    });
}

/// A client of a socket of this process, however many of its tests listen at once.
fn client(path: &Path) -> Client {
    Client::at(std::process::id().cast_signed(), path)
}

fn send_with(path: &Path, request: &Request, descriptors: &[std::os::fd::BorrowedFd<'_>]) -> Result<Answer, String> {
    let mut stream = UnixStream::connect(path).unwrap();
    let mut space = [std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(64))];
    let mut control = rustix::net::SendAncillaryBuffer::new(&mut space);
    assert!(control.push(rustix::net::SendAncillaryMessage::ScmRights(descriptors)));
    let frame = request.encode().unwrap();
    let flags = rustix::net::SendFlags::NOSIGNAL;
    let n = rustix::net::sendmsg(&stream, &[std::io::IoSlice::new(&frame)], &mut control, flags).unwrap();
    assert_eq!(n, frame.len());
    read_answer(&mut stream)
}

#[test]
fn a_patch_comes_as_sealed_memory_and_nothing_else_stays_open() {
    let folder = Folder::new();
    let path = folder.socket();
    // In a process of its own: other tests of this one open files meanwhile.
    let mut agent = play("agent", &path, None);
    assert_eq!(told(&mut agent), "ready");
    let open = || std::fs::read_dir(format!("/proc/{}/fd", agent.id())).unwrap().count();
    let before = open();
    let apply = Request::Apply(given());
    let patch = vec![7; 3 << 20];
    let at = Client::at(agent.id().cast_signed(), &path);
    match at.ask(&apply, Some(&patch), SOON) {
        Ok(Answer::Reports(reports)) => {
            assert_eq!((reports[0].entries, reports[0].pid), (patch.len(), agent.id().cast_signed()));
        }
        other => panic!("{other:?}"),
    }
    let sealed = SealedPatch::new(b"patch").unwrap();
    let file = std::fs::File::open("/proc/self/exe").unwrap();
    let memory = rustix::fs::memfd_create("open", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
    let said = |request: &Request, descriptors: &[std::os::fd::BorrowedFd<'_>]| {
        failure(send_with(&path, request, descriptors)).message
    };
    assert!(said(&apply, &[file.as_fd()]).contains("sealed memory"));
    assert!(said(&apply, &[memory.as_fd()]).contains("not sealed"));
    assert!(said(&apply, &[sealed.as_fd(), sealed.as_fd()]).contains("more descriptors"));
    assert!(said(&apply, &[file.as_fd(); 60]).contains("more descriptors"));
    assert!(said(&Request::Info, &[sealed.as_fd()]).contains("more descriptors"));
    assert!(failure(raw(&path, &apply.encode().unwrap())).message.contains("has to come with the request"));
    for _ in 0..100 {
        assert!(said(&apply, &[file.as_fd(); 3]).contains("more descriptors"));
    }
    // The last connection is closed a moment after its answer.
    let until = Instant::now() + SOON;
    while open() != before && Instant::now() < until {
        std::thread::sleep(Duration::from_millis(5));
    }
    assert_eq!(open(), before);
    finish(agent);
}

#[test]
fn a_good_client_is_answered_among_many_bad_ones() {
    let folder = Folder::new();
    let path = folder.socket();
    served(&path, || {
        let ok = Request::Info.encode().unwrap();
        // 50 that begin and do not go on, more than there is room for.
        let mut slow: Vec<UnixStream> = (0..50)
            .map(|i| {
                let mut stream = UnixStream::connect(&path).unwrap();
                stream.write_all(&ok[..i % ok.len()]).unwrap();
                stream
            })
            .collect();
        assert!(slow.len() > MAX_CLIENTS);
        // 200 that talk nonsense, some of which go away at once.
        let mut state = 88_172_645_463_325_252_u64;
        for i in 0..200 {
            let mut stream = UnixStream::connect(&path).unwrap();
            let nonsense: Vec<u8> = (0..i * 7)
                .map(|_| {
                    state ^= state << 13;
                    state ^= state >> 7;
                    state ^= state << 17;
                    (state >> 32) as u8
                })
                .collect();
            let _ = stream.write_all(&nonsense);
            if i % 20 == 0 {
                let began = Instant::now();
                assert!(matches!(client(&path).ask(&Request::Info, None, SOON), Ok(Answer::Info(_))));
                assert!(began.elapsed() < REQUEST_TIME / 2, "{:?}", began.elapsed());
            }
        }
        // The youngest of the slow ones is still heard in time, or was let go for others; none stays for ever.
        let until = Instant::now() + REQUEST_TIME + SOON;
        for stream in &mut slow {
            stream.set_read_timeout(Some(until.saturating_duration_since(Instant::now()))).unwrap();
            assert!(matches!(stream.read(&mut [0; 1]), Ok(0) | Err(_)));
        }
        assert!(Instant::now() < until);
    });
}

#[test]
fn who_does_not_read_does_not_keep_others_waiting() {
    let folder = Folder::new();
    let path = folder.socket();
    served(&path, || {
        // The answer is larger than a socket's buffer.
        let large = Request::Confirm { name: "x".repeat(200) }.encode().unwrap();
        let _deaf: Vec<UnixStream> = (0..4)
            .map(|_| {
                let mut stream = UnixStream::connect(&path).unwrap();
                stream.write_all(&large).unwrap();
                stream
            })
            .collect();
        assert!(matches!(client(&path).ask(&Request::Info, None, SOON), Ok(Answer::Info(_))));
        match client(&path).ask(&Request::Confirm { name: "y".repeat(200) }, None, SOON) {
            Ok(Answer::Outside { why }) => assert_eq!(why.len(), 200 << 16),
            other => panic!("{other:?}"),
        }
    });
}

#[test]
fn an_agent_at_work_makes_others_wait_but_drops_none() {
    let folder = Folder::new();
    let path = &folder.socket();
    served(path, || {
        std::thread::scope(|s| {
            // Longer than a client has to send its request.
            let work = REQUEST_TIME + Duration::from_millis(500);
            let share = u32::try_from(work.as_millis()).unwrap();
            let request = Request::Canary { name: "fix".into(), share };
            let busy = s.spawn(move || client(path).ask(&request, None, 2 * SOON));
            let mut stream = UnixStream::connect(path).unwrap();
            let ok = Request::Info.encode().unwrap();
            stream.write_all(&ok[..5]).unwrap();
            std::thread::sleep(Duration::from_millis(300));
            // It would end this process, were it not gone when its turn comes.
            let deadly = Request::Revert { name: None, all: true, options: Options::default() };
            let hasty = client(path).ask(&deadly, None, Duration::from_millis(100));
            assert!(matches!(hasty, Err(ClientError::Silent { .. })), "{hasty:?}");
            assert_eq!(busy.join().unwrap().unwrap(), Answer::Done);
            stream.write_all(&ok[5..]).unwrap();
            assert!(matches!(read_answer(&mut stream), Ok(Answer::Info(_))));
        });
    });
}

#[test]
fn the_agent_of_a_process_is_found_and_only_its_own() {
    let folder = Folder::new();
    // A path that no socket address holds by itself is reached all the same; this one just fits.
    let deep = folder.0.join("d".repeat(107 - folder.0.as_os_str().len() - "//livepatch.sock".len()));
    std::fs::create_dir(&deep).unwrap();
    let path = deep.join("livepatch.sock");
    let mut agent = play("agent", &path, None);
    assert_eq!(told(&mut agent), "ready");
    let pid = agent.id().cast_signed();
    let found = find(pid).expect("its agent");
    assert_eq!(found.path(), path);
    assert!(matches!(found.ask(&Request::Info, None, SOON), Ok(Answer::Info(info)) if info.pid == pid));
    assert!(find(1).is_none());
    // Another process at the same path.
    std::fs::remove_file(&path).unwrap();
    let other = UnixListener::bind(&path).unwrap();
    let own = std::process::id().cast_signed();
    assert!(matches!(found.ask(&Request::Info, None, SOON), Err(ClientError::Another { found, .. }) if found == own));
    assert!(find(pid).is_none());
    // One whose file is gone is there, and cannot be reached.
    drop(other);
    std::fs::remove_file(&path).unwrap();
    let found = find(pid).expect("its agent");
    assert!(matches!(found.ask(&Request::Info, None, SOON), Err(ClientError::Unreachable { .. })));
    finish(agent);
    // A child that inherited the socket of a process.
    let server = UnixListener::bind(&path).unwrap();
    let mut heir = Command::new("/proc/self/exe");
    heir.args(["--exact", "a_part_in_another_process", "--nocapture", "--test-threads=1"]);
    heir.env("PART", "heir").env("SOCKET", &path).stdout(Stdio::piped());
    heir.stdin(std::os::fd::OwnedFd::from(server.try_clone().unwrap()));
    let mut heir = heir.spawn().unwrap();
    assert_eq!(told(&mut heir), "ready");
    assert!(find(heir.id().cast_signed()).is_none());
    heir.kill().unwrap();
    heir.wait().unwrap();
}

#[test]
fn an_agent_that_does_not_serve_is_waited_for_no_longer_than_said() {
    let folder = Folder::new();
    let mut agent = play("silent", &folder.socket(), None);
    assert_eq!(told(&mut agent), "ready");
    let found = find(agent.id().cast_signed()).expect("its agent");
    let within = Duration::from_millis(200);
    // Until its queue is full, and then.
    for _ in 0..3 {
        let began = Instant::now();
        assert!(matches!(found.ask(&Request::Status, None, within), Err(ClientError::Silent { .. })));
        assert!((within..within + SOON).contains(&began.elapsed()));
    }
    let _full: Vec<_> = (0..70).map(|_| fill(&folder.socket())).collect();
    let found = find(agent.id().cast_signed()).expect("its agent, with a full queue");
    assert!(matches!(found.ask(&Request::Status, None, within), Err(ClientError::Silent { .. })));
    finish(agent);
}

/// A connection that waits to be accepted, if there is room for it.
fn fill(path: &Path) -> std::os::fd::OwnedFd {
    use rustix::net::{connect, socket_with, AddressFamily, SocketAddrUnix, SocketFlags, SocketType};
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None).unwrap();
    let _ = connect(&socket, &SocketAddrUnix::new(path).unwrap());
    socket
}

#[test]
fn an_agent_that_dies_over_a_request_is_not_waited_for() {
    let folder = Folder::new();
    let mut agent = play("agent", &folder.socket(), None);
    assert_eq!(told(&mut agent), "ready");
    let found = find(agent.id().cast_signed()).expect("its agent");
    let deadly = Request::Revert { name: None, all: true, options: Options::default() };
    let ended = found.ask(&deadly, None, SOON);
    assert!(matches!(ended, Err(ClientError::Closed)), "{ended:?}");
    finish(agent);
}
