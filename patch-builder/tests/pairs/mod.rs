//! Pairs of builds for the tests of what is said of them.
#![allow(dead_code, reason = "each test uses its part")]

use std::path::{Path, PathBuf};
use std::process::Command;

use patch_builder::report::Report;
use patch_builder::{run, Options};

/// A small server: a loop, a thread, an inlined function, texts.
pub const SERVER: &str = r#"
#include <errno.h>
#include <poll.h>
#include <pthread.h>
#include <stdio.h>
#include <unistd.h>
#define OUT __attribute__((noinline))
long total;
static inline long fee(long n)
{
    return n * 70 / 10000;
}
OUT long charge(long n)
{
    total += fee(n);
    return total;
}
OUT long show(long n)
{
    printf("fee %ld\n", n);
    return n;
}
OUT int wait_once(struct pollfd *p)
{
    int n;
    do n = poll(p, 1, 100); while (n < 0 && errno == EINTR);
    return n + 1;
}
OUT int sum(int n)
{
    int s = 0;
    for (int i = 0; i < n; i++) { s ^= getppid() + i; }
    return s + 1;
}
OUT int handle(int n) { return (int)charge(n) + (int)show(n) + sum(n); }
int event_loop(int fd)
{
    struct pollfd p = { .fd = fd, .events = POLLIN };
    int stop = 0;
    while (!stop) {
        poll(&p, 1, 1000);
        stop = handle(fd) == 42;
    }
    return stop;
}
static void *worker(void *arg)
{
    for (;;) { usleep(1000); charge((long)arg); }
}
int main(int argc, char **argv)
{
    pthread_t t;
    struct pollfd p = { .fd = 0 };
    pthread_create(&t, 0, worker, argv);
    if (argc == 7) puts("seven");
    return wait_once(&p) + event_loop(argc);
}
"#;

/// A folder of one test, removed with it.
pub struct Folder(pub PathBuf);

impl Folder {
    /// An empty one.
    pub fn new(name: &str) -> Self {
        let path = std::env::temp_dir().join(format!("patch-builder-{name}-{}", std::process::id()));
        std::fs::create_dir_all(&path).expect("the temporary folder is writable");
        Self(path)
    }

    /// Builds a version in a folder of its own.
    pub fn build(&self, version: &str, text: &str, flags: &[&str]) -> PathBuf {
        let folder = self.0.join(version);
        std::fs::create_dir_all(&folder).expect("the folder is writable");
        std::fs::write(folder.join("server.c"), text).expect("the folder is writable");
        compile(&folder.join("server.c"), &folder.join("server"), flags)
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// Compiles one file.
pub fn compile(source: &Path, out: &Path, flags: &[&str]) -> PathBuf {
    let mut gcc = Command::new("gcc");
    gcc.args(["-O2", "-Wl,--emit-relocs", "-Wl,--build-id", "-pthread"]).args(flags).arg("-o").arg(out).arg(source);
    assert!(gcc.status().expect("gcc runs").success(), "gcc failed: {gcc:?}");
    out.to_owned()
}

/// The report of two builds.
pub fn report(old: &Path, new: &Path) -> Report {
    let options =
        Options { old: old.into(), new: new.into(), name: "fix".into(), only_report: true, ..Options::default() };
    run(&options).expect("they differ").report
}

/// The report of one replacement in the server's text.
pub fn of_change(name: &str, from: &str, to: &str) -> Report {
    assert!(SERVER.contains(from), "{from}");
    let folder = Folder::new(name);
    report(&folder.build("old", SERVER, &["-g"]), &folder.build("new", &SERVER.replace(from, to), &["-g"]))
}
