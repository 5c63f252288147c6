//! Applies a patch by the library, runs a check of yours, and reverts at once if that fails.
//!
//!     cargo run --example guarded -- PID FIX.so CHECK [ARG]...

use std::process::{Command, ExitCode};

use livepatch::patch::PatchFile;
use livepatch::patcher::{Error, Options, Patcher};
use livepatch::process::Pid;

fn guarded(pid: Pid, patch: &PatchFile, check: &mut Command) -> Result<bool, Error> {
    let options = Options::default();
    let mut process = Patcher::open(pid)?;
    // Touches nothing, and tells every reason at once.
    for inside in process.check(patch, &options)?.inside {
        println!("thread {} is inside {} now", inside.tid, inside.function);
    }
    let applied = process.apply(patch, &options)?;
    println!("applied {}: {} entry jumps, {} µs", applied.patch, applied.entries, applied.pause_us);
    if check.status().is_ok_and(|s| s.success()) {
        return Ok(true);
    }
    let reverted = process.revert(Some(&applied.patch), &options)?;
    println!("the check failed; reverted {} in {} µs", reverted.patch, reverted.pause_us);
    Ok(false)
}

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let [pid, fix, command, rest @ ..] = &args[..] else {
        eprintln!("usage: guarded PID FIX.so CHECK [ARG]...");
        return ExitCode::from(2);
    };
    let Ok(pid) = pid.parse() else {
        eprintln!("{pid} is not a PID");
        return ExitCode::from(2);
    };
    let patch = std::fs::read(fix).map_err(|e| e.to_string());
    let patch = match patch.and_then(|bytes| PatchFile::parse(&bytes).map_err(|e| e.to_string())) {
        Ok(patch) => patch,
        Err(e) => {
            eprintln!("{fix}: {e}");
            return ExitCode::from(1);
        }
    };
    match guarded(Pid(pid), &patch, Command::new(command).args(rest)) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::from(5),
        Err(e) => {
            eprintln!("process {pid}: {e}");
            ExitCode::from(e.exit_code())
        }
    }
}
