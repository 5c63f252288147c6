//! Whose patches a host takes: signed, altered, by another key, of an older revision.

mod support;

use std::path::{Path, PathBuf};
use std::process::Command;

use support::program::Program;
use support::{build_patch, livepatch, run, scratch, tool, Ran};

type Outcome = Result<(), String>;

const SOURCE: &str = r#"
#include <stdio.h>
__attribute__((noipa)) long fee(long n) { return n + V; }
int main(void)
{
    char line[64];
    for (long n = 1; fgets(line, sizeof line, stdin); n++) { printf("%ld %ld\n", n, fee(0)); fflush(stdout); }
    return 0;
}
"#;

fn builder(args: &[&str]) -> Ran {
    run(Command::new(tool("patch-builder")).args(args))
}

struct Place {
    dir: PathBuf,
    program: Program,
}

impl Place {
    fn new(name: &str) -> Result<Self, String> {
        let dir = scratch("signatures").join(name);
        let _ = std::fs::remove_dir_all(&dir);
        std::fs::create_dir_all(&dir).map_err(|e| e.to_string())?;
        std::fs::write(dir.join("fee.c"), SOURCE).map_err(|e| e.to_string())?;
        for version in ["1", "2", "3"] {
            let flags = ["-g", "-O2", "-Wl,--emit-relocs", "-Wl,--build-id", "fee.c", "-o"];
            let mut command = Command::new("gcc");
            command.args(flags).arg(format!("v{version}")).arg(format!("-DV={version}"));
            run(command.current_dir(&dir)).expect_code(0)?;
        }
        for version in ["2", "3"] {
            let fix = dir.join(format!("fix{version}.so"));
            build_patch(&dir.join("v1"), &dir.join(format!("v{version}")), &fix).expect_code(0)?;
        }
        let program = Program::start(&dir.join("v1"));
        let place = Self { dir, program };
        for key in ["desk", "stranger"] {
            builder(&["keygen", &place.path(key), "--no-password"]).expect_code(0)?;
        }
        Ok(place)
    }

    fn path(&self, name: &str) -> String {
        self.dir.join(name).display().to_string()
    }

    fn sign(&self, fix: &str, key: &str, more: &[&str]) -> Result<(), String> {
        let (fix, key) = (self.path(fix), self.path(key));
        builder(&[&["sign", &fix, "--no-password", "--key", &key], more].concat()).expect_code(0).map(drop)
    }

    fn run(&self, command: &str, fix: Option<&str>, more: &[&str]) -> Ran {
        let (pid, fix) = (self.program.pid().to_string(), fix.map(|f| self.path(f)));
        let args: Vec<&str> = [command, &pid].into_iter().chain(fix.as_deref()).chain(more.iter().copied()).collect();
        livepatch(&args)
    }
}

#[test]
fn only_a_patch_that_a_known_key_signed_goes_in() -> Outcome {
    let mut p = Place::new("known")?;
    let (keys, fix) = (p.path("desk.pub"), p.path("fix2.so"));
    let asked = ["--require-signature", "--keys", &keys];
    let refused = |p: &mut Place, words: &[&str]| -> Outcome {
        for command in ["check", "apply"] {
            p.run(command, Some("fix2.so"), &asked).expect_code(3)?.expect_says(words)?;
        }
        builder(&["verify", &fix, "--key", &keys]).expect_code(3)?.expect_says(words)?;
        p.program.ask("1")
    };
    refused(&mut p, &["not signed"])?;
    p.sign("fix2.so", "stranger.key", &[])?;
    refused(&mut p, &["no known key (desk)"])?;
    p.sign("fix3.so", "desk.key", &[])?;
    std::fs::copy(p.dir.join("fix3.so.minisig"), p.dir.join("fix2.so.minisig")).map_err(|e| e.to_string())?;
    refused(&mut p, &["altered"])?;
    p.sign("fix2.so", "desk.key", &["--comment", "INC-7"])?;
    let signature = p.dir.join("fix2.so.minisig");
    let text = std::fs::read_to_string(&signature).map_err(|e| e.to_string())?;
    for (damaged, words) in [
        (text.replace("INC-7", "INC-8"), "altered"),
        (text[..text.len() / 2].to_owned(), "no signature"),
        (String::new(), "no signature"),
    ] {
        std::fs::write(&signature, damaged).map_err(|e| e.to_string())?;
        refused(&mut p, &[words])?;
    }
    std::fs::write(&signature, text).map_err(|e| e.to_string())?;
    builder(&["verify", &fix, "--key", &keys]).expect_code(0)?.expect_prints(&["signed by desk", "INC-7"])?;
    p.run("apply", Some("fix2.so"), &asked).expect_code(0)?;
    p.program.ask("2")?;
    p.run("revert", None, &[]).expect_code(0)?;
    p.program.finish()
}

#[test]
fn the_policy_of_the_host_goes_first() -> Outcome {
    let mut p = Place::new("policy")?;
    std::fs::create_dir(p.dir.join("keys")).map_err(|e| e.to_string())?;
    let policy = p.path("policy.toml");
    let write = |text: &str| std::fs::write(Path::new(&policy), text).map_err(|e| e.to_string());
    let stranger = p.path("stranger.pub");
    let by_policy = ["--policy", &policy];
    write("require-signature = true\n")?;
    p.run("apply", Some("fix2.so"), &by_policy).expect_code(3)?.expect_says(&["no key"])?;
    write(&format!("require-signature = true\nkeys = \"{}\"\n", p.path("keys")))?;
    p.run("apply", Some("fix2.so"), &by_policy).expect_code(3)?.expect_says(&["no public key"])?;
    std::fs::copy(p.dir.join("desk.pub"), p.dir.join("keys/desk.pub")).map_err(|e| e.to_string())?;
    p.sign("fix2.so", "stranger.key", &[])?;
    // A key of the caller's own does not open the door.
    p.run("apply", Some("fix2.so"), &["--policy", &policy, "--keys", &stranger])
        .expect_code(3)?
        .expect_says(&["desk"])?;
    write("require-signatures = true\n")?;
    p.run("apply", Some("fix2.so"), &by_policy).expect_code(1)?.expect_says(&["require-signatures"])?;
    p.program.ask("1")?;
    p.program.finish()
}

#[test]
fn an_older_revision_is_a_replay() -> Outcome {
    let mut p = Place::new("replay")?;
    let keys = p.path("desk.pub");
    let asked = ["--require-signature", "--keys", &keys];
    p.sign("fix3.so", "desk.key", &["--revision", "3"])?;
    p.sign("fix2.so", "desk.key", &["--revision", "2"])?;
    p.run("apply", Some("fix3.so"), &asked).expect_code(0)?;
    p.program.ask("3")?;
    p.run("revert", None, &[]).expect_code(0)?;
    p.run("apply", Some("fix2.so"), &asked).expect_code(3)?.expect_says(&["revision 2", "seen revision 3"])?;
    p.program.ask("1")?;
    p.run("apply", Some("fix3.so"), &asked).expect_code(0)?;
    p.program.ask("3")?;
    p.run("revert", None, &[]).expect_code(0)?;
    p.sign("fix2.so", "desk.key", &[])?;
    p.run("apply", Some("fix2.so"), &asked).expect_code(3)?.expect_says(&["no revision"])?;
    p.run("apply", Some("fix2.so"), &[&asked[..], &["--allow", "replay"]].concat()).expect_code(0)?;
    p.program.ask("2")?;
    p.program.finish()
}

#[test]
fn a_secret_key_may_have_a_password() -> Outcome {
    let p = Place::new("password")?;
    let (key, secret) = (p.path("guarded"), p.path("secret.txt"));
    std::fs::write(&secret, "correct horse\n").map_err(|e| e.to_string())?;
    builder(&["keygen", &key, "--password-file", &secret]).expect_code(0)?;
    builder(&["keygen", &key, "--password-file", &secret]).expect_code(1)?.expect_says(&["is there already"])?;
    let (fix, key) = (p.path("fix2.so"), p.path("guarded.key"));
    let mode =
        std::os::unix::fs::PermissionsExt::mode(&std::fs::metadata(&key).map_err(|e| e.to_string())?.permissions());
    assert_eq!(mode & 0o777, 0o600);
    builder(&["sign", &fix, "--key", &key, "--password-file", &secret]).expect_code(0)?;
    builder(&["verify", &fix, "--key", &p.path("guarded.pub"), "--json"])
        .expect_code(0)?
        .expect_prints(&["\"key\":\"guarded\""])?;
    std::fs::write(&secret, "wrong\n").map_err(|e| e.to_string())?;
    builder(&["sign", &fix, "--key", &key, "--password-file", &secret]).expect_code(1)?;
    builder(&["sign", &key, "--key", &key, "--no-password"]).expect_code(1)?;
    Ok(())
}
