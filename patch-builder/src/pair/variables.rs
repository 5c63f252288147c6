//! Variables: by name, by number where nothing says that the numbering moved, else by who uses them.

use std::collections::{BTreeSet, HashMap, HashSet};

use super::family::{is_dotted, Key, Kin, Kins, Names, Text};
use crate::build::{canonical, FastMap, FuncId, Name, Object};
use crate::lift::{Ref, Target};
use crate::pairing::Pairing;
use crate::side::Side;

/// Variables of one kind in both builds, with the functions that use them.
pub struct Variables<'a, 'd> {
    sides: (&'a Side<'d>, &'a Side<'d>),
    all: (&'a [Object<'d>], &'a [Object<'d>]),
    kin: (Kins, Kins),
    users: (Vec<Vec<FuncId>>, Vec<Vec<FuncId>>),
    pick: fn(Target<'d>) -> Option<u32>,
    /// By exact name and file, by family and file, by family.
    groups: [Vec<Group>; 3],
}

/// Old to new, and new to old.
type Pairs = (Vec<Option<u32>>, Vec<Option<u32>>);
/// Members of one family, old and new.
type Group = (Vec<u32>, Vec<u32>);

/// All groups, in the order of their names.
fn groups<'d>(kin: &(Kins, Kins), names: &Names<'d>, key: fn(&Kin) -> Key) -> Vec<Group> {
    let mut groups: FastMap<Key, Group> = FastMap::default();
    for (kins, is_old) in [(&kin.0, true), (&kin.1, false)] {
        for (id, k) in kins.iter().flat_map(|(id, all)| all.iter().map(move |k| (id, k))) {
            let group = groups.entry(key(k)).or_default();
            let members = if is_old { &mut group.0 } else { &mut group.1 };
            if members.last() != Some(&id) {
                members.push(id);
            }
        }
    }
    let mut out: Vec<(Key, Group)> = groups.into_iter().filter(|(_, (a, b))| !a.is_empty() && !b.is_empty()).collect();
    out.sort_by(|(a, _), (b, _)| names.order(*a).cmp(&names.order(*b)));
    out.into_iter().map(|(_, group)| group).collect()
}

fn names_of<'a, 'd>(all: &'a [Object<'d>]) -> Vec<&'a [Name<'d>]> {
    all.iter().map(|o| &o.names[..]).collect()
}

impl<'a, 'd> Variables<'a, 'd> {
    pub fn new(
        old: &'a Side<'d>,
        new: &'a Side<'d>,
        olds: &'a [Object<'d>],
        news: &'a [Object<'d>],
        names: &mut Names<'d>,
        pick: fn(Target<'d>) -> Option<u32>,
    ) -> Self {
        let users = |side: &Side<'d>, len: usize| {
            let mut users: Vec<Vec<FuncId>> = vec![Vec::new(); len];
            for (id, f) in side.lifted.iter().enumerate() {
                f.refs.iter().filter_map(|r| pick(r.target)).for_each(|o| users[o as usize].push(id as FuncId));
            }
            users.iter_mut().for_each(Vec::dedup);
            users
        };
        let kin = (Kins::new(&names_of(olds), names), Kins::new(&names_of(news), names));
        let keys: [fn(&Kin) -> Key; 3] = [|k| (k.exact, k.file), |k| (k.family, k.file), |k| (k.family, None)];
        Self {
            sides: (old, new),
            all: (olds, news),
            users: (users(old, olds.len()), users(new, news.len())),
            pick,
            groups: keys.map(|key| groups(&kin, names, key)),
            kin,
        }
    }

    /// Whether some function and its new version use the old and the new variable.
    fn meet(&self, pairing: &Pairing, x: u32, y: u32, strict: bool) -> bool {
        let (olds, news) = (&self.users.0[x as usize], &self.users.1[y as usize]);
        if olds.is_empty() && news.is_empty() {
            return !strict; // used through pointers in data only: nothing can tell more
        }
        olds.iter().any(|f| pairing.func_pair(*f).is_some_and(|g| news.binary_search(&g).is_ok()))
    }

    pub fn pair(&self, pairing: &Pairing) -> Pairs {
        let mut pairs: Pairs = (vec![None; self.all.0.len()], vec![None; self.all.1.len()]);
        for (pass, groups) in self.groups.iter().enumerate() {
            for group in groups {
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
        let meeting = Meeting::new(self, pairing, &a, &b, moved);
        for x in &a {
            if let Some(y) = meeting.only_new(*x).filter(|y| meeting.only_old(*y) == Some(*x)) {
                set(*x, y);
            }
        }
    }

    /// Equal numbers, provided that nothing says that the numbering moved: both builds have the same
    /// names, and whoever uses them is the same code and uses them in the same order.
    fn by_number(&self, pairing: &Pairing, group: &Group) -> Vec<(u32, u32)> {
        let names =
            |ids: &[u32], kins: &Kins| -> HashMap<Text, u32> { ids.iter().map(|i| (kins.of(*i)[0].own, *i)).collect() };
        let (olds, news) = (names(&group.0, &self.kin.0), names(&group.1, &self.kin.1));
        let distinct = olds.len() == group.0.len() && news.len() == group.1.len();
        if !distinct || olds.len() != news.len() || !olds.keys().all(|own| news.contains_key(own)) {
            return Vec::new();
        }
        let members: (HashSet<u32>, HashSet<u32>) =
            (group.0.iter().copied().collect(), group.1.iter().copied().collect());
        let same_use = |f: FuncId, g: FuncId| {
            let (x, y) = (&self.sides.0.lifted[f as usize], &self.sides.1.lifted[g as usize]);
            let order = |refs: &[Ref<'d>], ids: &HashSet<u32>, kins: &Kins| -> Vec<Text> {
                let used = refs.iter().filter_map(|r| (self.pick)(r.target)).filter(|o| ids.contains(o));
                used.map(|o| kins.of(o)[0].own).collect()
            };
            x.masked == y.masked && order(&x.refs, &members.0, &self.kin.0) == order(&y.refs, &members.1, &self.kin.1)
        };
        let users: BTreeSet<FuncId> = group.0.iter().flat_map(|x| self.users.0[*x as usize].iter().copied()).collect();
        if users.iter().any(|f| pairing.func_pair(*f).is_some_and(|g| !same_use(*f, g))) {
            return Vec::new();
        }
        let pairs = group.0.iter().map(|x| (*x, news[&self.kin.0.of(*x)[0].own]));
        pairs.filter(|(x, y)| self.meet(pairing, *x, *y, false)).collect()
    }

    /// New variables whose name some unpaired old one has, too: it can't be said which is which.
    pub fn ambiguous(&self, pairing: &Pairing) -> HashSet<String> {
        let gone = |id: &usize| pairing.objects[*id].is_none() && self.all.0[*id].size > 0;
        let gone: HashSet<Text> =
            (0..self.all.0.len()).filter(gone).flat_map(|id| self.kin.0.of(id as u32)).map(|k| k.family).collect();
        (0..self.all.1.len())
            .filter(|id| pairing.objects_back[*id].is_none())
            .filter(|id| self.kin.1.of(*id as u32).iter().any(|k| gone.contains(&k.family)))
            .map(|id| canonical(self.all.1[id].name()))
            .collect()
    }
}

/// Which members of a group meet (see [`Variables::meet`]), without asking for every pair.
struct Meeting<'v, 'a, 'd> {
    variables: &'v Variables<'a, 'd>,
    pairing: &'v Pairing,
    /// The members that each function uses, old and new.
    used: (HashMap<FuncId, Vec<u32>>, HashMap<FuncId, Vec<u32>>),
    /// Members that no function uses; none where these do not meet.
    unused: (Vec<u32>, Vec<u32>),
}

impl<'v, 'a, 'd> Meeting<'v, 'a, 'd> {
    fn new(variables: &'v Variables<'a, 'd>, pairing: &'v Pairing, a: &[u32], b: &[u32], strict: bool) -> Self {
        let used = |ids: &[u32], users: &[Vec<FuncId>]| {
            let mut used: HashMap<FuncId, Vec<u32>> = HashMap::new();
            for id in ids {
                users[*id as usize].iter().for_each(|f| used.entry(*f).or_default().push(*id));
            }
            used
        };
        let unused = |ids: &[u32], users: &[Vec<FuncId>]| {
            ids.iter().copied().filter(|id| !strict && users[*id as usize].is_empty()).collect()
        };
        let (olds, news) = (&variables.users.0, &variables.users.1);
        Self { variables, pairing, used: (used(a, olds), used(b, news)), unused: (unused(a, olds), unused(b, news)) }
    }

    /// The one new variable that an old one meets; `None` if it is none or several.
    fn only_new(&self, x: u32) -> Option<u32> {
        let users = &self.variables.users.0[x as usize];
        if users.is_empty() {
            return only(self.unused.1.iter().copied());
        }
        let news = users.iter().filter_map(|f| {
            let g = self.pairing.func_pair(*f)?;
            let all = self.used.1.get(&g)?;
            Some(self.in_place(*f, g, x, false).unwrap_or_else(|| all.clone()))
        });
        only(news.flatten())
    }

    /// What the same code, old and new, uses in the place of a variable; `None` if the code differs.
    fn in_place(&self, f: FuncId, g: FuncId, id: u32, is_new: bool) -> Option<Vec<u32>> {
        let (old, new) = self.variables.sides;
        let (x, y) = (&old.lifted[f as usize], &new.lifted[g as usize]);
        let pick = self.variables.pick;
        (x.masked == y.masked && x.refs.len() == y.refs.len()).then(|| {
            let picked = x.refs.iter().zip(&y.refs).map(|(r, s)| (pick(r.target), pick(s.target)));
            let there = picked.map(|(o, n)| if is_new { (n, o) } else { (o, n) });
            there.filter(|(from, _)| *from == Some(id)).filter_map(|(_, to)| to).collect()
        })
    }

    /// The one old variable that a new one meets.
    fn only_old(&self, y: u32) -> Option<u32> {
        let users = &self.variables.users.1[y as usize];
        if users.is_empty() {
            return only(self.unused.0.iter().copied());
        }
        let olds = users.iter().flat_map(|g| self.pairing.func_olds(*g).iter().map(move |f| (*f, *g)));
        let olds = olds.filter_map(|(f, g)| {
            let all = self.used.0.get(&f)?;
            Some(self.in_place(f, g, y, true).unwrap_or_else(|| all.clone()))
        });
        only(olds.flatten())
    }
}

/// What all of them are; stops at the second.
fn only(mut of: impl Iterator<Item = u32>) -> Option<u32> {
    let first = of.next()?;
    of.all(|other| other == first).then_some(first)
}
