//! Tables of trait objects: which function is behind which slot.

use super::same::Compare;
use crate::build::{canonical, DynKind, FuncId};
use crate::pairing::Pairing;
use crate::side::Side;
use crate::types::{Static, Types};

/// The functions that a table names, slot by slot; `None` where there is no pointer.
fn slots(side: &Side<'_>, types: &Types, table: &Static) -> Vec<Option<FuncId>> {
    let size = types.name_of(table.ty).and_then(|n| types.defs(n).first()).map_or(0, |d| d.layout.size);
    (0..size / 8)
        .map(|i| {
            let at = table.addr.checked_add(8 * i)?;
            let to = match side.build.dynamic.get(&at).map(|r| r.kind) {
                Some(DynKind::Relative(to)) => to,
                _ => u64::from_le_bytes(side.build.bytes(at, 8)?.try_into().ok()?),
            };
            side.build.func_at(to).filter(|f| side.build.func(*f).addr == to)
        })
        .collect()
}

/// How two versions of a table differ in what is behind their slots.
pub fn compare(
    c: &Compare<'_>,
    (old, new): (&Side<'_>, &Side<'_>),
    pairing: &Pairing,
    (a, b): (&Static, &Static),
) -> Vec<String> {
    let (x, y) = (slots(old, c.old, a), slots(new, c.new, b));
    let mut out = Vec::new();
    if x.len() != y.len() {
        out.push(format!(
            "it has {} methods, in the new build {}",
            x.len().saturating_sub(3),
            y.len().saturating_sub(3)
        ));
    }
    let last = |side: &Side<'_>, f: FuncId| {
        let name = canonical(side.build.func(f).name());
        let name = name.split_once(" as ").map_or(name.as_str(), |(_, n)| n).to_owned();
        let mut depth = 0;
        let at = name.char_indices().rev().find(|(i, ch)| {
            match ch {
                '>' => depth += 1,
                '<' => depth -= 1,
                _ => {}
            }
            depth == 0 && name[..*i].ends_with("::") && !name[*i..].starts_with("::")
        });
        at.map_or(name.clone(), |(i, _)| name[i..].to_owned())
    };
    // The first three are drop, size and alignment.
    for (i, (f, g)) in x.iter().zip(&y).enumerate().skip(3) {
        let (Some(f), Some(g)) = (*f, *g) else { continue };
        if pairing.is_pair(f, g) {
            continue;
        }
        let (was, is) = (last(old, f), last(new, g));
        if was != is {
            out.push(format!("method {} is {was}, in the new build {is}", i - 3));
        }
    }
    out
}
