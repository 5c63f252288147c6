//! Shadow variables in patches: a field that objects get while they live, in C with the store that the patch brings along, and in a Rust program
//! that has livepatch's agent; from outside and from inside.

mod support;

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::LazyLock;

use support::inside::{by, Inside};
use support::program::Program;
use support::{build_patch_with, example, root, run, scratch, tool, Ran};

type Outcome = Result<(), String>;

enum Target {
    Program(Program),
    Inside(Box<Inside>),
}

/// A program, and two patches for it: the second takes the place of the first.
struct Place {
    target: Target,
    first: String,
    second: String,
    hold: &'static [&'static str],
    /// Whether an agent must have done what was done.
    by_agent: bool,
}

/// The patches between three builds.
fn patches(dir: &Path, [old, new, newer]: [&Path; 3]) -> Result<[String; 2], String> {
    let [first, second] = ["first", "second"].map(|n| dir.join(format!("{n}.so")));
    build_patch_with(old, new, &first, &[]).expect_code(0)?;
    build_patch_with(old, newer, &second, &["--after".as_ref(), first.as_os_str()]).expect_code(0)?;
    Ok([first, second].map(|p| p.to_string_lossy().into_owned()))
}

fn of_c(name: &str, inside: bool) -> Result<Place, String> {
    let dir = scratch("shadow").join(name);
    let mut built = Vec::new();
    for version in ["1", "2", "3"] {
        let folder = dir.join(version);
        std::fs::create_dir_all(&folder).map_err(|e| e.to_string())?;
        let mut gcc = Command::new("gcc");
        gcc.current_dir(&folder).args(["-g", "-O2", "-pthread", "-Wl,--emit-relocs", "-Wl,--build-id", "-o", "it"]);
        gcc.arg(format!("-DV={version}"))
            .arg("-I")
            .arg(root().join("include"))
            .arg(root().join("tests/shadow/objects.c"));
        if inside {
            gcc.args(["-DLIBRARY", "-shared", "-fPIC"]);
        }
        if version != "1" {
            gcc.arg(root().join("include/livepatch_shadow.c"));
        }
        run(&mut gcc).expect_code(0)?;
        built.push(folder.join("it"));
    }
    let [first, second] = patches(&dir, [&built[0], &built[1], &built[2]])?;
    let target = if inside {
        let inside = Inside::start_with(name, &built[0], Path::new(&first), Command::new(example("inside")));
        Target::Inside(Box::new(inside))
    } else {
        Target::Program(Program::start(&built[0]))
    };
    Ok(Place { target, first, second, hold: &[], by_agent: inside })
}

/// The livepatch libraries that cargo has built, the newest first: they differ in their features.
fn libraries() -> Result<Vec<PathBuf>, String> {
    let deps = tool("livepatch").with_file_name("deps");
    let files = std::fs::read_dir(&deps).map_err(|e| format!("{}: {e}", deps.display()))?.flatten().map(|f| f.path());
    let is_it = |p: &PathBuf| {
        let name = p.file_name().unwrap_or_default().to_string_lossy();
        name.starts_with("liblivepatch-") && name.ends_with(".rlib")
    };
    let mut found: Vec<PathBuf> = files.filter(is_it).collect();
    found.sort_by_key(|p| std::cmp::Reverse(p.metadata().and_then(|m| m.modified()).ok()));
    Ok(found)
}

/// One build of the program in Rust, linked with a library of livepatch.
fn build_rust(folder: &Path, version: &str, library: &Path) -> Ran {
    let mut rustc = Command::new("rustc");
    rustc.current_dir(folder).arg(root().join("tests/shadow/sessions.rs")).args(["--cfg", version, "-o", "it"]);
    rustc.args(["--edition=2021", "-g", "-O", "-Csymbol-mangling-version=v0", "-Ccodegen-units=1", "-Awarnings"]);
    rustc.args(["--crate-name=it", "-Clink-arg=-Wl,--emit-relocs,--build-id,-Map=it.map"]);
    rustc.arg("--extern").arg(format!("livepatch={}", library.display()));
    run(rustc.arg(format!("-Ldependency={}", library.with_file_name("").display())))
}

/// Builds and patches, once for all tests.
fn of_rust(name: &str, hold: &'static [&'static str]) -> Result<Place, String> {
    static BUILT: LazyLock<Result<(PathBuf, [String; 2]), String>> = LazyLock::new(|| {
        let dir = scratch("shadow").join("rust");
        let folders = ["v1", "v2", "v3"].map(|v| dir.join(v));
        for folder in &folders {
            std::fs::create_dir_all(folder).map_err(|e| e.to_string())?;
        }
        let mut library = None;
        for candidate in libraries()? {
            let ran = build_rust(&folders[0], "v1", &candidate);
            if ran.code == 0 {
                library = Some(candidate);
                break;
            }
            // One without the agent.
            ran.expect_says(&["Agent"])?;
        }
        let library = library.ok_or("no library of livepatch with the agent is built")?;
        for (folder, version) in folders.iter().zip(["v1", "v2", "v3"]).skip(1) {
            build_rust(folder, version, &library).expect_code(0)?;
        }
        let [old, new, newer] = folders.map(|f| f.join("it"));
        let patches = patches(&dir, [&old, &new, &newer])?;
        Ok((old, patches))
    });
    let (old, [first, second]) = BUILT.clone()?;
    let socket = std::env::temp_dir().join(format!("livepatch-{name}-{}.sock", std::process::id()));
    let target = Target::Program(Program::start_by(Command::new(&old).arg(socket)));
    Ok(Place { target, first, second, hold, by_agent: hold.is_empty() })
}

impl Place {
    fn pid(&self) -> String {
        match &self.target {
            Target::Program(p) => p.pid().to_string(),
            Target::Inside(i) => i.pid.to_string(),
        }
    }

    fn tell(&mut self, line: &str, expected: i64) -> Outcome {
        let expected = expected.to_string();
        match &mut self.target {
            Target::Program(p) => p.tell(line, &expected),
            Target::Inside(i) => {
                let said = i.ask(line);
                (said == expected).then_some(()).ok_or_else(|| format!("{line}: it says {said}, expected {expected}"))
            }
        }
        .map_err(|e| format!("{line}: {e}"))
    }

    fn run(&self, command: &str, more: &[&str]) -> Ran {
        let ways = if command == "status" { &[] } else { self.hold };
        run(Command::new(tool("livepatch")).args([command, &self.pid(), "--json"]).args(more).args(ways))
    }

    fn done(&self, command: &str, more: &[&str]) -> Outcome {
        let ran = self.run(command, more);
        let report = ran.expect_code(0)?.json()?;
        assert_eq!(by(&report) == "agent", self.by_agent, "{}", ran.both());
        Ok(())
    }

    /// The field of live objects comes, stays with a later patch, goes with its object and with the second patch.
    fn life(&mut self) -> Outcome {
        let [first, second] = [self.first.clone(), self.second.clone()];
        for k in [1, 2, 3] {
            self.tell(&format!("new {k}"), 0)?;
        }
        self.tell("call 1", 1000)?;
        self.done("apply", &[&first])?;
        self.tell("call 1", 1101)?;
        self.tell("call 1", 1102)?;
        self.tell("call 2", 2101)?;
        // Another object at the same place has its own.
        self.tell("free 2", 0)?;
        self.tell("new 2", 0)?;
        self.tell("call 2", 2101)?;
        // Away and back: what is attached stays.
        self.done("revert", &[])?;
        self.tell("call 1", 1000)?;
        self.done("apply", &[&first])?;
        self.tell("call 1", 1103)?;
        // A later patch finds it.
        self.done("apply", &[&second])?;
        self.tell("call 1", 1000 + 2 * 104)?;
        self.tell("call 2", 2000 + 2 * 102)?;
        self.tell("call 3", 3000 + 2 * 101)?;
        // Its hook takes it away.
        self.done("revert", &[])?;
        self.tell("call 1", 1000)?;
        self.done("apply", &[&first])?;
        self.tell("call 1", 1101)
    }
}

#[test]
fn a_patch_brings_the_store_along() -> Outcome {
    for inside in [false, true] {
        let mut place = of_c(if inside { "c-inside" } else { "c-outside" }, inside)?;
        place.life()?;
        // One object of eight bytes.
        place.tell("count", 1008)?;
    }
    Ok(())
}

#[test]
fn a_program_with_the_agent_has_the_store() -> Outcome {
    for (name, hold) in [("rust-inside", &[][..]), ("rust-outside", &["--hold"][..])] {
        of_rust(name, hold)?.life()?;
    }
    // What nobody names any more is told.
    let mut place = of_rust("rust-leak", &[])?;
    let first = place.first.clone();
    let shadows = |place: &Place| {
        let status = place.run("status", &[]).expect_code(0)?.json()?;
        Ok::<_, String>(status.get(0).unwrap_or(&status)["shadows"].clone())
    };
    place.tell("new 1", 0)?;
    place.tell("new 2", 0)?;
    place.done("apply", &[&first])?;
    assert_eq!(shadows(&place)?, serde_json::Value::Null);
    place.tell("call 1", 1101)?;
    place.tell("call 2", 2101)?;
    let told = shadows(&place)?;
    let id = 0x5e55_1075_ca11_f1e1_u64;
    let is = |told: &serde_json::Value, names: serde_json::Value| {
        let told = &told[0];
        let same = told["id"] == id && told["objects"] == 2 && told["bytes"] == 16 && told["named_by"] == names;
        same.then_some(()).ok_or_else(|| told.to_string())
    };
    is(&told, serde_json::json!(["first"]))?;
    place.done("revert", &[])?;
    is(&shadows(&place)?, serde_json::json!([]))?;
    let text = run(Command::new(tool("livepatch")).args(["status", &place.pid()]));
    text.expect_code(0)?.expect_prints(&["shadow 0x5e551075ca11f1e1: 2 objects, 16 bytes", "left over"])?;
    Ok(())
}
