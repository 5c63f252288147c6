//! What is counted, and the report.

use hdrhistogram::Histogram;
use serde::Serialize;

/// Latencies are kept from 1 µs to 60 s with three digits.
pub fn histogram() -> Histogram<u64> {
    Histogram::new_with_bounds(1, 60_000_000, 3).unwrap_or_else(|_| unreachable!("constant bounds are valid"))
}

/// Notes a latency, in nanoseconds.
pub fn note(histogram: &mut Histogram<u64>, ns: u64) {
    histogram.saturating_record((ns / 1_000).max(1));
}

/// What one thread counts.
#[derive(Debug)]
pub struct Stats {
    pub counts: Counts,
    pub orders: Histogram<u64>,
    pub cancels: Histogram<u64>,
    pub send_lag: Histogram<u64>,
}

impl Default for Stats {
    fn default() -> Self {
        Self { counts: Counts::default(), orders: histogram(), cancels: histogram(), send_lag: histogram() }
    }
}

/// Numbers of messages, unless it says otherwise.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Counts {
    pub orders_sent: u64,
    pub orders_acknowledged: u64,
    pub orders_rejected: u64,
    pub cancels_sent: u64,
    pub cancels_done: u64,
    pub cancels_rejected: u64,
    pub fills: u64,
    /// Orders and cancels without any answer, fills that a later one shows to be missing, and what was due while its
    /// session was down.
    pub lost: u64,
    pub repeated: u64,
    pub out_of_sequence: u64,
    pub duplicates_flagged: u64,
    pub garbled: u64,
    pub disconnects: u64,
    pub heartbeats_late: u64,
    pub heartbeats_missed: u64,
    pub test_requests: u64,
    pub resend_requests: u64,
    pub session_rejects: u64,
    pub business_rejects: u64,
    pub foreign_reports: u64,
}

impl Stats {
    /// Adds another thread's.
    pub fn merge(&mut self, other: &Self) {
        let (a, b) = (&mut self.counts, &other.counts);
        for (mine, theirs) in [
            (&mut a.orders_sent, b.orders_sent),
            (&mut a.orders_acknowledged, b.orders_acknowledged),
            (&mut a.orders_rejected, b.orders_rejected),
            (&mut a.cancels_sent, b.cancels_sent),
            (&mut a.cancels_done, b.cancels_done),
            (&mut a.cancels_rejected, b.cancels_rejected),
            (&mut a.fills, b.fills),
            (&mut a.lost, b.lost),
            (&mut a.repeated, b.repeated),
            (&mut a.out_of_sequence, b.out_of_sequence),
            (&mut a.duplicates_flagged, b.duplicates_flagged),
            (&mut a.garbled, b.garbled),
            (&mut a.disconnects, b.disconnects),
            (&mut a.heartbeats_late, b.heartbeats_late),
            (&mut a.heartbeats_missed, b.heartbeats_missed),
            (&mut a.test_requests, b.test_requests),
            (&mut a.resend_requests, b.resend_requests),
            (&mut a.session_rejects, b.session_rejects),
            (&mut a.business_rejects, b.business_rejects),
            (&mut a.foreign_reports, b.foreign_reports),
        ] {
            *mine += theirs;
        }
        for (mine, theirs) in [
            (&mut self.orders, &other.orders),
            (&mut self.cancels, &other.cancels),
            (&mut self.send_lag, &other.send_lag),
        ] {
            // The bounds are the same.
            let _ = mine.add(theirs);
        }
    }
}

/// A histogram's figures, in microseconds.
#[derive(Debug, Serialize)]
pub struct Latency {
    pub p50_us: u64,
    pub p90_us: u64,
    pub p99_us: u64,
    pub p99_9_us: u64,
    pub max_us: u64,
    pub mean_us: f64,
    pub count: u64,
}

impl Latency {
    pub fn of(h: &Histogram<u64>) -> Self {
        Self {
            p50_us: h.value_at_quantile(0.5),
            p90_us: h.value_at_quantile(0.9),
            p99_us: h.value_at_quantile(0.99),
            p99_9_us: h.value_at_quantile(0.999),
            max_us: h.max(),
            mean_us: (h.mean() * 10.0).round() / 10.0,
            count: h.len(),
        }
    }
}

/// What is printed at the end.
#[derive(Debug, Serialize)]
pub struct Report {
    pub sessions: usize,
    pub rate: u64,
    pub duration_s: f64,
    /// New orders acknowledged per second of the load phase.
    pub acknowledged_per_s: f64,
    #[serde(flatten)]
    pub counts: Counts,
    /// From when an order was due to its first report.
    pub latency: Latency,
    /// The same for cancels.
    pub cancel_latency: Latency,
    /// From when a message was due to when it was handed to the socket: the part of the latency that is the client's own.
    pub send_lag: Latency,
    pub passed: bool,
}

impl Report {
    pub fn verdict(counts: &Counts) -> bool {
        counts.lost == 0
            && counts.repeated == 0
            && counts.out_of_sequence == 0
            && counts.disconnects == 0
            && counts.garbled == 0
    }
}
