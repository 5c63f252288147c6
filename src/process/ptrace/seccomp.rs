//! What a seccomp filter would say of a system call, before anything of the process makes it.
//!
//! The filters of a thread are classic BPF over `struct seccomp_data` (seccomp(2), linux/filter.h). Of several, each is
//! asked, and all must let the call pass.

use libc::sock_filter;

/// A system call as a filter sees it.
#[derive(Clone, Copy, Debug)]
pub struct Call {
    /// Its number.
    pub number: i64,
    /// Where it is made from.
    pub from: u64,
    /// Its arguments.
    pub args: [u64; 6],
}

const AUDIT_ARCH_X86_64: u32 = 0xc000_003e;
const ACTION: u32 = 0xffff_0000;

/// Whether every one of `filters` lets the call pass unseen.
pub fn allows(filters: &[Vec<sock_filter>], call: &Call) -> bool {
    filters.iter().all(|f| {
        let verdict = run(f, &call.data()).map(|v| v & ACTION);
        matches!(verdict, Some(libc::SECCOMP_RET_ALLOW | libc::SECCOMP_RET_LOG))
    })
}

impl Call {
    /// `struct seccomp_data`, in 32-bit words.
    fn data(&self) -> [u32; 16] {
        let mut out = [0; 16];
        let halves = |v: u64| [v as u32, (v >> 32) as u32];
        out[0] = self.number as u32;
        out[1] = AUDIT_ARCH_X86_64;
        out[2..4].copy_from_slice(&halves(self.from));
        for (slot, arg) in out[4..].chunks_exact_mut(2).zip(self.args) {
            slot.copy_from_slice(&halves(arg));
        }
        out
    }
}

/// What a filter returns; `None` for a program that the kernel would not have taken.
fn run(program: &[sock_filter], data: &[u32; 16]) -> Option<u32> {
    let (mut a, mut x, mut memory) = (0u32, 0u32, [0u32; 16]);
    let mut at = 0usize;
    loop {
        let ins = program.get(at)?;
        let (class, k) = (u32::from(ins.code) & 0x07, ins.k);
        let operand = if u32::from(ins.code) & libc::BPF_X != 0 { x } else { k };
        let slot = usize::try_from(k).ok()?;
        at += 1;
        match class {
            libc::BPF_LD | libc::BPF_LDX => {
                let value = match u32::from(ins.code) & 0xe0 {
                    libc::BPF_ABS if class == libc::BPF_LD && k % 4 == 0 => *data.get(slot / 4)?,
                    libc::BPF_IMM => k,
                    libc::BPF_MEM => *memory.get(slot)?,
                    libc::BPF_LEN => size_of_val(data) as u32,
                    _ => return None,
                };
                *if class == libc::BPF_LD { &mut a } else { &mut x } = value;
            }
            libc::BPF_ST => *memory.get_mut(slot)? = a,
            libc::BPF_STX => *memory.get_mut(slot)? = x,
            libc::BPF_ALU => {
                a = match u32::from(ins.code) & 0xf0 {
                    libc::BPF_ADD => a.wrapping_add(operand),
                    libc::BPF_SUB => a.wrapping_sub(operand),
                    libc::BPF_MUL => a.wrapping_mul(operand),
                    libc::BPF_DIV => a.checked_div(operand)?,
                    libc::BPF_MOD => a.checked_rem(operand)?,
                    libc::BPF_OR => a | operand,
                    libc::BPF_AND => a & operand,
                    libc::BPF_XOR => a ^ operand,
                    libc::BPF_LSH => a.checked_shl(operand)?,
                    libc::BPF_RSH => a.checked_shr(operand)?,
                    libc::BPF_NEG => a.wrapping_neg(),
                    _ => return None,
                }
            }
            libc::BPF_JMP => {
                let jump = u32::from(ins.code) & 0xf0;
                let taken = match jump {
                    libc::BPF_JA => true,
                    libc::BPF_JEQ => a == operand,
                    libc::BPF_JGT => a > operand,
                    libc::BPF_JGE => a >= operand,
                    libc::BPF_JSET => a & operand != 0,
                    _ => return None,
                };
                at += match (jump == libc::BPF_JA, taken) {
                    (true, _) => slot,
                    (false, true) => usize::from(ins.jt),
                    (false, false) => usize::from(ins.jf),
                };
            }
            libc::BPF_RET => return Some(if u32::from(ins.code) & 0x18 == 0x10 { a } else { k }),
            libc::BPF_MISC if u32::from(ins.code) & 0xf8 == 0x80 => a = x,
            libc::BPF_MISC => x = a,
            _ => return None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ins(code: u32, jt: u8, jf: u8, k: u32) -> sock_filter {
        sock_filter { code: code as u16, jt, jf, k }
    }

    fn call(number: i64, protection: u64) -> Call {
        Call { number, from: 0x7000_0000_1000, args: [0, 0, protection, 0, 0, 0] }
    }

    /// `mprotect` with PROT_EXEC fails, `mmap` kills, everything else passes.
    fn filter() -> Vec<sock_filter> {
        let load = libc::BPF_LD | libc::BPF_W | libc::BPF_ABS;
        let equal = libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K;
        vec![
            ins(load, 0, 0, 4),
            ins(equal, 1, 0, AUDIT_ARCH_X86_64),
            ins(libc::BPF_RET, 0, 0, libc::SECCOMP_RET_KILL_PROCESS),
            ins(load, 0, 0, 0),
            ins(equal, 4, 0, libc::SYS_mmap as u32),
            ins(equal, 0, 2, libc::SYS_mprotect as u32),
            ins(load, 0, 0, 32),
            ins(libc::BPF_JMP | libc::BPF_JSET | libc::BPF_K, 2, 0, libc::PROT_EXEC as u32),
            ins(libc::BPF_RET, 0, 0, libc::SECCOMP_RET_ALLOW),
            ins(libc::BPF_RET, 0, 0, libc::SECCOMP_RET_KILL_PROCESS),
            ins(libc::BPF_RET, 0, 0, libc::SECCOMP_RET_ERRNO | 1),
        ]
    }

    #[test]
    fn a_filter_says_what_it_would() {
        let filters = [filter()];
        assert!(allows(&filters, &call(libc::SYS_rt_sigreturn, 0)));
        assert!(allows(&filters, &call(libc::SYS_mprotect, 1)));
        assert!(!allows(&filters, &call(libc::SYS_mprotect, 5)));
        assert!(!allows(&filters, &call(libc::SYS_mmap, 1)));
        assert!(allows(&[], &call(libc::SYS_mmap, 1)));
        let all = vec![ins(libc::BPF_RET, 0, 0, libc::SECCOMP_RET_ALLOW)];
        assert!(!allows(&[all.clone(), filter()], &call(libc::SYS_mmap, 1)), "each must let it pass");
        assert!(!allows(&[all, vec![ins(libc::BPF_RET, 0, 0, libc::SECCOMP_RET_TRACE)]], &call(1, 1)));
    }

    #[test]
    fn a_broken_filter_allows_nothing() {
        for program in [
            vec![],
            vec![ins(libc::BPF_LD | libc::BPF_ABS, 0, 0, 400)],
            vec![ins(libc::BPF_ALU | libc::BPF_DIV, 0, 0, 0)],
            vec![ins(libc::BPF_JMP | libc::BPF_JA, 0, 0, u32::MAX)],
        ] {
            assert!(!allows(&[program], &call(1, 1)));
        }
    }
}
