//! The `patch-builder` command.

mod cli;

fn main() -> std::process::ExitCode {
    cli::main()
}
