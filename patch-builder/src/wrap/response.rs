//! Arguments in files: `@file`, as gcc, clang and the linkers read it.

use std::path::Path;

/// How deep files may name files.
const MAX_DEPTH: usize = 16;

/// The arguments with every `@file` replaced by what it holds; one that cannot be read stays, as with gcc.
#[must_use]
pub fn expand(args: &[String]) -> Vec<String> {
    let mut out = Vec::new();
    into(args, 0, &mut out);
    out
}

fn into(args: &[String], depth: usize, out: &mut Vec<String>) {
    for arg in args {
        let file = arg.strip_prefix('@').filter(|_| depth < MAX_DEPTH);
        match file.and_then(|f| std::fs::read(Path::new(f)).ok()) {
            Some(text) => into(&words(&String::from_utf8_lossy(&text)), depth + 1, out),
            None => out.push(arg.clone()),
        }
    }
}

/// Splits at white space; quotes of both kinds hold together, and a backslash takes the next character as it is.
fn words(text: &str) -> Vec<String> {
    let (mut out, mut word, mut quote) = (Vec::new(), None::<String>, None);
    let mut chars = text.chars();
    while let Some(c) = chars.next() {
        match (c, quote) {
            ('\\', _) => word.get_or_insert_default().extend(chars.next()),
            (c, Some(q)) if c == q => quote = None,
            ('"' | '\'', None) => {
                quote = Some(c);
                word.get_or_insert_default();
            }
            (c, None) if c.is_ascii_whitespace() => out.extend(word.take()),
            (c, _) => word.get_or_insert_default().push(c),
        }
    }
    out.extend(word);
    out
}

/// The arguments as the text of such a file.
#[must_use]
pub fn text(args: &[String]) -> String {
    let quoted = |a: &String| {
        let inner: String =
            a.chars().flat_map(|c| ['\\', c].into_iter().skip(usize::from(!matches!(c, '"' | '\\')))).collect();
        format!("\"{inner}\"\n")
    };
    args.iter().map(quoted).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_are_split_as_gcc_does() {
        let got = words("-c  'a b.c' \"c\\\"d\" e\\ f\n-DX='\"s\"' ''");
        assert_eq!(got, ["-c", "a b.c", "c\"d", "e f", "-DX=\"s\"", ""]);
        assert_eq!(words(&text(&got)), got);
    }

    #[test]
    fn files_are_read_and_missing_ones_stay() {
        let path = std::env::temp_dir().join(format!("patch-builder-response-{}", std::process::id()));
        std::fs::write(&path, format!("-s 'x y.o' @{} @nowhere", path.display())).expect("written");
        let got = expand(&["a.o".into(), format!("@{}", path.display())]);
        std::fs::remove_file(&path).expect("removed");
        assert_eq!(got[..3], ["a.o", "-s", "x y.o"]);
        assert_eq!(got.iter().filter(|a| *a == "@nowhere").count(), MAX_DEPTH, "a file that names itself ends");
    }
}
