//! The commands where an agent listens: they ask it, say what it says, and go in from outside only when it asks for that.

use std::io::{BufRead, BufReader, Read};
use std::os::unix::fs::{chown, PermissionsExt};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use livepatch::agent::server::{Server, Stop};
use livepatch::agent::wire::{Answer, Failure, Given, Request};
use livepatch::patch::PatchFile;
use livepatch::patcher::{CheckReport, Error, ProcessStatus, Report};
use livepatch::process::Pid;
use serde_json::Value;

/// Any patch: the stand-in applies nothing.
const PATCH: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/golden/patch-v2.so");

/// Of the process as it knows itself; a container's is often 1.
const INNER_PID: i32 = 1;

fn report(action: &'static str, patch: &str, given: &str) -> Report {
    Report {
        pid: INNER_PID,
        action: action.into(),
        patch: patch.to_owned(),
        already: false,
        functions: vec!["fee".into()],
        entries: 1,
        pause_us: 0.0,
        sleepers_us: 0.0,
        threads: 3,
        attempts: 1,
        within: None,
        migrated: None,
        warnings: vec![given.to_owned()],
    }
}

/// What it was given, in words.
fn words(given: &Given) -> String {
    let (options, signature) = (&given.options, given.signature.as_deref());
    let canary = options.canary.as_ref().map(|c| (c.share, c.keys.clone()));
    format!("{:?} {canary:?} {:?} {signature:?}", options.timeout, options.confirm_within)
}

/// Stands in for the engine. `mode` is what it is to do with everything.
fn handle(mode: &str, request: &Request, patch: Option<&[u8]>) -> Answer {
    match mode {
        "outside" => return Answer::Outside { why: "another handler owns SIGTRAP".into() },
        "refuse" => return Answer::Failed(Failure::of(INNER_PID, &Error::NothingApplied { pid: Pid(INNER_PID) })),
        "silent" => std::thread::sleep(Duration::from_secs(60)),
        "odd" => return Answer::Check(checked()),
        _ => {}
    }
    match request {
        Request::Check(_) => Answer::Check(checked()),
        Request::Apply(given) => {
            let patch = PatchFile::parse(patch.expect("a patch")).unwrap();
            Answer::Reports(vec![report("apply", &patch.manifest.name, &words(given))])
        }
        Request::Revert { name: Some(name), .. } => Answer::Reports(vec![report("revert", name, "by name")]),
        Request::Revert { all, .. } => {
            let newest = report("revert", "newest", "newest");
            Answer::Reports(if *all { vec![newest, report("revert", "older", "older")] } else { vec![newest] })
        }
        Request::Status => {
            let (name, exe, build_id) = ("gw".into(), "/gw".into(), "ab".into());
            Answer::Status(ProcessStatus {
                pid: INNER_PID,
                name,
                exe,
                build_id,
                patches: vec![],
                transitioning: false,
                shadows: vec![],
            })
        }
        Request::Canary { .. } | Request::Confirm { .. } => Answer::Done,
        Request::Info => Answer::Outside { why: "nobody asks".into() },
    }
}

fn checked() -> CheckReport {
    CheckReport {
        pid: INNER_PID,
        patch: "fix".into(),
        already: false,
        functions: vec!["fee".into()],
        entries: 1,
        warnings: vec![],
        inside: vec![],
        running: 0,
    }
}

/// Another process, in which the stand-in listens.
struct Gateway {
    child: Child,
    socket: PathBuf,
}

impl Gateway {
    fn start(mode: &str) -> Self {
        let socket = std::env::temp_dir().join(format!("livepatch-{mode}-{}.sock", std::process::id()));
        Self::start_as(mode, socket, Command::new(std::env::current_exe().unwrap())).expect("the stand-in")
    }

    /// With a command that becomes the stand-in; nothing if it does not.
    fn start_as(mode: &str, socket: PathBuf, mut command: Command) -> Option<Self> {
        command.args(["--exact", "the_stand_in", "--nocapture", "--test-threads=1"]);
        command.env("MODE", mode).env("SOCKET", &socket).stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut child = command.spawn().unwrap();
        let mut lines = BufReader::new(child.stdout.as_mut().unwrap()).lines();
        let is_ready = lines.any(|l| l.unwrap().contains("ready"));
        let gateway = Self { child, socket };
        is_ready.then_some(gateway)
    }

    /// Runs a command on it.
    fn run(&self, command: &str, more: &[&str]) -> Ran {
        Self::run_with(Command::new(env!("CARGO_BIN_EXE_livepatch")), self.child.id(), command, more)
    }

    fn run_with(mut livepatch: Command, pid: u32, command: &str, more: &[&str]) -> Ran {
        let pid = pid.to_string();
        let out = livepatch.arg(command).arg(&pid).args(more).output().unwrap();
        let text = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap().replace(&pid, "PID");
        Ran { code: out.status.code(), stdout: text(out.stdout), stderr: text(out.stderr) }
    }
}

impl Drop for Gateway {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        let _ = std::fs::remove_file(&self.socket);
    }
}

#[derive(Debug)]
struct Ran {
    code: Option<i32>,
    stdout: String,
    stderr: String,
}

impl Ran {
    fn json(&self) -> Value {
        serde_json::from_str(&self.stdout.replace("PID", "4711")).unwrap_or_else(|e| panic!("{e}: {self:?}"))
    }
}

#[test]
fn the_stand_in() {
    let Ok(mode) = std::env::var("MODE") else { return };
    let socket = std::env::var_os("SOCKET").unwrap();
    let (server, stop) = (Server::bind(Path::new(&socket)).unwrap(), Stop::new().unwrap());
    println!("ready");
    std::thread::scope(|s| {
        s.spawn(|| {
            let _ = std::io::stdin().read(&mut [0; 1]);
            stop.stop();
        });
        let mut each = |request: Request, patch: Option<livepatch::agent::sealed::SealedPatch>, _| {
            handle(&mode, &request, patch.map(|p| p.read().unwrap()).as_deref())
        };
        server.serve(&stop, &mut each).unwrap();
    });
}

#[test]
fn every_command_asks_the_agent() {
    let gateway = Gateway::start("good");
    let check = gateway.run("check", &[PATCH]);
    assert_eq!((check.code, check.stderr.as_str()), (Some(0), ""));
    assert!(check.stdout.starts_with("process PID: patch fix would apply"), "{check:?}");

    let apply = gateway
        .run("apply", &[PATCH, "--timeout", "7s", "--canary", "5%", "--key", "session", "--confirm-within", "2m"]);
    assert_eq!(apply.code, Some(0), "{apply:?}");
    assert!(apply.stdout.starts_with("process PID: applied patch "), "{apply:?}");
    assert!(apply.stderr.contains(r#"warning: 7s Some((500, [("session", 0)])) Some(120s) None"#), "{apply:?}");
    assert!(apply.stderr.contains("its agent reverts patch"), "and the command does not stay: {apply:?}");

    let apply = gateway.run("apply", &[PATCH, "--json"]).json();
    assert_eq!((&apply["by"], &apply["pid"]), (&"agent".into(), &4711.into()));

    let revert = gateway.run("revert", &["fix"]);
    assert!(revert.code == Some(0) && revert.stdout.contains("reverted patch fix"), "{revert:?}");
    let revert = gateway.run("revert", &["--all"]);
    assert!(revert.stdout.contains("patch newest") && revert.stdout.contains("patch older"), "{revert:?}");

    let status = gateway.run("status", &[]);
    assert_eq!(status.stdout, "process PID /gw build ab\n  no patch\n", "{status:?}");
    assert_eq!(gateway.run("status", &["--json"]).json()[0]["by"], "agent");

    assert_eq!(gateway.run("canary", &["fix", "25%"]).stdout, "process PID: patch fix runs in 25 % of the calls\n");
    assert_eq!(gateway.run("confirm", &["fix"]).stdout, "process PID: patch fix is permanent\n");
}

#[test]
fn a_signature_beside_the_patch_goes_along() {
    let gateway = Gateway::start("signed");
    let folder = PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join("agent_commands");
    std::fs::create_dir_all(&folder).unwrap();
    let fix = folder.join("fix.so");
    std::fs::copy(PATCH, &fix).unwrap();
    std::fs::write(folder.join("fix.so.minisig"), "signed by the desk").unwrap();
    let apply = gateway.run("apply", &[fix.to_str().unwrap()]);
    assert!(apply.stderr.contains(r#"Some("signed by the desk")"#), "{apply:?}");
}

#[test]
fn the_agent_may_ask_for_the_hold_from_outside() {
    let gateway = Gateway::start("outside");
    let said = "livepatch: the agent of process PID asks for the hold from outside: another handler owns SIGTRAP\n";
    // From outside the patch is refused: it is for another build.
    for command in ["check", "apply"] {
        let ran = gateway.run(command, &[PATCH]);
        assert_eq!(ran.code, Some(3), "{ran:?}");
        assert!(ran.stderr.starts_with(said), "{ran:?}");
        let held = gateway.run(command, &[PATCH, "--hold"]);
        assert!(held.code == Some(3) && !held.stderr.contains("the agent of"), "{held:?}");
    }
    let revert = gateway.run("revert", &[]);
    assert!(revert.code == Some(1) && revert.stderr.ends_with("no patch is applied to process PID\n"), "{revert:?}");
    let status = gateway.run("status", &["--json"]);
    assert!(status.stderr == said && status.json()[0].get("by").is_none(), "{status:?}");
    let session = gateway.run("apply", &[PATCH, "--canary", "5%", "--key", "session"]);
    assert!(session.code == Some(3) && session.stderr.contains("--key session needs an agent"), "{session:?}");
}

#[test]
fn what_the_agent_refuses_is_said_as_ever() {
    let gateway = Gateway::start("refuse");
    let revert = gateway.run("revert", &["--json"]);
    assert_eq!(revert.code, Some(1));
    assert_eq!((&revert.json()["pid"], &revert.json()["error"]["exit"]), (&4711.into(), &1.into()));
    assert!(revert.stderr.contains("no patch is applied"), "{revert:?}");
}

#[test]
fn an_agent_that_does_not_answer_is_never_gone_past() {
    let gateway = Gateway::start("silent");
    let began = Instant::now();
    let apply = gateway.run("apply", &[PATCH, "--timeout", "100ms"]);
    assert!(apply.code == Some(1) && apply.stderr.contains("has not answered within"), "{apply:?}");
    assert!(began.elapsed() < Duration::from_secs(20));
    // What is applied can be read all the same, and that is said.
    let status = gateway.run("status", &[]);
    assert_eq!(status.code, Some(0), "{status:?}");
    assert!(status.stderr.contains("read from outside") && status.stdout.contains("no patch"), "{status:?}");
}

#[test]
fn an_answer_to_another_question_is_an_error() {
    let gateway = Gateway::start("odd");
    for (command, more) in [("apply", PATCH), ("revert", "fix"), ("confirm", "fix")] {
        let ran = gateway.run(command, &[more]);
        assert!(ran.code == Some(1) && ran.stderr.contains("answers another question"), "{ran:?}");
    }
}

#[test]
fn an_agent_in_a_container_is_asked() {
    // PIDs of its own, and a folder that nobody outside sees.
    let folder = std::env::temp_dir().join(format!("livepatch-container-{}", std::process::id()));
    std::fs::create_dir(&folder).unwrap();
    let mut command = Command::new("unshare");
    command.args(["--pid", "--fork", "--mount", "sh", "-c", r#"mount -t tmpfs none "$0" && exec "$@""#]);
    command.arg(&folder).arg(std::env::current_exe().unwrap());
    let inside = folder.join("livepatch.sock");
    let Some(gateway) = Gateway::start_as("inside", inside.clone(), command) else {
        std::fs::remove_dir(&folder).unwrap();
        eprintln!("not tested, for want of root: an agent in namespaces of its own");
        return;
    };
    let unshare = gateway.child.id();
    let children = std::fs::read_to_string(format!("/proc/{unshare}/task/{unshare}/children")).unwrap();
    let pid = children.trim().parse().unwrap();
    assert!(!inside.exists());
    let livepatch = || Command::new(env!("CARGO_BIN_EXE_livepatch"));
    let apply = Gateway::run_with(livepatch(), pid, "apply", &[PATCH, "--json"]);
    assert_eq!((&apply.json()["by"], &apply.json()["pid"]), (&"agent".into(), &4711.into()), "{apply:?}");
    drop(gateway);
    std::fs::remove_dir(&folder).unwrap();
}

#[test]
fn an_ordinary_user_asks_the_agents_of_their_own_processes() {
    const NOBODY: u32 = 65_534;
    if !rustix::process::geteuid().is_root() {
        eprintln!("not tested, for want of root: it is what the other tests are then");
        return;
    }
    let folder = std::env::temp_dir().join(format!("livepatch-nobody-{}", std::process::id()));
    std::fs::create_dir(&folder).unwrap();
    std::fs::set_permissions(&folder, std::fs::Permissions::from_mode(0o755)).unwrap();
    for (from, to) in [(env!("CARGO_BIN_EXE_livepatch"), "livepatch"), (PATCH, "fix.so")] {
        std::fs::copy(from, folder.join(to)).unwrap();
        std::fs::set_permissions(folder.join(to), std::fs::Permissions::from_mode(0o755)).unwrap();
    }
    chown(&folder, Some(NOBODY), None).unwrap();
    let (livepatch, fix) = (folder.join("livepatch"), folder.join("fix.so"));
    let run_as = |uid: u32, gateway: &Gateway| {
        let mut command = Command::new(&livepatch);
        command.uid(uid).gid(uid);
        Gateway::run_with(command, gateway.child.id(), "apply", &[fix.to_str().unwrap()])
    };
    let mut command = Command::new("/proc/self/exe");
    command.uid(NOBODY).gid(NOBODY).current_dir("/");
    let gateway = Gateway::start_as("theirs", folder.join("livepatch.sock"), command).expect("the stand-in");
    let own = run_as(NOBODY, &gateway);
    assert!(own.code == Some(0) && own.stdout.contains("applied patch"), "{own:?}");
    let root = run_as(0, &gateway);
    assert!(root.code == Some(0) && root.stdout.contains("applied patch"), "{root:?}");
    let other = run_as(NOBODY - 1, &gateway);
    assert_eq!(other.code, Some(6), "{other:?}");
    drop(gateway);
    std::fs::remove_dir_all(&folder).unwrap();
}
