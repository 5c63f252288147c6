//! The message types that the gateway speaks.
#![allow(missing_docs, reason = "each name is the message's name in the FIX 4.4 specification")]

pub const HEARTBEAT: &[u8] = b"0";
pub const TEST_REQUEST: &[u8] = b"1";
pub const RESEND_REQUEST: &[u8] = b"2";
pub const REJECT: &[u8] = b"3";
pub const SEQUENCE_RESET: &[u8] = b"4";
pub const LOGOUT: &[u8] = b"5";
pub const EXECUTION_REPORT: &[u8] = b"8";
pub const ORDER_CANCEL_REJECT: &[u8] = b"9";
pub const LOGON: &[u8] = b"A";
pub const NEW_ORDER_SINGLE: &[u8] = b"D";
pub const ORDER_CANCEL_REQUEST: &[u8] = b"F";
pub const BUSINESS_MESSAGE_REJECT: &[u8] = b"j";

/// Session-level messages are never sent again: a gap fill stands for them.
pub fn is_session_level(msg_type: &[u8]) -> bool {
    matches!(msg_type, b"0" | b"1" | b"2" | b"3" | b"4" | b"5" | b"A")
}
