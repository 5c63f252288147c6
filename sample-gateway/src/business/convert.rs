//! From fields to orders, and from executions to fields.

use gateway_interface::{
    put, put_number, Cancel, ClOrdId, ExecKind, Execution, FieldSource, Liquidity, Money, NewOrder, OrdType, Price,
    Qty, Refusal, Side, Symbol, TimeInForce,
};

/// SessionRejectReason (373) values.
const TAG_MISSING: u16 = 1;
const VALUE_INCORRECT: u16 = 5;
const FORMAT_INCORRECT: u16 = 6;
/// OrdRejReason (103) 11: unsupported order characteristic.
const UNSUPPORTED: u16 = 11;

/// Bounds that keep quantity times price far inside 64 bits.
const MAX_QTY: i64 = 10_000_000;
const MAX_PRICE: i64 = 1_000_000 * 10_000;

/// Reads a NewOrderSingle.
///
/// # Errors
/// [`Refusal::Field`] names what breaks the protocol, [`Refusal::Order`] what is legal and not offered here.
pub fn order(message: &dyn FieldSource) -> Result<NewOrder, Refusal> {
    let cl_ord_id = name(message, 11, ClOrdId::new)?;
    let symbol = name(message, 55, Symbol::new)?;
    let side = side(message)?;
    required(message, 60)?;
    let qty = Qty::parse(required(message, 38)?).map_err(|_| wrong_format(38))?;
    if qty.0 <= 0 || qty.0 > MAX_QTY {
        return Err(wrong_value(38));
    }
    let (ord_type, price) = match required(message, 40)? {
        b"1" => (OrdType::Market, Price(0)),
        b"2" => (OrdType::Limit, price(message)?),
        b"3" | b"4" | b"P" => return Err(unsupported("only market and limit orders are offered")),
        _ => return Err(wrong_value(40)),
    };
    let time_in_force = match (message.field(59), ord_type) {
        (_, OrdType::Market) => TimeInForce::ImmediateOrCancel,
        (None | Some(b"0"), OrdType::Limit) => TimeInForce::Day,
        (Some(b"3" | b"4"), OrdType::Limit) => TimeInForce::ImmediateOrCancel,
        (Some(b"1" | b"2" | b"5" | b"6" | b"7"), _) => return Err(unsupported("time in force is not offered")),
        (Some(_), _) => return Err(wrong_value(59)),
    };
    Ok(NewOrder { cl_ord_id, symbol, side, qty, ord_type, price, time_in_force })
}

/// Reads an OrderCancelRequest.
///
/// # Errors
/// [`Refusal::Field`] names what breaks the protocol.
pub fn cancel(message: &dyn FieldSource) -> Result<Cancel, Refusal> {
    Ok(Cancel {
        cl_ord_id: name(message, 11, ClOrdId::new)?,
        orig_cl_ord_id: name(message, 41, ClOrdId::new)?,
        symbol: name(message, 55, Symbol::new)?,
        side: side(message)?,
    })
}

/// Writes the body of an ExecutionReport. Commission (12) is that of this execution alone, as an absolute amount
/// (CommType 3).
pub fn report(execution: &Execution, commission: Money, body: &mut Vec<u8>) {
    let (exec_type, status): (&[u8], &[u8]) = match execution.kind {
        ExecKind::New => (b"0", b"0"),
        ExecKind::Canceled => (b"4", b"4"),
        ExecKind::Trade if execution.leaves_qty.0 > 0 => (b"F", b"1"),
        ExecKind::Trade => (b"F", b"2"),
    };
    put_number(body, 37, execution.order_id.0);
    put(body, 11, execution.cl_ord_id.as_bytes());
    if !execution.orig_cl_ord_id.is_empty() {
        put(body, 41, execution.orig_cl_ord_id.as_bytes());
    }
    put_number(body, 17, execution.exec_id);
    put(body, 150, exec_type);
    put(body, 39, status);
    put(body, 55, execution.symbol.as_bytes());
    put(body, 54, if execution.side == Side::Buy { b"1" } else { b"2" });
    put_number(body, 38, execution.order_qty);
    put(body, 40, if execution.ord_type == OrdType::Market { b"1" } else { b"2" });
    if execution.ord_type == OrdType::Limit {
        put_number(body, 44, execution.price);
    }
    put(body, 59, if execution.time_in_force == TimeInForce::Day { b"0" } else { b"3" });
    if execution.kind == ExecKind::Trade {
        put_number(body, 32, execution.last_qty);
        put_number(body, 31, execution.last_price);
    }
    put_number(body, 151, execution.leaves_qty);
    put_number(body, 14, execution.cum_qty);
    put_number(body, 6, execution.avg_price);
    put_number(body, 12, commission);
    put(body, 13, b"3");
    if execution.kind == ExecKind::Trade {
        put(body, 851, if execution.liquidity == Liquidity::Maker { b"1" } else { b"2" });
    }
}

fn side(message: &dyn FieldSource) -> Result<Side, Refusal> {
    match required(message, 54)? {
        b"1" => Ok(Side::Buy),
        b"2" => Ok(Side::Sell),
        _ => Err(wrong_value(54)),
    }
}

fn price(message: &dyn FieldSource) -> Result<Price, Refusal> {
    let price = Price::parse(required(message, 44)?).map_err(|_| wrong_format(44))?;
    if price.0 <= 0 || price.0 > MAX_PRICE {
        return Err(wrong_value(44));
    }
    Ok(price)
}

fn name<T>(message: &dyn FieldSource, tag: u32, parse: fn(&[u8]) -> Option<T>) -> Result<T, Refusal> {
    parse(required(message, tag)?).ok_or(wrong_value(tag))
}

fn required(message: &dyn FieldSource, tag: u32) -> Result<&[u8], Refusal> {
    message.field(tag).ok_or(Refusal::Field { tag, reason: TAG_MISSING, text: "required tag missing" })
}

fn wrong_value(tag: u32) -> Refusal {
    Refusal::Field { tag, reason: VALUE_INCORRECT, text: "value is incorrect (out of range) for this tag" }
}

fn wrong_format(tag: u32) -> Refusal {
    Refusal::Field { tag, reason: FORMAT_INCORRECT, text: "incorrect data format for value" }
}

fn unsupported(text: &str) -> Refusal {
    Refusal::Order { reason: UNSUPPORTED, text: text.to_owned() }
}

#[cfg(test)]
mod tests {
    use super::*;
    use gateway_interface::{OrderId, SessionId};

    struct Fields(Vec<(u32, &'static str)>);

    impl FieldSource for Fields {
        fn field(&self, tag: u32) -> Option<&[u8]> {
            self.0.iter().find(|f| f.0 == tag).map(|f| f.1.as_bytes())
        }
    }

    fn limit() -> Fields {
        Fields(vec![(11, "A1"), (55, "ACME"), (54, "1"), (60, "x"), (38, "100"), (40, "2"), (44, "12.5")])
    }

    fn with(tag: u32, value: &'static str) -> Result<NewOrder, Refusal> {
        let mut fields = limit();
        fields.0.retain(|f| f.0 != tag);
        fields.0.push((tag, value));
        order(&fields)
    }

    #[test]
    fn a_limit_order_is_read() {
        let read = order(&limit()).unwrap();
        assert_eq!((read.qty, read.price, read.side), (Qty(100), Price(125_000), Side::Buy));
        assert_eq!(read.time_in_force, TimeInForce::Day);
    }

    #[test]
    fn each_missing_field_is_named() {
        for at in 0..limit().0.len() {
            let mut fields = limit();
            let (missing, _) = fields.0.remove(at);
            match order(&fields) {
                Err(Refusal::Field { tag, reason: TAG_MISSING, .. }) => assert_eq!(tag, missing),
                other => panic!("without {missing}: {other:?}"),
            }
        }
    }

    #[test]
    fn wrong_values_are_refused() {
        for (tag, value, reason) in
            [(38, "0", 5), (38, "-1", 5), (38, "x", 6), (44, "0", 5), (44, "1e9", 6), (54, "7", 5), (40, "Q", 5)]
        {
            match with(tag, value) {
                Err(Refusal::Field { tag: t, reason: r, .. }) => assert_eq!((t, r), (tag, reason)),
                other => panic!("{tag}={value}: {other:?}"),
            }
        }
        assert!(matches!(with(40, "3"), Err(Refusal::Order { .. })));
        assert!(matches!(with(59, "1"), Err(Refusal::Order { .. })));
    }

    #[test]
    fn a_trade_carries_its_commission() {
        let execution = Execution {
            exec_id: 9,
            session: SessionId(1),
            order_id: OrderId(4),
            cl_ord_id: ClOrdId::new(b"A1").unwrap(),
            orig_cl_ord_id: ClOrdId::EMPTY,
            symbol: Symbol::new(b"ACME").unwrap(),
            side: Side::Sell,
            ord_type: OrdType::Limit,
            time_in_force: TimeInForce::Day,
            kind: ExecKind::Trade,
            order_qty: Qty(10),
            price: Price(10_000),
            last_qty: Qty(4),
            last_price: Price(10_000),
            cum_qty: Qty(4),
            leaves_qty: Qty(6),
            avg_price: Price(10_000),
            liquidity: Liquidity::Taker,
            at_ms: 0,
        };
        let mut body = Vec::new();
        report(&execution, Money(12_500), &mut body);
        let text = String::from_utf8(body).unwrap().replace('\u{1}', "|");
        assert_eq!(
            text,
            "37=4|11=A1|17=9|150=F|39=1|55=ACME|54=2|38=10|40=2|44=1.00|59=0|32=4|31=1.00|151=6|14=4|6=1.00|12=1.25|13=3|851=2|"
        );
    }
}
