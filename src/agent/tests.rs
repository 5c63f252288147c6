use std::os::fd::OwnedFd;
use std::time::Duration;

use proptest::prelude::*;

use super::sealed::SealedPatch;
use super::wire::{Answer, Failure, FailureKind, Given, Inbox, Request, WireError, HEADER_BYTES, MAX_REQUEST, VERSION};
use crate::patcher::{Canary, Confirmed, Error, Options, PatchStatus, ProcessStatus, Report};
use crate::plan::beside::Consistency;
use crate::process::Pid;
use crate::registry::State;
use crate::signature::Signed;

/// What is read from the frame when it comes in these pieces.
fn body(frame: &[u8], piece_bytes: usize) -> Result<Option<Vec<u8>>, WireError> {
    let mut inbox = Inbox::new(MAX_REQUEST);
    let mut found = None;
    for piece in frame.chunks(piece_bytes) {
        assert_eq!(found, None, "a frame ends with its last byte");
        found = inbox.push(piece)?;
    }
    Ok(found)
}

fn options() -> impl Strategy<Value = Options> {
    let time = (0..1_000_000_u64, 0..1_000_000_000_u32).prop_map(|(s, ns)| Duration::new(s, ns));
    let consistency = prop_oneof![
        Just(Consistency::Stack),
        Just(Consistency::Entry),
        proptest::collection::vec(".{0,20}", 0..4).prop_map(Consistency::StackBut),
    ];
    let keys = proptest::collection::vec((".{0,20}", any::<u8>()), 0..4);
    let canary = (0..=10_000_u32, keys).prop_map(|(share, keys)| Canary { share, keys });
    let signed = (".{0,9}", ".{0,9}", proptest::option::of(any::<u64>())).prop_map(|(key, comment, revision)| Signed {
        key,
        comment,
        revision,
    });
    let (times, flags) = ((time.clone(), time.clone(), proptest::option::of(time)), any::<[bool; 3]>());
    (times, flags, consistency, proptest::option::of(canary), proptest::option::of(signed)).prop_map(
        |(
            (timeout, hold, confirm_within),
            [allow_contexts, allow_unwind, allow_replay],
            consistency,
            canary,
            signed,
        )| {
            Options {
                timeout,
                hold,
                allow_contexts,
                allow_unwind,
                consistency,
                signed,
                canary,
                confirm_within,
                allow_replay,
            }
        },
    )
}

fn requests() -> impl Strategy<Value = Request> {
    let given = (options(), proptest::option::of(".{0,200}"))
        .prop_map(|(options, signature)| Given { options, signature })
        .boxed();
    prop_oneof![
        Just(Request::Info),
        Just(Request::Status),
        given.clone().prop_map(Request::Check),
        given.prop_map(Request::Apply),
        (proptest::option::of(".{1,20}"), options()).prop_map(|(name, options)| Request::Revert {
            all: name.is_none(),
            name,
            options
        }),
        (".{1,20}", 0..=10_000_u32).prop_map(|(name, share)| Request::Canary { name, share }),
        ".{1,20}".prop_map(|name| Request::Confirm { name }),
    ]
}

proptest! {
    #[test]
    fn requests_come_back_in_any_pieces(request in requests(), piece in 1..50_usize) {
        let frame = request.encode().unwrap();
        let body = body(&frame, piece).unwrap().unwrap();
        prop_assert_eq!(Request::decode(&body).unwrap(), request);
    }

    #[test]
    fn no_bytes_are_too_odd(bytes in proptest::collection::vec(any::<u8>(), 0..300), piece in 1..50_usize) {
        let _ = (body(&bytes, piece), Request::decode(&bytes), Answer::decode(&bytes));
        // And behind a header that is right.
        let mut frame = Request::Info.encode().unwrap();
        frame.truncate(HEADER_BYTES);
        frame[8..12].copy_from_slice(&(bytes.len() as u32).to_le_bytes());
        frame.extend(&bytes);
        let whole = body(&frame, frame.len()).unwrap();
        prop_assert_eq!(whole, Some(bytes));
    }

    #[test]
    fn a_changed_byte_is_an_error_or_another_message(request in requests(), at in any::<prop::sample::Index>(), to in any::<u8>()) {
        let mut frame = request.encode().unwrap();
        let at = at.index(frame.len());
        frame[at] = to;
        if let Ok(Some(body)) = body(&frame, frame.len()) {
            let _ = Request::decode(&body);
        }
    }
}

#[test]
fn a_frame_says_what_is_wrong_with_it() {
    let frame = Request::Info.encode().unwrap();
    assert_eq!(body(&frame[..frame.len() - 1], 7), Ok(None));
    assert_eq!(body(b"GET / HTTP/1.1", 1), Err(WireError::Magic), "at its first byte");
    assert_eq!(body(&[&frame[..], b"x"].concat(), 4096), Err(WireError::Trailing));
    let changed = |at: usize, to: u8| {
        let mut frame = frame.clone();
        frame[at] = to;
        body(&frame[..HEADER_BYTES], 4096)
    };
    assert_eq!(changed(5, 1), Err(WireError::Version { theirs: VERSION | 0x100 }));
    assert_eq!(changed(6, 1), Err(WireError::Magic));
    assert!(matches!(changed(11, 1), Err(WireError::TooLong { len_bytes: 0x0100_0006, .. })), "{:?}", changed(11, 1));
}

#[test]
fn what_is_out_of_bounds_is_refused() {
    let body = |text: &str| Request::decode(text.as_bytes());
    assert_eq!(body(r#""status""#), Ok(Request::Status));
    assert!(matches!(body(r#"{"confirm":{"name":"fix","now":true}}"#), Err(WireError::Body(_))), "unknown field");
    assert!(matches!(body(r#""reboot""#), Err(WireError::Body(_))), "unknown request");
    assert!(matches!(body(r#"{"canary":{"name":"fix","share":10001}}"#), Err(WireError::Value(_))));
    assert!(matches!(body(r#"{"confirm":{"name":""}}"#), Err(WireError::Value(_))));
    let deep = "[".repeat(100_000);
    assert!(body(&deep).is_err() && Answer::decode(deep.as_bytes()).is_err());
    let for_ever = Options { timeout: Duration::MAX, ..Options::default() };
    let revert = |name: Option<String>, options| Request::Revert { name, all: true, options }.encode();
    assert!(matches!(revert(None, for_ever), Err(WireError::Value(_))));
    assert!(matches!(revert(Some("fix".into()), Options::default()), Err(WireError::Value(_))));
    let long = "x".repeat(MAX_REQUEST);
    let many = Options { consistency: Consistency::StackBut(vec![long]), ..Options::default() };
    assert!(matches!(revert(None, many), Err(WireError::TooLong { .. })));
}

fn decoded(answer: &Answer) -> Answer {
    let frame = answer.encode();
    Answer::decode(&frame[HEADER_BYTES..]).unwrap()
}

#[test]
fn answers_come_back() {
    let report = Report {
        pid: 7,
        action: "apply".into(),
        patch: "fix".into(),
        already: false,
        functions: vec!["fee".into()],
        entries: 1,
        pause_us: 81.3,
        sleepers_us: 0.0,
        threads: 9,
        attempts: 1,
        within: None,
        migrated: None,
        warnings: vec!["w".into()],
    };
    let patch = PatchStatus {
        patch: "fix".into(),
        digest: "00".into(),
        image: None,
        state: State::Applied,
        unfinished: false,
        confirmation: Some(Confirmed::Unconfirmed { by: 5, watcher: None }),
        canary_percent: Some(12.5),
        arms: Some([
            crate::registry::Arm { messages: 9, panics: 1, failed: 2, timed: 3, p50_ns: 512, p99_ns: 4096 },
            crate::registry::Arm::default(),
        ]),
        slot: None,
        functions: vec![],
        entries: 0,
        bytes: 4096,
        applied_at: 1,
        pause_us: 1.0,
        unwind_registered: true,
        damage: None,
    };
    let (name, exe, build_id) = ("gw".to_owned(), "/gw".to_owned(), "ab".to_owned());
    let status =
        ProcessStatus { pid: 7, name, exe, build_id, patches: vec![patch], transitioning: true, shadows: vec![] };
    let outside = Answer::Outside { why: "SIGTRAP is somebody else's".into() };
    for answer in [Answer::Reports(vec![report]), Answer::Status(status), Answer::Done, outside] {
        assert_eq!(decoded(&answer), answer);
        assert!(!format!("{:?}", answer.of_process(8)).contains("pid: 7"));
    }
}

#[test]
fn failures_keep_exit_code_and_json() {
    let error = Error::NothingApplied { pid: Pid(1) };
    let answer = decoded(&Answer::Failed(Failure::of(1, &error)));
    let Answer::Failed(failure) = answer.of_process(4711) else { panic!("a failure") };
    assert_eq!((failure.exit, failure.kind), (1, FailureKind::NothingApplied));
    assert_eq!(failure.message, error.to_string());
    assert_eq!(failure.json, error.to_json(Some(4711)));
}

#[test]
fn an_answer_cannot_lie_about_success_or_move_the_cursor() {
    let mut failure = Failure::other(1, "\u{1b}[2Jdone\nno");
    failure.exit = 0;
    let Answer::Failed(read) = decoded(&Answer::Failed(failure)) else { panic!("a failure") };
    assert_eq!((read.exit, read.message.as_str()), (1, "\u{fffd}[2Jdone\nno"));
}

#[test]
fn an_answer_that_is_too_long_becomes_a_failure() {
    let why = "x".repeat(super::wire::MAX_ANSWER);
    assert!(matches!(decoded(&Answer::Outside { why }), Answer::Failed(Failure { exit: 1, .. })));
}

#[test]
fn only_sealed_memory_is_a_patch() {
    let patch = SealedPatch::new(b"patch").unwrap();
    assert_eq!(patch.read().unwrap(), b"patch");
    assert!(rustix::io::write(&patch, b"!").is_err(), "its sender has given that up");

    let flags = rustix::fs::MemfdFlags::ALLOW_SEALING | rustix::fs::MemfdFlags::CLOEXEC;
    let open = rustix::fs::memfd_create("open", flags).unwrap();
    rustix::fs::fcntl_add_seals(&open, rustix::fs::SealFlags::WRITE).unwrap();
    let file: OwnedFd = std::fs::File::open("/proc/self/exe").unwrap().into();
    let null: OwnedFd = std::fs::File::open("/dev/null").unwrap().into();
    for other in [open, file, null] {
        assert!(matches!(SealedPatch::check(other), Err(WireError::Descriptor(_))));
    }

    let huge = rustix::fs::memfd_create("huge", flags).unwrap();
    rustix::fs::ftruncate(&huge, 1 << 40).unwrap();
    let seals = rustix::fs::SealFlags::WRITE | rustix::fs::SealFlags::SHRINK | rustix::fs::SealFlags::GROW;
    rustix::fs::fcntl_add_seals(&huge, seals).unwrap();
    assert!(matches!(SealedPatch::check(huge).unwrap().read(), Err(WireError::TooLong { .. })));
}
