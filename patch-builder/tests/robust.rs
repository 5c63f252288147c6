//! patch-builder as a library, on real builds: the same bytes twice, refusals
//! that can be overruled, and inputs with damage.

use std::path::{Path, PathBuf};
use std::process::Command;

use livepatch::patch::PatchFile;
use patch_builder::{run, Options};
use proptest::prelude::*;
use proptest::test_runner::{Config, TestRunner};

const SOURCE: &str = r#"
#include <stdio.h>
#include <stdlib.h>
long limit = LIMIT;
static long calls;
__attribute__((noinline)) static const char *side(int s)
{
    switch (s) { case 1: return "buy"; case 2: return "sell"; case 3: return "short"; case 4: return "cross"; case 5: return "quote"; }
    return "none";
}
__attribute__((noinline)) long fee(long n, int s)
{
    calls++;
    printf("%s %ld\n", side(s), calls);
    return n * FACTOR + limit;
}
int main(int argc, char **argv) { return (int)fee(argc, atoi(argv[argc - 1])); }
"#;

/// Builds one version at one path, so that nothing but the definitions differs.
fn build(folder: &Path, name: &str, definitions: &[&str]) -> PathBuf {
    let source = folder.join("main.c");
    std::fs::write(&source, SOURCE).expect("the folder is writable");
    let out = folder.join(name);
    let status = Command::new("gcc")
        .args(["-g", "-O2", "-Wl,--emit-relocs", "-Wl,--build-id"])
        .args(definitions)
        .arg("-o")
        .arg(&out)
        .arg(&source)
        .status()
        .expect("gcc runs");
    assert!(status.success(), "gcc failed on {definitions:?}");
    out
}

fn folder(name: &str) -> PathBuf {
    let path = std::env::temp_dir().join(format!("patch-builder-{name}-{}", std::process::id()));
    std::fs::create_dir_all(&path).expect("the temporary folder is writable");
    path
}

fn options(old: &Path, new: &Path) -> Options {
    Options { old: old.to_owned(), new: new.to_owned(), name: "fix".into(), ..Options::default() }
}

#[test]
fn the_output_is_the_same_bytes_each_time() {
    let dir = folder("twice");
    let (old, new) =
        (build(&dir, "old", &["-DLIMIT=1", "-DFACTOR=3"]), build(&dir, "new", &["-DLIMIT=1", "-DFACTOR=5"]));
    let patches: Vec<_> =
        (0..3).map(|_| run(&options(&old, &new)).expect("they differ").patch.expect("a patch")).collect();
    assert_eq!(patches[0], patches[1]);
    assert_eq!(patches[0], patches[2]);
    let patch = PatchFile::parse(&patches[0]).expect("it reads back");
    let names: Vec<_> = patch.manifest.functions.iter().map(|f| f.name.as_str()).collect();
    assert_eq!(names, ["fee"]);
    assert!(patch.manifest.statics.is_empty(), "`calls` and `limit` are the old image's");
    std::fs::remove_dir_all(dir).expect("the folder can be removed");
}

#[test]
fn a_changed_initial_value_is_refused_unless_somebody_allows_it() {
    let dir = folder("allow");
    let (old, new) =
        (build(&dir, "old", &["-DLIMIT=1", "-DFACTOR=3"]), build(&dir, "new", &["-DLIMIT=2", "-DFACTOR=5"]));
    let refused = run(&options(&old, &new)).expect("they differ");
    assert!(refused.patch.is_none());
    let [refusal] = &refused.report.refusals[..] else { panic!("{:?}", refused.report.refusals) };
    assert_eq!((refusal.rule.as_str(), refusal.symbol.as_str()), ("initial-value", "limit"));
    assert!(refusal.remedy.contains("--allow 'initial-value:limit'"), "{}", refusal.remedy);
    for (allow, passes) in
        [("initial-value:limit", true), ("initial-value", true), ("initial-value:calls", false), ("icf", false)]
    {
        let outcome = run(&Options { allow: vec![allow.into()], ..options(&old, &new) }).expect("they differ");
        assert_eq!(outcome.patch.is_some(), passes, "{allow}");
        if let Some(bytes) = outcome.patch {
            let patch = PatchFile::parse(&bytes).expect("it reads back");
            assert_eq!(patch.manifest.allowances, ["initial-value:limit"]);
        }
    }
    std::fs::remove_dir_all(dir).expect("the folder can be removed");
}

/// Damage in an input or in a patch gives an error, a refusal or a patch that reads back; never a panic.
#[test]
fn damage_is_an_error_and_never_a_panic() {
    let dir = folder("damage");
    let (old, new) =
        (build(&dir, "old", &["-DLIMIT=1", "-DFACTOR=3"]), build(&dir, "new", &["-DLIMIT=1", "-DFACTOR=5"]));
    let good = std::fs::read(&old).expect("it was just built");
    let patch = run(&options(&old, &new)).expect("they differ").patch.expect("a patch");
    let damaged = dir.join("damaged");
    let mut runner = TestRunner::new(Config { cases: 300, failure_persistence: None, ..Config::default() });
    let edits = proptest::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..12);
    let strategy = (edits, proptest::option::weighted(0.2, any::<prop::sample::Index>()));
    let verdict = runner.run(&strategy, |(edits, cut)| {
        let damage = |bytes: &[u8]| {
            let mut bytes = bytes.to_vec();
            for (at, value) in &edits {
                let at = at.index(bytes.len());
                bytes[at] = *value;
            }
            if let Some(cut) = cut {
                bytes.truncate(cut.index(bytes.len()));
            }
            bytes
        };
        let _ = PatchFile::parse(&damage(&patch));
        std::fs::write(&damaged, damage(&good)).expect("the folder is writable");
        for (a, b) in [(&damaged, &new), (&old, &damaged)] {
            if let Some(bytes) = run(&options(a, b)).ok().and_then(|o| o.patch) {
                prop_assert!(PatchFile::parse(&bytes).is_ok());
            }
        }
        Ok(())
    });
    std::fs::remove_dir_all(dir).expect("the folder can be removed");
    verdict.expect("no damage may panic");
}

#[test]
fn what_fuzzing_found_stays_mended() {
    use patch_builder::build::Build;
    use patch_builder::side::Side;

    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/fuzz/regressions/elf");
    let mut seen = 0;
    for entry in std::fs::read_dir(&dir).expect("tests/fuzz/regressions/elf").map(|e| e.expect("an entry").path()) {
        let bytes = std::fs::read(&entry).expect("a finding");
        seen += 1;
        // Most are refused as damaged by now; none may panic.
        if let Ok(build) = Build::parse("fuzz", &bytes) {
            let side = Side::new(build);
            assert!(!side.lifted.is_empty(), "{}: nothing was lifted", entry.display());
        }
    }
    assert!(seen > 0, "no finding in {}", dir.display());
    // Line tables with addresses and file numbers that no table has.
    let dir = dir.with_file_name("lines");
    for entry in std::fs::read_dir(&dir).expect("tests/fuzz/regressions/lines").map(|e| e.expect("an entry").path()) {
        let bytes = std::fs::read(&entry).expect("a finding");
        let lines = patch_builder::build::Lines::load(&bytes, &[(0, u64::MAX / 2)]);
        assert!(lines.present, "{}: its units are not read any more", entry.display());
    }
}

/// The place of a relocation of a jump table, and of a slot of the import table, moved by bits: found by fuzzing.
#[test]
fn a_relocation_that_contradicts_the_image_is_damage() {
    use object::{Object as _, ObjectSection as _};
    use patch_builder::build::Build;

    let good = std::fs::read(Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/fuzz/pairs/new")).expect("the pair");
    assert!(Build::parse("good", &good).is_ok());
    let file = object::File::parse(&*good).expect("an ELF file");
    for (section, byte, bits) in [
        (".rela.rodata", 0, 0xff),
        (".rela.rodata", 2, 0xbf),
        (".rela.rodata", 5, 0xf5),
        (".rela.plt", 0, 1),
        (".rela.plt", 0, 8),
    ] {
        let (at, _) = file.section_by_name(section).and_then(|s| s.file_range()).expect(section);
        let mut bytes = good.clone();
        bytes[at as usize + byte] ^= bits;
        let error = Build::parse("damaged", &bytes).err().map(|e| e.to_string());
        assert!(error.as_ref().is_some_and(|e| e.contains("damaged")), "{section}+{byte} ^ {bits:#x}: {error:?}");
    }
}
