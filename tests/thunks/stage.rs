//! A program in which code is run step by step, with registers that are made up.

use std::path::Path;
use std::process::Command;

use object::Object;

/// A program that stands still, in which code is run step by step.
pub struct Stage {
    pid: i32,
    /// What each linked address becomes.
    pub bias: u64,
    /// Where thunks are put: in the image's own code, which is not run.
    pub spot: u64,
    arena: u64,
    registers: libc::user_regs_struct,
    vectors: libc::user_fpregs_struct,
    seed: u64,
}

/// Bytes of the memory that registers point into.
const ARENA: usize = 16 << 10;

/// How a run of a few instructions ended.
#[derive(PartialEq)]
pub struct End {
    pub registers: Vec<u64>,
    pub arena: Vec<u8>,
    pub fault: bool,
}

fn ptrace(request: libc::c_uint, pid: i32, addr: usize, data: usize) -> libc::c_long {
    // SAFETY: `addr` and `data` are numbers, or point to what the request reads or writes, alive for the call.
    unsafe { libc::ptrace(request, pid, addr, data) }
}

impl Stage {
    /// Starts the image, or a program that is linked to it.
    pub fn start(image: &Path, spot: u64) -> Option<Self> {
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

    pub fn memory(&self) -> std::fs::File {
        std::fs::OpenOptions::new().read(true).write(true).open(format!("/proc/{}/mem", self.pid)).unwrap()
    }

    pub fn random(&mut self) -> u64 {
        self.seed ^= self.seed << 13;
        self.seed ^= self.seed >> 7;
        self.seed ^= self.seed << 17;
        self.seed
    }

    /// Registers that point into the arena, or are small numbers; some flags.
    pub fn state(&mut self) -> libc::user_regs_struct {
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
    pub fn run(&self, regs: &libc::user_regs_struct, at: u64, inside: impl Fn(u64, u64) -> bool) -> Option<End> {
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
