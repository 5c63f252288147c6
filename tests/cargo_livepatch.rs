//! `cargo livepatch` on a package with a build script, a path dependency, two programs and a profile that strips:
//! what it records, what it compares, and that the patch serves the stripped program that runs.

mod support;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use serde_json::Value;
use support::program::Program;
use support::{livepatch, run, run_within, scratch, tool, Ran};

type Outcome = Result<(), String>;

const FILES: [(&str, &str); 8] = [
    (
        "desk/Cargo.toml",
        "[package]\nname = \"desk\"\nversion = \"0.1.0\"\nedition = \"2021\"\n[dependencies]\nprice = { path = \"../price\" }\n[features]\nloud = []\n[profile.release]\nstrip = true\nlto = \"thin\"\npanic = \"abort\"\nincremental = true\n[workspace]\n",
    ),
    (
        "desk/build.rs",
        "fn main() {\n    println!(\"cargo:rerun-if-changed=build.rs\");\n    let out = std::env::var(\"OUT_DIR\").unwrap();\n    std::fs::write(format!(\"{out}/made.rs\"), \"const DESK: &str = \\\"desk 7\\\";\").unwrap();\n}\n",
    ),
    (
        "desk/src/main.rs",
        "include!(concat!(env!(\"OUT_DIR\"), \"/made.rs\"));\nuse std::io::BufRead;\nfn main() {\n    for (i, line) in std::io::stdin().lock().lines().enumerate() {\n        let n = line.unwrap().len() as u64;\n        println!(\"{} {DESK} fee {}\", i + 1, price::fee(n * 7, 1000));\n    }\n}\n",
    ),
    ("desk/src/bin/other.rs", "fn main() {\n    println!(\"{}\", price::fee(1, 1));\n}\n"),
    ("price/Cargo.toml", "[package]\nname = \"price\"\nversion = \"0.1.0\"\nedition = \"2021\"\n"),
    (
        "price/src/lib.rs",
        "#[inline(never)]\npub fn fee(quantity: u64, price: u64) -> u64 {\n    assert!(price > 0, \"a price of nothing\");\n    quantity * price / 100\n}\n",
    ),
    (".gitignore", "target\n"),
    ("README", "A desk.\n"),
];

struct Project {
    root: PathBuf,
}

impl Project {
    /// Writes the package and commits it.
    fn new(name: &str) -> Self {
        let root = scratch("cargo-livepatch").join(name);
        let _ = fs::remove_dir_all(&root);
        for (path, text) in FILES {
            let path = root.join(path);
            fs::create_dir_all(path.parent().expect("a folder")).expect("a folder");
            fs::write(path, text).expect("written");
        }
        let it = Self { root };
        it.git(&["init", "--quiet"]);
        run(Command::new("cargo").args(["generate-lockfile", "--offline", "--quiet"]).current_dir(it.desk()));
        it.git(&["add", "--all"]);
        it.git(&["-c", "user.name=a", "-c", "user.email=a@example.com", "commit", "--quiet", "--message", "one"]);
        it.git(&["tag", "v1"]);
        it
    }

    fn desk(&self) -> PathBuf {
        self.root.join("desk")
    }

    fn git(&self, args: &[&str]) {
        let ran = run(Command::new("git").arg("-C").arg(&self.root).args(args));
        assert_eq!(ran.code, 0, "{}\n{}", ran.line, ran.both());
    }

    fn livepatch(&self, args: &[&str]) -> Ran {
        let mut command = Command::new("cargo");
        let path = std::env::var("PATH").unwrap_or_default();
        let folder = tool("cargo-livepatch").parent().expect("a folder").to_owned();
        // What the test runner's own cargo exports must not reach the project's.
        for variable in ["CARGO_TARGET_DIR", "RUSTFLAGS", "RUSTC_WRAPPER", "CARGO_MANIFEST_DIR"] {
            command.env_remove(variable);
        }
        command.env("PATH", format!("{}:{path}", folder.display())).env("CARGO_NET_OFFLINE", "true");
        command.arg("livepatch").args(args).current_dir(self.desk());
        run_within(&mut command, Duration::from_secs(600))
    }

    /// Builds and gives the record and its folder.
    fn build(&self, args: &[&str]) -> Result<(Value, PathBuf), String> {
        let ran = self.livepatch(&[&["build", "--json"], args].concat());
        let record = ran.expect_code(0)?.json()?[0].clone();
        let id = record["build_id"].as_str().ok_or("no build-id")?.to_owned();
        Ok((record, self.desk().join("target/livepatch").join(id)))
    }

    fn edit(&self, path: &str, from: &str, to: &str) {
        let path = self.root.join(path);
        let text = fs::read_to_string(&path).expect("the file");
        assert!(text.contains(from), "{from} in {text}");
        fs::write(path, text.replace(from, to)).expect("written");
    }
}

fn names(report: &Value) -> Vec<&str> {
    report["functions"].as_array().into_iter().flatten().filter_map(|f| f["demangled"].as_str()).collect()
}

fn s(path: &Path) -> &str {
    path.to_str().expect("a path in UTF-8")
}

#[test]
fn a_release_is_recorded_compared_and_patched() -> Outcome {
    let project = Project::new("release");
    let (record, dir) = project.build(&["--bin", "desk"])?;
    let id = record["build_id"].as_str().unwrap_or_default().to_owned();
    assert_eq!(record["git"]["dirty"], false, "{record}");
    assert!(record["compiler"].as_str().is_some_and(|c| c.contains("LLVM")), "{record}");
    for file in ["desk", "desk.map", "Cargo.lock", "record.json", "ship/desk"] {
        assert!(dir.join(file).is_file(), "{file} in {}", dir.display());
    }
    let sections = run(Command::new("readelf").arg("-SW").arg(dir.join("desk"))).stdout;
    assert!(sections.contains(".rela.text") && sections.contains(".debug_info"), "{sections}");
    let sections = run(Command::new("readelf").arg("-SW").arg(dir.join("ship/desk"))).stdout;
    assert!(!sections.contains(".symtab") && !sections.contains(".rela.text"), "{sections}");

    // The same tree again is the same record; the package's own target folder is untouched.
    project.build(&["--bin", "desk"])?;
    let list = project.livepatch(&["list", "--json"]).expect_code(0)?.json()?;
    assert_eq!(list.as_array().map(Vec::len), Some(1), "{list}");
    assert!(!project.desk().join("target/release").exists());

    // The stripped program runs, and gets the fix by its recorded build.
    let mut program = Program::start(&dir.join("ship/desk"));
    program.ask("desk 7 fee 70")?;
    project.edit("price/src/lib.rs", "/ 100\n", "/ 50\n");
    let fix = project.root.join("fix.so");
    let base = format!("pid:{}", program.pid());
    let ran = project.livepatch(&["diff", "--base", &base, "-o", s(&fix), "--json"]);
    assert_eq!(names(&ran.expect_code(0)?.json()?), ["price::fee"]);
    assert!(!ran.stderr.contains("warning"), "nothing else differs:\n{}", ran.stderr);
    livepatch(&["apply", &program.pid().to_string(), s(&fix)]).expect_code(0)?;
    program.ask("desk 7 fee 140")?;
    livepatch(&["revert", &program.pid().to_string()]).expect_code(0)?;
    program.ask("desk 7 fee 70")?;
    program.finish()?;

    // A revision is built where it does not disturb the tree, and is the recorded build to the last byte.
    fs::remove_dir_all(&dir).map_err(|e| e.to_string())?;
    let again = project.root.join("again.so");
    let args = ["diff", "--base", "v1", "--bin", "desk", "-o", s(&again), "--name", "fix", "--json"];
    let report = project.livepatch(&args).expect_code(0)?.json()?;
    assert_eq!(report["target"]["build_id"], id);
    assert_eq!(fs::read(&fix).map_err(|e| e.to_string())?, fs::read(&again).map_err(|e| e.to_string())?);
    let trees = run(Command::new("git").args(["worktree", "list"]).current_dir(&project.root)).stdout;
    assert_eq!(trees.lines().count(), 1, "{trees}");

    // Another profile is built, but its price is said.
    let ran = project.livepatch(&["diff", "--base", &id[..9], "--profile", "dev", "-o", s(&again)]);
    assert!(ran.stderr.contains("another profile (release, then dev)"), "{}", ran.both());

    // A damaged record is not used, but said.
    let path = dir.join("desk");
    let mut bytes = fs::read(&path).map_err(|e| e.to_string())?;
    bytes[5000] ^= 1;
    fs::write(&path, bytes).map_err(|e| e.to_string())?;
    project.livepatch(&["show", &id[..9]]).expect_code(1)?.expect_says(&["damaged"])?;
    project.livepatch(&["diff", "--base", &id[..9]]).expect_code(1)?.expect_says(&["damaged", &id])?;

    project.livepatch(&["prune", "--keep", "0"]).expect_code(0)?;
    let list = project.livepatch(&["list", "--json"]).expect_code(0)?.json()?;
    assert_eq!(list.as_array().map(Vec::len), Some(0), "{list}");
    Ok(())
}

#[test]
fn what_cannot_be_meant_is_said() -> Outcome {
    let project = Project::new("errors");
    // Two programs, and nobody says which.
    let unchanged = project.livepatch(&["diff", "--base", "v1"]);
    unchanged.expect_code(2)?.expect_says(&["several programs", "--bin"])?;
    project.livepatch(&["diff", "--base", "v1", "--bin", "desk"]).expect_code(1)?.expect_says(&["differ"])?;
    project.livepatch(&["diff", "--base", "v2", "--bin", "desk"]).expect_code(1)?.expect_says(&["v2", "list"])?;
    project.livepatch(&["diff", "--base", "deadbeef"]).expect_code(1)?.expect_says(&["deadbeef"])?;
    project.livepatch(&["diff", "--base", "pid:x"]).expect_code(2)?;
    project.livepatch(&["diff", "--base", "pid:2147483000"]).expect_code(1)?.expect_says(&["2147483000"])?;
    project.livepatch(&["diff"]).expect_code(2)?;
    project.livepatch(&["build", "--bin", "nobody"]).expect_code(1)?.expect_says(&["nobody"])?;
    project.livepatch(&["show", "12345678"]).expect_code(1)?.expect_says(&["12345678"])?;
    project.livepatch(&["list", "-C", "/nowhere"]).expect_code(1)?.expect_says(&["/nowhere"])?;
    // A tree that does not compile gives no patch.
    project.edit("price/src/lib.rs", "quantity * price", "quantity *");
    project
        .livepatch(&["diff", "--base", "v1", "--bin", "desk"])
        .expect_code(1)?
        .expect_says(&["cargo build failed"])?;
    Ok(())
}
