//! Text in, text out, exit codes. Each command has its own file.

mod build;
mod cargo;
mod flags;
mod inspect;
mod output;
mod progress;
mod records;
mod sign;
mod wrap;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

/// Diffs two linked builds into a live patch.
#[derive(Parser)]
#[command(
    name = "patch-builder",
    version,
    subcommand_negates_reqs = true,
    args_conflicts_with_subcommands = true,
    after_help = "Example:\n  patch-builder gateway-1.0 gateway-1.0.1 -o fee-fix.so\n  livepatch apply $(pidof gateway) fee-fix.so\n\nExit codes: 0 done, 1 error or nothing differs, 2 usage, 3 refused"
)]
struct Args {
    #[command(subcommand)]
    command: Option<Command>,
    #[command(flatten)]
    build: build::BuildArgs,
}

#[derive(Subcommand)]
enum Command {
    /// Only report what differs
    Diff(Box<build::DiffArgs>),
    /// What a patch holds
    Inspect(inspect::InspectArgs),
    /// Makes a pair of keys for `sign`
    Keygen(sign::KeygenArgs),
    /// Signs a patch: FIX.so.minisig
    Sign(sign::SignArgs),
    /// Whether a patch is signed by a key
    Verify(sign::VerifyArgs),
    /// What to ask of the build
    Flags(flags::FlagsArgs),
    /// Builds C and C++ with what a diff needs, and keeps every linked image
    Wrap(wrap::WrapArgs),
}

/// The `cargo livepatch` command.
pub use cargo::main as cargo_main;

/// The `patch-builder` command; under a compiler's name it stands in for that (see [`crate::wrap`]).
#[must_use]
pub fn main() -> ExitCode {
    if let Some(name) = crate::wrap::shim::called_as() {
        return crate::wrap::shim::main(&name);
    }
    let args = Args::parse();
    match args.command {
        None => build::main(args.build),
        Some(Command::Diff(args)) => build::diff(*args),
        Some(Command::Inspect(args)) => inspect::main(&args),
        Some(Command::Keygen(args)) => sign::keygen(&args),
        Some(Command::Sign(args)) => sign::sign(&args),
        Some(Command::Verify(args)) => sign::verify(&args),
        Some(Command::Flags(args)) => flags::main(&args),
        Some(Command::Wrap(args)) => wrap::main(&args),
    }
}
