//! Source texts, where they are at hand. A text counts only if nothing says that it belongs to another build.

use std::cell::RefCell;
use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::rc::Rc;

use md5::{Digest as _, Md5};
use similar::{capture_diff_slices, group_diff_ops, Algorithm, DiffOp};

use crate::build::{SourceFile, SourceLine};

/// Texts longer than this are not read.
const MAX_LEN_BYTES: u64 = 16 << 20;
/// A hunk longer than this is cut.
const MAX_HUNK_LINES: usize = 80;
/// The longest function whose end is looked for.
const MAX_FUNCTION_LINES: usize = 4000;

type Text = Rc<[String]>;
/// A text and its MD5.
type Known = (Text, [u8; 16]);

/// Reads source files, each once.
pub(super) struct Sources<'o> {
    folders: (Option<&'o Path>, Option<&'o Path>),
    read: RefCell<HashMap<PathBuf, Option<Known>>>,
}

/// The texts of one file in both builds.
pub(super) enum Texts {
    /// Both are at hand.
    Both(Text, Text),
    /// Only that of the new build.
    New(Text),
    /// None; why.
    None(String),
}

impl<'o> Sources<'o> {
    /// Looks in these folders, or else where the builds say.
    pub(super) fn new(old: Option<&'o Path>, new: Option<&'o Path>) -> Self {
        Self { folders: (old, new), read: RefCell::default() }
    }

    fn read(&self, path: &Path) -> Option<Known> {
        let load = || {
            let meta = std::fs::metadata(path).ok()?;
            if !meta.is_file() || meta.len() > MAX_LEN_BYTES {
                return None;
            }
            let bytes = std::fs::read(path).ok()?;
            let sum = Md5::digest(&bytes).into();
            let lines: Vec<String> = String::from_utf8_lossy(&bytes).lines().map(str::to_owned).collect();
            Some((Text::from(lines), sum))
        };
        self.read.borrow_mut().entry(path.to_owned()).or_insert_with(load).clone()
    }

    /// Where a file lies: below the given folder with as much of its recorded path as leads somewhere.
    fn place(folder: Option<&Path>, recorded: &str) -> Option<PathBuf> {
        let recorded = Path::new(recorded);
        let Some(folder) = folder else { return recorded.is_absolute().then(|| recorded.to_owned()) };
        let parts: Vec<_> = recorded.components().filter(|c| matches!(c, std::path::Component::Normal(_))).collect();
        (0..parts.len()).map(|from| folder.join(parts[from..].iter().collect::<PathBuf>())).find(|p| p.is_file())
    }

    /// One line of a build's source, if nothing says that the text at hand is another's: a checksum, or that the other
    /// build's text lies there.
    pub(super) fn line(&self, new: bool, file: &SourceFile, line: u32, overwritten: bool) -> Option<String> {
        let folder = if new { self.folders.1 } else { self.folders.0 };
        let (text, sum) = self.read(&Self::place(folder, &file.path)?)?;
        let is_its_own = file.md5.map_or(!overwritten || folder.is_some(), |m| m == sum);
        let text = text.get((line as usize).checked_sub(1)?)?;
        is_its_own.then(|| text.trim_end().to_owned())
    }

    /// The texts of a file that both builds were made from.
    pub(super) fn texts(&self, old: Option<&SourceFile>, new: Option<&SourceFile>) -> Texts {
        let find = |folder, file: Option<&SourceFile>| {
            let file = file?;
            let path = Self::place(folder, &file.path)?;
            let (text, sum) = self.read(&path)?;
            let proven = file.md5.map(|m| m == sum);
            (proven != Some(false)).then_some((path, text, proven == Some(true)))
        };
        let (a, b) = (find(self.folders.0, old), find(self.folders.1, new));
        match (a, b) {
            // One file cannot be two versions, unless checksums say that both are this one.
            (Some((p, t, sure)), Some((q, u, sure_too))) if p != q || sure && sure_too => Texts::Both(t, u),
            (Some((p, ..)), Some((q, u, _))) if p == q => Texts::New(u),
            (_, Some((_, u, _))) => Texts::New(u),
            _ => Texts::None("the sources are not at hand (--old-source DIR --new-source DIR)".into()),
        }
    }
}

/// The lines of the function that is declared at `line`, 1-based, both ends included.
pub(super) fn extent(text: &[String], line: u32) -> Option<(usize, usize)> {
    let first = (line as usize).checked_sub(1).filter(|l| *l < text.len())?;
    let (mut depth, mut opened, mut comment) = (0i32, false, false);
    for (at, line) in text.iter().enumerate().skip(first).take(MAX_FUNCTION_LINES) {
        let mut chars = line.chars().peekable();
        let mut quoted = false;
        while let Some(c) = chars.next() {
            let next = chars.peek().copied();
            match c {
                '*' if comment && next == Some('/') => {
                    comment = false;
                    chars.next();
                }
                _ if comment => {}
                '\\' if quoted => {
                    chars.next();
                }
                '"' => quoted = !quoted,
                _ if quoted => {}
                '/' if next == Some('/') => break,
                '/' if next == Some('*') => comment = true,
                '\'' => {
                    // a character, not a lifetime
                    let rest: String = chars.clone().take(3).collect();
                    let len = if rest.starts_with('\\') { 3 } else { 2 };
                    if rest.chars().nth(len - 1) == Some('\'') {
                        chars.nth(len - 1);
                    }
                }
                '{' => (depth, opened) = (depth + 1, true),
                '}' => depth -= 1,
                ';' if !opened && depth == 0 => return Some((first + 1, at + 1)),
                _ => {}
            }
        }
        if opened && depth <= 0 {
            return Some((first + 1, at + 1));
        }
    }
    None
}

/// The lines `from..=to` of a text.
pub(super) fn slice(text: &[String], (from, to): (usize, usize)) -> &[String] {
    text.get(from - 1..to.min(text.len())).unwrap_or(&[])
}

/// A unified hunk of two functions' lines; `None` if they are equal.
pub(super) fn hunk(old: (&[String], usize), new: (&[String], usize)) -> Option<String> {
    let (a, b): (Vec<&str>, Vec<&str>) =
        (old.0.iter().map(|l| l.trim_end()).collect(), new.0.iter().map(|l| l.trim_end()).collect());
    let ops = capture_diff_slices(Algorithm::Patience, &a, &b);
    let mut lines = Vec::new();
    for group in group_diff_ops(ops, 3) {
        let (Some(first), Some(last)) = (group.first(), group.last()) else { continue };
        if group.iter().all(|op| matches!(op, DiffOp::Equal { .. })) {
            continue;
        }
        let (from, to) = (first.old_range().start, last.old_range().end);
        let (new_from, new_to) = (first.new_range().start, last.new_range().end);
        lines.push(format!("@@ -{},{} +{},{} @@", old.1 + from, to - from, new.1 + new_from, new_to - new_from));
        for op in &group {
            if let DiffOp::Equal { .. } = op {
                lines.extend(a[op.old_range()].iter().map(|l| format!(" {l}")));
            } else {
                lines.extend(a[op.old_range()].iter().map(|l| format!("-{l}")));
                lines.extend(b[op.new_range()].iter().map(|l| format!("+{l}")));
            }
        }
    }
    if lines.len() > MAX_HUNK_LINES {
        let more = lines.len() - MAX_HUNK_LINES;
        lines.truncate(MAX_HUNK_LINES);
        lines.push(format!("({more} more lines)"));
    }
    (!lines.is_empty()).then(|| lines.join("\n"))
}

/// Lines of the new text around those that are marked.
pub(super) fn excerpt(text: &[String], marked: &[u32]) -> Option<String> {
    let mut shown: Vec<usize> =
        marked.iter().take(6).flat_map(|l| (*l as usize).saturating_sub(1)..=*l as usize + 1).collect();
    shown.sort_unstable();
    shown.dedup();
    let mut out: Vec<String> = Vec::new();
    let mut last = 0;
    for at in shown.into_iter().filter(|at| (1..=text.len()).contains(at)) {
        if last > 0 && at > last + 1 {
            out.push("   ...".into());
        }
        let mark = if marked.contains(&(at as u32)) { '>' } else { ' ' };
        out.push(format!("{mark} {at:5}  {}", text[at - 1].trim_end()).trim_end().to_owned());
        last = at;
    }
    (!out.is_empty()).then(|| out.join("\n"))
}

/// `file:line`, with the file as the compiler recorded it.
pub(super) fn place(file: Option<&SourceFile>, line: SourceLine) -> Option<String> {
    file.map(|f| format!("{}:{}", f.path.rsplit('/').next().unwrap_or(&f.path), line.line))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lines(text: &str) -> Vec<String> {
        text.lines().map(str::to_owned).collect()
    }

    #[test]
    fn a_function_ends_where_its_braces_do() {
        let text = lines("int f(int a,\n      int b)\n{\n  if (a) { /* } */\n    return '}';\n  } // }\n  return \"}\"[0];\n}\nint g;");
        assert_eq!(extent(&text, 1), Some((1, 8)));
        let text = lines("fn f<'a>(x: &'a str) -> char {\n  if x == \"{\" { '{' } else { '\\'' }\n}\nfn g() {}");
        assert_eq!(extent(&text, 1), Some((1, 3)));
        assert_eq!(extent(&text, 4), Some((4, 4)));
        assert_eq!(extent(&text, 9), None);
    }

    #[test]
    fn a_hunk_has_the_lines_of_its_file() {
        let (a, b) = (lines("a\nb\nc"), lines("a\nB\nc"));
        assert_eq!(hunk((&a, 10), (&b, 20)).as_deref(), Some("@@ -10,3 +20,3 @@\n a\n-b\n+B\n c"));
        assert_eq!(hunk((&a, 10), (&a, 20)), None);
    }

    #[test]
    fn one_file_is_not_two_versions() {
        let folder = std::env::temp_dir().join(format!("patch-builder-sources-{}", std::process::id()));
        std::fs::create_dir_all(folder.join("b/src")).expect("the temporary folder is writable");
        let path = folder.join("b/src/f.c");
        std::fs::write(&path, "int x;\n").expect("the folder is writable");
        let file = SourceFile { path: path.display().to_string(), md5: None };
        let sources = Sources::new(None, None);
        assert!(matches!(sources.texts(Some(&file), Some(&file)), Texts::New(_)));
        let proven = SourceFile { md5: Some(Md5::digest(b"int x;\n").into()), ..file.clone() };
        assert!(matches!(sources.texts(Some(&proven), Some(&proven)), Texts::Both(..)));
        let other = SourceFile { md5: Some([1; 16]), ..file.clone() };
        assert!(matches!(sources.texts(Some(&other), Some(&other)), Texts::None(_)));
        let moved = SourceFile { path: "/build/pkg/src/f.c".into(), md5: None };
        let (b, elsewhere) = (folder.join("b"), Sources::new(Some(&folder), None));
        assert!(matches!(elsewhere.texts(Some(&moved), Some(&file)), Texts::New(_)), "/src/f.c is not below it");
        assert!(matches!(Sources::new(None, Some(&b)).texts(None, Some(&moved)), Texts::New(_)));
        std::fs::remove_dir_all(folder).expect("the folder can be removed");
    }
}
