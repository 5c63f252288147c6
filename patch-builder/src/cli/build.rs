//! Two builds in, a patch or a report out.

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::Args;

use crate::cli::output::{say, write_whole};
use crate::cli::progress::Progress;
use crate::cli::wrap::recorded;
use crate::cost::{Cost, Meter};
use crate::pipeline::{run_metered, Options};
use crate::report::{page, Look, Report};

/// What both the building and the mere reporting may be asked.
#[derive(Args, Debug, Default)]
pub struct Common {
    /// Count moved line numbers as changes
    #[arg(long)]
    strict_locations: bool,
    /// The old build's link map [default: OLD.map, if it is there]
    #[arg(long, value_name = "FILE")]
    old_map: Option<PathBuf>,
    /// The new build's link map [default: NEW.map, if it is there]
    #[arg(long, value_name = "FILE")]
    new_map: Option<PathBuf>,
    /// Where builds are recorded that are named by build-id [default: .livepatch, then target/livepatch]
    #[arg(long, value_name = "DIR")]
    store: Option<PathBuf>,
    /// An object file (gcc -c -fPIC) that exports livepatch_pre_apply, livepatch_post_apply, livepatch_pre_revert or
    /// livepatch_post_revert
    #[arg(long, value_name = "H.o")]
    hooks: Option<PathBuf>,
    /// The patch that is applied already: this one takes its place
    #[arg(long, value_name = "PREV.so")]
    after: Option<PathBuf>,
    /// Where the old build's sources are [default: where it was built]
    #[arg(long, value_name = "DIR")]
    old_source: Option<PathBuf>,
    /// Where the new build's sources are [default: where it was built]
    #[arg(long, value_name = "DIR")]
    new_source: Option<PathBuf>,
    /// Overrule a refusal, on your responsibility; recorded in the patch
    #[arg(long, value_name = "RULE[:SYMBOL]")]
    allow: Vec<String>,
    /// Report as JSON on standard output
    #[arg(long)]
    pub(super) json: bool,
    /// Report as one web page, too
    #[arg(long, value_name = "FILE")]
    pub(super) html: Option<PathBuf>,
    /// Say what each phase took, and the peak memory, on standard error (with --json always said, under `cost`)
    #[arg(long)]
    timings: bool,
}

/// How to say what came of it.
#[derive(Clone, Debug, Default)]
pub struct Say {
    /// As JSON.
    pub json: bool,
    /// With the time of each phase.
    pub timings: bool,
    /// As a web page, too, in this file.
    pub html: Option<PathBuf>,
}

/// The report and what it took; the cost is no part of the report, which is the same for the same inputs.
#[derive(serde::Serialize)]
struct Json<'a> {
    #[serde(flatten)]
    report: &'a Report,
    cost: &'a Cost,
}

/// `patch-builder OLD NEW -o FIX.so`
#[derive(Args, Debug)]
pub struct BuildArgs {
    /// The build that runs (unstripped, linked with --emit-relocs), or the build-id of a recorded one
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
    #[command(flatten)]
    common: Common,
}

/// `patch-builder diff OLD NEW`
#[derive(Args, Debug)]
#[command(after_help = "Example:\n  patch-builder diff gateway-1.0 gateway-1.0.1 --json")]
pub struct DiffArgs {
    /// The build that runs
    old: PathBuf,
    /// The build with the change
    new: PathBuf,
    #[command(flatten)]
    common: Common,
}

impl Common {
    /// The two images, where they are named by build-id.
    fn found(&self, old: PathBuf, new: PathBuf) -> Result<(PathBuf, PathBuf), ExitCode> {
        let find = |path: PathBuf| match recorded(&path, self.store.as_deref()) {
            Ok(entry) => Ok(entry.map_or(path, |e| e.image())),
            Err(e) => {
                eprintln!("patch-builder: {e}");
                Err(ExitCode::from(1))
            }
        };
        Ok((find(old)?, find(new)?))
    }

    pub(super) fn how(&self) -> Say {
        Say { json: self.json, timings: self.timings, html: self.html.clone() }
    }

    pub(super) fn options(self, old: PathBuf, new: PathBuf, name: String) -> Options {
        Options {
            old,
            new,
            name,
            strict_locations: self.strict_locations,
            maps: (self.old_map, self.new_map),
            detailed: self.html.is_some(),
            sources: (self.old_source, self.new_source),
            allow: self.allow,
            hooks: self.hooks,
            after: self.after,
            ..Options::default()
        }
    }
}

/// Diffs and writes the patch.
pub(super) fn main(args: BuildArgs) -> ExitCode {
    let (Some(old), Some(new), Some(output)) = (args.old, args.new, args.output) else {
        return ExitCode::from(2);
    };
    let (old, new) = match args.common.found(old, new) {
        Ok(both) => both,
        Err(code) => return code,
    };
    let stem = output.file_stem().map_or_else(|| "patch".into(), |s| s.to_string_lossy().into_owned());
    let how = args.common.how();
    build(&args.common.options(old, new, args.name.unwrap_or(stem)), Some(&output), how)
}

/// Diffs and reports.
pub(super) fn diff(args: DiffArgs) -> ExitCode {
    let how = args.common.how();
    let (old, new) = match args.common.found(args.old, args.new) {
        Ok(both) => both,
        Err(code) => return code,
    };
    let options = args.common.options(old, new, "diff".into());
    build(&Options { only_report: true, ..options }, None, how)
}

/// Runs the pipeline, says what came of it, and writes the patch where one is wanted.
pub(super) fn build(options: &Options, output: Option<&Path>, how: Say) -> ExitCode {
    let json = how.json;
    let ran = {
        let progress = Progress::new();
        let begins = |phase| progress.begins(phase);
        run_metered(options, Meter::new(&begins))
    };
    let outcome = match ran {
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
    if let (Some(path), Some(detail)) = (&how.html, &outcome.detail) {
        if let Err(e) = write_whole(path, page(&outcome.report, detail).as_bytes()) {
            eprintln!("patch-builder: {}: {e}", path.display());
            return ExitCode::from(1);
        }
    }
    if json {
        let whole = Json { report: &outcome.report, cost: &outcome.cost };
        say(&format!("{}\n", serde_json::to_string_pretty(&whole).unwrap_or_default()));
    } else {
        say(&outcome.report.text(Look::of(&console::Term::stdout())));
    }
    if how.timings {
        eprint!("{}", outcome.cost.text());
    }
    if !outcome.report.refusals.is_empty() {
        eprint!("{}", outcome.report.refusal_text(Look::of(&console::Term::stderr())));
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
