use super::*;
use proptest::prelude::*;

fn message(body: &str) -> Vec<u8> {
    let body = body.replace('|', "\u{1}");
    let mut out = format!("8=FIX.4.4\u{1}9={}\u{1}{body}", body.len()).into_bytes();
    let sum = checksum(&out);
    out.extend_from_slice(format!("10={sum:03}\u{1}").as_bytes());
    out
}

const ORDER: &str = "35=D|49=A|56=B|34=2|52=20240101-00:00:00|11=X|55=ACME|54=1|38=10|40=1|60=20240101-00:00:00|";

#[test]
fn a_message_is_framed_byte_by_byte() {
    let bytes = message(ORDER);
    for n in 0..bytes.len() {
        assert_eq!(frame(&bytes[..n]), Frame::Incomplete, "after {n} bytes");
    }
    assert_eq!(frame(&bytes), Frame::Message(bytes.len()));
    let mut two = bytes.clone();
    two.extend_from_slice(b"8=FIX");
    assert_eq!(frame(&two), Frame::Message(bytes.len()));
}

#[test]
fn fields_are_found() {
    let bytes = message(ORDER);
    let mut parser = Parser::new();
    let (message, verdict) = parser.parse(&bytes);
    assert_eq!(verdict, Ok(()));
    assert_eq!(message.msg_type(), b"D");
    assert_eq!(message.number(34), Some(2));
    assert_eq!(message.get(55), Some(&b"ACME"[..]));
    assert_eq!(message.get(999), None);
    assert!(message.version_is_ours());
}

#[test]
fn a_wrong_checksum_or_length_is_garbled_and_the_next_message_is_found() {
    let good = message(ORDER);
    let mut bad = good.clone();
    let at = bad.len() - 2;
    bad[at] = if bad[at] == b'0' { b'1' } else { b'0' };
    let mut buffer = bad.clone();
    buffer.extend_from_slice(&good);
    assert_eq!(frame(&buffer), Frame::Garbled(bad.len()));
    let text = String::from_utf8(good).unwrap();
    let length = format!("9={}", ORDER.len());
    assert!(text.contains(&length));
    let short = text.replacen(&length, &format!("9={}", ORDER.len() - 1), 1).into_bytes();
    assert!(matches!(frame(&short), Frame::Garbled(_)));
    assert_eq!(frame(b"hello"), Frame::Garbled(5));
    assert_eq!(frame(b"hello\x018=F"), Frame::Garbled(5));
}

#[test]
fn an_endless_message_is_not_waited_for() {
    assert!(matches!(frame(b"8=FIX.4.4\x019=999999\x01"), Frame::Garbled(_)));
    assert!(matches!(frame(b"8=FIX.4.4\x019=9999999"), Frame::Garbled(_)));
}

#[test]
fn wrong_fields_are_named() {
    for (body, tag, reason) in [
        ("35=D|34=|", Some(34), 4),
        ("35=D|x=1|", None, 0),
        ("35=D|034=1|", None, 0),
        ("34=1|35=D|", Some(35), 14),
        ("35=D|34=1|34=1|", Some(34), 13),
        ("35=D|95=9|96=abc|", Some(96), 5),
        ("35=D|95=x|96=abc|", Some(95), 6),
    ] {
        let bytes = message(body);
        assert_eq!(frame(&bytes), Frame::Message(bytes.len()), "{body}");
        let error = Parser::new().parse(&bytes).1.unwrap_err();
        assert_eq!((error.tag, error.reason), (tag, reason), "{body}");
    }
}

#[test]
fn raw_data_may_hold_delimiters() {
    let bytes = message("35=A|95=3|96=a|b|108=30|");
    let mut parser = Parser::new();
    let (message, verdict) = parser.parse(&bytes);
    assert_eq!(verdict, Ok(()));
    assert_eq!(message.get(96), Some(&b"a\x01b"[..]));
    assert_eq!(message.number(108), Some(30));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2_000))]

    #[test]
    fn any_bytes_are_survived_and_consumed(bytes in proptest::collection::vec(any::<u8>(), 0..400)) {
        let _ = Parser::new().parse(&bytes).0.number(34);
        walk(&bytes);
    }

    #[test]
    fn any_damaged_message_is_survived(
        edits in proptest::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..6),
        cut in any::<prop::sample::Index>(),
    ) {
        let mut bytes = message(ORDER);
        bytes.extend_from_slice(&message("35=0|34=3|49=A|56=B|"));
        for (at, value) in edits {
            let at = at.index(bytes.len());
            bytes[at] = value;
        }
        bytes.truncate(cut.index(bytes.len() + 1));
        let _ = Parser::new().parse(&bytes).0.msg_type();
        walk(&bytes);
    }
}

/// Consumes a buffer as a connection would: it must come to an end.
fn walk(bytes: &[u8]) {
    let mut rest = bytes;
    let mut parser = Parser::new();
    while !rest.is_empty() {
        match frame(rest) {
            Frame::Incomplete => break,
            Frame::Message(n) => {
                let _ = parser.parse(&rest[..n]);
                rest = &rest[n..];
            }
            Frame::Garbled(n) => {
                assert!(n > 0 && n <= rest.len());
                rest = &rest[n..];
            }
        }
    }
}
