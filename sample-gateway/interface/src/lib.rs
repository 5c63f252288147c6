//! The types and traits that the layers of the sample gateway share.
//!
//! The core knows the business layer only as [`Business`]; the business layer knows the rest of the gateway only
//! as the [`Context`] that it is handed with each call. Objects of these types are alive while a patch is applied,
//! so their layout is a contract: `interface.lock` holds a digest of this crate's source, and a test fails when
//! the two disagree. Who changes the interface updates the lock on purpose, and ships a restart or a migration.

mod business;
mod fields;
mod name;
mod numbers;
mod order;

pub use business::{Account, Business, Context, FeeSchedule, FeeTier, RiskLimits};
pub use fields::{put, put_number, FieldSource, SOH};
pub use name::{ClOrdId, CompId, Name, Symbol};
pub use numbers::{Money, ParseNumberError, Price, Qty, Rate};
pub use order::{
    Cancel, ExecKind, Execution, Fill, Liquidity, NewOrder, OrdType, OrderId, Refusal, SessionId, Side, TimeInForce,
};
