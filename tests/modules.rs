//! Module handles: what is loaded and what is refused, switching, weights, release, the two ways back.

mod support;

use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use livepatch::module::{describe, interface, Handle, LoadError, Refusal, VersionId};

/// As in tests/modules/desk.rs.
#[repr(C)]
pub struct Order {
    qty: i64,
    price: i64,
    side: Side,
}
describe! { struct Order { qty: i64, price: i64, side: Side } }

/// As there.
#[repr(u8)]
#[allow(dead_code)] // a module may be asked for either
#[derive(Clone, Copy)]
pub enum Side {
    /// 1
    Buy,
    /// 2
    Sell,
}
describe! { enum Side { Buy, Sell } }

interface! {
    /// What tests/modules/desk.rs implements.
    pub trait Desk, table DeskTable, version "1.3";
    /// Of the module.
    fn version(&self) -> u64;
    /// In hundredths.
    fn fee(&self, order: &Order, rate: i64) -> i64;
    /// Calls so far.
    fn count(&self) -> u64;
}

const ORDER: Order = Order { qty: 100, price: 5_000, side: Side::Sell };

struct Built {
    dir: PathBuf,
    interface: PathBuf,
}

impl Built {
    fn new(test: &str) -> Self {
        let dir = support::scratch(&format!("modules-{test}"));
        let interface = support::modules::interface(&dir);
        Self { dir, interface }
    }

    fn desk(&self, cfgs: &[&str]) -> PathBuf {
        support::modules::desk(&self.dir, &self.interface, &format!("desk-{}", cfgs.join("-")), cfgs, &[])
    }
}

fn refusal(handle: &Handle<DeskTable>, file: &std::path::Path) -> Refusal {
    match handle.load(file) {
        Err(LoadError::Refused { why, .. }) => why,
        other => panic!("{}: {other:?}", file.display()),
    }
}

/// Waits for the keeper: what it does is not told to anybody.
fn eventually(what: &str, mut is: impl FnMut() -> bool) {
    for _ in 0..10_000 {
        if is() {
            return;
        }
        std::thread::sleep(Duration::from_millis(1));
    }
    panic!("never: {what}");
}

fn alive(handle: &Handle<DeskTable>, id: VersionId) -> (bool, bool) {
    let status = handle.status().into_iter().find(|s| s.id == id).expect("known");
    (status.alive, status.mapped)
}

#[test]
fn a_version_answers_until_another_does_and_both_ways_lead_back() {
    let built = Built::new("switch");
    let (one, two) = (built.desk(&[]), built.desk(&["v2"]));
    let handle = Handle::<DeskTable>::new();
    assert!(handle.try_enter(1).is_none());
    let first = handle.load(&one).unwrap();
    handle.switch(first).unwrap();
    assert_eq!((handle.enter(1).version(), handle.enter(1).fee(&ORDER, 250)), (first, 126));
    let held = handle.enter(1);

    // The second is made from the first's state, and the first's last call goes on in it.
    let second = handle.load(&two).unwrap();
    handle.switch(second).unwrap();
    assert_eq!(handle.enter(1).fee(&ORDER, 250), 128);
    assert_eq!(handle.enter(1).count(), 2);
    handle.release(first).unwrap();
    std::thread::sleep(Duration::from_millis(20));
    assert_eq!(alive(&handle, first), (true, true), "a call is in it");
    assert_eq!(held.fee(&ORDER, 250), 126);

    // Back while it is alive.
    handle.switch(first).unwrap();
    assert_eq!(handle.enter(1).fee(&ORDER, 250), 126);
    handle.switch(second).unwrap();
    assert!(matches!(handle.release(second), Err(LoadError::InUse(_))));
    drop(held);
    handle.release(first).unwrap();
    eventually("the first is unloaded", || alive(&handle, first) == (false, false));

    // Back when it is gone: from the kept file, with the state that the second says in the first's form.
    let _ = (handle.enter(7).fee(&ORDER, 1), std::fs::remove_file(&one));
    let count = handle.enter(7).count();
    handle.switch(first).unwrap();
    assert_eq!((handle.enter(7).fee(&ORDER, 250), handle.enter(7).count()), (126, count + 1));
    handle.release(second).unwrap();
    eventually("the second is unloaded", || alive(&handle, second) == (false, false));
    handle.forget(second).unwrap();
    assert!(matches!(handle.switch(second), Err(LoadError::NotLoaded(_))));
}

#[test]
fn what_keeps_the_interface_is_loaded() {
    let built = Built::new("accepted");
    let handle = Handle::<DeskTable>::new();
    for cfgs in [
        &["v2"][..],
        &["new_function"],
        &["mutable_static", "declared"],
        &["thread_local", "declared"],
        &["constructor", "declared"],
    ] {
        let id = handle.load(&built.desk(cfgs)).unwrap_or_else(|e| panic!("{cfgs:?}: {e}"));
        handle.switch(id).unwrap();
        assert!(handle.enter(0).fee(&ORDER, 250) >= 126);
    }
}

#[test]
fn what_does_not_keep_it_is_refused_by_name() {
    let built = Built::new("refused");
    let handle = Handle::<DeskTable>::new();
    for (cfg, program, module) in [
        (
            "param_added",
            "fn fee(order: &Order, rate: i64) -> i64",
            "fn fee(order: &Order, rate: i64, minimum: i64) -> i64",
        ),
        ("method_inserted", "fn count() -> u64", "fn tax(order: &Order) -> i64"),
        ("method_reordered", "fn version() -> u64", "fn version() -> u64"),
        (
            "member_reordered",
            "type Order 24 8 { qty: i64 @0, price: i64 @8, side: Side @16 }",
            "type Order 24 8 { price: i64 @0, qty: i64 @8, side: Side @16 }",
        ),
    ] {
        match refusal(&handle, &built.desk(&[cfg])) {
            Refusal::Interface(d) => {
                assert!(d.program.iter().any(|l| l == program), "{cfg}: {d}");
                assert!(d.module.iter().any(|l| l == module), "{cfg}: {d}");
            }
            other => panic!("{cfg}: {other}"),
        }
    }
    assert_eq!(refusal(&handle, &built.desk(&["mutable_static"])), Refusal::Static("desk::SEEN".into()));
    assert!(
        matches!(refusal(&handle, &built.desk(&["thread_local"])), Refusal::ThreadLocal(name) if name.starts_with("desk::LAST"))
    );
    assert_eq!(refusal(&handle, &built.desk(&["constructor"])), Refusal::Constructor("desk::eager".into()));
    assert_eq!(refusal(&handle, &built.desk(&["no_factory"])), Refusal::NoFactory);
    match handle.load(&built.desk(&["unwilling"])) {
        Err(LoadError::Factory { why, .. }) => assert_eq!(why, "not today"),
        other => panic!("{other:?}"),
    }
    let stripped = support::modules::desk(&built.dir, &built.interface, "stripped", &[], &["-Cstrip=symbols"]);
    assert_eq!(refusal(&handle, &stripped), Refusal::NoSymbols);
    let pinned = support::modules::desk(&built.dir, &built.interface, "pinned", &[], &["-Clink-arg=-Wl,-z,nodelete"]);
    assert!(matches!(refusal(&handle, &pinned), Refusal::Pinned(_)));

    let good = std::fs::read(built.desk(&[])).unwrap();
    let damaged = built.dir.join("damaged.so");
    for (bytes, name) in
        [(&b"#!/bin/sh"[..], "no ELF"), (&[], "empty"), (&good[..good.len() / 2], "half"), (&good[..100], "head")]
    {
        std::fs::write(&damaged, bytes).unwrap();
        assert!(matches!(refusal(&handle, &damaged), Refusal::NotALibrary(_)), "{name}");
    }
    assert_eq!(handle.status(), [], "nothing was loaded");
    assert!(handle.try_enter(0).is_none());
}

#[test]
fn damaged_files_are_errors() {
    let built = Built::new("damaged");
    let good = std::fs::read(built.desk(&[])).unwrap();
    let program =
        livepatch::module::Description::parse(<DeskTable as livepatch::module::Table>::text().as_bytes()).unwrap();
    livepatch::module::check(&good, &program).unwrap();
    let mut seed = 1u64;
    let mut random = || {
        seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (seed >> 33) as usize
    };
    // Headers, tables and dynamic section are where damage leads somewhere.
    let sections = u64::from_le_bytes(std::array::from_fn(|i| good[40 + i])) as usize;
    for round in 0..300 {
        let mut bytes = good.clone();
        for _ in 0..1 + round % 4 {
            let at = match random() % 3 {
                0 => random() % 1_000,
                1 => sections + random() % (good.len() - sections),
                _ => random() % good.len(),
            };
            bytes[at] = random() as u8;
        }
        // An answer, whichever: no panic, no endless loop.
        let _ = livepatch::module::check(&bytes, &program);
        let _ = livepatch::module::check(&bytes[..random() % bytes.len()], &program);
    }
}

#[test]
fn a_panic_in_a_module_is_the_programs_and_costs_one_call() {
    let built = Built::new("panic");
    let handle = Handle::<DeskTable>::new();
    let id = handle.load(&built.desk(&["v2"])).unwrap();
    handle.switch(id).unwrap();
    let panic = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| handle.enter(1).fee(&ORDER, 13))).unwrap_err();
    assert_eq!(panic.downcast_ref::<String>().map(String::as_str), Some("thirteen in version 2"));
    assert_eq!(handle.enter(1).fee(&ORDER, 250), 128);
    handle.switch(handle.load(&built.desk(&[])).unwrap()).unwrap();
    handle.release(id).unwrap();
    eventually("its guard went with the panic", || !alive(&handle, id).0);
}

#[test]
fn sessions_are_shared_out_and_never_move_back() {
    let built = Built::new("weights");
    let handle = Handle::<DeskTable>::new();
    let old = handle.load(&built.desk(&[])).unwrap();
    handle.switch(old).unwrap();
    let new = handle.load(&built.desk(&["v2"])).unwrap();
    let mut before = vec![false; 20_000];
    for share in [0, 100, 1_000, 5_000, 9_900, 10_000] {
        handle.weigh(&[(new, share), (old, 0)]).unwrap();
        let now: Vec<bool> = (0..20_000).map(|s| handle.enter(s).version() == new).collect();
        let again = (0..20_000).all(|s| now[s as usize] == (Desk::version(&*handle.enter(s)) == 2));
        assert!(again, "a session keeps its version");
        assert!(before.iter().zip(&now).all(|(was, is)| !was || *is), "{share}: a session moved back");
        let n = now.iter().filter(|n| **n).count() as f64;
        let p = f64::from(share) / 10_000.0;
        // Five standard deviations; the hash is fixed, so the answer is always the same.
        assert!((n - p * 20_000.0).abs() <= 5.0 * (20_000.0 * p * (1.0 - p)).sqrt(), "{share}: {n}");
        before = now;
    }
}

#[test]
fn threads_call_while_versions_come_and_go() {
    let built = Built::new("storm");
    let handle = Handle::<DeskTable>::new();
    let (a, b) = (built.desk(&[]), built.desk(&["v2"]));
    let mut current = handle.load(&a).unwrap();
    handle.switch(current).unwrap();
    let stop = AtomicBool::new(false);
    let calls: u64 = std::thread::scope(|scope| {
        let call = || {
            let mut calls = 0;
            while !stop.load(Ordering::Relaxed) {
                let entered = handle.enter(calls);
                let want = if Desk::version(&*entered) == 1 { 126 } else { 128 };
                assert_eq!(entered.fee(&ORDER, 250), want, "one message, one version");
                calls += 1;
            }
            calls
        };
        let threads: Vec<_> = (0..3).map(|_| scope.spawn(call)).collect();
        for round in 0..40 {
            let next = handle.load(if round % 2 == 0 { &b } else { &a }).unwrap();
            handle.switch(next).unwrap();
            handle.release(current).unwrap();
            eventually("it is unloaded", || alive(&handle, current) == (false, false));
            handle.forget(current).unwrap();
            current = next;
        }
        stop.store(true, Ordering::Relaxed);
        threads.into_iter().map(|t| t.join().unwrap()).sum()
    });
    assert!(calls > 0 && handle.status().len() == 1);
}
