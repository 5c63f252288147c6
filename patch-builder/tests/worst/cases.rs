//! Programs that are hard on a differ: each grows with one number, and is built twice, with one change between the two.
//! `tests/worst/main.rs` checks the answers at small sizes, `benches/worst.rs` time and memory at large ones.

use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::process::Command;

/// What must come of a pair of builds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Answer {
    /// A patch that replaces or brings so many functions.
    Patch(usize),
    /// As many as the size says, and so many more.
    PatchAll(usize),
    /// Refused by this rule.
    Refused(&'static str),
}

/// A kind of program.
pub struct Case {
    /// What it is called.
    pub name: &'static str,
    /// A size for tests.
    #[allow(dead_code, reason = "used by the tests only")]
    pub small: usize,
    /// A size for benches.
    #[allow(dead_code, reason = "used by the benches only")]
    pub large: usize,
    /// The answer at every size.
    pub answer: Answer,
    /// For the compiler and the linker.
    pub flags: &'static [&'static str],
    /// Writes the old or the new (`true`) source.
    pub source: fn(usize, bool) -> String,
}

/// All of them.
pub const CASES: &[Case] = &[
    Case { name: "twins", small: 40, large: 2_000, answer: Answer::Patch(1), flags: &["-O1"], source: twin },
    Case { name: "equal bodies", small: 200, large: 10_000, answer: Answer::Patch(1), flags: &["-O1"], source: equal },
    Case {
        name: "folded bodies",
        small: 200,
        large: 10_000,
        answer: Answer::Refused("icf"),
        flags: &["-O1", "-ffunction-sections", "-fuse-ld=lld", "-Wl,--icf=all"],
        source: equal,
    },
    Case {
        name: "long function",
        small: 2_000,
        large: 50_000,
        answer: Answer::Patch(1),
        flags: &["-O0"],
        source: long,
    },
    Case {
        name: "relocations",
        small: 10_000,
        large: 200_000,
        answer: Answer::Patch(1),
        flags: &["-O1"],
        source: relocations,
    },
    Case {
        name: "chain of named constants",
        small: 500,
        large: 10_000,
        answer: Answer::Refused("initial-value"),
        flags: &["-O1"],
        source: named_chain,
    },
    Case {
        name: "chain of unnamed constants",
        small: 50,
        large: 40,
        answer: Answer::Patch(1),
        flags: &["-O1"],
        source: unnamed_chain,
    },
    Case {
        name: "new chain of constants",
        small: 20_000,
        large: 10_000,
        answer: Answer::Patch(1),
        flags: &["-O1"],
        source: new_chain,
    },
    Case {
        name: "types by pointer",
        small: 500,
        large: 25_000,
        answer: Answer::Refused("layout"),
        flags: &["-O1"],
        source: pointed,
    },
    Case {
        name: "types by value",
        small: 500,
        large: 2_500,
        answer: Answer::Refused("layout"),
        flags: &["-O1"],
        source: nested,
    },
    Case {
        name: "everything changed",
        small: 200,
        large: 20_000,
        answer: Answer::PatchAll(0),
        flags: &["-O1"],
        source: everything,
    },
    Case { name: "jump table", small: 2_000, large: 50_000, answer: Answer::Patch(1), flags: &["-O0"], source: jumps },
    Case { name: "long names", small: 5_000, large: 400_000, answer: Answer::Patch(8), flags: &["-O1"], source: names },
    Case { name: "strings", small: 2_000, large: 200_000, answer: Answer::Patch(1), flags: &["-O1"], source: strings },
    Case { name: "one string", small: 2_000, large: 10_000, answer: Answer::Patch(1), flags: &["-O1"], source: pool },
];

const START: &str = "#define NOINLINE __attribute__((noinline))\nlong sink;\n";

/// The function with the change, and what calls it.
fn fix(out: &mut String, new: bool, more: &str) {
    let k = if new { 5 } else { 3 };
    let _ = writeln!(out, "NOINLINE long fix(long n) {{ return n * {k} + sink{more}; }}");
    out.push_str("int main(int argc, char **argv) { (void)argv; return (int)fix(argc); }\n");
}

fn twin(_: usize, new: bool) -> String {
    let mut out = START.to_owned();
    fix(&mut out, new, "");
    out
}

/// One unit of many that are equal but for one name and, in the changed one, a number.
fn twin_unit(kind: usize, changed: bool) -> String {
    let k = kind + if changed { 90 } else { 2 };
    format!(
        "extern long sink;\nstatic long seen;\nstatic __attribute__((noinline)) long helper(long n) {{ seen += n; return n * {k} + sink; }}\n\
         long unit_0(long n) {{ return helper(n) + seen; }}\n"
    )
}

fn equal(n: usize, new: bool) -> String {
    let mut out = START.to_owned();
    for i in 0..n {
        let k = if new && i == n / 2 { 9 } else { 7 };
        let _ = writeln!(out, "NOINLINE long same_{i}(long n) {{ return n * {k} + sink; }}");
    }
    let list: Vec<String> = (0..n).map(|i| format!("same_{i}")).collect();
    let _ = writeln!(out, "long (*table[])(long) = {{ {} }};", list.join(", "));
    fix(&mut out, false, " + table[n & 7](n)");
    out
}

fn long(n: usize, new: bool) -> String {
    let mut out = format!("{START}long a[8];\nNOINLINE long body(long x) {{\n");
    for i in 0..n {
        let k = if new && i == n / 2 { 77 } else { 31 };
        let _ = writeln!(out, "x = x * {k} + a[{}];", i % 8);
        // A compiler is slow on blocks without end.
        if i % 16 == 15 {
            let _ = writeln!(out, "if (x == {i}) return a[0];");
        }
    }
    out.push_str("return x; }\n");
    fix(&mut out, false, " + body(n)");
    out
}

fn relocations(n: usize, new: bool) -> String {
    let mut out = START.to_owned();
    fix(&mut out, new, " + many[n] + all[n]");
    let table = |name: &str, what: &str, section: &str| {
        format!("asm(\".section {section}\\n.globl {name}\\n.type {name}, @object\\n{name}:\\n.rept {n}\\n.quad {what}\\n.endr\\n.size {name}, .-{name}\\n.text\");\nextern long {name}[];\n")
    };
    format!(
        "{}{}{out}",
        table("many", "fix", ".data.many,\\\"aw\\\""),
        table("all", "sink", ".data.rel.ro.all,\\\"aw\\\"")
    )
}

fn named_chain(n: usize, new: bool) -> String {
    let mut out = format!("{START}struct node {{ const struct node *next; long v; }};\n");
    let _ = writeln!(out, "static const struct node c0 = {{ 0, {} }};", if new { 2 } else { 1 });
    for i in 1..=n {
        let _ = writeln!(out, "static const struct node c{i} = {{ &c{}, {i} }};", i - 1);
    }
    named_walk(&mut out, n);
    fix(&mut out, false, " + walk(n)");
    out
}

fn named_walk(out: &mut String, n: usize) {
    let _ = writeln!(out, "NOINLINE long walk(long n) {{ const struct node *p = &c{n}; while (n-- && p->next) p = p->next; return p->v; }}");
}

fn chain(n: usize, last: u32) -> String {
    let mut out = format!("asm(\".section .data.rel.ro.local,\\\"aw\\\"\\n.balign 16\\n.Lc0: .quad 0, {last}\\n");
    for i in 1..=n {
        let _ = write!(out, ".Lc{i}: .quad .Lc{}, {i}\\n", i - 1);
    }
    out.push_str(".text\");\n");
    out
}

const WALK: &str = "NOINLINE long walk(long n) { const struct node *p; asm volatile(\"lea .LcEND(%%rip), %0\" : \"=r\"(p)); while (n-- && p->next) p = p->next; return p->v; }\n";

fn unnamed_chain(n: usize, new: bool) -> String {
    let walk = WALK.replace("END", &n.to_string());
    let mut out = format!(
        "{START}struct node {{ const struct node *next; long v; }};\n{}{walk}",
        chain(n, if new { 2 } else { 1 })
    );
    fix(&mut out, false, " + walk(n)");
    out
}

fn new_chain(n: usize, new: bool) -> String {
    let mut out = format!("{START}struct node {{ const struct node *next; long v; }};\n");
    if new {
        out.push_str("static const struct node c0 = { 0, 1 };\n");
        (1..=n).for_each(|i| out.push_str(&format!("static const struct node c{i} = {{ &c{}, {i} }};\n", i - 1)));
        named_walk(&mut out, n);
    } else {
        out.push_str("NOINLINE long walk(long n) { return n * 3 + sink; }\n");
    }
    fix(&mut out, false, " + walk(n)");
    out
}

fn types(n: usize, new: bool, link: &str) -> String {
    let mut out = format!("{START}struct t0 {{ int x; {} }};\n", if new { "long more;" } else { "" });
    for i in 1..=n {
        let _ = writeln!(out, "struct t{i} {{ struct t{} {link}; int x; }};", i - 1);
    }
    let _ = writeln!(out, "struct t{n} *kept;");
    out.push_str("NOINLINE int first(struct t0 *p) { return p->x + (int)sizeof *p; }\n");
    fix(&mut out, new, " + first((struct t0 *)kept)");
    out
}

fn pointed(n: usize, new: bool) -> String {
    types(n, new, "*p")
}

fn nested(n: usize, new: bool) -> String {
    types(n, new, "v")
}

fn everything(n: usize, new: bool) -> String {
    let k = if new { 11 } else { 13 };
    let mut out = format!("{START}NOINLINE long f_0(long n) {{ return n * {k} + sink; }}\n");
    for i in 1..n {
        let _ = writeln!(out, "NOINLINE long f_{i}(long n) {{ return n > {i} ? f_{}(n * {k}) : n - {i}; }}", i / 2);
    }
    let list: Vec<String> = (0..n).map(|i| format!("f_{i}")).collect();
    let _ = writeln!(out, "long (*table[])(long) = {{ {} }};", list.join(", "));
    fix(&mut out, false, " + table[n & 7](n)");
    out
}

fn jumps(n: usize, new: bool) -> String {
    let mut out = format!("{START}NOINLINE long pick(long n) {{ long x = n; switch (n) {{\n");
    for i in 0..n {
        let _ = writeln!(out, "case {i}: x += {}; break;", if new && i == n / 2 { n + 7 } else { i });
    }
    out.push_str("default: x = 0; }\nreturn x; }\n");
    fix(&mut out, false, " + pick(n)");
    out
}

fn names(n: usize, new: bool) -> String {
    let k = if new { 5 } else { 3 };
    let repeat = |s: &str| s.repeat(n / s.len());
    let texts = [
        "plain_".to_owned() + &repeat("name"),
        format!("_ZN{}E", repeat("1a")),
        format!("_Z1f{}i", repeat("P")),
        format!("_Z1fI{}iE{}vv", repeat("1aI"), repeat("E")),
        format!("_R{}C1a{}", repeat("Nv"), repeat("1b")),
        format!("_RINvC1a1f{}hE", repeat("R")),
        format!("_ZN1a{}17h0123456789abcdefE", repeat("2$u20$")),
        format!("_Z1fDp{}", repeat("T_")),
    ];
    let mut out = START.to_owned();
    let mut calls = String::new();
    for (i, text) in texts.iter().enumerate() {
        let _ =
            writeln!(out, "long g{i}(long) asm(\"{text}\");\nNOINLINE long g{i}(long n) {{ return n * {k} + {i}; }}");
        let _ = write!(calls, " + g{i}(n)");
    }
    fix(&mut out, false, &calls);
    out
}

fn strings(n: usize, new: bool) -> String {
    let mut out = format!("{START}const char *table[] = {{\n");
    for i in 0..n {
        let _ = writeln!(out, "\"text number {i} of the table\",");
    }
    out.push_str("};\n");
    fix(&mut out, new, " + (long)table[n]");
    out
}

/// Text without an end in sight, into which a table refers everywhere.
fn pool(n: usize, new: bool) -> String {
    let mut out = format!("{START}asm(\".section .rodata.pool,\\\"a\\\"\\n.Lpool: .rept {n}\\n.ascii \\\"abcdefgh\\\"\\n.endr\\n.byte 0\\n.text\");\n");
    out.push_str("NOINLINE long pick(long n) { const char *p; long sum = n;\n");
    for i in 0..n {
        let _ = writeln!(out, "asm volatile(\"lea .Lpool+{}(%%rip), %0\" : \"=r\"(p)); sum += *p;", i * 8);
    }
    out.push_str("return sum; }\n");
    fix(&mut out, new, " + pick(n)");
    out
}

fn run(command: &mut Command) {
    let done = command.output().expect("the compiler runs");
    let said = String::from_utf8_lossy(&done.stderr);
    assert!(done.status.success(), "{command:?}: {}", said.chars().take(2000).collect::<String>());
}

fn compiler(folder: &Path) -> Command {
    let mut gcc = Command::new("gcc");
    gcc.current_dir(folder).args(["-g", "-w", "-fPIE", "-pipe", "-fno-ipa-icf", "-fcf-protection=none"]);
    gcc
}

/// Builds the old and the new program of a case in `folder`, unless they are there.
pub fn build(case: &Case, n: usize, folder: &Path) -> [PathBuf; 2] {
    let name = format!("{}-{n}", case.name.replace(' ', "-"));
    let work = folder.join(format!("{name}.work"));
    let made = ["old", "new"].map(|b| folder.join(format!("{name}.{b}")));
    if made.iter().all(|m| m.exists()) {
        return made;
    }
    std::fs::create_dir_all(&work).expect("the folder is writable");
    let units = if case.name == "twins" { twin_units(n, &work) } else { Vec::new() };
    for (i, target) in made.iter().enumerate() {
        let new = i == 1;
        let source = (case.source)(n, new && case.name != "twins");
        std::fs::write(work.join("main.c"), source).expect("the folder is writable");
        let mut list = String::from("main.o\n");
        for (u, unit) in units.iter().enumerate() {
            let _ = writeln!(list, "{}", if new && u == n / 2 { "changed.o" } else { unit });
        }
        std::fs::write(work.join("objects"), list).expect("the folder is writable");
        run(compiler(&work).args(case.flags).args(["-c", "main.c"]));
        let link = ["-pie", "-Wl,--emit-relocs", "-Wl,--build-id", "@objects", "-o"];
        run(compiler(&work).args(case.flags).args(link).arg(target));
    }
    std::fs::remove_dir_all(&work).expect("the folder can be removed");
    made
}

/// Objects that differ in one name: compiled once for each kind, then assembled from the text.
fn twin_units(n: usize, work: &Path) -> Vec<String> {
    let text = |kind: usize, changed: bool| {
        std::fs::write(work.join("unit_0.c"), twin_unit(kind, changed)).expect("the folder is writable");
        run(compiler(work).args(["-O1", "-S", "unit_0.c"]));
        std::fs::read_to_string(work.join("unit_0.s")).expect("the compiler wrote it")
    };
    let texts: Vec<String> = (0..4).map(|kind| text(kind, false)).collect();
    let assemble = |text: &str, unit: usize, name: &str| {
        std::fs::write(work.join("unit.s"), text.replace("unit_0", &format!("unit_{unit}"))).expect("writable");
        run(Command::new("as").current_dir(work).args(["unit.s", "-o", name]));
    };
    assemble(&text(n / 2 % 4, true), n / 2, "changed.o");
    (0..n)
        .map(|unit| {
            let name = format!("unit_{unit}.o");
            assemble(&texts[unit % 4], unit, &name);
            name
        })
        .collect()
}
