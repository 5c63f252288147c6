//! The patch file's contract over time: a stored file of each released version stays readable, and what a version
//! does not know stays rejected.

mod support;

use livepatch::patch::{PatchError, PatchFile, RelocKind, RelocTarget, SegmentKind, Status};
use support::root;

fn golden(name: &str) -> Vec<u8> {
    std::fs::read(root().join("tests/golden").join(name)).expect("a stored patch")
}

/// The file with `from` replaced by `to`, of the same length, everywhere, and the digest made right again.
fn with(bytes: &[u8], from: &str, to: &str) -> Vec<u8> {
    assert_eq!(from.len(), to.len());
    let mut out = bytes.to_vec();
    let mut hits = 0;
    for at in 0..out.len() - from.len() {
        if &out[at..at + from.len()] == from.as_bytes() {
            out[at..at + from.len()].copy_from_slice(to.as_bytes());
            hits += 1;
        }
    }
    assert!(hits > 0, "{from:?} is not in the file");
    seal(out)
}

fn seal(mut bytes: Vec<u8>) -> Vec<u8> {
    let head = b"livepatch\0\0\0";
    let at = (0..bytes.len()).filter(|at| bytes[*at..].starts_with(head)).nth(1).expect("the second note") + head.len();
    let digest = livepatch::patch::file_digest(&bytes, at).expect("it lies in the file");
    bytes[at..at + 32].copy_from_slice(&digest);
    bytes
}

#[test]
fn a_patch_of_version_1_reads_as_it_did() {
    let patch = PatchFile::parse(&golden("patch-v1.so")).expect("version 1 stays readable");
    let m = &patch.manifest;
    assert_eq!((m.format, m.name.as_str(), m.builder.as_str()), (1, "golden-v1", "patch-builder 0.1.0"));
    assert_eq!(m.target.build_id.0.len(), 20);
    assert_ne!(m.target.build_id, m.new.build_id);
    assert_eq!((m.types.as_str(), m.may_unwind), ("not compared", false));
    let functions: Vec<_> = m.functions.iter().map(|f| (f.name.as_str(), f.status, f.new_at, f.new_size)).collect();
    assert_eq!(functions, [("fresh", Status::New, 0x1000, 6), ("pick", Status::Changed, 0x1010, 46)]);
    assert!(m.functions.iter().all(|f| f.address_taken), "not recorded in version 1: so it may be");
    let old = m.functions[1].old.as_ref().expect("it replaces one");
    let entry = old.entry.as_ref().expect("it has a jump");
    assert_eq!((entry.at, old.size, entry.original.0.len()), (old.at, 18, 5));
    let statics: Vec<_> = m.statics.iter().map(|s| (s.name.as_str(), s.at, s.size)).collect();
    assert_eq!(statics, [("rows", 0x2000, 48)]);
    assert!(m.imports.is_empty() && m.after.is_none() && m.hooks.is_empty() && m.layouts.is_empty());
    let kinds: Vec<_> = patch.segments.iter().map(|s| s.kind).collect();
    assert_eq!(kinds, [SegmentKind::Rodata, SegmentKind::Text, SegmentKind::Data]);
    assert!(patch.eh_frame.is_some());
    let image = patch.relocs.iter().filter(|r| matches!(r.target, RelocTarget::Image(_))).count();
    assert_eq!((patch.relocs.len(), image), (5, 2));
    assert!(patch.relocs.iter().all(|r| r.kind == RelocKind::Abs64));
}

#[test]
fn what_version_1_did_not_know_stays_rejected_in_it() {
    let bytes = golden("patch-v1.so");
    // A field of version 2 in place of one of version 1, and hooks that no writer of version 1 wrote.
    for (from, to) in [("\"builder\"", "\"layouts\""), ("\"hooks\": []", "\"hooks\":[1]")] {
        let e = PatchFile::parse(&with(&bytes, from, to)).expect_err(to);
        assert!(matches!(e, PatchError::Manifest(_)), "{from}: {e}");
    }
    // Note and manifest must agree on the version.
    let e = PatchFile::parse(&with(&bytes, "\"format\": 1", "\"format\": 2")).expect_err("another version");
    assert!(matches!(e, PatchError::Version(2)), "{e}");
    // Relocations of version 2: to the previous patch, and to an undefined symbol.
    for section in [0xff21u16, 0] {
        let mut changed = bytes.clone();
        let image = 0xff20u16.to_le_bytes();
        let symbol =
            (0..changed.len()).rfind(|at| changed[*at..].starts_with(&image)).expect("an address of the image");
        changed[symbol..symbol + 2].copy_from_slice(&section.to_le_bytes());
        let e = PatchFile::parse(&seal(changed)).expect_err("an unknown section");
        assert!(matches!(e, PatchError::Malformed(_)), "{section:#x}: {e}");
    }
}

#[test]
fn a_patch_of_version_2_reads_as_it_did() {
    let bytes = golden("patch-v2.so");
    let patch = PatchFile::parse(&bytes).expect("version 2 stays readable");
    let m = &patch.manifest;
    assert_eq!((m.format, m.name.as_str(), m.linked.as_ref()), (2, "golden-v2", None));
    let imports: Vec<String> = m.imports.iter().map(livepatch::patch::Import::symbol).collect();
    assert_eq!(imports, ["realpath@GLIBC_2.2.5"]);
    assert!(patch.relocs.iter().any(|r| r.target == RelocTarget::Import(0)));
    // A field of version 3 in place of one of version 2.
    let e = PatchFile::parse(&with(&bytes, "\"states\"", "\"linked\"")).expect_err("of version 3");
    assert!(matches!(e, PatchError::Manifest(_)), "{e}");
}

#[test]
fn a_version_that_is_not_known_is_rejected_by_number() {
    let mut bytes = golden("patch-v1.so");
    let head = b"livepatch\0\0\0\x01\0\0\0";
    let at = (0..bytes.len()).find(|at| bytes[*at..].starts_with(head)).expect("the note") + head.len() - 4;
    bytes[at] = 4;
    let e = PatchFile::parse(&seal(bytes)).expect_err("version 4 does not exist");
    assert!(matches!(e, PatchError::Version(4)), "{e}");
    assert!(e.to_string().contains("format 4"), "{e}");
}
