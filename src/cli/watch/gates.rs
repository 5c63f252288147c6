//! What was seen of a process, held against what is asked of it: samples in, verdicts out.
//!
//! *Invariant:* no data is no pass. A gate that could not be judged says so, and only a pass goes on.

use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::metrics::{Histogram, Metrics};

/// What one look saw.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Sample {
    /// Seconds since the first one.
    pub at_s: f64,
    /// Resident bytes.
    pub rss_bytes: u64,
    /// Seconds of processor time that the process has used.
    pub cpu_s: f64,
    /// Names of the patches that are applied.
    pub patches: Vec<String>,
    /// Its own figures, where they could be had.
    pub metrics: Option<Metrics>,
}

/// A file of samples, for a later watch to compare with.
#[derive(Debug, Serialize, Deserialize)]
pub struct Series {
    /// The version of this form: 1.
    pub format: u32,
    /// When it began, in seconds since 1970.
    pub began_at: u64,
    /// In the order of their time.
    pub samples: Vec<Sample>,
}

/// How a gate was judged; the worst last.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Verdict {
    /// It held.
    Pass,
    /// There were too few figures to tell.
    Inconclusive,
    /// There were none.
    NoData,
    /// It could not be judged.
    Error,
    /// It did not hold.
    Fail,
}

impl std::fmt::Display for Verdict {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.pad(match self {
            Self::Pass => "pass",
            Self::Inconclusive => "inconclusive",
            Self::NoData => "no-data",
            Self::Error => "error",
            Self::Fail => "FAIL",
        })
    }
}

/// One gate, judged.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Finding {
    /// Which.
    pub gate: &'static str,
    /// How.
    pub verdict: Verdict,
    /// Why, in one line.
    pub reason: String,
}

fn finding(gate: &'static str, verdict: Verdict, reason: impl Into<String>) -> Finding {
    Finding { gate, verdict, reason: reason.into() }
}

/// What is asked.
#[derive(Clone, Debug, Default)]
pub struct Gates {
    /// A patch that has to stay applied.
    pub patch: Option<String>,
    /// Bytes a minute that resident memory may grow by, beyond what it grew by before.
    pub rss_growth: Option<f64>,
    /// Resident memory, at most so many times that of before.
    pub rss_ratio: Option<f64>,
    /// Processor time per second, at most so many times that of before.
    pub cpu_ratio: Option<f64>,
    /// The histogram of latencies, in seconds.
    pub latency: Option<String>,
    /// Its 99th percentile, at most so long.
    pub p99: Option<Duration>,
    /// Its 99th percentile, at most so many times that of before.
    pub p99_ratio: Option<f64>,
    /// Counters of what failed, and of what there was.
    pub errors: Option<(String, String)>,
    /// The largest share that may fail.
    pub error_rate: Option<f64>,
    /// The new arm of a canary, at most so many times as bad as the old one.
    pub arm_ratio: Option<f64>,
}

/// So many observations there have to be for a quantile or a rate.
const OBSERVATIONS: f64 = 100.0;
/// So many points of each arm.
const POINTS: usize = 50;
/// A difference between arms that chance makes less often than this is one.
const SIGNIFICANCE: f64 = 0.01;
/// Shorter than this no growth is told from noise.
const GROWTH_SECONDS: f64 = 10.0;
const GROWTH_SAMPLES: usize = 10;

/// Judges all gates that were asked for, and those that always are: the patch stays, no breaker trips. `alive` is whether the process
/// still was itself at the end.
pub fn judge(gates: &Gates, seen: &[Sample], before: Option<&[Sample]>, alive: bool) -> Vec<Finding> {
    let mut out = Vec::new();
    if !alive {
        out.push(finding("process", Verdict::Fail, "it ended"));
    }
    out.push(patch(gates.patch.as_deref(), seen));
    out.extend(breaker(seen));
    out.extend(gates.rss_growth.map(|most| rss_growth(most, seen, before)));
    out.extend(gates.rss_ratio.map(|most| rss_level(most, seen, before)));
    out.extend(gates.cpu_ratio.map(|most| cpu(most, seen, before)));
    if let Some(name) = &gates.latency {
        out.extend(gates.p99.map(|most| p99(name, most, seen)));
        out.extend(gates.p99_ratio.map(|most| p99_ratio(name, most, seen, before)));
    }
    if let (Some((failed, all)), Some(most)) = (&gates.errors, gates.error_rate) {
        out.push(error_rate((failed, all), most, seen));
    }
    if let Some(most) = gates.arm_ratio {
        out.extend(arms(most, seen));
    }
    out
}

/// The verdict of all of them: a fail is one whatever the others say, and only passes make a pass.
pub fn overall(findings: &[Finding]) -> Verdict {
    findings.iter().map(|f| f.verdict).max().unwrap_or(Verdict::NoData)
}

fn patch(wanted: Option<&str>, seen: &[Sample]) -> Finding {
    const GATE: &str = "patch";
    let (Some(first), Some(last)) = (seen.first(), seen.last()) else {
        return finding(GATE, Verdict::NoData, "nothing was seen");
    };
    let names = match wanted {
        Some(name) if !first.patches.iter().any(|p| p == name) => {
            return finding(GATE, Verdict::Error, format!("{name} is not applied"));
        }
        Some(name) => vec![name.to_owned()],
        None => first.patches.clone(),
    };
    for sample in seen {
        if let Some(gone) = names.iter().find(|n| !sample.patches.contains(n)) {
            return finding(GATE, Verdict::Fail, format!("{gone} was reverted after {:.0} s", sample.at_s));
        }
    }
    match last.patches.len() {
        0 => finding(GATE, Verdict::Pass, "none is applied"),
        _ => finding(GATE, Verdict::Pass, format!("{} applied all the time", names.join(", "))),
    }
}

/// The agent's own count.
fn breaker(seen: &[Sample]) -> Option<Finding> {
    const NAME: &str = "livepatch_breaker_trips_total";
    let trips = |s: &Sample| s.metrics.as_ref().and_then(|m| m.value(NAME));
    let mut all = seen.iter().filter_map(trips);
    let first = all.next()?;
    let tripped = all.fold(first, f64::max) > first;
    Some(if tripped {
        finding("breaker", Verdict::Fail, "it tripped")
    } else {
        finding("breaker", Verdict::Pass, "it did not trip")
    })
}

/// The median of the slopes between all pairs (Theil-Sen): a single step, or a spike, moves it little. Units of y per unit of x.
fn slope(points: &[(f64, f64)]) -> f64 {
    let mut slopes = Vec::with_capacity(points.len() * points.len() / 2);
    for (i, a) in points.iter().enumerate() {
        slopes.extend(points.iter().skip(i + 1).filter(|b| b.0 > a.0).map(|b| (b.1 - a.1) / (b.0 - a.0)));
    }
    median(&mut slopes)
}

fn median(values: &mut [f64]) -> f64 {
    values.sort_by(f64::total_cmp);
    match values.len() {
        0 => 0.0,
        n if n % 2 == 1 => values[n / 2],
        n => f64::midpoint(values[n / 2 - 1], values[n / 2]),
    }
}

fn bytes(n: f64) -> String {
    let (sign, n) = (if n < 0.0 { "-" } else { "" }, n.abs());
    let (scaled, unit) = match n {
        n if n >= 1024.0 * 1024.0 * 1024.0 => (n / (1024.0 * 1024.0 * 1024.0), "GiB"),
        n if n >= 1024.0 * 1024.0 => (n / (1024.0 * 1024.0), "MiB"),
        n if n >= 1024.0 => (n / 1024.0, "KiB"),
        n => return format!("{sign}{n:.0} bytes"),
    };
    format!("{sign}{scaled:.1} {unit}")
}

fn rss_growth(most: f64, seen: &[Sample], before: Option<&[Sample]>) -> Finding {
    const GATE: &str = "rss-growth";
    let long = |s: &[Sample]| {
        let span = s.last().map_or(0.0, |l| l.at_s) - s.first().map_or(0.0, |f| f.at_s);
        s.len() >= GROWTH_SAMPLES && span >= GROWTH_SECONDS
    };
    if !long(seen) {
        let least = format!("it takes {GROWTH_SAMPLES} looks in {GROWTH_SECONDS} s");
        return finding(GATE, Verdict::Inconclusive, least);
    }
    let growth = |s: &[Sample]| slope(&s.iter().map(|s| (s.at_s / 60.0, s.rss_bytes as f64)).collect::<Vec<_>>());
    let now = growth(seen);
    let then = before.filter(|b| long(b)).map(growth);
    let more = now - then.unwrap_or(0.0).max(0.0);
    let verdict = if more > most { Verdict::Fail } else { Verdict::Pass };
    let compared = then.map_or(String::new(), |t| format!(", {} a minute before", bytes(t)));
    finding(GATE, verdict, format!("{} a minute{compared}; at most {}", bytes(now), bytes(most)))
}

/// What needs figures of before.
fn with_before<'a>(gate: &'static str, before: Option<&'a [Sample]>) -> Result<&'a [Sample], Finding> {
    let none = || finding(gate, Verdict::NoData, "there is nothing to compare with: give --baseline");
    before.filter(|b| b.len() > 1).ok_or_else(none)
}

fn rss_level(most: f64, seen: &[Sample], before: Option<&[Sample]>) -> Finding {
    const GATE: &str = "rss";
    let before = match with_before(GATE, before) {
        Ok(before) => before,
        Err(finding) => return finding,
    };
    let level = |s: &[Sample]| median(&mut s.iter().map(|s| s.rss_bytes as f64).collect::<Vec<_>>());
    let (now, then) = (level(seen), level(before));
    let verdict = if now > then * most { Verdict::Fail } else { Verdict::Pass };
    finding(GATE, verdict, format!("{}, {} before; at most {most} times", bytes(now), bytes(then)))
}

/// Processor time per second.
fn usage(samples: &[Sample]) -> Option<f64> {
    let (first, last) = (samples.first()?, samples.last()?);
    let span = last.at_s - first.at_s;
    (span > 0.0).then(|| (last.cpu_s - first.cpu_s) / span)
}

fn cpu(most: f64, seen: &[Sample], before: Option<&[Sample]>) -> Finding {
    const GATE: &str = "cpu";
    let before = match with_before(GATE, before) {
        Ok(before) => before,
        Err(finding) => return finding,
    };
    let (Some(now), Some(then)) = (usage(seen), usage(before)) else {
        return finding(GATE, Verdict::NoData, "nothing was seen");
    };
    // A hundredth of a processor more is nothing, whatever it was before.
    let verdict = if now > then * most + 0.01 { Verdict::Fail } else { Verdict::Pass };
    let percent = |n: f64| format!("{:.1} %", n * 100.0);
    finding(GATE, verdict, format!("{} of a processor, {} before; at most {most} times", percent(now), percent(then)))
}

/// What a histogram counted between the first sample that has it and the last.
fn counted(name: &str, samples: &[Sample]) -> Option<Histogram> {
    let mut all = samples.iter().filter_map(|s| s.metrics.as_ref()?.histogram(name));
    let first = all.next()?;
    let last = all.next_back()?;
    Some(last.since(first))
}

/// A quantile, once there is enough.
fn quantile(gate: &'static str, name: &str, samples: &[Sample]) -> Result<f64, Finding> {
    let Some(counted) = counted(name, samples).filter(|h| h.count() > 0.0) else {
        return Err(finding(gate, Verdict::NoData, format!("{name} counted nothing")));
    };
    let few = || finding(gate, Verdict::Inconclusive, format!("{name} counted only {}", counted.count()));
    if counted.count() < OBSERVATIONS {
        return Err(few());
    }
    counted.quantile(0.99).ok_or_else(few)
}

fn seconds(s: f64) -> String {
    match s {
        s if s.is_infinite() => "more than its last bucket".into(),
        s if s >= 1.0 => format!("{s:.2} s"),
        s if s >= 1e-3 => format!("{:.2} ms", s * 1e3),
        s => format!("{:.1} us", s * 1e6),
    }
}

fn p99(name: &str, most: Duration, seen: &[Sample]) -> Finding {
    const GATE: &str = "p99";
    match quantile(GATE, name, seen) {
        Err(finding) => finding,
        Ok(now) => {
            let verdict = if now > most.as_secs_f64() { Verdict::Fail } else { Verdict::Pass };
            finding(GATE, verdict, format!("{}; at most {}", seconds(now), seconds(most.as_secs_f64())))
        }
    }
}

fn p99_ratio(name: &str, most: f64, seen: &[Sample], before: Option<&[Sample]>) -> Finding {
    const GATE: &str = "p99-ratio";
    let then = with_before(GATE, before).and_then(|b| quantile(GATE, name, b));
    match (quantile(GATE, name, seen), then) {
        (Err(finding), _) | (_, Err(finding)) => finding,
        (Ok(now), Ok(then)) => {
            let verdict = if now > then * most { Verdict::Fail } else { Verdict::Pass };
            finding(GATE, verdict, format!("{}, {} before; at most {most} times", seconds(now), seconds(then)))
        }
    }
}

fn error_rate((failed, all): (&str, &str), most: f64, seen: &[Sample]) -> Finding {
    const GATE: &str = "error-rate";
    let grown = |name: &str| {
        let mut values = seen.iter().filter_map(|s| s.metrics.as_ref()?.value(name));
        let first = values.next()?;
        Some((values.next_back()? - first).max(0.0))
    };
    let (Some(failed), Some(all)) = (grown(failed), grown(all)) else {
        return finding(GATE, Verdict::NoData, "the counters are not there");
    };
    let reason = format!("{failed} of {all}; at most {most}");
    let verdict = match all {
        0.0 => Verdict::NoData,
        _ if failed > all * most && all >= OBSERVATIONS => Verdict::Fail,
        _ if all < OBSERVATIONS => Verdict::Inconclusive,
        _ => Verdict::Pass,
    };
    finding(GATE, verdict, reason)
}

/// Arm against arm: how often messages fail or panic, and how long they take in each second.
fn arms(most: f64, seen: &[Sample]) -> Vec<Finding> {
    const TIMES: &str = "livepatch_arm_seconds";
    fn figures<'s>(arm: &str, sample: &'s Sample) -> Option<(f64, f64, Option<&'s Histogram>)> {
        let metrics = sample.metrics.as_ref()?;
        let value = |name: &str| metrics.value_where(name, "arm", arm);
        let bad = value("livepatch_arm_failed_total")? + value("livepatch_arm_panics_total")?;
        Some((value("livepatch_arm_messages_total")?, bad, metrics.histogram_where(TIMES, "arm", arm)))
    }
    let all: Vec<_> = seen.iter().filter_map(|s| Some([figures("old", s)?, figures("new", s)?])).collect();
    let (Some([old_first, new_first]), Some([old_last, new_last])) = (all.first(), all.last()) else {
        return vec![finding("arms", Verdict::NoData, "no canary by session shows in the metrics")];
    };
    let (old_all, new_all) = (old_last.0 - old_first.0, new_last.0 - new_first.0);
    let (old_bad, new_bad) = (old_last.1 - old_first.1, new_last.1 - new_first.1);
    let errors = {
        let allowed = new_all * most * old_bad / old_all.max(1.0);
        // Beyond chance: three standard deviations of a count, and one of none.
        let more = new_bad > allowed + 3.0 * (allowed + 1.0).sqrt();
        let verdict = match (old_all < OBSERVATIONS || new_all < OBSERVATIONS, more) {
            _ if old_all == 0.0 || new_all == 0.0 => Verdict::NoData,
            (false, true) => Verdict::Fail,
            (true, _) => Verdict::Inconclusive,
            (false, false) => Verdict::Pass,
        };
        let reason = format!("new {new_bad} of {new_all}, old {old_bad} of {old_all}; at most {most} times as often");
        finding("arm-errors", verdict, reason)
    };
    let points = |arm: usize| -> Vec<f64> {
        let mean = |pair: &[[(f64, f64, Option<&Histogram>); 2]]| {
            let came = pair[1][arm].2?.since(pair[0][arm].2?);
            (came.count() > 0.0).then(|| came.sum / came.count())
        };
        all.windows(2).filter_map(mean).collect()
    };
    vec![errors, compare(most, &points(0), &points(1))]
}

fn compare(most: f64, old: &[f64], new: &[f64]) -> Finding {
    const GATE: &str = "arm-time";
    let counts = format!("{} points of the old arm and {} of the new one", old.len(), new.len());
    if old.is_empty() || new.is_empty() {
        return finding(GATE, Verdict::NoData, counts);
    }
    if old.len() < POINTS || new.len() < POINTS {
        return finding(GATE, Verdict::Inconclusive, format!("{counts}: it takes {POINTS} each"));
    }
    // How much longer is asked by scaling the old one.
    let scaled: Vec<f64> = old.iter().map(|t| t * most).collect();
    let p = greater(new, &scaled);
    let (now, then) = (median(&mut new.to_vec()), median(&mut old.to_vec()));
    let verdict = if p < SIGNIFICANCE { Verdict::Fail } else { Verdict::Pass };
    let reason = format!("new {}, old {}; more than {most} times with p = {p:.4}", seconds(now), seconds(then));
    finding(GATE, verdict, reason)
}

/// How likely it is by chance that values of `xs` exceed those of `ys` as much as they do: the one-sided U test of Mann and Whitney, by the
/// normal approximation with ties and continuity corrected for, which serves from some twenty values on.
fn greater(xs: &[f64], ys: &[f64]) -> f64 {
    let (m, n) = (xs.len() as f64, ys.len() as f64);
    let mut all: Vec<(f64, bool)> = xs.iter().map(|x| (*x, true)).chain(ys.iter().map(|y| (*y, false))).collect();
    all.sort_by(|a, b| a.0.total_cmp(&b.0));
    let (mut ranks, mut ties, mut before) = (0.0, 0.0, 0.0);
    for equal in all.chunk_by(|a, b| a.0 == b.0) {
        let t = equal.len() as f64;
        // Equal values share the mean of their ranks.
        ranks += equal.iter().filter(|e| e.1).count() as f64 * (before + (t + 1.0) / 2.0);
        ties += t * t * t - t;
        before += t;
    }
    let u = ranks - m * (m + 1.0) / 2.0;
    let sum = m + n;
    let variance = m * n / 12.0 * (sum + 1.0 - ties / (sum * (sum - 1.0)));
    if variance <= 0.0 {
        return 1.0;
    }
    let z = (u - m * n / 2.0 - 0.5) / variance.sqrt();
    libm::erfc(z / std::f64::consts::SQRT_2) / 2.0
}

#[cfg(test)]
#[path = "gates_tests.rs"]
mod tests;
