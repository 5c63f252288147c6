//! Which thread may be borrowed to call `__register_frame`: that takes libgcc's lock and allocates, so the thread
//! must hold no lock of the loader, an allocator, the unwinder or the C library.
//!
//! Bias: a thread is proven idle by a strict unwind to its root in which the C library appears only as the wait
//! itself, innermost, and as the thread's start, outermost; or it is not idle.

use std::collections::HashMap;

use crate::addr::{ImageAddr, ProcAddr, ProcRange};
use crate::elf::FunctionNames;
use crate::image::Image;
use crate::maps::{self, Mapping};
use crate::memory::ReadMemory;
use crate::patch::{CodeRange, Linked, WAITS};
use crate::process::{HeldThread, IdleCheck};
use crate::stack::{Cfi, Frame, Unwinder};

/// Room that the called function must have on the stack.
const ROOM_BYTES: u64 = 64 << 10;

#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    Libc,
    Forbidden,
    Other,
}

/// Judges threads.
pub(super) struct Idle<'a> {
    cfi: &'a Cfi,
    /// Each image with its kind.
    images: Vec<(ProcRange, Kind)>,
    libc: Option<&'a Image>,
    names: FunctionNames,
    maps: &'a [Mapping],
    waits: HashMap<&'static str, ()>,
    /// What a static program has of the C library: where it waits, and all of it.
    linked: Option<(Vec<ProcRange>, Vec<ProcRange>)>,
}

impl<'a> Idle<'a> {
    /// `linked` tells what a static program, the image, has of the C library.
    pub fn new(
        memory: &dyn ReadMemory,
        images: &'a [Image],
        maps: &'a [Mapping],
        cfi: &'a Cfi,
        linked: Option<(&Image, &Linked)>,
    ) -> Self {
        let libc = images.iter().find(|i| is_libc(i));
        let symbols = libc.map(|l| l.dynamic_symbols(memory)).unwrap_or_default();
        // Where several names share an address, a known wait goes first.
        let waits: HashMap<&'static str, ()> = WAITS.iter().map(|w| (*w, ())).collect();
        let mut named: HashMap<ImageAddr, (u64, String)> = HashMap::new();
        for s in symbols {
            let Some(at) = s.at else { continue };
            if waits.contains_key(s.name.as_str()) || !named.contains_key(&at) {
                named.insert(at, (s.len_bytes, s.name));
            }
        }
        let names = FunctionNames::from_list(named.into_iter().map(|(at, (len, name))| (at, len, name)).collect());
        let images = images.iter().map(|i| (i.range, kind(i))).collect();
        let linked = linked.map(|(image, linked)| {
            let ranges = |list: &[CodeRange]| {
                list.iter().filter_map(|c| ProcRange::new(image.to_process(c.at, c.size)?, c.size)).collect()
            };
            (ranges(&linked.waits), ranges(&linked.runtime))
        });
        Self { cfi, images, libc, names, maps, waits, linked }
    }

    fn kind(&self, pc: ProcAddr) -> Kind {
        if let Some((waits, runtime)) = &self.linked {
            if waits.iter().chain(runtime).any(|r| r.contains(pc)) {
                return Kind::Libc;
            }
        }
        self.images.iter().find(|(r, _)| r.contains(pc)).map_or(Kind::Other, |(_, k)| *k)
    }

    /// Whether a frame of the C library is in one of the functions that merely wait.
    fn waits_at(&self, frame: Frame) -> bool {
        let pc = if frame.exact { Some(frame.pc) } else { frame.pc.checked_sub(1) };
        if let Some((waits, _)) = &self.linked {
            return pc.is_some_and(|pc| waits.iter().any(|w| w.contains(pc)));
        }
        let place = self.libc.zip(pc).and_then(|(l, pc)| self.names.find(l.bias.to_image(pc)?));
        place.is_some_and(|(name, _)| self.waits.contains_key(name))
    }

    fn has_room(&self, thread: &HeldThread) -> bool {
        let sp = thread.registers.sp();
        maps::find(self.maps, sp).is_some_and(|m| {
            // The kernel lets the main stack grow.
            m.write && (m.name == "[stack]" || sp.offset_from(m.range.start).is_some_and(|room| room >= ROOM_BYTES))
        })
    }
}

fn is_libc(image: &Image) -> bool {
    let name = image.short_name();
    name.starts_with("libc.so") || name.starts_with("libc-2") || name.starts_with("libpthread")
}

fn kind(image: &Image) -> Kind {
    let name = image.short_name();
    if is_libc(image) || name == "[vdso]" {
        Kind::Libc
    } else if name.starts_with("ld-") || name.starts_with("libgcc_s") || name.contains("alloc") {
        Kind::Forbidden
    } else {
        Kind::Other
    }
}

impl IdleCheck for Idle<'_> {
    fn is_idle(&mut self, thread: &HeldThread, memory: &dyn ReadMemory) -> bool {
        let mut frames: Vec<(Frame, Kind)> = Vec::new();
        let mut look = |frame: Frame| frames.push((frame, self.kind(frame.pc)));
        if Unwinder::new(self.cfi, memory).walk(&thread.registers, &mut look).is_err() || !self.has_room(thread) {
            return false;
        }
        if frames.iter().any(|(f, k)| *k == Kind::Forbidden || f.exact && f.pc != thread.registers.pc) {
            return false;
        }
        // The innermost run of libc frames must end in a wait that is known.
        let wait = frames.iter().take_while(|(_, k)| *k == Kind::Libc).count();
        let Some((outermost_of_wait, _)) = wait.checked_sub(1).and_then(|i| frames.get(i)) else { return false };
        if wait == frames.len() || !self.waits_at(*outermost_of_wait) {
            return false;
        }
        // After it, libc only as the thread's start: at most two frames at the end, before `_start` perhaps.
        let rest = frames.get(wait..).unwrap_or(&[]);
        let first_libc = rest.iter().position(|(_, k)| *k == Kind::Libc).unwrap_or(rest.len());
        rest.len() - first_libc <= 3
    }
}
