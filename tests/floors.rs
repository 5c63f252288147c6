//! The documents cannot drift from the code: docs/architecture.md says which room may import which, where `unsafe`
//! is, and docs/safety.md what every refusal means; these tests read them and the sources.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

/// The longest a source file may be.
const MAX_LINES: usize = 600;

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

fn read(path: impl AsRef<Path>) -> String {
    let path = root().join(path);
    fs::read_to_string(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()))
}

/// Every file with the extension under a folder, as paths from the repository's root, sorted.
fn files(folder: &str, extension: &str) -> Vec<PathBuf> {
    let (mut out, mut open) = (Vec::new(), vec![root().join(folder)]);
    while let Some(folder) = open.pop() {
        let list = fs::read_dir(&folder).unwrap_or_else(|e| panic!("{}: {e}", folder.display()));
        for path in list.map(|e| e.expect("an entry of a folder").path()) {
            if path.is_dir() {
                open.push(path);
            } else if path.extension().is_some_and(|e| e == extension) {
                out.push(path.strip_prefix(root()).expect("below the root").to_owned());
            }
        }
    }
    out.sort();
    out
}

/// The part of a document under a heading, up to the next heading.
fn part<'a>(document: &'a str, heading: &str) -> &'a str {
    let from = document.find(heading).unwrap_or_else(|| panic!("docs/architecture.md has no heading {heading:?}"));
    let body = &document[from + heading.len()..];
    &body[..body.find("\n#").unwrap_or(body.len())]
}

/// What stands in backquotes.
fn quoted(text: &str) -> Vec<&str> {
    text.split('`').skip(1).step_by(2).collect()
}

/// Each room of a floor table: its floor, and the row that it stands in (rooms of one row may know each other).
fn floor_table(heading: &str) -> BTreeMap<String, (u32, usize)> {
    let document = read("docs/architecture.md");
    let mut out = BTreeMap::new();
    for (row, line) in part(&document, heading).lines().enumerate() {
        let cells: Vec<&str> = line.split('|').map(str::trim).collect();
        let Some(floor) = cells.get(1).and_then(|c| c.parse().ok()) else { continue };
        for room in quoted(cells[2]) {
            assert!(out.insert(room.to_owned(), (floor, row)).is_none(), "{heading}: {room} stands there twice");
        }
    }
    assert!(!out.is_empty(), "{heading}: no table of floors");
    out
}

/// A source text without comments and without what stands in string literals.
fn bare(text: &str) -> String {
    let (mut out, mut rest) = (String::with_capacity(text.len()), text);
    while let Some(c) = rest.chars().next() {
        let skip = if rest.starts_with("//") {
            rest.find('\n').unwrap_or(rest.len())
        } else if rest.starts_with("/*") {
            rest.find("*/").map_or(rest.len(), |end| end + 2)
        } else if let Some(raw) = rest.strip_prefix("r#\"") {
            raw.find("\"#").map_or(rest.len(), |end| end + 5)
        } else if c == '"' {
            let mut escaped = false;
            let end = rest.char_indices().skip(1).find(|(_, c)| {
                let ends = *c == '"' && !escaped;
                escaped = *c == '\\' && !escaped;
                ends
            });
            end.map_or(rest.len(), |(at, _)| at + 1)
        } else if rest.starts_with("'\"'") || rest.starts_with("'\\\"'") {
            rest[1..].find('\'').map_or(rest.len(), |end| end + 2)
        } else {
            out.push(c);
            rest = &rest[c.len_utf8()..];
            continue;
        };
        out.extend(rest[..skip].chars().filter(|c| *c == '\n')); // lines keep their numbers
        rest = &rest[skip..];
    }
    out
}

/// The first names after every `KRATE::` of a source text, with the line: `crate::{a::X, b}` gives `a` and `b`.
fn imports(text: &str, krate: &str) -> Vec<(usize, String)> {
    let (text, mark) = (bare(text), format!("{krate}::"));
    let mut out = Vec::new();
    for (at, _) in text.match_indices(&mark) {
        let is_part = |c: char| c.is_alphanumeric() || c == '_';
        if text[..at].chars().next_back().is_some_and(|c| is_part(c) || c == ':') {
            continue;
        }
        let line = text[..at].matches('\n').count() + 1;
        let rest = &text[at + mark.len()..];
        let name = |s: &str| s.trim_start().chars().take_while(|c| is_part(*c) || *c == '*').collect::<String>();
        let Some(list) = rest.strip_prefix('{') else {
            out.push((line, name(rest)));
            continue;
        };
        let (mut depth, mut start) = (0, 0);
        for (i, c) in list.char_indices() {
            match c {
                '{' => depth += 1,
                '}' if depth > 0 => depth -= 1,
                ',' | '}' if depth == 0 => {
                    out.push((line, name(&list[start..i])));
                    start = i + 1;
                    if c == '}' {
                        break;
                    }
                }
                _ => {}
            }
        }
        out.retain(|(_, n)| !n.is_empty());
    }
    out
}

/// The room that a file below `src` belongs to: `lib.rs`, or its first folder or file name.
fn room_of(file: &Path, src: &str) -> String {
    let inner = file.strip_prefix(src).expect("a file of this package");
    let first = inner.iter().next().expect("a name").to_string_lossy();
    match first.as_ref() {
        "lib.rs" | "main.rs" => first.into_owned(),
        name => name.trim_end_matches(".rs").to_owned(),
    }
}

/// Every import of a package that does not run downward.
fn upward(src: &str, heading: &str, own_name: &str) -> Vec<String> {
    let floors = floor_table(heading);
    let mut wrong = Vec::new();
    let mut seen = BTreeSet::new();
    for file in files(src, "rs") {
        let (room, text) = (room_of(&file, src), read(&file));
        seen.insert(room.clone());
        let Some(&(floor, row)) = floors.get(&room) else {
            wrong.push(format!("{}: the room {room} is not in the table", file.display()));
            continue;
        };
        // In the command's own crate the library goes by its name.
        let in_binary = floors.get("lib.rs").is_some_and(|(face, _)| floor > *face);
        let krate = if in_binary { own_name } else { "crate" };
        if room == "lib.rs" {
            continue; // the face shows every room
        }
        for (line, to) in imports(&text, krate) {
            let place = format!("{}:{line}: {room} (floor {floor})", file.display());
            match floors.get(&to) {
                Some((_, its_row)) if *its_row == row => {}
                Some((below, _)) if *below < floor => {}
                Some((above, _)) => wrong.push(format!("{place} imports {to} (floor {above})")),
                None if in_binary => {} // an item of the public face
                None => wrong.push(format!("{place} imports {to}, which is no room of the table")),
            }
        }
        // Ways out of a room that do not name it.
        let bare = bare(&text);
        let is_top = file.strip_prefix(src).expect("below src").iter().count() == 1;
        if bare.contains("super::super") || is_top && bare.lines().any(|l| l.starts_with("use super")) {
            wrong.push(format!("{}: leaves its room by `super`; say `crate::room`", file.display()));
        }
    }
    for room in floors.keys().filter(|r| !seen.contains(*r)) {
        wrong.push(format!("{heading}: there is no room {room} in {src}"));
    }
    wrong
}

#[track_caller]
fn none(wrong: &[String], what: &str) {
    assert!(wrong.is_empty(), "{what}:\n  {}", wrong.join("\n  "));
}

#[test]
fn imports_of_the_engine_run_downward() {
    none(&upward("src", "### Floors of livepatch", "livepatch"), "docs/architecture.md, floors of livepatch");
}

#[test]
fn imports_of_patch_builder_run_downward() {
    let wrong = upward("patch-builder/src", "### Floors of patch-builder", "patch_builder");
    none(&wrong, "docs/architecture.md, floors of patch-builder");
}

#[test]
fn patch_builder_knows_the_format_and_nothing_else_of_the_engine() {
    let mut wrong = Vec::new();
    for file in files("patch-builder/src", "rs") {
        for (line, to) in imports(&read(&file), "livepatch") {
            if !["addr", "patch", "signature"].contains(&to.as_str()) {
                wrong.push(format!("{}:{line}: livepatch::{to}", file.display()));
            }
        }
    }
    none(&wrong, "patch-builder may use livepatch::addr, livepatch::patch and livepatch::signature only");
    let manifest = read("patch-builder/Cargo.toml");
    let dependency = manifest.lines().find(|l| l.starts_with("livepatch")).expect("it depends on livepatch");
    assert!(dependency.contains("default-features = false"), "patch-builder must not build the engine: {dependency}");
}

#[test]
fn unsafe_code_is_where_the_document_says() {
    let document = read("docs/architecture.md");
    let said: BTreeSet<String> = part(&document, "### Where unsafe code is")
        .lines()
        .filter(|l| l.starts_with('|'))
        .filter_map(|l| quoted(l).first().map(|s| (*s).to_owned()))
        .collect();
    let folders = ["include", "src", "patch-builder/src", "sample-gateway/src", "sample-gateway/interface/src"];
    let found: BTreeSet<String> = folders
        .iter()
        .flat_map(|f| files(f, "rs"))
        .filter(|f| bare(&read(f)).contains("allow(unsafe_code)"))
        .map(|f| f.display().to_string())
        .collect();
    assert_eq!(found, said, "files that allow unsafe code (left) and docs/architecture.md (right)");
    assert!(read("patch-builder/src/lib.rs").contains("#![forbid(unsafe_code)]"), "patch-builder has no unsafe code");
}

#[test]
fn no_file_is_too_long() {
    let folders = ["include", "src", "patch-builder", "sample-gateway", "tests"];
    let wrong: Vec<String> = folders
        .iter()
        .flat_map(|f| files(f, "rs"))
        .map(|f| (read(&f).lines().count(), f))
        .filter(|(lines, _)| *lines > MAX_LINES)
        .map(|(lines, f)| format!("{}: {lines} lines", f.display()))
        .collect();
    none(&wrong, &format!("files over {MAX_LINES} lines ask to be two rooms"));
}

/// The string that follows each mark.
fn literals<'a>(text: &'a str, mark: &str) -> Vec<&'a str> {
    let after = text.match_indices(mark).map(|(at, _)| text[at + mark.len()..].trim_start());
    after.filter_map(|t| t.strip_prefix('"')?.split('"').next()).collect()
}

#[test]
fn every_refusal_is_explained() {
    let mut names: BTreeSet<(String, &str)> = BTreeSet::new();
    let engine = read("src/plan/refusal.rs");
    let kinds = &engine[engine.find("fn kind").expect("kinds")..engine.find("fn remedy").expect("remedies")];
    names.extend(literals(kinds, "=>").into_iter().map(|k| (k.to_owned(), "livepatch")));
    for file in files("patch-builder/src", "rs") {
        let text = read(&file);
        for mark in ["refuse(", "rule:"] {
            let noise = |rule: &&str| !["location", "line-immediate", "padding"].contains(rule);
            names.extend(literals(&text, mark).into_iter().filter(noise).map(|r| (r.to_owned(), "patch-builder")));
        }
    }
    assert!(names.len() > 30, "only {} refusals found: {names:?}", names.len());
    let document = read("docs/safety.md");
    let unsaid = names.iter().filter(|(name, _)| !document.contains(&format!("| `{name}` |")));
    let wrong: Vec<String> = unsaid.map(|(name, tool)| format!("{name} ({tool})")).collect();
    none(&wrong, "docs/safety.md has no row for");
}

#[test]
fn links_lead_somewhere() {
    let mut wrong = Vec::new();
    let documents = files("docs", "md").into_iter().chain([PathBuf::from("README.md")]);
    for document in documents {
        let (text, folder) = (read(&document), root().join(&document).parent().expect("a folder").to_owned());
        let (mut in_code, mut prose) = (false, String::new());
        for line in text.lines() {
            if line.trim_start().starts_with("```") {
                in_code = !in_code;
            } else if !in_code {
                prose.push_str(line);
                prose.push('\n');
            }
        }
        for (at, _) in prose.match_indices("](") {
            let target = prose[at + 2..].split(')').next().unwrap_or("");
            let path = target.split('#').next().unwrap_or("");
            if path.is_empty() || path.contains("://") || folder.join(path).exists() {
                continue;
            }
            wrong.push(format!("{}: {target}", document.display()));
        }
    }
    none(&wrong, "links to what is not there");
}

#[test]
fn the_reader_of_imports_sees_what_it_should() {
    let text =
        "use crate::{a::X, b, c::{D, E}};\n// crate::comment\nlet s = \"crate::string\"; crate::f::g();\nmycrate::h;";
    let found: Vec<(usize, String)> = imports(text, "crate");
    let want = [(1, "a"), (1, "b"), (1, "c"), (3, "f")].map(|(l, n)| (l, n.to_owned()));
    assert_eq!(found, want);
    assert_eq!(imports("'\"'; crate::x::Y; '\"'", "crate"), [(1, "x".to_owned())]);
}
