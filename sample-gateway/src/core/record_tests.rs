use super::*;
use proptest::prelude::*;

fn samples(n: i64) -> Vec<Record> {
    let order = NewOrder {
        cl_ord_id: ClOrdId::new(b"order-1").unwrap(),
        symbol: Symbol::new(b"ACME").unwrap(),
        side: Side::Sell,
        qty: Qty(n),
        ord_type: OrdType::Limit,
        price: Price(-n),
        time_in_force: TimeInForce::ImmediateOrCancel,
    };
    let execution = Execution {
        exec_id: n.unsigned_abs(),
        session: SessionId(u32::MAX),
        order_id: OrderId(u64::MAX),
        cl_ord_id: order.cl_ord_id,
        orig_cl_ord_id: ClOrdId::EMPTY,
        symbol: order.symbol,
        side: Side::Buy,
        ord_type: OrdType::Market,
        time_in_force: TimeInForce::Day,
        kind: ExecKind::Canceled,
        order_qty: Qty(n),
        price: Price(i64::MAX),
        last_qty: Qty(i64::MIN),
        last_price: Price(0),
        cum_qty: Qty(1),
        leaves_qty: Qty(-1),
        avg_price: Price(n),
        liquidity: Liquidity::Maker,
        at_ms: 1,
    };
    let id = SessionId(7);
    vec![
        Record::Session { id, comp: CompId::new(b"PEER").unwrap() },
        Record::Sequence { id, next_in: 128, next_out: 127 },
        Record::Reset { id },
        Record::Execution(execution),
        Record::Reported { id, seq: 3, at_ms: 4, exec_id: 5, commission: Money(n) },
        Record::Sent { id, seq: 3, at_ms: 4, msg_type: b'j', body: b"58=x\x01".to_vec() },
        Record::Resting(Resting { owner: id, order_id: OrderId(1), order, cum_qty: Qty(1), cum_notional: Money(n) }),
        Record::Account { id, traded: Money(n), charged: Money(1) },
        Record::Ids { order: 5, exec: 6 },
        Record::Last { symbol: order.symbol, price: Price(n) },
    ]
}

fn decoded(bytes: &[u8]) -> Result<Vec<Record>, DecodeError> {
    let mut records = Vec::new();
    decode_all(bytes, |r| records.push(r)).map(|()| records)
}

proptest! {
    #[test]
    fn records_round_trip(n in any::<i64>()) {
        let mut bytes = Vec::new();
        samples(n).iter().for_each(|r| r.encode(&mut bytes));
        prop_assert_eq!(decoded(&bytes), Ok(samples(n)));
    }

    #[test]
    fn any_bytes_are_survived(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
        let _ = decoded(&bytes);
    }
}

#[test]
fn a_cut_entry_is_an_error_and_not_a_shorter_one() {
    for record in samples(5) {
        let mut bytes = Vec::new();
        record.encode(&mut bytes);
        for n in 1..bytes.len() {
            assert!(decoded(&bytes[..n]).is_err(), "{record:?} cut to {n} bytes");
        }
    }
}
