//! Random Rust programs: what they are made of, and how they are made up.
//!
//! A program is text with marks, `«KIND:VALUE»`, at the places that a change may alter; [`plain`] takes them off. Functions call only functions
//! of lower levels, so every call ends. All state is in statics that the program can write out and read in.

use super::rng::Rng;

/// How a function is called.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    Number,
    Text,
    Option,
    Result,
    Name,
    Wide,
    Float,
    Slice,
    Order,
    Generic,
    Dyn,
}

#[derive(Clone, Debug)]
pub struct Function {
    pub name: String,
    pub kind: Kind,
    /// 0 is the module or crate `base`, 1 is `main`.
    pub unit: usize,
    pub level: usize,
    pub attribute: &'static str,
    pub body: Vec<String>,
    pub result: String,
}

/// A constant table: of numbers of some width, or of strings.
#[derive(Clone, Debug)]
pub struct Table {
    pub name: String,
    pub unit: usize,
    pub of: &'static str,
    pub entries: Vec<String>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Holds {
    Number,
    List,
    Local,
    LocalList,
}

#[derive(Clone, Debug)]
pub struct Static {
    pub name: String,
    pub unit: usize,
    pub holds: Holds,
    pub init: u64,
    /// Brought by the change: neither written out nor read in.
    pub new: bool,
}

#[derive(Clone, Debug)]
pub struct Program {
    /// Types, traits and small functions of `base`.
    pub base: String,
    /// Implementors of `Rule`, and closures that are stored.
    pub rules: Vec<String>,
    pub hooks: Vec<String>,
    pub functions: Vec<Function>,
    pub statics: Vec<Static>,
    pub tables: Vec<Table>,
    /// Functions that can be asked for: those of the old program.
    pub asked: usize,
    pub unwind: bool,
    pub order: Vec<usize>,
    pub comment: [usize; 2],
}

/// What the text that is being made up may use.
pub struct Scope {
    pub unit: usize,
    pub level: usize,
    pub calls: usize,
    pub unwind: bool,
}

const LEVELS: usize = 4;
const TEXTS: [&str; 6] = [
    "order rejected",
    "session closed",
    "no such symbol",
    "limit",
    "a much longer text that is no immediate value",
    "ok",
];

impl Program {
    pub fn random(rng: &mut Rng, unwind: bool) -> Self {
        let mut p = Self {
            base: include_str!("rust_base.rs.in").to_owned(),
            rules: vec![],
            hooks: vec![],
            functions: vec![],
            statics: vec![],
            tables: vec![],
            asked: 0,
            unwind,
            order: vec![],
            comment: [rng.below(4), rng.below(4)],
        };
        for i in 0..4 + rng.below(4) {
            let holds = *rng.pick(&[Holds::Number, Holds::Number, Holds::List, Holds::Local, Holds::LocalList]);
            let init = if rng.chance(40) { 0 } else { rng.constant() };
            p.statics.push(Static { name: format!("STATE{i}"), unit: rng.below(2), holds, init, new: false });
        }
        for i in 0..4 + rng.below(3) {
            let unit = rng.below(2);
            p.tables.push(table(rng, format!("TABLE{i}"), unit));
        }
        for i in 0..9 + rng.below(7) {
            let f = p.function(rng, i);
            p.functions.push(f);
        }
        let count = p.functions.len();
        for i in 0..2 + rng.below(4) {
            p.rules.push(p.rule(rng, i));
        }
        for i in 0..2 + rng.below(4) {
            let mut scope = Scope { unit: 1, level: 1, calls: 1, unwind };
            let body = p.expr(rng, &mut scope, 2);
            p.hooks.push(format!("pub fn hook_{i}(b: u64) -> Hook {{\n    Box::new(move |a| {body})\n}}\n"));
        }
        p.order = (0..count).collect();
        p.asked = count;
        p
    }

    pub fn rule(&self, rng: &mut Rng, i: usize) -> String {
        let mut scope = Scope { unit: 1, level: 1, calls: 1, unwind: self.unwind };
        let apply = self.expr(rng, &mut scope, 2);
        let mut out = format!(
            "pub struct Rule{i}(pub u64);\nimpl Rule for Rule{i} {{\n    fn kind(&self) -> u64 {{ {i} }}\n    fn value(&self) -> u64 {{ self.0 }}\n    \
             fn apply(&self, a: u64) -> u64 {{\n        let b = self.0;\n        {apply}\n    }}\n"
        );
        if rng.chance(40) {
            out += &format!("    fn label(&self) -> String {{ \"{}\".to_owned() }}\n", text(rng));
        }
        if rng.chance(40) {
            out += &format!("    fn weight(&self) -> u64 {{ self.0 % {} }}\n", number(rng.constant() | 1));
        }
        out + "}\n"
    }

    pub fn function(&self, rng: &mut Rng, i: usize) -> Function {
        use Kind::{Dyn, Float, Generic, Name, Number, Option, Order, Result, Slice, Text, Wide};
        let kind = *rng.pick(&[
            Number, Number, Number, Number, Text, Option, Result, Name, Wide, Float, Slice, Order, Generic, Dyn,
        ]);
        let level = (i * LEVELS / 14).min(LEVELS - 1);
        let unit = usize::from(rng.chance(65));
        let attribute = *rng.pick(&["", "", "", "inline(never)", "inline(never)", "inline", "cold"]);
        let mut scope = Scope { unit, level, calls: 2, unwind: self.unwind };
        let body = (0..2 + rng.below(4)).map(|_| self.stmt(rng, &mut scope, kind, 2)).collect();
        let result = self.result(rng, &mut scope, kind);
        let name = format!("{}_{i}", rng.pick(&["parse", "update", "price", "score", "find", "check", "encode"]));
        Function { name, kind, unit, level, attribute, body, result }
    }

    /// An expression of the function's own type.
    pub fn result(&self, rng: &mut Rng, scope: &mut Scope, kind: Kind) -> String {
        let e = self.expr(rng, scope, 3);
        match kind {
            Kind::Text => format!("format!(\"{}{{}}\", {e})", text(rng)),
            Kind::Option => format!("Some({e}).filter(|v| v % 5 != {})", bound(rng.below(5))),
            Kind::Result => match rng.below(3) {
                0 => format!("match {e} {{ v if v % 3 == 1 => Err(Fault::Limit(v)), v => Ok(v) }}"),
                1 => format!("match {e} {{ v if v & 4 != 0 => Err(Fault::Both {{ code: v as u16, text: \"{}\".to_owned() }}), v => Ok(v) }}", text(rng)),
                _ => format!("if {e} % 4 == 0 {{ Err(Fault::Text(\"{}\")) }} else if a == {} {{ Err(Fault::Empty) }} else {{ Ok(b) }}", text(rng), number(3)),
            },
            Kind::Name => {
                let [s, t, u] = [text(rng), text(rng), text(rng)];
                if rng.chance(50) {
                    format!("[\"{s}\", \"{t}\", \"{u}\"][({e} % 3) as usize]")
                } else {
                    format!("match {e} % 9 {{ 0 => \"{s}\", 1 => \"{t}\", 2 => \"new\", 3 => \"{u}\", 4 => \"filled\", 5 => \"{s}\", _ => \"other\" }}")
                }
            }
            Kind::Wide => format!("(u128::from({e}) << {}) ^ p", shift(rng)),
            Kind::Slice => match rng.below(3) {
                0 if scope.unwind => format!("p[({e} % {}) as usize]", bound(3)),
                0 | 1 => format!("p.windows(2).map(|w| w[0] ^ w[1]).fold({e}, |s, v| s.wrapping_mul({}) ^ v)", number(31)),
                _ => format!("p.iter().skip({}).zip(p).map(|(x, y)| x.wrapping_mul(*y)).fold({e}, |s, v| s ^ v)", bound(1)),
            },
            Kind::Order => format!(
                "{{ p.price ^= {e} as u32; p.tags.push(b as u8); match &p.side {{ Side::Buy => {}, Side::Sell {{ limit }} => u64::from(*limit) ^ {}, Side::Swap(s) => s.map_or({}, |v| u64::from(v.get())) }} }}",
                number(rng.constant()), number(rng.constant()), number(rng.constant())
            ),
            Kind::Generic => format!("T::WIDTH.wrapping_mul({e}) ^ p.draw({})", number(rng.constant())),
            Kind::Dyn => format!("hash(&p.label()) ^ p.apply({e}) ^ p.weight()"),
            Kind::Float => format!("p.mul_add({}, ({e} % 1000) as f64)", float(rng)),
            _ => e,
        }
    }

    pub fn stmt(&self, rng: &mut Rng, scope: &mut Scope, kind: Kind, depth: usize) -> String {
        let var = format!("x{}", rng.below(3));
        let which = rng.below(if depth == 0 { 10 } else { 26 });
        match which {
            0..=4 => format!("{var} {} {};", rng.pick(&["=", "^=", "&="]), self.expr(rng, scope, 3)),
            5 | 6 => self.set_static(rng, scope).unwrap_or_else(|| format!("{var} ^= {};", self.expr(rng, scope, 2))),
            7 if scope.unwind => {
                format!("if {} % 97 == {} {{ panic!(\"{} {{}}\", {var}); }}", self.expr(rng, scope, 1), bound(rng.below(9)), text(rng))
            }
            7 | 8 => format!("assert!({var} | 1 > 0, \"{}\");", text(rng)),
            9 => format!("let _guard = Guard({});", self.expr(rng, scope, 1)),
            10..=12 => {
                let test = self.test(rng, scope);
                let then = self.block(rng, scope, kind, depth - 1);
                if rng.chance(50) {
                    format!("if {test} {{\n{then}}} else {{\n{}}}", self.block(rng, scope, kind, depth - 1))
                } else {
                    format!("if {test} {{\n{then}}}")
                }
            }
            13 => format!("if {} {{ return {}; }}", self.test(rng, scope), self.result(rng, scope, kind)),
            14 | 15 => {
                let calls = std::mem::take(&mut scope.calls);
                let body = self.block(rng, scope, kind, 0);
                scope.calls = calls;
                format!("for i in 0..{}_u64 {{\n{body}x2 ^= i;\n}}", bound(1 + rng.below(9)))
            }
            16..=18 => {
                let (e, n) = (self.expr(rng, scope, 2), 3 + rng.below(8));
                let arms: String = (0..n)
                    .map(|i| format!("{i} => {var} = {},\n", self.expr(rng, scope, 1)))
                    .collect();
                format!("match {e} % {} {{\n{arms}«+:{n}»_ => {var} = {},\n}}", bound(n + 3), number(rng.constant()))
            }
            19 | 20 => format!(
                "match event({}, {}) {{\nEvent::Tick => {var} = {},\nEvent::Trade(v, w) => {var} = v.wrapping_add(u64::from(w)) ^ {},\n\
                 Event::Text(t) if t.is_empty() => {var} ^= {},\nEvent::Text(t) => {var} = hash(&t),\nEvent::Fill {{ order: o, left: Some(l) }} => {var} = l ^ o.id,\n\
                 Event::Fill {{ order: o, left: None }} => {var} = u64::from(o.price) | {},\nEvent::Many(v) => {var} = v.iter().copied().max().unwrap_or({}),\nEvent::Wide(w) => {var} = (w >> {}) as u64,\n}}",
                self.expr(rng, scope, 1), self.expr(rng, scope, 1), self.expr(rng, scope, 0), number(rng.constant()), number(rng.constant()), bound(3), number(rng.constant()), shift(rng)
            ),
            21 => format!("locked(&BOOK).insert({0} % 16, {{ let mut o = order({0} % 16); o.price ^= {1} as u32; o }});", self.pure(rng), number(rng.constant())),
            22 => format!(
                "if let Some(o) = locked(&BOOK).get_mut(&({} % 16)) {{ o.price = o.price.wrapping_add({} as u32); {var} ^= u64::from(o.price); }}",
                self.pure(rng), number(rng.constant())
            ),
            23 if scope.unit == 1 && scope.level > 1 => {
                let (k, v) = (self.pure(rng), self.pure(rng));
                match rng.below(3) {
                    0 => format!("{{ let rule = make_rule({k} % 8, {v}); let mut rules = locked(&RULES); if rules.len() > 6 {{ rules.remove(0); }} rules.push(rule); }}"),
                    1 => format!("{{ let k = {k} % 8; let hook = (k, {v}, make_hook(k, {v})); let mut hooks = locked(&HOOKS); if hooks.len() > 6 {{ hooks.swap_remove(1); }} hooks.push(hook); }}"),
                    _ => format!("{{ let text = make_rule({k}, {v}).label(); {var} ^= hash(&text); }}"),
                }
            }
            24 => format!(
                "{{ let mut m: HashMap<u64, String> = HashMap::new(); for i in 0..{}_u64 {{ m.entry({} % {}).or_default().push_str(\"{}\"); {var} ^= i; }} {var} ^= m.get(&{}).map_or({}, |t| hash(t)); }}",
                bound(4), self.pure(rng), bound(5), text(rng), bound(2), number(rng.constant())
            ),
            _ => {
                let calls = std::mem::take(&mut scope.calls);
                let body = self.expr(rng, scope, 2).replace("(a ", "(v ");
                scope.calls = calls;
                match rng.below(2) {
                    0 => format!("{{ let (a, b, x1, x2) = (a, b, x1, x2); x0 = with(&move |v| {body}, x0); let _ = (a, b, x1, x2); }}"),
                    _ => format!("{{ let (a, b, x1, x2) = (a, b, x1, x2); let f: Box<dyn Fn(u64) -> u64> = Box::new(move |v| {body}); x0 = f(x0).wrapping_add(f({})); let _ = (a, b, x1, x2); }}", number(rng.constant())),
                }
            }
        }
    }

    fn block(&self, rng: &mut Rng, scope: &mut Scope, kind: Kind, depth: usize) -> String {
        (0..1 + rng.below(2)).map(|_| self.stmt(rng, scope, kind, depth) + "\n").collect()
    }

    fn test(&self, rng: &mut Rng, scope: &mut Scope) -> String {
        let (a, b) = (self.expr(rng, scope, 1), self.expr(rng, scope, 1));
        format!("{a} % 1000 «c:{}» {b} % 1000", rng.pick(&["<", ">", "<=", "=="]))
    }

    fn set_static(&self, rng: &mut Rng, scope: &mut Scope) -> Option<String> {
        let mine: Vec<&Static> = self.statics.iter().filter(|s| s.unit <= scope.unit).collect();
        if mine.is_empty() {
            return None;
        }
        let s = *rng.pick(&mine);
        let value = self.expr(rng, scope, 2);
        Some(set(s, &value, rng))
    }

    fn pure(&self, rng: &mut Rng) -> String {
        (*rng.pick(&["a", "b", "x0", "x1", "x2"])).to_owned()
    }

    /// A number (`u64`) of `a` and `b`.
    pub fn expr(&self, rng: &mut Rng, scope: &mut Scope, depth: usize) -> String {
        match depth {
            0 if rng.chance(33) => number(rng.constant()),
            0 => (*rng.pick(&["a", "b"])).to_owned(),
            _ => format!("({})", self.inner(rng, scope, depth)),
        }
    }

    fn inner(&self, rng: &mut Rng, scope: &mut Scope, depth: usize) -> String {
        let (unwind, level) = (scope.unwind, scope.level);
        let mut sub = |rng: &mut Rng| self.expr(rng, scope, depth - 1);
        match rng.below(30) {
            0..=3 => {
                let (a, b) = (sub(rng), sub(rng));
                format!("{a}.«o:{}»({b})", rng.pick(&["wrapping_add", "wrapping_sub", "wrapping_mul"]))
            }
            4 | 5 => format!("({} «x:{}» {})", sub(rng), rng.pick(&["^", "&", "|"]), sub(rng)),
            6 => format!("u64::from({} «c:<» {})", sub(rng), sub(rng)),
            7 => format!("({} >> {})", sub(rng), shift(rng)),
            8 => format!("{}.rotate_left({})", sub(rng), shift(rng)),
            9 => format!("hash(\"{}\").wrapping_add({})", text(rng), sub(rng)),
            10 => format!("(({} % 65536) as f64 * {} + {}) as u64", sub(rng), float(rng), float(rng)),
            11 => format!("((u128::from({}) * u128::from({})) >> {}) as u64", sub(rng), sub(rng), shift(rng)),
            12 => format!("{}.checked_sub({}).map_or({}, |v| v ^ {})", sub(rng), sub(rng), number(rng.constant()), number(rng.constant())),
            13 => format!(
                "(0..{} % {}).map(|i| i.wrapping_mul({}) ^ b).filter(|v| v & 1 == 0).fold({}, |s: u64, v| s.rotate_left(3) ^ v)",
                sub(rng), bound(9), number(rng.constant()), number(rng.constant())
            ),
            14 => format!("{{ let mut v = vec![{}, {}, {}]; v.sort_by_key(|k| k % {}); v[1] }}", sub(rng), sub(rng), number(rng.constant()), bound(2 + rng.below(90))),
            15 => format!("hash(&format!(\"{}{{:«v:{}»}}-{{}}\", {}, {}))", text(rng), rng.pick(&["x", "5", "<6", "08b"]), sub(rng), sub(rng)),
            16 => {
                let n = 4 + rng.below(6);
                let all: Vec<String> = (0..n).map(|_| number(rng.constant())).collect();
                format!("[{}][({} % {n}) as usize]", all.join(", "), sub(rng))
            }
            17 => format!("match [\"{}\", \"{}\", \"x\"][({} % 3) as usize] {{ \"limit\" => {}, t => t.len() as u64 }}", text(rng), text(rng), sub(rng), number(rng.constant())),
            18 => format!("{}.to_string().parse::<u32>().map_or({}, u64::from)", sub(rng), number(rng.constant())),
            19 => format!("[{}, {}, {}].iter().map(|v| v % {}).sum::<u64>()", sub(rng), sub(rng), sub(rng), bound(1000)),
            20 if unwind && rng.chance(40) => format!("[1, 2, {}].get({} as usize % {}).copied().unwrap()", number(rng.constant()), sub(rng), bound(3 + rng.below(2))),
            20 => format!("[{}, {}].as_slice().draw({})", sub(rng), sub(rng), number(3)),
            21 | 22 => self.read(rng, scope, depth),
            23 | 24 => self.lookup(rng, scope, depth),
            25 if level > 1 => format!("{}({})", rng.pick(&["hooked", "ruled"]), sub(rng)),
            _ => self.call(rng, scope, depth),
        }
    }

    fn read(&self, rng: &mut Rng, scope: &mut Scope, depth: usize) -> String {
        let mine: Vec<&Static> = self.statics.iter().filter(|s| s.unit <= scope.unit).collect();
        if mine.is_empty() {
            return self.expr(rng, scope, depth - 1);
        }
        get(mine[rng.below(mine.len())])
    }

    fn lookup(&self, rng: &mut Rng, scope: &mut Scope, depth: usize) -> String {
        let e = self.expr(rng, scope, depth - 1);
        let mine: Vec<&Table> = self.tables.iter().filter(|t| t.unit <= scope.unit).collect();
        if mine.is_empty() {
            return e;
        }
        entry(mine[rng.below(mine.len())], &e)
    }

    fn call(&self, rng: &mut Rng, scope: &mut Scope, depth: usize) -> String {
        let (a, b) = (self.expr(rng, scope, depth - 1), self.expr(rng, scope, depth - 1));
        let can = |f: &&Function| f.level < scope.level && f.unit <= scope.unit;
        let all: Vec<&Function> = self.functions.iter().filter(can).collect();
        if scope.calls == 0 || all.is_empty() {
            return format!("({a} ^ {b})");
        }
        scope.calls -= 1;
        let f = *rng.pick(&all);
        if scope.unwind && f.kind == Kind::Number && rng.chance(25) {
            let n = number(rng.constant());
            return format!(
                "{{ let (p, q) = ({a}, {b}); std::panic::catch_unwind(move || {}).unwrap_or({n}) }}",
                call(f, "p", "q", rng)
            );
        }
        call(f, &a, &b, rng)
    }
}

/// A call as a number.
pub fn call(f: &Function, a: &str, b: &str, rng: &mut Rng) -> String {
    let (name, n) = (&f.name, number(rng.constant()));
    match f.kind {
        Kind::Number => format!("{name}({a}, {b})"),
        Kind::Text => format!("hash(&{name}({a}, {b}))"),
        Kind::Option => format!("{name}({a}, {b}).unwrap_or({n})"),
        Kind::Result => format!(
            "match {name}({a}, {b}) {{ Ok(v) => v, Err(Fault::Limit(v)) => v ^ {n}, Err(e) => hash(&e.to_string()) }}"
        ),
        Kind::Name => format!("hash({name}({a}, {b}))"),
        Kind::Wide => format!("({name}(u128::from({a}) << {}, {b}) as u64)", shift(rng)),
        Kind::Float => format!("{name}(({a} % 4096) as f64, {b}).to_bits()"),
        Kind::Slice => format!("{name}(&[{a}, {n}, b], {b})"),
        Kind::Order => format!("{name}(&mut order({a}), {b})"),
        Kind::Generic => match rng.below(6) {
            0 => format!("{name}(&({a} as u8), {b})"),
            1 => format!("{name}(&({a} as u32), {b})"),
            2 => format!("{name}(&({a}, {n} as u32), {b})"),
            3 => format!("{name}(\"{}\", {b} ^ {a})", text(rng)),
            4 => format!("{name}([{a}, {n}].as_slice(), {b})"),
            _ => format!("{name}(&{a}, {b})"),
        },
        Kind::Dyn => format!("{name}(&Guarded({a}), {b})"),
    }
    .replacen("match ", "(match ", usize::from(f.kind == Kind::Result))
        + if f.kind == Kind::Result { ")" } else { "" }
}

/// The value of a table at an index, as a number.
pub fn entry(t: &Table, index: &str) -> String {
    let (name, n) = (&t.name, t.entries.len());
    match t.of {
        "&str" => format!("hash({name}[({index} % {n}) as usize])"),
        _ => format!("u64::from({name}[({index} % {n}) as usize])"),
    }
}

/// Reads a static as a number.
pub fn get(s: &Static) -> String {
    let name = &s.name;
    match s.holds {
        Holds::Number => format!("{name}.load(Relaxed)"),
        Holds::List => format!("sum(&{name})"),
        Holds::Local => format!("{name}.get()"),
        Holds::LocalList => format!("{name}.with_borrow(|v| v.len() as u64 ^ v.last().copied().unwrap_or(0))"),
    }
}

/// Changes a static.
pub fn set(s: &Static, value: &str, rng: &mut Rng) -> String {
    let (name, limit) = (&s.name, bound(5 + rng.below(20)));
    match s.holds {
        Holds::Number if rng.chance(50) => format!("{name}.store({value}, Relaxed);"),
        Holds::Number => format!("{name}.fetch_add({value}, Relaxed);"),
        Holds::List => format!("{{ let value = {value}; let mut list = locked(&{name}); if list.len() > {limit} {{ list.clear(); }} list.push(value); }}"),
        Holds::Local => format!("{name}.set({value});"),
        Holds::LocalList => format!("{{ let value = {value}; {name}.with_borrow_mut(|v| {{ v.truncate({limit}); v.push(value); }}); }}"),
    }
}

pub fn table(rng: &mut Rng, name: String, unit: usize) -> Table {
    let of = *rng.pick(&["u8", "u16", "u32", "u64", "&str", "&str"]);
    let n = 3 + rng.below(12);
    let entries = (0..n)
        .map(|_| match of {
            "&str" => format!("\"{}\"", text(rng)),
            _ => format!("«n:{}»", rng.next() >> (64 - of[1..].parse::<u32>().expect("a width"))),
        })
        .collect();
    Table { name, unit, of, entries }
}

pub fn number(n: u64) -> String {
    format!("«n:{n}»_u64")
}

pub fn bound(n: usize) -> String {
    format!("«b:{n}»")
}

fn shift(rng: &mut Rng) -> String {
    format!("«h:{}»", rng.below(63))
}

fn float(rng: &mut Rng) -> String {
    format!("«f:{}.{}»", rng.below(100), rng.below(10))
}

/// The inside of a string literal.
pub fn text(rng: &mut Rng) -> String {
    let some = *rng.pick(&TEXTS);
    match rng.below(3) {
        0 => format!("«t:{some}»"),
        1 => format!("«t:{:x} {some}»", rng.below(4096)),
        _ => format!("«t:{:x}»", rng.next() >> rng.below(60)),
    }
}

/// A mark in a text: where it is, its kind and its value.
#[derive(Clone, Debug)]
pub struct Mark {
    pub range: std::ops::Range<usize>,
    pub kind: char,
    pub value: String,
}

pub fn marks(text: &str) -> Vec<Mark> {
    let mut out = Vec::new();
    for (start, _) in text.match_indices('«') {
        let end = start + text[start..].find('»').expect("a mark's end");
        let inner = &text[start + '«'.len_utf8()..end];
        let (kind, value) = inner.split_once(':').expect("a mark's kind");
        out.push(Mark {
            range: start..end + '»'.len_utf8(),
            kind: kind.chars().next().expect("a mark's kind"),
            value: value.to_owned(),
        });
    }
    out
}

/// The text as Rust.
pub fn plain(text: &str) -> String {
    let (mut out, mut at) = (String::new(), 0);
    for m in marks(text) {
        out += &text[at..m.range.start];
        if m.kind != '+' {
            out += &m.value;
        }
        at = m.range.end;
    }
    out + &text[at..]
}
