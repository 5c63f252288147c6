//! Functions: by exact names first, then within families by what tells their members apart.

use std::collections::{BTreeSet, HashMap, HashSet};

use super::family::{Key, Kin, Kins, Names, Text};
use crate::build::{Build, FastMap, FuncId};
use crate::compare::{Comparer, LineProof};
use crate::lift::Target;
use crate::pairing::Pairing;
use crate::side::Side;

/// More than a few candidates of one name are not worth a quadratic search.
const CANDIDATES: usize = 32;

/// One family in both builds.
#[derive(Default)]
struct Members {
    key: Key,
    olds: Vec<FuncId>,
    news: Vec<FuncId>,
}

/// The functions of both builds by name.
pub struct Functions<'a, 'd> {
    old: &'a Side<'d>,
    new: &'a Side<'d>,
    kin: &'a (Kins, Kins),
    names: &'a Names<'d>,
    /// Families within one source file, then families whatever the file.
    families: [Vec<Members>; 2],
}

impl<'a, 'd> Functions<'a, 'd> {
    pub fn new(old: &'a Side<'d>, new: &'a Side<'d>, kin: &'a (Kins, Kins), names: &'a Names<'d>) -> Self {
        let group = |with_file: bool| {
            let mut index: FastMap<Key, usize> = FastMap::default();
            let mut out: Vec<Members> = Vec::new();
            for (kins, is_old) in [(&kin.0, true), (&kin.1, false)] {
                for (id, k) in kins.iter().filter_map(|(id, k)| Some((id, k.first()?))) {
                    let key = (k.family, k.file.filter(|_| with_file));
                    let at = *index.entry(key).or_insert(out.len());
                    if at == out.len() {
                        out.push(Members { key, ..Members::default() });
                    }
                    if is_old { &mut out[at].olds } else { &mut out[at].news }.push(id);
                }
            }
            out
        };
        let (with_file, without) = rayon::join(|| group(true), || group(false));
        Self { old, new, kin, names, families: [with_file, without] }
    }

    /// Pairs whoever is alone with an exact name.
    pub fn exact(&self, pairing: &mut Pairing) {
        type Group<'d> = (Vec<(FuncId, &'d str)>, Vec<(FuncId, &'d str)>);
        let mut groups: FastMap<Key, Group<'d>> = FastMap::default();
        for (side, kins, is_old) in [(self.old, &self.kin.0, true), (self.new, &self.kin.1, false)] {
            for (id, all) in kins.iter() {
                for (name, k) in side.build.func(id).names.iter().zip(all) {
                    let group = groups.entry((k.exact, k.file)).or_default();
                    if is_old { &mut group.0 } else { &mut group.1 }.push((id, unpromoted(name.text)));
                }
            }
        }
        // Groups of several in which both builds have the same names, each once.
        let same_texts: FastMap<Key, FastMap<&str, FuncId>> = groups
            .iter()
            .filter(|(_, (a, b))| a.len() > 1 && a.len() == b.len())
            .filter_map(|(key, (a, b))| {
                let olds: HashSet<&str> = a.iter().map(|(_, text)| *text).collect();
                let news: FastMap<&str, FuncId> = b.iter().map(|(id, text)| (*text, *id)).collect();
                let same = olds.len() == a.len() && news.len() == b.len() && olds.iter().all(|t| news.contains_key(t));
                same.then_some((*key, news))
            })
            .collect();
        for (id, all) in self.kin.0.iter() {
            let mut found: Option<FuncId> = None;
            for (name, k) in self.old.build.func(id).names.iter().zip(all) {
                let key = (k.exact, k.file);
                let Some((a, b)) = groups.get(&key) else { continue };
                let new_id = match (&a[..], &b[..]) {
                    ([_], [(n, text)]) if *text == unpromoted(name.text) => *n,
                    // Instances of a generic function; closures are numbered by their hashes, too.
                    _ if k.legacy && !name.text.contains("closure") => {
                        let Some(n) = same_texts.get(&key).and_then(|news| news.get(unpromoted(name.text))) else {
                            continue;
                        };
                        *n
                    }
                    _ => continue,
                };
                match found {
                    None => found = Some(new_id),
                    Some(first) if first != new_id => pairing.splits.push((id, first, new_id)),
                    Some(_) => {}
                }
            }
            if let Some(new_id) = found {
                pairing.set_func(id, new_id);
            }
        }
    }

    /// Start-up functions of one name (compilers name them after the last part of a file's path): by their places in the array that runs
    /// them. A wrong guess finds other bodies, and is refused.
    pub fn start_up(&self, pairing: &mut Pairing) {
        let (olds, news) = (self.old.start_up(), self.new.start_up());
        if olds.len() != news.len() {
            return;
        }
        for (x, y) in olds.into_iter().zip(news) {
            let (Target::Func(f, 0), Target::Func(g, 0)) = (x, y) else { continue };
            let name = |side: &Side<'d>, id| side.build.func(id).names.first().map(|n| n.text);
            let free = pairing.func_pair(f).is_none() && pairing.func_olds(g).is_empty();
            if free && name(self.old, f) == name(self.new, g) {
                pairing.set_func(f, g);
            }
        }
    }

    /// What exact names left: numbered names, several copies of one name, names whose hashes differ.
    pub fn families(&self, pairing: &mut Pairing) {
        for (families, with_file) in self.families.iter().zip([true, false]) {
            let open = |m: &&Members| !m.news.is_empty() && m.olds.iter().any(|f| pairing.func_pair(*f).is_none());
            let mut open: Vec<&Members> = families.iter().filter(open).collect();
            open.sort_by_key(|m| self.names.order(m.key));
            for members in open {
                let family = Family { old: self.old, new: self.new, kin: self.kin, members, with_file };
                for (f, g) in family.pairs(pairing) {
                    pairing.set_func(f, g);
                }
            }
        }
    }

    /// Old functions without new version, while functions without old version go by their name.
    pub fn ambiguous(&self, pairing: &Pairing) -> Vec<(FuncId, String)> {
        let mut families: FastMap<Text, Vec<FuncId>> = FastMap::default();
        for (id, kins) in self.kin.1.iter().filter(|(id, _)| pairing.func_olds(*id).is_empty()) {
            kins.iter().for_each(|k| families.entry(k.family).or_default().push(id));
        }
        let mut comparer = Comparer::new(self.old, self.new, pairing, LineProof::None);
        let mut out = Vec::new();
        for (id, kins) in self.kin.0.iter().filter(|(id, _)| pairing.func_pair(*id).is_none()) {
            let rivals = kins.iter().filter_map(|k| families.get(&k.family)).flatten();
            // Its own body under a new name: the old one can go on.
            if rivals.clone().next().is_some() && !rivals.take(CANDIDATES).any(|g| comparer.func_bodies(id, *g)) {
                out.push((id, self.old.build.func(id).name().to_owned()));
            }
        }
        out
    }
}

struct Family<'a, 'd> {
    old: &'a Side<'d>,
    new: &'a Side<'d>,
    kin: &'a (Kins, Kins),
    members: &'a Members,
    with_file: bool,
}

impl Family<'_, '_> {
    fn first(&self, f: FuncId) -> &Kin {
        &self.kin.0.of(f)[0]
    }

    fn own_name(&self, f: FuncId, g: FuncId) -> bool {
        self.first(f).own == self.kin.1.of(g)[0].own
    }

    /// Whether some caller and its new version refer to the old and the new function.
    fn meet(&self, pairing: &Pairing, f: FuncId, g: FuncId) -> bool {
        let news = self.new.callers(g);
        self.old.callers(f).iter().any(|h| pairing.func_pair(*h).is_some_and(|i| news.binary_search(&i).is_ok()))
    }

    /// Whether some caller, with the same code in both builds, refers to the old and to the new function in one place.
    fn meet_in_place(&self, pairing: &Pairing, f: FuncId, g: FuncId) -> bool {
        self.old.callers(f).iter().any(|h| {
            let Some(i) = pairing.func_pair(*h) else { return false };
            let (x, y) = (&self.old.lifted[*h as usize], &self.new.lifted[i as usize]);
            let is = |t: Target<'_>, id| matches!(t, Target::Func(to, 0) if to == id);
            x.masked == y.masked
                && x.refs.len() == y.refs.len()
                && x.refs.iter().zip(&y.refs).any(|(r, s)| is(r.target, f) && is(s.target, g))
        })
    }

    /// Whether some members differ by nothing but a number.
    fn is_numbered(&self) -> bool {
        let numbered = |ids: &[FuncId], kins: &Kins| {
            let mut seen: HashMap<Text, Text> = HashMap::new();
            ids.iter().any(|id| {
                let k = &kins.of(*id)[0];
                *seen.entry(k.exact).or_insert(k.own) != k.own
            })
        };
        numbered(&self.members.olds, &self.kin.0) || numbered(&self.members.news, &self.kin.1)
    }

    fn pairs(&self, pairing: &Pairing) -> Vec<(FuncId, FuncId)> {
        let Members { olds: all_olds, news: all_news, .. } = self.members;
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
        let mut candidates = Candidates::new(&news, &self.kin.1);
        for &f in &olds {
            let own = self.first(f).own;
            match candidates.of(own).into_iter().find(|g| comparer.func_bodies(f, *g)) {
                Some(g) => {
                    candidates.take(g, self.kin.1.of(g)[0].own);
                    pairs.push((f, g));
                }
                None => left.push(f),
            }
        }
        self.by_code_that_moved(pairing, &mut candidates, &mut left, &mut pairs);
        let free: Vec<FuncId> = news.into_iter().filter(|g| !candidates.taken.contains(g) && free(g)).collect();
        let alone = self.with_file && (all_olds.len(), all_news.len()) == (1, 1);
        match (&left[..], &free[..]) {
            ([f], [g]) if alone => pairs.push((*f, *g)),
            ([f], [g]) if self.is_numbered() => {
                // The number proves something once everybody else has kept theirs.
                let found: HashMap<FuncId, FuncId> = pairs.iter().copied().collect();
                let kept = |e: &FuncId| {
                    let known = found.get(e).copied().or(pairing.func_pair(*e));
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
            _ if self.with_file && left.len() == free.len() && left.len() <= CANDIDATES => {
                let meets = |f: FuncId| free.iter().copied().filter(move |g| self.meet_in_place(pairing, f, *g));
                for f in &left {
                    let mut met = meets(*f);
                    let (Some(g), None) = (met.next(), met.next()) else { continue };
                    if left.iter().all(|e| e == f || !self.meet_in_place(pairing, *e, g)) {
                        pairs.push((*f, g));
                    }
                }
                self.by_own_names(&left, &free, &mut pairs);
            }
            _ => self.by_own_names(&left, &free, &mut pairs),
        }
        pairs
    }

    /// Numbered functions that only moved: their code differs in the lines where it may panic.
    fn by_code_that_moved(
        &self,
        pairing: &Pairing,
        candidates: &mut Candidates,
        left: &mut Vec<FuncId>,
        pairs: &mut Vec<(FuncId, FuncId)>,
    ) {
        if left.is_empty() || !self.is_numbered() {
            return;
        }
        let mut comparer = Comparer::new(self.old, self.new, pairing, LineProof::Locations);
        left.retain(|f| {
            let own = self.first(*f).own;
            let found = candidates.of(own).into_iter().find(|g| comparer.func_bodies(*f, *g));
            if let Some(g) = found {
                candidates.take(g, self.kin.1.of(g)[0].own);
                pairs.push((*f, g));
            }
            found.is_none()
        });
    }

    /// Pairs those that are alone with their whole name, if there are as many as before.
    fn by_own_names(&self, left: &[FuncId], free: &[FuncId], pairs: &mut Vec<(FuncId, FuncId)>) {
        if !self.with_file || self.members.olds.len() != self.members.news.len() {
            return;
        }
        let mut rivals: HashMap<Text, usize> = HashMap::new();
        left.iter().for_each(|f| *rivals.entry(self.first(*f).own).or_default() += 1);
        let mut named: HashMap<Text, Vec<FuncId>> = HashMap::new();
        free.iter().for_each(|g| named.entry(self.kin.1.of(*g)[0].own).or_default().push(*g));
        for f in left {
            let own = self.first(*f).own;
            if let (Some([g]), 1) = (named.get(&own).map(Vec::as_slice), rivals[&own]) {
                if !pairs.iter().any(|(old, new)| old == f || new == g) {
                    pairs.push((*f, *g));
                }
            }
        }
    }
}

/// New members of a family in the order in which they are tried: those of the old one's own name, those that
/// nobody has, by number.
struct Candidates {
    by_name: HashMap<Text, Named>,
    /// Those that nobody has.
    untaken: BTreeSet<FuncId>,
    taken: HashSet<FuncId>,
}

#[derive(Default)]
struct Named {
    untaken: BTreeSet<FuncId>,
    taken: BTreeSet<FuncId>,
}

impl Candidates {
    fn new(news: &[FuncId], kins: &Kins) -> Self {
        let mut by_name: HashMap<Text, Named> = HashMap::new();
        for g in news {
            by_name.entry(kins.of(*g)[0].own).or_default().untaken.insert(*g);
        }
        Self { by_name, untaken: news.iter().copied().collect(), taken: HashSet::new() }
    }

    /// The first few to try for an old function of this name. What somebody has is tried only under its own name.
    fn of(&self, own: Text) -> Vec<FuncId> {
        let named = self.by_name.get(&own);
        let own = named.into_iter().flat_map(|n| n.untaken.iter().chain(&n.taken));
        let others = self.untaken.iter().filter(|g| !named.is_some_and(|n| n.untaken.contains(g)));
        own.chain(others).copied().take(CANDIDATES).collect()
    }

    fn take(&mut self, g: FuncId, own: Text) {
        self.untaken.remove(&g);
        self.taken.insert(g);
        if let Some(named) = self.by_name.get_mut(&own) {
            named.untaken.remove(&g);
            named.taken.insert(g);
        }
    }
}

/// Whether the name is a Rust symbol that codegen units may hold several copies of.
fn is_copied(build: &Build<'_>, id: FuncId) -> bool {
    let name = build.func(id).name();
    build.rust && (name.starts_with("_R") || name.starts_with("_ZN"))
}

/// A name without what link-time optimisation appends when it lets another unit see it: the unit, which is not the function's own.
fn unpromoted(name: &str) -> &str {
    name.split_once(".llvm.").map_or(name, |(own, _)| own)
}
