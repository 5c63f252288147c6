//! What people read.

use std::fmt::Write;
use std::time::Duration;

use livepatch::patcher::{CheckReport, Confirmed, Outcome, ProcessStatus, Reclaimed, Recovered, Report};
use livepatch::registry::State;

/// `5s`, `500ms`, `2m`; a bare number counts seconds.
pub fn duration(text: &str) -> Result<Duration, String> {
    let digits = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
    let (number, unit) = text.split_at(digits);
    let number: f64 = number.parse().map_err(|_| format!("{text:?} is no duration such as 5s or 500ms"))?;
    let scale = match unit {
        "" | "s" => 1.0,
        "ms" => 1e-3,
        "m" => 60.0,
        _ => return Err(format!("{unit:?} is no unit of time; known: ms, s, m")),
    };
    Duration::try_from_secs_f64(number * scale).map_err(|e| e.to_string())
}

/// `10%`, `0.5`: in 1/10,000.
pub fn percent(text: &str) -> Result<u32, String> {
    let no = || format!("{text:?} is no share such as 10% or 0.5%, in steps of 0.01%");
    let number: f64 = text.trim_end_matches('%').trim().parse().map_err(|_| no())?;
    let share = number * 100.0;
    let whole = (share - share.round()).abs() < 1e-6 && (0.0..=10_000.0).contains(&share);
    whole.then(|| share.round() as u32).ok_or_else(no)
}

/// The key that only an agent knows.
pub const SESSION: &str = "session";

/// `FUNC:arg1`, or `session`, as argument 0.
pub fn key(text: &str) -> Result<(String, u8), String> {
    if text == SESSION {
        return Ok((SESSION.into(), 0));
    }
    let no = || format!("{text:?} is no key such as handle_order:arg1");
    let (function, argument) = text.rsplit_once(":arg").ok_or_else(no)?;
    Ok((function.to_owned(), argument.parse().map_err(|_| no())?))
}

fn count(n: usize, what: &str) -> String {
    format!("{n} {what}{}", if n == 1 { "" } else { "s" })
}

/// The result of an apply or a revert.
pub fn report(r: &Report) -> String {
    let mut out = String::new();
    if r.already {
        let _ = writeln!(out, "process {}: patch {} is already applied; nothing was written", r.pid, r.patch);
        return out;
    }
    let (done, what) = if r.action == "apply" { ("applied", "replaced") } else { ("reverted", "given back") };
    let entries = if r.entries == 1 { "entry jump" } else { "entry jumps" };
    let _ = writeln!(out, "process {}: {done} patch {}", r.pid, r.patch);
    for f in &r.functions {
        let _ = writeln!(out, "  {what}: {f}");
    }
    let (functions, threads) = (count(r.functions.len(), "function"), count(r.threads, "thread"));
    if let Some(within) = &r.within {
        let _ = writeln!(
            out,
            "  {functions}, {} {entries}; no thread held; traps stood for {:.2} ms, {}, {threads}",
            r.entries,
            within.trapping_us / 1e3,
            count(usize::try_from(within.trapped).unwrap_or(usize::MAX), "trapped call"),
        );
        if within.interrupted > 0 {
            let calls = count(usize::try_from(within.interrupted).unwrap_or(usize::MAX), "system call");
            let _ = writeln!(out, "  {calls} ended with EINTR");
        }
        return out;
    }
    let _ = writeln!(
        out,
        "  {}, {} {entries}; pause {:.1} µs (sleeping threads held up to {:.1} µs), {}, {}",
        functions,
        r.entries,
        r.pause_us,
        r.sleepers_us,
        threads,
        count(r.attempts as usize, "attempt"),
    );
    out
}

/// The result of a check.
pub fn check(r: &CheckReport) -> String {
    let mut out = String::new();
    if r.already {
        let _ = writeln!(out, "process {}: patch {} is already applied", r.pid, r.patch);
        return out;
    }
    let _ = writeln!(
        out,
        "process {}: patch {} would apply: {}, {}",
        r.pid,
        r.patch,
        count(r.functions.len(), "function"),
        count(r.entries, "entry jump")
    );
    for f in &r.functions {
        let _ = writeln!(out, "  would replace: {f}");
    }
    for w in &r.warnings {
        let _ = writeln!(out, "  {w}");
    }
    for b in &r.inside {
        let how = if b.certain { "is inside" } else { "may be inside" };
        let _ = writeln!(out, "  now thread {} ({}) {how} {}", b.tid, b.thread, b.function);
    }
    if r.running > 0 {
        let _ = writeln!(out, "  not looked at: {}", count(r.running, "running thread"));
    }
    out
}

/// What a recovery did.
pub fn recovered(pid: i32, done: &[Recovered]) -> String {
    let mut out = String::new();
    if done.is_empty() {
        let _ = writeln!(out, "process {pid}: nothing to recover");
    }
    for r in done {
        let what = match r.outcome {
            Outcome::Applied => "is applied: the interrupted command had done it",
            Outcome::Reverted => "is reverted",
            Outcome::Removed => "was never applied, and is gone",
            Outcome::Kept => "was never applied; its mapping stays, for the unwinder may know its tables",
        };
        let _ = writeln!(out, "process {pid}: patch {} {what}", r.patch);
    }
    out
}

/// What was taken out of memory.
pub fn reclaimed(pid: i32, done: Option<&Reclaimed>) -> String {
    let Some(done) = done else { return format!("process {pid}: nothing to reclaim\n") };
    let patches = done.patches.join(", ");
    let (kib, mib) = (done.bytes / 1024, done.scanned as f64 / f64::from(1 << 20));
    format!(
        "process {pid}: reclaimed {kib} KiB of {patches}; {mib:.1} MiB looked through, threads held for {:.1} µs\n",
        done.held_us
    )
}

/// One process with its patches.
pub fn status(s: &ProcessStatus) -> String {
    let mut out = String::new();
    let _ = writeln!(out, "process {} {} build {}", s.pid, s.exe, s.build_id);
    if s.patches.is_empty() {
        let _ = writeln!(out, "  no patch");
    }
    for p in &s.patches {
        let state = match p.state {
            State::Staged => "staged",
            State::Applied => "applied",
            State::Reverted => "reverted",
        };
        let _ = write!(
            out,
            "  {state:8} {}: {}, {}, {} KiB",
            p.patch,
            count(p.functions.len(), "function"),
            count(p.entries, "entry jump"),
            p.bytes / 1024
        );
        if let Some(image) = &p.image {
            let _ = write!(out, " of {image}");
        }
        if p.applied_at > 0 {
            let _ = write!(out, ", last applied {} with a pause of {:.1} µs", utc(p.applied_at), p.pause_us);
        }
        if let Some(percent) = p.canary_percent {
            let _ = write!(out, ", a canary of {percent} %");
        }
        match p.confirmation {
            None => {}
            Some(Confirmed::Permanent) => out.push_str(", permanent"),
            Some(Confirmed::Current) => out.push_str(", current"),
            Some(Confirmed::Unconfirmed { by, watcher }) => {
                let _ = write!(out, ", unconfirmed: ");
                let _ = match watcher {
                    Some(pid) => write!(out, "PID {pid} reverts it at {}", utc(by)),
                    None => write!(
                        out,
                        "it was to be confirmed by {}, and the command that would revert it is gone",
                        utc(by)
                    ),
                };
            }
        }
        let _ = writeln!(out);
        if p.unfinished {
            let _ = writeln!(out, "    an interrupted command left it so: livepatch recover {}", s.pid);
        }
        for (name, arm) in p.arms.iter().flat_map(|[old, new]| [("old", old), ("new", new)]) {
            let us = |ns: u64| ns as f64 / 1e3;
            let _ = write!(
                out,
                "    {name} arm: {} messages, {} failed, {} panics; ",
                arm.messages, arm.failed, arm.panics
            );
            let _ = match arm.timed {
                0 => writeln!(out, "none timed yet"),
                _ => writeln!(out, "p50 {:.1} µs, p99 {:.1} µs", us(arm.p50_ns), us(arm.p99_ns)),
            };
        }
        if let Some(damage) = &p.damage {
            let _ = writeln!(out, "    damaged: {damage}");
        }
    }
    for shadow in &s.shadows {
        let who = match &shadow.named_by[..] {
            [] => "left over: no applied patch names it, nor the program".to_owned(),
            names => format!("named by {}", names.join(", ")),
        };
        let (objects, bytes) = (count(shadow.objects, "object"), count(shadow.bytes, "byte"));
        let _ = writeln!(out, "  shadow {:#x}: {objects}, {bytes} ({}), {who}", shadow.id, shadow.type_name);
    }
    if s.transitioning {
        let _ = writeln!(out, "  transitioning: a switch is still to be taken back; the agent goes on with it");
    }
    out
}

/// Unix time as `2026-01-31 12:00:00 UTC` (days to civil date after Howard Hinnant).
fn utc(unix_s: u64) -> String {
    let (days, s) = (unix_s / 86_400, unix_s % 86_400);
    let z = days + 719_468;
    let (era, doe) = (z / 146_097, z % 146_097);
    let yoe = (doe - doe / 1_460 + doe / 36_524 - doe / 146_096) / 365;
    let doy = doe - (365 * yoe + yoe / 4 - yoe / 100);
    let mp = (5 * doy + 2) / 153;
    let (day, month) = (doy - (153 * mp + 2) / 5 + 1, if mp < 10 { mp + 3 } else { mp - 9 });
    let year = yoe + era * 400 + u64::from(month <= 2);
    format!("{year:04}-{month:02}-{day:02} {:02}:{:02}:{:02} UTC", s / 3600, s / 60 % 60, s % 60)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_have_units() {
        assert_eq!(duration("5s"), Ok(Duration::from_secs(5)));
        assert_eq!(duration("1.5"), Ok(Duration::from_millis(1500)));
        assert_eq!(duration("250ms"), Ok(Duration::from_millis(250)));
        assert_eq!(duration("2m"), Ok(Duration::from_secs(120)));
        for bad in ["", "s", "5h", "-1s", "1e400s"] {
            assert!(duration(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn shares_are_percent() {
        assert_eq!((percent("10%"), percent("0.5"), percent("100 %")), (Ok(1000), Ok(50), Ok(10_000)));
        assert_eq!((percent("0"), percent("0.01%")), (Ok(0), Ok(1)));
        for bad in ["", "%", "101%", "-1", "0.001%", "NaN", "ten"] {
            assert!(percent(bad).is_err(), "{bad}");
        }
        assert_eq!(key("a::b:arg2"), Ok(("a::b".into(), 2)));
        assert!(key("f").is_err() && key("f:argx").is_err());
    }

    #[test]
    fn times_are_utc() {
        assert_eq!(utc(0), "1970-01-01 00:00:00 UTC");
        assert_eq!(utc(951_827_696), "2000-02-29 12:34:56 UTC");
        assert_eq!(utc(1_798_761_599), "2026-12-31 23:59:59 UTC");
    }
}
