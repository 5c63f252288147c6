//! Notes which compiler builds this: where a type of Rust's library crosses an interface, both sides must be of one compiler.

use std::process::Command;

fn main() {
    println!("cargo:rerun-if-env-changed=RUSTC");
    let rustc = std::env::var_os("RUSTC").unwrap_or_else(|| "rustc".into());
    let output = Command::new(rustc).arg("--version").output().expect("cargo names the compiler");
    let text = String::from_utf8(output.stdout).expect("its version is text");
    println!("cargo:rustc-env=LIVEPATCH_RUSTC={}", text.trim());
}
