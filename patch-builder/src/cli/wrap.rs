//! `patch-builder wrap -- make`

use std::ffi::OsString;
use std::os::unix::process::ExitStatusExt as _;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::Args;

use crate::cli::output::say;
use crate::cli::records::lines_of;
use crate::store::{Entry, Store, StoreError};
use crate::wrap::{self, Seen};

/// Where records are kept unless told otherwise.
const STORE: &str = ".livepatch";

/// Builds C and C++ with what a diff needs, and keeps every linked image
#[derive(Args, Debug)]
#[command(
    after_help = "Example:\n  patch-builder wrap -- make -j8\n  patch-builder wrap --list\n  patch-builder 3f9c81 a0b1c2 -o fix.so      # two recorded builds, by their build-ids\n\nThe exit code is the command's. Works through PATH: configure, cmake and make must run inside the wrap, and find\ntheir compiler by name."
)]
pub struct WrapArgs {
    /// Where records are kept
    #[arg(long, value_name = "DIR", default_value = STORE)]
    store: PathBuf,
    /// List what is recorded
    #[arg(long, conflicts_with = "command")]
    list: bool,
    /// As JSON on standard output
    #[arg(long)]
    json: bool,
    /// The command that builds
    #[arg(last = true, required_unless_present = "list", value_name = "COMMAND")]
    command: Vec<OsString>,
}

/// Builds, or lists.
pub(super) fn main(args: &WrapArgs) -> ExitCode {
    if args.list {
        return list(args);
    }
    let wrapped = match wrap::run(&args.store, &args.command) {
        Ok(wrapped) => wrapped,
        Err(e) => {
            eprintln!("patch-builder: {e}");
            return ExitCode::from(1);
        }
    };
    if args.json {
        say(&format!("{}\n", serde_json::to_string_pretty(&wrapped.seen).unwrap_or_default()));
    }
    for seen in &wrapped.seen {
        match seen {
            Seen::Recorded { build_id, output, new } => {
                let what = if *new { "recorded" } else { "recorded before" };
                eprintln!("patch-builder: {what} {build_id} {}", output.display());
            }
            Seen::Missed { output, why } => eprintln!("patch-builder: not recorded: {}: {why}", output.display()),
        }
    }
    wrapped.notes.iter().for_each(|n| eprintln!("patch-builder: {n}"));
    let code = wrapped.status.code().or_else(|| wrapped.status.signal().map(|s| 128 + s)).unwrap_or(1);
    ExitCode::from(u8::try_from(code).unwrap_or(1))
}

fn list(args: &WrapArgs) -> ExitCode {
    match Store::at(&args.store).list() {
        Ok((good, bad)) => {
            say(&lines_of(&good, args.json));
            bad.iter().for_each(|e| eprintln!("patch-builder: {e}"));
            ExitCode::from(u8::from(!bad.is_empty()))
        }
        Err(e) => {
            eprintln!("patch-builder: {e}");
            ExitCode::from(1)
        }
    }
}

/// The recorded image that a build-id or its beginning names, where it is no file.
pub(super) fn recorded(name: &std::path::Path, store: Option<&std::path::Path>) -> Result<Option<Entry>, StoreError> {
    let Some(text) = name.to_str().filter(|_| !name.exists()) else { return Ok(None) };
    let places: Vec<PathBuf> = match store {
        Some(store) => vec![store.to_owned()],
        None => vec![STORE.into(), PathBuf::from("target").join("livepatch")],
    };
    for place in places {
        match Store::at(place).find(text) {
            Ok(entry) => return Ok(Some(entry)),
            Err(StoreError::NotFound { .. }) => {}
            Err(e) => return Err(e),
        }
    }
    Ok(None)
}
