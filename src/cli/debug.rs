//! `livepatch symbols`: one file for each patch, and what gdb is to be told.

use std::path::Path;

use livepatch::patcher::Patcher;
use livepatch::process::Pid;
use livepatch::registry;
use livepatch::symbols::{self, Core, SymbolFile};

use super::args::SymbolsArgs;
use super::fail;

pub fn symbols(args: &SymbolsArgs) -> u8 {
    let found = match args.of.parse::<i32>() {
        Ok(pid) if !Path::new(&args.of).exists() => match Patcher::open(Pid(pid)).and_then(|p| p.symbols()) {
            Ok(found) => found,
            Err(e) => return fail(Some(pid), &e.into(), false),
        },
        _ => match of_core(Path::new(&args.of)) {
            Ok(found) => found,
            Err(e) => {
                eprintln!("livepatch: {}: {e}", args.of);
                return 1;
            }
        },
    };
    if found.is_empty() {
        eprintln!("livepatch: {}: no patch lies in it", args.of);
        return 1;
    }
    let of = Path::new(&args.of).file_name().map_or_else(|| "core".into(), |n| n.to_string_lossy());
    for (i, s) in found.iter().enumerate() {
        if args.perf {
            print!("{}", s.perf_map);
            continue;
        }
        let path = args.dir.join(format!("{}-{of}-{i}.sym", s.patch.replace('/', "_")));
        let path = std::path::absolute(&path).unwrap_or(path);
        if let Err(e) = std::fs::write(&path, &s.elf) {
            eprintln!("livepatch: {}: {e}", path.display());
            return 1;
        }
        println!("add-symbol-file {}", path.display());
    }
    0
}

fn of_core(path: &Path) -> Result<Vec<SymbolFile>, String> {
    let core = Core::open(path).map_err(|e| e.to_string())?;
    let records = registry::find(&core, core.mappings()).map_err(|broken| broken.error.to_string())?;
    Ok(records.iter().map(|found| symbols::of_patch(&core, found)).collect())
}
