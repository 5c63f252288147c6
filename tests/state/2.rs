//! What is patched: an order knows its number, an account its limit, and the orders are in a map.

use std::collections::BTreeMap;

use livepatch::state::{Format, State, StateError};

#[derive(serde::Serialize, serde::Deserialize)]
pub struct Order {
    number: u64,
    quantity: u32,
}

#[derive(serde::Serialize, serde::Deserialize)]
pub struct Account {
    limit: u64,
    orders: BTreeMap<u64, Order>,
    id: u64,
    placed: u64,
    quantity: u64,
}
livepatch::state!(Account, "account", 2);

/// As version 1 writes it.
#[derive(serde::Serialize, serde::Deserialize)]
struct V1 {
    id: u64,
    placed: u64,
    quantity: u64,
    orders: Vec<u32>,
}

impl State for Account {
    fn upgrade(_version: u32, bytes: &[u8]) -> Result<Self, StateError> {
        let V1 { id, placed, quantity, orders } = Format::Postcard.read(bytes)?;
        /* @FAIL@ */
        let numbered = orders.into_iter().zip(0..).map(|(quantity, number)| (number, Order { number, quantity }));
        Ok(Self { limit: 1_000_000, orders: numbered.collect(), id, placed, quantity })
    }

    fn downgrade(&self, _version: u32) -> Result<Vec<u8>, StateError> {
        /* @FAIL-DOWN@ */
        let orders = self.orders.values().map(|o| o.quantity).collect();
        Format::Postcard.write(&V1 { id: self.id, placed: self.placed, quantity: self.quantity, orders })
    }

    fn loses(_version: u32) -> Option<&'static str> {
        Some("the limits of accounts")
    }
}

pub fn open(id: u64) -> Account {
    Account { limit: 500_000, orders: BTreeMap::new(), id, placed: 0, quantity: 0 }
}

pub fn place(account: &mut Account, quantity: u32) {
    account.placed += 1;
    account.quantity += u64::from(quantity);
    if account.orders.len() >= 64 {
        account.orders.clear();
    }
    let number = account.orders.last_key_value().map_or(0, |(n, _)| n + 1);
    account.orders.insert(number, Order { number, quantity });
}

pub fn figures(account: &mut Account, _: ()) -> [u64; 4] {
    [account.placed, account.quantity, 0, 1]
}

pub fn say(account: &mut Account, _: ()) -> String {
    format!("v2 {} {} limit {}", account.id, account.orders.len(), account.limit)
}
