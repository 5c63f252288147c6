//! A session's open orders and the figures of its account.

use gateway_interface::{Account, ClOrdId, ExecKind, Execution, Money, OrderId, Price, Qty, Side, Symbol};
use std::collections::HashMap;

/// Where an open order is to be found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct OpenOrder {
    /// The gateway's number.
    pub order_id: OrderId,
    /// Its book.
    pub symbol: Symbol,
    /// Its side of the book.
    pub side: Side,
    /// Its level.
    pub price: Price,
    /// What is not filled yet.
    pub leaves: Qty,
}

/// The open orders of one session by the names that the counterparty gave them.
#[derive(Debug, Default)]
pub struct OpenOrders {
    by_name: HashMap<ClOrdId, OpenOrder>,
    /// Running figures, handed to the business layer.
    pub account: Account,
}

impl OpenOrders {
    /// The order with this name.
    pub fn get(&self, name: &ClOrdId) -> Option<&OpenOrder> {
        self.by_name.get(name)
    }

    /// Takes in what happened to an order of this session.
    pub fn apply(&mut self, execution: &Execution) {
        match execution.kind {
            ExecKind::New => {
                let order = OpenOrder {
                    order_id: execution.order_id,
                    symbol: execution.symbol,
                    side: execution.side,
                    price: execution.price,
                    leaves: execution.order_qty,
                };
                self.open(execution.cl_ord_id, order);
            }
            ExecKind::Trade => {
                let traded = Money::notional(execution.last_qty, execution.last_price);
                self.account.traded_notional.0 = self.account.traded_notional.0.saturating_add(traded.0);
                if let Some(order) = self.by_name.get_mut(&execution.cl_ord_id) {
                    order.leaves.0 -= execution.last_qty.0;
                    self.account.open_notional.0 -= Money::notional(execution.last_qty, order.price).0;
                    if order.leaves.0 <= 0 {
                        self.by_name.remove(&execution.cl_ord_id);
                        self.account.open_orders -= 1;
                    }
                }
            }
            ExecKind::Canceled => {
                let name =
                    if execution.orig_cl_ord_id.is_empty() { execution.cl_ord_id } else { execution.orig_cl_ord_id };
                if let Some(order) = self.by_name.remove(&name) {
                    self.account.open_notional.0 -= Money::notional(order.leaves, order.price).0;
                    self.account.open_orders -= 1;
                }
            }
        }
    }

    /// Takes in an order that rests already: a new one, or one read back from the journal.
    pub fn open(&mut self, name: ClOrdId, order: OpenOrder) {
        let notional = Money::notional(order.leaves, order.price);
        if self.by_name.insert(name, order).is_none() {
            self.account.open_orders += 1;
            self.account.open_notional.0 = self.account.open_notional.0.saturating_add(notional.0);
        }
    }
}
