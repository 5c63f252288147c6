//! Signatures of patches: detached, and those of minisign(1).

use std::io::Cursor;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::Args;
use livepatch::patch::PatchFile;
use livepatch::signature::{beside, Keys, REVISION};
use minisign::{KeyPair, SecretKey, SecretKeyBox};

use crate::cli::output::{say, write_whole};

/// `patch-builder keygen NAME`
#[derive(Args, Debug)]
#[command(
    after_help = "Example:\n  patch-builder keygen desk --password-file secret.txt\n  install -m 644 desk.pub /etc/livepatch/keys/"
)]
pub struct KeygenArgs {
    /// Writes NAME.key, the secret, and NAME.pub
    name: PathBuf,
    #[command(flatten)]
    password: Password,
}

/// Where the secret key's password comes from; without either it is asked for.
#[derive(Args, Debug)]
struct Password {
    /// The secret key's password is the first line of this file
    #[arg(long, value_name = "FILE")]
    password_file: Option<PathBuf>,
    /// The secret key has no password
    #[arg(long, conflicts_with = "password_file")]
    no_password: bool,
}

/// `patch-builder sign FIX.so --key KEY`
#[derive(Args, Debug)]
#[command(
    after_help = "Example:\n  patch-builder sign fee-fix.so --key desk.key --revision 12\n  livepatch apply 4711 fee-fix.so --require-signature --keys desk.pub"
)]
pub struct SignArgs {
    /// The patch
    patch: PathBuf,
    /// The secret key, of keygen or `minisign -G`
    #[arg(long, value_name = "FILE")]
    key: PathBuf,
    /// Grows with each patch of a program: one with a lower revision than a process has seen is refused there
    #[arg(long, value_name = "N")]
    revision: Option<u64>,
    /// A comment that is signed, too
    #[arg(long, value_name = "TEXT", default_value = "")]
    comment: String,
    #[command(flatten)]
    password: Password,
}

/// `patch-builder verify FIX.so --key PUB`
#[derive(Args, Debug)]
#[command(after_help = "Example:\n  patch-builder verify fee-fix.so --key desk.pub")]
pub struct VerifyArgs {
    /// The patch; its signature lies beside it
    patch: PathBuf,
    /// A public key, or a folder of them (*.pub)
    #[arg(long, value_name = "PATH")]
    key: PathBuf,
    /// Result as JSON
    #[arg(long)]
    json: bool,
}

impl Password {
    /// `None`: it is to be asked for.
    fn read(&self) -> Result<Option<String>, String> {
        let Some(file) = &self.password_file else { return Ok(None) };
        let text = std::fs::read_to_string(file).map_err(|e| format!("{}: {e}", file.display()))?;
        Ok(Some(text.lines().next().unwrap_or_default().to_owned()))
    }
}

fn done(result: Result<String, String>) -> ExitCode {
    match result {
        Ok(said) => {
            say(&said);
            ExitCode::SUCCESS
        }
        Err(e) => {
            eprintln!("patch-builder: {e}");
            ExitCode::from(1)
        }
    }
}

pub(super) fn keygen(args: &KeygenArgs) -> ExitCode {
    done(new_key(args))
}

fn new_key(args: &KeygenArgs) -> Result<String, String> {
    let [secret, public] = ["key", "pub"].map(|ext| args.name.with_extension(ext));
    if let Some(there) = [&secret, &public].into_iter().find(|p| p.exists()) {
        return Err(format!("{} is there already, and stays as it is", there.display()));
    }
    let failed = |e: minisign::PError| e.to_string();
    let pair = if args.password.no_password {
        KeyPair::generate_unencrypted_keypair()
    } else {
        KeyPair::generate_encrypted_keypair(args.password.read()?)
    };
    let pair = pair.map_err(failed)?;
    write_secret(&secret, &pair.sk.to_box(None).map_err(failed)?.to_string())?;
    let text = pair.pk.to_box().map_err(failed)?.to_string();
    write_whole(&public, text.as_bytes()).map_err(|e| format!("{}: {e}", public.display()))?;
    Ok(format!("wrote {} (keep it secret) and {}\n", secret.display(), public.display()))
}

/// For its owner only, from the first byte on.
fn write_secret(path: &Path, text: &str) -> Result<(), String> {
    use std::io::Write;
    use std::os::unix::fs::OpenOptionsExt;
    let file = std::fs::OpenOptions::new().write(true).create_new(true).mode(0o600).open(path);
    file.and_then(|mut f| f.write_all(text.as_bytes())).map_err(|e| format!("{}: {e}", path.display()))
}

pub(super) fn sign(args: &SignArgs) -> ExitCode {
    done(sign_patch(args))
}

fn read_patch(path: &Path) -> Result<(Vec<u8>, PatchFile), String> {
    let bytes = std::fs::read(path).map_err(|e| format!("{}: {e}", path.display()))?;
    let patch = PatchFile::parse(&bytes).map_err(|e| format!("{}: {e}", path.display()))?;
    Ok((bytes, patch))
}

fn secret_key(args: &SignArgs) -> Result<SecretKey, String> {
    let failed = |e: minisign::PError| format!("{}: {e}", args.key.display());
    let text = std::fs::read_to_string(&args.key).map_err(|e| format!("{}: {e}", args.key.display()))?;
    let boxed = SecretKeyBox::from_string(&text).map_err(failed)?;
    if args.password.no_password {
        return boxed.into_unencrypted_secret_key().map_err(failed);
    }
    boxed.into_secret_key(args.password.read()?).map_err(failed)
}

fn sign_patch(args: &SignArgs) -> Result<String, String> {
    let (bytes, patch) = read_patch(&args.patch)?;
    let key = secret_key(args)?;
    let mut comment = format!("patch:{} target:{}", patch.manifest.name, patch.manifest.target.build_id);
    if let Some(n) = args.revision {
        comment = format!("{REVISION}{n} {comment}");
    }
    if !args.comment.is_empty() {
        comment = format!("{comment} {}", args.comment.replace(['\n', '\r'], " "));
    }
    let signed =
        minisign::sign(None, &key, Cursor::new(&bytes), Some(&comment), Some("signature of a livepatch patch"));
    let signed = signed.map_err(|e| e.to_string())?.into_string();
    let out = beside(&args.patch);
    write_whole(&out, signed.as_bytes()).map_err(|e| format!("{}: {e}", out.display()))?;
    Ok(format!("wrote {}: {comment}\n", out.display()))
}

pub(super) fn verify(args: &VerifyArgs) -> ExitCode {
    const REFUSED: u8 = 3;
    let read =
        read_patch(&args.patch).and_then(|(bytes, _)| Ok((bytes, Keys::load(&args.key).map_err(|e| e.to_string())?)));
    let checked = match read.map(|(bytes, keys)| keys.verify_file(&bytes, &args.patch)) {
        Ok(Ok(signed)) => Ok(signed),
        Ok(Err(e)) => {
            eprintln!("patch-builder: refused: {}: {e}", args.patch.display());
            return ExitCode::from(REFUSED);
        }
        Err(e) => Err(e),
    };
    done(checked.map(|signed| match args.json {
        true => format!("{}\n", serde_json::to_string(&signed).unwrap_or_default()),
        false => format!("{}: signed by {}: {}\n", args.patch.display(), signed.key, signed.comment),
    }))
}
