//! For the engine's tests: small C programs, and a writer of patches that needs no patch-builder. It takes the new code
//! from an object file and the old addresses from the running build's symbol table.
#![allow(dead_code)]

use std::collections::HashMap;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdout, Command, Stdio};

use livepatch::addr::ImageAddr;
use livepatch::patch::{
    After, BuildRef, Companion, Entry, Function, HexBytes, Manifest, OldFunction, PatchFile, Status, ENTRY_JUMP_LEN,
    FORMAT_VERSION, MANIFEST_SECTION, NOTE_NAME, NOTE_TYPE_TARGET, SHN_TARGET_IMAGE,
};
use object::{Object, ObjectSection, ObjectSymbol, RelocationFlags, RelocationTarget, SectionKind, SymbolKind};
use sha2::Digest;

/// A folder of its own for one test, below target/.
pub fn folder(test: &str) -> PathBuf {
    let path = PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join(test);
    std::fs::create_dir_all(&path).unwrap();
    path
}

/// Compiles C source with more flags.
pub fn gcc(folder: &Path, out: &str, source: &str, flags: &[&str]) -> PathBuf {
    let input = folder.join(format!("{out}.c"));
    std::fs::write(&input, source).unwrap();
    let output = folder.join(out);
    let status = Command::new("gcc")
        .args(["-O2", "-g", "-pthread", "-fasynchronous-unwind-tables", "-Wl,--build-id", "-o"])
        .arg(&output)
        .arg(&input)
        .args(flags)
        .status()
        .expect("gcc is needed");
    assert!(status.success());
    output
}

/// A process that ends with the test.
pub struct Target {
    child: Child,
    lines: BufReader<ChildStdout>,
}

impl Target {
    /// Starts a program and waits for its first line.
    pub fn start(program: &Path, args: &[&str]) -> Self {
        let mut child = Command::new(program).args(args).stdout(Stdio::piped()).stdin(Stdio::piped()).spawn().unwrap();
        let lines = BufReader::new(child.stdout.take().unwrap());
        let mut target = Self { child, lines };
        target.line();
        target
    }

    pub fn pid(&self) -> i32 {
        self.child.id().cast_signed()
    }

    /// The next line that it prints.
    pub fn line(&mut self) -> String {
        let mut line = String::new();
        self.lines.read_line(&mut line).unwrap();
        assert!(!line.is_empty(), "the target has ended: {:?}", self.child.try_wait());
        line.trim().to_owned()
    }

    /// Sends it a line and gives its answer.
    pub fn ask(&mut self, question: &str) -> String {
        use std::io::Write;
        writeln!(self.child.stdin.as_mut().unwrap(), "{question}").unwrap();
        self.line()
    }

    pub fn is_alive(&mut self) -> bool {
        self.child.try_wait().unwrap().is_none()
    }
}

impl Drop for Target {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// The GNU build-id of a file.
pub fn build_id(file: &Path) -> Vec<u8> {
    let bytes = std::fs::read(file).unwrap();
    object::File::parse(&*bytes).unwrap().build_id().unwrap().unwrap().to_vec()
}

struct Old {
    bytes: Vec<u8>,
}

impl Old {
    fn file(&self) -> object::File<'_> {
        object::File::parse(&*self.bytes).unwrap()
    }

    fn code(&self, at: u64, size: u64) -> Vec<u8> {
        let file = self.file();
        let section = file.sections().find(|s| s.address() <= at && at < s.address() + s.size()).unwrap();
        let offset = (at - section.address()) as usize;
        section.data().unwrap()[offset..offset + size as usize].to_vec()
    }
}

/// What a patch is made of.
pub struct Recipe<'a> {
    pub name: &'a str,
    pub old: &'a Path,
    /// An object file, compiled with `-fpie -fno-plt`.
    pub object: &'a Path,
    /// Functions to replace.
    pub replace: &'a [&'a str],
    pub may_unwind: bool,
    /// The patch whose place it takes.
    pub after: Option<&'a Path>,
}

/// Name, type, flags, address, offset, size, link, info, entry size.
type SectionRow = (u32, u32, u64, u64, u64, u64, u32, u32, u64);

struct Piece {
    at: u64,
    data: Vec<u8>,
    len: u64,
    flags: u32,
}

/// Writes the patch and gives its path.
pub fn write_patch(recipe: &Recipe<'_>, out: &Path) -> PathBuf {
    let old = Old { bytes: std::fs::read(recipe.old).unwrap() };
    let object_bytes = std::fs::read(recipe.object).unwrap();
    let object = object::File::parse(&*object_bytes).unwrap();
    // Text, read-only, data: each a segment of its own.
    let mut placed: HashMap<object::SectionIndex, u64> = HashMap::new();
    let mut pieces: Vec<Piece> = Vec::new();
    let mut eh_frame = None;
    let mut next = 0u64;
    for (flags, kinds) in [
        (5, &[SectionKind::Text][..]),
        (4, &[SectionKind::ReadOnlyData, SectionKind::ReadOnlyString]),
        (6, &[SectionKind::Data, SectionKind::UninitializedData]),
    ] {
        let mut piece = Piece { at: next, data: Vec::new(), len: 0, flags };
        for s in object.sections().filter(|s| s.size() > 0) {
            let is_frame = s.name() == Ok(".eh_frame");
            let wanted = if is_frame { flags == 4 } else { kinds.contains(&s.kind()) };
            if !wanted {
                continue;
            }
            let pad = (piece.data.len() as u64).next_multiple_of(s.align().max(16)) as usize;
            piece.data.resize(pad, 0);
            placed.insert(s.index(), piece.at + pad as u64);
            let mut data = s.data().unwrap().to_vec();
            data.resize(s.size() as usize, 0);
            if is_frame {
                data.extend([0; 4]);
                eh_frame = Some((piece.at + pad as u64, data.len() as u64));
            }
            piece.data.extend(data);
        }
        if !piece.data.is_empty() {
            piece.len = piece.data.len() as u64;
            next = (piece.at + piece.len).next_multiple_of(4096);
            pieces.push(piece);
        }
    }
    // (at, type, target image?, value, addend)
    let mut relocs: Vec<(u64, u32, bool, u64, i64)> = Vec::new();
    for s in object.sections() {
        let Some(base) = placed.get(&s.index()) else { continue };
        for (offset, r) in s.relocations() {
            let RelocationFlags::Elf { r_type } = r.flags() else { panic!("{r:?}") };
            let r_type = if r_type == object::elf::R_X86_64_PLT32 { object::elf::R_X86_64_PC32 } else { r_type };
            assert!(matches!(r_type, object::elf::R_X86_64_PC32 | object::elf::R_X86_64_64), "relocation {r_type}");
            let RelocationTarget::Symbol(index) = r.target() else { panic!("{r:?}") };
            let symbol = object.symbol_by_index(index).unwrap();
            let (image, value) = match symbol.section_index() {
                Some(section) => (false, placed[&section] + symbol.address()),
                None => {
                    let file = old.file();
                    let name = symbol.name().unwrap();
                    let found = file.symbols().find(|o| o.name() == Ok(name) && o.is_definition());
                    (true, found.unwrap_or_else(|| panic!("{name} is not in the old build")).address())
                }
            };
            relocs.push((base + offset, r_type.0, image, value, r.addend()));
        }
    }
    let mut functions = Vec::new();
    for s in object.symbols().filter(|s| s.kind() == SymbolKind::Text && s.size() > 0) {
        let name = s.name().unwrap().to_owned();
        let new_at = placed[&s.section_index().unwrap()] + s.address();
        let replaced = recipe.replace.contains(&name.as_str());
        let old = replaced.then(|| old_function(&old, &name));
        functions.push(Function {
            demangled: name.clone(),
            name,
            status: if replaced { Status::Changed } else { Status::New },
            reason: "written by hand".into(),
            new_at,
            new_size: s.size(),
            source: None,
            address_taken: false,
            old,
        });
    }
    functions.sort_by_key(|f| f.new_at);
    let manifest = Manifest {
        format: FORMAT_VERSION,
        name: recipe.name.into(),
        builder: "engine tests".into(),
        target: BuildRef { build_id: HexBytes(build_id(recipe.old)), file: "old".into() },
        new: BuildRef { build_id: HexBytes(vec![0xee; 20]), file: "new".into() },
        functions,
        statics: Vec::new(),
        types: "not compared".into(),
        may_unwind: recipe.may_unwind,
        allowances: Vec::new(),
        together: Some(Vec::new()),
        after: recipe.after.map(|fix| {
            let before = PatchFile::parse(&std::fs::read(fix).unwrap()).unwrap();
            After { name: before.manifest.name, digest: HexBytes(before.digest.to_vec()), before: Vec::new() }
        }),
        ..Manifest::default()
    };
    std::fs::write(out, elf(&manifest, &pieces, &relocs, eh_frame)).unwrap();
    out.to_owned()
}

fn old_function(old: &Old, name: &str) -> OldFunction {
    let file = old.file();
    let symbol = file.symbols().find(|s| s.name() == Ok(name) && s.is_definition()).expect(name);
    let (at, size) = (symbol.address(), symbol.size());
    let body = old.code(at, size);
    let skip = if body.starts_with(&[0xf3, 0x0f, 0x1e, 0xfa]) { 4 } else { 0 };
    let hash = |b: &[u8]| HexBytes(sha2::Sha256::digest(b).to_vec());
    let cold = format!("{name}.cold");
    let companions = file.symbols().filter(|s| s.name() == Ok(cold.as_str()) && s.size() > 0).map(|s| Companion {
        name: cold.clone(),
        at: ImageAddr(s.address()),
        size: s.size(),
        sha256: hash(&old.code(s.address(), s.size())),
    });
    OldFunction {
        at: ImageAddr(at),
        size,
        sha256: hash(&body),
        branches_to_entry: false,
        companions: companions.collect(),
        entry_beside: None,
        entry: Some(Entry {
            at: ImageAddr(at + skip),
            original: HexBytes(old.code(at + skip, ENTRY_JUMP_LEN)),
            padding: (skip + ENTRY_JUMP_LEN).saturating_sub(size),
        }),
    }
}

/// Type of the note that holds the digest (docs/patch-format.md).
const NOTE_TYPE_DIGEST: u32 = 2;

/// A patch file, as docs/patch-format.md says.
fn elf(
    manifest: &Manifest,
    pieces: &[Piece],
    relocs: &[(u64, u32, bool, u64, i64)],
    eh_frame: Option<(u64, u64)>,
) -> Vec<u8> {
    let note = |kind: u32, desc: &[u8]| {
        let mut note = Vec::new();
        note.extend((NOTE_NAME.len() as u32 + 1).to_le_bytes());
        note.extend((desc.len() as u32).to_le_bytes());
        note.extend(kind.to_le_bytes());
        note.extend(NOTE_NAME.as_bytes());
        note.push(0);
        note.resize(note.len().next_multiple_of(4), 0);
        note.extend(desc);
        note.resize(note.len().next_multiple_of(4), 0);
        note
    };
    let desc: Vec<u8> = FORMAT_VERSION.to_le_bytes().into_iter().chain(manifest.target.build_id.0.clone()).collect();
    let note = [note(NOTE_TYPE_TARGET, &desc), note(NOTE_TYPE_DIGEST, &[0; 32])].concat();
    let digest_in_note = note.len() - 32;

    let phnum = pieces.len() + 1;
    let mut out = vec![0u8; 64 + 56 * phnum];
    let note_at = out.len() as u64;
    out.extend(&note);
    let mut program_headers = Vec::new();
    let mut header = |kind: u32, flags: u32, offset: u64, at: u64, filesz: u64, memsz: u64, align: u64| {
        program_headers.extend(kind.to_le_bytes());
        program_headers.extend(flags.to_le_bytes());
        for v in [offset, at, at, filesz, memsz, align] {
            program_headers.extend(v.to_le_bytes());
        }
    };
    let mut file_at = HashMap::new();
    for p in pieces {
        out.resize(out.len().next_multiple_of(4096), 0);
        let offset = out.len() as u64;
        file_at.insert(p.at, offset);
        out.extend(&p.data);
        header(1, p.flags, offset, p.at, p.data.len() as u64, p.len, 4096);
    }
    header(4, 4, note_at, 0, note.len() as u64, note.len() as u64, 4);
    out[64..64 + 56 * phnum].copy_from_slice(&program_headers);

    // Sections: 0 null, 1 .text (the first piece), 2 manifest, 3 .symtab, 4 .strtab, 5 .rela, 6 .shstrtab, 7 .eh_frame
    let names = b"\0.text\0.livepatch.manifest\0.symtab\0.strtab\0.rela.livepatch\0.shstrtab\0.eh_frame\0";
    let name_at = |n: &str| {
        let wanted: Vec<u8> = [n.as_bytes(), &[0]].concat();
        (names.windows(wanted.len()).position(|w| w == wanted).unwrap()) as u32
    };
    let json = serde_json::to_vec(manifest).unwrap();
    let manifest_at = out.len() as u64;
    out.extend(&json);
    out.resize(out.len().next_multiple_of(8), 0);
    let symtab_at = out.len() as u64;
    out.extend([0; 24]);
    let mut rela = Vec::new();
    for (i, (at, kind, image, value, addend)) in relocs.iter().enumerate() {
        let section = if *image { SHN_TARGET_IMAGE } else { 1 };
        out.extend([0, 0, 0, 0, 0x10, 0]);
        out.extend(section.to_le_bytes());
        out.extend(value.to_le_bytes());
        out.extend([0; 8]);
        rela.extend(at.to_le_bytes());
        rela.extend((((i as u64 + 1) << 32) | u64::from(*kind)).to_le_bytes());
        rela.extend(addend.to_le_bytes());
    }
    let symtab_len = out.len() as u64 - symtab_at;
    let strtab_at = out.len() as u64;
    out.push(0);
    out.resize(out.len().next_multiple_of(8), 0);
    let rela_at = out.len() as u64;
    out.extend(&rela);
    let names_at = out.len() as u64;
    out.extend(names);
    out.resize(out.len().next_multiple_of(8), 0);
    let sections_at = out.len() as u64;
    let text = &pieces[0];
    let mut list: Vec<SectionRow> = vec![
        (0, 0, 0, 0, 0, 0, 0, 0, 0),
        (name_at(".text"), 1, 6, text.at, file_at[&text.at], text.data.len() as u64, 0, 0, 0),
        (name_at(MANIFEST_SECTION), 1, 0, 0, manifest_at, json.len() as u64, 0, 0, 0),
        (name_at(".symtab"), 2, 0, 0, symtab_at, symtab_len, 4, 1, 24),
        (name_at(".strtab"), 3, 0, 0, strtab_at, 1, 0, 0, 0),
        (name_at(".rela.livepatch"), 4, 0, 0, rela_at, rela.len() as u64, 3, 0, 24),
        (name_at(".shstrtab"), 3, 0, 0, names_at, names.len() as u64, 0, 0, 0),
    ];
    if let Some((at, len)) = eh_frame {
        let piece = pieces.iter().find(|p| p.at <= at && at < p.at + p.len).unwrap();
        list.push((name_at(".eh_frame"), 1, 2, at, file_at[&piece.at] + at - piece.at, len, 0, 0, 0));
    }
    for (name, kind, flags, addr, offset, size, link, info, entsize) in &list {
        out.extend(name.to_le_bytes());
        out.extend(kind.to_le_bytes());
        for v in [flags, addr, offset, size] {
            out.extend(v.to_le_bytes());
        }
        out.extend(link.to_le_bytes());
        out.extend(info.to_le_bytes());
        out.extend(1u64.to_le_bytes());
        out.extend(entsize.to_le_bytes());
    }
    let mut head = vec![0x7f, b'E', b'L', b'F', 2, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    head.extend(3u16.to_le_bytes());
    head.extend(62u16.to_le_bytes());
    head.extend(1u32.to_le_bytes());
    for v in [0, 64, sections_at] {
        head.extend(v.to_le_bytes());
    }
    head.extend(0u32.to_le_bytes());
    for v in [64, 56, phnum as u16, 64, list.len() as u16, 6] {
        head.extend(v.to_le_bytes());
    }
    out[..64].copy_from_slice(&head);
    // Over the file with zeros where it goes.
    let digest = sha2::Sha256::digest(&out);
    let at = note_at as usize + digest_in_note;
    out[at..at + 32].copy_from_slice(&digest);
    out
}

/// Compiles the new code of a patch.
pub fn object(folder: &Path, out: &str, source: &str) -> PathBuf {
    gcc(folder, out, source, &["-c", "-fpie", "-ffunction-sections"])
}

/// The outcome of a command.
pub struct Outcome {
    pub code: i32,
    pub stdout: String,
    pub stderr: String,
}

/// Runs the `livepatch` command.
pub fn livepatch(args: &[&str]) -> Outcome {
    let out = Command::new(env!("CARGO_BIN_EXE_livepatch")).args(args).output().unwrap();
    Outcome {
        code: out.status.code().unwrap_or(-1),
        stdout: String::from_utf8_lossy(&out.stdout).into_owned(),
        stderr: String::from_utf8_lossy(&out.stderr).into_owned(),
    }
}
