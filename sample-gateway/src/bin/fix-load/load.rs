//! Threads, phases, progress.

use crate::client::Market;
use crate::driver::{Driver, Plan};
use crate::stats::{Counts, Latency, Report, Stats};
use std::error::Error;
use std::io::{IsTerminal, Write};
use std::net::{IpAddr, SocketAddr};
use std::process::ExitCode;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

/// What load, and on what.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Address of the gateway
    #[arg(long, default_value = "127.0.0.1")]
    host: IpAddr,
    /// Its FIX port
    #[arg(long, default_value_t = 9880)]
    port: u16,
    /// Its CompID
    #[arg(long, default_value = "GATEWAY")]
    target: String,
    /// Sessions, each with a connection of its own
    #[arg(long, default_value_t = 100, value_parser = clap::value_parser!(u32).range(1..))]
    sessions: u32,
    /// Messages per second over all sessions: new orders and cancels
    #[arg(long, default_value_t = 1_000, value_parser = clap::value_parser!(u64).range(1..))]
    rate: u64,
    /// How long, in seconds
    #[arg(long, default_value_t = 10.0)]
    duration: f64,
    /// How many symbols are traded
    #[arg(long, default_value_t = 50, value_parser = clap::value_parser!(u16).range(1..))]
    symbols: u16,
    /// Share of messages that cancel an open order
    #[arg(long, default_value_t = 0.15)]
    cancel_share: f64,
    /// HeartBtInt, in seconds
    #[arg(long, default_value_t = 10, value_parser = clap::value_parser!(u64).range(1..=3600))]
    heartbeat: u64,
    /// Threads
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=16))]
    threads: u32,
    /// Prefix of the sessions' CompIDs
    #[arg(long, default_value = "LOAD")]
    prefix: String,
    /// How long to wait for the last answers, in seconds
    #[arg(long, default_value_t = 10)]
    drain: u64,
    /// How long all sessions may take to log on, in seconds
    #[arg(long, default_value_t = 60)]
    logon_timeout: u64,
    /// No progress line; the report is JSON in any case
    #[arg(long)]
    json: bool,
}

/// What the threads do now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stage {
    Connect,
    Trade { start_ns: u64 },
    LogOut,
    End,
}

/// What the threads tell each other.
#[derive(Debug)]
pub struct Live {
    stage: Mutex<Stage>,
    logged_on: AtomicU64,
    ready: AtomicU64,
    failed: AtomicU64,
    counts: Vec<Mutex<(Counts, bool)>>,
}

impl Live {
    fn new(threads: usize) -> Self {
        Self {
            stage: Mutex::new(Stage::Connect),
            logged_on: AtomicU64::new(0),
            ready: AtomicU64::new(0),
            failed: AtomicU64::new(0),
            counts: (0..threads).map(|_| Mutex::default()).collect(),
        }
    }

    pub fn stage(&self) -> Stage {
        self.stage.lock().map_or(Stage::End, |s| *s)
    }

    fn set_stage(&self, stage: Stage) {
        if let Ok(mut now) = self.stage.lock() {
            *now = stage;
        }
    }

    pub fn one_logged_on(&self) {
        self.logged_on.fetch_add(1, Ordering::Relaxed);
    }

    pub fn one_ready(&self) {
        self.ready.fetch_add(1, Ordering::Relaxed);
    }

    pub fn failed_to_log_on(&self) {
        self.failed.fetch_add(1, Ordering::Relaxed);
    }

    pub fn publish(&self, thread: u64, counts: &Counts) {
        if let Ok(mut slot) = self.counts[thread as usize].lock() {
            slot.0 = *counts;
        }
    }

    pub fn one_answered(&self, thread: u64) {
        if let Ok(mut slot) = self.counts[thread as usize].lock() {
            slot.1 = true;
        }
    }

    fn sum(&self) -> (Counts, bool) {
        let mut sum = Stats::default();
        let mut all = true;
        for slot in &self.counts {
            let (counts, answered) = slot.lock().map_or((Counts::default(), true), |s| *s);
            sum.merge(&Stats { counts, ..Stats::default() });
            all &= answered;
        }
        (sum.counts, all)
    }
}

/// Runs the load and prints the report.
///
/// # Errors
/// When a socket can't be had or the sessions do not log on.
pub fn run(args: &Args) -> Result<ExitCode, Box<dyn Error>> {
    raise_open_files(u64::from(args.sessions))?;
    let threads = u64::from(args.threads.min(args.sessions));
    let live = Arc::new(Live::new(threads as usize));
    let epoch = Instant::now();
    let since = SystemTime::now().duration_since(UNIX_EPOCH)?;
    let market = Market {
        run: format!("{:x}", since.as_millis() & 0xff_ffff_ffff),
        symbols: args.symbols,
        heartbeat_s: args.heartbeat,
        cancel_share: args.cancel_share,
    };
    let interval_ns = 1e9 / args.rate as f64;
    let mut handles = Vec::new();
    for thread in 0..threads {
        let plan = Plan {
            address: SocketAddr::new(args.host, args.port),
            names: (thread..u64::from(args.sessions))
                .step_by(threads as usize)
                .map(|n| format!("{}{n}", args.prefix))
                .collect(),
            target: args.target.clone(),
            market: market.clone(),
            first: thread,
            step: threads,
            total: (args.duration * args.rate as f64) as u64,
            interval_ns,
        };
        let driver = Driver::new(plan, Arc::clone(&live), epoch)?;
        handles.push(std::thread::spawn(move || driver.run()));
    }

    let outcome = conduct(args, &live, epoch, threads);
    live.set_stage(if outcome.is_ok() { Stage::LogOut } else { Stage::End });
    let deadline = Instant::now() + Duration::from_secs(10);
    while outcome.is_ok() && Instant::now() < deadline && !handles.iter().all(std::thread::JoinHandle::is_finished) {
        std::thread::sleep(Duration::from_millis(20));
    }
    live.set_stage(Stage::End);
    let mut stats = Stats::default();
    for handle in handles {
        stats.merge(&handle.join().map_err(|_| "a thread panicked")??);
    }
    outcome?;

    let passed = Report::verdict(&stats.counts);
    let report = Report {
        sessions: args.sessions as usize,
        rate: args.rate,
        duration_s: args.duration,
        acknowledged_per_s: stats.counts.orders_acknowledged as f64 / args.duration,
        counts: stats.counts,
        latency: Latency::of(&stats.orders),
        cancel_latency: Latency::of(&stats.cancels),
        send_lag: Latency::of(&stats.send_lag),
        passed,
    };
    println!("{}", serde_json::to_string_pretty(&report)?);
    Ok(if passed { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// Waits for the logons, starts the trading, waits for its end.
fn conduct(args: &Args, live: &Live, epoch: Instant, threads: u64) -> Result<(), Box<dyn Error>> {
    let progress = Progress { on: !args.json && std::io::stderr().is_terminal() };
    let deadline = Instant::now() + Duration::from_secs(args.logon_timeout);
    while live.ready.load(Ordering::Relaxed) < threads {
        std::thread::sleep(Duration::from_millis(20));
        let on = live.logged_on.load(Ordering::Relaxed);
        progress.line(&format!("{on} of {} sessions logged on", args.sessions));
        let failed = live.failed.load(Ordering::Relaxed);
        if failed > 0 || Instant::now() > deadline {
            progress.end();
            return Err(format!(
                "{on} of {} sessions logged on, {failed} were refused or cut off; is a gateway listening on {}:{}?",
                args.sessions, args.host, args.port
            )
            .into());
        }
    }
    let start = epoch.elapsed() + Duration::from_millis(50);
    live.set_stage(Stage::Trade { start_ns: u64::try_from(start.as_nanos())? });
    let end = start + Duration::from_secs_f64(args.duration);
    let give_up = end + Duration::from_secs(args.drain);
    let mut shown = Instant::now();
    let mut last = 0;
    loop {
        std::thread::sleep(Duration::from_millis(50));
        let now = epoch.elapsed();
        let (counts, answered) = live.sum();
        if shown.elapsed() >= Duration::from_secs(1) {
            let rate = (counts.orders_acknowledged - last) as f64 / shown.elapsed().as_secs_f64();
            (shown, last) = (Instant::now(), counts.orders_acknowledged);
            progress.line(&format!(
                "{:.0} s of {:.0} | sent {} | acknowledged {} ({rate:.0}/s) | fills {} | out of sequence {} | disconnects {}",
                now.saturating_sub(start).as_secs_f64(),
                args.duration,
                counts.orders_sent + counts.cancels_sent,
                counts.orders_acknowledged,
                counts.fills,
                counts.out_of_sequence,
                counts.disconnects,
            ));
        }
        if (now > end && answered) || now > give_up {
            progress.end();
            return Ok(());
        }
    }
}

struct Progress {
    on: bool,
}

impl Progress {
    fn line(&self, text: &str) {
        if self.on {
            eprint!("\r\x1b[K{text}");
            let _ = std::io::stderr().flush();
        }
    }

    fn end(&self) {
        if self.on {
            eprintln!();
        }
    }
}

fn raise_open_files(sessions: u64) -> Result<(), Box<dyn Error>> {
    use rustix::process::{getrlimit, setrlimit, Resource, Rlimit};
    let needed = sessions + 64;
    let limit = getrlimit(Resource::Nofile);
    if limit.current.is_none_or(|n| n >= needed) {
        return Ok(());
    }
    let wanted = Rlimit { current: Some(needed), maximum: limit.maximum.map(|n| n.max(needed)) };
    setrlimit(Resource::Nofile, wanted)
        .map_err(|_| format!("{needed} open files are needed; raise the hard limit (ulimit -Hn {needed})").into())
}
