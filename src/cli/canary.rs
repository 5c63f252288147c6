//! The share of a canary, once or as a file says.

use std::path::Path;
use std::time::Duration;

use livepatch::patcher::{status_of, Error};
use livepatch::process::{Pid, ProcessError};
use serde_json::json;

use super::args::CanaryArgs;
use super::{fail, text, usage, ways, worst};

/// How often a followed file is read.
const LOOK: Duration = Duration::from_millis(200);

/// `livepatch canary PID... NAME PERCENT | --follow FILE`
pub fn main(args: &CanaryArgs) -> u8 {
    let mut words = args.words.clone();
    let share = match &args.follow {
        Some(_) => None,
        None => match words.pop().as_deref().map(text::percent) {
            Some(Ok(share)) => Some(share),
            Some(Err(e)) => return usage(&e),
            None => return usage("what share?"),
        },
    };
    let Some(name) = words.pop() else { return usage("which patch, and what share? PID... NAME PERCENT") };
    let pids = match args.which.of_words(&words) {
        Ok(pids) => pids,
        Err(code) => return code,
    };
    match (share, &args.follow) {
        (Some(share), _) => pids.into_iter().fold(0, |code, pid| worst(code, set(pid, &name, share, args))),
        (None, Some(file)) => follow(pids, &name, file, args),
        (None, None) => usage("what share?"),
    }
}

fn tell(pid: i32, name: &str, share: u32, as_json: bool) {
    let percent = f64::from(share) / 100.0;
    if as_json {
        println!("{}", json!({"pid": pid, "patch": name, "canary_percent": percent}));
    } else {
        println!("process {pid}: patch {name} runs in {percent} % of the calls");
    }
}

fn set(pid: i32, name: &str, share: u32, args: &CanaryArgs) -> u8 {
    match ways::set_share(pid, name, share, args.hold) {
        Ok(()) => {
            tell(pid, name, share, args.json);
            0
        }
        Err(e) => fail(Some(pid), &e, args.json),
    }
}

/// Until none of the processes has the patch any more.
fn follow(mut pids: Vec<i32>, name: &str, file: &Path, args: &CanaryArgs) -> u8 {
    let (mut code, mut last, mut said) = (0, None, None);
    while !pids.is_empty() {
        let read = std::fs::read_to_string(file).map_err(|e| e.to_string()).and_then(|t| text::percent(t.trim()));
        match read {
            // What can't be read changes nothing; a file that is being written, for one.
            Err(e) => {
                if said.as_ref() != Some(&e) {
                    eprintln!("livepatch: {}: {e}; the share stays", file.display());
                    said = Some(e);
                }
            }
            Ok(share) => {
                let changed = last != Some(share);
                pids.retain(|pid| {
                    if !changed {
                        return is_there(*pid, name);
                    }
                    match ways::set_share(*pid, name, share, args.hold) {
                        Ok(()) => tell(*pid, name, share, args.json),
                        Err(e) if e.is_not_applied() => return false,
                        Err(e) => {
                            code = worst(code, fail(Some(*pid), &e, args.json));
                            return false;
                        }
                    }
                    true
                });
                (last, said) = (Some(share), None);
            }
        }
        std::thread::sleep(LOOK);
    }
    code
}

fn is_there(pid: i32, name: &str) -> bool {
    match status_of(Pid(pid)) {
        Ok(status) => status.patches.iter().any(|p| p.patch == name && p.canary_percent.is_some()),
        Err(Error::Process(ProcessError::Gone(_))) => false,
        Err(_) => true,
    }
}
