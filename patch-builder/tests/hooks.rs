//! Objects with hooks, and patches after patches, on real builds: what each reference of a hook leads to, and what is refused.

use std::path::{Path, PathBuf};
use std::process::Command;

use livepatch::patch::{in_chain, HookKind, PatchFile, RelocTarget};
use object::{Object, ObjectSymbol};
use patch_builder::{run, Options, Outcome};

const PROGRAM: &str = r#"
#include <stdio.h>
#define KEEP __attribute__((noipa))
long limit = 100;
KEEP long plain(long n) { return n + limit; }
#ifdef NEW
volatile long fresh;
KEEP long fee(long n) { return plain(n) + ++fresh; }
#else
KEEP long fee(long n) { return plain(n) + 1; }
#endif
int main(int argc, char **argv) { (void)argv; return printf("%ld\n", fee(argc)); }
"#;

struct Folder(PathBuf);

impl Folder {
    fn new(name: &str) -> Self {
        let path = std::env::temp_dir().join(format!("patch-builder-hooks-{name}-{}", std::process::id()));
        std::fs::create_dir_all(&path).expect("the temporary folder is writable");
        Self(path)
    }

    fn write(&self, name: &str, text: &str) -> PathBuf {
        let path = self.0.join(name);
        std::fs::write(&path, text).expect("the folder is writable");
        path
    }

    fn run(&self, program: &str, args: &[&str]) {
        let status = Command::new(program).args(args).current_dir(&self.0).status();
        assert!(status.is_ok_and(|s| s.success()), "{program} {args:?} failed");
    }

    fn programs(&self) -> Options {
        self.write("main.c", PROGRAM);
        let flags = ["-g", "-O2", "-Wl,--emit-relocs", "-Wl,--build-id", "main.c", "-o"];
        self.run("gcc", &[&flags[..], &["old"]].concat());
        self.run("gcc", &[&flags[..], &["new", "-DNEW"]].concat());
        let (old, new) = (self.0.join("old"), self.0.join("new"));
        Options { old, new, name: "fix".into(), ..Options::default() }
    }

    fn with_hooks(&self, compiler: &str, args: &[&str], name: &str, text: &str) -> Outcome {
        self.write(name, text);
        self.run(compiler, &[args, &[name, "-o", "hooks.o"]].concat());
        let hooks = Some(self.0.join("hooks.o"));
        run(&Options { hooks, ..self.programs() }).expect("they differ")
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

fn patch(outcome: &Outcome) -> PatchFile {
    assert!(outcome.report.refusals.is_empty(), "{:?}", outcome.report.refusals);
    PatchFile::parse(outcome.patch.as_ref().expect("a patch")).expect("it reads back")
}

fn address(program: &Path, symbol: &str) -> u64 {
    let bytes = std::fs::read(program).expect("a program");
    let file = object::File::parse(&*bytes).expect("ELF");
    let found = file.symbols().find(|s| s.name() == Ok(symbol) && s.is_definition());
    found.unwrap_or_else(|| panic!("no {symbol}")).address()
}

fn rules(outcome: &Outcome) -> Vec<(&str, &str)> {
    assert!(outcome.patch.is_none());
    outcome.report.refusals.iter().map(|r| (r.rule.as_str(), r.symbol.as_str())).collect()
}

const C_ARGS: [&str; 3] = ["-c", "-O2", "-fPIC"];

#[test]
fn what_a_hook_refers_to_is_bound_to_the_old_image_the_patch_and_the_libraries() {
    let folder = Folder::new("bound");
    let text = r#"
extern long limit; extern volatile long fresh; extern long plain(long); extern int printf(const char *, ...);
static long own = 7;
static long (*volatile kept)(long) = plain;
__attribute__((noinline)) static long helper(long x) { return x * own; }
int livepatch_pre_apply(void) { limit += helper(3); fresh = kept(1); return printf("%d\n", 5) < 0; }
int livepatch_post_revert(void) { return own++ < 0; }
int nobody_reaches_this_data = 5;
"#;
    let outcome = folder.with_hooks("gcc", &C_ARGS, "hooks.c", text);
    let patch = patch(&outcome);
    let old = folder.0.join("old");
    let m = &patch.manifest;
    let kinds: Vec<_> = m.hooks.iter().map(|h| (h.kind, h.symbol.as_str(), h.agent)).collect();
    let expected = [HookKind::PreApply, HookKind::PostRevert].map(|k| (k, k.symbol(), false));
    assert_eq!(kinds, expected);
    for h in &m.hooks {
        let function = m.functions.iter().find(|f| f.name == h.symbol).expect("a function of this name");
        assert_eq!((function.new_at, function.old.is_none()), (h.at, true));
    }
    let images: Vec<u64> = patch
        .relocs
        .iter()
        .filter_map(|r| match r.target {
            RelocTarget::Image(at) => Some(at.0),
            _ => None,
        })
        .collect();
    for symbol in ["limit", "plain"] {
        assert!(images.contains(&address(&old, symbol)), "no reference to the old {symbol}");
    }
    assert!(m.imports.is_empty(), "printf is the old image's: {:?}", m.imports);
    let statics: Vec<&str> = m.statics.iter().map(|s| s.name.as_str()).collect();
    for name in ["fresh", "own", "kept"] {
        assert!(statics.contains(&name), "{name} is not in {statics:?}");
    }
    assert!(!statics.contains(&"nobody_reaches_this_data"), "{statics:?}");
    assert_eq!(statics.iter().filter(|s| **s == "fresh").count(), 1, "the patch and its hooks share it");
    // The unwind table has an entry for each function, hooks and helper included: 12 bytes in each at least.
    let (_, len) = patch.eh_frame.expect("an unwind table");
    assert!(len > 12 * m.functions.len() as u64);
}

#[test]
fn a_hook_in_rust_is_linked_and_can_ask_for_the_agent() {
    let folder = Folder::new("rust");
    let text = r#"
#![no_std]
#[panic_handler] fn panic(_: &core::panic::PanicInfo) -> ! { loop {} }
extern "C" { static mut limit: i64; fn plain(n: i64) -> i64; }
#[no_mangle] pub static livepatch_hooks_need_agent: u8 = 1;
#[no_mangle] pub extern "C" fn livepatch_post_apply() -> i32 { unsafe { limit = plain(limit); } 0 }
"#;
    let args = ["--edition", "2021", "--crate-type", "lib", "--emit=obj", "-O", "-Cpanic=abort"];
    let outcome = folder.with_hooks("rustc", &args, "hooks.rs", text);
    let patch = patch(&outcome);
    let hooks: Vec<_> = patch.manifest.hooks.iter().map(|h| (h.kind, h.agent)).collect();
    assert_eq!(hooks, [(HookKind::PostApply, true)]);
}

#[test]
fn what_nothing_defines_and_what_cannot_be_linked_is_refused_by_name() {
    let folder = Folder::new("refused");
    let cases = [
        ("int gone(void); int livepatch_pre_apply(void) { return gone(); }", "gone"),
        ("static __thread int t; int livepatch_pre_apply(void) { return ++t; }", ".tbss"),
        ("int pre_apply(void) { return 0; }", "pre_apply"),
    ];
    for (text, symbol) in cases {
        let outcome = folder.with_hooks("gcc", &C_ARGS, "hooks.c", text);
        let rules = rules(&outcome);
        assert!(rules.iter().all(|(rule, _)| *rule == "hook"), "{rules:?}");
        assert!(rules.iter().any(|(_, s)| *s == symbol || symbol == ".tbss"), "{rules:?}");
    }
    // Exceptions need a personality that a program in C does not have.
    let text = "extern \"C\" { long plain(long); int livepatch_pre_apply() { try { return plain(1) < 0; } catch (...) { return 1; } } }";
    let outcome = folder.with_hooks("g++", &C_ARGS, "hooks.cc", text);
    let rules = rules(&outcome);
    assert!(rules.iter().any(|(rule, s)| *rule == "hook" && s.contains("gxx_personality")), "{rules:?}");
}

#[test]
fn what_is_no_object_is_an_error() {
    let folder = Folder::new("no-object");
    let options = folder.programs();
    for file in [options.new.clone(), folder.write("text.o", "hello")] {
        let hooks = Some(file);
        let e = run(&Options { hooks, ..options.clone() }).err().expect("it is no object");
        assert_eq!(e.exit_code(), 1);
    }
}

#[test]
fn a_patch_of_another_build_is_refused_as_the_previous_one_and_a_chain_tells_what_lives() {
    let folder = Folder::new("after");
    let options = folder.programs();
    let bytes = run(&options).expect("they differ").patch.expect("a patch");
    let first = folder.0.join("first.so");
    std::fs::write(&first, bytes).expect("the folder is writable");
    // The other way round: the old build of the one is the new build of the other.
    let swapped =
        Options { old: options.new.clone(), new: options.old.clone(), after: Some(first.clone()), ..options.clone() };
    let outcome = run(&swapped).expect("they differ");
    assert!(rules(&outcome).iter().any(|(rule, symbol)| *rule == "after" && *symbol == "fix"));
    // Right, and then on top of that.
    let outcome = run(&Options { after: Some(first), name: "second".into(), ..options.clone() }).expect("they differ");
    let second = patch(&outcome);
    let after = second.manifest.after.as_ref().expect("it takes a place");
    assert_eq!(after.name, "fix");
    assert_eq!(living(&second), [("fresh".to_owned(), 1)], "it is alive in the first");
    assert!(second.relocs.iter().any(|r| matches!(r.target, RelocTarget::Previous(_))));
    let path = folder.0.join("second.so");
    std::fs::write(&path, outcome.patch.expect("a patch")).expect("the folder is writable");
    let third = patch(&run(&Options { after: Some(path), name: "third".into(), ..options }).expect("they differ"));
    let after = third.manifest.after.as_ref().expect("it takes a place");
    let before: Vec<&str> = after.before.iter().map(|b| b.name.as_str()).collect();
    assert_eq!((after.name.as_str(), before), ("second", vec!["fix"]));
    assert_eq!(living(&third), [("fresh".to_owned(), 2)], "where it was");
    assert!(third.relocs.iter().any(|r| matches!(r.target, RelocTarget::Previous(at) if in_chain(at).0 == 1)));
}

/// The statics of a patch, with how many patches back they live.
fn living(patch: &PatchFile) -> Vec<(String, usize)> {
    patch.manifest.statics.iter().map(|s| (s.name.clone(), in_chain(s.at).0)).collect()
}
