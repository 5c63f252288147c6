//! Whether an order may go to the book.

use gateway_interface::{Context, Money, NewOrder, OrdType, Price, Refusal, TimeInForce};

/// OrdRejReason (103) 3: order exceeds limit.
const EXCEEDS_LIMIT: u16 = 3;
/// OrdRejReason (103) 13: incorrect quantity.
const INCORRECT_QUANTITY: u16 = 13;

/// Holds an order against every limit of its account, the cheapest check first.
///
/// # Errors
/// [`Refusal::Order`], naming the limit and the figure that broke it.
pub fn check(ctx: &Context<'_>, order: &NewOrder) -> Result<(), Refusal> {
    check_size(ctx, order)?;
    check_price(ctx, order)?;
    check_exposure(ctx, order)
}

fn check_size(ctx: &Context<'_>, order: &NewOrder) -> Result<(), Refusal> {
    let limits = ctx.limits;
    if order.qty > limits.max_order_qty {
        let text = format!("quantity {} exceeds the limit of {}", order.qty, limits.max_order_qty);
        return Err(Refusal::Order { reason: INCORRECT_QUANTITY, text });
    }
    let notional = Money::notional(order.qty, valuation_price(ctx, order));
    if notional > limits.max_order_notional {
        let text = format!("order value {notional} exceeds the limit of {}", limits.max_order_notional);
        return Err(Refusal::Order { reason: EXCEEDS_LIMIT, text });
    }
    Ok(())
}

fn check_price(ctx: &Context<'_>, order: &NewOrder) -> Result<(), Refusal> {
    let (Some(last), OrdType::Limit) = (ctx.last_price, order.ord_type) else {
        return Ok(());
    };
    if ctx.limits.price_collar_percent == 0 {
        return Ok(());
    }
    let collar = last.0 / 100 * ctx.limits.price_collar_percent;
    if (order.price.0 - last.0).abs() > collar.max(1) {
        let text = format!("price {} lies too far from the last trade at {last}", order.price);
        return Err(Refusal::Order { reason: EXCEEDS_LIMIT, text });
    }
    Ok(())
}

fn check_exposure(ctx: &Context<'_>, order: &NewOrder) -> Result<(), Refusal> {
    if order.time_in_force != TimeInForce::Day {
        return Ok(());
    }
    let (limits, account) = (ctx.limits, ctx.account);
    if account.open_orders >= limits.max_open_orders {
        let text = format!("{} open orders are the limit", limits.max_open_orders);
        return Err(Refusal::Order { reason: EXCEEDS_LIMIT, text });
    }
    let open = account.open_notional.0.saturating_add(Money::notional(order.qty, order.price).0);
    if open > limits.max_open_notional.0 {
        let text = format!("open orders worth {} exceed the limit of {}", Money(open), limits.max_open_notional);
        return Err(Refusal::Order { reason: EXCEEDS_LIMIT, text });
    }
    Ok(())
}

/// A market order is valued at the last trade.
fn valuation_price(ctx: &Context<'_>, order: &NewOrder) -> Price {
    match order.ord_type {
        OrdType::Limit => order.price,
        OrdType::Market => ctx.last_price.unwrap_or_default(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use gateway_interface::{Account, ClOrdId, FeeSchedule, Qty, RiskLimits, Side, Symbol};

    fn order(qty: i64, price: i64) -> NewOrder {
        NewOrder {
            cl_ord_id: ClOrdId::new(b"A1").unwrap(),
            symbol: Symbol::new(b"ACME").unwrap(),
            side: Side::Buy,
            qty: Qty(qty),
            ord_type: OrdType::Limit,
            price: Price(price * 10_000),
            time_in_force: TimeInForce::Day,
        }
    }

    fn verdict(order: &NewOrder, account: Account, last: Option<i64>) -> Result<(), Refusal> {
        let limits = RiskLimits {
            max_order_qty: Qty(1_000),
            max_order_notional: Money(100_000 * 10_000),
            max_open_orders: 2,
            max_open_notional: Money(150_000 * 10_000),
            price_collar_percent: 10,
        };
        let ctx = Context {
            now_ms: 0,
            limits: &limits,
            fees: &FeeSchedule::default(),
            account: &account,
            last_price: last.map(|p| Price(p * 10_000)),
        };
        check(&ctx, order)
    }

    fn text(verdict: Result<(), Refusal>) -> String {
        match verdict {
            Err(Refusal::Order { text, .. }) => text,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn orders_within_all_limits_pass() {
        assert_eq!(verdict(&order(1_000, 100), Account::default(), Some(100)), Ok(()));
    }

    #[test]
    fn each_limit_names_itself() {
        let idle = Account::default();
        assert!(text(verdict(&order(1_001, 1), idle, None)).contains("quantity 1001"));
        assert!(text(verdict(&order(1_000, 101), idle, None)).contains("order value"));
        assert!(text(verdict(&order(1, 111), idle, Some(100))).contains("too far"));
        assert!(text(verdict(&order(1, 89), idle, Some(100))).contains("too far"));
        let full = Account { open_orders: 2, ..idle };
        assert!(text(verdict(&order(1, 1), full, None)).contains("2 open orders"));
        let heavy = Account { open_notional: Money(100_000 * 10_000), ..idle };
        assert!(text(verdict(&order(600, 100), heavy, None)).contains("open orders worth"));
    }

    #[test]
    fn what_does_not_rest_does_not_count_as_open() {
        let full = Account { open_orders: 2, ..Account::default() };
        let immediate = NewOrder { time_in_force: TimeInForce::ImmediateOrCancel, ..order(1, 1) };
        assert_eq!(verdict(&immediate, full, None), Ok(()));
    }
}
