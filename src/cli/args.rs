//! The command line.

use std::path::{Path, PathBuf};
use std::time::Duration;

use clap::{Args, Parser, Subcommand};
use livepatch::patcher::Patcher;
use livepatch::plan::beside::Consistency;
use livepatch::process::Pid;

use super::watch::WatchArgs;
use super::{policy, text, usage};

#[derive(Parser)]
#[command(
    name = "livepatch",
    version,
    about = "Patches a running Linux x86-64 process, and takes it back",
    after_help = "Example:\n  patch-builder old-build new-build -o fix.so\n  livepatch apply 4711 fix.so\n  livepatch revert 4711\n\n\
        Exit codes: 0 done, 1 error, 2 usage, 3 refused, 4 not quiescent before the timeout,\n\
        5 a gate did not pass, 6 no such process, no permission or another tracer"
)]
pub struct Cli {
    #[command(subcommand)]
    pub command: Command,
}

#[derive(Subcommand)]
pub enum Command {
    /// Would the patch apply now? Touches nothing.
    #[command(after_help = "Example:\n  livepatch check 4711 fix.so")]
    Check(PatchArgs),
    /// Applies a patch.
    #[command(
        after_help = "Example:\n  livepatch apply 4711 fix.so --timeout 10s\n  livepatch apply --exe /usr/bin/gateway fix.so --json"
    )]
    Apply(PatchArgs),
    /// Reverts the newest patch, or NAME if it is the newest, or all.
    #[command(
        after_help = "Example:\n  livepatch revert 4711\n  livepatch revert 4711 --all\n  livepatch revert 4711 --all --reclaim"
    )]
    Revert(RevertArgs),
    /// What is applied; without PID, every patched process of this host.
    #[command(after_help = "Example:\n  livepatch status\n  livepatch status 4711 --json")]
    Status(StatusArgs),
    /// Sets what share of the calls runs an applied canary.
    #[command(
        after_help = "Example:\n  livepatch apply 4711 fix.so --canary 1% --key handle_order:arg1\n  livepatch canary 4711 fix 25%\n  livepatch canary 4711 fix --follow /etc/gateway/canary"
    )]
    Canary(CanaryArgs),
    /// Makes an applied patch permanent.
    #[command(
        after_help = "Example:\n  livepatch apply 4711 fix.so --confirm-within 10m &\n  livepatch confirm 4711 fix"
    )]
    Confirm(ConfirmArgs),
    /// Finishes or undoes what an interrupted command left.
    #[command(after_help = "Example:\n  livepatch recover 4711")]
    Recover(RecoverArgs),
    /// Watches a process for a while: exit 0 only if every gate passed.
    #[command(
        after_help = "Example:\n  livepatch watch 4711 --for 60s --metrics http://127.0.0.1:9881/metrics --save before.json\n  livepatch apply 4711 fix.so\n  livepatch watch 4711 --for 60s --metrics http://127.0.0.1:9881/metrics --baseline before.json \\\n      --max-rss-growth 1M --latency gateway_order_latency_seconds --max-p99-ratio 1.2\n\n\
            Exit codes: 0 every gate passed; 5 one failed, was inconclusive, in error or without data; 6 no such process"
    )]
    Watch(Box<WatchArgs>),
    #[command(hide = true)]
    Console(Rest),
    /// Writes what gdb and perf need to name a patch's functions.
    #[command(
        after_help = "Example:\n  livepatch symbols 4711 > patch.gdb && gdb -p 4711 -x patch.gdb\n  livepatch symbols core > patch.gdb && gdb gateway core -x patch.gdb\n  livepatch symbols 4711 --perf > /tmp/perf-4711.map"
    )]
    Symbols(SymbolsArgs),
}

#[derive(Args)]
pub struct Rest {
    #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
    pub _any: Vec<String>,
}

#[derive(Args)]
pub struct Which {
    /// Every process that runs this executable.
    #[arg(long, value_name = "PATH")]
    pub exe: Option<PathBuf>,
    /// Every process that runs this build: as its executable, or as a library.
    #[arg(long, value_name = "ID")]
    pub build_id: Option<String>,
}

#[derive(Args)]
pub struct Common {
    /// How long to try, such as 5s or 500ms.
    #[arg(long, default_value = "5s", value_parser = text::duration)]
    pub timeout: Duration,
    /// The longest that threads are held in one attempt.
    #[arg(long, default_value = "100ms", value_parser = text::duration, hide = true)]
    pub hold_deadline: Duration,
    /// Results in JSON.
    #[arg(long)]
    pub json: bool,
}

#[derive(Args)]
pub struct PatchArgs {
    /// PIDs, then the patch file.
    #[arg(required = true, value_name = "PID... FIX.so")]
    pub words: Vec<String>,
    #[command(flatten)]
    pub which: Which,
    #[command(flatten)]
    pub common: Common,
    /// Go on in spite of a rule; known: contexts, unwind, replay.
    #[arg(long, value_name = "RULE")]
    pub allow: Vec<String>,
    /// Leave all processes as they were when one refuses: checks all before it applies, and reverts what it applied.
    #[arg(long)]
    pub all_or_none: bool,
    #[command(flatten)]
    pub inside: Inside,
    #[command(flatten)]
    pub signature: policy::SignatureArgs,
    /// Only this share of the calls runs the patch, such as 10% or 0.5%; which, a key of each call decides.
    #[arg(long, value_name = "PERCENT", value_parser = text::percent, requires = "key")]
    pub canary: Option<u32>,
    /// The key of a function's calls: one of its first six arguments, an integer or a pointer. Once for each function of the patch;
    /// equal keys go the same way.
    #[arg(long, value_name = "FUNC:argN", value_parser = text::key, requires = "canary")]
    pub key: Vec<(String, u8)>,
    /// Stays, and reverts the patch unless `livepatch confirm` has made it permanent by then.
    #[arg(long, value_name = "TIME", value_parser = text::duration)]
    pub confirm_within: Option<Duration>,
    /// From outside even where an agent is linked in: all threads switch at one instant.
    #[arg(long)]
    pub hold: bool,
}

/// What no thread may be inside of when the code switches.
#[derive(Args)]
pub struct Inside {
    /// What no thread may be inside of: `stack`, any function of the patch; or `entry`, only the bytes that are written: calls that began
    /// before go on in the code that they began in, beside the other.
    #[arg(long, default_value = "stack", value_parser = ["stack", "entry"])]
    pub consistency: String,
    /// A function in which threads may stay, such as an event loop that never returns; as the report spells it.
    #[arg(long, value_name = "FUNC")]
    pub leave_running: Vec<String>,
}

impl Inside {
    /// What they ask for.
    pub fn consistency(&self) -> Consistency {
        match (self.consistency.as_str(), &self.leave_running[..]) {
            ("entry", _) => Consistency::Entry,
            (_, []) => Consistency::Stack,
            (_, names) => Consistency::StackBut(names.to_vec()),
        }
    }
}

#[derive(Args)]
pub struct RevertArgs {
    /// PIDs, then perhaps the patch's name.
    #[arg(value_name = "PID... [NAME]")]
    pub words: Vec<String>,
    /// Reverts all patches, the newest first.
    #[arg(long)]
    pub all: bool,
    /// Then takes reverted patches out of the process's memory, once a scan of it shows that nothing leads there. Needs no patch
    /// that is still applied.
    #[arg(long)]
    pub reclaim: bool,
    /// From outside even where an agent is linked in: all threads switch at one instant.
    #[arg(long)]
    pub hold: bool,
    #[command(flatten)]
    pub inside: Inside,
    #[command(flatten)]
    pub which: Which,
    #[command(flatten)]
    pub common: Common,
}

#[derive(Args)]
pub struct SymbolsArgs {
    /// A process, or its core file.
    #[arg(value_name = "PID|CORE")]
    pub of: String,
    /// Where the files go that gdb reads.
    #[arg(long, value_name = "DIR", default_value = ".")]
    pub dir: PathBuf,
    /// Lines of a perf map in place of commands for gdb.
    #[arg(long)]
    pub perf: bool,
}

#[derive(Args)]
pub struct CanaryArgs {
    /// PIDs, the patch's name, and the share (not with --follow).
    #[arg(required = true, value_name = "PID... NAME PERCENT")]
    pub words: Vec<String>,
    #[command(flatten)]
    pub which: Which,
    /// Stays, and sets what this file says whenever that changes: a number, with or without %.
    #[arg(long, value_name = "FILE")]
    pub follow: Option<PathBuf>,
    /// From outside even where an agent is linked in.
    #[arg(long)]
    pub hold: bool,
    /// Results in JSON.
    #[arg(long)]
    pub json: bool,
}

#[derive(Args)]
pub struct ConfirmArgs {
    /// PIDs, then the patch's name.
    #[arg(required = true, value_name = "PID... NAME")]
    pub words: Vec<String>,
    #[command(flatten)]
    pub which: Which,
    /// From outside even where an agent is linked in.
    #[arg(long)]
    pub hold: bool,
    /// Results in JSON.
    #[arg(long)]
    pub json: bool,
}

#[derive(Args)]
pub struct RecoverArgs {
    /// The processes.
    #[arg(value_name = "PID")]
    pub pids: Vec<i32>,
    #[command(flatten)]
    pub which: Which,
    #[command(flatten)]
    pub common: Common,
}

#[derive(Args)]
pub struct StatusArgs {
    /// The processes.
    #[arg(value_name = "PID")]
    pub pids: Vec<i32>,
    #[command(flatten)]
    pub which: Which,
    /// Results in JSON.
    #[arg(long)]
    pub json: bool,
}

impl Which {
    pub fn is_given(&self) -> bool {
        self.exe.is_some() || self.build_id.is_some()
    }

    pub fn matches(&self, pid: i32) -> bool {
        let exe = self.exe.as_ref().is_none_or(|path| {
            let running = std::fs::read_link(format!("/proc/{pid}/exe")).unwrap_or_default();
            // A file that was replaced shows with a mark.
            let running = running.to_string_lossy().trim_end_matches(" (deleted)").to_owned();
            let wanted = std::fs::canonicalize(path).unwrap_or_else(|_| path.clone());
            Path::new(&running) == wanted
        });
        exe && self.build_id.as_ref().is_none_or(|id| Patcher::open(Pid(pid)).is_ok_and(|p| p.runs(id)))
    }

    /// The processes among `words`, all of which are PIDs; else the exit code, and it was said why.
    pub fn of_words(&self, words: &[String]) -> Result<Vec<i32>, u8> {
        let named: Result<Vec<i32>, u8> =
            words.iter().map(|p| p.parse::<i32>().map_err(|_| usage(&format!("{p:?} is not a PID")))).collect();
        self.some(&named?)
    }

    /// The processes meant, at least one; else the exit code, and it was said why.
    pub fn some(&self, named: &[i32]) -> Result<Vec<i32>, u8> {
        const NO_PROCESS: u8 = 6;
        let pids = self.pids(named).map_err(|e| usage(&e))?;
        if pids.is_empty() {
            eprintln!("livepatch: no process matches");
            return Err(NO_PROCESS);
        }
        Ok(pids)
    }

    /// The processes meant: those named, or all that match.
    pub fn pids(&self, named: &[i32]) -> Result<Vec<i32>, String> {
        if !self.is_given() {
            return if named.is_empty() {
                Err("which process? Give a PID, --exe or --build-id".into())
            } else {
                Ok(named.to_vec())
            };
        }
        if !named.is_empty() {
            return Err("give PIDs, or --exe or --build-id, not both".into());
        }
        let own = std::process::id().cast_signed();
        let all = std::fs::read_dir("/proc").into_iter().flatten().flatten();
        let numbers = all.filter_map(|e| e.file_name().to_str()?.parse().ok());
        let mut found: Vec<i32> = numbers.filter(|p| *p != own && self.matches(*p)).collect();
        found.sort_unstable();
        Ok(found)
    }
}
