//! Which old symbol is which new one. Never guessed: what stays ambiguous
//! stays unpaired, and an unpaired function counts as removed and as new.

mod family;
mod functions;
mod variables;

use std::collections::{BTreeSet, HashMap, HashSet};

use crate::build::{FuncId, Name, TlsFound};
use crate::compare::{Comparer, LineProof};
use crate::lift::Target;
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
