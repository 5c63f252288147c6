//! The `cargo livepatch` command.

mod args;
mod build;
mod diff;
mod records;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

/// Builds, records and compares releases of cargo packages
#[derive(Parser)]
#[command(name = "cargo", bin_name = "cargo", disable_help_subcommand = true)]
enum Cargo {
    Livepatch(Livepatch),
}

/// Builds, records and compares releases of cargo packages
#[derive(clap::Args)]
#[command(
    version,
    after_help = "Example:\n  cargo livepatch build --bin gateway      # a release; ship what it names\n  cargo livepatch diff --base v1.4.2 --bin gateway -o fix.so\n  livepatch apply $(pidof gateway) fix.so\n\nExit codes: 0 done, 1 error or nothing differs, 2 usage, 3 refused"
)]
struct Livepatch {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Builds a release and keeps what a later diff needs
    Build(Box<build::BuildArgs>),
    /// Builds the tree and writes the patch from a base to it
    Diff(Box<diff::DiffArgs>),
    /// Lists what is recorded
    List(records::ListArgs),
    /// Shows one record
    Show(records::ShowArgs),
    /// Removes old records
    Prune(records::PruneArgs),
}

/// Runs the command, or stands in for the compiler where cargo asks for that.
#[must_use]
pub fn main() -> ExitCode {
    if crate::cargo::wrapper::is_wrapper() {
        return crate::cargo::wrapper::main();
    }
    let Cargo::Livepatch(args) = Cargo::parse();
    let done = match args.command {
        Command::Build(args) => build::main(&args),
        Command::Diff(args) => diff::main(*args),
        Command::List(args) => records::list(&args),
        Command::Show(args) => records::show(&args),
        Command::Prune(args) => records::prune(&args),
    };
    done.unwrap_or_else(|e| {
        eprintln!("cargo-livepatch: {e}");
        ExitCode::from(e.exit_code())
    })
}
