//! Hooks: the code and data of an object file that go into the patch beside what the builds differ in, bound to the old
//! image by name; and hooks that the new build itself exports.

use std::collections::{BTreeMap, VecDeque};

use livepatch::patch::HookKind;

use super::after::OF_HOOKS;
use super::{Bound, Fixup, ForeignFrame, HookFunction, Piece, PieceKind, Selector, Store};
use crate::build::{FuncId, ObjPlace, ObjReloc, ObjSymbol, Relocatable};
use crate::lift::Access;

/// Sections whose content runs at start-up or exit.
const START_UP: [&str; 5] = [".init_array", ".fini_array", ".preinit_array", ".ctors", ".dtors"];

const R_64: u32 = 1;
const R_PC32: u32 = 2;
const R_PLT32: u32 = 4;
const R_GOTPCREL: u32 = 9;
const R_GOTPCRELX: u32 = 41;
const R_REX_GOTPCRELX: u32 = 42;

impl<'d> Selector<'_, 'd> {
    /// Hooks that the new build defines and the old one does not.
    pub(super) fn hooks_of_build(&mut self) {
        for kind in HookKind::ALL {
            let named = |names: &[crate::build::Name<'_>]| names.iter().any(|n| n.text == kind.symbol());
            if self.old.build.funcs.iter().any(|f| named(&f.names)) {
                continue;
            }
            let Some(g) = self.new.build.funcs.iter().position(|f| named(&f.names)) else { continue };
            let g = g as FuncId;
            self.enter(g, Vec::new(), "a hook".into());
            self.hooks.push((kind, Bound::Func(g, 0)));
        }
    }

    /// Takes what the hooks of an object reach.
    pub(super) fn hooks_of_object(&mut self, object: &Relocatable) {
        let first = self.pieces.len();
        let mut linker = Linker { object, pieces: BTreeMap::new(), queue: VecDeque::new() };
        let mut any = false;
        for kind in HookKind::ALL {
            let hook = object.symbols.iter().find(|s| s.global && s.section.is_some() && s.name == kind.symbol());
            let Some((symbol, section)) = hook.and_then(|s| Some((s, s.section?))) else { continue };
            any = true;
            if self.hooks.iter().any(|(k, _)| *k == kind) {
                let message = format!("both the object and the new build export {}", kind.symbol());
                self.refuse("hook", kind.symbol(), message, "keep one of them");
                continue;
            }
            let piece = self.hook_piece(&mut linker, section);
            self.hooks.push((kind, Bound::Piece(piece, symbol.value.cast_signed())));
        }
        if !any {
            let names: Vec<&str> = HookKind::ALL.iter().map(|k| k.symbol()).collect();
            let bare = |s: &&ObjSymbol| names.iter().any(|n| n.strip_prefix("livepatch_") == Some(&s.name));
            let other = object.symbols.iter().find(bare).map_or("hooks", |s| s.name.as_str());
            let message = format!("the hook object exports none of {}", names.join(", "));
            let remedy = "export at least one of them, spelled like this, as `int hook(void)` of C";
            self.refuse("hook", other, message, remedy);
        }
        let starts = |n: &str| START_UP.iter().any(|s| n.starts_with(s));
        if let Some(s) = object.sections.iter().find(|s| starts(&s.name)) {
            let message = format!("the hook object has code that runs at start-up or exit (section {})", s.name);
            self.refuse("hook", &s.name, message, "do it in the hooks themselves");
        }
        while let Some(index) = linker.queue.pop_front() {
            self.hook_section(&mut linker, index);
        }
        self.hook_frames(&mut linker);
        while let Some(index) = linker.queue.pop_front() {
            self.hook_section(&mut linker, index);
        }
        self.foreign.extend(first..self.pieces.len());
        for s in object.symbols.iter().filter(|s| s.func && s.size > 0) {
            let Some(piece) = s.section.and_then(|i| linker.pieces.get(&i).copied()) else { continue };
            self.hook_functions.push(HookFunction { name: s.name.clone(), piece, offset: s.value, size: s.size });
        }
    }

    /// The piece of a section; made, and put into the queue, when first asked for.
    fn hook_piece(&mut self, linker: &mut Linker<'_>, index: usize) -> usize {
        if let Some(piece) = linker.pieces.get(&index) {
            return *piece;
        }
        let section = &linker.object.sections[index];
        let kind = match (section.exec, section.write) {
            (true, false) => PieceKind::HookCode,
            (false, true) if !section.name.starts_with(".data.rel.ro") => PieceKind::Static,
            _ => PieceKind::Constant,
        };
        let name = section.name.clone();
        let bad = if section.tls {
            Some("thread-local data")
        } else if section.exec && section.write {
            Some("code that is written")
        } else {
            None
        };
        if let Some(what) = bad {
            let message = format!("the hook object has {what} (section {name})");
            self.refuse("hook", &name, message, "do it in the hooks themselves, with ordinary data");
        }
        let piece = self.pieces.len();
        let symbol = linker.object.symbols.iter().find(|s| s.section == Some(index) && !s.name.is_empty() && !s.func);
        self.pieces.push(Piece {
            kind,
            name: symbol.map_or(name, |s| s.name.clone()),
            file: Some(OF_HOOKS.into()),
            from: None,
            align: section.align,
            bytes: section.bytes.clone(),
            fixups: Vec::new(),
        });
        linker.pieces.insert(index, piece);
        linker.queue.push_back(index);
        piece
    }

    fn hook_section(&mut self, linker: &mut Linker<'_>, index: usize) {
        let object = linker.object;
        let piece = linker.pieces[&index];
        let mut fixups = Vec::new();
        for r in &object.sections[index].relocs {
            let Some(symbol) = object.symbols.get(r.symbol) else { continue };
            self.current = format!("the hook object ({})", object.sections[index].name);
            let Some((store, to)) = self.hook_reference(linker, r, symbol) else { continue };
            let width = if store == Store::Abs64 { 8 } else { 4 };
            let field = usize::try_from(r.at).ok().and_then(|at| self.pieces[piece].bytes.get_mut(at..at + width));
            match field {
                Some(field) => field.fill(0),
                None => self.refuse(
                    "hook",
                    &symbol.name,
                    "a relocation of the hook object lies outside its section".into(),
                    "compile it again",
                ),
            }
            fixups.push(Fixup { at: r.at, store, to });
        }
        self.pieces[piece].fixups = fixups;
    }

    /// What one relocation of the object stores, and of what.
    fn hook_reference(&mut self, linker: &mut Linker<'_>, r: &ObjReloc, symbol: &ObjSymbol) -> Option<(Store, Bound)> {
        if let Some(section) = symbol.section {
            let to = self.hook_piece(linker, section);
            let at = symbol.value.cast_signed();
            return match r.kind {
                R_64 => Some((Store::Abs64, Bound::Piece(to, at + r.addend))),
                R_PC32 | R_PLT32 => Some((Store::Pc32(r.addend), Bound::Piece(to, at))),
                R_GOTPCREL | R_GOTPCRELX | R_REX_GOTPCRELX => {
                    let slot = self.hook_slot(&symbol.name, Bound::Piece(to, at));
                    Some((Store::Pc32(r.addend), slot))
                }
                kind => self.hook_kind(kind, symbol),
            };
        }
        if let Some(name) = self.hook_import(symbol) {
            return match r.kind {
                R_64 => Some((Store::Abs64, Bound::Import(self.want(name)?, r.addend))),
                R_GOTPCREL | R_GOTPCRELX | R_REX_GOTPCRELX => Some((Store::Pc32(r.addend), self.import_slot(name)?)),
                R_PLT32 => Some((Store::Pc32(r.addend), self.bind_import(name, Access::Branch)?)),
                kind => self.hook_kind(kind, symbol),
            };
        }
        let to = self.hook_symbol(symbol)?;
        match (r.kind, to) {
            (R_64, Bound::Image(at)) => Some((Store::Abs64, Bound::Image(at.wrapping_add_signed(r.addend)))),
            (R_64, Bound::Func(id, at)) => Some((Store::Abs64, Bound::Func(id, at + r.addend))),
            (R_64, Bound::Piece(id, at)) => Some((Store::Abs64, Bound::Piece(id, at + r.addend))),
            (R_64, Bound::Previous(at)) => Some((Store::Abs64, Bound::Previous(at.wrapping_add_signed(r.addend)))),
            (R_GOTPCREL | R_GOTPCRELX | R_REX_GOTPCRELX, to) => {
                Some((Store::Pc32(r.addend), self.hook_slot(&symbol.name, to)))
            }
            (R_PC32 | R_PLT32, to @ (Bound::Image(_) | Bound::Func(..) | Bound::Piece(..) | Bound::Previous(_))) => {
                Some((Store::Pc32(r.addend), to))
            }
            (kind, _) => self.hook_kind(kind, symbol),
        }
    }

    fn hook_kind<T>(&mut self, kind: u32, symbol: &ObjSymbol) -> Option<T> {
        let message = format!("{} refers to {} by a relocation of type {kind}", self.current, symbol.name);
        self.refuse(
            "hook",
            &symbol.name,
            message,
            "compile the hook object with -fPIC -O2, and without thread-local variables",
        );
        None
    }

    /// A slot with an address.
    fn hook_slot(&mut self, name: &str, to: Bound) -> Bound {
        let fixups = match to {
            Bound::Null => Vec::new(),
            to => vec![Fixup { at: 0, store: Store::Abs64, to }],
        };
        let name = format!("slot of {name}");
        let known = self.pieces.iter().position(|p| p.kind == PieceKind::Slot && p.name == name);
        let piece = known.unwrap_or_else(|| {
            self.pieces.push(Piece {
                kind: PieceKind::Slot,
                name,
                file: None,
                from: None,
                align: 8,
                bytes: vec![0; 8],
                fixups,
            });
            self.pieces.len() - 1
        });
        Bound::Piece(piece, 0)
    }

    /// The name of a symbol that only a library defines, with the lifetime of the build.
    fn hook_import(&self, symbol: &ObjSymbol) -> Option<&'d str> {
        let name = symbol.name.as_str();
        let has = |names: &[crate::build::Name<'_>]| names.iter().any(|n| n.text == name);
        let defines = |b: &crate::build::Build<'_>| {
            b.funcs.iter().any(|f| has(&f.names)) || b.objects.iter().any(|o| has(&o.names))
        };
        let (old, new) = (&self.old.build, &self.new.build);
        if defines(old) || defines(new) {
            return None;
        }
        let key = new.imports.get_key_value(name).or_else(|| old.imports.get_key_value(name));
        key.map(|(name, _)| *name)
    }

    /// What a name means that the object does not define: in the old image or in the patch.
    fn hook_symbol(&mut self, symbol: &ObjSymbol) -> Option<Bound> {
        let name = symbol.name.as_str();
        let has = |names: &[crate::build::Name<'_>]| names.iter().any(|n| n.text == name);
        let old = &self.old.build;
        let mut places: Vec<u64> = old.funcs.iter().filter(|f| has(&f.names)).map(|f| f.addr).collect();
        places.extend(old.objects.iter().filter(|o| has(&o.names)).map(|o| o.addr));
        places.dedup();
        if let [at] = places[..] {
            if let Some(f) = old.func_at(at).filter(|f| old.func(*f).addr == at) {
                self.address_taken.insert(f);
            }
            return Some(Bound::Image(at));
        }
        if places.len() > 1 {
            let message = format!("{} refers to {name}, of which the old build has {}", self.current, places.len());
            self.refuse("hook", name, message, "give one of them another name, or reach it through a function");
            return None;
        }
        // New in the patch.
        let new = &self.new.build;
        let func = new.funcs.iter().position(|f| has(&f.names)).map(|g| g as FuncId);
        if let Some(g) = func {
            if !self.functions.contains_key(&g) {
                let current = self.current.clone();
                self.enter(g, Vec::new(), "a hook needs it".into());
                self.current = current;
            }
            self.taken.insert(g);
            return Some(Bound::Func(g, 0));
        }
        if let Some(o) = new.objects.iter().position(|o| has(&o.names) && o.size > 0) {
            return self.bind_object(o as u32, 0, Access::Extent);
        }
        if symbol.weak {
            return Some(Bound::Null);
        }
        let message = format!("{} refers to {name}, which neither build defines or imports", self.current);
        let remedy = "define it in the object (ld -r joins objects), or use it in the new build";
        self.refuse("hook", name, message, remedy);
        None
    }

    /// The unwind table's entries of the code that was taken.
    fn hook_frames(&mut self, linker: &mut Linker<'_>) {
        let object = linker.object;
        for frame in &object.frames {
            let Some(piece) = linker.pieces.get(&frame.at.0).copied() else { continue };
            let personality = match frame.personality {
                None => None,
                Some((ObjPlace::Section(section, offset), slot)) => {
                    Some((Bound::Piece(self.hook_piece(linker, section), offset.cast_signed()), slot))
                }
                Some((ObjPlace::Symbol(index), slot)) => {
                    self.current = "the unwind table of the hook object".into();
                    match object.symbols.get(index).cloned().and_then(|s| self.hook_symbol(&s)) {
                        Some(to) => Some((to, slot)),
                        None => continue,
                    }
                }
            };
            let lsda = frame.lsda.map(|(section, offset)| (self.hook_piece(linker, section), offset));
            self.frames.push(ForeignFrame { piece, frame: frame.clone(), personality, lsda });
        }
    }
}

struct Linker<'o> {
    object: &'o Relocatable,
    /// The piece of each section that was taken.
    pieces: BTreeMap<usize, usize>,
    queue: VecDeque<usize>,
}
