//! Random C programs: what they are made of, and how they are made up.
//!
//! Functions call only functions of lower levels, so every call ends; all arithmetic is on unsigned numbers or on
//! doubles of bounded size, so nothing is undefined. Whatever a function may change is set anew by `reset`.

use super::rng::Rng;

/// How a function is called.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// `u64 f(u64 a, u64 b)`
    Number,
    /// `double f(double x, u64 b)`
    Double,
    /// `struct large f(struct large p, u64 b)`: in memory
    Large,
    /// `struct small f(struct small p, u64 b)`: in registers
    Small,
    /// `const char *f(u64 a, u64 b)`
    Text,
    /// `u64 f(u64 count, ...)`: as many numbers more
    Variadic,
}

#[derive(Clone, Debug)]
pub enum Expr {
    Const(u64),
    /// A local variable: `a`, `b`, `x0` to `x3`.
    Var(usize),
    Bin(&'static str, Box<Expr>, Box<Expr>),
    /// A comparison, as signed numbers or not.
    Compare(&'static str, bool, Box<Expr>, Box<Expr>),
    Shift(&'static str, Box<Expr>, u32),
    Not(Box<Expr>),
    /// `table[i % N]`
    Table(usize, Box<Expr>),
    /// A character of a table of strings.
    Char(usize, Box<Expr>),
    /// A string as such, hashed.
    Literal(String),
    Call(usize, Box<Expr>, Box<Expr>),
    /// Through a table of functions.
    Indirect(usize, Box<Expr>, Box<Expr>),
    /// `(u64)(x * factor + term)`
    Float(Box<Expr>, f64, f64),
    Static(usize),
    /// The static of the function itself.
    Own,
    /// The program's `qsort` with a comparator: the median of some numbers.
    Sorted(usize, Box<Expr>, Box<Expr>),
}

#[derive(Clone, Debug)]
pub enum Stmt {
    Assign(usize, Expr),
    If(Expr, Vec<Stmt>, Vec<Stmt>),
    /// `bound` times, with the count in the variable.
    For(usize, u64, Vec<Stmt>),
    Switch(Expr, Vec<(u64, Vec<Stmt>)>, Vec<Stmt>),
    SetStatic(usize, Expr),
    SetOwn(Expr),
    /// An assertion with its line, of something that is always so.
    Assert(String),
    Return(Expr),
}

#[derive(Clone, Debug)]
pub struct Function {
    pub name: String,
    pub kind: Kind,
    pub unit: usize,
    pub level: usize,
    pub local: bool,
    pub attribute: &'static str,
    /// Initial value of its own static.
    pub own: Option<u64>,
    pub body: Vec<Stmt>,
    pub result: Expr,
}

#[derive(Clone, Debug)]
pub struct Static {
    pub name: String,
    pub unit: usize,
    pub init: u64,
    pub thread_local: bool,
    pub local: bool,
    /// Brought by the change: `reset` does not know it.
    pub new: bool,
}

#[derive(Clone, Debug)]
pub enum Content {
    Numbers(&'static str, Vec<u64>),
    Texts(Vec<String>),
    /// Functions of the kind `Number`.
    Functions(Vec<usize>),
}

#[derive(Clone, Debug)]
pub struct Table {
    pub name: String,
    pub unit: usize,
    pub content: Content,
}

#[derive(Clone, Debug)]
pub struct Program {
    pub units: usize,
    pub functions: Vec<Function>,
    pub statics: Vec<Static>,
    pub tables: Vec<Table>,
    /// The order in which functions are written.
    pub order: Vec<usize>,
    /// Lines of comment at the head of each unit.
    pub comment: Vec<usize>,
}

/// What the function that is being made up may use.
pub struct Scope {
    pub unit: usize,
    pub level: usize,
    pub calls: usize,
    pub in_loop: bool,
    pub own: bool,
}

const LEVELS: usize = 4;
const BIN: [&str; 6] = ["+", "-", "*", "^", "&", "|"];

impl Program {
    pub fn random(rng: &mut Rng) -> Self {
        let units = 2 + rng.below(3);
        let mut p = Self {
            units,
            functions: vec![],
            statics: vec![],
            tables: vec![],
            order: vec![],
            comment: (0..units).map(|_| rng.below(5)).collect(),
        };
        for unit in 0..units {
            for _ in 0..1 + rng.below(3) {
                let name = format!("{}{}", rng.pick(&["counter", "total", "seen", "state"]), p.statics.len());
                let (thread_local, local) = (rng.chance(20), rng.chance(50));
                let init = if rng.chance(40) { 0 } else { rng.constant() };
                p.statics.push(Static { name, unit, init, thread_local, local, new: false });
            }
            for _ in 0..2 + rng.below(3) {
                let name = format!("{}{}", rng.pick(&["table", "names", "weights"]), p.tables.len());
                let content = p.content(rng);
                p.tables.push(Table { name, unit, content });
            }
        }
        for i in 0..8 + rng.below(10) {
            let f = p.function(rng, i);
            p.functions.push(f);
            let unit = rng.below(units);
            let fits = |f: &Function| f.kind == Kind::Number && (!f.local || f.unit == unit);
            let same: Vec<usize> = (0..p.functions.len()).filter(|g| fits(&p.functions[*g])).collect();
            if rng.chance(15) && same.len() > 2 {
                let functions = (0..2 + rng.below(4)).map(|_| *rng.pick(&same)).collect();
                let name = format!("handlers{}", p.tables.len());
                p.tables.push(Table { name, unit, content: Content::Functions(functions) });
            }
        }
        p.order = (0..p.functions.len()).collect();
        p
    }

    pub fn content(&self, rng: &mut Rng) -> Content {
        let n = 3 + rng.below(14);
        if rng.chance(40) {
            return Content::Texts((0..n).map(|_| text(rng)).collect());
        }
        let of = *rng.pick(&["u8", "u16", "u32", "u64"]);
        let bits = of[1..].parse::<u32>().expect("a width");
        Content::Numbers(of, (0..n).map(|_| rng.next() >> (64 - bits)).collect())
    }

    pub fn function(&self, rng: &mut Rng, i: usize) -> Function {
        use Kind::{Double, Large, Number, Small, Text, Variadic};
        let kind = *rng.pick(&[Number, Number, Number, Number, Number, Number, Double, Large, Small, Text, Variadic]);
        let level = (i * LEVELS / 14).min(LEVELS - 1);
        let own = (kind == Number && rng.chance(25)).then(|| rng.constant());
        let unit = rng.below(self.units);
        let local = rng.chance(45);
        let attribute = *rng.pick(&["", "", "", "", "NOINLINE", "inline", "COLD"]);
        let attribute = if attribute == "inline" && !local { "" } else { attribute };
        let mut scope = Scope { unit, level, calls: 2, in_loop: false, own: own.is_some() };
        let body = self.block(rng, &mut scope, 2);
        let result = self.expr(rng, &mut scope, 3);
        let name = format!("{}_{i}", rng.pick(&["parse", "update", "hash", "score", "find", "check", "encode"]));
        Function { name, kind, unit, level, local, attribute, own, body, result }
    }

    pub fn block(&self, rng: &mut Rng, scope: &mut Scope, depth: usize) -> Vec<Stmt> {
        (0..1 + rng.below(3)).map(|_| self.stmt(rng, scope, depth)).collect()
    }

    pub fn stmt(&self, rng: &mut Rng, scope: &mut Scope, depth: usize) -> Stmt {
        let var = 2 + rng.below(3);
        match rng.below(if depth == 0 { 9 } else { 15 }) {
            0..=4 => Stmt::Assign(var, self.expr(rng, scope, 3)),
            5 => {
                let mine: Vec<usize> = (0..self.statics.len()).filter(|s| self.visible(*s, scope.unit)).collect();
                match mine.is_empty() {
                    true => Stmt::Assign(var, self.expr(rng, scope, 2)),
                    false => Stmt::SetStatic(*rng.pick(&mine), self.expr(rng, scope, 2)),
                }
            }
            6 if scope.own => Stmt::SetOwn(self.expr(rng, scope, 2)),
            6 | 7 => Stmt::Assert(text(rng)),
            8 if depth < 2 => Stmt::If(self.expr(rng, scope, 2), vec![Stmt::Return(self.expr(rng, scope, 2))], vec![]),
            8..=10 => {
                let test = self.expr(rng, scope, 2);
                let then = self.block(rng, scope, depth.saturating_sub(1));
                let other = if rng.chance(50) { self.block(rng, scope, depth.saturating_sub(1)) } else { vec![] };
                Stmt::If(test, then, other)
            }
            11 | 12 => {
                let outer = std::mem::replace(&mut scope.in_loop, true);
                let body = self.block(rng, scope, 0);
                scope.in_loop = outer;
                Stmt::For(5, 1 + rng.next() % 9, body)
            }
            _ => {
                let sparse = rng.chance(25);
                let test = self.expr(rng, scope, 2);
                let n = 3 + rng.below(8) as u64;
                let cases = (0..n)
                    .map(|i| {
                        let arm = vec![Stmt::Assign(var, self.expr(rng, scope, 1))];
                        (if sparse { i * 7919 % 100 } else { i }, arm)
                    })
                    .collect();
                Stmt::Switch(test, cases, vec![Stmt::Assign(var, Expr::Const(rng.constant()))])
            }
        }
    }

    fn visible(&self, s: usize, unit: usize) -> bool {
        let s = &self.statics[s];
        !s.new && (!s.local || s.unit == unit)
    }

    pub fn expr(&self, rng: &mut Rng, scope: &mut Scope, depth: usize) -> Expr {
        if depth == 0 {
            return if rng.chance(60) { Expr::Var(rng.below(5)) } else { Expr::Const(rng.constant()) };
        }
        match rng.below(19) {
            0..=4 => {
                let op = *rng.pick(&BIN);
                Expr::Bin(op, self.sub(rng, scope, depth), self.sub(rng, scope, depth))
            }
            5 => {
                let (op, signed) = (*rng.pick(&["<", ">", "<=", ">=", "==", "!="]), rng.chance(50));
                Expr::Compare(op, signed, self.sub(rng, scope, depth), self.sub(rng, scope, depth))
            }
            6 | 7 => {
                let (op, by) = (*rng.pick(&["<<", ">>"]), 1 + rng.below(31) as u32);
                Expr::Shift(op, self.sub(rng, scope, depth), by)
            }
            8 => Expr::Not(self.sub(rng, scope, depth)),
            9 => {
                let factor = (rng.below(4000) as f64 - 2000.0) / 16.0;
                Expr::Float(self.sub(rng, scope, depth), factor, rng.below(1000) as f64 / 8.0)
            }
            10..=12 => {
                let index = self.sub(rng, scope, depth);
                self.table_use(rng, scope, index)
            }
            13 => Expr::Literal(text(rng)),
            14 if scope.own => Expr::Own,
            14 => {
                let mine: Vec<usize> = (0..self.statics.len()).filter(|s| self.visible(*s, scope.unit)).collect();
                if mine.is_empty() {
                    Expr::Var(rng.below(5))
                } else {
                    Expr::Static(*rng.pick(&mine))
                }
            }
            15 => Expr::Var(rng.below(5)),
            _ if scope.calls == 0 || scope.in_loop && !rng.chance(20) => Expr::Var(rng.below(5)),
            which => {
                let (a, b) = (self.sub(rng, scope, depth), self.sub(rng, scope, depth));
                let can = |f: &usize| {
                    let f = &self.functions[*f];
                    f.level < scope.level && (!f.local || f.unit == scope.unit)
                };
                let callees: Vec<usize> = (0..self.functions.len()).filter(can).collect();
                if callees.is_empty() {
                    return Expr::Bin("^", a, b);
                }
                scope.calls = scope.calls.saturating_sub(1);
                let f = *rng.pick(&callees);
                if which == 18 && rng.chance(30) && self.functions[f].kind == Kind::Number {
                    return Expr::Sorted(f, a, b);
                }
                Expr::Call(f, a, b)
            }
        }
    }

    fn sub(&self, rng: &mut Rng, scope: &mut Scope, depth: usize) -> Box<Expr> {
        Box::new(self.expr(rng, scope, depth - 1))
    }

    fn table_use(&self, rng: &mut Rng, scope: &mut Scope, index: Box<Expr>) -> Expr {
        let usable = |t: &usize| {
            let t = &self.tables[*t];
            let shallow = match &t.content {
                Content::Functions(all) => {
                    all.iter().all(|f| self.functions[*f].level < scope.level) && scope.calls > 0 && !scope.in_loop
                }
                _ => true,
            };
            t.unit == scope.unit && shallow
        };
        let tables: Vec<usize> = (0..self.tables.len()).filter(usable).collect();
        if tables.is_empty() {
            return *index;
        }
        let t = *rng.pick(&tables);
        match self.tables[t].content {
            Content::Numbers(..) => Expr::Table(t, index),
            Content::Texts(_) => Expr::Char(t, index),
            Content::Functions(_) => {
                scope.calls = scope.calls.saturating_sub(1);
                Expr::Indirect(t, index, Box::new(Expr::Var(rng.below(5))))
            }
        }
    }
}

/// A string; some end like others, so that linkers merge them.
pub fn text(rng: &mut Rng) -> String {
    let tail = *rng.pick(&["order rejected", "session closed", "no such symbol", "limit"]);
    match rng.below(4) {
        0 => tail.to_owned(),
        1 => format!("{:x}: {tail}", rng.below(4096)),
        2 => format!("{} {:x}", tail, rng.below(65536)),
        _ => format!("{:x}", rng.next() >> rng.below(60)),
    }
}
