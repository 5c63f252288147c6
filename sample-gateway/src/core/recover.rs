//! From the journal back to sessions and books.

use super::guard::guarded;
use super::record::Record;
use crate::fix::Encoder;
use crate::state::{Books, Ids, OpenOrder, Output, Resting, Session};
use gateway_interface::{
    Business, Context, ExecKind, Execution, FeeSchedule, Money, NewOrder, OrderId, Price, Qty, RiskLimits, SessionId,
    Symbol, TimeInForce,
};
use std::collections::{BTreeMap, HashMap};

/// What the journal says, record by record.
#[derive(Default)]
pub struct Recovered {
    /// All counterparties ever seen.
    pub sessions: BTreeMap<SessionId, Session>,
    resting: BTreeMap<OrderId, Resting>,
    last: HashMap<Symbol, Price>,
    /// Executions whose report is not written yet.
    unreported: BTreeMap<u64, Execution>,
    next_order: u64,
    next_exec: u64,
    keep_bytes: usize,
}

impl Recovered {
    /// Nothing yet; each session will keep that many bytes of sent messages.
    pub fn new(keep_bytes: usize) -> Self {
        Self { next_order: 1, next_exec: 1, keep_bytes, ..Self::default() }
    }

    /// Takes in the next record. `business` writes the reports anew that were sent, with the commission as charged.
    pub fn apply(&mut self, record: Record, business: &dyn Business) {
        match record {
            Record::Session { id, comp } => {
                self.sessions.insert(id, Session::new(id, comp));
            }
            Record::Sequence { id, next_in, next_out } => {
                if let Some(session) = self.sessions.get_mut(&id) {
                    session.restore_sequence(next_in, next_out);
                }
            }
            Record::Reset { id } => {
                if let Some(session) = self.sessions.get_mut(&id) {
                    session.reset_sequence();
                }
            }
            Record::Execution(execution) => self.execution(execution),
            Record::Reported { id, seq, at_ms, exec_id, commission } => {
                let Some(execution) = self.unreported.remove(&exec_id) else { return };
                let Some(session) = self.sessions.get_mut(&id) else { return };
                session.orders.account.charged.0 = session.orders.account.charged.0.saturating_add(commission.0);
                let mut body = Vec::new();
                let (limits, fees) = (RiskLimits::default(), FeeSchedule::default());
                let ctx = Context {
                    now_ms: at_ms,
                    limits: &limits,
                    fees: &fees,
                    account: &session.orders.account,
                    last_price: None,
                };
                if guarded(|| business.report(&ctx, &execution, commission, &mut body)).is_ok() {
                    super::replies::transact_time(&execution, &mut body);
                    session.sent.push(seq, at_ms, b'8', &body, self.keep_bytes);
                }
            }
            Record::Sent { id, seq, at_ms, msg_type, body } => {
                if let Some(session) = self.sessions.get_mut(&id) {
                    session.sent.push(seq, at_ms, msg_type, &body, self.keep_bytes);
                }
            }
            Record::Resting(resting) => {
                if let Some(session) = self.sessions.get_mut(&resting.owner) {
                    session.orders.open(resting.order.cl_ord_id, open_order(&resting));
                }
                self.next_order = self.next_order.max(resting.order_id.0 + 1);
                self.resting.insert(resting.order_id, resting);
            }
            Record::Account { id, traded, charged } => {
                if let Some(session) = self.sessions.get_mut(&id) {
                    (session.orders.account.traded_notional, session.orders.account.charged) = (traded, charged);
                }
            }
            Record::Ids { order, exec } => {
                (self.next_order, self.next_exec) = (self.next_order.max(order), self.next_exec.max(exec));
            }
            Record::Last { symbol, price } => {
                self.last.insert(symbol, price);
            }
        }
    }

    fn execution(&mut self, e: Execution) {
        self.next_exec = self.next_exec.max(e.exec_id + 1);
        self.next_order = self.next_order.max(e.order_id.0 + 1);
        if let Some(session) = self.sessions.get_mut(&e.session) {
            session.orders.apply(&e);
        }
        match e.kind {
            ExecKind::New if e.time_in_force == TimeInForce::Day => {
                let order = NewOrder {
                    cl_ord_id: e.cl_ord_id,
                    symbol: e.symbol,
                    side: e.side,
                    qty: e.order_qty,
                    ord_type: e.ord_type,
                    price: e.price,
                    time_in_force: e.time_in_force,
                };
                let resting =
                    Resting { owner: e.session, order_id: e.order_id, order, cum_qty: Qty(0), cum_notional: Money(0) };
                self.resting.insert(e.order_id, resting);
            }
            ExecKind::New => {}
            ExecKind::Trade => {
                self.last.insert(e.symbol, e.last_price);
                if let Some(resting) = self.resting.get_mut(&e.order_id) {
                    resting.cum_qty = e.cum_qty;
                    resting.cum_notional.0 =
                        resting.cum_notional.0.saturating_add(Money::notional(e.last_qty, e.last_price).0);
                    if e.leaves_qty.0 == 0 {
                        self.resting.remove(&e.order_id);
                    }
                }
            }
            ExecKind::Canceled => {
                self.resting.remove(&e.order_id);
            }
        }
        self.unreported.insert(e.exec_id, e);
    }

    /// The same as a snapshot: what a log may be replaced by.
    pub fn snapshot(&self) -> Vec<Record> {
        let mut records = vec![Record::Ids { order: self.next_order, exec: self.next_exec }];
        for session in self.sessions.values() {
            let id = session.id;
            let (next_in, next_out) = session.sequence();
            let account = session.orders.account;
            records.push(Record::Session { id, comp: session.comp });
            records.push(Record::Account { id, traded: account.traded_notional, charged: account.charged });
            records.push(Record::Sequence { id, next_in, next_out });
            records.extend(session.sent.range(0, u64::MAX).map(|sent| Record::Sent {
                id,
                seq: sent.seq,
                at_ms: sent.at_ms,
                msg_type: sent.msg_type,
                body: sent.body,
            }));
        }
        records.extend(self.resting.values().cloned().map(Record::Resting));
        records.extend(self.last.iter().map(|(&symbol, &price)| Record::Last { symbol, price }));
        records
    }

    /// A crash may fall between an execution and its report: such reports are written now, to be asked for by the
    /// counterparty. Returns how many.
    pub fn report_the_rest(&mut self, business: &dyn Business, us: &[u8], now_ms: u64) -> usize {
        let mut encoder = Encoder::new();
        let rest = std::mem::take(&mut self.unreported);
        let (limits, fees) = (RiskLimits::default(), FeeSchedule::default());
        for execution in rest.values() {
            let Some(session) = self.sessions.get_mut(&execution.session) else { continue };
            let mut body = Vec::new();
            let account = session.orders.account;
            let ctx = Context { now_ms, limits: &limits, fees: &fees, account: &account, last_price: None };
            let written = guarded(|| {
                let commission = execution.fill().map_or(Money(0), |fill| business.commission(&ctx, &fill));
                business.report(&ctx, execution, commission, &mut body);
                commission
            });
            let Ok(commission) = written else { continue };
            session.orders.account.charged.0 = account.charged.0.saturating_add(commission.0);
            super::replies::transact_time(execution, &mut body);
            let mut out = Output { bytes: None, encoder: &mut encoder, us, now_ms, keep_bytes: self.keep_bytes };
            session.send_application(b'8', &body, &mut out);
        }
        rest.len()
    }

    /// The books, and the sessions.
    pub fn into_state(self, max_symbols: usize) -> (Books, BTreeMap<SessionId, Session>) {
        let books = Books::new(max_symbols, Ids::new(self.next_order, self.next_exec));
        for resting in self.resting.into_values() {
            if let Some(cell) = books.get(&resting.order.symbol) {
                cell.book.lock().rest(resting);
            }
        }
        for (symbol, price) in self.last {
            if let Some(cell) = books.get(&symbol) {
                cell.set_last_price(price);
            }
        }
        (books, self.sessions)
    }
}

fn open_order(resting: &Resting) -> OpenOrder {
    OpenOrder {
        order_id: resting.order_id,
        symbol: resting.order.symbol,
        side: resting.order.side,
        price: resting.order.price,
        leaves: Qty(resting.order.qty.0 - resting.cum_qty.0),
    }
}

#[cfg(test)]
#[path = "recover_tests.rs"]
mod tests;
