//! One build with everything that comparing needs: its functions in symbolic
//! form and the places at which code refers to unnamed data.

use crate::build::{Build, FuncId, ObjId};
use crate::lift::{lift_all, Access, Lifted, Target};

/// One of the two builds.
pub struct Side<'d> {
    /// The build.
    pub build: Build<'d>,
    /// Its functions in symbolic form, by id.
    pub lifted: Vec<Lifted<'d>>,
    /// Where code refers to unnamed data, ascending.
    soft_bounds: Vec<u64>,
    /// The functions that refer to each data symbol.
    users: Vec<Vec<FuncId>>,
    /// The functions that refer to each function.
    callers: Vec<Vec<FuncId>>,
}

const R_PC32: u32 = 2;

impl<'d> Side<'d> {
    /// Lifts a build.
    #[must_use]
    pub fn new(build: Build<'d>) -> Self {
        let lifted = lift_all(&build);
        let mut soft_bounds = Vec::new();
        let mut users = vec![Vec::new(); build.objects.len()];
        let mut callers = vec![Vec::new(); build.funcs.len()];
        for (id, f) in lifted.iter().enumerate() {
            for r in &f.refs {
                match r.target {
                    Target::Func(callee, _) => callers[callee as usize].push(id as FuncId),
                    Target::Data(at) => soft_bounds.push(at),
                    Target::Object(object, _) => users[object as usize].push(id as FuncId),
                    _ => {}
                }
            }
        }
        soft_bounds.sort_unstable();
        soft_bounds.dedup();
        users.iter_mut().chain(&mut callers).for_each(Vec::dedup);
        Self { build, lifted, soft_bounds, users, callers }
    }

    /// The functions that refer to a data symbol.
    #[must_use]
    pub fn users(&self, id: ObjId) -> &[FuncId] {
        &self.users[id as usize]
    }

    /// The functions that refer to a function.
    #[must_use]
    pub fn callers(&self, id: FuncId) -> &[FuncId] {
        &self.callers[id as usize]
    }

    /// Whether `addr` lies in data that the program may change.
    #[must_use]
    pub fn is_mutable(&self, addr: u64) -> bool {
        self.build.section_at(addr).is_none_or(crate::build::Section::is_mutable)
    }

    /// The places of writable data without a name that code refers to, ascending.
    #[must_use]
    pub fn unnamed_mutable(&self) -> Vec<u64> {
        self.soft_bounds.iter().copied().filter(|at| self.is_mutable(*at)).collect()
    }

    /// Whether a 32-bit relative entry of a table stands at `addr`.
    #[must_use]
    pub fn is_table_entry(&self, addr: u64) -> bool {
        self.build.relocs_in(addr, 1).iter().any(|r| r.kind == R_PC32)
    }

    /// Where the unnamed data that begins at `addr` ends. Errs on the long side, except
    /// where names, maps or zero terminators prove an end.
    #[must_use]
    pub fn extent_end(&self, addr: u64) -> u64 {
        let hard = self.build.next_bound(addr);
        let index = self.soft_bounds.partition_point(|b| *b <= addr);
        let soft = self.soft_bounds.get(index).copied().unwrap_or(hard).min(hard);
        if self.is_table_entry(addr) {
            let mut end = addr;
            while end < soft && self.is_table_entry(end) {
                end += 4;
            }
            return end;
        }
        if self.is_text(addr, soft) {
            return soft;
        }
        let cut_text = !self.build.rust && self.is_unterminated_text(addr, soft);
        if cut_text {
            // A tail-merged string: its end is its terminator.
            let limit = self.build.section_at(addr).map_or(hard, |s| s.addr + s.size);
            let bytes = self.build.bytes(addr, limit - addr).unwrap_or(&[]);
            return bytes.iter().position(|b| *b == 0).map_or(hard, |at| addr + at as u64 + 1);
        }
        if soft == hard || self.build.rust {
            return soft;
        }
        // A reference into the middle of something: take all of it, but no table that follows.
        let mut end = soft;
        while end < hard && !self.is_table_entry(end) {
            end += 4 - end % 4;
        }
        end.min(hard)
    }

    fn is_text(&self, from: u64, to: u64) -> bool {
        let Some(bytes) = self.build.bytes(from, to.saturating_sub(from)) else { return false };
        let trimmed = bytes.iter().rposition(|b| *b != 0).map_or(0, |at| at + 1);
        trimmed < bytes.len()
            && bytes[..trimmed].iter().all(|b| *b >= 0x20 || matches!(b, b'\t' | b'\n' | b'\r' | 0x1b))
    }

    fn is_unterminated_text(&self, from: u64, to: u64) -> bool {
        let Some(bytes) = self.build.bytes(from, to.saturating_sub(from)) else { return false };
        !bytes.is_empty() && bytes.iter().all(|b| *b >= 0x20 || matches!(b, b'\t' | b'\n' | b'\r' | 0x1b))
    }

    /// Whether a reference may be by address rather than by call.
    #[must_use]
    pub fn takes_address(access: Access) -> bool {
        access != Access::Branch
    }
}
