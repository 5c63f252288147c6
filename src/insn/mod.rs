//! x86-64 instructions (iced-x86): the entry jump, and what a body does to its own entry window.

use iced_x86::{Decoder, DecoderOptions, FlowControl, Instruction, OpKind};

use crate::addr::{ProcAddr, ProcRange};

mod canary;
mod stub;

pub use canary::{
    bucket, canary_old_way, canary_stub, session_stub, KeyArgument, ShareWords, Whole, CANARY_BYTES, WHOLE,
};
pub use stub::{
    calls_nothing, original_thunk, second_way, switch_stub, whole_bytes, whole_thunk, StubError, SwitchStub, Way,
    OVERWRITTEN, STUB_BYTES, WHOLE_BODY_BYTES,
};

/// An instruction that we write.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Edit {
    /// `jmp rel32` at `at` to `to`: `e9 xx xx xx xx`.
    Jump {
        /// Its first byte.
        at: ProcAddr,
        /// Where it goes.
        to: ProcAddr,
    },
}

/// The target lies more than 2 GiB away.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct OutOfReach {
    /// From.
    pub at: ProcAddr,
    /// To.
    pub to: ProcAddr,
}

impl std::fmt::Display for OutOfReach {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} is more than 2 GiB away from {}", self.to, self.at)
    }
}

impl std::error::Error for OutOfReach {}

impl Edit {
    /// Its bytes.
    ///
    /// # Errors
    ///
    /// The target cannot be reached by a `rel32`.
    pub fn encode(self) -> Result<[u8; 5], OutOfReach> {
        match self {
            Self::Jump { at, to } => {
                let distance = i128::from(to.0) - i128::from(at.0) - 5;
                let rel = i32::try_from(distance).map_err(|_| OutOfReach { at, to })?;
                let [a, b, c, d] = rel.to_le_bytes();
                Ok([0xe9, a, b, c, d])
            }
        }
    }
}

/// Where the jump that we wrote at `at` leads, if these bytes are one.
#[must_use]
pub fn jump_target(at: ProcAddr, bytes: [u8; 5]) -> Option<ProcAddr> {
    let [0xe9, a, b, c, d] = bytes else { return None };
    let next = at.0.checked_add(5)?;
    next.checked_add_signed(i64::from(i32::from_le_bytes([a, b, c, d]))).map(ProcAddr)
}

/// Calls the function in `rax` and then makes a harmless system call, at which a tracer catches the thread. If the
/// tracer is dead, the thread goes on and back to where its signal frame says:
///
/// ```text
/// ff d0            call rax
/// b8 27 00 00 00   mov  eax, 39    ; getpid
/// 0f 05            syscall
/// b8 0f 00 00 00   mov  eax, 15    ; rt_sigreturn
/// 0f 05            syscall
/// 0f 0b            ud2
/// ```
pub const CALL_STUB: [u8; 18] =
    [0xff, 0xd0, 0xb8, 0x27, 0, 0, 0, 0x0f, 0x05, 0xb8, 0x0f, 0, 0, 0, 0x0f, 0x05, 0x0f, 0x0b];

/// Where the thread of a hook begins, with the address of its words in `rdi`:
///
/// ```text
/// 53                     push rbx
/// 48 89 fb               mov  rbx, rdi
/// ff 53 28               call [rbx+40]           ; gettid
/// 89 43 20               mov  [rbx+32], eax
/// 48 8d bb 80 00 00 00   lea  rdi, [rbx+128]     ; room for a text
/// be 00 04 00 00         mov  esi, 1024
/// ff 13                  call [rbx]              ; the hook
/// 89 43 18               mov  [rbx+24], eax      ; what it returned
/// ff 53 08               call [rbx+8]            ; pthread_self
/// 48 89 c7               mov  rdi, rax
/// ff 53 10               call [rbx+16]           ; pthread_detach
/// c7 43 1c 01 00 00 00   mov  dword [rbx+28], 1  ; done
/// 31 c0                  xor  eax, eax
/// 5b                     pop  rbx
/// c3                     ret
/// ```
pub const HOOK_STUB: [u8; 47] = [
    0x53, 0x48, 0x89, 0xfb, 0xff, 0x53, 0x28, 0x89, 0x43, 0x20, 0x48, 0x8d, 0xbb, 0x80, 0, 0, 0, 0xbe, 0, 4, 0, 0,
    0xff, 0x13, 0x89, 0x43, 0x18, 0xff, 0x53, 0x08, 0x48, 0x89, 0xc7, 0xff, 0x53, 0x10, 0xc7, 0x43, 0x1c, 1, 0, 0, 0,
    0x31, 0xc0, 0x5b, 0xc3,
];

/// Offset in [`CALL_STUB`] of its system call.
pub const CALL_STUB_SYSCALL: u64 = 7;

/// The number of that call: getpid.
pub const CALL_STUB_NUMBER: i64 = libc::SYS_getpid;

/// Bytes of a `syscall` instruction.
pub const SYSCALL: [u8; 2] = [0x0f, 0x05];

/// `syscall; ret`.
pub const SYSCALL_RET: [u8; 3] = [0x0f, 0x05, 0xc3];

/// `pop rax; ret`.
pub const POP_RAX_RET: [u8; 2] = [0x58, 0xc3];

/// `mov rax, 15; syscall` and `mov eax, 15; syscall`: rt_sigreturn, as the C libraries have it.
pub const SIGRETURN: [&[u8]; 2] = [&[0x48, 0xc7, 0xc0, 0x0f, 0, 0, 0, 0x0f, 0x05], &[0xb8, 0x0f, 0, 0, 0, 0x0f, 0x05]];

/// What a function's body does to its entry.
#[derive(Clone, Debug, PartialEq, Eq, Default)]
pub struct BodyFacts {
    /// The first byte that is no instruction.
    pub undecodable: Option<ProcAddr>,
    /// An instruction that branches to, or takes the address of, a byte that the entry jump covers after its first.
    pub into_window: Option<(ProcAddr, ProcAddr)>,
    /// Whether an instruction branches (not: calls) back to an entry.
    pub branches_to_entry: bool,
}

/// Decodes all of `code`, which stands at `at`. `entries` are the places at
/// which a call comes in; `window` is what the entry jump covers, if there is one.
#[must_use]
pub fn survey(code: &[u8], at: ProcAddr, entries: &[ProcAddr], window: Option<ProcRange>) -> BodyFacts {
    let mut facts = BodyFacts::default();
    let inside = |to: ProcAddr| window.is_some_and(|w| w.start < to && to < w.end);
    let mut decoder = Decoder::with_ip(64, code, at.0, DecoderOptions::NONE);
    let mut insn = Instruction::default();
    while decoder.can_decode() {
        decoder.decode_out(&mut insn);
        let ip = ProcAddr(insn.ip());
        if insn.is_invalid() {
            facts.undecodable = Some(ip);
            return facts;
        }
        let near = matches!(insn.op0_kind(), OpKind::NearBranch16 | OpKind::NearBranch32 | OpKind::NearBranch64);
        let target = if near {
            Some(ProcAddr(insn.near_branch_target()))
        } else {
            insn.is_ip_rel_memory_operand().then(|| ProcAddr(insn.ip_rel_memory_address()))
        };
        let Some(target) = target else { continue };
        if inside(target) && facts.into_window.is_none() {
            facts.into_window = Some((ip, target));
        }
        if near && insn.flow_control() != FlowControl::Call && entries.contains(&target) {
            facts.branches_to_entry = true;
        }
    }
    facts
}

/// Whether bytes after a function's end are padding: zeros, `int3`, or whole NOPs from the
/// first byte on (the last may be cut off by the end of `bytes`).
#[must_use]
pub fn is_padding(bytes: &[u8]) -> bool {
    if bytes.iter().all(|b| *b == 0) || bytes.iter().all(|b| *b == 0xcc) {
        return true;
    }
    let mut decoder = Decoder::with_ip(64, bytes, 0, DecoderOptions::NONE);
    let mut insn = Instruction::default();
    while decoder.can_decode() {
        let at = decoder.position();
        decoder.decode_out(&mut insn);
        if insn.is_invalid() {
            // Cut off by the end: what is left must at least begin as a NOP does.
            let rest = bytes.get(at..).unwrap_or(&[]);
            let prefixes = rest.iter().take_while(|b| matches!(b, 0x66 | 0x2e)).count();
            return matches!(rest.get(prefixes..), Some([] | [0x0f] | [0x0f, 0x1f, ..]));
        }
        if !matches!(insn.mnemonic(), iced_x86::Mnemonic::Nop | iced_x86::Mnemonic::Int3) && !is_xchg_nop(&insn) {
            return false;
        }
    }
    true
}

/// `xchg ax,ax`, which assemblers use as a two-byte NOP.
fn is_xchg_nop(insn: &Instruction) -> bool {
    insn.mnemonic() == iced_x86::Mnemonic::Xchg
        && insn.op0_kind() == OpKind::Register
        && insn.op1_kind() == OpKind::Register
        && insn.op0_register() == insn.op1_register()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn window(at: u64) -> Option<ProcRange> {
        ProcRange::new(ProcAddr(at), 5)
    }

    #[test]
    fn a_jump_reaches_two_gib_either_way_and_no_further() {
        let jump = |at, to| Edit::Jump { at: ProcAddr(at), to: ProcAddr(to) }.encode();
        assert_eq!(jump(0x1000, 0x1005).unwrap(), [0xe9, 0, 0, 0, 0]);
        assert_eq!(jump(0x1000, 0x1000).unwrap(), [0xe9, 0xfb, 0xff, 0xff, 0xff]);
        assert!(jump(0x1000, 0x1005 + 0x7fff_ffff).is_ok());
        assert!(jump(0x1000, 0x1005 + 0x8000_0000).is_err());
        assert!(jump(0x1_0000_0000, 0x1_0000_0005 - 0x8000_0000).is_ok());
        assert!(jump(0x1_0000_0000, 0x1_0000_0004 - 0x8000_0000).is_err());
        assert!(jump(0, u64::MAX).is_err());
    }

    #[test]
    fn branches_into_the_window_are_found() {
        // dec edi; jnz -4 (to entry); ret
        let to_entry = [0xff, 0xcf, 0x75, 0xfc, 0xc3];
        let facts = survey(&to_entry, ProcAddr(0x1000), &[ProcAddr(0x1000)], window(0x1000));
        assert!(facts.branches_to_entry && facts.into_window.is_none());
        // push rbp; dec edi; jnz -4 (to entry + 1); pop rbp; ret
        let into = [0x55, 0xff, 0xcf, 0x75, 0xfc, 0x5d, 0xc3];
        let facts = survey(&into, ProcAddr(0x1000), &[ProcAddr(0x1000)], window(0x1000));
        assert_eq!(facts.into_window, Some((ProcAddr(0x1003), ProcAddr(0x1001))));
        // A recursive call to the own entry is no branch back.
        let call = [0xe8, 0xfb, 0xff, 0xff, 0xff, 0xc3];
        assert!(!survey(&call, ProcAddr(0x1000), &[ProcAddr(0x1000)], window(0x1000)).branches_to_entry);
        // The address of a label in the window is taken: lea rax, [rip-4].
        let lea = [0x48, 0x8d, 0x05, 0xfc, 0xff, 0xff, 0xff, 0xc3];
        assert!(survey(&lea, ProcAddr(0x1000), &[], window(0x1000)).into_window.is_some());
        assert_eq!(survey(&[0x06], ProcAddr(8), &[], None).undecodable, Some(ProcAddr(8)));
    }

    #[test]
    fn padding_is_nops_traps_or_zeros() {
        assert!(is_padding(&[]));
        assert!(is_padding(&[0x90, 0x90]));
        assert!(is_padding(&[0xcc, 0xcc, 0xcc]));
        assert!(is_padding(&[0; 4]));
        assert!(is_padding(&[0x0f, 0x1f, 0x40, 0x00]));
        assert!(is_padding(&[0x66, 0x90]));
        assert!(is_padding(&[0x66, 0x2e, 0x0f, 0x1f]), "a NOP cut off");
        assert!(!is_padding(&[0x55]));
        assert!(!is_padding(&[0x90, 0xc3]));
    }
}
