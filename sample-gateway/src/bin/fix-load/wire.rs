//! A counterparty's end of a FIX session: numbers, framing, buffers.

use gateway_interface::{put, put_number};
use sample_gateway::core::now_ms;
use sample_gateway::fix::{msg_type, tag, Encoder, Header, Message};

/// What a received message means for the session.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Received {
    /// In sequence, for the application.
    Application,
    /// A session-level message, dealt with.
    Admin(Admin),
    /// A duplicate that says so.
    Duplicate,
    /// Not the number that was expected.
    OutOfSequence,
}

/// Which session-level message it was.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Admin {
    Logon,
    Logout,
    TestRequest,
    ResendRequest,
    Reject,
    Other,
}

/// Numbers and output of one session.
#[derive(Debug)]
pub struct Wire {
    pub us: String,
    pub them: String,
    pub next_in: u64,
    pub next_out: u64,
    pub out: Vec<u8>,
    encoder: Encoder,
}

impl Wire {
    pub fn new(us: String, them: String) -> Self {
        Self { us, them, next_in: 1, next_out: 1, out: Vec::new(), encoder: Encoder::default() }
    }

    pub fn send(&mut self, kind: &[u8], body: &[u8]) {
        let seq = self.next_out;
        self.next_out += 1;
        self.write(kind, seq, None, body);
    }

    pub fn logon(&mut self, heartbeat_s: u64) {
        let mut body = Vec::with_capacity(32);
        put(&mut body, tag::ENCRYPT_METHOD, b"0");
        put_number(&mut body, tag::HEART_BT_INT, heartbeat_s);
        put(&mut body, tag::RESET_SEQ_NUM_FLAG, b"Y");
        self.send(msg_type::LOGON, &body);
    }

    /// Checks the number and answers what needs an answer.
    pub fn receive(&mut self, message: &Message<'_>) -> Received {
        let seq = message.number(tag::MSG_SEQ_NUM).unwrap_or(0);
        if seq != self.next_in {
            if seq < self.next_in && message.flag(tag::POSS_DUP_FLAG) {
                return Received::Duplicate;
            }
            self.next_in = self.next_in.max(seq + 1);
            return Received::OutOfSequence;
        }
        self.next_in += 1;
        let admin = match message.msg_type() {
            msg_type::LOGON => Admin::Logon,
            msg_type::LOGOUT => Admin::Logout,
            msg_type::REJECT => Admin::Reject,
            msg_type::HEARTBEAT => Admin::Other,
            msg_type::TEST_REQUEST => {
                let mut body = Vec::new();
                put(&mut body, tag::TEST_REQ_ID, message.get(tag::TEST_REQ_ID).unwrap_or(b"?"));
                self.send(msg_type::HEARTBEAT, &body);
                Admin::TestRequest
            }
            msg_type::RESEND_REQUEST => {
                // Orders are not sent twice: what is asked for is filled.
                let mut body = Vec::new();
                put(&mut body, tag::GAP_FILL_FLAG, b"Y");
                put_number(&mut body, tag::NEW_SEQ_NO, self.next_out);
                let first = message.number(tag::BEGIN_SEQ_NO).unwrap_or(1);
                self.write(msg_type::SEQUENCE_RESET, first, Some(now_ms()), &body);
                Admin::ResendRequest
            }
            msg_type::SEQUENCE_RESET => {
                self.next_in = message.number(tag::NEW_SEQ_NO).unwrap_or(self.next_in);
                Admin::Other
            }
            _ => return Received::Application,
        };
        Received::Admin(admin)
    }

    fn write(&mut self, kind: &[u8], seq: u64, first_sent_ms: Option<u64>, body: &[u8]) {
        let header = Header {
            msg_type: kind,
            seq,
            sender: self.us.as_bytes(),
            target: self.them.as_bytes(),
            at_ms: now_ms(),
            first_sent_ms,
        };
        self.encoder.write(&mut self.out, &header, body);
    }
}
