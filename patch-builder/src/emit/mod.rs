//! Writes the patch: lays out what was selected, resolves what is inside the
//! patch, and leaves relocations for what lies in the old image.

mod elf;
mod frames;
mod linked;

use std::collections::{BTreeMap, BTreeSet, HashMap};

use livepatch::addr::ImageAddr;
use livepatch::patch::{
    self, BuildRef, Companion, Entry, Function, HexBytes, Manifest, OldFunction, PatchFile, Status, TypeLayout,
};
use sha2::{Digest, Sha256};

use crate::build::{demangle, FuncId};
use crate::diff::Diff;
use crate::report::Refusal;
use crate::select::{Bound, Fixup, PieceKind, Selection, Store};
use crate::side::Side;
use crate::types::LayoutRecord;

pub(crate) const PAGE: u64 = 4096;

/// A section of the patch, before it is written.
#[derive(Clone, Debug, Default)]
pub(crate) struct Part {
    pub name: &'static str,
    pub at: u64,
    pub bytes: Vec<u8>,
    /// Length in memory; more than `bytes` for `.bss`.
    pub len: u64,
    pub relocs: Vec<OutReloc>,
}

/// A relocation of the patch against the old image or against itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct OutReloc {
    /// Where, in the patch's address space.
    pub at: u64,
    pub kind: OutKind,
    /// Address of the old image, or offset in the patch's address space.
    pub to: OutTarget,
    pub addend: i64,
}

/// How a relocation is stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum OutKind {
    Abs64,
    Abs32,
    Pc32,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) enum OutTarget {
    Image(u64),
    Patch(u64),
    /// By index in the manifest's imports.
    Import(usize),
    /// Offset in the previous patch's address space.
    Previous(u64),
}

/// A symbol of the patch.
#[derive(Clone, Debug)]
pub(crate) struct OutSymbol {
    pub name: String,
    pub at: u64,
    pub size: u64,
    pub func: bool,
}

/// The patch's bytes and its manifest.
pub struct Emitted {
    /// The file.
    pub bytes: Vec<u8>,
    /// Its manifest.
    pub manifest: Manifest,
    /// Where each carried function begins.
    pub placed: BTreeMap<FuncId, u64>,
    /// Ranges of the patch that come from a hook object.
    pub foreign: Vec<(u64, u64)>,
}

struct Layout<'a, 'd> {
    selection: &'a Selection,
    after: Option<&'a PatchFile>,
    old: &'a Side<'d>,
    funcs: BTreeMap<FuncId, u64>,
    pieces: Vec<u64>,
}

impl Layout<'_, '_> {
    /// What a relocation refers to, and its addend.
    fn address(&self, to: Bound) -> Option<(OutTarget, i64)> {
        let target = match to {
            Bound::Image(at) => OutTarget::Image(at),
            Bound::Func(id, offset) => OutTarget::Patch(self.funcs.get(&id)?.checked_add_signed(offset)?),
            Bound::Piece(index, offset) => OutTarget::Patch(self.pieces.get(index)?.checked_add_signed(offset)?),
            Bound::Import(index, addend) => return Some((OutTarget::Import(index), addend)),
            Bound::Previous(at) => OutTarget::Previous(at),
            Bound::Null => return None,
        };
        Some((target, 0))
    }
}

/// What a patch says of itself.
#[derive(Clone, Copy)]
pub struct About<'a> {
    /// Its name.
    pub name: &'a str,
    /// The rules that were overruled.
    pub allowances: &'a [String],
    /// What was done about types.
    pub types: &'a str,
    /// The layouts that it brings.
    pub layouts: &'a [LayoutRecord],
    /// What old and new code do not agree on.
    pub together: &'a [String],
    /// Old functions whose new version has another signature.
    pub unlike: &'a BTreeSet<FuncId>,
    /// The digest of the type of each new static, by its place in the new build.
    pub statics: &'a BTreeMap<u64, String>,
    /// The states that the new build declares.
    pub states: &'a [patch::StateVersion],
    /// The patch that it takes the place of.
    pub after: Option<&'a PatchFile>,
}

fn type_layout(record: &LayoutRecord) -> Option<TypeLayout> {
    let digest = HexBytes::from_hex(&record.digest)?;
    Some(TypeLayout { name: record.name.clone(), digest, layout: record.text.clone() })
}

/// Writes the patch.
///
/// # Errors
///
/// A refusal, if something can't be expressed.
pub fn emit(
    old: &Side<'_>,
    new: &Side<'_>,
    diff: &Diff,
    selection: &Selection,
    about: &About<'_>,
) -> Result<Emitted, Vec<Refusal>> {
    let after = about.after;
    let mut layout = Layout { selection, after, old, funcs: BTreeMap::new(), pieces: vec![0; selection.pieces.len()] };
    let note = note(&old.build.build_id);

    // Read-only part: note, constants, slots, exception tables, unwind table.
    let mut cursor = (note.len() as u64).next_multiple_of(16);
    let mut spans: HashMap<&'static str, (u64, u64)> = HashMap::new();
    for (section, kinds) in [
        (".rodata", &[PieceKind::Constant][..]),
        (".got", &[PieceKind::Slot][..]),
        (".gcc_except_table", &[PieceKind::Lsda][..]),
    ] {
        let start = cursor.next_multiple_of(64);
        cursor = start;
        for (i, piece) in selection.pieces.iter().enumerate().filter(|(_, p)| kinds.contains(&p.kind)) {
            cursor = cursor.next_multiple_of(piece.align.max(1));
            layout.pieces[i] = cursor;
            cursor += piece.bytes.len() as u64;
        }
        spans.insert(section, (start, cursor));
    }
    let frames_at = cursor.next_multiple_of(8);
    let mut plan = frames::Frames::new(frames_at);
    for c in selection.functions.values() {
        let func = new.build.func(c.new);
        if let Some(fde) = new.build.unwind.fde_at(func.addr) {
            let personality = c.personality.map(|(at, slot)| (Bound::Image(at), slot));
            plan.reserve(frames::Covered::Func(c.new), fde, personality, c.lsda.is_some());
        }
    }
    for (i, f) in selection.frames.iter().enumerate() {
        plan.reserve(frames::Covered::Foreign(i), &f.fde(), f.personality, f.lsda.is_some());
    }
    let frames_len = plan.len();
    let text_at = (frames_at + frames_len).next_multiple_of(PAGE);

    // Code.
    cursor = text_at;
    for (id, c) in &selection.functions {
        let align = 1u64 << new.build.func(*id).addr.trailing_zeros().clamp(4, 6);
        cursor = cursor.next_multiple_of(align);
        layout.funcs.insert(*id, cursor);
        cursor += c.len_with_islands();
    }
    for (i, piece) in selection.pieces.iter().enumerate().filter(|(_, p)| is_code(p)) {
        cursor = cursor.next_multiple_of(piece.align);
        layout.pieces[i] = cursor;
        cursor += piece.bytes.len() as u64;
    }
    let text_end = cursor;

    // New statics, the zeroed ones last.
    let data_at = text_end.next_multiple_of(PAGE);
    cursor = data_at;
    let is_bss = |p: &crate::select::Piece| p.fixups.is_empty() && p.bytes.iter().all(|b| *b == 0);
    let mut data_end = data_at;
    for zeroed in [false, true] {
        for (i, piece) in selection.pieces.iter().enumerate() {
            if piece.kind == PieceKind::Static && is_bss(piece) == zeroed {
                cursor = cursor.next_multiple_of(piece.align.max(8));
                layout.pieces[i] = cursor;
                cursor += piece.bytes.len() as u64;
            }
        }
        if !zeroed {
            data_end = cursor;
        }
    }
    let bss_end = cursor;

    // Contents.
    let mut writer = Contents { layout: &layout, errors: Vec::new() };
    let mut parts =
        vec![Part { name: ".note.livepatch", at: 0, len: note.len() as u64, bytes: note, relocs: Vec::new() }];
    for section in [".rodata", ".got", ".gcc_except_table"] {
        let (start, end) = spans[section];
        let kind = match section {
            ".rodata" => PieceKind::Constant,
            ".got" => PieceKind::Slot,
            _ => PieceKind::Lsda,
        };
        parts.push(writer.data(section, start, end, |k| k == kind));
    }
    let lsda_at = |index: usize| layout.pieces[index];
    let covered = |what| match what {
        frames::Covered::Func(id) => {
            let c: &crate::select::Carried = &selection.functions[&id];
            frames::Placed { at: layout.funcs[&id], lsda: c.lsda.map(lsda_at) }
        }
        frames::Covered::Foreign(index) => {
            let f = &selection.frames[index];
            let lsda = f.lsda.map(|(piece, offset)| layout.pieces[piece] + offset);
            frames::Placed { at: layout.pieces[f.piece] + f.frame.at.1, lsda }
        }
    };
    let (frame_bytes, frame_relocs) = plan.write(covered, |to| layout.address(to).map(|(target, _)| target));
    let len = frame_bytes.len() as u64;
    parts.push(Part { name: ".eh_frame", at: frames_at, bytes: frame_bytes, len, relocs: frame_relocs });
    parts.push(writer.text(text_at, text_end));
    parts.push(writer.data(".data", data_at, data_end, |k| k == PieceKind::Static));
    let bss = Part { name: ".bss", at: data_end, len: bss_end - data_end, ..Part::default() };
    parts.push(bss);
    let mut refusals = writer.errors;
    let mut manifest = manifest(old, new, diff, selection, &layout, about, &mut refusals);
    manifest.allowances = about.allowances.to_vec();
    manifest.types = about.types.to_owned();
    manifest.states = about.states.to_vec();
    manifest.together = Some(about.together.to_vec());
    manifest.layouts = about.layouts.iter().filter_map(type_layout).collect();
    if !refusals.is_empty() {
        return Err(refusals);
    }
    let mut symbols: Vec<OutSymbol> = Vec::new();
    for (id, at) in &layout.funcs {
        let size = selection.functions[id].len_with_islands();
        symbols.push(OutSymbol { name: new.build.func(*id).name().to_owned(), at: *at, size, func: true });
    }
    for (i, piece) in selection.pieces.iter().enumerate().filter(|(_, p)| p.kind == PieceKind::Static) {
        symbols.push(OutSymbol {
            name: piece.name.clone(),
            at: layout.pieces[i],
            size: piece.bytes.len() as u64,
            func: false,
        });
    }
    for f in &selection.hook_functions {
        symbols.push(OutSymbol {
            name: f.name.clone(),
            at: layout.pieces[f.piece] + f.offset,
            size: f.size,
            func: true,
        });
    }
    let image_name = |at: u64| image_symbol(layout.old, at);
    let json = serde_json::to_vec_pretty(&manifest).unwrap_or_default();
    let mut bytes = elf::write(&parts, &symbols, &selection.imports, &json, &image_name);
    let digest_at = (PAGE + parts[0].len) as usize - 32;
    if let Some(digest) = patch::file_digest(&bytes, digest_at) {
        bytes[digest_at..digest_at + 32].copy_from_slice(&digest);
    }
    let range = |i: &usize| (layout.pieces[*i], layout.pieces[*i] + selection.pieces[*i].bytes.len() as u64);
    let foreign = selection.foreign.iter().map(range).collect();
    Ok(Emitted { bytes, manifest, placed: layout.funcs, foreign })
}

/// Whether a piece lies among the code.
fn is_code(p: &crate::select::Piece) -> bool {
    matches!(p.kind, PieceKind::Stub | PieceKind::HookCode)
}

/// The two notes: the target, and room for the digest, which is the last thing in them.
fn note(build_id: &[u8]) -> Vec<u8> {
    let mut out = Vec::new();
    let target: Vec<u8> = patch::FORMAT_VERSION.to_le_bytes().into_iter().chain(build_id.iter().copied()).collect();
    for (kind, descriptor) in [(patch::NOTE_TYPE_TARGET, &target[..]), (patch::NOTE_TYPE_DIGEST, &[0; 32][..])] {
        let name = format!("{}\0", patch::NOTE_NAME);
        out.extend((name.len() as u32).to_le_bytes());
        out.extend((descriptor.len() as u32).to_le_bytes());
        out.extend(kind.to_le_bytes());
        out.extend(name.as_bytes());
        out.resize(out.len().next_multiple_of(4), 0);
        out.extend(descriptor);
        out.resize(out.len().next_multiple_of(4), 0);
    }
    out
}

/// The name of an old address, for people who read the relocations.
fn image_symbol(old: &Side<'_>, at: u64) -> String {
    if let Some(name) = old.build.plt.get(&at) {
        return format!("{name}@plt");
    }
    if let Some(f) = old.build.func_at(at).map(|id| old.build.func(id)).filter(|f| f.addr <= at) {
        if old.build.section_at(at).is_some_and(|s| s.exec) {
            return if f.addr == at { f.name().to_owned() } else { format!("{}+{:#x}", f.name(), at - f.addr) };
        }
    }
    if let Some(crate::build::DynKind::Import(name, _)) = old.build.dynamic.get(&at).map(|d| d.kind) {
        return format!("{name}@got");
    }
    match old.build.object_at(at).map(|id| old.build.object(id)) {
        Some(o) if o.addr == at => o.name().to_owned(),
        Some(o) => format!("{}+{:#x}", o.name(), at - o.addr),
        None => format!("image+{at:#x}"),
    }
}

struct Contents<'a, 'b, 'd> {
    layout: &'a Layout<'b, 'd>,
    errors: Vec<Refusal>,
}

impl Contents<'_, '_, '_> {
    fn fail(&mut self, symbol: &str, message: String) {
        let remedy = "report this: it is a limit of patch-builder".into();
        let (rule, symbol) = ("unsupported".into(), symbol.into());
        self.errors.push(Refusal { rule, symbol, message, remedy, ..Refusal::default() });
    }

    fn data(&mut self, name: &'static str, start: u64, end: u64, wanted: impl Fn(PieceKind) -> bool) -> Part {
        let mut part =
            Part { name, at: start, bytes: vec![0; (end - start) as usize], len: end - start, relocs: Vec::new() };
        for (i, piece) in self.layout.selection.pieces.iter().enumerate().filter(|(_, p)| wanted(p.kind)) {
            let at = self.layout.pieces[i];
            if at + piece.bytes.len() as u64 > end {
                continue; // in .bss
            }
            self.place(&mut part, at, &piece.bytes, &piece.fixups, &piece.name);
        }
        part
    }

    fn text(&mut self, start: u64, end: u64) -> Part {
        // int3 between functions
        let mut part = Part {
            name: ".text",
            at: start,
            bytes: vec![0xcc; (end - start) as usize],
            len: end - start,
            relocs: Vec::new(),
        };
        for (id, c) in &self.layout.selection.functions {
            let at = self.layout.funcs[id];
            let mut bytes = c.bytes.clone();
            let mut fixups = c.fixups.clone();
            for f in fixups.iter_mut().filter(|f| f.store == Store::Pc8) {
                // jmp rel32 behind the function, reached by the short branch
                let island = bytes.len() as u64;
                let distance = i8::try_from(island.cast_signed() - f.at.cast_signed() - 1);
                match (distance, bytes.get_mut(f.at as usize)) {
                    (Ok(d), Some(byte)) => *byte = d.cast_unsigned(),
                    _ => self.fail(&demangle("?"), format!("a short branch at +{:#x} that can't be lengthened", f.at)),
                }
                bytes.extend([0xe9, 0, 0, 0, 0]);
                *f = Fixup { at: island + 1, store: Store::Pc32(-4), to: f.to };
            }
            self.place(&mut part, at, &bytes, &fixups, "function");
        }
        for (i, piece) in self.layout.selection.pieces.iter().enumerate().filter(|(_, p)| is_code(p)) {
            self.place(&mut part, self.layout.pieces[i], &piece.bytes, &piece.fixups, &piece.name);
        }
        part
    }

    fn place(&mut self, part: &mut Part, at: u64, bytes: &[u8], fixups: &[Fixup], name: &str) {
        let from = (at - part.at) as usize;
        part.bytes[from..from + bytes.len()].copy_from_slice(bytes);
        for f in fixups {
            let place = at + f.at;
            let Some((target, own)) = self.layout.address(f.to) else {
                if f.store != Store::Abs64 {
                    self.fail(name, format!("{name} refers to an undefined weak symbol relative to itself"));
                }
                continue;
            };
            let field = (place - part.at) as usize;
            match (f.store, target) {
                (Store::Pc32(addend), OutTarget::Patch(to)) => {
                    let value = to.wrapping_add_signed(addend).wrapping_sub(place) as u32;
                    part.bytes[field..field + 4].copy_from_slice(&value.to_le_bytes());
                }
                (Store::Pc32(_), OutTarget::Import(_)) => {
                    self.fail(name, format!("{name} refers to a library relative to itself"));
                }
                (Store::Pc32(addend), to) => part.relocs.push(OutReloc { at: place, kind: OutKind::Pc32, to, addend }),
                (Store::Abs64, to) => part.relocs.push(OutReloc { at: place, kind: OutKind::Abs64, to, addend: own }),
                (Store::Abs32, OutTarget::Image(to)) if !self.layout.old.build.pie && u32::try_from(to).is_ok() => {
                    part.bytes[field..field + 4].copy_from_slice(&(to as u32).to_le_bytes());
                }
                (Store::Abs32, to @ OutTarget::Patch(_)) if !self.layout.old.build.pie => {
                    part.relocs.push(OutReloc { at: place, kind: OutKind::Abs32, to, addend: 0 });
                }
                (Store::Abs32 | Store::Pc8, _) => self.fail(name, format!("{name} holds an address in too few bits")),
            }
        }
    }
}

/// Where the previous patch's functions lead.
fn after_of(previous: &PatchFile) -> patch::After {
    let (m, digest) = (&previous.manifest, HexBytes(previous.digest.to_vec()));
    let before = m.after.iter().flat_map(|a| {
        let first = patch::Before { name: a.name.clone(), digest: a.digest.clone() };
        std::iter::once(first).chain(a.before.iter().cloned())
    });
    patch::After { name: m.name.clone(), digest, before: before.collect() }
}

fn redirects(previous: &PatchFile, selection: &Selection, layout: &Layout<'_, '_>) -> Vec<patch::Redirect> {
    let one = |(index, g): &(usize, FuncId)| {
        let f = previous.manifest.functions.get(*index)?;
        let code = previous.segments.iter().find(|s| s.at <= f.new_at && f.new_at < s.at + s.len_bytes)?;
        let first = code.data.get(usize::try_from(f.new_at - code.at).ok()?..)?;
        let skip = if first.starts_with(&[0xf3, 0x0f, 0x1e, 0xfa]) { 4 } else { 0 };
        let new_at = *layout.funcs.get(g)?;
        // Whoever holds its address may have it from a patch before that one.
        if let Some(r) = previous.manifest.redirects.iter().find(|r| r.name == f.name) {
            let (at, held) = (patch::further_back(r.at)?, r.held.and_then(patch::further_back));
            return Some(patch::Redirect { at, held, new_at, ..r.clone() });
        }
        let held = Some(f.new_at);
        Some(patch::Redirect { name: f.name.clone(), at: f.new_at + skip, held, size: f.new_size - skip, new_at })
    };
    selection.redirects.iter().filter_map(one).collect()
}

fn sha(bytes: &[u8]) -> HexBytes {
    HexBytes(Sha256::digest(bytes).to_vec())
}

fn file_name(path: &str) -> String {
    std::path::Path::new(path).file_name().map_or_else(|| path.to_owned(), |n| n.to_string_lossy().into_owned())
}

fn manifest(
    old: &Side<'_>,
    new: &Side<'_>,
    diff: &Diff,
    selection: &Selection,
    layout: &Layout<'_, '_>,
    about: &About<'_>,
    refusals: &mut Vec<Refusal>,
) -> Manifest {
    let mut functions = Vec::new();
    for (id, c) in &selection.functions {
        let func = new.build.func(*id);
        let base = Function {
            name: func.name().to_owned(),
            demangled: demangle(func.name()),
            status: Status::New,
            reason: c.reason.clone(),
            new_at: layout.funcs[id],
            new_size: c.len_with_islands(),
            source: diff.lines.1.source(func.addr),
            address_taken: selection.taken.contains(id),
            old: None,
        };
        if c.part || c.olds.is_empty() {
            functions.push(base);
            continue;
        }
        for f in &c.olds {
            let of = old.build.func(*f);
            let Some(plan) = selection.entries.get(f) else { continue };
            let companions = plan.parts.iter().map(|p| {
                let part = old.build.func(*p);
                Companion {
                    name: part.name().to_owned(),
                    at: ImageAddr(part.addr),
                    size: part.size,
                    sha256: sha(old.build.code(*p)),
                }
            });
            let entry = |(at, padding)| {
                let original = old.build.bytes(at, patch::ENTRY_JUMP_LEN)?.to_vec();
                Some(Entry { at: ImageAddr(at), original: HexBytes(original), padding })
            };
            let entry_beside = plan.beside.filter(|_| !about.unlike.contains(f)).and_then(entry);
            let entry = plan.at.and_then(|at| entry((at, plan.padding)));
            if plan.at.is_some() && entry.is_none() {
                let symbol = demangle(of.name());
                let message = format!("the bytes of {symbol}'s entry are not in the file");
                refusals.push(Refusal {
                    rule: "entry-window".into(),
                    symbol,
                    message,
                    remedy: "diff the unstripped build".into(),
                    ..Refusal::default()
                });
            }
            let old_function = OldFunction {
                at: ImageAddr(of.addr),
                size: of.size,
                sha256: sha(old.build.code(*f)),
                branches_to_entry: plan.branches_to_entry,
                companions: companions.collect(),
                entry,
                entry_beside,
            };
            functions.push(Function {
                name: of.name().to_owned(),
                demangled: demangle(of.name()),
                status: Status::Changed,
                old: Some(old_function),
                ..base.clone()
            });
        }
    }
    for f in &selection.hook_functions {
        functions.push(Function {
            name: f.name.clone(),
            demangled: demangle(&f.name),
            status: Status::New,
            reason: "the hook object".into(),
            new_at: layout.pieces[f.piece] + f.offset,
            new_size: f.size,
            source: None,
            address_taken: false,
            old: None,
        });
    }
    let statics =
        selection.pieces.iter().enumerate().filter(|(_, p)| p.kind == PieceKind::Static).map(|(i, p)| patch::Static {
            name: p.name.clone(),
            file: p.file.clone(),
            at: layout.pieces[i],
            size: p.bytes.len() as u64,
            type_digest: p.from.and_then(|at| HexBytes::from_hex(about.statics.get(&at)?)),
        });
    let living = selection.living.iter().filter_map(|(index, _)| {
        let s = layout.after?.manifest.statics.get(*index)?;
        Some(patch::Static { at: patch::further_back(s.at)?, ..s.clone() })
    });
    let statics = statics.chain(living);
    let hooks = selection.hooks.iter().filter_map(|(kind, to)| {
        let (OutTarget::Patch(at), _) = layout.address(*to)? else { return None };
        let symbol = kind.symbol().to_owned();
        Some(patch::Hook { kind: *kind, symbol, at, agent: selection.hooks_need_agent })
    });
    let unwinder = ["_Unwind_RaiseException", "_Unwind_Resume", "__cxa_throw"];
    let throws = old
        .build
        .dynamic
        .values()
        .any(|d| matches!(d.kind, crate::build::DynKind::Import(n, _) if unwinder.contains(&n)));
    Manifest {
        format: patch::FORMAT_VERSION,
        name: about.name.to_owned(),
        builder: format!("patch-builder {}", env!("CARGO_PKG_VERSION")),
        target: BuildRef { build_id: HexBytes(old.build.build_id.clone()), file: file_name(&old.build.path) },
        new: BuildRef { build_id: HexBytes(new.build.build_id.clone()), file: file_name(&new.build.path) },
        functions,
        statics: statics.collect(),
        types: String::new(),
        may_unwind: throws || linked::may_unwind(old, &diff.lines.0),
        linked: Some(linked::linked(old, &diff.lines.0)),
        imports: selection.imports.clone(),
        after: layout.after.map(after_of),
        redirects: layout.after.map_or_else(Vec::new, |p| redirects(p, selection, layout)),
        hooks: hooks.collect(),
        ..Manifest::default()
    }
}
