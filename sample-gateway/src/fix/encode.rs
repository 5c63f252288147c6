//! Messages to bytes.

use super::{decode::checksum, format_utc, tag};
use gateway_interface::{put, put_number, SOH};

/// What stands before a message's body.
#[derive(Clone, Copy, Debug)]
pub struct Header<'a> {
    /// 35
    pub msg_type: &'a [u8],
    /// 34
    pub seq: u64,
    /// 49
    pub sender: &'a [u8],
    /// 56
    pub target: &'a [u8],
    /// 52
    pub at_ms: u64,
    /// PossDupFlag and OrigSendingTime (43, 122): the message was sent before, then.
    pub first_sent_ms: Option<u64>,
}

/// Writes messages into an output buffer; keeps its scratch space, so that writing allocates nothing.
#[derive(Debug, Default)]
pub struct Encoder {
    scratch: Vec<u8>,
}

impl Encoder {
    /// An encoder with room for usual messages.
    pub fn new() -> Self {
        Self { scratch: Vec::with_capacity(512) }
    }

    /// Appends one whole message. `body` are the fields behind the header, each with its delimiter.
    pub fn write(&mut self, out: &mut Vec<u8>, header: &Header<'_>, body: &[u8]) {
        let head = &mut self.scratch;
        head.clear();
        put(head, tag::MSG_TYPE, header.msg_type);
        put_number(head, tag::MSG_SEQ_NUM, header.seq);
        put(head, tag::SENDER_COMP_ID, header.sender);
        put(head, tag::SENDING_TIME, &format_utc(header.at_ms));
        put(head, tag::TARGET_COMP_ID, header.target);
        if let Some(first) = header.first_sent_ms {
            put(head, tag::POSS_DUP_FLAG, b"Y");
            put(head, tag::ORIG_SENDING_TIME, &format_utc(first));
        }
        let start = out.len();
        out.extend_from_slice(b"8=FIX.4.4\x01");
        put_number(out, tag::BODY_LENGTH, head.len() + body.len());
        out.extend_from_slice(head);
        out.extend_from_slice(body);
        let sum = checksum(&out[start..]);
        out.extend_from_slice(&[b'1', b'0', b'=', b'0' + sum / 100, b'0' + sum / 10 % 10, b'0' + sum % 10, SOH]);
    }
}

#[cfg(test)]
mod tests {
    use super::super::{frame, Frame, Parser};
    use super::*;

    #[test]
    fn what_is_written_can_be_read() {
        let mut out = Vec::new();
        let header = Header { msg_type: b"0", seq: 7, sender: b"S", target: b"T", at_ms: 5, first_sent_ms: Some(1) };
        Encoder::new().write(&mut out, &header, b"112=hello\x01");
        assert_eq!(frame(&out), Frame::Message(out.len()));
        let mut parser = Parser::new();
        let (message, verdict) = parser.parse(&out);
        assert_eq!(verdict, Ok(()));
        assert_eq!(message.number(34), Some(7));
        assert!(message.flag(43));
        assert_eq!(message.get(122), Some(&b"19700101-00:00:00.001"[..]));
        assert_eq!(message.get(112), Some(&b"hello"[..]));
    }
}
