//! The original thunk: the instructions that an entry jump overwrites, moved. For every function of real images, each thunk is held
//! against what it was made from in two ways, neither of which knows how it was made: decoded and compared instruction by instruction; and
//! executed, with random registers, beside the original in its own place in its own process.
//!
//! That the comparison can fail is tried, too, on thunks with one bit turned.
//!
//! `THUNKS=FILE:FILE…` names the images (default: the C library that this test uses); `./ci/thunks` tries them all.
#![allow(unsafe_code)]

#[path = "thunks/stage.rs"]
mod stage;
mod support;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use iced_x86::{Code, Decoder, DecoderOptions, FlowControl, Instruction, OpKind, Register};
use livepatch::addr::ProcAddr;
use livepatch::insn::{original_thunk, whole_thunk, OVERWRITTEN};
use object::{Object, ObjectSection, ObjectSymbol, SymbolKind};
use stage::Stage;

/// Bytes of `jmp rel32`.
const JUMP: u64 = 5;

/// A function's code from its entry on, at the address that the image is linked to.
struct Entry {
    name: String,
    at: u64,
    /// Bytes that belong to the function.
    size: u64,
    code: Vec<u8>,
    /// All of them, if some branch leads back to the entry.
    looping: Vec<u8>,
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
        let body = &code[..code.len().min(size as usize)];
        let back =
            |i: Instruction| is_near(&i) && i.flow_control() != FlowControl::Call && i.near_branch_target() == at;
        let looping = if decode(body, at).any(back) { body.to_vec() } else { Vec::new() };
        let code = code[..code.len().min(OVERWRITTEN)].to_vec();
        let name = s.name().unwrap_or("?").to_owned();
        out.entry(at).or_insert(Entry { name, at, size, code, looping });
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

/// Holds a function that was moved whole against the function: the same instructions in the same order, each branch within it to the
/// copy of where it led, all others to where they did.
fn compare_whole(original: &[Instruction], moved: &[Instruction]) -> Result<(), String> {
    let jump = moved.last().ok_or("nothing")?;
    let behind = original.last().is_some_and(|o| is_near(jump) && jump.near_branch_target() == o.next_ip());
    if original.len() + 1 != moved.len() || !behind {
        return Err(format!("{} instructions became {}", original.len(), moved.len()));
    }
    let place = |to: u64| original.iter().position(|i| i.ip() == to);
    for (o, m) in original.iter().zip(moved) {
        let inner = Some(o).filter(|o| is_near(o)).and_then(|o| place(o.near_branch_target()));
        let right = match inner {
            Some(i) => {
                let target = moved.get(i).map(Instruction::ip);
                is_near(m) && m.mnemonic() == o.mnemonic() && Some(m.near_branch_target()) == target
            }
            None => same(o, m),
        };
        if !right {
            return Err(format!("{o} became {m}"));
        }
    }
    Ok(())
}

/// Moves a looping function whole, holds the copy against it, and runs both.
fn check_whole(e: &Entry, stage: &mut Stage, counts: &mut Counts) {
    use std::os::unix::fs::FileExt;
    let memory = stage.memory();
    let at = ProcAddr(e.at + stage.bias);
    let moved = match whole_thunk(ProcAddr(stage.spot), at, at, &e.looping) {
        Ok(code) => code,
        Err(why) => {
            counts.whole_refused.push(format!("{} ({why})", e.name));
            return;
        }
    };
    let original: Vec<Instruction> = decode(&e.looping, at.0).collect();
    if let Err(why) = compare_whole(&original, &decode(&moved, stage.spot).collect::<Vec<_>>()) {
        counts.wrong.push(format!("{} at {:#x}, moved whole: {why}", e.name, e.at));
        return;
    }
    counts.whole.0 += 1;
    let mut there = vec![0; e.looping.len()];
    let same = memory.read_exact_at(&mut there, at.0).is_ok() && there == e.looping;
    if !same || original.iter().any(is_for_decoding_only) || memory.write_all_at(&moved, stage.spot).is_err() {
        return;
    }
    let regs = stage.state();
    let (body, copy) = (at.0..at.0 + e.looping.len() as u64, stage.spot..stage.spot + moved.len() as u64);
    let first = stage.run(&regs, at.0, |_, now| body.contains(&now));
    let second = stage.run(&regs, stage.spot, |_, now| copy.contains(&now));
    let (Some(a), Some(b)) = (first, second) else { return };
    counts.whole.1 += 1;
    if a != b {
        counts.wrong.push(format!("{} at {:#x}, moved whole, runs differently", e.name, e.at));
    }
}

/// What runs differently each time, or is more than an experiment; and what stores where the last x87 instruction stood.
fn is_for_decoding_only(insn: &Instruction) -> bool {
    use iced_x86::Mnemonic::{
        Cpuid, Fnsave, Fnstenv, Fxsave, Fxsave64, Hlt, Int, Int1, Int3, Rdpid, Rdrand, Rdseed, Rdtsc, Rdtscp, Syscall,
        Sysenter, Ud2,
    };
    let never = [
        Cpuid, Fnsave, Fnstenv, Fxsave, Fxsave64, Hlt, Int, Int1, Int3, Rdpid, Rdrand, Rdseed, Rdtsc, Rdtscp, Syscall,
        Sysenter, Ud2,
    ];
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
    /// Functions whose loop goes back to the entry: moved whole and compared; run; refused.
    whole: (usize, usize),
    whole_refused: Vec<String>,
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
        if !e.looping.is_empty() && !(room.0..room.0 + room.1).contains(&e.at) && (e.looping.len() as u64) * 6 < room.1
        {
            check_whole(e, &mut stage, &mut counts);
        }
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
        // A bit that the processor does not look at, such as one of an unused prefix, makes no other instruction.
        let damaged = loop {
            let mut damaged = thunk.clone();
            let byte = stage.random() as usize % damaged.len();
            damaged[byte] ^= 1 << (stage.random() % 8);
            let damaged: Vec<Instruction> = decode(&damaged, spot).collect();
            if damaged != moved {
                break damaged;
            }
        };
        let told = compare(&original, &damaged).is_err();
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
        println!(
            "{:28} with a loop to the entry: {} moved whole, {} run beside the original, {} refused{}",
            "",
            c.whole.0,
            c.whole.1,
            c.whole_refused.len(),
            c.whole_refused.first().map_or(String::new(), |f| format!(", such as {f}"))
        );
        c.wrong.iter().take(5).for_each(|w| println!("  WRONG {w}"));
        wrong += c.wrong.len();
        // The rest are other spellings of the same instruction.
        assert!(c.damaged.1 * 100 >= c.damaged.0 * 99, "{name}: {:?} damaged thunks were told", c.damaged);
        assert!(c.executed * 2 > c.functions, "{name}: only {} were executed", c.executed);
    }
    assert_eq!(wrong, 0);
}
