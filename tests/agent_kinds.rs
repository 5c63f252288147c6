//! What is patched from inside: many functions at once, code that throws and panics, the executable itself, a patch in another's place.

mod engine_support;
mod support;

use std::fmt::Write as _;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use engine_support::{object, write_patch, Recipe};
use support::inside::{by, Inside};
use support::{build_patch, build_patch_with, example, root, run, scratch};

fn folder(test: &str) -> PathBuf {
    scratch(&format!("agent_kinds/{test}"))
}

/// A library of each version, by a command that the caller completes.
fn libraries(
    test: &str,
    file: &str,
    source: &str,
    compiler: &dyn Fn(&str) -> Command,
    versions: &[&str],
) -> Vec<PathBuf> {
    let of = |version: &&str| {
        let folder = folder(test).join(version);
        std::fs::create_dir_all(&folder).unwrap();
        std::fs::write(folder.join(file), source.replace("@VERSION@", version)).unwrap();
        run(compiler(version).current_dir(&folder)).expect_code(0).unwrap();
        folder.join("work.so")
    };
    versions.iter().map(of).collect()
}

fn gcc(compiler: &str, file: &str, version: &str) -> Command {
    let mut command = Command::new(compiler);
    command.args(["-O2", "-g", "-shared", "-fPIC", "-pthread", "-Wl,--build-id", "-Wl,--emit-relocs"]);
    command.arg(format!("-DVERSION={version}")).args(["-o", "work.so", file]);
    command
}

fn start(test: &str, libraries: &[PathBuf]) -> Inside {
    let fix = folder(test).join("fix.so");
    build_patch(&libraries[0], &libraries[1], &fix).expect_code(0).unwrap();
    Inside::start_with(test, &libraries[0], &fix, Command::new(example("inside")))
}

/// Functions of which each calls another, which must be of the same version, and threads that call them.
fn many(functions: usize) -> String {
    let mut out =
        String::from("#include <pthread.h>\n#include <stdio.h>\n#include <unistd.h>\nstatic long mixed, calls;\n");
    let _ = (0..functions)
        .try_for_each(|i| writeln!(out, "__attribute__((visibility(\"hidden\"), noipa)) int f{i}(int depth);"));
    for i in 0..functions {
        let next = (i * 7 + 1) % functions;
        let _ = writeln!(
            out,
            "int f{i}(int depth) {{ if (depth > 0 && f{next}(depth - 1) != VERSION) __atomic_fetch_add(&mixed, 1, __ATOMIC_SEQ_CST); \
             return VERSION; }}"
        );
    }
    let table: Vec<String> = (0..functions).map(|i| format!("f{i}")).collect();
    let _ = writeln!(
        out,
        r#"static int (*const table[])(int) = {{ {} }};
static void *caller(void *arg)
{{
	for (unsigned long n = (unsigned long)arg;; n = n * 6364136223846793005ul + 1442695040888963407ul) {{
		int first = table[(n >> 33) % {functions}](4);
		if (first != 1 && first != 2)
			__atomic_fetch_add(&mixed, 1, __ATOMIC_SEQ_CST);
		__atomic_fetch_add(&calls, 5, __ATOMIC_RELAXED);
		if (n % 4096 == 5)
			usleep(100);
	}}
	return arg;
}}
void start(void)
{{
	pthread_t t;
	for (long i = 1; i <= 3; i++)
		pthread_create(&t, 0, caller, (void *)i);
}}
const char *ask(const char *question)
{{
	static char out[99];
	snprintf(out, sizeof out, "version %d mixed %ld odd 0 seen %ld", table[*question % 7](3), mixed, calls);
	return out;
}}
"#,
        table.join(", ")
    );
    out
}

#[test]
fn five_hundred_functions_are_never_mixed() {
    let built = libraries("many", "work.c", &many(500), &|v| gcc("gcc", "work.c", v), &["1", "2"]);
    let mut inside = start("many", &built);
    inside.cycles(3);
    let calls = inside.finish();
    println!("{calls} calls, none mixed");
    assert!(calls > 10_000, "{calls}");
}

const THROWS: &str = r#"
#include <pthread.h>
#include <stdexcept>
#include <cstdio>
#include <string>
#define HIDDEN __attribute__((visibility("hidden"), noipa))
static long mixed, calls;
static int fail(bool really) {
	if (really)
		throw std::runtime_error("thrown");
	return 0;
}
struct Guard { int *count; ~Guard() { ++*count; } };
HIDDEN int inner(int depth, int *dropped) {
	Guard guard{dropped};
	if (depth == 0)
		fail(true);
	return inner(depth - 1, dropped) + VERSION;
}
HIDDEN int outer(int depth) {
	int dropped = 0;
	try {
		inner(depth, &dropped);
	} catch (const std::runtime_error &e) {
		return dropped == depth + 1 ? VERSION : 9;
	}
	return 8;
}
static void *caller(void *) {
	for (;;) {
		int got = outer(5);
		if (got != 1 && got != 2)
			__atomic_fetch_add(&mixed, 1, __ATOMIC_SEQ_CST);
		__atomic_fetch_add(&calls, 1, __ATOMIC_RELAXED);
	}
}
extern "C" void start() {
	pthread_t t;
	for (int i = 0; i < 2; i++)
		pthread_create(&t, nullptr, caller, nullptr);
}
extern "C" const char *ask(const char *) {
	static char out[99];
	snprintf(out, sizeof out, "version %d mixed %ld odd 0 seen %ld", outer(3), mixed, calls);
	return out;
}
"#;

#[test]
fn exceptions_cross_patched_frames() {
    let built = libraries("throws", "work.cc", THROWS, &|v| gcc("g++", "work.cc", v), &["1", "2"]);
    let mut inside = start("throws", &built);
    inside.cycles(8);
    assert!(inside.finish() > 100);
}

const PANICS: &str = r#"
use std::ffi::c_char;
use std::sync::atomic::{AtomicI64, Ordering::SeqCst};
static MIXED: AtomicI64 = AtomicI64::new(0);
static CALLS: AtomicI64 = AtomicI64::new(0);
#[inline(never)]
fn inner(depth: u32) -> u32 {
    let text = format!("{depth} of @VERSION@");
    if depth == 0 {
        std::panic::resume_unwind(Box::new(@VERSION@u32));
    }
    inner(depth - 1) + text.len() as u32
}
#[inline(never)]
fn outer(depth: u32) -> i64 {
    let got = std::panic::catch_unwind(|| inner(depth)).unwrap_err();
    let version = *got.downcast_ref::<u32>().unwrap();
    if version != @VERSION@ {
        MIXED.fetch_add(1, SeqCst);
    }
    @VERSION@
}
#[no_mangle]
pub extern "C" fn start() {
    for _ in 0..2 {
        std::thread::spawn(|| loop {
            std::hint::black_box(outer(std::hint::black_box(4)));
            CALLS.fetch_add(1, SeqCst);
        });
    }
}
#[no_mangle]
pub extern "C" fn ask(_question: *const c_char) -> *const c_char {
    let text = format!("version {} mixed {} odd 0 seen {}\0", outer(std::hint::black_box(3)), MIXED.load(SeqCst), CALLS.load(SeqCst));
    text.leak().as_ptr().cast()
}
"#;

#[test]
fn who_panics_all_the_time_in_old_code_is_never_taken_for_clear() {
    let rustc = |_: &str| {
        let mut command = Command::new("rustc");
        command.args([
            "--edition=2021",
            "--crate-type=cdylib",
            "-O",
            "-Csymbol-mangling-version=v0",
            "-Ccodegen-units=1",
        ]);
        command.args(["-Cdebuginfo=2", "-Cstrip=none", "-Clink-arg=-Wl,--emit-relocs", "-Clink-arg=-Wl,--build-id"]);
        command.args(["-o", "work.so", "work.rs"]);
        command
    };
    let built = libraries("panics", "work.rs", PANICS, &rustc, &["1", "2"]);
    let mut inside = start("panics", &built);
    // The loop around it is replaced, too, and its threads never leave it. In the middle of an unwind their frames are hard to follow.
    let ran = inside.apply(&["--timeout", "3s"]);
    ran.expect_code(4).unwrap().expect_says(&["is inside work::start"]).unwrap();
    assert_eq!(inside.figure("version"), 1);
    assert!(inside.finish() > 100);
}

#[test]
fn a_patch_takes_the_place_of_another() {
    let source = std::fs::read_to_string(root().join("tests/switch/work.c")).unwrap();
    let built = libraries("after", "work.c", &source, &|v| gcc("gcc", "work.c", v), &["1", "2", "3"]);
    let mut inside = start("after", &built);
    let third = folder("after").join("third.so");
    let after: [&std::ffi::OsStr; 2] = ["--after".as_ref(), inside.fix.as_ref()];
    build_patch_with(&built[0], &built[2], &third, &after).expect_code(0).unwrap();
    for kind in ["call", "sleeps", "births"] {
        inside.ask(kind);
    }
    for _ in 0..4 {
        for (command, patch, version) in
            [("apply", inside.fix.clone(), 2), ("apply", third.display().to_string(), 3), ("revert", String::new(), 1)]
        {
            let more: Vec<&str> = [patch.as_str(), "--json"].into_iter().filter(|w| !w.is_empty()).collect();
            let ran = inside.run(command, &more);
            let report = ran.expect_code(0).unwrap().json().unwrap();
            assert_eq!(by(&report), "agent", "{report} {}", ran.stderr);
            assert_eq!(inside.figure("version"), version);
        }
    }
    inside.finish();
}

#[test]
fn the_executable_itself() {
    let folder = folder("own");
    std::fs::create_dir_all(&folder).unwrap();
    let old = example("inside");
    let object = object(&folder, "fix.o", "int own_version(int of) { return of * 5 - 3; }\n");
    let recipe =
        Recipe { name: "own", old: &old, object: &object, replace: &["own_version"], may_unwind: false, after: None };
    let fix = write_patch(&recipe, &folder.join("fix.so"));
    let source = std::fs::read_to_string(root().join("tests/switch/work.c")).unwrap();
    let built = libraries("own", "work.c", &source, &|v| gcc("gcc", "work.c", v), &["1"]);
    let mut inside = Inside::start_with("own", Path::new(&built[0]), &fix, Command::new(&old));
    let own = |inside: &mut Inside| {
        writeln!(inside.child.stdin.as_mut().unwrap(), "own").unwrap();
        inside.line()
    };
    assert_eq!(own(&mut inside), "1");
    for _ in 0..10 {
        for version in ["2", "1"] {
            let ran = if version == "2" { inside.apply(&[]) } else { inside.revert(&[]) };
            assert_eq!(by(&ran.expect_code(0).unwrap().json().unwrap()), "agent", "{}", ran.stderr);
            assert_eq!(own(&mut inside), version);
        }
    }
    std::thread::sleep(Duration::from_millis(1));
}
