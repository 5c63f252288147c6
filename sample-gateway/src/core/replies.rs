//! Bodies of the application messages that the core itself writes.

use crate::fix::{format_utc, tag, Message};
use gateway_interface::{put, put_number, ExecKind, Execution};

/// BusinessRejectReason (380) 0: other.
pub const OTHER: u16 = 0;
/// BusinessRejectReason (380) 3: unsupported message type.
pub const UNSUPPORTED_TYPE: u16 = 3;

/// TransactTime (60), which belongs to every ExecutionReport.
pub fn transact_time(execution: &Execution, body: &mut Vec<u8>) {
    put(body, tag::TRANSACT_TIME, &format_utc(execution.at_ms));
}

/// An ExecutionReport that rejects an order.
pub fn order_rejected(order: &Message<'_>, exec_id: u64, reason: u16, text: &str, now_ms: u64, body: &mut Vec<u8>) {
    put(body, tag::ORDER_ID, b"NONE");
    copy(order, tag::CL_ORD_ID, body);
    put_number(body, tag::EXEC_ID, exec_id);
    put(body, tag::EXEC_TYPE, b"8");
    put(body, tag::ORD_STATUS, b"8");
    put_number(body, tag::ORD_REJ_REASON, reason);
    copy(order, 55, body);
    copy(order, 54, body);
    put(body, tag::LEAVES_QTY, b"0");
    put(body, tag::CUM_QTY, b"0");
    put(body, 6, b"0");
    put(body, tag::TRANSACT_TIME, &format_utc(now_ms));
    put(body, tag::TEXT, text.as_bytes());
}

/// An OrderCancelReject (9) to an OrderCancelRequest. CxlRejReason 1 is "unknown order".
pub fn cancel_rejected(request: &Message<'_>, reason: u16, text: &str, now_ms: u64, body: &mut Vec<u8>) {
    put(body, tag::ORDER_ID, b"NONE");
    copy(request, tag::CL_ORD_ID, body);
    copy(request, tag::ORIG_CL_ORD_ID, body);
    // OrdStatus is required; "rejected" is what the specification says when the order is unknown.
    put(body, tag::ORD_STATUS, b"8");
    put(body, tag::TRANSACT_TIME, &format_utc(now_ms));
    put(body, tag::CXL_REJ_RESPONSE_TO, b"1");
    put_number(body, tag::CXL_REJ_REASON, reason);
    put(body, tag::TEXT, text.as_bytes());
}

/// A BusinessMessageReject to any message.
pub fn business_rejected(message: &Message<'_>, reason: u16, text: &str, body: &mut Vec<u8>) {
    if let Some(seq) = message.number(tag::MSG_SEQ_NUM) {
        put_number(body, tag::REF_SEQ_NUM, seq);
    }
    put(body, tag::REF_MSG_TYPE, message.msg_type());
    if let Some(name) = message.get(tag::CL_ORD_ID) {
        put(body, tag::BUSINESS_REJECT_REF_ID, name);
    }
    put_number(body, tag::BUSINESS_REJECT_REASON, reason);
    put(body, tag::TEXT, text.as_bytes());
}

/// A BusinessMessageReject where the report of an execution could not be written.
pub fn unreportable(execution: &Execution, text: &str, body: &mut Vec<u8>) {
    put(body, tag::REF_MSG_TYPE, if execution.kind == ExecKind::Canceled { b"F" } else { b"D" });
    put(body, tag::BUSINESS_REJECT_REF_ID, execution.cl_ord_id.as_bytes());
    put_number(body, tag::BUSINESS_REJECT_REASON, OTHER);
    put(body, tag::TEXT, text.as_bytes());
}

fn copy(message: &Message<'_>, tag: u32, body: &mut Vec<u8>) {
    if let Some(value) = message.get(tag) {
        put(body, tag, value);
    }
}
