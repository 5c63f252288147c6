//! Modules of tests/modules, built by the compiler alone.

use std::path::{Path, PathBuf};
use std::process::Command;

fn run(command: &mut Command) {
    let out = command.output().expect("the compiler runs");
    assert!(out.status.success(), "{command:?}\n{}", String::from_utf8_lossy(&out.stderr));
}

/// The crate that both sides share, compiled as cargo would.
pub fn interface(dir: &Path) -> PathBuf {
    let version = Command::new("rustc").arg("--version").output().expect("rustc").stdout;
    let library = dir.join("liblivepatch_interface.rlib");
    let source = super::root().join("include/interface/src/lib.rs");
    run(Command::new("rustc")
        .env("LIVEPATCH_RUSTC", String::from_utf8(version).expect("text").trim())
        .args(["--edition", "2021", "--crate-name", "livepatch_interface", "--crate-type", "rlib", "-O", "-o"])
        .args([&library, &source]));
    library
}

/// One version of tests/modules/desk.rs.
pub fn desk(dir: &Path, interface: &Path, name: &str, cfgs: &[&str], more: &[&str]) -> PathBuf {
    let out = dir.join(format!("{name}.so"));
    let external = format!("livepatch_interface={}", interface.display());
    let mut rustc = Command::new("rustc");
    rustc.args(["--edition", "2021", "--crate-name", "desk", "--crate-type", "cdylib", "-O", "--cap-lints", "allow"]);
    rustc.args(cfgs.iter().flat_map(|c| ["--cfg", c]));
    run(rustc
        .args(more)
        .args(["--extern", &external, "-o"])
        .args([&out, &super::root().join("tests/modules/desk.rs")]));
    out
}
