//! A panic in the business layer is caught in the core: the request is answered, the session lives on.

use gateway_interface::{
    Business, Cancel, Context, Execution, FieldSource, Fill, Money, NewOrder, Qty, Refusal, RiskLimits,
};
use sample_gateway::business::Desk;
use sample_gateway::core::{run, Config};
use std::process::Command;
use std::time::{Duration, Instant};

/// The desk of this build, but panicking where the version 02-panic does, and in other functions on other symbols.
struct Panicking;

impl Business for Panicking {
    fn order(&self, ctx: &Context<'_>, message: &dyn FieldSource) -> Result<NewOrder, Refusal> {
        assert!(message.field(55) != Some(b"PANIC-ORDER"), "panicked in order");
        Desk.order(ctx, message)
    }

    fn cancel(&self, ctx: &Context<'_>, message: &dyn FieldSource) -> Result<Cancel, Refusal> {
        Desk.cancel(ctx, message)
    }

    fn check(&self, ctx: &Context<'_>, order: &NewOrder) -> Result<(), Refusal> {
        assert!(order.symbol.as_bytes() != b"PANIC", "panicked in check");
        assert!(ctx.limits == &RiskLimits::default());
        Desk.check(ctx, order)
    }

    fn commission(&self, ctx: &Context<'_>, fill: &Fill) -> Money {
        assert!(fill.qty != Qty(13), "panicked in commission");
        Desk.commission(ctx, fill)
    }

    fn report(&self, ctx: &Context<'_>, execution: &Execution, commission: Money, body: &mut Vec<u8>) {
        Desk.report(ctx, execution, commission, body);
        assert!(execution.symbol.as_bytes() != b"PANIC-REPORT", "panicked in report");
    }
}

#[test]
fn a_panic_costs_one_request() {
    let data = tempfile::tempdir().unwrap();
    let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port().to_string();
    let arguments = ["gateway", "--port", &port, "--data", data.path().to_str().unwrap()];
    let config = <Config as clap::Parser>::parse_from(arguments);
    std::thread::spawn(move || run(config, Box::new(Panicking)));
    let deadline = Instant::now() + Duration::from_secs(10);
    while std::net::TcpStream::connect(format!("127.0.0.1:{port}")).is_err() {
        assert!(Instant::now() < deadline, "the gateway does not listen");
        std::thread::sleep(Duration::from_millis(10));
    }
    let probe = |symbol: &str, qty: &str| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_fix-load"));
        let arguments =
            ["probe", "--sender", "ONE", "--port", &port, "--symbol", symbol, "--qty", qty, "--price", "50"];
        let output = command.args(arguments).output().unwrap();
        let text = [output.stdout, output.stderr].concat();
        (output.status.code(), String::from_utf8_lossy(&text).into_owned())
    };
    for (symbol, function) in [("PANIC", "check"), ("PANIC-ORDER", "order"), ("PANIC-REPORT", "report")] {
        let (code, text) = probe(symbol, "100");
        assert_eq!(code, Some(3), "{symbol}: {text}");
        assert!(text.contains(&format!("panicked in {function}")), "{symbol}: {text}");
    }
    assert_eq!(probe("ACME", "13"), (Some(0), "0.00\n".to_owned()), "the fill is reported, without a commission");
    assert_eq!(probe("ACME", "100"), (Some(0), "1.25\n".to_owned()), "the same session trades on");
}
