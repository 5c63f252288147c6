use super::*;
use crate::business::Desk;
use gateway_interface::{ClOrdId, CompId, OrdType, Side};

fn order(name: &str, side: Side, qty: i64) -> NewOrder {
    NewOrder {
        cl_ord_id: ClOrdId::new(name.as_bytes()).unwrap(),
        symbol: Symbol::new(b"ACME").unwrap(),
        side,
        qty: Qty(qty),
        ord_type: OrdType::Limit,
        price: Price(1_000_000),
        time_in_force: TimeInForce::Day,
    }
}

/// One session sells 10 and buys 4 of them; only the first three executions were reported.
fn log() -> Vec<Record> {
    let id = SessionId(5);
    let books = Books::new(9, Ids::new(1, 1));
    let cell = books.get(&order("s", Side::Sell, 1).symbol).unwrap();
    let mut happened = Vec::new();
    let mut book = cell.book.lock();
    book.submit(id, &order("s", Side::Sell, 10), None, &books.ids, 1, &mut happened);
    book.submit(id, &order("b", Side::Buy, 4), None, &books.ids, 2, &mut happened);
    assert_eq!(happened.len(), 4);
    let mut log = vec![
        Record::Session { id, comp: CompId::new(b"PEER").unwrap() },
        Record::Sequence { id, next_in: 4, next_out: 5 },
    ];
    log.extend(happened.iter().copied().map(Record::Execution));
    for (n, e) in happened.iter().take(3).enumerate() {
        let commission = Money(if e.fill().is_some() { 700 } else { 0 });
        log.push(Record::Reported { id, seq: 2 + n as u64, at_ms: 3, exec_id: e.exec_id, commission });
    }
    log
}

fn replay(log: Vec<Record>) -> Recovered {
    let mut recovered = Recovered::new(1 << 20);
    log.into_iter().for_each(|r| recovered.apply(r, &Desk));
    recovered
}

#[test]
fn books_sessions_and_messages_come_back() {
    let mut recovered = replay(log());
    assert_eq!(recovered.report_the_rest(&Desk, b"GATEWAY", 9), 1, "the maker's fill was not reported");
    let session = &recovered.sessions[&SessionId(5)];
    assert_eq!(session.sequence(), (4, 6));
    let sent: Vec<(u64, bool)> = session
        .sent
        .range(0, 99)
        .map(|s| (s.seq, String::from_utf8_lossy(&s.body).contains("\u{1}12=0.07\u{1}")))
        .collect();
    assert_eq!(sent[..3], [(2, false), (3, false), (4, true)], "the commission as charged");
    assert_eq!(sent[3].0, 5);
    assert_eq!(session.orders.get(&order("s", Side::Sell, 1).cl_ord_id).map(|o| o.leaves), Some(Qty(6)));
    assert_eq!(session.orders.account.open_orders, 1);
    let (books, _) = recovered.into_state(9);
    assert_eq!(books.resting(), 1);
    let symbol = order("s", Side::Sell, 1).symbol;
    assert_eq!(books.get(&symbol).unwrap().last_price(), Some(Price(1_000_000)));
    assert!(books.ids.next_exec() > 4);
}

#[test]
fn a_snapshot_says_the_same_as_the_log() {
    let mut first = replay(log());
    first.report_the_rest(&Desk, b"GATEWAY", 9);
    let mut bytes = Vec::new();
    first.snapshot().iter().for_each(|r| r.encode(&mut bytes));
    let mut second = Recovered::new(1 << 20);
    super::super::record::decode_all(&bytes, |r| second.apply(r, &Desk)).unwrap();
    assert_eq!(second.snapshot(), first.snapshot());
    assert_eq!(second.report_the_rest(&Desk, b"GATEWAY", 9), 0);
    let account = |r: &Recovered| r.sessions[&SessionId(5)].orders.account;
    assert_eq!(account(&first), account(&second));
}
