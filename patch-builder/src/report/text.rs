//! The report for a terminal.

use std::fmt::Write as _;

use console::Style;

use super::{Refusal, Report};

/// How wide the text may be, and whether it has colours.
#[derive(Clone, Copy, Debug, Default)]
pub struct Look {
    /// Columns; `None`: lines are not broken.
    pub columns: Option<usize>,
    /// Colours.
    pub colours: bool,
}

impl Look {
    /// What suits this terminal, or plain text if it is none.
    #[must_use]
    pub fn of(term: &console::Term) -> Self {
        let columns = term.size_checked().map(|(_, columns)| usize::from(columns).max(40));
        let features = term.features();
        Self { columns, colours: features.is_attended() && features.colors_supported() }
    }

    fn paint(self, style: Style, text: &str) -> String {
        style.force_styling(self.colours).apply_to(text).to_string()
    }

    fn strong(self, text: &str) -> String {
        self.paint(Style::new().bold(), text)
    }

    fn bad(self, text: &str) -> String {
        self.paint(Style::new().red().bold(), text)
    }

    fn caution(self, text: &str) -> String {
        self.paint(Style::new().yellow().bold(), text)
    }

    /// `text` broken between words so that it fits behind `indent` columns. The first line has no indent.
    fn wrap(self, indent: usize, text: &str) -> String {
        let Some(columns) = self.columns else { return text.to_owned() };
        let room = columns.saturating_sub(indent).max(20);
        let (mut out, mut used) = (String::new(), 0);
        for word in text.split(' ') {
            let len = console::measure_text_width(word);
            if used > 0 && used + 1 + len > room {
                let _ = write!(out, "\n{:indent$}", "");
                used = 0;
            } else if used > 0 {
                out.push(' ');
                used += 1;
            }
            out.push_str(word);
            used += len;
        }
        out
    }
}

impl Report {
    /// The report for a terminal.
    #[must_use]
    pub fn text(&self, look: Look) -> String {
        let mut out = String::new();
        let changed = self.functions.iter().filter(|f| f.status == "changed").count();
        let _ = writeln!(
            out,
            "{}: {changed} changed and {} new functions, {} bytes of code, {} bytes of data; types: {}",
            look.strong(&self.name),
            self.functions.len() - changed,
            self.functions.iter().map(|f| f.new_size).sum::<u64>(),
            self.data.iter().map(|d| d.size).sum::<u64>(),
            self.types
        );
        for f in &self.functions {
            let sizes = f.old_size.map_or(String::new(), |old| format!("{old} -> "));
            let jump = match (f.status, f.entry_jump) {
                ("changed", false) => "  (no entry jump: only this patch calls it)",
                _ => "",
            };
            let _ =
                writeln!(out, "  {:7} {}  [{sizes}{} bytes]{jump}", f.status, look.strong(&f.demangled), f.new_size);
            let at = f.source.as_ref().map_or(String::new(), |s| format!("{s}: "));
            let _ = writeln!(out, "          {}", look.wrap(10, &format!("{at}{}", f.reason)));
        }
        let statics: Vec<_> = self.data.iter().filter(|d| d.kind == "static").collect();
        for d in statics {
            let _ = writeln!(out, "  static  {}  [{} bytes]", d.name, d.size);
        }
        if !self.noise.is_empty() {
            let names: std::collections::BTreeSet<_> = self.noise.iter().map(|n| n.function.as_str()).collect();
            let _ = writeln!(out, "  not patched, only lines moved: {} functions", names.len());
            for n in &self.noise {
                let _ = writeln!(out, "          {} ({}): {}", n.function, n.rule, n.detail);
            }
        }
        for note in &self.type_notes {
            let _ = writeln!(out, "  types   {}", look.wrap(10, note));
        }
        for w in &self.warnings {
            let _ = writeln!(out, "  {}: {}", look.caution("warning"), look.wrap(11, w));
        }
        out
    }

    /// The refusals for a terminal.
    #[must_use]
    pub fn refusal_text(&self, look: Look) -> String {
        self.refusals.iter().map(|r| r.text(look)).collect()
    }
}

impl Refusal {
    /// The refusal for a terminal.
    #[must_use]
    pub fn text(&self, look: Look) -> String {
        let head = look.wrap(4, &format!("refused [{}]: {}", self.rule, self.message));
        let mut out = head.replacen("refused", &look.bad("refused"), 1) + "\n";
        if let (Some(old), Some(new)) = (&self.old, &self.new) {
            out += &columns(old, new, look);
        }
        let _ = writeln!(out, "    {}", look.wrap(8, &format!("what to do: {}", self.remedy)));
        out
    }
}

/// Two texts beside each other if that fits, else one below the other.
fn columns(old: &str, new: &str, look: Look) -> String {
    let (left, right): (Vec<&str>, Vec<&str>) = (old.lines().collect(), new.lines().collect());
    let width = |lines: &[&str]| lines.iter().map(|l| console::measure_text_width(l)).max().unwrap_or(0);
    let (a, b) = (width(&left).max(3), width(&right));
    let mut out = String::new();
    if a + b + 12 <= look.columns.unwrap_or(100) {
        let _ = writeln!(out, "      {:a$}    new", "old");
        for i in 0..left.len().max(right.len()) {
            let (l, r) = (left.get(i).copied().unwrap_or(""), right.get(i).copied().unwrap_or(""));
            let pad = a - console::measure_text_width(l).min(a);
            let mark = if l == r { ' ' } else { '|' };
            let line = format!("      {l}{:pad$}  {mark} {r}", "");
            let line = line.trim_end();
            let _ = writeln!(out, "{}", if l == r { line.to_owned() } else { look.caution(line) });
        }
        return out;
    }
    for (title, lines) in [("old", left), ("new", right)] {
        let _ = writeln!(out, "      {title}:");
        for line in lines {
            let _ = writeln!(out, "        {line}");
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refusal() -> Refusal {
        Refusal {
            rule: "data-size".into(),
            symbol: "order".into(),
            message: "struct order grew".into(),
            remedy: "restart".into(),
            old: Some("order.h:3\nid   @0  8\nnext @8  8".into()),
            new: Some("order.h:3\nid   @0  8\nfee  @8  4\nnext @16 8".into()),
        }
    }

    #[test]
    fn two_layouts_stand_beside_each_other() {
        let text = refusal().text(Look { columns: Some(100), colours: false });
        let want = "refused [data-size]: struct order grew\n      old           new\n      order.h:3     order.h:3\n      id   @0  8    id   @0  8\n      next @8  8  | fee  @8  4\n                  | next @16 8\n    what to do: restart\n";
        assert_eq!(text, want);
    }

    #[test]
    fn where_that_is_too_wide_one_follows_the_other() {
        let wide = Refusal { old: Some("x".repeat(60)), new: Some("y".repeat(60)), ..refusal() };
        let text = wide.text(Look { columns: Some(100), colours: false });
        assert!(text.lines().all(|l| l.len() <= 100) && text.contains("      old:\n"), "{text}");
    }

    #[test]
    fn lines_break_between_words() {
        let look = Look { columns: Some(40), colours: false };
        let text = look.wrap(4, "a message of many words that does not fit into forty columns");
        assert_eq!(text, "a message of many words that does\n    not fit into forty columns");
        assert_eq!(Look::default().wrap(4, &"word ".repeat(50)), "word ".repeat(50));
    }
}
