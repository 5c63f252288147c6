//! What to ask of the build.

use std::process::ExitCode;

use clap::Args;

use crate::cli::output::say;

/// `patch-builder flags rust|c`
#[derive(Args, Debug)]
#[command(
    after_help = "Examples:\n  gcc $(patch-builder flags c) -o gateway gateway.c\n  patch-builder flags rust --explain\n\n`cargo livepatch build` and `patch-builder wrap -- make` give these flags themselves."
)]
pub struct FlagsArgs {
    /// `rust` or `c`
    #[arg(value_parser = ["rust", "c"])]
    language: String,
    /// Say on standard error what each flag is for and what it costs to go without
    #[arg(long)]
    explain: bool,
}

/// A flag, what it is for, and what happens without it.
struct Flag(&'static str, &'static str, &'static str);

const RUST: [Flag; 6] = [
    Flag(
        "-Csymbol-mangling-version=v0",
        "names tell instances of a generic apart",
        "correct; more functions in the patch, and closures are refused as ambiguous more often",
    ),
    Flag(
        "-Ccodegen-units=1",
        "a function is compiled alike whatever changed elsewhere",
        "correct; up to some dozens of functions more, that were compiled differently",
    ),
    Flag(
        "-Cdebuginfo=2",
        "types for the guard, line tables to tell a moved line from a changed number",
        "refused (no-types) unless allowed; moved lines count as changes",
    ),
    Flag("-Cstrip=none", "symbols stay; ship a stripped copy", "refused: no-symbols"),
    Flag("-Clink-arg=-Wl,--emit-relocs", "says which bytes of the code are addresses", "refused: no-relocations"),
    Flag("-Clink-arg=-Wl,--build-id", "names the build, in the file and in memory", "refused: no-build-id"),
];
const C: [Flag; 5] = [
    Flag(
        "-g",
        "types for the guard, line tables to tell a moved line from a changed number",
        "refused (no-types) unless allowed; each __LINE__ that moved counts as a change",
    ),
    Flag(
        "-ffunction-sections",
        "each function has its own bounds in the link map",
        "correct; bounds come from symbols and references",
    ),
    Flag("-fdata-sections", "each variable has its own bounds in the link map", "correct; more data may be carried"),
    Flag("-Wl,--emit-relocs", "says which bytes of the code are addresses", "refused: no-relocations"),
    Flag("-Wl,--build-id", "names the build, in the file and in memory", "refused: no-build-id"),
];

/// Prints the flags on one line, fit for a variable; explanations go elsewhere.
pub(super) fn main(args: &FlagsArgs) -> ExitCode {
    let flags: &[Flag] = if args.language == "rust" { &RUST } else { &C };
    let mut line: Vec<&str> = flags.iter().map(|f| f.0).collect();
    if args.language == "c" {
        line.insert(1, "-O2");
    }
    say(&format!("{}\n", line.join(" ")));
    if args.explain {
        for Flag(flag, why, without) in flags {
            eprintln!("{flag}\n    for      {why}\n    without  {without}");
        }
        eprintln!("-Wl,-Map=FILE (as OLD.map beside the image)\n    for      exact bounds of constants without a name\n    without  correct; bounds are taken from symbols and references");
    }
    ExitCode::SUCCESS
}
