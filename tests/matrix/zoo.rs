// A zoo of Rust: every function of the list in `check.py` changes with `--cfg all`, `price` alone with `--cfg one`.
include!("common.rs");
use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, HashMap};
use std::fmt::Display;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, OnceLock};

const ALL: u64 = cfg!(all) as u64;
const ONE: u64 = cfg!(one) as u64;

#[inline(never)]
fn price(x: u64) -> u64 {
    x * 3 + 17 + ALL + ONE
}

#[inline(never)]
fn jumps(kind: u64, x: u64) -> u64 {
    match kind {
        0 => x + 1 + ALL,
        1 => x * x,
        2 => x / 7,
        3 => x << 3,
        4 => x ^ 0x55,
        5 => counted(x),
        6 => x % 13,
        7 => x.count_ones() as u64,
        _ => 0,
    }
}

#[inline(never)]
fn texts(kind: u64) -> &'static str {
    match kind {
        0 => "zero",
        1 => "one",
        2 => "two",
        3 => {
            if ALL == 1 {
                "THREE"
            } else {
                "three"
            }
        }
        4 => "four",
        5 => "five",
        _ => "many",
    }
}

static COUNT: AtomicU64 = AtomicU64::new(3);
static NAMES: Mutex<Vec<String>> = Mutex::new(Vec::new());
static ONCE: OnceLock<String> = OnceLock::new();
thread_local! {
    static PLAIN: Cell<u64> = const { Cell::new(5) };
    static LAZY: RefCell<Vec<u64>> = RefCell::new(vec![number()]);
}

#[inline(never)]
fn counted(x: u64) -> u64 {
    COUNT.fetch_add(1 + ALL, Ordering::Relaxed) + x
}

#[inline(never)]
fn kept(x: u64) -> u64 {
    let mut names = NAMES.lock().expect("no poison");
    names.push(format!("name {x}"));
    names.len() as u64 + ONCE.get_or_init(|| "once".to_owned()).len() as u64 + ALL
}

#[inline(never)]
fn locals(x: u64) -> u64 {
    PLAIN.set(PLAIN.get() + 1 + ALL);
    LAZY.with_borrow_mut(|v| v.push(x));
    PLAIN.get() + LAZY.with_borrow(|v| v.iter().sum::<u64>())
}

trait Shape {
    fn area(&self, x: u64) -> u64;
    fn name(&self) -> String {
        "shape".into()
    }
}
struct Square;
struct Circle(u64);
impl Shape for Square {
    #[inline(never)]
    fn area(&self, x: u64) -> u64 {
        x * x + 1 + ALL
    }
    #[inline(never)]
    fn name(&self) -> String {
        format!("square {}", 4 + ALL)
    }
}
impl Shape for Circle {
    #[inline(never)]
    fn area(&self, x: u64) -> u64 {
        self.0 * x + 2 + ALL
    }
}

#[inline(never)]
fn largest<T: PartialOrd + Copy + Display>(all: &[T]) -> String {
    let mut best = all[0];
    for x in all {
        if *x > best {
            best = *x;
        }
    }
    format!("{best:>5}{}", ALL)
}

#[inline(never)]
fn floats(x: f64) -> f64 {
    x.abs() * -0.125 + x * 1.0625 + ALL as f64
}

#[inline(never)]
fn panics(x: u64) -> u64 {
    let caught = std::panic::catch_unwind(|| fails(x));
    caught.map_or(7 + ALL, |v| v)
}

#[inline(never)]
fn fails(x: u64) -> u64 {
    let v = [1u64, 2, 3];
    let i = std::hint::black_box(x as usize);
    v[i] + ALL
}

#[inline(never)]
fn closures(x: u64) -> u64 {
    let by = 5 + ALL;
    let all: Vec<u64> = (0..x % 20).map(|i| i * by).filter(|i| i % 2 == 0).collect();
    let boxed: Box<dyn Fn(u64) -> u64> = Box::new(move |y| y + by);
    boxed(all.iter().sum())
}

#[inline(never)]
fn maps(x: u64) -> u64 {
    let mut m = HashMap::new();
    let mut b = BTreeMap::new();
    for i in 0..x % 50 {
        *m.entry(i % 7).or_insert(0) += i;
        b.insert(i, format!("{i}"));
    }
    m.values().sum::<u64>() + b.len() as u64 + ALL
}

#[inline(never)]
fn parses(text: &str) -> Result<u64, std::num::ParseIntError> {
    Ok(text.trim().parse::<u64>()? + ALL)
}

fn opaque(x: u64) -> u64 {
    std::hint::black_box(x)
}

fn answer(line: &str) -> String {
    let x = number();
    let shapes: [Box<dyn Shape>; 2] = [Box::new(Square), Box::new(Circle(x))];
    let mut out = format!("{} {} {} {}", price(x), jumps(opaque(x % 8), x), texts(opaque(x % 8 + 3)), counted(x));
    for s in std::hint::black_box(&shapes) {
        out += &format!(" {} {}", s.area(x), s.name());
    }
    out += &format!(" {} {}", kept(x), locals(x));
    out += &format!(" {} {}", largest(&[1u64, x, 3]), largest(&[1.5f64, 0.5]));
    let caught = if cfg!(panic = "unwind") { panics(x) } else { fails(x - 999) };
    out += &format!(" {} {caught} {} {} {:?}", floats(x as f64), closures(x), maps(x), parses(line));
    out
}

fn main() {
    std::panic::set_hook(Box::new(|_| {}));
    serve(answer);
}
