//! The way back of a borrowed thread, which it takes alone if we die: a signal frame below its stack and
//! rt_sigreturn(2), which loads every register, the vector state and the signal mask from it.
//!
//! The frame is what the kernel itself writes when a signal arrives (arch/x86/include/asm/sigframe.h,
//! `struct rt_sigframe`), so it goes where a signal's frame would go: below the red zone of the thread's own stack.

use crate::addr::ProcAddr;
use crate::insn;
use crate::maps::Mapping;
use crate::memory::ReadMemory;

use super::sys::{self, RawRegisters};
use super::tracee;

/// Code of the process's own that leads back: two places.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Gadgets {
    /// `syscall; ret`: a call of ours, after which the thread returns to where the top of its stack says.
    pub syscall_ret: ProcAddr,
    /// How a thread gets from a `ret` to `rt_sigreturn`.
    pub back: Back,
}

/// Code that makes the system call `rt_sigreturn`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Back {
    /// `mov eax, 15; syscall`: what a signal handler returns to.
    SigReturn(ProcAddr),
    /// `pop rax; ret`, for a static program that handles no signal: the number and a `syscall` lie on the stack.
    PopNumber(ProcAddr),
}

/// Code is read in parts of this many bytes, each with the tail of the one before.
const WINDOW: u64 = 1 << 20;

impl Gadgets {
    /// Looks for them in memory that may be read and executed; every libc that is loaded has the first two.
    pub fn find(memory: &dyn ReadMemory, maps: &[Mapping]) -> Option<Self> {
        let (mut syscall_ret, mut sigreturn, mut pop) = (None, None, None);
        // The vDSO and libraries before the program itself, which may be large.
        let mut code: Vec<&Mapping> = maps.iter().filter(|m| m.execute && m.read && m.name != "[vsyscall]").collect();
        code.sort_by_key(|m| (m.name != "[vdso]", !m.name.contains("libc"), m.range.len_bytes()));
        for m in code {
            let mut at = m.range.start;
            while at < m.range.end {
                let len = WINDOW.min(m.range.end.0 - at.0);
                let Ok(bytes) = memory.read_vec(at, len) else { break };
                let find = |what: &[u8]| {
                    let i = memchr::memmem::find(&bytes, what)?;
                    at.checked_add(i as u64)
                };
                syscall_ret = syscall_ret.or_else(|| find(&insn::SYSCALL_RET));
                sigreturn = sigreturn.or_else(|| insn::SIGRETURN.iter().find_map(|s| find(s)));
                pop = pop.or_else(|| find(&insn::POP_RAX_RET));
                if let (Some(syscall_ret), Some(sigreturn)) = (syscall_ret, sigreturn) {
                    return Some(Self { syscall_ret, back: Back::SigReturn(sigreturn) });
                }
                if len < WINDOW {
                    break;
                }
                at = ProcAddr(at.0 + WINDOW - 16);
            }
        }
        Some(Self { syscall_ret: syscall_ret?, back: Back::PopNumber(pop?) })
    }

    /// What stands on the stack above a signal frame: where a `ret` goes, and what follows.
    fn way_back(&self) -> Vec<u64> {
        match self.back {
            Back::SigReturn(at) => vec![at.0],
            Back::PopNumber(at) => vec![at.0, libc::SYS_rt_sigreturn.cast_unsigned(), self.syscall_ret.0],
        }
    }
}

/// Bytes below the stack pointer that belong to a function (System V psABI).
const RED_ZONE: u64 = 128;

/// `pretcode`, `struct ucontext`, `siginfo_t`.
const FRAME_BYTES: usize = 8 + 304 + 128;

const UC_FP_XSTATE: u64 = 1;
const UC_SIGCONTEXT_SS: u64 = 2;
const UC_STRICT_RESTORE_SS: u64 = 4;

// arch/x86/include/uapi/asm/sigcontext.h
const FP_XSTATE_MAGIC1: u32 = 0x4650_5853;
const FP_XSTATE_MAGIC2: u32 = 0x4650_5845;
/// Offset in the image of what the processor leaves to software: `struct _fpx_sw_bytes` in a frame.
const SOFTWARE_BYTES: usize = 464;
/// Offset of the features that are not in their initial state (XSTATE_BV).
const FEATURES: usize = 512;
const X87_AND_SSE: u64 = 3;

/// A frame, ready to be written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Frame {
    /// Its first byte: where the return address stands. The stack pointer that a call of ours gets.
    pub at: ProcAddr,
    /// Bytes from there to the context that `rt_sigreturn` reads.
    before_context: u64,
    /// Its bytes, the vector state behind it included.
    pub bytes: Vec<u8>,
}

impl Frame {
    /// For a thread that an interrupt stopped, with its signal mask and its vector state as
    /// [`sys::vector_state`] gives it. `None` if the stack pointer is no stack's.
    pub fn new(regs: &RawRegisters, mask: u64, vector: &[u8], gadgets: &Gadgets) -> Option<Self> {
        let way_back = gadgets.way_back();
        let before_context = way_back.len() as u64 * 8;
        let features = u64::from_le_bytes(*vector.get(FEATURES..)?.first_chunk()?) | X87_AND_SSE;
        // No more than that: the kernel refuses an image that is longer than what this thread may have.
        let vector = vector.get(..sys::vector_extent(features))?;
        // XRSTOR wants 64 bytes' alignment; the stack pointer of a called function 16.
        let image_at = regs.rsp.checked_sub(RED_ZONE + vector.len() as u64 + 4)? & !63;
        let at = (image_at.checked_sub(FRAME_BYTES as u64)? & !15).checked_sub(before_context)?;
        let mut out = Vec::with_capacity((regs.rsp - at) as usize);
        let word = |out: &mut Vec<u8>, value: u64| out.extend(value.to_le_bytes());
        way_back.into_iter().for_each(|w| word(&mut out, w));
        word(&mut out, UC_FP_XSTATE | UC_SIGCONTEXT_SS | UC_STRICT_RESTORE_SS);
        // uc_link, and an alternate stack of no size: it is refused, and the thread's own stays.
        (0..4).for_each(|_| word(&mut out, 0));
        let (rip, rax) = tracee::restarted(regs);
        let r = regs;
        for value in [
            r.r8, r.r9, r.r10, r.r11, r.r12, r.r13, r.r14, r.r15, r.rdi, r.rsi, r.rbp, r.rbx, r.rdx, rax, r.rcx, r.rsp,
            rip, r.eflags,
        ] {
            word(&mut out, value);
        }
        // cs, gs, fs, ss: 16 bits each; the bases of fs and gs stay as they are.
        word(&mut out, r.cs & 0xffff | (r.ss & 0xffff) << 48);
        (0..4).for_each(|_| word(&mut out, 0)); // err, trapno, oldmask, cr2
        word(&mut out, image_at);
        (0..8).for_each(|_| word(&mut out, 0));
        word(&mut out, mask);
        out.resize((image_at - at) as usize, 0);
        let image = out.len();
        out.extend(vector);
        let size = vector.len() as u32;
        let mut software = Vec::with_capacity(48);
        software.extend(FP_XSTATE_MAGIC1.to_le_bytes());
        software.extend((size + 4).to_le_bytes());
        software.extend(features.to_le_bytes());
        software.extend(size.to_le_bytes());
        software.resize(48, 0);
        out.get_mut(image + SOFTWARE_BYTES..image + SOFTWARE_BYTES + 48)?.copy_from_slice(&software);
        out.extend(FP_XSTATE_MAGIC2.to_le_bytes());
        Some(Self { at: ProcAddr(at), before_context, bytes: out })
    }

    /// Whether it fits into the mapping that holds the stack, with `spare` bytes below it.
    pub fn fits(&self, sp: u64, maps: &[Mapping], spare: u64) -> bool {
        let Some(low) = self.at.0.checked_sub(spare) else { return false };
        let home = maps.iter().find(|m| m.range.contains(ProcAddr(sp)));
        home.is_some_and(|m| m.read && m.write && m.range.contains(ProcAddr(low)))
    }

    /// The stack pointer with which `rt_sigreturn` finds it.
    pub fn context(&self) -> u64 {
        self.at.0 + self.before_context
    }

    /// The program counter and the stack pointer with which a thread goes home.
    pub fn home(&self) -> (u64, u64) {
        let back = self.bytes.first_chunk().map_or(0, |b| u64::from_le_bytes(*b));
        (back, self.at.0 + 8)
    }
}
