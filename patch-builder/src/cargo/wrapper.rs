//! The compiler as cargo sees it: adds what a diff needs, and notes how each image was linked.

use std::ffi::{OsStr, OsString};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};

use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};

use crate::store::build_id;

/// Tells the wrapper that it is one, and where notes of links go.
pub const NOTES: &str = "CARGO_LIVEPATCH_NOTES";
/// The wrapper that the user has set.
pub const CHAINED: &str = "CARGO_LIVEPATCH_CHAINED";
/// Paths to be shown as others, `FROM=TO`, separated by `\x1f`.
pub const REMAP: &str = "CARGO_LIVEPATCH_REMAP";

/// The top folder of the sources and cargo's home, separated by `\x1f`.
pub const ROOTS: &str = "CARGO_LIVEPATCH_ROOTS";

/// What every crate is compiled with, on top of what cargo asks for; the last one counts.
pub const COMPILE: [&str; 5] =
    ["-Csymbol-mangling-version=v0", "-Ccodegen-units=1", "-Cdebuginfo=2", "-Cstrip=none", "-Csplit-debuginfo=off"];
/// What images are linked with.
const LINK: [&str; 2] = ["--emit-relocs", "--build-id"];

/// How an image was linked.
#[derive(Debug, Serialize, Deserialize)]
pub struct Note {
    /// The image, where the compiler wrote it.
    pub output: PathBuf,
    /// The folder of the link.
    pub cwd: PathBuf,
    /// The compiler and its arguments.
    pub command: Vec<String>,
}

/// One call of the compiler.
#[derive(Debug, Default, PartialEq, Eq)]
struct Call {
    krate: Option<String>,
    types: Vec<String>,
    out_dir: Option<PathBuf>,
    extra: String,
    links: bool,
    linker_is_ld: bool,
}

/// Reads what matters of a call.
fn read(args: &[OsString]) -> Call {
    let mut call = Call { links: true, ..Call::default() };
    let mut at = args.iter().map(|a| a.to_string_lossy().into_owned());
    while let Some(arg) = at.next() {
        let (key, value) = match arg.split_once('=') {
            Some((key, value)) if key.starts_with("--") => (key.to_owned(), Some(value.to_owned())),
            _ if ["-C", "--crate-name", "--crate-type", "--out-dir", "--emit", "--codegen"].contains(&arg.as_str()) => {
                (arg.clone(), at.next())
            }
            _ if arg.starts_with("-C") => ("-C".to_owned(), Some(arg[2..].to_owned())),
            _ => continue,
        };
        let Some(value) = value else { continue };
        match key.as_str() {
            "--crate-name" => call.krate = Some(value),
            "--crate-type" => call.types.extend(value.split(',').map(str::to_owned)),
            "--out-dir" => call.out_dir = Some(value.into()),
            "--emit" => call.links = value.split(',').any(|e| e == "link" || e.starts_with("link=")),
            "-C" | "--codegen" => match value.split_once('=') {
                Some(("extra-filename", v)) => v.clone_into(&mut call.extra),
                Some(("linker-flavor", v)) => call.linker_is_ld = !v.contains("cc") && v.contains("ld"),
                Some(("linker", v)) => {
                    let name = Path::new(v).file_name().unwrap_or_default().to_string_lossy().into_owned();
                    call.linker_is_ld |= ["ld", "ld.lld", "rust-lld", "ld.bfd", "ld.gold", "mold"].contains(&&*name);
                }
                _ => {}
            },
            _ => {}
        }
    }
    call
}

impl Call {
    /// Whether it compiles a crate (and does not only ask the compiler something).
    fn compiles(&self) -> bool {
        self.krate.as_deref().is_some_and(|k| k != "___") && self.out_dir.is_some()
    }

    /// The image that it links for the target, if it does; build scripts and macros are the host's.
    fn image(&self) -> Option<PathBuf> {
        let (krate, dir) = (self.krate.as_deref()?, self.out_dir.as_ref()?);
        if !self.compiles() || !self.links || krate.starts_with("build_script_") {
            return None;
        }
        let name = format!("{krate}{}", self.extra);
        if self.types.iter().any(|t| t == "cdylib" || t == "dylib") {
            return Some(dir.join(format!("lib{name}.so")));
        }
        (self.types.is_empty() || self.types.iter().any(|t| t == "bin")).then(|| dir.join(name))
    }
}

/// The arguments that are added to a call; with an image also where its map goes.
fn added(call: &Call, remap: &str) -> (Vec<OsString>, Option<(PathBuf, PathBuf)>) {
    let mut out: Vec<OsString> = Vec::new();
    if !call.compiles() {
        return (out, None);
    }
    out.extend(COMPILE.iter().map(Into::into));
    out.extend(remap.split('\x1f').filter(|r| !r.is_empty()).map(|r| format!("--remap-path-prefix={r}").into()));
    let Some(image) = call.image() else { return (out, None) };
    let map = beside(&image, "link-map");
    let mut link = |flag: &OsStr| {
        let mut arg = OsString::from(if call.linker_is_ld { "-Clink-arg=" } else { "-Clink-arg=-Wl," });
        arg.push(flag);
        out.push(arg);
    };
    LINK.iter().for_each(|flag| link(OsStr::new(flag)));
    let mut flag = OsString::from("-Map=");
    flag.push(&map);
    link(&flag);
    (out, Some((image, map)))
}

/// The crate's identity, which enters every symbol's name. Cargo's own holds the full path of a package outside the
/// workspace, and differs between two checkouts; this one does not.
fn identity(args: &[String], package: &[String; 3], roots: &str) -> String {
    let [name, version, manifest_dir] = package;
    let inside = |(i, root): (usize, &str)| {
        let rest = Path::new(manifest_dir).strip_prefix(root).ok().filter(|_| !root.is_empty())?;
        Some(format!("{i}:{}", rest.display()))
    };
    let place = roots.split('\x1f').enumerate().find_map(inside).unwrap_or_else(|| manifest_dir.clone());
    let mut hash = Sha256::new();
    let mut add = |text: &str| {
        hash.update(text.as_bytes());
        hash.update([0]);
    };
    [name.as_str(), version, &place].into_iter().for_each(&mut add);
    let mut at = args.iter();
    while let Some(arg) = at.next() {
        if ["--crate-name", "--crate-type", "--cfg", "--target"].contains(&arg.as_str()) {
            add(arg);
            add(at.next().map_or("", String::as_str));
        } else if arg == "--test" {
            add(arg);
        }
    }
    crate::cargo::compare::flags(args).iter().for_each(|f| add(f));
    hash.finalize().iter().take(8).map(|b| format!("{b:02x}")).collect()
}

/// The arguments with that identity in place of cargo's.
fn with_identity(args: &[OsString], roots: &str) -> Vec<OsString> {
    let package =
        ["CARGO_PKG_NAME", "CARGO_PKG_VERSION", "CARGO_MANIFEST_DIR"].map(|v| std::env::var(v).unwrap_or_default());
    let texts: Vec<String> = args.iter().map(|a| a.to_string_lossy().into_owned()).collect();
    let identity = identity(&texts, &package, roots);
    let replaced = |a: &OsString| match a.to_str() {
        Some(a) if a.starts_with("metadata=") => format!("metadata={identity}").into(),
        Some(a) if a.starts_with("-Cmetadata=") => format!("-Cmetadata={identity}").into(),
        _ => a.clone(),
    };
    args.iter().map(replaced).collect()
}

fn beside(path: &Path, extension: &str) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(".");
    name.push(extension);
    name.into()
}

/// Where the note of an image goes, and its map.
#[must_use]
pub fn note_paths(notes: &Path, build_id: &str) -> (PathBuf, PathBuf) {
    (notes.join(format!("{build_id}.json")), notes.join(format!("{build_id}.map")))
}

/// Whether this process was called by cargo in place of the compiler.
#[must_use]
pub fn is_wrapper() -> bool {
    std::env::var_os(NOTES).is_some() && std::env::args_os().nth(1).is_some_and(|a| a != "livepatch")
}

/// Compiles.
#[must_use]
pub fn main() -> ExitCode {
    let args: Vec<OsString> = std::env::args_os().skip(1).collect();
    match compile(&args) {
        Ok(code) => code,
        Err(e) => {
            eprintln!("cargo-livepatch: {e}");
            ExitCode::FAILURE
        }
    }
}

fn compile(args: &[OsString]) -> Result<ExitCode, String> {
    let call = read(args);
    let (more, linked) = added(&call, &std::env::var(REMAP).unwrap_or_default());
    let mut line: Vec<OsString> = std::env::var_os(CHAINED).filter(|c| !c.is_empty()).into_iter().collect();
    if call.compiles() {
        line.extend(with_identity(args, &std::env::var(ROOTS).unwrap_or_default()));
    } else {
        line.extend(args.iter().cloned());
    }
    line.extend(more);
    let mut command = Command::new(&line[0]);
    command.args(&line[1..]).env_remove("RUSTC_WRAPPER");
    let status = command.status().map_err(|e| format!("{}: {e}", line[0].to_string_lossy()))?;
    if !status.success() {
        return Ok(ExitCode::from(u8::try_from(status.code().unwrap_or(101)).unwrap_or(101)));
    }
    if let (Some((image, map)), Some(notes)) = (linked, std::env::var_os(NOTES)) {
        note(&PathBuf::from(notes), &image, &map, &line).map_err(|e| format!("{}: {e}", image.display()))?;
    }
    Ok(ExitCode::SUCCESS)
}

/// Notes how an image was linked, under its build-id.
fn note(notes: &Path, image: &Path, map: &Path, line: &[OsString]) -> Result<(), String> {
    let Some(id) = build_id(image)? else { return Ok(()) };
    let said = |e: std::io::Error| e.to_string();
    std::fs::create_dir_all(notes).map_err(said)?;
    let (text_at, map_at) = note_paths(notes, &id);
    if map.exists() {
        std::fs::rename(map, map_at).map_err(said)?;
    }
    let note = Note {
        output: image.to_owned(),
        cwd: std::env::current_dir().map_err(said)?,
        command: line.iter().map(|a| a.to_string_lossy().into_owned()).collect(),
    };
    std::fs::write(text_at, serde_json::to_vec(&note).map_err(|e| e.to_string())?).map_err(said)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn call(text: &str) -> Call {
        read(&text.split(' ').map(Into::into).collect::<Vec<_>>())
    }

    #[test]
    fn a_program_is_linked_for_a_diff() {
        let bin = call("rustc --crate-name my_app --edition=2021 src/main.rs --crate-type bin --emit=dep-info,link -C opt-level=3 -C extra-filename=-0f --out-dir /t/deps");
        let (args, linked) = added(&bin, "/a=/b\x1f/c=/d");
        assert_eq!(linked.expect("an image").0, Path::new("/t/deps/my_app-0f"));
        for flag in [
            "-Clink-arg=-Wl,--emit-relocs",
            "-Clink-arg=-Wl,-Map=/t/deps/my_app-0f.link-map",
            "--remap-path-prefix=/c=/d",
        ] {
            assert!(args.iter().any(|a| a == flag), "{flag} in {args:?}");
        }
        let library = call("rustc --crate-name x --crate-type cdylib --emit=dep-info,link --out-dir /t");
        assert_eq!(library.image().expect("an image"), Path::new("/t/libx.so"));
        let plain = call("rustc --crate-name x --crate-type bin --emit=link -Clinker=/usr/bin/ld.lld --out-dir /t");
        assert!(added(&plain, "").0.iter().any(|a| a == "-Clink-arg=--emit-relocs"));
    }

    #[test]
    fn a_crate_is_the_same_in_every_checkout() {
        let args = |text: &str| text.split(' ').map(str::to_owned).collect::<Vec<_>>();
        let line = args("rustc --crate-name price -C opt-level=3 -C metadata=12 --cfg feature=\"a\" --out-dir /x");
        let of = |dir: &str| ["price".to_owned(), "1.0.0".to_owned(), dir.to_owned()];
        let one = identity(&line, &of("/home/a/desk/price"), "/home/a/desk\x1f/home/a/.cargo");
        assert_eq!(one, identity(&line, &of("/ci/7/price"), "/ci/7\x1f/ci/.cargo"));
        let moved = args("rustc --crate-name price -C opt-level=3 -C metadata=99 --cfg feature=\"a\" --out-dir /y");
        assert_eq!(one, identity(&moved, &of("/ci/7/price"), "/ci/7\x1f/ci/.cargo"));
        for (other, dir) in [
            (line.clone(), "/ci/7/price2"),
            (args("rustc --crate-name price -C opt-level=3 --cfg feature=\"b\""), "/ci/7/price"),
        ] {
            assert_ne!(one, identity(&other, &of(dir), "/ci/7\x1f/ci/.cargo"));
        }
    }

    #[test]
    fn what_is_not_shipped_is_linked_as_always() {
        for (what, compiles) in [
            ("rustc --crate-name build_script_build --crate-type bin --emit=dep-info,link --out-dir /t", true),
            ("rustc --crate-name serde_derive --crate-type proc-macro --emit=dep-info,link --out-dir /t", true),
            ("rustc --crate-name log --crate-type lib --emit=dep-info,metadata,link --out-dir /t", true),
            ("rustc --crate-name app --crate-type bin --emit=dep-info,metadata --out-dir /t", true),
            ("rustc - --crate-name ___ --print=file-names --crate-type bin --crate-type rlib", false),
            ("rustc -vV", false),
        ] {
            let call = call(what);
            let (args, linked) = added(&call, "");
            assert!(linked.is_none(), "{what}");
            assert_eq!(args.len(), if compiles { COMPILE.len() } else { 0 }, "{what}");
        }
    }
}
