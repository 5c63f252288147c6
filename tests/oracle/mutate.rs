//! One change to a random program, as a person would make one.

use super::driver::Mutation;
use super::program::{text, Content, Expr, Function, Kind, Program, Scope, Static, Stmt, Table};
use super::rng::Rng;

/// Everything of a function that can be changed in place.
enum Place<'a> {
    Expr(&'a mut Expr),
    Stmts(&'a mut Vec<Stmt>),
    Stmt(&'a mut Stmt),
}

fn walk_expr(e: &mut Expr, visit: &mut dyn FnMut(Place<'_>)) {
    visit(Place::Expr(e));
    match e {
        Expr::Bin(_, a, b)
        | Expr::Compare(_, _, a, b)
        | Expr::Call(_, a, b)
        | Expr::Indirect(_, a, b)
        | Expr::Sorted(_, a, b) => {
            walk_expr(a, visit);
            walk_expr(b, visit);
        }
        Expr::Shift(_, a, _) | Expr::Not(a) | Expr::Table(_, a) | Expr::Char(_, a) | Expr::Float(a, ..) => {
            walk_expr(a, visit)
        }
        _ => {}
    }
}

fn walk(all: &mut Vec<Stmt>, visit: &mut dyn FnMut(Place<'_>)) {
    visit(Place::Stmts(all));
    for s in all {
        visit(Place::Stmt(s));
        match s {
            Stmt::Assign(_, e) | Stmt::SetStatic(_, e) | Stmt::SetOwn(e) | Stmt::Return(e) => walk_expr(e, visit),
            Stmt::If(e, a, b) => {
                walk_expr(e, visit);
                walk(a, visit);
                walk(b, visit);
            }
            Stmt::For(_, _, body) => walk(body, visit),
            Stmt::Switch(e, cases, default) => {
                walk_expr(e, visit);
                cases.iter_mut().for_each(|(_, body)| walk(body, visit));
                walk(default, visit);
            }
            Stmt::Assert(_) => {}
        }
    }
}

/// Changes one place of `f` that `change` accepts, chosen at random.
fn somewhere(f: &mut Function, rng: &mut Rng, change: &mut dyn FnMut(Place<'_>, &mut Rng, bool) -> bool) -> bool {
    let mut count = 0;
    let probe = rng.clone();
    let mut copy = f.clone();
    let each = |f: &mut Function, visit: &mut dyn FnMut(Place<'_>)| {
        walk(&mut f.body, visit);
        walk_expr(&mut f.result, visit);
    };
    each(&mut copy, &mut |p| count += usize::from(change(p, &mut probe.clone(), false)));
    if count == 0 {
        return false;
    }
    let (chosen, mut at) = (rng.below(count), 0);
    each(f, &mut |p| {
        let mut dice = rng.clone();
        let (is_it, before) = (at == chosen, at);
        if at <= chosen && change(p, &mut dice, is_it) {
            at = before + 1;
        }
    });
    rng.next();
    true
}

/// Changes the program; most often one function, sometimes with something that means nothing beside it.
pub fn mutate(p: &mut Program, rng: &mut Rng) -> Mutation {
    let mut beside = String::new();
    if rng.chance(30) {
        let u = rng.below(p.units);
        p.comment[u] += 1 + rng.below(3);
        beside += ", lines moved";
    }
    if rng.chance(10) {
        let (i, j) = (rng.below(p.order.len()), rng.below(p.order.len()));
        p.order.swap(i, j);
        beside += ", order of functions";
    }
    for _ in 0..50 {
        let target = rng.below(p.functions.len());
        if let Some((what, rule)) = one(p, rng, target) {
            return Mutation { what: format!("{what}{beside}"), rule };
        }
    }
    Mutation { what: format!("nothing{beside}"), rule: None }
}

type Done = Option<(String, Option<&'static str>)>;

fn one(p: &mut Program, rng: &mut Rng, target: usize) -> Done {
    let name = p.functions[target].name.clone();
    let mut scope = Scope {
        unit: p.functions[target].unit,
        level: p.functions[target].level,
        calls: 1,
        in_loop: false,
        own: p.functions[target].own.is_some(),
    };
    let done = |what: &str, ok: bool| ok.then(|| (format!("{what} in {name}"), None));
    match rng.below(18) {
        0 | 1 => done("a constant", constant(&mut p.functions[target], rng)),
        2 => done("an operator", operator(&mut p.functions[target], rng)),
        3 | 4 => {
            let (stmt, depth) = (p.stmt(rng, &mut scope, 1), rng.below(3));
            let f = &mut p.functions[target];
            let at = rng.below(f.body.len() + 1);
            match f.body.get_mut(at) {
                Some(Stmt::If(_, then, _)) if depth > 0 => then.push(stmt),
                _ => f.body.insert(at, stmt),
            }
            done("a new statement", true)
        }
        5 => {
            let changed = somewhere(&mut p.functions[target], rng, &mut |place, rng, now| {
                let Place::Stmts(v) = place else { return false };
                let fits = !v.is_empty();
                if fits && now {
                    let at = rng.below(v.len());
                    v.remove(at);
                }
                fits
            });
            done("a statement less", changed)
        }
        6 => {
            let changed = somewhere(&mut p.functions[target], rng, &mut |place, rng, now| {
                let Place::Stmt(Stmt::Switch(_, cases, default)) = place else { return false };
                if now {
                    let next = cases.iter().map(|(l, _)| l + 1).max().unwrap_or(0);
                    match rng.below(3) {
                        0 => cases.push((next, default.clone())),
                        1 => cases.swap(0, 1),
                        _ => drop(cases.pop()),
                    }
                    if rng.chance(50) {
                        cases[0].1.push(Stmt::Assign(2, Expr::Const(rng.constant())));
                    }
                }
                true
            });
            done("a switch", changed)
        }
        7 | 8 => {
            let t = rng.below(p.tables.len());
            let table = &mut p.tables[t];
            let what = format!("an entry of {}", table.name);
            match &mut table.content {
                Content::Numbers(_, v) => {
                    let i = rng.below(v.len());
                    v[i] ^= 1;
                    Some((what, None))
                }
                Content::Texts(v) => {
                    let i = rng.below(v.len());
                    v[i] += if rng.chance(50) { "!" } else { "" };
                    if let Some(first) = v[i].get(..1).map(str::to_owned) {
                        v[i] = format!("{}{}", if first == "Z" { "Y" } else { "Z" }, &v[i][1..]);
                    }
                    Some((what, None))
                }
                Content::Functions(v) => {
                    v.reverse();
                    Some((format!("{what} of functions"), Some("initial-value")))
                }
            }
        }
        9 => {
            let i = p.functions.len();
            let mut f = p.function(rng, i);
            (f.unit, f.level) = (scope.unit, scope.level.saturating_sub(1));
            f.own = None;
            // What it was made up for may not be seen from here.
            let mut inner = Scope { unit: scope.unit, level: f.level, calls: 1, in_loop: false, own: false };
            (f.body, f.result) = (p.block(rng, &mut inner, 1), p.expr(rng, &mut inner, 2));
            p.functions.push(f);
            p.order.insert(rng.below(p.order.len()), i);
            let call = Expr::Call(i, Box::new(Expr::Var(1)), Box::new(Expr::Var(2)));
            p.functions[target].body.push(Stmt::Assign(3, call));
            p.functions[target].result = plus(p.functions[target].result.clone(), 3);
            done("a call of a new function", true)
        }
        10 if p.functions[target].own.is_none() && p.functions[target].kind == Kind::Number => {
            let f = &mut p.functions[target];
            f.own = Some(rng.constant());
            f.body.push(Stmt::SetOwn(Expr::Var(0)));
            f.result = Expr::Bin("^", Box::new(f.result.clone()), Box::new(Expr::Own));
            done("a new static", true)
        }
        11 => {
            let name = format!("fresh{}", p.statics.len());
            p.statics.push(Static {
                name,
                unit: scope.unit,
                init: rng.constant(),
                thread_local: false,
                local: true,
                new: true,
            });
            let s = p.statics.len() - 1;
            let f = &mut p.functions[target];
            f.body.insert(0, Stmt::SetStatic(s, Expr::Var(0)));
            f.result = Expr::Bin("+", Box::new(f.result.clone()), Box::new(Expr::Static(s)));
            done("a new variable", true)
        }
        12 => {
            let content = p.content(rng);
            let t = p.tables.len();
            let is_text = matches!(content, Content::Texts(_));
            p.tables.push(Table { name: format!("added{t}"), unit: scope.unit, content });
            let index = Box::new(Expr::Var(0));
            let value = if is_text { Expr::Char(t, index) } else { Expr::Table(t, index) };
            p.functions[target].body.push(Stmt::Assign(4, value));
            p.functions[target].result = plus(p.functions[target].result.clone(), 4);
            done("a new table", true)
        }
        13 => {
            let changed = somewhere(&mut p.functions[target], rng, &mut |place, rng, now| match place {
                Place::Expr(Expr::Literal(t)) => {
                    if now {
                        *t = text(rng);
                    }
                    true
                }
                Place::Stmt(Stmt::Assert(t)) => {
                    if now {
                        t.push('?');
                    }
                    true
                }
                _ => false,
            });
            done("a string", changed)
        }
        14 => {
            let s = rng.below(p.statics.len());
            p.statics[s].init ^= 5;
            let rule = if p.statics[s].thread_local { "thread-local" } else { "initial-value" };
            Some((format!("the initial value of {}", p.statics[s].name), Some(rule)))
        }
        15 => {
            let f = &mut p.functions[target];
            f.attribute = if f.attribute == "NOINLINE" { "" } else { "NOINLINE" };
            constant(f, rng).then(|| (format!("inlining, and a constant in {name}"), None))
        }
        16 => {
            let early = Stmt::If(
                Expr::Compare(">", false, Box::new(Expr::Var(1)), Box::new(Expr::Const(rng.constant()))),
                vec![Stmt::Return(p.expr(rng, &mut scope, 2))],
                vec![],
            );
            p.functions[target].body.insert(0, early);
            done("a check at the front", true)
        }
        _ => {
            let other = rng.below(p.functions.len());
            let both = constant(&mut p.functions[target], rng) | constant(&mut p.functions[other], rng);
            done("constants in two functions, one of them", both)
        }
    }
}

fn plus(e: Expr, var: usize) -> Expr {
    Expr::Bin("+", Box::new(e), Box::new(Expr::Var(var)))
}

fn constant(f: &mut Function, rng: &mut Rng) -> bool {
    somewhere(f, rng, &mut |place, rng, now| match place {
        Place::Expr(Expr::Const(c)) => {
            if now {
                *c = if rng.chance(50) { *c + 1 } else { rng.constant() };
            }
            true
        }
        Place::Expr(Expr::Float(_, factor, term)) => {
            if now {
                (*factor, *term) = if rng.chance(50) { (-*factor, *term) } else { (*factor, *term + 1.0) };
            }
            true
        }
        Place::Expr(Expr::Shift(_, _, by)) => {
            if now {
                *by = *by % 31 + 1;
            }
            true
        }
        Place::Stmt(Stmt::For(_, bound, _)) => {
            if now {
                *bound += 1;
            }
            true
        }
        _ => false,
    })
}

fn operator(f: &mut Function, rng: &mut Rng) -> bool {
    somewhere(f, rng, &mut |place, rng, now| match place {
        Place::Expr(Expr::Bin(op, ..)) => {
            if now {
                *op = if *op == "+" { "^" } else { "+" };
            }
            true
        }
        Place::Expr(Expr::Compare(op, signed, ..)) => {
            if now {
                if rng.chance(50) {
                    *signed = !*signed;
                } else {
                    *op = if *op == "<" { "<=" } else { "<" };
                }
            }
            true
        }
        Place::Stmt(Stmt::If(_, then, other)) if !other.is_empty() => {
            if now {
                std::mem::swap(then, other);
            }
            true
        }
        _ => false,
    })
}
