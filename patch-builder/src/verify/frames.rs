//! The unwind table of the patch against that of the new build.

use livepatch::patch::{PatchFile, RelocTarget};

use super::{different, Check, Verdict};
use crate::build::{Personality, Unwind};

/// Call-frame instructions without the padding behind them.
fn trimmed(instructions: &[u8]) -> &[u8] {
    let end = instructions.iter().rposition(|b| *b != 0).map_or(0, |at| at + 1);
    &instructions[..end]
}

/// Whether the first entry of length zero, which ends the table, is its last word.
fn ends_once(table: &[u8]) -> bool {
    let mut at = 0;
    while let Some(len) = table.get(at..).and_then(<[u8]>::first_chunk).map(|b| u32::from_le_bytes(*b) as usize) {
        at += 4 + len;
        if len == 0 {
            break;
        }
    }
    at == table.len()
}

impl Check<'_, '_> {
    /// Each carried function has the unwind information that it has in the new build.
    pub(super) fn frames(&mut self, patch: &PatchFile) -> Verdict {
        let (placed, new) = (self.meant.placed, self.meant.new);
        let bytes = match patch.eh_frame {
            Some((at, len)) => Some((at, self.relocated(patch, at, len)?)),
            None => None,
        };
        if bytes.as_ref().is_some_and(|(_, b)| !ends_once(b)) {
            return Err(different("its unwind table ends before its end"));
        }
        let table = match &bytes {
            Some((at, bytes)) => Unwind::parse(*at, bytes).map_err(|e| different(format!("its unwind table: {e}")))?,
            None => Unwind::default(),
        };
        let mut known = 0;
        for (id, at) in placed {
            let func = new.build.func(*id);
            let bad = |what: &str| {
                different(format!("{what} in the unwind table for {}", crate::build::demangle(func.name())))
            };
            let (there, wanted) = match (table.fde_at(*at), new.build.unwind.fde_at(func.addr)) {
                (None, None) => continue,
                (Some(a), Some(b)) => (a, b),
                _ => return Err(bad("an entry is missing or too much")),
            };
            known += 1;
            let same = there.len == wanted.len
                && trimmed(there.initial) == trimmed(wanted.initial)
                && trimmed(there.instructions) == trimmed(wanted.instructions)
                && there.code_align == wanted.code_align
                && there.data_align == wanted.data_align
                && there.return_register == wanted.return_register
                && there.signal == wanted.signal;
            if !same {
                return Err(bad("other rules"));
            }
            let pair = |p: Personality| match p {
                Personality::Direct(at) => (at, false),
                Personality::Indirect(at) => (at, true),
            };
            match (there.personality.map(pair), wanted.personality.map(pair)) {
                (None, None) => {}
                (Some(a), Some(b)) if self.same_personality(a, b) => {}
                _ => return Err(bad("another personality routine")),
            }
            match (there.lsda, wanted.lsda) {
                (None, None) => {}
                (Some(a), Some(b)) => self.exception_table(a, b)?,
                _ => return Err(bad("another exception table")),
            }
        }
        if table.starts().filter(|at| !self.is_foreign(*at)).count() != known {
            return Err(different("the unwind table has entries for what is no function"));
        }
        Ok(())
    }

    /// The table's bytes with its relocations done, as if patch and old image lay at the addresses that they count in.
    fn relocated(&self, patch: &PatchFile, at: u64, len: u64) -> Result<Vec<u8>, super::VerifyError> {
        let mut bytes = self.words.bytes(at, len).ok_or_else(|| different("its unwind table is cut off"))?;
        for r in patch.relocs.iter().filter(|r| (at..at + len).contains(&r.at)) {
            // Marks it as looked at.
            let actual = self.words.relative(r.at, r.at);
            let RelocTarget::Image(to) = r.target else { continue };
            let value = to.0.wrapping_add_signed(r.addend).wrapping_sub(r.at) as u32;
            let from = (r.at - at) as usize;
            match (actual, bytes.get_mut(from..from + 4)) {
                (Some(_), Some(field)) => field.copy_from_slice(&value.to_le_bytes()),
                _ => return Err(different("a relocation of its unwind table is of an unknown kind")),
            }
        }
        Ok(bytes)
    }
}
