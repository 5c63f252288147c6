//! Text in, text out, exit codes. Results go to stdout, messages to stderr.

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use clap::{Args, Parser, Subcommand};
use livepatch::patch::PatchFile;
use livepatch::patcher::{patched_processes, Canary, CheckReport, Error, Options, Patcher, Report};
use livepatch::plan::beside::Consistency;
use livepatch::process::{Pid, ProcessError};
use serde_json::json;

mod canary;
mod confirm;
mod debug;
mod policy;
mod text;

#[derive(Parser)]
#[command(
    name = "livepatch",
    version,
    about = "Patches a running Linux x86-64 process, and takes it back",
    after_help = "Example:\n  patch-builder old-build new-build -o fix.so\n  livepatch apply 4711 fix.so\n  livepatch revert 4711\n\n\
        Exit codes: 0 done, 1 error, 2 usage, 3 refused, 4 not quiescent before the timeout,\n\
        6 no such process, no permission or another tracer"
)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
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
    #[command(hide = true)]
    Watch(Rest),
    #[command(hide = true)]
    Console(Rest),
    /// Writes what gdb and perf need to name a patch's functions.
    #[command(
        after_help = "Example:\n  livepatch symbols 4711 > patch.gdb && gdb -p 4711 -x patch.gdb\n  livepatch symbols core > patch.gdb && gdb gateway core -x patch.gdb\n  livepatch symbols 4711 --perf > /tmp/perf-4711.map"
    )]
    Symbols(SymbolsArgs),
}

#[derive(Args)]
struct Rest {
    #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
    _any: Vec<String>,
}

#[derive(Args)]
struct Which {
    /// Every process that runs this executable.
    #[arg(long, value_name = "PATH")]
    exe: Option<PathBuf>,
    /// Every process that runs this build: as its executable, or as a library.
    #[arg(long, value_name = "ID")]
    build_id: Option<String>,
}

#[derive(Args)]
struct Common {
    /// How long to try, such as 5s or 500ms.
    #[arg(long, default_value = "5s", value_parser = text::duration)]
    timeout: Duration,
    /// The longest that threads are held in one attempt.
    #[arg(long, default_value = "100ms", value_parser = text::duration, hide = true)]
    hold_deadline: Duration,
    /// Results in JSON.
    #[arg(long)]
    json: bool,
}

#[derive(Args)]
struct PatchArgs {
    /// PIDs, then the patch file.
    #[arg(required = true, value_name = "PID... FIX.so")]
    words: Vec<String>,
    #[command(flatten)]
    which: Which,
    #[command(flatten)]
    common: Common,
    /// Go on in spite of a rule; known: contexts, unwind, replay.
    #[arg(long, value_name = "RULE")]
    allow: Vec<String>,
    /// Leave all processes as they were when one refuses: checks all before it applies, and reverts what it applied.
    #[arg(long)]
    all_or_none: bool,
    #[command(flatten)]
    inside: Inside,
    #[command(flatten)]
    signature: policy::SignatureArgs,
    /// Only this share of the calls runs the patch, such as 10% or 0.5%; which, a key of each call decides.
    #[arg(long, value_name = "PERCENT", value_parser = text::percent, requires = "key")]
    canary: Option<u32>,
    /// The key of a function's calls: one of its first six arguments, an integer or a pointer. Once for each function of the patch;
    /// equal keys go the same way.
    #[arg(long, value_name = "FUNC:argN", value_parser = text::key, requires = "canary")]
    key: Vec<(String, u8)>,
    /// Stays, and reverts the patch unless `livepatch confirm` has made it permanent by then.
    #[arg(long, value_name = "TIME", value_parser = text::duration)]
    confirm_within: Option<Duration>,
    /// Holds from outside even where an agent is linked in: always so in this version.
    #[arg(long)]
    hold: bool,
}

/// What no thread may be inside of when the code switches.
#[derive(Args)]
struct Inside {
    /// What no thread may be inside of: `stack`, any function of the patch; or `entry`, only the bytes that are written: calls that began
    /// before go on in the code that they began in, beside the other.
    #[arg(long, default_value = "stack", value_parser = ["stack", "entry"])]
    consistency: String,
    /// A function in which threads may stay, such as an event loop that never returns; as the report spells it.
    #[arg(long, value_name = "FUNC")]
    leave_running: Vec<String>,
}

impl Inside {
    fn consistency(&self) -> Consistency {
        match (self.consistency.as_str(), &self.leave_running[..]) {
            ("entry", _) => Consistency::Entry,
            (_, []) => Consistency::Stack,
            (_, names) => Consistency::StackBut(names.to_vec()),
        }
    }
}

#[derive(Args)]
struct RevertArgs {
    /// PIDs, then perhaps the patch's name.
    #[arg(value_name = "PID... [NAME]")]
    words: Vec<String>,
    /// Reverts all patches, the newest first.
    #[arg(long)]
    all: bool,
    /// Then takes reverted patches out of the process's memory, once a scan of it shows that nothing leads there. Needs no patch
    /// that is still applied.
    #[arg(long)]
    reclaim: bool,
    #[command(flatten)]
    inside: Inside,
    #[command(flatten)]
    which: Which,
    #[command(flatten)]
    common: Common,
}

#[derive(Args)]
struct SymbolsArgs {
    /// A process, or its core file.
    #[arg(value_name = "PID|CORE")]
    of: String,
    /// Where the files go that gdb reads.
    #[arg(long, value_name = "DIR", default_value = ".")]
    dir: PathBuf,
    /// Lines of a perf map in place of commands for gdb.
    #[arg(long)]
    perf: bool,
}

#[derive(Args)]
struct CanaryArgs {
    /// PIDs, the patch's name, and the share (not with --follow).
    #[arg(required = true, value_name = "PID... NAME PERCENT")]
    words: Vec<String>,
    #[command(flatten)]
    which: Which,
    /// Stays, and sets what this file says whenever that changes: a number, with or without %.
    #[arg(long, value_name = "FILE")]
    follow: Option<PathBuf>,
    /// Results in JSON.
    #[arg(long)]
    json: bool,
}

#[derive(Args)]
struct ConfirmArgs {
    /// PIDs, then the patch's name.
    #[arg(required = true, value_name = "PID... NAME")]
    words: Vec<String>,
    #[command(flatten)]
    which: Which,
    /// Results in JSON.
    #[arg(long)]
    json: bool,
}

#[derive(Args)]
struct RecoverArgs {
    /// The processes.
    #[arg(value_name = "PID")]
    pids: Vec<i32>,
    #[command(flatten)]
    which: Which,
    #[command(flatten)]
    common: Common,
}

#[derive(Args)]
struct StatusArgs {
    /// The processes.
    #[arg(value_name = "PID")]
    pids: Vec<i32>,
    #[command(flatten)]
    which: Which,
    /// Results in JSON.
    #[arg(long)]
    json: bool,
}

const USAGE: u8 = 2;

/// Runs the command line.
pub fn main() -> ExitCode {
    let code = match Cli::parse().command {
        Command::Check(a) => check(&a),
        Command::Apply(a) => apply(&a),
        Command::Revert(a) => revert(&a),
        Command::Status(a) => status(&a),
        Command::Canary(a) => canary::main(&a),
        Command::Confirm(a) => confirm::confirm(&a),
        Command::Recover(a) => recover(&a),
        Command::Watch(_) => absent("watch"),
        Command::Console(_) => absent("console"),
        Command::Symbols(a) => debug::symbols(&a),
    };
    ExitCode::from(code)
}

fn absent(command: &str) -> u8 {
    usage(&format!("{command} is not in this version"))
}

fn usage(message: &str) -> u8 {
    eprintln!("livepatch: {message}");
    USAGE
}

impl Which {
    fn is_given(&self) -> bool {
        self.exe.is_some() || self.build_id.is_some()
    }

    fn matches(&self, pid: i32) -> bool {
        let exe = self.exe.as_ref().is_none_or(|path| {
            let running = std::fs::read_link(format!("/proc/{pid}/exe")).unwrap_or_default();
            // A file that was replaced shows with a mark.
            let running = running.to_string_lossy().trim_end_matches(" (deleted)").to_owned();
            let wanted = std::fs::canonicalize(path).unwrap_or_else(|_| path.clone());
            Path::new(&running) == wanted
        });
        exe && self.build_id.as_ref().is_none_or(|id| Patcher::open(Pid(pid)).is_ok_and(|p| p.runs(id)))
    }

    /// The processes meant: those named, or all that match.
    fn pids(&self, named: &[i32]) -> Result<Vec<i32>, String> {
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

/// An error about one process, on stderr and under `--json` on stdout.
fn fail(pid: Option<i32>, error: &Error, json: bool) -> u8 {
    match pid {
        Some(pid) => eprintln!("livepatch: process {pid}: {error}"),
        None => eprintln!("livepatch: {error}"),
    }
    if json {
        println!("{}", text::error_json(pid, error));
    }
    error.exit_code()
}

fn read_patch(path: &str, json: bool) -> Result<(PatchFile, Vec<u8>), u8> {
    let bytes = std::fs::read(path).map_err(|e| {
        eprintln!("livepatch: {path}: {e}");
        1
    })?;
    let patch = PatchFile::parse(&bytes).map_err(|e| {
        eprintln!("livepatch: {path}: {e}");
        if json {
            println!("{}", json!({"error": {"message": format!("{path}: {e}")}}));
        }
        1
    });
    patch.map(|patch| (patch, bytes))
}

impl PatchArgs {
    fn parse(&self) -> Result<(Vec<i32>, PatchFile, Options), u8> {
        let Some((file, pids)) = self.words.split_last() else { return Err(usage("which patch?")) };
        let pids: Result<Vec<i32>, _> = pids.iter().map(|p| p.parse::<i32>().map_err(|_| p)).collect();
        let pids = pids.map_err(|p| usage(&format!("{p:?} is not a PID")))?;
        if let Some(rule) = self.allow.iter().find(|r| !["contexts", "unwind", "replay"].contains(&r.as_str())) {
            return Err(usage(&format!("--allow {rule}: no such rule; known: contexts, unwind, replay")));
        }
        if file.parse::<i32>().is_ok() && !Path::new(file).exists() {
            return Err(usage(&format!("{file:?} is a PID: give the patch file after it")));
        }
        if self.key.iter().any(|(function, argument)| function == text::SESSION && *argument == 0) {
            eprintln!("livepatch: refused: --key session needs an agent that is linked into the process: give --key FUNC:argN");
            return Err(3);
        }
        let pids = self.which.pids(&pids).map_err(|e| usage(&e))?;
        let (patch, bytes) = read_patch(file, self.common.json)?;
        let signed = self.signature.check(Path::new(file), &bytes, self.common.json)?;
        if pids.is_empty() {
            eprintln!("livepatch: no process matches");
            return Err(6);
        }
        let options = Options {
            timeout: self.common.timeout,
            hold: self.common.hold_deadline,
            allow_contexts: self.allow.iter().any(|r| r == "contexts"),
            allow_unwind: self.allow.iter().any(|r| r == "unwind"),
            consistency: self.inside.consistency(),
            signed,
            canary: self.canary.map(|share| Canary { share, keys: self.key.clone() }),
            confirm_within: self.confirm_within,
            allow_replay: self.allow.iter().any(|r| r == "replay"),
        };
        Ok((pids, patch, options))
    }
}

fn check(args: &PatchArgs) -> u8 {
    let (pids, patch, options) = match args.parse() {
        Ok(parsed) => parsed,
        Err(code) => return code,
    };
    let mut code = 0;
    for pid in pids {
        match Patcher::open(Pid(pid)).and_then(|p| p.check(&patch, &options)) {
            Ok(report) => print_check(&report, args.common.json),
            Err(e) => code = worst(code, fail(Some(pid), &e, args.common.json)),
        }
    }
    code
}

fn print_check(report: &CheckReport, json: bool) {
    if json {
        println!("{}", serde_json::to_string(report).unwrap_or_default());
    } else {
        print!("{}", text::check(report));
    }
}

fn print_report(report: &Report, json: bool) {
    for warning in &report.warnings {
        eprintln!("livepatch: process {}: warning: {warning}", report.pid);
    }
    if json {
        println!("{}", serde_json::to_string(report).unwrap_or_default());
    } else {
        print!("{}", text::report(report));
    }
}

/// The first exit code that is not 0 stands.
fn worst(before: u8, now: u8) -> u8 {
    if before == 0 {
        now
    } else {
        before
    }
}

fn apply(args: &PatchArgs) -> u8 {
    let (pids, patch, options) = match args.parse() {
        Ok(parsed) => parsed,
        Err(code) => return code,
    };
    let json = args.common.json;
    if args.all_or_none {
        for pid in &pids {
            if let Err(e) = Patcher::open(Pid(*pid)).and_then(|p| p.check(&patch, &options)) {
                eprintln!("livepatch: no process was changed, for one refuses");
                return fail(Some(*pid), &e, json);
            }
        }
    }
    let (mut code, mut done) = (0, Vec::new());
    for pid in pids {
        match Patcher::open(Pid(pid)).and_then(|mut p| p.apply(&patch, &options)) {
            Ok(report) => {
                print_report(&report, json);
                if !report.already {
                    done.push(pid);
                }
                if report.already && options.confirm_within.is_some() {
                    eprintln!("livepatch: process {pid}: it was applied before: nothing reverts it");
                }
            }
            Err(e) => {
                code = worst(code, fail(Some(pid), &e, json));
                if args.all_or_none {
                    take_back(&done, &patch.manifest.name, &options, json);
                    done.clear();
                    break;
                }
            }
        }
    }
    match options.confirm_within {
        Some(within) => worst(code, confirm::watch(done, &patch, within, &options, json)),
        None => code,
    }
}

/// Reverts what was applied before one process failed.
fn take_back(done: &[i32], name: &str, options: &Options, json: bool) {
    for pid in done.iter().rev() {
        match Patcher::open(Pid(*pid)).and_then(|mut p| p.revert(Some(name), options)) {
            Ok(report) => print_report(&report, json),
            Err(e) => {
                fail(Some(*pid), &e, json);
                eprintln!("livepatch: process {pid} keeps patch {name}");
            }
        }
    }
}

fn revert(args: &RevertArgs) -> u8 {
    let mut pids = Vec::new();
    let mut name = None;
    for word in &args.words {
        match (word.parse::<i32>(), &name) {
            (Ok(pid), None) => pids.push(pid),
            (Err(_), None) if !pids.is_empty() || args.which.is_given() => name = Some(word.as_str()),
            _ => return usage(&format!("{word:?} is not a PID")),
        }
    }
    if args.all && name.is_some() {
        return usage("give a patch's name or --all, not both");
    }
    let pids = match args.which.pids(&pids) {
        Ok(pids) => pids,
        Err(e) => return usage(&e),
    };
    if pids.is_empty() {
        eprintln!("livepatch: no process matches");
        return 6;
    }
    let options = Options {
        timeout: args.common.timeout,
        hold: args.common.hold_deadline,
        allow_contexts: true,
        allow_unwind: true,
        consistency: args.inside.consistency(),
        ..Options::default()
    };
    let json = args.common.json;
    let mut code = 0;
    for pid in pids {
        let result = Patcher::open(Pid(pid)).and_then(|mut p| {
            if args.all {
                p.revert_all(&options)
            } else {
                p.revert(name, &options).map(|r| vec![r])
            }
        });
        match result {
            Ok(reports) => reports.iter().for_each(|r| print_report(r, json)),
            // What was reverted before may be there to be reclaimed.
            Err(Error::NothingApplied { .. }) if args.reclaim => {}
            Err(e) => {
                code = worst(code, fail(Some(pid), &e, json));
                continue;
            }
        }
        if args.reclaim {
            code = worst(code, reclaim(pid, &options, json));
        }
    }
    code
}

fn reclaim(pid: i32, options: &Options, json: bool) -> u8 {
    match Patcher::open(Pid(pid)).and_then(|mut p| p.reclaim(options)) {
        Ok(done) if json => println!("{}", json!({"pid": pid, "reclaimed": done})),
        Ok(done) => print!("{}", text::reclaimed(pid, done.as_ref())),
        Err(e) => return fail(Some(pid), &e, json),
    }
    0
}

fn recover(args: &RecoverArgs) -> u8 {
    let pids = match args.which.pids(&args.pids) {
        Ok(pids) => pids,
        Err(e) => return usage(&e),
    };
    let options = Options { timeout: args.common.timeout, hold: args.common.hold_deadline, ..Options::default() };
    let mut code = 0;
    for pid in pids {
        match Patcher::open(Pid(pid)).and_then(|mut p| p.recover(&options)) {
            Ok(done) if args.common.json => println!("{}", json!({"pid": pid, "recovered": done})),
            Ok(done) => print!("{}", text::recovered(pid, &done)),
            Err(e) => code = worst(code, fail(Some(pid), &e, args.common.json)),
        }
    }
    code
}

fn status(args: &StatusArgs) -> u8 {
    let mut code = 0;
    let mut list = Vec::new();
    if args.pids.is_empty() && !args.which.is_given() {
        let (found, hidden) = patched_processes();
        if hidden > 0 {
            eprintln!("livepatch: {hidden} processes could not be looked at for want of permission");
        }
        list = found;
    } else {
        let pids = match args.which.pids(&args.pids) {
            Ok(pids) => pids,
            Err(e) => return usage(&e),
        };
        for pid in pids {
            match Patcher::open(Pid(pid)).and_then(|p| p.status()) {
                Ok(status) => list.push(status),
                // A traced process is not ours to touch, but a failure all the same.
                Err(e @ Error::Process(ProcessError::Traced { .. })) => {
                    code = worst(code, fail(Some(pid), &e, args.json))
                }
                Err(e) => code = worst(code, fail(Some(pid), &e, args.json)),
            }
        }
    }
    if args.json {
        println!("{}", serde_json::to_string(&list).unwrap_or_default());
    } else if list.is_empty() && code == 0 {
        println!("no patched process");
    } else {
        list.iter().for_each(|s| print!("{}", text::status(s)));
    }
    code
}
