//! Borrowing one thread: to make system calls, or to call a function.
//!
//! The thread is stopped by PTRACE_INTERRUPT, its registers, signal mask and vector state are kept. Then a signal
//! frame with all of it is written below its stack, and only then it gets registers of ours: from here on it finds
//! back alone, by rt_sigreturn(2), whenever we die ([`super::frame`]). It runs what we set up from one system-call stop to
//! the next. To give it back, it is interrupted again: only at a stop of that kind does the kernel restart the call
//! that the thread was blocked in (at a stop of a system call's exit the program would see errno 512).
//!
//! The order matters. There: frame, registers, signal mask (a mask outlives its tracer; with the frame's return it goes).
//! Back: mask, registers.

use std::time::{Duration, Instant};

use super::frame::{Frame, Gadgets};
use super::sys::{self, RawRegisters};
use super::tracee::{self, Running, Stop, Stopped, Waited};
use super::{procfs, seccomp, PtraceProcess};
use crate::addr::ProcAddr;
use crate::insn::{self, CALL_STUB_SYSCALL, SYSCALL};
use crate::memory::ReadMemory;
use crate::process::{Access, FunctionCall, HeldThread, IdleCheck, Process, ProcessError, RemoteCall, Tid};

/// How long one candidate may take to stop.
const STOP_WITHIN: Duration = Duration::from_millis(20);

/// Bytes of stack that a function that is called gets at least.
const CALL_STACK: u64 = 16 << 10;

/// What a borrowed thread is for.
#[derive(Clone, Copy)]
enum Purpose<'a> {
    /// System calls: any thread will do, and a running one where none sleeps.
    SystemCalls(&'a [RemoteCall]),
    /// A function: it must be asleep, with room for the function's frames.
    Function,
}

impl Purpose<'_> {
    /// The system calls that a thread will make; those of a function that takes a lock and memory.
    fn calls(self) -> Vec<(i64, [u64; 6])> {
        let (write, private) =
            ((libc::PROT_READ | libc::PROT_WRITE) as u64, (libc::MAP_PRIVATE | libc::MAP_ANONYMOUS) as u64);
        match self {
            Self::SystemCalls(calls) => calls.iter().map(|c| (arguments(*c).1, arguments(*c).2)).collect(),
            Self::Function => vec![
                (libc::SYS_futex, [0; 6]),
                (libc::SYS_brk, [0; 6]),
                (libc::SYS_mmap, [0, 1 << 20, write, private, u64::MAX, 0]),
                (libc::SYS_mprotect, [0, 1 << 12, write, 0, 0, 0]),
                (libc::SYS_munmap, [0; 6]),
                (insn::CALL_STUB_NUMBER, [0; 6]),
            ],
        }
    }
}

/// A borrowed thread.
struct Borrowed {
    thread: Stopped,
    registers: RawRegisters,
    mask: u64,
    vector: Vec<u8>,
    frame: Frame,
    gadgets: Gadgets,
    /// So that it is not kept waiting while we wait for a CPU.
    _priority: sys::Priority,
}

/// Calls in which threads wait, and which go on unseen after an interruption.
fn is_wait(number: i64) -> bool {
    matches!(
        number,
        libc::SYS_epoll_wait
            | libc::SYS_epoll_pwait
            | libc::SYS_epoll_pwait2
            | libc::SYS_poll
            | libc::SYS_ppoll
            | libc::SYS_select
            | libc::SYS_pselect6
            | libc::SYS_futex
            | libc::SYS_nanosleep
            | libc::SYS_clock_nanosleep
            | libc::SYS_read
            | libc::SYS_recvfrom
            | libc::SYS_recvmsg
            | libc::SYS_accept
            | libc::SYS_accept4
            | libc::SYS_pause
            | libc::SYS_rt_sigsuspend
            | libc::SYS_rt_sigtimedwait
            | libc::SYS_wait4
            | libc::SYS_waitid
    )
}

impl Borrowed {
    /// Registers to set up something of ours with: no interrupted call, strings forward.
    fn foreign(&self) -> RawRegisters {
        const DIRECTION_FLAG: u64 = 1 << 10;
        RawRegisters { orig_rax: u64::MAX, eflags: self.registers.eflags & !DIRECTION_FLAG, ..self.registers }
    }
}

impl PtraceProcess {
    /// Threads that might be borrowed, best first: blocked in a wait and rarely woken; running ones last, if wanted.
    fn candidates(&self, running_too: bool) -> Result<Vec<Tid>, ProcessError> {
        let list = procfs::threads(self.pid).map_err(|e| self.os_error("list the threads", e))?;
        let mut out: Vec<(bool, u64, Tid)> = Vec::new();
        for tid in list {
            match procfs::blocked_in(self.pid, tid) {
                Some(b) if is_wait(b.number) => out.push((false, procfs::run_count(self.pid, tid), tid)),
                None if running_too => out.push((true, 0, tid)),
                // Stopped by job control at the end of whatever it did.
                Some(_) if running_too && procfs::Status::of_thread(self.pid, tid).is_ok_and(|s| s.state == 'T') => {
                    out.push((true, 0, tid));
                }
                _ => {}
            }
        }
        out.sort();
        Ok(out.into_iter().map(|(_, _, tid)| tid).collect())
    }

    fn borrow_thread(
        &mut self,
        what: &'static str,
        purpose: Purpose<'_>,
        accept: &mut dyn FnMut(&HeldThread, &dyn ReadMemory) -> bool,
        deadline: Instant,
    ) -> Result<Borrowed, ProcessError> {
        self.gadgets()?;
        loop {
            self.release_lingering();
            for tid in self.candidates(matches!(purpose, Purpose::SystemCalls(_)))? {
                if self.lingering.iter().any(|r| r.tid() == tid) {
                    continue;
                }
                if let Some(borrowed) = self.try_borrow(tid, purpose, accept)? {
                    return Ok(borrowed);
                }
                if Instant::now() >= deadline {
                    break;
                }
            }
            if let Some(mode) = self.confined.take() {
                return Err(ProcessError::Confined { pid: self.pid, mode });
            }
            if Instant::now() >= deadline {
                return Err(ProcessError::NoIdleThread { pid: self.pid, what });
            }
            if !self.is_alive() {
                return Err(ProcessError::Gone(self.pid));
            }
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    fn try_borrow(
        &mut self,
        tid: Tid,
        purpose: Purpose<'_>,
        accept: &mut dyn FnMut(&HeldThread, &dyn ReadMemory) -> bool,
    ) -> Result<Option<Borrowed>, ProcessError> {
        let runs = procfs::run_count(self.pid, tid);
        self.runs_before_loan.entry(tid).or_insert(runs);
        let Some(running) = self.seize(tid)? else { return Ok(None) };
        let os = |e| ProcessError::from_os(self.pid, "set a timer for", e);
        let alarm = sys::Alarm::after(STOP_WITHIN).map_err(os)?;
        let until = Instant::now() + STOP_WITHIN;
        let priority = sys::Priority::raise();
        running.interrupt();
        let mut running = running;
        let stopped = loop {
            match running.wait(until) {
                // Stopped by job control: it runs for us, and the kernel stops it again when it is let go.
                Waited::Stopped(s) if matches!(s.stop(), Stop::Interrupt | Stop::Group) => break s,
                Waited::Stopped(s) => {
                    let born = s.born();
                    running = s.resume();
                    if let Some(born) = born {
                        self.release_running(vec![Running::inherited(born)]);
                    }
                }
                Waited::Gone => return Ok(None),
                Waited::Late(running) => {
                    self.lingering.push(running);
                    return Ok(None);
                }
            }
        };
        drop(alarm);
        let Ok(mut registers) = stopped.raw_registers() else {
            stopped.detach();
            return Ok(None);
        };
        tracee::hide_eintr(&stopped, &mut registers);
        let held = HeldThread { tid, is_main: tid.0 == self.pid.0, registers: tracee::registers(&registers) };
        // Job control stops a thread where no call is under way any more: it has its result, or starts anew.
        let suitable = (tracee::restarts(&registers) || stopped.stop() == Stop::Group)
            && registers.cs == 0x33
            && self.outside_rseq(tid)
            && accept(&held, self)
            && self.may_call(tid, purpose);
        let kept = suitable.then(|| Some((sys::signal_mask(tid.0).ok()?, sys::vector_state(tid.0).ok()?))).flatten();
        let Some((mask, vector)) = kept else {
            stopped.detach();
            return Ok(None);
        };
        let gadgets = self.gadgets()?;
        let spare = if matches!(purpose, Purpose::Function) { CALL_STACK } else { 0 };
        let maps = self.mappings()?;
        let frame = Frame::new(&registers, mask, &vector, &gadgets);
        let Some(frame) = frame.filter(|f| f.fits(registers.rsp, &maps, spare)) else {
            stopped.detach();
            return Ok(None);
        };
        if self.write_any(frame.at, &frame.bytes, Some(tid)).is_err() {
            stopped.detach();
            return Ok(None);
        }
        let borrowed = Borrowed { thread: stopped, registers, mask, vector, frame, gadgets, _priority: priority };
        // From the first of these two on, the thread finds back alone.
        let (rip, rsp) = borrowed.frame.home();
        let home = RawRegisters { rip, rsp, ..borrowed.foreign() };
        if sys::set_registers(tid.0, &home).is_err() || sys::set_signal_mask(tid.0, !0).is_err() {
            self.give_back(borrowed)?;
            return Ok(None);
        }
        Ok(Some(borrowed))
    }

    /// Whether no seccomp filter of a stopped thread stands in the way, or it is suspended until the thread is let go.
    ///
    /// If we die meanwhile the suspension ends with us: the way back, `rt_sigreturn`, must always be allowed.
    fn may_call(&mut self, tid: Tid, purpose: Purpose<'_>) -> bool {
        const STRICT: u32 = 1;
        let mode = procfs::Status::of_thread(self.pid, tid).map_or(u32::MAX, |s| s.seccomp);
        if mode == 0 {
            return true;
        }
        let from = self.gadgets.map_or(0, |g| g.syscall_ret.0 + SYSCALL.len() as u64);
        let allowed = match mode {
            STRICT => Some(false),
            _ => sys::seccomp_filters(tid.0).ok().and_then(|filters| {
                let allows = |number, args| seccomp::allows(&filters, &seccomp::Call { number, from, args });
                allows(libc::SYS_rt_sigreturn, [0; 6])
                    .then(|| purpose.calls().into_iter().all(|(number, args)| allows(number, args)))
            }),
        };
        let may = match allowed {
            Some(true) => true,
            Some(false) => sys::suspend_seccomp(tid.0).is_ok(),
            None => false,
        };
        if !may {
            self.confined = Some(mode);
        }
        may
    }

    /// Whether the thread is in no restartable sequence: moving its program counter would abort that.
    fn outside_rseq(&self, tid: Tid) -> bool {
        const RSEQ_CS: u64 = 8;
        match sys::rseq_area(tid.0) {
            None => true,
            Some(area) => area.checked_add(RSEQ_CS).is_some_and(|at| self.read_u64(at) == Ok(0)),
        }
    }

    /// Lets the borrowed thread run to its next system-call stop.
    fn run_to_syscall(&mut self, thread: Stopped) -> Result<Stopped, ProcessError> {
        let mut running = thread.resume_to_syscall();
        loop {
            // Without an alarm this waits as long as it takes: a thread that is on its way cannot be given up.
            match running.wait(Instant::now()) {
                Waited::Stopped(s) if s.stop() == Stop::Syscall => return Ok(s),
                Waited::Stopped(s) => {
                    // What a function that we call makes is traced, too, and waits for us.
                    self.lingering.extend(s.born().map(Running::inherited));
                    running = s.resume_to_syscall();
                }
                Waited::Gone => return Err(ProcessError::Gone(self.pid)),
                Waited::Late(r) => running = r,
            }
        }
    }

    /// Gives a thread back as it was.
    fn give_back(&self, borrowed: Borrowed) -> Result<(), ProcessError> {
        let Borrowed { thread, registers, mask, vector, _priority, .. } = borrowed;
        let failed = |e| ProcessError::from_os(self.pid, "give back a thread of", e);
        let tid = thread.tid().0;
        let mut running = thread.resume_to_interrupt();
        let thread = loop {
            match running.wait(Instant::now()) {
                Waited::Stopped(s) if matches!(s.stop(), Stop::Interrupt | Stop::Group) => break s,
                Waited::Stopped(s) => running = s.resume_to_interrupt(),
                Waited::Gone => return Err(ProcessError::Gone(self.pid)),
                Waited::Late(r) => running = r,
            }
        };
        sys::set_vector_state(tid, &vector).map_err(failed)?;
        sys::set_signal_mask(tid, mask).map_err(failed)?;
        sys::set_registers(tid, &registers).map_err(failed)?;
        thread.detach();
        Ok(())
    }

    pub(super) fn remote_calls(&mut self, calls: &[RemoteCall], deadline: Instant) -> Result<(), ProcessError> {
        let what = "make a system call";
        let mut borrowed = self.borrow_thread(what, Purpose::SystemCalls(calls), &mut |_, _| true, deadline)?;
        let mut result = Ok(());
        for call in calls {
            let (back, outcome) = self.one_call(borrowed, *call)?;
            borrowed = back;
            if let Err(e) = outcome {
                result = Err(e);
                break;
            }
            match call {
                RemoteCall::Map(range) => self.own.push(*range),
                RemoteCall::Unmap(range) => self.own.retain(|o| o != range),
                RemoteCall::Protect(..) | RemoteCall::AskHandler { .. } => {}
            }
        }
        self.give_back(borrowed)?;
        result
    }

    fn one_call(
        &mut self,
        mut borrowed: Borrowed,
        call: RemoteCall,
    ) -> Result<(Borrowed, Result<(), ProcessError>), ProcessError> {
        let pid = self.pid;
        let failed = |e| ProcessError::from_os(pid, "set registers of", e);
        let (name, number, args, expected) = arguments(call);
        let mut regs = borrowed.foreign();
        regs.rip = borrowed.gadgets.syscall_ret.0;
        regs.rsp = borrowed.frame.at.0;
        regs.rax = number as u64;
        [regs.rdi, regs.rsi, regs.rdx, regs.r10, regs.r8, regs.r9] = args;
        sys::set_registers(borrowed.thread.tid().0, &regs).map_err(failed)?;
        borrowed.thread = self.run_to_syscall(borrowed.thread)?;
        borrowed.thread = self.run_to_syscall(borrowed.thread)?;
        let rax = borrowed.thread.raw_registers().map_err(failed)?.rax;
        let outcome = match rax.cast_signed() {
            e @ -4095..=-1 => {
                let source = std::io::Error::from_raw_os_error(i32::try_from(-e).unwrap_or(0));
                Err(ProcessError::Remote { pid: self.pid, call: name, source })
            }
            // Kernels before 4.17 take MAP_FIXED_NOREPLACE for a mere wish; the result is then elsewhere.
            _ if rax != expected => {
                let source = std::io::Error::from_raw_os_error(libc::EEXIST);
                Err(ProcessError::Remote { pid: self.pid, call: name, source })
            }
            _ => Ok(()),
        };
        Ok((borrowed, outcome))
    }

    pub(super) fn call_function(
        &mut self,
        call: FunctionCall,
        idle: &mut dyn IdleCheck,
        deadline: Instant,
    ) -> Result<(), ProcessError> {
        let failed = |pid| move |e| ProcessError::from_os(pid, "set registers of", e);
        let pid = self.pid;
        let what = "register unwind tables";
        let mut accept = |t: &HeldThread, m: &dyn ReadMemory| idle.is_idle(t, m);
        let mut borrowed = self.borrow_thread(what, Purpose::Function, &mut accept, deadline)?;
        let mut regs = borrowed.foreign();
        regs.rsp = borrowed.frame.context();
        regs.rip = call.stub.0;
        regs.rax = call.function.0;
        [regs.rdi, regs.rsi, regs.rdx, regs.rcx] = call.arguments;
        sys::set_registers(borrowed.thread.tid().0, &regs).map_err(failed(pid))?;
        let back = call.stub.0 + CALL_STUB_SYSCALL + SYSCALL.len() as u64;
        // The function's own system calls stop, too; only the stub's tells that it has returned.
        loop {
            borrowed.thread = self.run_to_syscall(borrowed.thread)?;
            if borrowed.thread.raw_registers().map_err(failed(pid))?.rip == back {
                break;
            }
        }
        borrowed.thread = self.run_to_syscall(borrowed.thread)?;
        self.give_back(borrowed)?;
        self.release_born();
        Ok(())
    }

    /// Writes by PTRACE_POKETEXT on a thread borrowed for it.
    pub(super) fn poke_borrowed(&mut self, at: ProcAddr, bytes: &[u8]) -> Result<(), ProcessError> {
        let deadline = Instant::now() + Duration::from_secs(1);
        let borrowed = self.borrow_thread("write memory", Purpose::SystemCalls(&[]), &mut |_, _| true, deadline)?;
        let result = self.poke(borrowed.thread.tid(), at, bytes);
        self.give_back(borrowed)?;
        result.map_err(|source| ProcessError::Write { pid: self.pid(), at, len_bytes: bytes.len(), source })
    }
}

/// Name, number, arguments and the result of success.
fn arguments(call: RemoteCall) -> (&'static str, i64, [u64; 6], u64) {
    let (read, write, execute) = (libc::PROT_READ as u64, libc::PROT_WRITE as u64, libc::PROT_EXEC as u64);
    match call {
        RemoteCall::Map(r) => {
            let flags = (libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED_NOREPLACE) as u64;
            ("mmap", libc::SYS_mmap, [r.start.0, r.len_bytes(), read | execute, flags, u64::MAX, 0], r.start.0)
        }
        RemoteCall::Protect(r, access) => {
            let access = match access {
                Access::Read => read,
                Access::Execute => read | execute,
                Access::Write => read | write,
            };
            ("mprotect", libc::SYS_mprotect, [r.start.0, r.len_bytes(), access, 0, 0, 0], 0)
        }
        RemoteCall::Unmap(r) => ("munmap", libc::SYS_munmap, [r.start.0, r.len_bytes(), 0, 0, 0, 0], 0),
        RemoteCall::AskHandler { signal, to } => {
            const MASK_BYTES: u64 = 8;
            let signal = u64::from(signal.unsigned_abs());
            ("rt_sigaction", libc::SYS_rt_sigaction, [signal, 0, to.0, MASK_BYTES, 0, 0], 0)
        }
    }
}
