//! A patch that only a share of the calls runs, by a key: the same key goes the same way, in every function, and a growing share
//! takes nobody back.

mod support;

use std::io::{BufRead, BufReader, Write};
use std::path::PathBuf;
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::time::{Duration, Instant};

use support::{build_patch, livepatch, run, scratch, tool, Ran};

type Outcome = Result<(), String>;

/// Each answer tells for each session which version of `fee` and of `limit` it met: `1`, `2`, or `x` where they disagree or something was
/// lost on the way. Two threads call all the time; every wrong value is counted.
const SOURCE: &str = r#"
#include <pthread.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>
#define NOINLINE __attribute__((noipa))
NOINLINE long fee(long session, long b, long c, long d, long e, long f, double g, long h)
{ return V * 1000000 + session + b + c + d + e + f + (long)g + h; }
NOINLINE long limit(const char *name, long session) { return V * 1000000 + session + name[0]; }
NOINLINE long total(long session, int n, ...)
{ va_list v; long sum = V * 1000000 + session; va_start(v, n); while (n--) sum += (long)va_arg(v, double); va_end(v); return sum; }
NOINLINE long twice(long session, long n) { return n * 2 + session * 0 + (V - 1) * 1000000; }
/* Its loop goes back to its first instruction, and its key is another in each turn. */
NOINLINE __attribute__((optimize("align-loops=1"))) void walk(long session, volatile long *x)
{ do *x += V; while ((session -= 30000) > 0); }
static volatile long lost;
static int version(long s)
{
    volatile long walked = 0;
    walk(s, &walked);
    long turns = s <= 30000 ? 1 : (s + 29999) / 30000;
    if (walked % turns) lost++;
    long a = fee(s, 1, 2, 3, 4, 5, 6.0, 7) - s - 28, b = limit("a", s) - s - 'a', c = total(s, 2, 1.0, 2.0) - s - 3;
    long d = twice(s, 0) + 1000000;
    long e = walked / turns * 1000000;
    long all[5] = { a, b, c, d, e };
    for (int i = 0; i < 5; i++) if (all[i] != 1000000 && all[i] != 2000000) lost++;
    /* while the share changes, one call of a session may come before and the next after */
    return a == b && b == c && c == d && d == e ? '0' + (int)(a / 1000000) : 'x';
}
static void *caller(void *p) { for (long s = (long)p; ; s++) { version(s % 100000); for (volatile int i = 0; i < 100; i++); } return p; }
int main(void)
{
    pthread_t t;
    for (long i = 0; i < 2; i++) pthread_create(&t, 0, caller, (void *)i);
    long from, to;
    while (scanf("%ld %ld", &from, &to) == 2) {
        for (long s = from; s < to; s++) putchar(version(s));
        printf(" %ld\n", lost);
        fflush(stdout);
    }
    return 0;
}
"#;

struct Place {
    dir: PathBuf,
    child: Child,
    input: ChildStdin,
    output: BufReader<ChildStdout>,
}

impl Drop for Place {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

const KEYS: [&str; 10] =
    ["--key", "fee:arg1", "--key", "limit:arg2", "--key", "total:arg1", "--key", "walk:arg1", "--key", "twice:arg1"];

impl Place {
    fn new(name: &str) -> Result<Self, String> {
        let dir = scratch("canary").join(name);
        std::fs::create_dir_all(&dir).map_err(|e| e.to_string())?;
        std::fs::write(dir.join("fee.c"), SOURCE).map_err(|e| e.to_string())?;
        for version in ["1", "2"] {
            let flags = ["-g", "-O2", "-pthread", "-Wl,--emit-relocs", "-Wl,--build-id", "fee.c", "-o"];
            let mut command = Command::new("gcc");
            command.args(flags).arg(format!("v{version}")).arg(format!("-DV={version}"));
            run(command.current_dir(&dir)).expect_code(0)?;
        }
        build_patch(&dir.join("v1"), &dir.join("v2"), &dir.join("fix.so")).expect_code(0)?;
        let mut child = Command::new(dir.join("v1"))
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .map_err(|e| e.to_string())?;
        let (input, output) = (child.stdin.take().expect("piped"), BufReader::new(child.stdout.take().expect("piped")));
        Ok(Self { dir, child, input, output })
    }

    /// Which version each of these sessions meets.
    fn arms(&mut self, sessions: u32) -> Result<Vec<u8>, String> {
        writeln!(self.input, "0 {sessions}").map_err(|e| e.to_string())?;
        let mut line = String::new();
        self.output.read_line(&mut line).map_err(|e| e.to_string())?;
        let (arms, lost) = line.trim_end().split_once(' ').ok_or("the program is gone")?;
        if lost != "0" || arms.contains('x') {
            return Err(format!("{lost} values were lost; {} sessions met both versions", arms.matches('x').count()));
        }
        Ok(arms.bytes().collect())
    }

    fn run(&self, command: &str, more: &[&str]) -> Ran {
        livepatch(&[&[command, &self.child.id().to_string()], more].concat())
    }

    fn apply(&self, more: &[&str]) -> Ran {
        let fix = self.dir.join("fix.so").display().to_string();
        self.run("apply", &[&[fix.as_str()], more].concat())
    }
}

fn new(arms: &[u8]) -> usize {
    arms.iter().filter(|a| **a == b'2').count()
}

#[test]
fn a_share_of_the_sessions_runs_the_patch() -> Outcome {
    const SESSIONS: u32 = 100_000;
    let mut p = Place::new("share")?;
    assert_eq!(new(&p.arms(SESSIONS)?), 0);
    p.apply(&[&["--canary", "1%"], &KEYS[..]].concat()).expect_code(0)?;
    p.run("status", &[]).expect_prints(&["a canary of 1 %"])?;
    let mut before = p.arms(SESSIONS)?;
    for (share, percent) in [("1%", 0.01), ("10%", 0.10), ("25.5%", 0.255), ("60", 0.60), ("100%", 1.0)] {
        p.run("canary", &["fix", share]).expect_code(0)?;
        let now = p.arms(SESSIONS)?;
        let (expected, n) = (f64::from(SESSIONS) * percent, new(&now) as f64);
        // Five standard deviations.
        let room = 5.0 * (expected * (1.0 - percent)).sqrt();
        assert!((n - expected).abs() <= room, "{share}: {n} of {SESSIONS}");
        let back = before.iter().zip(&now).filter(|(b, n)| **b == b'2' && **n == b'1').count();
        assert_eq!(back, 0, "{share}: sessions went back");
        assert_eq!(p.arms(SESSIONS)?, now, "{share}: and stay where they are");
        before = now;
    }
    p.run("canary", &["fix", "0%"]).expect_code(0)?;
    assert_eq!(new(&p.arms(SESSIONS)?), 0, "taken back at once");
    p.run("canary", &["fix", "50%"]).expect_code(0)?;
    let half = p.arms(SESSIONS)?;
    p.run("revert", &[]).expect_code(0)?;
    assert_eq!(new(&p.arms(SESSIONS)?), 0);
    // The same mapping again, the same sessions; and then all calls.
    p.apply(&[&["--canary", "50%"], &KEYS[..]].concat()).expect_code(0)?;
    assert_eq!(p.arms(SESSIONS)?, half);
    let again = p.apply(&[]);
    again.expect_code(0)?.expect_says(&["canary of 50 %"])?;
    p.run("revert", &[]).expect_code(0)?;
    p.apply(&[]).expect_code(0)?;
    assert_eq!(new(&p.arms(SESSIONS)?), SESSIONS as usize);
    p.run("canary", &["fix", "5%"]).expect_code(3)?.expect_says(&["applied to all calls"])?;
    Ok(())
}

#[test]
fn a_canary_without_its_keys_is_refused() -> Outcome {
    let mut p = Place::new("keys")?;
    for (keys, words) in [
        (&KEYS[..8], "no key tells the calls of twice apart"),
        (&[&KEYS[..], &["--key", "nobody:arg1"]].concat()[..], "the patch has no function nobody"),
        (&[&KEYS[..8], &["--key", "twice:arg7"]].concat()[..], "not in a register"),
        (&["--key", "session"][..], "needs an agent"),
    ] {
        p.apply(&[&["--canary", "1%"], keys].concat()).expect_code(3)?.expect_says(&[words])?;
    }
    p.apply(&["--canary", "1%"]).expect_code(2)?;
    p.apply(&[&["--canary", "101%"], &KEYS[..]].concat()).expect_code(2)?;
    p.run("canary", &["fix", "5%"]).expect_code(1)?.expect_says(&["no patch is applied"])?;
    assert_eq!(new(&p.arms(1000)?), 0);
    Ok(())
}

#[test]
fn a_share_follows_a_file() -> Outcome {
    let mut p = Place::new("follow")?;
    p.apply(&[&["--canary", "0%"], &KEYS[..]].concat()).expect_code(0)?;
    let file = p.dir.join("share");
    std::fs::write(&file, "10\n").map_err(|e| e.to_string())?;
    let mut follower = Command::new(tool("livepatch"));
    follower.args(["canary", &p.child.id().to_string(), "fix", "--follow"]).arg(&file);
    let mut follower = follower.stdout(Stdio::null()).stderr(Stdio::null()).spawn().map_err(|e| e.to_string())?;
    let until = |p: &mut Place, low: usize, high: usize| -> Outcome {
        let deadline = Instant::now() + Duration::from_secs(10);
        loop {
            let n = new(&p.arms(10_000)?);
            if (low..=high).contains(&n) {
                return Ok(());
            }
            if Instant::now() > deadline {
                return Err(format!("{n} of 10000, expected {low} to {high}"));
            }
            std::thread::sleep(Duration::from_millis(20));
        }
    };
    until(&mut p, 800, 1200)?;
    std::fs::write(&file, "40%").map_err(|e| e.to_string())?;
    until(&mut p, 3700, 4300)?;
    // What makes no sense changes nothing.
    std::fs::write(&file, "all of them").map_err(|e| e.to_string())?;
    std::thread::sleep(Duration::from_millis(500));
    until(&mut p, 3700, 4300)?;
    std::fs::write(&file, "0").map_err(|e| e.to_string())?;
    until(&mut p, 0, 0)?;
    p.run("revert", &[]).expect_code(0)?;
    assert!(follower.wait().map_err(|e| e.to_string())?.success(), "it ends with the patch");
    Ok(())
}
