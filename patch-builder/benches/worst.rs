//! Time and memory of patch-builder for programs that are hard on a differ, at two sizes: twice as much input must take
//! about twice as much time. Run by `./ci/bench-builder`; ends with an error where a goal is missed.
//!
//!     cargo bench -p patch-builder --bench worst -- [WORD]... [--percent N]

#[path = "../tests/worst/cases.rs"]
mod cases;

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};

use cases::{build, Answer, Case, CASES};

/// Seconds and MiB that no case may take.
const LIMIT: (f64, u64) = (30.0, 4096);
/// How much longer twice as much may take. What both sizes have in common makes it less than 2.
const GROWTH: f64 = 2.6;
/// Seconds under which a time says nothing about growth.
const NOTHING: f64 = 0.15;

/// What a run took.
#[derive(Clone, Copy)]
struct Taken {
    cpu_s: f64,
    wall_s: f64,
    peak_mib: u64,
}

fn measure(builder: &Path, case: &Case, [old, new]: &[PathBuf; 2], n: usize) -> Result<Taken, String> {
    let patch = old.with_extension("so");
    let done = Command::new(builder).arg(old).arg(new).arg("-o").arg(&patch).arg("--json").output();
    let _ = std::fs::remove_file(&patch);
    let done = done.map_err(|e| e.to_string())?;
    let said: serde_json::Value = serde_json::from_slice(&done.stdout).map_err(|_| {
        let text = String::from_utf8_lossy(&done.stderr);
        format!("{}: {}", done.status, text.lines().next().unwrap_or_default())
    })?;
    let rules = said["refusals"].as_array().into_iter().flatten().filter_map(|r| r["rule"].as_str());
    let rules: BTreeSet<&str> = rules.collect();
    let functions = said["functions"].as_array().map_or(0, Vec::len);
    let right = match case.answer {
        Answer::Refused(rule) => rules.contains(&rule),
        Answer::Patch(count) => rules.is_empty() && functions == count,
        Answer::PatchAll(more) => rules.is_empty() && functions == n + more,
    };
    if !right {
        return Err(format!("{functions} functions, refused by {rules:?}; expected {:?}", case.answer));
    }
    let number = |key: &str| said["cost"][key].as_f64().unwrap_or(f64::MAX);
    Ok(Taken {
        cpu_s: (number("user_ms") + number("system_ms")) / 1e3,
        wall_s: number("wall_ms") / 1e3,
        peak_mib: number("peak_kib") as u64 / 1024,
    })
}

fn judge(case: &Case, small: Taken, large: Taken) -> Option<String> {
    if large.wall_s > LIMIT.0 || large.peak_mib > LIMIT.1 {
        return Some(format!("over {} s or {} MiB", LIMIT.0, LIMIT.1));
    }
    let growth = large.cpu_s / small.cpu_s;
    let grows = large.cpu_s > NOTHING && growth > GROWTH;
    grows.then(|| format!("{}: twice as much takes {growth:.1} times as long", case.name))
}

fn main() -> ExitCode {
    let (mut words, mut percent) = (Vec::new(), 100);
    let mut args = std::env::args().skip(1).filter(|a| a != "--bench");
    while let Some(arg) = args.next() {
        if arg == "--percent" {
            percent = args.next().and_then(|n| n.parse().ok()).unwrap_or(100);
        } else {
            words.push(arg);
        }
    }
    let builder = std::env::var_os("LIVEPATCH_BIN_DIR")
        .map_or_else(|| PathBuf::from(env!("CARGO_BIN_EXE_patch-builder")), |d| PathBuf::from(d).join("patch-builder"));
    let folder = std::env::temp_dir().join(format!("patch-builder-worst-{}", std::process::id()));
    std::fs::create_dir_all(&folder).expect("the temporary folder is writable");
    let mut missed = 0;
    println!(
        "{:28} {:>9} {:>8} {:>9} {:>8} {:>6} {:>9}",
        "program", "size", "cpu s", "twice", "cpu s", "ratio", "peak MiB"
    );
    for case in CASES.iter().filter(|c| words.is_empty() || words.iter().any(|w| c.name.contains(w.as_str()))) {
        let n = case.large * percent / 100;
        let take = |n: usize| {
            let pair = build(case, n, &folder);
            // The least of three: whatever else the machine does only adds.
            let runs: Result<Vec<Taken>, String> = (0..3).map(|_| measure(&builder, case, &pair, n)).collect();
            let taken = runs.map(|r| r.into_iter().min_by(|a, b| a.cpu_s.total_cmp(&b.cpu_s)).expect("three runs"));
            pair.iter().for_each(|p| {
                let _ = std::fs::remove_file(p);
            });
            taken
        };
        let complaint = match (take(n), take(2 * n)) {
            (Ok(a), Ok(b)) => {
                let ratio = b.cpu_s / a.cpu_s;
                println!(
                    "{:28} {n:9} {:8.2} {:9} {:8.2} {ratio:6.2} {:9}",
                    case.name,
                    a.cpu_s,
                    2 * n,
                    b.cpu_s,
                    b.peak_mib
                );
                judge(case, a, b)
            }
            (Err(why), _) | (_, Err(why)) => {
                println!("{:28} {n:9} {why}", case.name);
                Some(why)
            }
        };
        if let Some(why) = complaint {
            println!("MISS  {}: {why}", case.name);
            missed += 1;
        }
    }
    let _ = std::fs::remove_dir_all(&folder);
    if missed == 0 {
        println!("ok    every hard program: under {} s and {} MiB, and linear", LIMIT.0, LIMIT.1);
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    }
}
