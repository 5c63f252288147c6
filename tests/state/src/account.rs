//! What is patched.

use livepatch::state::State;

#[derive(serde::Serialize, serde::Deserialize)]
pub struct Order {
    quantity: u32,
}

#[derive(serde::Serialize, serde::Deserialize)]
pub struct Account {
    id: u64,
    placed: u64,
    quantity: u64,
    orders: Vec<Order>,
}
livepatch::state!(Account, "account", 1);

impl State for Account {}

pub fn open(id: u64) -> Account {
    Account { id, placed: 0, quantity: 0, orders: Vec::new() }
}

pub fn place(account: &mut Account, quantity: u32) {
    account.placed += 1;
    account.quantity += u64::from(quantity);
    if account.orders.len() >= 64 {
        account.orders.clear();
    }
    account.orders.push(Order { quantity });
}

pub fn figures(account: &mut Account, _: ()) -> [u64; 4] {
    [account.placed, account.quantity, 1, 0]
}

pub fn say(account: &mut Account, _: ()) -> String {
    format!("v1 {} {} {:?}", account.id, account.orders.len(), account.orders.last().map(|o| o.quantity))
}
