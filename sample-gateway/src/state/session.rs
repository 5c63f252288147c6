//! A FIX session's state machine: what a received message or the passing of time makes it do.
//!
//! Pure: it is handed messages and a clock and writes into a buffer. *Invariant:* `next_in` only moves when the message
//! with exactly that number was taken, was skipped by a gap fill, or the counterparty reset the sequence.

use super::{OpenOrders, SentStore};
use crate::fix::{msg_type, parse_utc_ms, tag, Encoder, Header, Message, SyntaxError};
use gateway_interface::{put, put_number, CompId, SessionId};

/// How far a counterparty's clock may be off.
const CLOCK_TOLERANCE_MS: u64 = 120_000;
/// When a resend that does not come is asked for again.
const RESEND_PATIENCE_MS: u64 = 5_000;
const HEARTBEAT_RANGE_S: std::ops::RangeInclusive<u64> = 1..=3_600;

/// Where a session writes to, and what it needs for that.
#[derive(Debug)]
pub struct Output<'a> {
    /// Output of the connection; nothing is written while there is none.
    pub bytes: Option<&'a mut Vec<u8>>,
    /// Writes messages.
    pub encoder: &'a mut Encoder,
    /// Our CompID.
    pub us: &'a [u8],
    /// Milliseconds since 1970.
    pub now_ms: u64,
    /// How many bytes of sent messages the session may keep.
    pub keep_bytes: usize,
}

/// What is left for the core to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// Nothing.
    Done,
    /// The message is for the application and is the next in sequence.
    Application,
    /// As [`Step::Application`], of a type that this gateway does not have.
    Unsupported,
    /// Send what was written, then close the connection. The text says why.
    Close(&'static str),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Status {
    Offline,
    Active,
    /// We have sent a Logout and wait for the answer until then.
    LoggingOut(u64),
}

/// One counterparty, connected or not.
#[derive(Debug)]
pub struct Session {
    /// The gateway's number of it.
    pub id: SessionId,
    /// The counterparty's name.
    pub comp: CompId,
    /// Its open orders and account.
    pub orders: OpenOrders,
    /// What may be asked for again.
    pub sent: SentStore,
    next_in: u64,
    next_out: u64,
    status: Status,
    heartbeat_ms: u64,
    last_in_ms: u64,
    last_out_ms: u64,
    test_request_ms: Option<u64>,
    /// A resend was asked for: up to which number, and when.
    gap: Option<(u64, u64)>,
}

impl Session {
    /// A session that has never been connected.
    pub fn new(id: SessionId, comp: CompId) -> Self {
        Self {
            id,
            comp,
            orders: OpenOrders::default(),
            sent: SentStore::default(),
            next_in: 1,
            next_out: 1,
            status: Status::Offline,
            heartbeat_ms: 0,
            last_in_ms: 0,
            last_out_ms: 0,
            test_request_ms: None,
            gap: None,
        }
    }

    /// The numbers expected next, in and out.
    pub fn sequence(&self) -> (u64, u64) {
        (self.next_in, self.next_out)
    }

    /// Takes the numbers over from the journal.
    pub fn restore_sequence(&mut self, next_in: u64, next_out: u64) {
        (self.next_in, self.next_out) = (next_in, next_out);
    }

    /// Starts both sequences anew.
    pub fn reset_sequence(&mut self) {
        (self.next_in, self.next_out) = (1, 1);
        self.gap = None;
        self.sent.clear();
    }

    /// Whether a connection is logged on.
    pub fn is_connected(&self) -> bool {
        self.status != Status::Offline
    }

    /// The connection is gone.
    pub fn disconnected(&mut self) {
        self.status = Status::Offline;
        self.test_request_ms = None;
        self.gap = None;
    }

    /// The first message of a connection, known to be a Logon from this counterparty to us.
    pub fn on_logon(&mut self, message: &Message<'_>, out: &mut Output<'_>) -> Step {
        self.last_in_ms = out.now_ms;
        if let Err((text, _)) = self.check_time(message, out.now_ms) {
            return self.refuse(text, out);
        }
        let Some(seq) = message.number(tag::MSG_SEQ_NUM) else {
            return self.refuse("MsgSeqNum missing or not a number", out);
        };
        if message.get(tag::ENCRYPT_METHOD) != Some(b"0") {
            return self.refuse("EncryptMethod must be 0 (none)", out);
        }
        let Some(heartbeat_s) = message.number(tag::HEART_BT_INT).filter(|s| HEARTBEAT_RANGE_S.contains(s)) else {
            return self.refuse("HeartBtInt must be 1 to 3600 seconds", out);
        };
        let reset = message.flag(tag::RESET_SEQ_NUM_FLAG);
        if reset {
            if seq != 1 {
                return self.refuse("MsgSeqNum must be 1 when ResetSeqNumFlag is Y", out);
            }
            self.reset_sequence();
        }
        if seq < self.next_in {
            return self.sequence_too_low(seq, out);
        }
        self.status = Status::Active;
        self.heartbeat_ms = heartbeat_s * 1_000;
        let mut body = Vec::with_capacity(32);
        put(&mut body, tag::ENCRYPT_METHOD, b"0");
        put_number(&mut body, tag::HEART_BT_INT, heartbeat_s);
        if reset {
            put(&mut body, tag::RESET_SEQ_NUM_FLAG, b"Y");
        }
        self.send(msg_type::LOGON, &body, out);
        if seq > self.next_in {
            self.ask_resend(seq, out);
        } else {
            self.next_in += 1;
        }
        Step::Done
    }

    /// Any further message. `syntax` is the parser's verdict on it.
    pub fn on_message(&mut self, message: &Message<'_>, syntax: Result<(), SyntaxError>, out: &mut Output<'_>) -> Step {
        self.last_in_ms = out.now_ms;
        self.test_request_ms = None;
        let kind = message.msg_type();
        if !message.version_is_ours() {
            return self.log_out("BeginString must be FIX.4.4", out);
        }
        let Some(seq) = message.number(tag::MSG_SEQ_NUM) else {
            return self.log_out("MsgSeqNum missing or not a number", out);
        };
        if message.get(tag::SENDER_COMP_ID) != Some(self.comp.as_bytes())
            || message.get(tag::TARGET_COMP_ID) != Some(out.us)
        {
            self.reject(message, seq, None, 9, "CompID problem", out);
            return self.log_out("CompID problem", out);
        }
        if kind == msg_type::SEQUENCE_RESET && syntax.is_ok() && !message.flag(tag::GAP_FILL_FLAG) {
            return self.on_reset(message, seq, out);
        }
        if seq < self.next_in {
            return self.on_low(message, seq, out);
        }
        if seq > self.next_in {
            return self.on_high(message, seq, out);
        }
        self.next_in += 1;
        if self.gap.is_some_and(|(until, _)| self.next_in > until) {
            self.gap = None;
        }
        if let Err(error) = syntax {
            self.reject(message, seq, error.tag, error.reason, error.text, out);
            return Step::Done;
        }
        if let Err((text, reason)) = self.check_time(message, out.now_ms) {
            self.reject(message, seq, Some(tag::SENDING_TIME), reason, text, out);
            return if reason == 10 { self.log_out(text, out) } else { Step::Done };
        }
        self.on_next(message, kind, seq, out)
    }

    /// A message with the number that was expected.
    fn on_next(&mut self, message: &Message<'_>, kind: &[u8], seq: u64, out: &mut Output<'_>) -> Step {
        match kind {
            msg_type::HEARTBEAT | msg_type::REJECT => Step::Done,
            msg_type::TEST_REQUEST => {
                match message.get(tag::TEST_REQ_ID) {
                    None => self.reject(message, seq, Some(tag::TEST_REQ_ID), 1, "required tag missing", out),
                    Some(id) => {
                        let mut body = Vec::with_capacity(id.len() + 8);
                        put(&mut body, tag::TEST_REQ_ID, id);
                        self.send(msg_type::HEARTBEAT, &body, out);
                    }
                }
                Step::Done
            }
            msg_type::RESEND_REQUEST => {
                self.on_resend_request(message, seq, out);
                Step::Done
            }
            msg_type::SEQUENCE_RESET => {
                match message.number(tag::NEW_SEQ_NO) {
                    Some(next) if next > seq => self.next_in = next,
                    Some(_) => self.reject(message, seq, Some(tag::NEW_SEQ_NO), 5, "NewSeqNo must be greater", out),
                    None => self.reject(message, seq, Some(tag::NEW_SEQ_NO), 1, "required tag missing", out),
                }
                if self.gap.is_some_and(|(until, _)| self.next_in > until) {
                    self.gap = None;
                }
                Step::Done
            }
            msg_type::LOGOUT => self.on_logout(out),
            msg_type::LOGON => self.log_out("already logged on", out),
            msg_type::NEW_ORDER_SINGLE | msg_type::ORDER_CANCEL_REQUEST => Step::Application,
            _ if kind.len() <= 2 && kind.iter().all(u8::is_ascii_alphanumeric) => Step::Unsupported,
            _ => {
                self.reject(message, seq, Some(tag::MSG_TYPE), 11, "invalid MsgType", out);
                Step::Done
            }
        }
    }

    fn on_low(&mut self, message: &Message<'_>, seq: u64, out: &mut Output<'_>) -> Step {
        if !message.flag(tag::POSS_DUP_FLAG) {
            return self.sequence_too_low(seq, out);
        }
        if message.get(tag::ORIG_SENDING_TIME).is_none() {
            self.reject(message, seq, Some(tag::ORIG_SENDING_TIME), 1, "required tag missing", out);
        }
        Step::Done
    }

    /// A message is missing. What came early is dropped: the resend is asked for without an end and brings it again.
    fn on_high(&mut self, message: &Message<'_>, seq: u64, out: &mut Output<'_>) -> Step {
        match message.msg_type() {
            // Answered at once, or two sides that both miss messages wait for each other.
            msg_type::RESEND_REQUEST => self.on_resend_request(message, seq, out),
            msg_type::LOGOUT => return self.on_logout(out),
            _ => {}
        }
        if self.gap.is_none_or(|(_, asked)| out.now_ms.saturating_sub(asked) > RESEND_PATIENCE_MS) {
            self.ask_resend(seq, out);
        }
        Step::Done
    }

    fn on_reset(&mut self, message: &Message<'_>, seq: u64, out: &mut Output<'_>) -> Step {
        match message.number(tag::NEW_SEQ_NO) {
            Some(next) if next >= self.next_in => {
                self.next_in = next;
                self.gap = None;
            }
            Some(_) => self.reject(message, seq, Some(tag::NEW_SEQ_NO), 5, "NewSeqNo may not go back", out),
            None => self.reject(message, seq, Some(tag::NEW_SEQ_NO), 1, "required tag missing", out),
        }
        Step::Done
    }

    fn on_logout(&mut self, out: &mut Output<'_>) -> Step {
        if self.status == Status::Active {
            self.send(msg_type::LOGOUT, b"", out);
        }
        Step::Close("logged out")
    }

    fn on_resend_request(&mut self, message: &Message<'_>, seq: u64, out: &mut Output<'_>) {
        let (Some(first), Some(end)) = (message.number(tag::BEGIN_SEQ_NO), message.number(tag::END_SEQ_NO)) else {
            let missing = if message.number(tag::BEGIN_SEQ_NO).is_none() { tag::BEGIN_SEQ_NO } else { tag::END_SEQ_NO };
            return self.reject(message, seq, Some(missing), 1, "required tag missing", out);
        };
        let newest = self.next_out - 1;
        let last = if end == 0 { newest } else { end.min(newest) };
        if first == 0 || (end != 0 && first > end) {
            return self.reject(message, seq, Some(tag::BEGIN_SEQ_NO), 5, "not a range", out);
        }
        let mut next = first;
        for sent in self.sent.range(first, last) {
            if sent.seq > next {
                gap_fill(self.comp, next, sent.seq, out);
            }
            let header = Header {
                msg_type: &[sent.msg_type],
                seq: sent.seq,
                sender: out.us,
                target: self.comp.as_bytes(),
                at_ms: out.now_ms,
                first_sent_ms: Some(sent.at_ms),
            };
            if let Some(bytes) = out.bytes.as_deref_mut() {
                out.encoder.write(bytes, &header, &sent.body);
            }
            next = sent.seq + 1;
        }
        if next <= last {
            gap_fill(self.comp, next, last + 1, out);
        }
        self.last_out_ms = out.now_ms;
    }

    /// Time has passed: heartbeats, test requests, the end of patience.
    pub fn on_timer(&mut self, out: &mut Output<'_>) -> Step {
        match self.status {
            Status::Offline => return Step::Done,
            Status::LoggingOut(until) if out.now_ms >= until => return Step::Close("no answer to Logout"),
            Status::LoggingOut(_) | Status::Active => {}
        }
        let silent_ms = out.now_ms.saturating_sub(self.last_in_ms);
        if silent_ms > self.heartbeat_ms * 24 / 10 {
            return self.log_out("no answer to TestRequest", out);
        }
        if silent_ms > self.heartbeat_ms * 12 / 10 && self.test_request_ms.is_none() {
            self.test_request_ms = Some(out.now_ms);
            let mut body = Vec::with_capacity(32);
            put_number(&mut body, tag::TEST_REQ_ID, out.now_ms);
            self.send(msg_type::TEST_REQUEST, &body, out);
        }
        if out.now_ms.saturating_sub(self.last_out_ms) >= self.heartbeat_ms {
            self.send(msg_type::HEARTBEAT, b"", out);
        }
        Step::Done
    }

    /// Asks the counterparty to log out, because the gateway stops.
    pub fn begin_logout(&mut self, text: &str, patience_ms: u64, out: &mut Output<'_>) {
        if self.status == Status::Active {
            let mut body = Vec::with_capacity(text.len() + 8);
            put(&mut body, tag::TEXT, text.as_bytes());
            self.send(msg_type::LOGOUT, &body, out);
            self.status = Status::LoggingOut(out.now_ms + patience_ms);
        }
    }

    /// Sends an application message and keeps it. Returns its number and how many older ones had to go for it.
    pub fn send_application(&mut self, kind: u8, body: &[u8], out: &mut Output<'_>) -> (u64, usize) {
        let seq = self.next_out;
        let forgotten = self.sent.push(seq, out.now_ms, kind, body, out.keep_bytes);
        self.send(&[kind], body, out);
        (seq, forgotten)
    }

    /// Answers a message with a session-level Reject.
    pub fn reject(
        &mut self,
        message: &Message<'_>,
        seq: u64,
        tag_at_fault: Option<u32>,
        reason: u16,
        text: &str,
        out: &mut Output<'_>,
    ) {
        let mut body = Vec::with_capacity(96);
        put_number(&mut body, tag::REF_SEQ_NUM, seq);
        if let Some(at_fault) = tag_at_fault {
            put_number(&mut body, tag::REF_TAG_ID, at_fault);
        }
        if !message.msg_type().is_empty() {
            put(&mut body, tag::REF_MSG_TYPE, message.msg_type());
        }
        put_number(&mut body, tag::SESSION_REJECT_REASON, reason);
        put(&mut body, tag::TEXT, text.as_bytes());
        self.send(msg_type::REJECT, &body, out);
    }

    fn ask_resend(&mut self, until: u64, out: &mut Output<'_>) {
        self.gap = Some((until, out.now_ms));
        let mut body = Vec::with_capacity(32);
        put_number(&mut body, tag::BEGIN_SEQ_NO, self.next_in);
        put(&mut body, tag::END_SEQ_NO, b"0");
        self.send(msg_type::RESEND_REQUEST, &body, out);
    }

    fn sequence_too_low(&mut self, seq: u64, out: &mut Output<'_>) -> Step {
        let text = format!("MsgSeqNum too low, expecting {} but received {seq}", self.next_in);
        self.logout_message(&text, out);
        Step::Close("MsgSeqNum too low")
    }

    fn log_out(&mut self, text: &'static str, out: &mut Output<'_>) -> Step {
        self.logout_message(text, out);
        Step::Close(text)
    }

    /// A Logon that is not accepted is answered by a Logout.
    fn refuse(&mut self, text: &'static str, out: &mut Output<'_>) -> Step {
        self.log_out(text, out)
    }

    fn logout_message(&mut self, text: &str, out: &mut Output<'_>) {
        let mut body = Vec::with_capacity(text.len() + 8);
        put(&mut body, tag::TEXT, text.as_bytes());
        self.send(msg_type::LOGOUT, &body, out);
    }

    fn check_time(&self, message: &Message<'_>, now_ms: u64) -> Result<(), (&'static str, u16)> {
        let text = message.get(tag::SENDING_TIME).ok_or(("required tag missing", 1))?;
        let at_ms = parse_utc_ms(text).ok_or(("incorrect data format for value", 6))?;
        if at_ms.abs_diff(now_ms) > CLOCK_TOLERANCE_MS {
            return Err(("SendingTime accuracy problem", 10));
        }
        Ok(())
    }

    fn send(&mut self, kind: &[u8], body: &[u8], out: &mut Output<'_>) {
        let seq = self.next_out;
        self.next_out += 1;
        self.last_out_ms = out.now_ms;
        let header = Header {
            msg_type: kind,
            seq,
            sender: out.us,
            target: self.comp.as_bytes(),
            at_ms: out.now_ms,
            first_sent_ms: None,
        };
        if let Some(bytes) = out.bytes.as_deref_mut() {
            out.encoder.write(bytes, &header, body);
        }
    }
}

fn gap_fill(target: CompId, seq: u64, next: u64, out: &mut Output<'_>) {
    let mut body = Vec::with_capacity(32);
    put(&mut body, tag::GAP_FILL_FLAG, b"Y");
    put_number(&mut body, tag::NEW_SEQ_NO, next);
    let header = Header {
        msg_type: msg_type::SEQUENCE_RESET,
        seq,
        sender: out.us,
        target: target.as_bytes(),
        at_ms: out.now_ms,
        first_sent_ms: Some(out.now_ms),
    };
    if let Some(bytes) = out.bytes.as_deref_mut() {
        out.encoder.write(bytes, &header, &body);
    }
}

#[cfg(test)]
#[path = "session_tests.rs"]
mod tests;
