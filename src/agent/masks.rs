//! Ownership of SIGTRAP: no thread blocks it, and nobody takes its handler away.
//!
//! The agent puts `int3` over entries while threads run. A thread that meets one while it has SIGTRAP blocked is
//! killed by the kernel, together with its process. So the functions that block signals or install handlers stand in
//! the executable in front of the C library's (`wrappers`), for the program itself, std and every loaded library.
//! Until [`own`] they pass everything on unchanged. From then on:
//!
//! - SIGTRAP, and one more signal by which the agent looks at a thread, are taken out of every mask: of threads, of
//!   handlers (`sa_mask`), of waits (`ppoll` and its like) and of attributes of new threads;
//! - a handler that the program installs for either is kept ([`chained`]) and called for what is not the agent's
//!   ([`pass_on`]); a query gives that handler back;
//! - a query of a mask gives what the thread asked for. The two bits are one word of each thread: a new thread starts
//!   with both reported clear, and a jump out of a handler (`siglongjmp`) leaves them as they are.
//!
//! What no wrapper sees: system calls that the program makes itself, `setcontext` and `siglongjmp` with a mask saved
//! before [`own`], the BSD form of `sigpause`, a mask that a handler writes into its context, and the C library's own
//! helper threads for `timer_create(SIGEV_THREAD)`, `aio` and `mq_notify`, which block everything. Therefore
//! [`blocked_threads`] asks the kernel before each switch, [`is_installed`] asks for the handlers that it has, and what
//! was overlooked means a refusal. For moments, inside of `pthread_create`, `posix_spawn` and a thread's end, the C
//! library blocks all signals itself; only its own code runs then, so it must not be patched by `int3`.
//!
//! For the same reason nobody gets either signal from `sigwait` or `signalfd`: the handler takes it.
//!
//! A chained handler runs as if it had `SA_NODEFER`, with SIGTRAP unblocked, for it may call patched functions, and
//! on the alternate stack, if the thread has one.
//!
//! Contract of the `unsafe` in this module:
//! 1. signal sets and actions are plain data, valid for any bytes; the kernel's signals are their first eight bytes;
//! 2. what the C library gets are pointers to local values that outlive the call, or null;
//! 3. a handler that the kernel had, and gets again, was valid for it before.
#![allow(unsafe_code)]

mod chain;
mod real;
mod wrappers;

use std::cell::Cell;
use std::fs;
use std::io;
use std::mem::zeroed;
use std::ptr::null;
use std::sync::atomic::{AtomicU64, AtomicU8, AtomicUsize, Ordering::SeqCst};
use std::time::Duration;

use libc::{c_int, c_void, pid_t, sigset_t};
use thiserror::Error;

use chain::Chain;
pub use chain::Chained;

/// The highest signal of Linux x86-64.
const MAX_SIGNAL: c_int = 64;

/// What cannot be the second signal: SIGTRAP itself, what instructions raise, and what stops a process.
const UNFIT: &[c_int] = &[
    libc::SIGTRAP,
    libc::SIGILL,
    libc::SIGABRT,
    libc::SIGBUS,
    libc::SIGFPE,
    libc::SIGSEGV,
    libc::SIGSYS,
    libc::SIGTSTP,
    libc::SIGTTIN,
    libc::SIGTTOU,
];

/// A handler as [`install`] takes it.
pub type Handler = unsafe extern "C-unwind" fn(c_int, *mut libc::siginfo_t, *mut c_void);

/// The owned signals as bits, 0 as long as there is no owner.
static OWNED: AtomicU64 = AtomicU64::new(0);
/// What the program wants at SIGTRAP.
static TRAP: Chain = Chain::new();
/// What the program wants at the other owned signal.
static LOOK: Chain = Chain::new();
/// The handlers that [`install`] gave to the kernel, for SIGTRAP and the other one.
static INSTALLED: [AtomicUsize; 2] = [const { AtomicUsize::new(0) }; 2];
/// For each signal's handler, which of the owned signals the program has in its `sa_mask`: 1 SIGTRAP, 2 the other.
static ASKED: [AtomicU8; MAX_SIGNAL as usize] = [const { AtomicU8::new(0) }; MAX_SIGNAL as usize];

thread_local! {
    /// The owned signals that this thread believes to be blocked. Constant at first and never dropped, so that
    /// handlers may read it.
    static BELIEVED: Cell<u64> = const { Cell::new(0) };
}

/// Why SIGTRAP cannot be owned.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum OwnError {
    /// Calls from libraries go past the wrappers.
    #[error(
        "calls of `{symbol}` from shared libraries do not reach the agent, so a library could block SIGTRAP; link \
         livepatch into the executable itself, and let nothing hide its symbols (--exclude-libs, a version script)"
    )]
    NotInterposed {
        /// The function that libraries find elsewhere.
        symbol: &'static str,
    },
    /// The second signal is none that can have a handler of ours.
    #[error("signal {signal} cannot be used to look at threads")]
    UnfitSignal {
        /// The number given.
        signal: c_int,
    },
    /// There is an owner already.
    #[error("SIGTRAP is owned already")]
    AlreadyOwned,
    /// The kernel refused.
    #[error("the handler of signal {signal} could not be changed: {source}")]
    Refused {
        /// Whose handler.
        signal: c_int,
        /// What the kernel said.
        source: io::Error,
    },
}

/// A signal as a bit of the kernel's set.
const fn bit(signal: c_int) -> u64 {
    1 << (signal - 1)
}

fn low_word(set: &sigset_t) -> u64 {
    // SAFETY: 1.
    unsafe { (set as *const sigset_t).cast::<u64>().read() }
}

fn set_of(signals: u64) -> sigset_t {
    // SAFETY: 1.
    unsafe {
        let mut set: sigset_t = zeroed();
        (&raw mut set).cast::<u64>().write(signals);
        set
    }
}

/// Is SIGTRAP the agent's?
pub fn is_owned() -> bool {
    OWNED.load(SeqCst) != 0
}

/// The chain of a signal, if it is owned.
fn chain_of(signal: c_int, owned: u64) -> Option<&'static Chain> {
    if !(1..=MAX_SIGNAL).contains(&signal) || bit(signal) & owned == 0 {
        return None;
    }
    Some(if signal == libc::SIGTRAP { &TRAP } else { &LOOK })
}

/// The owned signals in two bits: 1 SIGTRAP, 2 the other.
fn packed(signals: u64, owned: u64) -> u8 {
    let trap = bit(libc::SIGTRAP);
    u8::from(signals & owned & trap != 0) | u8::from(signals & owned & !trap != 0) << 1
}

fn unpacked(packed: u8, owned: u64) -> u64 {
    let trap = bit(libc::SIGTRAP);
    (if packed & 1 != 0 { owned & trap } else { 0 }) | if packed & 2 != 0 { owned & !trap } else { 0 }
}

/// What the kernel does at a signal.
fn action_of(signal: c_int) -> io::Result<libc::sigaction> {
    // SAFETY: 1, 2.
    unsafe {
        let mut action: libc::sigaction = zeroed();
        match real::sigaction(signal, null(), &raw mut action) {
            0 => Ok(action),
            _ => Err(io::Error::last_os_error()),
        }
    }
}

/// Changes what the kernel does at a signal, and gives what it did before.
///
/// # Safety
/// The new action's handler is fit for the signal.
unsafe fn change(signal: c_int, new: &libc::sigaction) -> io::Result<libc::sigaction> {
    // SAFETY: 1, 2; the handler by the caller's promise.
    unsafe {
        let mut before: libc::sigaction = zeroed();
        match real::sigaction(signal, new, &raw mut before) {
            0 => Ok(before),
            _ => Err(io::Error::last_os_error()),
        }
    }
}

/// Puts other bits of the owned signals into the mask of a signal's handler, whoever changes it meanwhile.
fn change_handler_mask(signal: c_int, edit: impl Fn(u64) -> u64) -> io::Result<()> {
    let mut now = action_of(signal)?;
    loop {
        let (handler, mask) = (Chained::from_libc(&now), low_word(&now.sa_mask));
        if !handler.is_handler() || edit(mask) == mask {
            return Ok(());
        }
        let mut new = now;
        new.sa_mask = set_of(edit(mask));
        // SAFETY: 3.
        let before = unsafe { change(signal, &new)? };
        if Chained::from_libc(&before) == handler {
            return Ok(());
        }
        // somebody installed another one between the two calls: put it back, without the bits
        now = before;
        now.sa_mask = set_of(edit(low_word(&before.sa_mask)));
        // SAFETY: 3.
        let ours = unsafe { change(signal, &now)? };
        if Chained::from_libc(&ours) == Chained::from_libc(&new) {
            return Ok(());
        }
        now = ours;
    }
}

/// The signals whose handlers a program can have.
fn signals() -> impl Iterator<Item = c_int> {
    let is_kept = |s: c_int| [libc::SIGKILL, libc::SIGSTOP].contains(&s) || bit(s) & real::RESERVED != 0;
    (1..=MAX_SIGNAL).filter(move |s| !is_kept(*s))
}

/// Makes SIGTRAP and `look` the agent's: they are blocked no more by what goes through the C library, and their
/// present handlers become the chained ones. They stay with the kernel until [`install`], which should follow at
/// once. Threads that have either blocked already are found by [`blocked_threads`]; a mask that such a thread sets
/// later through the C library has neither.
///
/// # Errors
/// Where a call from a library would go past the wrappers, where `look` is not fit, and where the kernel refuses.
pub fn own(look: c_int) -> Result<(), OwnError> {
    if !signals().any(|s| s == look) || UNFIT.contains(&look) {
        return Err(OwnError::UnfitSignal { signal: look });
    }
    real::resolve_all();
    if let Some(symbol) = wrappers::passed_by() {
        return Err(OwnError::NotInterposed { symbol });
    }
    let owned = bit(libc::SIGTRAP) | bit(look);
    if OWNED.load(SeqCst) != 0 {
        return Err(OwnError::AlreadyOwned);
    }
    let refused = |signal| move |source| OwnError::Refused { signal, source };
    let take_over = || {
        for (chain, signal) in [(&TRAP, libc::SIGTRAP), (&LOOK, look)] {
            chain.swap(Chained::from_libc(&action_of(signal).map_err(refused(signal))?));
        }
        Ok(())
    };
    take_over()?;
    if OWNED.compare_exchange(0, owned, SeqCst, SeqCst).is_err() {
        return Err(OwnError::AlreadyOwned);
    }
    for signal in signals().filter(|s| bit(*s) & owned == 0) {
        change_handler_mask(signal, |mask| {
            ASKED[signal as usize - 1].store(packed(mask, owned), SeqCst);
            mask & !owned
        })
        .map_err(refused(signal))
        .inspect_err(|_| disown())?;
    }
    let before = real::change_mask(libc::SIG_UNBLOCK, owned);
    BELIEVED.set(before & owned);
    Ok(())
}

/// Gives the kernel a handler of the agent for an owned signal. It runs on the alternate stack, if there is one,
/// with system calls restarted, and with `block` blocked meanwhile, but never SIGTRAP and never the signal itself.
///
/// # Errors
/// Where the signal is not owned (`EINVAL`), and where the kernel refuses.
///
/// # Safety
/// 1. The handler does only what is allowed in a handler that may interrupt any instruction of any thread, itself
///    included.
/// 2. It stays mapped as long as the process lives.
pub unsafe fn install(signal: c_int, handler: Handler, block: u64) -> io::Result<()> {
    if chain_of(signal, OWNED.load(SeqCst)).is_none() {
        return Err(io::Error::from_raw_os_error(libc::EINVAL));
    }
    let action = Chained {
        handler: handler as usize,
        flags: libc::SA_SIGINFO | libc::SA_ONSTACK | libc::SA_RESTART | libc::SA_NODEFER,
        mask: block & !bit(libc::SIGTRAP) & !bit(signal),
    };
    INSTALLED[usize::from(signal != libc::SIGTRAP)].store(action.handler, SeqCst);
    // SAFETY: by the caller's promises 1 and 2.
    unsafe { change(signal, &action.to_libc()).map(drop) }
}

/// Does the kernel still have the handler that [`install`] gave it? A program that makes the system call itself can
/// change it.
pub fn is_installed(signal: c_int) -> bool {
    let installed = INSTALLED[usize::from(signal != libc::SIGTRAP)].load(SeqCst);
    chain_of(signal, OWNED.load(SeqCst)).is_some() && action_of(signal).is_ok_and(|a| a.sa_sigaction == installed)
}

/// Gives both signals back: the kernel gets the chained handlers, and all handlers the masks that were asked for.
/// No `int3` of the agent may be in the code any more. What threads believed to be blocked stays unblocked.
pub fn disown() {
    let owned = OWNED.load(SeqCst);
    if owned == 0 {
        return;
    }
    for signal in signals().filter(|s| bit(*s) & owned == 0) {
        let asked = unpacked(ASKED[signal as usize - 1].swap(0, SeqCst), owned);
        // what can be refused has been done before with the same signal
        let _ = change_handler_mask(signal, |mask| mask | asked);
    }
    for signal in signals().filter(|s| bit(*s) & owned != 0) {
        let Some(chain) = chain_of(signal, owned) else { continue };
        INSTALLED[usize::from(signal != libc::SIGTRAP)].store(0, SeqCst);
        loop {
            let seen = chain.read();
            // SAFETY: 3: the program gave this handler for this signal.
            let _ = unsafe { change(signal, &seen.value.to_libc()) };
            OWNED.fetch_and(!bit(signal), SeqCst);
            // a call that came between the two: its handler counts
            if chain.is_current(seen) {
                break;
            }
        }
    }
    OWNED.store(0, SeqCst);
}

/// What the program wants done at a SIGTRAP that is not the agent's. Fit for signal handlers.
pub fn chained() -> Chained {
    TRAP.read().value
}

/// What the program wants done at an owned signal. Fit for signal handlers.
pub fn chained_of(signal: c_int) -> Option<Chained> {
    Some(chain_of(signal, OWNED.load(SeqCst))?.read().value)
}

/// Does with a signal that is not the agent's what the kernel would have done if the program's handler were the
/// installed one: calls it with its mask and flags; resets it first with `SA_RESETHAND`; ignores the signal; or lets
/// the process die of it. A trap that an instruction raised kills even where SIGTRAP is ignored. The handler may
/// leave with a jump or with an exception.
///
/// # Safety
/// 1. Called in the handler that [`install`] got, with its arguments.
/// 2. No frame between here and the interrupted code has anything to drop.
pub unsafe fn pass_on(signal: c_int, info: *mut libc::siginfo_t, context: *mut c_void) {
    let owned = OWNED.load(SeqCst) | bit(libc::SIGTRAP);
    let chain = chain_of(signal, owned).unwrap_or(&LOOK);
    let wanted = loop {
        let seen = chain.read();
        let resets = seen.value.is_handler() && seen.value.flags & libc::SA_RESETHAND != 0;
        if !resets || chain.replace(seen, Chained { handler: libc::SIG_DFL, ..seen.value }) {
            break seen.value;
        }
    };
    if !wanted.is_handler() {
        // SAFETY: 1 of the contract here: null, or what the kernel told.
        let raised_by_code = !info.is_null() && unsafe { (*info).si_code } > 0;
        if wanted.handler == libc::SIG_DFL || raised_by_code {
            default_action(signal, info);
        }
        return;
    }
    let before = real::change_mask(libc::SIG_BLOCK, wanted.blocks(signal) & !owned);
    // SAFETY: an address that the program gave as a handler for this signal, of the form that its flags say; the
    // arguments are the kernel's (1).
    unsafe {
        if wanted.flags & libc::SA_SIGINFO != 0 {
            std::mem::transmute::<usize, Handler>(wanted.handler)(signal, info, context);
        } else {
            std::mem::transmute::<usize, unsafe extern "C-unwind" fn(c_int)>(wanted.handler)(signal);
        }
        if !context.is_null() {
            // the mask that the thread gets back, which the handler may have written
            let mask = (&raw mut (*context.cast::<libc::ucontext_t>()).uc_sigmask).cast::<u64>();
            mask.write(mask.read() & !owned);
        }
    }
    real::change_mask(libc::SIG_SETMASK, before);
}

/// What the kernel does at a signal without a handler. Comes back only if that is nothing.
fn default_action(signal: c_int, info: *mut libc::siginfo_t) {
    if [libc::SIGCHLD, libc::SIGURG, libc::SIGWINCH, libc::SIGCONT].contains(&signal) {
        return;
    }
    // SAFETY: the default action is fit for every signal.
    let _ = unsafe { change(signal, &Chained::DEFAULT.to_libc()) };
    real::change_mask(libc::SIG_UNBLOCK, bit(signal));
    real::send_to_self(signal, info);
    // process 1 of a namespace does not die of what it sends itself, but of a trap
    // SAFETY: ends the process.
    unsafe {
        core::arch::asm!("int3");
        libc::abort()
    }
}

/// The threads of this process that have one of the signals blocked, with their names. What is blocked for a moment
/// only, as the C library does in `pthread_create`, is looked at again, for up to 0.1 s, and not reported; nor are
/// threads that have ended.
///
/// # Errors
/// Where `/proc/self/task` cannot be read, or says nothing of a thread's mask.
pub fn blocked_threads(signals: &[c_int]) -> io::Result<Vec<(pid_t, String)>> {
    const ROUNDS: u32 = 11;
    let wanted = signals.iter().filter(|s| (1..=MAX_SIGNAL).contains(*s)).fold(0, |set, s| set | bit(*s));
    let mut suspects = Vec::new();
    for entry in fs::read_dir("/proc/self/task")? {
        let Some(tid) = entry?.file_name().to_str().and_then(|n| n.parse::<pid_t>().ok()) else { continue };
        suspects.push((tid, String::new()));
    }
    for round in 0..ROUNDS {
        let mut still = Vec::new();
        for (tid, _) in suspects {
            still.extend(blocked_by(tid)?.filter(|(_, blocked)| blocked & wanted != 0).map(|(name, _)| (tid, name)));
        }
        suspects = still;
        if suspects.is_empty() {
            break;
        }
        if round + 1 < ROUNDS {
            std::thread::sleep(Duration::from_micros(100 << round));
        }
    }
    Ok(suspects)
}

/// A thread's name and the signals that it blocks; `None` if it has ended.
fn blocked_by(tid: pid_t) -> io::Result<Option<(String, u64)>> {
    let status = match fs::read(format!("/proc/self/task/{tid}/status")) {
        Ok(status) => status,
        Err(e) if e.kind() == io::ErrorKind::NotFound || e.raw_os_error() == Some(libc::ESRCH) => return Ok(None),
        Err(e) => return Err(e),
    };
    let status = String::from_utf8_lossy(&status);
    let field = |name: &str| status.lines().find_map(|l| l.strip_prefix(name)).map(str::trim);
    if field("State:").is_some_and(|s| s.starts_with(['Z', 'X'])) {
        return Ok(None);
    }
    let blocked = field("SigBlk:").and_then(|s| u64::from_str_radix(s, 16).ok());
    let blocked = blocked.ok_or_else(|| io::Error::other(format!("/proc/self/task/{tid}/status has no SigBlk")))?;
    Ok(Some((field("Name:").unwrap_or_default().to_owned(), blocked)))
}
