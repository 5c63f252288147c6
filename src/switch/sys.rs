//! The system calls of a switch, as safe functions.
//!
//! Contract of the `unsafe` in this module: every pointer that a call gets is to a local value or to a slice of the caller that outlives
//! the call, with the length that it has; or the call takes numbers only; or memory is mapped where nothing is, and belongs to one value.
#![allow(unsafe_code)]

use std::io;
use std::sync::atomic::AtomicU32;

use libc::{c_int, c_long};

use crate::addr::ProcAddr;
use crate::process::{Pid, Tid};

fn check(result: c_long) -> io::Result<c_long> {
    if result == -1 {
        Err(io::Error::last_os_error())
    } else {
        Ok(result)
    }
}

/// Lets [`make_code_seen`] work in this process.
pub fn register_barrier() -> io::Result<()> {
    const REGISTER_PRIVATE_EXPEDITED_SYNC_CORE: c_int = 1 << 6;
    // SAFETY: numbers only.
    check(unsafe { libc::syscall(libc::SYS_membarrier, REGISTER_PRIVATE_EXPEDITED_SYNC_CORE, 0, 0) }).map(drop)
}

/// When it returns, every thread of this process executes what was written to code before (membarrier(2), SYNC_CORE).
pub fn make_code_seen() -> io::Result<()> {
    const PRIVATE_EXPEDITED_SYNC_CORE: c_int = 1 << 5;
    // SAFETY: numbers only.
    check(unsafe { libc::syscall(libc::SYS_membarrier, PRIVATE_EXPEDITED_SYNC_CORE, 0, 0) }).map(drop)
}

/// Sends a signal to one thread of this process.
pub fn send(pid: Pid, tid: Tid, signal: c_int) -> io::Result<()> {
    // SAFETY: numbers only.
    check(unsafe { libc::syscall(libc::SYS_tgkill, pid.0, tid.0, signal) }).map(drop)
}

/// Whether there is a task of this number in this process, a zombie included. Needs no descriptor.
pub fn is_thread(pid: Pid, tid: Tid) -> bool {
    !matches!(send(pid, tid, 0), Err(e) if e.raw_os_error() == Some(libc::ESRCH))
}

/// Whether there is a task of this number at all.
pub fn is_there(tid: Tid) -> bool {
    // SAFETY: numbers only.
    let result = check(unsafe { libc::syscall(libc::SYS_kill, tid.0, 0) });
    !matches!(result, Err(e) if e.raw_os_error() == Some(libc::ESRCH))
}

/// Puts signals in the place of those that the calling thread blocks: the kernel's set, past whatever stands before the C library.
pub fn set_mask(set: u64) {
    // SAFETY: a local of the kernel's layout.
    unsafe {
        libc::syscall(libc::SYS_rt_sigprocmask, libc::SIG_SETMASK, &raw const set, std::ptr::null_mut::<u64>(), 8usize)
    };
}

/// Words of memory that are zero at first, and cost nothing until they are written.
pub struct Zeroed {
    start: *mut AtomicU32,
    len: usize,
}

// SAFETY: atomics, which any thread may use; the memory is this value's own.
unsafe impl Send for Zeroed {}
// SAFETY: as above.
unsafe impl Sync for Zeroed {}

impl Zeroed {
    /// So many.
    pub fn map(len: usize) -> io::Result<Self> {
        let access = libc::PROT_READ | libc::PROT_WRITE;
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
        // SAFETY: new memory, where nothing is.
        let start = unsafe { libc::mmap(std::ptr::null_mut(), len * size_of::<AtomicU32>(), access, flags, -1, 0) };
        if start == libc::MAP_FAILED {
            Err(io::Error::last_os_error())
        } else {
            Ok(Self { start: start.cast(), len })
        }
    }

    /// One of them.
    pub fn get(&self, at: usize) -> Option<&AtomicU32> {
        // SAFETY: within what was mapped, which stays until this value is dropped; zero is a value of an atomic.
        (at < self.len).then(|| unsafe { &*self.start.add(at) })
    }
}

impl Drop for Zeroed {
    fn drop(&mut self) {
        // SAFETY: mapped by `map`, with this length.
        unsafe { libc::munmap(self.start.cast(), self.len * size_of::<AtomicU32>()) };
    }
}

/// Reads memory of this process that need not be there, all or nothing. Safe in a signal handler and in a child of fork; changes errno.
pub fn read_own(at: ProcAddr, buf: &mut [u8]) -> bool {
    // SAFETY: it takes nothing and cannot fail.
    let pid = unsafe { libc::getpid() };
    let local = libc::iovec { iov_base: buf.as_mut_ptr().cast(), iov_len: buf.len() };
    let remote = libc::iovec { iov_base: at.0 as usize as *mut libc::c_void, iov_len: buf.len() };
    // SAFETY: the local part is the caller's slice, the remote one is an address that the kernel checks.
    let got = unsafe { libc::process_vm_readv(pid, &raw const local, 1, &raw const remote, 1, 0) };
    usize::try_from(got).is_ok_and(|n| n == buf.len())
}

/// Whether what handlers and barriers need is allowed now: a filter of system calls may have come since the start.
///
/// # Errors
///
/// What is not.
pub fn can_look() -> Result<(), &'static str> {
    let (there, mut byte) = (0u8, [0]);
    if !read_own(ProcAddr(std::ptr::from_ref(&there) as u64), &mut byte) {
        return Err("read its own memory by process_vm_readv(2)");
    }
    make_code_seen().map_err(|_| "have all its threads see changed code by membarrier(2)")
}

/// Has `before` called by fork(2) in the thread that calls it, and `in_child` in every child, before fork returns there.
pub fn at_fork(before: extern "C" fn(), in_child: extern "C" fn()) -> io::Result<()> {
    // SAFETY: functions of the right type; they keep to what a child of a threaded process may do.
    match unsafe { libc::pthread_atfork(Some(before), None, Some(in_child)) } {
        0 => Ok(()),
        e => Err(io::Error::from_raw_os_error(e)),
    }
}

/// Writes entries of this process, a child of fork with one thread; whether all were. Allocates nothing.
pub fn write_code_of_child(entries: impl Iterator<Item = (ProcAddr, [u8; 5])>) -> bool {
    // SAFETY: a path that ends with a zero byte.
    let memory = unsafe { libc::open(c"/proc/self/mem".as_ptr(), libc::O_WRONLY | libc::O_CLOEXEC) };
    if memory < 0 {
        return false;
    }
    let mut done = true;
    for (at, bytes) in entries {
        // SAFETY: `bytes` is a local of that length.
        let wrote = unsafe { libc::pwrite(memory, bytes.as_ptr().cast(), bytes.len(), at.0.cast_signed()) };
        done &= usize::try_from(wrote).is_ok_and(|n| n == bytes.len());
    }
    // SAFETY: it was opened above.
    unsafe { libc::close(memory) };
    done
}

/// Where the list of robust futexes of a thread of this process is: in its control block, if the C library set it.
pub fn control_block(tid: Tid) -> Option<ProcAddr> {
    let (mut head, mut len) = (0u64, 0usize);
    // SAFETY: two locals for the two results.
    let result = unsafe { libc::syscall(libc::SYS_get_robust_list, tid.0, &raw mut head, &raw mut len) };
    (result == 0 && head != 0).then_some(ProcAddr(head))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::process::ptrace::procfs::own_tid;

    #[test]
    fn own_memory_is_read_if_it_is_there() {
        let value = 0x1122_3344_5566_7788_u64;
        let mut buf = [0; 8];
        assert!(read_own(ProcAddr(std::ptr::from_ref(&value) as u64), &mut buf));
        assert_eq!(u64::from_le_bytes(buf), value);
        assert!(!read_own(ProcAddr(16), &mut buf));
    }

    #[test]
    fn a_control_block_lies_above_the_stack() {
        let here = 0u8;
        std::thread::scope(|s| {
            let above = s.spawn(|| {
                let local = 0u8;
                control_block(own_tid()).is_some_and(|c| c.0 > std::ptr::from_ref(&local) as u64)
            });
            assert!(above.join().unwrap());
        });
        let _ = here;
        assert!(control_block(Tid(i32::MAX)).is_none());
    }

    #[test]
    fn a_barrier_needs_to_be_registered_once() {
        register_barrier().unwrap();
        make_code_seen().unwrap();
    }
}
