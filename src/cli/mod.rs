//! Text in, text out, exit codes. Results go to stdout, messages to stderr.

use std::path::Path;
use std::process::ExitCode;

use clap::Parser;
use livepatch::patch::PatchFile;
use livepatch::patcher::{patched_processes, Canary, CheckReport, Options, Patcher, Report};
use livepatch::process::Pid;
use serde_json::json;

use args::{Cli, Command, PatchArgs, RecoverArgs, RevertArgs, StatusArgs};
use ways::{Done, Failed, Fix};

mod args;
mod canary;
mod confirm;
mod debug;
mod policy;
mod text;
mod watch;
mod ways;

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
        Command::Watch(a) => watch::watch(&a),
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

/// An error about one process, on stderr and under `--json` on stdout.
fn fail(pid: Option<i32>, error: &Failed, json: bool) -> u8 {
    match pid {
        Some(pid) => eprintln!("livepatch: process {pid}: {error}"),
        None => eprintln!("livepatch: {error}"),
    }
    if json {
        println!("{}", error.to_json(pid));
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
    fn parse(&self) -> Result<(Vec<i32>, Fix, Options), u8> {
        let Some((file, words)) = self.words.split_last() else { return Err(usage("which patch?")) };
        if let Some(rule) = self.allow.iter().find(|r| !["contexts", "unwind", "replay"].contains(&r.as_str())) {
            return Err(usage(&format!("--allow {rule}: no such rule; known: contexts, unwind, replay")));
        }
        if file.parse::<i32>().is_ok() && !Path::new(file).exists() {
            return Err(usage(&format!("{file:?} is a PID: give the patch file after it")));
        }
        let pids = self.which.of_words(words)?;
        let (patch, bytes) = read_patch(file, self.common.json)?;
        let signed = self.signature.check(Path::new(file), &bytes, self.common.json)?;
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
        Ok((pids, Fix::new(patch, bytes, Path::new(file)), options))
    }
}

fn check(args: &PatchArgs) -> u8 {
    let (pids, fix, options) = match args.parse() {
        Ok(parsed) => parsed,
        Err(code) => return code,
    };
    let mut code = 0;
    for pid in pids {
        match ways::check(pid, &fix, &options, args.hold) {
            Ok(report) => print_check(&report, args.common.json),
            Err(e) => code = worst(code, fail(Some(pid), &e, args.common.json)),
        }
    }
    code
}

fn print_check(report: &Done<CheckReport>, json: bool) {
    if json {
        println!("{}", serde_json::to_string(report).unwrap_or_default());
    } else {
        print!("{}", text::check(&report.what));
    }
}

fn print_report(report: &Done<Report>, json: bool) {
    for warning in &report.what.warnings {
        eprintln!("livepatch: process {}: warning: {warning}", report.what.pid);
    }
    if json {
        println!("{}", serde_json::to_string(report).unwrap_or_default());
    } else {
        print!("{}", text::report(&report.what));
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
    let (pids, fix, options) = match args.parse() {
        Ok(parsed) => parsed,
        Err(code) => return code,
    };
    let json = args.common.json;
    if args.all_or_none {
        for pid in &pids {
            if let Err(e) = ways::check(*pid, &fix, &options, args.hold) {
                eprintln!("livepatch: no process was changed, for one refuses");
                return fail(Some(*pid), &e, json);
            }
        }
    }
    let name = &fix.patch.manifest.name;
    let (mut code, mut done, mut watched) = (0, Vec::new(), Vec::new());
    for pid in pids {
        match ways::apply(pid, &fix, &options, args.hold) {
            Ok(report) => {
                print_report(&report, json);
                match (options.confirm_within, report.what.already) {
                    (Some(_), true) => {
                        eprintln!("livepatch: process {pid}: it was applied before: nothing reverts it");
                    }
                    (Some(within), false) if report.is_by_agent() => eprintln!(
                        "livepatch: process {pid}: its agent reverts patch {name} in {} s unless it is confirmed: livepatch confirm {pid} {name}",
                        within.as_secs_f64()
                    ),
                    (Some(_), false) => watched.push(pid),
                    (None, _) => {}
                }
                if !report.what.already {
                    done.push(pid);
                }
            }
            Err(e) => {
                code = worst(code, fail(Some(pid), &e, json));
                if args.all_or_none {
                    take_back(&done, name, &options, args);
                    watched.clear();
                    break;
                }
            }
        }
    }
    match options.confirm_within {
        Some(within) => worst(code, confirm::watch(watched, &fix.patch, within, &options, args)),
        None => code,
    }
}

/// Reverts what was applied before one process failed.
fn take_back(done: &[i32], name: &str, options: &Options, args: &PatchArgs) {
    let json = args.common.json;
    for pid in done.iter().rev() {
        match ways::revert(*pid, Some(name), false, options, args.hold) {
            Ok(reports) => reports.iter().for_each(|r| print_report(r, json)),
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
    let pids = match args.which.some(&pids) {
        Ok(pids) => pids,
        Err(code) => return code,
    };
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
        match ways::revert(pid, name, args.all, &options, args.hold) {
            Ok(reports) => reports.iter().for_each(|r| print_report(r, json)),
            // What was reverted before may be there to be reclaimed.
            Err(e) if args.reclaim && e.is_nothing_applied() => {}
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
        Err(e) => return fail(Some(pid), &e.into(), json),
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
            Err(e) => code = worst(code, fail(Some(pid), &e.into(), args.common.json)),
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
        list = ways::outside(found);
    } else {
        let pids = match args.which.pids(&args.pids) {
            Ok(pids) => pids,
            Err(e) => return usage(&e),
        };
        for pid in pids {
            match ways::status(pid) {
                Ok(status) => list.push(status),
                Err(e) => code = worst(code, fail(Some(pid), &e, args.json)),
            }
        }
    }
    if args.json {
        println!("{}", serde_json::to_string(&list).unwrap_or_default());
    } else if list.is_empty() && code == 0 {
        println!("no patched process");
    } else {
        list.iter().for_each(|s| print!("{}", text::status(&s.what)));
    }
    code
}
