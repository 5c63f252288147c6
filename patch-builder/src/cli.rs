//! Text in, text out, exit codes.

use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::{Parser, Subcommand};
use livepatch::patch::{PatchFile, SegmentKind, Status};
use patch_builder::{run, Options};

/// Diffs two linked builds into a live patch.
#[derive(Parser)]
#[command(
    version,
    subcommand_negates_reqs = true,
    args_conflicts_with_subcommands = true,
    after_help = "Example:\n  patch-builder gateway-1.0 gateway-1.0.1 -o fee-fix.so\n  livepatch apply $(pidof gateway) fee-fix.so\n\nExit codes: 0 done, 1 error or nothing differs, 2 usage, 3 refused"
)]
struct Args {
    #[command(subcommand)]
    command: Option<Command>,
    /// The build that runs (unstripped, linked with --emit-relocs)
    #[arg(required = true)]
    old: Option<PathBuf>,
    /// The build with the change
    #[arg(required = true)]
    new: Option<PathBuf>,
    /// Where to write the patch
    #[arg(short, long, value_name = "FIX.so", required = true)]
    output: Option<PathBuf>,
    /// The patch's name [default: the output file's stem]
    #[arg(long)]
    name: Option<String>,
    /// Count moved line numbers as changes
    #[arg(long)]
    strict_locations: bool,
    /// The old build's link map [default: OLD.map, if it is there]
    #[arg(long, value_name = "FILE")]
    old_map: Option<PathBuf>,
    /// The new build's link map [default: NEW.map, if it is there]
    #[arg(long, value_name = "FILE")]
    new_map: Option<PathBuf>,
    /// Overrule a refusal, on your responsibility; recorded in the patch
    #[arg(long, value_name = "RULE[:SYMBOL]")]
    allow: Vec<String>,
    /// Report as JSON on standard output
    #[arg(long)]
    json: bool,
}

#[derive(Subcommand)]
enum Command {
    /// Only report what differs
    #[command(after_help = "Example:\n  patch-builder diff gateway-1.0 gateway-1.0.1 --json")]
    Diff {
        /// The build that runs
        old: PathBuf,
        /// The build with the change
        new: PathBuf,
        /// Count moved line numbers as changes
        #[arg(long)]
        strict_locations: bool,
        /// Report as JSON on standard output
        #[arg(long)]
        json: bool,
    },
    /// What a patch holds
    #[command(after_help = "Example:\n  patch-builder inspect fee-fix.so")]
    Inspect {
        /// The patch
        patch: PathBuf,
        /// Report as JSON on standard output
        #[arg(long)]
        json: bool,
    },
    /// What to ask of the build
    #[command(after_help = "Example:\n  RUSTFLAGS=\"$(patch-builder flags rust)\" cargo build --release")]
    Flags {
        /// `rust` or `c`
        #[arg(value_parser = ["rust", "c"])]
        language: String,
    },
}

/// Prints to standard output; a closed pipe ends quietly.
fn say(text: &str) {
    let _ = std::io::stdout().write_all(text.as_bytes());
}

pub fn main() -> ExitCode {
    let args = Args::parse();
    match args.command {
        None => {
            let (Some(old), Some(new), Some(output)) = (args.old, args.new, args.output) else {
                return ExitCode::from(2);
            };
            let stem = output.file_stem().map_or_else(|| "patch".into(), |s| s.to_string_lossy().into_owned());
            let name = args.name.unwrap_or(stem);
            let options = Options {
                old,
                new,
                name,
                strict_locations: args.strict_locations,
                only_report: false,
                maps: (args.old_map, args.new_map),
                allow: args.allow,
            };
            build(&options, Some(&output), args.json)
        }
        Some(Command::Diff { old, new, strict_locations, json }) => {
            let name = "diff".into();
            let options = Options { old, new, name, strict_locations, only_report: true, ..Options::default() };
            build(&options, None, json)
        }
        Some(Command::Inspect { patch, json }) => inspect(&patch, json),
        Some(Command::Flags { language }) => {
            say(flags(&language));
            ExitCode::SUCCESS
        }
    }
}

fn build(options: &Options, output: Option<&Path>, json: bool) -> ExitCode {
    let outcome = match run(options) {
        Ok(outcome) => outcome,
        Err(e) => {
            if json {
                let refusals: Vec<_> = e.refusal().into_iter().collect();
                say(&format!("{}\n", serde_json::json!({ "error": e.to_string(), "refusals": refusals })));
            }
            match e.refusal() {
                Some(r) => eprintln!("patch-builder: refused [{}]: {e}", r.rule),
                None => eprintln!("patch-builder: {e}"),
            }
            return ExitCode::from(e.exit_code());
        }
    };
    if json {
        say(&format!("{}\n", serde_json::to_string_pretty(&outcome.report).unwrap_or_default()));
    } else {
        say(&outcome.report.text());
    }
    if !outcome.report.refusals.is_empty() {
        eprint!("{}", outcome.report.refusal_text());
        eprintln!("patch-builder: refused: no file was written");
        return ExitCode::from(3);
    }
    if outcome.report.functions.is_empty() {
        let drift = if outcome.report.noise.is_empty() { "" } else { "; only lines moved" };
        eprintln!("patch-builder: nothing differs in any function{drift}; no file was written");
        return ExitCode::from(1);
    }
    let (Some(output), Some(bytes)) = (output, outcome.patch) else { return ExitCode::SUCCESS };
    if let Err(e) = write_whole(output, &bytes) {
        eprintln!("patch-builder: {}: {e}", output.display());
        return ExitCode::from(1);
    }
    if !json {
        say(&format!("wrote {} ({} bytes)\n", output.display(), bytes.len()));
    }
    ExitCode::SUCCESS
}

/// All of the file or none of it.
fn write_whole(path: &Path, bytes: &[u8]) -> std::io::Result<()> {
    let mut partial = path.as_os_str().to_owned();
    partial.push(format!(".{}.partial", std::process::id()));
    let partial = PathBuf::from(partial);
    let written = std::fs::write(&partial, bytes).and_then(|()| std::fs::rename(&partial, path));
    if written.is_err() {
        let _ = std::fs::remove_file(&partial);
    }
    written
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
    for a in &m.allowances {
        out += &format!("  allowed {a}\n");
    }
    for s in &m.statics {
        out += &format!("  static  {}  [{} bytes at {:#x}]\n", s.name, s.size, s.at);
    }
    say(&out);
    ExitCode::SUCCESS
}

fn flags(language: &str) -> &'static str {
    match language {
        "rust" => "-Csymbol-mangling-version=v0 -Ccodegen-units=1 -Cdebuginfo=2 -Cstrip=none -Clink-arg=-Wl,--emit-relocs -Clink-arg=-Wl,--build-id\n",
        _ => "-g -O2 -ffunction-sections -fdata-sections -Wl,--emit-relocs -Wl,--build-id\n",
    }
}
