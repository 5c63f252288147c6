//! What a module's file says before any of its code runs: bytes in, a refusal out.
//!
//! *Invariant:* what cannot be seen is refused. Writable data without a symbol is a static nobody named; a file without symbols
//! cannot be looked into.

use goblin::elf::header::{EM_X86_64, ET_DYN};
use goblin::elf::program_header::{PF_X, PT_GNU_RELRO, PT_GNU_STACK, PT_LOAD, PT_TLS};
use goblin::elf::reloc::{R_X86_64_64, R_X86_64_IRELATIVE, R_X86_64_RELATIVE};
use goblin::elf::section_header::{SHF_ALLOC, SHF_TLS, SHF_WRITE, SHT_FINI_ARRAY, SHT_INIT_ARRAY, SHT_NOBITS};
use goblin::elf::sym::{STB_GNU_UNIQUE, STT_FUNC, STT_GNU_IFUNC, STT_OBJECT, STT_TLS};
use goblin::elf::{Elf, SectionHeader, Sym};

use super::text::{Description, Difference};
use livepatch_interface::{FACTORY, SECTION};

/// Why a module is not loaded. None of its code has run.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Refusal {
    /// It is no shared library for this machine, or only a part of one.
    #[error("it is no shared library for x86-64: {0}")]
    NotALibrary(String),
    /// It says nothing of an interface.
    #[error("it is no module: {0}")]
    NotAModule(String),
    /// Its interface is another.
    #[error("its interface is not that of the program:{0}\nBuild the module against the program's interface, or restart with a program that has the new one.")]
    Interface(Difference),
    /// It has no factory.
    #[error("it has no factory ({FACTORY}): nothing can be made of it")]
    NoFactory,
    /// It cannot be looked into.
    #[error("it has no symbols, so its statics can't be told from the runtime's: build it with `strip = false`")]
    NoSymbols,
    /// It keeps something of its own.
    #[error("it has a mutable static that it does not declare: {0}. Each version has its own copy, which starts anew: keep it in the program, or declare it (allow \"static {0}\")")]
    Static(String),
    /// It keeps something of its own in each thread.
    #[error("it has a thread-local that it does not declare: {0}. Threads keep it after the module has gone: keep it in the program, or declare it (allow \"thread-local {0}\")")]
    ThreadLocal(String),
    /// It runs code as soon as it is loaded.
    #[error("it has a constructor that it does not declare: {0} runs at load, before the module is asked for anything (allow \"constructor {0}\")")]
    Constructor(String),
    /// It runs code when it is unloaded.
    #[error(
        "it has a destructor that it does not declare: {0} runs when the module is released (allow \"destructor {0}\")"
    )]
    Destructor(String),
    /// It needs a library, whose constructors would run.
    #[error("it needs a library that it does not declare: {0} (allow \"library {0}\")")]
    Library(String),
    /// It could never be released.
    #[error("it could not be unloaded: {0}")]
    Pinned(String),
    /// It would make stacks executable.
    #[error("it asks for executable stacks")]
    ExecutableStack,
}

impl Refusal {
    /// Its name in documents.
    #[must_use]
    pub fn kind(&self) -> &'static str {
        match self {
            Self::NotALibrary(_) => "not-a-library",
            Self::NotAModule(_) => "not-a-module",
            Self::Interface(_) => "interface",
            Self::NoFactory => "no-factory",
            Self::NoSymbols => "no-symbols",
            Self::Static(_) => "static",
            Self::ThreadLocal(_) => "thread-local",
            Self::Constructor(_) => "constructor",
            Self::Destructor(_) => "destructor",
            Self::Library(_) => "library",
            Self::Pinned(_) => "pinned",
            Self::ExecutableStack => "executable-stack",
        }
    }
}

/// Crates of Rust's runtime, which every module brings along: what they keep is caches, and counts of panics and threads. `memchr` is
/// std's own copy; where a module has another, what it keeps is which implementation fits the processor.
const RUNTIME: [&str; 8] =
    ["std", "core", "alloc", "panic_unwind", "panic_abort", "std_detect", "compiler_builtins", "memchr"];

/// Objects of the C runtime's start files and of compilers.
const STARTUP: [&str; 5] = ["__dso_handle", "__TMC_LIST__", "__TMC_END__", "__EH_FRAME_BEGIN__", "__FRAME_END__"];

/// Libraries that belong to the runtime.
const LIBRARIES: [&str; 8] = [
    "libc.so.6",
    "libm.so.6",
    "libgcc_s.so.1",
    "ld-linux-x86-64.so.2",
    "libpthread.so.0",
    "libdl.so.2",
    "librt.so.1",
    "libstdc++.so.6",
];

const DF_1_NODELETE: u64 = 8;

/// `crti.o`'s alone is shorter.
const MAX_INIT_BYTES: u64 = 32;

/// Reads a module's file.
///
/// # Errors
///
/// The first reason not to load it.
pub fn check(file: &[u8], program: &Description) -> Result<Description, Refusal> {
    let elf = Elf::parse(file).map_err(|e| Refusal::NotALibrary(e.to_string()))?;
    is_a_library(&elf, file.len() as u64)?;
    let text = text_of(&elf, file)?;
    if let Some(difference) = program.differs(&text) {
        return Err(Refusal::Interface(difference));
    }
    let defined = |s: &Sym| s.st_shndx != 0;
    let is_factory =
        |s: &Sym| defined(s) && s.st_type() == STT_FUNC && elf.dynstrtab.get_at(s.st_name) == Some(FACTORY);
    if !elf.dynsyms.iter().any(|s| is_factory(&s)) {
        return Err(Refusal::NoFactory);
    }
    let file = File::of(&elf);
    if file.symbols.is_empty() {
        return Err(Refusal::NoSymbols);
    }
    file.code_that_runs_by_itself(&text)?;
    file.what_it_keeps(&text)?;
    if let Some(s) = elf.dynsyms.iter().find(|s| defined(s) && s.st_bind() == STB_GNU_UNIQUE) {
        let name = spelled(elf.dynstrtab.get_at(s.st_name).unwrap_or(""));
        return Err(Refusal::Pinned(format!("{name} is unique in the process (compile with -fno-gnu-unique)")));
    }
    let flags = elf.dynamic.as_ref().map_or(0, |d| d.info.flags_1);
    if flags & DF_1_NODELETE != 0 {
        return Err(Refusal::Pinned("it was linked with -z nodelete".into()));
    }
    let foreign = elf.libraries.iter().find(|l| !LIBRARIES.contains(l) && !text.allows("library", l));
    foreign.map_or(Ok(text.clone()), |l| Err(Refusal::Library((*l).to_owned())))
}

fn is_a_library(elf: &Elf<'_>, len: u64) -> Result<(), Refusal> {
    let not = |why: &str| Err(Refusal::NotALibrary(why.to_owned()));
    if elf.header.e_machine != EM_X86_64 || !elf.is_64 || !elf.little_endian {
        return not("it is for another machine");
    }
    if elf.header.e_type != ET_DYN || elf.dynamic.is_none() {
        return not("it can't be linked dynamically");
    }
    let inside = |at: u64, bytes: u64| at.checked_add(bytes).is_some_and(|end| end <= len);
    let whole = elf.program_headers.iter().all(|p| inside(p.p_offset, p.p_filesz))
        && elf.section_headers.iter().all(|s| s.sh_type == SHT_NOBITS || inside(s.sh_offset, s.sh_size));
    if !whole || !elf.program_headers.iter().any(|p| p.p_type == PT_LOAD) {
        return not("it is cut short");
    }
    if elf.program_headers.iter().any(|p| p.p_type == PT_GNU_STACK && p.p_flags & PF_X != 0) {
        return Err(Refusal::ExecutableStack);
    }
    Ok(())
}

fn text_of(elf: &Elf<'_>, file: &[u8]) -> Result<Description, Refusal> {
    let mut found = elf.section_headers.iter().filter(|s| elf.shdr_strtab.get_at(s.sh_name) == Some(SECTION));
    let Some(section) = found.next().filter(|s| s.sh_type != SHT_NOBITS) else {
        return Err(Refusal::NotAModule(format!("there is no section {SECTION}")));
    };
    let bytes = section.file_range().and_then(|r| file.get(r)).unwrap_or(&[]);
    Description::parse(bytes).map_err(|why| Refusal::NotAModule(format!("{SECTION}: {why}")))
}

struct Named<'a> {
    at: u64,
    len: u64,
    kind: u8,
    name: &'a str,
}

struct File<'a> {
    elf: &'a Elf<'a>,
    symbols: Vec<Named<'a>>,
}

impl<'a> File<'a> {
    fn of(elf: &'a Elf<'a>) -> Self {
        let named = |s: Sym| {
            let name = elf.strtab.get_at(s.st_name)?;
            Some(Named { at: s.st_value, len: s.st_size, kind: s.st_type(), name })
        };
        let mut symbols: Vec<Named<'_>> = elf.syms.iter().filter(|s| s.st_shndx != 0).filter_map(named).collect();
        symbols.retain(|s| matches!(s.kind, STT_OBJECT | STT_TLS | STT_FUNC | STT_GNU_IFUNC));
        symbols.sort_by_key(|s| (s.at, s.len));
        Self { elf, symbols }
    }

    fn section_name(&self, s: &SectionHeader) -> &'a str {
        self.elf.shdr_strtab.get_at(s.sh_name).unwrap_or("")
    }

    fn function_at(&self, at: u64) -> String {
        let code = |s: &&Named<'_>| matches!(s.kind, STT_FUNC | STT_GNU_IFUNC) && s.at == at;
        self.symbols
            .iter()
            .find(code)
            .map_or_else(|| format!("a function without a name at {at:#x}"), |s| s.name.to_owned())
    }

    fn code_that_runs_by_itself(&self, text: &Description) -> Result<(), Refusal> {
        let arrays =
            [(SHT_INIT_ARRAY, "frame_dummy", "constructor"), (SHT_FINI_ARRAY, "__do_global_dtors_aux", "destructor")];
        for (kind, startup, word) in arrays {
            let refuse = |name: String| {
                if word == "constructor" {
                    Refusal::Constructor(name)
                } else {
                    Refusal::Destructor(name)
                }
            };
            for section in self.elf.section_headers.iter().filter(|s| s.sh_type == kind) {
                let inside = |at: u64| at >= section.sh_addr && at - section.sh_addr < section.sh_size;
                let mut count = 0;
                for r in self.elf.dynrelas.iter().filter(|r| inside(r.r_offset)) {
                    count += 1;
                    let name = match r.r_type {
                        R_X86_64_RELATIVE => self.function_at(r.r_addend.unwrap_or(0) as u64),
                        R_X86_64_64 => {
                            let symbol = self.elf.dynsyms.get(r.r_sym);
                            symbol.and_then(|s| self.elf.dynstrtab.get_at(s.st_name)).unwrap_or("").to_owned()
                        }
                        other => format!("a function reached by a relocation of type {other}"),
                    };
                    let shown = spelled(&name);
                    if name != startup && !is_runtime(&name) && !text.allows(word, &shown) {
                        return Err(refuse(shown));
                    }
                }
                if count * 8 != section.sh_size {
                    return Err(refuse(format!("something in {}", self.section_name(section))));
                }
            }
        }
        for (name, refuse) in [(".init", Refusal::Constructor as fn(String) -> Refusal), (".fini", Refusal::Destructor)]
        {
            let long = |s: &&SectionHeader| self.section_name(s) == name && s.sh_size > MAX_INIT_BYTES;
            if self.elf.section_headers.iter().any(|s| long(&s)) {
                return Err(refuse(format!("code in {name}")));
            }
        }
        let chooses =
            self.elf.dynrelas.iter().chain(self.elf.pltrelocs.iter()).find(|r| r.r_type == R_X86_64_IRELATIVE);
        if let Some(r) = chooses {
            return Err(Refusal::Constructor(spelled(&self.function_at(r.r_addend.unwrap_or(0) as u64))));
        }
        let chosen = self.symbols.iter().find(|s| s.kind == STT_GNU_IFUNC);
        chosen.map_or(Ok(()), |s| Err(Refusal::Constructor(spelled(s.name))))
    }

    fn what_it_keeps(&self, text: &Description) -> Result<(), Refusal> {
        let headers = &self.elf.program_headers;
        let constant: Vec<_> = headers.iter().filter(|p| p.p_type == PT_GNU_RELRO).map(|p| p.vm_range()).collect();
        let thread_base = headers.iter().find(|p| p.p_type == PT_TLS).map_or(0, |p| p.p_vaddr);
        for section in &self.elf.section_headers {
            let flag = |f: u32| section.sh_flags & u64::from(f) != 0;
            let (local, name) = (flag(SHF_TLS), self.section_name(section));
            if !flag(SHF_ALLOC) || !flag(SHF_WRITE) || section.sh_size == 0 {
                continue;
            }
            let relro = constant.iter().any(|r| r.contains(&(section.sh_addr as usize)));
            if !local && (relro || name.starts_with(".data.rel.ro") || [".got", ".got.plt", ".dynamic"].contains(&name))
            {
                continue;
            }
            let (kind, base) = if local { (STT_TLS, thread_base) } else { (STT_OBJECT, 0) };
            let refuse = if local { Refusal::ThreadLocal } else { Refusal::Static };
            let word = if local { "thread-local" } else { "static" };
            let Some(end) = section.sh_addr.checked_add(section.sh_size) else { continue };
            let slack = section.sh_addralign.clamp(16, 64);
            let mut covered = section.sh_addr;
            for s in self.symbols.iter().filter(|s| s.kind == kind) {
                let Some(at) = s.at.checked_add(base).filter(|at| (section.sh_addr..end).contains(at)) else {
                    continue;
                };
                let shown = spelled(s.name);
                if !is_runtime(s.name) && !is_startup(s.name) && !text.allows(word, &shown) {
                    return Err(refuse(shown));
                }
                if at.saturating_sub(covered) >= slack {
                    return Err(refuse(format!("{} bytes without a name in {name}", at - covered)));
                }
                covered = covered.max(at.saturating_add(s.len));
            }
            if end.saturating_sub(covered) >= slack {
                return Err(refuse(format!("{} bytes without a name in {name}", end - covered)));
            }
        }
        Ok(())
    }
}

/// A name as people read it, without the compiler's hash.
fn spelled(name: &str) -> String {
    if let Ok(rust) = rustc_demangle::try_demangle(name) {
        return format!("{rust:#}");
    }
    let cpp = cpp_demangle::Symbol::new(name).ok().and_then(|s| s.demangle().ok());
    cpp.unwrap_or_else(|| name.to_owned())
}

fn is_startup(name: &str) -> bool {
    let numbered = name.strip_prefix("completed.").is_some_and(|n| n.bytes().all(|b| b.is_ascii_digit()));
    numbered || STARTUP.contains(&name) || name.starts_with("DW.ref.") || name.starts_with("_rust_extern_with_linkage_")
}

/// Whether a symbol's crate is Rust's own. C++ has a namespace `std`, too, but never Rust's mangling.
fn is_runtime(name: &str) -> bool {
    let Ok(rust) = rustc_demangle::try_demangle(name) else { return false };
    let rust = format!("{rust:#}");
    let first = rust.trim_start_matches(['<', '&', '*', '(', '[']);
    RUNTIME.contains(&first.split("::").next().unwrap_or(""))
}
