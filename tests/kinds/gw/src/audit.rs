//! A thread with a tokio runtime: it writes down what was traded, slowly, away from the event loop.

use std::time::Duration;

use tokio::sync::mpsc::{unbounded_channel, UnboundedReceiver, UnboundedSender};

/// What the event loop tells the auditor.
#[derive(Debug)]
pub enum Note {
    Traded { account: u32, value: u64 },
    Refused { account: u32, why: String },
    Closed(usize),
}

pub type Auditor = UnboundedSender<Note>;

/// Starts the thread; its runtime ends when the sender is dropped.
pub fn start() -> Auditor {
    let (send, receive) = unbounded_channel();
    std::thread::spawn(move || {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().expect("a runtime");
        runtime.block_on(write_down(receive));
    });
    send
}

async fn write_down(mut notes: UnboundedReceiver<Note>) {
    let mut total = 0u64;
    while let Some(note) = notes.recv().await {
        match note {
            Note::Traded { account, value } => {
                total = total.wrapping_add(value);
                tokio::spawn(large_trade(account, value));
            }
            Note::Refused { account, why } => refused(account, &why),
            Note::Closed(token) => log::debug!("session {token} is gone, {total} traded"),
        }
    }
}

#[inline(never)]
fn refused(account: u32, why: &str) {
    log::info!("account {account}: {why}");
}

/// Large trades are looked at twice.
async fn large_trade(account: u32, value: u64) {
    if value < 1_000_000 {
        return;
    }
    tokio::time::sleep(Duration::from_millis(50)).await;
    log::info!("large trade of account {account}: {value}");
}
