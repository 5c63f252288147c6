//! What a patch holds.

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::Args;
use livepatch::patch::{PatchFile, SegmentKind, Status};

use crate::cli::output::say;

/// `patch-builder inspect FIX.so`
#[derive(Args, Debug)]
#[command(after_help = "Example:\n  patch-builder inspect fee-fix.so")]
pub struct InspectArgs {
    /// The patch
    patch: PathBuf,
    /// Report as JSON on standard output
    #[arg(long)]
    json: bool,
}

/// Reads the patch with the engine's reader and says what it found.
pub(super) fn main(args: &InspectArgs) -> ExitCode {
    inspect(&args.patch, args.json)
}

fn inspect(path: &Path, json: bool) -> ExitCode {
    let patch =
        std::fs::read(path).map_err(|e| e.to_string()).and_then(|b| PatchFile::parse(&b).map_err(|e| e.to_string()));
    let patch = match patch {
        Ok(patch) => patch,
        Err(e) => {
            eprintln!("patch-builder: {}: {e}", path.display());
            return ExitCode::from(1);
        }
    };
    let digest = livepatch::patch::HexBytes(patch.digest.to_vec());
    if json {
        let value =
            serde_json::json!({ "digest": digest, "manifest": patch.manifest, "relocations": patch.relocs.len() });
        say(&format!("{}\n", serde_json::to_string_pretty(&value).unwrap_or_default()));
        return ExitCode::SUCCESS;
    }
    let m = &patch.manifest;
    let mut out = format!(
        "patch    {}\ndigest   {digest}\nbuilder  {} (format {})\nfor      {} {}\nfrom     {} {}\ntypes    {}\n",
        m.name, m.builder, m.format, m.target.file, m.target.build_id, m.new.file, m.new.build_id, m.types
    );
    for s in &patch.segments {
        let kind = match s.kind {
            SegmentKind::Rodata => "constants, read-only",
            SegmentKind::Text => "code, executable",
            SegmentKind::Data => "new statics, writable",
        };
        out += &format!("segment  {:#8x} {:7} bytes  {kind}\n", s.at, s.len_bytes);
    }
    out += &format!("relocs   {}\nfunctions\n", patch.relocs.len());
    for f in &m.functions {
        let status = if f.status == Status::New { "new" } else { "changed" };
        out += &format!("  {status:7} {}  [{} bytes at {:#x}]", f.demangled, f.new_size, f.new_at);
        if let Some(old) = &f.old {
            out += &format!("  replaces {} [{} bytes]", old.at, old.size);
            out += match &old.entry {
                Some(_) => ", entry jump",
                None => ", no entry jump",
            };
        }
        out += "\n";
    }
    for i in &m.imports {
        out += &format!(
            "  import  {}{}\n",
            i.symbol(),
            i.library.as_ref().map_or_else(String::new, |l| format!(" of {l}"))
        );
    }
    if let Some(after) = &m.after {
        out += &format!("  after   {}  {}\n", after.name, after.digest);
    }
    for h in &m.hooks {
        out += &format!("  hook    {}\n", h.symbol);
    }
    for a in &m.allowances {
        out += &format!("  allowed {a}\n");
    }
    for s in &m.statics {
        out += &format!("  static  {}  [{} bytes at {:#x}]\n", s.name, s.size, s.at);
    }
    say(&out);
    ExitCode::SUCCESS
}
