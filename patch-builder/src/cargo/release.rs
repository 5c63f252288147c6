//! Builds a tree with cargo and records what it links.

use std::io::{BufRead as _, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use serde::Deserialize;
use sha2::{Digest as _, Sha256};

use crate::cargo::workspace::{cargo, Workspace};
use crate::cargo::wrapper::{note_paths, Note, CHAINED, COMPILE, NOTES, REMAP, ROOTS};
use crate::cargo::{git, output, CargoError};
use crate::store::{build_id, CargoBuild, Entry, GitState, Parts, Record, ShownPaths, Store};

/// What to build.
#[derive(Clone, Debug, Default)]
pub struct Wanted {
    /// The profile.
    pub profile: String,
    /// Features and the like, which are replayed for another build of the same thing.
    pub choices: Vec<String>,
    /// Packages and targets, as cargo's arguments.
    pub targets: Vec<String>,
    /// What concerns only this run: jobs, verbosity, the network.
    pub ways: Vec<String>,
}

/// Where to build it.
#[derive(Clone, Debug)]
pub struct Place {
    /// The folder to run cargo in.
    pub dir: PathBuf,
    /// The manifest, if not that of the folder.
    pub manifest: Option<PathBuf>,
    /// The workspace's folder.
    pub root: PathBuf,
    /// The top folder of the sources.
    pub source: PathBuf,
    /// The folder of intermediate files; `None`: one for these flags below the store.
    pub build: Option<PathBuf>,
    /// The paths that the image shall show; `None`: the real ones.
    pub shown: Option<ShownPaths>,
    /// What stands in the record about the revision; `None`: what git says.
    pub git: Option<GitState>,
}

impl Place {
    /// The tree of a workspace as it is.
    #[must_use]
    pub fn here(dir: &Path, manifest: Option<PathBuf>, workspace: &Workspace) -> Self {
        let root = workspace.root.clone();
        let source = git::top(&root).unwrap_or_else(|| root.clone());
        Self { dir: dir.to_owned(), manifest, root, source, build: None, shown: None, git: None }
    }
}

/// One image that was built.
#[derive(Clone, Debug)]
pub struct Built {
    /// Its record.
    pub entry: Entry,
    /// Whether it was not recorded before.
    pub new: bool,
}

/// The paths that a build here shows unless told otherwise.
#[must_use]
pub fn own_paths(source: &Path, store: &Store) -> ShownPaths {
    ShownPaths { source: source.to_owned(), build: build_folder(store, ""), cargo_home: cargo_home() }
}

fn cargo_home() -> PathBuf {
    let home = || PathBuf::from(std::env::var_os("HOME").unwrap_or_default()).join(".cargo");
    std::env::var_os("CARGO_HOME").map_or_else(home, PathBuf::from)
}

/// The folder for intermediate files of one way to compile: cargo does not see what the wrapper adds.
fn build_folder(store: &Store, remap: &str) -> PathBuf {
    let way = format!("{}\n{}\n{remap}", env!("CARGO_PKG_VERSION"), COMPILE.join(" "));
    let digest: String = Sha256::digest(way.as_bytes()).iter().take(4).map(|b| format!("{b:02x}")).collect();
    store.root().join("build").join(digest)
}

/// The remappings that make real paths look like the shown ones.
fn remap(real: &ShownPaths, shown: &ShownPaths) -> String {
    // The compiler takes the last that fits: the inner folders come last.
    let pairs = [(&real.source, &shown.source), (&real.build, &shown.build), (&real.cargo_home, &shown.cargo_home)];
    let differ = pairs.into_iter().filter(|(from, to)| from != to);
    differ.map(|(from, to)| format!("{}={}", from.display(), to.display())).collect::<Vec<_>>().join("\x1f")
}

/// Builds and records.
///
/// # Errors
///
/// The build fails, links nothing, or cannot be recorded.
pub fn build(wanted: &Wanted, place: &Place, workspace: &Workspace, store: &Store) -> Result<Vec<Built>, CargoError> {
    let mut real = own_paths(&place.source, store);
    if let Some(build) = &place.build {
        real.build.clone_from(build);
    }
    let mut shown = place.shown.clone().unwrap_or_else(|| real.clone());
    let mut map = remap(&real, &shown);
    if place.build.is_none() && !map.is_empty() {
        // Other paths, other intermediate files. Their folder is shown as the other build's, like the rest.
        real.build = build_folder(store, &map);
        map = remap(&real, &shown);
    }
    if place.shown.is_none() {
        shown = real.clone();
    }
    let notes = real.build.join("livepatch-notes");
    let mut command = cargo();
    command.current_dir(&place.dir).arg("build").arg("--message-format=json-render-diagnostics");
    command.arg("--target-dir").arg(&real.build).args(["--profile", &wanted.profile]);
    if let Some(manifest) = &place.manifest {
        command.arg("--manifest-path").arg(manifest);
    }
    command.args(&wanted.choices).args(&wanted.targets).args(&wanted.ways);
    let own = std::env::current_exe().map_err(|error| CargoError::Io { path: "/proc/self/exe".into(), error })?;
    command
        .env(CHAINED, std::env::var_os("RUSTC_WRAPPER").unwrap_or_default())
        .env("RUSTC_WRAPPER", own)
        .env(NOTES, &notes)
        .env(REMAP, &map)
        .env(ROOTS, format!("{}\x1f{}", place.source.display(), real.cargo_home.display()))
        .env("CARGO_INCREMENTAL", "0")
        .env("CARGO_BUILD_BUILD_DIR", &real.build)
        .stdout(Stdio::piped());
    let artifacts = run(&mut command)?;
    let compiler = rustc_version(&place.dir);
    let state = place.git.clone().or_else(|| git::state(&place.root, &workspace.target));
    let lock = Some(place.root.join("Cargo.lock")).filter(|l| l.is_file());
    let mut out = Vec::new();
    for artifact in artifacts {
        let Some(package) = workspace.package(&artifact.package_id) else { continue };
        let Some((image, kind)) = artifact.image() else { continue };
        let image_error = |what: String| CargoError::Answer { program: image.display().to_string(), what };
        let id = build_id(&image)
            .map_err(image_error)?
            .ok_or_else(|| image_error("has no build-id: does the linker know --build-id?".into()))?;
        let (note, link_map) = read_note(&notes, &id)?;
        let record = Record {
            output: image.clone(),
            cwd: note.cwd,
            compiler: compiler.clone(),
            cargo: Some(CargoBuild {
                package: package.to_owned(),
                target: artifact.target.name.clone(),
                kind: kind.to_owned(),
                profile: wanted.profile.clone(),
                args: wanted.choices.clone(),
                flags: crate::cargo::compare::flags(&note.command),
                paths: shown.clone(),
            }),
            command: note.command,
            git: state.clone(),
            ..Record::default()
        };
        let parts = Parts { map: link_map.as_deref(), lock: lock.as_deref(), ship: true, ..Parts::of(&image) };
        let (entry, new) = store.put(record, &parts)?;
        out.push(Built { entry, new });
    }
    if out.is_empty() {
        let what = "the build links no program and no cdylib: choose one with --bin, --package or --lib".into();
        return Err(CargoError::Choice { what });
    }
    Ok(out)
}

fn read_note(notes: &Path, id: &str) -> Result<(Note, Option<PathBuf>), CargoError> {
    let (path, map) = note_paths(notes, id);
    let text = std::fs::read(&path).map_err(|error| CargoError::Io { path: path.clone(), error })?;
    let note = serde_json::from_slice(&text)
        .map_err(|e| CargoError::Answer { program: path.display().to_string(), what: e.to_string() })?;
    Ok((note, Some(map).filter(|m| m.is_file())))
}

/// What the compiler of that folder says of itself.
fn rustc_version(dir: &Path) -> String {
    let rustc = std::env::var_os("RUSTC").unwrap_or_else(|| "rustc".into());
    output(Command::new(rustc).current_dir(dir).arg("-vV")).map_or_else(|_| String::new(), |s| s.trim().to_owned())
}

/// A message of cargo about something that was built.
#[derive(Debug, Deserialize)]
struct Artifact {
    package_id: String,
    target: Target,
    filenames: Vec<PathBuf>,
    executable: Option<PathBuf>,
}

#[derive(Debug, Deserialize)]
struct Target {
    name: String,
    kind: Vec<String>,
}

impl Artifact {
    /// The linked image and its kind.
    fn image(&self) -> Option<(PathBuf, &str)> {
        if self.target.kind.iter().any(|k| k == "custom-build" || k == "proc-macro") {
            return None;
        }
        let kind = self.target.kind.iter().find(|k| ["bin", "example", "cdylib", "dylib"].contains(&k.as_str()))?;
        let library = || self.filenames.iter().find(|f| f.extension().is_some_and(|e| e == "so")).cloned();
        Some((self.executable.clone().or_else(library)?, kind))
    }
}

/// Runs cargo and gives what it built.
fn run(command: &mut Command) -> Result<Vec<Artifact>, CargoError> {
    let program = "cargo build".to_owned();
    let mut child = command.spawn().map_err(|error| CargoError::Start { program: program.clone(), error })?;
    let mut out = Vec::new();
    for line in BufReader::new(
        child.stdout.take().into_iter().next().ok_or_else(|| CargoError::Failed { program: program.clone() })?,
    )
    .lines()
    {
        let line = line.map_err(|e| CargoError::Answer { program: program.clone(), what: e.to_string() })?;
        let Ok(message) = serde_json::from_str::<serde_json::Value>(&line) else { continue };
        if message["reason"] == "compiler-artifact" {
            if let Ok(artifact) = serde_json::from_value(message) {
                out.push(artifact);
            }
        }
    }
    let status = child.wait().map_err(|error| CargoError::Start { program: program.clone(), error })?;
    if !status.success() {
        return Err(CargoError::Failed { program });
    }
    Ok(out)
}
