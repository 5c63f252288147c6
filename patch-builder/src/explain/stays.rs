//! Functions that a thread may never leave, so that a patch of them never finds its moment.
//!
//! What is said here is a warning, made from the old build's calls and loops:
//! - `main`, and the functions in which threads start, stay on a stack for as long as the process or the thread lives;
//! - a loop that no path leads out of, around anything that waits;
//! - a loop around a wait for events (`epoll_wait`, `accept`, …), in the function itself (inlined code included), in one
//!   that only it calls, or in one that cannot return without having waited;
//! - in functions that only `main` or a thread's start calls, also a loop that reaches such a wait by any path;
//! - whoever calls such a function for good.
//!
//! A function that waits without a loop, or that only repeats an interrupted wait, is none of them.

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::rc::Rc;

use super::flow::{flow, Callee, Flow, Loop};
use crate::build::{canonical, demangle, DynKind, FuncId};
use crate::compare::{slot, Place};
use crate::lift::{Access, Target};
use crate::side::Side;

/// What kind of waiting a call is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Wait {
    /// For input of a file: ends with the file.
    Read,
    /// For a time.
    Sleep,
    /// For another thread.
    Signal,
    /// For events.
    Event,
}

fn wait_of_import(name: &str) -> Option<Wait> {
    Some(match name {
        "epoll_wait"
        | "epoll_pwait"
        | "epoll_pwait2"
        | "poll"
        | "ppoll"
        | "__poll_chk"
        | "__ppoll_chk"
        | "select"
        | "pselect"
        | "accept"
        | "accept4"
        | "recv"
        | "recvfrom"
        | "recvmsg"
        | "recvmmsg"
        | "__recv_chk"
        | "__recvfrom_chk"
        | "sigwait"
        | "sigwaitinfo"
        | "sigtimedwait"
        | "sigsuspend"
        | "pause"
        | "mq_receive"
        | "mq_timedreceive"
        | "msgrcv"
        | "io_uring_enter"
        | "io_uring_wait_cqe"
        | "io_uring_wait_cqes"
        | "io_uring_wait_cqe_timeout"
        | "io_uring_submit_and_wait"
        | "__io_uring_get_cqe"
        | "io_getevents"
        | "kevent"
        | "uv_run"
        | "event_base_loop"
        | "event_base_dispatch"
        | "ev_run"
        | "g_main_loop_run" => Wait::Event,
        "pthread_cond_wait"
        | "pthread_cond_timedwait"
        | "pthread_cond_clockwait"
        | "cnd_wait"
        | "cnd_timedwait"
        | "sem_wait"
        | "sem_timedwait"
        | "sem_clockwait"
        | "pthread_barrier_wait"
        | "pthread_join"
        | "thrd_join"
        | "_ZNSt18condition_variable4waitERSt11unique_lockISt5mutexE" => Wait::Signal,
        "nanosleep" | "clock_nanosleep" | "usleep" | "sleep" | "thrd_sleep" => Wait::Sleep,
        "read" | "readv" | "__read_chk" | "fgets" | "fgets_unlocked" | "__fgets_chk" | "getline" | "__getdelim"
        | "getdelim" | "getc" | "fgetc" | "getchar" | "fread" | "wait" | "waitpid" | "wait3" | "wait4" | "waitid" => {
            Wait::Read
        }
        _ => return None,
    })
}

fn wait_of_system_call(number: u32) -> Option<Wait> {
    Some(match number {
        232 | 281 | 441 | 7 | 271 | 23 | 270 | 43 | 288 | 45 | 47 | 299 | 34 | 128 | 130 | 208 | 333 | 426 | 243
        | 70 => Wait::Event,
        202 | 449 => Wait::Signal,
        35 | 230 => Wait::Sleep,
        0 | 19 | 61 | 247 => Wait::Read,
        _ => return None,
    })
}

/// Why a function may never be off the stack.
#[derive(Clone, Debug)]
pub(super) struct Verdict {
    /// `main`, `thread-start`, `event-loop` or `above-event-loop`.
    pub kind: &'static str,
    /// In words.
    pub reason: String,
    /// Whether there is no coming back at all.
    pub for_good: bool,
    /// What its loop calls.
    pub loop_calls: Vec<FuncId>,
}

/// Answers for one build.
pub(super) struct Stays<'a, 'd> {
    side: &'a Side<'d>,
    /// Where the program and its threads start.
    roots: BTreeMap<FuncId, &'static str>,
    /// Functions that data or an argument refers to: anybody may call them.
    pointed: BTreeSet<FuncId>,
    flows: RefCell<HashMap<FuncId, Rc<Flow>>>,
    /// Functions that cannot return without having waited, as far as it was asked.
    waiters: RefCell<HashMap<FuncId, Option<(Wait, String)>>>,
    /// The loops in which functions may stay, as far as it was asked.
    loops: RefCell<HashMap<FuncId, Option<Verdict>>>,
}

/// How many calls deep a wait is looked for.
const DEPTH: u32 = 6;
/// How many functions are looked into for one loop.
const MAX_REACHED: usize = 300;

impl<'a, 'd> Stays<'a, 'd> {
    pub(super) fn new(side: &'a Side<'d>) -> Self {
        let (flows, waiters, loops) = (RefCell::default(), RefCell::default(), RefCell::default());
        let mut out = Self { side, roots: BTreeMap::new(), pointed: BTreeSet::new(), flows, waiters, loops };
        out.find_pointed();
        out.find_roots();
        out
    }

    pub(super) fn flow(&self, id: FuncId) -> Rc<Flow> {
        if let Some(known) = self.flows.borrow().get(&id) {
            return Rc::clone(known);
        }
        let new = Rc::new(flow(self.side, id));
        self.flows.borrow_mut().insert(id, Rc::clone(&new));
        new
    }

    /// Where the program or a thread starts.
    pub(super) fn root(&self, id: FuncId) -> Option<&'static str> {
        self.roots.get(&id).copied()
    }

    /// Whether data or an argument holds its address.
    pub(super) fn is_pointed(&self, id: FuncId) -> bool {
        self.pointed.contains(&id)
    }

    fn find_pointed(&mut self) {
        let build = &self.side.build;
        let mut point = |to: u64| self.pointed.extend(build.func_at(to).filter(|f| build.func(*f).addr == to));
        for r in build.dynamic.values() {
            match r.kind {
                DynKind::Relative(to) | DynKind::Own(to, _) | DynKind::Ifunc(to) => point(to),
                _ => {}
            }
        }
        for r in build.relocs.iter().filter(|r| r.kind == 1) {
            point(build.rel_sym(r).value.wrapping_add_signed(r.addend));
        }
        for lifted in &self.side.lifted {
            self.pointed.extend(lifted.refs.iter().filter_map(|r| match (r.target, r.access) {
                (Target::Func(f, 0), access) if access != Access::Branch => Some(f),
                _ => None,
            }));
        }
    }

    fn find_roots(&mut self) {
        let side = self.side;
        let mut starters: Vec<(FuncId, usize)> = Vec::new();
        let mut handed: Vec<(FuncId, &'static str)> = Vec::new();
        for (id, f) in side.build.funcs.iter().enumerate() {
            let id = id as FuncId;
            if f.names.iter().any(|n| n.text == "main") {
                self.roots.insert(id, "main");
                // Rust's `main` hands the program's own to the runtime.
                for r in &side.lifted[id as usize].refs {
                    if let (Target::Func(own, 0), true) = (r.target, side.build.rust) {
                        if canonical(side.build.func(own).name()).ends_with("::main") {
                            self.roots.insert(own, "main");
                        }
                    }
                }
            }
            if f.name().starts_with("_ZNSt6thread11_State_impl") && f.name().ends_with("6_M_runEv") {
                self.roots.entry(id).or_insert("thread-start");
            }
            if let Some(kind) = rust_start(f.name()) {
                self.roots.entry(id).or_insert(kind);
                handed.push((id, kind));
            }
            starters.extend(
                side.lifted[id as usize].refs.iter().filter_map(|r| Some((id, starts_thread(side, r.target)?))),
            );
        }
        // What such a frame alone calls is the program's own.
        for (id, kind) in handed {
            for to in self.calls(id) {
                if side.callers(to).iter().all(|c| *c == id || *c == to) && !self.pointed.contains(&to) {
                    self.roots.entry(to).or_insert(kind);
                }
            }
        }
        starters.sort_unstable();
        starters.dedup();
        for (id, argument) in starters {
            for call in &self.flow(id).calls {
                let Callee::Import(name) = &call.to else { continue };
                if start_argument(name) == Some(argument) {
                    for (_, f) in call.arguments.iter().filter(|(a, _)| *a == argument) {
                        self.roots.entry(*f).or_insert("thread-start");
                    }
                }
            }
        }
    }

    /// Whether it runs only because `main` or a thread's start called it, directly or through others like it.
    fn only_from_roots(&self, id: FuncId, depth: u32) -> bool {
        if self.roots.contains_key(&id) {
            return true;
        }
        let callers: Vec<FuncId> = self.side.callers(id).iter().copied().filter(|c| *c != id).collect();
        depth < DEPTH
            && !self.pointed.contains(&id)
            && !callers.is_empty()
            && callers.iter().all(|c| self.only_from_roots(*c, depth + 1))
    }

    fn wait_of(to: &Callee, number: Option<u32>) -> Option<Wait> {
        match to {
            Callee::Import(name) if name == "syscall" => number.and_then(wait_of_system_call),
            Callee::Import(name) => wait_of_import(name),
            Callee::System(number) => number.and_then(wait_of_system_call),
            _ => None,
        }
    }

    /// The wait that a call leads to: directly, through functions that `from` alone calls, or through such as cannot
    /// return without it.
    fn leads_to(&self, from: FuncId, call: usize, depth: u32) -> Option<(Wait, String)> {
        let flow = self.flow(from);
        let call = &flow.calls[call];
        if let Some(wait) = Self::wait_of(&call.to, call.number) {
            return Some((wait, name_of(&call.to)));
        }
        let Callee::Func(to) = call.to else { return None };
        if depth >= DEPTH || to == from {
            return None;
        }
        let alone = !self.pointed.contains(&to) && self.side.callers(to).iter().all(|c| *c == from || *c == to);
        let (wait, name) = if alone {
            let inner = self.flow(to);
            (0..inner.calls.len()).filter_map(|c| self.leads_to(to, c, depth + 1)).max_by_key(|(wait, _)| *wait)?
        } else {
            self.must_wait(to, depth + 1)?
        };
        let via = demangle(self.side.build.func(to).name());
        let wait_name = name.split(" (through ").next().unwrap_or(&name);
        Some((wait, format!("{wait_name} (through {via})")))
    }

    /// Whether a function cannot return without having waited.
    fn must_wait(&self, id: FuncId, depth: u32) -> Option<(Wait, String)> {
        if let Some(known) = self.waiters.borrow().get(&id) {
            return known.clone();
        }
        if depth >= DEPTH {
            return None;
        }
        self.waiters.borrow_mut().insert(id, None);
        let flow = self.flow(id);
        let waits: Vec<(usize, (Wait, String))> =
            (0..flow.calls.len()).filter_map(|c| Some((c, self.leads_to(id, c, depth)?))).collect();
        let calls: Vec<usize> = waits.iter().map(|(c, _)| *c).collect();
        let certain = !calls.is_empty() && !flow.can_return_without(&calls);
        let found = waits.into_iter().map(|(_, w)| w).max_by_key(|(wait, _)| *wait).filter(|_| certain);
        self.waiters.borrow_mut().insert(id, found.clone());
        found
    }

    /// A wait that is reached from a call by any path.
    fn reaches(&self, from: FuncId, call: usize) -> Option<(Wait, String)> {
        let flow = self.flow(from);
        let Callee::Func(first) = flow.calls[call].to else { return self.leads_to(from, call, DEPTH) };
        let (mut seen, mut open) = (BTreeSet::from([from, first]), vec![first]);
        let mut best: Option<(Wait, String)> = None;
        for _ in 0..DEPTH {
            let mut further = Vec::new();
            for f in std::mem::take(&mut open) {
                for call in &self.flow(f).calls {
                    let found = Self::wait_of(&call.to, call.number).map(|wait| (wait, name_of(&call.to)));
                    if found.as_ref().is_some_and(|(wait, _)| best.as_ref().is_none_or(|(b, _)| wait > b)) {
                        best = found;
                    }
                    if let Callee::Func(to) = call.to {
                        if seen.len() < MAX_REACHED && seen.insert(to) {
                            further.push(to);
                        }
                    }
                }
            }
            open = further;
        }
        let via = demangle(self.side.build.func(first).name());
        best.map(|(wait, name)| (wait, format!("{name} (through {via})")))
    }

    /// Whether a loop does nothing but wait, again if it was interrupted.
    fn only_repeats(&self, flow: &Flow, l: &Loop) -> bool {
        l.calls.iter().all(|c| {
            let call = &flow.calls[*c];
            Self::wait_of(&call.to, call.number).is_some() || matches!(&call.to, Callee::Import(name) if is_aside(name))
        })
    }

    /// The loop in which a function may stay, if it has one.
    fn own_loop(&self, id: FuncId) -> Option<Verdict> {
        if let Some(known) = self.loops.borrow().get(&id) {
            return known.clone();
        }
        let found = self.find_loop(id);
        self.loops.borrow_mut().insert(id, found.clone());
        found
    }

    fn find_loop(&self, id: FuncId) -> Option<Verdict> {
        let flow = self.flow(id);
        let rooted = self.only_from_roots(id, 0);
        for l in &flow.loops {
            let strict = l.calls.iter().filter_map(|c| self.leads_to(id, *c, 0)).max_by_key(|(wait, _)| *wait);
            let any = || l.calls.iter().filter_map(|c| self.reaches(id, *c)).max_by_key(|(wait, _)| *wait);
            let hit = match (strict, l.leads_out) {
                (Some(found), false) => Some(found),
                (None, false) if rooted => any(),
                (Some((Wait::Event, name)), true) if !self.only_repeats(&flow, l) => Some((Wait::Event, name)),
                (_, true) if rooted && !self.only_repeats(&flow, l) => any().filter(|(wait, _)| *wait >= Wait::Signal),
                _ => None,
            };
            if let Some((_, name)) = hit {
                let leaves = if l.leads_out { "" } else { " and has no way out of the loop" };
                let mut loop_calls: Vec<FuncId> = l
                    .calls
                    .iter()
                    .filter_map(|c| match flow.calls[*c].to {
                        Callee::Func(f) if f != id => Some(f),
                        _ => None,
                    })
                    .collect();
                loop_calls.dedup();
                return Some(Verdict {
                    kind: "event-loop",
                    reason: format!("it loops around {name}{leaves}"),
                    for_good: rooted || !l.leads_out,
                    loop_calls,
                });
            }
        }
        None
    }

    /// Why a thread may never leave this function.
    pub(super) fn verdict(&self, id: FuncId) -> Option<Verdict> {
        let own = self.own_loop(id);
        let loop_calls = own.as_ref().map_or_else(|| self.calls(id), |v| v.loop_calls.clone());
        match self.roots.get(&id) {
            Some(&"main") => {
                let also = own.map_or(String::new(), |v| format!("; {}", v.reason));
                let reason = format!("it is the program's main, which runs until the program ends{also}");
                Some(Verdict { kind: "main", reason, for_good: true, loop_calls })
            }
            Some(kind) => {
                let also = own.map_or(String::new(), |v| format!("; {}", v.reason));
                let reason = format!("a thread starts in it and stays in it until the thread ends{also}");
                Some(Verdict { kind, reason, for_good: true, loop_calls })
            }
            None => own.or_else(|| self.above(id, 0)),
        }
    }

    /// A call of a function that never comes back.
    fn above(&self, id: FuncId, depth: u32) -> Option<Verdict> {
        if depth >= 3 {
            return None;
        }
        for to in self.calls(id) {
            let deeper = self.own_loop(to).filter(|v| v.for_good).or_else(|| self.above(to, depth + 1));
            if let Some(v) = deeper {
                let name = demangle(self.side.build.func(to).name());
                let reason = match v.kind {
                    "above-event-loop" => format!("it calls {name}: {}", v.reason),
                    _ => format!("it calls {name} and waits for its end: {}", v.reason.replacen("it ", "that one ", 1)),
                };
                return Some(Verdict { kind: "above-event-loop", reason, ..v });
            }
        }
        None
    }

    /// The functions that a function calls.
    pub(super) fn calls(&self, id: FuncId) -> Vec<FuncId> {
        let mut out: Vec<FuncId> = Vec::new();
        for call in &self.flow(id).calls {
            if let Callee::Func(f) = call.to {
                if f != id && !call.tail && !out.contains(&f) {
                    out.push(f);
                }
            }
        }
        out
    }
}

fn name_of(to: &Callee) -> String {
    match to {
        Callee::Import(name) => name.clone(),
        Callee::System(Some(n)) => format!("system call {n}"),
        _ => "a wait".into(),
    }
}

/// Calls that say nothing about what a function is for.
fn is_aside(name: &str) -> bool {
    name == "__errno_location"
        || name.starts_with("pthread_mutex_")
        || name.starts_with("mtx_")
        || name == "__stack_chk_fail"
}

/// The argument in which a function takes what the new thread runs.
fn start_argument(import: &str) -> Option<usize> {
    match import {
        "pthread_create" => Some(2),
        "thrd_create" => Some(1),
        "clone" => Some(0),
        _ => None,
    }
}

fn starts_thread(side: &Side<'_>, target: Target<'_>) -> Option<usize> {
    match target {
        Target::Plt(name) => start_argument(name),
        Target::Slot(at) => match slot(side, at) {
            Place::Import(name, _) => start_argument(name),
            _ => None,
        },
        _ => None,
    }
}

/// Where Rust's standard library hands over to `main` or to what a thread runs, by name.
fn rust_start(symbol: &str) -> Option<&'static str> {
    if symbol.contains("__rust_begin_short_backtrace") {
        // What is handed to it by `lang_start` is a plain function.
        let main = canonical(symbol).contains("__rust_begin_short_backtrace::<fn(), ()>");
        return Some(if main { "main" } else { "thread-start" });
    }
    let thread = symbol.contains("spawn_unchecked") && canonical(symbol).contains("{closure");
    thread.then_some("thread-start")
}
