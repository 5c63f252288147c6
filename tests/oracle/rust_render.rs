//! A random Rust program as source files.

use super::rust_program::{plain, Function, Holds, Kind, Program, Static, Table};

/// The name of the crate or module with types and small functions.
pub const BASE: &str = "base";

/// File names and contents: `main.rs` and, as a crate or a module, `base.rs`.
pub fn files(p: &Program, two_crates: bool) -> Vec<(String, String)> {
    let mut base = p.base.clone() + "use std::cell::{Cell, RefCell};\n";
    base = "// a line\n".repeat(p.comment[0]) + &base + &unit(p, 0);
    let mut main = "// a line\n".repeat(p.comment[1]);
    main += if two_crates { "use base::*;\n" } else { "mod base;\nuse base::*;\n" };
    main += "use std::cell::{Cell, RefCell};\nuse std::collections::HashMap;\nuse std::sync::{atomic::{AtomicU64, Ordering::Relaxed}, Mutex};\n";
    main += &unit(p, 1);
    main.extend(p.rules.iter().chain(&p.hooks).map(String::as_str));
    main += &makers(p);
    main += &state(p);
    main += &asked(p);
    main += include_str!("rust_serve.rs.in");
    vec![("base.rs".to_owned(), plain(&base)), ("main.rs".to_owned(), plain(&main))]
}

fn unit(p: &Program, unit: usize) -> String {
    let mut out = String::new();
    for s in p.statics.iter().filter(|s| s.unit == unit) {
        out += &declare(s);
    }
    for t in p.tables.iter().filter(|t| t.unit == unit) {
        out += &array(t);
    }
    for f in p.order.iter().map(|i| &p.functions[*i]).filter(|f| f.unit == unit) {
        out += &function(f);
    }
    out
}

fn declare(s: &Static) -> String {
    let (name, init) = (&s.name, s.init);
    match s.holds {
        Holds::Number => format!("pub static {name}: AtomicU64 = AtomicU64::new({init});\n"),
        Holds::List => format!("pub static {name}: Mutex<Vec<u64>> = Mutex::new(Vec::new());\n"),
        Holds::Local => format!("thread_local! {{ pub static {name}: Cell<u64> = const {{ Cell::new({init}) }}; }}\n"),
        Holds::LocalList => {
            format!("thread_local! {{ pub static {name}: RefCell<Vec<u64>> = RefCell::new(vec![{init}, 1]); }}\n")
        }
    }
}

fn array(t: &Table) -> String {
    let of = if t.of == "&str" { "&'static str" } else { t.of };
    format!("pub static {}: [{of}; {}] = [{}];\n", t.name, t.entries.len(), t.entries.join(", "))
}

fn function(f: &Function) -> String {
    let (types, first, result, a) = match f.kind {
        Kind::Number => ("", "u64", "u64", "p"),
        Kind::Text => ("", "u64", "String", "p"),
        Kind::Option => ("", "u64", "Option<u64>", "p"),
        Kind::Result => ("", "u64", "Result<u64, Fault>", "p"),
        Kind::Name => ("", "u64", "&'static str", "p"),
        Kind::Wide => ("", "u128", "u128", "(p >> 5) as u64"),
        Kind::Float => ("", "f64", "f64", "p as u64"),
        Kind::Slice => ("", "&[u64]", "u64", "p.first().map_or(1, |v| v ^ 1)"),
        Kind::Order => ("", "&mut Order", "u64", "p.id ^ u64::from(p.price)"),
        Kind::Generic => ("<T: Source + ?Sized>", "&T", "u64", "p.draw(b)"),
        Kind::Dyn => ("", "&dyn Rule", "u64", "p.value()"),
    };
    let attribute = if f.attribute.is_empty() { String::new() } else { format!("#[{}]\n", f.attribute) };
    format!(
        "{attribute}pub fn {}{types}(p: {first}, b: u64) -> {result} {{\nlet a: u64 = {a};\nlet (mut x0, mut x1, mut x2) = (a, b, 0_u64);\n{}\n\
         let b = b ^ x0.wrapping_add(x1.rotate_left(9)) ^ x2;\nlet out = {};\nout\n}}\n",
        f.name,
        f.body.join("\n"),
        f.result
    )
}

fn makers(p: &Program) -> String {
    let arms = |n: usize, of: &dyn Fn(usize) -> String| -> String {
        (0..n).map(|i| format!("{} => {},\n", if i + 1 == n { "_".to_owned() } else { i.to_string() }, of(i))).collect()
    };
    format!(
        "pub fn make_rule(kind: u64, value: u64) -> Box<dyn Rule> {{\nmatch kind % 8 {{\n{}}}\n}}\n\
         pub fn make_hook(kind: u64, b: u64) -> Hook {{\nmatch kind % 8 {{\n{}}}\n}}\n",
        arms(p.rules.len(), &|i| format!("Box::new(Rule{i}(value))")),
        arms(p.hooks.len(), &|i| format!("hook_{i}(b)"))
    )
}

/// Functions that write out every static of the old program, and read it in.
fn state(p: &Program) -> String {
    let (mut dump, mut load) = (String::new(), String::new());
    for s in p.statics.iter().filter(|s| !s.new) {
        let name = &s.name;
        let (d, l) = match s.holds {
            Holds::Number => (
                format!("out.push({name}.load(Relaxed));"),
                format!("{name}.store(from.next().unwrap_or(0), Relaxed);"),
            ),
            Holds::List => {
                (format!("dump_list(&locked(&{name}), out);"), format!("*locked(&{name}) = load_list(from);"))
            }
            Holds::Local => (format!("out.push({name}.get());"), format!("{name}.set(from.next().unwrap_or(0));")),
            Holds::LocalList => (
                format!("{name}.with_borrow(|v| dump_list(v, out));"),
                format!("let list = load_list(from);\n{name}.replace(list);"),
            ),
        };
        dump += &(d + "\n");
        load += &(l + "\n");
    }
    format!("#[inline(never)]\nfn dump(out: &mut Vec<u64>) {{\n{dump}}}\n#[inline(never)]\nfn load(from: &mut dyn Iterator<Item = u64>) {{\n{load}}}\n")
}

/// A function for each that can be asked for, and the table of them.
fn asked(p: &Program) -> String {
    let mut out = String::new();
    for (i, f) in p.functions[..p.asked].iter().enumerate() {
        let name = &f.name;
        let call = match f.kind {
            Kind::Wide => format!("{name}(u128::from(a) << 33 | u128::from(b), b)"),
            Kind::Float => format!("{name}(a as f64 / 3.0, b).to_bits()"),
            Kind::Slice => format!("{name}(&[a, b, 3, a ^ b, 5][..(a % 4) as usize + 1], b)"),
            Kind::Order => {
                format!("{{ let mut o = order(a); let n = {name}(&mut o, b); let mut out = vec![n]; dump_order(&o, &mut out); out }}")
            }
            Kind::Generic => format!("({name}(&a, b), {name}(&(a as i16), b), {name}(&[a as u8, 3][..], b))"),
            Kind::Dyn => format!("{name}(&*make_rule(a, b), b)"),
            _ => format!("{name}(a, b)"),
        };
        out += &format!("fn ask_{i}(a: u64, b: u64) -> String {{ format!(\"{{:?}}\", {call}) }}\n");
    }
    let all: String = (0..p.asked).map(|i| format!("ask_{i}, ")).collect();
    out + &format!("static FUNCTIONS: [fn(u64, u64) -> String; {}] = [{all}];\n", p.asked)
}
