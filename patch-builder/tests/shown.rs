//! What people read: golden text of `diff` and of refusals, and the page.

mod pairs;

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use pairs::{compile, Folder, SERVER};
use patch_builder::report::{page, Detail, Look, Refusal};
use patch_builder::{run, Options, Outcome};

/// The text at 100 columns against `tests/golden/NAME.txt`. Lengths in bytes depend on the compiler and are left out.
#[track_caller]
fn golden(name: &str, folder: &Folder, text: &str) {
    let text = text.replace(&folder.0.display().to_string(), "DIR");
    let text: Vec<String> = text.lines().map(|l| without_sizes(l).trim_end().to_owned()).collect();
    let text = text.join("\n") + "\n";
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(format!("{name}.txt"));
    if std::env::var_os("UPDATE_GOLDEN").is_some() {
        std::fs::write(&path, &text).expect("tests/golden is writable");
    }
    let want = std::fs::read_to_string(&path).unwrap_or_default();
    assert!(
        text == want,
        "{} differs; if that is meant: UPDATE_GOLDEN=1 cargo test -p patch-builder --test shown\n--- is\n{text}--- was\n{want}",
        path.display()
    );
}

/// A line with `N` for each number before the word `bytes` and in front of an arrow to one.
fn without_sizes(line: &str) -> String {
    let mut words: Vec<String> = line.split(' ').map(str::to_owned).collect();
    for i in (0..words.len()).rev() {
        let next = words.get(i + 1).map_or("", String::as_str);
        let digits = words[i].trim_start_matches('[');
        let counts =
            next.starts_with("bytes") || next == "of" || next == "->" && words.get(i + 2).is_some_and(|w| w == "N");
        if counts && !digits.is_empty() && digits.bytes().all(|b| b.is_ascii_digit()) {
            words[i] = words[i].replace(digits, "N");
        }
    }
    words.join(" ")
}

const LOOK: Look = Look { columns: Some(100), colours: false };

fn outcome(old: &Path, new: &Path) -> Outcome {
    let (old, new) = (old.to_owned(), new.to_owned());
    run(&Options { old, new, name: "fix".into(), only_report: true, detailed: true, ..Options::default() })
        .expect("they differ")
}

fn pair(folder: &Folder, edits: &[(&str, &str)]) -> (PathBuf, PathBuf) {
    let mut text = SERVER.to_owned();
    for (from, to) in edits {
        assert!(text.contains(from), "{from}");
        text = text.replace(from, to);
    }
    (folder.build("old", SERVER, &["-g"]), folder.build("new", &text, &["-g"]))
}

const EDITS: [(&str, &str); 4] =
    [("n * 70", "n * 75"), ("fee %ld", "the fee is %ld"), ("== 42", "== 43"), ("return n + 1;", "return n + step(n);")];
const STEP: (&str, &str) = ("OUT int wait_once", "OUT int step(int n) { return n * n; }\nOUT int wait_once");

#[test]
fn the_text_of_a_diff() {
    let folder = Folder::new("golden-diff");
    let edits: Vec<_> = EDITS.into_iter().chain([STEP]).collect();
    let (old, new) = pair(&folder, &edits);
    let text = outcome(&old, &new).report.text(LOOK);
    let long: Vec<_> =
        text.lines().filter(|l| l.chars().count() > 100 && !l.contains(&folder.0.display().to_string())).collect();
    assert!(long.is_empty(), "wider than 100 columns: {long:?}");
    golden("diff", &folder, &text);
}

#[test]
fn the_text_of_a_refusal() {
    let folder = Folder::new("golden-refusal");
    let (old, new) = pair(&folder, &[("long total;", "long total = 5;"), ("n * 70", "n * 75")]);
    let report = outcome(&old, &new).report;
    golden("refusal", &folder, &report.refusal_text(LOOK));
}

#[test]
fn moved_lines_are_said_to_be_noise() {
    let folder = Folder::new("golden-noise");
    let with_line = SERVER.replace("return n + 1;", "printf(\"%d\", __LINE__); return n + 1;");
    let moved = with_line.replace("OUT int wait_once", "\n\nOUT int wait_once").replace("n * 70", "n * 75");
    let (old, new) = (folder.build("old", &with_line, &["-g"]), folder.build("new", &moved, &["-g"]));
    golden("noise", &folder, &outcome(&old, &new).report.text(LOOK));
}

#[test]
fn colours_are_for_terminals() {
    let folder = Folder::new("colours");
    let (old, new) = pair(&folder, &[("n * 70", "n * 75")]);
    let report = outcome(&old, &new).report;
    assert!(report.text(Look { colours: true, ..LOOK }).contains("\x1b["));
    assert!(!report.text(LOOK).contains('\x1b'));
    let ran = diff(&old, &new, &[]);
    assert!(!String::from_utf8_lossy(&ran.stdout).contains('\x1b'), "a pipe is no terminal");
}

fn diff(old: &Path, new: &Path, more: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_patch-builder"));
    command.arg("diff").args([old, new]).args(more).output().expect("it runs")
}

/// Fails unless every element is closed in order and every attribute quoted.
#[track_caller]
fn well_formed(html: &str) {
    const VOID: [&str; 6] = ["meta", "input", "br", "hr", "img", "link"];
    let mut open: Vec<&str> = Vec::new();
    let mut rest = html.strip_prefix("<!DOCTYPE html>").expect("a doctype");
    while let Some(at) = rest.find('<') {
        let tag = &rest[at + 1..];
        // `>` within quotes belongs to the attribute
        let mut quoted = false;
        let end = tag.char_indices().find(|(_, c)| {
            quoted ^= *c == '"';
            *c == '>' && !quoted
        });
        let (end, _) = end.unwrap_or_else(|| panic!("an open tag: {:.80}", tag));
        let name = tag[..end].split([' ', '/']).find(|w| !w.is_empty()).unwrap_or("");
        if tag.starts_with('/') {
            assert_eq!(open.pop(), Some(name), "closed out of order near {:.80}", tag);
        } else if !VOID.contains(&name) {
            open.push(name);
        }
        assert!(tag[..end].matches('"').count().is_multiple_of(2), "{:.80}", tag);
        rest = &tag[end + 1..];
        if let Some(raw) = ["style", "script"].iter().find(|raw| open.last() == Some(raw)) {
            rest = &rest[rest.find(&format!("</{raw}")).expect("it ends")..];
        }
    }
    assert!(open.is_empty(), "never closed: {open:?}");
}

/// Fails if anything on the page would be fetched.
#[track_caller]
fn self_contained(html: &str) {
    for mark in
        ["http://", "https://", "src=", "@import", "url(\"", "url('", "<link", "<iframe", "<object", "xlink:", "fetch("]
    {
        assert!(!html.contains(mark), "{mark} on the page");
    }
    let ids: BTreeSet<&str> = html.split(" id=\"").skip(1).filter_map(|s| s.split('"').next()).collect();
    for to in html.split("href=\"#").skip(1).filter_map(|s| s.split('"').next()) {
        assert!(ids.contains(to), "a link to #{to}, which is not there");
    }
    assert!(html.contains("default-src 'none'"));
}

#[test]
fn the_page_holds_every_function_and_needs_nothing_else() {
    let folder = Folder::new("page");
    let edits: Vec<_> = EDITS.into_iter().chain([STEP]).collect();
    let (old, new) = pair(&folder, &edits);
    let out = folder.0.join("page.html");
    let ran = diff(&old, &new, &["--html", out.to_str().expect("UTF-8"), "--json"]);
    assert_eq!(ran.status.code(), Some(0), "{}", String::from_utf8_lossy(&ran.stderr));
    let report: serde_json::Value = serde_json::from_slice(&ran.stdout).expect("JSON");
    let html = std::fs::read_to_string(&out).expect("the page was written");
    well_formed(&html);
    self_contained(&html);
    let functions = report["functions"].as_array().expect("functions");
    assert!(functions.len() >= 5, "{functions:?}");
    for f in functions {
        let name = f["demangled"].as_str().expect("a name");
        assert!(html.contains(&format!("<summary><code>{name}</code>")), "{name} has no listing");
    }
    // both sides of one changed instruction, its source, and the callers' graph
    for part in [
        "cmp eax, 0x2a",
        "cmp eax, 0x2b",
        "stop = handle(fd) == 43;",
        "<title>main</title>",
        "may never be off the stack",
    ] {
        assert!(html.contains(part), "no {part}");
    }
}

#[test]
fn a_refused_pair_has_its_reason_and_remedy_first() {
    let folder = Folder::new("page-refused");
    let (old, new) = pair(&folder, &[("long total;", "long total = 5;"), ("n * 70", "n * 75")]);
    let outcome = outcome(&old, &new);
    let html = page(&outcome.report, outcome.detail.as_ref().expect("it was asked for"));
    well_formed(&html);
    self_contained(&html);
    let (refusal, functions) =
        (html.find("id=\"refusals\"").expect("refusals"), html.find("id=\"functions\"").expect("functions"));
    assert!(refusal < functions && html.contains("What to do: "), "refusals come first");
    assert!(html.contains("initial-value"));
}

#[test]
fn names_of_a_build_cannot_write_the_page() {
    let folder = Folder::new("page-escape");
    let evil = "<script>alert(1)</script>&\"'";
    let plain = "e".repeat(evil.len());
    let text = format!(
        "#include <stdio.h>\n__attribute__((noinline)) int {plain}(int n) {{ puts(\"</style><b>x\"); return n * FACTOR; }}\n\
         int main(int c, char **v) {{ return {plain}(c); }}\n"
    );
    let source = folder.0.join("evil.c");
    std::fs::write(&source, text).expect("the folder is writable");
    let build = |name: &str, factor: &str| {
        let out = compile(&source, &folder.0.join(name), &["-g", factor]);
        // No assembler takes such a name; a linked file may hold it.
        let mut bytes = std::fs::read(&out).expect("it was just built");
        let places: Vec<usize> =
            (0..bytes.len() - evil.len()).filter(|i| bytes[*i..].starts_with(plain.as_bytes())).collect();
        places.iter().for_each(|i| bytes[*i..*i + evil.len()].copy_from_slice(evil.as_bytes()));
        std::fs::write(&out, bytes).expect("the folder is writable");
        out
    };
    let (old, new) = (build("old", "-DFACTOR=3"), build("new", "-DFACTOR=7"));
    let mut outcome = outcome(&old, &new);
    assert!(outcome.report.functions[0].demangled.contains("<script>"), "{:?}", outcome.report.functions[0]);
    let evil = "</pre><img src=x onerror=alert(1)>".to_owned();
    outcome.report.refusals.push(Refusal { old: Some(evil.clone()), new: Some(evil), ..Refusal::default() });
    let html = page(&outcome.report, outcome.detail.as_ref().unwrap_or(&Detail::default()));
    well_formed(&html);
    assert!(!html.contains("<script>alert") && !html.contains("<img") && !html.contains("</style><b>"));
    assert!(html.contains("&lt;script&gt;alert(1)&lt;/script&gt;"));
}
