//! Writing all entries while threads are held: compare, write, read back; on any failure back to what was.

use crate::addr::ProcAddr;
use crate::memory::ReadMemory;
use crate::plan::{CodeEdit, Refusal};
use crate::process::{Held, ProcessError};

/// Why the entries were not written.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SwapError {
    /// An entry does not hold what it should; nothing was written.
    #[error("the entry of {function} at {at} does not hold the bytes that it should")]
    Changed {
        /// The function.
        function: String,
        /// Where.
        at: ProcAddr,
        /// Whether its first byte is `int3`.
        breakpoint: bool,
    },
    /// A write failed; the entries are as they were.
    #[error("an entry could not be written, all are as they were: {0}")]
    TakenBack(#[source] ProcessError),
    /// A write failed, and so did taking back.
    #[error("an entry could not be written, and the entry of {function} at {at} could not be put back")]
    Stuck {
        /// The function.
        function: String,
        /// Where.
        at: ProcAddr,
    },
}

impl SwapError {
    /// As a refusal, of the patch `name`.
    #[must_use]
    pub fn refusal(&self, name: &str) -> Refusal {
        let at = match self {
            Self::Changed { at, function, breakpoint: true } => {
                return Refusal::CodeChanged { function: function.clone(), at: *at, breakpoint: true };
            }
            Self::Changed { at, .. } | Self::Stuck { at, .. } => *at,
            Self::TakenBack(_) => ProcAddr(0),
        };
        Refusal::Damaged { name: name.to_owned(), at, what: self.to_string() }
    }
}

fn read<M: ReadMemory + ?Sized>(memory: &M, edits: &[CodeEdit]) -> Vec<Option<[u8; 5]>> {
    let mut found = vec![[0u8; 5]; edits.len()];
    let mut parts: Vec<_> = edits.iter().zip(&mut found).map(|(e, buf)| (e.at, buf.as_mut_slice())).collect();
    let ok = memory.read_many(&mut parts);
    found.into_iter().zip(ok).map(|(bytes, ok)| ok.then_some(bytes)).collect()
}

/// Whether every place holds what is expected.
pub(super) fn check<M: ReadMemory + ?Sized>(memory: &M, edits: &[CodeEdit]) -> Result<(), SwapError> {
    for (edit, found) in edits.iter().zip(read(memory, edits)) {
        if found != Some(edit.expected) {
            let breakpoint = found.is_some_and(|f| f[0] == 0xcc);
            return Err(SwapError::Changed { function: edit.function.clone(), at: edit.at, breakpoint });
        }
    }
    Ok(())
}

/// Writes all edits, or none.
pub(super) fn swap<H: Held>(held: &mut H, edits: &[CodeEdit]) -> Result<(), SwapError> {
    check(held, edits)?;
    for (i, edit) in edits.iter().enumerate() {
        if let Err(e) = held.write_code(edit.at, &edit.new) {
            // The failed one, too, may have been written in part.
            undo(held, edits.get(..=i).unwrap_or(edits))?;
            return Err(SwapError::TakenBack(e));
        }
    }
    let written = read(held, edits);
    let wrong = edits.iter().zip(written).find(|(edit, found)| *found != Some(edit.new));
    if let Some((edit, _)) = wrong {
        let source = std::io::Error::other("what was written is not what is there");
        let error = ProcessError::Os { pid: crate::process::Pid(0), what: "read back the entries", source };
        let error = match undo(held, edits) {
            Ok(()) => SwapError::TakenBack(error),
            Err(_) => SwapError::Stuck { function: edit.function.clone(), at: edit.at },
        };
        return Err(error);
    }
    Ok(())
}

/// Puts back what was expected, the last first, and makes sure of it. Each write is tried twice.
pub(super) fn undo<H: Held>(held: &mut H, edits: &[CodeEdit]) -> Result<(), SwapError> {
    for edit in edits.iter().rev() {
        let mut put_back = || held.write_code(edit.at, &edit.expected);
        if put_back().or_else(|_| put_back()).is_err() {
            return Err(SwapError::Stuck { function: edit.function.clone(), at: edit.at });
        }
    }
    check(held, edits).or_else(|_| check(held, edits)).map_err(|e| match e {
        SwapError::Changed { function, at, .. } => SwapError::Stuck { function, at },
        other => other,
    })
}
