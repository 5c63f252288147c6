//! The strict unwinder and the stack check against a real process: signal frames on their own stack, callbacks out of the C
//! library, vfork, every wait. Every thread must be followed to its root, and a frame under a signal frame be found.

mod engine_support;

use engine_support::{folder, gcc, Target};
use livepatch::addr::{ProcAddr, ProcRange};
use livepatch::image::find_images;
use livepatch::maps::Mapping;
use livepatch::memory::ReadMemory;
use livepatch::process::ptrace::PtraceProcess;
use livepatch::process::{HeldThread, HoldLimits, Pid, Process, StackCheck, Tid};
use livepatch::quiesce::{Checker, StackMap, Why};
use livepatch::stack::{Cfi, Frame, Part, Unwinder, WatchList, Watched};
use object::{Object, ObjectSymbol};
use std::collections::HashMap;
use std::path::Path;
use std::time::Duration;

const PROGRAM: &str = r#"
#define _GNU_SOURCE
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>
static volatile int in;
__attribute__((noinline)) void hidden(int depth)
{
	volatile char big[256];
	big[0] = depth;
	if (depth) hidden(depth - 1);
	else for (in++;;) __asm__ volatile("pause");
	__asm__ volatile("" :: "r"(big));
}
static void handler(int s) { (void)s; for (;;) pause(); }
static void *on_signal_stack(void *arg)
{
	stack_t st = { .ss_sp = malloc(65536), .ss_size = 65536 };
	prctl(PR_SET_NAME, "altstack");
	sigaltstack(&st, NULL);
	hidden(5);
	return arg;
}
static int compare(const void *a, const void *b) { for (;;) pause(); return *(int *)a - *(int *)b; }
static void *in_qsort(void *arg) { int l[] = { 3, 1, 2 }; prctl(PR_SET_NAME, "qsort"); qsort(l, 3, sizeof *l, compare); return arg; }
static void *in_sleep(void *arg) { prctl(PR_SET_NAME, "sleep"); for (;;) sleep(100); return arg; }
static void *spinning(void *arg) { prctl(PR_SET_NAME, "spin"); for (;;) hidden(3); return arg; }
int main(void)
{
	pthread_t a, t;
	struct sigaction sa = { .sa_handler = handler, .sa_flags = SA_ONSTACK };
	prctl(PR_SET_PDEATHSIG, SIGKILL);
	sigaction(SIGUSR1, &sa, NULL);
	pthread_create(&a, NULL, on_signal_stack, NULL);
	while (!in) usleep(100);
	pthread_kill(a, SIGUSR1);
	pthread_create(&t, NULL, in_qsort, NULL);
	pthread_create(&t, NULL, in_sleep, NULL);
	pthread_create(&t, NULL, spinning, NULL);
	while (in < 2) usleep(100);
	usleep(50000);
	printf("ready\n");
	fflush(stdout);
	for (;;) pause();
}
"#;

/// Looks at all threads and never says no.
struct Look<'a> {
    cfi: &'a Cfi,
    seen: HashMap<Tid, (Result<(), String>, Vec<Frame>)>,
}

impl StackCheck for Look<'_> {
    fn extent(&self, _: &HeldThread) -> Option<ProcRange> {
        None
    }

    fn is_clear(&mut self, t: &HeldThread, _: Option<ProcRange>, _: &[u8], memory: &dyn ReadMemory) -> bool {
        let mut frames = Vec::new();
        let result = Unwinder::new(self.cfi, memory).walk(&t.registers, &mut |f| frames.push(f));
        self.seen.insert(t.tid, (result.map_err(|e| e.to_string()), frames));
        true
    }
}

fn name(pid: i32, tid: Tid) -> String {
    std::fs::read_to_string(format!("/proc/{pid}/task/{tid}/comm")).unwrap().trim().to_owned()
}

fn function(program: &Path, maps: &[Mapping], name: &str) -> ProcRange {
    let bytes = std::fs::read(program).unwrap();
    let file = object::File::parse(&*bytes).unwrap();
    let symbol = file.symbols().find(|s| s.name() == Ok(name)).unwrap();
    let base = maps.iter().find(|m| m.name == program.to_str().unwrap()).unwrap().range.start;
    ProcRange::new(base.checked_add(symbol.address()).unwrap(), symbol.size()).unwrap()
}

const LIMITS: HoldLimits = HoldLimits { deadline: Duration::from_secs(2) };

#[test]
fn every_thread_is_followed_to_its_root_and_frames_below_signals_are_found() {
    let folder = folder("engine-unwind");
    let program = gcc(&folder, "program", PROGRAM, &["-pie", "-fpie", "-fomit-frame-pointer"]);
    let target = Target::start(&program, &[]);
    let mut process = PtraceProcess::open(Pid(target.pid())).unwrap();
    let maps = process.mappings().unwrap();
    let cfi = Cfi::load(&process, &find_images(&process, &maps));
    let mut look = Look { cfi: &cfi, seen: HashMap::new() };
    drop(process.hold(LIMITS, &mut look).unwrap());
    assert_eq!(look.seen.len(), 5);
    let hidden = function(&program, &maps, "hidden");
    for (tid, (result, frames)) in &look.seen {
        let name = name(target.pid(), *tid);
        assert_eq!(result, &Ok(()), "{name}: {frames:?}");
        let inside = frames.iter().filter(|f| hidden.contains(ProcAddr(f.pc.0 - u64::from(!f.exact)))).count();
        let expected = match name.as_str() {
            // One interrupted, five that called it.
            "altstack" => 6,
            "spin" => 4,
            _ => 0,
        };
        assert_eq!(inside, expected, "{name}: {frames:?}");
        if name == "altstack" {
            let interrupted = frames.iter().filter(|f| f.exact).count();
            assert_eq!(interrupted, 2, "where it stands, and where the signal came");
        }
    }
    // The same by the checker, which must find the frame that only an unwind through the signal frame shows.
    let part = Part::Body { branches_to_entry: false };
    let stacks = StackMap::new(&maps);
    let watch = WatchList::new(vec![Watched { name: "hidden".into(), range: hidden, part }]);
    for cfi in [None, Some(&cfi)] {
        let mut checker = Checker::new(&watch, &stacks, cfi);
        assert!(process.hold(LIMITS, &mut checker).is_err());
        let why = checker.into_blocked().unwrap().why;
        match cfi {
            None => assert_eq!(why, Why::TablesWanted),
            Some(_) => assert_eq!(why, Why::Inside { function: "hidden".into() }),
        }
    }
    // A function that nobody is in: the thread on its signal stack is cleared by the unwind, and by nothing less.
    let compare = function(&program, &maps, "in_sleep");
    let elsewhere = ProcRange { start: ProcAddr(compare.start.0 - 2), end: ProcAddr(compare.start.0 - 1) };
    let watch = WatchList::new(vec![Watched { name: "nobody".into(), range: elsewhere, part }]);
    assert!(process.hold(LIMITS, &mut Checker::new(&watch, &stacks, None)).is_err());
    drop(process.hold(LIMITS, &mut Checker::new(&watch, &stacks, Some(&cfi))).unwrap());
}
