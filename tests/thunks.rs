//! The original thunk: the instructions that an entry jump overwrites, moved. For every function of real images, each thunk is held
//! against what it was made from in two ways, neither of which knows how it was made: decoded and compared instruction by instruction; and
//! executed, with random registers, beside the original in its own place in its own process.
//!
//! That the comparison can fail is tried, too, on thunks with one bit turned.
//!
//! `THUNKS=FILE:FILE…` names the images (default: the C library that this test uses); `./ci/thunks` tries them all.
#![allow(unsafe_code)]

mod support;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Command;

use iced_x86::{Code, Decoder, DecoderOptions, FlowControl, Instruction, OpKind, Register};
use livepatch::addr::ProcAddr;
use livepatch::insn::{original_thunk, OVERWRITTEN};
use object::{Object, ObjectSection, ObjectSymbol, SymbolKind};

/// Bytes of `jmp rel32`.
const JUMP: u64 = 5;

/// A function's code from its entry on, at the address that the image is linked to.
struct Entry {
    name: String,
    at: u64,
    /// Bytes that belong to the function.
    size: u64,
    code: Vec<u8>,
}

fn entries(path: &Path) -> Vec<Entry> {
    let bytes = std::fs::read(path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    let file = object::File::parse(&*bytes).unwrap();
    let mut out: BTreeMap<u64, Entry> = BTreeMap::new();
    for s in file.symbols().chain(file.dynamic_symbols()) {
        if s.kind() != SymbolKind::Text || s.size() == 0 || !s.is_definition() {
            continue;
        }
        let Some(section) = s.section_index().and_then(|i| file.section_by_index(i).ok()) else { continue };
        let Ok(data) = section.data() else { continue };
        let Some(offset) = s.address().checked_sub(section.address()).map(|o| o as usize) else { continue };
        let Some(mut code) = data.get(offset..) else { continue };
        let (mut at, mut size) = (s.address(), s.size());
        if code.starts_with(&[0xf3, 0x0f, 0x1e, 0xfa]) && size > 4 {
            (at, size, code) = (at + 4, size - 4, &code[4..]);
        }
        let code = code[..code.len().min(OVERWRITTEN)].to_vec();
        let name = s.name().unwrap_or("?").to_owned();
        out.entry(at).or_insert(Entry { name, at, size, code });
    }
    out.into_values().collect()
}

fn decode(code: &[u8], at: u64) -> impl Iterator<Item = Instruction> + '_ {
    let mut decoder = Decoder::with_ip(64, code, at, DecoderOptions::NONE);
    std::iter::from_fn(move || decoder.can_decode().then(|| decoder.decode()))
}

/// The instructions that the jump overwrites, the last one whole.
fn overwritten(e: &Entry) -> Vec<Instruction> {
    let mut out = Vec::new();
    for insn in decode(&e.code, e.at) {
        let (next, ends) = (insn.next_ip(), ends(&insn));
        out.push(insn);
        if ends || next >= e.at + JUMP {
            break;
        }
    }
    out
}

/// Whether nothing after it is reached from it, but by a return.
fn ends(insn: &Instruction) -> bool {
    use FlowControl::{Call, Exception, IndirectBranch, IndirectCall, Return, UnconditionalBranch};
    matches!(insn.flow_control(), Call | IndirectCall | Return | UnconditionalBranch | IndirectBranch | Exception)
}

fn is_near(insn: &Instruction) -> bool {
    matches!(insn.op0_kind(), OpKind::NearBranch16 | OpKind::NearBranch32 | OpKind::NearBranch64)
}

/// Whether two instructions do the same wherever they stand: all but their lengths and the way they spell an address.
fn same(a: &Instruction, b: &Instruction) -> bool {
    if a.is_ip_rel_memory_operand() || b.is_ip_rel_memory_operand() {
        let (mut x, mut y) = (*a, *b);
        let equal = a.is_ip_rel_memory_operand() == b.is_ip_rel_memory_operand()
            && a.ip_rel_memory_address() == b.ip_rel_memory_address()
            && a.memory_segment() == b.memory_segment();
        for i in [&mut x, &mut y] {
            i.set_memory_displacement64(0);
            i.set_next_ip(0);
        }
        return equal && x == y;
    }
    if is_near(a) && is_near(b) {
        let target = |i: &Instruction| i.near_branch_target();
        return a.mnemonic() == b.mnemonic() && target(a) == target(b) && a.condition_code() == b.condition_code();
    }
    a == b
}

/// Holds a thunk against the code that it was made from.
fn compare(original: &[Instruction], thunk: &[Instruction]) -> Result<(), String> {
    let mut rest = thunk;
    let mut take = || {
        let (first, more) = rest.split_first().ok_or("it ends too soon")?;
        rest = more;
        Ok::<_, String>(*first)
    };
    for o in original {
        let wrong = |got: &Instruction| format!("{o} became {got}");
        match o.flow_control() {
            FlowControl::Call | FlowControl::IndirectCall => {
                // A push of the old return address, in two halves, and a jump.
                let (push, upper, jump) = (take()?, take()?, take()?);
                let pushes = push.code() == Code::Pushq_imm32
                    && upper.code() == Code::Mov_rm32_imm32
                    && upper.memory_base() == Register::RSP
                    && upper.memory_index() == Register::None
                    && upper.memory_displacement64() == 4;
                let address = u64::from(push.immediate32to64() as u32) | u64::from(upper.immediate32()) << 32;
                if !pushes || address != o.next_ip() {
                    return Err(wrong(&push));
                }
                let mut called = *o;
                if is_near(o) {
                    if jump.code() != Code::Jmp_rel32_64 || jump.near_branch_target() != o.near_branch_target() {
                        return Err(wrong(&jump));
                    }
                } else {
                    called.set_code(Code::Jmp_rm64);
                    if !same(&called, &jump) || o.memory_base() == Register::RSP {
                        return Err(wrong(&jump));
                    }
                }
            }
            FlowControl::ConditionalBranch if o.is_loop() || o.is_loopcc() || o.is_jcx_short() => {
                // It reaches only 128 bytes: over a jump that is not taken, to one that is.
                let short = take()?;
                if is_near(&short) && short.near_branch_target() == o.near_branch_target() && short.code() == o.code() {
                    continue;
                }
                let (over, far) = (take()?, take()?);
                let right = short.code() == o.code()
                    && short.near_branch_target() == far.ip()
                    && over.flow_control() == FlowControl::UnconditionalBranch
                    && over.near_branch_target() == far.next_ip()
                    && far.flow_control() == FlowControl::UnconditionalBranch
                    && far.near_branch_target() == o.near_branch_target();
                if !right {
                    return Err(wrong(&short));
                }
            }
            _ => {
                let moved = take()?;
                if !same(o, &moved) {
                    return Err(wrong(&moved));
                }
            }
        }
    }
    let last = original.last().ok_or("nothing was overwritten")?;
    if !ends(last) {
        let jump = take()?;
        if jump.flow_control() != FlowControl::UnconditionalBranch || jump.near_branch_target() != last.next_ip() {
            return Err(format!("it goes on at {jump}"));
        }
    }
    if rest.is_empty() {
        Ok(())
    } else {
        Err("it has more than it should".into())
    }
}

/// A program that stands still, in which code is run step by step.
struct Stage {
    pid: i32,
    /// What each linked address becomes.
    bias: u64,
    /// Where thunks are put: in the image's own code, which is not run.
    spot: u64,
    arena: u64,
    registers: libc::user_regs_struct,
    vectors: libc::user_fpregs_struct,
    seed: u64,
}

/// Bytes of the memory that registers point into.
const ARENA: usize = 16 << 10;

/// How a run of a few instructions ended.
#[derive(PartialEq)]
struct End {
    registers: Vec<u64>,
    arena: Vec<u8>,
    fault: bool,
}

fn ptrace(request: libc::c_uint, pid: i32, addr: usize, data: usize) -> libc::c_long {
    // SAFETY: `addr` and `data` are numbers, or point to what the request reads or writes, alive for the call.
    unsafe { libc::ptrace(request, pid, addr, data) }
}

impl Stage {
    /// Starts what holds the image: the image itself, or a program that is linked to it.
    fn start(image: &Path, spot: u64) -> Option<Self> {
        use std::os::unix::process::CommandExt;
        let is_library = image.file_name().is_some_and(|n| n.to_string_lossy().contains(".so"));
        let mut command = Command::new(if is_library { Path::new("/bin/true") } else { image });
        if is_library {
            command.env("LD_PRELOAD", image);
        }
        // SAFETY: ptrace(2) with PTRACE_TRACEME takes nothing and may be called between fork and exec.
        unsafe {
            command.pre_exec(|| {
                libc::ptrace(libc::PTRACE_TRACEME, 0, 0, 0);
                Ok(())
            })
        };
        let child = command.spawn().ok()?;
        let mut stage = Self {
            pid: child.id().cast_signed(),
            bias: 0,
            spot: 0,
            arena: 0,
            // SAFETY: numbers only.
            registers: unsafe { std::mem::zeroed() },
            // SAFETY: as above.
            vectors: unsafe { std::mem::zeroed() },
            seed: 0x9e37_79b9_7f4a_7c15,
        };
        stage.wait();
        ptrace(libc::PTRACE_SETOPTIONS, stage.pid, 0, libc::PTRACE_O_EXITKILL as usize);
        // A library is there once the loader has mapped it and goes on to the program.
        for _ in 0..20_000 {
            if let Some(base) = stage.base(image) {
                stage.bias = base;
                break;
            }
            ptrace(libc::PTRACE_SYSCALL, stage.pid, 0, 0);
            stage.wait();
        }
        stage.registers = stage.get();
        stage.vectors = stage.get_vectors();
        stage.spot = spot + stage.bias;
        stage.arena = (stage.registers.rsp & !0xfff) - (48 << 10);
        Some(stage)
    }

    fn wait(&self) -> i32 {
        let mut status = 0;
        // SAFETY: the status is ours; the child is waited for here only.
        unsafe { libc::waitpid(self.pid, &raw mut status, 0) };
        status
    }

    /// Where the image is: when all of its segments are.
    fn base(&self, image: &Path) -> Option<u64> {
        let maps = std::fs::read_to_string(format!("/proc/{}/maps", self.pid)).ok()?;
        let path = std::fs::canonicalize(image).ok()?;
        let of = |l: &&str| l.ends_with(path.to_str().unwrap_or_default());
        let all: Vec<&str> = maps.lines().filter(of).collect();
        // The data come last.
        all.iter().find(|l| l.contains("rw-p"))?;
        let bytes = std::fs::read(image).ok()?;
        let file = object::File::parse(&*bytes).ok()?;
        let start = u64::from_str_radix(all.first()?.split('-').next()?, 16).ok()?;
        let pie = file.kind() == object::ObjectKind::Dynamic;
        Some(if pie { start } else { 0 })
    }

    fn get(&self) -> libc::user_regs_struct {
        // SAFETY: numbers only; the kernel fills it.
        let mut regs: libc::user_regs_struct = unsafe { std::mem::zeroed() };
        ptrace(libc::PTRACE_GETREGS, self.pid, 0, &raw mut regs as usize);
        regs
    }

    fn get_vectors(&self) -> libc::user_fpregs_struct {
        // SAFETY: numbers only; the kernel fills it.
        let mut regs: libc::user_fpregs_struct = unsafe { std::mem::zeroed() };
        ptrace(libc::PTRACE_GETFPREGS, self.pid, 0, &raw mut regs as usize);
        regs
    }

    fn memory(&self) -> std::fs::File {
        std::fs::OpenOptions::new().read(true).write(true).open(format!("/proc/{}/mem", self.pid)).unwrap()
    }

    fn random(&mut self) -> u64 {
        self.seed ^= self.seed << 13;
        self.seed ^= self.seed >> 7;
        self.seed ^= self.seed << 17;
        self.seed
    }

    /// Registers that point into the arena, or are small numbers; some flags.
    fn state(&mut self) -> libc::user_regs_struct {
        let mut regs = self.registers;
        for i in 0..15 {
            let r = self.random();
            let value = if r.is_multiple_of(4) { r >> 58 } else { self.arena + 4096 + (r >> 16) % 8192 };
            let slots = [
                &mut regs.rax,
                &mut regs.rbx,
                &mut regs.rcx,
                &mut regs.rdx,
                &mut regs.rsi,
                &mut regs.rdi,
                &mut regs.rbp,
                &mut regs.r8,
                &mut regs.r9,
                &mut regs.r10,
                &mut regs.r11,
                &mut regs.r12,
                &mut regs.r13,
                &mut regs.r14,
                &mut regs.r15,
            ];
            *slots.into_iter().nth(i).unwrap() = value;
        }
        regs.rsp = self.arena + 8192 + 8;
        regs.eflags = 0x202 | self.random() & 0x8d5;
        // No system call to restart.
        regs.orig_rax = u64::MAX;
        regs
    }

    /// Runs from `at` while the program counter stays in `from..to`.
    fn run(&self, regs: &libc::user_regs_struct, at: u64, inside: impl Fn(u64, u64) -> bool) -> Option<End> {
        use std::os::unix::fs::FileExt;
        let memory = self.memory();
        let start: Vec<u8> = (0..ARENA).map(|i| (i * 7 % 251) as u8).collect();
        memory.write_all_at(&start, self.arena).unwrap();
        let regs = libc::user_regs_struct { rip: at, ..*regs };
        ptrace(libc::PTRACE_SETREGS, self.pid, 0, &raw const regs as usize);
        let mut vectors = self.vectors;
        for (i, word) in vectors.xmm_space.iter_mut().enumerate() {
            *word = (regs.rax as u32).rotate_left(i as u32);
        }
        ptrace(libc::PTRACE_SETFPREGS, self.pid, 0, &raw const vectors as usize);
        let (mut before, mut fault) = (at, false);
        for _ in 0..64 {
            ptrace(libc::PTRACE_SINGLESTEP, self.pid, 0, 0);
            let status = self.wait();
            assert!(libc::WIFSTOPPED(status), "the stage is gone: {status:#x}");
            fault = libc::WSTOPSIG(status) != libc::SIGTRAP;
            let now = self.get();
            if fault || !inside(before, now.rip) {
                let mut arena = vec![0; ARENA];
                memory.read_exact_at(&mut arena, self.arena).unwrap();
                let rip = if fault { 0 } else { now.rip };
                let flags = now.eflags & 0xcd5;
                let r = now;
                let v = self.get_vectors();
                // Where the last x87 instruction stood is another place.
                let vectors = v.xmm_space.iter().chain(&v.st_space).map(|w| u64::from(*w));
                let control = [v.cwd, v.swd, v.ftw].into_iter().map(u64::from);
                let registers = vec![
                    r.rax, r.rbx, r.rcx, r.rdx, r.rsi, r.rdi, r.rbp, r.rsp, r.r8, r.r9, r.r10, r.r11, r.r12, r.r13,
                    r.r14, r.r15, rip, flags,
                ];
                let registers = registers.into_iter().chain(vectors).chain(control).collect();
                return Some(End { registers, arena, fault });
            }
            before = now.rip;
        }
        let _ = fault;
        None
    }
}

impl Drop for Stage {
    fn drop(&mut self) {
        // SAFETY: our own child.
        unsafe { libc::kill(self.pid, libc::SIGKILL) };
        self.wait();
    }
}

/// What runs differently each time, or is more than an experiment.
fn is_for_decoding_only(insn: &Instruction) -> bool {
    use iced_x86::Mnemonic::{
        Cpuid, Hlt, Int, Int1, Int3, Rdpid, Rdrand, Rdseed, Rdtsc, Rdtscp, Syscall, Sysenter, Ud2,
    };
    let never = [Cpuid, Hlt, Int, Int1, Int3, Rdpid, Rdrand, Rdseed, Rdtsc, Rdtscp, Syscall, Sysenter, Ud2];
    never.contains(&insn.mnemonic()) || insn.has_rep_prefix() || insn.has_repne_prefix()
}

#[derive(Default)]
struct Counts {
    functions: usize,
    compared: usize,
    executed: usize,
    faulted: usize,
    /// Thunks with one bit turned, and how many of these were told from what they should be.
    damaged: (usize, usize),
    refused: BTreeMap<String, Vec<String>>,
    wrong: Vec<String>,
}

fn check(image: &Path) -> Counts {
    use std::os::unix::fs::FileExt;
    let all = entries(image);
    let mut counts = Counts::default();
    // The longest function makes room for thunks, and is not run.
    let room = all.iter().max_by_key(|e| e.size).map(|e| (e.at, e.size)).unwrap();
    let spot = (room.0 + 15) & !15;
    let mut stage = Stage::start(image, spot).unwrap_or_else(|| panic!("{} starts", image.display()));
    let memory = stage.memory();
    for e in &all {
        counts.functions += 1;
        let thunk = match original_thunk(ProcAddr(spot), ProcAddr(e.at), &e.code) {
            Ok(thunk) => thunk,
            Err(why) => {
                let kind = format!("{why:?}").split([' ', '{']).next().unwrap_or_default().to_lowercase();
                counts.refused.entry(kind).or_default().push(e.name.clone());
                continue;
            }
        };
        let original = overwritten(e);
        let moved: Vec<Instruction> = decode(&thunk, spot).collect();
        counts.compared += 1;
        if let Err(why) = compare(&original, &moved) {
            counts.wrong.push(format!("{} at {:#x}: {why}", e.name, e.at));
            continue;
        }
        let mut damaged = thunk.clone();
        let byte = stage.random() as usize % damaged.len();
        damaged[byte] ^= 1 << (stage.random() % 8);
        let told = compare(&original, &decode(&damaged, spot).collect::<Vec<_>>()).is_err();
        counts.damaged = (counts.damaged.0 + 1, counts.damaged.1 + usize::from(told));
        if original.iter().any(is_for_decoding_only) || (room.0..room.0 + room.1).contains(&e.at) {
            continue;
        }
        let at = e.at + stage.bias;
        let there = {
            let mut bytes = vec![0; e.code.len().min(e.size as usize)];
            memory.read_exact_at(&mut bytes, at).is_ok() && bytes[..] == e.code[..bytes.len()]
        };
        // As it is loaded; what the loader changed in code is another function's.
        let placed = original_thunk(ProcAddr(stage.spot), ProcAddr(at), &e.code).unwrap();
        if !there || memory.write_all_at(&placed, stage.spot).is_err() {
            continue;
        }
        let regs = stage.state();
        let lens: BTreeMap<u64, u64> =
            original.iter().map(|i| (i.ip() + stage.bias, i.next_ip() + stage.bias)).collect();
        let here = |before: u64, now: u64| lens.get(&before) == Some(&now) && lens.contains_key(&now);
        let in_thunk = stage.spot..stage.spot + placed.len() as u64;
        // What they change in the image is put back in between.
        let data = |i: &Instruction| i.is_ip_rel_memory_operand().then(|| i.ip_rel_memory_address() + stage.bias);
        let kept: Vec<(u64, [u8; 64])> = original
            .iter()
            .filter_map(data)
            .filter_map(|at| {
                let mut bytes = [0; 64];
                memory.read_exact_at(&mut bytes, at).ok()?;
                Some((at, bytes))
            })
            .collect();
        let first = stage.run(&regs, at, here);
        kept.iter().for_each(|(at, bytes)| drop(memory.write_all_at(bytes, *at)));
        let second = stage.run(&regs, stage.spot, |_, now| in_thunk.contains(&now));
        match (first, second) {
            (Some(a), Some(b)) if a == b => {
                counts.executed += 1;
                counts.faulted += usize::from(a.fault);
            }
            (Some(a), Some(b)) => {
                let differ = a.arena.iter().zip(&b.arena).filter(|(x, y)| x != y).count();
                let what = format!("{:x?}\n  {:x?}; {differ} bytes of memory", &a.registers[..18], &b.registers[..18]);
                counts.wrong.push(format!("{} at {:#x} runs differently:\n  {what}", e.name, e.at));
            }
            _ => {}
        }
    }
    counts
}

fn own_libc() -> PathBuf {
    let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
    let line = maps.lines().find(|l| l.contains("/libc.so") || l.contains("/libc-2")).expect("a C library is loaded");
    PathBuf::from(line.split_whitespace().last().unwrap())
}

#[test]
fn a_thunk_does_what_the_code_did_that_it_was_made_from() {
    let images: Vec<PathBuf> = match std::env::var("THUNKS") {
        Ok(list) => list.split(':').map(PathBuf::from).collect(),
        Err(_) => vec![own_libc()],
    };
    let mut wrong = 0;
    println!(
        "{:28} {:>9} {:>9} {:>9} {:>8} {:>6} {:>8}  refused",
        "image", "functions", "compared", "executed", "faulted", "wrong", "noticed"
    );
    for image in &images {
        let c = check(image);
        let name = image.file_name().unwrap_or_default().to_string_lossy();
        let refused: Vec<String> = c
            .refused
            .iter()
            .map(|(why, names)| format!("{} {why} ({})", names.len(), names.first().map_or("", |n| n.as_str())))
            .collect();
        println!(
            "{name:28} {:9} {:9} {:9} {:8} {:6} {:7.1}%  {}",
            c.functions,
            c.compared,
            c.executed,
            c.faulted,
            c.wrong.len(),
            c.damaged.1 as f64 * 100.0 / c.damaged.0 as f64,
            refused.join(", ")
        );
        c.wrong.iter().take(5).for_each(|w| println!("  WRONG {w}"));
        wrong += c.wrong.len();
        // A bit that says nothing, such as one of an unused operand, is a few in a hundred.
        assert!(c.damaged.1 * 100 >= c.damaged.0 * 95, "{name}: {:?} damaged thunks were told", c.damaged);
        assert!(c.executed * 2 > c.functions, "{name}: only {} were executed", c.executed);
    }
    assert_eq!(wrong, 0);
}
