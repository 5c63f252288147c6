//! The report as one self-contained page: no network, no other file, readable without its script.
//! Everything in it that comes from a build is untrusted and goes through maud's escaping.

mod code;
mod graph;

use std::collections::BTreeMap;

use maud::{html, Markup, PreEscaped, DOCTYPE};

use super::{Detail, FunctionInfo, NoiseInfo, Refusal, Report};

const STYLE: &str = include_str!("style.css");
const SCRIPT: &str = include_str!("filter.js");
/// So many cases of one kind of noise are on the page.
const MAX_NOISE: usize = 500;

/// The page.
#[must_use]
pub fn page(report: &Report, detail: &Detail) -> String {
    let refused = !report.refusals.is_empty();
    let changed = report.functions.iter().filter(|f| f.status == "changed").count();
    let markup = html! {
        (DOCTYPE)
        html lang="en" {
            head {
                meta charset="utf-8";
                meta name="viewport" content="width=device-width, initial-scale=1";
                meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'";
                title { (report.name) " – live patch" }
                style { (PreEscaped(STYLE)) }
            }
            body {
                header {
                    h1 { (report.name) }
                    p.verdict.bad[refused] {
                        @if refused { "Refused for " (count(report.refusals.len(), "reason", "reasons")) ": no patch is written." }
                        @else if report.functions.is_empty() { "Nothing differs in any function." }
                        @else { "Can be patched." }
                    }
                    dl.builds {
                        dt { "running" } dd { (report.target.path) " " code { (short(&report.target.build_id)) } }
                        dt { "new" } dd { (report.new.path) " " code { (short(&report.new.build_id)) } }
                    }
                    ul.figures {
                        (figure(changed, "changed")) (figure(report.functions.len() - changed, "new"))
                        (figure(report.functions.iter().map(|f| f.new_size as usize).sum(), "bytes of code"))
                        (figure(report.data.iter().map(|d| d.size as usize).sum(), "bytes of data"))
                        (figure(report.warnings.len(), if report.warnings.len() == 1 { "warning" } else { "warnings" }))
                        li { "types: " b { (report.types) } }
                    }
                    (navigation(report, detail))
                }
                main {
                    @if refused { (refusals(&report.refusals)) }
                    @if !report.warnings.is_empty() { (warnings(report)) }
                    @if !report.functions.is_empty() { (functions(report)) }
                    @if !detail.graph.nodes.is_empty() { (graph::section(&detail.graph)) }
                    @if !report.functions.is_empty() { (bodies(report, detail)) }
                    @if !report.data.is_empty() { (data(report)) }
                    @if !report.noise.is_empty() { (noise(report)) }
                    @if !report.not_compared.is_empty() { (not_compared(report)) }
                }
                footer { "patch-builder " (env!("CARGO_PKG_VERSION")) }
                script { (PreEscaped(SCRIPT)) }
            }
        }
    };
    markup.into_string()
}

fn short(build_id: &str) -> &str {
    build_id.get(..16).unwrap_or(build_id)
}

fn count(n: usize, one: &str, many: &str) -> String {
    format!("{n} {}", if n == 1 { one } else { many })
}

fn figure(n: usize, what: &str) -> Markup {
    html! { li { b { (n) } " " (what) } }
}

fn navigation(report: &Report, detail: &Detail) -> Markup {
    let parts = [
        ("refusals", "Refusals", !report.refusals.is_empty()),
        ("warnings", "Warnings", !report.warnings.is_empty()),
        ("functions", "Functions", !report.functions.is_empty()),
        ("calls", "Calls", !detail.graph.nodes.is_empty()),
        ("code", "Code", !report.functions.is_empty()),
        ("data", "Data", !report.data.is_empty()),
        ("noise", "Noise", !report.noise.is_empty()),
        ("not-compared", "Not compared", !report.not_compared.is_empty()),
    ];
    html! {
        nav aria-label="Parts of this page" {
            @for (id, name, _) in parts.iter().filter(|(.., there)| *there) { a href={ "#" (id) } { (name) } }
        }
    }
}

fn refusals(all: &[Refusal]) -> Markup {
    html! {
        section #refusals {
            h2 { "Refusals" }
            @for r in all {
                article.refusal {
                    h3 { code.rule { (r.rule) } " " span.name { (r.symbol) } }
                    p { (r.message) }
                    @if let (Some(old), Some(new)) = (&r.old, &r.new) {
                        div.sides {
                            figure { figcaption { "old" } pre { (old) } }
                            figure { figcaption { "new" } pre { (new) } }
                        }
                    }
                    p.remedy { b { "What to do: " } (r.remedy) }
                }
            }
        }
    }
}

fn warnings(report: &Report) -> Markup {
    html! {
        section #warnings {
            h2 { "Warnings" }
            ul { @for w in &report.warnings { li.warning { (w) } } }
        }
    }
}

fn functions(report: &Report) -> Markup {
    html! {
        section #functions {
            h2 { "Functions" }
            p.filter hidden { label { "Filter: " input type="search" id="filter" placeholder="part of a name"; } }
            div.scroll tabindex="0" role="region" aria-label="Functions of the patch" {
                table {
                    thead { tr { th { "function" } th.number { "old" } th.number { "new" } th { "why" } th { "entry" } } }
                    tbody {
                        @for (i, f) in report.functions.iter().enumerate() {
                            tr data-name=(f.demangled) {
                                td { a href={ "#f" (i) } { code { (f.demangled) } } @if f.status == "new" { " " span.tag { "new" } } }
                                td.number { @if let Some(size) = f.old_size { (size) } @else { "–" } }
                                td.number { (f.new_size) }
                                td { (f.reason) }
                                td { (f.entry) }
                            }
                        }
                    }
                }
            }
        }
    }
}

fn bodies(report: &Report, detail: &Detail) -> Markup {
    html! {
        section #code {
            h2 { "Code" }
            p.hint { "Old on the left, new on the right. Marked are instructions that differ in meaning; equal runs are folded." }
            @for (i, f) in report.functions.iter().enumerate() {
                details.function open[i < 3] data-name=(f.demangled) {
                    summary { code { (f.demangled) } " " span.size { @if let Some(old) = f.old_size { (old) " → " } (f.new_size) " bytes" } }
                    div id={ "f" (i) } { (body(f)) }
                    @if let Some(listing) = detail.listings.iter().find(|l| l.function == i) { (code::listing(listing, f.old_size.is_some())) }
                    @else { p.hint { "Its code is left out of this page." } }
                }
            }
        }
    }
}

fn body(f: &FunctionInfo) -> Markup {
    html! {
        @if let Some(source) = &f.source { p.at { (source) } }
        ul.why {
            @for why in &f.why { li { (why.to_string()) } }
            @if f.why.is_empty() { li { (f.reason) } }
            @if let Some(d) = &f.difference {
                li { "first difference: " code { (d.old) } " is now " code { (d.new) } @if let Some(at) = &d.at { " (" (at) ")" } }
            }
            li { (f.entry) }
            @if !f.companions.is_empty() { li { "with " code { (f.companions.join(", ")) } } }
            @if !f.aliases.is_empty() { li { "also known as " code { (f.aliases.join(", ")) } } }
        }
        @if let Some(hunk) = &f.hunk { (code::hunk(hunk)) }
        @if let Some(note) = &f.hunk_note { p.hint { "Source: " (note) "." } }
    }
}

fn data(report: &Report) -> Markup {
    html! {
        section #data {
            h2 { "Data" }
            details open[report.data.len() <= 20] {
                summary { (count(report.data.len(), "piece", "pieces")) " of data in the patch" }
                table {
                    thead { tr { th { "what" } th { "kind" } th.number { "bytes" } } }
                    tbody { @for d in &report.data { tr { td { code { (d.name) } } td { (d.kind) } td.number { (d.size) } } } }
                }
            }
        }
    }
}

fn noise(report: &Report) -> Markup {
    let mut rules: BTreeMap<&str, Vec<&NoiseInfo>> = BTreeMap::new();
    report.noise.iter().for_each(|n| rules.entry(n.rule).or_default().push(n));
    html! {
        section #noise {
            h2 { "Noise" }
            p.hint { "Differences that are proven to mean nothing at run time. These functions are not patched." }
            @for (rule, all) in rules {
                details {
                    summary { code.rule { (rule) } " " (count(all.len(), "case", "cases")) }
                    ul { @for n in all.iter().take(MAX_NOISE) { li { code { (n.function) } ": " (n.detail) } } }
                    @if all.len() > MAX_NOISE { p.hint { (all.len() - MAX_NOISE) " more: see --json." } }
                }
            }
        }
    }
}

fn not_compared(report: &Report) -> Markup {
    html! {
        section #not-compared {
            h2 { "Not compared" }
            ul {
                @for n in &report.not_compared {
                    li {
                        (n.text)
                        @if n.what != "types" {
                            " (" (n.count) ")"
                            ul { @for e in &n.examples { li { code { (e) } } } @if n.count > n.examples.len() as u64 { li { "…" } } }
                        }
                    }
                }
            }
        }
    }
}
