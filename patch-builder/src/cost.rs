//! What a run costs: wall time by phase, processor time, peak memory. Said to
//! people and to scripts, never written into a patch: patches are reproducible.

use std::time::{Duration, Instant};

use serde::Serialize;

/// The phases of a whole run, in order.
pub const PHASES: [&str; 11] =
    ["read", "parse", "lift", "pair", "compare", "guard", "select", "types", "emit", "verify", "report"];

/// The wall time of one phase.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Phase {
    /// One of [`PHASES`].
    pub name: &'static str,
    /// Milliseconds.
    pub wall_ms: f64,
}

/// What a run has cost so far.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Cost {
    /// Phases in the order in which they ran.
    pub phases: Vec<Phase>,
    /// Milliseconds from the start of the run.
    pub wall_ms: f64,
    /// Processor time in user mode, all threads, of the whole process; milliseconds.
    pub user_ms: f64,
    /// Processor time in the kernel, all threads, of the whole process; milliseconds.
    pub system_ms: f64,
    /// The most memory that the process ever held, in KiB.
    pub peak_kib: u64,
    /// Length of both files, in bytes.
    pub input_bytes: u64,
    /// How much of them was read.
    pub read_bytes: u64,
    /// Functions of the old and of the new build.
    pub functions: (usize, usize),
}

impl Cost {
    /// The costs for a terminal.
    #[must_use]
    pub fn text(&self) -> String {
        use std::fmt::Write as _;
        let mut out = String::new();
        for p in &self.phases {
            let _ = writeln!(out, "{:>10} {:10.1} ms", p.name, p.wall_ms);
        }
        let _ = writeln!(
            out,
            "{:>10} {:10.1} ms ({:.1} ms user, {:.1} ms system), {} MiB peak, {} and {} functions, {:.1} of {:.1} MB read",
            "all",
            self.wall_ms,
            self.user_ms,
            self.system_ms,
            self.peak_kib >> 10,
            self.functions.0,
            self.functions.1,
            self.read_bytes as f64 / 1e6,
            self.input_bytes as f64 / 1e6,
        );
        out
    }
}

/// Takes the time of phases, and tells an observer when one begins.
pub struct Meter<'a> {
    start: Instant,
    begins: &'a dyn Fn(&'static str),
    /// What is known beside the times.
    pub cost: Cost,
}

impl<'a> Meter<'a> {
    /// The run begins now; `begins` is called with each phase's name as it begins.
    #[must_use]
    pub fn new(begins: &'a dyn Fn(&'static str)) -> Self {
        Self { start: Instant::now(), begins, cost: Cost::default() }
    }

    /// Runs one phase.
    pub fn phase<T>(&mut self, name: &'static str, work: impl FnOnce() -> T) -> T {
        (self.begins)(name);
        let start = Instant::now();
        let out = work();
        self.cost.phases.push(Phase { name, wall_ms: ms(start.elapsed()) });
        out
    }

    /// The run is over.
    #[must_use]
    pub fn finish(mut self) -> Cost {
        self.cost.wall_ms = ms(self.start.elapsed());
        self.cost.peak_kib = peak_kib().unwrap_or(0);
        if let Ok(usage) = nix::sys::resource::getrusage(nix::sys::resource::UsageWho::RUSAGE_SELF) {
            let ms = |t: nix::sys::time::TimeVal| t.tv_sec() as f64 * 1e3 + t.tv_usec() as f64 / 1e3;
            (self.cost.user_ms, self.cost.system_ms) = (ms(usage.user_time()), ms(usage.system_time()));
        }
        self.cost
    }
}

fn ms(time: Duration) -> f64 {
    (time.as_secs_f64() * 1e6).round() / 1e3
}

/// `VmHWM` of proc(5). Not `ru_maxrss`: that is inherited across execve(2), so that a large parent shows in it.
fn peak_kib() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|l| l.strip_prefix("VmHWM:"))?;
    line.trim().strip_suffix("kB")?.trim().parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn phases_are_told_as_they_begin_and_counted_when_they_end() {
        let told = std::cell::RefCell::new(Vec::new());
        let begins = |name| told.borrow_mut().push(name);
        let mut meter = Meter::new(&begins);
        assert_eq!(meter.phase("read", || 7), 7);
        meter.phase("lift", || ());
        let cost = meter.finish();
        assert_eq!(*told.borrow(), ["read", "lift"]);
        assert_eq!(cost.phases.iter().map(|p| p.name).collect::<Vec<_>>(), ["read", "lift"]);
        assert!(cost.phases.iter().map(|p| p.wall_ms).sum::<f64>() <= cost.wall_ms);
        assert!(cost.peak_kib > 0, "Linux says how much memory a process held");
    }
}
