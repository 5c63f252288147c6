//! A patch of 500 functions, applied and reverted while threads call them: every call checks that what it called was of its
//! own version. `CONSISTENCY_CYCLES=n` sets how often (default 3; `./ci/consistency` does 40).

mod engine_support;

use std::fmt::Write as _;

use engine_support::{folder, gcc, livepatch, object, write_patch, Recipe, Target};

const FUNCTIONS: usize = 500;

/// `f0` to `f499`: each calls another, which must be of the same version.
fn functions(version: u32) -> String {
    let mut out = String::from("extern long mixed;\n");
    let _ = (0..FUNCTIONS).try_for_each(|i| writeln!(out, "int f{i}(int depth);"));
    for i in 0..FUNCTIONS {
        let next = (i * 7 + 1) % FUNCTIONS;
        let _ = writeln!(
            out,
            "__attribute__((noipa)) int f{i}(int depth) {{ if (depth > 0 && f{next}(depth - 1) != {version}) \
             __atomic_fetch_add(&mixed, 1, __ATOMIC_SEQ_CST); return {version}; }}"
        );
    }
    out
}

fn program() -> String {
    let table: Vec<String> = (0..FUNCTIONS).map(|i| format!("f{i}")).collect();
    format!(
        r#"#define _GNU_SOURCE
#include <pthread.h>
#include <stdio.h>
#include <sys/prctl.h>
#include <signal.h>
long mixed;
static long calls;
{}
static int (*const table[])(int) = {{ {} }};
static void *caller(void *arg)
{{
	for (unsigned long n = (unsigned long)arg;; n = n * 6364136223846793005ul + 1442695040888963407ul) {{
		int first = table[(n >> 33) % {FUNCTIONS}](4);
		if (first != 1 && first != 2)
			__atomic_fetch_add(&mixed, 1, __ATOMIC_SEQ_CST);
		__atomic_fetch_add(&calls, 5, __ATOMIC_RELAXED);
		/* outside of them most of the time, so that the switch finds a moment */
		for (int i = 0; i < 300; i++)
			__builtin_ia32_pause();
	}}
	return arg;
}}
int main(void)
{{
	pthread_t t;
	char line[99];
	prctl(PR_SET_PDEATHSIG, SIGKILL);
	for (long i = 1; i <= 3; i++)
		pthread_create(&t, NULL, caller, (void *)i);
	printf("ready\n");
	fflush(stdout);
	while (fgets(line, sizeof line, stdin)) {{
		if (*line == 'v')
			printf("%d\n", table[7](3));
		else
			printf("%ld %ld\n", __atomic_load_n(&calls, __ATOMIC_SEQ_CST), __atomic_load_n(&mixed, __ATOMIC_SEQ_CST));
		fflush(stdout);
	}}
	return 0;
}}
"#,
        functions(1),
        table.join(", ")
    )
}

#[test]
fn five_hundred_functions_switch_at_once() {
    let folder = folder("consistency");
    let old = gcc(&folder, "old", &program(), &[]);
    let object = object(&folder, "fix.o", &functions(2));
    let names: Vec<String> = (0..FUNCTIONS).map(|i| format!("f{i}")).collect();
    let names: Vec<&str> = names.iter().map(String::as_str).collect();
    let recipe = Recipe { name: "fix", old: &old, object: &object, replace: &names, may_unwind: false, after: None };
    let fix = write_patch(&recipe, &folder.join("fix.so"));
    let mut target = Target::start(&old, &[]);
    let (pid, fix) = (target.pid().to_string(), fix.to_str().unwrap());
    let cycles = std::env::var("CONSISTENCY_CYCLES").ok().and_then(|n| n.parse().ok()).unwrap_or(3);
    let (mut pause, mut attempts) = (0f64, 0);
    for cycle in 0..cycles {
        for (args, version) in [(vec!["apply", &pid, fix], "2"), (vec!["revert", &pid], "1")] {
            let out = livepatch(&[args.as_slice(), &["--json", "--timeout", "20s"]].concat());
            assert_eq!(out.code, 0, "cycle {cycle}: {args:?}: {}", out.stderr);
            let report: serde_json::Value = serde_json::from_str(&out.stdout).unwrap();
            assert_eq!(report["entries"], FUNCTIONS, "{report}");
            assert!(!out.stderr.contains("switch stubs"), "{}", out.stderr);
            pause = pause.max(report["pause_us"].as_f64().unwrap());
            attempts += report["attempts"].as_u64().unwrap();
            assert_eq!(target.ask("v"), version, "cycle {cycle}");
        }
    }
    let counts = target.ask("counts");
    let (calls, mixed) = counts.split_once(' ').unwrap();
    println!("{FUNCTIONS} functions, {cycles} applies and {cycles} reverts, {attempts} switch attempts: {calls} calls checked, {mixed} mixed");
    println!("longest pause of a running thread, as reported: {pause} µs");
    assert_eq!(mixed, "0");
    assert!(calls.parse::<u64>().unwrap() > 1000, "{calls} calls only");
}
