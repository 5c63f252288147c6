use super::*;

fn sample(at_s: f64, rss_bytes: u64, cpu_s: f64, text: &str) -> Sample {
    let metrics = (!text.is_empty()).then(|| Metrics::parse(text).unwrap());
    Sample { at_s, rss_bytes, cpu_s, patches: vec!["fix".into()], metrics }
}

fn series(n: u32, of: impl Fn(f64) -> Sample) -> Vec<Sample> {
    (0..n).map(|i| of(f64::from(i))).collect()
}

fn one(gates: &Gates, seen: &[Sample], before: Option<&[Sample]>, gate: &str) -> Verdict {
    judge(gates, seen, before, true).into_iter().find(|f| f.gate == gate).map(|f| f.verdict).expect(gate)
}

const MIB: f64 = 1024.0 * 1024.0;

#[test]
fn a_leak_fails_and_a_step_does_not() {
    let gates = Gates { rss_growth: Some(MIB), ..Gates::default() };
    let level = |at: f64| 100e6 + if at > 20.0 { 50e6 } else { 0.0 };
    let step = series(61, |at| sample(at, level(at) as u64, 0.0, ""));
    assert_eq!(one(&gates, &step, None, "rss-growth"), Verdict::Pass);
    let leak = series(61, |at| sample(at, (100e6 + at * 2.0 * MIB / 60.0) as u64, 0.0, ""));
    assert_eq!(one(&gates, &leak, None, "rss-growth"), Verdict::Fail);
    assert_eq!(one(&gates, &leak, Some(&leak), "rss-growth"), Verdict::Pass, "it leaked before as well");
    assert_eq!(one(&gates, &leak[..5], None, "rss-growth"), Verdict::Inconclusive);
}

#[test]
fn levels_need_something_to_compare_with() {
    let gates = Gates { rss_ratio: Some(1.2), cpu_ratio: Some(1.5), ..Gates::default() };
    let low = series(20, |at| sample(at, 100, at * 0.1, ""));
    let high = series(20, |at| sample(at, 130, at * 0.2, ""));
    for gate in ["rss", "cpu"] {
        assert_eq!(one(&gates, &high, None, gate), Verdict::NoData);
        assert_eq!(one(&gates, &high, Some(&low), gate), Verdict::Fail);
        assert_eq!(one(&gates, &low, Some(&high), gate), Verdict::Pass);
    }
}

fn latency(fast: f64, slow: f64) -> String {
    let all = fast + slow;
    format!(
        "# TYPE t histogram\nt_bucket{{le=\"0.001\"}} {fast}\nt_bucket{{le=\"0.1\"}} {all}\nt_bucket{{le=\"+Inf\"}} {all}\nt_count {all}\n"
    )
}

#[test]
fn a_percentile_is_of_what_came_meanwhile() {
    let gates = Gates {
        latency: Some("t".into()),
        p99: Some(Duration::from_millis(2)),
        p99_ratio: Some(2.0),
        ..Gates::default()
    };
    let good = series(11, |at| sample(at, 1, 0.0, &latency(at * 100.0, 500.0)));
    let bad = series(11, |at| sample(at, 1, 0.0, &latency(at * 100.0, at * 5.0)));
    let few = series(11, |at| sample(at, 1, 0.0, &latency(at, 0.0)));
    let none = series(11, |at| sample(at, 1, 0.0, &latency(5.0, 0.0)));
    for gate in ["p99", "p99-ratio"] {
        assert_eq!(one(&gates, &good, Some(&good), gate), Verdict::Pass, "{gate}: the slow ones were before");
        assert_eq!(one(&gates, &bad, Some(&good), gate), Verdict::Fail, "{gate}");
        assert_eq!(one(&gates, &few, Some(&good), gate), Verdict::Inconclusive, "{gate}");
        assert_eq!(one(&gates, &none, Some(&good), gate), Verdict::NoData, "{gate}");
    }
    assert_eq!(one(&gates, &good, None, "p99-ratio"), Verdict::NoData);
}

#[test]
fn errors_are_a_share() {
    let gates = Gates { errors: Some(("bad".into(), "all".into())), error_rate: Some(0.1), ..Gates::default() };
    let of = |bad: f64, all: f64| {
        series(5, move |at| {
            sample(at, 1, 0.0, &format!("# TYPE bad counter\nbad {}\n# TYPE all counter\nall {}\n", at * bad, at * all))
        })
    };
    assert_eq!(one(&gates, &of(1.0, 100.0), None, "error-rate"), Verdict::Pass);
    assert_eq!(one(&gates, &of(50.0, 100.0), None, "error-rate"), Verdict::Fail);
    assert_eq!(one(&gates, &of(5.0, 10.0), None, "error-rate"), Verdict::Inconclusive);
    assert_eq!(one(&gates, &of(0.0, 0.0), None, "error-rate"), Verdict::NoData);
    assert_eq!(one(&gates, &series(5, |at| sample(at, 1, 0.0, "")), None, "error-rate"), Verdict::NoData);
}

#[test]
fn a_patch_has_to_stay() {
    let mut seen = series(5, |at| sample(at, 1, 0.0, ""));
    assert_eq!(one(&Gates::default(), &seen, None, "patch"), Verdict::Pass);
    let other = Gates { patch: Some("other".into()), ..Gates::default() };
    assert_eq!(one(&other, &seen, None, "patch"), Verdict::Error);
    seen[4].patches.clear();
    assert_eq!(one(&Gates::default(), &seen, None, "patch"), Verdict::Fail);
    let gone = judge(&Gates::default(), &seen, None, false);
    assert_eq!(overall(&gone), Verdict::Fail);
    assert_eq!(overall(&[]), Verdict::NoData);
}

#[test]
fn a_breaker_that_trips_is_a_fail() {
    let trips = |n: f64| format!("# TYPE livepatch_breaker_trips_total counter\nlivepatch_breaker_trips_total {n}\n");
    let calm = series(5, |at| sample(at, 1, 0.0, &trips(2.0)));
    assert_eq!(one(&Gates::default(), &calm, None, "breaker"), Verdict::Pass);
    let trips = series(5, |at| sample(at, 1, 0.0, &trips(if at > 2.0 { 3.0 } else { 2.0 })));
    assert_eq!(one(&Gates::default(), &trips, None, "breaker"), Verdict::Fail);
}

/// Seconds of a canary: messages per second of each arm, how many of the new arm's fail, and how long each takes.
fn canary(n: u32, [old, new]: [f64; 2], failing: f64, [old_ms, new_ms]: [f64; 2]) -> Vec<Sample> {
    series(n, move |at| {
        let mut text = String::new();
        let kinds = ["messages", "failed", "panics"];
        for kind in kinds {
            text += &format!("# TYPE livepatch_arm_{kind}_total counter\n");
            let of = |all: f64, bad: f64| match kind {
                "messages" => all,
                "failed" => bad,
                _ => 0.0,
            };
            text += &format!("livepatch_arm_{kind}_total{{arm=\"old\"}} {}\n", of(old * at, 0.0));
            text += &format!("livepatch_arm_{kind}_total{{arm=\"new\"}} {}\n", of(new * at, failing * at));
        }
        text += "# TYPE livepatch_arm_seconds histogram\n";
        for (arm, rate, ms) in [("old", old, old_ms), ("new", new, new_ms)] {
            // Each second is a bit different.
            let sum = (0..=at as u32).map(|i| rate * ms / 1e3 * (1.0 + f64::from(i * 7 % 11) / 50.0)).sum::<f64>();
            let count = rate * at;
            text += &format!(
                "livepatch_arm_seconds_bucket{{arm=\"{arm}\",le=\"+Inf\"}} {count}\nlivepatch_arm_seconds_sum{{arm=\"{arm}\"}} {sum}\nlivepatch_arm_seconds_count{{arm=\"{arm}\"}} {count}\n"
            );
        }
        sample(at, 1, 0.0, &text)
    })
}

#[test]
fn arms_are_compared() {
    let gates = Gates { arm_ratio: Some(1.2), ..Gates::default() };
    let verdicts = |seen: &[Sample]| (one(&gates, seen, None, "arm-errors"), one(&gates, seen, None, "arm-time"));
    assert_eq!(verdicts(&canary(61, [900.0, 100.0], 0.0, [1.0, 1.0])), (Verdict::Pass, Verdict::Pass));
    assert_eq!(verdicts(&canary(61, [900.0, 100.0], 0.0, [1.0, 1.5])), (Verdict::Pass, Verdict::Fail));
    assert_eq!(verdicts(&canary(61, [900.0, 100.0], 5.0, [1.0, 1.0])), (Verdict::Fail, Verdict::Pass));
    assert_eq!(verdicts(&canary(40, [900.0, 100.0], 0.0, [1.0, 9.0])), (Verdict::Pass, Verdict::Inconclusive));
    assert_eq!(verdicts(&canary(61, [900.0, 0.0], 0.0, [1.0, 1.0])), (Verdict::NoData, Verdict::NoData));
    assert_eq!(one(&gates, &series(61, |at| sample(at, 1, 0.0, "")), None, "arms"), Verdict::NoData);
}

#[test]
fn the_u_test_is_the_one_of_the_books() {
    // The usual example of five and four values: U is 17, and by the formula p is 0.055673.
    let x = [19.0, 22.0, 16.0, 29.0, 24.0];
    let y = [20.0, 11.0, 17.0, 12.0];
    assert!((greater(&x, &y) - 0.055_673_443).abs() < 1e-8, "{}", greater(&x, &y));
    assert!(greater(&y, &x) > 0.9);
    assert_eq!(greater(&[1.0; 50], &[1.0; 50]), 1.0, "all are equal");
}
