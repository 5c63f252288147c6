//! Which old symbol is which new one. Never guessed: what stays ambiguous
//! stays unpaired, and an unpaired function counts as removed and as new.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};

use crate::build::{canonical, Build, FuncId, Name, ObjId, Object};
use crate::compare::{Comparer, LineProof};
use crate::pairing::Pairing;
use crate::side::Side;

/// Pairs functions, data and thread-locals of two builds.
#[must_use]
pub fn pair(old: &Side<'_>, new: &Side<'_>) -> Pairing {
    let mut pairing = Pairing {
        funcs: vec![None; old.build.funcs.len()],
        funcs_back: vec![Vec::new(); new.build.funcs.len()],
        ..Pairing::default()
    };
    exact_functions(&old.build, &new.build, &mut pairing);
    let tls = objects(&old.build.tls, &new.build.tls, None, &mut pairing);
    (pairing.tls, pairing.tls_back) = tls;
    let users = Users { old, new };
    let (a, b) = objects(&old.build.objects, &new.build.objects, Some(&users), &mut pairing);
    (pairing.objects, pairing.objects_back) = (a, b);
    for _ in 0..4 {
        let before = pairing.funcs.iter().flatten().count();
        family_functions(old, new, &mut pairing);
        if pairing.funcs.iter().flatten().count() == before {
            break;
        }
    }
    unnamed_data(old, new, &mut pairing);
    // Static locals are recognised by their users, which may only now be paired.
    let (a, b) = objects(&old.build.objects, &new.build.objects, Some(&users), &mut pairing);
    (pairing.objects, pairing.objects_back) = (a, b);
    pairing
}

/// A name that compilers number, so that equal names prove nothing by themselves.
fn is_numbered(name: &str) -> bool {
    let (_, suffix) = crate::build::split_suffix(name);
    suffix.split('.').skip(1).any(|p| !p.is_empty() && p.bytes().all(|b| b.is_ascii_digit())) || is_closure(name)
}

/// v0 and legacy spellings of a closure.
fn is_closure(name: &str) -> bool {
    name.contains("{{closure}}") || name.contains("$u7b$$u7b$closure") || name.starts_with("_R") && name.contains("NC")
}

/// `{closure#3}` and `{closure#0}` as one family.
fn closure_family(name: &str) -> String {
    let mut out = String::with_capacity(name.len());
    let mut rest = name;
    while let Some(at) = rest.find("{closure#") {
        let (head, tail) = rest.split_at(at);
        out.push_str(head);
        out.push_str("{closure}");
        rest = tail.find('}').map_or("", |end| &tail[end + 1..]);
    }
    out.push_str(rest);
    out
}

type Index<'a, 'd> = HashMap<&'a str, Vec<(FuncId, &'a Name<'d>)>>;

fn index<'a, 'd>(build: &'a Build<'d>) -> Index<'a, 'd> {
    let mut map: Index<'a, 'd> = HashMap::new();
    for (id, f) in build.funcs.iter().enumerate() {
        for name in &f.names {
            map.entry(name.text).or_default().push((id as FuncId, name));
        }
    }
    map
}

fn exact_functions(old: &Build<'_>, new: &Build<'_>, pairing: &mut Pairing) {
    let (a, b) = (index(old), index(new));
    for (id, f) in old.funcs.iter().enumerate() {
        let mut found: Option<FuncId> = None;
        for name in f.names.iter().filter(|n| !is_numbered(n.text)) {
            let (Some(olds), Some(news)) = (a.get(name.text), b.get(name.text)) else { continue };
            let new_id = if let ([_], [(n, _)]) = (&olds[..], &news[..]) {
                Some(*n)
            } else {
                let same_file = |v: &[(FuncId, &Name<'_>)]| {
                    let mut hits = v.iter().filter(|(_, n)| n.file == name.file && n.file.is_some());
                    hits.next().filter(|_| hits.next().is_none()).map(|(id, _)| *id)
                };
                same_file(olds).and_then(|_| same_file(news))
            };
            let Some(new_id) = new_id else { continue };
            match found {
                None => found = Some(new_id),
                Some(first) if first != new_id => pairing.splits.push((id as FuncId, first, new_id)),
                Some(_) => {}
            }
        }
        if let Some(new_id) = found {
            pairing.set_func(id as FuncId, new_id);
        }
    }
}

/// What exact names left: numbered names, several copies of one name, names whose hashes differ.
fn family_functions(old: &Side<'_>, new: &Side<'_>, pairing: &mut Pairing) {
    type Families = BTreeMap<Key, (Vec<FuncId>, Vec<FuncId>)>;
    let key = |build: &Build<'_>, f: FuncId, with_file: bool| {
        let name = &build.func(f).names[0];
        let file = if build.rust || !with_file { None } else { name.file.map(str::to_owned) };
        (closure_family(&canonical(name.text)), file)
    };
    for with_file in [true, false] {
        let mut families: Families = BTreeMap::new();
        let mut whole: HashMap<Key, (usize, usize)> = HashMap::new();
        for id in 0..old.build.funcs.len() as FuncId {
            let k = key(&old.build, id, with_file);
            whole.entry(k.clone()).or_default().0 += 1;
            if pairing.func_pair(id).is_none() {
                families.entry(k).or_default().0.push(id);
            }
        }
        for id in 0..new.build.funcs.len() as FuncId {
            let k = key(&new.build, id, with_file);
            whole.entry(k.clone()).or_default().1 += 1;
            if pairing.func_olds(id).is_empty() || is_copied(&new.build, id) {
                families.entry(k).or_default().1.push(id);
            }
        }
        for (k, (olds, news)) in families {
            if olds.is_empty() || news.is_empty() {
                continue;
            }
            let sizes = whole.get(&k).copied().unwrap_or_default();
            for (f, g) in match_family(old, new, pairing, &olds, &news, sizes == (1, 1), sizes.0 == sizes.1) {
                pairing.set_func(f, g);
            }
        }
    }
}

/// Whether the name is a Rust symbol that codegen units may hold several copies of.
fn is_copied(build: &Build<'_>, id: FuncId) -> bool {
    let name = build.func(id).name();
    build.rust && (name.starts_with("_R") || name.starts_with("_ZN"))
}

fn match_family(
    old: &Side<'_>,
    new: &Side<'_>,
    pairing: &Pairing,
    olds: &[FuncId],
    news: &[FuncId],
    alone: bool,
    same_size: bool,
) -> Vec<(FuncId, FuncId)> {
    let mut comparer = Comparer::new(old, new, pairing, LineProof::None);
    let mut pairs = Vec::new();
    let mut left = Vec::new();
    let mut taken: HashSet<FuncId> = HashSet::new();
    let same_name = |f: FuncId, g: FuncId| old.build.func(f).name() == new.build.func(g).name();
    for &f in olds {
        let mut order: Vec<FuncId> = news.to_vec();
        order.sort_by_key(|g| (!same_name(f, *g), taken.contains(g), *g));
        // More than a few candidates of one name are not worth a quadratic search.
        let equal = order
            .into_iter()
            .take(32)
            .find(|g| (!taken.contains(g) || same_name(f, *g)) && comparer.func_bodies(f, *g));
        match equal {
            Some(g) => {
                taken.insert(g);
                pairs.push((f, g));
            }
            None => left.push(f),
        }
    }
    let free: Vec<FuncId> =
        news.iter().copied().filter(|g| !taken.contains(g) && pairing.func_olds(*g).is_empty()).collect();
    // Copies of one name (codegen units hold several, each with other constants propagated into it) are
    // told apart by who calls them; a name that is alone in both builds needs no more evidence.
    let meet = |f: FuncId, g: FuncId| {
        let news = new.callers(g);
        old.callers(f).iter().any(|h| pairing.func_pair(*h).is_some_and(|i| news.contains(&i)))
    };
    if let ([f], [g], true) =
        (&left[..], &free[..], alone || left.first().zip(free.first()).is_some_and(|(f, g)| meet(*f, *g)))
    {
        pairs.push((*f, *g));
        return pairs;
    }
    for f in &left {
        let named: Vec<FuncId> = free.iter().copied().filter(|g| same_name(*f, *g)).collect();
        let rivals = left.iter().filter(|e| old.build.func(**e).name() == old.build.func(*f).name()).count();
        if let ([g], 1, true) = (&named[..], rivals, same_size) {
            pairs.push((*f, *g));
        }
    }
    pairs
}

/// Writable data without a name is recognised by its order, as long as the initial contents agree:
/// from the front up to the first difference, and from the back.
fn unnamed_data(old: &Side<'_>, new: &Side<'_>, pairing: &mut Pairing) {
    let (a, b) = (old.unnamed_mutable(), new.unnamed_mutable());
    let pairs: Vec<(u64, u64)> = {
        let mut comparer = Comparer::new(old, new, pairing, LineProof::None);
        let front = a.iter().zip(&b).take_while(|(x, y)| comparer.unnamed(**x, **y)).count();
        let rest = a.len().min(b.len()) - front;
        let back =
            a.iter().rev().zip(b.iter().rev()).take(rest).take_while(|(x, y)| comparer.unnamed(**x, **y)).count();
        let ends = a.iter().rev().zip(b.iter().rev()).take(back);
        a.iter().zip(&b).take(front).chain(ends).map(|(x, y)| (*x, *y)).collect()
    };
    for (x, y) in pairs {
        pairing.unnamed.insert(x, y);
        pairing.unnamed_back.insert(y, x);
    }
}

struct Users<'a, 'd> {
    old: &'a Side<'d>,
    new: &'a Side<'d>,
}

impl Users<'_, '_> {
    /// Whether some function and its new version use the old and the new variable.
    fn meet(&self, pairing: &Pairing, a: ObjId, b: ObjId) -> bool {
        let news = self.new.users(b);
        if self.old.users(a).is_empty() && news.is_empty() {
            return true; // used through pointers in data only: nothing can tell more
        }
        self.old.users(a).iter().any(|f| pairing.func_pair(*f).is_some_and(|g| news.contains(&g)))
    }
}

/// A name, and the source file where that tells variables apart.
type Key = (String, Option<String>);
/// Old to new, and new to old.
type Pairs = (Vec<Option<u32>>, Vec<Option<u32>>);

fn objects(old: &[Object<'_>], new: &[Object<'_>], users: Option<&Users<'_, '_>>, pairing: &mut Pairing) -> Pairs {
    let mut there = vec![None; old.len()];
    let mut back = vec![None; new.len()];
    let passes: [&dyn Fn(&Name<'_>) -> Key; 3] =
        [&|n| (n.text.to_owned(), n.file.map(str::to_owned)), &|n| (n.text.to_owned(), None), &|n| {
            (canonical(n.text), None)
        }];
    for (pass, key) in passes.iter().enumerate() {
        let mut groups: BTreeMap<Key, (Vec<u32>, Vec<u32>)> = BTreeMap::new();
        let names = |o: &Object<'_>| -> Vec<Key> {
            o.names.iter().filter(|n| pass == 2 || !is_numbered(n.text)).map(key).collect()
        };
        for (id, o) in old.iter().enumerate().filter(|(id, _)| there[*id].is_none()) {
            names(o).into_iter().for_each(|k| groups.entry(k).or_default().0.push(id as u32));
        }
        for (id, o) in new.iter().enumerate().filter(|(id, _)| back[*id].is_none()) {
            names(o).into_iter().for_each(|k| groups.entry(k).or_default().1.push(id as u32));
        }
        for (_, (a, b)) in groups {
            if let ([x], [y]) = (&a[..], &b[..]) {
                // A numbered name (a static local) must also be used by one function's two versions.
                let numbered = is_numbered(old[*x as usize].name()) || is_numbered(new[*y as usize].name());
                let proven = !numbered || users.is_none_or(|u| u.meet(pairing, *x, *y));
                if proven && there[*x as usize].is_none() && back[*y as usize].is_none() {
                    (there[*x as usize], back[*y as usize]) = (Some(*y), Some(*x));
                }
                continue;
            }
            let Some(users) = users else { continue };
            // The same numbers on both sides, and each used by the same function: the numbering did not move.
            let texts = |v: &[u32], all: &[Object<'_>]| -> BTreeSet<String> {
                v.iter().map(|i| all[*i as usize].name().to_owned()).collect()
            };
            let same_numbers = texts(&a, old) == texts(&b, new);
            for x in a.iter().filter(|_| same_numbers) {
                let named = b.iter().find(|y| new[**y as usize].name() == old[*x as usize].name());
                if let Some(y) = named.filter(|y| back[**y as usize].is_none() && users.meet(pairing, *x, **y)) {
                    (there[*x as usize], back[*y as usize]) = (Some(*y), Some(*x));
                }
            }
            for x in a.iter() {
                if there[*x as usize].is_some() {
                    continue;
                }
                let mut hits = b.iter().filter(|y| back[**y as usize].is_none() && users.meet(pairing, *x, **y));
                let (Some(y), None) = (hits.next(), hits.next()) else { continue };
                let rivals = a.iter().filter(|z| users.meet(pairing, **z, *y)).count();
                if rivals == 1 && there[*x as usize].is_none() {
                    (there[*x as usize], back[*y as usize]) = (Some(*y), Some(*x));
                }
            }
        }
    }
    // New static locals whose name some unpaired old one has, too: it can't be said which is which.
    if users.is_some() {
        let family = |o: &Object<'_>| canonical(o.name());
        let gone: HashSet<String> =
            (0..old.len()).filter(|i| there[*i].is_none() && old[*i].size > 0).map(|i| family(&old[i])).collect();
        pairing.ambiguous = (0..new.len())
            .filter(|i| back[*i].is_none())
            .map(|i| family(&new[i]))
            .filter(|n| gone.contains(n))
            .collect();
    }
    (there, back)
}
