//! One thread's event loop over many traders.

use crate::client::{Client, Market, Phase};
use crate::load::{Live, Stage};
use crate::stats::{note, Stats};
use mio::net::TcpStream;
use mio::unix::SourceFd;
use mio::{Events, Interest, Poll, Token};
use rustix::time::{
    timerfd_create, timerfd_settime, Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec,
};
use sample_gateway::fix::{msg_type, Parser};
use std::io::{ErrorKind, Read, Write};
use std::net::SocketAddr;
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

const TIMER: Token = Token(0);
const FIRST: usize = 1;
/// Connections in the making at a time.
const WAVE: usize = 256;
/// Due times closer than this are served together: a timer per order would cost more than the order.
const QUANTUM_NS: u64 = 100_000;
const CHECK_NS: u64 = 200_000_000;

/// What a thread is to do.
#[derive(Clone, Debug)]
pub struct Plan {
    pub address: SocketAddr,
    pub names: Vec<String>,
    pub target: String,
    pub market: Market,
    /// This thread sends the orders `first`, `first + step`, … of the whole run.
    pub first: u64,
    pub step: u64,
    pub total: u64,
    pub interval_ns: f64,
}

/// One thread's traders.
pub struct Driver {
    plan: Plan,
    live: Arc<Live>,
    epoch: Instant,
    poll: Poll,
    timer: OwnedFd,
    streams: Vec<Option<TcpStream>>,
    clients: Vec<Client>,
    stats: Stats,
    parser: Parser,
    buffer: Vec<u8>,
    connecting: usize,
    next_connect: usize,
    active: usize,
    next_check_ns: u64,
}

impl Driver {
    pub fn new(plan: Plan, live: Arc<Live>, epoch: Instant) -> std::io::Result<Self> {
        let poll = Poll::new()?;
        let timer = timerfd_create(TimerfdClockId::Monotonic, TimerfdFlags::NONBLOCK | TimerfdFlags::CLOEXEC)?;
        poll.registry().register(&mut SourceFd(&timer.as_raw_fd()), TIMER, Interest::READABLE)?;
        let clients: Vec<Client> = plan
            .names
            .iter()
            .enumerate()
            .map(|(n, name)| Client::new(name.clone(), plan.target.clone(), (n as u64 + 1) * 31 + plan.first))
            .collect();
        Ok(Self {
            streams: clients.iter().map(|_| None).collect(),
            clients,
            plan,
            live,
            epoch,
            poll,
            timer,
            stats: Stats::default(),
            parser: Parser::new(),
            buffer: vec![0; 64 << 10],
            connecting: 0,
            next_connect: 0,
            active: 0,
            next_check_ns: 0,
        })
    }

    /// Connects, waits for the others, trades, waits for the last answers, logs out.
    pub fn run(mut self) -> std::io::Result<Stats> {
        let mut events = Events::with_capacity(1_024);
        let mut announced = false;
        let mut next = self.plan.first;
        let mut logged_out = false;
        loop {
            let now = self.now_ns();
            let stage = self.live.stage();
            match stage {
                Stage::Connect => {
                    self.connect_more()?;
                    if self.active == self.clients.len() && !announced {
                        announced = true;
                        self.live.one_ready();
                    }
                }
                Stage::Trade { start_ns } => {
                    next = self.trade_due(next, start_ns, now);
                    if next >= self.plan.total && self.clients.iter().all(|c| c.unanswered() == 0) {
                        self.live.one_answered(self.plan.first);
                    }
                }
                Stage::LogOut if !logged_out => {
                    logged_out = true;
                    for index in 0..self.clients.len() {
                        if self.clients[index].phase == Phase::Active {
                            self.clients[index].phase = Phase::LoggingOut;
                            self.clients[index].wire.send(msg_type::LOGOUT, b"");
                            self.flush(index);
                        }
                    }
                }
                Stage::LogOut if self.streams.iter().all(Option::is_none) => break,
                Stage::LogOut => {}
                Stage::End => break,
            }
            if now >= self.next_check_ns {
                self.next_check_ns = now + CHECK_NS;
                self.check(now);
            }
            self.arm(next, stage)?;
            match self.poll.poll(&mut events, Some(Duration::from_millis(100))) {
                Err(e) if e.kind() != ErrorKind::Interrupted => return Err(e),
                _ => {}
            }
            let now = self.now_ns();
            for event in &events {
                if let Some(index) = event.token().0.checked_sub(FIRST) {
                    if event.is_writable() {
                        self.writable(index);
                    }
                    let ended = event.is_read_closed() || event.is_error();
                    if event.is_readable() || ended {
                        self.readable(index, now, ended);
                    }
                }
            }
        }
        self.stats.counts.lost += self.clients.iter().map(Client::unanswered).sum::<u64>();
        Ok(self.stats)
    }

    fn now_ns(&self) -> u64 {
        u64::try_from(self.epoch.elapsed().as_nanos()).unwrap_or(u64::MAX)
    }

    fn due_ns(&self, n: u64, start_ns: u64) -> u64 {
        start_ns + (n as f64 * self.plan.interval_ns) as u64
    }

    /// Sends everything that is due by now, each from the next trader in turn.
    fn trade_due(&mut self, mut next: u64, start_ns: u64, now: u64) -> u64 {
        let mut touched = 0;
        while next < self.plan.total {
            let due = self.due_ns(next, start_ns);
            if due > now {
                break;
            }
            let index = (next / self.plan.step) as usize % self.clients.len();
            if self.clients[index].phase == Phase::Active {
                self.clients[index].trade(&self.plan.market, due, &mut self.stats);
                self.flush(index);
                let sent = self.now_ns();
                note(&mut self.stats.send_lag, sent.saturating_sub(due));
                touched += 1;
            } else {
                self.stats.counts.lost += 1;
            }
            next += self.plan.step;
            // After a pause of our own: read in between, or answers wait for the whole backlog.
            if touched == 256 {
                break;
            }
        }
        self.live.publish(self.plan.first, &self.stats.counts);
        next
    }

    fn arm(&self, next: u64, stage: Stage) -> std::io::Result<()> {
        let Stage::Trade { start_ns } = stage else { return Ok(()) };
        if next >= self.plan.total {
            return Ok(());
        }
        let now = self.now_ns();
        let due = self.due_ns(next, start_ns);
        let wait = if due <= now { 1 } else { (due - now).max(QUANTUM_NS) };
        let value =
            Timespec { tv_sec: (wait / 1_000_000_000).cast_signed(), tv_nsec: (wait % 1_000_000_000).cast_signed() };
        let once = Itimerspec { it_interval: Timespec { tv_sec: 0, tv_nsec: 0 }, it_value: value };
        timerfd_settime(&self.timer, TimerfdTimerFlags::empty(), &once)?;
        Ok(())
    }

    fn connect_more(&mut self) -> std::io::Result<()> {
        while self.connecting < WAVE && self.next_connect < self.clients.len() {
            let index = self.next_connect;
            let mut stream = TcpStream::connect(self.plan.address)?;
            let interest = Interest::READABLE | Interest::WRITABLE;
            self.poll.registry().register(&mut stream, Token(index + FIRST), interest)?;
            self.streams[index] = Some(stream);
            self.next_connect += 1;
            self.connecting += 1;
        }
        Ok(())
    }

    fn writable(&mut self, index: usize) {
        let Some(stream) = &self.streams[index] else { return };
        if self.clients[index].phase == Phase::Connecting {
            match (stream.take_error(), stream.peer_addr()) {
                (Ok(None), Ok(_)) => {
                    // Small messages must not wait for each other.
                    let _ = stream.set_nodelay(true);
                    self.clients[index].phase = Phase::LoggingOn;
                    self.clients[index].wire.logon(self.plan.market.heartbeat_s);
                }
                (Ok(None), Err(_)) => return,
                _ => return self.lost(index),
            }
        }
        self.flush(index);
    }

    fn flush(&mut self, index: usize) {
        let now = self.now_ns();
        let client = &mut self.clients[index];
        let Some(stream) = &mut self.streams[index] else { return };
        if client.wire.out.is_empty() {
            return;
        }
        while client.sent_bytes < client.wire.out.len() {
            match stream.write(&client.wire.out[client.sent_bytes..]) {
                Ok(0) => return self.lost(index),
                Ok(n) => client.sent_bytes += n,
                Err(e) if e.kind() == ErrorKind::WouldBlock => return,
                Err(e) if e.kind() == ErrorKind::Interrupted => {}
                Err(_) => return self.lost(index),
            }
        }
        client.wire.out.clear();
        client.sent_bytes = 0;
        client.last_out_ns = now;
    }

    fn readable(&mut self, index: usize, now: u64, ended: bool) {
        loop {
            let Some(stream) = &mut self.streams[index] else { return };
            match stream.read(&mut self.buffer) {
                Ok(0) => return self.lost(index),
                Ok(n) => {
                    let client = &mut self.clients[index];
                    let before = client.phase;
                    client.input(&self.buffer[..n], &mut self.parser, &self.plan.market, now, &mut self.stats);
                    if before == Phase::LoggingOn && client.phase == Phase::Active {
                        self.active += 1;
                        self.connecting -= 1;
                        self.live.one_logged_on();
                    }
                    if !client.wire.out.is_empty() {
                        self.flush(index);
                    }
                    if n < self.buffer.len() && !ended {
                        return;
                    }
                }
                Err(e) if e.kind() == ErrorKind::WouldBlock => return,
                Err(e) if e.kind() == ErrorKind::Interrupted => {}
                Err(_) => return self.lost(index),
            }
        }
    }

    fn lost(&mut self, index: usize) {
        if self.streams[index].take().is_none() {
            return;
        }
        let was = std::mem::replace(&mut self.clients[index].phase, Phase::Closed);
        if matches!(was, Phase::Connecting | Phase::LoggingOn) {
            self.live.failed_to_log_on();
        }
        if was != Phase::LoggingOut {
            self.stats.counts.disconnects += 1;
        }
    }

    /// Heartbeats: ours that are due, theirs that are not there.
    fn check(&mut self, now: u64) {
        let interval = self.plan.market.heartbeat_s * 1_000_000_000;
        let grace = 2_000_000_000;
        for index in 0..self.clients.len() {
            let client = &mut self.clients[index];
            if client.phase != Phase::Active {
                continue;
            }
            let silent = now.saturating_sub(client.last_in_ns);
            if silent > interval + grace && !client.late_noted {
                client.late_noted = true;
                self.stats.counts.heartbeats_late += 1;
            }
            if silent > 2 * interval + grace {
                client.last_in_ns = now;
                self.stats.counts.heartbeats_missed += 1;
            }
            if now.saturating_sub(client.last_out_ns) >= interval {
                client.wire.send(msg_type::HEARTBEAT, b"");
                self.flush(index);
            }
        }
    }
}
