//! Revisions of the sources.

use std::path::{Path, PathBuf};
use std::process::Command;

use crate::cargo::{output, CargoError};
use crate::store::GitState;

fn git(dir: &Path) -> Command {
    let mut git = Command::new("git");
    git.arg("-C").arg(dir);
    // What a hook exports must not lead to another repository.
    for variable in ["GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE"] {
        git.env_remove(variable);
    }
    git
}

/// The top folder of the repository that a folder lies in; `None` if it lies in none.
#[must_use]
pub fn top(dir: &Path) -> Option<PathBuf> {
    let text = output(git(dir).args(["rev-parse", "--show-toplevel"])).ok()?;
    Some(PathBuf::from(text.trim_end_matches('\n')))
}

/// The commit that the sources are at, and whether they differ from it; `build` is not looked at.
#[must_use]
pub fn state(dir: &Path, build: &Path) -> Option<GitState> {
    let commit = output(git(dir).args(["rev-parse", "--verify", "HEAD^{commit}"])).ok()?.trim().to_owned();
    let top = top(dir)?;
    let mut status = git(&top);
    status.args(["status", "--porcelain", "--", "."]);
    if let Ok(inside) = build.strip_prefix(&top) {
        status.arg(format!(":(exclude){}", inside.display()));
    }
    let dirty = output(&mut status).map_or(true, |s| !s.trim().is_empty());
    Some(GitState { commit, dirty })
}

/// The commit that a revision names; `None` if it names none.
#[must_use]
pub fn commit(dir: &Path, revision: &str) -> Option<String> {
    let name = format!("{revision}^{{commit}}");
    let text = output(git(dir).args(["rev-parse", "--quiet", "--verify", "--end-of-options", &name])).ok()?;
    Some(text.trim().to_owned())
}

/// A checkout of another commit; removed when dropped.
pub struct Worktree {
    repository: PathBuf,
    /// Its top folder.
    pub path: PathBuf,
}

impl Worktree {
    /// Checks a commit out into a folder.
    ///
    /// # Errors
    ///
    /// git cannot, or a submodule cannot be had.
    pub fn add(repository: &Path, path: &Path, commit: &str) -> Result<Self, CargoError> {
        if let Some(parent) = path.parent() {
            std::fs::create_dir_all(parent).map_err(|error| CargoError::Io { path: parent.to_owned(), error })?;
        }
        output(git(repository).args(["worktree", "prune"]))?;
        output(git(repository).args(["worktree", "add", "--quiet", "--detach", "--force"]).arg(path).arg(commit))?;
        let tree = Self { repository: repository.to_owned(), path: path.to_owned() };
        if path.join(".gitmodules").exists() {
            output(git(path).args(["submodule", "update", "--quiet", "--init", "--recursive"]))?;
        }
        Ok(tree)
    }
}

impl Drop for Worktree {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.path);
        let _ = output(git(&self.repository).args(["worktree", "prune"]));
    }
}
