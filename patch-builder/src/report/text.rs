//! The report for a terminal.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;

use console::Style;

use super::{FunctionInfo, NoiseInfo, Refusal, Report};

/// So many cases of each kind of noise are shown.
const NOISE_EXAMPLES: usize = 5;

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
    /// The report for a terminal, what matters most first.
    #[must_use]
    pub fn text(&self, look: Look) -> String {
        let mut out = String::new();
        let changed = self.functions.iter().filter(|f| f.status == "changed").count();
        let head = format!(
            "{changed} changed and {} new functions, {} bytes of code, {} bytes of data; types: {}",
            self.functions.len() - changed,
            self.functions.iter().map(|f| f.new_size).sum::<u64>(),
            self.data.iter().map(|d| d.size).sum::<u64>(),
            self.types
        );
        let _ = writeln!(out, "{}: {}", look.strong(&self.name), look.wrap(self.name.len() + 2, &head));
        for w in &self.warnings {
            let _ = writeln!(out, "  {}: {}", look.caution("warning"), look.wrap(11, w));
        }
        for f in &self.functions {
            f.write(&mut out, look);
        }
        for d in self.data.iter().filter(|d| d.kind == "static") {
            let _ = writeln!(out, "  static  {}  [{} bytes]", d.name, d.size);
        }
        for note in &self.type_notes {
            let _ = writeln!(out, "  types   {}", look.wrap(10, note));
        }
        self.write_noise(&mut out, look);
        if !self.not_compared.is_empty() {
            let _ = writeln!(out, "  not compared:");
            for n in &self.not_compared {
                let more = if n.count > n.examples.len() as u64 { ", …" } else { "" };
                let line = match n.what {
                    "types" => n.text.clone(),
                    _ => format!("{} ({}): {}{more}", n.text, n.count, n.examples.join(", ")),
                };
                let _ = writeln!(out, "    {}", look.wrap(4, &line));
            }
        }
        out
    }

    /// What is not patched since only lines moved, by rule, with a few examples.
    fn write_noise(&self, out: &mut String, look: Look) {
        let mut rules: BTreeMap<&str, Vec<&NoiseInfo>> = BTreeMap::new();
        self.noise.iter().for_each(|n| rules.entry(n.rule).or_default().push(n));
        for (rule, all) in rules {
            let functions: BTreeSet<&str> = all.iter().map(|n| n.function.as_str()).collect();
            let many = if functions.len() == 1 { "function" } else { "functions" };
            let _ = writeln!(out, "  not patched, noise of the rule {rule}: {} {many}", functions.len());
            for n in all.iter().take(NOISE_EXAMPLES) {
                let _ = writeln!(out, "    {}", look.wrap(4, &format!("{}: {}", n.function, n.detail)));
            }
            if all.len() > NOISE_EXAMPLES {
                let _ = writeln!(out, "    … and {} more (--json lists all)", all.len() - NOISE_EXAMPLES);
            }
        }
    }

    /// The refusals for a terminal.
    #[must_use]
    pub fn refusal_text(&self, look: Look) -> String {
        self.refusals.iter().map(|r| r.text(look)).collect()
    }
}

impl FunctionInfo {
    fn write(&self, out: &mut String, look: Look) {
        let sizes = self.old_size.map_or(String::new(), |old| format!("{old} -> "));
        let name = look.strong(&self.demangled);
        let _ = writeln!(out, "  {:7} {name}  [{sizes}{} bytes]", self.status, self.new_size);
        let mut line = |text: &str| {
            let _ = writeln!(out, "          {}", look.wrap(10, text));
        };
        let at = self.source.as_ref().map_or(String::new(), |s| format!("{s}: "));
        line(&format!("{at}{}", self.reason));
        if let Some(d) = &self.difference {
            let at = d.at.as_ref().map_or(String::new(), |at| format!(" ({at})"));
            line(&format!("first: `{}` is now `{}`{at}", d.old, d.new));
        }
        line(&self.entry);
        for (what, list) in [("with", &self.companions), ("also known as", &self.aliases)] {
            if !list.is_empty() {
                line(&format!("{what} {}", list.join(", ")));
            }
        }
        if let Some(hunk) = &self.hunk {
            for l in hunk.lines() {
                let styled = match l.as_bytes().first() {
                    Some(b'+') => look.paint(Style::new().green(), l),
                    Some(b'-') => look.paint(Style::new().red(), l),
                    Some(b'@') => look.paint(Style::new().cyan(), l),
                    _ => l.to_owned(),
                };
                let _ = writeln!(out, "          {styled}");
            }
        }
        if let Some(note) = &self.hunk_note {
            let _ = writeln!(out, "          {}", look.wrap(10, &format!("source: {note}")));
        }
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
