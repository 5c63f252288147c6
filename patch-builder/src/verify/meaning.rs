//! Whether what a field of the patch leads to is what the new build's reference means.

use super::{different, Actual, Check, Meant, VerifyError};
use crate::build::{DynKind, FuncId, ObjId, TlsFound, TlsModel};
use crate::compare::{place, place_of_slot, slot, type_slot, Place};
use crate::lift::{Access, Ref, Target};

type Answer = Result<bool, VerifyError>;

impl<'d> Check<'_, 'd> {
    /// Whether `actual` is what `target` of the new build means in the patched process.
    pub(super) fn means(&mut self, actual: Actual, target: Target<'d>, access: Access) -> Answer {
        match target {
            Target::Func(g, offset) => Ok(self.means_function(actual, g, offset, access)),
            Target::Object(id, offset) => self.means_object(actual, id, offset),
            Target::Data(at) => self.means_data(actual, at, access),
            Target::Plt(name) => Ok(self.means_stub(actual, name)),
            Target::Slot(at) => self.means_slot(actual, at),
            Target::Unknown(0) => Ok(actual == Actual::Null),
            Target::TlsSlots(model, found) => Ok(self.means_tls_slots(actual, model, found)),
            Target::Unknown(_) | Target::Tls(..) | Target::Empty(_) | Target::Number(_) => Ok(false),
        }
    }

    /// The same for a reference of a function, whose address may lie behind what it refers to.
    pub(super) fn means_ref(&mut self, actual: Actual, r: &Ref<'d>) -> Answer {
        let (Target::Data(at), true) = (r.target, r.bias != 0) else { return self.means(actual, r.target, r.access) };
        let start = match actual {
            Actual::Image(a) => Actual::Image(a.wrapping_add_signed(-r.bias)),
            Actual::Patch(a) => Actual::Patch(a.wrapping_add_signed(-r.bias)),
            _ => return Ok(false),
        };
        if let (Actual::Patch(p), Ok(before)) = (start, u64::try_from(r.bias)) {
            self.content(p, at, before)?;
        }
        self.means_data(start, at, r.access)
    }

    fn means_tls_slots(&self, actual: Actual, model: TlsModel, found: TlsFound<'d>) -> bool {
        let Actual::Image(at) = actual else { return false };
        let wanted = match found {
            TlsFound::Own(id, offset) => self.meant.pairing.tls_old(id).map(|old| TlsFound::Own(old, offset)),
            other => Some(other),
        };
        wanted.is_some() && self.meant.old.build.tls_slots(model, at) == wanted
    }

    /// Whether the slot holds the type that the slot at `at` of the new build holds.
    fn means_type_slot(&mut self, actual: Actual, at: u64) -> Answer {
        let Meant { old, new, .. } = self.meant;
        match (actual, place(new, at, at)) {
            (Actual::Image(slot), wanted) => Ok(self.comparer.places(place(old, slot, slot), wanted)),
            (Actual::Patch(_), Place::Import(name, 0)) => Ok(self.holds_import(actual, name)),
            (Actual::Patch(p), Place::Pointer(to)) => match self.words.long(p) {
                Some(holds) => self.means(holds, to, Access::Extent),
                None => Ok(false),
            },
            _ => Ok(false),
        }
    }

    fn means_function(&mut self, actual: Actual, g: FuncId, offset: i64, access: Access) -> bool {
        let Meant { old, new, pairing, diff, placed, .. } = self.meant;
        let at = match actual {
            Actual::Patch(at) => return placed.get(&g).and_then(|p| p.checked_add_signed(offset)) == Some(at),
            Actual::Image(at) => at,
            Actual::Previous(at) => return offset == 0 && !Self::is_branch(access) && self.leads_here(at, g),
            _ => return false,
        };
        let Some(start) = at.checked_add_signed(-offset) else { return false };
        let Some(f) = old.build.func_at(start).filter(|f| old.build.func(*f).addr == start) else { return false };
        let unchanged = !diff.changed.contains_key(&f);
        if pairing.is_pair(f, g) {
            // The old address of a changed function is its address, and its entry leads to the new code.
            return unchanged || offset == 0 && !Self::is_branch(access) && self.jumps.contains(&start);
        }
        let may_share = Self::is_branch(access) || new.build.rust;
        unchanged && may_share && pairing.func_olds(g).is_empty() && self.comparer.func_bodies(f, g)
    }

    /// Whether the previous patch's function at `at` goes by the name of `g`, and leads to it.
    fn leads_here(&self, at: u64, g: FuncId) -> bool {
        let Meant { new, manifest, placed, after, .. } = self.meant;
        let functions = after.map_or(&[][..], |p| &p.manifest.functions);
        let earlier = after.map_or(&[][..], |p| &p.manifest.redirects);
        let named = |name: &str| new.build.func(g).names.iter().any(|n| n.text == name);
        let held = |r: &livepatch::patch::Redirect| r.held.and_then(livepatch::patch::further_back);
        let known = match earlier.iter().find(|r| named(&r.name)) {
            Some(r) => held(r) == Some(at),
            None => functions.iter().any(|f| named(&f.name) && f.new_at == at && f.old.is_none()),
        };
        known && manifest.redirects.iter().any(|r| (r.at == at || r.at == at + 4) && placed.get(&g) == Some(&r.new_at))
    }

    fn means_object(&mut self, actual: Actual, id: ObjId, offset: i64) -> Answer {
        let Meant { old, new, pairing, .. } = self.meant;
        let object = new.build.object(id);
        let mutable = new.is_mutable(object.addr);
        match actual {
            Actual::Image(at) => {
                let Some(o) = pairing.object_old(id).map(|o| old.build.object(o)) else { return Ok(false) };
                let same = mutable
                    || object.size == 0
                    || o.size == object.size && self.comparer.objects(o.addr, object.addr, o.size);
                Ok(same && o.addr.checked_add_signed(offset) == Some(at))
            }
            Actual::Patch(at) => {
                let Some(start) = at.checked_add_signed(-offset) else { return Ok(false) };
                let existing = mutable && pairing.object_old(id).is_some();
                if existing || object.size == 0 || *self.objects.entry(id).or_insert(start) != start {
                    return Ok(false);
                }
                self.content(start, object.addr, object.size).map(|()| true)
            }
            Actual::Previous(at) => {
                let statics = self.meant.after.map_or(&[][..], |p| &p.manifest.statics);
                let start = at.checked_add_signed(-offset);
                let name = crate::build::demangle(object.name());
                let living = statics.iter().any(|s| Some(s.at) == start && s.name == name && s.size == object.size);
                Ok(living && mutable && pairing.object_old(id).is_none())
            }
            _ => Ok(false),
        }
    }

    fn means_data(&mut self, actual: Actual, at: u64, access: Access) -> Answer {
        let Meant { new, pairing, .. } = self.meant;
        match actual {
            Actual::Image(old) => Ok(pairing.unnamed_old(at) == Some(old)),
            Actual::Patch(p) if !new.is_mutable(at) => {
                let end = match access {
                    Access::Exact(len) => at + u64::from(len),
                    _ => new.extent_end(at),
                };
                self.content(p, at, end - at).map(|()| true)
            }
            _ => Ok(false),
        }
    }

    fn is_import(&self, index: usize, name: &str) -> bool {
        let import = self.meant.manifest.imports.get(index);
        import.is_some_and(|i| i.name == name && i.version.as_deref() == self.meant.new.build.import_version(name))
    }

    fn means_stub(&self, actual: Actual, name: &str) -> bool {
        let old = &self.meant.old.build;
        match actual {
            Actual::Image(at) => old.plt.get(&at).is_some_and(|n| self.comparer.same_import(n, name)),
            Actual::Patch(at) => {
                // jmp qword ptr [rip + slot]
                let jump = self.words.bytes(at, 2).is_some_and(|b| b == [0xff, 0x25]) && self.words.untouched(at, 2);
                let slot = self.words.relative(at + 2, at + 6);
                jump && slot.is_some_and(|s| self.holds_import(s, name))
            }
            _ => false,
        }
    }

    /// Whether a slot holds the address of an import.
    fn holds_import(&self, slot_at: Actual, name: &str) -> bool {
        match slot_at {
            Actual::Image(at) => {
                matches!(slot(self.meant.old, at), Place::Import(n, 0) if self.comparer.same_import(n, name))
            }
            Actual::Patch(at) => {
                matches!(self.words.long(at), Some(Actual::Import(index, 0)) if self.is_import(index, name))
            }
            _ => false,
        }
    }

    fn means_slot(&mut self, actual: Actual, at: u64) -> Answer {
        let Meant { old, new, pairing, .. } = self.meant;
        match (slot(new, at), actual) {
            (Place::Import(name, 0), _) => Ok(self.holds_import(actual, name)),
            (Place::Pointer(Target::Tls(id, offset)), Actual::Image(at)) => {
                let variable = pairing.tls_old(id).map(|id| &old.build.tls[id as usize]);
                let wanted = variable.map(|v| DynKind::TpOff(v.addr.wrapping_add_signed(offset)));
                Ok(wanted.is_some() && old.build.dynamic.get(&at).map(|r| r.kind) == wanted)
            }
            (Place::Pointer(Target::Func(g, 0)), Actual::Image(at)) if new.build.func(g).ifunc => {
                let held = slot(old, at);
                Ok(
                    matches!(held, Place::Pointer(Target::Func(f, 0)) if old.build.func(f).ifunc && pairing.is_pair(f, g)),
                )
            }
            (Place::Pointer(target), Actual::Patch(p)) => match self.words.long(p) {
                Some(holds) => self.means(holds, target, Access::Extent),
                None => Ok(false),
            },
            _ => Ok(false),
        }
    }

    /// Compares data of the patch with data of the new build.
    pub(super) fn content(&mut self, p: u64, at: u64, len: u64) -> Result<(), VerifyError> {
        if !self.data.insert((p, at, len)) {
            return Ok(());
        }
        // What it refers to is compared after it, not inside of it: constants may be chained deeper than a stack reaches.
        self.open.push((p, at, len));
        if self.comparing {
            return Ok(());
        }
        self.comparing = true;
        while let Some((p, at, len)) = self.open.pop() {
            let mut offset = 0;
            while offset < len {
                offset += self.one(p + offset, p, at + offset, at)?;
            }
        }
        self.comparing = false;
        Ok(())
    }

    /// The language-specific data area: its distances count from where they stand.
    pub(super) fn exception_table(&mut self, p: u64, at: u64) -> Result<(), VerifyError> {
        let len = self.meant.new.build.lsda_end(at) - at;
        let mut offset = 0;
        while offset < len {
            let here = at + offset;
            let slot = match place(self.meant.new, here, here) {
                Place::Relative(to) => type_slot(self.meant.new, to),
                _ => None,
            };
            let Some(slot) = slot else {
                offset += self.one(p + offset, p + offset, here, here)?;
                continue;
            };
            let right = match self.words.relative(p + offset, p + offset) {
                Some(actual) => self.means_type_slot(actual, slot)?,
                None => false,
            };
            if !right {
                return Err(different(format!("the exception table at {:#x} names another type", p + offset)));
            }
            offset += 4;
        }
        Ok(())
    }

    /// Compares one place of data; tells how long it is.
    fn one(&mut self, p: u64, p_base: u64, at: u64, base: u64) -> Result<u64, VerifyError> {
        let new = self.meant.new;
        let (target, actual, len) = match place(new, at, base) {
            Place::Bytes => {
                let zero = new.build.is_zero_fill(at);
                let wanted = if zero { Some(0) } else { new.build.bytes(at, 1).and_then(|b| b.first().copied()) };
                let there = self.words.bytes(p, 1).and_then(|b| b.first().copied());
                if wanted.is_none() || there != wanted || !self.words.untouched(p, 1) {
                    return Err(different(format!("the data at {p:#x} is not that at {at:#x} of the new build")));
                }
                return Ok(1);
            }
            Place::Import(name, addend) => {
                return match self.words.long(p) {
                    Some(Actual::Import(index, a)) if a == addend && self.is_import(index, name) => Ok(8),
                    _ => Err(different(format!("the data at {p:#x} does not hold the address of {name}"))),
                };
            }
            Place::Pointer(to) => ((to, Access::Extent), self.words.long(p), 8),
            Place::Relative(to @ Target::Func(..)) => ((to, Access::Branch), self.words.relative(p, p_base), 4),
            Place::Relative(to) => ((to, Access::Extent), self.words.relative(p, p_base), 4),
            Place::Short(to) => ((to, Access::Extent), self.words.short(p), 4),
            Place::Strange => return Err(different(format!("the data at {p:#x} is not understood"))),
        };
        let right = match actual {
            Some(actual) => self.means(actual, target.0, target.1)?,
            None => false,
        };
        if !right {
            let wanted = crate::compare::describe(new, target.0);
            let what = actual.map_or_else(|| "nothing".into(), |a| self.describe(a));
            return Err(different(format!("the data at {p:#x} refers to {what}, not to {wanted}")));
        }
        Ok(len)
    }

    /// Whether two slots or addresses of personality routines are the same.
    pub(super) fn same_personality(&mut self, old_at: (u64, bool), new_at: (u64, bool)) -> bool {
        let Meant { old, new, .. } = self.meant;
        let holds = |side, (at, indirect): (u64, bool)| {
            if indirect {
                place_of_slot(side, at)
            } else {
                crate::compare::place_of_address(side, at)
            }
        };
        self.comparer.places(holds(old, old_at), holds(new, new_at))
    }
}
