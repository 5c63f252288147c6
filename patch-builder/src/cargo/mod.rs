//! Releases of cargo packages: built so that they can be compared, recorded, and compared.
//!
//! The flags reach the compiler through `RUSTC_WRAPPER`, so that dependencies get them, too, whatever profiles,
//! `RUSTFLAGS` and configuration say, while build scripts and procedural macros are linked as always.

pub mod base;
pub mod compare;
pub mod git;
pub mod release;
pub mod workspace;
pub mod wrapper;

/// Why there is no build.
#[derive(Debug)]
#[non_exhaustive]
pub enum CargoError {
    /// A program that cannot be started.
    Start {
        /** The program. */
        program: String,
        /** Why. */
        error: std::io::Error,
    },
    /// A program that failed; it has said why itself.
    Failed {
        /** The program. */
        program: String,
    },
    /// A program's answer that makes no sense, or what it said when it failed.
    Answer {
        /** The program. */
        program: String,
        /** The answer. */
        what: String,
    },
    /// What was asked for does not name one thing.
    Choice {
        /** Why not, and what to do. */
        what: String,
    },
    /// The store of records.
    Store(crate::store::StoreError),
    /// A file that cannot be read or written.
    Io {
        /** The file. */
        path: std::path::PathBuf,
        /** Why. */
        error: std::io::Error,
    },
}

impl std::fmt::Display for CargoError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Start { program, error } => write!(f, "{program} cannot be started: {error}"),
            Self::Failed { program } => write!(f, "{program} failed"),
            Self::Answer { program, what } => write!(f, "{program}: {what}"),
            Self::Choice { what } => f.write_str(what),
            Self::Store(e) => e.fmt(f),
            Self::Io { path, error } => write!(f, "{}: {error}", path.display()),
        }
    }
}

impl std::error::Error for CargoError {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        match self {
            Self::Start { error, .. } | Self::Io { error, .. } => Some(error),
            Self::Store(e) => Some(e),
            _ => None,
        }
    }
}

impl From<crate::store::StoreError> for CargoError {
    fn from(e: crate::store::StoreError) -> Self {
        Self::Store(e)
    }
}

impl CargoError {
    /// The exit code that the design gives it.
    #[must_use]
    pub fn exit_code(&self) -> u8 {
        match self {
            Self::Choice { .. } => 2,
            _ => 1,
        }
    }
}

/// Runs a program and gives what it prints.
pub(crate) fn output(command: &mut std::process::Command) -> Result<String, CargoError> {
    let program = command.get_program().to_string_lossy().into_owned();
    match command.output() {
        Err(error) => Err(CargoError::Start { program, error }),
        Ok(out) if out.status.success() => Ok(String::from_utf8_lossy(&out.stdout).into_owned()),
        Ok(out) => Err(CargoError::Answer { program, what: String::from_utf8_lossy(&out.stderr).trim().to_owned() }),
    }
}
