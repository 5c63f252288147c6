//! `livepatch watch`: what it says of a process that does well, leaks, serves figures, loses its patch, or ends.

mod support;

use std::io::{BufRead, BufReader};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};

use support::{build_patch, livepatch, run, scratch, Ran};

type Outcome = Result<(), String>;

/// Leaks so many bytes every 10 ms; serves a histogram in which each tenth observation is slow if it is told so.
const SOURCE: &str = r##"
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>
__attribute__((noipa)) int version(void) { return V; }
static _Atomic long served;
static void *serve(void *p)
{
    int s = *(int *)p;
    for (;;) {
        int c = accept(s, 0, 0);
        char in[4096], body[1024], out[2048];
        if (read(c, in, sizeof in) <= 0) { close(c); continue; }
        long n = served;
        int len = snprintf(body, sizeof body,
            "# TYPE took_seconds histogram\ntook_seconds_bucket{le=\"0.001\"} %ld\ntook_seconds_bucket{le=\"0.1\"} %ld\n"
            "took_seconds_bucket{le=\"+Inf\"} %ld\ntook_seconds_sum 1\ntook_seconds_count %ld\n"
            "# TYPE bad_total counter\nbad_total %ld\n# TYPE all_total counter\nall_total %ld\n", n * 9, n * 10, n * 10, n * 10, n, n * 10);
        int all = snprintf(out, sizeof out, "HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\nContent-Length: %d\r\nConnection: close\r\n\r\n%s", len, body);
        if (write(c, out, (size_t)all) != all) return 0;
        close(c);
    }
}
int main(int argc, char **argv)
{
    long leak = argc > 1 ? atol(argv[1]) : 0;
    struct sockaddr_in at = { .sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK) };
    socklen_t len = sizeof at;
    int s = socket(AF_INET, SOCK_STREAM, 0);
    pthread_t t;
    if (bind(s, (void *)&at, len) || listen(s, 8) || getsockname(s, (void *)&at, &len)) return 1;
    pthread_create(&t, 0, serve, &s);
    printf("%d\n", ntohs(at.sin_port));
    fflush(stdout);
    for (;;) {
        if (leak) memset(malloc((size_t)leak), 1, (size_t)leak);
        served += 20 + version();
        usleep(10000);
    }
}
"##;

struct Program {
    dir: PathBuf,
    child: Child,
    port: String,
}

impl Drop for Program {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Program {
    fn start(name: &str, leak: &str) -> Result<Self, String> {
        let dir = scratch("watch").join(name);
        std::fs::create_dir_all(&dir).map_err(|e| e.to_string())?;
        std::fs::write(dir.join("watch.c"), SOURCE).map_err(|e| e.to_string())?;
        for version in ["1", "2"] {
            let flags = ["-g", "-O2", "-pthread", "-Wl,--emit-relocs", "-Wl,--build-id", "watch.c", "-o"];
            let mut command = Command::new("gcc");
            command.args(flags).arg(format!("v{version}")).arg(format!("-DV={version}"));
            run(command.current_dir(&dir)).expect_code(0)?;
        }
        let mut command = Command::new(dir.join("v1"));
        let mut child = command.arg(leak).stdout(Stdio::piped()).spawn().map_err(|e| e.to_string())?;
        let mut port = String::new();
        let out = child.stdout.take().expect("piped");
        BufReader::new(out).read_line(&mut port).map_err(|e| e.to_string())?;
        Ok(Self { dir, child, port: port.trim().to_owned() })
    }

    fn watch(&self, more: &[&str]) -> Ran {
        let (pid, url) = (self.child.id().to_string(), format!("http://127.0.0.1:{}/metrics", self.port));
        livepatch(&[&["watch", &pid, "--every", "100ms", "--metrics", &url], more].concat())
    }
}

#[test]
fn figures_are_held_against_bounds_and_against_before() -> Outcome {
    let p = Program::start("figures", "0")?;
    let before = p.dir.join("before.json").display().to_string();
    p.watch(&["--for", "1s", "--save", &before]).expect_code(0)?.expect_prints(&["pass", "none is applied"])?;
    let gates = ["--for", "1s", "--baseline", &before, "--latency", "took_seconds"];
    let all = ["--max-p99", "500ms", "--max-p99-ratio", "1.5", "--max-rss-ratio", "1.5"];
    p.watch(&[&gates[..], &all].concat()).expect_code(0)?.expect_prints(&["p99-ratio", "rss", "pass"])?;
    // Nine of a hundred lie near a tenth of a second.
    p.watch(&[&gates[..], &["--max-p99", "10ms"]].concat()).expect_code(5)?.expect_prints(&["FAIL", "p99:"])?;
    let errors = ["--for", "1s", "--errors", "bad_total", "--requests", "all_total", "--max-error-rate"];
    p.watch(&[&errors[..], &["0.2"]].concat()).expect_code(0)?;
    p.watch(&[&errors[..], &["0.05"]].concat()).expect_code(5)?.expect_prints(&["error-rate"])?;
    p.watch(&["--for", "500ms", "--latency", "nothing", "--max-p99", "1s"])
        .expect_code(5)?
        .expect_prints(&["no-data"])?;
    p.watch(&["--for", "500ms", "--max-cpu-ratio", "2"]).expect_code(5)?.expect_prints(&["--baseline"])?;
    p.watch(&["--for", "1s", "--max-rss-growth", "1M"]).expect_code(5)?.expect_prints(&["inconclusive"])?;
    p.watch(&["--for", "500ms", "--max-arm-ratio", "2"]).expect_code(5)?.expect_prints(&["no canary"])?;
    std::fs::write(&before, "{}").map_err(|e| e.to_string())?;
    p.watch(&["--baseline", &before]).expect_code(1)?;
    Ok(())
}

#[test]
fn a_patch_has_to_stay_and_the_process_to_live() -> Outcome {
    let mut p = Program::start("stays", "0")?;
    let fix = p.dir.join("fix.so");
    build_patch(&p.dir.join("v1"), &p.dir.join("v2"), &fix).expect_code(0)?;
    let pid = p.child.id().to_string();
    p.watch(&["--for", "300ms", "--patch", "fix"]).expect_code(5)?.expect_prints(&["fix is not applied"])?;
    livepatch(&["apply", &pid, &fix.display().to_string()]).expect_code(0)?;
    let json = p.watch(&["--for", "300ms", "--patch", "fix", "--json"]);
    json.expect_code(0)?.expect_prints(&["\"verdict\":\"pass\""])?;
    std::thread::scope(|scope| {
        let watch = scope.spawn(|| p.watch(&["--for", "3s"]));
        std::thread::sleep(std::time::Duration::from_millis(700));
        livepatch(&["revert", &pid]).expect_code(0)?;
        watch.join().map_err(|_| "it panicked")?.expect_code(5)?.expect_prints(&["fix was reverted"]).map(drop)
    })?;
    let watch = std::thread::scope(|scope| {
        let watch = scope.spawn(|| p.watch(&["--for", "3s"]));
        std::thread::sleep(std::time::Duration::from_millis(700));
        run(Command::new("kill").args(["-9", &pid])).expect_code(0)?;
        watch.join().map_err(|_| "it panicked".to_owned())
    })?;
    watch.expect_code(5)?.expect_prints(&["process", "it ended"])?;
    let _ = p.child.wait();
    p.watch(&["--for", "1s"]).expect_code(6)?;
    Ok(())
}

#[test]
fn a_leak_is_found() -> Outcome {
    // 40 KB every 10 ms are 230 MiB a minute.
    let p = Program::start("leak", "40000")?;
    let seen = p.watch(&["--for", "11s", "--max-rss-growth", "50M"]);
    seen.expect_code(5)?.expect_prints(&["FAIL", "rss-growth"])?;
    Ok(())
}
