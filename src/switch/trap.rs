//! The signal handlers of a switch: a thread that traps judges itself, and one that is asked to looks at itself.
//!
//! What runs here runs in signal handlers: no lock, no allocation, no panic, little stack, and `errno` stays as it was.
//!
//! Contract of the `unsafe` in this module:
//! 1. `ACTIVE` holds null or a table that lives until [`withdraw`] has seen that no handler is inside: a handler counts itself in before
//!    it reads the pointer and out after its last use of it;
//! 2. the kernel hands a handler a `siginfo_t` and a `ucontext_t` that are its own until it returns;
//! 3. `COPY` is written by the one handler that changed its state from asked to busy, and read by the one thread that asked, once the state
//!    says that it is done.
#![allow(unsafe_code)]

use std::cell::{Cell, UnsafeCell};
use std::io;
use std::mem::ManuallyDrop;
use std::sync::atomic::{AtomicBool, AtomicI32, AtomicPtr, AtomicU32, AtomicU64, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use libc::{c_int, c_void, siginfo_t, ucontext_t};

use super::marks::{Mark, Marks};
use super::sys;
use crate::addr::{ProcAddr, ProcRange};
use crate::insn;
use crate::plan::sites::Trap;
use crate::process::ptrace::procfs;
use crate::process::{HeldThread, Pid, Registers, Tid};
use crate::quiesce::StackMap;
use crate::stack::{Part, WatchList, Watched};

/// What is called for a SIGTRAP that is not ours.
pub type PassOn = unsafe fn(c_int, *mut siginfo_t, *mut c_void);

/// Bytes of a stack that a handler reads at once.
const CHUNK: usize = 1024;

/// `int3`.
pub const INT3: u8 = 0xcc;

/// A trap, and what a thread that comes to it by a call is taken to stand at.
pub struct Called {
    pub trap: Trap,
    /// The first byte of the function that is left, if only calls come to the trap; else where the trap is.
    called: ProcAddr,
}

impl Called {
    pub fn new(trap: &Trap, watch: &[Watched]) -> Self {
        const ENDBR64: u64 = 4;
        let by_calls = |w: &&Watched| {
            w.part == Part::Body { branches_to_entry: false } && w.range.start.checked_add(ENDBR64) == Some(trap.at)
        };
        let called = watch.iter().find(by_calls).map_or(trap.at, |w| w.range.start);
        Self { trap: trap.clone(), called }
    }
}

/// Everything that handlers need of a switch.
pub struct Table {
    pub pid: Pid,
    /// By address.
    pub traps: Vec<Called>,
    /// What no thread may be in that enters the other code.
    pub watch: WatchList,
    pub stacks: StackMap,
    pub marks: Marks,
    /// All traps stand. Before that nobody enters the other code: it would call functions that have no trap yet, and so old ones.
    pub armed: AtomicBool,
    /// All threads that there were are clear: whoever is new was born by one that was.
    pub ends: AtomicBool,
    pub trapped: AtomicU64,
    pub stayed: AtomicU64,
    pub restarted: AtomicU64,
    pub interrupted: AtomicU64,
}

static ACTIVE: AtomicPtr<Table> = AtomicPtr::new(std::ptr::null_mut());
/// How often `ACTIVE` was changed, counted before the change.
static CHANGES: AtomicU64 = AtomicU64::new(0);
static INSIDE: AtomicUsize = AtomicUsize::new(0);
static PASS_ON: AtomicUsize = AtomicUsize::new(0);
static LOOK: AtomicI32 = AtomicI32::new(0);

thread_local! {
    /// The thread that is in fork(2), as its child knows it. Constant at first and never dropped: fit for what runs around fork.
    static FORKING: Cell<i32> = const { Cell::new(0) };
}

const IDLE: u32 = 0;
const ASKED: u32 = 1;
const BUSY: u32 = 2;
const CLEAR: u32 = 3;
const COPIED: u32 = 4;
const TOO_LONG: u32 = 5;

/// Bytes of a stack that are copied to be unwound.
const COPY_BYTES: usize = 256 << 10;

struct Copy {
    state: AtomicU32,
    tid: AtomicI32,
    what: UnsafeCell<CopyOf>,
}

struct CopyOf {
    thread: HeldThread,
    len: usize,
    bytes: [u8; COPY_BYTES],
}

// SAFETY: contract 3: one writes, then one reads.
unsafe impl Sync for Copy {}

static COPY: Copy = Copy {
    state: AtomicU32::new(IDLE),
    tid: AtomicI32::new(0),
    what: UnsafeCell::new(CopyOf {
        thread: HeldThread {
            tid: Tid(0),
            is_main: false,
            registers: Registers { general: [0; 16], pc: ProcAddr(0), fs_base: ProcAddr(0) },
        },
        len: 0,
        bytes: [0; COPY_BYTES],
    }),
};

/// What a thread that was asked found.
#[derive(Debug)]
pub enum Answer {
    /// It is clear, and marked so.
    Clear,
    /// It may not be: its registers and its stack, to be unwound.
    Perhaps(HeldThread, Vec<u8>),
    /// Its stack is unknown or too long to copy.
    Unknown,
    /// It did not come to answer.
    Late,
}

/// Installs the handlers, for SIGTRAP and for the signal by which threads are asked to look at themselves. Both stay for good: a trap may
/// come late.
pub fn install(look: c_int, pass_on: PassOn) -> io::Result<()> {
    PASS_ON.store(pass_on as usize, Ordering::SeqCst);
    LOOK.store(look, Ordering::SeqCst);
    // SIGTRAP is not blocked while it is handled, for a switch does not begin while a thread blocks it, and a handler may be preempted for
    // long. Everything else is: a handler of the program could leave ours by a jump (siglongjmp), or end the thread (pthread_cancel), and
    // whoever waits until no handler is inside would wait for ever. And signal stacks may be as small as two frames (Rust's are).
    set_handler(libc::SIGTRAP, on_trap, libc::SA_NODEFER, ALL_BUT_RAISED)?;
    set_handler(look, on_look, 0, ALL_BUT_RAISED)?;
    sys::at_fork(before_fork, in_child)
}

/// What handlers of ours block: all but SIGTRAP and what instructions raise.
const ALL_BUT_RAISED: u64 = {
    const fn bit(signal: c_int) -> u64 {
        1 << (signal - 1)
    }
    !(bit(libc::SIGTRAP)
        | bit(libc::SIGILL)
        | bit(libc::SIGBUS)
        | bit(libc::SIGFPE)
        | bit(libc::SIGSEGV)
        | bit(libc::SIGSYS))
};

type Handler = extern "C" fn(c_int, *mut siginfo_t, *mut c_void);

/// By the system call itself: whatever stands before the C library's sigaction keeps programs from taking these away.
fn set_handler(signal: c_int, handler: Handler, more: c_int, mask: u64) -> io::Result<()> {
    #[repr(C)]
    struct KernelAction {
        handler: usize,
        flags: u64,
        restorer: usize,
        mask: u64,
    }
    const SA_RESTORER: u64 = 0x0400_0000;
    let flags = (libc::SA_SIGINFO | libc::SA_RESTART | libc::SA_ONSTACK | more) as u64 | SA_RESTORER;
    let action = KernelAction { handler: handler as usize, flags, restorer: restore as *const () as usize, mask };
    // SAFETY: `action` is a local of the kernel's layout (sigaction(2), "C library/kernel differences"); the handlers keep to the rules above.
    let result = unsafe {
        libc::syscall(libc::SYS_rt_sigaction, signal, &raw const action, std::ptr::null_mut::<c_void>(), 8usize)
    };
    if result == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

/// Whether the kernel still has these handlers: a system call of the program's own may have taken them away.
pub fn is_installed(look: c_int) -> bool {
    [(libc::SIGTRAP, on_trap as Handler), (look, on_look)].into_iter().all(|(signal, ours)| {
        let mut there = [0usize; 4];
        // SAFETY: room for what the kernel tells, in its layout: the handler comes first.
        let result = unsafe {
            libc::syscall(libc::SYS_rt_sigaction, signal, std::ptr::null::<c_void>(), there.as_mut_ptr(), 8usize)
        };
        result == 0 && there[0] == ours as usize
    })
}

/// Where the handlers return to. Byte for byte what debuggers and unwinders know a signal frame by. The last instruction is never reached: with it
/// the end of that code is an address in this function, where a patch of the program can tell what it belongs to.
#[unsafe(naked)]
unsafe extern "C" fn restore() {
    core::arch::naked_asm!("mov rax, 15", "syscall", "ud2");
}

/// The code that a handler of ours returns to. A word of a stack that leads there means that a thread is in a handler, and perhaps has judged
/// itself and not yet gone where it decided to: to a function's first byte, which no scan takes for a frame.
pub fn returns() -> Watched {
    let start = ProcAddr(restore as *const () as u64);
    let range = ProcRange { start, end: ProcAddr(start.0 + insn::SIGRETURN[0].len() as u64) };
    Watched { name: "a signal frame".into(), range, part: Part::SignalReturn }
}

/// A table of a switch. Dropped while handlers still go by it, it stays where it is, for good.
pub struct OwnedTable(ManuallyDrop<Box<Table>>);

impl OwnedTable {
    pub fn new(table: Table) -> Self {
        Self(ManuallyDrop::new(Box::new(table)))
    }
}

impl std::ops::Deref for OwnedTable {
    type Target = Table;

    fn deref(&self) -> &Table {
        &self.0
    }
}

impl Drop for OwnedTable {
    fn drop(&mut self) {
        let own: *const Table = &raw const **self.0;
        if ACTIVE.load(Ordering::SeqCst).cast_const() != own {
            // SAFETY: it is not used after this. By 1, `withdraw` has waited for the handlers.
            unsafe { ManuallyDrop::drop(&mut self.0) };
        }
    }
}

/// Makes a table the one that handlers go by. The one before it, if any, is withdrawn first.
pub fn publish(table: &OwnedTable) {
    let table: &Table = table;
    CHANGES.fetch_add(1, Ordering::SeqCst);
    ACTIVE.store(std::ptr::from_ref(table).cast_mut(), Ordering::SeqCst);
}

/// Puts `next` in the place of the table, or none, and waits until no handler uses the one before.
pub fn withdraw(next: Option<&OwnedTable>) {
    let next = next.map_or(std::ptr::null_mut(), |t| std::ptr::from_ref::<Table>(t).cast_mut());
    CHANGES.fetch_add(1, Ordering::SeqCst);
    ACTIVE.store(next, Ordering::SeqCst);
    // Handlers that come now use `next`; they go by fast, but there may always be one.
    let mut seen = 0;
    while INSIDE.load(Ordering::SeqCst) != 0 {
        seen += 1;
        if seen % 64 == 0 {
            std::thread::sleep(Duration::from_micros(50));
        } else {
            std::hint::spin_loop();
        }
    }
}

/// Asks a thread to look at itself, and waits for what it finds until `deadline`.
pub fn ask(pid: Pid, tid: Tid, signal: c_int, deadline: Instant) -> Answer {
    COPY.tid.store(tid.0, Ordering::SeqCst);
    COPY.state.store(ASKED, Ordering::SeqCst);
    if sys::send(pid, tid, signal).is_err() {
        COPY.state.store(IDLE, Ordering::SeqCst);
        return Answer::Late;
    }
    let mut turns = 0u32;
    loop {
        match COPY.state.load(Ordering::SeqCst) {
            state @ (CLEAR | COPIED | TOO_LONG) => {
                COPY.state.store(IDLE, Ordering::SeqCst);
                return match state {
                    CLEAR => Answer::Clear,
                    COPIED => {
                        // SAFETY: 3: the state says that it is done, and nobody writes until the next one is asked.
                        let copy = unsafe { &*COPY.what.get() };
                        // One that was asked before may have come late, in this one's place.
                        if copy.thread.tid != tid {
                            return Answer::Unknown;
                        }
                        Answer::Perhaps(copy.thread, copy.bytes.get(..copy.len).unwrap_or(&[]).to_vec())
                    }
                    _ => Answer::Unknown,
                };
            }
            ASKED if Instant::now() >= deadline => {
                let gone = COPY.state.compare_exchange(ASKED, IDLE, Ordering::SeqCst, Ordering::SeqCst).is_ok();
                if gone {
                    return Answer::Late;
                }
            }
            _ => {}
        }
        turns += 1;
        if turns > 200 {
            std::thread::sleep(Duration::from_micros(20));
        } else {
            std::hint::spin_loop();
        }
    }
}

impl Table {
    /// From the calling thread's stack pointer to the end of its stack. One that was mapped since the stacks were looked up reaches to the
    /// thread's control block, which lies above all its frames, if all between can be read.
    fn extent(&self, thread: &HeldThread) -> Option<ProcRange> {
        const MAX_BYTES: u64 = 1 << 20;
        let Registers { fs_base, .. } = thread.registers;
        let new = || {
            let range = ProcRange { start: thread.registers.sp(), end: ProcAddr(fs_base.0 & !7) };
            (!thread.is_main && range.start < range.end && range.len_bytes() <= MAX_BYTES).then_some(range)
        };
        self.stacks.home(thread).or_else(new)
    }

    /// Whether threads that trap go on here.
    pub fn begins_way(&self, at: ProcAddr) -> bool {
        self.traps.iter().any(|t| [t.trap.from, t.trap.to].contains(&at))
    }

    /// Whether the thread has no frame in what is watched. In handlers.
    fn is_clear(&self, thread: &HeldThread) -> bool {
        let registers = &thread.registers;
        if self.watch.hits_pc(registers.pc) || registers.general.iter().any(|r| self.watch.hits_word(*r)) {
            return false;
        }
        let Some(extent) = self.extent(thread) else { return false };
        let mut buffer = [0u8; CHUNK];
        let mut at = extent.start;
        while at < extent.end {
            let left = usize::try_from(extent.end.0 - at.0).unwrap_or(usize::MAX);
            let Some(part) = buffer.get_mut(..left.min(CHUNK)) else { return false };
            // By the kernel: what is mapped may have changed since the stacks were looked up.
            if !sys::read_own(at, part) || self.watch.hits_stack(part) {
                return false;
            }
            at = ProcAddr(at.0 + part.len() as u64);
        }
        extent.start.0 % 8 == 0
    }

    /// Judges the calling thread, and marks it.
    fn judge(&self, thread: &HeldThread) -> bool {
        let Some(slot) = self.marks.slot(thread.tid) else { return false };
        // A thread that has gone on in the code that is left may still be there, whatever is known of those that were looked at.
        let has_stayed = matches!(slot.get(), Mark::Stays(_));
        let mut is_clear = None;
        loop {
            let mark = slot.get();
            let armed = self.armed.load(Ordering::SeqCst);
            if armed && mark == Mark::Clear {
                return true;
            }
            let born_clear = !has_stayed && self.ends.load(Ordering::SeqCst);
            let clear = born_clear || *is_clear.get_or_insert_with(|| self.is_clear(thread));
            if armed && clear {
                if slot.change(mark, Mark::Clear) {
                    return true;
                }
                continue;
            }
            let times = if let Mark::Stays(n) = mark { n } else { 0 };
            // Whoever looks for marks that are not clear sets `ends` first: one of us sees the other.
            if slot.change(mark, Mark::Stays(times.saturating_add(1)))
                && (has_stayed || !self.ends.load(Ordering::SeqCst))
            {
                return false;
            }
        }
    }

    /// Where a thread that trapped at `at` goes on.
    fn way(&self, at: ProcAddr, thread: &HeldThread) -> Option<ProcAddr> {
        let Called { trap, called } =
            self.traps.binary_search_by_key(&at, |t| t.trap.at).ok().and_then(|i| self.traps.get(i))?;
        self.trapped.fetch_add(1, Ordering::Relaxed);
        let mut thread = *thread;
        // A call stands at its first instruction, which follows an endbr64 that belongs to no body's middle.
        thread.registers.pc = *called;
        if self.judge(&thread) {
            return Some(trap.to);
        }
        self.stayed.fetch_add(1, Ordering::Relaxed);
        Some(trap.from)
    }
}

/// The calling thread as the kernel saved it.
fn thread_of(context: &ucontext_t, table: &Table, pc: ProcAddr) -> HeldThread {
    let r = |i: c_int| context.uc_mcontext.gregs.get(i as usize).map_or(0, |v| v.cast_unsigned());
    let general = [
        r(libc::REG_RAX),
        r(libc::REG_RDX),
        r(libc::REG_RCX),
        r(libc::REG_RBX),
        r(libc::REG_RSI),
        r(libc::REG_RDI),
        r(libc::REG_RBP),
        r(libc::REG_RSP),
        r(libc::REG_R8),
        r(libc::REG_R9),
        r(libc::REG_R10),
        r(libc::REG_R11),
        r(libc::REG_R12),
        r(libc::REG_R13),
        r(libc::REG_R14),
        r(libc::REG_R15),
    ];
    own_thread(table, Registers { general, pc, fs_base: ProcAddr(0) })
}

/// The calling thread with these registers.
fn own_thread(table: &Table, registers: Registers) -> HeldThread {
    let fs: u64;
    // SAFETY: the first word of a thread's control block is its own address (ELF handling for thread-local storage, x86-64).
    unsafe { core::arch::asm!("mov {}, fs:[0]", out(reg) fs, options(nostack, preserves_flags, readonly)) };
    // The only thread of a forked child has the stack of the one that called fork.
    let is_main = table.stacks.is_main(registers.sp());
    HeldThread { tid: procfs::own_tid(), is_main, registers: Registers { fs_base: ProcAddr(fs), ..registers } }
}

/// Before fork(2), in the thread that calls it.
extern "C" fn before_fork() {
    FORKING.set(procfs::own_tid().0);
}

/// In a child of fork(2), before it returns there: a switch that was on its way in the parent comes to its end, by the one thread that there is.
extern "C" fn in_child() {
    INSIDE.store(0, Ordering::SeqCst);
    COPY.state.store(IDLE, Ordering::SeqCst);
    // SAFETY: 1: nobody withdraws it here, for the thread that does is not in the child.
    let Some(table) = (unsafe { ACTIVE.load(Ordering::SeqCst).as_ref() }) else { return };
    let mut general = [0u64; 16];
    // SAFETY: it writes six registers and the stack pointer to a local of that size.
    unsafe {
        core::arch::asm!(
            "mov [{0} + 24], rbx", "mov [{0} + 48], rbp", "mov [{0} + 56], rsp",
            "mov [{0} + 96], r12", "mov [{0} + 104], r13", "mov [{0} + 112], r14", "mov [{0} + 120], r15",
            in(reg) general.as_mut_ptr(), options(nostack, preserves_flags)
        );
    }
    let pc = ProcAddr(in_child as *const () as u64);
    let thread = own_thread(table, Registers { general, pc, fs_base: ProcAddr(0) });
    // What the thread was in the parent, it is in the child: it may have frames in the other code already, and a stale word of this one.
    let before = table.marks.get(Tid(FORKING.get()));
    let born_clear = before == Mark::Unknown && table.ends.load(Ordering::SeqCst);
    let armed = table.armed.load(Ordering::SeqCst);
    let clear = armed && (before == Mark::Clear || born_clear || table.is_clear(&thread));
    let bytes = table.traps.iter().map(|t| (t.trap.at, if clear { t.trap.after } else { t.trap.before }));
    if sys::write_code_of_child(bytes) {
        ACTIVE.store(std::ptr::null_mut(), Ordering::SeqCst);
    } else if let (true, Some(slot)) = (clear, table.marks.slot(thread.tid)) {
        // It goes by the traps.
        slot.change(slot.get(), Mark::Clear);
    }
}

/// Where errno is.
fn errno() -> *mut c_int {
    // SAFETY: it takes nothing and cannot fail.
    unsafe { libc::__errno_location() }
}

/// Whether a trap of ours was at `at` when this thread came there, and is no more: the instruction that stands there now is to be executed.
fn is_gone(at: ProcAddr) -> bool {
    /// `int 3` in two bytes, which a program may have of its own.
    const LONG: [u8; 2] = [0xcd, 0x03];
    let mut there = [0; 2];
    if sys::read_own(ProcAddr(at.0.wrapping_sub(1)), &mut there) {
        return there[1] != INT3 && there != LONG;
    }
    // At the first byte of a mapping.
    // SAFETY: an instruction has just been executed there.
    unsafe { (at.0 as *const u8).read_volatile() != INT3 }
}

/// Where a thread that met a trap at `at` goes on; `None` if that is not of a switch.
fn goes_on(uc: &ucontext_t, at: ProcAddr) -> Option<ProcAddr> {
    loop {
        let changes = CHANGES.load(Ordering::SeqCst);
        INSIDE.fetch_add(1, Ordering::SeqCst);
        // SAFETY: 1.
        let table = unsafe { ACTIVE.load(Ordering::SeqCst).as_ref() };
        let to = table.and_then(|table| table.way(at, &thread_of(uc, table, at)));
        INSIDE.fetch_sub(1, Ordering::SeqCst);
        let to = to.or_else(|| is_gone(at).then_some(at));
        // A trap of ours may have gone, and one of the next switch may have come, between the two looks.
        if to.is_some() || changes == CHANGES.load(Ordering::SeqCst) {
            return to;
        }
    }
}

extern "C" fn on_trap(signal: c_int, info: *mut siginfo_t, context: *mut c_void) {
    const SI_KERNEL: c_int = 0x80;
    // SAFETY: errno of the calling thread is readable.
    let saved = unsafe { *errno() };
    // SAFETY: 2.
    let (by_int3, uc) = unsafe { ((*info).si_code == SI_KERNEL, &mut *context.cast::<ucontext_t>()) };
    let rip = uc.uc_mcontext.gregs[libc::REG_RIP as usize].cast_unsigned();
    let at = ProcAddr(rip.wrapping_sub(1));
    let to = if by_int3 { goes_on(uc, at) } else { None };
    // SAFETY: as above.
    unsafe { *errno() = saved };
    match to {
        Some(to) => uc.uc_mcontext.gregs[libc::REG_RIP as usize] = to.0.cast_signed(),
        None => {
            // The program's handler may do what it likes: it gets the mask that it would have. Only the look waits, for a signal stack has room
            // for few frames.
            // SAFETY: the kernel's set is the first eight bytes of the C library's.
            let mask = unsafe { (&raw const uc.uc_sigmask).cast::<u64>().read() };
            sys::set_mask(mask | 1 << (LOOK.load(Ordering::SeqCst) - 1));
            let pass_on = PASS_ON.load(Ordering::SeqCst);
            if pass_on != 0 {
                // SAFETY: only `install` writes it, a `PassOn`; it gets what the kernel gave us.
                unsafe { std::mem::transmute::<usize, PassOn>(pass_on)(signal, info, context) };
            }
        }
    }
}

extern "C" fn on_look(_signal: c_int, _info: *mut siginfo_t, context: *mut c_void) {
    // SAFETY: errno of the calling thread is readable.
    let saved = unsafe { *errno() };
    // SAFETY: 2.
    let uc = unsafe { &mut *context.cast::<ucontext_t>() };
    INSIDE.fetch_add(1, Ordering::SeqCst);
    // SAFETY: 1.
    let table = unsafe { ACTIVE.load(Ordering::SeqCst).as_ref() };
    if let Some(table) = table {
        let pc = ProcAddr(uc.uc_mcontext.gregs[libc::REG_RIP as usize].cast_unsigned());
        let thread = thread_of(uc, table, pc);
        look(table, &thread);
    }
    // Also when the switch that asked has come to its end meanwhile.
    go_on(table, uc);
    INSIDE.fetch_sub(1, Ordering::SeqCst);
    // SAFETY: as above.
    unsafe { *errno() = saved };
}

fn look(table: &Table, thread: &HeldThread) {
    let slot = table.marks.slot(thread.tid);
    let before = slot.as_ref().map(super::marks::Slot::get);
    // A signal of a switch before may come late: before all traps stand, nobody is clear for good.
    let clear = table.armed.load(Ordering::SeqCst) && table.is_clear(thread);
    if let (true, Some(slot), Some(before)) = (clear, &slot, before) {
        slot.change(before, Mark::Clear);
    }
    let asked = COPY.tid.load(Ordering::SeqCst) == thread.tid.0
        && COPY.state.compare_exchange(ASKED, BUSY, Ordering::SeqCst, Ordering::SeqCst).is_ok();
    if !asked {
        return;
    }
    if clear {
        COPY.state.store(CLEAR, Ordering::SeqCst);
        return;
    }
    let extent = table.extent(thread).filter(|e| e.len_bytes() <= COPY_BYTES as u64);
    // SAFETY: 3: the state is busy, so only this handler touches it.
    let copy = unsafe { &mut *COPY.what.get() };
    let len = extent.map_or(0, |e| usize::try_from(e.len_bytes()).unwrap_or(0));
    let read = extent.zip(copy.bytes.get_mut(..len)).is_some_and(|(e, part)| sys::read_own(e.start, part));
    copy.thread = *thread;
    copy.len = len;
    COPY.state.store(if read { COPIED } else { TOO_LONG }, Ordering::SeqCst);
}

/// A system call that the look has interrupted is made again, where it is known how it was made.
fn go_on(table: Option<&Table>, uc: &mut ucontext_t) {
    const CLOSE: i64 = libc::SYS_close;
    let gregs = &mut uc.uc_mcontext.gregs;
    if gregs[libc::REG_RAX as usize] != -i64::from(libc::EINTR) {
        return;
    }
    // mov eax, NUMBER; syscall
    let mut code = [0u8; 7];
    let rip = gregs[libc::REG_RIP as usize].cast_unsigned();
    let read = sys::read_own(ProcAddr(rip.wrapping_sub(7)), &mut code);
    let [0xb8, n @ .., 0x0f, 0x05] = code else {
        let interrupted = read && code[5..] == [0x0f, 0x05];
        return table.iter().for_each(|t| _ = t.interrupted.fetch_add(u64::from(interrupted), Ordering::Relaxed));
    };
    if read && i64::from(i32::from_le_bytes(n)) != CLOSE {
        gregs[libc::REG_RIP as usize] = rip.wrapping_sub(7).cast_signed();
        table.iter().for_each(|t| _ = t.restarted.fetch_add(1, Ordering::Relaxed));
    }
}
