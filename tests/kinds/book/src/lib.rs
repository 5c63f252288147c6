//! Accounts, books and fees: what the gateway decides with.

use std::collections::{BTreeMap, VecDeque};
use std::sync::atomic::{AtomicU64, Ordering};

use hashbrown::HashMap;

/// Orders seen since the start.
pub static SEEN: AtomicU64 = AtomicU64::new(0);

/// The largest quantity that an order may have.
pub static MAX_QTY: AtomicU64 = AtomicU64::new(10_000);

/// Said when an order is too large.
pub const TOO_LARGE: &str = "qty too large";

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Side {
    Buy,
    Sell,
}

#[derive(Clone, Debug)]
pub struct Order {
    pub id: u64,
    pub account: u32,
    pub side: Side,
    pub price: u64,
    pub qty: u64,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Fill {
    pub maker: u64,
    pub taker: u64,
    pub price: u64,
    pub qty: u64,
}

#[derive(Debug, Default)]
pub struct Account {
    pub volume: u64,
    pub fees: u64,
    pub rejects: u32,
}

#[derive(Debug, PartialEq, Eq)]
pub enum Reject {
    Quantity(&'static str),
    Price { given: u64, lowest: u64 },
    Account(u32),
}

impl std::fmt::Display for Reject {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Reject::Quantity(why) => f.write_str(why),
            Reject::Price { given, lowest } => write!(f, "price {given} is under {lowest}"),
            Reject::Account(id) => write!(f, "account {id} is closed"),
        }
    }
}

/// What a trade of this value costs: 7 basis points.
#[inline(never)]
pub fn fee(value: u64) -> u64 {
    value * 7 / 10_000
}

/// The value of a quantity at a price, in cents.
#[inline]
pub fn value(price: u64, qty: u64) -> u64 {
    price.saturating_mul(qty) / 100
}

/// Refuses an order before it reaches a book.
#[inline(never)]
pub fn check(order: &Order) -> Result<(), Reject> {
    if order.qty == 0 || order.qty > MAX_QTY.load(Ordering::Relaxed) {
        return Err(Reject::Quantity(TOO_LARGE));
    }
    if order.price < 5 {
        return Err(Reject::Price { given: order.price, lowest: 5 });
    }
    Ok(())
}

/// One symbol's resting orders, by price.
#[derive(Default)]
pub struct Book {
    bids: BTreeMap<u64, VecDeque<Order>>,
    asks: BTreeMap<u64, VecDeque<Order>>,
}

impl Book {
    /// Trades what crosses, rests what is left.
    #[inline(never)]
    pub fn place(&mut self, mut order: Order) -> Vec<Fill> {
        let mut fills = Vec::new();
        while order.qty > 0 {
            let level = match order.side {
                Side::Buy => self.asks.first_entry().filter(|e| *e.key() <= order.price),
                Side::Sell => self.bids.last_entry().filter(|e| *e.key() >= order.price),
            };
            let Some(mut level) = level else { break };
            let queue = level.get_mut();
            if let Some(maker) = queue.front_mut() {
                let qty = maker.qty.min(order.qty);
                maker.qty -= qty;
                order.qty -= qty;
                fills.push(Fill { maker: maker.id, taker: order.id, price: maker.price, qty });
                if maker.qty == 0 {
                    queue.pop_front();
                }
            }
            if queue.is_empty() {
                level.remove();
            }
        }
        if order.qty > 0 {
            let side = if order.side == Side::Buy { &mut self.bids } else { &mut self.asks };
            side.entry(order.price).or_default().push_back(order);
        }
        fills
    }

    /// The best price of each side.
    #[inline(never)]
    pub fn top(&self) -> (Option<u64>, Option<u64>) {
        (self.bids.keys().next_back().copied(), self.asks.keys().next().copied())
    }
}

/// Everything that lasts.
#[derive(Default)]
pub struct Market {
    books: HashMap<String, Book>,
    accounts: HashMap<u32, Account>,
}

impl Market {
    /// One order, checked, traded and charged.
    #[inline(never)]
    pub fn order(&mut self, symbol: &str, order: Order) -> Result<Vec<Fill>, Reject> {
        SEEN.fetch_add(1, Ordering::Relaxed);
        let account = self.accounts.entry(order.account).or_default();
        if let Err(reject) = check(&order) {
            account.rejects += 1;
            return Err(reject);
        }
        let fills = self.books.entry_ref(symbol).or_default().place(order);
        for fill in &fills {
            charge(account, fill);
        }
        log::debug!("{symbol}: {} fills", fills.len());
        Ok(fills)
    }

    /// Volume, fees and rejects of one account.
    #[inline(never)]
    pub fn stats(&self, account: u32) -> Option<(u64, u64, u32)> {
        self.accounts.get(&account).map(|a| (a.volume, a.fees, a.rejects))
    }

    /// Both best prices of a symbol.
    #[inline(never)]
    pub fn quote(&self, symbol: &str) -> (Option<u64>, Option<u64>) {
        self.books.get(symbol).map_or((None, None), Book::top)
    }

    /// What the whole house has earned.
    #[inline(never)]
    pub fn earned(&self) -> u64 {
        self.accounts.values().map(|a| a.fees).sum()
    }
}

#[inline(never)]
fn charge(account: &mut Account, fill: &Fill) {
    let value = value(fill.price, fill.qty);
    account.volume += value;
    account.fees += fee(value);
}
