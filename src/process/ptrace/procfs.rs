//! What /proc says about a process and its threads (proc(5)).

use std::fs;
use std::io::{self, Read};

use crate::process::{Pid, Tid};

/// A short file of /proc, in one read: what is longer than a page is cut off.
fn read_short(path: &str) -> io::Result<Vec<u8>> {
    let mut buf = vec![0; 4096];
    let len = fs::File::open(path)?.read(&mut buf)?;
    buf.truncate(len);
    Ok(buf)
}

/// The fields of /proc/PID/status that matter here.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Status {
    /// `State`, the letter.
    pub state: char,
    /// `TracerPid`, 0 if none.
    pub tracer: i32,
    /// `Seccomp`: 0 none, 1 strict, 2 filter.
    pub seccomp: u32,
    /// `x86_Thread_features` holds `shstk`.
    pub shadow_stack: bool,
    /// `Name`.
    pub name: String,
    /// `PPid`.
    pub parent: i32,
    /// `VmSize` is there: it has memory. A kernel thread never has, a process no more once it exits.
    pub memory: bool,
    /// SIGKILL is on its way to it, or its core is being dumped.
    pub dying: bool,
}

impl Status {
    /// Reads the text of a status file; unknown lines are passed over.
    #[must_use]
    pub fn parse(text: &str) -> Self {
        let mut status = Self::default();
        for line in text.lines() {
            let Some((key, value)) = line.split_once(':') else { continue };
            let value = value.trim();
            let kill = || u64::from_str_radix(value, 16).is_ok_and(|set| set & 1 << (libc::SIGKILL - 1) != 0);
            match key {
                "Name" => value.clone_into(&mut status.name),
                "State" => status.state = value.chars().next().unwrap_or('?'),
                "TracerPid" => status.tracer = value.parse().unwrap_or(0),
                "PPid" => status.parent = value.parse().unwrap_or(0),
                "VmSize" => status.memory = true,
                "CoreDumping" => status.dying |= value == "1",
                "SigPnd" | "ShdPnd" => status.dying |= kill(),
                "Seccomp" => status.seccomp = value.parse().unwrap_or(0),
                "x86_Thread_features" => status.shadow_stack = value.split(' ').any(|f| f == "shstk"),
                _ => {}
            }
        }
        status
    }

    /// Of a process.
    pub fn of(pid: Pid) -> io::Result<Self> {
        Ok(Self::parse(&String::from_utf8_lossy(&read_short(&format!("/proc/{pid}/status"))?)))
    }

    /// Of a thread.
    pub fn of_thread(pid: Pid, tid: Tid) -> io::Result<Self> {
        Ok(Self::parse(&String::from_utf8_lossy(&read_short(&format!("/proc/{pid}/task/{tid}/status"))?)))
    }
}

/// The fields of a stat file (proc(5)) from the third one on: the name before them may hold anything.
fn stat_fields(path: &str) -> io::Result<Vec<String>> {
    let stat = read_short(path)?;
    let after = stat.iter().rposition(|b| *b == b')').map_or(0, |at| at + 2);
    let text = String::from_utf8_lossy(stat.get(after..).unwrap_or(&[])).into_owned();
    Ok(text.split_ascii_whitespace().map(str::to_owned).collect())
}

/// Field 9 of a stat file.
fn flags(path: &str) -> io::Result<u64> {
    let flags = stat_fields(path)?.get(6).and_then(|f| f.parse().ok());
    flags.ok_or_else(|| io::Error::other("stat is not as documented"))
}

/// Whether a process has ended or is about to: whatever else is found out about it then may be wrong.
#[must_use]
pub fn has_ended(pid: Pid) -> bool {
    const PF_EXITING: u64 = 0x4;
    let gone = |e: &io::Error| matches!(e.raw_os_error(), Some(libc::ENOENT | libc::ESRCH));
    let ended = match Status::of(pid) {
        Ok(s) => matches!(s.state, 'Z' | 'X') || !s.memory || s.dying,
        Err(e) => gone(&e),
    };
    ended
        || match flags(&format!("/proc/{pid}/stat")) {
            Ok(flags) => flags & PF_EXITING != 0,
            Err(e) => gone(&e),
        }
}

/// Whether it is a thread of the kernel (PF_KTHREAD).
#[must_use]
pub fn is_kernel_thread(pid: Pid) -> bool {
    const PF_KTHREAD: u64 = 0x0020_0000;
    flags(&format!("/proc/{pid}/stat")).is_ok_and(|flags| flags & PF_KTHREAD != 0)
}

/// Start time of a process in clock ticks since boot: together with the PID it names one process for ever.
pub fn start_time(pid: Pid) -> io::Result<u64> {
    // Field 22.
    let field = stat_fields(&format!("/proc/{pid}/stat"))?.get(19).and_then(|f| f.parse().ok());
    field.ok_or_else(|| io::Error::other("stat is not as documented"))
}

/// Whether there is such a thread.
#[must_use]
pub fn thread_exists(pid: Pid, tid: Tid) -> bool {
    stat_fields(&format!("/proc/{pid}/task/{tid}/stat"))
        .is_ok_and(|f| !matches!(f.first().map(String::as_str), Some("Z" | "X")))
}

/// Whether the numbers that a process has for its threads are those by which /proc lists them here, and it may ask for them.
#[must_use]
pub fn shows_threads_of(pid: Pid) -> bool {
    let space = |who: &str| fs::read_link(format!("/proc/{who}/ns/pid")).ok();
    let own = std::process::id();
    // What asks itself may ask.
    let filtered = pid.0.cast_unsigned() != own && Status::of(pid).map_or(true, |s| s.seccomp != 0);
    let is_ours = fs::read_link("/proc/self").is_ok_and(|name| name.as_os_str() == own.to_string().as_str());
    !filtered && is_ours && space("self").is_some_and(|own| space(&pid.to_string()) == Some(own))
}

/// Whether a thread has ended and is still listed, as a process's first thread is until the last one ends.
#[must_use]
pub fn is_zombie(pid: Pid, tid: Tid) -> bool {
    stat_fields(&format!("/proc/{pid}/task/{tid}/stat"))
        .is_ok_and(|f| matches!(f.first().map(String::as_str), Some("Z" | "X")))
}

/// The signals that a thread blocks (`SigBlk`), signal 1 in the lowest bit; `None` if it has ended.
#[must_use]
pub fn blocked_signals(pid: Pid, tid: Tid) -> Option<u64> {
    let text = String::from_utf8(read_short(&format!("/proc/{pid}/task/{tid}/status")).ok()?).ok()?;
    let line = text.lines().find_map(|l| l.strip_prefix("SigBlk:"))?;
    u64::from_str_radix(line.trim(), 16).ok()
}

/// The name of a thread.
#[must_use]
pub fn thread_name(pid: Pid, tid: Tid) -> String {
    let name = read_short(&format!("/proc/{pid}/task/{tid}/comm")).unwrap_or_default();
    String::from_utf8_lossy(name.trim_ascii_end()).into_owned()
}

/// The calling thread.
#[must_use]
pub fn own_tid() -> Tid {
    Tid(super::sys::own_tid())
}

/// The threads of a process.
pub fn threads(pid: Pid) -> io::Result<Vec<Tid>> {
    let mut out = Vec::new();
    for entry in fs::read_dir(format!("/proc/{pid}/task"))? {
        if let Some(tid) = entry?.file_name().to_str().and_then(|n| n.parse().ok()) {
            out.push(Tid(tid));
        }
    }
    Ok(out)
}

/// The threads of a process, none left out that was there all the time; `None` if that can't be told of this try.
///
/// The kernel goes from one thread to the next, and stops early where one ends just then. What was listed last tells: `is_there` says
/// whether it still is.
pub fn all_threads(pid: Pid, is_there: &dyn Fn(Tid) -> bool) -> io::Result<Option<Vec<Tid>>> {
    const ENTRY_BYTES: usize = 32;
    let folder = task_folder(pid)?;
    let room = thread_count(&folder)? * 2 + 64;
    let mut buffer = Vec::with_capacity(room * ENTRY_BYTES);
    let mut dir = rustix::fs::RawDir::new(&folder, buffer.spare_capacity_mut());
    let (mut out, mut calls) = (Vec::new(), 0);
    while let Some(entry) = dir.next() {
        if let Some(tid) = entry?.file_name().to_str().ok().and_then(|n| n.parse().ok()) {
            out.push(Tid(tid));
        }
        calls += u32::from(dir.is_buffer_empty());
    }
    Ok((calls == 1 && out.last().is_some_and(|last| is_there(*last))).then_some(out))
}

/// The folder that lists the threads of a process.
pub fn task_folder(pid: Pid) -> io::Result<fs::File> {
    fs::File::open(format!("/proc/{pid}/task"))
}

/// How many threads a process has, in one call: the links of its task folder, less its own two.
pub fn thread_count(task_folder: &fs::File) -> io::Result<usize> {
    use std::os::unix::fs::MetadataExt;
    let links = task_folder.metadata()?.nlink();
    Ok(usize::try_from(links.saturating_sub(2)).unwrap_or(usize::MAX))
}

/// Whether a thread is a worker of io_uring, which never executes code of the process (PF_IO_WORKER of its stat file).
#[must_use]
pub fn is_io_worker(pid: Pid, tid: Tid) -> bool {
    const PF_IO_WORKER: u64 = 0x10;
    flags(&format!("/proc/{pid}/task/{tid}/stat")).is_ok_and(|flags| flags & PF_IO_WORKER != 0)
}

/// How often a thread has been put on a CPU (schedstat, field 3); 0 if the kernel does not count.
pub fn run_count(pid: Pid, tid: Tid) -> u64 {
    let text = read_short(&format!("/proc/{pid}/task/{tid}/schedstat")).unwrap_or_default();
    String::from_utf8_lossy(&text).trim().split(' ').nth(2).and_then(|f| f.parse().ok()).unwrap_or(0)
}

/// The system call that a thread is blocked in, with the stack pointer and the program counter; `None` while it runs.
pub fn blocked_in(pid: Pid, tid: Tid) -> Option<Blocked> {
    let text = read_short(&format!("/proc/{pid}/task/{tid}/syscall")).ok()?;
    Blocked::parse(&String::from_utf8_lossy(&text))
}

/// A thread blocked in the kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Blocked {
    /// Number of the system call, -1 if it is in the kernel for another reason.
    pub number: i64,
    /// The arguments of the call: `rdi`, `rsi`, `rdx`, `r10`, `r8`, `r9`.
    pub arguments: [u64; 6],
    /// Stack pointer.
    pub sp: u64,
    /// Program counter.
    pub pc: u64,
}

impl Blocked {
    fn parse(text: &str) -> Option<Self> {
        let mut fields = text.trim().split(' ');
        let number = fields.next()?.parse().ok()?;
        let mut last = fields.rev().map(|f| u64::from_str_radix(f.trim_start_matches("0x"), 16));
        let pc = last.next()?.ok()?;
        let sp = last.next()?.ok()?;
        let mut arguments = [0; 6];
        for (to, from) in arguments.iter_mut().rev().zip(last) {
            *to = from.ok()?;
        }
        Some(Self { number, arguments, sp, pc })
    }
}

/// Whether this very process has CAP_SYS_ADMIN.
#[must_use]
pub fn may_administer() -> bool {
    const CAP_SYS_ADMIN: u32 = 21;
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|l| l.strip_prefix("CapEff:"));
    line.is_some_and(|set| u64::from_str_radix(set.trim(), 16).is_ok_and(|set| set >> CAP_SYS_ADMIN & 1 == 1))
}

/// Every process on this host.
#[must_use]
pub fn processes() -> Vec<Pid> {
    let list = fs::read_dir("/proc").into_iter().flatten().flatten();
    list.filter_map(|e| e.file_name().to_str()?.parse().ok().map(Pid)).collect()
}

/// One value of /proc/PID/auxv (getauxval(3)).
pub fn auxiliary(pid: Pid, kind: u64) -> Option<u64> {
    let bytes = read_short(&format!("/proc/{pid}/auxv")).ok()?;
    let (words, _) = bytes.as_chunks::<8>();
    let mut pairs = words.chunks_exact(2).map(|p| (u64::from_le_bytes(p[0]), u64::from_le_bytes(p[1])));
    pairs.find(|(k, _)| *k == kind).map(|(_, v)| v)
}

/// Who holds the flock(2) on an open file, by `/proc/locks`: `1: FLOCK  ADVISORY  WRITE 4711 00:15:32085 0 EOF`.
pub fn lock_holder(file: &std::fs::File) -> Option<i32> {
    use std::os::unix::fs::MetadataExt;
    let inode = format!(":{}", file.metadata().ok()?.ino());
    let locks = std::fs::read_to_string("/proc/locks").ok()?;
    locks.lines().find_map(|line| {
        let mut words = line.split_whitespace().skip(1).filter(|w| *w != "->");
        let (kind, pid, place) = (words.next()?, words.nth(2)?, words.next()?);
        (kind == "FLOCK" && place.ends_with(&inode)).then(|| pid.parse().ok()).flatten()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn status_lines_are_read() {
        let status = Status::parse(
            "Name:\ta b\nState:\tS (sleeping)\nPPid:\t7\nTracerPid:\t42\nVmSize:\t 8 kB\nShdPnd:\t0000000000000100\nSeccomp:\t2\nSeccomp_filters:\t1\nx86_Thread_features:\tshstk wrss\n",
        );
        let expected = Status {
            state: 'S',
            tracer: 42,
            seccomp: 2,
            shadow_stack: true,
            name: "a b".into(),
            parent: 7,
            memory: true,
            dying: true,
        };
        assert_eq!(status, expected);
        assert!(!Status::parse("SigPnd:\tfffffffffffffeff\nCoreDumping:\t0\n").dying);
        assert!(Status::parse("CoreDumping:\t1\n").dying);
        assert!(!Status::parse("x86_Thread_features:\t\n").shadow_stack);
    }

    #[test]
    fn a_blocked_thread_is_told_from_a_running_one() {
        assert_eq!(Blocked::parse("running\n"), None);
        assert_eq!(
            Blocked::parse("232 0x3 0x7f 0x4 0xffffffff 0x0 0x8 0x7f51409987e0 0x7f5140aa5f36\n"),
            Some(Blocked {
                number: 232,
                arguments: [3, 0x7f, 4, 0xffff_ffff, 0, 8],
                sp: 0x7f51_4099_87e0,
                pc: 0x7f51_40aa_5f36
            })
        );
        assert_eq!(
            Blocked::parse("-1 0x7ffe0 0x10\n"),
            Some(Blocked { number: -1, arguments: [0; 6], sp: 0x7ffe0, pc: 0x10 })
        );
    }

    #[test]
    fn our_own_files_are_readable() {
        let pid = Pid(std::process::id().cast_signed());
        assert!(start_time(pid).unwrap() > 0);
        assert!(!threads(pid).unwrap().is_empty());
        assert!(all_threads(pid, &|_| true).unwrap().unwrap().contains(&own_tid()));
        assert!(all_threads(pid, &|_| false).unwrap().is_none());
        assert!(thread_count(&task_folder(pid).unwrap()).unwrap() >= 1);
        assert!(!is_io_worker(pid, Tid(pid.0)));
        assert!(!has_ended(pid) && !is_kernel_thread(pid));
        assert!(has_ended(Pid(i32::MAX)));
        assert!(processes().contains(&pid));
        assert!(auxiliary(pid, 3).is_some());
    }
}
