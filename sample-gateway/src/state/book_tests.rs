use super::*;
use proptest::prelude::*;

fn order(name: &str, side: Side, qty: i64, price: i64) -> NewOrder {
    NewOrder {
        cl_ord_id: ClOrdId::new(name.as_bytes()).unwrap(),
        symbol: Symbol::new(b"ACME").unwrap(),
        side,
        qty: Qty(qty),
        ord_type: OrdType::Limit,
        price: Price(price),
        time_in_force: TimeInForce::Day,
    }
}

struct Venue(Book, Ids);

impl Venue {
    fn new() -> Self {
        Self(Book::default(), Ids::new(1, 1))
    }

    fn submit(&mut self, owner: u32, order: &NewOrder) -> Vec<Execution> {
        let mut happened = Vec::new();
        self.0.submit(SessionId(owner), order, None, &self.1, 0, &mut happened);
        happened
    }
}

#[test]
fn better_prices_then_earlier_orders_trade_first() {
    let mut venue = Venue::new();
    venue.submit(1, &order("late-price", Side::Sell, 5, 101));
    venue.submit(2, &order("first", Side::Sell, 5, 100));
    venue.submit(3, &order("second", Side::Sell, 5, 100));
    let happened = venue.submit(4, &order("buy", Side::Buy, 12, 101));
    let makers: Vec<(u32, i64, i64)> = happened
        .iter()
        .filter(|e| e.liquidity == Liquidity::Maker)
        .map(|e| (e.session.0, e.last_qty.0, e.last_price.0))
        .collect();
    assert_eq!(makers, [(2, 5, 100), (3, 5, 100), (1, 2, 101)]);
    assert_eq!(happened.last().map(|e| e.leaves_qty), Some(Qty(3)), "the maker's rest");
    assert_eq!(venue.0.len(), 1);
}

#[test]
fn what_does_not_cross_rests_and_can_be_cancelled_once() {
    let mut venue = Venue::new();
    let new = venue.submit(1, &order("bid", Side::Buy, 5, 99))[0];
    assert_eq!(venue.submit(2, &order("ask", Side::Sell, 5, 100)).len(), 1);
    let request = ClOrdId::new(b"cancel").unwrap();
    let done = venue.0.cancel(Side::Buy, Price(99), new.order_id, request, &venue.1, 0).unwrap();
    assert_eq!((done.kind, done.leaves_qty), (ExecKind::Canceled, Qty(0)));
    assert_eq!((done.cl_ord_id, done.orig_cl_ord_id), (request, new.cl_ord_id));
    assert_eq!(venue.0.cancel(Side::Buy, Price(99), new.order_id, request, &venue.1, 0), None);
}

#[test]
fn the_house_fills_the_rest_of_an_immediate_order() {
    let mut venue = Venue::new();
    venue.submit(1, &order("ask", Side::Sell, 4, 100));
    let immediate = NewOrder { time_in_force: TimeInForce::ImmediateOrCancel, ..order("buy", Side::Buy, 10, 105) };
    let happened = venue.submit(2, &immediate);
    let mine: Vec<(i64, i64)> = happened
        .iter()
        .filter(|e| e.session.0 == 2 && e.last_qty.0 > 0)
        .map(|e| (e.last_qty.0, e.last_price.0))
        .collect();
    assert_eq!(mine, [(4, 100), (6, 105)]);
    assert_eq!(happened.last().map(|e| (e.cum_qty.0, e.avg_price.0)), Some((10, 103)));
    assert!(venue.0.is_empty());
}

#[test]
fn a_market_order_without_any_price_is_cancelled() {
    let market = NewOrder {
        ord_type: OrdType::Market,
        time_in_force: TimeInForce::ImmediateOrCancel,
        ..order("m", Side::Buy, 10, 0)
    };
    let happened = Venue::new().submit(1, &market);
    assert_eq!(happened.iter().map(|e| e.kind).collect::<Vec<_>>(), [ExecKind::New, ExecKind::Canceled]);
}

proptest! {
    #[test]
    fn quantity_is_conserved_and_the_book_never_stays_crossed(
        orders in proptest::collection::vec((any::<bool>(), 1i64..50, 90i64..110), 1..200),
    ) {
        let mut venue = Venue::new();
        let mut entered = 0;
        let mut traded = 0;
        for (n, (buy, qty, price)) in orders.into_iter().enumerate() {
            let side = if buy { Side::Buy } else { Side::Sell };
            entered += qty;
            for e in venue.submit(1, &order(&format!("o{n}"), side, qty, price)) {
                traded += e.last_qty.0;
                prop_assert!(e.leaves_qty.0 >= 0);
                prop_assert_eq!(e.cum_qty.0 + e.leaves_qty.0, e.order_qty.0);
            }
            let bid = venue.0.bids.first_key_value().map(|(k, _)| -k.0);
            let ask = venue.0.asks.first_key_value().map(|(k, _)| k.0);
            if let (Some(bid), Some(ask)) = (bid, ask) {
                prop_assert!(bid < ask);
            }
        }
        let resting: i64 = venue.0.bids.values().chain(venue.0.asks.values()).map(|r| r.leaves().0).sum();
        prop_assert_eq!(entered, traded + resting);
    }
}
