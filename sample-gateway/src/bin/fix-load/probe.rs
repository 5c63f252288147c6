//! One order, its fee.

use crate::wire::{Received, Wire};
use gateway_interface::{put, put_number, Money, Price, Qty};
use sample_gateway::core::now_ms;
use sample_gateway::fix::{format_utc, frame, msg_type, tag, Frame, Message, Parser};
use std::error::Error;
use std::io::{Read, Write};
use std::net::{IpAddr, TcpStream};
use std::process::ExitCode;
use std::time::Duration;

/// The order, and where it goes.
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
    /// Our CompID
    #[arg(long, default_value_t = format!("PROBE{}", std::process::id()))]
    sender: String,
    /// What to buy
    #[arg(long, default_value = "ACME")]
    symbol: String,
    /// How many
    #[arg(long, default_value = "100")]
    qty: String,
    /// At which price; the order is immediate-or-cancel, so that it is filled at once
    #[arg(long, default_value = "5000")]
    price: String,
    /// Print a JSON object instead of the amount alone
    #[arg(long)]
    json: bool,
    /// How long to wait for an answer, in seconds
    #[arg(long, default_value_t = 10, value_parser = clap::value_parser!(u64).range(1..))]
    timeout: u64,
}

#[derive(Debug, Default, serde::Serialize)]
struct Outcome {
    symbol: String,
    filled: i64,
    fills: u32,
    commission: String,
    refused: Option<String>,
}

/// Sends the order and prints what it cost.
///
/// # Errors
/// When the gateway can't be reached or does not answer in time.
pub fn run(args: &Args) -> Result<ExitCode, Box<dyn Error>> {
    Qty::parse(args.qty.as_bytes()).map_err(|_| format!("--qty {}: not a whole number", args.qty))?;
    Price::parse(args.price.as_bytes()).map_err(|_| format!("--price {}: not a price", args.price))?;
    let mut stream = TcpStream::connect((args.host, args.port))
        .map_err(|e| format!("no gateway at {}:{}: {e}", args.host, args.port))?;
    stream.set_read_timeout(Some(Duration::from_secs(args.timeout)))?;
    let mut wire = Wire::new(args.sender.clone(), args.target.clone());
    wire.logon(30);
    // The order follows at once: a gateway takes what comes after the Logon in sequence.
    wire.send(msg_type::NEW_ORDER_SINGLE, &order(args));
    let mut outcome = Outcome { symbol: args.symbol.clone(), ..Outcome::default() };
    let mut commission = Money(0);
    let mut seen = Vec::new();
    let mut buffer = [0; 4096];
    let mut parser = Parser::new();
    'answers: loop {
        stream.write_all(&wire.out)?;
        wire.out.clear();
        let n = stream.read(&mut buffer).map_err(|e| format!("no answer: {e}"))?;
        if n == 0 {
            return Err("the gateway closed the connection".into());
        }
        seen.extend_from_slice(&buffer[..n]);
        while let Frame::Message(n) = frame(&seen) {
            let (message, _) = parser.parse(&seen[..n]);
            let received = wire.receive(&message);
            let done = take(&message, received, &mut outcome, &mut commission);
            seen.drain(..n);
            if done {
                break 'answers;
            }
        }
    }
    wire.send(msg_type::LOGOUT, b"");
    // The answer is known; a gateway that is gone by now changes nothing.
    let _ = stream.write_all(&wire.out);
    let _ = stream.read(&mut buffer);
    outcome.commission = commission.to_string();
    if args.json {
        println!("{}", serde_json::to_string(&outcome)?);
    } else if outcome.refused.is_none() {
        println!("{}", outcome.commission);
    }
    match outcome.refused {
        None => Ok(ExitCode::SUCCESS),
        Some(why) => {
            eprintln!("fix-load: refused: {why}");
            Ok(ExitCode::from(3))
        }
    }
}

fn order(args: &Args) -> Vec<u8> {
    let mut body = Vec::new();
    put_number(&mut body, tag::CL_ORD_ID, format_args!("probe{:x}", now_ms()));
    put(&mut body, 21, b"1");
    put(&mut body, 55, args.symbol.as_bytes());
    put(&mut body, 54, b"1");
    put(&mut body, tag::TRANSACT_TIME, &format_utc(now_ms()));
    put(&mut body, 38, args.qty.as_bytes());
    put(&mut body, 40, b"2");
    put(&mut body, 44, args.price.as_bytes());
    put(&mut body, 59, b"3");
    body
}

/// Takes in one message; true when nothing more is to come.
fn take(message: &Message<'_>, received: Received, outcome: &mut Outcome, commission: &mut Money) -> bool {
    let text = || String::from_utf8_lossy(message.get(tag::TEXT).unwrap_or(b"no reason given")).into_owned();
    match (message.msg_type(), message.get(tag::EXEC_TYPE)) {
        (msg_type::EXECUTION_REPORT, Some(b"F")) => {
            outcome.fills += 1;
            outcome.filled = message.number(tag::CUM_QTY).map_or(0, u64::cast_signed);
            let charged = message.get(tag::COMMISSION).and_then(|c| Money::parse(c).ok());
            commission.0 += charged.unwrap_or_default().0;
            message.get(tag::LEAVES_QTY) == Some(b"0")
        }
        (msg_type::EXECUTION_REPORT, Some(b"0")) => false,
        (msg_type::EXECUTION_REPORT | msg_type::REJECT | msg_type::BUSINESS_MESSAGE_REJECT | msg_type::LOGOUT, _) => {
            outcome.refused = Some(text());
            true
        }
        _ => {
            if received == Received::OutOfSequence {
                eprintln!("fix-load: a message out of sequence");
            }
            false
        }
    }
}
