//! Risk, fees and conversion: the layer that changes, and is patched while the gateway runs.
//!
//! *Invariant:* nothing here keeps anything. No mutable static, no `thread_local!`, no cell; all that a function
//! knows is in its arguments (a test scans the source for it). What must last is owned by the state layer and handed
//! in as a [`Context`].

mod convert;
mod fees;
mod risk;

use gateway_interface::{Business, Cancel, Context, Execution, FieldSource, Fill, Money, NewOrder, Refusal};

/// The business layer of this build.
pub struct Desk;

impl Business for Desk {
    fn order(&self, _ctx: &Context<'_>, message: &dyn FieldSource) -> Result<NewOrder, Refusal> {
        convert::order(message)
    }

    fn cancel(&self, _ctx: &Context<'_>, message: &dyn FieldSource) -> Result<Cancel, Refusal> {
        convert::cancel(message)
    }

    fn check(&self, ctx: &Context<'_>, order: &NewOrder) -> Result<(), Refusal> {
        risk::check(ctx, order)
    }

    fn commission(&self, ctx: &Context<'_>, fill: &Fill) -> Money {
        fees::commission(ctx.fees, fill)
    }

    fn report(&self, _ctx: &Context<'_>, execution: &Execution, commission: Money, body: &mut Vec<u8>) {
        convert::report(execution, commission, body);
    }
}
