//! A program's own figures, in Prometheus' text format.

use std::collections::BTreeMap;
use std::io::Read as _;
use std::time::Duration;

use prometheus_parse::{Scrape, Value};
use serde::{Deserialize, Serialize};

/// The most that is read of an answer.
const MOST_BYTES: u64 = 16 << 20;

/// Figures of one moment, by name and labels.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Metrics {
    values: Vec<Labelled<f64>>,
    histograms: Vec<Labelled<Histogram>>,
    /// The histograms of each name, added up.
    whole: BTreeMap<String, Histogram>,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
struct Labelled<T> {
    name: String,
    labels: BTreeMap<String, String>,
    value: T,
}

/// How many observations were at most so large.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Histogram {
    /// Upper bounds in ascending order, and how many lie at or below each. Not the last one, infinity: JSON has no such number.
    buckets: Vec<(f64, f64)>,
    /// How many there are.
    all: f64,
    /// Their sum.
    pub sum: f64,
}

impl Histogram {
    /// How many observations.
    pub fn count(&self) -> f64 {
        self.all
    }

    /// What came since `before`; counters that began anew count from zero.
    pub fn since(&self, before: &Self) -> Self {
        if self.all < before.all || self.buckets.len() != before.buckets.len() {
            return self.clone();
        }
        let buckets = self.buckets.iter().zip(&before.buckets).map(|(now, then)| (now.0, now.1 - then.1)).collect();
        Self { buckets, all: self.all - before.all, sum: self.sum - before.sum }
    }

    /// The value that this share of the observations does not exceed, by a straight line within its bucket; infinity beyond the last bound.
    pub fn quantile(&self, share: f64) -> Option<f64> {
        let wanted = self.all * share;
        let (mut low, mut below) = (0.0, 0.0);
        if self.all <= 0.0 {
            return None;
        }
        for (bound, upto) in &self.buckets {
            if *upto >= wanted {
                let within = if *upto > below { (wanted - below) / (upto - below) } else { 1.0 };
                return Some(low + (bound - low) * within);
            }
            (low, below) = (*bound, *upto);
        }
        Some(f64::INFINITY)
    }

    fn add(&mut self, other: &Self) {
        if self.buckets.is_empty() {
            *self = other.clone();
            return;
        }
        // Series of one name have the same bounds.
        self.buckets.iter_mut().zip(&other.buckets).for_each(|(mine, more)| mine.1 += more.1);
        self.all += other.all;
        self.sum += other.sum;
    }
}

impl Metrics {
    /// Asks a program.
    pub fn fetch(url: &str) -> Result<Self, String> {
        let agent = ureq::Agent::config_builder().timeout_global(Some(Duration::from_secs(2))).build().new_agent();
        let mut answer = agent.get(url).call().map_err(|e| e.to_string())?;
        let mut text = String::new();
        let mut body = answer.body_mut().as_reader().take(MOST_BYTES);
        body.read_to_string(&mut text).map_err(|e| e.to_string())?;
        Self::parse(&text)
    }

    /// Reads what it answered.
    pub fn parse(text: &str) -> Result<Self, String> {
        let scrape = Scrape::parse(text.lines().map(|l| Ok(l.to_owned()))).map_err(|e| e.to_string())?;
        let mut out = Self::default();
        // Sums and counts of histograms come as values of their own.
        let mut loose: Vec<Labelled<f64>> = Vec::new();
        for sample in scrape.samples {
            let labels: BTreeMap<String, String> = sample.labels.iter().map(|(k, v)| (k.clone(), v.clone())).collect();
            let name = sample.metric;
            match sample.value {
                Value::Counter(value) | Value::Gauge(value) | Value::Untyped(value) => {
                    loose.push(Labelled { name, labels, value });
                }
                Value::Histogram(counts) => {
                    let mut buckets: Vec<(f64, f64)> = counts.iter().map(|c| (c.less_than, c.count)).collect();
                    buckets.sort_by(|a, b| a.0.total_cmp(&b.0));
                    let all = buckets.last().map_or(0.0, |b| b.1);
                    buckets.retain(|b| b.0.is_finite());
                    out.histograms.push(Labelled { name, labels, value: Histogram { buckets, all, sum: 0.0 } });
                }
                Value::Summary(_) => {}
            }
        }
        for h in &mut out.histograms {
            let of = |suffix: &str| {
                let name = format!("{}{suffix}", h.name);
                loose.iter().find(|l| l.name == name && l.labels == h.labels).map(|l| l.value)
            };
            (h.value.sum, h.value.all) = (of("_sum").unwrap_or(0.0), of("_count").unwrap_or(h.value.all));
            out.whole.entry(h.name.clone()).or_default().add(&h.value);
        }
        out.values = loose;
        Ok(out)
    }

    /// All series of a name, added up.
    pub fn value(&self, name: &str) -> Option<f64> {
        let mut all = self.values.iter().filter(|v| v.name == name).map(|v| v.value).peekable();
        all.peek()?;
        Some(all.sum())
    }

    /// Those with this label, added up.
    pub fn value_where(&self, name: &str, label: &str, is: &str) -> Option<f64> {
        let wanted = |v: &&Labelled<f64>| v.name == name && v.labels.get(label).is_some_and(|l| l == is);
        let mut all = self.values.iter().filter(wanted).map(|v| v.value).peekable();
        all.peek()?;
        Some(all.sum())
    }

    /// The histogram of a name, all its series added up.
    pub fn histogram(&self, name: &str) -> Option<&Histogram> {
        self.whole.get(name)
    }

    /// The first of this name with this label.
    pub fn histogram_where(&self, name: &str, label: &str, is: &str) -> Option<&Histogram> {
        let wanted = |h: &&Labelled<Histogram>| h.name == name && h.labels.get(label).is_some_and(|l| l == is);
        self.histograms.iter().find(wanted).map(|h| &h.value)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TEXT: &str = "# HELP orders Orders.\n# TYPE orders counter\norders{side=\"buy\"} 3\norders{side=\"sell\"} 4\n\
        # HELP took_seconds Time.\n# TYPE took_seconds histogram\n\
        took_seconds_bucket{le=\"0.001\"} 50\ntook_seconds_bucket{le=\"0.01\"} 90\ntook_seconds_bucket{le=\"+Inf\"} 100\n\
        took_seconds_sum 1.5\ntook_seconds_count 100\n";

    #[test]
    fn a_text_is_read() {
        let m = Metrics::parse(TEXT).unwrap();
        assert_eq!((m.value("orders"), m.value("nothing")), (Some(7.0), None));
        assert_eq!(m.value_where("orders", "side", "sell"), Some(4.0));
        let h = m.histogram("took_seconds").unwrap();
        assert_eq!((h.count(), h.sum), (100.0, 1.5));
        assert!((h.quantile(0.5).unwrap() - 0.001).abs() < 1e-9 && (h.quantile(0.7).unwrap() - 0.0055).abs() < 1e-9);
        assert_eq!(h.quantile(0.99), Some(f64::INFINITY));
        assert_eq!(h.since(h).quantile(0.99), None);
    }

    #[test]
    fn counters_that_begin_anew_count_from_zero() {
        let before = Metrics::parse(TEXT).unwrap();
        let mut after = before.histogram("took_seconds").unwrap().clone();
        after.all = 10.0;
        assert_eq!(after.since(before.histogram("took_seconds").unwrap()).count(), 10.0);
    }

    #[test]
    fn what_is_no_such_text_has_no_figures() {
        assert_eq!(Metrics::parse("<html>\nnot found\n</html>").map(|m| m.value("orders")).unwrap_or(None), None);
    }
}
