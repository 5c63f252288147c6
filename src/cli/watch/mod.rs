//! Watches a process for a while and says whether it does well. Touches nothing.

mod gates;
mod metrics;

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use clap::Args;
use livepatch::registry::State;
use serde_json::json;

use super::{text, usage, ways};
use gates::{judge, overall, Finding, Gates, Sample, Series, Verdict};
use metrics::Metrics;

/// No such process, or no permission.
const NO_PROCESS: u8 = 6;
/// A gate did not pass.
const NOT_PASSED: u8 = 5;
/// The version of a file of samples.
const FORMAT: u32 = 1;
/// The largest file of samples that is read.
const MOST_BYTES: u64 = 256 << 20;

#[derive(Args)]
pub struct WatchArgs {
    /// The process.
    pub pid: i32,
    /// For how long.
    #[arg(long = "for", value_name = "TIME", default_value = "60s", value_parser = text::duration)]
    pub long: Duration,
    /// How often it is looked at.
    #[arg(long, value_name = "TIME", default_value = "1s", value_parser = text::duration)]
    pub every: Duration,
    /// Keeps what was seen in this file, for a later --baseline.
    #[arg(long, value_name = "FILE")]
    pub save: Option<PathBuf>,
    /// What an earlier watch kept of this host: what gates compare with.
    #[arg(long, value_name = "FILE")]
    pub baseline: Option<PathBuf>,
    /// Where the program's figures are, in Prometheus' text format; plain HTTP.
    #[arg(long, value_name = "URL")]
    pub metrics: Option<String>,
    /// This patch has to be applied, and to stay; without it, those that are at the beginning.
    #[arg(long, value_name = "NAME")]
    pub patch: Option<String>,
    /// Resident memory may grow by so much a minute, beyond its growth in the baseline, such as 1M or 300K.
    #[arg(long, value_name = "BYTES", value_parser = bytes, help_heading = "Gates")]
    pub max_rss_growth: Option<f64>,
    /// Resident memory, at most so many times that of the baseline.
    #[arg(long, value_name = "TIMES", value_parser = times, help_heading = "Gates")]
    pub max_rss_ratio: Option<f64>,
    /// Processor time, at most so many times that of the baseline.
    #[arg(long, value_name = "TIMES", value_parser = times, help_heading = "Gates")]
    pub max_cpu_ratio: Option<f64>,
    /// The histogram of latencies, in seconds, that the next two are about.
    #[arg(long, value_name = "METRIC", requires = "metrics", help_heading = "Gates")]
    pub latency: Option<String>,
    /// The 99th percentile, at most so long.
    #[arg(long, value_name = "TIME", value_parser = text::duration, requires = "latency", help_heading = "Gates")]
    pub max_p99: Option<Duration>,
    /// The 99th percentile, at most so many times that of the baseline.
    #[arg(long, value_name = "TIMES", value_parser = times, requires = "latency", help_heading = "Gates")]
    pub max_p99_ratio: Option<f64>,
    /// The counter of what failed.
    #[arg(long, value_name = "METRIC", requires_all = ["requests", "max_error_rate"], help_heading = "Gates")]
    pub errors: Option<String>,
    /// The counter of what there was.
    #[arg(long, value_name = "METRIC", requires = "errors", help_heading = "Gates")]
    pub requests: Option<String>,
    /// The largest share that may fail, 0 to 1.
    #[arg(long, value_name = "RATE", value_parser = share, requires_all = ["errors", "metrics"], help_heading = "Gates")]
    pub max_error_rate: Option<f64>,
    /// The new arm of a canary by session fails at most so many times as often as the old one, and takes at most so many times as long.
    #[arg(long, value_name = "TIMES", value_parser = times, requires = "metrics", help_heading = "Gates")]
    pub max_arm_ratio: Option<f64>,
    /// Results in JSON.
    #[arg(long)]
    pub json: bool,
}

/// `1M`, `300K`, `5000`.
fn bytes(text: &str) -> Result<f64, String> {
    let digits = text.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let number: f64 = digits.parse().map_err(|_| format!("{text:?} is no number of bytes such as 1M or 300K"))?;
    let scale = match &text[digits.len()..] {
        "" => 1.0,
        "K" | "KiB" => 1024.0,
        "M" | "MiB" => 1024.0 * 1024.0,
        "G" | "GiB" => 1024.0 * 1024.0 * 1024.0,
        unit => return Err(format!("{unit:?} is no unit of memory; known: K, M, G")),
    };
    Some(number * scale).filter(|b| b.is_finite() && *b >= 0.0).ok_or_else(|| format!("{text:?} is too much"))
}

fn times(text: &str) -> Result<f64, String> {
    let times: Option<f64> = text.parse().ok().filter(|t: &f64| t.is_finite() && *t > 0.0);
    times.ok_or_else(|| format!("{text:?} is no factor such as 1.2"))
}

fn share(text: &str) -> Result<f64, String> {
    let share: Option<f64> = text.parse().ok().filter(|s| (0.0..=1.0).contains(s));
    share.ok_or_else(|| format!("{text:?} is no share from 0 to 1"))
}

impl WatchArgs {
    fn gates(&self) -> Gates {
        Gates {
            patch: self.patch.clone(),
            rss_growth: self.max_rss_growth,
            rss_ratio: self.max_rss_ratio,
            cpu_ratio: self.max_cpu_ratio,
            latency: self.latency.clone(),
            p99: self.max_p99,
            p99_ratio: self.max_p99_ratio,
            errors: self.errors.clone().zip(self.requests.clone()),
            error_rate: self.max_error_rate,
            arm_ratio: self.max_arm_ratio,
        }
    }
}

/// What the kernel says of a process.
struct Kernel {
    started: u64,
    cpu_s: f64,
    rss_bytes: u64,
}

/// proc_pid_stat(5): fields behind the name, which may hold anything.
fn kernel(pid: i32) -> Option<Kernel> {
    let text = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    let fields: Vec<&str> = text.rsplit_once(')')?.1.split_whitespace().collect();
    // The first here is field 3, the state.
    let number = |n: usize| fields.get(n - 3)?.parse::<u64>().ok();
    if matches!(fields.first(), Some(&("Z" | "X"))) {
        return None;
    }
    let ticks = rustix::param::clock_ticks_per_second() as f64;
    Some(Kernel {
        started: number(22)?,
        cpu_s: (number(14)? + number(15)?) as f64 / ticks,
        rss_bytes: number(24)? * rustix::param::page_size() as u64,
    })
}

fn read_series(path: &Path) -> Result<Vec<Sample>, String> {
    let of = |e: &dyn std::fmt::Display| format!("{}: {e}", path.display());
    let len = std::fs::metadata(path).map_err(|e| of(&e))?.len();
    if len > MOST_BYTES {
        return Err(of(&"it is too long for a file of samples"));
    }
    let bytes = std::fs::read(path).map_err(|e| of(&e))?;
    let series: Series = serde_json::from_slice(&bytes).map_err(|e| of(&e))?;
    if series.format != FORMAT {
        return Err(of(&format!("its format is {}, and this version knows {FORMAT}", series.format)));
    }
    Ok(series.samples)
}

/// `livepatch watch PID`
pub fn watch(args: &WatchArgs) -> u8 {
    if args.every.is_zero() || args.every > args.long {
        return usage("--every is longer than --for, or nothing");
    }
    let before = match args.baseline.as_deref().map(read_series).transpose() {
        Ok(before) => before,
        Err(e) => {
            eprintln!("livepatch: {e}");
            return 1;
        }
    };
    let Some(first) = kernel(args.pid) else {
        eprintln!("livepatch: process {}: there is no such process", args.pid);
        return NO_PROCESS;
    };
    if let Err(e) = ways::status(args.pid) {
        return super::fail(Some(args.pid), &e, args.json);
    }
    let began_at = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs());
    let (samples, alive) = look(args, first.started);
    if let Some(path) = &args.save {
        let series = Series { format: FORMAT, began_at, samples: samples.clone() };
        let written = serde_json::to_vec(&series).map_err(std::io::Error::from).and_then(|b| std::fs::write(path, b));
        if let Err(e) = written {
            eprintln!("livepatch: {}: {e}", path.display());
            return 1;
        }
    }
    let findings = judge(&args.gates(), &samples, before.as_deref(), alive);
    let verdict = overall(&findings);
    print(args, &findings, verdict, samples.len());
    if verdict == Verdict::Pass {
        0
    } else {
        NOT_PASSED
    }
}

/// All samples, and whether the process is still itself.
fn look(args: &WatchArgs, started: u64) -> (Vec<Sample>, bool) {
    let began = Instant::now();
    let mut samples = Vec::new();
    let mut told = false;
    loop {
        let at = began.elapsed();
        let Some(now) = kernel(args.pid).filter(|k| k.started == started) else { return (samples, false) };
        let patches = match ways::status(args.pid) {
            Ok(status) => status.what.patches,
            // It ends, or another command is at work: the kernel tells next time.
            Err(_) => {
                std::thread::sleep(args.every.min(Duration::from_millis(100)));
                if at >= args.long + args.every {
                    return (samples, true);
                }
                continue;
            }
        };
        let patches = patches.into_iter().filter(|p| p.state == State::Applied).map(|p| p.patch).collect();
        let metrics = args.metrics.as_deref().map(Metrics::fetch).transpose().unwrap_or_else(|e| {
            if !std::mem::replace(&mut told, true) {
                eprintln!("livepatch: its metrics can't be had: {e}");
            }
            None
        });
        let (rss_bytes, cpu_s) = (now.rss_bytes, now.cpu_s);
        samples.push(Sample { at_s: at.as_secs_f64(), rss_bytes, cpu_s, patches, metrics });
        if at >= args.long {
            return (samples, true);
        }
        let next = args.every * u32::try_from(samples.len()).unwrap_or(u32::MAX);
        std::thread::sleep(next.min(args.long).saturating_sub(began.elapsed()));
    }
}

fn print(args: &WatchArgs, findings: &[Finding], verdict: Verdict, looks: usize) {
    let worst: Vec<&Finding> = findings.iter().filter(|f| f.verdict == verdict).collect();
    let reason = match (verdict, worst.first()) {
        (Verdict::Pass, _) => format!("{} gates passed", findings.len()),
        (_, Some(f)) => format!("{}: {}", f.gate, f.reason),
        (_, None) => "nothing was judged".to_owned(),
    };
    if args.json {
        let out = json!({"pid": args.pid, "verdict": verdict, "reason": reason, "looks": looks, "gates": findings});
        println!("{out}");
        return;
    }
    for f in findings {
        println!("{:<12}  {:<12}  {}", f.verdict, f.gate, f.reason);
    }
    println!("process {}: {verdict}: {reason}", args.pid);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_read() {
        assert_eq!((bytes("300K"), bytes("1.5M"), bytes("7")), (Ok(307_200.0), Ok(1_572_864.0), Ok(7.0)));
        assert!(bytes("1T").is_err() && bytes("-1M").is_err() && bytes("M").is_err());
        assert!(times("0").is_err() && times("nan").is_err() && share("1.1").is_err() && share("0.5").is_ok());
    }

    #[test]
    fn the_kernel_knows_this_process() {
        let own = kernel(std::process::id().cast_signed()).unwrap();
        assert!(own.rss_bytes > 1 << 16 && own.started > 0);
        assert!(kernel(0).is_none());
    }
}
