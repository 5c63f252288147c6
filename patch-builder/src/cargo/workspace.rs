//! What cargo says about the workspace.

use std::path::{Path, PathBuf};
use std::process::Command;

use serde::Deserialize;

use crate::cargo::{output, CargoError};

/// The cargo that called us, else the one in `PATH`.
#[must_use]
pub fn cargo() -> Command {
    Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()))
}

/// A workspace, as `cargo metadata` describes it.
#[derive(Clone, Debug, Deserialize)]
pub struct Workspace {
    /// Its top folder.
    #[serde(rename = "workspace_root")]
    pub root: PathBuf,
    /// Where its builds go.
    #[serde(rename = "target_directory")]
    pub target: PathBuf,
    /// The packages of the workspace.
    pub packages: Vec<Package>,
}

/// A package of the workspace.
#[derive(Clone, Debug, Deserialize)]
pub struct Package {
    /// Its name.
    pub name: String,
    /// Its identity among all packages.
    pub id: String,
}

impl Workspace {
    /// Reads the workspace of a folder or a manifest.
    ///
    /// # Errors
    ///
    /// cargo finds no workspace, or it is broken.
    pub fn read(dir: &Path, manifest: Option<&Path>, target: Option<&Path>) -> Result<Self, CargoError> {
        let mut command = cargo();
        command.current_dir(dir).args(["metadata", "--format-version", "1", "--no-deps"]);
        if let Some(manifest) = manifest {
            command.arg("--manifest-path").arg(manifest);
        }
        let text = output(&mut command)?;
        let mut out: Self = serde_json::from_str(&text)
            .map_err(|e| CargoError::Answer { program: "cargo metadata".into(), what: e.to_string() })?;
        if let Some(target) = target {
            out.target = std::path::absolute(dir.join(target)).unwrap_or_else(|_| dir.join(target));
        }
        Ok(out)
    }

    /// Where records and builds of ours go.
    #[must_use]
    pub fn store(&self) -> PathBuf {
        self.target.join("livepatch")
    }

    /// The name of a package of the workspace.
    #[must_use]
    pub fn package(&self, id: &str) -> Option<&str> {
        self.packages.iter().find(|p| p.id == id).map(|p| p.name.as_str())
    }
}
