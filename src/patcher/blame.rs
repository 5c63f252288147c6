//! Tells who stands where: the thread that kept a patch from being applied, with its backtrace. Nobody is held.

use std::fs::File;
use std::io::Read;
use std::os::unix::fs::FileExt;

use super::error::{NotQuiescent, TraceLine};
use crate::addr::{ImageAddr, ProcAddr};
use crate::elf::FunctionNames;
use crate::image::Image;
use crate::memory::ReadMemory;
use crate::process::ptrace::{procfs, PtraceProcess};
use crate::process::{HoldError, Process, Tid};
use crate::quiesce::{NotClear, Why};
use crate::stack::{Cfi, Frame, Unwinder};

/// Frames that are shown at most.
const MAX_LINES: usize = 64;

pub(super) fn not_quiescent(
    process: &PtraceProcess,
    images: &[Image],
    cfi: Option<&Cfi>,
    error: &HoldError,
    blocked: Option<NotClear>,
    attempts: u32,
) -> NotQuiescent {
    let pid = process.pid();
    let name = |tid: Tid| Some(procfs::thread_name(pid, tid));
    let Some(blocked) = blocked else {
        let tid = match error {
            HoldError::NotClear(tid) | HoldError::Deadline(tid) => Some(*tid),
            HoldError::Process(_) => None,
        };
        let reason = "could not be stopped in time (it sleeps where it cannot be interrupted, or the machine is busy)";
        return NotQuiescent {
            taken_back: false,
            tid: tid.map(|t| t.0),
            thread: tid.and_then(name),
            function: None,
            reason: reason.into(),
            backtrace: Vec::new(),
            attempts,
        };
    };
    let (function, reason) = match &blocked.why {
        Why::Inside { function } => (Some(function.clone()), format!("is inside {function}")),
        Why::Unproven { function, error } => {
            let of = function.as_deref().unwrap_or("a function of the patch");
            (function.clone(), format!("may be inside {of}: its stack cannot be followed to its end ({error})"))
        }
        _ => (None, "may be inside a function of the patch".into()),
    };
    let backtrace = cfi.map(|cfi| backtrace(process, images, cfi, &blocked)).unwrap_or_default();
    let tid = blocked.tid();
    NotQuiescent { taken_back: false, tid: Some(tid.0), thread: name(tid), function, reason, backtrace, attempts }
}

fn backtrace(process: &PtraceProcess, images: &[Image], cfi: &Cfi, blocked: &NotClear) -> Vec<TraceLine> {
    let memory = blocked.stack.over(process);
    let mut frames: Vec<Frame> = Vec::new();
    let mut look = |frame| {
        if frames.len() < MAX_LINES {
            frames.push(frame);
        }
    };
    // What could be followed is shown.
    let _ = Unwinder::new(cfi, &memory).walk(&blocked.thread.registers, &mut look);
    let mut names: Vec<Option<FunctionNames>> = vec![None; images.len()];
    frames.into_iter().map(|f| line(process, images, &mut names, f)).collect()
}

fn line(process: &PtraceProcess, images: &[Image], names: &mut [Option<FunctionNames>], frame: Frame) -> TraceLine {
    let pc = format!("{:#014x}", frame.pc.0);
    let look_up = if frame.exact { Some(frame.pc) } else { frame.pc.checked_sub(1) };
    let found = images.iter().zip(names).find(|(i, _)| look_up.is_some_and(|at| i.range.contains(at)));
    let Some((image, names)) = found else {
        return TraceLine { pc, place: "(no image: a patch, or code made at run time)".into() };
    };
    let names = names.get_or_insert_with(|| read_names(process, image));
    let at = look_up.and_then(|at| image.bias.to_image(at));
    let place = match at.and_then(|at| names.find(at)) {
        Some((name, offset)) => {
            let offset = offset + u64::from(!frame.exact);
            format!("{}+{offset:#x} ({})", demangle(name), image.short_name())
        }
        None => {
            let offset = image.bias.to_image(frame.pc).map_or(0, |a| a.0);
            format!("{}+{offset:#x}", image.short_name())
        }
    };
    TraceLine { pc, place }
}

/// The file that an image was mapped from, as the process sees it; `None` if it is not that file any more.
pub(super) fn file_of(process: &PtraceProcess, image: &Image) -> Option<File> {
    let pid = process.pid();
    let (start, end) = (image.range.start.0, process.mappings().ok());
    let end = end.and_then(|maps| crate::maps::find(&maps, ProcAddr(start)).map(|m| m.range.end.0));
    let by_mapping = end.map(|end| format!("/proc/{pid}/map_files/{start:x}-{end:x}"));
    let by_name = format!("/proc/{pid}/root{}", image.name);
    let file = by_mapping.into_iter().chain([by_name]).find_map(|path| File::open(path).ok())?;
    let mut front = vec![0; crate::elf::HEAD_BYTES];
    let len = file.read_at(&mut front, 0).ok()?;
    let head = crate::elf::Head::parse(front.get(..len)?);
    head.is_ok_and(|h| h == image.head).then_some(file)
}

/// A section of the file that an image was mapped from.
pub(super) fn section_of(process: &PtraceProcess, image: &Image, name: &str) -> Option<(ImageAddr, u64)> {
    let file = file_of(process, image)?;
    let read = |offset, len| {
        let mut bytes = vec![0; len];
        file.read_exact_at(&mut bytes, offset).ok().map(|()| bytes)
    };
    crate::elf::section(&read, name)
}

/// The functions of an image: from its file, else from its dynamic symbols in memory.
fn read_names(process: &PtraceProcess, image: &Image) -> FunctionNames {
    let mut bytes = Vec::new();
    if file_of(process, image).is_some_and(|mut file| file.read_to_end(&mut bytes).is_ok()) {
        return FunctionNames::parse(&bytes);
    }
    let symbols = image.dynamic_symbols(process as &dyn ReadMemory);
    FunctionNames::from_list(symbols.into_iter().filter_map(|s| Some((s.at?, s.len_bytes, s.name))).collect())
}

/// A symbol, readable.
fn demangle(symbol: &str) -> String {
    if let Ok(name) = rustc_demangle::try_demangle(symbol) {
        return format!("{name:#}");
    }
    cpp_demangle::Symbol::new(symbol).ok().and_then(|s| s.demangle().ok()).unwrap_or_else(|| symbol.to_owned())
}
