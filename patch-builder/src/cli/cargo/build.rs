//! `cargo livepatch build`

use std::process::ExitCode;

use clap::Args;

use crate::cargo::release::{self, Built};
use crate::cargo::CargoError;
use crate::cli::cargo::args::{What, Where};
use crate::cli::output::say;

/// Builds a release and keeps what a later diff needs
#[derive(Args, Debug)]
#[command(after_help = "Example:\n  cargo livepatch build --package gateway --bin gateway --features tls")]
pub struct BuildArgs {
    #[command(flatten)]
    place: Where,
    #[command(flatten)]
    what: What,
    /// The records as JSON on standard output
    #[arg(long)]
    json: bool,
}

pub fn main(args: &BuildArgs) -> Result<ExitCode, CargoError> {
    let found = args.place.find()?;
    let built = release::build(&args.what.wanted(), &found.place, &found.workspace, &found.store)?;
    if args.json {
        let records: Vec<_> = built.iter().map(|b| &b.entry.record).collect();
        say(&format!("{}\n", serde_json::to_string_pretty(&records).unwrap_or_default()));
    } else {
        built.iter().for_each(|b| say(&line(b)));
    }
    Ok(ExitCode::SUCCESS)
}

fn line(built: &Built) -> String {
    let r = &built.entry.record;
    let what = if built.new { "recorded" } else { "recorded before" };
    let ship = built.entry.ship().unwrap_or_default();
    let map = if r.map.is_none() { "  (no link map: the linker wrote none)\n" } else { "" };
    format!("{what} {} {}\n  ship {}\n{map}", r.name, r.build_id, ship.display())
}
