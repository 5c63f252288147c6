//! What a worker does with application messages: the way of an order through business layer, book and journal.

use super::guard::{guarded, Panicked};
use super::metrics::Counter;
use super::record::Record;
use super::replies;
use super::shared::Shared;
use super::worker::Worker;
use crate::fix::{msg_type, tag, Message};
use gateway_interface::{
    put, Account, Cancel, Context, ExecKind, Execution, Money, NewOrder, Price, Refusal, SessionId,
};
use std::sync::Arc;

/// OrdRejReason (103) values.
const UNKNOWN_SYMBOL: u16 = 1;
const DUPLICATE_ORDER: u16 = 6;
/// CxlRejReason (102) values.
const TOO_LATE: u16 = 0;
const UNKNOWN_ORDER: u16 = 1;

impl Worker {
    /// An application message in sequence.
    pub(super) fn application(&mut self, slot: usize, message: &Message<'_>) {
        let Some(home) = self.home(slot) else { return };
        let (id, account) = (home.session.id, home.session.orders.account);
        let shared = Arc::clone(&self.shared);
        if message.msg_type() == msg_type::NEW_ORDER_SINGLE {
            self.metrics().add(Counter::Orders, 1);
            self.turn_orders += 1;
            self.new_order(&shared, slot, id, &account, message);
        } else {
            self.metrics().add(Counter::Cancels, 1);
            self.cancel_order(&shared, slot, id, &account, message);
        }
    }

    /// An application message of a type that is not offered.
    pub(super) fn unsupported(&mut self, slot: usize, message: &Message<'_>) {
        self.business_reject(slot, message, replies::UNSUPPORTED_TYPE, "unsupported message type");
    }

    fn new_order(&mut self, shared: &Shared, slot: usize, id: SessionId, account: &Account, message: &Message<'_>) {
        let ctx = context(shared, self.now_ms, account, None);
        let order = match guarded(|| shared.business.order(&ctx, message)) {
            Ok(Ok(order)) => order,
            Ok(Err(refusal)) => return self.refuse(slot, message, refusal),
            Err(panic) => return self.panicked(slot, message, &panic),
        };
        if self.home(slot).is_some_and(|h| h.session.orders.get(&order.cl_ord_id).is_some()) {
            return self.reject_order(slot, message, DUPLICATE_ORDER, "an order with this ClOrdID is open");
        }
        let Some(cell) = shared.books.get(&order.symbol) else {
            return self.reject_order(slot, message, UNKNOWN_SYMBOL, "unknown symbol, and no room for another");
        };
        let last = cell.last_price();
        let ctx = context(shared, self.now_ms, account, last);
        match guarded(|| shared.business.check(&ctx, &order)) {
            Ok(Ok(())) => {}
            Ok(Err(refusal)) => return self.refuse(slot, message, refusal),
            Err(panic) => return self.panicked(slot, message, &panic),
        }
        self.metrics().add(Counter::Accepted, 1);
        self.begin_group(slot, id);
        let mut happened = std::mem::take(&mut self.happened);
        {
            // The journal is written under the book's lock: its order is the order of the book.
            let mut book = cell.book.lock();
            self.submit(&mut book, id, &order, last, &mut happened);
            if let Some(trade) = happened.iter().rev().find(|e| e.kind == ExecKind::Trade) {
                cell.set_last_price(trade.last_price);
            }
            happened.iter().for_each(|&e| Record::Execution(e).encode(&mut self.group));
            shared.journal.append(&self.group);
            happened.drain(..).for_each(|e| self.post(e));
        }
        self.happened = happened;
        self.deliver();
    }

    fn submit(
        &self,
        book: &mut crate::state::Book,
        id: SessionId,
        order: &NewOrder,
        last: Option<Price>,
        happened: &mut Vec<Execution>,
    ) {
        book.submit(id, order, last, &self.shared.books.ids, self.now_ms, happened);
    }

    fn cancel_order(&mut self, shared: &Shared, slot: usize, id: SessionId, account: &Account, message: &Message<'_>) {
        let ctx = context(shared, self.now_ms, account, None);
        let request: Cancel = match guarded(|| shared.business.cancel(&ctx, message)) {
            Ok(Ok(request)) => request,
            Ok(Err(Refusal::Order { reason, text })) => return self.reject_cancel(slot, message, reason, &text),
            Ok(Err(refusal)) => return self.refuse(slot, message, refusal),
            Err(panic) => return self.panicked(slot, message, &panic),
        };
        let found = self.home(slot).and_then(|h| h.session.orders.get(&request.orig_cl_ord_id).copied());
        let Some(open) = found.filter(|o| o.symbol == request.symbol && o.side == request.side) else {
            return self.reject_cancel(slot, message, UNKNOWN_ORDER, "no such order is open");
        };
        let Some(cell) = shared.books.get(&open.symbol) else {
            return self.reject_cancel(slot, message, UNKNOWN_ORDER, "no such order is open");
        };
        self.begin_group(slot, id);
        let cancelled = {
            let mut book = cell.book.lock();
            let ids = &shared.books.ids;
            let done = book.cancel(open.side, open.price, open.order_id, request.cl_ord_id, ids, self.now_ms);
            if let Some(execution) = done {
                Record::Execution(execution).encode(&mut self.group);
                shared.journal.append(&self.group);
                self.post(execution);
            }
            done.is_some()
        };
        if cancelled {
            self.deliver();
        } else {
            // Filled by another worker a moment ago; the report is on its way.
            self.reject_cancel(slot, message, TOO_LATE, "too late to cancel");
        }
    }

    /// An order and the number of the message that brought it are on record together, or neither is.
    fn begin_group(&mut self, slot: usize, id: SessionId) {
        let (next_in, next_out) = self.home(slot).map(|h| h.session.sequence()).unwrap_or_default();
        self.group.clear();
        Record::Sequence { id, next_in, next_out }.encode(&mut self.group);
    }

    /// Called under the book's lock; nobody is woken yet.
    fn post(&mut self, execution: Execution) {
        let home = self.shared.home(execution.session);
        if self.shared.mail[home].post_execution(execution) && home != self.index {
            self.to_wake |= 1 << home;
        }
    }

    /// Called without the lock: wakes the others, and reports to the own sessions.
    fn deliver(&mut self) {
        while self.to_wake != 0 {
            let home = self.to_wake.trailing_zeros() as usize;
            self.to_wake &= self.to_wake - 1;
            self.shared.mail[home].wake();
        }
        self.read_executions();
    }

    /// Something happened to an order of a session of this worker: it is charged and reported.
    pub(super) fn happened_to(&mut self, execution: &Execution) {
        let shared = Arc::clone(&self.shared);
        let slot = shared.slot(execution.session);
        let Some(home) = self.home(slot) else { return };
        home.session.orders.apply(execution);
        let account = home.session.orders.account;
        let ctx = context(&shared, self.now_ms, &account, Some(execution.last_price));
        let mut uncharged = false;
        let mut commission = Money(0);
        if let Some(fill) = execution.fill() {
            self.metrics().add(Counter::Fills, 1);
            match guarded(|| shared.business.commission(&ctx, &fill)) {
                Ok(charged) => commission = charged,
                Err(_) => {
                    self.metrics().add(Counter::Panics, 1);
                    uncharged = true;
                }
            }
        }
        let mut body = std::mem::take(&mut self.body);
        body.clear();
        let kind = match guarded(|| shared.business.report(&ctx, execution, commission, &mut body)) {
            Ok(()) => {
                replies::transact_time(execution, &mut body);
                if uncharged {
                    put(&mut body, tag::TEXT, b"the commission could not be computed");
                }
                b'8'
            }
            Err(Panicked(text)) => {
                self.metrics().add(Counter::Panics, 1);
                body.clear();
                replies::unreportable(execution, &text, &mut body);
                b'j'
            }
        };
        let sent = self.with_session(slot, |session, out| {
            let charged = &mut session.orders.account.charged.0;
            *charged = charged.saturating_add(commission.0);
            session.send_application(kind, &body, out)
        });
        if let Some((seq, forgotten)) = sent {
            self.metrics().add(Counter::Commission, commission.0.max(0).unsigned_abs());
            self.metrics().add(Counter::Forgotten, forgotten as u64);
            let (id, at_ms) = (execution.session, self.now_ms);
            let record = if kind == b'8' {
                Record::Reported { id, seq, at_ms, exec_id: execution.exec_id, commission }
            } else {
                Record::Sent { id, seq, at_ms, msg_type: kind, body: body.clone() }
            };
            record.encode(&mut self.log);
        }
        self.body = body;
    }

    fn refuse(&mut self, slot: usize, message: &Message<'_>, refusal: Refusal) {
        match refusal {
            Refusal::Order { reason, text } => self.reject_order(slot, message, reason, &text),
            Refusal::Field { tag, reason, text } => {
                self.metrics().add(Counter::MessageRejects, 1);
                let seq = message.number(tag::MSG_SEQ_NUM).unwrap_or_default();
                self.with_session(slot, |session, out| session.reject(message, seq, Some(tag), reason, text, out));
            }
        }
    }

    /// The business layer panicked and was caught: the request is answered, the session and the gateway live on.
    fn panicked(&mut self, slot: usize, message: &Message<'_>, panic: &Panicked) {
        self.metrics().add(Counter::Panics, 1);
        let text = format!("internal error: {}", panic.0);
        self.business_reject(slot, message, replies::OTHER, &text);
    }

    fn reject_order(&mut self, slot: usize, message: &Message<'_>, reason: u16, text: &str) {
        self.metrics().add(Counter::Rejected, 1);
        let (now_ms, exec_id) = (self.now_ms, self.shared.books.ids.next_exec());
        self.send_written(slot, b'8', |body| {
            replies::order_rejected(message, exec_id, reason, text, now_ms, body);
        });
    }

    fn reject_cancel(&mut self, slot: usize, message: &Message<'_>, reason: u16, text: &str) {
        let now_ms = self.now_ms;
        self.send_written(slot, b'9', |body| replies::cancel_rejected(message, reason, text, now_ms, body));
    }

    fn business_reject(&mut self, slot: usize, message: &Message<'_>, reason: u16, text: &str) {
        self.metrics().add(Counter::MessageRejects, 1);
        self.send_written(slot, b'j', |body| replies::business_rejected(message, reason, text, body));
    }

    /// Sends an application message that is not the report of an execution.
    fn send_written(&mut self, slot: usize, kind: u8, write: impl FnOnce(&mut Vec<u8>)) {
        let mut body = std::mem::take(&mut self.body);
        body.clear();
        write(&mut body);
        let sent = self.with_session(slot, |session, out| (session.id, session.send_application(kind, &body, out)));
        if let Some((id, (seq, forgotten))) = sent {
            self.metrics().add(Counter::Forgotten, forgotten as u64);
            Record::Sent { id, seq, at_ms: self.now_ms, msg_type: kind, body: body.clone() }.encode(&mut self.log);
        }
        self.body = body;
    }
}

fn context<'a>(shared: &'a Shared, now_ms: u64, account: &'a Account, last_price: Option<Price>) -> Context<'a> {
    Context { now_ms, limits: &shared.limits, fees: &shared.fees, account, last_price }
}
