//! The `cargo livepatch` command.

fn main() -> std::process::ExitCode {
    patch_builder::cli::cargo_main()
}
