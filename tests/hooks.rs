//! Hooks run in the process, on a thread of their own: before and after an apply and a revert; the first may say no. Each test for both ways
//! into a process: from outside, and by an agent.

mod support;

use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use support::inside::{by, Inside};
use support::program::Program;
use support::{build_patch_with, example, root, run, scratch, tool, Ran};

type Outcome = Result<(), String>;

#[derive(Clone, Copy, PartialEq)]
enum Way {
    Outside,
    Inside,
}

enum Target {
    Program(Program),
    Inside(Box<Inside>),
}

struct Place {
    fix: PathBuf,
    target: Target,
}

/// Old build, new build and hooks, and the patch of them.
fn built(name: &str, flags: &[&str], hook_flags: &[&str]) -> Result<(PathBuf, PathBuf), String> {
    let dir = scratch("hooks").join(name);
    std::fs::create_dir_all(&dir).map_err(|e| e.to_string())?;
    let source = |file: &str| root().join("tests/hooks").join(file);
    for version in ["1", "2"] {
        let fixed = ["-g", "-O2", "-w", "-pthread", "-Wl,--emit-relocs", "-Wl,--build-id", "-o"];
        let mut gcc = Command::new("gcc");
        gcc.args(fixed).arg(format!("v{version}")).arg(format!("-DV={version}")).args(flags).arg(source("program.c"));
        run(gcc.current_dir(&dir)).expect_code(0)?;
    }
    let mut gcc = Command::new("gcc");
    gcc.args(["-c", "-O2", "-fPIC", "-w", "-o", "hooks.o"]).args(hook_flags).arg(source("hooks.c"));
    run(gcc.current_dir(&dir)).expect_code(0)?;
    let (fix, hooks) = (dir.join("fix.so"), dir.join("hooks.o"));
    let more = ["--hooks".as_ref(), hooks.as_os_str()];
    build_patch_with(&dir.join("v1"), &dir.join("v2"), &fix, &more).expect_code(0)?;
    Ok((dir.join("v1"), fix))
}

impl Place {
    fn new(name: &str, way: Way) -> Result<Self, String> {
        Self::with_hooks(name, way, &[])
    }

    fn with_hooks(name: &str, way: Way, hook_flags: &[&str]) -> Result<Self, String> {
        let (target, fix) = match way {
            Way::Outside => {
                let (old, fix) = built(&format!("{name}-outside"), &[], hook_flags)?;
                (Target::Program(Program::start(&old)), fix)
            }
            Way::Inside => {
                let name = format!("{name}-inside");
                let (old, fix) = built(&name, &["-DLIBRARY", "-shared", "-fPIC"], hook_flags)?;
                let inside = Inside::start_with(&name, &old, &fix, Command::new(example("inside")));
                (Target::Inside(Box::new(inside)), fix)
            }
        };
        Ok(Self { fix, target })
    }

    fn pid(&self) -> String {
        match &self.target {
            Target::Program(p) => p.pid().to_string(),
            Target::Inside(i) => i.pid.to_string(),
        }
    }

    fn tell(&mut self, line: &str, expected: &str) -> Outcome {
        match &mut self.target {
            Target::Program(p) => p.tell(line, expected),
            Target::Inside(i) => {
                let said = i.ask(line);
                (said == expected).then_some(()).ok_or_else(|| format!("it says {said:?}, expected {expected:?}"))
            }
        }
    }

    /// Runs a command, which an agent must have carried out if there is one.
    fn run(&self, command: &str, more: &[&str]) -> Ran {
        let ran = self.start(command, more);
        if ran.code == 0 && !more.contains(&"--hold") {
            let report = ran.json().unwrap_or_default();
            let by_agent = matches!(self.target, Target::Inside(_));
            assert_eq!(by(&report) == "agent", by_agent, "{}", ran.both());
        }
        ran
    }

    fn start(&self, command: &str, more: &[&str]) -> Ran {
        run(Command::new(tool("livepatch")).args([command, &self.pid(), "--json"]).args(more))
    }

    fn fix(&self) -> &str {
        self.fix.to_str().unwrap_or_default()
    }

    fn apply(&self, more: &[&str]) -> Ran {
        self.run("apply", &[&[self.fix()], more].concat())
    }

    /// Mappings of patches and hooks.
    fn maps(&self) -> Result<usize, String> {
        let maps = std::fs::read_to_string(format!("/proc/{}/maps", self.pid())).map_err(|e| e.to_string())?;
        // Stacks and heaps of threads come and go.
        Ok(maps.lines().filter(|l| l.contains("r-xp") && l.ends_with(" 0 ")).count())
    }

    /// Runs a command until it ends with 0: what stood in its way is on its way out.
    fn until_done(&self, command: &str, more: &[&str]) -> Outcome {
        let until = Instant::now() + Duration::from_secs(20);
        loop {
            let ran = self.run(command, more);
            if ran.code == 0 || Instant::now() > until {
                return ran.expect_code(0).map(drop);
            }
        }
    }
}

/// The program whose hooks are written with the attribute: nothing of livepatch is linked to it but what the attribute wrote.
fn in_rust(name: &str, way: Way, more: &[&str]) -> Result<Place, String> {
    let name = format!("{name}-{}", if way == Way::Inside { "inside" } else { "outside" });
    let dir = scratch("hooks").join(&name);
    let deps = tool("livepatch").with_file_name("deps");
    let macros = std::fs::read_dir(&deps).map_err(|e| format!("{}: {e}", deps.display()))?.flatten().map(|f| f.path());
    let named =
        |p: &PathBuf| p.to_string_lossy().contains("liblivepatch_macros-") && p.extension().is_some_and(|e| e == "so");
    let newest = |p: &PathBuf| p.metadata().and_then(|m| m.modified()).ok();
    let macros = macros.filter(named).max_by_key(newest).ok_or("the macros are not built")?;
    for version in ["old", "new"] {
        std::fs::create_dir_all(dir.join(version)).map_err(|e| e.to_string())?;
        let mut rustc = Command::new("rustc");
        rustc
            .current_dir(dir.join(version))
            .arg(root().join("tests/hooks/rust.rs"))
            .args(["--cfg", version, "-o", "it"]);
        rustc.args(["--edition=2021", "-g", "-O", "-Csymbol-mangling-version=v0", "-Ccodegen-units=1", "-Awarnings"]);
        rustc.args(["--crate-name=it", "-Clink-arg=-Wl,--emit-relocs,--build-id"]);
        rustc.arg("--extern").arg(format!("livepatch={}", macros.display()));
        rustc.args(more);
        if way == Way::Inside {
            rustc.args(["--cfg=library", "--crate-type=cdylib"]);
        }
        run(&mut rustc).expect_code(0)?;
    }
    let [old, new] = ["old", "new"].map(|v| dir.join(v).join("it"));
    let fix = dir.join("fix.so");
    build_patch_with(&old, &new, &fix, &[]).expect_code(0)?;
    let target = match way {
        Way::Outside => Target::Program(Program::start(&old)),
        Way::Inside => Target::Inside(Box::new(Inside::start_with(&name, &old, &fix, Command::new(example("inside"))))),
    };
    Ok(Place { fix, target })
}

fn both(name: &str, test: impl Fn(Place) -> Outcome) -> Outcome {
    for way in [Way::Outside, Way::Inside] {
        test(Place::new(name, way)?)?;
    }
    Ok(())
}

fn warns(ran: &Ran, text: &str) -> Outcome {
    let report = ran.json()?;
    let report = report.get(0).unwrap_or(&report);
    let warnings = report["warnings"].to_string();
    warnings.contains(text).then_some(()).ok_or_else(|| format!("no {text:?} in {warnings}\n{}", ran.both()))
}

#[test]
fn hooks_run_around_apply_and_revert() -> Outcome {
    both("around", |mut p| {
        p.tell("?", "v1 -")?;
        p.apply(&[]).expect_code(0)?;
        p.tell("?", "v2 -aA")?;
        p.run("revert", &[]).expect_code(0)?;
        p.tell("?", "v1 -aArR")?;
        let before = p.maps()?;
        for _ in 0..5 {
            p.apply(&[]).expect_code(0)?;
            p.run("revert", &[]).expect_code(0)?;
        }
        assert_eq!(p.maps()?, before, "nothing of the hooks is left");
        p.tell("?", "v1 -aArRaArRaArRaArRaArRaArR")
    })
}

#[test]
fn what_may_not_refuse_is_told() -> Outcome {
    both("told", |mut p| {
        p.tell("mode 6", "v1 -")?;
        let ran = p.apply(&[]);
        warns(&ran, "the hook livepatch_post_apply failed: the cache is cold")?;
        p.tell("mode 6", "v2 -aA")?;
        let ran = p.run("revert", &[]);
        warns(&ran, "the hook livepatch_pre_revert failed: it returned 5")?;
        p.tell("mode 7", "v1 -aArR")?;
        let ran = p.apply(&[]);
        warns(&ran, "the hook livepatch_post_apply failed: it returned 4")
    })
}

#[test]
fn the_first_hook_may_say_no() -> Outcome {
    both("no", |mut p| {
        p.tell("mode 1", "v1 -")?;
        let before = p.maps()?;
        p.apply(&[]).expect_code(3)?.expect_says(&["livepatch_pre_apply says no", "returned 7"])?;
        // A mapping whose unwind tables are registered waits for the next attempt.
        let waits = p.maps()?;
        assert!(waits == before || matches!(p.target, Target::Inside(_)), "{before}, then {waits}");
        for _ in 0..2 {
            p.apply(&[]).expect_code(3)?.expect_says(&["livepatch_pre_apply says no", "returned 7"])?;
        }
        p.tell("mode 2", "v1 -aaa")?;
        // In its own words, on one line, whatever bytes these are.
        let why = "livepatch_pre_apply says no: no limits are loaded (ask  [31mtrading )";
        p.apply(&[]).expect_code(3)?.expect_says(&[why])?;
        p.tell("mode 8", "v1 -aaaa")?;
        p.apply(&[]).expect_code(3)?.expect_says(&["says no: xxxxxxxx"])?;
        assert_eq!(p.maps()?, waits, "nothing more is left");
        p.tell("mode 0", "v1 -aaaaa")?;
        p.apply(&[]).expect_code(0)?;
        p.tell("?", "v2 -aaaaaaA")
    })
}

#[test]
fn a_hook_that_does_not_return_is_left_alone() -> Outcome {
    both("late", |mut p| {
        p.tell("mode 3", "v1 -")?;
        p.apply(&["--timeout", "500ms"]).expect_code(4)?.expect_says(&["livepatch_pre_apply had not returned"])?;
        p.tell("?", "v1 -a")?;
        // While it runs, its code stays.
        p.apply(&["--timeout", "500ms"]).expect_code(4)?.expect_says(&["a hook of fix still runs"])?;
        p.start("status", &[]).expect_code(0)?;
        p.tell("mode 0", "v1 -a")?;
        // It returns, and is called anew.
        let fix = p.fix().to_owned();
        p.until_done("apply", &[&fix])?;
        p.tell("?", "v2 -a.aA")
    })
}

#[test]
fn a_later_hook_that_does_not_return_is_waited_for_by_the_next() -> Outcome {
    both("later", |mut p| {
        p.tell("mode 9", "v1 -")?;
        let ran = p.apply(&["--timeout", "500ms"]);
        warns(ran.expect_code(0)?, "livepatch_post_apply failed: it had not returned by the deadline, and runs on")?;
        p.tell("?", "v2 -aA")?;
        // A thread is in the patch.
        p.run("revert", &["--timeout", "500ms"]).expect_code(4)?;
        p.tell("mode 0", "v2 -aA")?;
        p.until_done("revert", &[])?;
        p.tell("?", "v1 -aA.rR")
    })
}

#[test]
fn a_hook_may_end_its_thread() -> Outcome {
    both("ends", |mut p| {
        p.tell("mode 4", "v1 -")?;
        let ended = "livepatch_pre_apply says no: it ended its thread";
        p.apply(&[]).expect_code(3)?.expect_says(&[ended])?;
        p.tell("mode 0", "v1 -a")?;
        p.apply(&[]).expect_code(0)?;
        p.tell("?", "v2 -aaA")
    })
}

#[test]
fn a_fault_in_a_hook_ends_the_process() -> Outcome {
    both("fault", |mut p| {
        p.tell("mode 5", "v1 -")?;
        let ran = p.apply(&[]);
        assert_ne!(ran.code, 0, "{}", ran.both());
        let deadline = Instant::now() + Duration::from_secs(10);
        let dead = |pid: &str| {
            let state = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
            state.rsplit(") ").next().is_none_or(|s| s.is_empty() || s.starts_with('Z') || s.starts_with('X'))
        };
        while !dead(&p.pid()) {
            assert!(Instant::now() < deadline, "it lives on");
            std::thread::sleep(Duration::from_millis(5));
        }
        Ok(())
    })
}

#[test]
fn a_command_may_die_while_a_hook_runs() -> Outcome {
    both("killed", |mut p| {
        p.tell("mode 3", "v1 -")?;
        let mut command = Command::new(tool("livepatch"));
        command.args(["apply", &p.pid(), p.fix(), "--timeout", "20s"]).stdout(Stdio::null()).stderr(Stdio::null());
        let mut command = command.spawn().map_err(|e| e.to_string())?;
        let until = Instant::now() + Duration::from_secs(10);
        while p.tell("?", "v1 -a").is_err() {
            assert!(Instant::now() < until, "the hook does not begin");
        }
        command.kill().map_err(|e| e.to_string())?;
        command.wait().map_err(|e| e.to_string())?;
        p.tell("?", "v1 -a")?;
        p.tell("mode 0", "v1 -a")?;
        let fix = p.fix().to_owned();
        match p.target {
            // The hook runs to its end, the apply does not go on.
            Target::Program(_) => {
                p.until_done("apply", &[&fix])?;
                p.tell("?", "v2 -a.aA")
            }
            // The agent goes on with what was asked.
            Target::Inside(_) => {
                let ran = p.apply(&[]);
                assert_eq!(ran.json()?["already"], true, "{}", ran.both());
                p.tell("?", "v2 -a.A")
            }
        }
    })
}

#[test]
fn what_the_first_hook_did_is_undone_when_the_apply_fails() -> Outcome {
    both("undone", |mut p| {
        p.tell("stay", "v1 -")?;
        p.apply(&["--timeout", "300ms"]).expect_code(4)?.expect_says(&["version"])?;
        p.tell("mode 10", "v1 -aR")?;
        let ran = p.apply(&["--timeout", "300ms"]);
        ran.expect_code(4)?.expect_says(&["version", "the hook livepatch_post_revert failed: it returned 8"])?;
        p.tell("leave", "v1 -aRaR")?;
        p.apply(&[]).expect_code(0)?;
        p.tell("?", "v2 -aRaRaA")
    })
}

#[test]
fn hooks_that_need_an_agent() -> Outcome {
    let p = Place::with_hooks("need", Way::Outside, &["-DAGENT"])?;
    p.apply(&[]).expect_code(3)?.expect_says(&["an agent in the process", "livepatch_pre_apply"])?;
    let p = in_rust("need-rust", Way::Outside, &["--cfg=agent"])?;
    p.apply(&[]).expect_code(3)?.expect_says(&["an agent in the process", "livepatch_pre_apply"])?;
    let mut p = Place::with_hooks("need", Way::Inside, &["-DAGENT"])?;
    p.apply(&["--hold"]).expect_code(3)?.expect_says(&["an agent in the process"])?;
    p.tell("?", "v1 -")?;
    p.apply(&[]).expect_code(0)?;
    p.tell("?", "v2 -aA")?;
    p.run("revert", &[]).expect_code(0)?;
    p.tell("?", "v1 -aArR")
}

#[test]
fn each_way_reverts_what_the_other_applied() -> Outcome {
    let mut p = Place::new("mixed", Way::Inside)?;
    p.apply(&["--hold"]).expect_code(0)?;
    p.tell("?", "v2 -aA")?;
    p.run("revert", &[]).expect_code(0)?;
    p.tell("?", "v1 -aArR")?;
    p.apply(&[]).expect_code(0)?;
    p.run("revert", &["--hold"]).expect_code(0)?;
    p.tell("?", "v1 -aArRaArR")
}

#[test]
fn what_nobody_confirms_is_reverted_with_its_hooks() -> Outcome {
    let mut p = Place::new("confirm", Way::Inside)?;
    p.apply(&["--confirm-within", "1s"]).expect_code(0)?;
    let until = Instant::now() + Duration::from_secs(20);
    while p.tell("?", "v1 -aArR").is_err() {
        assert!(Instant::now() < until, "it is not reverted");
        std::thread::sleep(Duration::from_millis(20));
    }
    Ok(())
}

#[test]
fn hooks_of_the_attribute_say_no_in_words_and_may_panic() -> Outcome {
    for way in [Way::Outside, Way::Inside] {
        let mut p = in_rust("attribute", way, &[])?;
        p.tell("mode 1", "v1 0")?;
        let why = "livepatch_pre_apply says no: no limits are loaded: größer als nötig: ";
        p.apply(&[]).expect_code(3)?.expect_says(&[why])?;
        p.tell("mode 2", "v1 1")?;
        p.apply(&[]).expect_code(3)?.expect_says(&["says no: it panicked: index 2 of 0"])?;
        // What is too long is cut off between two characters.
        p.tell("mode 3", "v1 2")?;
        let ran = p.apply(&[]);
        ran.expect_code(3)?.expect_says(&["says no: äää", "ää: "])?;
        assert!(!ran.both().contains(char::REPLACEMENT_CHARACTER), "{}", ran.both());
        p.tell("mode 4", "v1 3")?;
        let ran = p.apply(&[]);
        warns(ran.expect_code(0)?, "the hook livepatch_post_apply failed: the cache is cold: 4")?;
        p.tell("?", "v2 14")?;
        let ran = p.run("revert", &[]);
        warns(ran.expect_code(0)?, "the hook livepatch_pre_revert failed: it panicked: not warm")?;
        p.tell("mode 0", "v1 1114")?;
        p.apply(&[]).expect_code(0)?;
        p.tell("?", "v2 1125")?;
    }
    Ok(())
}
