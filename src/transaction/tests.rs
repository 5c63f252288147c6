use std::time::{Duration, Instant};

use super::*;
use crate::addr::ImageAddr;
use crate::addr::LoadBias;
use crate::maps::Mapping;
use crate::memory::Unreadable;
use crate::patch::HexBytes;
use crate::patch::PatchFile;
use crate::patch::{BuildRef, Entry, Function, Manifest, OldFunction, Segment, SegmentKind, Status};
use crate::plan::sites::Switch;
use crate::plan::{Links, OldFacts};
use crate::process::fake::FakeProcess;
use crate::process::{HeldThread, Registers, Tid, RSP};
use crate::quiesce::{Checker, StackMap};
use crate::registry;
use crate::stack::WatchList;

const IMAGE: u64 = 0x5555_5555_0000;
const STACK: u64 = 0x7fff_0000_0000;
const BODY: [u8; 8] = [0x48, 0x89, 0xf8, 0x48, 0x01, 0xf0, 0xc3, 0x90];

fn function(i: u64) -> Function {
    use sha2::Digest;
    Function {
        name: format!("f{i}"),
        demangled: format!("f{i}"),
        status: Status::Changed,
        reason: "test".into(),
        new_at: i * 16,
        new_size: 8,
        source: None,
        address_taken: false,
        old: Some(OldFunction {
            at: ImageAddr(0x100 + i * 16),
            size: 7,
            sha256: HexBytes(sha2::Sha256::digest(&BODY[..7]).to_vec()),
            branches_to_entry: false,
            companions: Vec::new(),
            entry: Some(Entry { at: ImageAddr(0x100 + i * 16), original: HexBytes(BODY[..5].to_vec()), padding: 0 }),
            entry_beside: None,
        }),
    }
}

fn patch() -> PatchFile {
    let build = BuildRef { build_id: HexBytes(vec![1]), file: "f".into() };
    PatchFile {
        manifest: Manifest {
            format: 1,
            name: "p".into(),
            builder: "t".into(),
            target: build.clone(),
            new: build,
            functions: (0..3).map(function).collect(),
            statics: Vec::new(),
            types: String::new(),
            may_unwind: false,
            allowances: Vec::new(),
            ..Manifest::default()
        },
        segments: vec![
            Segment { kind: SegmentKind::Text, at: 0, len_bytes: 48, data: vec![0xc3; 48] },
            Segment { kind: SegmentKind::Rodata, at: 4096, len_bytes: 8, data: vec![0; 8] },
            Segment { kind: SegmentKind::Data, at: 8192, len_bytes: 8, data: vec![5; 8] },
        ],
        relocs: Vec::new(),
        eh_frame: Some((4096, 4)),
        digest: [9; 32],
    }
}

fn process() -> FakeProcess {
    let mut p = FakeProcess::default();
    let mut code = vec![0xcc; 0x1000];
    for i in 0..3 {
        code[0x100 + i * 16..][..8].copy_from_slice(&BODY);
    }
    p.insert(ProcAddr(IMAGE), code, Access::Execute);
    p.insert(ProcAddr(STACK), vec![0; 0x1000], Access::Write);
    let mut registers = Registers { pc: ProcAddr(0x9999), fs_base: ProcAddr(STACK + 0xf00), ..Registers::default() };
    registers.general[RSP] = STACK + 0xe00;
    p.threads.push(HeldThread { tid: Tid(1), is_main: false, registers });
    p
}

fn target() -> Target {
    Target {
        links: Links { bias: LoadBias(IMAGE), ..Links::default() },
        range: ProcRange::new(ProcAddr(IMAGE), 0x1000).unwrap(),
    }
}

struct Anyone;

impl IdleCheck for Anyone {
    fn is_idle(&mut self, _: &HeldThread, _: &dyn ReadMemory) -> bool {
        true
    }
}

const LIMITS: HoldLimits = HoldLimits { deadline: Duration::from_millis(100) };

fn soon() -> Instant {
    Instant::now() + Duration::from_secs(1)
}

fn apply(p: &mut FakeProcess, planned: Planned) -> Result<Committed, TransactionError> {
    apply_as(p, planned, 1)
}

/// As the use case does it: to the switch stubs, the switch, straight on; or back.
fn apply_as(p: &mut FakeProcess, planned: Planned, sequence: u64) -> Result<Committed, TransactionError> {
    let stacks = StackMap::new(&p.mappings()?);
    let mut staged = planned.stage(p, soon())?;
    staged.register(ProcAddr(0x4444), &mut Anyone, soon())?;
    let leads = staged.leads().to_vec();
    let windows = WatchList::new(staged.windows());
    let with_stubs = WatchList::new(staged.windows_and_stubs());
    let checker = |watch| Checker::new(watch, &stacks, None);
    staged.set_led(!leads.is_empty());
    let led = rewrite(staged.process(), &leads, LIMITS, &mut checker(&windows));
    let watch = WatchList::new(staged.watched());
    let committed = match led {
        Ok(_) => staged.commit(LIMITS, &mut checker(&watch), Stamp { sequence, applied_at_s: 2, ..Stamp::default() }),
        Err(e) => Err(Box::new((staged, e))),
    };
    let committed = committed.map_err(|failed| {
        let (mut staged, e) = *failed;
        let back = undone(staged.process(), &leads);
        let done = rewrite(staged.process(), &back, LIMITS, &mut checker(&with_stubs)).is_ok();
        staged.set_led(!done);
        e
    })?;
    // What fails here changes nothing: the stubs lead to the new code.
    let _ = rewrite(p, &committed.rest, LIMITS, &mut checker(&windows));
    Ok(committed)
}

fn revert(p: &mut FakeProcess) -> Result<Reverted, TransactionError> {
    let found = registry::find(p, &p.mappings()?).map_err(|_| Unreadable { at: ProcAddr(0), len_bytes: 0 });
    let Some(found) = found.ok().and_then(|mut f| f.pop()) else {
        return Err(ProcessError::Gone(p.pid()).into());
    };
    let applied = Applied::new(found)?;
    let stacks = StackMap::new(&p.mappings()?);
    let watch = WatchList::new(applied.watched());
    let windows = WatchList::new(applied.windows());
    let checker = |watch| Checker::new(watch, &stacks, None);
    let (leads, rest) = (applied.leads().to_vec(), applied.rest());
    let led = rewrite(p, &leads, LIMITS, &mut checker(&windows));
    let reverted = led.and_then(|_| applied.revert(p, LIMITS, &mut checker(&watch)).map_err(|e| e.1));
    match &reverted {
        Ok(_) => drop(rewrite(p, &rest, LIMITS, &mut checker(&windows))),
        Err(_) => {
            let back = undone(p, &leads);
            let _ = rewrite(p, &back, LIMITS, &mut checker(&windows));
        }
    }
    reverted
}

fn facts() -> [OldFacts; 3] {
    std::array::from_fn(|_| OldFacts { overwritten: BODY.to_vec(), ..OldFacts::default() })
}

fn planned(p: &FakeProcess) -> Planned {
    let all: Vec<Mapping> = p.mappings().unwrap();
    Planned::new(&patch(), &target(), &all, &facts(), None, Switch::All).unwrap()
}

/// How many entries lead to new code, by themselves or by their switch stubs.
fn jumps(p: &FakeProcess) -> usize {
    let records = registry::find(p, &p.mappings().unwrap()).unwrap();
    let mut count = 0;
    for at in (0u64..3).map(|i| ProcAddr(IMAGE + 0x100 + i * 16)) {
        let bytes = p.read_vec(at, 8).unwrap();
        assert!(bytes == BODY || (bytes[0] == 0xe9 && bytes[5..] == BODY[5..]), "torn entry {bytes:x?}");
        let Some(to) = leads_to(p, at) else { continue };
        let stubs_of = |f: &&Found| f.payload.stub <= to && to < f.payload.base;
        count += usize::from(records.iter().find(stubs_of).is_none_or(|f| f.mutable.state == State::Applied));
    }
    count
}

fn state(p: &FakeProcess) -> Option<State> {
    let maps = p.mappings().unwrap();
    registry::find(p, &maps).unwrap().first().map(|f| f.mutable.state)
}

#[test]
fn applied_and_reverted_and_applied_again() {
    let mut p = process();
    let plan = planned(&p);
    let region = plan.region();
    let done = apply(&mut p, plan).unwrap();
    assert_eq!((done.entries, jumps(&p), state(&p)), (3, 3, Some(State::Applied)));
    assert_eq!(p.called.len(), 1);
    assert_eq!(revert(&mut p).unwrap().entries, 3);
    assert_eq!((jumps(&p), state(&p)), (0, Some(State::Reverted)));
    // The patch's data keep their values.
    let data = ProcAddr(region.end.0 - 4096);
    p.adopt(region);
    p.write_own(data, &[6; 8]).unwrap();
    let found = registry::find(&p, &p.mappings().unwrap()).unwrap().remove(0);
    let again = Planned::again(&patch(), &target().links, &found, &facts(), None).unwrap();
    apply(&mut p, again).unwrap();
    assert_eq!((jumps(&p), p.called.len(), p.read_vec(data, 8).unwrap()), (3, 1, vec![6; 8]));
}

#[test]
fn a_failure_at_any_operation_leaves_all_old() {
    for torn in [false, true] {
        for n in 0.. {
            assert!(n < 200, "the loop must end");
            let mut p = process();
            let plan = planned(&p);
            p.torn_writes = torn;
            p.fail_at(n);
            let result = apply(&mut p, plan);
            let failed = p.has_failed();
            let mut clean = p;
            clean.fail_at(u32::MAX);
            match (&result, state(&clean)) {
                (Ok(_), Some(State::Applied)) => assert_eq!(jumps(&clean), 3, "operation {n}"),
                (Err(_), None | Some(State::Staged)) => assert_eq!(jumps(&clean), 0, "operation {n}"),
                (result, state) => panic!("operation {n}: {result:?} and {state:?}"),
            }
            if !failed {
                assert!(result.is_ok());
                break;
            }
        }
    }
}

#[test]
fn a_failure_at_any_operation_of_a_revert_leaves_all_new_or_all_old() {
    for torn in [false, true] {
        for n in 0.. {
            assert!(n < 200, "the loop must end");
            let mut p = process();
            let plan = planned(&p);
            apply(&mut p, plan).unwrap();
            p.torn_writes = torn;
            p.fail_at(n);
            let result = revert(&mut p);
            let failed = p.has_failed();
            p.fail_at(u32::MAX);
            match (&result, state(&p)) {
                (Ok(_), Some(State::Reverted)) => assert_eq!(jumps(&p), 0, "operation {n}"),
                (Err(_), Some(State::Applied)) => assert_eq!(jumps(&p), 3, "operation {n}"),
                (result, state) => panic!("operation {n}: {result:?} and {state:?}"),
            }
            if !failed {
                break;
            }
        }
    }
}

#[test]
fn a_thread_inside_stops_both_ways() {
    let mut p = process();
    let plan = planned(&p);
    p.threads[0].registers.pc = ProcAddr(IMAGE + 0x103);
    assert!(matches!(apply(&mut p, plan), Err(TransactionError::Hold(HoldError::NotClear(Tid(1))))));
    assert_eq!(jumps(&p), 0);
    p.threads[0].registers.pc = ProcAddr(0x9999);
    let found = registry::find(&p, &p.mappings().unwrap()).unwrap();
    assert_eq!(found.len(), 1, "registered tables keep the mapping");
    let again = Planned::again(&patch(), &target().links, &found[0], &facts(), None).unwrap();
    apply(&mut p, again).unwrap();
    p.threads[0].registers.pc = found[0].payload.base;
    assert!(revert(&mut p).is_err(), "the first byte of new code counts");
    assert_eq!(jumps(&p), 3);
}

#[test]
fn changed_entries_are_not_touched() {
    let mut p = process();
    let plan = planned(&p);
    p.adopt(target().range);
    p.write_own(ProcAddr(IMAGE + 0x110), &[0xcc]).unwrap();
    let e = apply(&mut p, plan).unwrap_err();
    assert!(matches!(e, TransactionError::Swap(SwapError::Changed { breakpoint: true, .. })), "{e}");
}

/// A second patch, built after the first: it replaces `f1` and `f2` only, and `f0` of the first leads to its own.
fn second() -> PatchFile {
    let mut second = patch();
    second.digest = [8; 32];
    second.manifest.name = "second".into();
    second.manifest.functions.remove(0);
    second.manifest.after =
        Some(crate::patch::After { name: "p".into(), digest: HexBytes(vec![9; 32]), before: Vec::new() });
    second.manifest.redirects =
        vec![crate::patch::Redirect { name: "f0".into(), at: 0, held: None, size: 8, new_at: 0 }];
    second
}

fn take_over(p: &FakeProcess) -> Planned {
    let all: Vec<Mapping> = p.mappings().unwrap();
    let found = registry::find(p, &all).unwrap().remove(0);
    let mut target = target();
    target.links.previous = vec![found.payload.base];
    let chain = target.links.previous.clone();
    let code = found.payload.entries.iter().map(|e| (e.at, BODY.to_vec()));
    let code = code.chain([(chain[0], p.read_vec(chain[0], 19).unwrap())]).collect();
    Planned::new(&second(), &target, &all, &facts()[1..], Some(Replaced { found, chain, code }), Switch::All).unwrap()
}

/// Where the jump at `at` leads, if there is one.
fn leads_to(p: &FakeProcess, at: ProcAddr) -> Option<ProcAddr> {
    let bytes = p.read_vec(at, 5).unwrap();
    let distance = i32::from_le_bytes(bytes[1..].try_into().unwrap());
    (bytes[0] == 0xe9).then(|| ProcAddr((at.0 + 5).wrapping_add_signed(i64::from(distance))))
}

/// Where a call of `at` ends up: in a function of a patch, by a jump or by the way through a switch stub that its word tells;
/// or in the code that stands there.
fn ends_up(p: &FakeProcess, at: ProcAddr) -> Option<ProcAddr> {
    use iced_x86::{Code, Decoder, DecoderOptions};
    let to = leads_to(p, at)?;
    let records = registry::find(p, &p.mappings().unwrap()).unwrap();
    if !records.iter().any(|f| f.payload.stub <= to && to < f.payload.base) {
        return Some(to);
    }
    let code = p.read_vec(to, crate::insn::STUB_BYTES).unwrap();
    let mut decoder = Decoder::with_ip(64, &code, to.0, DecoderOptions::NONE);
    let compare = decoder.iter().nth(2).unwrap();
    let word = p.read_vec(ProcAddr(compare.ip_rel_memory_address()), 4).unwrap();
    let branch = decoder.decode();
    assert_eq!(branch.code(), Code::Jne_rel8_64);
    if word != u32::from(compare.immediate8()).to_le_bytes() {
        decoder.set_position((branch.near_branch_target() - to.0) as usize).unwrap();
        decoder.set_ip(branch.near_branch_target());
    }
    let way = decoder.iter().nth(2).unwrap();
    (way.code() == Code::Jmp_rel32_64).then(|| ProcAddr(way.near_branch_target()))
}

#[test]
fn a_patch_takes_the_place_of_another_or_nothing_changes() {
    for torn in [false, true] {
        for n in 0.. {
            assert!(n < 400, "the loop must end");
            let mut p = process();
            let plan = planned(&p);
            apply(&mut p, plan).unwrap();
            let first = registry::find(&p, &p.mappings().unwrap()).unwrap().remove(0);
            let plan = take_over(&p);
            let region = plan.region();
            p.torn_writes = torn;
            p.fail_at(n);
            let result = apply_as(&mut p, plan, 2);
            let failed = p.has_failed();
            p.fail_at(u32::MAX);
            let state = |p: &FakeProcess, digest: u8| {
                let all = registry::find(p, &p.mappings().unwrap()).unwrap();
                all.iter().find(|f| f.payload.digest.0 == [digest; 32]).map(|f| f.mutable.state)
            };
            let entries: Vec<_> = (0..3).map(|i| ends_up(&p, ProcAddr(IMAGE + 0x100 + i * 16))).collect();
            let redirect = ends_up(&p, first.payload.base);
            match result {
                Ok(_) => {
                    assert_eq!((state(&p, 9), state(&p, 8)), (Some(State::Reverted), Some(State::Applied)));
                    assert_eq!(entries[0], None, "what the second does not replace is the old one again");
                    assert!(entries[1..].iter().all(|e| e.is_some_and(|at| region.contains(at))));
                    assert!(redirect.is_some_and(|at| region.contains(at)));
                }
                Err(_) => {
                    assert_eq!(state(&p, 9), Some(State::Applied), "operation {n}");
                    assert!(matches!(state(&p, 8), None | Some(State::Staged)), "operation {n}");
                    assert!(entries.iter().all(|e| e.is_some_and(|at| first.region.contains(at))), "operation {n}");
                    assert_eq!(redirect, None, "operation {n}");
                }
            }
            if !failed {
                // And back: all old, and the first patch's code as it was.
                assert_eq!(revert(&mut p).unwrap().entries, 3);
                assert_eq!((jumps(&p), leads_to(&p, first.payload.base)), (0, None));
                assert_eq!((state(&p, 9), state(&p, 8)), (Some(State::Reverted), Some(State::Reverted)));
                break;
            }
        }
    }
}

#[test]
fn a_thread_inside_the_patch_below_stops_the_one_that_takes_its_place() {
    let mut p = process();
    let plan = planned(&p);
    apply(&mut p, plan).unwrap();
    let first = registry::find(&p, &p.mappings().unwrap()).unwrap().remove(0);
    let plan = take_over(&p);
    // In `f0` of the first, which the second does not replace.
    p.threads[0].registers.pc = ProcAddr(first.payload.base.0 + 1);
    assert!(matches!(apply_as(&mut p, plan, 2), Err(TransactionError::Hold(HoldError::NotClear(Tid(1))))));
    assert_eq!(jumps(&p), 3);
}

/// What livepatch left in a process before `--after` switched by one word: the address of a record and its bytes, taken from a
/// real process (two functions, applied).
const REGISTRY_V1: &[u8] = include_bytes!("../../tests/golden/registry-v1.bin");

#[test]
fn a_record_of_the_first_version_is_read_and_reverted() {
    let (at, record) = REGISTRY_V1.split_first_chunk::<8>().unwrap();
    let at = ProcAddr(u64::from_le_bytes(*at));
    let (header, payload) = registry::decode(record).unwrap();
    assert_eq!((record[16], header.mutable.state, payload.jumps()), (1, State::Applied, 2));
    let mut p = process();
    let mut region = record.to_vec();
    region.resize(header.region_bytes as usize, 0);
    p.insert(at, region, Access::Read);
    let page = payload.entries[0].at.0 & !0xfff;
    let mut code = vec![0xcc; 0x1000];
    for e in &payload.entries {
        code[(e.at.0 - page) as usize..][..5].copy_from_slice(&e.jump.0);
    }
    p.insert(ProcAddr(page), code, Access::Execute);
    assert_eq!(revert(&mut p).unwrap().entries, 2);
    for e in &payload.entries {
        assert_eq!(p.read_vec(e.at, 5).unwrap(), e.original.0, "{}", e.function);
    }
    assert_eq!(state(&p), Some(State::Reverted));
}
