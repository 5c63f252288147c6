//! Each step of a diff by itself, on a C program of 2,000 functions that the bench builds. For comparing two versions of
//! the code on one machine; what a whole run takes says `./ci/bench-builder`.
//!
//!     cargo bench -p patch-builder --bench steps

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::hint::black_box;
use std::path::{Path, PathBuf};
use std::process::Command;

use criterion::{criterion_group, criterion_main, BatchSize, Criterion};
use patch_builder::build::{Build, FileBytes};
use patch_builder::diff::{diff, DiffOptions};
use patch_builder::emit::{emit, About};
use patch_builder::pair::pair;
use patch_builder::select::{select, Extras};
use patch_builder::side::Side;
use patch_builder::verify::{verify, Meant};
use patch_builder::{abi, run, Options};

const FUNCTIONS: usize = 2_000;

/// Functions of a few kinds; every seventh differs between the two builds.
fn source(new: bool) -> String {
    let mut out = String::from(
        "#include <stdio.h>\nstruct order { long id, price; struct order *next; const char *symbol; };\nlong total;\nstatic long seen[16];\n",
    );
    for i in 0..FUNCTIONS {
        let k = i + if new && i % 7 == 0 { 5 } else { 3 };
        let call = if i == 0 { "n".to_owned() } else { format!("f{}(n - 1, o)", i / 2) };
        let _ = match i % 4 {
            0 => writeln!(out, "__attribute__((noinline)) long f{i}(long n, struct order *o) {{ seen[n & 15] += {k}; return n > 0 ? {call} : o->price; }}"),
            1 => writeln!(out, "__attribute__((noinline)) long f{i}(long n, struct order *o) {{ if (n == {k}) printf(\"order %ld of {i}\\n\", o->id); return {call} + total; }}"),
            2 => writeln!(out, "__attribute__((noinline)) long f{i}(long n, struct order *o) {{ long s = {k}; for (; o; o = o->next) s += o->price * n; return s; }}"),
            _ => writeln!(out, "__attribute__((noinline)) long f{i}(long n, struct order *o) {{ switch (n) {{ case 1: return {k}; case 2: total++; break; case 3: return {call}; case 4: return o->id; case 5: return o->price; case 6: total--; }} return n; }}"),
        };
    }
    let list: Vec<String> = (0..FUNCTIONS).map(|i| format!("f{i}")).collect();
    let _ = writeln!(out, "long (*table[])(long, struct order *) = {{ {} }};", list.join(", "));
    out.push_str("int main(int argc, char **argv) { struct order o = { argc, 2, 0, argv[0] }; return (int)table[argc & 15](argc, &o); }\n");
    out
}

fn build(folder: &Path, new: bool) -> PathBuf {
    let out = folder.join(if new { "new" } else { "old" });
    std::fs::write(folder.join("main.c"), source(new)).expect("the folder is writable");
    let flags = ["-g", "-O1", "-w", "-fPIE", "-pie", "-Wl,--emit-relocs", "-Wl,--build-id", "main.c", "-o"];
    let status = Command::new("cc").current_dir(folder).args(flags).arg(&out).status().expect("cc runs");
    assert!(status.success(), "cc failed");
    out
}

fn steps(c: &mut Criterion) {
    let folder = std::env::temp_dir().join(format!("patch-builder-steps-{}", std::process::id()));
    std::fs::create_dir_all(&folder).expect("the temporary folder is writable");
    let (old, new) = (build(&folder, false), build(&folder, true));
    let bytes = [&old, &new].map(|p| FileBytes::read(p).expect("it reads"));
    let side = |i: usize| Side::new(Build::parse("bench", &bytes[i][..]).expect("it is a build"));

    c.bench_function("read", |b| b.iter(|| FileBytes::read(&old).map(|f| f.len())));
    c.bench_function("parse", |b| b.iter(|| Build::parse("bench", &bytes[0][..]).map(|b| b.funcs.len())));
    c.bench_function("types", |b| b.iter(|| abi::read(&old, &bytes[0][..]).defined().len()));
    c.bench_function("lift", |b| {
        let parse = || Build::parse("bench", &bytes[0][..]).expect("it is a build");
        b.iter_batched(parse, |build| Side::new(build).lifted.len(), BatchSize::LargeInput);
    });
    let (a, b) = (side(0), side(1));
    c.bench_function("pair", |bench| bench.iter(|| black_box(pair(&a, &b))));
    let pairing = pair(&a, &b);
    let compare = || diff(&a, &b, (&bytes[0][..], &bytes[1][..]), &pairing, DiffOptions::default());
    c.bench_function("compare", |bench| bench.iter(|| compare().changed.len()));
    let found = compare();
    let cut = || select(&a, &b, &pairing, &found, Extras::default());
    c.bench_function("select", |bench| bench.iter(|| cut().pieces.len()));
    let selection = cut();
    assert!(selection.refusals.is_empty() && selection.functions.len() > FUNCTIONS / 8, "the bench measures a patch");
    let about = About {
        name: "bench",
        allowances: &[],
        types: "",
        layouts: &[],
        together: &[],
        states: &[],
        unlike: &BTreeSet::new(),
        statics: &BTreeMap::new(),
        after: None,
    };
    let write = || emit(&a, &b, &found, &selection, &about).unwrap_or_else(|e| panic!("{e:?}"));
    c.bench_function("emit", |bench| bench.iter(|| write().bytes.len()));
    let patch = write();
    let meant = Meant {
        old: &a,
        new: &b,
        pairing: &pairing,
        diff: &found,
        manifest: &patch.manifest,
        placed: &patch.placed,
        after: None,
        foreign: &patch.foreign,
    };
    c.bench_function("verify", |bench| bench.iter(|| verify(&patch.bytes, meant).expect("it is right")));
    let options = Options { old: old.clone(), new: new.clone(), name: "bench".into(), ..Options::default() };
    c.bench_function("whole", |bench| bench.iter(|| run(&options).map(|o| o.patch.map(|p| p.len()))));
    std::fs::remove_dir_all(&folder).expect("the folder can be removed");
}

criterion_group! {
    name = benches;
    config = Criterion::default().sample_size(20);
    targets = steps
}
criterion_main!(benches);
