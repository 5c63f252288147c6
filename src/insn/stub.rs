//! The switch stub: code behind an entry jump that follows a word of the patch's record, one way or the other: to a function, or on
//! in one; and the copy of the overwritten instructions (the original thunk) that the second kind of way needs.
//!
//! ```text
//! lea   rsp, [rsp-128]        ; the red zone may be in use: a body may branch back to its entry
//! pushfq
//! cmp   dword [rip+word], 2   ; applied
//! jne   otherwise
//! popfq
//! lea   rsp, [rsp+128]
//! jmp   new                   ; a way to a function
//! otherwise:
//! popfq
//! lea   rsp, [rsp+128]
//! ...                         ; a way on in a function: the overwritten instructions, moved
//! jmp   behind the entry jump
//! ```
//!
//! No register and no flag changes, so callers that know what a function leaves alone (`-fipa-ra`) stay right. A call among the
//! moved instructions pushes the return address that it has in the old body: unwind tables are found by it, and nothing
//! ever returns into a stub.

use iced_x86::{
    BlockEncoder, BlockEncoderOptions, Code, Decoder, DecoderOptions, FlowControl, IcedError, Instruction,
    InstructionBlock, MemoryOperand, Register,
};

use crate::addr::ProcAddr;

/// Room for one switch stub, in bytes.
pub const STUB_BYTES: u64 = 128;

/// Bytes of old code that are enough to move what an entry jump overwrites: it ends inside the last instruction.
pub const OVERWRITTEN: usize = 5 + 14;

/// How a stub begins: up to where the word is.
const START: [u8; 8] = [0x48, 0x8d, 0x64, 0x24, 0x80, 0x9c, 0x83, 0x3d];

/// Flags and stack pointer as they were.
const BACK: [u8; 9] = [0x9d, 0x48, 0x8d, 0xa4, 0x24, 0x80, 0, 0, 0];

/// Where the first way begins: behind the comparison, the branch and [`BACK`].
const FIRST_WAY: usize = START.len() + 4 + 1 + 2 + BACK.len();

/// Why overwritten instructions cannot be moved.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum StubError {
    /// An instruction that only works where it stands.
    #[error("the instruction at {at} cannot be moved out of the entry jump's way")]
    Unmovable {
        /// The instruction.
        at: ProcAddr,
    },
    /// No instruction.
    #[error("the bytes at {at} are no instruction")]
    Undecodable {
        /// Where.
        at: ProcAddr,
    },
    /// The moved code does not reach what it refers to.
    #[error("what stands at {at} cannot be moved: {why}")]
    OutOfReach {
        /// The entry.
        at: ProcAddr,
        /// What the encoder says.
        why: String,
    },
}

/// Where one way through a switch stub goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Way<'c> {
    /// To the function that begins here.
    To(ProcAddr),
    /// On in the function whose entry is overwritten, and whose code from there on begins with these bytes.
    On(&'c [u8]),
}

/// A switch stub.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SwitchStub {
    /// Its code.
    pub code: Vec<u8>,
    /// Where its two ways begin, registers and flags as at its own beginning: whoever goes on there goes that way.
    pub ways: [ProcAddr; 2],
}

/// The stub at `at` for the entry jump at `entry`: the first way while the word at `word` is `applied`, else the other.
///
/// # Errors
///
/// The overwritten instructions cannot be moved.
pub fn switch_stub(
    at: ProcAddr,
    (word, applied): (ProcAddr, u8),
    entry: ProcAddr,
    ways: [Way<'_>; 2],
) -> Result<SwitchStub, StubError> {
    let far = |why: &str| StubError::OutOfReach { at: entry, why: why.to_owned() };
    let relative = |end: u64, to: ProcAddr| {
        let distance = i128::from(to.0) - i128::from(end);
        i32::try_from(distance).map(i32::to_le_bytes).map_err(|_| far("more than 2 GiB away"))
    };
    let mut out = START.to_vec();
    out.extend(relative(at.0 + out.len() as u64 + 5, word)?);
    out.push(applied);
    let branch = out.len();
    out.extend([0x75, 0]);
    let mut begins = [at; 2];
    for (i, way) in ways.into_iter().enumerate() {
        out.extend(BACK);
        begins[i] = at.checked_add(out.len() as u64).ok_or_else(|| far("it is at the end of memory"))?;
        match way {
            Way::To(to) => {
                out.push(0xe9);
                out.extend(relative(at.0 + out.len() as u64 + 4, to)?);
            }
            Way::On(code) => {
                out.extend(original_thunk(begins[i], entry, code)?);
            }
        }
        if i == 0 {
            let distance = i8::try_from(out.len() - branch - 2).map_err(|_| far("it needs too much room"))?;
            out[branch + 1] = distance.cast_unsigned();
        }
    }
    if out.len() as u64 > STUB_BYTES {
        return Err(far("it needs too much room"));
    }
    Ok(SwitchStub { code: out, ways: begins })
}

/// Where the second way of the stub at `at` begins, if `code` is a stub whose first way is to a function.
#[must_use]
pub fn second_way(at: ProcAddr, code: &[u8]) -> Option<ProcAddr> {
    const JUMP: usize = 5;
    let first = FIRST_WAY + JUMP;
    let is_stub = code.starts_with(&START)
        && code.get(FIRST_WAY - BACK.len()..FIRST_WAY)? == BACK
        && code.get(FIRST_WAY) == Some(&0xe9)
        && code.get(first..first + BACK.len())? == BACK;
    at.checked_add((first + BACK.len()) as u64).filter(|_| is_stub)
}

/// A copy at `at` of the instructions that an entry jump at `entry` overwrites, which goes on in the old function.
///
/// # Errors
///
/// They cannot be moved.
pub fn original_thunk(at: ProcAddr, entry: ProcAddr, code: &[u8]) -> Result<Vec<u8>, StubError> {
    /// Bytes of `jmp rel32`.
    const JUMP: u64 = 5;
    let encoder = |e: IcedError| StubError::OutOfReach { at: entry, why: e.to_string() };
    let mut moved: Vec<Instruction> = Vec::new();
    let mut decoder = Decoder::with_ip(64, code, entry.0, DecoderOptions::NONE);
    let mut ended = false;
    while !ended && decoder.ip() < entry.0 + JUMP {
        let place = ProcAddr(decoder.ip());
        let insn = decoder.decode();
        if insn.is_invalid() {
            return Err(StubError::Undecodable { at: place });
        }
        let unmovable = StubError::Unmovable { at: place };
        match insn.flow_control() {
            FlowControl::Call | FlowControl::IndirectCall => {
                // It must return behind the entry jump, and nowhere else.
                if insn.next_ip() < entry.0 + JUMP {
                    return Err(unmovable);
                }
                moved.extend(as_jump(&insn).ok_or(unmovable)?);
                ended = true;
            }
            FlowControl::Return | FlowControl::UnconditionalBranch | FlowControl::IndirectBranch => {
                moved.push(insn);
                ended = true;
            }
            FlowControl::Next | FlowControl::ConditionalBranch => moved.push(insn),
            FlowControl::Exception if insn.code() == Code::Ud2 => {
                moved.push(insn);
                ended = true;
            }
            _ => return Err(unmovable),
        }
    }
    if !ended {
        moved.push(Instruction::with_branch(Code::Jmp_rel32_64, decoder.ip()).map_err(encoder)?);
    }
    let block = InstructionBlock::new(&moved, at.0);
    Ok(BlockEncoder::encode(64, block, BlockEncoderOptions::NONE).map_err(encoder)?.code_buffer)
}

/// Whether a body calls nothing, so that nobody but its own instructions changes anything between two turns of its loop.
#[must_use]
pub fn calls_nothing(start: ProcAddr, body: &[u8]) -> bool {
    let mut decoder = Decoder::with_ip(64, body, start.0, DecoderOptions::NONE);
    std::iter::from_fn(|| decoder.can_decode().then(|| decoder.decode())).all(|insn| {
        let calls =
            matches!(insn.flow_control(), FlowControl::Call | FlowControl::IndirectCall | FlowControl::Interrupt);
        !calls && !insn.is_invalid()
    })
}

/// The longest body that is moved whole, in bytes.
pub const WHOLE_BODY_BYTES: usize = 2048;

/// Room for a moved body: a short branch may have to become a long one, of at most three instructions.
#[must_use]
pub fn whole_bytes(body: usize) -> u64 {
    6 * body as u64 + 16
}

/// A copy at `at` of a whole function whose loop goes back to its first instruction: branches within it stay within the copy, all others
/// lead where they did. `body` stands at `start` and is entered at `entry`, which may be behind an `endbr64`.
///
/// Only what calls nothing: a call would return into the copy, of which no unwind table tells.
///
/// # Errors
///
/// It can't be moved.
pub fn whole_thunk(at: ProcAddr, start: ProcAddr, entry: ProcAddr, body: &[u8]) -> Result<Vec<u8>, StubError> {
    let far = |why: &str| StubError::OutOfReach { at: start, why: why.to_owned() };
    if body.len() > WHOLE_BODY_BYTES {
        return Err(far("the function branches back to its entry and is too long to be moved whole"));
    }
    let end = start.checked_add(body.len() as u64).ok_or_else(|| far("it is at the end of memory"))?;
    let within = |to: u64| start.0 <= to && to < end.0;
    let mut moved: Vec<Instruction> = Vec::new();
    let mut decoder = Decoder::with_ip(64, body, start.0, DecoderOptions::NONE);
    while decoder.can_decode() {
        let place = ProcAddr(decoder.ip());
        let insn = decoder.decode();
        if insn.is_invalid() {
            return Err(StubError::Undecodable { at: place });
        }
        let movable = match insn.flow_control() {
            FlowControl::Next | FlowControl::ConditionalBranch | FlowControl::UnconditionalBranch => true,
            FlowControl::Return => true,
            FlowControl::Exception => insn.code() == Code::Ud2,
            // Where an indirect one leads, a table of the old body may say.
            _ => false,
        };
        // A table or a constant inside of the function is no instruction of it.
        let data = insn.is_ip_rel_memory_operand() && within(insn.ip_rel_memory_address());
        if !movable || data {
            return Err(StubError::Unmovable { at: place });
        }
        moved.push(insn);
    }
    let starts = |to: u64| moved.binary_search_by_key(&to, Instruction::ip).is_ok();
    let near = |i: &&Instruction| i.op0_kind() == iced_x86::OpKind::NearBranch64 && within(i.near_branch_target());
    if let Some(i) = moved.iter().filter(near).find(|i| !starts(i.near_branch_target())) {
        return Err(StubError::Unmovable { at: ProcAddr(i.ip()) });
    }
    let first = moved.iter().position(|i| i.ip() == entry.0).ok_or(StubError::Undecodable { at: entry })?;
    let encoder = |e: IcedError| StubError::OutOfReach { at: start, why: e.to_string() };
    // Without its endbr64, which a loop may go back to.
    let mut copy = moved.split_off(first);
    for insn in &mut copy {
        if insn.op0_kind() == iced_x86::OpKind::NearBranch64 && insn.near_branch_target() == start.0 {
            insn.set_near_branch64(entry.0);
        }
    }
    // What its last instruction falls into.
    copy.push(Instruction::with_branch(Code::Jmp_rel32_64, end.0).map_err(encoder)?);
    let block = InstructionBlock::new(&copy, at.0);
    let code = BlockEncoder::encode(64, block, BlockEncoderOptions::NONE).map_err(encoder)?.code_buffer;
    if code.len() as u64 > whole_bytes(body.len()) {
        return Err(far("it needs too much room"));
    }
    Ok(code)
}

/// A call as a push of its return address and a jump.
fn as_jump(call: &Instruction) -> Option<[Instruction; 3]> {
    let [low, high] = [call.next_ip() as u32, (call.next_ip() >> 32) as u32].map(u32::cast_signed);
    let push = Instruction::with1(Code::Pushq_imm32, low).ok()?;
    let slot = MemoryOperand::with_base_displ(Register::RSP, 4);
    let upper = Instruction::with2(Code::Mov_rm32_imm32, slot, high).ok()?;
    let jump = match call.code() {
        Code::Call_rel32_64 => Instruction::with_branch(Code::Jmp_rel32_64, call.near_branch_target()).ok()?,
        // What it goes by must not have moved with the push.
        Code::Call_rm64 if call.memory_base() != Register::RSP && call.op0_register() != Register::RSP => {
            let mut jump = *call;
            jump.set_code(Code::Jmp_rm64);
            jump
        }
        _ => return None,
    };
    Some([push, upper, jump])
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The text of code, at its address.
    fn text(code: &[u8], at: u64) -> Vec<String> {
        use iced_x86::Formatter;
        let mut out = Vec::new();
        let mut formatter = iced_x86::IntelFormatter::new();
        for insn in Decoder::with_ip(64, code, at, DecoderOptions::NONE).iter() {
            let mut line = String::new();
            formatter.format(&insn, &mut line);
            out.push(line);
        }
        out
    }

    fn thunk(code: &[u8]) -> Result<Vec<String>, StubError> {
        original_thunk(ProcAddr(0x9000), ProcAddr(0x1000), code).map(|c| text(&c, 0x9000))
    }

    #[test]
    fn what_follows_is_jumped_to() {
        // push rbp; mov rbp, rsp; sub rsp, 16
        let lines = thunk(&[0x55, 0x48, 0x89, 0xe5, 0x48, 0x83, 0xec, 0x10, 0x90]).unwrap();
        assert_eq!(lines, ["push rbp", "mov rbp,rsp", "sub rsp,10h", "jmp 0000000000001008h"]);
    }

    #[test]
    fn what_refers_to_its_own_place_still_refers_to_it() {
        // lea rax, [rip+0x100]
        assert_eq!(thunk(&[0x48, 0x8d, 0x05, 0, 1, 0, 0]).unwrap(), ["lea rax,[1107h]", "jmp 0000000000001007h"]);
        // test edi, edi; je +0x20; nop
        let lines = thunk(&[0x85, 0xff, 0x74, 0x20, 0x90]).unwrap();
        assert_eq!(lines, ["test edi,edi", "je 0000000000001024h", "nop", "jmp 0000000000001005h"]);
    }

    #[test]
    fn a_call_returns_into_the_old_body() {
        // sub rsp, 8; call +0x100
        let lines = thunk(&[0x48, 0x83, 0xec, 0x08, 0xe8, 0, 1, 0, 0]).unwrap();
        assert_eq!(lines, ["sub rsp,8", "push 1009h", "mov dword ptr [rsp+4],0", "jmp 0000000000001109h"]);
        // sub rsp, 8; call [rip+0x10]
        let lines = thunk(&[0x48, 0x83, 0xec, 0x08, 0xff, 0x15, 0x10, 0, 0, 0]).unwrap();
        assert_eq!(lines[1..], ["push 100Ah", "mov dword ptr [rsp+4],0", "jmp qword ptr [101Ah]"]);
        // The upper half of an address counts, and a low half that looks negative, too.
        let far = original_thunk(ProcAddr(0x5555_9000_0000), ProcAddr(0x5555_8fff_0000), &[0xe8, 0, 1, 0, 0]).unwrap();
        let lines = text(&far, 0x5555_9000_0000);
        assert_eq!(lines[..2], ["push 0FFFFFFFF8FFF0005h", "mov dword ptr [rsp+4],5555h"]);
    }

    #[test]
    fn a_function_that_ends_is_not_left() {
        // xor eax, eax; ret; and padding
        assert_eq!(thunk(&[0x31, 0xc0, 0xc3, 0xcc, 0xcc]).unwrap(), ["xor eax,eax", "ret"]);
        assert_eq!(thunk(&[0xe9, 0, 1, 0, 0]).unwrap(), ["jmp 0000000000001105h"]);
    }

    #[test]
    fn what_only_works_in_its_place_is_refused() {
        // call rax, which returns to where the jump will be; int 0x80; no instruction
        let at = |n| Err(StubError::Unmovable { at: ProcAddr(n) });
        assert_eq!(thunk(&[0xff, 0xd0, 0x90, 0x90, 0x90]), at(0x1000));
        assert_eq!(thunk(&[0x90, 0xcd, 0x80, 0x90, 0x90]), at(0x1001));
        assert_eq!(thunk(&[0x06, 0, 0, 0, 0]), Err(StubError::Undecodable { at: ProcAddr(0x1000) }));
        // call [rsp+8]: the push would move it.
        assert_eq!(thunk(&[0x90, 0xff, 0x54, 0x24, 0x08]), at(0x1001));
    }

    #[test]
    fn a_loop_stays_within_its_copy() {
        let whole = |start, entry, code: &[u8]| {
            whole_thunk(ProcAddr(0x9000), ProcAddr(start), ProcAddr(entry), code).map(|c| text(&c, 0x9000))
        };
        // add rax, [rdi]; add rdi, 8; dec rsi; jne the start; mov [rip+0x10], rax; jmp elsewhere
        let body = [
            0x48, 0x03, 0x07, 0x48, 0x83, 0xc7, 0x08, 0x48, 0xff, 0xce, 0x75, 0xf4, 0x48, 0x89, 0x05, 0x10, 0, 0, 0,
            0xe9, 0, 1, 0, 0,
        ];
        let lines = whole(0x1000, 0x1000, &body).unwrap();
        let expected = [
            "add rax,[rdi]",
            "add rdi,8",
            "dec rsi",
            "jne short 0000000000009000h",
            "mov [1023h],rax",
            "jmp 0000000000001118h",
            "jmp 0000000000001018h",
        ];
        assert_eq!(lines, expected);
        // endbr64; dec edi; jne the endbr64; ret
        let endbr = [0xf3, 0x0f, 0x1e, 0xfa, 0xff, 0xcf, 0x75, 0xf8, 0xc3];
        let lines = whole(0x1000, 0x1004, &endbr).unwrap();
        assert_eq!(lines[..3], ["dec edi", "jne short 0000000000009000h", "ret"]);
        // A branch over more than a short one reaches gets longer, and what follows moves on.
        let mut long = vec![0xe3, 0x05, 0xff, 0xcf, 0x75, 0xfa, 0xc3];
        long.extend([0x90; 200]);
        assert!(whole(0x1000, 0x1000, &long).unwrap().contains(&"dec edi".to_owned()));
        let at = |n| Err(StubError::Unmovable { at: ProcAddr(n) });
        // nop; call; and nop; jmp rax; and nop; lea rax, [rip-3]
        assert_eq!(whole(0x1000, 0x1000, &[0x90, 0xe8, 0, 1, 0, 0]), at(0x1001));
        assert_eq!(whole(0x1000, 0x1000, &[0x90, 0xff, 0xe0]), at(0x1001));
        assert_eq!(whole(0x1000, 0x1000, &[0x90, 0x48, 0x8d, 0x05, 0xfd, 0xff, 0xff, 0xff]), at(0x1001));
        // Into the middle of an instruction.
        assert_eq!(whole(0x1000, 0x1000, &[0x48, 0x03, 0x07, 0x75, 0xfc, 0xc3]), at(0x1003));
        assert!(whole(0x1000, 0x1000, &[0x90; WHOLE_BODY_BYTES + 1]).is_err());
        assert!(calls_nothing(ProcAddr(0x1000), &body) && calls_nothing(ProcAddr(0x1000), &endbr));
        assert!(!calls_nothing(ProcAddr(0x1000), &[0x90, 0xe8, 0, 1, 0, 0]));
        assert!(!calls_nothing(ProcAddr(0x1000), &[0xff, 0xd0]) && !calls_nothing(ProcAddr(0x1000), &[0x06]));
    }

    #[test]
    fn a_stub_follows_its_word() {
        let code = [0x55, 0x48, 0x89, 0xe5, 0x90];
        let at = ProcAddr(0x9000);
        let stub =
            switch_stub(at, (ProcAddr(0x8048), 2), ProcAddr(0x1000), [Way::To(ProcAddr(0xa000)), Way::On(&code)])
                .unwrap();
        let lines = text(&stub.code, at.0);
        assert_eq!(stub.ways.map(|w| w.0), [0x9018, 0x9026]);
        assert_eq!(second_way(at, &stub.code), Some(stub.ways[1]));
        assert_eq!(second_way(at, &stub.code[1..]), None);
        assert_eq!(
            lines,
            [
                "lea rsp,[rsp-80h]",
                "pushfq",
                "cmp dword ptr [8048h],2",
                "jne short 000000000000901Dh",
                "popfq",
                "lea rsp,[rsp+80h]",
                "jmp 000000000000A000h",
                "popfq",
                "lea rsp,[rsp+80h]",
                "push rbp",
                "mov rbp,rsp",
                "nop",
                "jmp 0000000000001005h",
            ]
        );
        let far =
            switch_stub(at, (ProcAddr(1 << 40), 2), ProcAddr(0x1000), [Way::To(ProcAddr(0xa000)), Way::On(&code)]);
        assert!(matches!(far, Err(StubError::OutOfReach { .. })));
    }
}
