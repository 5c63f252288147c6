//! Load for a FIX 4.4 gateway, in an open loop: every order has a time at which it is due, whether or not the gateway
//! keeps up, and its latency counts from that time. (A client that waits for answers hides every pause: while the gateway
//! stands still, it sends nothing that could be late.)
//!
//! | room | one line |
//! | --- | --- |
//! | `wire` | a counterparty's end of a FIX session: numbers, framing, buffers |
//! | `client` | one simulated trader: its orders and what became of them |
//! | `driver` | one thread's event loop over many traders |
//! | `stats` | what is counted, and the report |
//! | `load` | threads, phases, progress |
//! | `probe` | one order, its fee |

mod client;
mod driver;
mod load;
mod probe;
mod stats;
mod wire;

use clap::{Parser, Subcommand};
use std::process::ExitCode;

/// Puts an open-loop load of FIX 4.4 orders on a gateway, prints a report as JSON.
///
/// Exits with 1 when a message was lost, repeated or out of sequence, or a session was disconnected.
///
/// Example: fix-load --port 9880 --sessions 500 --rate 20000 --duration 30
#[derive(Debug, Parser)]
#[command(name = "fix-load", version, args_conflicts_with_subcommands = true)]
struct Cli {
    #[command(subcommand)]
    command: Option<Command>,
    #[command(flatten)]
    load: load::Args,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Logs on with one session, sends one order, prints the commission charged for it
    ///
    /// Exits with 3 when the gateway refuses the order.
    Probe(probe::Args),
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    let outcome = match cli.command {
        Some(Command::Probe(args)) => probe::run(&args),
        None => load::run(&cli.load),
    };
    outcome.unwrap_or_else(|error| {
        eprintln!("fix-load: {error}");
        ExitCode::FAILURE
    })
}
