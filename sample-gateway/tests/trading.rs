//! The two binaries together: the gateway on a free port, the load client as its counterparty.

use serde_json::Value;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::path::Path;
use std::process::{Child, Command, Output, Stdio};

struct Gateway {
    child: Child,
    port: String,
    metrics: String,
}

impl Gateway {
    fn start(data: &Path, more: &[&str]) -> Self {
        let mut child = Command::new(env!("CARGO_BIN_EXE_sample-gateway"))
            .args(["--port", "0", "--metrics-port", "0", "--data"])
            .arg(data)
            .args(more)
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
        let mut port = |what: &str| {
            let line = lines.next().expect("the gateway says where it listens").unwrap();
            assert!(line.starts_with(what), "{line}");
            line.rsplit(':').next().unwrap().to_owned()
        };
        let (port, metrics) = (port("listening "), port("metrics "));
        Self { child, port, metrics }
    }

    fn load(&self, args: &[&str]) -> (Output, Value) {
        let output = fix_load(args, &self.port);
        let report = serde_json::from_slice(&output.stdout).unwrap_or(Value::Null);
        (output, report)
    }

    fn metric(&self, name: &str) -> f64 {
        let mut stream = TcpStream::connect(format!("127.0.0.1:{}", self.metrics)).unwrap();
        stream.write_all(b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n").unwrap();
        let mut text = String::new();
        stream.read_to_string(&mut text).unwrap();
        let line = text.lines().find_map(|l| l.strip_prefix(name)?.strip_prefix(' '));
        line.unwrap_or_else(|| panic!("{name} in {text}")).parse().unwrap()
    }

    fn terminate(mut self) {
        let pid = self.child.id().to_string();
        assert!(Command::new("kill").arg(&pid).status().unwrap().success());
        assert!(self.child.wait().unwrap().success(), "SIGTERM ends the gateway in order");
    }
}

impl Drop for Gateway {
    fn drop(&mut self) {
        // Already gone after `terminate`.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn fix_load(args: &[&str], port: &str) -> Output {
    Command::new(env!("CARGO_BIN_EXE_fix-load")).args(args).args(["--port", port]).output().unwrap()
}

#[test]
fn a_load_loses_nothing() {
    let data = tempfile::tempdir().unwrap();
    let gateway = Gateway::start(data.path(), &["--workers", "3"]);
    let args = ["--sessions", "30", "--rate", "1000", "--duration", "2", "--threads", "2", "--cancel-share", "0.3"];
    let (output, report) = gateway.load(&args);
    assert!(output.status.success(), "{report:#}\n{}", String::from_utf8_lossy(&output.stderr));
    let count = |name: &str| report[name].as_u64().unwrap();
    assert_eq!(count("orders_sent") + count("cancels_sent"), 2_000);
    assert_eq!(count("orders_acknowledged"), count("orders_sent"));
    assert_eq!(count("cancels_done") + count("cancels_rejected"), count("cancels_sent"));
    assert!(count("cancels_done") > 0 && count("fills") > 0);
    assert_eq!(report["latency"]["count"].as_u64().unwrap(), count("orders_sent"));
    assert_eq!(gateway.metric("gateway_orders_accepted_total") as u64, count("orders_sent"));
    assert_eq!(gateway.metric("gateway_fills_total") as u64, count("fills"));
    assert_eq!(gateway.metric("gateway_sessions"), 0.0, "all have logged out");
    gateway.terminate();
}

#[test]
fn the_fee_is_on_the_wire() {
    let data = tempfile::tempdir().unwrap();
    let gateway = Gateway::start(data.path(), &["--acknowledge", "received"]);
    let probe = ["probe", "--symbol", "ACME", "--qty", "100", "--price", "50"];
    let (output, _) = gateway.load(&probe);
    assert_eq!(String::from_utf8_lossy(&output.stdout), "1.25\n");
    let (output, _) = gateway.load(&["probe", "--qty", "9000000", "--price", "1"]);
    assert_eq!(output.status.code(), Some(3));
    assert!(String::from_utf8_lossy(&output.stderr).contains("quantity 9000000 exceeds"), "{output:?}");
    gateway.terminate();
}

#[test]
fn a_killed_gateway_comes_back_with_its_books() {
    let data = tempfile::tempdir().unwrap();
    let mut gateway = Gateway::start(data.path(), &[]);
    let load = ["--sessions", "10", "--rate", "500", "--duration", "1", "--symbols", "2", "--cancel-share", "0"];
    let (output, _) = gateway.load(&load);
    assert!(output.status.success());
    let resting = gateway.metric("gateway_resting_orders");
    assert!(resting > 0.0);
    gateway.child.kill().unwrap();
    gateway.child.wait().unwrap();
    let gateway = Gateway::start(data.path(), &["--workers", "1"]);
    assert_eq!(gateway.metric("gateway_resting_orders"), resting, "every acknowledged order is there");
    let (output, report) = gateway.load(&load);
    assert!(output.status.success(), "{report:#}");
    gateway.terminate();
}

#[test]
fn what_is_no_fix_is_closed_and_harms_nobody() {
    let data = tempfile::tempdir().unwrap();
    let gateway = Gateway::start(data.path(), &[]);
    for junk in [&b"GET / HTTP/1.1\r\n\r\n"[..], b"8=FIX.4.4\x019=5\x0135=0\x0110=163\x01", &[0xff; 5_000]] {
        let mut stream = TcpStream::connect(format!("127.0.0.1:{}", gateway.port)).unwrap();
        // The gateway may close before all is written.
        let _ = stream.write_all(junk);
    }
    let (output, _) = gateway.load(&["probe"]);
    assert!(output.status.success());
    gateway.terminate();
}

#[test]
fn nobody_listening_is_an_error_that_says_so() {
    let output = fix_load(&["--sessions", "2"], "1");
    assert_eq!(output.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&output.stderr).contains("is a gateway listening"), "{output:?}");
}
