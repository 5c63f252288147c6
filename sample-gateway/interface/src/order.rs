//! Orders, fills and what is reported of them.

use crate::{ClOrdId, Price, Qty, Symbol};

/// A counterparty's session, for as long as the journal lives.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SessionId(pub u32);

/// The gateway's own number of an order; later orders have greater ones.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct OrderId(pub u64);

/// `Side` (54).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Side {
    /// 1
    Buy,
    /// 2
    Sell,
}

/// `OrdType` (40).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum OrdType {
    /// 1
    Market,
    /// 2
    Limit,
}

/// `TimeInForce` (59).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum TimeInForce {
    /// 0: rests in the book until filled or cancelled.
    Day,
    /// 3: what the book does not fill at once, the house fills at the limit (or, for a market order, last) price.
    ImmediateOrCancel,
}

/// Who was first: fees differ.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Liquidity {
    /// The order rested in the book.
    Maker,
    /// The order met one that rested, or the house.
    Taker,
}

/// A `NewOrderSingle` that was understood.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NewOrder {
    /// 11
    pub cl_ord_id: ClOrdId,
    /// 55
    pub symbol: Symbol,
    /// 54
    pub side: Side,
    /// 38
    pub qty: Qty,
    /// 40
    pub ord_type: OrdType,
    /// 44; zero for a market order.
    pub price: Price,
    /// 59
    pub time_in_force: TimeInForce,
}

/// An `OrderCancelRequest` that was understood.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Cancel {
    /// 11
    pub cl_ord_id: ClOrdId,
    /// 41
    pub orig_cl_ord_id: ClOrdId,
    /// 55
    pub symbol: Symbol,
    /// 54
    pub side: Side,
}

/// What a fee is charged on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fill {
    /// 32
    pub qty: Qty,
    /// 31
    pub price: Price,
    /// Whether the order was first.
    pub liquidity: Liquidity,
}

/// `ExecType` (150), as far as this gateway has it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ExecKind {
    /// 0
    New,
    /// F
    Trade,
    /// 4
    Canceled,
}

/// One thing that happened to one order, in the terms of an `ExecutionReport`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Execution {
    /// 17; unique for the life of the journal.
    pub exec_id: u64,
    /// Whose order it is.
    pub session: SessionId,
    /// 37
    pub order_id: OrderId,
    /// 11: of the order or, when it was cancelled, of the cancel request.
    pub cl_ord_id: ClOrdId,
    /// 41: of the cancelled order, else empty.
    pub orig_cl_ord_id: ClOrdId,
    /// 55
    pub symbol: Symbol,
    /// 54
    pub side: Side,
    /// 40
    pub ord_type: OrdType,
    /// 59
    pub time_in_force: TimeInForce,
    /// 150
    pub kind: ExecKind,
    /// 38
    pub order_qty: Qty,
    /// 44
    pub price: Price,
    /// 32; zero unless a trade.
    pub last_qty: Qty,
    /// 31; zero unless a trade.
    pub last_price: Price,
    /// 14
    pub cum_qty: Qty,
    /// 151
    pub leaves_qty: Qty,
    /// 6
    pub avg_price: Price,
    /// 851, of a trade.
    pub liquidity: Liquidity,
    /// 60, in milliseconds since 1970.
    pub at_ms: u64,
}

impl Execution {
    /// The fill of a trade.
    pub fn fill(&self) -> Option<Fill> {
        (self.kind == ExecKind::Trade).then_some(Fill {
            qty: self.last_qty,
            price: self.last_price,
            liquidity: self.liquidity,
        })
    }
}

/// Why the business layer does not take a request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Refusal {
    /// The message breaks the protocol: answered by a session-level Reject.
    Field {
        /// 371
        tag: u32,
        /// 373
        reason: u16,
        /// 58
        text: &'static str,
    },
    /// The request is well-formed and not accepted: answered by a rejecting report.
    Order {
        /// 103 (or 102 for a cancel request)
        reason: u16,
        /// 58
        text: String,
    },
}
