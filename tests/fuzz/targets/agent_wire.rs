//! What comes over the control socket: as a frame in pieces, and as the body of one.
#![no_main]

use livepatch::agent::wire::{Answer, Inbox, Request, HEADER_BYTES, MAX_ANSWER, MAX_REQUEST};

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    // The first byte says how long the pieces are; the frame ends with the same body in pieces of any length.
    let (step, frame) = data.split_first().map_or((1, data), |(n, rest)| (usize::from(*n) + 1, rest));
    let read = |step: usize| {
        let mut inbox = Inbox::new(MAX_REQUEST);
        frame.chunks(step).find_map(|piece| inbox.push(piece).transpose())
    };
    if let Some(Ok(body)) = read(1) {
        // Whole, it may be refused for what stands behind its end.
        let in_pieces = read(step);
        assert!(in_pieces == Some(Ok(body)) || matches!(in_pieces, Some(Err(_))));
    }
    for body in [data, frame, frame.get(HEADER_BYTES..).unwrap_or_default()] {
        if let Ok(request) = Request::decode(body) {
            let again = request.encode().expect("what was read can be written");
            assert_eq!(Request::decode(&again[HEADER_BYTES..]), Ok(request), "what was written reads back");
        }
        if let Ok(answer) = Answer::decode(body) {
            let again = answer.encode();
            assert!(again.len() <= HEADER_BYTES + MAX_ANSWER);
            Answer::decode(&again[HEADER_BYTES..]).expect("what was written reads back");
        }
    }
});
