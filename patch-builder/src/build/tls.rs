//! How the thread-local variables of a library are found: by two slots that the dynamic linker fills.

use super::{Build, DynKind, DynRel, Object, TlsSym};

/// How the slots of a thread-local are used.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum TlsModel {
    /// `__tls_get_addr` finds one variable (general dynamic).
    Pair,
    /// `__tls_get_addr` finds the image's segment (local dynamic).
    Module,
    /// A descriptor is called for one variable.
    Descriptor,
    /// A descriptor is called for the image's segment.
    ModuleDescriptor,
}

/// What is found through the slots.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum TlsFound<'d> {
    /// A variable of this image, and how far behind its start.
    Own(u32, i64),
    /// A variable of another image, plus an addend.
    Import(&'d str, i64),
    /// The start of this image's segment.
    Segment,
}

impl<'d> Build<'d> {
    /// What is found through the slots at `at`; `None` if they are not understood.
    #[must_use]
    pub fn tls_slots(&self, model: TlsModel, at: u64) -> Option<TlsFound<'d>> {
        let sym = match model {
            TlsModel::Pair | TlsModel::Module => self.tls_pair(at)?,
            TlsModel::Descriptor | TlsModel::ModuleDescriptor => self.tls_descriptor(at)?,
        };
        match (model, sym) {
            (TlsModel::Module | TlsModel::ModuleDescriptor, TlsSym::Own(0)) => Some(TlsFound::Segment),
            (TlsModel::Module | TlsModel::ModuleDescriptor, _) => None,
            (_, TlsSym::Own(offset)) => self.tls_at(offset).map(|(id, offset)| TlsFound::Own(id, offset)),
            (_, TlsSym::Import(name, addend)) => Some(TlsFound::Import(name, addend)),
        }
    }

    /// Slots of thread-locals that the linker filled itself, as mold does in a program: a small negative number in the global
    /// offset table, where every address has a dynamic relocation, is an offset from the thread pointer.
    pub(super) fn add_thread_local_slots(&mut self) {
        let Some(size) = self.tls_segment.map(|s| s.aligned_len).filter(|_| self.pie) else { return };
        let mut found = Vec::new();
        for s in self.sections.iter().filter(|s| s.name == ".got") {
            for (at, word) in (s.addr..).step_by(8).zip(s.data.chunks_exact(8)) {
                let word = word.try_into().map_or(0, u64::from_le_bytes);
                let offset = word.wrapping_add(size);
                if offset < size && !self.dynamic.contains_key(&at) {
                    found.push((at, DynRel { kind: DynKind::TpOff(offset) }));
                }
            }
        }
        self.dynamic_at.extend(found.iter().map(|(at, _)| *at));
        self.dynamic_at.sort_unstable();
        self.dynamic.extend(found);
    }

    fn tls_pair(&self, at: u64) -> Option<TlsSym<'d>> {
        let DynKind::TlsModule(module) = self.dynamic.get(&at)?.kind else { return None };
        match (module, self.dynamic.get(&(at + 8)).map(|r| r.kind)) {
            (_, Some(DynKind::TlsOffset(variable))) => Some(variable),
            (TlsSym::Own(_), None) => {
                let offset = self.bytes(at + 8, 8)?.try_into().ok()?;
                Some(TlsSym::Own(u64::from_le_bytes(offset)))
            }
            _ => None,
        }
    }

    fn tls_descriptor(&self, at: u64) -> Option<TlsSym<'d>> {
        match self.dynamic.get(&at)?.kind {
            DynKind::TlsDescriptor(variable) => Some(variable),
            _ => None,
        }
    }

    /// The thread-local variable that holds the offset `at` of the segment, and how far behind its start that is.
    #[must_use]
    pub fn tls_at(&self, at: u64) -> Option<(u32, i64)> {
        let holds = |o: &Object<'_>| o.addr <= at && at < o.addr + o.size.max(1);
        let sized = self.tls.iter().position(|o| holds(o) && o.size > 0);
        let id = sized.or_else(|| self.tls.iter().position(holds))?;
        Some((id as u32, at.wrapping_sub(self.tls[id].addr).cast_signed()))
    }
}
