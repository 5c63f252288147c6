//! What to ask of the build.

use std::process::ExitCode;

use clap::Args;

use crate::cli::output::say;

/// `patch-builder flags rust|c`
#[derive(Args, Debug)]
#[command(after_help = "Example:\n  RUSTFLAGS=\"$(patch-builder flags rust)\" cargo build --release")]
pub struct FlagsArgs {
    /// `rust` or `c`
    #[arg(value_parser = ["rust", "c"])]
    language: String,
}

/// Prints the flags on one line, fit for a variable.
pub(super) fn main(args: &FlagsArgs) -> ExitCode {
    say(flags(&args.language));
    ExitCode::SUCCESS
}

fn flags(language: &str) -> &'static str {
    match language {
        "rust" => "-Csymbol-mangling-version=v0 -Ccodegen-units=1 -Cdebuginfo=2 -Cstrip=none -Clink-arg=-Wl,--emit-relocs -Clink-arg=-Wl,--build-id\n",
        _ => "-g -O2 -ffunction-sections -fdata-sections -Wl,--emit-relocs -Wl,--build-id\n",
    }
}
