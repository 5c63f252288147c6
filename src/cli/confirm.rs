//! Patches that are current until somebody makes them permanent.

use std::time::{Duration, Instant};

use livepatch::patch::{HexBytes, PatchFile};
use livepatch::patcher::{status_of, Confirmed, Options};
use livepatch::process::Pid;
use livepatch::registry::State;
use serde_json::json;

use super::args::{ConfirmArgs, PatchArgs};
use super::ways::{self, Failed};
use super::{fail, print_report, usage, worst};

/// How often a patch is looked at: a read of the process's memory.
const LOOK: Duration = Duration::from_millis(200);

/// A gate said no.
const NOT_CONFIRMED: u8 = 5;

/// `livepatch confirm PID... NAME`
pub fn confirm(args: &ConfirmArgs) -> u8 {
    let Some((name, pids)) = args.words.split_last() else { return usage("which patch?") };
    let pids = match args.which.of_words(pids) {
        Ok(pids) => pids,
        Err(code) => return code,
    };
    let mut code = 0;
    for pid in pids {
        match ways::confirm(pid, name, args.hold) {
            Ok(()) if args.json => println!("{}", json!({"pid": pid, "patch": name, "confirmation": "permanent"})),
            Ok(()) => println!("process {pid}: patch {name} is permanent"),
            Err(e) => code = worst(code, fail(Some(pid), &e, args.json)),
        }
    }
    code
}

/// What has become of a patch that waits for its confirmation.
enum Seen {
    Waiting,
    Permanent,
    /// Somebody reverted it, or another took its place.
    Away,
}

fn look(pid: i32, digest: &str) -> Result<Seen, Failed> {
    let status = status_of(Pid(pid))?;
    let applied = status.patches.iter().find(|p| p.digest == digest && p.state == State::Applied);
    Ok(match applied.and_then(|p| p.confirmation) {
        Some(Confirmed::Permanent) => Seen::Permanent,
        Some(_) => Seen::Waiting,
        None => Seen::Away,
    })
}

/// Waits until each of these processes has its patch confirmed, and reverts it where that does not come in time.
pub fn watch(mut pids: Vec<i32>, patch: &PatchFile, within: Duration, options: &Options, args: &PatchArgs) -> u8 {
    let json = args.common.json;
    let name = &patch.manifest.name;
    let digest = HexBytes(patch.digest.to_vec()).to_string();
    let deadline = Instant::now() + within;
    for pid in &pids {
        eprintln!(
            "livepatch: process {pid}: patch {name} is reverted in {} s unless it is confirmed: livepatch confirm {pid} {name}",
            within.as_secs_f64()
        );
    }
    let tell = |pid: i32, what: &str| {
        if json {
            println!("{}", json!({"pid": pid, "patch": name, "confirmation": what}));
        } else {
            println!("process {pid}: patch {name} is {what}");
        }
    };
    let mut code = 0;
    while !pids.is_empty() {
        std::thread::sleep(LOOK.min(deadline.saturating_duration_since(Instant::now())));
        let overdue = Instant::now() >= deadline;
        pids.retain(|pid| match look(*pid, &digest) {
            Ok(Seen::Permanent) => {
                tell(*pid, "permanent");
                false
            }
            Ok(Seen::Away) => {
                tell(*pid, "no longer applied");
                false
            }
            Ok(Seen::Waiting) if overdue => {
                eprintln!("livepatch: process {pid}: nobody confirmed patch {name}");
                match ways::revert(*pid, Some(name), false, options, args.hold) {
                    Ok(reports) => {
                        reports.iter().for_each(|r| print_report(r, json));
                        code = worst(code, NOT_CONFIRMED);
                        false
                    }
                    Err(e) => still(*pid, &e, &mut code, json),
                }
            }
            Ok(Seen::Waiting) => true,
            Err(e) => still(*pid, &e, &mut code, json),
        });
    }
    code
}

/// Whether to go on with a process after an error: not with one that is gone.
fn still(pid: i32, error: &Failed, code: &mut u8, json: bool) -> bool {
    if error.is_gone() {
        *code = worst(*code, fail(Some(pid), error, json));
        return false;
    }
    // Another command at work, a debugger, a thread inside: all of that ends.
    eprintln!("livepatch: process {pid}: {error}; trying again");
    std::thread::sleep(LOOK);
    true
}
