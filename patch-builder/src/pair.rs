//! Which old symbol is which new one. Never guessed: what stays ambiguous
//! stays unpaired, and an unpaired function counts as removed and as new.

mod family;
mod functions;
mod variables;

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};

use crate::build::{FuncId, Name, ObjId, TlsFound};
use crate::compare::{Comparer, LineProof};
use crate::lift::{resolve, Target};
use crate::pairing::Pairing;
use crate::side::Side;
use family::{Kins, Names};
use functions::Functions;
use variables::Variables;

/// Pairs functions, data and thread-locals of two builds.
#[must_use]
pub fn pair<'d>(old: &Side<'d>, new: &Side<'d>) -> Pairing {
    let mut pairing = Pairing {
        funcs: vec![None; old.build.funcs.len()],
        funcs_back: vec![Vec::new(); new.build.funcs.len()],
        ..Pairing::default()
    };
    let mut names = Names::default();
    let kin = (Kins::new(&names_of(old), &mut names), Kins::new(&names_of(new), &mut names));
    let functions = Functions::new(old, new, &kin, &names);
    functions.exact(&mut pairing);
    functions.start_up(&mut pairing);
    let (mut objects, mut locals) = (Names::default(), Names::default());
    let data = Variables::new(old, new, &old.build.objects, &new.build.objects, &mut objects, |t| match t {
        Target::Object(id, _) => Some(id),
        _ => None,
    });
    let tls = Variables::new(old, new, &old.build.tls, &new.build.tls, &mut locals, |t| match t {
        Target::Tls(id, _) | Target::TlsSlots(_, TlsFound::Own(id, _)) => Some(id),
        _ => None,
    });
    // Functions are recognised by the data that they use, and data by the functions that use it.
    for _ in 0..5 {
        (pairing.tls, pairing.tls_back) = tls.pair(&pairing);
        (pairing.objects, pairing.objects_back) = data.pair(&pairing);
        let before = pairing.funcs.iter().flatten().count();
        functions.families(&mut pairing);
        if pairing.funcs.iter().flatten().count() == before {
            break;
        }
    }
    unnamed_data(old, new, &mut pairing);
    pointed_data(old, new, &mut pairing);
    (pairing.tls, pairing.tls_back) = tls.pair(&pairing);
    (pairing.objects, pairing.objects_back) = data.pair(&pairing);
    pairing.ambiguous = data.ambiguous(&pairing);
    pairing.ambiguous_functions = functions.ambiguous(&pairing);
    pairing
}

fn names_of<'a, 'd>(side: &'a Side<'d>) -> Vec<&'a [Name<'d>]> {
    side.build.funcs.iter().map(|f| &f.names[..]).collect()
}

/// Writable data without a name is recognised by its order, as long as the initial contents agree:
/// from the front up to the first difference, and from the back. Contents that several pieces have (zeros,
/// above all) prove nothing: only code that did not change can say which is which.
fn unnamed_data(old: &Side<'_>, new: &Side<'_>, pairing: &mut Pairing) {
    let (a, b) = (old.unnamed_mutable(), new.unnamed_mutable());
    let (mut there, mut back): (HashMap<u64, BTreeSet<u64>>, HashMap<u64, BTreeSet<u64>>) = Default::default();
    for (f, x) in old.lifted.iter().enumerate() {
        let Some(y) = pairing.func_pair(f as FuncId).map(|g| &new.lifted[g as usize]) else { continue };
        if x.masked != y.masked || x.refs.len() != y.refs.len() {
            continue;
        }
        for (r, s) in x.refs.iter().zip(&y.refs).filter(|(r, s)| r.bias == s.bias) {
            if let (Target::Data(at), Target::Data(to)) = (r.target, s.target) {
                there.entry(at).or_default().insert(to);
                back.entry(to).or_default().insert(at);
            }
        }
    }
    let only = |map: &HashMap<u64, BTreeSet<u64>>, at, to| map.get(at).is_some_and(|s| s.len() == 1 && s.contains(to));
    let pairs: Vec<(u64, u64)> = {
        let mut comparer = Comparer::new(old, new, pairing, LineProof::None);
        let front = a.iter().zip(&b).take_while(|(x, y)| comparer.unnamed(**x, **y)).count();
        let rest = a.len().min(b.len()) - front;
        let end = a.iter().rev().zip(b.iter().rev()).take(rest).take_while(|(x, y)| comparer.unnamed(**x, **y)).count();
        let ends = a.iter().rev().zip(b.iter().rev()).take(end);
        let telling = (telling(old, &a), telling(new, &b));
        let ordered = a.iter().zip(&b).take(front).chain(ends).filter(|(x, y)| {
            let silent = !there.contains_key(x) && !back.contains_key(y);
            silent && telling.0.contains(x) && telling.1.contains(y)
        });
        let mut pairs: Vec<(u64, u64)> = ordered.map(|(x, y)| (*x, *y)).collect();
        for x in &a {
            let Some(y) = there.get(x).and_then(|s| s.first()) else { continue };
            if only(&there, x, y) && only(&back, y, x) && new.is_mutable(*y) && comparer.unnamed(*x, *y) {
                pairs.push((*x, *y));
            }
        }
        pairs
    };
    for (x, y) in pairs {
        pairing.unnamed.insert(x, y);
        pairing.unnamed_back.insert(y, x);
    }
}

/// Writable data without a name that a variable points to: the old and the new variable do from the same place in them,
/// and so on from there. All must be equal in the end, for they may point to each other.
fn pointed_data(old: &Side<'_>, new: &Side<'_>, pairing: &mut Pairing) {
    let by_place = |side: &Side<'_>| {
        let mut all: Vec<(u64, u64)> = side.pointers().iter().map(|p| (p.at, p.to)).collect();
        all.sort_unstable();
        all.dedup_by_key(|(at, _)| *at);
        all
    };
    let (olds, news) = (by_place(old), by_place(new));
    let mut open: Vec<(u64, u64, u64)> = Vec::new();
    for (id, o) in old.build.objects.iter().enumerate().filter(|(_, o)| o.size > 0 && old.is_mutable(o.addr)) {
        let Some(p) = pairing.object_pair(id as ObjId).map(|to| new.build.object(to)) else { continue };
        if o.size == p.size {
            open.push((o.addr, p.addr, o.size));
        }
    }
    let unnamed =
        |side: &Side<'_>, to| matches!(resolve(&side.build, to, None), Target::Data(_)) && side.is_mutable(to);
    let (mut there, mut back): (BTreeMap<u64, u64>, HashMap<u64, u64>) = Default::default();
    let mut doubtful: HashSet<u64> = HashSet::new();
    while let Some((a, b, len)) = open.pop() {
        let from = olds.partition_point(|(at, _)| *at < a);
        for (at, x) in olds[from..].iter().take_while(|(at, _)| *at < a + len) {
            let Ok(found) = news.binary_search_by_key(&(b + (at - a)), |(at, _)| *at) else { continue };
            let (x, y) = (*x, news[found].1);
            let known = pairing.unnamed.contains_key(&x) || pairing.unnamed_back.contains_key(&y);
            if known || !unnamed(old, x) || !unnamed(new, y) {
                continue;
            }
            if there.get(&x).is_some_and(|to| *to != y) || back.get(&y).is_some_and(|from| *from != x) {
                doubtful.insert(x);
            } else if there.insert(x, y).is_none() {
                back.insert(y, x);
                let ends = (old.extent_end(x) - x, new.extent_end(y) - y);
                if ends.0 == ends.1 {
                    open.push((x, y, ends.0));
                }
            }
        }
    }
    there.retain(|x, _| !doubtful.contains(x));
    loop {
        pairing.unnamed.extend(&there);
        pairing.unnamed_back.extend(there.iter().map(|(x, y)| (*y, *x)));
        let mut comparer = Comparer::new(old, new, pairing, LineProof::None);
        let wrong: Vec<(u64, u64)> =
            there.iter().map(|(x, y)| (*x, *y)).filter(|(x, y)| !comparer.unnamed(*x, *y)).collect();
        if wrong.is_empty() {
            break;
        }
        for (x, y) in wrong {
            there.remove(&x);
            pairing.unnamed.remove(&x);
            pairing.unnamed_back.remove(&y);
        }
    }
}

/// The pieces whose contents no other piece has.
fn telling(side: &Side<'_>, pieces: &[u64]) -> HashSet<u64> {
    let content = |at: u64| {
        let len = side.extent_end(at).saturating_sub(at);
        let bytes = side.build.bytes(at, len).unwrap_or(&[]);
        let all = &side.build.dynamic_at;
        let first = all.get(all.partition_point(|p| *p < at));
        (bytes, first.is_some_and(|p| *p < at + len))
    };
    let mut seen: HashMap<&[u8], usize> = HashMap::new();
    pieces.iter().for_each(|at| *seen.entry(content(*at).0).or_default() += 1);
    let tells = |at: &u64| {
        let (bytes, has_pointers) = content(*at);
        has_pointers || bytes.iter().any(|b| *b != 0) && seen[bytes] == 1
    };
    pieces.iter().copied().filter(tells).collect()
}
