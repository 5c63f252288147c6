//! Patches that take each other's place, one after the other: V1→V2, V1→V3 after it, V1→V4 after that. What each brought stays alive:
//! its statics keep their values, functions whose address it handed out lead to the newest.

mod support;

use std::path::{Path, PathBuf};
use std::process::Command;

use support::program::Program;
use support::{build_patch_with, livepatch, run, scratch, Ran};

type Outcome = Result<(), String>;

/// From the second version on a counter, and a callback that is registered once; from the third on another counter.
const SOURCE: &str = r#"
#include <stdio.h>
#include <unistd.h>
static volatile long thousand = 1000;
static long calls;
long (*callback)(long);
#if V >= 2
static long twos;
__attribute__((noipa)) static long bonus(long x) { return x * thousand / 1000 + V; }
#endif
#if V >= 3
static long threes;
#endif
__attribute__((noipa)) void answer(void)
{
    char line[128];
    int n = snprintf(line, sizeof line, "%ld v%d", ++calls, V);
#if V >= 2
    if (!callback)
        callback = bonus;
    n += snprintf(line + n, sizeof line - n, " twos %ld held %ld same %d", ++twos, callback(thousand), callback == bonus);
#else
    if (callback)
        n += snprintf(line + n, sizeof line - n, " held %ld", callback(thousand));
#endif
#if V >= 3
    n += snprintf(line + n, sizeof line - n, " threes %ld", ++threes);
#endif
    n += snprintf(line + n, sizeof line - n, "\n");
    if (write(1, line, (size_t)n) != n)
        _exit(1);
}
int main(void)
{
    char c;
    while (read(0, &c, 1) == 1)
        if (c == '\n')
            answer();
    return 0;
}
"#;

fn build(dir: &Path, version: u32) -> Result<PathBuf, String> {
    std::fs::write(dir.join("chain.c"), SOURCE).map_err(|e| e.to_string())?;
    let out = dir.join(format!("v{version}"));
    let flags = ["-g", "-O2", "-Wl,--emit-relocs", "-Wl,--build-id", "chain.c", "-o"];
    let mut command = Command::new("gcc");
    run(command.args(flags).arg(&out).arg(format!("-DV={version}")).current_dir(dir)).expect_code(0)?;
    Ok(out)
}

struct Chain {
    dir: PathBuf,
    program: Program,
}

impl Chain {
    fn start(name: &str) -> Result<Self, String> {
        let dir = scratch("chain").join(name);
        std::fs::create_dir_all(&dir).map_err(|e| e.to_string())?;
        for version in 1..=4 {
            build(&dir, version)?;
        }
        let program = Program::start(&dir.join("v1"));
        Ok(Self { dir, program })
    }

    /// From the first version to this one, in the place of that patch.
    fn patch(&self, version: u32, after: Option<&Path>) -> Result<PathBuf, String> {
        let fix = self.dir.join(format!("fix{version}.so"));
        let after: Vec<&std::ffi::OsStr> =
            after.into_iter().flat_map(|p| ["--after".as_ref(), p.as_os_str()]).collect();
        build_patch_with(&self.dir.join("v1"), &self.dir.join(format!("v{version}")), &fix, &after).expect_code(0)?;
        Ok(fix)
    }

    fn run(&self, command: &str, fix: Option<&Path>) -> Ran {
        let (pid, fix) = (self.program.pid().to_string(), fix.map(|f| f.display().to_string()));
        let args: Vec<&str> = [command, &pid].into_iter().chain(fix.as_deref()).collect();
        livepatch(&args)
    }
}

#[test]
fn what_each_brought_stays_alive() -> Outcome {
    let mut c = Chain::start("alive")?;
    let second = c.patch(2, None)?;
    let third = c.patch(3, Some(&second))?;
    let fourth = c.patch(4, Some(&third))?;
    c.program.ask("v1")?;
    c.run("apply", Some(&fourth)).expect_code(3)?.expect_says(&["fix3"])?;
    c.run("apply", Some(&second)).expect_code(0)?;
    c.program.ask("v2 twos 1 held 1002 same 1")?;
    c.run("apply", Some(&third)).expect_code(0)?;
    c.program.ask("v3 twos 2 held 1003 same 1 threes 1")?;
    c.run("apply", Some(&fourth)).expect_code(0)?;
    c.program.ask("v4 twos 3 held 1004 same 1 threes 2")?;
    c.program.ask("v4 twos 4 held 1004 same 1 threes 3")?;
    // All the way back, and forth again: the values are where they were.
    c.run("revert", None).expect_code(0)?;
    c.program.ask("v1 held 1002")?;
    c.run("apply", Some(&second)).expect_code(0)?;
    c.program.ask("v2 twos 5 held 1002 same 1")?;
    c.run("apply", Some(&third)).expect_code(0)?;
    c.program.ask("v3 twos 6 held 1003 same 1 threes 4")?;
    c.program.finish()
}

#[test]
fn the_library_does_what_the_commands_do() -> Outcome {
    let mut c = Chain::start("library")?;
    let second = c.patch(2, None)?;
    let guarded = support::example("guarded");
    let (pid, fix) = (c.program.pid().to_string(), second.display().to_string());
    c.program.ask("v1")?;
    run(Command::new(&guarded).args([&pid, &fix, "false"]))
        .expect_code(5)?
        .expect_prints(&["applied fix2", "reverted fix2"])?;
    c.program.ask("v1")?;
    run(Command::new(&guarded).args([&pid, &fix, "true"])).expect_code(0)?.expect_prints(&["applied fix2"])?;
    c.program.ask("v2 twos 1 held 1002 same 1")?;
    c.program.finish()
}

/// A counter that every version changes the use of, one that the first patch brings, and one in a function; in C, C++ and Rust.
const COUNTERS: [(&str, &str); 3] = [
    (
        "c",
        r#"
#include <stdio.h>
#include <unistd.h>
static long calls;
__attribute__((noipa)) long count(long *inner)
{
    static long within;
    *inner = ++within;
    return ++calls;
}
__attribute__((noipa)) long version(void) { return V; }
#if V > 1
static long brought;
__attribute__((noipa)) void answer(void)
{
    long inner, n = count(&inner);
    dprintf(1, "%ld v%ld within %ld brought %ld\n", n, version(), inner, ++brought);
}
#else
__attribute__((noipa)) void answer(void)
{
    long inner, n = count(&inner);
    dprintf(1, "%ld v%ld within %ld brought 0\n", n, version(), inner);
}
#endif
int main(void) { char c; while (read(0, &c, 1) == 1) if (c == '\n') answer(); return 0; }
"#,
    ),
    (
        "cpp",
        r#"
#include <cstdio>
#include <unistd.h>
namespace book { static long calls; }
struct within { long n = 0; __attribute__((noipa)) within() { dprintf(2, "%s", ""); } };
__attribute__((noipa)) long count(long &inner)
{
    static within w;
    inner = ++w.n;
    return ++book::calls;
}
__attribute__((noipa)) long version() { return V; }
#if V > 1
static long brought;
__attribute__((noipa)) void answer()
{
    long inner, n = count(inner);
    dprintf(1, "%ld v%ld within %ld brought %ld\n", n, version(), inner, ++brought);
}
#else
__attribute__((noipa)) void answer()
{
    long inner, n = count(inner);
    dprintf(1, "%ld v%ld within %ld brought 0\n", n, version(), inner);
}
#endif
int main() { char c; while (read(0, &c, 1) == 1) if (c == '\n') answer(); }
"#,
    ),
    (
        "rs",
        r#"
use std::sync::atomic::{AtomicU64, Ordering::SeqCst};
static CALLS: AtomicU64 = AtomicU64::new(0);
#[inline(never)]
fn count(inner: &mut u64) -> u64 {
    static WITHIN: AtomicU64 = AtomicU64::new(0);
    *inner = WITHIN.fetch_add(1, SeqCst) + 1;
    CALLS.fetch_add(1, SeqCst) + 1
}
#[inline(never)]
fn version() -> u64 { std::hint::black_box(VERSION) }
#[cfg(not(first))]
static BROUGHT: AtomicU64 = AtomicU64::new(0);
#[cfg(not(first))]
#[inline(never)]
fn answer() -> [u64; 4] {
    let mut inner = 0;
    let n = std::hint::black_box(count as fn(&mut u64) -> u64)(&mut inner);
    let version = std::hint::black_box(version as fn() -> u64);
    [n, version(), inner, BROUGHT.fetch_add(1, SeqCst) + 1]
}
#[cfg(first)]
#[inline(never)]
fn answer() -> [u64; 4] {
    let mut inner = 0;
    let n = std::hint::black_box(count as fn(&mut u64) -> u64)(&mut inner);
    let version = std::hint::black_box(version as fn() -> u64);
    [n, version(), inner, 0]
}
fn main() {
    let answer = std::hint::black_box(answer as fn() -> [u64; 4]);
    for _ in std::io::stdin().lines() {
        let [n, version, inner, brought] = answer();
        println!("{n} v{version} within {inner} brought {brought}");
    }
}
"#,
    ),
];

/// The eleven builds of one of [`COUNTERS`].
fn eleven(dir: &Path, language: &str, source: &str) -> Result<Vec<PathBuf>, String> {
    std::fs::create_dir_all(dir).map_err(|e| e.to_string())?;
    let built = (1..=11).map(|version| {
        let out = dir.join(format!("v{version}"));
        let file = dir.join(format!("counter.{language}"));
        let text = source.replace("VERSION", &version.to_string());
        std::fs::write(&file, text).map_err(|e| e.to_string())?;
        let mut command = Command::new(match language {
            "c" => "gcc",
            "cpp" => "g++",
            _ => "rustc",
        });
        if language == "rs" {
            command.args(["--edition=2021", "-g", "-O", "-Csymbol-mangling-version=v0", "-Ccodegen-units=1"]);
            command.arg(format!("-Clink-arg=-Wl,--emit-relocs,--build-id,-Map={}.map", out.display()));
            if version == 1 {
                command.arg("--cfg=first");
            }
        } else {
            command.args(["-g", "-O2", "-Wl,--emit-relocs", "-Wl,--build-id"]).arg(format!("-DV={version}"));
        }
        run(command.arg(&file).arg("-o").arg(&out).current_dir(dir)).expect_code(0)?;
        Ok(out)
    });
    built.collect()
}

#[test]
fn counters_keep_their_values_through_ten_patches() -> Outcome {
    for (language, source) in COUNTERS {
        let dir = scratch("chain").join(format!("ten-{language}"));
        let builds = eleven(&dir, language, source)?;
        let pid = |program: &Program| program.pid().to_string();
        // Each in the place of the one before: what the first brought goes on, too.
        let mut program = Program::start(&builds[0]);
        let (mut calls, mut before) = (1, None::<PathBuf>);
        program.ask(&format!("v1 within {calls} brought 0"))?;
        for (new, version) in builds.iter().zip(1..).skip(1) {
            let fix = dir.join(format!("after{version}.so"));
            let more: Vec<&std::ffi::OsStr> = match &before {
                Some(before) => vec!["--after".as_ref(), before.as_os_str()],
                None => Vec::new(),
            };
            build_patch_with(&builds[0], new, &fix, &more).expect_code(0)?;
            livepatch(&["apply", &pid(&program), &fix.to_string_lossy()]).expect_code(0)?;
            for _ in 0..2 {
                calls += 1;
                program.ask(&format!("v{version} within {calls} brought {}", calls - 1))?;
            }
            before = Some(fix);
        }
        livepatch(&["revert", &pid(&program)]).expect_code(0)?;
        program.ask(&format!("v1 within {} brought 0", calls + 1))?;
        program.finish()?;
        // Each after the one before was reverted: what a patch brings is its own.
        let mut program = Program::start(&builds[0]);
        let mut calls = 0;
        for (new, version) in builds.iter().zip(1..).skip(1) {
            let fix = dir.join(format!("alone{version}.so"));
            build_patch_with(&builds[0], new, &fix, &[]).expect_code(0)?;
            livepatch(&["apply", &pid(&program), &fix.to_string_lossy()]).expect_code(0)?;
            program.ask(&format!("v{version} within {} brought 1", calls + 1))?;
            livepatch(&["revert", &pid(&program)]).expect_code(0)?;
            program.ask(&format!("v1 within {} brought 0", calls + 2))?;
            calls += 2;
        }
        program.finish()?;
    }
    Ok(())
}
