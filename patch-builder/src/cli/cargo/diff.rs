//! `cargo livepatch diff`

use std::path::PathBuf;
use std::process::ExitCode;

use clap::Args;

use crate::cargo::base::{self, Base};
use crate::cargo::release::{self, own_paths, Built};
use crate::cargo::{compare, CargoError};
use crate::cli::build::{build, Common};
use crate::cli::cargo::args::{Found, What, Where};
use crate::store::{CargoBuild, Record};

/// Builds the tree and writes the patch from a base to it
#[derive(Args, Debug)]
#[command(
    after_help = "Examples:\n  cargo livepatch diff --base v1.4.2 --bin gateway -o fix.so\n  cargo livepatch diff --base pid:$(pidof gateway)\n\nThe base must be the very build that runs: best one that `cargo livepatch build` recorded. A git revision is built\nanew with the same toolchain; the patch then serves processes of exactly that build."
)]
pub struct DiffArgs {
    /// The build that runs: a recorded build-id (or its beginning), a git revision, an unstripped image, or pid:PID
    #[arg(long, value_name = "BASE")]
    base: String,
    /// Where to write the patch [default: PROGRAM-OLD-NEW.so]
    #[arg(short, long, value_name = "FIX.so")]
    output: Option<PathBuf>,
    /// The patch's name [default: the output file's stem]
    #[arg(long)]
    name: Option<String>,
    #[command(flatten)]
    place: Where,
    #[command(flatten)]
    what: What,
    #[command(flatten)]
    common: Common,
}

pub fn main(args: DiffArgs) -> Result<ExitCode, CargoError> {
    let mut found = args.place.find()?;
    let base = base::resolve(&args.base, &found.place.source, &found.store)?;
    let like = match &base {
        Base::Recorded(entry) => entry.record.cargo.clone(),
        _ => None,
    };
    let mut wanted = args.what.wanted();
    if let Some(cargo) = &like {
        wanted = args.what.wanted_like(cargo);
        if cargo.paths != own_paths(&found.place.source, &found.store) {
            found.place.shown = Some(cargo.paths.clone());
        }
    }
    let new = choose(release::build(&wanted, &found.place, &found.workspace, &found.store)?, like.as_ref(), &base)?;
    let (old, old_map, record) = old(&base, &new, &wanted, &found)?;
    match &record {
        Some(record) => {
            eprintln!("base {} {}", record.name, record.build_id);
            for warning in compare::warnings(record, &new.entry.record) {
                eprintln!("warning: {warning}");
            }
        }
        None => eprintln!(
            "warning: {} is not recorded: whether compiler and flags were the same is not known",
            old.display()
        ),
    }
    let short = |id: &str| id[..id.len().min(8)].to_owned();
    let from = record.as_ref().map_or_else(|| "base".to_owned(), |r| short(&r.build_id));
    let output = args
        .output
        .unwrap_or_else(|| format!("{}-{from}-{}.so", new.entry.record.name, short(&new.entry.record.build_id)).into());
    let stem = output.file_stem().map_or_else(|| "patch".into(), |s| s.to_string_lossy().into_owned());
    let how = args.common.how();
    let mut options = args.common.options(old, new.entry.image(), args.name.unwrap_or(stem));
    options.maps = (options.maps.0.or(old_map), options.maps.1.or_else(|| new.entry.map()));
    Ok(build(&options, Some(&output), how))
}

/// The image that the base stands for, its map, and its record.
fn old(
    base: &Base,
    new: &Built,
    wanted: &release::Wanted,
    found: &Found,
) -> Result<(PathBuf, Option<PathBuf>, Option<Record>), CargoError> {
    let entry = match base {
        Base::File(path) => return Ok((path.clone(), None, None)),
        Base::Recorded(entry) => (**entry).clone(),
        Base::Commit(commit) => {
            eprintln!("building the base, commit {}", &commit[..commit.len().min(12)]);
            base::build_commit(commit, new, wanted, &found.place, &found.workspace, &found.store)?
        }
    };
    Ok((entry.image(), entry.map(), Some(entry.record)))
}

/// The one build that is to be compared with the base.
fn choose(mut built: Vec<Built>, like: Option<&CargoBuild>, base: &Base) -> Result<Built, CargoError> {
    let of = |b: &Built| b.entry.record.cargo.clone().unwrap_or_default();
    if let Some(like) = like {
        built.retain(|b| of(b).package == like.package && of(b).target == like.target);
    } else if let (Base::File(path), true) = (base, built.len() > 1) {
        built.retain(|b| path.file_name().is_some_and(|n| n == &*b.entry.record.name));
    }
    let names: Vec<_> = built.iter().map(|b| of(b).target).collect();
    match (built.pop(), built.is_empty()) {
        (Some(one), true) => Ok(one),
        (None, _) => Err(CargoError::Choice {
            what: "nothing that was built fits the base: choose it with --package and --bin".into(),
        }),
        (Some(_), false) => Err(CargoError::Choice {
            what: format!("several programs were built ({}): choose one with --bin", names.join(", ")),
        }),
    }
}
