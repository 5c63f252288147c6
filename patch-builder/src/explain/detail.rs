//! What the page shows beyond the report: listings and the call graph.

use std::collections::{BTreeMap, BTreeSet};

use similar::DiffOp;

use super::code::{instructions, Ins};
use super::source::place;
use super::stays::Stays;
use super::why::{align, Asker};
use super::Both;
use crate::build::{demangle, FuncId, SourceLine};
use crate::report::{Cell, Detail, Graph, Listing, Node, NodeKind, Row, RowKind};

/// So many functions are listed with their code.
const MAX_LISTINGS: usize = 200;
/// Functions of the patch in the graph.
const MAX_CHANGED: usize = 24;
/// Functions in the graph.
const MAX_NODES: usize = 60;
/// Callers of one function in the graph.
const MAX_CALLERS: usize = 4;
/// Calls from the outermost shown to what changed.
const MAX_LAYERS: usize = 4;

/// The functions of the report: old and new.
pub(super) type Pairs = Vec<(Option<FuncId>, FuncId)>;

pub(super) fn detail(asker: &Asker<'_, '_>, pairs: &Pairs) -> Detail {
    let both = asker.both;
    let listings = pairs.iter().take(MAX_LISTINGS).enumerate().map(|(function, (f, g))| {
        let new = instructions(both.new, *g);
        let old = f.map_or_else(Vec::new, |f| instructions(both.old, f));
        Listing { function, rows: rows(asker, (f.unwrap_or_default(), &old), (*g, &new)) }
    });
    Detail { listings: listings.collect(), graph: graph(both, pairs) }
}

fn shown(ins: &Ins) -> Cell {
    let text = match ins.local {
        Some(to) => ins.text.replacen("local", &format!("+{to:#x}"), 1),
        None => ins.text.clone(),
    };
    Cell { at: ins.at, text }
}

fn rows(asker: &Asker<'_, '_>, (f, x): (FuncId, &[Ins]), (g, y): (FuncId, &[Ins])) -> Vec<Row> {
    let mut pairs: Vec<(RowKind, Option<usize>, Option<usize>)> = Vec::new();
    for op in align(x, y) {
        let kind = if matches!(op, DiffOp::Equal { .. }) { RowKind::Equal } else { RowKind::Changed };
        let (old, new) = (op.old_range(), op.new_range());
        for i in 0..old.len().max(new.len()) {
            let (a, b) = (old.clone().nth(i), new.clone().nth(i));
            pairs.push(match (a, b) {
                (Some(_), None) => (RowKind::Removed, a, b),
                (None, Some(_)) => (RowKind::Added, a, b),
                _ => (kind, a, b),
            });
        }
    }
    // A branch is the same only if it leads to the same place.
    let meets: BTreeMap<u32, u32> = pairs.iter().filter_map(|(_, a, b)| Some((x[(*a)?].at, y[(*b)?].at))).collect();
    let (old_start, new_start) = (asker.both.old.build.func(f).addr, asker.both.new.build.func(g).addr);
    let (old_scope, new_scope) = (asker.scopes.0.at(old_start), asker.scopes.1.at(new_start));
    let mut last: Option<String> = None;
    let mut out = Vec::with_capacity(pairs.len());
    for (mut kind, a, b) in pairs {
        let (old, new) = (a.map(|i| &x[i]), b.map(|i| &y[i]));
        if let (RowKind::Equal, Some(Some(from)), Some(Some(to))) = (kind, old.map(|i| i.local), new.map(|i| i.local)) {
            if meets.get(&from) != Some(&to) {
                kind = RowKind::Changed;
            }
        }
        let line = match (new, old) {
            (Some(ins), _) => new_scope.and_then(|s| s.line(new_start + u64::from(ins.at))).map(|l| (true, l)),
            (None, Some(ins)) => old_scope.and_then(|s| s.line(old_start + u64::from(ins.at))).map(|l| (false, l)),
            _ => None,
        };
        let source = line.and_then(|(is_new, l)| source(asker, is_new, l)).filter(|(at, _)| last.as_ref() != Some(at));
        if let Some((at, _)) = &source {
            last = Some(at.clone());
        }
        out.push(Row { kind, old: old.map(shown), new: new.map(shown), source });
    }
    out
}

fn source(asker: &Asker<'_, '_>, is_new: bool, line: SourceLine) -> Option<(String, Option<String>)> {
    let scopes = if is_new { &asker.scopes.1 } else { &asker.scopes.0 };
    let file = scopes.file(line)?;
    // Of one path for both builds, the text is taken for that of the new one.
    let overwritten = !is_new && asker.scopes.1.files.iter().any(|f| f.path == file.path);
    Some((place(Some(file), line)?, asker.sources.line(is_new, file, line.line, overwritten)))
}

/// The callers of an old function, with the whole function in place of its cold part.
fn callers(both: &Both<'_, '_>, f: FuncId) -> Vec<FuncId> {
    let build = &both.old.build;
    let whole = |c: FuncId| {
        let parent = build.func(c).cold_parent()?;
        both.old.callers(c).iter().copied().find(|p| build.func(*p).names.iter().any(|n| n.text == parent))
    };
    let all: BTreeSet<FuncId> =
        both.old.callers(f).iter().map(|c| whole(*c).unwrap_or(*c)).filter(|c| *c != f).collect();
    all.into_iter().collect()
}

fn graph(both: &Both<'_, '_>, pairs: &Pairs) -> Graph {
    let stays = Stays::new(both.old);
    let mut out = Graph::default();
    // Old functions by id; new ones behind them.
    let mut index: BTreeMap<(bool, FuncId), usize> = BTreeMap::new();
    let mut open: Vec<FuncId> = Vec::new();
    for (f, g) in pairs {
        if out.nodes.len() >= MAX_CHANGED {
            out.left_out += 1;
            continue;
        }
        let (key, side) = f.map_or(((true, *g), both.new), |f| ((false, f), both.old));
        if index.contains_key(&key) {
            continue;
        }
        index.insert(key, out.nodes.len());
        let kind = if f.is_some() { NodeKind::Changed } else { NodeKind::New };
        let pointed = f.is_some_and(|f| stays.is_pointed(f));
        out.nodes.push(Node { name: demangle(side.build.func(key.1).name()), kind, layer: 0, more: 0, pointed });
        open.extend(*f);
    }
    let mut edges: BTreeSet<(usize, usize)> = BTreeSet::new();
    for layer in 1..=MAX_LAYERS {
        let mut next = Vec::new();
        for f in std::mem::take(&mut open) {
            let to = index[&(false, f)];
            // What is called by its address is a way in: nobody goes on from there.
            let entered = matches!(out.nodes[to].kind, NodeKind::Main | NodeKind::Thread) || out.nodes[to].pointed;
            if layer > 1 && entered {
                continue;
            }
            let mut added = 0;
            for caller in callers(both, f) {
                if let Some(&from) = index.get(&(false, caller)) {
                    edges.insert((from, to));
                    continue;
                }
                if added >= MAX_CALLERS || out.nodes.len() >= MAX_NODES || layer == MAX_LAYERS {
                    out.nodes[to].more += 1;
                    continue;
                }
                added += 1;
                let kind = match stays.root(caller) {
                    Some("main") => NodeKind::Main,
                    Some(_) => NodeKind::Thread,
                    None => NodeKind::Caller,
                };
                let from = out.nodes.len();
                index.insert((false, caller), from);
                let (name, pointed) = (demangle(both.old.build.func(caller).name()), stays.is_pointed(caller));
                // What starts is always handed over.
                let pointed = pointed && kind == NodeKind::Caller;
                out.nodes.push(Node { name, kind, layer, more: 0, pointed });
                edges.insert((from, to));
                next.push(caller);
            }
        }
        open = next;
    }
    // New functions are called by functions of the patch.
    for (f, g) in pairs.iter().filter(|(f, _)| f.is_none()) {
        let Some(&to) = index.get(&(true, *g)) else { continue };
        debug_assert!(f.is_none());
        for caller in both.new.callers(*g) {
            let key = both.pairing.func_olds(*caller).first().map_or((true, *caller), |f| (false, *f));
            if let Some(&from) = index.get(&key).filter(|from| **from != to) {
                edges.insert((from, to));
            }
        }
    }
    out.edges = edges.into_iter().collect();
    out
}
