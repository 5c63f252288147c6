//! The `patch-builder` command.

fn main() -> std::process::ExitCode {
    patch_builder::cli::main()
}
