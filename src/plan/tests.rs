use super::*;
use crate::addr::ImageAddr;
use crate::patch::{BuildRef, Entry, HexBytes, Manifest, OldFunction, Reloc, Segment, Status};

fn patch() -> PatchFile {
    let build = BuildRef { build_id: HexBytes(vec![1]), file: "f".into() };
    PatchFile {
        manifest: Manifest {
            format: 1,
            name: "p".into(),
            builder: "t".into(),
            target: build.clone(),
            new: build,
            functions: Vec::new(),
            statics: Vec::new(),
            types: String::new(),
            may_unwind: false,
            allowances: Vec::new(),
            ..Manifest::default()
        },
        segments: vec![
            Segment { kind: SegmentKind::Text, at: 0, len_bytes: 32, data: vec![0x90; 32] },
            Segment { kind: SegmentKind::Data, at: 4096, len_bytes: 5000, data: vec![0; 16] },
        ],
        relocs: Vec::new(),
        eh_frame: None,
        digest: [0; 32],
    }
}

fn mapping(start: u64, end: u64) -> Mapping {
    let range = ProcRange { start: ProcAddr(start), end: ProcAddr(end) };
    Mapping { range, read: true, write: false, execute: false, shared: false, offset: 0, inode: 0, name: String::new() }
}

fn function(code: &[u8], padding: u64) -> Function {
    use sha2::Digest;
    let size = code.len() as u64 - padding;
    Function {
        name: "f".into(),
        demangled: "f".into(),
        status: Status::Changed,
        reason: String::new(),
        new_at: 16,
        new_size: 1,
        source: None,
        address_taken: false,
        old: Some(OldFunction {
            at: ImageAddr(0x1000),
            size,
            sha256: HexBytes(sha2::Sha256::digest(&code[..size as usize]).to_vec()),
            branches_to_entry: false,
            companions: Vec::new(),
            entry: Some(Entry { at: ImageAddr(0x1000), original: HexBytes(code[..5].to_vec()), padding }),
            entry_beside: None,
        }),
    }
}

#[test]
fn a_pie_gets_its_patch_below_and_a_fixed_program_above() {
    let pie = ProcRange { start: ProcAddr(0x5555_5555_4000), end: ProcAddr(0x5555_5565_4000) };
    let maps = [mapping(pie.start.0, pie.end.0), mapping(0x5555_5565_5000, 0x5555_5575_5000)];
    let layout = Layout::near(pie, &maps, 100, 0, &patch()).unwrap();
    assert!(layout.region.end.0 <= pie.start.0 - BELOW && layout.region.start.0 > pie.end.0 - REACH);
    assert_eq!(layout.region.len_bytes(), 2 * PAGE + patch().len_bytes());
    let fixed = ProcRange { start: ProcAddr(0x40_0000), end: ProcAddr(0x50_0000) };
    let maps = [mapping(fixed.start.0, fixed.end.0), mapping(0x60_0000, 0x70_0000)];
    let layout = Layout::near(fixed, &maps, 100, 0, &patch()).unwrap();
    assert!(layout.region.start.0 > 0x70_0000 && layout.region.end.0 <= fixed.start.0 + REACH);
}

#[test]
fn no_room_is_a_refusal() {
    let image = ProcRange { start: ProcAddr(0x5555_5555_4000), end: ProcAddr(0x5555_5565_4000) };
    let all = [mapping(image.start.0 - (4 << 30), image.end.0 + (4 << 30))];
    assert!(matches!(Layout::near(image, &all, 1, 0, &patch()), Err(Refusal::NoRoom { .. })));
    assert!(matches!(Layout::near(image, &[], u64::MAX, 0, &patch()), Err(Refusal::NoRoom { .. })));
}

#[test]
fn relocations_are_stored_or_refused() {
    let mut patch = patch();
    let reloc = |at, kind, target, addend| Reloc { at, kind, target, addend };
    patch.relocs = vec![
        reloc(1, RelocKind::Pc32, RelocTarget::Image(ImageAddr(0x10)), -4),
        reloc(8, RelocKind::Abs64, RelocTarget::Patch(4096), 8),
        reloc(4096, RelocKind::Abs64, RelocTarget::Image(ImageAddr(0x20)), 0),
    ];
    let bias = LoadBias(0x10_0000);
    let layout = Layout::at(ProcAddr(0x20_0000), 1, 0, &patch).unwrap();
    let links = Links { bias, ..Links::default() };
    let pieces = pieces(&patch, &layout, &links, &sites::Stubs::default()).unwrap();
    let text = &pieces[1].bytes;
    let rel = i32::from_le_bytes(text[1..5].try_into().unwrap());
    assert_eq!(layout.base.0.wrapping_add(1).wrapping_add_signed(rel.into()), 0x10_0010 - 4);
    assert_eq!(text[8..16], (layout.base.0 + 4096 + 8).to_le_bytes());
    assert_eq!(pieces[2].bytes[..8], 0x10_0020u64.to_le_bytes());
    assert_eq!((pieces[1].access, pieces[2].access), (Access::Execute, Access::Write));
    let far = Layout::at(ProcAddr(0x20_0000 + (3 << 30)), 1, 0, &patch).unwrap();
    assert!(matches!(super::pieces(&patch, &far, &links, &sites::Stubs::default()), Err(Refusal::OutOfReach { .. })));
    let mut under = patch.clone();
    under.relocs = vec![reloc(8, RelocKind::Abs64, RelocTarget::Image(ImageAddr(0)), i64::MIN)];
    assert!(matches!(
        super::pieces(&under, &layout, &Links::default(), &sites::Stubs::default()),
        Err(Refusal::OutOfReach { .. })
    ));
}

#[test]
fn changed_code_is_refused_and_a_breakpoint_named() {
    let code = [0x48, 0x89, 0xf8, 0x48, 0x01, 0xf0, 0xc3];
    let f = function(&code, 0);
    let check = |bytes: &[u8]| check_old_code(&f, LoadBias(0x1000), &[bytes.to_vec()]).map(|f| f.branches_to_entry);
    assert_eq!(check(&code), Ok(false));
    let mut changed = code;
    changed[4] ^= 1;
    assert!(matches!(check(&changed), Err(Refusal::CodeChanged { at: ProcAddr(0x2000), breakpoint: false, .. })));
    changed[0] = 0xcc;
    assert!(matches!(check(&changed), Err(Refusal::CodeChanged { breakpoint: true, .. })));
    assert!(matches!(check(&[]), Err(Refusal::CodeChanged { .. })));
}

#[test]
fn a_short_function_needs_padding() {
    let short = [0x89, 0xf8, 0xc3, 0x90, 0x90];
    let facts = check_old_code(&function(&short, 2), LoadBias(0), &[short.to_vec()]).unwrap();
    assert_eq!(facts, OldFacts { overwritten: short.to_vec(), ..OldFacts::default() });
    let used = [0x89, 0xf8, 0xc3, 0x55, 0x53];
    assert!(matches!(
        check_old_code(&function(&used, 2), LoadBias(0), &[used.to_vec()]),
        Err(Refusal::EntryTooShort { .. })
    ));
}

#[test]
fn branches_to_the_entry_are_recomputed() {
    let looping = [0xff, 0xcf, 0x75, 0xfc, 0x90, 0xc3];
    assert!(check_old_code(&function(&looping, 0), LoadBias(0), &[looping.to_vec()]).unwrap().branches_to_entry);
    let into = [0x55, 0xff, 0xcf, 0x75, 0xfc, 0x5d, 0xc3];
    assert!(matches!(
        check_old_code(&function(&into, 0), LoadBias(0), &[into.to_vec()]),
        Err(Refusal::BranchIntoEntry { .. })
    ));
}
