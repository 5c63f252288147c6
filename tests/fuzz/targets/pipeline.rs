//! The whole way from two builds to a patch, with bytes of the builds flipped: no panic, and never a wrong patch.
//!
//! What is guaranteed, and held here: the patch that comes of damaged builds either is refused by the engine on a
//! process of the true old build (it names another build-id, or other bytes of a function), or passes the check of
//! patch-builder's own output against the *true* old build and the new one. Of the new build, what is loaded counts as
//! flipped (it is then another program, which the patch must bring); names, relocations and debug information do not.
//! What cannot be known: a flip in the old file's constants or initial values. Nothing of the process is compared with
//! those; `sha256` in a record of the store is what guards them.
#![no_main]

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::OnceLock;

use livepatch::patch::PatchFile;
use object::{Object as _, ObjectSection as _};
use patch_builder::build::Build;
use patch_builder::diff::{diff, DiffOptions};
use patch_builder::pair::pair;
use patch_builder::side::Side;
use patch_builder::verify::{verify, Meant};
use patch_builder::{run, Options};
use sha2::{Digest as _, Sha256};

const OLD: &[u8] = include_bytes!("../pairs/old");
const NEW: &[u8] = include_bytes!("../pairs/new");

/// A section of a build: where it lies in the file, whether it is loaded, whether it is data that nobody digests.
struct Place {
    at: usize,
    len: usize,
    loaded: bool,
    plain_data: bool,
}

fn places(bytes: &[u8]) -> Vec<Place> {
    let file = object::File::parse(bytes).expect("the stored build is whole");
    let mut out = vec![Place { at: 0, len: 0x318, loaded: false, plain_data: false }];
    for s in file.sections() {
        let Some((at, len)) = s.file_range().filter(|(_, len)| *len > 0) else { continue };
        let name = s.name().unwrap_or("");
        out.push(Place {
            at: at as usize,
            len: len as usize,
            loaded: s.address() != 0,
            plain_data: [".rodata", ".data", ".data.rel.ro", ".init_array", ".fini_array"].contains(&name),
        });
    }
    // The section headers.
    let table = u64::from_le_bytes(bytes[40..48].try_into().expect("eight bytes")) as usize;
    out.push(Place { at: table, len: bytes.len() - table, loaded: false, plain_data: false });
    out
}

fn folder() -> &'static PathBuf {
    static FOLDER: OnceLock<PathBuf> = OnceLock::new();
    FOLDER.get_or_init(|| {
        let base = if PathBuf::from("/dev/shm").is_dir() { "/dev/shm".into() } else { std::env::temp_dir() };
        let dir = base.join(format!("livepatch-fuzz-{}", std::process::id()));
        std::fs::create_dir_all(&dir).expect("a folder");
        dir
    })
}

/// Whether the engine would refuse the patch on a process of the true old build.
fn engine_refuses(patch: &PatchFile, old: &Build<'_>) -> bool {
    let m = &patch.manifest;
    if m.target.build_id.0 != old.build_id {
        return true;
    }
    let other = |at: u64, len: u64, sha: &[u8]| old.bytes(at, len).is_none_or(|b| Sha256::digest(b)[..] != *sha);
    m.functions.iter().filter_map(|f| f.old.as_ref()).any(|o| {
        other(o.at.0, o.size, &o.sha256.0)
            || o.companions.iter().any(|c| other(c.at.0, c.size, &c.sha256.0))
            || o.entry.as_ref().is_some_and(|e| old.bytes(e.at.0, e.original.0.len() as u64) != Some(&e.original.0[..]))
    })
}

/// The check of a finished patch, against builds that it was not made of.
fn is_right(bytes: &[u8], patch: &PatchFile, new_bytes: &[u8], flipped: &[u8]) -> Result<(), String> {
    let old = Side::new(Build::parse("old", OLD).map_err(|e| e.to_string())?);
    // A new build that cannot be read without the other flips says nothing.
    let Ok(new) = Build::parse("new", new_bytes) else { return Ok(()) };
    let new = Side::new(new);
    let pairing = pair(&old, &new);
    let found = diff(&old, &new, (OLD, new_bytes), &pairing, DiffOptions { strict_locations: false });
    // A flipped name is still the function that it names.
    let named = Build::parse("new", flipped).map_err(|e| e.to_string())?;
    let mut placed = BTreeMap::new();
    for f in &patch.manifest.functions {
        let at = named.funcs.iter().find(|g| g.names.iter().any(|n| n.text == f.name)).map(|g| g.addr);
        let id = (0..new.build.funcs.len() as u32).find(|id| Some(new.build.func(*id).addr) == at);
        let Some(id) = id else { return Err(format!("{} is no function of the new build", f.name)) };
        placed.insert(id, f.new_at);
    }
    let manifest = &patch.manifest;
    let meant = Meant {
        old: &old,
        new: &new,
        pairing: &pairing,
        diff: &found,
        manifest,
        placed: &placed,
        foreign: &[],
        after: None,
    };
    verify(bytes, meant).map_err(|e| e.to_string())
}

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    static PLACES: OnceLock<[Vec<Place>; 2]> = OnceLock::new();
    let all = PLACES.get_or_init(|| [places(OLD), places(NEW)]);
    let mut flipped = [OLD.to_vec(), NEW.to_vec()];
    let mut true_new = NEW.to_vec();
    let mut unknowable = false;
    // Five bytes a flip: build and section, where, which bits.
    for flip in data.chunks_exact(5).take(8) {
        let side = usize::from(flip[0] & 1);
        let place = &all[side][usize::from(flip[0] >> 1) % all[side].len()];
        let within = usize::from(u16::from_le_bytes([flip[1], flip[2]])) + usize::from(flip[3]) * 0x1_0000;
        let at = place.at + within % place.len;
        flipped[side][at] ^= flip[4];
        if side == 1 && place.loaded {
            true_new[at] ^= flip[4];
        }
        unknowable |= side == 0 && place.plain_data;
    }
    let (old, new) = (folder().join("old"), folder().join("new"));
    std::fs::write(&old, &flipped[0]).expect("written");
    std::fs::write(&new, &flipped[1]).expect("written");
    let options = Options { old, new, name: "fuzz".into(), ..Options::default() };
    let Ok(outcome) = run(&options) else { return };
    let Some(bytes) = outcome.patch else { return };
    let patch = PatchFile::parse(&bytes).expect("what was verified reads back");
    let truth = Build::parse("old", OLD).expect("the stored build is whole");
    if unknowable || engine_refuses(&patch, &truth) {
        return;
    }
    if let Err(what) = is_right(&bytes, &patch, &true_new, &flipped[1]) {
        panic!("a wrong patch: {what}");
    }
});
