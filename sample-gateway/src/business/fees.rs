//! What a fill costs.
//!
//! The schedule has tiers: the larger a fill, the lower the rate. A maker pays less than a taker, and no fill costs
//! less than the schedule's minimum.

use gateway_interface::{FeeSchedule, FeeTier, Fill, Liquidity, Money, Rate};

/// One unit of money in the schedule's whole currency units.
const CURRENCY_UNIT: i64 = 10_000;

/// A [`Rate`] counts millionths.
const RATE_UNIT: i128 = 1_000_000;

/// The commission of one fill, rounded half up to the cent.
pub fn commission(schedule: &FeeSchedule, fill: &Fill) -> Money {
    let notional = Money::notional(fill.qty, fill.price);
    let Some(tier) = tier_for(schedule, fill) else {
        return schedule.minimum;
    };
    let rate = match fill.liquidity {
        Liquidity::Maker => tier.maker,
        Liquidity::Taker => tier.taker,
    };
    charge(notional, rate).max(schedule.minimum)
}

/// The highest tier that the fill reaches.
fn tier_for<'a>(schedule: &'a FeeSchedule, fill: &Fill) -> Option<&'a FeeTier> {
    let reached = fill.qty.0;
    schedule.tiers.iter().rev().find(|tier| reached >= tier.from_notional)
}

fn charge(notional: Money, rate: Rate) -> Money {
    let cent = i128::from(CURRENCY_UNIT / 100);
    let exact = i128::from(notional.0) * i128::from(rate.0);
    let cents = (exact + RATE_UNIT * cent / 2) / (RATE_UNIT * cent);
    Money(i64::try_from(cents * cent).unwrap_or(i64::MAX))
}

#[cfg(test)]
mod tests {
    use super::*;
    use gateway_interface::{Price, Qty};

    fn fill(qty: i64, price: i64, liquidity: Liquidity) -> Fill {
        Fill { qty: Qty(qty), price: Price(price * CURRENCY_UNIT), liquidity }
    }

    #[test]
    fn small_fills_pay_the_first_tier() {
        let schedule = FeeSchedule::default();
        assert_eq!(commission(&schedule, &fill(100, 50, Liquidity::Taker)).to_string(), "1.25");
        assert_eq!(commission(&schedule, &fill(100, 50, Liquidity::Maker)).to_string(), "0.50");
    }

    #[test]
    fn no_fill_costs_less_than_the_minimum() {
        let schedule = FeeSchedule::default();
        assert_eq!(commission(&schedule, &fill(1, 1, Liquidity::Maker)), schedule.minimum);
    }

    #[test]
    fn a_maker_never_pays_more_than_a_taker() {
        let schedule = FeeSchedule::default();
        for qty in [1, 100, 10_000, 1_000_000] {
            for price in [1, 20, 1_000] {
                let maker = commission(&schedule, &fill(qty, price, Liquidity::Maker));
                let taker = commission(&schedule, &fill(qty, price, Liquidity::Taker));
                assert!(maker <= taker, "{qty} at {price}: {maker} > {taker}");
            }
        }
    }

    #[test]
    fn cents_are_rounded_half_up() {
        assert_eq!(charge(Money(100 * CURRENCY_UNIT), Rate(50)), Money(100));
        assert_eq!(charge(Money(99 * CURRENCY_UNIT), Rate(50)), Money(0));
    }

    #[test]
    fn an_empty_schedule_charges_its_minimum() {
        let schedule = FeeSchedule { tiers: Vec::new(), minimum: Money(7) };
        assert_eq!(commission(&schedule, &fill(1_000, 1_000, Liquidity::Taker)), Money(7));
    }
}
