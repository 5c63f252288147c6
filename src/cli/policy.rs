//! Whose patches this host takes: `/etc/livepatch/policy.toml`.
//!
//! ```toml
//! require-signature = true
//! keys = "/etc/livepatch/keys"
//! ```

use std::path::{Path, PathBuf};

use clap::Args;
use livepatch::signature::{Keys, SignatureError, Signed};
use serde::Deserialize;
use serde_json::json;

/// Where the policy of the host is.
const POLICY: &str = "/etc/livepatch/policy.toml";

#[derive(Args)]
pub struct SignatureArgs {
    /// Takes only a patch that is signed: FIX.so.minisig, by a key of --keys or of the host's policy.
    #[arg(long)]
    require_signature: bool,
    /// A public key of minisign, or a folder of them (*.pub); the host's policy goes first.
    #[arg(long, value_name = "PATH")]
    keys: Option<PathBuf>,
    /// The host's policy.
    #[arg(long, value_name = "FILE", default_value = POLICY)]
    policy: PathBuf,
}

#[derive(Default, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
struct Policy {
    #[serde(default)]
    require_signature: bool,
    keys: Option<PathBuf>,
}

impl Policy {
    /// No file, no policy.
    fn load(path: &Path) -> Result<Self, String> {
        let said = |e: String| format!("{}: {e}", path.display());
        match std::fs::read_to_string(path) {
            Ok(text) => toml::from_str(&text).map_err(|e| said(e.to_string())),
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(Self::default()),
            Err(e) => Err(said(e.to_string())),
        }
    }
}

impl SignatureArgs {
    /// What the patch's signature says, if one is asked for; else the exit code, and it was said why.
    pub fn check(&self, patch: &Path, bytes: &[u8], as_json: bool) -> Result<Option<Signed>, u8> {
        let policy = Policy::load(&self.policy).map_err(|e| {
            eprintln!("livepatch: {e}");
            1
        })?;
        if !policy.require_signature && !self.require_signature {
            return Ok(None);
        }
        // A key that comes with the command line says nothing where the host names its own.
        let keys = policy.keys.as_ref().or(self.keys.as_ref());
        let Some(keys) = keys else {
            let what = "a signature is asked for, and no key to hold it against is known";
            return Err(refuse(what, "give --keys, or name them in the policy (keys = \"…\")", as_json));
        };
        match Keys::load(keys).and_then(|keys| keys.verify_file(bytes, patch)) {
            Ok(signed) => Ok(Some(signed)),
            Err(e) => {
                let unreadable = matches!(e, SignatureError::Unreadable { .. });
                let code =
                    refuse(&format!("{}: {e}", patch.display()), "patch-builder sign makes a signature", as_json);
                Err(if unreadable { 1 } else { code })
            }
        }
    }
}

fn refuse(what: &str, remedy: &str, as_json: bool) -> u8 {
    const REFUSED: u8 = 3;
    eprintln!("livepatch: refused: {what}: {remedy}");
    if as_json {
        let refusal = json!({"kind": "signature", "message": what, "remedy": remedy, "waiting_helps": false});
        println!("{}", json!({"refusal": refusal}));
    }
    REFUSED
}
