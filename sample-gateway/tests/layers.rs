//! The layers are what the documentation says: imports run downward, the business layer keeps nothing, and the interface
//! is what it was when its lock was written.

use sha2::{Digest, Sha256};
use std::fs;
use std::path::{Path, PathBuf};

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

fn sources(folder: &Path) -> Vec<(PathBuf, String)> {
    let mut found = Vec::new();
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            found.extend(sources(&path));
        } else if path.extension().is_some_and(|e| e == "rs") {
            found.push((path.clone(), fs::read_to_string(&path).unwrap()));
        }
    }
    found.sort();
    found
}

/// Lines of code: comments and everything from the tests on are left out.
fn code(text: &str) -> impl Iterator<Item = (usize, &str)> {
    let lines = text.lines().enumerate().map(|(n, line)| (n + 1, line.split("//").next().unwrap_or("")));
    lines.take_while(|(_, line)| !line.contains("#[cfg(test)]"))
}

#[test]
fn the_business_layer_keeps_nothing() {
    let forbidden = [
        "static ",
        "thread_local!",
        "Cell<",
        "OnceLock",
        "LazyLock",
        "Mutex",
        "RwLock",
        "Atomic",
        "unsafe",
        "std::fs",
        "std::net",
        "std::env",
        "std::thread",
        "std::time",
    ];
    let files = sources(&root().join("src/business"));
    assert!(files.len() >= 4, "{files:?}");
    for (path, text) in files {
        for (line, code) in code(&text) {
            for word in forbidden {
                let code = code.replace("&'static ", "");
                assert!(!code.contains(word), "{}:{line}: `{word}` has no place in the business layer", path.display());
            }
        }
    }
}

#[test]
fn imports_run_downward() {
    for (layer, forbidden) in [
        ("fix", &["crate::business", "crate::state", "crate::core", "livepatch::"][..]),
        ("business", &["crate::fix", "crate::state", "crate::core", "livepatch::"]),
        ("state", &["crate::business", "crate::core", "livepatch::"]),
        ("core", &["crate::business"]),
    ] {
        for (path, text) in sources(&root().join("src").join(layer)) {
            if path.to_string_lossy().ends_with("_tests.rs") {
                continue;
            }
            for (line, code) in code(&text) {
                for word in forbidden {
                    assert!(!code.contains(word), "{}:{line}: {layer} may not import {word}", path.display());
                }
            }
        }
    }
}

#[test]
fn the_interface_is_locked() {
    let mut digest = Sha256::new();
    for (path, text) in sources(&root().join("interface/src")) {
        digest.update(path.file_name().unwrap().as_encoded_bytes());
        // What changes no layout and no contract: comments and tests.
        for (_, line) in code(&text).filter(|(_, l)| !l.trim().is_empty()) {
            digest.update(line.trim().as_bytes());
            digest.update(b"\n");
        }
    }
    let found: String = digest.finalize().iter().map(|b| format!("{b:02x}")).collect();
    let lock = root().join("interface/interface.lock");
    if std::env::var_os("UPDATE_INTERFACE_LOCK").is_some() {
        fs::write(&lock, format!("{found}\n")).unwrap();
    }
    let locked = fs::read_to_string(&lock).unwrap_or_default();
    assert_eq!(
        locked.trim(),
        found,
        "the interface changed; objects of its types are alive when a patch is applied. If that is meant:\n\
         UPDATE_INTERFACE_LOCK=1 cargo test -p sample-gateway --test layers"
    );
}

#[test]
fn every_version_is_a_diff_of_business_code_that_applies() {
    let mut diffs: Vec<PathBuf> = fs::read_dir(root().join("versions")).unwrap().map(|e| e.unwrap().path()).collect();
    diffs.retain(|p| p.extension().is_some_and(|e| e == "diff"));
    diffs.sort();
    assert!(!diffs.is_empty());
    for diff in diffs {
        let text = fs::read_to_string(&diff).unwrap();
        for line in text.lines().filter(|l| l.starts_with("+++ ")) {
            let in_business = line.starts_with("+++ b/sample-gateway/src/business/");
            assert!(in_business, "{}: {line}: versions change business code only", diff.display());
        }
        let done = std::process::Command::new("patch")
            .args(["-p1", "--dry-run", "--fuzz=0", "--force", "-i"])
            .arg(&diff)
            .current_dir(root().parent().unwrap())
            .output()
            .expect("the command `patch` is needed");
        assert!(done.status.success(), "{}: {}", diff.display(), String::from_utf8_lossy(&done.stdout));
    }
}
