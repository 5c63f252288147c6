//! Counters, one set per worker so that no two threads write one cache line, and their Prometheus text.

use std::fmt::Write;
use std::sync::atomic::{AtomicI64, AtomicU64, Ordering};
use std::time::Duration;

/// What is counted. The order is that of [`COUNTERS`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Counter {
    /// Whole messages read.
    Messages,
    /// Messages whose length or checksum was wrong.
    Garbled,
    /// NewOrderSingle.
    Orders,
    /// Orders that went to the book.
    Accepted,
    /// Orders that did not.
    Rejected,
    /// Cancel requests.
    Cancels,
    /// Fills, each side counted.
    Fills,
    /// Commission of all fills, in ten-thousandths.
    Commission,
    /// Messages answered by Reject or BusinessMessageReject.
    MessageRejects,
    /// Panics of the business layer that were caught.
    Panics,
    /// Sessions logged on.
    Logons,
    /// Connections that ended without a Logout on either side.
    Disconnects,
    /// Connections closed because they did not read what they were sent.
    SlowConsumers,
    /// Sent messages that can't be asked for again any more.
    Forgotten,
}

const COUNTERS: [(&str, &str); 14] = [
    ("messages_received_total", "FIX messages received"),
    ("messages_garbled_total", "Byte sequences that were no FIX message"),
    ("orders_received_total", "NewOrderSingle received"),
    ("orders_accepted_total", "Orders acknowledged as new"),
    ("orders_rejected_total", "Orders rejected"),
    ("cancels_received_total", "OrderCancelRequest received"),
    ("fills_total", "Fills reported, each side counted"),
    ("commission_ten_thousandths_total", "Commission charged, in ten-thousandths"),
    ("message_rejects_total", "Reject and BusinessMessageReject sent"),
    ("business_panics_total", "Panics of the business layer that were caught"),
    ("logons_total", "Sessions logged on"),
    ("disconnects_total", "Connections lost without a Logout"),
    ("slow_consumers_total", "Connections closed because their peer did not read"),
    ("resend_forgotten_total", "Sent messages that were dropped from the resend memory"),
];

/// Upper bounds of the latency buckets, in microseconds.
const BUCKETS_US: [u64; 16] =
    [50, 100, 200, 300, 500, 750, 1_000, 1_500, 2_000, 3_000, 5_000, 10_000, 20_000, 50_000, 100_000, 1_000_000];

/// What one thread counts.
#[derive(Debug, Default)]
#[repr(align(128))]
pub struct ThreadMetrics {
    counters: [AtomicU64; COUNTERS.len()],
    /// Sessions logged on now.
    sessions: AtomicI64,
    latency_buckets: [AtomicU64; BUCKETS_US.len() + 1],
    latency_sum_us: AtomicU64,
}

impl ThreadMetrics {
    /// Adds to a counter.
    pub fn add(&self, counter: Counter, n: u64) {
        self.counters[counter as usize].fetch_add(n, Ordering::Relaxed);
    }

    /// Adds to the number of sessions.
    pub fn sessions(&self, change: i64) {
        self.sessions.fetch_add(change, Ordering::Relaxed);
    }

    /// What this thread did not do as it was asked: orders and messages that were refused, and panics.
    pub fn failures(&self) -> u64 {
        [Counter::Rejected, Counter::MessageRejects, Counter::Panics]
            .map(|c| load(&self.counters[c as usize]))
            .iter()
            .sum()
    }

    /// Notes that `orders` orders were answered this long after they had been read.
    pub fn latency(&self, took: Duration, orders: u64) {
        let us = u64::try_from(took.as_micros()).unwrap_or(u64::MAX);
        let bucket = BUCKETS_US.partition_point(|&bound| bound < us);
        self.latency_buckets[bucket].fetch_add(orders, Ordering::Relaxed);
        self.latency_sum_us.fetch_add(us.saturating_mul(orders), Ordering::Relaxed);
    }
}

/// What the persistence thread counts.
#[derive(Debug, Default)]
pub struct JournalMetrics {
    commits: AtomicU64,
    bytes: AtomicU64,
    took_us: AtomicU64,
}

impl JournalMetrics {
    /// Notes a group that is on disk.
    pub fn commit(&self, bytes: usize, took: Duration) {
        self.commits.fetch_add(1, Ordering::Relaxed);
        self.bytes.fetch_add(bytes as u64, Ordering::Relaxed);
        self.took_us.fetch_add(u64::try_from(took.as_micros()).unwrap_or(u64::MAX), Ordering::Relaxed);
    }
}

/// All counters of the process.
#[derive(Debug)]
pub struct Metrics {
    /// By worker.
    pub threads: Vec<ThreadMetrics>,
    /// Of the persistence thread.
    pub journal: JournalMetrics,
}

impl Metrics {
    /// Zeros.
    pub fn new(workers: usize) -> Self {
        Self { threads: (0..workers).map(|_| ThreadMetrics::default()).collect(), journal: JournalMetrics::default() }
    }

    /// The Prometheus text format, version 0.0.4.
    pub fn text(&self, resting_orders: usize) -> String {
        let mut out = String::with_capacity(8 * 1024);
        for (at, (name, help)) in COUNTERS.iter().enumerate() {
            let sum: u64 = self.threads.iter().map(|t| load(&t.counters[at])).sum();
            metric(&mut out, name, help, "counter", sum);
        }
        let sessions: i64 = self.threads.iter().map(|t| t.sessions.load(Ordering::Relaxed)).sum();
        metric(&mut out, "sessions", "Sessions logged on now", "gauge", sessions);
        metric(&mut out, "resting_orders", "Orders in the books now", "gauge", resting_orders);
        metric(&mut out, "journal_commits_total", "Groups committed", "counter", load(&self.journal.commits));
        metric(&mut out, "journal_bytes_total", "Bytes committed", "counter", load(&self.journal.bytes));
        let took = seconds(load(&self.journal.took_us));
        metric(&mut out, "journal_commit_seconds_total", "Time spent in commits", "counter", took);
        self.latency_text(&mut out);
        out
    }

    fn latency_text(&self, out: &mut String) {
        let name = "gateway_order_latency_seconds";
        // Writing into a String does not fail.
        let _ = writeln!(out, "# HELP {name} From reading an order to handing its answer to the socket");
        let _ = writeln!(out, "# TYPE {name} histogram");
        let mut sum = 0;
        for at in 0..=BUCKETS_US.len() {
            sum += self.threads.iter().map(|t| load(&t.latency_buckets[at])).sum::<u64>();
            let bound = BUCKETS_US.get(at).map_or("+Inf".to_owned(), |&us| seconds(us).to_string());
            let _ = writeln!(out, "{name}_bucket{{le=\"{bound}\"}} {sum}");
        }
        let took: u64 = self.threads.iter().map(|t| load(&t.latency_sum_us)).sum();
        let _ = writeln!(out, "{name}_sum {}\n{name}_count {sum}", seconds(took));
    }
}

fn metric(out: &mut String, name: &str, help: &str, kind: &str, value: impl std::fmt::Display) {
    let _ = writeln!(out, "# HELP gateway_{name} {help}\n# TYPE gateway_{name} {kind}\ngateway_{name} {value}");
}

fn load(value: &AtomicU64) -> u64 {
    value.load(Ordering::Relaxed)
}

fn seconds(us: u64) -> f64 {
    us as f64 / 1e6
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_sums_the_threads() {
        let metrics = Metrics::new(2);
        metrics.threads[0].add(Counter::Orders, 2);
        metrics.threads[1].add(Counter::Orders, 3);
        metrics.threads[1].add(Counter::Forgotten, 1);
        metrics.threads[1].sessions(1);
        metrics.threads[0].latency(Duration::from_micros(50), 4);
        metrics.threads[0].latency(Duration::from_secs(9), 1);
        let text = metrics.text(7);
        for line in [
            "gateway_orders_received_total 5",
            "gateway_resend_forgotten_total 1",
            "gateway_sessions 1",
            "gateway_resting_orders 7",
            "gateway_order_latency_seconds_bucket{le=\"0.00005\"} 4",
            "gateway_order_latency_seconds_bucket{le=\"1\"} 4",
            "gateway_order_latency_seconds_bucket{le=\"+Inf\"} 5",
            "gateway_order_latency_seconds_count 5",
        ] {
            assert!(text.lines().any(|l| l == line), "{line} in\n{text}");
        }
    }
}
