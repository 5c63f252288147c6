//! The engine while threads are born and die, and while signals arrive: nothing is lost, and nothing is torn.

mod engine_support;

use engine_support::{folder, gcc, livepatch, object, write_patch, Recipe, Target};
use livepatch::patch::PatchFile;
use livepatch::patcher::{Options, Patcher};
use livepatch::process::Pid;
use proptest::prelude::*;

const PROGRAM: &str = r#"
#define _GNU_SOURCE
#include <errno.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/prctl.h>
#include <unistd.h>
static volatile long handled, sent, wrong, stop;
__attribute__((noinline, noclone)) int value(int x) { __asm__ volatile("" ::: "memory"); return x + 1; }
static void *one(void *arg)
{
	int v = value(1);
	if (v != 2 && v != 102) wrong++;
	return arg;
}
static void *births(void *arg)
{
	while (!stop) {
		pthread_t t;
		if (pthread_create(&t, NULL, one, NULL)) { wrong++; continue; }
		pthread_join(t, NULL);
	}
	return arg;
}
static void *callers(void *arg) { while (!stop) one(NULL); return arg; }
static void handler(int s) { (void)s; __atomic_add_fetch(&handled, 1, __ATOMIC_SEQ_CST); }
static void *waiter(void *arg)
{
	struct epoll_event e;
	int ep = epoll_create1(0);
	while (!stop)
		epoll_wait(ep, &e, 1, -1);
	return arg;
}
static pthread_t w;
static void *sender(void *arg)
{
	union sigval v = { 0 };
	while (!stop) {
		if (!pthread_sigqueue(w, SIGRTMIN, v)) sent++;
		usleep(300);
	}
	return arg;
}
int main(void)
{
	pthread_t t[4];
	char line[99];
	struct sigaction sa = { .sa_handler = handler };
	prctl(PR_SET_PDEATHSIG, SIGKILL);
	sigaction(SIGRTMIN, &sa, NULL);
	pthread_create(&w, NULL, waiter, NULL);
	pthread_create(&t[0], NULL, births, NULL);
	pthread_create(&t[1], NULL, births, NULL);
	pthread_create(&t[2], NULL, callers, NULL);
	pthread_create(&t[3], NULL, sender, NULL);
	printf("ready\n");
	fflush(stdout);
	while (fgets(line, sizeof line, stdin)) {
		if (*line == 'v') printf("%d\n", value(1));
		if (*line == 's') {
			stop = 1;
			for (int i = 0; i < 4; i++) pthread_join(t[i], NULL);
			usleep(100000);
			printf("wrong %ld lost %ld\n", wrong, sent - handled);
		}
		fflush(stdout);
	}
	return 0;
}
"#;

const FIX: &str = "int value(int x) { __asm__ volatile(\"\" ::: \"memory\"); return x + 101; }";

#[test]
fn births_deaths_and_signals_are_no_matter() {
    let folder = folder("engine-storm");
    let old = gcc(&folder, "old", PROGRAM, &[]);
    let new = object(&folder, "fix.o", FIX);
    let recipe = Recipe { name: "fix", old: &old, object: &new, replace: &["value"], may_unwind: false, after: None };
    let fix = write_patch(&recipe, &folder.join("fix.so"));
    let mut target = Target::start(&old, &[]);
    let (pid, fix) = (target.pid().to_string(), fix.to_str().unwrap().to_owned());
    for _ in 0..30 {
        let out = livepatch(&["apply", &pid, &fix]);
        assert_eq!(out.code, 0, "{}", out.stderr);
        assert_eq!(target.ask("v"), "102");
        let out = livepatch(&["revert", &pid]);
        assert_eq!(out.code, 0, "{}", out.stderr);
        assert_eq!(target.ask("v"), "2");
    }
    assert_eq!(target.ask("s"), "wrong 0 lost 0");
}

#[test]
fn a_kernel_that_writes_no_code_through_proc_is_no_matter() {
    let folder = folder("engine-poke");
    let old = gcc(&folder, "old", PROGRAM, &[]);
    let new = object(&folder, "fix.o", FIX);
    let recipe = Recipe { name: "fix", old: &old, object: &new, replace: &["value"], may_unwind: false, after: None };
    let fix = write_patch(&recipe, &folder.join("fix.so"));
    let patch = PatchFile::parse(&std::fs::read(fix).unwrap()).unwrap();
    let mut target = Target::start(&old, &[]);
    let mut patcher = Patcher::open(Pid(target.pid())).unwrap();
    patcher.process().without_proc_mem();
    patcher.apply(&patch, &Options::default()).unwrap();
    assert_eq!(target.ask("v"), "102");
    patcher.revert(None, &Options::default()).unwrap();
    assert_eq!(target.ask("v"), "2");
    assert_eq!(target.ask("s"), "wrong 0 lost 0");
}

fn sample() -> Vec<u8> {
    let folder = folder("engine-parse");
    let old = gcc(&folder, "old", PROGRAM, &[]);
    let new = object(&folder, "fix.o", FIX);
    let recipe = Recipe { name: "fix", old: &old, object: &new, replace: &["value"], may_unwind: false, after: None };
    std::fs::read(write_patch(&recipe, &folder.join("fix.so"))).unwrap()
}

#[test]
fn a_damaged_patch_file_never_panics() {
    let bytes = sample();
    assert!(PatchFile::parse(&bytes).is_ok());
    let damage = proptest::collection::vec((any::<proptest::sample::Index>(), any::<u8>()), 1..6);
    let mut runner =
        proptest::test_runner::TestRunner::new(ProptestConfig { cases: 2000, ..ProptestConfig::default() });
    runner
        .run(&(damage, any::<proptest::sample::Index>()), |(damage, cut)| {
            let mut damaged = bytes.clone();
            for (at, value) in damage {
                let at = at.index(damaged.len());
                damaged[at] = value;
            }
            let _ = PatchFile::parse(&damaged);
            damaged.truncate(cut.index(bytes.len()));
            prop_assert!(PatchFile::parse(&damaged).is_err());
            Ok(())
        })
        .unwrap();
}
