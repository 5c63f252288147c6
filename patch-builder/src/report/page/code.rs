//! Instructions side by side, and hunks.

use maud::{html, Markup};

use crate::report::{Cell, Listing, Row, RowKind};

/// Equal rows in sequence beyond this are folded, but for the first and last few.
const FOLDED_FROM: usize = 12;
const KEPT: usize = 3;
/// Rows of one function on the page.
const MAX_ROWS: usize = 6000;

pub(super) fn listing(listing: &Listing, has_old: bool) -> Markup {
    let rows = &listing.rows[..listing.rows.len().min(MAX_ROWS)];
    let differing = listing.rows.iter().filter(|r| r.kind != RowKind::Equal).count();
    html! {
        p.hint { @if has_old { (differing) " of " (listing.rows.len()) " rows differ." } @else { (listing.rows.len()) " instructions." } }
        div.asm.single[!has_old] role="group" aria-label="Instructions, old and new" {
            @for run in runs(rows) {
                @if run.len() > FOLDED_FROM && run[0].kind == RowKind::Equal {
                    @for row in &run[..KEPT] { (one(row)) }
                    details.fold {
                        summary { (run.len() - 2 * KEPT) " equal instructions" }
                        @for row in &run[KEPT..run.len() - KEPT] { (one(row)) }
                    }
                    @for row in &run[run.len() - KEPT..] { (one(row)) }
                } @else {
                    @for row in run { (one(row)) }
                }
            }
        }
        @if listing.rows.len() > MAX_ROWS { p.hint { (listing.rows.len() - MAX_ROWS) " more rows are left out." } }
    }
}

/// Rows that are equal, or not, in sequence.
fn runs(rows: &[Row]) -> impl Iterator<Item = &[Row]> {
    rows.chunk_by(|a, b| (a.kind == RowKind::Equal) == (b.kind == RowKind::Equal))
}

fn one(row: &Row) -> Markup {
    let class = match row.kind {
        RowKind::Equal => "row eq",
        RowKind::Changed => "row ch",
        RowKind::Removed => "row rm",
        RowKind::Added => "row ad",
    };
    html! {
        @if let Some((at, text)) = &row.source { div.src { span.at { (at) } @if let Some(text) = text { " " code { (text) } } } }
        div class=(class) { (cell(row.old.as_ref(), "old")) (cell(row.new.as_ref(), "new")) }
    }
}

fn cell(cell: Option<&Cell>, class: &str) -> Markup {
    html! {
        @match cell {
            Some(c) => div class=(class) { span.off { (format!("+{:x}", c.at)) } code { (c.text) } },
            None => div class={ (class) " none" } {},
        }
    }
}

pub(super) fn hunk(text: &str) -> Markup {
    html! {
        pre.hunk {
            @for line in text.lines() {
                @let class = match line.as_bytes() {
                    [b'+', b'+', b'+', ..] | [b'-', b'-', b'-', ..] | [b'@', ..] => "pos",
                    [b'+' | b'>', ..] => "ins",
                    [b'-', ..] => "del",
                    _ => "ctx",
                };
                span class=(class) { (line) "\n" }
            }
        }
    }
}
