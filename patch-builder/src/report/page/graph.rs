//! The call graph, drawn in columns: what starts on the left, what changed on the right.

use std::collections::BTreeMap;

use maud::{html, Markup};

use crate::report::{Graph, NodeKind};

const BOX: (usize, usize) = (210, 26);
const GAP: (usize, usize) = (56, 12);
const MARGIN: usize = 12;
const MAX_NAME: usize = 28;

pub(super) fn section(graph: &Graph) -> Markup {
    html! {
        section #calls {
            h2 { "Who reaches what changed" }
            p.hint {
                "Calls run from left to right; what is in the patch has a thick border. "
                "“*” after a name: its address is stored, exported or handed over, so it may be called from places that are not shown. "
                @if graph.left_out > 0 { (graph.left_out) " functions of the patch are left out." }
            }
            div.scroll tabindex="0" role="region" aria-label="Call graph" { (drawing(graph)) }
            details {
                summary { "The same as text" }
                ul {
                    @for (i, node) in graph.nodes.iter().enumerate().filter(|(_, n)| matches!(n.kind, NodeKind::Changed | NodeKind::New)) {
                        @let callers: Vec<&str> = graph.edges.iter().filter(|(_, to)| *to == i).map(|(from, _)| graph.nodes[*from].name.as_str()).collect();
                        li {
                            code { (node.name) } " ← "
                            @if callers.is_empty() && node.more == 0 { @if node.pointed { "by its address only" } @else { "nobody that is seen" } }
                            (callers.join(", "))
                            @if node.more > 0 { " and " (node.more) " more" }
                        }
                    }
                }
            }
        }
    }
}

/// The place of each node: column, and row within it.
fn layout(graph: &Graph) -> (Vec<(usize, usize)>, usize, usize) {
    let layers = graph.nodes.iter().map(|n| n.layer).max().unwrap_or(0);
    let mut columns: BTreeMap<usize, Vec<usize>> = BTreeMap::new();
    for (i, node) in graph.nodes.iter().enumerate() {
        columns.entry(node.layer).or_default().push(i);
    }
    // From what changed outward: each caller stands at the height of what it calls.
    let mut height = vec![0f64; graph.nodes.len()];
    for (layer, column) in &mut columns {
        if *layer > 0 {
            let mean = |i: usize| {
                let below: Vec<f64> = graph
                    .edges
                    .iter()
                    .filter(|(from, to)| *from == i && graph.nodes[*to].layer < *layer)
                    .map(|(_, to)| height[*to])
                    .collect();
                below.iter().sum::<f64>() / below.len().max(1) as f64
            };
            let means: BTreeMap<usize, f64> = column.iter().map(|i| (*i, mean(*i))).collect();
            column.sort_by(|a, b| means[a].total_cmp(&means[b]).then(a.cmp(b)));
        }
        for (row, i) in column.iter().enumerate() {
            height[*i] = row as f64;
        }
    }
    let rows = columns.values().map(Vec::len).max().unwrap_or(1);
    let mut places = vec![(0, 0); graph.nodes.len()];
    for (layer, column) in &columns {
        for (row, i) in column.iter().enumerate() {
            places[*i] = (layers - layer, row);
        }
    }
    (places, layers + 1, rows)
}

fn drawing(graph: &Graph) -> Markup {
    let (places, columns, rows) = layout(graph);
    let x = |i: usize| MARGIN + places[i].0 * (BOX.0 + GAP.0);
    let y = |i: usize| MARGIN + places[i].1 * (BOX.1 + GAP.1);
    let (width, height) = (2 * MARGIN + columns * (BOX.0 + GAP.0), 2 * MARGIN + rows * (BOX.1 + GAP.1) - GAP.1);
    html! {
        svg width=(width) height=(height) viewBox={ "0 0 " (width) " " (height) } role="img" aria-label="Call graph; the same follows as text" {
            defs {
                marker id="tip" viewBox="0 0 8 8" refX="8" refY="4" markerWidth="7" markerHeight="7" orient="auto-start-reverse" {
                    path d="M0,0 L8,4 L0,8 z" {}
                }
            }
            @for (from, to) in &graph.edges {
                @let (x1, y1, x2, y2) = (x(*from) + BOX.0, y(*from) + BOX.1 / 2, x(*to), y(*to) + BOX.1 / 2);
                // Within a column, or backward: around the right side.
                @let right = x1.max(x2 + BOX.0);
                @let path = if places[*from].0 < places[*to].0 { format!("M{x1},{y1} C{},{y1} {},{y2} {x2},{y2}", x1 + GAP.0 / 2, x2 - GAP.0 / 2) }
                    else { format!("M{x1},{y1} C{},{y1} {},{y2} {},{y2}", right + 40, right + 40, x2 + BOX.0) };
                path.edge d=(path) marker-end="url(#tip)" {}
            }
            @for (i, node) in graph.nodes.iter().enumerate() {
                @let class = match node.kind {
                    NodeKind::Changed => "node changed", NodeKind::New => "node new", NodeKind::Caller => "node",
                    NodeKind::Main | NodeKind::Thread => "node start",
                };
                g class=(class) {
                    title { (node.name) }
                    rect x=(x(i)) y=(y(i)) width=(BOX.0) height=(BOX.1) rx="4" {}
                    text x=(x(i) + 8) y=(y(i) + 17) {
                        @if node.kind == NodeKind::Thread { "thread: " }
                        (clipped(&node.name, if node.kind == NodeKind::Thread { MAX_NAME - 8 } else { MAX_NAME })) @if node.pointed { "*" }
                    }
                    @if node.more > 0 { text.more x=(x(i)) y=(y(i) + BOX.1 + 10) { "and " (node.more) " more" } }
                }
            }
        }
    }
}

/// The end of a name says more than its beginning.
fn clipped(name: &str, len: usize) -> String {
    let count = name.chars().count();
    if count <= len {
        return name.to_owned();
    }
    format!("…{}", name.chars().skip(count - len + 1).collect::<String>())
}
