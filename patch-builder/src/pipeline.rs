//! From two files to a patch, or to the reasons why not.

use std::path::{Path, PathBuf};

use livepatch::patch::PatchFile;

use crate::abi::{self, Contract};
use crate::build::{separate, Build, BuildError, FileBytes, Relocatable, Separate};
use crate::cost::{Cost, Meter};
use crate::diff::{diff, Diff, DiffOptions};
use crate::emit::{emit, About};
use crate::explain::{explain, Both};
use crate::pair::pair;
use crate::report::{Detail, Refusal, Report, ALLOWABLE};
use crate::select::{select, Extras, Selection};
use crate::side::Side;
use crate::verify::{verify, Meant, VerifyError};

/// What to do.
#[derive(Clone, Debug, Default)]
pub struct Options {
    /// The build that runs.
    pub old: PathBuf,
    /// The build with the change.
    pub new: PathBuf,
    /// The patch's name.
    pub name: String,
    /// Count a moved line as a change.
    pub strict_locations: bool,
    /// Write no patch.
    pub only_report: bool,
    /// Find out what the page shows beyond the report.
    pub detailed: bool,
    /// Link maps of the two builds; else `OLD.map` and `NEW.map`, if they are there.
    pub maps: (Option<PathBuf>, Option<PathBuf>),
    /// An object file with hooks.
    pub hooks: Option<PathBuf>,
    /// The applied patch that this one is to take the place of.
    pub after: Option<PathBuf>,
    /// Folders of the sources of the two builds, if they are not where the builds say.
    pub sources: (Option<PathBuf>, Option<PathBuf>),
    /// Rules that somebody takes responsibility for: `RULE` or `RULE:SYMBOL`.
    pub allow: Vec<String>,
}

/// What came of it.
pub struct Outcome {
    /// Everything found; refused if it holds refusals.
    pub report: Report,
    /// What the page shows beyond the report, if asked for.
    pub detail: Option<Detail>,
    /// The patch; `None` if refused, if nothing differs, or if not asked for.
    pub patch: Option<Vec<u8>>,
    /// What it took to find out.
    pub cost: Cost,
}

/// Why there is not even a report.
#[derive(Debug)]
#[non_exhaustive]
pub enum Error {
    /// A file that is no build.
    Input(PathBuf, BuildError),
    /// The two are the same build.
    SameBuild,
    /// A defect of patch-builder that its own check found.
    Verify(crate::verify::VerifyError),
}

impl std::fmt::Display for Error {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Input(path, e) => write!(f, "{}: {e}", path.display()),
            Self::SameBuild => f.write_str("nothing differs: both files are the same build"),
            Self::Verify(e) => write!(f, "{e}; no file was written"),
        }
    }
}

impl std::error::Error for Error {}

impl Error {
    /// The exit code that the design gives it.
    #[must_use]
    pub fn exit_code(&self) -> u8 {
        match self {
            Self::Input(_, BuildError::Incomplete { .. }) => 3,
            _ => 1,
        }
    }

    /// The rule and remedy, if it is a refusal.
    #[must_use]
    pub fn refusal(&self) -> Option<Refusal> {
        let Self::Input(path, BuildError::Incomplete { rule, what, remedy }) = self else { return None };
        let symbol = path.display().to_string();
        let (rule, message, remedy) = ((*rule).into(), format!("{symbol}: {what}"), (*remedy).into());
        Some(Refusal { rule, message, symbol, remedy, ..Refusal::default() })
    }
}

fn read(path: &Path) -> Result<FileBytes, Error> {
    FileBytes::read(path).map_err(|e| Error::Input(path.to_owned(), BuildError::Io(e)))
}

/// Diffs the two builds.
///
/// # Errors
///
/// Unreadable or unusable files, and builds that do not differ.
pub fn run(options: &Options) -> Result<Outcome, Error> {
    run_all(options, Meter::new(&|_| ()), &|_, _| {})
}

/// The same, with a meter that may tell somebody what is under way.
///
/// # Errors
///
/// As [`run`].
pub fn run_metered(options: &Options, meter: Meter<'_>) -> Result<Outcome, Error> {
    run_all(options, meter, &|_, _| {})
}

/// Gets the bytes of a patch, and what checks such bytes.
pub type Examine<'a> = dyn Fn(&[u8], &dyn Fn(&[u8]) -> Result<(), VerifyError>) + 'a;

/// As [`run`], but hands out the bytes and the check of them, to prove that the check sees what is wrong.
///
/// # Errors
///
/// As [`run`].
#[doc(hidden)]
pub fn run_with(options: &Options, examine: &Examine<'_>) -> Result<Outcome, Error> {
    run_all(options, Meter::new(&|_| ()), examine)
}

fn run_all(options: &Options, mut meter: Meter<'_>, examine: &Examine<'_>) -> Result<Outcome, Error> {
    let (old_bytes, new_bytes) = meter.phase("read", || rayon::join(|| read(&options.old), || read(&options.new)));
    let (old_bytes, new_bytes) = (old_bytes?, new_bytes?);
    meter.cost.input_bytes = (old_bytes.len() + new_bytes.len()) as u64;
    meter.cost.read_bytes = old_bytes.read_bytes + new_bytes.read_bytes;
    let parse = |path: &Path, bytes, given: Option<&Path>| {
        let input = |e| Error::Input(path.to_owned(), e);
        let mut build = Build::parse(&path.display().to_string(), bytes).map_err(input)?;
        if let Some(map) = link_map(path, given)? {
            build.add_link_map(&map);
        }
        Ok(build)
    };
    let apart = (separate(&options.old, &old_bytes), separate(&options.new, &new_bytes));
    let debug = (debug_bytes(&apart.0, &old_bytes), debug_bytes(&apart.1, &new_bytes));
    let hooks = options.hooks.as_deref().map(hook_object).transpose()?;
    let after = options.after.as_deref().map(previous).transpose()?;
    let (old, new) = meter.phase("parse", || {
        rayon::join(
            || parse(&options.old, &old_bytes[..], options.maps.0.as_deref()),
            || parse(&options.new, &new_bytes[..], options.maps.1.as_deref()),
        )
    });
    let (old, new) = (old?, new?);
    if old.build_id == new.build_id {
        return Err(Error::SameBuild);
    }
    meter.cost.functions = (old.funcs.len(), new.funcs.len());
    let (old, new) = meter.phase("lift", || rayon::join(|| Side::new(old), || Side::new(new)));
    let pairing = meter.phase("pair", || pair(&old, &new));
    let how = DiffOptions { strict_locations: options.strict_locations };
    let found = meter.phase("compare", || diff(&old, &new, debug, &pairing, how));
    let mut refusals = meter.phase("guard", || {
        let mut refusals = crate::guard::check(&old, &new, &pairing, &found);
        refusals.extend(crate::merged::check(&old, &new, &pairing, &found));
        refusals.extend(crate::sets::check(&old, &new, &pairing, &found));
        refusals.extend(crate::sets::unseen_users(&old, &new, &pairing, &found));
        refusals
    });
    let kin = crate::kin::check(&old, &new, &pairing, debug);
    refusals.extend(kin.refusals.iter().cloned());
    let extras = Extras { hooks: hooks.as_ref(), after: after.as_ref() };
    let selection = meter.phase("select", || select(&old, &new, &pairing, &found, extras));
    refusals.extend(after.as_ref().and_then(|p| not_after(p, &old)));
    refusals.extend(selection.refusals.iter().cloned());
    let files = [(&*options.old, debug.0), (&*options.new, debug.1)];
    let inputs = (&old, &new, &pairing, &found, &selection);
    let contract = meter.phase("types", || contract(inputs, files, after.as_ref()));
    refusals.extend(contract.refusals.iter().cloned());
    let mut said = std::collections::BTreeSet::new();
    refusals.retain(|r| said.insert((r.rule.clone(), r.symbol.clone())));
    let allowances = allow(&mut refusals, &options.allow);
    if refusals.iter().any(|r| kin.refusals.contains(r)) {
        refusals.retain(|r| kin.refusals.contains(r)); // the others are only what comes of it
    }
    let types = contract.summary(&allowances);
    let mut emitted = None;
    if refusals.is_empty() && !selection.functions.is_empty() {
        let about = About {
            name: &options.name,
            allowances: &allowances,
            types: &types,
            layouts: &contract.layouts,
            together: &contract.together(),
            unlike: &contract.unlike,
            statics: &contract.statics,
            states: &contract.states,
            after: after.as_ref(),
        };
        match meter.phase("emit", || emit(&old, &new, &found, &selection, &about)) {
            Ok(e) => {
                let meant = Meant {
                    old: &old,
                    new: &new,
                    pairing: &pairing,
                    diff: &found,
                    manifest: &e.manifest,
                    placed: &e.placed,
                    foreign: &e.foreign,
                    after: after.as_ref(),
                };
                examine(&e.bytes, &|bytes| verify(bytes, meant));
                meter.phase("verify", || verify(&e.bytes, meant)).map_err(Error::Verify)?;
                emitted = Some(e);
            }
            Err(more) => refusals.extend(more),
        }
    }
    let both = Both {
        old: &old,
        new: &new,
        bytes: debug,
        sources: (options.sources.0.as_deref(), options.sources.1.as_deref()),
        detailed: options.detailed,
        pairing: &pairing,
        found: &found,
        selection: &selection,
        layouts: &contract.layouts_used,
    };
    let said = (types, contract.notes);
    let (mut report, detail) =
        meter.phase("report", || explain(&both, &options.name, refusals, emitted.as_ref(), said));
    report.warnings.splice(0..0, kin.warnings);
    for (missing, of) in [(&apart.0, &options.old), (&apart.1, &options.new)] {
        if let Separate::Missing(name) = missing {
            let of = of.display();
            report.warnings.push(format!(
                "the debug information of {of} is in {name}, which is not found beside it (.gnu_debuglink)"
            ));
        }
    }
    let patch = emitted.map(|e| e.bytes).filter(|_| !options.only_report);
    Ok(Outcome { report, detail, patch, cost: meter.finish() })
}

/// The bytes that hold a build's debug information.
fn debug_bytes<'a>(apart: &'a Separate, image: &'a FileBytes) -> &'a [u8] {
    match apart {
        Separate::Found(bytes) => bytes,
        _ => image,
    }
}

/// Reads the types of both builds and compares them, if there is anything to patch.
fn contract(
    (old, new, pairing, diff, selection): (&Side<'_>, &Side<'_>, &crate::pairing::Pairing, &Diff, &Selection),
    files: [(&Path, &[u8]); 2],
    after: Option<&PatchFile>,
) -> Contract {
    if selection.functions.is_empty() {
        return Contract::default();
    }
    let [(old_path, old_bytes), (new_path, new_bytes)] = files;
    let (a, b) = rayon::join(|| abi::read(old_path, old_bytes), || abi::read(new_path, new_bytes));
    let mut contract = abi::check(abi::Inputs { old, new, pairing, diff, selection, files, types: [&a, &b] });
    if let Some(previous) = after {
        contract.refusals.extend(abi::after(&previous.manifest, &b));
        contract.refusals.extend(abi::living(&previous.manifest, &b, &new.build, &selection.living));
    }
    contract
}

/// A small file as it is.
fn whole(path: &Path) -> Result<Vec<u8>, Error> {
    std::fs::read(path).map_err(|e| Error::Input(path.to_owned(), BuildError::Io(e)))
}

fn hook_object(path: &Path) -> Result<Relocatable, Error> {
    let bytes = whole(path)?;
    Relocatable::parse(&bytes).map_err(|e| Error::Input(path.to_owned(), e))
}

fn previous(path: &Path) -> Result<PatchFile, Error> {
    PatchFile::parse(&whole(path)?).map_err(|e| Error::Input(path.to_owned(), BuildError::NotElf(e.to_string())))
}

/// Why a patch can't take the place of `previous`.
fn not_after(previous: &PatchFile, old: &Side<'_>) -> Option<Refusal> {
    let m = &previous.manifest;
    let (message, remedy) = if m.target.build_id.0 != old.build.build_id {
        let message = format!("patch {} is for another build ({}, {})", m.name, m.target.file, m.target.build_id);
        (message, "give the patch that is applied to the running old build".to_owned())
    } else if let (Some(first), true) = (&m.after, m.format < 3) {
        let message = format!(
            "patch {} took the place of {} itself, and does not tell what that one brought (format {})",
            m.name, first.name, m.format
        );
        (message, format!("revert {} and build one patch without --after, or restart with the new build", m.name))
    } else {
        return None;
    };
    Some(Refusal { rule: "after".into(), symbol: m.name.clone(), message, remedy, ..Refusal::default() })
}

/// Takes out the refusals that somebody takes responsibility for, and says which.
fn allow(refusals: &mut Vec<Refusal>, allowed: &[String]) -> Vec<String> {
    let mut used = Vec::new();
    refusals.retain(|r| {
        let exact = format!("{}:{}", r.rule, r.symbol);
        let hit = ALLOWABLE.contains(&r.rule.as_str()) && allowed.iter().any(|a| *a == r.rule || *a == exact);
        if hit {
            used.push(exact);
        }
        !hit
    });
    used
}

/// The link map that was given, or the one beside the build.
fn link_map(build: &Path, given: Option<&Path>) -> Result<Option<String>, Error> {
    let mut beside = build.as_os_str().to_owned();
    beside.push(".map");
    let path = given.map_or_else(|| PathBuf::from(beside), Path::to_owned);
    match std::fs::read(&path) {
        Ok(bytes) => Ok(Some(String::from_utf8_lossy(&bytes).into_owned())),
        Err(e) if given.is_none() && e.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(e) => Err(Error::Input(path, BuildError::Io(e))),
    }
}
