//! The compiler as the build sees it.

use std::ffi::OsString;
use std::io::Write as _;
use std::os::unix::process::{CommandExt as _, ExitStatusExt as _};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, ExitStatus, Stdio};

use crate::store::{Parts, Record, Store};
use crate::wrap::line::{self, Line, Mode, Strip};
use crate::wrap::{response, tool, Seen, Tool, SESSION, STORE, TOOLS};

/// The name that this process was called by, if it is that of a compiler.
#[must_use]
pub fn called_as() -> Option<String> {
    let arg = std::env::args_os().next()?;
    let name = Path::new(&arg).file_name()?.to_str()?.to_owned();
    tool(&name).map(|_| name)
}

/// The real program of that name: the first in `PATH` that is not this one.
pub(super) fn find(name: &str, tools: &Path) -> Option<PathBuf> {
    let own = std::env::current_exe().ok()?;
    let real = |p: &PathBuf| std::fs::canonicalize(p).is_ok_and(|c| c != own && p.is_file());
    super::path_folders().into_iter().filter(|f| f != tools).map(|f| f.join(name)).find(real)
}

/// Stands in for the compiler.
#[must_use]
pub fn main(name: &str) -> ExitCode {
    let tools = std::env::var_os(TOOLS).map_or_else(PathBuf::new, PathBuf::from);
    let Some(real) = find(name, &tools) else {
        eprintln!("{name}: command not found");
        return ExitCode::from(127);
    };
    let args: Vec<OsString> = std::env::args_os().skip(1).collect();
    let call = Call { name, tools, real };
    let texts: Option<Vec<String>> = args.iter().map(|a| a.to_str().map(str::to_owned)).collect();
    let (Some(store), Some(texts)) = (std::env::var_os(STORE), texts) else { return call.exec(&args) };
    let kind = tool(name).unwrap_or(Tool::Compiler);
    let line = line::read(kind, &response::expand(&texts));
    let cwd = std::env::current_dir().unwrap_or_default();
    if line.mode == Mode::Other || line.is_probe(&cwd) {
        return call.exec(&args);
    }
    let mut with: Vec<OsString> = line.compile_flags().into_iter().map(Into::into).collect();
    with.extend(args.iter().cloned());
    if line.mode == Mode::Compile {
        return call.exec(&with);
    }
    let store = PathBuf::from(store);
    Link { call, kind, line, args: texts, store, cwd }.run()
}

/// The program to run.
struct Call<'a> {
    name: &'a str,
    tools: PathBuf,
    real: PathBuf,
}

impl Call<'_> {
    /// The real program, which must not meet the links again (ccache looks for compilers in `PATH`, too).
    fn command(&self) -> Command {
        let mut command = Command::new(&self.real);
        let by_path = std::env::args_os().next().is_some_and(|a| a.to_string_lossy().contains('/'));
        command.arg0(if by_path { self.real.as_os_str().to_owned() } else { self.name.into() });
        if let Ok(path) = std::env::join_paths(super::path_folders().into_iter().filter(|f| *f != self.tools)) {
            command.env("PATH", path);
        }
        command
    }

    /// Becomes the real program.
    fn exec(&self, args: &[OsString]) -> ExitCode {
        let error = self.command().args(args).exec();
        eprintln!("{}: {error}", self.real.display());
        ExitCode::from(126)
    }
}

/// A link that is to be recorded.
struct Link<'a> {
    call: Call<'a>,
    kind: Tool,
    line: Line,
    args: Vec<String>,
    store: PathBuf,
    cwd: PathBuf,
}

impl Link<'_> {
    fn temporary(&self, what: &str) -> PathBuf {
        self.store.join(format!(".{}.{what}", std::process::id()))
    }

    /// Links with what a diff needs; where that fails, exactly as asked.
    fn run(&self) -> ExitCode {
        let plain: Vec<OsString> = self.args.iter().map(Into::into).collect();
        let (map, list) = (self.temporary("map"), self.temporary("args"));
        let mut with: Vec<String> = self.line.compile_flags().into_iter().map(str::to_owned).collect();
        if self.line.strip.is_some() {
            let all = line::without_strip(self.kind, &response::expand(&self.args));
            if std::fs::write(&list, response::text(&all)).is_err() {
                return self.call.exec(&plain);
            }
            with.push(format!("@{}", list.display()));
        } else {
            with.extend(self.args.iter().cloned());
        }
        with.extend(self.line.link_flags(self.kind, &map));
        let mut command = self.call.command();
        command.args(&with);
        let outcome = if self.line.stdin {
            // It can be read only once: what it says goes out as it comes.
            command.status().map(|status| (status, Vec::new(), Vec::new()))
        } else {
            command.stdin(Stdio::null()).output().map(|o| (o.status, o.stdout, o.stderr))
        };
        let _ = std::fs::remove_file(&list);
        let (status, out, err) = match outcome {
            Ok(outcome) => outcome,
            Err(_) => return self.call.exec(&plain),
        };
        if !status.success() && !self.line.stdin && status.signal().is_none() {
            let _ = std::fs::remove_file(&map);
            return self.fall_back(&plain);
        }
        let _ = std::io::stdout().write_all(&out);
        let _ = std::io::stderr().write_all(&err);
        if status.success() {
            self.record(&with, &map);
            if let Some(code) = self.strip() {
                return code;
            }
        }
        let _ = std::fs::remove_file(&map);
        code_of(status)
    }

    /// Links as asked: either the build is broken, and says so now, or it cannot bear what was added.
    fn fall_back(&self, plain: &[OsString]) -> ExitCode {
        match self.call.command().args(plain).status() {
            Ok(status) => {
                if status.success() {
                    self.note(&Seen::Missed {
                        output: self.line.image(),
                        why: "it does not link with --emit-relocs, --build-id and -Map; it was linked without".into(),
                    });
                }
                code_of(status)
            }
            Err(_) => self.call.exec(plain),
        }
    }

    fn record(&self, with: &[String], map: &Path) {
        let image = self.cwd.join(self.line.image());
        let own_map = self.line.map.as_ref().map(|m| self.cwd.join(m));
        let map = own_map.as_deref().unwrap_or(map);
        let record = Record {
            output: image.clone(),
            cwd: self.cwd.clone(),
            command: std::iter::once(self.call.real.display().to_string()).chain(with.iter().cloned()).collect(),
            compiler: self.version(),
            inputs: self.line.inputs.clone(),
            ..Record::default()
        };
        let parts = Parts { map: Some(map).filter(|m| m.is_file()), ..Parts::of(&image) };
        self.note(&match Store::at(&self.store).put(record, &parts) {
            Ok((entry, new)) => Seen::Recorded { build_id: entry.record.build_id, output: image, new },
            Err(e) => Seen::Missed { output: image, why: e.to_string() },
        });
    }

    /// What the compiler says of itself.
    fn version(&self) -> String {
        let out = self.call.command().arg("--version").stderr(Stdio::null()).output();
        let text = out.map_or_else(|_| String::new(), |o| String::from_utf8_lossy(&o.stdout).into_owned());
        text.lines().next().unwrap_or_default().to_owned()
    }

    /// Strips, where the link should have.
    fn strip(&self) -> Option<ExitCode> {
        let flag = match self.line.strip? {
            Strip::All => "-s",
            Strip::Debug => "-S",
        };
        let status = Command::new("strip").arg(flag).arg(self.line.image()).status();
        (!status.is_ok_and(|s| s.success())).then(|| {
            eprintln!("{}: {} cannot be stripped", self.call.name, self.line.image().display());
            ExitCode::FAILURE
        })
    }

    /// One line at the end of the list; short enough to be written whole.
    fn note(&self, seen: &Seen) {
        let Some(path) = std::env::var_os(SESSION) else { return };
        let Ok(mut text) = serde_json::to_string(seen) else { return };
        text.push('\n');
        if let Ok(mut file) = std::fs::OpenOptions::new().append(true).open(path) {
            let _ = file.write_all(text.as_bytes());
        }
    }
}

/// As a shell would say it.
fn code_of(status: ExitStatus) -> ExitCode {
    let code = status.code().or_else(|| status.signal().map(|s| 128 + s)).unwrap_or(1);
    ExitCode::from(u8::try_from(code).unwrap_or(1))
}
