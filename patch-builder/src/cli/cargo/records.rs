//! `cargo livepatch list`, `show` and `prune`

use std::collections::BTreeMap;
use std::process::ExitCode;

use clap::Args;

use crate::cargo::CargoError;
use crate::cli::cargo::args::Where;
use crate::cli::output::say;
use crate::cli::records::{lines_of, text_of};

/// Lists what is recorded
#[derive(Args, Debug)]
#[command(after_help = "Example:\n  cargo livepatch list")]
pub struct ListArgs {
    #[command(flatten)]
    place: Where,
    /// As JSON
    #[arg(long)]
    json: bool,
}

/// Shows one record
#[derive(Args, Debug)]
#[command(after_help = "Example:\n  cargo livepatch show 3f9c")]
pub struct ShowArgs {
    /// The build-id, or its beginning
    build_id: String,
    #[command(flatten)]
    place: Where,
    /// As JSON
    #[arg(long)]
    json: bool,
}

/// Removes old records
#[derive(Args, Debug)]
#[command(after_help = "Example:\n  cargo livepatch prune --keep 5")]
pub struct PruneArgs {
    /// Keep the newest N of each program
    #[arg(long, value_name = "N")]
    keep: usize,
    #[command(flatten)]
    place: Where,
}

pub fn list(args: &ListArgs) -> Result<ExitCode, CargoError> {
    let found = args.place.find()?;
    let (good, bad) = found.store.list()?;
    say(&lines_of(&good, args.json));
    bad.iter().for_each(|e| eprintln!("cargo-livepatch: {e}"));
    Ok(if bad.is_empty() { ExitCode::SUCCESS } else { ExitCode::from(1) })
}

pub fn show(args: &ShowArgs) -> Result<ExitCode, CargoError> {
    let found = args.place.find()?;
    let entry = found.store.find(&args.build_id)?;
    say(&text_of(&entry, args.json));
    Ok(ExitCode::SUCCESS)
}

pub fn prune(args: &PruneArgs) -> Result<ExitCode, CargoError> {
    let found = args.place.find()?;
    let mut kept: BTreeMap<(String, String), usize> = BTreeMap::new();
    for entry in found.store.list()?.0 {
        let program = entry.record.cargo.as_ref().map(|c| (c.package.clone(), c.target.clone())).unwrap_or_default();
        let n = kept.entry(program).or_default();
        *n += 1;
        if *n > args.keep {
            found.store.remove(&entry)?;
            say(&format!("removed {} {}\n", entry.record.name, entry.record.build_id));
        }
    }
    Ok(ExitCode::SUCCESS)
}
