//! Why a function is in the patch.
//!
//! With both source texts the answer is the text's. Without, the line tables say in which function, own or inlined, lines
//! came or went; without that, in which one instructions other than moves differ. Each answer says which of the
//! three it rests on.

use std::collections::{BTreeMap, BTreeSet};

use similar::{capture_diff_slices, Algorithm, DiffOp};

use super::code::{instructions, Ins};
use super::source::{excerpt, extent, hunk, place, slice, Sources, Texts};
use super::values::{numbers, value};
use super::Both;
use crate::build::{canonical, demangle, FuncId, Inlined, Scope, Scopes, SourceLine};
use crate::compare::{describe, Comparer, LineProof};
use crate::lift::{Access, Ref, Target};
use crate::report::{Difference, Evidence, Why};
use crate::side::Side;

/// So many functions get reasons of their own; a patch of more is read by nobody.
pub(super) const MAX_EXPLAINED: usize = 1000;
/// So many types are named as a reason.
const MAX_LAYOUTS: usize = 4;
/// Two versions are aligned if the product of their lengths is below this; else one stands for the other as a whole.
const MAX_ALIGNED: usize = 100_000_000;

/// What is said of one function.
#[derive(Default)]
pub(super) struct Answer {
    pub why: Vec<Why>,
    pub difference: Option<Difference>,
    pub hunk: Option<String>,
    pub hunk_note: Option<String>,
}

/// What the DWARF of both builds says of the functions at hand.
pub(super) struct Asker<'a, 'd> {
    pub both: &'a Both<'a, 'd>,
    pub scopes: (Scopes, Scopes),
    pub sources: Sources<'a>,
}

/// One version of one function.
#[derive(Clone, Copy)]
struct Version<'a, 'd> {
    side: &'a Side<'d>,
    id: FuncId,
    scopes: &'a Scopes,
    scope: Option<&'a Scope>,
}

impl<'a, 'd> Version<'a, 'd> {
    fn of(side: &'a Side<'d>, id: FuncId, scopes: &'a Scopes) -> Self {
        Self { side, id, scopes, scope: scopes.at(side.build.func(id).addr) }
    }

    fn start(&self) -> u64 {
        self.side.build.func(self.id).addr
    }

    fn line(&self, ins: &Ins) -> Option<SourceLine> {
        self.scope?.line(self.start() + u64::from(ins.at))
    }

    fn place(&self, line: SourceLine) -> Option<String> {
        place(self.scopes.file(line), line)
    }
}

/// The code of one function within another, or of that itself, in both versions.
#[derive(Default)]
struct Frame {
    /// How often each shape of instruction occurs: new minus old.
    shapes: BTreeMap<String, i64>,
    /// Whether an instruction other than a move differs.
    telling: bool,
    /// The lines of each version, counted from the declaration.
    lines: [BTreeSet<i64>; 2],
    declared: [Option<SourceLine>; 2],
    called: [Option<SourceLine>; 2],
    seen: [bool; 2],
}

impl Frame {
    fn differs(&self) -> bool {
        self.shapes.values().any(|n| *n != 0) || self.seen[0] != self.seen[1]
    }

    /// Whether lines came or went, with more than the compiler's choice of lines in it.
    fn lines_differ(&self) -> bool {
        let span = |lines: &BTreeSet<i64>| lines.last().zip(lines.first()).map(|(a, b)| a - b);
        self.seen == [true, true] && self.differs() && span(&self.lines[0]) != span(&self.lines[1])
    }
}

/// The frames of a function by symbol; its own is `None`.
type Frames = BTreeMap<Option<String>, Frame>;

impl<'a, 'd> Asker<'a, 'd> {
    /// Reads what is needed of the DWARF of both builds.
    pub(super) fn new(both: &'a Both<'a, 'd>) -> Self {
        let range = |side: &Side<'_>, id: FuncId| (side.build.func(id).addr, side.build.func(id).size);
        let carried = || both.selection.functions.values().take(MAX_EXPLAINED);
        let olds: Vec<_> = carried().flat_map(|c| &c.olds).map(|f| range(both.old, *f)).collect();
        let news: Vec<_> = carried().map(|c| range(both.new, c.new)).collect();
        let scopes = rayon::join(|| Scopes::load(both.bytes.0, &olds), || Scopes::load(both.bytes.1, &news));
        Self { both, scopes, sources: Sources::new(both.sources.0, both.sources.1) }
    }

    /// Why a new function is in the patch.
    pub(super) fn new_function(&self, g: FuncId) -> Answer {
        let both = self.both;
        let needs = both.new.callers(g).iter().filter(|c| **c != g && both.selection.functions.contains_key(c));
        let why = needs.map(|c| Why::NeededBy { function: demangle(both.new.build.func(*c).name()) }).take(8).collect();
        Answer { why, ..Answer::default() }
    }

    /// Why a changed function is in the patch.
    pub(super) fn changed(&self, f: FuncId, g: FuncId) -> Answer {
        let both = self.both;
        let (a, b) = (Version::of(both.old, f, &self.scopes.0), Version::of(both.new, g, &self.scopes.1));
        let mut out = Answer::default();
        let (x, y) = (instructions(both.old, f), instructions(both.new, g));
        let ops = align(&x, &y);
        let pairs = replaced(&ops, &x, &y);
        let references = self.references(a, b, &x, &y, &ops);
        let frames = frames(a, b, &x, &y);
        let same_text = self.blame(&frames, (a, b), &mut out);
        // One that differs in more than registers and stack slots.
        let telling = pairs.iter().find(|(i, j)| x[*i].shape != y[*j].shape && !x[*i].plumbing);
        out.difference = telling.map(|(i, j)| Difference {
            old: x[*i].text.clone(),
            new: y[*j].text.clone(),
            at: b.line(&y[*j]).and_then(|l| b.place(l)),
        });
        let differing: Vec<&Ins> = added(&ops, &y, &surplus(&frames));
        self.source_lines((a, b), &differing, &mut out);
        let layouts = both.layouts.get(&g).map_or(&[][..], Vec::as_slice);
        if !layouts.is_empty() {
            // Other offsets look like another source.
            let by_code = |w: &Why| {
                matches!(
                    w,
                    Why::Source { evidence: Evidence::Code, .. } | Why::Inlined { evidence: Evidence::Code, .. }
                )
            };
            out.why.retain(|w| !by_code(w));
            out.why.extend(layouts.iter().take(MAX_LAYOUTS).map(|name| Why::Layout { name: name.clone() }));
        }
        let explained = !references.is_empty();
        out.why.extend(references);
        if !out.why.iter().any(|w| matches!(w, Why::Source { .. } | Why::Layout { .. })) {
            out.why.extend(numbers_of(&pairs, &x, &y, b));
        }
        if out.why.is_empty() && !explained {
            let telling = frames.values().any(|f| f.telling && f.differs());
            let known = a.scope.is_some() && b.scope.is_some();
            out.why.push(match (known, telling) {
                _ if same_text => Why::CodeGeneration { evidence: Evidence::Text },
                (_, false) => Why::CodeGeneration { evidence: Evidence::Code },
                (true, true) => Why::CodeGeneration { evidence: Evidence::Lines },
                (false, true) => Why::Unknown {
                    reason: "its code differs, and without debug information it can't be told why".into(),
                },
            });
        }
        let base = |side: &Side<'_>, id: FuncId| demangle(side.build.func(id).name());
        let name = base(both.new, g);
        for suffix in [".constprop.", ".isra.", ".part."] {
            if let Some(at) = name.find(suffix) {
                out.why.push(Why::Clone { of: name[..at].to_owned(), suffix: suffix.trim_matches('.').to_owned() });
                break;
            }
        }
        out
    }

    /// What it refers to that differs.
    fn references(&self, a: Version<'a, 'd>, b: Version<'a, 'd>, x: &[Ins], y: &[Ins], ops: &[DiffOp]) -> Vec<Why> {
        let both = self.both;
        let proof = LineProof::Tables(&both.found.lines.0, &both.found.lines.1);
        let mut comparer = Comparer::new(both.old, both.new, both.pairing, proof);
        let (p, q) = (&both.old.lifted[a.id as usize], &both.new.lifted[b.id as usize]);
        // Instructions that stand for each other: all, if nothing but references differs.
        let twins: Vec<(usize, usize)> = if p.masked == q.masked && x.len() == y.len() {
            (0..x.len()).zip(0..y.len()).collect()
        } else {
            ops.iter().flat_map(|op| op.old_range().zip(op.new_range())).collect()
        };
        let mut pairs: Vec<(Ref<'d>, Ref<'d>, usize, usize)> = Vec::new();
        for (i, j) in twins {
            let word = |ins: &Ins| ins.shape.split(' ').next().map(str::to_owned);
            if x[i].refs.len() == y[j].refs.len() && word(&x[i]) == word(&y[j]) {
                let (r, s) = (x[i].refs.clone(), y[j].refs.clone());
                pairs.extend(p.refs[r].iter().zip(&q.refs[s]).map(|(r, s)| (*r, *s, i, j)));
            }
        }
        let mut out: BTreeSet<Why> = BTreeSet::new();
        for (r, s, i, j) in pairs {
            if comparer.targets(r.target, s.target, r.access) {
                continue;
            }
            let (old, new) = (describe(both.old, r.target), describe(both.new, s.target));
            let is_code = |t: Target<'_>| matches!(t, Target::Func(..) | Target::Plt(_) | Target::Slot(_));
            if is_code(r.target) || is_code(s.target) {
                if old != new {
                    out.insert(Why::Reference { old, new });
                }
                continue;
            }
            let unnamed = |t: Target<'_>| matches!(t, Target::Data(_));
            if !unnamed(r.target) && !unnamed(s.target) && old != new {
                out.insert(Why::Reference { old, new });
                continue;
            }
            // A switch table differs whenever the function does.
            if matches!((r.target, s.target), (Target::Data(t), Target::Data(u)) if both.old.is_table_entry(t) && both.new.is_table_entry(u))
            {
                continue;
            }
            let name = if unnamed(s.target) { "a constant".to_owned() } else { new };
            let (old, new) = match (r.target, s.target) {
                (Target::Data(_), Target::Data(_)) if matches!(r.access, Access::Exact(_)) => {
                    (x[i].operand(), y[j].operand())
                }
                (Target::Object(o, _), Target::Object(n, _)) => super::values::objects(both.old, o, both.new, n),
                _ => (value(both.old, r.target, r.access), value(both.new, s.target, s.access)),
            };
            out.insert(Why::Constant { name, old, new });
        }
        out.into_iter().collect()
    }

    /// Which source changed: its own or an inlined function's. Whether all their texts are at hand and the same.
    fn blame(&self, frames: &Frames, (a, b): (Version<'a, 'd>, Version<'a, 'd>), out: &mut Answer) -> bool {
        if a.scope.is_none() || b.scope.is_none() {
            return false;
        }
        let declared = |frame: &Frame, key: &Option<String>| match key {
            None => [a.scope.and_then(|s| s.declared), b.scope.and_then(|s| s.declared)],
            Some(_) => frame.declared,
        };
        let mut by_text = Vec::new();
        let mut all_known = true;
        for (key, frame) in frames {
            match self.text_changed(declared(frame, key)) {
                Some(true) => by_text.push(key),
                Some(false) => {}
                None => all_known = false,
            }
        }
        let said = |key: &Option<String>, evidence| self.said(key, &frames[key], (a, b), evidence);
        if !by_text.is_empty() {
            out.why.extend(by_text.into_iter().map(|key| said(key, Evidence::Text)));
            return false;
        }
        if all_known {
            return true;
        }
        // A crate of the registry has its version in its path.
        let pinned = |f: &&Frame| {
            let path = |scopes: &Scopes, l: Option<SourceLine>| l.and_then(|l| scopes.file(l)).map(|f| f.path.clone());
            let (old, new) = (path(&self.scopes.0, f.declared[0]), path(&self.scopes.1, f.declared[1]));
            old == new && new.is_some_and(|p| p.contains("/registry/src/"))
        };
        let frames: BTreeMap<_, _> = frames.iter().filter(|(k, f)| k.is_none() || !pinned(f)).collect();
        let by_lines: Vec<_> = frames.iter().filter(|(_, f)| f.lines_differ()).map(|(k, _)| *k).collect();
        if !by_lines.is_empty() {
            out.why.extend(by_lines.into_iter().map(|key| said(key, Evidence::Lines)));
            return false;
        }
        let mut by_code: Vec<_> = frames.iter().filter(|(_, f)| f.differs() && f.telling).map(|(k, _)| *k).collect();
        // What is only in one version was taken in or left out by the compiler, or is called from a changed line.
        let both_have = |k: &Option<String>| frames[&k].seen == [true, true];
        if by_code.iter().any(|k| both_have(k)) {
            by_code.retain(|k| both_have(k));
        } else if by_code.iter().any(|k| k.is_some()) {
            by_code = vec![&None];
        }
        out.why.extend(by_code.into_iter().map(|key| said(key, Evidence::Code)));
        false
    }

    fn said(
        &self,
        key: &Option<String>,
        frame: &Frame,
        (a, b): (Version<'a, 'd>, Version<'a, 'd>),
        evidence: Evidence,
    ) -> Why {
        let at = |line: Option<SourceLine>, v: Version<'_, '_>| line.and_then(|l| v.place(l));
        match key {
            None => Why::Source { at: at(b.scope.and_then(|s| s.declared), b), evidence },
            Some(symbol) => Why::Inlined {
                callee: symbol.clone(),
                called_at: at(frame.called[1], b).or_else(|| at(frame.called[0], a)),
                declared_at: at(frame.declared[1], b).or_else(|| at(frame.declared[0], a)),
                evidence,
            },
        }
    }

    fn texts(&self, declared: [Option<SourceLine>; 2]) -> Texts {
        let old = declared[0].and_then(|l| self.scopes.0.file(l));
        self.sources.texts(old, declared[1].and_then(|l| self.scopes.1.file(l)))
    }

    /// Whether the text of a function changed, if both texts are at hand.
    fn text_changed(&self, declared: [Option<SourceLine>; 2]) -> Option<bool> {
        let Texts::Both(old, new) = self.texts(declared) else { return None };
        let (from, to) = (extent(&old, declared[0]?.line)?, extent(&new, declared[1]?.line)?);
        let (a, b) = (slice(&old, from), slice(&new, to));
        Some(a.len() != b.len() || a.iter().zip(b).any(|(l, m)| l.trim_end() != m.trim_end()))
    }

    /// The hunk, or what there is of it.
    fn source_lines(&self, (a, b): (Version<'a, 'd>, Version<'a, 'd>), differing: &[&Ins], out: &mut Answer) {
        let mut declared = vec![[a.scope.and_then(|s| s.declared), b.scope.and_then(|s| s.declared)]];
        // The hunk of an inlined function says more than the unchanged text of this one.
        for why in &out.why {
            if let Why::Inlined { callee, .. } = why {
                let of = |v: Version<'_, '_>| v.scope?.inlined.iter().find(|i| symbol(&i.symbol) == *callee)?.declared;
                declared.push([of(a), of(b)]);
            }
        }
        let mut hunks = Vec::new();
        for places in &declared {
            let ([Some(old_line), Some(new_line)], Texts::Both(old, new)) = (*places, self.texts(*places)) else {
                continue;
            };
            let (Some(from), Some(to)) = (extent(&old, old_line.line), extent(&new, new_line.line)) else { continue };
            if let Some(h) = hunk((slice(&old, from), from.0), (slice(&new, to), to.0)) {
                let name = |s: &Scopes, l| s.file(l).map_or(String::new(), |f| f.path.clone());
                hunks.push(format!(
                    "--- {}\n+++ {}\n{h}",
                    name(&self.scopes.0, old_line),
                    name(&self.scopes.1, new_line)
                ));
            }
        }
        if !hunks.is_empty() {
            out.hunk = Some(hunks.join("\n"));
            return;
        }
        match self.texts(declared[0]) {
            Texts::Both(..) => {
                out.hunk_note = Some("the text of the function itself is the same in both builds".into())
            }
            Texts::None(why) => out.hunk_note = Some(why),
            Texts::New(text) => {
                let own_file = declared[0][1].map(|l| l.file);
                let mut lines: Vec<u32> = differing
                    .iter()
                    .filter_map(|i| b.line(i).filter(|l| Some(l.file) == own_file).map(|l| l.line))
                    .collect();
                lines.sort_unstable();
                lines.dedup();
                out.hunk = excerpt(&text, &lines);
                out.hunk_note = Some(
                    "the text of the old build is not at hand (--old-source DIR): lines of the new one whose code differs".into(),
                );
            }
        }
    }
}

/// A symbol as it is shown and compared: readable, without what differs from build to build.
fn symbol(name: &str) -> String {
    let canonical = canonical(name);
    if canonical == name {
        demangle(name)
    } else {
        canonical
    }
}

/// Aligns two versions by what their instructions mean.
pub(super) fn align(x: &[Ins], y: &[Ins]) -> Vec<DiffOp> {
    if x.len().saturating_mul(y.len()) > MAX_ALIGNED {
        return vec![DiffOp::Replace { old_index: 0, old_len: x.len(), new_index: 0, new_len: y.len() }];
    }
    let key = |list: &[Ins]| list.iter().map(|i| i.text.clone()).collect::<Vec<_>>();
    capture_diff_slices(Algorithm::Myers, &key(x), &key(y))
}

/// Instructions that stand in the same place of a difference, with the same mnemonic.
fn replaced(ops: &[DiffOp], x: &[Ins], y: &[Ins]) -> Vec<(usize, usize)> {
    let word = |i: &Ins| i.text.split(' ').next().unwrap_or("").to_owned();
    ops.iter()
        .filter(|op| matches!(op, DiffOp::Replace { .. }))
        .flat_map(|op| op.old_range().zip(op.new_range()))
        .filter(|(i, j)| word(&x[*i]) == word(&y[*j]))
        .collect()
}

/// Numbers that differ in otherwise equal instructions.
fn numbers_of<'x>(
    pairs: &'x [(usize, usize)],
    x: &'x [Ins],
    y: &'x [Ins],
    b: Version<'x, '_>,
) -> impl Iterator<Item = Why> + 'x {
    let place = move |j: usize| b.line(&y[j]).and_then(|l| b.place(l));
    let found: BTreeSet<Why> = pairs
        .iter()
        .filter(|(i, j)| !x[*i].plumbing && x[*i].shape != y[*j].shape)
        .filter_map(|(i, j)| {
            let (old, new) = numbers(&x[*i].text, &y[*j].text)?;
            let name =
                place(*j).map_or_else(|| "a number in its code".into(), |at| format!("a number in the code of {at}"));
            Some(Why::Constant { name, old: Some(old), new: Some(new) })
        })
        .collect();
    found.into_iter().take(4)
}

/// The instructions that the new version has more of, in the function itself or in one that is inlined there.
fn surplus(frames: &Frames) -> BTreeSet<&str> {
    frames.values().flat_map(|f| &f.shapes).filter(|(_, n)| **n > 0).map(|(shape, _)| shape.as_str()).collect()
}

/// Instructions of the new version that are not in the old one: by alignment, and by count.
fn added<'y>(ops: &[DiffOp], y: &'y [Ins], surplus: &BTreeSet<&str>) -> Vec<&'y Ins> {
    ops.iter()
        .filter(|op| !matches!(op, DiffOp::Equal { .. }))
        .flat_map(|op| &y[op.new_range()])
        .filter(|i| !i.plumbing && surplus.contains(i.shape.as_str()))
        .collect()
}

/// Whether a function came with the compiler: what differs there differs by what is asked of it.
fn is_toolchain(scopes: &Scopes, inlined: &Inlined) -> bool {
    inlined.declared.and_then(|l| scopes.file(l)).is_some_and(|f| {
        ["/usr/include/", "/usr/lib/", "/rustc/"].iter().any(|p| f.path.starts_with(p))
            || ["/rustlib/src/", "/include/c++/"].iter().any(|p| f.path.contains(p))
    })
}

/// Sorts the instructions of both versions by the function they come from.
fn frames(a: Version<'_, '_>, b: Version<'_, '_>, x: &[Ins], y: &[Ins]) -> Frames {
    let mut out = Frames::new();
    out.entry(None).or_default();
    for (which, (v, list)) in [(a, x), (b, y)].into_iter().enumerate() {
        for ins in list {
            let addr = v.start() + u64::from(ins.at);
            let inlined =
                v.scope.and_then(|s| s.inlined_at(addr, |i| !is_toolchain(v.scopes, i)).map(|i| &s.inlined[i]));
            let frame = out.entry(inlined.map(|i| symbol(&i.symbol))).or_default();
            let declared = inlined.map_or_else(|| v.scope.and_then(|s| s.declared), |i| i.declared);
            frame.seen[which] = true;
            frame.declared[which] = frame.declared[which].or(declared);
            frame.called[which] = frame.called[which].or(inlined.and_then(|i| i.called));
            if let (Some(line), Some(declared)) = (v.line(ins), declared) {
                if line.file == declared.file && line.line > 0 {
                    frame.lines[which].insert(i64::from(line.line) - i64::from(declared.line));
                }
            }
            *frame.shapes.entry(ins.shape.clone()).or_default() += if which == 0 { -1 } else { 1 };
        }
    }
    let plumbing: BTreeSet<&str> = x.iter().chain(y).filter(|i| i.plumbing).map(|i| i.shape.as_str()).collect();
    for frame in out.values_mut() {
        frame.telling = frame.shapes.iter().any(|(shape, n)| *n != 0 && !plumbing.contains(shape.as_str()));
    }
    out
}
