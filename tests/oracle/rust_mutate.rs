//! One change to a random Rust program, as a person would make one.

use super::driver::Mutation;
use super::rng::Rng;
use super::rust_program::{call, entry, get, marks, number, set, table, text, Holds, Mark, Program, Scope, Static};

/// Changes the program; most often one function, sometimes with something that means nothing beside it.
pub fn mutate(p: &mut Program, rng: &mut Rng) -> Mutation {
    let mut beside = String::new();
    if rng.chance(30) {
        p.comment[rng.below(2)] += 1 + rng.below(3);
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
    let (name, kind, unit) = (p.functions[target].name.clone(), p.functions[target].kind, p.functions[target].unit);
    let mut scope = Scope { unit, level: p.functions[target].level, calls: 1, unwind: p.unwind };
    let done = |what: &str, rule| Some((format!("{what} in {name}"), rule));
    match rng.below(24) {
        0..=8 => {
            let f = &mut p.functions[target];
            let n = rng.below(f.body.len() + 1);
            let text = if n < f.body.len() { &mut f.body[n] } else { &mut f.result };
            let what = alter(text, rng, "nhbfoxctv+")?;
            done(what, None)
        }
        9 | 10 => {
            let new = p.stmt(rng, &mut scope, kind, 1);
            let f = &mut p.functions[target];
            f.body.insert(rng.below(f.body.len() + 1), new);
            done("a new statement", None)
        }
        11 => {
            let f = &mut p.functions[target];
            f.body.remove(rng.below(f.body.len()));
            (!f.body.is_empty()).then_some(())?;
            done("a statement less", None)
        }
        12 => {
            let f = &mut p.functions[target];
            let (i, j) = (rng.below(f.body.len()), rng.below(f.body.len()));
            (i != j).then(|| f.body.swap(i, j))?;
            done("two statements swapped", None)
        }
        13 => {
            let t = rng.below(p.tables.len());
            let t = &mut p.tables[t];
            let i = rng.below(t.entries.len());
            if t.of == "&str" {
                alter(&mut t.entries[i], rng, "t")?;
            } else {
                let m = marks(&t.entries[i]).pop()?;
                t.entries[i] = format!("«n:{}»", m.value.parse::<u64>().ok()? ^ 1);
            }
            Some((format!("an entry of {}", t.name), Some("initial-value")))
        }
        14 => {
            let i = rng.below(p.rules.len());
            let what = alter(&mut p.rules[i], rng, "nhbfoxctv")?;
            Some((format!("{what} in an implementation of Rule"), None))
        }
        15 => {
            let i = rng.below(p.hooks.len());
            let what = alter(&mut p.hooks[i], rng, "nhbfoxctv")?;
            Some((format!("{what} in a stored closure"), None))
        }
        16 => {
            let what = alter(&mut p.base, rng, "nhbfoxctv")?;
            Some((format!("{what} in base"), None))
        }
        17 => {
            let i = p.functions.len();
            let mut f = p.function(rng, i);
            (f.unit, f.level) = (unit, scope.level.saturating_sub(1));
            let mut inner = Scope { unit, level: f.level, calls: 1, unwind: p.unwind };
            f.body = vec![p.stmt(rng, &mut inner, f.kind, 1)];
            f.result = p.result(rng, &mut inner, f.kind);
            let new = format!("x1 ^= {};", call(&f, "a", "b", rng));
            p.functions.push(f);
            p.order.insert(rng.below(p.order.len()), i);
            p.functions[target].body.push(new);
            done("a call of a new function", None)
        }
        18 => {
            let holds = if rng.chance(70) { Holds::Number } else { Holds::List };
            let s = Static { name: format!("FRESH{}", p.statics.len()), unit, holds, init: rng.constant(), new: true };
            let (change, read) = (set(&s, "a", rng), get(&s));
            p.functions[target].body.extend([change, format!("x2 ^= {read};")]);
            p.statics.push(s);
            done("a new static", None)
        }
        19 => {
            let t = table(rng, format!("ADDED{}", p.tables.len()), unit);
            p.functions[target].body.push(format!("x0 ^= {};", entry(&t, "b")));
            p.tables.push(t);
            done("a new table", None)
        }
        20 => {
            let s = rng.below(p.statics.len());
            let s = &mut p.statics[s];
            let rule = match s.holds {
                Holds::Number => Some("initial-value"),
                Holds::Local => Some("thread-local"),
                Holds::LocalList => None,
                Holds::List => return None,
            };
            s.init ^= 5;
            Some((format!("the initial value of {}", s.name), rule))
        }
        21 => {
            let f = &mut p.functions[target];
            f.attribute = if f.attribute == "inline(never)" { "" } else { "inline(never)" };
            alter(&mut f.result, rng, "nhbfoxctv").unwrap_or("nothing else");
            done("inlining, and something", None)
        }
        22 => {
            let new = match rng.below(3) {
                0 => format!(
                    "{{ struct Fresh(u64); impl Rule for Fresh {{ fn kind(&self) -> u64 {{ 9 }} fn value(&self) -> u64 {{ self.0 }} fn apply(&self, x: u64) -> u64 {{ x ^ {} }} }} \
                     let all: [Box<dyn Rule>; 2] = [Box::new(Fresh(a)), Box::new(Guarded(b))]; x1 ^= all[(b % 2) as usize].apply(x0); x2 ^= hash(&all[(a % 2) as usize].label()); }}",
                    number(rng.constant())
                ),
                1 => format!("x1 ^= [(a, 7_u32), (b, {} as u32)].as_slice().draw(a);", number(rng.constant())),
                _ => format!(
                    "{{ #[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)] enum Fresh {{ One(u64), Two(String), Three }} \
                     let mut v = vec![Fresh::One(a), Fresh::Two(\"{}\".to_owned()), Fresh::Three, Fresh::One(b)]; v.sort(); x1 ^= hash(&format!(\"{{:?}}\", v)); }}",
                    text(rng)
                ),
            };
            p.functions[target].body.push(new);
            done("a new type", None)
        }
        _ => {
            let other = rng.below(p.functions.len());
            let mut all = 0;
            for i in [target, other] {
                all += usize::from(alter(&mut p.functions[i].result, rng, "nhbfoxctv").is_some());
            }
            (all > 0).then(|| done("two functions, one of them", None))?
        }
    }
}

/// Alters one mark of a text, of one of the kinds.
fn alter(text: &mut String, rng: &mut Rng, kinds: &str) -> Option<&'static str> {
    let all: Vec<Mark> = marks(text).into_iter().filter(|m| kinds.contains(m.kind)).collect();
    if all.is_empty() {
        return None;
    }
    let m = rng.pick(&all).clone();
    let other = |rng: &mut Rng, all: &[&str]| -> String {
        let left: Vec<&str> = all.iter().copied().filter(|a| *a != m.value).collect();
        (*rng.pick(&left)).to_owned()
    };
    let up = |by: u64| m.value.parse::<u64>().ok().map(|n| n.wrapping_add(by).to_string());
    let (what, value) = match m.kind {
        'n' if rng.chance(50) => ("a constant", up(1)?),
        'n' => ("a constant", rng.constant().to_string()),
        'h' => ("a shift", ((m.value.parse::<u64>().ok()? + 1) % 64).to_string()),
        'b' => ("a bound", up(1)?),
        'f' => ("a float", format!("1{}", m.value)),
        'o' => ("an operator", other(rng, &["wrapping_add", "wrapping_sub", "wrapping_mul"])),
        'x' => ("an operator", other(rng, &["^", "&", "|"])),
        'c' => ("a comparison", other(rng, &["<", "<=", ">", "!="])),
        't' if rng.chance(50) => ("a string", m.value.clone() + "!"),
        't' => ("a string", format!("{}{}", if m.value.starts_with('Z') { "Y" } else { "Z" }, m.value.get(1..)?)),
        'v' => ("a format", other(rng, &["x", "5", "<6", "08b"])),
        _ => {
            text.replace_range(m.range.clone(), &format!("{} => x0 ^= b,\n«+:9»", m.value));
            return Some("a new arm");
        }
    };
    text.replace_range(m.range.clone(), &format!("«{}:{value}»", m.kind));
    Some(what)
}
