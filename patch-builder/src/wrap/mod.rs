//! Builds of C and C++ as they are, with every linked image recorded.
//!
//! A folder of links to this program, named like the compilers, stands first in `PATH`. Each call of a compiler comes
//! here ([`shim`]), is read ([`mod@line`]), gets the flags that a diff needs unless it says otherwise, and runs the real
//! compiler. Everything else of the build is untouched.

pub mod line;
pub mod response;
pub mod shim;

use std::collections::BTreeSet;
use std::ffi::{OsStr, OsString};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus};

use serde::{Deserialize, Serialize};

/// Where records go.
pub const STORE: &str = "LIVEPATCH_WRAP_STORE";
/// The folder of the links.
pub const TOOLS: &str = "LIVEPATCH_WRAP_TOOLS";
/// The file that lists what this run recorded.
pub const SESSION: &str = "LIVEPATCH_WRAP_SESSION";

/// What became of one link.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Seen {
    /// It is recorded.
    Recorded {
        /** Its build-id. */
        build_id: String,
        /** What the build wrote. */
        output: PathBuf,
        /** Not recorded before. */
        new: bool,
    },
    /// It is not recorded.
    Missed {
        /** What the build wrote. */
        output: PathBuf,
        /** Why not. */
        why: String,
    },
}

/// How the build went.
#[derive(Debug)]
pub struct Wrapped {
    /// How its command ended.
    pub status: ExitStatus,
    /// Its links, in the order in which they ended.
    pub seen: Vec<Seen>,
    /// What could not be seen, and what to do.
    pub notes: Vec<String>,
}

/// What a name means as a compiler or linker.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Tool {
    /// gcc, clang and the like.
    Compiler,
    /// A linker called without a compiler.
    Linker,
}

/// What a program of that name is: `gcc`, `x86_64-linux-gnu-g++-12`, `clang++-14`, `ld.lld`, …
#[must_use]
pub fn tool(name: &str) -> Option<Tool> {
    if ["ld", "ld.bfd", "ld.gold", "ld.lld", "mold", "ld.mold"].contains(&name) {
        return Some(Tool::Linker);
    }
    let base = match name.rsplit_once('-') {
        Some((base, version)) if !version.is_empty() && version.bytes().all(|b| b.is_ascii_digit() || b == b'.') => {
            base
        }
        _ => name,
    };
    const KINDS: [&str; 8] = ["gcc", "g++", "cc", "c++", "clang", "clang++", "c89", "c99"];
    let fits = |k: &str| base == k || base.strip_suffix(k).is_some_and(is_triple);
    KINDS.iter().copied().any(fits).then_some(Tool::Compiler)
}

/// Whether it is the beginning of a cross tool's name: `x86_64-linux-gnu-`.
fn is_triple(prefix: &str) -> bool {
    prefix.strip_suffix('-').is_some_and(|t| t.starts_with("x86_64-") || t.starts_with("amd64-"))
}

fn path_folders() -> Vec<PathBuf> {
    std::env::var_os("PATH").map_or_else(Vec::new, |p| std::env::split_paths(&p).collect())
}

/// Fills the folder of links with a name for every compiler in `PATH`.
fn link_tools(tools: &Path, own: &Path) -> std::io::Result<BTreeSet<String>> {
    fs::create_dir_all(tools)?;
    for old in fs::read_dir(tools)? {
        fs::remove_file(old?.path())?;
    }
    let mut names = BTreeSet::new();
    for folder in path_folders() {
        for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
            let name = entry.file_name().to_string_lossy().into_owned();
            if tool(&name).is_some() && names.insert(name.clone()) {
                std::os::unix::fs::symlink(own, tools.join(name))?;
            }
        }
    }
    Ok(names)
}

/// Compilers that are named by a path, which no `PATH` leads away from: variables, and arguments of the command.
fn by_path(command: &[OsString], tools: &Path, names: &BTreeSet<String>) -> (Vec<(String, PathBuf)>, Vec<String>) {
    let (mut set, mut notes) = (Vec::new(), Vec::new());
    for variable in ["CC", "CXX", "LD"] {
        let Ok(value) = std::env::var(variable) else { continue };
        let path = Path::new(&value);
        let Some(name) = path.file_name().and_then(OsStr::to_str).filter(|_| value.starts_with('/')) else { continue };
        let same = || Some(fs::canonicalize(path).ok()? == fs::canonicalize(shim::find(name, tools)?).ok()?);
        if names.contains(name) && same() == Some(true) {
            set.push((variable.to_owned(), tools.join(name)));
        } else {
            notes.push(format!(
                "{variable}={value} is a path: what it compiles is not seen; say {variable}=NAME and put it into PATH"
            ));
        }
    }
    for arg in command.iter().filter_map(|a| a.to_str()) {
        let Some((key, value)) = arg.split_once('=') else { continue };
        let is_compiler = Path::new(value).file_name().and_then(OsStr::to_str).and_then(tool).is_some();
        if value.starts_with('/') && is_compiler && !Path::new(value).starts_with(tools) {
            notes.push(format!("{arg} is a path: what it compiles is not seen; say {key}=NAME"));
        }
    }
    (set, notes)
}

/// Runs a build.
///
/// # Errors
///
/// The folder cannot be written, or the command cannot be started.
pub fn run(store: &Path, command: &[OsString]) -> Result<Wrapped, String> {
    let said = |path: &Path| {
        let path = path.display().to_string();
        move |e: std::io::Error| format!("{path}: {e}")
    };
    fs::create_dir_all(store).map_err(said(store))?;
    let store = fs::canonicalize(store).map_err(said(store))?;
    let own = std::env::current_exe().map_err(|e| e.to_string())?;
    let tools = store.join("tools");
    let names = link_tools(&tools, &own).map_err(said(&tools))?;
    let (variables, mut notes) = by_path(command, &tools, &names);
    let session = store.join(format!(".session-{}", std::process::id()));
    fs::write(&session, "").map_err(said(&session))?;
    let path = std::env::join_paths(std::iter::once(tools.clone()).chain(path_folders())).map_err(|e| e.to_string())?;
    let Some((program, args)) = command.split_first() else { return Err("no command".into()) };
    let status = Command::new(program)
        .args(args)
        .env("PATH", path)
        .env(STORE, &store)
        .env(TOOLS, &tools)
        .env(SESSION, &session)
        .envs(variables)
        .status();
    let text = fs::read_to_string(&session).unwrap_or_default();
    let _ = fs::remove_file(&session);
    let status = status.map_err(said(Path::new(program)))?;
    let seen: Vec<Seen> = text.lines().filter_map(|l| serde_json::from_str(l).ok()).collect();
    if seen.is_empty() {
        notes.push(
            "no link was seen, other than tests of a configure script. Was everything up to date (make clean)? Is the compiler called by its full path (CMakeCache.txt, CC=/usr/bin/gcc)?"
                .into(),
        );
    }
    Ok(Wrapped { status, seen, notes })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn compilers_are_known_by_their_names() {
        for name in [
            "gcc",
            "g++-12",
            "cc",
            "c++",
            "clang-14",
            "clang++",
            "x86_64-linux-gnu-gcc-12",
            "x86_64-linux-gnu-g++",
            "c99",
        ] {
            assert_eq!(tool(name), Some(Tool::Compiler), "{name}");
        }
        for name in ["ld", "ld.lld"] {
            assert_eq!(tool(name), Some(Tool::Linker), "{name}");
        }
        for name in [
            "gcc-ar",
            "gcc-ranlib-12",
            "clang-format",
            "clangd",
            "patch-builder",
            "aarch64-linux-gnu-gcc",
            "cpp",
            "gcov",
            "clang-tidy-14",
            "tcc",
        ] {
            assert_eq!(tool(name), None, "{name}");
        }
    }
}
