//! What bad input gets: one clear message, the designed exit code, and a target whose code is what it was.

mod support;

use std::os::unix::fs::{FileExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use support::fixture::{all, Fixture};
use support::program::Program;
use support::{build_patch, livepatch, run, scratch, tool, Ran};

type Outcome = Result<(), String>;

/// A fixture of this name, built.
fn pair(name: &str) -> (Fixture, [PathBuf; 2]) {
    let fixture = all().into_iter().find(|f| f.name == name).expect("a fixture of this name");
    // Several tests share it: a folder for each, by the name of the test's thread.
    let test = std::thread::current().name().unwrap_or("main").to_owned();
    let built = fixture.build_in(&scratch("bad-input").join(test).join(name)).unwrap_or_else(|e| panic!("{e}"));
    (fixture, built)
}

/// The pair that most tests use, with its patch.
fn fee() -> ([PathBuf; 2], PathBuf) {
    let (_, [old, new]) = pair("c-constant");
    let fix = old.with_file_name("fix.so");
    build_patch(&old, &new, &fix).expect_code(0).unwrap_or_else(|e| panic!("{e}"));
    ([old, new], fix)
}

fn s(path: &Path) -> &str {
    path.to_str().expect("a path in UTF-8")
}

fn diff(old: &Path, new: &Path) -> Ran {
    let fix = scratch("bad-input").join("never-written.so");
    let ran = build_patch(old, new, &fix);
    assert!(!fix.exists() || ran.code == 0, "{}: failed, and wrote a patch", ran.line);
    ran
}

/// Runs `livepatch COMMAND PID FIX` on a living old program; nothing of its code may change, and it must live on.
fn leaves_untouched(old: &Path, command: &str, fix: &Path, check: impl Fn(&Ran, &Program) -> Outcome) -> Outcome {
    let mut program = Program::start(old);
    program.ask("fee 70")?;
    let before = program.text();
    let ran = livepatch(&[command, &program.pid().to_string(), s(fix)]);
    ran.expect_no_crash()?;
    check(&ran, &program)?;
    if program.text() != before {
        return Err(format!("{}: exit {}, but code was changed", ran.line, ran.code));
    }
    program.ask("fee 70")?;
    program.finish()
}

fn build_id(path: &Path) -> String {
    let notes = run(Command::new("readelf").arg("-n").arg(path)).stdout;
    let line = notes.lines().find_map(|l| l.trim().strip_prefix("Build ID: ")).expect("a build-id");
    line.to_owned()
}

/// Where `symbol` starts in a running program, and how long it is.
fn function_at(program: &Program, path: &Path, symbol: &str) -> (u64, usize) {
    let table = run(Command::new("nm").args(["-S", "--defined-only"]).arg(path)).stdout;
    let line = table.lines().find(|l| l.split_whitespace().nth(3) == Some(symbol)).expect("a symbol");
    let mut parts = line.split_whitespace().map(|x| u64::from_str_radix(x, 16));
    let (at, size) = (parts.next().expect("an address").expect("hex"), parts.next().expect("a size").expect("hex"));
    let maps = std::fs::read_to_string(format!("/proc/{}/maps", program.pid())).expect("maps");
    let real = path.canonicalize().expect("a path");
    let base = maps.lines().find(|l| l.ends_with(s(&real))).and_then(|l| l.split('-').next()).expect("a mapping");
    (u64::from_str_radix(base, 16).expect("hex") + at, size as usize)
}

fn poke(program: &Program, at: u64, bytes: &[u8]) {
    let mem = std::fs::OpenOptions::new()
        .write(true)
        .open(format!("/proc/{}/mem", program.pid()))
        .expect("memory of a child");
    mem.write_all_at(bytes, at).expect("writing into a child");
}

fn changed_copy(of: &Path, name: &str, change: impl FnOnce(&mut Vec<u8>)) -> PathBuf {
    let mut bytes = std::fs::read(of).expect("a file");
    change(&mut bytes);
    let path = of.with_file_name(name);
    std::fs::write(&path, bytes).expect("a file");
    path
}

#[test]
fn not_an_elf_file() -> Outcome {
    let ([old, new], _) = fee();
    let text = changed_copy(&old, "text", |b| *b = b"#!/bin/sh\necho this is a script\n".to_vec());
    let empty = changed_copy(&old, "empty", Vec::clear);
    for bad in [&text, &empty] {
        let name = bad.file_name().and_then(|n| n.to_str()).expect("a name");
        diff(bad, &new).expect_no_crash()?.expect_code(1)?.expect_says(&[name, "ELF"])?;
        diff(&old, bad).expect_no_crash()?.expect_code(1)?.expect_says(&[name, "ELF"])?;
        leaves_untouched(&old, "apply", bad, |r, _| r.expect_code(1)?.expect_says(&[name, "ELF"]).map(drop))?;
    }
    let missing = old.with_file_name("missing");
    diff(&missing, &new).expect_code(1)?.expect_says(&["missing", "No such file"])?;
    leaves_untouched(&old, "apply", &missing, |r, _| {
        r.expect_code(1)?.expect_says(&["missing", "No such file"]).map(drop)
    })
}

#[test]
fn truncated() -> Outcome {
    let ([old, new], _) = fee();
    let whole = std::fs::metadata(&old).expect("a file").len() as usize;
    for part in 0..60 {
        let cut = whole * part / 60 + part % 7;
        let short = changed_copy(&old, "short", |b| b.truncate(cut));
        diff(&short, &new).expect_no_crash()?.expect_code(1)?.expect_says(&["short"])?;
        diff(&new, &short).expect_no_crash()?.expect_code(1)?.expect_says(&["short"])?;
    }
    Ok(())
}

#[test]
fn another_architecture() -> Outcome {
    let ([old, new], fix) = fee();
    let arm = |b: &mut Vec<u8>| b[18..20].copy_from_slice(&183u16.to_le_bytes());
    for (name, change, says) in [
        ("arm", &arm as &dyn Fn(&mut Vec<u8>), "x86-64"),
        ("class32", &|b: &mut Vec<u8>| b[4] = 1, "64-bit"),
        ("big-endian", &|b: &mut Vec<u8>| b[5] = 2, "x86-64"),
    ] {
        let other = changed_copy(&old, name, change);
        diff(&other, &new).expect_no_crash()?.expect_code(1)?.expect_says(&[name, says])?;
        diff(&old, &other).expect_no_crash()?.expect_code(1)?.expect_says(&[name, says])?;
    }
    let patch = changed_copy(&fix, "arm.so", arm);
    leaves_untouched(&old, "apply", &patch, |r, _| r.expect_code(1)?.expect_says(&["x86-64"]).map(drop))
}

#[test]
fn no_build_id() -> Outcome {
    // Neither build has one: refused when it is built; and a process without one is refused when it is patched.
    let (_, [old, new]) = pair("c-refuse-no-build-id");
    diff(&old, &new).expect_code(3)?.expect_says(&["build-id", "--build-id"])?;
    let (_, fix) = fee();
    leaves_untouched(&old, "apply", &fix, |r, _| r.expect_code(3)?.expect_says(&["build-id"]).map(drop))
}

#[test]
fn stripped_of_symbols() -> Outcome {
    let ([old, new], fix) = fee();
    let bare = changed_copy(&old, "bare", |_| ());
    std::fs::set_permissions(&bare, std::fs::Permissions::from_mode(0o755)).expect("permissions");
    run(Command::new("strip").arg(&bare)).expect_code(0)?;
    diff(&bare, &new).expect_code(3)?.expect_says(&["symbol", "bare"])?;
    diff(&old, &bare).expect_code(3)?.expect_says(&["symbol", "bare"])?;
    // But the program that runs may be stripped: the build-id is what counts.
    let mut program = Program::start(&bare);
    program.ask("fee 70")?;
    livepatch(&["apply", &program.pid().to_string(), s(&fix)]).expect_code(0)?;
    program.ask("fee 75")?;
    livepatch(&["revert", &program.pid().to_string()]).expect_code(0)?;
    program.ask("fee 70")?;
    program.finish()
}

#[test]
fn the_same_build_twice() -> Outcome {
    let ([old, _], _) = fee();
    diff(&old, &old).expect_code(1)?.expect_says(&["differ"]).map(drop)
}

#[test]
fn swapped_old_and_new() -> Outcome {
    let ([old, new], _) = fee();
    let fix = old.with_file_name("swapped.so");
    build_patch(&new, &old, &fix).expect_code(0)?;
    let had = build_id(&old);
    let named = |r: &Ran, _: &Program| r.expect_code(3)?.expect_says(&[&had[..12], "swapped"]).map(drop);
    leaves_untouched(&old, "apply", &fix, named)?;
    leaves_untouched(&old, "check", &fix, named)
}

#[test]
fn two_programs() -> Outcome {
    let dir = scratch("bad-input").join("two-programs");
    std::fs::create_dir_all(&dir).map_err(|e| e.to_string())?;
    let built = [("ledger", "return argc * 70;"), ("game", "return argc - 1;")].map(|(name, body)| {
        let (source, image) = (dir.join(name).with_extension("c"), dir.join(name));
        std::fs::write(&source, format!("int main(int argc, char **argv) {{ (void)argv; {body} }}\n"))
            .expect("written");
        let mut gcc = Command::new("gcc");
        gcc.args(["-g", "-O2", "-Wl,--emit-relocs", "-Wl,--build-id", "-o"]).arg(&image).arg(source);
        run(&mut gcc).expect_code(0).unwrap_or_else(|e| panic!("{e}"));
        image
    });
    diff(&built[0], &built[1]).expect_code(3)?.expect_says(&["other-program", "ledger.c", "game.c"]).map(drop)
}

#[test]
fn a_patch_for_another_build() -> Outcome {
    let ([old, _], _) = fee();
    let (_, [other_old, other_new]) = pair("c-float-constant");
    let fix = old.with_file_name("other.so");
    build_patch(&other_old, &other_new, &fix).expect_code(0)?;
    let (had, wanted) = (build_id(&old), build_id(&other_old));
    let named = |r: &Ran, _: &Program| r.expect_code(3)?.expect_says(&["build", &had[..12], &wanted[..12]]).map(drop);
    leaves_untouched(&old, "apply", &fix, named)
}

#[test]
fn code_changed_by_something_else() -> Outcome {
    let ([old, _], fix) = fee();
    // A breakpoint on the entry, and another byte in the middle of the body.
    for at_end in [false, true] {
        for command in ["check", "apply"] {
            let mut program = Program::start(&old);
            program.ask("fee 70")?;
            let (at, size) = function_at(&program, &old, "fee");
            poke(&program, if at_end { at + size as u64 - 1 } else { at }, &[0xcc]);
            let before = program.text();
            let ran = livepatch(&[command, &program.pid().to_string(), s(&fix)]);
            ran.expect_no_crash()?.expect_code(3)?.expect_says(&["fee"])?;
            if program.text() != before {
                return Err(format!("{}: refused, but code was changed", ran.line));
            }
        }
    }
    Ok(())
}

#[test]
fn a_foreign_hook_over_an_applied_patch() -> Outcome {
    let ([old, _], fix) = fee();
    let mut program = Program::start(&old);
    program.ask("fee 70")?;
    let pid = program.pid().to_string();
    livepatch(&["apply", &pid, s(&fix)]).expect_code(0)?;
    let (at, _) = function_at(&program, &old, "fee");
    poke(&program, at, &[0xcc]);
    let before = program.text();
    livepatch(&["revert", &pid]).expect_no_crash()?.expect_code(3)?.expect_says(&["fee"])?;
    if program.text() != before {
        return Err("revert was refused, but code was changed".into());
    }
    Ok(())
}

#[test]
fn no_such_process() -> Outcome {
    let ([old, _], fix) = fee();
    let mut program = Program::start(&old);
    let pid = program.pid().to_string();
    program.kill();
    for args in [vec!["check", &pid, s(&fix)], vec!["apply", &pid, s(&fix)], vec!["revert", &pid], vec!["status", &pid]]
    {
        livepatch(&args).expect_no_crash()?.expect_code(6)?.expect_says(&[&pid])?;
    }
    // A number that no process can have, and one that is none at all.
    livepatch(&["apply", "2147483000", s(&fix)]).expect_code(6)?.expect_says(&["2147483000"])?;
    livepatch(&["apply", "abc", s(&fix)]).expect_code(2)?;
    // A thread of the kernel, where they can be seen.
    if std::fs::read_to_string("/proc/2/comm").is_ok_and(|name| name.trim() == "kthreadd") {
        for args in [vec!["check", "2", s(&fix)], vec!["apply", "2", s(&fix)], vec!["revert", "2"], vec!["status", "2"]]
        {
            livepatch(&args).expect_no_crash()?.expect_code(6)?.expect_says(&["kernel"])?;
        }
    }
    Ok(())
}

#[test]
fn a_process_that_has_ended_but_was_not_waited_for() -> Outcome {
    let ([old, _], fix) = fee();
    let mut zombie = Command::new(&old).stdin(Stdio::null()).stdout(Stdio::null()).spawn().expect("a child");
    let stat = format!("/proc/{}/stat", zombie.id());
    while !std::fs::read_to_string(&stat).is_ok_and(|s| s.contains(") Z ")) {
        std::thread::sleep(std::time::Duration::from_millis(2));
    }
    let ran = livepatch(&["apply", &zombie.id().to_string(), s(&fix)]);
    let _ = zombie.wait();
    ran.expect_no_crash()?.expect_code(6).map(drop)
}

#[test]
fn a_process_that_ends_meanwhile() -> Outcome {
    let ([old, _], fix) = fee();
    let mut codes = std::collections::BTreeMap::new();
    for round in 0..120 {
        let mut program = Program::start(&old);
        program.ask("fee 70")?;
        let pid = program.pid().to_string();
        let fix = s(&fix).to_owned();
        let apply = std::thread::spawn(move || match round % 3 {
            0 => livepatch(&["apply", &pid, &fix]),
            1 => livepatch(&["check", &pid, &fix]),
            _ => livepatch(&["status", &pid]),
        });
        std::thread::sleep(std::time::Duration::from_micros(100 * round));
        program.kill();
        let ran = apply.join().map_err(|_| "the test's own thread panicked")?;
        ran.expect_no_crash()?;
        if ![0, 6].contains(&ran.code) {
            return Err(format!("{}: exit {}, expected 0 or 6\n{}", ran.line, ran.code, ran.both()));
        }
        *codes.entry(ran.code).or_insert(0) += 1;
    }
    println!("exit codes: {codes:?}");
    Ok(())
}

#[test]
fn no_permission() -> Outcome {
    // Only root can become somebody else.
    if !run(Command::new("setpriv").args(["--reuid", "65534", "--clear-groups", "true"])).stderr.is_empty() {
        println!("not root: not tried");
        return Ok(());
    }
    let ([old, _], fix) = fee();
    // A folder that anybody can read, wherever the clone is.
    let open = std::env::temp_dir().join(format!("livepatch-no-permission-{}", std::process::id()));
    std::fs::create_dir_all(&open).expect("a folder");
    std::fs::set_permissions(&open, std::fs::Permissions::from_mode(0o755)).expect("permissions");
    let (command, patch) = (open.join("livepatch"), open.join("fix.so"));
    std::fs::copy(tool("livepatch"), &command).expect("a copy");
    std::fs::copy(&fix, &patch).expect("a copy");
    std::fs::set_permissions(&patch, std::fs::Permissions::from_mode(0o644)).expect("permissions");
    let mut program = Program::start(&old);
    program.ask("fee 70")?;
    let before = program.text();
    let pid = program.pid().to_string();
    let outcome = ["check", "apply"].iter().try_for_each(|what| {
        let nobody = ["--reuid", "65534", "--regid", "65534", "--clear-groups"];
        let ran = run(Command::new("setpriv").args(nobody).arg(&command).args([what, &pid.as_str()]).arg(&patch));
        ran.expect_no_crash()?.expect_code(6)?.expect_says(&[&pid, "perm"]).map(drop)
    });
    let _ = std::fs::remove_dir_all(&open);
    outcome?;
    if program.text() != before {
        return Err("not permitted, but code was changed".into());
    }
    program.ask("fee 70")?;
    program.finish()
}

#[test]
fn another_tracer() -> Outcome {
    let ([old, _], fix) = fee();
    let hold = old.with_file_name("hold");
    let source = support::root().join("tests/tools/hold.c");
    run(Command::new("gcc").arg("-O1").arg("-o").arg(&hold).arg(source)).expect_code(0)?;
    let mut program = Program::start(&old);
    program.ask("fee 70")?;
    let before = program.text();
    let pid = program.pid().to_string();
    let mut tracer =
        Command::new(&hold).arg(&pid).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().expect("a tracer");
    let mut line = [0; 5];
    let held = std::io::Read::read_exact(&mut tracer.stdout.take().expect("stdout"), &mut line);
    let by = tracer.id().to_string();
    let refused = |what: &&str| {
        livepatch(&[what, &pid, s(&fix)]).expect_no_crash()?.expect_code(6)?.expect_says(&["trace", &by]).map(drop)
    };
    let outcome =
        held.map_err(|e| format!("no tracer: {e}")).and_then(|()| ["check", "apply"].iter().try_for_each(refused));
    let _ = tracer.kill();
    let _ = tracer.wait();
    outcome?;
    if program.text() != before {
        return Err("traced, but code was changed".into());
    }
    program.ask("fee 70")?;
    // And once the tracer has gone, it applies.
    livepatch(&["apply", &pid, s(&fix)]).expect_code(0)?;
    program.ask("fee 75")?;
    program.finish()
}

#[test]
fn a_file_that_is_no_patch() -> Outcome {
    let ([old, new], _) = fee();
    for file in [&old, &new] {
        run(Command::new(tool("patch-builder")).arg("inspect").arg(file))
            .expect_no_crash()?
            .expect_code(1)?
            .expect_says(&["patch"])?;
        leaves_untouched(&old, "apply", file, |r, _| r.expect_code(1)?.expect_says(&["patch"]).map(drop))?;
    }
    Ok(())
}

/// A damaged patch is refused (1 or 3); or the damage is where nothing depends on it (a symbol's name, padding), and the patch does what it always did.
fn damaged(old: &Path, patch: &Path) -> Outcome {
    run(Command::new(tool("patch-builder")).arg("inspect").arg(patch)).expect_no_crash()?;
    let mut program = Program::start(old);
    program.ask("fee 70")?;
    let before = program.text();
    let pid = program.pid().to_string();
    let ran = livepatch(&["apply", &pid, s(patch)]);
    ran.expect_no_crash()?;
    match ran.code {
        1 | 3 => {
            if program.text() != before {
                return Err(format!("{}: exit {}, but code was changed", ran.line, ran.code));
            }
            program.ask("fee 70")?;
        }
        0 => {
            program.ask("fee 75")?;
            livepatch(&["revert", &pid]).expect_no_crash()?.expect_code(0)?;
            program.ask("fee 70")?;
        }
        other => return Err(format!("{}: exit {other}, expected 1 or 3\n{}", ran.line, ran.both())),
    }
    program.finish()
}

#[test]
fn a_patch_cut_short() -> Outcome {
    let ([old, _], fix) = fee();
    let whole = std::fs::metadata(&fix).expect("a patch").len() as usize;
    for part in 0..50 {
        let cut = whole * part / 50 + part % 5;
        let patch = changed_copy(&fix, "cut.so", |b| b.truncate(cut));
        damaged(&old, &patch).map_err(|e| format!("cut at {cut} of {whole}: {e}"))?;
        leaves_untouched(&old, "check", &patch, |r, _| {
            if [1, 3].contains(&r.code) {
                Ok(())
            } else {
                Err(format!("check: exit {}", r.code))
            }
        })?;
    }
    Ok(())
}

#[test]
fn a_patch_with_a_flipped_byte() -> Outcome {
    let ([old, _], fix) = fee();
    let whole = std::fs::metadata(&fix).expect("a patch").len() as usize;
    // All of the header, and 150 places spread over the file, each with another bit.
    for (i, at) in (0..64).chain((0..150).map(|i| 64 + (whole - 65) * i / 149)).enumerate() {
        let patch = changed_copy(&fix, "flipped.so", |b| b[at] ^= if i % 3 == 0 { 0xff } else { 1 << (i % 8) });
        damaged(&old, &patch).map_err(|e| format!("byte {at} of {whole}: {e}"))?;
    }
    Ok(())
}

/// Offset and length of every allocated section of a file, by name.
fn loaded_sections(path: &Path) -> Vec<(String, usize, usize)> {
    let table = run(Command::new("readelf").arg("-SW").arg(path)).stdout;
    let rows = table
        .lines()
        .filter_map(|line| line.split_once("] "))
        .map(|(_, row)| row.split_whitespace().collect::<Vec<_>>());
    let number = |text: &str| usize::from_str_radix(text, 16).expect("hex");
    rows.filter(|row| row.len() > 7 && row[6].contains('A'))
        .map(|row| (row[0].to_owned(), number(row[3]), number(row[4])))
        .collect()
}

#[test]
fn a_patch_with_damage_in_what_would_be_loaded() -> Outcome {
    let ([old, _], fix) = fee();
    let sections = loaded_sections(&fix);
    if !sections.iter().any(|(name, ..)| name == ".text") {
        return Err(format!("no .text in {sections:?}"));
    }
    for (name, start, size) in sections {
        for at in (start..start + size).step_by(size.div_ceil(25).max(1)) {
            let patch = changed_copy(&fix, "damaged.so", |b| b[at] ^= 0x10);
            leaves_untouched(&old, "apply", &patch, |r, _| match r.code {
                1 | 3 => Ok(()),
                code => Err(format!("byte {} of {name}: exit {code}, expected 1 or 3", at - start)),
            })?;
        }
    }
    Ok(())
}

#[test]
fn wrong_usage() -> Outcome {
    for args in [
        vec![],
        vec!["frobnicate"],
        vec!["apply"],
        vec!["apply", "1"],
        vec!["apply", "fix.so"],
        vec!["check", "fix.so"],
        vec!["revert"],
        vec!["apply", "1", "2"],
        vec!["apply", "--no-such-option", "1", "x.so"],
    ] {
        livepatch(&args).expect_no_crash()?.expect_code(2)?;
    }
    for args in [vec![], vec!["only-one"], vec!["a", "b", "--no-such-option"], vec!["flags", "cobol"]] {
        run(Command::new(tool("patch-builder")).args(&args)).expect_no_crash()?.expect_code(2)?;
    }
    run(Command::new(tool("livepatch")).arg("--help")).expect_code(0)?;
    run(Command::new(tool("patch-builder")).arg("--help")).expect_code(0)?;
    Ok(())
}
