//! The business layer's face, and what it is handed.

use crate::{Cancel, Execution, FieldSource, Fill, Money, NewOrder, Price, Qty, Rate, Refusal};

/// Where the limits of one account lie.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RiskLimits {
    /// Largest quantity of one order.
    pub max_order_qty: Qty,
    /// Largest quantity times price of one order.
    pub max_order_notional: Money,
    /// Most orders of one account that may rest at a time.
    pub max_open_orders: u32,
    /// Largest value of all resting orders of one account.
    pub max_open_notional: Money,
    /// How far a limit price may lie from the last trade, in percent; 0 switches the check off.
    pub price_collar_percent: i64,
}

impl Default for RiskLimits {
    fn default() -> Self {
        Self {
            max_order_qty: Qty(1_000_000),
            max_order_notional: Money(50_000_000 * 10_000),
            max_open_orders: 50_000,
            max_open_notional: Money(2_000_000_000 * 10_000),
            price_collar_percent: 50,
        }
    }
}

/// The rates from a notional on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FeeTier {
    /// The least notional, in whole currency units, that this tier is for.
    pub from_notional: i64,
    /// What the first in the book pays.
    pub maker: Rate,
    /// What the second pays.
    pub taker: Rate,
}

/// What is charged for a fill.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FeeSchedule {
    /// In ascending order; the first starts at 0.
    pub tiers: Vec<FeeTier>,
    /// The least commission of one fill.
    pub minimum: Money,
}

impl Default for FeeSchedule {
    fn default() -> Self {
        let tier = |from_notional, maker, taker| FeeTier { from_notional, maker: Rate(maker), taker: Rate(taker) };
        Self { tiers: vec![tier(0, 100, 250), tier(100_000, 60, 150), tier(1_000_000, 20, 80)], minimum: Money(100) }
    }
}

/// Running figures of one session's account; owned by its session.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Account {
    /// Orders that rest now.
    pub open_orders: u32,
    /// Their quantity times price.
    pub open_notional: Money,
    /// All that was traded.
    pub traded_notional: Money,
    /// All that was charged.
    pub charged: Money,
}

/// What a business function may know about the rest of the gateway. It keeps nothing of its own.
#[derive(Clone, Copy, Debug)]
pub struct Context<'a> {
    /// Milliseconds since 1970.
    pub now_ms: u64,
    /// The limits in force.
    pub limits: &'a RiskLimits,
    /// The fees in force.
    pub fees: &'a FeeSchedule,
    /// The account concerned.
    pub account: &'a Account,
    /// The last trade of the symbol concerned, if there was one.
    pub last_price: Option<Price>,
}

/// What the core asks the business layer.
///
/// The core guards every call with `catch_unwind`: a panic costs the one request a business-level reject.
pub trait Business: Send + Sync {
    /// Reads a `NewOrderSingle`.
    ///
    /// # Errors
    /// A [`Refusal`] that names the field.
    fn order(&self, ctx: &Context<'_>, message: &dyn FieldSource) -> Result<NewOrder, Refusal>;

    /// Reads an `OrderCancelRequest`.
    ///
    /// # Errors
    /// A [`Refusal`] that names the field.
    fn cancel(&self, ctx: &Context<'_>, message: &dyn FieldSource) -> Result<Cancel, Refusal>;

    /// Decides whether an order may go to the book.
    ///
    /// # Errors
    /// A [`Refusal::Order`] that names the limit.
    fn check(&self, ctx: &Context<'_>, order: &NewOrder) -> Result<(), Refusal>;

    /// What a fill costs.
    fn commission(&self, ctx: &Context<'_>, fill: &Fill) -> Money;

    /// Writes the body of an `ExecutionReport`: all fields behind the header.
    fn report(&self, ctx: &Context<'_>, execution: &Execution, commission: Money, body: &mut Vec<u8>);
}
