//! `patch-builder wrap` on a small project of make: spaces in names, a response file, a link that strips, a shared
//! object, a probe of a configure script, a linker called directly; and that nothing of the build is disturbed.

mod support;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::Value;
use support::program::Program;
use support::{livepatch, run, scratch, tool, Ran};

type Outcome = Result<(), String>;

const MAKEFILE: &str = r#"FEE = 10
CFLAGS = -O2 -fPIC
.PHONY: all probe
all: prog libprice.so probe
price.o: price.c
	$(CC) $(CFLAGS) -DFEE=$(FEE) -MMD -MF price.d -c -o $@ $<
main.o:
	$(CC) $(CFLAGS) -c -o $@ "my dir/main.c"
prog: price.o main.o
	echo "-s 'price.o' main.o" > list
	$(CC) -o "$@" @list
libprice.so: price.o
	$(CC) -shared -Wl,-soname,libprice.so.1 -o $@ price.o
probe: price.o main.o
	echo 'int main(void) { return 0; }' > conftest.c
	$(CC) -o conftest conftest.c && ./conftest
	$(CC) -r -o merged.o price.o main.o 2>/dev/null || $(CC) -nostdlib -r -o merged.o price.o main.o
"#;
const MAIN: &str = "#include <stdio.h>\nlong fee(long);\nint main(void)\n{\n    char line[99];\n    int n = 0;\n    while (fgets(line, 99, stdin)) {\n        printf(\"%d fee %ld\\n\", ++n, fee(7));\n        fflush(stdout);\n    }\n    return 0;\n}\n";
const PRICE: &str = "static long calls;\nlong fee(long quantity)\n{\n    calls++;\n    return quantity * FEE;\n}\n";

fn project(name: &str) -> PathBuf {
    let dir = scratch("wrap").join(name);
    let _ = fs::remove_dir_all(&dir);
    fs::create_dir_all(dir.join("my dir")).expect("a folder");
    for (path, text) in [("Makefile", MAKEFILE), ("my dir/main.c", MAIN), ("price.c", PRICE)] {
        fs::write(dir.join(path), text).expect("written");
    }
    dir
}

fn patch_builder(dir: &Path, args: &[&str]) -> Ran {
    run(Command::new(tool("patch-builder")).args(args).current_dir(dir).env_remove("CC").env_remove("MAKEFLAGS"))
}

fn wrap(dir: &Path, command: &[&str]) -> Ran {
    patch_builder(dir, &[&["wrap", "--"], command].concat())
}

/// The build-ids of the records of a name, newest last.
fn recorded(dir: &Path, name: &str) -> Result<Vec<(String, Value)>, String> {
    let list = patch_builder(dir, &["wrap", "--list", "--json"]).expect_code(0)?.json()?;
    let all = list.as_array().cloned().unwrap_or_default();
    let id = |r: &Value| r["build_id"].as_str().unwrap_or_default().to_owned();
    Ok(all.into_iter().rev().filter(|r| r["name"] == name).map(|r| (id(&r), r)).collect())
}

fn sections(path: &Path) -> String {
    run(Command::new("readelf").arg("-SW").arg(path)).stdout
}

#[test]
fn two_builds_of_make_become_a_patch() -> Outcome {
    let dir = project("make");
    let plain = run(Command::new("make").arg("-j2").current_dir(&dir)).expect_code(0)?.stdout.clone();
    for made in ["prog", "libprice.so", "price.o", "main.o"] {
        fs::remove_file(dir.join(made)).map_err(|e| e.to_string())?;
    }
    let ran = wrap(&dir, &["make", "-j2"]);
    ran.expect_code(0)?.expect_says(&["recorded", "prog", "libprice.so"])?;
    let sorted = |text: &str| {
        let mut lines: Vec<_> = text.lines().map(str::to_owned).collect();
        lines.sort();
        lines
    };
    assert_eq!(sorted(&ran.stdout), sorted(&plain), "the build says what it always says");
    assert!(!ran.stderr.contains("conftest") && !ran.stderr.contains("merged.o"), "{}", ran.stderr);

    let records = recorded(&dir, "prog")?;
    let [(old, record)] = records.as_slice() else { return Err(format!("{records:?}")) };
    let kept = dir.join(".livepatch").join(old);
    let of_kept = sections(&kept.join("prog"));
    assert!(
        of_kept.contains(".rela.text") && of_kept.contains(".debug_info") && of_kept.contains(".symtab"),
        "{of_kept}"
    );
    assert!(kept.join("prog.map").is_file());
    assert!(!sections(&dir.join("prog")).contains(".symtab"), "the build asked for a stripped program");
    assert_eq!(record["inputs"], serde_json::json!(["price.o", "main.o"]));
    assert!(record["compiler"].as_str().is_some_and(|c| !c.is_empty()), "{record}");

    // The program runs; the next build has another fee.
    let mut program = Program::start(&dir.join("prog"));
    program.ask("fee 70")?;
    fs::remove_file(dir.join("price.o")).map_err(|e| e.to_string())?;
    fs::copy(dir.join("prog"), dir.join("running")).map_err(|e| e.to_string())?;
    wrap(&dir, &["make", "FEE=20", "prog"]).expect_code(0)?;
    let records = recorded(&dir, "prog")?;
    let [_, (new, _)] = records.as_slice() else { return Err(format!("{records:?}")) };
    let report = patch_builder(&dir, &[&old[..10], &new[..10], "-o", "fix.so", "--json"]).expect_code(0)?.json()?;
    assert_eq!(report["functions"].as_array().map(Vec::len), Some(1), "{report}");
    assert_eq!(report["functions"][0]["name"], "fee");
    let fix = dir.join("fix.so").display().to_string();
    livepatch(&["apply", &program.pid().to_string(), &fix]).expect_code(0)?;
    program.ask("fee 140")?;
    program.finish()?;

    // Nothing to do: said, and no error.
    wrap(&dir, &["make", "prog"]).expect_code(0)?.expect_says(&["no link was seen"])?;
    // A build-id that nobody recorded is a file that is not there.
    patch_builder(&dir, &["00112233", &new[..10], "-o", "x.so"]).expect_code(1)?.expect_says(&["00112233"])?;
    Ok(())
}

#[test]
fn it_ends_and_fails_as_the_command_does() -> Outcome {
    let dir = project("codes");
    wrap(&dir, &["sh", "-c", "exit 42"]).expect_code(42)?;
    wrap(&dir, &["sh", "-c", "kill -9 $$"]).expect_code(137)?;
    wrap(&dir, &["no-such-command"]).expect_code(1)?.expect_says(&["no-such-command"])?;
    patch_builder(&dir, &["wrap"]).expect_code(2)?;

    // A compiler that fails says what it always says, once.
    let direct = run(Command::new("gcc").args(["-c", "-DFEE=}", "price.c"]).current_dir(&dir));
    let wrapped = wrap(&dir, &["gcc", "-c", "-DFEE=}", "price.c"]);
    assert_eq!(
        (wrapped.code, wrapped.stderr.matches("error:").count()),
        (direct.code, direct.stderr.matches("error:").count())
    );
    let unlinked = wrap(&dir, &["gcc", "-DFEE=1", "price.c", "-o", "x"]);
    unlinked.expect_code(1)?;
    assert_eq!(unlinked.stderr.matches("main").count(), 1, "{}", unlinked.stderr);

    // Questions are answered by the compiler alone.
    for question in
        [&["gcc", "--version"][..], &["gcc", "-dumpmachine"], &["gcc", "-E", "-DFEE=3", "price.c"], &["ld", "-v"]]
    {
        let direct = run(Command::new(question[0]).args(&question[1..]).current_dir(&dir));
        assert_eq!(wrap(&dir, question).stdout, direct.stdout, "{question:?}");
    }
    Ok(())
}

#[test]
fn other_ways_to_link_are_recorded() -> Outcome {
    let dir = project("ways");
    // One command, by standard input, into a.out; and a linker that is called directly.
    wrap(&dir, &["sh", "-c", "gcc -DFEE=1 -O2 -x c - -x none 'my dir/main.c' < price.c"]).expect_code(0)?;
    assert_eq!(recorded(&dir, "a.out")?.len(), 1);
    wrap(&dir, &["sh", "-c", "gcc -fPIC -DFEE=1 -c price.c && ld -shared -s -o direct.so price.o"]).expect_code(0)?;
    let records = recorded(&dir, "direct.so")?;
    let [(id, _)] = records.as_slice() else { return Err(format!("{records:?}")) };
    assert!(sections(&dir.join(".livepatch").join(id).join("direct.so")).contains(".rela.text"));
    assert!(!sections(&dir.join("direct.so")).contains(".symtab"));
    // The build's own wishes win: no debug information, its own map.
    wrap(&dir, &["gcc", "-g0", "-DFEE=1", "-Wl,-Map=own.map", "-o", "own", "my dir/main.c", "price.c"])
        .expect_code(0)?;
    let records = recorded(&dir, "own")?;
    let [(id, _)] = records.as_slice() else { return Err(format!("{records:?}")) };
    let kept = dir.join(".livepatch").join(id);
    assert!(!sections(&kept.join("own")).contains(".debug_info"));
    assert_eq!(fs::read(kept.join("own.map")).ok(), fs::read(dir.join("own.map")).ok());
    // A compiler by its full path is said to be out of reach.
    wrap(&dir, &["make", "CC=/usr/bin/gcc", "price.o"])
        .expect_code(0)?
        .expect_says(&["CC=/usr/bin/gcc", "not seen"])?;
    Ok(())
}
