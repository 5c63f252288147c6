//! Two layouts side by side, as text.

use crate::types::DefText;

/// How many equal lines are shown around a difference.
const CONTEXT: usize = 1;
/// How many lines at most.
const MAX_LINES: usize = 40;

fn cell(line: &(String, String)) -> String {
    format!("{:<4} {}", line.0, line.1)
}

/// Pairs of lines, old and new: those of one name beside each other.
fn aligned(old: &[(String, String)], new: &[(String, String)]) -> Vec<(Option<String>, Option<String>)> {
    let key = |l: &(String, String)| l.1.split(':').next().unwrap_or("").to_owned();
    let mut out = Vec::new();
    let mut j = 0;
    for line in old {
        match new[j..].iter().position(|n| key(n) == key(line)) {
            Some(skip) => {
                out.extend(new[j..j + skip].iter().map(|n| (None, Some(cell(n)))));
                out.push((Some(cell(line)), Some(cell(&new[j + skip]))));
                j += skip + 1;
            }
            None => out.push((Some(cell(line)), None)),
        }
    }
    out.extend(new[j..].iter().map(|n| (None, Some(cell(n)))));
    out
}

/// Both layouts as texts of equally many lines, those of one name on one line; equal stretches are left out.
pub fn beside(old: &DefText, old_at: &str, new: &DefText, new_at: &str) -> (String, String) {
    let rows = aligned(&old.lines, &new.lines);
    let differs = |row: &(Option<String>, Option<String>)| row.0 != row.1;
    let near = |i: usize| {
        let from = i.saturating_sub(CONTEXT);
        rows.iter().skip(from).take(i + CONTEXT + 1 - from).any(differs)
    };
    let (mut left, mut right) = (vec![old_at.to_owned(), old.head.clone()], vec![new_at.to_owned(), new.head.clone()]);
    if old_at.is_empty() && new_at.is_empty() {
        (left, right) = (vec![old.head.clone()], vec![new.head.clone()]); // rustc does not say where types stand
    }
    let mut left_out = 0;
    let flush = |left: &mut Vec<String>, right: &mut Vec<String>, left_out: &mut usize| {
        if *left_out > 0 {
            let text = format!("… {left_out} lines");
            left.push(text.clone());
            right.push(text);
            *left_out = 0;
        }
    };
    for (i, row) in rows.iter().enumerate() {
        if !near(i) || left.len() >= MAX_LINES {
            left_out += 1;
            continue;
        }
        flush(&mut left, &mut right, &mut left_out);
        left.push(row.0.clone().unwrap_or_default());
        right.push(row.1.clone().unwrap_or_default());
    }
    flush(&mut left, &mut right, &mut left_out);
    (left.join("\n"), right.join("\n"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn text(head: &str, lines: &[(&str, &str)]) -> DefText {
        let lines = lines.iter().map(|(a, b)| ((*a).to_owned(), (*b).to_owned())).collect();
        DefText { head: head.into(), lines }
    }

    #[test]
    fn fields_of_one_name_stand_beside_each_other() {
        let old = text("struct s, 8 bytes", &[("+0", "a: int"), ("+4", "b: int")]);
        let new = text("struct s, 12 bytes", &[("+0", "a: int"), ("+4", "extra: int"), ("+8", "b: int")]);
        let (left, right) = beside(&old, "s.h:1", &new, "s.h:1");
        assert_eq!(left, "s.h:1\nstruct s, 8 bytes\n+0   a: int\n\n+4   b: int");
        assert_eq!(right, "s.h:1\nstruct s, 12 bytes\n+0   a: int\n+4   extra: int\n+8   b: int");
    }
}
