//! Two versions of one state in one program: what a patch does to the functions, a switch in the shims' place does here.

use super::*;

#[derive(serde::Serialize, serde::Deserialize)]
struct Count {
    n: u64,
}
crate::state!(Count, "test.count", 1);
impl State for Count {}

#[test]
fn entries_are_made_used_and_ended() {
    let table: Table<Count> = Table::new();
    assert!(table.insert(1, 5, |n| Count { n }));
    assert!(!table.insert(1, 6, |n| Count { n }));
    assert_eq!(
        table.with(1, 2, |c, more| {
            c.n += more;
            c.n
        }),
        Some(7)
    );
    assert_eq!(table.with(2, 2, |c, more| c.n + more), None);
    assert_eq!((table.len(), table.ids()), (1, vec![1]));
    assert!(table.remove(1) && !table.remove(1) && table.is_empty());
    assert!(format!("{table:?}").contains("test.count"));
}

#[test]
fn no_update_is_lost() {
    let table: Table<Count> = Table::new();
    (0..16).for_each(|id| assert!(table.insert(id, (), |()| Count { n: 0 })));
    std::thread::scope(|s| {
        for t in 0..4u64 {
            let table = &table;
            s.spawn(move || {
                (0..10_000u64).for_each(|i| assert!(table.with((i * 7 + t) % 16, 1, |c, more| c.n += more).is_some()))
            });
        }
    });
    let sum: u64 = table.ids().into_iter().filter_map(|id| table.with(id, (), |c, ()| c.n)).sum();
    assert_eq!(sum, 40_000);
}

#[test]
fn a_value_of_another_version_is_not_touched() {
    let table: Table<Count> = Table::new();
    table.insert(1, (), |()| Count { n: 3 });
    let slot = table.inner().all().remove(0).1;
    slot.held.lock().built.version = 2;
    let met = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| table.with(1, (), |c, ()| c.n = 0)));
    assert!(met.is_err());
    slot.held.lock().built.version = 1;
    assert_eq!(table.with(1, (), |c, ()| c.n), Some(3));
}

#[test]
fn a_panic_leaves_the_table_usable() {
    let table: Table<Count> = Table::new();
    table.insert(1, (), |()| Count { n: 3 });
    let panicked = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| table.with(1, (), |_, ()| panic!("own"))));
    assert!(panicked.is_err());
    assert_eq!(table.with(1, (), |c, ()| c.n), Some(3));
}

#[test]
fn arguments_are_dropped_once() {
    let table: Table<Count> = Table::new();
    table.insert(1, (), |()| Count { n: 0 });
    let arg = std::sync::Arc::new(());
    for id in [1, 2] {
        let _ = table.with(id, arg.clone(), |_, arg| drop(arg));
        table.insert(id, arg.clone(), |_arg| Count { n: 1 });
    }
    assert_eq!(std::sync::Arc::strong_count(&arg), 1);
}

#[test]
fn the_gate_knows_versions() {
    let _table: Table<Count> = Table::new();
    let declared = |id: &str, from, version| [crate::patch::StateVersion { id: id.into(), version, from }];
    assert!(planned(&declared("test.count", Some(1), 1)).unwrap().is_none());
    assert!(planned(&declared("test.none", Some(1), 1)).unwrap().is_none());
    assert!(planned(&declared("test.none", Some(1), 2)).is_err());
    assert!(planned(&declared("test.count", Some(2), 3)).is_err());
    assert!(planned(&declared("test.count", Some(1), 2)).unwrap().is_some());
}

#[test]
fn bytes_that_are_left_over_are_an_error() {
    let mut bytes = Format::Postcard.write(&7u32).unwrap();
    assert_eq!(Format::Postcard.read::<u32>(&bytes), Ok(7));
    bytes.push(0);
    assert!(Format::Postcard.read::<u32>(&bytes).is_err());
    assert_eq!(Format::Json.read::<u32>(b"7"), Ok(7));
}
