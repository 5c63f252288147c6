//! What a call through a module's handle costs, and what happens to calls while versions come and go. `./ci/modules` builds the two
//! modules (tests/modules/desk.rs) and runs it: `modules ONE.so TWO.so FLIPS`. Ends with a table; its exit code is 0 if nothing was wrong.

use std::hint::black_box;
use std::process::ExitCode;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::Arc;
use std::time::{Duration, Instant};

use livepatch::module::{describe, interface, Handle, VersionId};

/// As in tests/modules/desk.rs.
#[repr(C)]
pub struct Order {
    qty: i64,
    price: i64,
    side: Side,
}
describe! { struct Order { qty: i64, price: i64, side: Side } }

/// As there.
#[repr(u8)]
#[allow(dead_code)] // a module may be asked for either
pub enum Side {
    /// 1
    Buy,
    /// 2
    Sell,
}
describe! { enum Side { Buy, Sell } }

interface! {
    /// As there.
    pub trait Desk, table DeskTable, version "1.0";
    /// Of the module.
    fn version(&self) -> u64;
    /// In hundredths.
    fn fee(&self, order: &Order, rate: i64) -> i64;
    /// Calls so far.
    fn count(&self) -> u64;
}

const ORDER: Order = Order { qty: 100, price: 5_000, side: Side::Sell };

/// The same work linked in.
struct Linked(AtomicU64);

impl Desk for Linked {
    fn version(&self) -> u64 {
        1
    }
    #[inline(never)]
    fn fee(&self, order: &Order, rate: i64) -> i64 {
        self.0.fetch_add(1, Ordering::Relaxed);
        order.qty * order.price * rate / 1_000_000 + i64::from(matches!(order.side, Side::Sell))
    }
    fn count(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// Nanoseconds a call: the best of some rounds, each of a million calls.
fn nanoseconds(mut call: impl FnMut(u64) -> i64) -> f64 {
    const CALLS: u64 = 1_000_000;
    let round = |_| {
        let began = Instant::now();
        (0..CALLS).for_each(|i| {
            black_box(call(i));
        });
        began.elapsed().as_nanos() as f64 / CALLS as f64
    };
    (0..7).map(round).fold(f64::INFINITY, f64::min)
}

fn resident_kb() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|l| l.strip_prefix("VmRSS:")).unwrap_or("0");
    line.split_whitespace().next().and_then(|n| n.parse().ok()).unwrap_or(0)
}

fn gone(handle: &Handle<DeskTable>, id: VersionId) -> bool {
    handle.status().iter().any(|s| s.id == id && !s.alive && !s.mapped)
}

fn run() -> Result<bool, Box<dyn std::error::Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [one, two, flips] = &arguments[..] else { return Err("usage: modules ONE.so TWO.so FLIPS".into()) };
    let flips: u64 = flips.parse()?;
    let handle = Handle::<DeskTable>::new();
    let mut current = handle.load(one.as_ref())?;
    handle.switch(current)?;

    let linked = Linked(AtomicU64::new(0));
    let object: Arc<dyn Desk + Send + Sync> = Arc::new(Linked(AtomicU64::new(0)));
    let direct = nanoseconds(|_| black_box(&linked).fee(black_box(&ORDER), 250));
    let shared = nanoseconds(|_| Arc::clone(black_box(&object)).fee(black_box(&ORDER), 250));
    let entered = handle.enter(0);
    let inside = nanoseconds(|_| entered.fee(black_box(&ORDER), 250));
    drop(entered);
    let whole = nanoseconds(|i| handle.enter(i).fee(black_box(&ORDER), 250));

    let (stop, calls, wrong) = (AtomicBool::new(false), AtomicU64::new(0), AtomicU64::new(0));
    let (mut warm, mut longest, mut stuck) = (0, Duration::ZERO, 0);
    std::thread::scope(|scope| -> Result<(), livepatch::module::LoadError> {
        for _ in 0..4 {
            scope.spawn(|| {
                let mut session = 0;
                while !stop.load(Ordering::Relaxed) {
                    let entered = handle.enter(session);
                    let want = if Desk::version(&*entered) == 1 { 126 } else { 128 };
                    wrong.fetch_add(u64::from(entered.fee(&ORDER, 250) != want), Ordering::Relaxed);
                    session += 1;
                }
                calls.fetch_add(session, Ordering::Relaxed);
            });
        }
        for flip in 0..flips {
            let changed = handle.load(if flip % 2 == 0 { two } else { one }.as_ref()).and_then(|next| {
                let began = Instant::now();
                handle.switch(next)?;
                longest = longest.max(began.elapsed());
                handle.release(current)?;
                let began = Instant::now();
                while !gone(&handle, current) && began.elapsed() < Duration::from_secs(60) {
                    std::thread::sleep(Duration::from_micros(500));
                }
                if gone(&handle, current) {
                    handle.forget(current)?;
                } else {
                    stuck += 1;
                }
                current = next;
                Ok(())
            });
            if changed.is_err() {
                stop.store(true, Ordering::Relaxed);
            }
            changed?;
            if flip == flips / 10 {
                warm = resident_kb();
            }
            if flip % 100 == 99 {
                eprintln!("{} of {flips}", flip + 1);
            }
        }
        stop.store(true, Ordering::Relaxed);
        Ok(())
    })?;
    let (calls, wrong, end) = (calls.into_inner(), wrong.into_inner(), resident_kb());
    let ratio = |ns: f64| format!("{ns:.1} ns, {:.2} of a direct call", ns / direct);
    println!("| what | figure |\n| --- | --- |");
    println!("| direct call | {direct:.1} ns |");
    println!("| cloned Arc of a trait object | {} |", ratio(shared));
    println!("| function of a version that is held | {} |", ratio(inside));
    println!("| entering the handle, one function, leaving | {} |", ratio(whole));
    println!("| versions loaded, switched to, released | {flips} |");
    println!("| calls meanwhile, four threads | {calls} |");
    println!("| wrong results | {wrong} |");
    println!("| versions that never went | {stuck} |");
    println!("| longest switch | {} µs |", longest.as_micros());
    println!("| resident memory after a tenth, at the end | {warm} KiB, {end} KiB |");
    // A new page here and there is the allocator's; a version is some hundred KiB.
    Ok(wrong == 0 && stuck == 0 && calls > 0 && end <= warm + 1_024)
}

fn main() -> ExitCode {
    match run() {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("modules: {error}");
            ExitCode::FAILURE
        }
    }
}
