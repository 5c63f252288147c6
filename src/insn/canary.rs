//! The canary stub: code behind an entry jump that sends some calls to the new function and the rest on in the old one, by a key
//! in an argument register.
//!
//! ```text
//! push  rax
//! push  rdx
//! lahf                        ; flags: callers that know what a function leaves alone may rely on them
//! seto  al
//! push  rax
//! mov   rax, KEY
//! mov   rdx, SALT
//! xor   rax, rdx
//! mov   rdx, MIX              ; both halves of the product, folded: every bit of the key counts in every bit
//! mul   rdx
//! xor   rax, rdx
//! shr   rax, 32
//! imul  rax, rax, 10000
//! shr   rax, 32               ; 0 to 9999
//! mov   edx, [share 0]
//! cmp   byte [which], 0
//! cmovne edx, [share 1]
//! cmp   eax, edx
//! jae   old
//! ...                         ; back: pop rax; add al, 127; sahf; pop rdx; pop rax
//! jmp   new
//! old:
//! ...                         ; back
//! ...                         ; the overwritten instructions, moved, and on in the old function
//! ```
//!
//! A body that branches back to its entry is moved whole ([`whole_thunk`]): its loop must not be judged anew in the middle of a call.
//!
//! Where the key is the session of a message, the arm was decided when its handling began, and a byte of the thread says which:
//!
//! ```text
//! push  rax
//! lahf
//! seto  al
//! test  byte fs:[OFFSET], BIT
//! jz    old
//! ...                         ; back: add al, 127; sahf; pop rax
//! jmp   new
//! old:
//! ...                         ; back
//! ...                         ; the overwritten instructions, moved, and on in the old function
//! ```
//!
//! There a loop that comes back to the entry meets the same arm, for its message is the same; but it may have something in its red zone. So
//! the stub of such a body begins with `lea rsp, [rsp-128]`, and both of its ways with the opposite.
//!
//! Between `which` and the share that it selects a call may see the one before: each is written whole before `which` changes, and that
//! is one byte.

use super::stub::{original_thunk, whole_thunk, StubError, SwitchStub};
use crate::addr::ProcAddr;

/// Room for one canary stub, in bytes.
pub const CANARY_BYTES: u64 = 256;

/// Shares are in units of 1 / this.
pub const WHOLE: u32 = 10_000;

const MIX: u64 = 0x9e37_79b9_7f4a_7c15;

/// Which argument holds the key: `rdi`, `rsi`, `rdx`, `rcx`, `r8`, `r9` (System V psABI).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct KeyArgument(u8);

impl KeyArgument {
    /// Counted from 1.
    #[must_use]
    pub fn new(argument: u8) -> Option<Self> {
        (1..=6).contains(&argument).then_some(Self(argument))
    }

    /// `mov rax, REGISTER`; `rdx` and `rax` are on the stack by then, unchanged.
    fn to_rax(self) -> [u8; 3] {
        // REX.W or REX.WR, 89 /r with rax as the destination.
        let (rex, reg) = match self.0 {
            1 => (0x48, 7),
            2 => (0x48, 6),
            3 => (0x48, 2),
            4 => (0x48, 1),
            5 => (0x4c, 0),
            _ => (0x4c, 1),
        };
        [rex, 0x89, 0xc0 | reg << 3]
    }
}

/// Which of 10,000 shares a key falls into: what the stub computes.
#[must_use]
pub fn bucket(key: u64, salt: u64) -> u32 {
    let product = u128::from(key ^ salt) * u128::from(MIX);
    let mixed = product as u64 ^ (product >> 64) as u64;
    (((mixed >> 32) * u64::from(WHOLE)) >> 32) as u32
}

/// Where the words lie that a stub reads.
#[derive(Clone, Copy, Debug)]
pub struct ShareWords {
    /// The two shares, four bytes each.
    pub shares: ProcAddr,
    /// The byte that says which of them counts.
    pub which: ProcAddr,
}

/// How the stub of a canary by an argument begins.
const START: [u8; 7] = [0x50, 0x52, 0x9f, 0x0f, 0x90, 0xc0, 0x50];

const BACK: [u8; 6] = [0x58, 0x04, 0x7f, 0x9e, 0x5a, 0x58];

/// Where the way to the old function begins in it.
const OLD: usize = 95;

/// Where the way to the old function begins, if `code` is the stub at `at` of a canary.
#[must_use]
pub fn canary_old_way(at: ProcAddr, code: &[u8]) -> Option<ProcAddr> {
    if code.starts_with(&START) && code.get(OLD - BACK.len()..OLD)? == BACK {
        return at.checked_add(OLD as u64);
    }
    session_old_way(at, code)
}

/// A whole function that is moved, because its body branches back to its entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Whole<'c> {
    /// Where it begins.
    pub start: ProcAddr,
    /// All of its code.
    pub body: &'c [u8],
}

/// The stub at `at` for the entry jump at `entry`, whose code from there on begins with `code`; or the function is moved `whole`.
///
/// # Errors
///
/// The overwritten instructions, or the function, cannot be moved, or something is out of reach.
pub fn canary_stub(
    at: ProcAddr,
    words: ShareWords,
    (key, salt): (KeyArgument, u64),
    new: ProcAddr,
    (entry, code): (ProcAddr, &[u8]),
    whole: Option<Whole<'_>>,
) -> Result<SwitchStub, StubError> {
    let far = |why: &str| StubError::OutOfReach { at: entry, why: why.to_owned() };
    let relative = |end: u64, to: ProcAddr| {
        let distance = i128::from(to.0) - i128::from(end);
        i32::try_from(distance).map(i32::to_le_bytes).map_err(|_| far("more than 2 GiB away"))
    };
    let second = words.shares.checked_add(4).ok_or_else(|| far("it is at the end of memory"))?;
    let mut out = START.to_vec();
    let immediate = |out: &mut Vec<u8>, value: u64| {
        out.extend([0x48, 0xba]);
        out.extend(value.to_le_bytes());
    };
    out.extend(key.to_rax());
    immediate(&mut out, salt);
    out.extend([0x48, 0x31, 0xd0]);
    immediate(&mut out, MIX);
    out.extend([0x48, 0xf7, 0xe2, 0x48, 0x31, 0xd0, 0x48, 0xc1, 0xe8, 32, 0x48, 0x69, 0xc0]);
    out.extend(WHOLE.to_le_bytes());
    out.extend([0x48, 0xc1, 0xe8, 32]);
    // mov edx, [rip+x]; cmp byte [rip+x], 0; cmovne edx, [rip+x]
    out.extend([0x8b, 0x15]);
    out.extend(relative(at.0 + out.len() as u64 + 4, words.shares)?);
    out.extend([0x80, 0x3d]);
    out.extend(relative(at.0 + out.len() as u64 + 5, words.which)?);
    out.extend([0, 0x0f, 0x45, 0x15]);
    out.extend(relative(at.0 + out.len() as u64 + 4, second)?);
    out.extend([0x39, 0xd0, 0x73, BACK.len() as u8 + 5]);
    out.extend(BACK);
    out.push(0xe9);
    out.extend(relative(at.0 + out.len() as u64 + 4, new)?);
    out.extend(BACK);
    let thunk = at.checked_add(out.len() as u64).ok_or_else(|| far("it is at the end of memory"))?;
    match whole {
        None => out.extend(original_thunk(thunk, entry, code)?),
        Some(Whole { start, body }) => out.extend(whole_thunk(thunk, start, entry, body)?),
    }
    if whole.is_none() && out.len() as u64 > CANARY_BYTES {
        return Err(far("it needs too much room"));
    }
    Ok(SwitchStub { code: out, ways: [at, thunk] })
}

/// How the stub of a canary by session begins: up to the byte's offset.
const SESSION_START: [u8; 9] = [0x50, 0x9f, 0x0f, 0x90, 0xc0, 0x64, 0xf6, 0x04, 0x25];

const SESSION_BACK: [u8; 4] = [0x04, 0x7f, 0x9e, 0x58];

/// Past the red zone: `lea rsp, [rsp-128]`.
const DEEP: [u8; 5] = [0x48, 0x8d, 0x64, 0x24, 0x80];

/// And back: `lea rsp, [rsp+128]`.
const UP: [u8; 8] = [0x48, 0x8d, 0xa4, 0x24, 0x80, 0, 0, 0];

/// The stub at `at` for the entry jump at `entry`: to `new` while the byte at `offset` from the thread's control block has the bit of `slot`.
/// Both of its ways leave registers and flags as they were; and the red zone, if the body `loops` back to its entry.
///
/// # Errors
///
/// The overwritten instructions cannot be moved, or something is out of reach.
pub fn session_stub(
    at: ProcAddr,
    (offset, slot): (i32, u8),
    new: ProcAddr,
    (entry, code): (ProcAddr, &[u8]),
    loops: bool,
) -> Result<SwitchStub, StubError> {
    let far = |why: &str| StubError::OutOfReach { at: entry, why: why.to_owned() };
    let (down, up) = if loops { (&DEEP[..], &UP[..]) } else { (&[][..], &[][..]) };
    let mut out = [down, &SESSION_START].concat();
    out.extend(offset.to_le_bytes());
    out.push(1u8.checked_shl(slot.into()).ok_or_else(|| far("there is no such slot"))?);
    out.extend([0x74, (SESSION_BACK.len() + up.len() + 5) as u8]);
    out.extend([&SESSION_BACK, up].concat());
    out.push(0xe9);
    let distance = i128::from(new.0) - i128::from(at.0 + out.len() as u64 + 4);
    out.extend(i32::try_from(distance).map_err(|_| far("more than 2 GiB away"))?.to_le_bytes());
    out.extend([&SESSION_BACK, up].concat());
    let thunk = at.checked_add(out.len() as u64).ok_or_else(|| far("it is at the end of memory"))?;
    out.extend(original_thunk(thunk, entry, code)?);
    if out.len() as u64 > CANARY_BYTES {
        return Err(far("it needs too much room"));
    }
    Ok(SwitchStub { code: out, ways: [at, thunk] })
}

fn session_old_way(at: ProcAddr, code: &[u8]) -> Option<ProcAddr> {
    /// An offset, a bit, a short branch.
    const TEST: usize = 4 + 1 + 2;
    let (down, up) = if code.starts_with(&DEEP) { (&DEEP[..], &UP[..]) } else { (&[][..], &[][..]) };
    let back = [&SESSION_BACK, up].concat();
    let new = down.len() + SESSION_START.len() + TEST;
    let old = new + back.len() + 5;
    let is_stub = code.get(down.len()..)?.starts_with(&SESSION_START)
        && code.get(new..)?.starts_with(&back)
        && code.get(old..)?.starts_with(&back);
    is_stub.then(|| at.checked_add((old + back.len()) as u64)).flatten()
}

#[cfg(test)]
mod tests {
    use super::*;
    use iced_x86::{Decoder, DecoderOptions, Formatter};
    use proptest::prelude::*;

    #[test]
    fn a_stub_is_what_it_should_be() {
        let words = ShareWords { shares: ProcAddr(0x8078), which: ProcAddr(0x8080) };
        let key = KeyArgument::new(5).unwrap();
        let code = [0x55, 0x48, 0x89, 0xe5, 0x90];
        let stub = canary_stub(ProcAddr(0x9000), words, (key, 0x77), ProcAddr(0xa000), (ProcAddr(0x1000), &code), None)
            .unwrap();
        assert_eq!(canary_old_way(ProcAddr(0x9000), &stub.code), Some(stub.ways[1]));
        let stub = stub.code;
        let mut formatter = iced_x86::IntelFormatter::new();
        let lines: Vec<String> = Decoder::with_ip(64, &stub, 0x9000, DecoderOptions::NONE)
            .iter()
            .map(|insn| {
                let mut line = String::new();
                formatter.format(&insn, &mut line);
                line
            })
            .collect();
        let old = lines.iter().position(|l| l == "jmp 000000000000A000h").unwrap() + 1;
        assert_eq!(
            lines[..8],
            ["push rax", "push rdx", "lahf", "seto al", "push rax", "mov rax,r8", "mov rdx,77h", "xor rax,rdx"]
        );
        let compare = ["mov edx,[8078h]", "cmp byte ptr [8080h],0", "cmovne edx,[807Ch]", "cmp eax,edx"];
        let at = lines.iter().position(|l| l == compare[0]).unwrap();
        assert_eq!(lines[at..at + 4], compare);
        let back = ["pop rax", "add al,7Fh", "sahf", "pop rdx", "pop rax"];
        assert_eq!(lines[old - 6..old - 1], back);
        assert_eq!(lines[old..old + 5], back);
        assert_eq!(lines[old + 5..], ["push rbp", "mov rbp,rsp", "nop", "jmp 0000000000001005h"]);
        let registers = (1..=6).map(|n| KeyArgument::new(n).unwrap().to_rax());
        let names: Vec<String> = registers
            .map(|code| {
                let mut line = String::new();
                formatter.format(&Decoder::new(64, &code, DecoderOptions::NONE).decode(), &mut line);
                line
            })
            .collect();
        assert_eq!(names, ["rdi", "rsi", "rdx", "rcx", "r8", "r9"].map(|r| format!("mov rax,{r}")));
        assert!(KeyArgument::new(0).is_none() && KeyArgument::new(7).is_none());
    }

    #[test]
    fn a_session_stub_looks_at_one_byte() {
        let code = [0x55, 0x48, 0x89, 0xe5, 0x90];
        let at = ProcAddr(0x9000);
        let stub = session_stub(at, (-0x1c, 3), ProcAddr(0xa000), (ProcAddr(0x1000), &code), false).unwrap();
        let mut formatter = iced_x86::IntelFormatter::new();
        let mut lines = Vec::new();
        for insn in Decoder::with_ip(64, &stub.code, at.0, DecoderOptions::NONE).iter() {
            let mut line = String::new();
            formatter.format(&insn, &mut line);
            lines.push(line);
        }
        assert_eq!(
            lines,
            [
                "push rax",
                "lahf",
                "seto al",
                "test byte ptr fs:[0FFFFFFFFFFFFFFE4h],8",
                "je short 0000000000009019h",
                "add al,7Fh",
                "sahf",
                "pop rax",
                "jmp 000000000000A000h",
                "add al,7Fh",
                "sahf",
                "pop rax",
                "push rbp",
                "mov rbp,rsp",
                "nop",
                "jmp 0000000000001005h"
            ]
        );
        assert_eq!(stub.ways, [at, ProcAddr(0x901d)]);
        assert_eq!(canary_old_way(at, &stub.code), Some(ProcAddr(0x901d)));
        assert_eq!(canary_old_way(at, &stub.code[1..]), None);
        assert!(session_stub(at, (0, 8), ProcAddr(0xa000), (ProcAddr(0x1000), &code), false).is_err());
        let deep = session_stub(at, (-0x1c, 3), ProcAddr(0xa000), (ProcAddr(0x1000), &code), true).unwrap();
        assert_eq!(canary_old_way(at, &deep.code), Some(deep.ways[1]));
        let lines: Vec<String> = Decoder::with_ip(64, &deep.code, at.0, DecoderOptions::NONE)
            .iter()
            .map(|insn| {
                let mut line = String::new();
                formatter.format(&insn, &mut line);
                line
            })
            .collect();
        let up = "lea rsp,[rsp+80h]";
        assert_eq!(lines[..2], ["lea rsp,[rsp-80h]", "push rax"]);
        assert_eq!(
            lines[5..11],
            ["je short 0000000000009026h", "add al,7Fh", "sahf", "pop rax", up, "jmp 000000000000A000h"]
        );
        assert_eq!(lines[11..16], ["add al,7Fh", "sahf", "pop rax", up, "push rbp"]);
    }

    #[test]
    fn keys_fall_evenly() {
        for salt in [0, 1, 0xdead_beef_0000_0000] {
            for step in [1u64, 8, 16, 4096] {
                let below = (0..100_000).filter(|i| bucket(0x5555_5555_0000 + i * step, salt) < 1000).count();
                // Ten in a hundred; four standard deviations are 380.
                assert!((9_620..10_380).contains(&below), "salt {salt:#x}, step {step}: {below}");
            }
        }
    }

    proptest! {
        #[test]
        fn a_bucket_is_a_share(key: u64, salt: u64) {
            prop_assert!(bucket(key, salt) < WHOLE);
        }
    }
}
