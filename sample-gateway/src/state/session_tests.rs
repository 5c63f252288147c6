use super::*;
use crate::fix::{format_utc, frame, Frame, Parser};

const NOW: u64 = 1_700_000_000_000;

struct Peer {
    session: Session,
    now_ms: u64,
}

impl Peer {
    fn offline() -> Self {
        Self { session: Session::new(SessionId(1), CompId::new(b"PEER").unwrap()), now_ms: NOW }
    }

    fn logged_on() -> Self {
        let mut peer = Self::offline();
        let (step, replies) = peer.say("35=A|34=1|98=0|108=30");
        assert_eq!(step, Step::Done);
        assert_eq!(replies, ["35=A|34=1|98=0|108=30"]);
        peer
    }

    /// Says something to the session; returns its step and its answers without the fields that are always the same.
    fn say(&mut self, text: &str) -> (Step, Vec<String>) {
        let time = String::from_utf8(format_utc(self.now_ms).to_vec()).unwrap();
        let has = |tag: &str| text.contains(&format!("|{tag}="));
        let (kind, rest) = text.split_once('|').unwrap();
        let mut whole = kind.to_owned();
        for (tag, value) in [("49", "PEER"), ("56", "GATEWAY"), ("52", time.as_str())] {
            if !has(tag) {
                whole.push_str(&format!("|{tag}={value}"));
            }
        }
        let body = format!("{whole}|{rest}").replace('|', "\u{1}").replace("\u{1}52=none", "") + "\u{1}";
        let begin = if has("8") { "" } else { "8=FIX.4.4\u{1}" };
        let bytes = format!("{begin}9={}\u{1}{body}10=000\u{1}", body.len()).into_bytes();
        let mut parser = Parser::new();
        let (message, syntax) = parser.parse(&bytes);
        self.with_output(|session, out| {
            if session.is_connected() {
                session.on_message(&message, syntax, out)
            } else {
                session.on_logon(&message, out)
            }
        })
    }

    fn wait(&mut self, ms: u64) -> (Step, Vec<String>) {
        self.now_ms += ms;
        self.with_output(|session, out| session.on_timer(out))
    }

    fn report(&mut self, text: &str) -> Vec<String> {
        self.with_output(|session, out| {
            session.send_application(b'8', format!("58={text}\u{1}").as_bytes(), out);
            Step::Done
        })
        .1
    }

    fn with_output(&mut self, act: impl FnOnce(&mut Session, &mut Output<'_>) -> Step) -> (Step, Vec<String>) {
        let mut bytes = Vec::new();
        let step = act(
            &mut self.session,
            &mut Output {
                bytes: Some(&mut bytes),
                encoder: &mut Encoder::new(),
                us: b"GATEWAY",
                now_ms: self.now_ms,
                keep_bytes: 1 << 16,
            },
        );
        (step, split(&bytes))
    }
}

fn split(mut bytes: &[u8]) -> Vec<String> {
    let mut replies = Vec::new();
    while let Frame::Message(n) = frame(bytes) {
        let text = String::from_utf8(bytes[..n].to_vec()).unwrap();
        let kept = text.split('\u{1}').filter(|f| {
            let tag = f.split('=').next().unwrap_or("");
            !matches!(tag, "" | "8" | "9" | "10" | "49" | "52" | "56" | "122")
        });
        replies.push(kept.collect::<Vec<_>>().join("|"));
        bytes = &bytes[n..];
    }
    assert!(bytes.is_empty());
    replies
}

#[test]
fn a_logon_must_be_complete() {
    for (text, why) in [
        ("35=A|34=1|98=1|108=30", "EncryptMethod"),
        ("35=A|34=1|98=0", "HeartBtInt"),
        ("35=A|34=1|98=0|108=0", "HeartBtInt"),
        ("35=A|98=0|108=30", "MsgSeqNum"),
        ("35=A|34=5|98=0|108=30|141=Y", "must be 1"),
        ("35=A|34=1|98=0|108=30|52=19990101-00:00:00", "accuracy"),
    ] {
        let mut peer = Peer::offline();
        let (step, replies) = peer.say(text);
        assert!(matches!(step, Step::Close(_)), "{text}");
        assert!(replies[0].starts_with("35=5|") && replies[0].contains(why), "{text}: {replies:?}");
        assert!(!peer.session.is_connected());
    }
}

#[test]
fn a_test_request_is_answered_with_its_id() {
    let (step, replies) = Peer::logged_on().say("35=1|34=2|112=ping");
    assert_eq!((step, replies), (Step::Done, vec!["35=0|34=2|112=ping".to_owned()]));
}

#[test]
fn orders_go_to_the_application_and_unknown_types_do_not() {
    let mut peer = Peer::logged_on();
    assert_eq!(peer.say("35=D|34=2").0, Step::Application);
    assert_eq!(peer.say("35=AE|34=3").0, Step::Unsupported);
    let (step, replies) = peer.say("35=?!|34=4");
    assert_eq!(step, Step::Done);
    assert!(replies[0].contains("|373=11|"), "{replies:?}");
    assert_eq!(peer.session.sequence().0, 5);
}

#[test]
fn a_gap_is_asked_for_once_and_filled() {
    let mut peer = Peer::logged_on();
    let (step, replies) = peer.say("35=D|34=4");
    assert_eq!((step, replies), (Step::Done, vec!["35=2|34=2|7=2|16=0".to_owned()]));
    assert_eq!(peer.say("35=D|34=5"), (Step::Done, vec![]), "asked already");
    assert_eq!(peer.say("35=4|34=2|43=Y|123=Y|36=4").0, Step::Done);
    assert_eq!(peer.say("35=D|34=4|43=Y|122=x").0, Step::Application);
    assert_eq!(peer.say("35=D|34=5|43=Y|122=x").0, Step::Application);
    assert_eq!(peer.say("35=D|34=6").0, Step::Application);
    assert_eq!(peer.say("35=D|34=9").1, ["35=2|34=3|7=7|16=0"], "a new gap is asked for anew");
}

#[test]
fn a_resend_that_does_not_come_is_asked_for_again() {
    let mut peer = Peer::logged_on();
    peer.say("35=D|34=4");
    peer.now_ms += RESEND_PATIENCE_MS + 1;
    assert_eq!(peer.say("35=0|34=5").1, ["35=2|34=3|7=2|16=0"]);
}

#[test]
fn a_logon_ahead_of_its_number_is_accepted_and_the_gap_asked_for() {
    let mut peer = Peer::offline();
    let (step, replies) = peer.say("35=A|34=7|98=0|108=30");
    assert_eq!(step, Step::Done);
    assert_eq!(replies, ["35=A|34=1|98=0|108=30", "35=2|34=2|7=1|16=0"]);
    assert_eq!(peer.say("35=4|34=1|43=Y|123=Y|36=8"), (Step::Done, vec![]));
    assert_eq!(peer.session.sequence().0, 8);
}

#[test]
fn a_low_number_ends_the_session() {
    let mut peer = Peer::logged_on();
    let (step, replies) = peer.say("35=0|34=1");
    assert_eq!(step, Step::Close("MsgSeqNum too low"));
    assert_eq!(replies, ["35=5|34=2|58=MsgSeqNum too low, expecting 2 but received 1"]);
    assert_eq!(peer.session.sequence().0, 2, "nothing was taken");
}

#[test]
fn a_low_number_marked_as_duplicate_is_ignored() {
    let mut peer = Peer::logged_on();
    assert_eq!(peer.say("35=D|34=1|43=Y|122=20231114-22:13:20"), (Step::Done, vec![]));
    let (step, replies) = peer.say("35=D|34=1|43=Y");
    assert_eq!(step, Step::Done);
    assert!(replies[0].contains("|371=122|"), "{replies:?}");
}

#[test]
fn reports_are_sent_again_and_the_rest_is_filled() {
    let mut peer = Peer::logged_on();
    peer.say("35=1|34=2|112=a");
    assert_eq!(peer.report("one"), ["35=8|34=3|58=one"]);
    peer.say("35=1|34=3|112=b");
    peer.say("35=1|34=4|112=c");
    peer.report("two");
    let (_, replies) = peer.say("35=2|34=5|7=1|16=0");
    assert_eq!(
        replies,
        ["35=4|34=1|43=Y|123=Y|36=3", "35=8|34=3|43=Y|58=one", "35=4|34=4|43=Y|123=Y|36=6", "35=8|34=6|43=Y|58=two",]
    );
    assert_eq!(peer.say("35=2|34=6|7=3|16=3").1, ["35=8|34=3|43=Y|58=one"]);
    assert_eq!(peer.say("35=2|34=7|7=7|16=0").1, Vec::<String>::new(), "nothing newer");
    assert!(peer.say("35=2|34=8|7=3|16=2").1[0].contains("|371=7|"));
    assert_eq!(peer.say("35=1|34=9|112=d").1, ["35=0|34=8|112=d"], "resends take no numbers of their own");
}

#[test]
fn a_resend_request_in_a_gap_is_answered_first() {
    let mut peer = Peer::logged_on();
    peer.report("one");
    let (_, replies) = peer.say("35=2|34=9|7=2|16=0");
    assert_eq!(replies, ["35=8|34=2|43=Y|58=one", "35=2|34=3|7=2|16=0"]);
}

#[test]
fn what_is_reported_while_nobody_is_there_can_be_asked_for() {
    let mut peer = Peer::logged_on();
    peer.session.disconnected();
    peer.report("while away");
    assert_eq!(peer.say("35=A|34=2|98=0|108=30").1, ["35=A|34=3|98=0|108=30"]);
    assert_eq!(peer.say("35=2|34=3|7=2|16=0").1[0], "35=8|34=2|43=Y|58=while away");
}

#[test]
fn sequence_reset_moves_forward_only() {
    let mut peer = Peer::logged_on();
    assert_eq!(peer.say("35=4|34=999|36=20").0, Step::Done);
    assert_eq!(peer.session.sequence().0, 20);
    assert!(peer.say("35=4|34=20|36=5").1[0].contains("|373=5|"));
    assert!(peer.say("35=4|34=20|123=Y|36=20").1[0].contains("|373=5|"));
}

#[test]
fn silence_is_tested_and_then_ended() {
    let mut peer = Peer::logged_on();
    assert_eq!(peer.wait(29_000), (Step::Done, vec![]));
    assert_eq!(peer.wait(1_000).1, ["35=0|34=2"]);
    let (_, replies) = peer.wait(7_000);
    assert!(replies[0].starts_with("35=1|34=3|112="), "{replies:?}");
    assert_eq!(peer.wait(1_000).1, Vec::<String>::new(), "asked once");
    assert_eq!(peer.wait(40_000).0, Step::Close("no answer to TestRequest"));
}

#[test]
fn logout_is_answered_and_can_be_ours() {
    assert_eq!(Peer::logged_on().say("35=5|34=2"), (Step::Close("logged out"), vec!["35=5|34=2".to_owned()]));
    let mut peer = Peer::logged_on();
    peer.with_output(|session, out| {
        session.begin_logout("closing", 2_000, out);
        Step::Done
    });
    assert_eq!(peer.say("35=5|34=2"), (Step::Close("logged out"), vec![]), "not answered twice");
    let mut peer = Peer::logged_on();
    peer.with_output(|session, out| {
        session.begin_logout("closing", 2_000, out);
        Step::Done
    });
    assert_eq!(peer.wait(2_000).0, Step::Close("no answer to Logout"));
}

#[test]
fn wrong_fields_cost_a_reject_and_their_number() {
    let mut peer = Peer::logged_on();
    assert!(peer.say("35=D|34=2|55=").1[0].contains("|371=55|372=D|373=4|"));
    assert!(peer.say("35=D|34=3|52=none").1[0].contains("|371=52|372=D|373=1|"));
    assert!(matches!(peer.say("35=D|34=4|52=20200101-00:00:00").0, Step::Close(_)));
    assert_eq!(peer.session.sequence().0, 5);
    let (step, replies) = Peer::logged_on().say("35=0|34=2|49=OTHER");
    assert!(matches!(step, Step::Close(_)));
    assert!(replies[0].contains("|373=9|"));
}

#[test]
fn a_reset_starts_both_sequences_anew() {
    let mut peer = Peer::logged_on();
    peer.report("old");
    peer.session.disconnected();
    assert_eq!(peer.say("35=A|34=1|98=0|108=30|141=Y").1, ["35=A|34=1|98=0|108=30|141=Y"]);
    assert_eq!(peer.session.sequence(), (2, 2));
    assert_eq!(peer.say("35=2|34=2|7=1|16=0").1, ["35=4|34=1|43=Y|123=Y|36=2"], "nothing old comes back");
}
