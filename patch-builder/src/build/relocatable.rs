//! Reads a relocatable object: the code and data of hooks, as compilers write it (`gcc -c`, `rustc --emit=obj`).

use object::{Object, ObjectSection, ObjectSymbol, RelocationFlags, RelocationTarget, SectionFlags, SymbolSection};

use super::elf::damaged;
use super::{BuildError, Unwind};

/// A relocation of a section.
#[derive(Clone, Copy, Debug)]
pub struct ObjReloc {
    /// Where in the section.
    pub at: u64,
    /// `R_X86_64_...`
    pub kind: u32,
    /// Index of the symbol in [`Relocatable::symbols`].
    pub symbol: usize,
    /// The addend.
    pub addend: i64,
}

/// A section that is loaded.
#[derive(Clone, Debug)]
pub struct ObjSection {
    /// Its name.
    pub name: String,
    /// Its bytes; zeros for `.bss`.
    pub bytes: Vec<u8>,
    /// Alignment in bytes.
    pub align: u64,
    /// Whether it is code.
    pub exec: bool,
    /// Whether it is written.
    pub write: bool,
    /// Whether it is thread-local.
    pub tls: bool,
    /// Its relocations.
    pub relocs: Vec<ObjReloc>,
}

/// A symbol.
#[derive(Clone, Debug)]
pub struct ObjSymbol {
    /// Its name; empty for a section's.
    pub name: String,
    /// The section that it lies in, by index of [`Relocatable::sections`]; `None` if it is defined elsewhere.
    pub section: Option<usize>,
    /// Offset in the section.
    pub value: u64,
    /// Its length.
    pub size: u64,
    /// Whether it is a function.
    pub func: bool,
    /// Whether other objects see it.
    pub global: bool,
    /// Whether it may be missing.
    pub weak: bool,
}

/// How the frames of a function in the object are unwound.
#[derive(Clone, Debug)]
pub struct ObjFrame {
    /// Section and offset of the function.
    pub at: (usize, u64),
    /// Its length.
    pub len: u64,
    /// Call-frame instructions of its CIE, and its own.
    pub instructions: [Vec<u8>; 2],
    /// Code alignment factor.
    pub code_align: u64,
    /// Data alignment factor.
    pub data_align: i64,
    /// Return address register.
    pub return_register: u16,
    /// A signal frame.
    pub signal: bool,
    /// Symbol or section and offset of the personality routine or of its slot, and whether it is a slot.
    pub personality: Option<(ObjPlace, bool)>,
    /// Section and offset of the language-specific data area.
    pub lsda: Option<(usize, u64)>,
}

/// A place of the object, or a symbol that it does not define.
#[derive(Clone, Copy, Debug)]
pub enum ObjPlace {
    /// Section and offset.
    Section(usize, u64),
    /// Index of an undefined symbol.
    Symbol(usize),
}

/// A relocatable object.
#[derive(Clone, Debug, Default)]
pub struct Relocatable {
    /// What is loaded of it.
    pub sections: Vec<ObjSection>,
    /// Its symbols.
    pub symbols: Vec<ObjSymbol>,
    /// Its unwind table.
    pub frames: Vec<ObjFrame>,
}

/// Distance at which undefined symbols are placed while the unwind table is read.
const FAR: u64 = 1 << 29;

impl Relocatable {
    /// Reads an object from the bytes of its file.
    ///
    /// # Errors
    ///
    /// No x86-64 relocatable object, or damaged.
    pub fn parse(bytes: &[u8]) -> Result<Self, BuildError> {
        let file = object::File::parse(bytes).map_err(|e| BuildError::NotElf(format!("not an ELF object: {e}")))?;
        let right = file.format() == object::BinaryFormat::Elf
            && file.architecture() == object::Architecture::X86_64
            && file.kind() == object::ObjectKind::Relocatable;
        if !right {
            return Err(BuildError::NotElf("not a relocatable x86-64 object (compile with -c)".into()));
        }
        let mut out = Self::default();
        let mut index_of = std::collections::HashMap::new();
        let mut eh_frame = None;
        for s in file.sections() {
            let SectionFlags::Elf { sh_flags, .. } = s.flags() else { continue };
            let (sh_flags, name) = (sh_flags.0, s.name().map_err(damaged)?.to_owned());
            const ALLOC: u64 = 2;
            if sh_flags & ALLOC == 0 || name.starts_with(".note") {
                continue;
            }
            if name == ".eh_frame" {
                eh_frame = Some(s);
                continue;
            }
            let mut bytes = s.data().map_err(damaged)?.to_vec();
            bytes.resize(usize::try_from(s.size()).map_err(damaged)?, 0);
            index_of.insert(s.index(), out.sections.len());
            let (exec, write, tls) = (sh_flags & 4 != 0, sh_flags & 1 != 0, sh_flags & 0x400 != 0);
            let relocs = relocs(&s)?;
            out.sections.push(ObjSection { name, bytes, align: s.align().max(1), exec, write, tls, relocs });
        }
        // By index, so that relocations find them: the null symbol first.
        out.symbols.push(ObjSymbol {
            name: String::new(),
            section: None,
            value: 0,
            size: 0,
            func: false,
            global: false,
            weak: false,
        });
        for s in file.symbols() {
            let section = match s.section() {
                SymbolSection::Section(i) => index_of.get(&i).copied(),
                SymbolSection::Common => {
                    let bytes = vec![0; usize::try_from(s.size()).map_err(damaged)?];
                    let name = format!(".bss.{}", s.name().map_err(damaged)?);
                    let (exec, write, tls, relocs) = (false, true, false, Vec::new());
                    let align = s.address().max(1);
                    out.sections.push(ObjSection { name, bytes, align, exec, write, tls, relocs });
                    Some(out.sections.len() - 1)
                }
                _ => None,
            };
            while out.symbols.len() < s.index().0 {
                let gap = out.symbols[0].clone();
                out.symbols.push(gap);
            }
            out.symbols.push(ObjSymbol {
                name: s.name().map_err(damaged)?.to_owned(),
                section,
                value: if matches!(s.section(), SymbolSection::Common) { 0 } else { s.address() },
                size: s.size(),
                func: s.kind() == object::SymbolKind::Text,
                global: s.is_global(),
                weak: s.is_weak(),
            });
        }
        if let Some(s) = eh_frame {
            let mut data = s.data().map_err(damaged)?.to_vec();
            out.frames = out.read_frames(&mut data, &relocs(&s)?)?;
        }
        Ok(out)
    }

    /// Where section `index` is taken to lie while the unwind table is read.
    fn place(&self, index: usize) -> u64 {
        let before = self.sections.iter().take(index).map(|s| (s.bytes.len() as u64).next_multiple_of(16) + 16);
        (1 << 24) + before.sum::<u64>()
    }

    /// What lies at such a place.
    fn what(&self, at: u64) -> Option<ObjPlace> {
        if at >= FAR {
            return Some(ObjPlace::Symbol(usize::try_from(at - FAR).ok()? / 16)).filter(|_| at.is_multiple_of(16));
        }
        let holds = |i: &usize| (self.place(*i)..=self.place(*i) + self.sections[*i].bytes.len() as u64).contains(&at);
        let index = (0..self.sections.len()).find(holds)?;
        Some(ObjPlace::Section(index, at - self.place(index)))
    }

    fn read_frames(&self, data: &mut [u8], relocs: &[ObjReloc]) -> Result<Vec<ObjFrame>, BuildError> {
        const TABLE: u64 = 1 << 28;
        for r in relocs {
            let symbol = self.symbols.get(r.symbol).ok_or_else(|| damaged("a relocation without its symbol"))?;
            let to = match symbol.section {
                Some(index) => self.place(index) + symbol.value,
                None => FAR + 16 * r.symbol as u64,
            };
            let to = to.wrapping_add_signed(r.addend);
            let (value, width) = match r.kind {
                1 => (to, 8),
                2 | 4 => (to.wrapping_sub(TABLE + r.at), 4),
                10 | 11 => (to, 4),
                24 => (to.wrapping_sub(TABLE + r.at), 8),
                kind => return Err(damaged(format!(".eh_frame: a relocation of type {kind}"))),
            };
            let field = usize::try_from(r.at).ok().and_then(|at| data.get_mut(at..at + width));
            let field = field.ok_or_else(|| damaged(".eh_frame: a relocation outside of it"))?;
            field.copy_from_slice(&value.to_le_bytes()[..width]);
        }
        let table = Unwind::parse(TABLE, data)?;
        let lost = || damaged(".eh_frame: an entry that belongs to nothing");
        let mut out = Vec::new();
        let mut starts: Vec<u64> = table.starts().collect();
        starts.sort_unstable();
        for start in starts {
            let (Some(fde), Some(ObjPlace::Section(index, offset))) = (table.fde_at(start), self.what(start)) else {
                return Err(lost());
            };
            let section = |at| match self.what(at) {
                Some(ObjPlace::Section(index, offset)) => Ok((index, offset)),
                _ => Err(lost()),
            };
            let personality = match fde.personality {
                None => None,
                Some(super::Personality::Direct(at)) => Some((self.what(at).ok_or_else(lost)?, false)),
                Some(super::Personality::Indirect(at)) => Some((self.what(at).ok_or_else(lost)?, true)),
            };
            out.push(ObjFrame {
                at: (index, offset),
                len: fde.len,
                instructions: [fde.initial.to_vec(), fde.instructions.to_vec()],
                code_align: fde.code_align,
                data_align: fde.data_align,
                return_register: fde.return_register,
                signal: fde.signal,
                personality,
                lsda: fde.lsda.map(section).transpose()?,
            });
        }
        Ok(out)
    }
}

fn relocs<'d>(s: &object::Section<'d, '_>) -> Result<Vec<ObjReloc>, BuildError> {
    let one = |(at, r): (u64, object::Relocation)| {
        let RelocationFlags::Elf { r_type } = r.flags() else { return Err(damaged("a relocation of another format")) };
        let RelocationTarget::Symbol(index) = r.target() else { return Err(damaged("a relocation without symbol")) };
        Ok(ObjReloc { at, kind: r_type.0, symbol: index.0, addend: r.addend() })
    };
    s.relocations().map(one).collect()
}
