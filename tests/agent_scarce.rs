//! An agent in a process that has no descriptor left. The limit is the process's: this test is alone in its file.

use std::io::{Read, Seek, Write};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use livepatch::agent::server::{Server, Stop};
use livepatch::agent::wire::{Answer, Inbox, Request, MAX_ANSWER};
use rustix::process::{getrlimit, setrlimit, Resource, Rlimit};

/// The processor time that this process has used, in clock ticks of 10 ms.
fn ticks(stat: &mut std::fs::File) -> u64 {
    let mut text = String::new();
    stat.rewind().unwrap();
    stat.read_to_string(&mut text).unwrap();
    let fields: Vec<&str> = text.rsplit_once(')').unwrap().1.split_whitespace().collect();
    fields[11].parse::<u64>().unwrap() + fields[12].parse::<u64>().unwrap()
}

#[test]
fn out_of_descriptors_it_lets_idle_commands_go_and_does_not_spin() {
    let path = std::env::temp_dir().join(format!("livepatch-scarce-{}.sock", std::process::id()));
    let (server, stop) = (Server::bind(&path).unwrap(), Stop::new().unwrap());
    let idle: Vec<UnixStream> = (0..6).map(|_| UnixStream::connect(&path).unwrap()).collect();
    let mut good = UnixStream::connect(&path).unwrap();
    good.write_all(&Request::Status.encode().unwrap()).unwrap();
    good.set_read_timeout(Some(Duration::from_secs(10))).unwrap();

    let mut stat = std::fs::File::open("/proc/self/stat").unwrap();
    // Room for three connections: descriptors are given out from the lowest on.
    let room = std::fs::File::open("/dev/null").unwrap();
    let lowest = std::os::fd::AsRawFd::as_raw_fd(&room) as u64;
    drop(room);
    let before = getrlimit(Resource::Nofile);
    setrlimit(Resource::Nofile, Rlimit { current: Some(lowest + 3), maximum: before.maximum }).unwrap();
    let (answer, waited, used) = std::thread::scope(|s| {
        let serving = s.spawn(|| server.serve(&stop, &mut |_, _, _| Answer::Done));
        let (began, from) = (Instant::now(), ticks(&mut stat));
        let mut bytes = [0; 4096];
        let n = good.read(&mut bytes);
        let waited = began.elapsed();
        let used = ticks(&mut stat) - from;
        stop.stop();
        serving.join().unwrap().unwrap();
        (n.map(|n| Inbox::new(MAX_ANSWER).push(&bytes[..n]).unwrap().unwrap()), waited, used)
    });
    setrlimit(Resource::Nofile, before).unwrap();
    assert_eq!(Answer::decode(&answer.unwrap()).unwrap(), Answer::Done);
    assert!(waited >= Duration::from_millis(100), "there was room for all: {waited:?}");
    assert!(used < 20, "{used} ticks of processor time");
    drop(idle);
}
