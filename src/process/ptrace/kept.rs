//! What the kernel keeps for a process and hands back to it later: addresses that no scan of memory finds.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::FileExt;

use crate::addr::{ProcAddr, ProcRange};
use crate::maps::PAGE;
use crate::process::Pid;

/// The signals whose handlers can be asked for.
pub const SIGNALS: [i32; 62] = {
    let mut out = [0; 62];
    let (mut i, mut signal) = (0, 1);
    while signal <= 64 {
        // KILL and STOP have none.
        if signal != libc::SIGKILL && signal != libc::SIGSTOP {
            out[i] = signal;
            i += 1;
        }
        signal += 1;
    }
    out
};

/// Bytes of the kernel's `struct sigaction` (handler, flags, restorer, mask).
pub const HANDLER_BYTES: u64 = 32;

/// An address that the kernel keeps and that `is_inside` knows, or something in which one may be kept unseen; in words.
///
/// # Errors
///
/// `/proc/PID` can't be read.
pub fn by_kernel(pid: Pid, is_inside: &dyn Fn(u64) -> bool) -> io::Result<Option<String>> {
    for fd in fs::read_dir(format!("/proc/{pid}/fd"))? {
        let fd = fd?.file_name().to_string_lossy().into_owned();
        let to = fs::read_link(format!("/proc/{pid}/fd/{fd}")).unwrap_or_default();
        let to = to.to_string_lossy();
        if to == "anon_inode:[eventpoll]" {
            let text = fs::read_to_string(format!("/proc/{pid}/fdinfo/{fd}"))?;
            if data_of_epoll(&text).any(is_inside) {
                return Ok(Some(format!("an address is kept by descriptor {fd} (epoll)")));
            }
        }
        if ["anon_inode:[io_uring]", "anon_inode:[userfaultfd]", "/dev/mqueue"].iter().any(|k| to.starts_with(k)) {
            return Ok(Some(format!("an address may be kept by descriptor {fd} ({to})")));
        }
    }
    // The file is there only where the kernel has checkpoint and restore.
    let timers = fs::read_to_string(format!("/proc/{pid}/timers")).unwrap_or_default();
    if values_of_timers(&timers).any(is_inside) {
        return Ok(Some("an address is kept by a timer".into()));
    }
    let maps = fs::read_to_string(format!("/proc/{pid}/maps"))?;
    if maps.lines().any(|l| l.contains("/[aio]")) {
        return Ok(Some("an address may be kept by asynchronous I/O (io_setup)".into()));
    }
    for task in fs::read_dir(format!("/proc/{pid}/task"))? {
        let text = fs::read_to_string(task?.path().join("status")).unwrap_or_default();
        let masks = text.lines().filter_map(|l| l.strip_prefix("SigPnd:").or_else(|| l.strip_prefix("ShdPnd:")));
        if masks.into_iter().any(|m| m.trim().bytes().any(|b| b != b'0')) {
            return Ok(Some("an address may be carried by a signal that is pending".into()));
        }
    }
    Ok(None)
}

/// `tfd:        5 events:       19 data:     7ffe0123 …`
fn data_of_epoll(text: &str) -> impl Iterator<Item = u64> + '_ {
    let data = |l: &str| u64::from_str_radix(l.split("data:").nth(1)?.split_whitespace().next()?, 16).ok();
    text.lines().filter_map(data)
}

/// `signal: 60/00007fff86e452a8`
fn values_of_timers(text: &str) -> impl Iterator<Item = u64> + '_ {
    let value = |l: &str| u64::from_str_radix(l.strip_prefix("signal:")?.split('/').nth(1)?.trim(), 16).ok();
    text.lines().filter_map(value)
}

/// Which pages of private memory the process ever touched (Documentation/admin-guide/mm/pagemap.rst).
pub struct Pages(File);

/// Bytes of one entry.
const ENTRY: u64 = 8;
const PRESENT_OR_SWAPPED: u64 = 0b11 << 62;

impl Pages {
    /// Opens `/proc/PID/pagemap`.
    ///
    /// # Errors
    ///
    /// It can't be opened.
    pub fn open(pid: Pid) -> io::Result<Self> {
        File::open(format!("/proc/{pid}/pagemap")).map(Self)
    }

    /// The parts of `range` that are not as fresh memory is.
    ///
    /// # Errors
    ///
    /// It can't be read.
    pub fn touched(&self, range: ProcRange) -> io::Result<Vec<ProcRange>> {
        const AT_ONCE: u64 = 8192;
        let mut out: Vec<ProcRange> = Vec::new();
        let (first, last) = (range.start.0 / PAGE, range.end.0.div_ceil(PAGE));
        let mut entries = vec![0u8; (AT_ONCE * ENTRY) as usize];
        let mut page = first;
        while page < last {
            let count = AT_ONCE.min(last - page);
            let part = &mut entries[..(count * ENTRY) as usize];
            self.0.read_exact_at(part, page * ENTRY)?;
            let (words, _) = part.as_chunks::<8>();
            for (i, word) in words.iter().enumerate() {
                if u64::from_le_bytes(*word) & PRESENT_OR_SWAPPED == 0 {
                    continue;
                }
                let start = ((page + i as u64) * PAGE).max(range.start.0);
                let end = ProcAddr(((page + i as u64 + 1) * PAGE).min(range.end.0));
                match out.last_mut() {
                    Some(last) if last.end.0 == start => last.end = end,
                    _ => out.push(ProcRange { start: ProcAddr(start), end }),
                }
            }
            page += count;
        }
        Ok(out)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_proc_tells_is_read() {
        let epoll =
            "pos:\t0\nflags:\t02\ntfd:        5 events:       19 data:     7ffe0123  pos:0 ino:61 sdev:7\ntfd: 6";
        assert_eq!(data_of_epoll(epoll).collect::<Vec<_>>(), [0x7ffe_0123]);
        let timers = "ID: 1\nsignal: 60/00007fff86e452a8\nnotify: signal/pid.2634\nClockID: 0\n";
        assert_eq!(values_of_timers(timers).collect::<Vec<_>>(), [0x7fff_86e4_52a8]);
    }

    #[test]
    fn touched_pages_are_told_from_fresh_ones() {
        // So much that the allocator maps it afresh.
        let mut map = vec![0u8; 1 << 22];
        let own = Pid(std::process::id().cast_signed());
        let at = map.as_ptr() as u64;
        map[3 * PAGE as usize] = 1;
        let range = ProcRange::new(ProcAddr(at), 8 * PAGE).unwrap();
        let touched = Pages::open(own).unwrap().touched(range).unwrap();
        let third = ProcRange::new(ProcAddr(at + 3 * PAGE), PAGE).unwrap();
        assert!(touched.iter().any(|t| t.start < third.end && third.start < t.end), "{touched:?}");
        assert!(touched.iter().map(|t| t.len_bytes()).sum::<u64>() < 8 * PAGE, "{touched:?}");
    }
}
