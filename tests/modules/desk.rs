//! The fixture of tests/modules.rs: an interface and a module of it, in versions that `--cfg` chooses. Each breaks or keeps one rule.

use livepatch_interface::{describe, export, interface, Module, Saved};

#[repr(C)]
#[cfg(not(member_reordered))]
pub struct Order {
    pub qty: i64,
    pub price: i64,
    pub side: Side,
}
#[cfg(not(member_reordered))]
describe! { struct Order { qty: i64, price: i64, side: Side } }

#[repr(C)]
#[cfg(member_reordered)]
pub struct Order {
    pub price: i64,
    pub qty: i64,
    pub side: Side,
}
#[cfg(member_reordered)]
describe! { struct Order { price: i64, qty: i64, side: Side } }

#[repr(u8)]
#[derive(Clone, Copy, PartialEq)]
pub enum Side {
    Buy,
    Sell,
}
describe! { enum Side { Buy, Sell } }

#[cfg(not(any(param_added, method_inserted, method_reordered)))]
interface! {
    pub trait Desk, table DeskTable, version "1.0";
    fn version(&self) -> u64;
    fn fee(&self, order: &Order, rate: i64) -> i64;
    fn count(&self) -> u64;
}
#[cfg(param_added)]
interface! {
    pub trait Desk, table DeskTable, version "1.0";
    fn version(&self) -> u64;
    fn fee(&self, order: &Order, rate: i64, minimum: i64) -> i64;
    fn count(&self) -> u64;
}
#[cfg(method_inserted)]
interface! {
    pub trait Desk, table DeskTable, version "1.0";
    fn version(&self) -> u64;
    fn tax(&self, order: &Order) -> i64;
    fn fee(&self, order: &Order, rate: i64) -> i64;
    fn count(&self) -> u64;
}
#[cfg(method_reordered)]
interface! {
    pub trait Desk, table DeskTable, version "1.0";
    fn fee(&self, order: &Order, rate: i64) -> i64;
    fn version(&self) -> u64;
    fn count(&self) -> u64;
}

/// Counts its calls: a module's own state, which is handed over.
pub struct Own {
    calls: std::sync::atomic::AtomicU64,
}

#[cfg(mutable_static)]
pub static SEEN: std::sync::atomic::AtomicU64 = std::sync::atomic::AtomicU64::new(0);

#[cfg(thread_local)]
std::thread_local! { pub static LAST: std::cell::Cell<u64> = const { std::cell::Cell::new(0) }; }

#[cfg(constructor)]
extern "C" fn eager() {}
#[cfg(constructor)]
#[used]
#[link_section = ".init_array"]
static EAGER: extern "C" fn() = eager;

#[cfg(new_function)]
impl Own {
    /// Not in the interface: nobody outside calls it.
    #[inline(never)]
    fn rounded(value: i64) -> i64 {
        std::hint::black_box(value)
    }
}

impl Desk for Own {
    fn version(&self) -> u64 {
        if cfg!(v2) {
            2
        } else {
            1
        }
    }

    fn fee(&self, order: &Order, rate: i64, #[cfg(param_added)] minimum: i64) -> i64 {
        #[cfg(mutable_static)]
        SEEN.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        #[cfg(thread_local)]
        LAST.with(|l| l.set(l.get() + std::hint::black_box(1)));
        #[cfg(param_added)]
        let rate = rate + minimum;
        assert!(rate != 13, "thirteen in version {}", self.version());
        self.calls.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        let fee = order.qty * order.price * rate / 1_000_000;
        #[cfg(new_function)]
        let fee = Self::rounded(fee);
        let side = if order.side == Side::Sell { 1 } else { 0 };
        if cfg!(v2) {
            fee + side + 2
        } else {
            fee + side
        }
    }

    fn count(&self) -> u64 {
        self.calls.load(std::sync::atomic::Ordering::Relaxed)
    }

    #[cfg(method_inserted)]
    fn tax(&self, order: &Order) -> i64 {
        order.qty
    }
}

impl Module for Own {
    const STATE: u32 = if cfg!(v2) { 2 } else { 1 };

    fn create(saved: Option<Saved<'_>>) -> Result<Self, String> {
        let calls = match saved {
            None => 0,
            Some(Saved { version: 1, bytes }) => bytes.try_into().map(u64::from_le_bytes).map_err(|_| "damaged")?,
            // Version 2 keeps it in text.
            Some(Saved { version: 2, bytes }) if cfg!(v2) => {
                std::str::from_utf8(bytes).ok().and_then(|t| t.parse().ok()).ok_or("damaged")?
            }
            Some(Saved { version, .. }) => return Err(format!("state of version {version} is not known")),
        };
        if cfg!(unwilling) {
            return Err("not today".into());
        }
        Ok(Self { calls: calls.into() })
    }

    fn save(&self, version: u32) -> Option<Vec<u8>> {
        match version {
            1 => Some(self.count().to_le_bytes().to_vec()),
            2 if cfg!(v2) => Some(self.count().to_string().into_bytes()),
            _ => None,
        }
    }
}

#[cfg(not(any(no_factory, declared)))]
export!(Own: DeskTable);
#[cfg(declared)]
export!(Own: DeskTable, allow "static desk::SEEN", allow "thread-local desk::LAST", allow "constructor desk::EAGER", allow "constructor desk::eager");

/// Its text without its factory.
#[cfg(no_factory)]
mod text_only {
    use super::DeskTable;
    use livepatch_interface::{describe, Table};
    const LEN: usize = describe::<0>((DeskTable::NAME, DeskTable::VERSION), DeskTable::FUNCTIONS, &[], None).1;
    #[used]
    #[no_mangle]
    #[link_section = ".livepatch.module"]
    static TEXT: [u8; LEN] = describe::<LEN>((DeskTable::NAME, DeskTable::VERSION), DeskTable::FUNCTIONS, &[], None).0;
}
