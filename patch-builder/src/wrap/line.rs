//! One command line of a compiler or linker: what it does, and what is added to it.

use std::path::{Path, PathBuf};

use crate::wrap::Tool;

/// What a command does.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Mode {
    /// It answers a question, preprocesses, or links objects into an object.
    #[default]
    Other,
    /// It makes objects or assembly.
    Compile,
    /// It links a program or a shared object.
    Link,
}

/// What is to be taken out of a linked image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Strip {
    /// Everything: `-s`.
    All,
    /// Debug information: `-S`.
    Debug,
}

/// A command line that was read.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Line {
    /// What it does.
    pub mode: Mode,
    /// Where the result goes.
    pub output: Option<PathBuf>,
    /// Files and libraries that go in.
    pub inputs: Vec<String>,
    /// What it strips while it links.
    pub strip: Option<Strip>,
    /// The map that it asks for.
    pub map: Option<PathBuf>,
    /// It says itself which build-id.
    pub build_id: bool,
    /// It keeps relocations itself.
    pub emit_relocs: bool,
    /// It reads standard input.
    pub stdin: bool,
    /// It compiles something other than assembly.
    compiles_source: bool,
    /// It optimises across files while it links.
    lto: bool,
}

/// Options of compilers whose value is the next argument.
const WITH_VALUE: [&str; 38] = [
    "-o",
    "-x",
    "-I",
    "-D",
    "-U",
    "-include",
    "-imacros",
    "-isystem",
    "-idirafter",
    "-iquote",
    "-iprefix",
    "-iwithprefix",
    "-isysroot",
    "--sysroot",
    "-L",
    "-l",
    "-T",
    "-u",
    "-z",
    "-e",
    "-Xlinker",
    "-Xassembler",
    "-Xpreprocessor",
    "-Xclang",
    "-MF",
    "-MT",
    "-MQ",
    "-arch",
    "-target",
    "--param",
    "-B",
    "-wrapper",
    "-mllvm",
    "-G",
    "-A",
    "-aux-info",
    "-dumpbase",
    "-dumpdir",
];
/// Options of linkers whose value is the next argument.
const LINKER_WITH_VALUE: [&str; 26] = [
    "-o",
    "--output",
    "-e",
    "--entry",
    "-L",
    "-l",
    "-T",
    "--script",
    "-m",
    "-z",
    "-h",
    "-soname",
    "--soname",
    "-rpath",
    "-rpath-link",
    "--rpath",
    "--rpath-link",
    "-dynamic-linker",
    "--dynamic-linker",
    "-plugin",
    "-plugin-opt",
    "-u",
    "-y",
    "-Map",
    "--version-script",
    "--defsym",
];
const SOURCES: [&str; 12] = ["c", "i", "ii", "cc", "cp", "cxx", "cpp", "c++", "C", "S", "m", "mm"];

/// Reads a line; files of arguments are expanded already.
#[must_use]
pub fn read(tool: Tool, args: &[String]) -> Line {
    match tool {
        Tool::Compiler => compiler(args),
        Tool::Linker => linker(args),
    }
}

fn compiler(args: &[String]) -> Line {
    let mut line = Line { mode: Mode::Link, ..Line::default() };
    let (mut language, mut to_linker) = (None, Vec::new());
    let (mut stops, mut asks, mut headers) = (false, false, false);
    let mut at = args.iter();
    while let Some(arg) = at.next() {
        let value = if WITH_VALUE.contains(&arg.as_str()) { at.next() } else { None };
        match (arg.as_str(), value) {
            ("-o", Some(v)) => line.output = Some(v.into()),
            ("-x", Some(v)) => language = Some(v.clone()),
            ("-Xlinker", Some(v)) => to_linker.push(v.clone()),
            ("-l", Some(v)) => line.inputs.push(format!("-l{v}")),
            (_, Some(_)) => {}
            ("-c" | "-S" | "-fsyntax-only" | "--precompile", _) => stops = true,
            ("-E" | "-M" | "-MM" | "-###" | "--version" | "-r" | "-cc1" | "-cc1as" | "--analyze" | "-V", _) => {
                asks = true
            }
            ("-s", _) => line.strip = Some(Strip::All),
            ("-", _) => {
                line.stdin = true;
                line.inputs.push(arg.clone());
            }
            (a, _) if a.starts_with("-Wl,") => to_linker.extend(a[4..].split(',').map(str::to_owned)),
            (a, _) if a.starts_with("-flto") => line.lto = a != "-flto=none",
            (a, _) if ["-dump", "-print", "--print", "--help", "--target-help"].iter().any(|p| a.starts_with(p)) => {
                asks = true
            }
            (a, _) if a.starts_with("-o") && a.len() > 2 => line.output = Some(a[2..].into()),
            (a, _) if a.starts_with("-x") => language = Some(a[2..].to_owned()),
            (a, _) if a.starts_with('-') && !a.starts_with("-l") => {}
            (a, _) => line.inputs.push(a.to_owned()),
        }
    }
    for input in line.inputs.iter().filter(|i| !i.starts_with("-l")) {
        let extension = Path::new(input).extension().and_then(|e| e.to_str()).unwrap_or("");
        headers |= ["h", "hh", "hpp", "hxx", "H", "h++"].contains(&extension);
        line.compiles_source |= SOURCES.contains(&extension) || line.stdin;
    }
    if let Some(language) = language.filter(|l| l != "none") {
        headers |= language.ends_with("-header");
        line.compiles_source |= language != "assembler";
    }
    let script = linker(&to_linker);
    line.strip = line.strip.or(script.strip);
    (line.map, line.build_id, line.emit_relocs) = (script.map, script.build_id, script.emit_relocs);
    let says_other = script.mode == Mode::Other && !to_linker.is_empty();
    line.mode = match () {
        () if asks || line.inputs.is_empty() => Mode::Other,
        () if stops || headers => Mode::Compile,
        () if says_other => Mode::Other,
        () => Mode::Link,
    };
    line
}

fn linker(args: &[String]) -> Line {
    let mut line = Line { mode: Mode::Link, ..Line::default() };
    let mut at = args.iter();
    while let Some(arg) = at.next() {
        let value = if LINKER_WITH_VALUE.contains(&arg.as_str()) { at.next() } else { None };
        match (arg.as_str(), value) {
            ("-o" | "--output", Some(v)) => line.output = Some(v.into()),
            ("-Map", Some(v)) => line.map = Some(v.into()),
            (_, Some(_)) => {}
            ("-r" | "-i" | "--relocatable" | "--version" | "-v" | "-V" | "--help", _) => line.mode = Mode::Other,
            ("-s" | "--strip-all", _) => line.strip = Some(Strip::All),
            ("-S" | "--strip-debug", _) => line.strip = line.strip.or(Some(Strip::Debug)),
            ("-q" | "--emit-relocs", _) => line.emit_relocs = true,
            ("--build-id", _) => line.build_id = true,
            (a, _) if a.starts_with("--build-id=") => line.build_id = a != "--build-id=none",
            (a, _) if a.starts_with("-Map=") || a.starts_with("--Map=") => {
                line.map = a.split_once('=').map(|(_, v)| v.into());
            }
            (a, _) if a.starts_with("--output=") => line.output = Some(a[9..].into()),
            (a, _) if a.starts_with("--oformat") => line.mode = Mode::Other,
            (a, _) if a.starts_with('-') => {}
            (a, _) => line.inputs.push(a.to_owned()),
        }
    }
    line
}

impl Line {
    /// Where a link writes.
    #[must_use]
    pub fn image(&self) -> PathBuf {
        self.output.clone().unwrap_or_else(|| "a.out".into())
    }

    /// Whether it is a question of a build system ("can this compiler …?"), which must not be answered differently.
    #[must_use]
    pub fn is_probe(&self, cwd: &Path) -> bool {
        let name = |p: &Path| p.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let probes = ["conftest", "cmTC_", "build_script_", "sanitycheck", "testfile"];
        let is = |p: &Path| {
            let inner = p
                .components()
                .any(|c| ["CMakeTmp", "CMakeScratch", "meson-private"].iter().any(|m| c.as_os_str() == *m));
            inner || probes.iter().any(|prefix| name(p).starts_with(prefix)) || p.starts_with("/dev")
        };
        let output = self.output.as_deref();
        let inputs = self.inputs.iter().filter(|i| !i.starts_with("-l")).map(Path::new);
        is(cwd)
            || cwd.components().any(|c| c.as_os_str() == "CMakeFiles")
            || output.is_some_and(is)
            || inputs.into_iter().any(is)
    }

    /// What comes before the build's own flags, which may contradict it.
    #[must_use]
    pub fn compile_flags(&self) -> Vec<&'static str> {
        let compiles = self.mode == Mode::Compile || self.mode == Mode::Link;
        if compiles && (self.compiles_source || self.mode == Mode::Link && self.lto) {
            vec!["-g", "-ffunction-sections", "-fdata-sections"]
        } else {
            Vec::new()
        }
    }

    /// What comes after the build's own flags; `map` is where the map shall go if none is asked for.
    #[must_use]
    pub fn link_flags(&self, tool: Tool, map: &Path) -> Vec<String> {
        let mut flags = vec![];
        if !self.emit_relocs {
            flags.push("--emit-relocs".to_owned());
        }
        if !self.build_id {
            flags.push("--build-id".to_owned());
        }
        let map = self.map.is_none().then(|| format!("-Map={}", map.display()));
        match tool {
            Tool::Linker => flags.into_iter().chain(map).collect(),
            // A comma in a path would split it.
            Tool::Compiler => flags
                .into_iter()
                .map(|f| format!("-Wl,{f}"))
                .chain(map.into_iter().flat_map(|m| ["-Xlinker".to_owned(), m]))
                .collect(),
        }
    }
}

/// The arguments without what strips; the same if nothing does.
#[must_use]
pub fn without_strip(tool: Tool, args: &[String]) -> Vec<String> {
    const LINKER: [&str; 4] = ["-s", "-S", "--strip-all", "--strip-debug"];
    let mut out: Vec<String> = Vec::new();
    let mut at = args.iter().peekable();
    let takes = |a: &str| if tool == Tool::Linker { LINKER_WITH_VALUE.contains(&a) } else { WITH_VALUE.contains(&a) };
    while let Some(arg) = at.next() {
        let strips = |a: &str| LINKER.contains(&a);
        if arg == "-Xlinker" && at.peek().is_some_and(|a| strips(a)) {
            at.next();
        } else if tool == Tool::Linker && strips(arg) || tool == Tool::Compiler && arg == "-s" {
        } else if let Some(list) = arg.strip_prefix("-Wl,").filter(|_| tool == Tool::Compiler) {
            let left: Vec<&str> = list.split(',').filter(|a| !strips(a)).collect();
            if !left.is_empty() {
                out.push(format!("-Wl,{}", left.join(",")));
            }
        } else {
            out.push(arg.clone());
            if takes(arg) {
                out.extend(at.next().cloned());
            }
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    fn args(text: &str) -> Vec<String> {
        text.split_whitespace().map(str::to_owned).collect()
    }

    fn gcc(text: &str) -> Line {
        read(Tool::Compiler, &args(text))
    }

    #[test]
    fn what_a_line_does() {
        for (text, mode) in [
            ("-O2 -c -o a.o a.c", Mode::Compile),
            ("-S a.c", Mode::Compile),
            ("-x c++-header all.h -o all.gch", Mode::Compile),
            ("-o prog a.o b.o -lm", Mode::Link),
            ("a.c", Mode::Link),
            ("-shared -o libx.so a.o", Mode::Link),
            ("-E a.c", Mode::Other),
            ("-MM a.c", Mode::Other),
            ("-### a.c", Mode::Other),
            ("--version", Mode::Other),
            ("-v", Mode::Other),
            ("-print-prog-name=ld", Mode::Other),
            ("-r -o all.o a.o b.o", Mode::Other),
            ("-nostdlib -Wl,-r -o all.o a.o", Mode::Other),
            ("-Wl,--version", Mode::Other),
            ("-MD -MF a.d -c a.c", Mode::Compile),
            ("-MMD -o a a.c", Mode::Link),
        ] {
            assert_eq!(gcc(text).mode, mode, "{text}");
        }
        assert_eq!(read(Tool::Linker, &args("-r -o a b.o")).mode, Mode::Other);
        assert_eq!(read(Tool::Linker, &args("-m elf_x86_64 -o a b.o")).mode, Mode::Link);
    }

    #[test]
    fn what_is_added() {
        let map = Path::new("/s/1.map");
        let both = gcc("-O2 -o prog main.c");
        assert_eq!(both.compile_flags(), ["-g", "-ffunction-sections", "-fdata-sections"]);
        assert_eq!(
            both.link_flags(Tool::Compiler, map),
            ["-Wl,--emit-relocs", "-Wl,--build-id", "-Xlinker", "-Map=/s/1.map"]
        );
        assert!(gcc("-o prog main.o").compile_flags().is_empty());
        assert!(!gcc("-flto -o prog main.o").compile_flags().is_empty());
        assert!(gcc("-c start.s").compile_flags().is_empty(), "assembly has its own lines");
        let own = gcc("-o prog a.o -Wl,-q,--build-id=md5,-Map,my.map");
        assert_eq!(own.map.as_deref(), Some(Path::new("my.map")));
        assert!(own.link_flags(Tool::Compiler, map).is_empty());
        assert!(!gcc("-o prog a.o -Wl,--build-id=none").build_id, "ours comes after it");
        assert_eq!(gcc("-o prog -I inc a.o -l m").inputs, ["a.o", "-lm"]);
    }

    #[test]
    fn what_strips_is_done_after_recording() {
        assert_eq!(gcc("-s -o prog a.o").strip, Some(Strip::All));
        assert_eq!(gcc("-Wl,-O1,-S -o prog a.o").strip, Some(Strip::Debug));
        let without = without_strip(Tool::Compiler, &args("-s -o -s -Wl,-O1,--strip-all -Xlinker -S a.o -Wl,-s"));
        assert_eq!(without, args("-o -s -Wl,-O1 a.o"));
        assert_eq!(without_strip(Tool::Linker, &args("-s -o x --strip-debug -m -S a.o")), args("-o x -m -S a.o"));
    }

    #[test]
    fn probes_of_build_systems_are_known() {
        let cwd = Path::new("/src");
        for text in [
            "-o conftest conftest.c -lm",
            "conftest.c",
            "-o cmTC_12 CMakeFiles/cmTC_12.dir/x.o",
            "-o /dev/null a.c",
            "/b/meson-private/tmpx/testfile.c",
        ] {
            assert!(gcc(text).is_probe(cwd), "{text}");
        }
        assert!(gcc("x.c").is_probe(Path::new("/b/CMakeFiles/3.25.1/CompilerIdC")));
        assert!(!gcc("-o prog a.o -lconftest").is_probe(cwd));
        assert!(!gcc("-o prog CMakeFiles/prog.dir/a.o").is_probe(cwd));
    }
}
