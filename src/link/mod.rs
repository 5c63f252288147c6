//! Finds what a patch imports, as the dynamic linker would have bound it: by name and version, in the order in which
//! the process's own images are searched. Everything is read from the process's memory; nothing is run in it.
//!
//! *Invariant:* a symbol that cannot be told for certain is an error with its name, never a guess.

mod tables;

use tables::{Slot, Symbol, Tables};

use crate::addr::ProcAddr;
use crate::image::Image;
use crate::memory::ReadMemory;
use crate::patch::Import;

const STB_LOCAL: u8 = 0;
const STT_FUNC: u8 = 2;
const STT_TLS: u8 = 6;
const STT_GNU_IFUNC: u8 = 10;

/// Why an import has no address.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum LinkError {
    /// The library that it comes from is not there.
    #[error("{symbol} is of {library}, which the process has not loaded")]
    NotLoaded {
        /// The import.
        symbol: String,
        /// Its library.
        library: String,
    },
    /// No image that the program was started with has it.
    #[error("{symbol} is in none of the libraries that the program was started with ({searched})")]
    Missing {
        /// The import.
        symbol: String,
        /// What was searched.
        searched: String,
    },
    /// A library has it several times.
    #[error("{symbol} is several times in {library}, and none of them is the default")]
    Ambiguous {
        /// The import.
        symbol: String,
        /// The library.
        library: String,
    },
    /// A thread-local variable.
    #[error("{symbol} of {library} is thread-local")]
    ThreadLocal {
        /// The import.
        symbol: String,
        /// The library.
        library: String,
    },
    /// It is chosen at run time, and nothing in the process has it chosen yet.
    #[error("{symbol} of {library} is chosen by the machine's features (IFUNC), and no image of the process has a slot in which that is done")]
    NotChosen {
        /// The import.
        symbol: String,
        /// The library.
        library: String,
    },
}

impl LinkError {
    /// What to do about it.
    #[must_use]
    pub fn remedy(&self) -> &'static str {
        match self {
            Self::NotLoaded { .. } => "use what the program has loaded, or restart with the new build",
            Self::Missing { .. } => "build against the libraries that the process runs with, or restart",
            Self::Ambiguous { .. } => "link the new build against a library with symbol versions",
            Self::ThreadLocal { .. } => "use a function of the library that returns its address",
            Self::NotChosen { .. } => "call it through a function that the program uses already",
        }
    }
}

/// Every image of a process with a dynamic section, in the order in which symbols are searched.
pub struct Scope<'i> {
    /// Those that are searched, the executable first.
    searched: Vec<Tables<'i>>,
    /// All others.
    others: Vec<Tables<'i>>,
}

impl<'i> Scope<'i> {
    /// Reads the tables of all images, for what `target` imports. `main` is the executable; `order` lists addresses in the
    /// images' dynamic sections in the order in which they were loaded, as far as the process tells.
    pub fn read<M: ReadMemory + ?Sized>(
        memory: &M,
        images: &'i [Image],
        main: &Image,
        target: &Image,
        order: &[ProcAddr],
    ) -> Self {
        let mut left: Vec<Tables<'i>> =
            images.iter().filter(|i| !i.name.starts_with('[')).filter_map(|i| Tables::read(memory, i)).collect();
        let rank = |t: &Tables<'_>| order.iter().position(|at| t.image.range.contains(*at)).unwrap_or(usize::MAX);
        left.sort_by_key(rank);
        let mut searched: Vec<Tables<'i>> = Vec::new();
        let take = |left: &mut Vec<Tables<'i>>, wanted: &dyn Fn(&Tables<'_>) -> bool| {
            left.iter().position(wanted).map(|at| left.remove(at))
        };
        searched.extend(take(&mut left, &|t| t.image.range == main.range));
        // What was preloaded stands before the first library that the executable needs.
        let needs = |t: &Tables<'_>, name: &str| t.needed().any(|n| n == name);
        let first = left.iter().position(|t| searched.first().is_some_and(|m| needs(m, t.soname())));
        let preloaded = first.filter(|_| !order.is_empty()).unwrap_or(0);
        searched.extend(left.drain(..preloaded));
        // Breadth first: each adds those that it needs and that are not there yet. What dlopen loaded looks at itself and at
        // what it needs after all others.
        let mut next = 0;
        for _ in 0..2 {
            while next < searched.len() {
                let names: Vec<String> = searched[next].needed().map(str::to_owned).collect();
                for name in names {
                    searched.extend(take(&mut left, &|t| t.soname() == name));
                }
                next += 1;
            }
            searched.extend(take(&mut left, &|t| t.image.range == target.range));
        }
        Self { searched, others: left }
    }

    /// The address of an import in the process; zero for a weak one that is nowhere.
    ///
    /// # Errors
    ///
    /// It has none, or it can't be told.
    pub fn find<M: ReadMemory + ?Sized>(&self, memory: &M, import: &Import) -> Result<ProcAddr, LinkError> {
        let symbol = || import.symbol();
        // What was loaded later (dlopen) is not searched: it may be unloaded again.
        for tables in &self.searched {
            let library = || tables.soname().to_owned();
            let main = self.searched.first().is_some_and(|m| m.image.range == tables.image.range);
            let found = match definition(tables, import, main) {
                Ok(None) => continue,
                Ok(Some(found)) => found,
                Err(Several) => return Err(LinkError::Ambiguous { symbol: symbol(), library: library() }),
            };
            let place = tables.image.to_process(found.value, 0);
            return match (found.kind, place) {
                (STT_TLS, _) => Err(LinkError::ThreadLocal { symbol: symbol(), library: library() }),
                (STT_GNU_IFUNC, _) => self
                    .chosen(memory, tables, found)
                    .ok_or_else(|| LinkError::NotChosen { symbol: symbol(), library: library() }),
                (_, Some(at)) => Ok(at),
                (_, None) => break,
            };
        }
        if import.weak {
            return Ok(ProcAddr(0));
        }
        let all = || self.searched.iter().chain(&self.others);
        if let Some(library) = import.library.clone().filter(|l| !all().any(|t| t.soname() == l)) {
            return Err(LinkError::NotLoaded { symbol: symbol(), library });
        }
        let searched: Vec<&str> = self.searched.iter().map(Tables::soname).collect();
        Err(LinkError::Missing { symbol: symbol(), searched: searched.join(", ") })
    }

    /// What a resolver answered when the process started: from a slot of any image that holds its answer.
    fn chosen<M: ReadMemory + ?Sized>(&self, memory: &M, of: &Tables<'_>, found: Symbol<'_>) -> Option<ProcAddr> {
        let mut answers: Vec<ProcAddr> = Vec::new();
        for tables in self.searched.iter().chain(&self.others) {
            let own = tables.image.range == of.image.range;
            for slot in tables.slots(memory) {
                let at = match slot {
                    Slot::Resolver { at, resolver } if own && resolver == found.value => at,
                    Slot::Symbol { at, index } if !own && self.refers(tables, index, found) => at,
                    _ => continue,
                };
                let Some(value) = tables.image.to_process(at, 8).and_then(|at| memory.read_u64(at).ok()) else {
                    continue;
                };
                // Code of its library: a stub that still has to ask lies in the slot's own image.
                let answer = of.image.range.contains(ProcAddr(value))
                    && of.image.to_process(found.value, 0) != Some(ProcAddr(value));
                answers.extend(answer.then_some(ProcAddr(value)));
            }
        }
        answers.sort_unstable();
        answers.dedup();
        // Two answers: somebody has put another function there.
        answers.first().copied().filter(|_| answers.len() == 1)
    }

    /// Whether the symbol of this index in an image that imports it means `found`.
    fn refers(&self, tables: &Tables<'_>, index: usize, found: Symbol<'_>) -> bool {
        let searches = self.searched.iter().any(|t| t.image.range == tables.image.range);
        let same = |s: Symbol<'_>| !s.defined && s.name == found.name && s.version == found.version;
        searches && tables.symbol(index).is_some_and(same)
    }
}

/// Several definitions, none of them the default.
struct Several;

/// The definition of an import in one image (dl-lookup.c, check_match).
fn definition<'t>(tables: &'t Tables<'_>, import: &'t Import, main: bool) -> Result<Option<Symbol<'t>>, Several> {
    // The executable's own stub is the address of a function that it imports, if the symbol has a value.
    let offered = |s: &Symbol<'_>| s.defined || main && s.kind == STT_FUNC && s.value.0 != 0;
    let all = || tables.named(&import.name).filter(|s| s.bind != STB_LOCAL && offered(s));
    if let Some(version) = &import.version {
        // An image without versions of its own defines every version; so does a base definition.
        let exact = all().find(|s| s.version == Some(version.as_str()));
        return Ok(
            exact.or_else(|| all().find(|s| s.version.is_none() && !s.hidden || !tables.is_versioned() && s.defined))
        );
    }
    let mut defaults = all().filter(|s| !s.hidden);
    let (first, second) = (defaults.next(), defaults.next());
    match (first, second) {
        (Some(_), Some(_)) => Err(Several),
        (Some(found), None) => Ok(Some(found)),
        // Only old versions: which of them, nobody says.
        (None, _) => all().next().map_or(Ok(None), |s| if s.index <= 2 { Ok(Some(s)) } else { Err(Several) }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::Unreadable;
    use crate::patch::ImportKind;

    /// This very process.
    struct Own;

    impl ReadMemory for Own {
        fn read_exact(&self, at: ProcAddr, buf: &mut [u8]) -> Result<(), Unreadable> {
            use std::os::unix::fs::FileExt;
            let bad = Unreadable { at, len_bytes: buf.len() as u64 };
            let file = std::fs::File::open("/proc/self/mem").map_err(|_| bad)?;
            file.read_exact_at(buf, at.0).map_err(|_| bad)
        }
    }

    fn import(name: &str, version: Option<&str>) -> Import {
        let library = version.map(|_| "libc.so.6".to_owned());
        let (name, version) = (name.to_owned(), version.map(str::to_owned));
        Import { name, version, library, kind: ImportKind::Function, weak: false }
    }

    fn find(imports: &[Import]) -> Vec<Result<ProcAddr, LinkError>> {
        let maps = crate::maps::parse(&std::fs::read("/proc/self/maps").unwrap()).unwrap();
        let images = crate::image::find_images(&Own, &maps);
        let main = images.iter().find(|i| i.has_interpreter() && i.name.contains("livepatch")).expect("this program");
        let order = main.load_order(&Own);
        assert!(order.len() > 2, "{order:?}");
        let scope = Scope::read(&Own, &images, main, main, &order);
        imports.iter().map(|i| scope.find(&Own, i)).collect()
    }

    #[test]
    fn functions_are_where_this_program_has_them() {
        // The last two are chosen by the machine's features.
        let known = [
            ("getppid", libc::getppid as *const () as usize),
            ("realpath", libc::realpath as *const () as usize),
            ("strlen", libc::strlen as *const () as usize),
            ("memcpy", libc::memcpy as *const () as usize),
        ];
        let found = find(&known.map(|(name, _)| import(name, None)));
        for ((name, at), found) in known.into_iter().zip(found) {
            assert_eq!(found, Ok(ProcAddr(at as u64)), "{name}");
        }
    }

    #[test]
    fn a_version_decides() {
        let all = [("realpath", "GLIBC_2.3"), ("realpath", "GLIBC_2.2.5")].map(|(n, v)| import(n, Some(v)));
        let found = find(&all);
        assert_eq!(found[0], Ok(ProcAddr(libc::realpath as *const () as usize as u64)));
        assert!(found[1].is_ok() && found[0] != found[1], "{found:?}");
    }

    #[test]
    fn what_is_not_there_is_named() {
        let mut lost = import("no_such_function", Some("GLIBC_2.2.5"));
        let wrong = import("realpath", Some("GLIBC_9.9"));
        let mut foreign = import("no_such_function", Some("X_1"));
        foreign.library = Some("libnowhere.so.1".into());
        let found = find(&[lost.clone(), wrong, foreign]);
        assert!(
            matches!(&found[0], Err(LinkError::Missing { symbol, .. }) if symbol == "no_such_function@GLIBC_2.2.5")
        );
        assert!(matches!(&found[1], Err(LinkError::Missing { symbol, .. }) if symbol == "realpath@GLIBC_9.9"));
        assert!(matches!(&found[2], Err(LinkError::NotLoaded { library, .. }) if library == "libnowhere.so.1"));
        lost.weak = true;
        assert_eq!(find(&[lost]), [Ok(ProcAddr(0))]);
        let tls = find(&[import("errno", Some("GLIBC_PRIVATE"))]);
        assert!(matches!(&tls[0], Err(LinkError::ThreadLocal { .. })), "{tls:?}");
    }
}
