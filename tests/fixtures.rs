//! Every fixture of `tests/fixtures`: built twice by the real toolchain, diffed, and, where a patch may come of it, applied to the running
//! old program and reverted. One can be chosen by name: `FIXTURE=c-constant cargo test --test fixtures`.

mod support;

use std::ffi::OsStr;
use std::path::Path;
use std::process::Command;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::Mutex;

use serde_json::Value;
use support::fixture::{all, Fixture, Language};
use support::program::Program;
use support::{build_patch_with, livepatch, tool};

#[test]
fn there_are_enough_of_each_kind() {
    let all = all();
    let refused = all.iter().filter(|f| f.must_not_patch()).count();
    assert!(all.len() >= 44, "{} fixtures", all.len());
    assert!(refused * 3 >= all.len(), "{refused} of {} must not be patched: at least a third should be", all.len());
    for f in &all {
        let told = !f.changed.is_empty() || !f.new.is_empty() || f.must_not_patch();
        assert!(told, "{}: expects nothing", f.name);
        match f.abi.as_deref() {
            Some("break") => assert!(!f.refusals.is_empty(), "{}: breaks the contract, and is not refused", f.name),
            Some("compatible") => assert!(f.refusals.is_empty(), "{}: is compatible, and refused", f.name),
            other => assert!(other.is_none(), "{}: no such truth: {other:?}", f.name),
        }
        let live = f.builder_exit() == 0;
        assert!(!live || f.says[0].is_some(), "{}: has no says-old", f.name);
        assert!(!live || f.apply_exit.is_some() || f.says[1].is_some(), "{}: has no says-new", f.name);
    }
}

#[test]
fn c() {
    check_all(|f| f.language == Some(Language::C) && !f.must_not_patch());
}

#[test]
fn c_must_not_patch() {
    check_all(|f| f.language == Some(Language::C) && f.must_not_patch());
}

#[test]
fn cpp() {
    check_all(|f| f.language == Some(Language::Cpp));
}

#[test]
fn rust() {
    check_all(|f| f.language == Some(Language::Rust) && !f.must_not_patch());
}

#[test]
fn rust_must_not_patch() {
    check_all(|f| f.language == Some(Language::Rust) && f.must_not_patch());
}

/// Checks those that `which` chooses, two at a time, and reports all that fail.
fn check_all(which: impl Fn(&Fixture) -> bool) {
    let only = std::env::var("FIXTURE").unwrap_or_default();
    let chosen: Vec<Fixture> = all()
        .into_iter()
        .filter(|f| which(f) && (only.is_empty() || only.split(',').any(|name| name == f.name)))
        .collect();
    let (lacking, chosen): (Vec<Fixture>, Vec<Fixture>) = chosen.into_iter().partition(|f| f.lacks().is_some());
    for f in &lacking {
        // Past the test harness, which keeps to itself what passing tests print.
        let line = format!("SKIPPED fixture {}: {} is not installed\n", f.name, f.lacks().unwrap_or("?"));
        std::io::Write::write_all(&mut std::io::stderr(), line.as_bytes()).expect("stderr");
    }
    let (next, failures) = (AtomicUsize::new(0), Mutex::new(Vec::new()));
    std::thread::scope(|s| {
        for _ in 0..2 {
            s.spawn(|| {
                while let Some(f) = chosen.get(next.fetch_add(1, Ordering::Relaxed)) {
                    if let Err(why) = check(f) {
                        failures.lock().expect("no check panics").push(format!("{}: {why}", f.name));
                    }
                }
            });
        }
    });
    let mut failures = failures.into_inner().expect("no check panics");
    failures.sort();
    println!("{} fixtures, {} failed", chosen.len(), failures.len());
    assert!(failures.is_empty(), "{} of {} fixtures failed\n\n{}", failures.len(), chosen.len(), failures.join("\n\n"));
}

fn check(f: &Fixture) -> Result<(), String> {
    let [old, new] = f.build()?;
    for (says, program) in f.says.iter().zip([&old, &new]) {
        if let Some(says) = says {
            speaks_for_itself(program, says)
                .map_err(|e| format!("the fixture is wrong, unpatched {}: {e}", program.display()))?;
        }
    }
    let fix = f.dir().join("fix.so");
    let _ = std::fs::remove_file(&fix);
    let hooks = f.dir().join("hooks.o");
    let mut more: Vec<&OsStr> = f.hooks.iter().flat_map(|_| ["--hooks".as_ref(), hooks.as_os_str()]).collect();
    more.extend(allowed(f));
    let built = build_patch_with(&f.image(&old), &f.image(&new), &fix, &more);
    built.expect_no_crash()?.expect_code(f.builder_exit())?;
    if fix.is_file() != (f.builder_exit() == 0) {
        return Err(format!(
            "exit {}, and {} the patch file",
            built.code,
            if fix.is_file() { "still wrote" } else { "did not write" }
        ));
    }
    let report = built.json()?;
    check_refusals(&f.refusals, &report, &built.stderr)?;
    check_noise(f, &report)?;
    for words in &f.warnings {
        let said = list(&report, "warnings").iter().any(|w| w.as_str().is_some_and(|w| w.contains(words.as_str())));
        said.then_some(()).ok_or_else(|| format!("no warning says {words:?}: {}", report["warnings"]))?;
    }
    if f.builder_exit() == 0 {
        check_functions(f, &report)?;
        check_data(f, &report)?;
        check_hooks(f, &fix)?;
        check_live(f, &old, &fix)?;
        if f.versions() == 3 {
            check_newer(f, &old, &fix).map_err(|e| format!("newer: {e}"))?;
        }
    }
    Ok(())
}

/// `--allow` for each rule that the fixture overrules.
fn allowed(f: &Fixture) -> impl Iterator<Item = &OsStr> {
    f.allow.iter().flat_map(|rule| ["--allow".as_ref(), OsStr::new(rule)])
}

/// The unpatched program says what the fixture claims of it.
fn speaks_for_itself(program: &Path, says: &str) -> Result<(), String> {
    let mut program = Program::start(program);
    program.ask(says)?;
    program.ask(says)?;
    program.finish()
}

fn list<'a>(report: &'a Value, key: &str) -> &'a [Value] {
    report[key].as_array().map_or(&[], Vec::as_slice)
}

fn text<'a>(value: &'a Value, key: &str) -> &'a str {
    value[key].as_str().unwrap_or("")
}

/// Every refusal is expected and every expected one is there, named on stderr and with a remedy.
fn check_refusals(wanted: &[(String, Option<String>)], report: &Value, stderr: &str) -> Result<(), String> {
    let got = list(report, "refusals");
    let is = |r: &Value, (rule, symbol): &(String, Option<String>)| {
        text(r, "rule") == rule && symbol.as_ref().is_none_or(|s| text(r, "symbol").contains(s.as_str()))
    };
    let said = || got.iter().map(|r| format!("\n  {r}")).collect::<String>();
    for want in wanted {
        let Some(found) = got.iter().find(|r| is(r, want)) else {
            return Err(format!("not refused as {want:?}, but:{}", said()));
        };
        if text(found, "remedy").is_empty() || text(found, "message").is_empty() {
            return Err(format!("a refusal without message or remedy: {found}"));
        }
        if want.1.as_ref().is_some_and(|s| !stderr.contains(s.as_str())) {
            return Err(format!("stderr does not name {:?}:\n{stderr}", want.1));
        }
    }
    match got.iter().find(|r| !wanted.iter().any(|want| is(r, want))) {
        Some(other) => Err(format!("refused for another reason, too: {other}")),
        None => Ok(()),
    }
}

fn check_noise(f: &Fixture, report: &Value) -> Result<(), String> {
    let got = list(report, "noise");
    match f.noise.iter().find(|rule| !got.iter().any(|n| text(n, "rule").contains(rule.as_str()))) {
        Some(rule) => Err(format!("no noise of the rule {rule:?} in {got:?}")),
        None => Ok(()),
    }
}

/// The functions are exactly the expected ones. A `.cold` or `.part.N` piece of an expected function needs not be named.
fn check_functions(f: &Fixture, report: &Value) -> Result<(), String> {
    for (status, want) in [("changed", &f.changed), ("new", &f.new)] {
        let got: Vec<&Value> = list(report, "functions").iter().filter(|x| text(x, "status") == status).collect();
        let (pieces, wholes): (Vec<&Value>, Vec<&Value>) =
            got.iter().partition(|x| [".cold", ".part."].iter().any(|s| text(x, "name").contains(s)));
        // The longest first, so that `answer` does not take the place of `book::answer`.
        let mut left: Vec<&str> = want.iter().map(String::as_str).collect();
        left.sort_by_key(|name| std::cmp::Reverse(name.len()));
        let mut extra = Vec::new();
        for function in wholes {
            match left.iter().position(|name| is_named(function, name)) {
                Some(i) => drop(left.remove(i)),
                None => extra.push(text(function, "demangled")),
            }
        }
        for piece in pieces {
            match left.iter().position(|name| is_named(piece, name)) {
                Some(i) => drop(left.remove(i)),
                None if f.changed.iter().chain(&f.new).any(|name| is_named(piece, name)) => {}
                None => extra.push(text(piece, "demangled")),
            }
        }
        if !left.is_empty() || !extra.is_empty() {
            let reasons: Vec<String> =
                got.iter().map(|x| format!("\n  {}: {}", text(x, "demangled"), text(x, "reason"))).collect();
            return Err(format!("{status}: missing {left:?}, not expected {extra:?}; got:{}", reasons.concat()));
        }
    }
    Ok(())
}

/// Whether a function goes by this name: its last parts, without return type, parameters, hash, clone suffixes and spaces.
/// `a|b` is either.
fn is_named(function: &Value, want: &str) -> bool {
    let mut name = text(function, "demangled");
    for suffix in [" [clone", ".cold", ".part.", ".constprop.", ".isra.", ".lto_priv.", ".llvm."] {
        name = name.split(suffix).next().unwrap_or(name);
    }
    let name = without_crate_hash(without_parameters(name));
    let name = without_return_type(&name).replace(' ', "");
    want.split('|').any(|want| name == want || name.strip_suffix(want).is_some_and(|before| before.ends_with("::")))
}

/// `f(int, long) const` without its parameters.
fn without_parameters(name: &str) -> &str {
    let name = name.strip_suffix(" const").unwrap_or(name);
    if !name.ends_with(')') {
        return name;
    }
    let mut depth = 0;
    for (i, c) in name.char_indices().rev() {
        match c {
            ')' => depth += 1,
            '(' => depth -= 1,
            _ => {}
        }
        if depth == 0 {
            return &name[..i];
        }
    }
    name
}

/// `gw[0123456789abcdef]::f` without the crate's disambiguator, `f[abi:cxx11]` without the tag.
fn without_crate_hash(name: &str) -> String {
    let mut parts = name.split('[');
    let mut out = parts.next().unwrap_or("").to_owned();
    for part in parts {
        match part.split_once(']') {
            Some((hash, rest)) if hash.len() == 16 && hash.bytes().all(|b| b.is_ascii_hexdigit()) => out += rest,
            Some((tag, rest)) if tag.starts_with("abi:") => out += rest,
            _ => out = out + "[" + part,
        }
    }
    out
}

/// `int scaled<int>` without the `int` in front: a template's name has its return type.
fn without_return_type(name: &str) -> &str {
    let (mut depth, mut from) = (0, 0);
    for (i, c) in name.char_indices() {
        match c {
            '<' | '(' | '{' => depth += 1,
            '>' | ')' | '}' => depth -= 1,
            ' ' if depth == 0 => from = i + 1,
            _ => {}
        }
    }
    &name[from..]
}

fn check_data(f: &Fixture, report: &Value) -> Result<(), String> {
    let got = list(report, "data");
    for (name, kind) in &f.data {
        if !got.iter().any(|d| text(d, "name").contains(name.as_str()) && text(d, "kind") == kind) {
            return Err(format!("no {kind} {name} in the patch's data {got:?}"));
        }
    }
    match got.iter().find(|d| {
        text(d, "kind") == "static" && !f.data.iter().any(|(name, _)| text(d, "name").contains(name.as_str()))
    }) {
        Some(d) => Err(format!("a static that was not expected: {d}")),
        None => Ok(()),
    }
}

/// Old behaviour, apply, new, revert, old, apply, new: with the state kept, and an orderly end.
fn check_live(f: &Fixture, old: &Path, fix: &Path) -> Result<(), String> {
    let mut program = Program::start(old);
    let says = |side: usize| f.says[side].as_deref().unwrap_or("");
    let (pid, fix) = (program.pid().to_string(), fix.to_str().expect("a path in UTF-8"));
    program.ask(says(0))?;
    if let Some((code, name)) = &f.apply_exit {
        let before = program.text();
        let ran = livepatch(&["apply", &pid, fix, "--timeout", "2s"]);
        ran.expect_no_crash()?.expect_code(*code)?.expect_says(&[name.as_deref().unwrap_or("")])?;
        if program.text() != before {
            return Err("not applied, but the code is not what it was".into());
        }
        program.ask(says(0))?;
        return program.finish();
    }
    for step in ["apply", "revert", "apply"] {
        let args = if step == "apply" { vec!["apply", &pid, fix, "--json"] } else { vec!["revert", &pid, "--json"] };
        let ran = livepatch(&args);
        let report = ran.expect_no_crash().and_then(|r| r.expect_code(0)).and_then(|r| r.json())?;
        if report["pause_us"].as_f64().is_none() || list(&report, "functions").is_empty() {
            return Err(format!("{step}: no pause_us or functions in {report}"));
        }
        for _ in 0..2 {
            program.ask(says(usize::from(step == "apply"))).map_err(|e| format!("after {step}: {e}"))?;
        }
    }
    program.finish()
}

/// The patch exports exactly the expected hooks.
fn check_hooks(f: &Fixture, fix: &Path) -> Result<(), String> {
    let inspected = support::run(Command::new(tool("patch-builder")).arg("inspect").arg(fix).arg("--json"));
    let report = inspected.expect_code(0)?.json()?;
    let got: Vec<&str> = list(&report["manifest"], "hooks").iter().map(|h| text(h, "symbol")).collect();
    if got != f.expected_hooks {
        return Err(format!("the patch's hooks are {got:?}, expected {:?}", f.expected_hooks));
    }
    Ok(())
}

/// The patch from old to newer takes the place of the one from old to new, and a revert leads back to old.
fn check_newer(f: &Fixture, old: &Path, fix: &Path) -> Result<(), String> {
    let (newer, newest) = (f.dir().join("newer"), f.dir().join("newer.so"));
    let _ = std::fs::remove_file(&newest);
    let after: Vec<&OsStr> = ["--after".as_ref(), fix.as_os_str()].into_iter().chain(allowed(f)).collect();
    let built = build_patch_with(&f.image(old), &f.image(&newer), &newest, &after);
    built.expect_no_crash()?.expect_code(if f.newer_refusals.is_empty() { 0 } else { 3 })?;
    check_refusals(&f.newer_refusals, &built.json()?, &built.stderr)?;
    if !f.newer_refusals.is_empty() {
        return if newest.is_file() { Err("refused, and still wrote the patch file".into()) } else { Ok(()) };
    }
    let says = |side: usize| f.says[side].as_deref().unwrap_or("");
    let (fix, newest) = (fix.to_str().expect("a path in UTF-8"), newest.to_str().expect("a path in UTF-8"));
    let mut program = Program::start(old);
    let pid = program.pid().to_string();
    program.ask(says(0))?;
    livepatch(&["apply", &pid, newest]).expect_no_crash()?.expect_code(3)?.expect_says(&["takes the place"])?;
    livepatch(&["apply", &pid, fix]).expect_no_crash()?.expect_code(0)?;
    program.ask(says(1))?;
    livepatch(&["apply", &pid, newest]).expect_no_crash()?.expect_code(0)?;
    for _ in 0..2 {
        program.ask(says(2)).map_err(|e| format!("after the newer patch: {e}"))?;
    }
    livepatch(&["apply", &pid, fix]).expect_no_crash()?.expect_code(3)?;
    livepatch(&["revert", &pid]).expect_no_crash()?.expect_code(0)?;
    program.ask(says(0)).map_err(|e| format!("after the revert: {e}"))?;
    // And once more: both mappings are used again.
    for patch in [fix, newest] {
        livepatch(&["apply", &pid, patch]).expect_no_crash()?.expect_code(0)?;
    }
    program.ask(says(2)).map_err(|e| format!("after all of it again: {e}"))?;
    program.finish()
}
