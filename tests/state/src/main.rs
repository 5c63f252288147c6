//! Accounts with orders, which threads trade on while patches migrate them. What the next version changes is in `account.rs`.
//!
//! ```text
//! ledger SOCKET [ACCOUNTS [THREADS]]  then, on standard input: figures | open N | close N | quit
//! ```

mod account;

use std::io::BufRead;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::Arc;

use account::Account;
use livepatch::agent::heap::Heap;
use livepatch::state::Table;

#[global_allocator]
static HEAP: Heap = Heap::new();

static TRADES: AtomicU64 = AtomicU64::new(0);

fn trade(accounts: &Table<Account>, seed: u64, count: u64, stop: &AtomicBool) {
    let mut n = seed;
    while !stop.load(Ordering::Relaxed) {
        n = n.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        let id = (n >> 33) % count;
        let quantity = (n >> 20 & 0xff) as u32 + 1;
        if accounts.with(id, quantity, account::place).is_some() {
            TRADES.fetch_add(1, Ordering::Relaxed);
        }
        if n % 64 == 0 {
            std::thread::sleep(std::time::Duration::from_micros(50));
        }
    }
}

fn main() {
    let mut args = std::env::args().skip(1);
    let socket = args.next().expect("which socket?");
    let mut number = |otherwise| args.next().and_then(|n| n.parse().ok()).unwrap_or(otherwise);
    let (count, threads): (u64, u64) = (number(1000), number(2));
    let agent = livepatch::Agent::builder()
        .socket(socket)
        .arena(16 << 20)
        .migration(std::time::Duration::from_millis(200), std::time::Duration::from_secs(20))
        .start()
        .expect("an agent");
    let accounts: Arc<Table<Account>> = Arc::new(Table::new());
    (0..count).for_each(|id| assert!(accounts.insert(id, id, account::open)));
    let stop = Arc::new(AtomicBool::new(false));
    let traders: Vec<_> = (0..threads)
        .map(|seed| {
            let (accounts, stop) = (Arc::clone(&accounts), Arc::clone(&stop));
            std::thread::spawn(move || trade(&accounts, seed, count, &stop))
        })
        .collect();
    println!("ready");
    for line in std::io::stdin().lock().lines() {
        let line = line.expect("a line");
        let (word, rest) = line.split_once(' ').unwrap_or((&line, ""));
        let id: u64 = rest.parse().unwrap_or(0);
        match word {
            // Trades, orders and quantities in all accounts, how many are of which version, and what the first says of itself.
            "figures" => {
                let mut sums = [0u64; 4];
                for id in accounts.ids() {
                    let of = accounts.with(id, (), account::figures).unwrap_or_default();
                    sums.iter_mut().zip(of).for_each(|(sum, n)| *sum += n);
                }
                let [orders, quantity, old, new] = sums;
                println!("trades {} orders {orders} quantity {quantity} old {old} new {new}", TRADES.load(Ordering::Relaxed));
            }
            "open" => println!("{}", accounts.insert(id, id, account::open)),
            "close" => println!("{}", accounts.remove(id)),
            "say" => println!("{}", accounts.with(id, (), account::say).unwrap_or_default()),
            "stop" => {
                stop.store(true, Ordering::Relaxed);
                println!("stopping");
            }
            _ => break,
        }
    }
    stop.store(true, Ordering::Relaxed);
    traders.into_iter().for_each(|t| t.join().expect("a trader"));
    drop(agent);
}
