//! The sample gateway with its agent: patched through the socket while it trades, by whom it trusts, and whatever becomes of the command.

mod support;

use std::io::{BufRead, BufReader, Read};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::OnceLock;
use std::time::{Duration, SystemTime};

use serde_json::Value;
use support::{build_patch, build_patch_with, livepatch, root, run, run_within, scratch, tool, Ran};

type Outcome = Result<(), String>;

/// What 100 at 5000 cost.
const OLD_FEE: &str = "125.00";
const NEW_FEE: &str = "75.00";

/// When the newest file of a folder was written.
fn newest(folder: &Path) -> SystemTime {
    let entries = std::fs::read_dir(folder).expect("a folder of the repository").map(|e| e.expect("an entry").path());
    let times = entries.map(|path| {
        let own = path.metadata().and_then(|m| m.modified()).expect("a time");
        if path.is_dir() {
            newest(&path)
        } else {
            own
        }
    });
    times.max().unwrap_or(SystemTime::UNIX_EPOCH)
}

/// A version of the gateway; built unless it was since the sources changed, which takes a minute the first time.
fn version(name: &str) -> PathBuf {
    let folder = root().join("target/gateway").join(name);
    let program = folder.join("sample-gateway");
    let built = program.metadata().and_then(|m| m.modified()).unwrap_or(SystemTime::UNIX_EPOCH);
    if ["src", "sample-gateway"].iter().any(|f| newest(&root().join(f)) > built) {
        let mut command = Command::new(root().join("sample-gateway/build-version"));
        let done = run_within(command.arg(name).arg(&folder), Duration::from_secs(600));
        done.expect_code(0).expect("the gateway builds");
    }
    program
}

/// The gateway as it is, and the patch that corrects its fee.
fn made() -> &'static (PathBuf, PathBuf) {
    static MADE: OnceLock<(PathBuf, PathBuf)> = OnceLock::new();
    MADE.get_or_init(|| {
        // Each test is a process of its own in some runners.
        let lock = std::fs::File::create(scratch("agent_gateway").join("lock")).expect("a lock");
        rustix::fs::flock(&lock, rustix::fs::FlockOperation::LockExclusive).expect("a lock");
        let (old, new) = (version("base"), version("01-fee"));
        let fix = scratch("agent_gateway").join(format!("fee-{}.so", std::process::id()));
        build_patch(&old, &new, &fix).expect_code(0).expect("a patch");
        (old, fix)
    })
}

struct Gateway {
    child: Child,
    folder: PathBuf,
    port: String,
}

impl Gateway {
    fn start(name: &str, more: &[&str]) -> Self {
        // A socket's path is short.
        let folder = std::env::temp_dir().join(format!("livepatch-{name}-{}", std::process::id()));
        let _ = std::fs::remove_dir_all(&folder);
        std::fs::create_dir_all(&folder).expect("a folder");
        let mut command = Command::new(&made().0);
        command.args(["--port", "0", "--workers", "2", "--data"]).arg(folder.join("data"));
        command.arg("--agent").arg(folder.join("livepatch.sock")).args(more);
        let mut child = command.stdout(Stdio::piped()).stderr(Stdio::inherit()).spawn().expect("the gateway");
        let mut lines = BufReader::new(child.stdout.take().expect("a pipe")).lines();
        let line = lines.next().expect("the gateway says where it listens").expect("a line");
        let port = line.rsplit(':').next().expect("a port").to_owned();
        Self { child, folder, port }
    }

    fn pid(&self) -> String {
        self.child.id().to_string()
    }

    fn load(&self, seconds: &str) -> Load {
        let mut command = Command::new(tool("fix-load"));
        command.args(["--port", &self.port, "--sessions", "100", "--rate", "1000", "--duration", seconds, "--json"]);
        Load(command.stdout(Stdio::piped()).stderr(Stdio::null()).spawn().expect("fix-load"))
    }

    /// An error unless that is what the order costs now.
    fn costs(&self, fee: &str) -> Outcome {
        let probe = ["probe", "--port", &self.port, "--symbol", "ACME", "--qty", "100", "--price", "5000"];
        let said = run(Command::new(tool("fix-load")).args(probe));
        said.expect_code(0)?;
        if said.stdout.trim() == fee {
            return Ok(());
        }
        Err(format!("the fee is {}, not {fee}", said.stdout.trim()))
    }

    fn apply(&self, fix: &Path) -> Ran {
        livepatch(&["apply", &self.pid(), &fix.display().to_string(), "--json"])
    }

    fn revert(&self) -> Ran {
        livepatch(&["revert", &self.pid(), "--json"])
    }

    /// Whether the patch is applied, by what the agent says.
    fn is_applied(&self) -> Result<bool, String> {
        let status = livepatch(&["status", &self.pid(), "--json"]);
        let json = status.expect_code(0)?.json()?;
        if json[0]["by"] != "agent" {
            return Err(format!("the agent did not answer: {}", status.both()));
        }
        let patches = json[0]["patches"].as_array().cloned().unwrap_or_default();
        if patches.iter().any(|p| p["unfinished"] == true || !p["damage"].is_null()) {
            return Err(format!("neither old nor new: {json}"));
        }
        Ok(patches.iter().any(|p| p["state"] == "applied"))
    }
}

impl Drop for Gateway {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        let _ = std::fs::remove_dir_all(&self.folder);
    }
}

fn by_agent(ran: &Ran) -> Outcome {
    match ran.expect_code(0)?.json()?["by"] == "agent" {
        true => Ok(()),
        false => Err(format!("not by the agent: {}", ran.both())),
    }
}

/// Traders; gone with the test.
struct Load(Child);

impl Load {
    /// An error unless they traded to their end and found nothing wrong.
    fn lost_nothing(mut self) -> Outcome {
        let mut text = String::new();
        let mut out = self.0.stdout.take().expect("a pipe");
        out.read_to_string(&mut text).map_err(|e| e.to_string())?;
        let status = self.0.wait().map_err(|e| e.to_string())?;
        let report: Value = serde_json::from_str(&text).map_err(|e| format!("{e}: {text}"))?;
        for count in ["lost", "repeated", "out_of_sequence", "disconnects", "garbled", "business_rejects"] {
            if report[count] != 0 {
                return Err(format!("{count}: {}", report[count]));
            }
        }
        match status.success() && report["orders_sent"] == report["orders_acknowledged"] {
            true => Ok(()),
            false => Err(text),
        }
    }
}

impl Drop for Load {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn ten_times_there_and_back_while_it_trades() -> Outcome {
    let gateway = Gateway::start("cycles", &[]);
    let fix = &made().1;
    let mut load = gateway.load("8");
    std::thread::sleep(Duration::from_secs(1));
    for _ in 0..10 {
        by_agent(&gateway.apply(fix))?;
        gateway.costs(NEW_FEE)?;
        by_agent(&gateway.revert())?;
        gateway.costs(OLD_FEE)?;
    }
    let ended = load.0.try_wait().map_err(|e| e.to_string())?;
    assert!(ended.is_none(), "the load ended before the last revert");
    load.lost_nothing()
}

#[test]
fn only_a_patch_that_a_known_key_signed_goes_in() -> Outcome {
    let folder = scratch("agent_gateway").join("keys");
    let _ = std::fs::remove_dir_all(&folder);
    std::fs::create_dir_all(&folder).map_err(|e| e.to_string())?;
    let path = |name: &str| folder.join(name).display().to_string();
    let builder = |args: &[&str]| run(Command::new(tool("patch-builder")).args(args)).expect_code(0).map(drop);
    for key in ["desk", "stranger"] {
        builder(&["keygen", &path(key), "--no-password"])?;
    }
    let audit = path("audit.jsonl");
    let gateway = Gateway::start("keys", &["--agent-keys", &path("desk.pub"), "--agent-audit", &audit]);
    let fix = folder.join("fix.so");
    std::fs::copy(&made().1, &fix).map_err(|e| e.to_string())?;
    let sign = |key: &str| builder(&["sign", &fix.display().to_string(), "--no-password", "--key", &path(key)]);
    let refused = |words: &[&str]| -> Outcome {
        gateway.apply(&fix).expect_code(3)?.expect_says(words)?;
        if gateway.is_applied()? {
            return Err("it is applied".into());
        }
        gateway.costs(OLD_FEE)
    };
    refused(&["not signed"])?;
    sign("stranger.key")?;
    refused(&["no known key"])?;
    // What was signed is another patch.
    sign("desk.key")?;
    let (old, new) = (version("base"), version("01-fee"));
    build_patch_with(&old, &new, &fix, &["--name".as_ref(), "altered".as_ref()]).expect_code(0)?;
    refused(&["altered"])?;
    std::fs::copy(&made().1, &fix).map_err(|e| e.to_string())?;
    by_agent(&gateway.apply(&fix))?;
    gateway.costs(NEW_FEE)?;
    let lines = std::fs::read_to_string(&audit).map_err(|e| e.to_string())?;
    let results: Vec<Value> = lines
        .lines()
        .map(|l| serde_json::from_str::<Value>(l).map(|l| l["result"].clone()))
        .collect::<Result<_, _>>()
        .map_err(|e| e.to_string())?;
    assert_eq!(results, ["failed", "failed", "failed", "done"], "{lines}");
    Ok(())
}

#[test]
fn a_command_that_is_killed_leaves_all_old_or_all_new() -> Outcome {
    let gateway = Gateway::start("killed", &[]);
    let fix = &made().1;
    let load = gateway.load("6");
    std::thread::sleep(Duration::from_millis(500));
    let (mut old, mut new) = (0, 0);
    for step in 0..24 {
        let mut command = Command::new(tool("livepatch"));
        command.arg("apply").arg(gateway.pid()).arg(fix).stdout(Stdio::null()).stderr(Stdio::null());
        let mut command = command.spawn().map_err(|e| e.to_string())?;
        std::thread::sleep(Duration::from_micros(250 * step));
        command.kill().and_then(|()| command.wait()).map_err(|e| e.to_string())?;
        if gateway.is_applied()? {
            new += 1;
            gateway.costs(NEW_FEE)?;
            by_agent(&gateway.revert())?;
        } else {
            old += 1;
            gateway.costs(OLD_FEE)?;
        }
    }
    println!("{old} times old, {new} times new");
    by_agent(&gateway.apply(fix))?;
    gateway.costs(NEW_FEE)?;
    load.lost_nothing()
}
