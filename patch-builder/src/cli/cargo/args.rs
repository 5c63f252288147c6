//! What the commands share: where the workspace is, and what of it to build.

use std::path::PathBuf;

use clap::Args;

use crate::cargo::release::{Place, Wanted};
use crate::cargo::workspace::Workspace;
use crate::cargo::CargoError;
use crate::store::Store;

/// Where the workspace is.
#[derive(Args, Clone, Debug, Default)]
pub struct Where {
    /// Run in this folder
    #[arg(short = 'C', value_name = "DIR", default_value = ".", hide_default_value = true)]
    dir: PathBuf,
    /// The package's Cargo.toml
    #[arg(long, value_name = "PATH")]
    manifest_path: Option<PathBuf>,
    /// Cargo's folder for what it builds; records lie in its folder `livepatch`
    #[arg(long, value_name = "DIR")]
    target_dir: Option<PathBuf>,
}

/// A workspace that was found.
pub struct Found {
    pub workspace: Workspace,
    pub store: Store,
    pub place: Place,
}

impl Where {
    /// Asks cargo.
    pub fn find(&self) -> Result<Found, CargoError> {
        let dir = std::fs::canonicalize(&self.dir).map_err(|error| CargoError::Io { path: self.dir.clone(), error })?;
        let manifest = self.manifest_path.as_ref().map(|m| dir.join(m));
        let workspace = Workspace::read(&dir, manifest.as_deref(), self.target_dir.as_deref())?;
        let store = Store::at(workspace.store());
        let place = Place::here(&dir, manifest, &workspace);
        Ok(Found { workspace, store, place })
    }
}

/// What to build: the arguments of `cargo build`.
#[derive(Args, Clone, Debug, Default)]
pub struct What {
    /// Build this package
    #[arg(short, long, value_name = "SPEC")]
    package: Vec<String>,
    /// Build every package of the workspace
    #[arg(long, visible_alias = "all")]
    workspace: bool,
    /// Build this program
    #[arg(long, value_name = "NAME")]
    bin: Vec<String>,
    /// Build every program
    #[arg(long)]
    bins: bool,
    /// Build this example
    #[arg(long, value_name = "NAME")]
    example: Vec<String>,
    /// Build the library (of interest if it is a cdylib)
    #[arg(long)]
    lib: bool,
    /// Switch features on
    #[arg(short = 'F', long, value_name = "FEATURES")]
    features: Vec<String>,
    /// Switch all features on
    #[arg(long)]
    all_features: bool,
    /// Leave the default features off
    #[arg(long)]
    no_default_features: bool,
    /// The profile [default: release]
    #[arg(long, value_name = "NAME")]
    profile: Option<String>,
    /// The release profile, which is the default
    #[arg(short, long, conflicts_with = "profile")]
    release: bool,
    /// Build for this target
    #[arg(long, value_name = "TRIPLE")]
    target: Option<String>,
    /// Override a configuration value
    #[arg(long, value_name = "KEY=VALUE")]
    config: Vec<String>,
    /// How many jobs at once
    #[arg(short, long, value_name = "N")]
    jobs: Option<String>,
    /// Cargo.lock must not change
    #[arg(long)]
    locked: bool,
    /// Do not use the network
    #[arg(long)]
    offline: bool,
    /// Both --locked and --offline
    #[arg(long)]
    frozen: bool,
    /// Cargo says less
    #[arg(short, long)]
    quiet: bool,
    /// Cargo says more
    #[arg(short, long, action = clap::ArgAction::Count)]
    verbose: u8,
    /// Further arguments for cargo build
    #[arg(last = true, value_name = "CARGO ARGS")]
    more: Vec<String>,
}

fn each<'a>(flag: &'a str, values: &'a [String]) -> impl Iterator<Item = String> + 'a {
    values.iter().flat_map(move |v| [flag.to_owned(), v.clone()])
}

fn switch(flag: &str, on: bool) -> Option<String> {
    on.then(|| flag.to_owned())
}

impl What {
    /// In cargo's words.
    pub fn wanted(&self) -> Wanted {
        let mut targets: Vec<String> = each("--package", &self.package).collect();
        targets.extend(switch("--workspace", self.workspace));
        targets.extend(each("--bin", &self.bin));
        targets.extend(switch("--bins", self.bins));
        targets.extend(each("--example", &self.example));
        targets.extend(switch("--lib", self.lib));
        let mut choices: Vec<String> = each("--features", &self.features).collect();
        choices.extend(switch("--all-features", self.all_features));
        choices.extend(switch("--no-default-features", self.no_default_features));
        choices.extend(self.target.iter().flat_map(|t| ["--target".to_owned(), t.clone()]));
        choices.extend(each("--config", &self.config));
        choices.extend(self.more.iter().cloned());
        let mut ways: Vec<String> = self.jobs.iter().flat_map(|j| ["--jobs".to_owned(), j.clone()]).collect();
        ways.extend(switch("--locked", self.locked));
        ways.extend(switch("--offline", self.offline));
        ways.extend(switch("--frozen", self.frozen));
        ways.extend(switch("--quiet", self.quiet));
        ways.extend((0..self.verbose).map(|_| "--verbose".to_owned()));
        let profile = self.profile.clone().unwrap_or_else(|| "release".into());
        Wanted { profile, choices, targets, ways }
    }

    /// As for the build of a record, wherever nothing else was asked for.
    pub fn wanted_like(&self, cargo: &crate::store::CargoBuild) -> Wanted {
        let mut wanted = self.wanted();
        if wanted.targets.is_empty() {
            let which = match cargo.kind.as_str() {
                "bin" => vec!["--bin".to_owned(), cargo.target.clone()],
                "example" => vec!["--example".to_owned(), cargo.target.clone()],
                _ => vec!["--lib".to_owned()],
            };
            wanted.targets = ["--package".to_owned(), cargo.package.clone()].into_iter().chain(which).collect();
        }
        if wanted.choices.is_empty() {
            wanted.choices.clone_from(&cargo.args);
        }
        if self.profile.is_none() && !self.release {
            wanted.profile.clone_from(&cargo.profile);
        }
        wanted
    }
}
