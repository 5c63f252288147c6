//! Fixtures: one source file with directives for two builds. `tests/fixtures/README.md` lists the directives.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;

use super::{root, run};

/// The language of a fixture, from its file name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Language {
    C,
    Cpp,
    Rust,
}

/// One fixture, parsed.
#[derive(Debug, Default)]
pub struct Fixture {
    pub name: String,
    pub language: Option<Language>,
    pub flags: [Vec<String>; 3],
    pub only_flags: Option<Vec<String>>,
    pub strip: bool,
    /// The compiler, where it is not the usual one of the language.
    pub cc: Option<String>,
    /// The fixture's units are a shared library: `linked` to the program, or `dlopened` by it.
    pub library: Option<String>,
    /// What the change truly is for what lives in the process: `break` or `compatible`.
    pub abi: Option<String>,
    /// The program that packs the split debug information (`.dwo`) into one file beside the image (`.dwp`).
    pub dwp: Option<String>,
    /// Words of warnings that must be given.
    pub warnings: Vec<String>,
    /// Commands for a shell after each link, with `{image}` for the image's path. Their first words must be installed.
    pub then: Vec<String>,
    pub changed: Vec<String>,
    pub new: Vec<String>,
    pub data: Vec<(String, String)>,
    /// `RULE` or `RULE:SYMBOL`, given to `--allow`.
    pub allow: Vec<String>,
    pub refusals: Vec<(String, Option<String>)>,
    pub exit: Option<i32>,
    pub noise: Vec<String>,
    pub apply_exit: Option<(i32, Option<String>)>,
    pub says: [Option<String>; 3],
    /// What the patch from old to newer must be refused for, built after the one from old to new.
    pub newer_refusals: Vec<(String, Option<String>)>,
    /// The text of the object with hooks.
    pub hooks: Option<String>,
    /// The hooks that the patch must export.
    pub expected_hooks: Vec<String>,
    /// Name and text of every unit, old, new and newer.
    pub units: [Vec<(String, String)>; 3],
}

/// Old, new, and what comes after that: the order of everything here.
pub const SIDES: [&str; 3] = ["old", "new", "newer"];

/// Every fixture, in the order of names.
pub fn all() -> Vec<Fixture> {
    let dir = root().join("tests/fixtures");
    let mut paths: Vec<PathBuf> =
        std::fs::read_dir(dir).expect("tests/fixtures").map(|e| e.expect("an entry").path()).collect();
    paths.retain(|p| p.is_file() && language(p).is_some());
    paths.sort();
    paths.iter().map(|p| parse(p)).collect()
}

fn language(path: &Path) -> Option<Language> {
    match path.extension()?.to_str()? {
        "c" => Some(Language::C),
        "cpp" => Some(Language::Cpp),
        "rs" => Some(Language::Rust),
        _ => None,
    }
}

fn parse(path: &Path) -> Fixture {
    let text = std::fs::read_to_string(path).expect("a fixture");
    let name = path.file_stem().and_then(|s| s.to_str()).expect("a name").to_owned();
    let words = |s: &str| s.split_whitespace().map(str::to_owned).collect::<Vec<_>>();
    let first_unit = format!("fixture.{}", path.extension().and_then(|s| s.to_str()).expect("an extension"));
    let mut f = Fixture { name, language: language(path), ..Fixture::default() };
    let (mut into, mut into_hooks) = ([true; 3], false);
    f.units.iter_mut().for_each(|units| units.push((first_unit.clone(), String::new())));
    for line in text.lines() {
        let Some(directive) = line.strip_prefix("//#") else {
            if into_hooks {
                let text = f.hooks.get_or_insert_default();
                *text += line;
                *text += "\n";
                continue;
            }
            for (units, _) in f.units.iter_mut().zip(into).filter(|(_, taken)| *taken) {
                let unit = units.last_mut().expect("the first unit");
                unit.1 += line;
                unit.1 += "\n";
            }
            continue;
        };
        let (key, value) = directive.split_once(':').map_or((directive.trim(), ""), |(k, v)| (k.trim(), v.trim()));
        let pair = || {
            value.split_once(' ').map_or((value.to_owned(), None), |(a, b)| (a.to_owned(), Some(b.trim().to_owned())))
        };
        match key {
            "both" => (into, into_hooks) = ([true; 3], false),
            "old" => (into, into_hooks) = ([true, false, false], false),
            "new" => (into, into_hooks) = ([false, true, false], false),
            "newer" => (into, into_hooks) = ([false, false, true], false),
            "later" => (into, into_hooks) = ([false, true, true], false),
            "hooks" => into_hooks = true,
            "unit" => {
                (into, into_hooks) = ([true; 3], false);
                f.units.iter_mut().for_each(|u| u.push((value.to_owned(), String::new())));
            }
            "flags" => f.flags.iter_mut().for_each(|x| x.extend(words(value))),
            "flags-old" => f.flags[0].extend(words(value)),
            "flags-new" => f.flags[1].extend(words(value)),
            "only-flags" => f.only_flags = Some(words(value)),
            "strip" => f.strip = true,
            "cc" => f.cc = Some(value.to_owned()),
            "library" => f.library = Some(value.to_owned()),
            "abi" => f.abi = Some(value.to_owned()),
            "expect-warning" => f.warnings.push(value.to_owned()),
            "then" => f.then.push(value.to_owned()),
            "dwp" => f.dwp = Some(value.to_owned()),
            "expect-changed" => f.changed.extend(words(value)),
            "expect-new" => f.new.extend(words(value)),
            "expect-data" => f.data.push((pair().0, pair().1.unwrap_or_default())),
            "allow" => f.allow.push(value.to_owned()),
            "expect-refusal" => f.refusals.push(pair()),
            "expect-exit" => f.exit = Some(value.parse().expect("an exit code")),
            "expect-noise" => f.noise.push(value.to_owned()),
            "expect-apply-exit" => f.apply_exit = Some((pair().0.parse().expect("an exit code"), pair().1)),
            "says-old" => f.says[0] = Some(value.to_owned()),
            "says-new" => f.says[1] = Some(value.to_owned()),
            "says-newer" => f.says[2] = Some(value.to_owned()),
            "expect-newer-refusal" => f.newer_refusals.push(pair()),
            "expect-hooks" => f.expected_hooks.extend(words(value)),
            other => panic!("{}: unknown directive {other:?}", f.name),
        }
    }
    f
}

impl Fixture {
    /// Whether something must be refused, or found not to differ, or not be applied.
    pub fn must_not_patch(&self) -> bool {
        !self.refusals.is_empty() || self.exit.is_some() || self.apply_exit.is_some()
    }

    /// The first tool that this machine lacks and this fixture needs.
    pub fn lacks(&self) -> Option<&str> {
        let linkers = self.flags.iter().flatten().chain(self.only_flags.iter().flatten());
        let linkers = linkers.filter_map(|flag| match flag.split_once("-fuse-ld=")?.1 {
            "mold" => Some("mold"),
            "lld" => Some("ld.lld"),
            _ => None,
        });
        let then = self.then.iter().filter_map(|command| command.split(' ').next());
        let tools = [self.cc.as_deref(), self.dwp.as_deref()].into_iter().flatten().chain(then);
        tools.chain(linkers).find(|tool| !is_installed(tool))
    }

    /// What patch-builder compares, given one of the two programs that [`Fixture::build`] returned.
    pub fn image(&self, program: &Path) -> PathBuf {
        if self.library.is_some() {
            program.with_extension("so")
        } else {
            program.to_owned()
        }
    }

    /// What patch-builder must exit with.
    pub fn builder_exit(&self) -> i32 {
        self.exit.unwrap_or(if self.refusals.is_empty() { 0 } else { 3 })
    }

    /// How many versions it has: two, or three.
    pub fn versions(&self) -> usize {
        if self.says[2].is_some() || !self.newer_refusals.is_empty() {
            3
        } else {
            2
        }
    }

    /// Where its builds go.
    pub fn dir(&self) -> PathBuf {
        root().join("target/fixtures").join(&self.name)
    }

    /// Builds both sides into its folder, see [`Fixture::build_in`].
    pub fn build(&self) -> Result<[PathBuf; 2], String> {
        self.build_in(&self.dir())
    }

    /// Builds both sides from the same path under `dir`; returns the two programs. Nothing is done if the same was built there before.
    pub fn build_in(&self, dir: &Path) -> Result<[PathBuf; 2], String> {
        let work = dir.join("src");
        let out: Vec<PathBuf> = SIDES[..self.versions()].iter().map(|side| dir.join(side)).collect();
        let pair = [out[0].clone(), out[1].clone()];
        let stamp = format!("{} {} {self:?}", toolchain(), self.tools());
        let stamp = common_text().iter().fold(stamp, |s, (_, t)| s + t);
        let stamped = dir.join("stamp");
        if out.iter().all(|p| p.is_file()) && std::fs::read_to_string(&stamped).is_ok_and(|s| s == stamp) {
            return Ok(pair);
        }
        let io = |e: std::io::Error| format!("{}: {e}", dir.display());
        for (side, program) in out.iter().enumerate() {
            let _ = std::fs::remove_dir_all(&work);
            std::fs::create_dir_all(&work).map_err(io)?;
            for (name, text) in common_text().iter().chain(&self.units[side]) {
                let path = work.join(name);
                std::fs::create_dir_all(path.parent().expect("a folder")).map_err(io)?;
                std::fs::write(path, text).map_err(io)?;
            }
            let image = self.image(program);
            run(self.compiler(side, &image).current_dir(&work)).expect_code(0)?;
            if let Some(dwp) = &self.dwp {
                pack(dwp, &image)?;
            }
            for command in &self.then {
                let command = command.replace("{image}", &image.display().to_string());
                run(Command::new("sh").args(["-ec", &command])).expect_code(0)?;
            }
            if let Some(how) = &self.library {
                run(host(how, &image, program).current_dir(&work)).expect_code(0)?;
            }
            if self.strip {
                run(Command::new("strip").arg(&image)).expect_code(0)?;
            }
        }
        if let Some(hooks) = &self.hooks {
            std::fs::write(dir.join("hooks.c"), hooks).map_err(io)?;
            let mut command = Command::new("gcc");
            command.args(["-c", "-g", "-O2", "-fPIC", "hooks.c", "-o", "hooks.o"]);
            run(command.current_dir(dir)).expect_code(0)?;
        }
        std::fs::write(stamped, stamp).map_err(io)?;
        Ok(pair)
    }

    /// The versions of the tools that not every fixture uses.
    fn tools(&self) -> String {
        let uses = |word: &str| self.flags.iter().flatten().any(|flag| flag.ends_with(word));
        let linkers = [("mold", uses("-fuse-ld=mold")), ("ld.lld", uses("-fuse-ld=lld"))];
        let tools =
            self.cc.as_deref().into_iter().chain(linkers.iter().filter(|(_, used)| *used).map(|(tool, _)| *tool));
        tools.map(version).collect()
    }

    fn compiler(&self, side: usize, out: &Path) -> Command {
        let language = self.language.expect("a language");
        let (program, defaults): (_, &[&str]) = match language {
            Language::C => ("gcc", &["-g", "-O2", "-Wl,--emit-relocs", "-Wl,--build-id"]),
            Language::Cpp => ("g++", &["-std=c++17", "-g", "-O2", "-Wl,--emit-relocs", "-Wl,--build-id"]),
            Language::Rust => (
                "rustc",
                &["-g", "-O", "-Csymbol-mangling-version=v0", "-Ccodegen-units=1", "-Clink-arg=-Wl,--emit-relocs"],
            ),
        };
        let mut command = Command::new(self.cc.as_deref().unwrap_or(program));
        match &self.only_flags {
            Some(flags) => command.args(flags),
            None => command.args(defaults),
        };
        match language {
            Language::Rust => {
                command.args(["--edition", "2021", "--crate-name", "fixture", "fixture.rs"]);
            }
            _ => {
                let sources = self.units[side].iter().map(|(name, _)| name).filter(|name| !name.ends_with(".h"));
                command.args(["-pthread", "-I."]).args(sources);
                match &self.library {
                    Some(_) => command.args(["-shared", "-fPIC"]),
                    None => command.arg("main.c"),
                };
            }
        }
        for flag in &self.flags[side] {
            match flag.as_str() {
                "{lld}" => command.arg("-fuse-ld=lld").arg(format!("-B{}", lld_dir())),
                flag => command.arg(flag.replace("{map}", &format!("-Wl,-Map={}.map", out.display()))),
            };
        }
        command.arg("-o").arg(out);
        command
    }
}

/// The program of a fixture that is a library: the common loop, which links the library or loads it.
fn host(how: &str, library: &Path, out: &Path) -> Command {
    let mut command = Command::new("gcc");
    command.args(["-g", "-O2", "-pthread", "-rdynamic", "-Wl,--build-id", "main.c", "-o"]).arg(out);
    match how {
        "linked" => command.arg("-DLINKED").arg(library),
        "dlopened" => command.arg(format!("-DLOADED=\"{}\"", library.display())).arg("-ldl"),
        other => panic!("a library is linked or dlopened, not {other:?}"),
    };
    command
}

/// Packs the `.dwo` files of an image into one `.dwp`, and removes them.
fn pack(tool: &str, image: &Path) -> Result<(), String> {
    let out = format!("{}.dwp", image.display());
    run(Command::new(tool).arg("-e").arg(image).arg("-o").arg(out)).expect_code(0)?;
    let io = |e: std::io::Error| format!("{}: {e}", image.display());
    for entry in std::fs::read_dir(image.parent().expect("a folder")).map_err(io)? {
        let path = entry.map_err(io)?.path();
        if path.extension().is_some_and(|e| e == "dwo") {
            std::fs::remove_file(path).map_err(io)?;
        }
    }
    Ok(())
}

fn is_installed(tool: &str) -> bool {
    let dirs = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&dirs).any(|dir| dir.join(tool).is_file())
}

fn common() -> PathBuf {
    root().join("tests/fixtures/common")
}

fn common_text() -> &'static [(String, String)] {
    static TEXT: OnceLock<Vec<(String, String)>> = OnceLock::new();
    TEXT.get_or_init(|| {
        ["common.h", "main.c", "common.rs"]
            .map(|name| (name.to_owned(), std::fs::read_to_string(common().join(name)).expect("tests/fixtures/common")))
            .to_vec()
    })
}

/// The lld that comes with Rust, as gcc takes it.
fn lld_dir() -> String {
    let sysroot = run(Command::new("rustc").args(["--print", "sysroot"])).stdout;
    format!("{}/lib/rustlib/x86_64-unknown-linux-gnu/bin/gcc-ld", sysroot.trim())
}

fn toolchain() -> &'static str {
    static VERSION: OnceLock<String> = OnceLock::new();
    VERSION.get_or_init(|| ["gcc", "g++", "rustc", "ld"].map(version).join(", "))
}

/// The first line of what a tool says of its version.
fn version(tool: &str) -> String {
    run(Command::new(tool).arg("--version")).stdout.lines().next().unwrap_or("?").to_owned()
}
