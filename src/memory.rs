//! Reading somebody else's memory: the one thing that everything above needs
//! of a process, live or faked.

use crate::addr::ProcAddr;

/// The memory at `at` could not be read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Unreadable {
    /// Where reading began.
    pub at: ProcAddr,
    /// How much was asked for.
    pub len_bytes: u64,
}

impl std::fmt::Display for Unreadable {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} bytes at {} cannot be read", self.len_bytes, self.at)
    }
}

impl std::error::Error for Unreadable {}

/// A process whose memory can be read.
pub trait ReadMemory {
    /// Fills `buf` from `at`, all or nothing.
    ///
    /// # Errors
    ///
    /// Some of the range is not mapped or the process is gone.
    fn read_exact(&self, at: ProcAddr, buf: &mut [u8]) -> Result<(), Unreadable>;

    /// Fills every buffer; `true` for each that could be filled.
    fn read_many(&self, parts: &mut [(ProcAddr, &mut [u8])]) -> Vec<bool> {
        parts.iter_mut().map(|(at, buf)| self.read_exact(*at, buf).is_ok()).collect()
    }

    /// The `len_bytes` bytes from `at`.
    ///
    /// # Errors
    ///
    /// As [`read_exact`](Self::read_exact); also for lengths over 1 GiB.
    fn read_vec(&self, at: ProcAddr, len_bytes: u64) -> Result<Vec<u8>, Unreadable> {
        let bad = Unreadable { at, len_bytes };
        let len = usize::try_from(len_bytes).ok().filter(|l| *l <= 1 << 30).ok_or(bad)?;
        let mut buf = vec![0; len];
        self.read_exact(at, &mut buf)?;
        Ok(buf)
    }

    /// The little-endian word at `at`.
    ///
    /// # Errors
    ///
    /// As [`read_exact`](Self::read_exact).
    fn read_u64(&self, at: ProcAddr) -> Result<u64, Unreadable> {
        let mut buf = [0; 8];
        self.read_exact(at, &mut buf)?;
        Ok(u64::from_le_bytes(buf))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Flat(Vec<u8>);

    impl ReadMemory for Flat {
        fn read_exact(&self, at: ProcAddr, buf: &mut [u8]) -> Result<(), Unreadable> {
            let start = at.0 as usize;
            let part = self.0.get(start..start + buf.len());
            buf.copy_from_slice(part.ok_or(Unreadable { at, len_bytes: buf.len() as u64 })?);
            Ok(())
        }
    }

    #[test]
    fn absurd_lengths_are_errors() {
        let memory = Flat((0..16).collect());
        assert_eq!(memory.read_u64(ProcAddr(0)).unwrap(), 0x0706_0504_0302_0100);
        assert!(memory.read_vec(ProcAddr(0), u64::MAX).is_err());
        assert!(memory.read_vec(ProcAddr(10), 7).is_err());
    }
}
