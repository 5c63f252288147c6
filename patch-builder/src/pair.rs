//! Which old symbol is which new one. Never guessed: what stays ambiguous
//! stays unpaired, and an unpaired function counts as removed and as new.

mod family;

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};

use crate::build::{canonical, Build, FuncId, Object, TlsFound};
use crate::compare::{Comparer, LineProof};
use crate::lift::Target;
use crate::pairing::Pairing;
use crate::side::Side;
use family::{is_dotted, Key, Kin};

/// Pairs functions, data and thread-locals of two builds.
#[must_use]
pub fn pair(old: &Side<'_>, new: &Side<'_>) -> Pairing {
    let mut pairing = Pairing {
        funcs: vec![None; old.build.funcs.len()],
        funcs_back: vec![Vec::new(); new.build.funcs.len()],
        ..Pairing::default()
    };
    let kin = (functions_kin(&old.build), functions_kin(&new.build));
    exact_functions(&kin, (&old.build, &new.build), &mut pairing);
    let data = Variables::new(old, new, &old.build.objects, &new.build.objects, |t| match t {
        Target::Object(id, _) => Some(id),
        _ => None,
    });
    let tls = Variables::new(old, new, &old.build.tls, &new.build.tls, |t| match t {
        Target::Tls(id, _) | Target::TlsSlots(_, TlsFound::Own(id, _)) => Some(id),
        _ => None,
    });
    // Functions are recognised by the data that they use, and data by the functions that use it.
    for _ in 0..5 {
        (pairing.tls, pairing.tls_back) = tls.pair(&pairing);
        (pairing.objects, pairing.objects_back) = data.pair(&pairing);
        let before = pairing.funcs.iter().flatten().count();
        family_functions(old, new, &kin, &mut pairing);
        if pairing.funcs.iter().flatten().count() == before {
            break;
        }
    }
    unnamed_data(old, new, &mut pairing);
    (pairing.tls, pairing.tls_back) = tls.pair(&pairing);
    (pairing.objects, pairing.objects_back) = data.pair(&pairing);
    pairing.ambiguous = data.ambiguous(&pairing);
    pairing.ambiguous_functions = ambiguous_functions(old, new, &kin, &pairing);
    pairing
}

/// What there is to compare of each name of each symbol.
type Kins = Vec<Vec<Kin>>;

fn functions_kin(build: &Build<'_>) -> Kins {
    build.funcs.iter().map(|f| f.names.iter().map(Kin::new).collect()).collect()
}

fn exact_functions(kin: &(Kins, Kins), builds: (&Build<'_>, &Build<'_>), pairing: &mut Pairing) {
    type Members<'a> = Vec<(FuncId, &'a str)>;
    type Groups<'a> = HashMap<(&'a str, Option<&'a str>), (Members<'a>, Members<'a>)>;
    let (old, new) = builds;
    let mut groups: Groups<'_> = HashMap::new();
    for (build, kins, is_old) in [(old, &kin.0, true), (new, &kin.1, false)] {
        for (id, f) in build.funcs.iter().enumerate() {
            for (name, k) in f.names.iter().zip(&kins[id]) {
                let group = groups.entry((&k.exact, k.file.as_deref())).or_default();
                let members = if is_old { &mut group.0 } else { &mut group.1 };
                members.push((id as FuncId, name.text));
            }
        }
    }
    let texts = |v: &Members<'_>| v.iter().map(|(_, t)| (*t).to_owned()).collect::<BTreeSet<String>>();
    let same_texts: HashSet<(&str, Option<&str>)> = groups
        .iter()
        .filter(|(_, (a, b))| a.len() > 1 && a.len() == b.len() && texts(a).len() == a.len() && texts(a) == texts(b))
        .map(|(k, _)| *k)
        .collect();
    for (id, f) in old.funcs.iter().enumerate() {
        let mut found: Option<FuncId> = None;
        for (name, k) in f.names.iter().zip(&kin.0[id]) {
            let key = (k.exact.as_str(), k.file.as_deref());
            let Some((a, b)) = groups.get(&key) else { continue };
            let new_id = match (&a[..], &b[..]) {
                ([_], [(n, text)]) if *text == name.text => *n,
                // Instances of a generic function; closures are numbered by their hashes, too.
                _ if k.legacy && !name.text.contains("closure") && same_texts.contains(&key) => {
                    let Some((n, _)) = b.iter().find(|(_, text)| *text == name.text) else { continue };
                    *n
                }
                _ => continue,
            };
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

/// One family in both builds.
#[derive(Default)]
struct Members {
    olds: Vec<FuncId>,
    news: Vec<FuncId>,
}

/// What exact names left: numbered names, several copies of one name, names whose hashes differ.
fn family_functions(old: &Side<'_>, new: &Side<'_>, kin: &(Kins, Kins), pairing: &mut Pairing) {
    for with_file in [true, false] {
        let mut whole: BTreeMap<Key, Members> = BTreeMap::new();
        let key = |k: &Kin| (k.family.clone(), k.file.clone().filter(|_| with_file));
        for (id, k) in kin.0.iter().enumerate().filter_map(|(id, k)| Some((id, k.first()?))) {
            whole.entry(key(k)).or_default().olds.push(id as FuncId);
        }
        for (id, k) in kin.1.iter().enumerate().filter_map(|(id, k)| Some((id, k.first()?))) {
            whole.entry(key(k)).or_default().news.push(id as FuncId);
        }
        for members in whole.into_values() {
            let family = Family { old, new, kin, members, with_file };
            for (f, g) in family.pairs(pairing) {
                pairing.set_func(f, g);
            }
        }
    }
}

struct Family<'a, 'd> {
    old: &'a Side<'d>,
    new: &'a Side<'d>,
    kin: &'a (Kins, Kins),
    members: Members,
    with_file: bool,
}

impl Family<'_, '_> {
    fn own_name(&self, f: FuncId, g: FuncId) -> bool {
        self.kin.0[f as usize][0].own == self.kin.1[g as usize][0].own
    }

    /// Whether some caller and its new version refer to the old and the new function.
    fn meet(&self, pairing: &Pairing, f: FuncId, g: FuncId) -> bool {
        let news = self.new.callers(g);
        self.old.callers(f).iter().any(|h| pairing.func_pair(*h).is_some_and(|i| news.contains(&i)))
    }

    /// Whether some members differ by nothing but a number.
    fn is_numbered(&self) -> bool {
        let numbered = |ids: &[FuncId], kins: &Kins| {
            let mut seen: HashMap<&str, &str> = HashMap::new();
            ids.iter().any(|id| {
                let k = &kins[*id as usize][0];
                *seen.entry(&k.exact).or_insert(&k.own) != k.own
            })
        };
        numbered(&self.members.olds, &self.kin.0) || numbered(&self.members.news, &self.kin.1)
    }

    fn pairs(&self, pairing: &Pairing) -> Vec<(FuncId, FuncId)> {
        let Members { olds: all_olds, news: all_news } = &self.members;
        let olds: Vec<FuncId> = all_olds.iter().copied().filter(|f| pairing.func_pair(*f).is_none()).collect();
        let free = |g: &FuncId| pairing.func_olds(*g).is_empty();
        let news: Vec<FuncId> =
            all_news.iter().copied().filter(|g| free(g) || is_copied(&self.new.build, *g)).collect();
        if olds.is_empty() || news.is_empty() {
            return Vec::new();
        }
        let mut comparer = Comparer::new(self.old, self.new, pairing, LineProof::None);
        let mut pairs = Vec::new();
        let mut left = Vec::new();
        let mut taken: HashSet<FuncId> = HashSet::new();
        for &f in &olds {
            let mut order = news.clone();
            order.sort_by_key(|g| (!self.own_name(f, *g), taken.contains(g), *g));
            // More than a few candidates of one name are not worth a quadratic search.
            let equal = order
                .into_iter()
                .take(32)
                .find(|g| (!taken.contains(g) || self.own_name(f, *g)) && comparer.func_bodies(f, *g));
            match equal {
                Some(g) => {
                    taken.insert(g);
                    pairs.push((f, g));
                }
                None => left.push(f),
            }
        }
        let free: Vec<FuncId> = news.into_iter().filter(|g| !taken.contains(g) && free(g)).collect();
        let alone = self.with_file && (all_olds.len(), all_news.len()) == (1, 1);
        match (&left[..], &free[..]) {
            ([f], [g]) if alone => pairs.push((*f, *g)),
            ([f], [g]) if self.is_numbered() => {
                // The number proves something once everybody else has kept theirs.
                let kept = |e: &FuncId| {
                    let known = pairs.iter().find(|(x, _)| x == e).map(|(_, y)| *y).or(pairing.func_pair(*e));
                    e == f || known.is_some_and(|y| self.own_name(*e, y))
                };
                if self.own_name(*f, *g) && all_olds.len() == all_news.len() && all_olds.iter().all(kept) {
                    pairs.push((*f, *g));
                }
            }
            _ if self.is_numbered() => {}
            // Copies of one name (codegen units hold several, each with other constants propagated into it) and
            // equal names in several files are told apart by who calls them.
            ([f], [g]) if self.meet(pairing, *f, *g) => pairs.push((*f, *g)),
            _ if self.with_file && all_olds.len() == all_news.len() => {
                for f in &left {
                    let named: Vec<FuncId> = free.iter().copied().filter(|g| self.own_name(*f, *g)).collect();
                    let own = |e: FuncId| &self.kin.0[e as usize][0].own;
                    let rivals = left.iter().filter(|e| own(**e) == own(*f)).count();
                    if let ([g], 1) = (&named[..], rivals) {
                        pairs.push((*f, *g));
                    }
                }
            }
            _ => {}
        }
        pairs
    }
}

/// Whether the name is a Rust symbol that codegen units may hold several copies of.
fn is_copied(build: &Build<'_>, id: FuncId) -> bool {
    let name = build.func(id).name();
    build.rust && (name.starts_with("_R") || name.starts_with("_ZN"))
}

/// Old functions without new version, while functions without old version go by their name.
fn ambiguous_functions(old: &Side<'_>, new: &Side<'_>, kin: &(Kins, Kins), pairing: &Pairing) -> Vec<(FuncId, String)> {
    let mut families: HashMap<&str, Vec<FuncId>> = HashMap::new();
    for (id, kins) in kin.1.iter().enumerate().filter(|(id, _)| pairing.func_olds(*id as FuncId).is_empty()) {
        kins.iter().for_each(|k| families.entry(&k.family).or_default().push(id as FuncId));
    }
    let mut comparer = Comparer::new(old, new, pairing, LineProof::None);
    let mut out = Vec::new();
    for (id, kins) in kin.0.iter().enumerate().filter(|(id, _)| pairing.func_pair(*id as FuncId).is_none()) {
        let id = id as FuncId;
        let rivals = kins.iter().filter_map(|k| families.get(k.family.as_str())).flatten();
        // Its own body under a new name: the old one can go on.
        if rivals.clone().next().is_some() && !rivals.take(32).any(|g| comparer.func_bodies(id, *g)) {
            out.push((id, old.build.func(id).name().to_owned()));
        }
    }
    out
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
        let pointers: Vec<u64> = (at..at + len).filter(|p| side.build.dynamic.contains_key(p)).collect();
        (bytes, pointers)
    };
    let mut seen: HashMap<&[u8], usize> = HashMap::new();
    pieces.iter().for_each(|at| *seen.entry(content(*at).0).or_default() += 1);
    let tells = |at: &u64| {
        let (bytes, pointers) = content(*at);
        !pointers.is_empty() || bytes.iter().any(|b| *b != 0) && seen[bytes] == 1
    };
    pieces.iter().copied().filter(tells).collect()
}

/// Variables of one kind in both builds, with the functions that use them.
struct Variables<'a, 'd> {
    sides: (&'a Side<'d>, &'a Side<'d>),
    all: (&'a [Object<'d>], &'a [Object<'d>]),
    kin: (Kins, Kins),
    users: (Vec<Vec<FuncId>>, Vec<Vec<FuncId>>),
    pick: fn(Target<'d>) -> Option<u32>,
}

/// Old to new, and new to old.
type Pairs = (Vec<Option<u32>>, Vec<Option<u32>>);
/// Members of one family, old and new.
type Group = (Vec<u32>, Vec<u32>);

impl<'a, 'd> Variables<'a, 'd> {
    fn new(
        old: &'a Side<'d>,
        new: &'a Side<'d>,
        olds: &'a [Object<'d>],
        news: &'a [Object<'d>],
        pick: fn(Target<'d>) -> Option<u32>,
    ) -> Self {
        let kin = |all: &[Object<'_>]| all.iter().map(|o| o.names.iter().map(Kin::new).collect()).collect();
        let users = |side: &Side<'d>, len: usize| {
            let mut users: Vec<Vec<FuncId>> = vec![Vec::new(); len];
            for (id, f) in side.lifted.iter().enumerate() {
                f.refs.iter().filter_map(|r| pick(r.target)).for_each(|o| users[o as usize].push(id as FuncId));
            }
            users.iter_mut().for_each(Vec::dedup);
            users
        };
        Self {
            sides: (old, new),
            all: (olds, news),
            kin: (kin(olds), kin(news)),
            users: (users(old, olds.len()), users(new, news.len())),
            pick,
        }
    }

    /// Whether some function and its new version use the old and the new variable.
    fn meet(&self, pairing: &Pairing, x: u32, y: u32, strict: bool) -> bool {
        let (olds, news) = (&self.users.0[x as usize], &self.users.1[y as usize]);
        if olds.is_empty() && news.is_empty() {
            return !strict; // used through pointers in data only: nothing can tell more
        }
        olds.iter().any(|f| pairing.func_pair(*f).is_some_and(|g| news.contains(&g)))
    }

    fn pair(&self, pairing: &Pairing) -> Pairs {
        let mut pairs: Pairs = (vec![None; self.all.0.len()], vec![None; self.all.1.len()]);
        let keys: [fn(&Kin) -> Key; 3] = [
            |k| (k.exact.clone(), k.file.clone()),
            |k| (k.family.clone(), k.file.clone()),
            |k| (k.family.clone(), None),
        ];
        for (pass, key) in keys.iter().enumerate() {
            let mut groups: BTreeMap<Key, Group> = BTreeMap::new();
            for (id, k) in self.kin.0.iter().enumerate().flat_map(|(id, kins)| kins.iter().map(move |k| (id, k))) {
                groups.entry(key(k)).or_default().0.push(id as u32);
            }
            for (id, k) in self.kin.1.iter().enumerate().flat_map(|(id, kins)| kins.iter().map(move |k| (id, k))) {
                groups.entry(key(k)).or_default().1.push(id as u32);
            }
            for group in groups.values_mut() {
                group.0.dedup();
                group.1.dedup();
                self.pair_group(pairing, group, pass == 2, &mut pairs);
            }
        }
        pairs
    }

    fn pair_group(&self, pairing: &Pairing, group: &Group, moved: bool, pairs: &mut Pairs) {
        let a: Vec<u32> = group.0.iter().copied().filter(|x| pairs.0[*x as usize].is_none()).collect();
        let b: Vec<u32> = group.1.iter().copied().filter(|y| pairs.1[*y as usize].is_none()).collect();
        if a.is_empty() || b.is_empty() {
            return;
        }
        let mut set = |x: u32, y: u32| {
            if pairs.0[x as usize].is_none() && pairs.1[y as usize].is_none() {
                (pairs.0[x as usize], pairs.1[y as usize]) = (Some(y), Some(x));
            }
        };
        if let ([x], [y]) = (&group.0[..], &group.1[..]) {
            let (o, p) = (&self.all.0[*x as usize], &self.all.1[*y as usize]);
            let label = o.size == 0 && p.size == 0;
            let own = !moved && !is_dotted(o.name()) && !is_dotted(p.name());
            if label || own || self.meet(pairing, *x, *y, moved) {
                set(*x, *y);
            }
            return;
        }
        if !moved {
            self.by_number(pairing, group).into_iter().for_each(|(x, y)| set(x, y));
        }
        for x in &a {
            let hits: Vec<u32> = b.iter().copied().filter(|y| self.meet(pairing, *x, *y, moved)).collect();
            let [y] = hits[..] else { continue };
            if a.iter().filter(|z| self.meet(pairing, **z, y, moved)).count() == 1 {
                set(*x, y);
            }
        }
    }

    /// Equal numbers, provided that nothing says that the numbering moved: both builds have the same
    /// names, and whoever uses them is the same code and uses them in the same order.
    fn by_number(&self, pairing: &Pairing, group: &Group) -> Vec<(u32, u32)> {
        let names = |ids: &[u32], kins: &'_ Kins| -> BTreeMap<String, u32> {
            ids.iter().map(|i| (kins[*i as usize][0].own.clone(), *i)).collect()
        };
        let (olds, news) = (names(&group.0, &self.kin.0), names(&group.1, &self.kin.1));
        let distinct = olds.len() == group.0.len() && news.len() == group.1.len();
        if !distinct || !olds.keys().eq(news.keys()) {
            return Vec::new();
        }
        let same_use = |f: FuncId, g: FuncId| {
            let (x, y) = (&self.sides.0.lifted[f as usize], &self.sides.1.lifted[g as usize]);
            let order = |refs: &[crate::lift::Ref<'d>], ids: &[u32], kins: &Kins| -> Vec<String> {
                let used = refs.iter().filter_map(|r| (self.pick)(r.target)).filter(|o| ids.contains(o));
                used.map(|o| kins[o as usize][0].own.clone()).collect()
            };
            x.masked == y.masked && order(&x.refs, &group.0, &self.kin.0) == order(&y.refs, &group.1, &self.kin.1)
        };
        let users: BTreeSet<FuncId> = group.0.iter().flat_map(|x| self.users.0[*x as usize].iter().copied()).collect();
        if users.iter().any(|f| pairing.func_pair(*f).is_some_and(|g| !same_use(*f, g))) {
            return Vec::new();
        }
        let pairs = olds.values().zip(news.values()).map(|(x, y)| (*x, *y));
        pairs.filter(|(x, y)| self.meet(pairing, *x, *y, false)).collect()
    }

    /// New variables whose name some unpaired old one has, too: it can't be said which is which.
    fn ambiguous(&self, pairing: &Pairing) -> HashSet<String> {
        let gone = |id: &usize| pairing.objects[*id].is_none() && self.all.0[*id].size > 0;
        let gone: HashSet<&str> =
            (0..self.all.0.len()).filter(gone).flat_map(|id| &self.kin.0[id]).map(|k| k.family.as_str()).collect();
        (0..self.all.1.len())
            .filter(|id| pairing.objects_back[*id].is_none())
            .filter(|id| self.kin.1[*id].iter().any(|k| gone.contains(k.family.as_str())))
            .map(|id| canonical(self.all.1[id].name()))
            .collect()
    }
}
