//! patch-builder's check of its own output: it must pass what is right, and object to every kind of damage.

use std::cell::Cell;
use std::path::{Path, PathBuf};
use std::process::Command;

use livepatch::patch::{file_digest, PatchFile, Reloc, RelocKind, RelocTarget};
use patch_builder::{run_with, Options};

/// One change with everything in it: calls of old and new functions, an import, a new static with pointers, a string, a jump
/// table, a constant, an exception handler with a type.
const SOURCE: &str = r#"
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <stdexcept>
long limit = 100;
static long calls;
#define KEEP __attribute__((noipa))
KEEP long plain(long n) { return n + limit; }
KEEP long other(long n) { return n - limit; }
KEEP void check(long n) { if (n > 1000) throw std::runtime_error("too much"); }
#ifdef NEW
KEEP long fresh(long n) { return n * 3; }
struct row { long (*call)(long); long *value; const char *text; };
static struct row rows[] = { { plain, &limit, "first" }, { fresh, &calls, "second" } };
#endif
KEEP long fee(long n, int side)
{
    calls++;
#ifdef NEW
    struct row *r = rows;
    asm("" : "+r"(r));
    const char *name = "none";
    switch (side) { case 1: name = "buy"; break; case 2: name = "sell"; break; case 3: name = "short"; break;
        case 4: name = "cross"; break; case 5: n += plain(n); name = "quote"; break; case 6: n -= other(n); name = "six"; break; }
    try { check(n); } catch (const std::runtime_error &e) { std::puts(e.what()); return -1; }
    return n + r[n & 1].call(n) + (long)std::strlen(name) + (long)std::strtoul(name, nullptr, 36) + (long)(n * 1.25);
#else
    try { check(n); } catch (const std::runtime_error &e) { std::puts(e.what()); return -1; }
    return plain(n) + other(n) + side;
#endif
}
int main(int argc, char **argv) { return (int)fee(argc, std::atoi(argv[argc - 1])); }
"#;

fn build(folder: &Path, name: &str, flags: &[&str]) -> PathBuf {
    let source = folder.join("main.cc");
    std::fs::write(&source, SOURCE).expect("the folder is writable");
    let out = folder.join(name);
    let mut command = Command::new("g++");
    command.args(["-g", "-O2", "-Wl,--emit-relocs", "-Wl,--build-id"]).args(flags);
    assert!(command.arg("-o").arg(&out).arg(&source).status().expect("g++ runs").success());
    out
}

struct Pair {
    folder: PathBuf,
    options: Options,
}

impl Pair {
    fn new(name: &str) -> Self {
        let folder = std::env::temp_dir().join(format!("patch-builder-selfcheck-{name}-{}", std::process::id()));
        std::fs::create_dir_all(&folder).expect("the temporary folder is writable");
        let (old, new) = (build(&folder, "old", &[]), build(&folder, "new", &["-DNEW"]));
        Self { options: Options { old, new, name: "fix".into(), ..Options::default() }, folder }
    }

    /// Hands over the patch, and what tells the check's objection to damaged bytes, whose digest is made right again.
    fn examine(&self, test: impl Fn(&[u8], &PatchFile, &dyn Fn(&dyn Fn(&mut Vec<u8>)) -> Option<String>)) {
        let ran = Cell::new(false);
        let outcome = run_with(&self.options, &|bytes, check| {
            let patch = PatchFile::parse(bytes).expect("it reads back");
            test(bytes, &patch, &|damage| {
                let mut damaged = bytes.to_vec();
                damage(&mut damaged);
                seal(&mut damaged);
                check(&damaged).err().map(|e| e.to_string())
            });
            ran.set(true);
        });
        let outcome = outcome.expect("they differ");
        assert!(outcome.report.refusals.is_empty(), "{:?}", outcome.report.refusals);
        assert!(ran.get() && outcome.patch.is_some());
    }
}

fn seal(bytes: &mut [u8]) {
    let head = b"livepatch\0\0\0";
    let notes = (0..bytes.len()).filter(|at| bytes[*at..].starts_with(head));
    let at = notes.map(|at| at + head.len()).nth(1).expect("the second note");
    let digest = file_digest(bytes, at).expect("it lies in the file");
    bytes[at..at + 32].copy_from_slice(&digest);
}

impl Drop for Pair {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.folder);
    }
}

/// File offset of an address of the patch.
fn file_at(at: u64) -> usize {
    at as usize + 4096
}

/// File offset of the entry of this relocation.
fn entry_of(bytes: &[u8], reloc: &Reloc) -> usize {
    let kind: u32 = match reloc.kind {
        RelocKind::Abs64 => 1,
        RelocKind::Pc32 => 2,
        RelocKind::Abs32 => 11,
    };
    let is = |at: &usize| {
        bytes[*at..].starts_with(&reloc.at.to_le_bytes()) && bytes[*at + 8..].starts_with(&kind.to_le_bytes())
    };
    (0..bytes.len() - 24).step_by(8).find(is).expect("its entry")
}

fn add(bytes: &mut [u8], at: usize, by: i64) {
    let word = i64::from_le_bytes(bytes[at..at + 8].try_into().expect("eight bytes"));
    bytes[at..at + 8].copy_from_slice(&(word + by).to_le_bytes());
}

#[test]
fn an_undamaged_patch_passes_and_holds_one_of_everything() {
    Pair::new("right").examine(|_, patch, objection| {
        let m = &patch.manifest;
        assert_eq!(
            m.imports.iter().map(|i| i.symbol()).collect::<Vec<_>>(),
            ["strlen@GLIBC_2.2.5", "strtoul@GLIBC_2.2.5"]
        );
        assert_eq!(m.statics.iter().map(|s| s.name.as_str()).collect::<Vec<_>>(), ["rows"]);
        let fresh = m.functions.iter().find(|f| f.demangled.starts_with("fresh")).expect("a new function");
        assert!(fresh.address_taken, "its address is in a table");
        assert!(patch.relocs.iter().any(|r| matches!(r.target, RelocTarget::Import(_))));
        assert_eq!(objection(&|_| {}), None);
    });
}

#[test]
fn another_target_is_seen() {
    Pair::new("target").examine(|bytes, patch, objection| {
        // Every relocation, one after the other, to what the next one refers to.
        let mut seen = 0;
        for (i, r) in patch.relocs.iter().enumerate() {
            let others = patch.relocs.iter().cycle().skip(i + 1).take(patch.relocs.len());
            let symbol = |r: &Reloc| {
                let at = entry_of(bytes, r) + 12;
                <[u8; 4]>::try_from(&bytes[at..at + 4]).expect("four bytes")
            };
            let Some(other) = others.map(symbol).find(|s| *s != symbol(r)) else { continue };
            let at = entry_of(bytes, r) + 12;
            let objection = objection(&|b| b[at..at + 4].copy_from_slice(&other));
            assert!(objection.is_some(), "nobody objects to another target at {:#x}: {:?}", r.at, r.target);
            seen += 1;
        }
        assert!(seen > 10, "only {seen} relocations");
    });
}

#[test]
fn another_addend_is_seen() {
    Pair::new("addend").examine(|bytes, patch, objection| {
        for r in &patch.relocs {
            let at = entry_of(bytes, r) + 16;
            for by in [8, -8, 1] {
                let objection = objection(&|b| add(b, at, by));
                assert!(objection.is_some(), "nobody objects to {by} more at {:#x} -> {:?}", r.at, r.target);
            }
        }
    });
}

#[test]
fn a_missing_fixup_is_seen() {
    Pair::new("missing").examine(|bytes, patch, objection| {
        // The relocation of one place is done at another: in the padding behind some function.
        let ends = patch.manifest.functions.iter().map(|f| f.new_at + f.new_size);
        let padding = ends.clone().find(|end| bytes[file_at(*end)..].starts_with(&[0xcc; 8])).expect("padding");
        for r in &patch.relocs {
            let at = entry_of(bytes, r);
            let objection = objection(&|b| b[at..at + 8].copy_from_slice(&padding.to_le_bytes()));
            assert!(objection.is_some(), "nobody misses the relocation at {:#x}", r.at);
        }
    });
}

#[test]
fn a_changed_byte_of_code_constants_and_tables_is_seen() {
    Pair::new("bytes").examine(|bytes, patch, objection| {
        let in_field = |at: u64| {
            patch.relocs.iter().any(|r| {
                let width = if r.kind == RelocKind::Abs64 { 8 } else { 4 };
                (r.at..r.at + width).contains(&at)
            })
        };
        let (mut missed, mut tried) = (Vec::new(), 0);
        for s in &patch.segments {
            // The first segment begins with the notes.
            let from = if s.at == 0 { 256 } else { s.at };
            for at in (from..s.at + s.data.len() as u64).filter(|at| !in_field(*at)) {
                // Between the parts, or padding in the unwind table.
                if matches!(bytes[file_at(at)], 0xcc | 0) {
                    continue;
                }
                tried += 1;
                if objection(&|b| b[file_at(at)] ^= 0x04).is_none() {
                    missed.push(format!("{at:#x}"));
                }
            }
        }
        assert!(tried > 300, "only {tried} bytes");
        assert!(missed.is_empty(), "nobody objects to a changed byte at {missed:?} of {tried}");
    });
}

#[test]
fn a_wrong_exception_table_is_seen() {
    Pair::new("frames").examine(|bytes, patch, objection| {
        let (at, len) = patch.eh_frame.expect("an unwind table");
        let end = file_at(at + len - 4);
        let (mut start, mut tables) = (file_at(at), 0);
        while start < end {
            let len = u32::from_le_bytes(bytes[start..start + 4].try_into().expect("four bytes")) as usize;
            let id = u32::from_le_bytes(bytes[start + 4..start + 8].try_into().expect("four bytes"));
            // The augmentation data, four bytes: a pointer to an exception table.
            if id != 0 && bytes[start + 16] == 4 {
                for by in [1u8, 4, 0x20] {
                    let objection = objection(&|b| b[start + 17] = b[start + 17].wrapping_add(by));
                    assert!(objection.is_some(), "nobody objects to another exception table");
                }
                tables += 1;
            }
            start += len + 4;
        }
        assert!(tables > 0, "the handler's");
    });
}

#[test]
fn a_manifest_that_says_something_else_is_seen() {
    Pair::new("manifest").examine(|bytes, _, objection| {
        let text = |needle: &[u8]| (0..bytes.len()).find(|at| bytes[*at..].starts_with(needle)).expect("it is there");
        for needle in [&b"\"address_taken\": true"[..], b"\"strtoul\"", b"\"rows\"", b"\"GLIBC_2.2.5\""] {
            let at = text(needle) + needle.len() - 2;
            let objection = objection(&|b| b[at] ^= 1);
            assert!(objection.is_some(), "nobody objects to another {}", String::from_utf8_lossy(needle));
        }
    });
}
