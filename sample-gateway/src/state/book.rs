//! One order book per symbol, price before time.

use gateway_interface::{
    ClOrdId, ExecKind, Execution, Liquidity, Money, NewOrder, OrdType, OrderId, Price, Qty, SessionId, Side, Symbol,
    TimeInForce,
};
use parking_lot::{Mutex, RwLock};
use std::collections::{BTreeMap, HashMap};
use std::sync::atomic::{AtomicI64, AtomicU64, Ordering};
use std::sync::Arc;

/// An order in a book.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Resting {
    /// Whose it is.
    pub owner: SessionId,
    /// The gateway's number.
    pub order_id: OrderId,
    /// As it came in.
    pub order: NewOrder,
    /// What is filled.
    pub cum_qty: Qty,
    /// Sum of quantity times price of its fills.
    pub cum_notional: Money,
}

impl Resting {
    fn leaves(&self) -> Qty {
        Qty(self.order.qty.0 - self.cum_qty.0)
    }

    fn execution(&self, kind: ExecKind, exec_id: u64, at_ms: u64) -> Execution {
        let leaves = if kind == ExecKind::Canceled { Qty(0) } else { self.leaves() };
        Execution {
            exec_id,
            session: self.owner,
            order_id: self.order_id,
            cl_ord_id: self.order.cl_ord_id,
            orig_cl_ord_id: ClOrdId::EMPTY,
            symbol: self.order.symbol,
            side: self.order.side,
            ord_type: self.order.ord_type,
            time_in_force: self.order.time_in_force,
            kind,
            order_qty: self.order.qty,
            price: self.order.price,
            last_qty: Qty(0),
            last_price: Price(0),
            cum_qty: self.cum_qty,
            leaves_qty: leaves,
            avg_price: Price(self.cum_notional.0.checked_div(self.cum_qty.0).unwrap_or(0)),
            liquidity: Liquidity::Taker,
            at_ms,
        }
    }

    fn fill(&mut self, qty: Qty, price: Price, liquidity: Liquidity, exec_id: u64, at_ms: u64) -> Execution {
        self.cum_qty.0 += qty.0;
        self.cum_notional.0 = self.cum_notional.0.saturating_add(Money::notional(qty, price).0);
        let trade = self.execution(ExecKind::Trade, exec_id, at_ms);
        Execution { last_qty: qty, last_price: price, liquidity, ..trade }
    }
}

/// Best first: the price for asks, the negated price for bids, then the number.
type Level = (i64, OrderId);

/// The resting orders of one symbol.
#[derive(Debug, Default)]
pub struct Book {
    bids: BTreeMap<Level, Resting>,
    asks: BTreeMap<Level, Resting>,
}

fn level(side: Side, price: Price, id: OrderId) -> Level {
    match side {
        Side::Buy => (-price.0, id),
        Side::Sell => (price.0, id),
    }
}

impl Book {
    /// Takes an order: what matches is traded, the rest of a day order rests, the rest of any other is filled by the
    /// house, or cancelled where there is no price to fill it at. Appends all that happened, to both sides, in order.
    pub fn submit(
        &mut self,
        owner: SessionId,
        order: &NewOrder,
        last: Option<Price>,
        ids: &Ids,
        at_ms: u64,
        happened: &mut Vec<Execution>,
    ) {
        let mut taker =
            Resting { owner, order_id: ids.next_order(), order: *order, cum_qty: Qty(0), cum_notional: Money(0) };
        happened.push(taker.execution(ExecKind::New, ids.next_exec(), at_ms));
        let opposite = match order.side {
            Side::Buy => &mut self.asks,
            Side::Sell => &mut self.bids,
        };
        let mut last = last;
        while taker.leaves().0 > 0 {
            let Some(mut best) = opposite.first_entry() else { break };
            let maker = best.get_mut();
            let price = maker.order.price;
            let crosses = match (order.ord_type, order.side) {
                (OrdType::Market, _) => true,
                (OrdType::Limit, Side::Buy) => price <= order.price,
                (OrdType::Limit, Side::Sell) => price >= order.price,
            };
            if !crosses {
                break;
            }
            let qty = taker.leaves().min(maker.leaves());
            happened.push(taker.fill(qty, price, Liquidity::Taker, ids.next_exec(), at_ms));
            happened.push(maker.fill(qty, price, Liquidity::Maker, ids.next_exec(), at_ms));
            last = Some(price);
            if maker.leaves().0 == 0 {
                best.remove();
            }
        }
        if taker.leaves().0 == 0 {
            return;
        }
        if order.time_in_force == TimeInForce::Day {
            self.rest(taker);
            return;
        }
        let house_price = match order.ord_type {
            OrdType::Limit => Some(order.price),
            OrdType::Market => last,
        };
        happened.push(match house_price {
            Some(price) => taker.fill(taker.leaves(), price, Liquidity::Taker, ids.next_exec(), at_ms),
            None => taker.execution(ExecKind::Canceled, ids.next_exec(), at_ms),
        });
    }

    /// Takes an order out of the book; `None` when it is not there (any more).
    pub fn cancel(
        &mut self,
        side: Side,
        price: Price,
        id: OrderId,
        request: ClOrdId,
        ids: &Ids,
        at_ms: u64,
    ) -> Option<Execution> {
        let resting = self.side(side).remove(&level(side, price, id))?;
        let execution = resting.execution(ExecKind::Canceled, ids.next_exec(), at_ms);
        Some(Execution { cl_ord_id: request, orig_cl_ord_id: resting.order.cl_ord_id, ..execution })
    }

    /// Puts an order into the book without matching it.
    pub fn rest(&mut self, resting: Resting) {
        let key = level(resting.order.side, resting.order.price, resting.order_id);
        self.side(resting.order.side).insert(key, resting);
    }

    /// How many orders rest.
    pub fn len(&self) -> usize {
        self.bids.len() + self.asks.len()
    }

    /// Whether no order rests.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    fn side(&mut self, side: Side) -> &mut BTreeMap<Level, Resting> {
        match side {
            Side::Buy => &mut self.bids,
            Side::Sell => &mut self.asks,
        }
    }
}

/// Numbers for orders and executions, unique over all books.
#[derive(Debug)]
pub struct Ids {
    order: AtomicU64,
    exec: AtomicU64,
}

impl Ids {
    /// The next ones to be given out.
    pub fn new(order: u64, exec: u64) -> Self {
        Self { order: AtomicU64::new(order), exec: AtomicU64::new(exec) }
    }

    /// A number for an order.
    pub fn next_order(&self) -> OrderId {
        OrderId(self.order.fetch_add(1, Ordering::Relaxed))
    }

    /// A number for an execution.
    pub fn next_exec(&self) -> u64 {
        self.exec.fetch_add(1, Ordering::Relaxed)
    }
}

/// A book and what may be read of it without its lock.
#[derive(Debug, Default)]
pub struct BookCell {
    /// The orders.
    pub book: Mutex<Book>,
    /// Zero while nothing has traded.
    last: AtomicI64,
}

impl BookCell {
    /// Price of the last trade.
    pub fn last_price(&self) -> Option<Price> {
        match self.last.load(Ordering::Relaxed) {
            0 => None,
            price => Some(Price(price)),
        }
    }

    /// Notes a trade.
    pub fn set_last_price(&self, price: Price) {
        self.last.store(price.0, Ordering::Relaxed);
    }
}

/// All books, reachable from every worker thread.
#[derive(Debug)]
pub struct Books {
    cells: RwLock<HashMap<Symbol, Arc<BookCell>>>,
    limit: usize,
    /// Where numbers come from.
    pub ids: Ids,
}

impl Books {
    /// No books yet, and at most `limit` ever.
    pub fn new(limit: usize, ids: Ids) -> Self {
        Self { cells: RwLock::default(), limit, ids }
    }

    /// The book of a symbol, made at its first order; `None` when there are too many.
    pub fn get(&self, symbol: &Symbol) -> Option<Arc<BookCell>> {
        if let Some(cell) = self.cells.read().get(symbol) {
            return Some(Arc::clone(cell));
        }
        let mut cells = self.cells.write();
        if cells.len() >= self.limit && !cells.contains_key(symbol) {
            return None;
        }
        Some(Arc::clone(cells.entry(*symbol).or_default()))
    }

    /// How many orders rest in all books.
    pub fn resting(&self) -> usize {
        self.cells.read().values().map(|cell| cell.book.lock().len()).sum()
    }
}

#[cfg(test)]
#[path = "book_tests.rs"]
mod tests;
