//! A running fixture: it answers every line with `NUMBER TEXT`, the number counting its answers.

use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::mpsc::{channel, Receiver};
use std::time::{Duration, Instant};

/// A program under test; killed when dropped.
pub struct Program {
    child: Child,
    stdin: Option<ChildStdin>,
    lines: Receiver<String>,
    answers: u64,
}

impl Program {
    pub fn start(path: &Path) -> Self {
        Self::start_by(&mut Command::new(path))
    }

    pub fn start_by(command: &mut Command) -> Self {
        let mut child = command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::inherit())
            .spawn()
            .unwrap_or_else(|e| panic!("{command:?}: {e}"));
        let out = child.stdout.take().expect("stdout was piped");
        let (send, lines) = channel();
        std::thread::spawn(move || {
            for line in BufReader::new(out).lines().map_while(Result::ok) {
                if send.send(line).is_err() {
                    break;
                }
            }
        });
        let stdin = child.stdin.take();
        Self { child, stdin, lines, answers: 0 }
    }

    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Asks once; an error unless the answer comes, has the next number and says `expected`, where `{n}` stands for the number of the
    /// answer and `{5n}` for five times that.
    pub fn ask(&mut self, expected: &str) -> Result<(), String> {
        self.tell("?", expected)
    }

    /// The same with this line.
    pub fn tell(&mut self, line: &str, expected: &str) -> Result<(), String> {
        self.answers += 1;
        let expected = format!("{} {}", self.answers, self.fill_in(expected));
        let stdin = self.stdin.as_mut().expect("stdin is open until finish");
        stdin
            .write_all(format!("{line}\n").as_bytes())
            .map_err(|e| format!("the program is gone: {e}{}", self.end()))?;
        let line = self
            .lines
            .recv_timeout(Duration::from_secs(10))
            .map_err(|_| format!("no answer within 10 s, expected {expected:?}{}", self.end()))?;
        if line == expected {
            return Ok(());
        }
        Err(format!("the program says {line:?}, expected {expected:?}"))
    }

    /// Closes its input; an error unless it then ends with exit code 0.
    pub fn finish(&mut self) -> Result<(), String> {
        self.stdin = None;
        let deadline = Instant::now() + Duration::from_secs(10);
        while Instant::now() < deadline {
            if let Some(status) = self.child.try_wait().map_err(|e| e.to_string())? {
                return if status.success() {
                    Ok(())
                } else {
                    Err(format!("at the end of its input the program: {status}"))
                };
            }
            std::thread::sleep(Duration::from_millis(2));
        }
        Err("the program does not end at the end of its input".into())
    }

    /// Ends it at once.
    pub fn kill(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }

    /// The bytes of all its executable mappings of files, in order.
    pub fn text(&self) -> Vec<u8> {
        use std::os::unix::fs::FileExt;
        let pid = self.pid();
        let maps = std::fs::read_to_string(format!("/proc/{pid}/maps")).expect("maps of a child");
        let mem = std::fs::File::open(format!("/proc/{pid}/mem")).expect("memory of a child");
        let mut all = Vec::new();
        for line in maps.lines() {
            let mut parts = line.split_whitespace();
            let (Some(range), Some(mode)) = (parts.next(), parts.next()) else { continue };
            if !mode.contains('x') || !line.contains('/') {
                continue;
            }
            let (start, end) = range.split_once('-').expect("a range");
            let [start, end] = [start, end].map(|x| u64::from_str_radix(x, 16).expect("an address"));
            let mut bytes = vec![0; (end - start) as usize];
            mem.read_exact_at(&mut bytes, start).expect("text of a child");
            all.extend(bytes);
        }
        all
    }

    fn fill_in(&self, text: &str) -> String {
        let mut out = String::new();
        let mut rest = text;
        while let Some((before, after)) = rest.split_once('{') {
            let (inside, after) = after.split_once('}').expect("a closing brace");
            let times: u64 = match inside.strip_suffix('n').expect("{n} or {5n}") {
                "" => 1,
                times => times.parse().expect("{n} or {5n}"),
            };
            out += before;
            out += &(times * self.answers).to_string();
            rest = after;
        }
        out + rest
    }

    fn end(&mut self) -> String {
        std::thread::sleep(Duration::from_millis(50));
        match self.child.try_wait() {
            Ok(Some(status)) => format!(" ({status})"),
            _ => String::new(),
        }
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        self.kill();
    }
}
