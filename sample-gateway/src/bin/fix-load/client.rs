//! One simulated trader: its orders and what became of them.

use crate::stats::{note, Stats};
use crate::wire::{Admin, Received, Wire};
use gateway_interface::{put, put_number};
use sample_gateway::core::now_ms;
use sample_gateway::fix::{format_utc, frame, msg_type, tag, Frame, Message, Parser};
use std::collections::VecDeque;

/// Where a trader's session stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Phase {
    Connecting,
    LoggingOn,
    Active,
    LoggingOut,
    Closed,
}

#[derive(Clone, Copy, Debug)]
struct Order {
    due_ns: u64,
    cancel_due_ns: Option<u64>,
    acknowledged: bool,
    open: bool,
    buy: bool,
    symbol: u16,
    cum: i64,
}

/// What all traders of a run share.
#[derive(Clone, Debug)]
pub struct Market {
    /// Tells this run's orders from those of earlier ones, which may still rest.
    pub run: String,
    pub symbols: u16,
    pub heartbeat_s: u64,
    pub cancel_share: f64,
}

/// One simulated trader.
#[derive(Debug)]
pub struct Client {
    pub wire: Wire,
    pub phase: Phase,
    pub rest: Vec<u8>,
    pub sent_bytes: usize,
    pub last_in_ns: u64,
    pub last_out_ns: u64,
    pub late_noted: bool,
    orders: Vec<Order>,
    cancellable: VecDeque<u32>,
    random: u64,
    unanswered: u64,
}

impl Client {
    pub fn new(us: String, them: String, seed: u64) -> Self {
        Self {
            wire: Wire::new(us, them),
            phase: Phase::Connecting,
            rest: Vec::new(),
            sent_bytes: 0,
            last_in_ns: 0,
            last_out_ns: 0,
            late_noted: false,
            orders: Vec::new(),
            cancellable: VecDeque::new(),
            random: seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1,
            unanswered: 0,
        }
    }

    /// Orders and cancels that no answer has come to.
    pub fn unanswered(&self) -> u64 {
        self.unanswered
    }

    /// Sends what is due: mostly a new order, sometimes the cancel of an older one.
    pub fn trade(&mut self, market: &Market, due_ns: u64, stats: &mut Stats) {
        let wants_cancel = (self.next_random() % 10_000) as f64 <= market.cancel_share * 10_000.0;
        let target = if wants_cancel { self.pop_cancellable() } else { None };
        self.unanswered += 1;
        match target {
            Some(n) => self.cancel(market, n, due_ns, stats),
            None => self.order(market, due_ns, stats),
        }
    }

    fn pop_cancellable(&mut self) -> Option<u32> {
        while let Some(n) = self.cancellable.pop_front() {
            let order = self.orders.get(n as usize)?;
            if order.open && order.acknowledged && order.cancel_due_ns.is_none() {
                return Some(n);
            }
        }
        None
    }

    fn order(&mut self, market: &Market, due_ns: u64, stats: &mut Stats) {
        let n = u32::try_from(self.orders.len()).unwrap_or(u32::MAX);
        let r = self.next_random();
        let symbol = (r % u64::from(market.symbols)) as u16;
        let buy = r >> 16 & 1 == 0;
        let immediate = r >> 17 & 0xff < 51;
        let cents = 10_000 + i64::from(symbol) * 100 + (r >> 32 & 0xf) as i64 - 8;
        let qty = 100 * (1 + (r >> 40 & 7));
        let mut body = Vec::with_capacity(128);
        put_number(&mut body, tag::CL_ORD_ID, format_args!("{}o{n}", market.run));
        put(&mut body, 21, b"1");
        put_number(&mut body, 55, format_args!("SYM{symbol}"));
        put(&mut body, 54, if buy { b"1" } else { b"2" });
        put(&mut body, tag::TRANSACT_TIME, &format_utc(now_ms()));
        put_number(&mut body, 38, qty);
        put(&mut body, 40, b"2");
        put_number(&mut body, 44, format_args!("{}.{:02}", cents / 100, cents % 100));
        put(&mut body, 59, if immediate { b"3" } else { b"0" });
        self.wire.send(msg_type::NEW_ORDER_SINGLE, &body);
        if !immediate {
            self.cancellable.push_back(n);
        }
        let order = Order { due_ns, cancel_due_ns: None, acknowledged: false, open: true, buy, symbol, cum: 0 };
        self.orders.push(order);
        stats.counts.orders_sent += 1;
    }

    fn cancel(&mut self, market: &Market, n: u32, due_ns: u64, stats: &mut Stats) {
        let Some(order) = self.orders.get_mut(n as usize) else { return };
        order.cancel_due_ns = Some(due_ns);
        let mut body = Vec::with_capacity(128);
        put_number(&mut body, tag::ORIG_CL_ORD_ID, format_args!("{}o{n}", market.run));
        put_number(&mut body, tag::CL_ORD_ID, format_args!("{}c{n}", market.run));
        put_number(&mut body, 55, format_args!("SYM{}", order.symbol));
        put(&mut body, 54, if order.buy { b"1" } else { b"2" });
        put(&mut body, tag::TRANSACT_TIME, &format_utc(now_ms()));
        self.wire.send(msg_type::ORDER_CANCEL_REQUEST, &body);
        stats.counts.cancels_sent += 1;
    }

    /// Takes in bytes from the gateway.
    pub fn input(&mut self, bytes: &[u8], parser: &mut Parser, market: &Market, now_ns: u64, stats: &mut Stats) {
        self.last_in_ns = now_ns;
        self.late_noted = false;
        let mut joined = std::mem::take(&mut self.rest);
        let data = if joined.is_empty() {
            bytes
        } else {
            joined.extend_from_slice(bytes);
            &joined
        };
        let mut at = 0;
        while at < data.len() {
            match frame(&data[at..]) {
                Frame::Incomplete => break,
                Frame::Garbled(n) => {
                    stats.counts.garbled += 1;
                    at += n;
                }
                Frame::Message(n) => {
                    let (message, _) = parser.parse(&data[at..at + n]);
                    self.message(&message, market, now_ns, stats);
                    at += n;
                }
            }
        }
        self.rest = data[at..].to_vec();
    }

    fn message(&mut self, message: &Message<'_>, market: &Market, now_ns: u64, stats: &mut Stats) {
        match self.wire.receive(message) {
            Received::Application => self.report(message, market, now_ns, stats),
            Received::Duplicate => stats.counts.duplicates_flagged += 1,
            Received::OutOfSequence => {
                stats.counts.out_of_sequence += 1;
                self.report(message, market, now_ns, stats);
            }
            Received::Admin(Admin::Logon) => self.phase = Phase::Active,
            Received::Admin(Admin::TestRequest) => stats.counts.test_requests += 1,
            Received::Admin(Admin::ResendRequest) => stats.counts.resend_requests += 1,
            Received::Admin(Admin::Reject) => stats.counts.session_rejects += 1,
            // The close that follows an unasked Logout is counted as a disconnect.
            Received::Admin(Admin::Logout | Admin::Other) => {}
        }
    }

    fn report(&mut self, message: &Message<'_>, market: &Market, now_ns: u64, stats: &mut Stats) {
        let counts = &mut stats.counts;
        let name = match (message.msg_type(), message.get(tag::EXEC_TYPE)) {
            (msg_type::BUSINESS_MESSAGE_REJECT, _) => message.get(tag::BUSINESS_REJECT_REF_ID),
            (msg_type::ORDER_CANCEL_REJECT, _) | (_, Some(b"4")) => message.get(tag::ORIG_CL_ORD_ID),
            _ => None,
        };
        let name = name.or(message.get(tag::CL_ORD_ID)).unwrap_or_default();
        let number = name.strip_prefix(market.run.as_bytes()).and_then(|n| n.strip_prefix(b"o"));
        let number = number.and_then(|n| std::str::from_utf8(n).ok()).and_then(|n| n.parse::<usize>().ok());
        let Some(order) = number.and_then(|n| self.orders.get_mut(n)) else {
            counts.foreign_reports += 1;
            return;
        };
        match (message.msg_type(), message.get(tag::EXEC_TYPE)) {
            (msg_type::EXECUTION_REPORT, Some(kind @ (b"0" | b"8"))) => {
                if order.acknowledged {
                    counts.repeated += 1;
                    return;
                }
                order.acknowledged = true;
                self.unanswered -= 1;
                note(&mut stats.orders, now_ns.saturating_sub(order.due_ns));
                if kind == b"0" {
                    counts.orders_acknowledged += 1;
                } else {
                    counts.orders_rejected += 1;
                    order.open = false;
                }
            }
            (msg_type::EXECUTION_REPORT, Some(b"F")) => {
                let cum = message.number(tag::CUM_QTY).map_or(0, u64::cast_signed);
                let last = message.number(tag::LAST_QTY).map_or(0, u64::cast_signed);
                match cum - last - order.cum {
                    0 => counts.fills += 1,
                    1.. => counts.lost += 1,
                    _ => counts.repeated += 1,
                }
                order.cum = order.cum.max(cum);
                order.open &= message.get(tag::LEAVES_QTY) != Some(b"0");
            }
            (msg_type::EXECUTION_REPORT, Some(b"4")) => {
                order.open = false;
                if let Some(due_ns) = order.cancel_due_ns.take() {
                    self.unanswered -= 1;
                    counts.cancels_done += 1;
                    note(&mut stats.cancels, now_ns.saturating_sub(due_ns));
                }
            }
            (msg_type::ORDER_CANCEL_REJECT, _) => match order.cancel_due_ns.take() {
                Some(due_ns) => {
                    self.unanswered -= 1;
                    counts.cancels_rejected += 1;
                    note(&mut stats.cancels, now_ns.saturating_sub(due_ns));
                }
                None => counts.repeated += 1,
            },
            (msg_type::BUSINESS_MESSAGE_REJECT, _) => {
                counts.business_rejects += 1;
                if !order.acknowledged {
                    order.acknowledged = true;
                    order.open = false;
                    self.unanswered -= 1;
                }
            }
            _ => counts.foreign_reports += 1,
        }
    }

    /// xorshift64: cheap, and the same in every run with the same seed.
    fn next_random(&mut self) -> u64 {
        self.random ^= self.random << 13;
        self.random ^= self.random >> 7;
        self.random ^= self.random << 17;
        self.random
    }
}
