//! The sample gateway's command.

use clap::Parser;
use sample_gateway::business::Desk;
use sample_gateway::core::{run, Config};
use std::process::ExitCode;

/// The program's allocator, and the agent's arena beside it.
#[global_allocator]
static HEAP: livepatch::agent::heap::Heap = livepatch::agent::heap::Heap::new();

fn main() -> ExitCode {
    match run(Config::parse(), Box::new(Desk)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("sample-gateway: {error}");
            ExitCode::FAILURE
        }
    }
}
