//! Every kind of process that a patch may meet: it works, or it is refused by name. One line for each.
//!
//!     TARGET=seccomp cargo test --release --test targets -- --nocapture

mod support;

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::mpsc::{channel, Receiver};
use std::time::{Duration, Instant};

use support::{build_patch, livepatch, root, run, scratch, tool, Ran};

type Outcome = Result<String, String>;

/// How a program is linked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Link {
    Pie,
    Fixed,
    Static,
    StaticPie,
    Musl,
    MuslStatic,
}

impl Link {
    fn compiler(self) -> &'static str {
        match self {
            Self::Musl | Self::MuslStatic => "musl-gcc",
            _ => "gcc",
        }
    }

    fn flags(self) -> &'static [&'static str] {
        match self {
            Self::Pie => &["-fPIE", "-pie"],
            Self::Musl => &["-fPIE", "-pie", KERNEL[0], KERNEL[1], KERNEL[2], KERNEL[3]],
            Self::Fixed => &["-fno-pie", "-no-pie"],
            Self::Static => &["-static"],
            Self::MuslStatic => &["-static", KERNEL[0], KERNEL[1], KERNEL[2], KERNEL[3]],
            Self::StaticPie => &["-static-pie"],
        }
    }
}

/// The kernel's headers, which musl does not bring.
const KERNEL: [&str; 4] = ["-idirafter", "/usr/include", "-idirafter", "/usr/include/x86_64-linux-gnu"];

/// The two builds of one program or library, and the patch from one to the other.
struct Pair {
    old: PathBuf,
    fix: PathBuf,
}

fn compile(compiler: &str, source: &Path, out: &Path, fee: u32, flags: &[&str]) -> Result<(), String> {
    let common = ["-g", "-O2", "-w", "-pthread", "-Wl,--emit-relocs", "-Wl,--build-id", "-o"];
    let mut command = Command::new(compiler);
    command.args(common).arg(out).arg(format!("-DFEE={fee}")).args(flags).arg(source).arg("-ldl");
    run(&mut command).expect_code(0).map(drop)
}

fn pair(folder: &Path, source: &str, name: &str, compiler: &str, flags: &[&str]) -> Result<Pair, String> {
    let source = root().join("tests/targets").join(source);
    let place = |side: &str| folder.join(side).join(name);
    for (side, fee) in [("old", 70), ("new", 75)] {
        fs::create_dir_all(folder.join(side)).map_err(|e| e.to_string())?;
        compile(compiler, &source, &place(side), fee, flags)?;
    }
    let fix = folder.join(format!("{name}.fix.so"));
    build_patch(&place("old"), &place("new"), &fix).expect_code(0)?;
    Ok(Pair { old: place("old"), fix })
}

/// A process under test; killed when dropped.
struct Target {
    child: Child,
    stdin: ChildStdin,
    lines: Receiver<String>,
    /// As the host counts.
    pid: u32,
    answers: u32,
    fix: PathBuf,
}

impl Target {
    fn start(command: &mut Command, fix: &Path) -> Result<Self, String> {
        let mut child =
            command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().map_err(|e| format!("{command:?}: {e}"))?;
        let (out, stdin) = (child.stdout.take().expect("piped"), child.stdin.take().expect("piped"));
        let (send, lines) = channel();
        std::thread::spawn(move || BufReader::new(out).lines().map_while(Result::ok).try_for_each(|l| send.send(l)));
        let pid = child.id();
        let mut target = Self { child, stdin, lines, pid, answers: 0, fix: fix.to_owned() };
        let ready = target.line()?;
        if !ready.starts_with("ready ") {
            return Err(ready);
        }
        // Below what brought it into its namespaces.
        while let Some(child) = only_child(target.pid).filter(|_| name_of(target.pid) != "target") {
            target.pid = child;
        }
        Ok(target)
    }

    fn line(&mut self) -> Result<String, String> {
        self.lines.recv_timeout(Duration::from_secs(20)).map_err(|_| match self.child.try_wait() {
            Ok(Some(status)) => format!("the program has ended: {status}"),
            _ => "the program does not answer".into(),
        })
    }

    fn ask(&mut self, question: &str, expected: &str) -> Result<(), String> {
        self.answers += 1;
        writeln!(self.stdin, "{question}").map_err(|e| format!("{question}: {e}"))?;
        let (line, expected) = (self.line()?, format!("{} {expected}", self.answers));
        if line == expected {
            return Ok(());
        }
        Err(format!("{question:?}: the program says {line:?}, expected {expected:?}"))
    }

    fn run(&self, command: &str, more: &[&str]) -> Ran {
        let fix = self.fix.display().to_string();
        let pid = self.pid.to_string();
        let patch = if ["apply", "check"].contains(&command) { Some(&*fix) } else { None };
        let args: Vec<&str> = [command, &pid].into_iter().chain(patch).chain(more.iter().copied()).collect();
        livepatch(&args)
    }

    /// Applied, reverted and applied again, with the right answer after each.
    fn works(&mut self, question: &str) -> Result<(), String> {
        let word = if question == "?" { "fee" } else { question };
        let (old, new) = (format!("{word} 70"), format!("{word} 75"));
        self.ask(question, &old)?;
        for _ in 0..2 {
            self.run("apply", &[]).expect_code(0)?;
            self.ask(question, &new)?;
            let status = self.run("status", &["--json"]).expect_code(0)?.stdout.clone();
            if !status.contains("\"applied\"") {
                return Err(format!("status does not tell: {status}"));
            }
            self.run("revert", &[]).expect_code(0)?;
            self.ask(question, &old)?;
        }
        self.run("apply", &[]).expect_code(0)?;
        self.ask(question, &new)
    }

    /// Refused with this exit code and word; it goes on as it was.
    fn refused(&mut self, code: i32, word: &str) -> Outcome {
        self.ask("?", "fee 70")?;
        let ran = self.run("apply", &["--timeout", "2s", "--json"]);
        ran.expect_code(code)?;
        if !(ran.stdout.clone() + &ran.stderr).contains(word) {
            return Err(format!("the refusal does not say {word:?}: {}", ran.both()));
        }
        self.ask("?", "fee 70")?;
        Ok(format!("refused: {word} (exit {code})"))
    }
}

impl Drop for Target {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = Command::new("kill").args(["-9", &self.pid.to_string()]).stderr(Stdio::null()).status();
        let _ = self.child.wait();
    }
}

fn name_of(pid: u32) -> String {
    fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default().trim().to_owned()
}

fn only_child(pid: u32) -> Option<u32> {
    let list = fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).ok()?;
    list.split_whitespace().next()?.parse().ok()
}

/// What a case gets: the programs, each built once.
struct Workshop {
    folder: PathBuf,
}

impl Workshop {
    fn program(&self, link: Link) -> Result<Pair, String> {
        let folder = self.folder.join(format!("{link:?}"));
        let made = Pair { old: folder.join("old/target"), fix: folder.join("target.fix.so") };
        if made.fix.is_file() {
            return Ok(made);
        }
        pair(&folder, "target.c", "target", link.compiler(), link.flags())
    }

    fn library(&self) -> Result<Pair, String> {
        pair(&self.folder.join("Pie"), "price.c", "libprice.so", "gcc", &["-fPIC", "-shared"])
    }

    /// Starts the program as a process of this kind.
    fn kind(&self, kind: &str) -> Result<Target, String> {
        self.start(Link::Pie, kind)
    }

    fn start(&self, link: Link, kind: &str) -> Result<Target, String> {
        let made = self.program(link)?;
        let folder = made.old.parent().expect("in a folder");
        Target::start(Command::new(&made.old).arg(kind).current_dir(folder), &made.fix)
    }
}

fn works(mut target: Target) -> Outcome {
    target.works("?")?;
    Ok("works".into())
}

fn copy_of(w: &Workshop, name: &str) -> Result<(PathBuf, PathBuf), String> {
    let made = w.program(Link::Pie)?;
    let folder = w.folder.join(name);
    fs::create_dir_all(&folder).map_err(|e| e.to_string())?;
    let copy = folder.join("target");
    let _ = fs::remove_file(&copy);
    fs::copy(&made.old, &copy).map_err(|e| e.to_string())?;
    Ok((copy, made.fix))
}

fn stripped(w: &Workshop) -> Outcome {
    let (copy, fix) = copy_of(w, "stripped")?;
    run(Command::new("strip").arg(&copy)).expect_code(0)?;
    works(Target::start(&mut Command::new(&copy), &fix)?)
}

fn deleted(w: &Workshop) -> Outcome {
    let (copy, fix) = copy_of(w, "deleted")?;
    let target = Target::start(&mut Command::new(&copy), &fix)?;
    fs::remove_file(&copy).map_err(|e| e.to_string())?;
    works(target)
}

fn replaced(w: &Workshop) -> Outcome {
    let (copy, fix) = copy_of(w, "replaced")?;
    let target = Target::start(&mut Command::new(&copy), &fix)?;
    fs::rename(w.folder.join("Pie/new/target"), &copy).map_err(|e| e.to_string())?;
    let done = works(target);
    fs::rename(&copy, w.folder.join("Pie/new/target")).map_err(|e| e.to_string())?;
    done
}

fn by_the_loader(w: &Workshop) -> Outcome {
    let made = w.program(Link::Pie)?;
    works(Target::start(Command::new("/lib64/ld-linux-x86-64.so.2").arg(&made.old), &made.fix)?)
}

fn in_a_chroot(w: &Workshop) -> Outcome {
    let made = w.program(Link::Static)?;
    let jail = made.old.parent().expect("in a folder");
    works(Target::start(Command::new("chroot").arg(jail).arg("/target"), &made.fix)?)
}

fn in_namespaces(w: &Workshop) -> Outcome {
    let made = w.program(Link::Pie)?;
    let mut command = Command::new("unshare");
    command.args([
        "--user",
        "--map-root-user",
        "--mount",
        "--pid",
        "--fork",
        "--mount-proc",
        "--net",
        "--ipc",
        "--uts",
    ]);
    let target = Target::start(command.arg(&made.old), &made.fix)?;
    if target.pid == target.child.id() {
        return Err("it is in no namespace".into());
    }
    works(target)
}

/// Whether a user without rights gets an error in place of a patch.
fn of_another_user(w: &Workshop) -> Outcome {
    let mut target = w.kind("plain")?;
    let fix = target.fix.clone();
    let mut command = Command::new(tool("livepatch"));
    command.args(["apply", &target.pid.to_string()]).arg(&fix);
    command.uid(65534).gid(65534);
    run(&mut command).expect_code(6)?.expect_says(&["no permission"])?;
    target.ask("?", "fee 70")?;
    Ok("no permission (exit 6)".into())
}

fn by_a_user_without_rights(w: &Workshop) -> Outcome {
    let made = w.program(Link::Pie)?;
    let place = std::env::temp_dir().join(format!("livepatch-targets-{}", std::process::id()));
    fs::create_dir_all(&place).map_err(|e| e.to_string())?;
    let copies = [(&made.old, "target"), (&made.fix, "fix.so"), (&tool("livepatch"), "livepatch")];
    for (from, name) in copies {
        fs::copy(from, place.join(name)).map_err(|e| e.to_string())?;
    }
    let done = own_process_of_a_user(&place);
    let _ = fs::remove_dir_all(&place);
    done
}

fn own_process_of_a_user(place: &Path) -> Outcome {
    let mut command = Command::new(place.join("target"));
    let mut target = Target::start(command.uid(65534).gid(65534), &place.join("fix.so"))?;
    target.ask("?", "fee 70")?;
    let mut command = Command::new(place.join("livepatch"));
    command.args(["apply", &target.pid.to_string()]).arg(place.join("fix.so")).uid(65534).gid(65534);
    run(&mut command).expect_code(0)?;
    target.ask("?", "fee 75")?;
    Ok("works".into())
}

fn seccomp_without_rights(w: &Workshop) -> Outcome {
    let mut target = w.kind("seccomp-other")?;
    let mut command = Command::new("setpriv");
    command.args(["--bounding-set", "-sys_admin", "--inh-caps", "-sys_admin"]).arg(tool("livepatch"));
    let ran = run(command.args(["apply", &target.pid.to_string()]).arg(&target.fix));
    ran.expect_code(3)?.expect_says(&["seccomp", "CAP_SYS_ADMIN"])?;
    target.ask("?", "fee 70")?;
    Ok("refused: seccomp (exit 3)".into())
}

fn traced(w: &Workshop) -> Outcome {
    let mut target = w.kind("plain")?;
    target.ask("?", "fee 70")?;
    let helper = w.folder.join("tracer");
    compile("gcc", &root().join("tests/targets/tracer.c"), &helper, 0, &[])?;
    let mut tracer =
        Command::new(&helper).arg(target.pid.to_string()).stdout(Stdio::piped()).spawn().map_err(|e| e.to_string())?;
    let mut said = String::new();
    let out = tracer.stdout.take().expect("piped");
    BufReader::new(out).read_line(&mut said).map_err(|e| e.to_string())?;
    let ran = target.run("apply", &[]);
    let _ = tracer.kill();
    let _ = tracer.wait();
    ran.expect_code(6)?.expect_says(&["is traced by", "tracer"])?;
    target.works("?")?;
    Ok("refused while traced (exit 6), then works".into())
}

fn stopped(w: &Workshop) -> Outcome {
    let mut target = w.kind("plain")?;
    target.ask("?", "fee 70")?;
    let signal = |name: &str| run(Command::new("kill").args([name, &target.pid.to_string()]));
    signal("-STOP").expect_code(0)?;
    let state = || {
        let stat = fs::read_to_string(format!("/proc/{}/stat", target.pid)).unwrap_or_default();
        stat.rsplit(')').next().unwrap_or_default().trim().chars().next().unwrap_or('?')
    };
    let until = Instant::now() + Duration::from_secs(5);
    while state() != 'T' && Instant::now() < until {
        std::thread::sleep(Duration::from_millis(5));
    }
    let ran = target.run("apply", &["--timeout", "1s"]);
    if state() != 'T' {
        return Err(format!("it was let go: state {}", state()));
    }
    ran.expect_code(0)?;
    signal("-CONT").expect_code(0)?;
    target.ask("?", "fee 75")?;
    Ok("works, and stays stopped until it is continued".into())
}

fn syscalls(w: &Workshop) -> Outcome {
    let mut target = w.kind("syscalls")?;
    for _ in 0..10 {
        target.run("apply", &[]).expect_code(0)?;
        target.ask("?", "fee 75")?;
        target.run("revert", &[]).expect_code(0)?;
        target.ask("?", "fee 70")?;
    }
    target.ask("interrupted", "0")?;
    Ok("works; 25 kinds of call, no EINTR in 20 holds".into())
}

fn no_memory(w: &Workshop) -> Outcome {
    let mut target = w.kind("nomemory")?;
    target.ask("?", "fee 70")?;
    target.run("apply", &[]).expect_code(1)?.expect_says(&["mmap", "memory"])?;
    target.ask("?", "fee 70")?;
    Ok("error: mmap (exit 1), nothing changed".into())
}

fn forks(w: &Workshop) -> Outcome {
    let mut target = w.kind("plain")?;
    target.run("apply", &[]).expect_code(0)?;
    target.answers += 1;
    writeln!(target.stdin, "fork").map_err(|e| e.to_string())?;
    let line = target.line()?;
    let child = line.split(' ').nth(1).ok_or_else(|| line.clone())?.to_owned();
    target.ask("child", "fee 75")?;
    livepatch(&["status", &child]).expect_code(0).and_then(|r| match r.stdout.contains("applied") {
        true => Ok(()),
        false => Err(format!("status of the child: {}", r.both())),
    })?;
    livepatch(&["revert", &child]).expect_code(0)?;
    target.ask("child", "fee 70")?;
    target.ask("?", "fee 75")?;
    writeln!(target.stdin, "exec").map_err(|e| e.to_string())?;
    target.line()?;
    target.answers = 0;
    target.ask("?", "fee 70")?;
    let status = target.run("status", &["--json"]);
    if status.stdout.contains("\"applied\"") {
        return Err(format!("after exec status says: {}", status.both()));
    }
    target.works("?")?;
    Ok("after fork both have it, each for itself; after exec it is gone".into())
}

fn loaded_library(w: &Workshop) -> Outcome {
    let library = w.library()?;
    let mut target = w.kind("plain")?;
    target.fix = library.fix;
    target.run("apply", &[]).expect_code(3)?.expect_says(&["has not loaded libprice.so"])?;
    target.ask("load", "loaded")?;
    target.works("price")?;
    let id = livepatch(&["status", &target.pid.to_string(), "--json"]).expect_code(0)?.stdout.clone();
    let notes = run(Command::new("readelf").arg("-n").arg(&library.old)).expect_code(0)?.stdout.clone();
    let build = notes.split("Build ID: ").nth(1).and_then(|t| t.split_whitespace().next()).ok_or("no build-id")?;
    livepatch(&["revert", "--build-id", build]).expect_code(0)?;
    target.ask("price", "price 70")?;
    target.run("apply", &[]).expect_code(0)?;
    target.ask("price", "price 75")?;
    if !target.run("status", &[]).stdout.contains("of libprice.so") {
        return Err("status does not name the library".into());
    }
    if id.contains(build) {
        return Err("status names the library's build in place of the program's".into());
    }
    target.ask("unload", "unloaded")?;
    let status = target.run("status", &[]);
    status.expect_code(0)?;
    if !(status.stdout.clone() + &status.stderr).contains("no longer loaded") {
        return Err(format!("status after dlclose: {}", status.both()));
    }
    target.ask("load", "loaded")?;
    target.ask("price", "price 70")?;
    target.run("recover", &[]).expect_code(0)?;
    target.works("price")?;
    Ok("refused before it is loaded, then works; unloaded and loaded again, too".into())
}

/// A breakpoint in the function, by another, and memory that is shared: both are said.
fn two_reasons(w: &Workshop) -> Outcome {
    use std::os::unix::fs::FileExt;
    let mut target = w.kind("sharer")?;
    target.ask("?", "fee 70")?;
    let made = w.program(Link::Pie)?;
    let symbols = run(Command::new("nm").arg(&made.old)).expect_code(0)?.stdout.clone();
    let at = symbols.lines().find_map(|l| l.strip_suffix(" T rebate")).ok_or("no rebate")?;
    let maps = fs::read_to_string(format!("/proc/{}/maps", target.pid)).map_err(|e| e.to_string())?;
    let base = maps.split('-').next().unwrap_or_default();
    let [at, base] = [at, base].map(|x| u64::from_str_radix(x, 16).unwrap_or(0));
    let mem = fs::OpenOptions::new().write(true).open(format!("/proc/{}/mem", target.pid));
    mem.and_then(|m| m.write_all_at(&[0xcc], base + at)).map_err(|e| e.to_string())?;
    let ran = target.run("check", &[]);
    ran.expect_code(3)?.expect_says(&["2 reasons", "shares the memory", "breakpoint"])?;
    Ok("refused: both are said (exit 3)".into())
}

fn library_twice(w: &Workshop) -> Outcome {
    let library = w.library()?;
    let mut target = w.kind("twice")?;
    target.fix = library.fix;
    target.refused(3, "mapped-twice")
}

fn hugetext(w: &Workshop) -> Outcome {
    let made = w.program(Link::Pie)?;
    let help = made.old.with_file_name("libhelp.so");
    compile("gcc", &root().join("tests/targets/help.c"), &help, 0, &["-fPIC", "-shared"])?;
    works(w.kind("hugetext")?)
}

fn vforks(w: &Workshop) -> Outcome {
    let mut target = w.kind("vforks")?;
    target.works("?")?;
    Ok("works between two of them".into())
}

type Case = (&'static str, fn(&Workshop) -> Outcome);

const CASES: &[Case] = &[
    ("position-independent", |w| works(w.kind("plain")?)),
    ("fixed addresses", |w| works(w.start(Link::Fixed, "plain")?)),
    ("static", |w| works(w.start(Link::Static, "plain")?)),
    ("static, position-independent", |w| works(w.start(Link::StaticPie, "plain")?)),
    ("musl", |w| works(w.start(Link::Musl, "plain")?)),
    ("musl, static", |w| works(w.start(Link::MuslStatic, "plain")?)),
    ("stripped", stripped),
    ("deleted on disk", deleted),
    ("replaced on disk by the new build", replaced),
    ("started by the loader", by_the_loader),
    ("library loaded later, unloaded, loaded again", loaded_library),
    ("library in two namespaces of the loader", library_twice),
    ("chroot", in_a_chroot),
    ("user, pid, mount and other namespaces", in_namespaces),
    ("another user's, without rights", of_another_user),
    ("a user's own, without rights", by_a_user_without_rights),
    ("not dumpable", |w| works(w.kind("undumpable")?)),
    ("seccomp: a filter for other calls", |w| works(w.kind("seccomp-other")?)),
    ("seccomp: mmap and mprotect fail", |w| works(w.kind("seccomp-errno")?)),
    ("seccomp: mmap and mprotect kill", |w| works(w.kind("seccomp-kill")?)),
    ("seccomp: no rt_sigreturn", |w| w.kind("seccomp-no-return")?.refused(3, "seccomp")),
    ("seccomp, without CAP_SYS_ADMIN", seccomp_without_rights),
    ("memory-deny-write-execute", |w| works(w.kind("mdwe")?)),
    ("traced by another", traced),
    ("stopped by SIGSTOP", stopped),
    ("vfork all the time", vforks),
    ("memory shared by another process", |w| w.kind("sharer")?.refused(3, "shared-memory")),
    ("shared memory and a breakpoint", two_reasons),
    ("signal stacks, handlers, signals", |w| works(w.kind("handlers")?)),
    ("system calls of every restart class", syscalls),
    ("io_uring with a polling thread", |w| works(w.kind("uring")?)),
    ("2,000 threads", |w| works(w.kind("many")?)),
    ("threads born and dying", |w| works(w.kind("births")?)),
    ("text in anonymous huge pages", hugetext),
    ("no memory left", no_memory),
    ("fork and exec", forks),
];

#[test]
fn every_kind_of_target() {
    let wanted = std::env::var("TARGET").unwrap_or_default();
    let folder = scratch("targets");
    let _ = fs::remove_dir_all(&folder);
    let workshop = Workshop { folder };
    let mut failed = 0;
    for (name, case) in CASES.iter().filter(|(name, _)| name.contains(&wanted)) {
        let missing = name.contains("musl") && !run(Command::new("sh").args(["-c", "command -v musl-gcc"])).code == 0;
        match if missing { Ok("skip: no musl-gcc".into()) } else { case(&workshop) } {
            Ok(how) => println!("ok    {name:48} {how}"),
            Err(why) if why.starts_with("skip: ") => println!("skip  {name:48} {}", &why[6..]),
            Err(why) => {
                failed += 1;
                println!("FAIL  {name:48} {why}");
            }
        }
    }
    assert_eq!(failed, 0, "kinds of target that neither work nor are refused as they should");
}
