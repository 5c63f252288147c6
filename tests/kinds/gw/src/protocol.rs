//! Requests and answers: JSON in, JSON out.

use std::panic::{catch_unwind, AssertUnwindSafe};
use std::sync::atomic::Ordering;

use book::{Market, Order, Side};
use serde_json::{json, Value};

use crate::audit::{Auditor, Note};

/// What one session may and did.
#[derive(Debug, Default)]
pub struct Session {
    pub account: u32,
    pub orders: u64,
    pub failures: u32,
}

/// One line: parsed, handled, answered. A panic in a handler costs that request only.
#[inline(never)]
pub fn handle(line: &str, session: &mut Session, market: &mut Market, audit: &Auditor) -> Value {
    let request: Value = match serde_json::from_str(line) {
        Ok(request) => request,
        Err(e) => return json!({"error": e.to_string()}),
    };
    match guarded(|| dispatch(&request, session, market, audit)) {
        Some(answer) => answer,
        None => {
            session.failures += 1;
            json!({"error": "internal"})
        }
    }
}

/// The answer of a handler, or none if it panics.
#[inline(never)]
fn guarded(handler: impl FnOnce() -> Value) -> Option<Value> {
    catch_unwind(AssertUnwindSafe(handler)).ok()
}

#[inline(never)]
fn dispatch(request: &Value, session: &mut Session, market: &mut Market, audit: &Auditor) -> Value {
    match request["type"].as_str() {
        Some("logon") => logon(request, session),
        Some("order") => order(request, session, market, audit),
        Some("quote") => quote(request, market),
        Some("stats") => stats(session, market),
        Some("tags") => tags(request),
        Some("crash") => crash(request),
        _ => json!({"error": "unknown type"}),
    }
}

#[inline(never)]
fn logon(request: &Value, session: &mut Session) -> Value {
    session.account = number(request, "account") as u32;
    json!({"ok": session.account})
}

#[inline(never)]
fn order(request: &Value, session: &mut Session, market: &mut Market, audit: &Auditor) -> Value {
    session.orders += 1;
    let side = if request["side"] == "buy" { Side::Buy } else { Side::Sell };
    let order = Order {
        id: session.orders,
        account: session.account,
        side,
        price: number(request, "price"),
        qty: number(request, "qty"),
    };
    match market.order(request["symbol"].as_str().unwrap_or("?"), order) {
        Ok(fills) => {
            let value = fills.iter().map(|f| book::value(f.price, f.qty)).sum();
            let _ = audit.send(Note::Traded { account: session.account, value });
            json!({"filled": fills.iter().map(|f| f.qty).sum::<u64>(), "value": value})
        }
        Err(reject) => {
            let why = reject.to_string();
            let _ = audit.send(Note::Refused { account: session.account, why: why.clone() });
            json!({"reject": why})
        }
    }
}

#[inline(never)]
fn quote(request: &Value, market: &Market) -> Value {
    let (bid, ask) = market.quote(request["symbol"].as_str().unwrap_or("?"));
    json!({"bid": bid, "ask": ask})
}

#[inline(never)]
fn stats(session: &Session, market: &Market) -> Value {
    match market.stats(session.account) {
        Some((volume, fees, rejects)) => json!({
            "volume": volume, "fees": fees, "rejects": rejects, "earned": market.earned(),
            "seen": book::SEEN.load(Ordering::Relaxed), "orders": session.orders,
        }),
        None => json!({"error": format!("account {} has not traded", session.account)}),
    }
}

/// The tags of a request, sorted by length, and how often each occurs.
#[inline(never)]
fn tags(request: &Value) -> Value {
    let mut tags: Vec<&str> = request["tags"].as_array().into_iter().flatten().filter_map(Value::as_str).collect();
    tags.sort_by_key(|t| std::cmp::Reverse(t.len()));
    let most = tags.iter().map(|t| t.len()).max();
    json!({"tags": tags, "most": most})
}

#[inline(never)]
fn crash(request: &Value) -> Value {
    let list = [1, 2, 3];
    let at = number(request, "at") as usize;
    assert!(at < 100, "asked for {at}");
    json!({"item": list[at]})
}

#[inline(never)]
fn number(request: &Value, key: &str) -> u64 {
    match &request[key] {
        Value::String(text) => text.parse().unwrap_or(0),
        other => other.as_u64().unwrap_or(0),
    }
}
