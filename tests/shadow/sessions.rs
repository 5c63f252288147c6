//! A program with livepatch's agent, and sessions that get a field by a patch: `--cfg v1` has none, v2 counts the calls of each, v3 tells twice
//! the count and takes the field away when it is reverted.
use std::io::BufRead;

#[derive(Default)]
pub struct Session {
    id: i64,
}

#[cfg(not(v1))]
static CALLS: livepatch::shadow::Shadow<std::sync::atomic::AtomicI64> =
    livepatch::shadow::Shadow::new(0x5e55_1075_ca11_f1e1);

#[cfg(v1)]
#[inline(never)]
pub fn handle(session: &Session) -> i64 {
    std::hint::black_box(session).id * 1000
}

#[cfg(not(v1))]
#[inline(never)]
pub fn handle(session: &Session) -> i64 {
    use std::sync::atomic::{AtomicI64, Ordering::Relaxed};
    let new = || AtomicI64::new(100);
    let calls = CALLS.with_or_attach(session, new, |n| n.fetch_add(1, Relaxed) + 1);
    std::hint::black_box(session).id * 1000 + calls * if cfg!(v3) { 2 } else { 1 }
}

#[inline(never)]
pub fn end(session: &mut Session) {
    #[cfg(not(v1))]
    livepatch::shadow::drop_all_of(std::ptr::from_ref(session));
    session.id = std::hint::black_box(-1);
}

#[cfg(v3)]
#[livepatch::hook(post_revert)]
fn forget() {
    CALLS.detach_all();
}

fn main() {
    let socket = std::env::args().nth(1).unwrap();
    let _agent = livepatch::Agent::builder().socket(socket).start().unwrap();
    // The next session of a number is where the last one was.
    let mut sessions: [Session; 100] = std::array::from_fn(|_| Session::default());
    for (n, line) in std::io::stdin().lock().lines().enumerate() {
        let line = line.unwrap();
        let (word, k) = line.split_once(' ').unwrap_or((&line, "0"));
        let session = &mut sessions[k.parse::<usize>().unwrap()];
        let said = match word {
            "new" => {
                session.id = k.parse().unwrap();
                0
            }
            "call" => std::hint::black_box(handle as fn(&Session) -> i64)(session),
            "free" => {
                std::hint::black_box(end as fn(&mut Session))(session);
                0
            }
            _ => 0,
        };
        println!("{} {said}", n + 1);
    }
}
