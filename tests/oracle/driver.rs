//! What the oracles of C and of Rust share: programs that run and are asked, the judgement of a report, and the run over many seeds.

use std::collections::{BTreeMap, BTreeSet};
use std::io::{BufRead, BufReader, Write};
use std::panic::AssertUnwindSafe;
use std::path::Path;
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::Mutex;

use serde_json::Value;

use super::rng::Rng;
use super::truth::{source_name, Truth};
use crate::support::{run, Ran};

/// Inputs in each phase: old, patched, reverted, patched again.
const INPUTS: usize = 1500;

/// What was changed.
#[derive(Clone, Debug)]
pub struct Mutation {
    pub what: String,
    /// The running process can't have it: a refusal by this rule is the right answer (and so is a patch, if the compiler made nothing of it).
    pub rule: Option<&'static str>,
}

/// Names of functions as the source has them.
pub type Names = BTreeSet<String>;

pub fn succeeds(command: &mut Command) {
    let ran = run(command);
    assert!(ran.code == 0, "{}: exit {}\n{}", ran.line, ran.code, ran.both());
}

/// A running program, which answers each line that is a dot with a dot.
pub struct Process {
    child: Child,
    input: ChildStdin,
    output: BufReader<ChildStdout>,
}

impl Process {
    pub fn start(path: &Path) -> Self {
        let mut child = Command::new(path)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("a program that was just built");
        let (input, output) = (child.stdin.take().expect("piped"), BufReader::new(child.stdout.take().expect("piped")));
        Self { child, input, output }
    }

    pub fn pid(&self) -> String {
        self.child.id().to_string()
    }

    /// Everything that it answers to these lines, up to the dot.
    pub fn ask(&mut self, lines: &str) -> Result<String, String> {
        let mut out = String::new();
        std::thread::scope(|s| {
            let input = &mut self.input;
            s.spawn(move || input.write_all(lines.as_bytes()).and_then(|()| input.flush()));
            loop {
                let mut line = String::new();
                match self.output.read_line(&mut line) {
                    Ok(0) | Err(_) => return Err("the program has ended".to_owned()),
                    Ok(_) if line == ".\n" => return Ok(()),
                    Ok(_) => out += &line,
                }
            }
        })
        .map_err(|e| {
            format!("{e}: {:?}; its last words: {}", self.child.wait(), out.lines().last().unwrap_or("none"))
        })?;
        Ok(out)
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Lines that call every function once, and then any.
pub fn calls(functions: usize, rng: &mut Rng) -> String {
    let mut out = String::new();
    for i in 0..INPUTS {
        let f = if i < functions { i } else { rng.below(functions) };
        let (a, b) = (rng.constant(), rng.constant());
        out += &format!("c {f} {a} {b}\n");
    }
    out
}

/// Whether two programs answered alike; each answer begins with the function's number.
pub fn same(a: &str, b: &str, names: &[&str], what: &str) -> Result<(), String> {
    for (x, y) in a.lines().zip(b.lines()) {
        if x != y {
            let name = x.split(' ').next().and_then(|i| names.get(i.parse::<usize>().ok()?)).unwrap_or(&"?");
            return Err(format!("{what}: {name} (function, argument, result, state) answers {x:?}, not {y:?}"));
        }
    }
    if a.lines().count() == b.lines().count() {
        Ok(())
    } else {
        Err(format!("{what}: answers are missing"))
    }
}

/// What came of many seeds.
#[derive(Default)]
pub struct Tally {
    pub patched: u64,
    pub refused: u64,
    pub nothing: u64,
    pub functions: u64,
    /// Functions that did not truly change, where that may be so.
    pub extra: u64,
    /// Programs whose old and new build answered the same inputs differently.
    pub visible: u64,
    /// Patches that only a thread outside of them all could have, and none was.
    pub waits: u64,
    /// Refusals by rule.
    pub rules: BTreeMap<String, u64>,
}

impl Tally {
    fn add(&mut self, other: &Self) {
        self.patched += other.patched;
        self.refused += other.refused;
        self.nothing += other.nothing;
        self.functions += other.functions;
        self.extra += other.extra;
        self.visible += other.visible;
        self.waits += other.waits;
        for (rule, n) in &other.rules {
            *self.rules.entry(rule.clone()).or_default() += n;
        }
    }
}

fn functions(report: &Value) -> &[Value] {
    report["functions"].as_array().map_or(&[], Vec::as_slice)
}

/// The names, aliases included, of the functions with a status.
pub fn names(report: &Value, status: &str) -> Names {
    let some = functions(report).iter().filter(|f| f["status"] == status).flat_map(|f| {
        let aliases = f["aliases"].as_array().map_or(&[][..], Vec::as_slice);
        std::iter::once(&f["name"]).chain(aliases).filter_map(Value::as_str)
    });
    some.map(source_name).collect()
}

/// Whether the report is right about which functions changed, where the truth is known, or the refusal has a reason that is `fair`.
pub fn judge(
    new: &Path,
    built: &Ran,
    report: &Value,
    truth: Option<&Truth>,
    fair: &dyn Fn(&Value) -> bool,
    tally: &mut Tally,
) -> Result<(), String> {
    match built.code {
        0 => {}
        1 => {
            tally.nothing += 1;
            return match truth {
                Some(t) if !t.certain.is_empty() => Err(format!("nothing differs, it says, but {:?} do", t.certain)),
                _ => Ok(()),
            };
        }
        3 => {
            tally.refused += 1;
            let refusals = report["refusals"].as_array().map_or(&[][..], Vec::as_slice);
            let rules: BTreeSet<&str> = refusals.iter().filter_map(|r| r["rule"].as_str()).collect();
            rules.iter().for_each(|rule| *tally.rules.entry((*rule).to_owned()).or_default() += 1);
            let unfair: Vec<String> =
                refusals.iter().filter(|r| !fair(r)).map(|r| format!("\n  {} {}", r["rule"], r["message"])).collect();
            return if unfair.is_empty() { Ok(()) } else { Err(format!("refused without need:{}", unfair.concat())) };
        }
        code => return Err(format!("exit {code}: {}", built.stderr)),
    }
    tally.patched += 1;
    let told = names(report, "changed");
    tally.functions += told.len() as u64;
    let Some(Truth { certain, possible }) = truth else { return Ok(()) };
    // A function that is nowhere but in its callers is in no linked build.
    let linked = linked(new);
    let all: Names = names(report, "new").union(&told).cloned().collect();
    let missing: Vec<&String> = certain.difference(&all).filter(|n| linked.contains(*n)).collect();
    tally.extra += told.difference(certain).count() as u64;
    let extra: Vec<&String> = possible.iter().flat_map(|all| told.difference(all)).collect();
    if !missing.is_empty() || !extra.is_empty() {
        let reasons = reasons(report);
        return Err(format!("missing {missing:?}, superfluous {extra:?}, of {certain:?}; reasons: {reasons}"));
    }
    Ok(())
}

fn with_symbols<T>(path: &Path, read: impl FnOnce(&object::File) -> T) -> T {
    let bytes = std::fs::read(path).expect("a program that was just built");
    read(&object::File::parse(&*bytes).expect("a program that was just built"))
}

/// The functions of a linked build.
fn linked(path: &Path) -> Names {
    use object::{Object, ObjectSymbol, SymbolKind};
    with_symbols(path, |file| {
        let functions = file.symbols().filter(|s| s.kind() == SymbolKind::Text && s.size() > 0);
        functions.filter_map(|s| s.name().ok().map(source_name)).collect()
    })
}

/// What a linked build has from libraries.
pub fn imports(path: &Path) -> Names {
    use object::{Object, ObjectSymbol};
    with_symbols(path, |file| {
        let undefined = file.dynamic_symbols().filter(ObjectSymbol::is_undefined);
        undefined.filter_map(|s| s.name().ok().map(str::to_owned)).collect()
    })
}

fn reasons(report: &Value) -> String {
    let all = functions(report).iter();
    all.map(|f| format!("\n  {} {}: {}", f["status"], f["name"], f["reason"])).collect()
}

/// Checks the seeds of `ORACLE_SEEDS`, or a dozen and those that once failed, two at a time; fails with every failure.
pub fn run_seeds(mended: &[u64], check: impl Fn(u64, &mut Tally) -> Result<(), String> + Sync) {
    let asked = std::env::var("ORACLE_SEEDS").ok();
    let (from, to) = asked.as_deref().unwrap_or("1..13").split_once("..").expect("ORACLE_SEEDS=FROM..TO");
    let [from, to]: [u64; 2] = [from, to].map(|n| n.parse().expect("a seed"));
    let mended: &[u64] = if asked.is_none() { mended } else { &[] };
    let seeds: Vec<u64> = (from..to).chain(mended.iter().copied()).collect();
    let (next, all, failures) = (AtomicUsize::new(0), Mutex::new(Tally::default()), Mutex::new(Vec::new()));
    std::thread::scope(|s| {
        for _ in 0..2 {
            s.spawn(|| loop {
                let Some(seed) = seeds.get(next.fetch_add(1, Ordering::Relaxed)).copied() else { return };
                let mut tally = Tally::default();
                let checked = std::panic::catch_unwind(AssertUnwindSafe(|| check(seed, &mut tally)));
                if let Err(e) = checked.unwrap_or_else(|_| Err("the check panicked".to_owned())) {
                    println!("seed {seed}: {e}");
                    failures.lock().expect("no check panics").push(format!("seed {seed}: {e}"));
                }
                all.lock().expect("no check panics").add(&tally);
            });
        }
    });
    let (t, failures) = (all.into_inner().expect("no check panics"), failures.into_inner().expect("no check panics"));
    println!(
        "seeds {from} to {}: {} patched ({} functions, {} of them superfluous; {} could only wait, the others live; {} to be seen from outside), {} refused {:?}, {} without difference; {} failed",
        to - 1, t.patched, t.functions, t.extra, t.waits, t.visible, t.refused, t.rules, t.nothing, failures.len()
    );
    assert!(t.patched > 0 && failures.is_empty(), "{} failed\n{}", failures.len(), failures.join("\n\n"));
}
