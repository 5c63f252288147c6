//! What `--base` names: a record, a revision, a file, or what a process runs.

use std::path::{Path, PathBuf};

use crate::cargo::git::{self, Worktree};
use crate::cargo::release::{self, Built, Place, Wanted};
use crate::cargo::workspace::Workspace;
use crate::cargo::CargoError;
use crate::store::{build_id, build_id_of_process, Entry, GitState, Store, StoreError};

/// The build that runs.
#[derive(Clone, Debug)]
pub enum Base {
    /// One that is recorded.
    Recorded(Box<Entry>),
    /// A file, of which nothing else is known.
    File(PathBuf),
    /// A commit that has yet to be built.
    Commit(String),
}

fn choice<T>(what: String) -> Result<T, CargoError> {
    Err(CargoError::Choice { what })
}

/// Works out what is meant.
///
/// # Errors
///
/// It names nothing, or several things, or a damaged record.
pub fn resolve(text: &str, dir: &Path, store: &Store) -> Result<Base, CargoError> {
    if let Some(pid) = text.strip_prefix("pid:") {
        let Ok(pid) = pid.parse() else { return choice(format!("--base {text}: {pid:?} is no process id")) };
        let id =
            build_id_of_process(pid).map_err(|what| CargoError::Answer { program: format!("--base {text}"), what })?;
        return recorded(&id, store);
    }
    if let Some(id) = text.strip_prefix("build:") {
        return recorded(id, store);
    }
    if let Some(revision) = text.strip_prefix("git:") {
        return match git::commit(dir, revision) {
            Some(commit) => Ok(Base::Commit(commit)),
            None => Err(unknown(text, store)),
        };
    }
    let path = dir.join(text);
    if path.is_file() {
        let id = build_id(&path).map_err(|what| CargoError::Answer { program: path.display().to_string(), what })?;
        // A stripped copy of a recorded build is as good as its name.
        return match id.map(|id| store.find(&id)) {
            Some(Ok(entry)) => Ok(Base::Recorded(Box::new(entry))),
            _ => Ok(Base::File(path)),
        };
    }
    let (found, commit) = (store.find(text), git::commit(dir, text));
    match (found, commit) {
        (Ok(entry), None) => Ok(Base::Recorded(Box::new(entry))),
        (Ok(entry), Some(commit)) => choice(format!(
            "--base {text} is the build {} and the commit {commit}: say build:{text} or git:{text}",
            entry.record.build_id
        )),
        (Err(StoreError::NotFound { .. }), Some(commit)) => Ok(Base::Commit(commit)),
        (Err(StoreError::NotFound { .. }), None) => Err(unknown(text, store)),
        (Err(e), _) => Err(e.into()),
    }
}

fn unknown(text: &str, store: &Store) -> CargoError {
    let what = format!(
        "--base {text} is no file, no git revision and no build recorded in {} (cargo livepatch list shows those)",
        store.root().display()
    );
    CargoError::Answer { program: "cargo livepatch diff".into(), what }
}

fn recorded(id: &str, store: &Store) -> Result<Base, CargoError> {
    Ok(Base::Recorded(Box::new(store.find(id)?)))
}

/// The clean record of a commit that was built like that already.
fn built_before(commit: &str, wanted: &Wanted, target: (&str, &str), compiler: &str, store: &Store) -> Option<Entry> {
    let clean = GitState { commit: commit.to_owned(), dirty: false };
    let (all, _) = store.list().ok()?;
    all.into_iter().find(|e| {
        let fits = e.record.cargo.as_ref().is_some_and(|c| {
            c.profile == wanted.profile && c.args == wanted.choices && (&*c.package, &*c.target) == target
        });
        fits && e.record.git.as_ref() == Some(&clean) && e.record.compiler == compiler && e.verify().is_ok()
    })
}

/// Builds a commit as it would have been built here.
///
/// # Errors
///
/// It cannot be checked out or built, or does not have the wanted program.
pub fn build_commit(
    commit: &str,
    like: &Built,
    wanted: &Wanted,
    place: &Place,
    workspace: &Workspace,
    store: &Store,
) -> Result<Entry, CargoError> {
    let Some(cargo) = &like.entry.record.cargo else {
        return choice("the new build is no build of cargo".into());
    };
    if let Some(entry) =
        built_before(commit, wanted, (&cargo.package, &cargo.target), &like.entry.record.compiler, store)
    {
        return Ok(entry);
    }
    let folder = store.root().join("src").join(format!("{}-{}", &commit[..commit.len().min(12)], std::process::id()));
    let _cleared = Cleared(folder.clone());
    let tree = Worktree::add(&place.source, &folder.join("tree"), commit)?;
    let moved = |path: &Path| match path.strip_prefix(&place.source) {
        Ok(inside) => tree.path.join(inside),
        Err(_) => path.to_owned(),
    };
    let root = moved(&place.root);
    let lock = root.join("Cargo.lock");
    if !lock.exists() && place.root.join("Cargo.lock").is_file() {
        std::fs::copy(place.root.join("Cargo.lock"), &lock)
            .map_err(|error| CargoError::Io { path: lock.clone(), error })?;
    }
    let there = Place {
        dir: moved(&place.dir),
        manifest: place.manifest.as_deref().map(moved),
        root,
        source: tree.path.clone(),
        build: Some(folder.join("build")),
        shown: Some(cargo.paths.clone()),
        git: Some(GitState { commit: commit.to_owned(), dirty: false }),
    };
    if !there.dir.is_dir() {
        return Err(CargoError::Answer {
            program: format!("commit {commit}"),
            what: format!("has no folder {}", place.dir.strip_prefix(&place.source).unwrap_or(&place.dir).display()),
        });
    }
    let its = Workspace::read(&there.dir, there.manifest.as_deref(), Some(&workspace.target))?;
    let built = release::build(wanted, &there, &its, store)?;
    let same = |b: &Built| {
        b.entry.record.cargo.as_ref().is_some_and(|c| c.package == cargo.package && c.target == cargo.target)
    };
    match built.into_iter().find(same) {
        Some(built) => Ok(built.entry),
        None => Err(CargoError::Answer {
            program: format!("commit {commit}"),
            what: format!("builds no {} of package {}", cargo.target, cargo.package),
        }),
    }
}

/// A folder that goes when it is no longer needed.
struct Cleared(PathBuf);

impl Drop for Cleared {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}
