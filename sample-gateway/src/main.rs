//! The sample gateway's command.

use clap::Parser;
use sample_gateway::business::Desk;
use sample_gateway::core::{run, Config};
use std::process::ExitCode;

fn main() -> ExitCode {
    match run(Config::parse(), Box::new(Desk)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("sample-gateway: {error}");
            ExitCode::FAILURE
        }
    }
}
