//! Application messages that were sent, for as long as they may be asked for again.

use std::collections::VecDeque;

/// One message as it was sent.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Sent {
    /// MsgSeqNum.
    pub seq: u64,
    /// SendingTime, in milliseconds since 1970.
    pub at_ms: u64,
    /// MsgType, one character: all that this gateway sends on application level have one.
    pub msg_type: u8,
    /// The fields behind the header.
    pub body: Vec<u8>,
}

#[derive(Clone, Copy, Debug)]
struct Entry {
    seq: u64,
    at_ms: u64,
    start: u64,
    len: u32,
    msg_type: u8,
}

/// The newest messages of one session, in one ring of bytes.
#[derive(Debug, Default)]
pub struct SentStore {
    entries: VecDeque<Entry>,
    bytes: VecDeque<u8>,
    /// Position of the first byte in `bytes`, counted from the beginning of time.
    base: u64,
}

impl SentStore {
    /// Adds a message, then forgets the oldest ones until at most `budget_bytes` are kept. Returns how many it forgot.
    pub fn push(&mut self, seq: u64, at_ms: u64, msg_type: u8, body: &[u8], budget_bytes: usize) -> usize {
        let start = self.base + self.bytes.len() as u64;
        let len = u32::try_from(body.len()).unwrap_or(u32::MAX);
        self.bytes.extend(&body[..len as usize]);
        self.entries.push_back(Entry { seq, at_ms, start, len, msg_type });
        let mut forgotten = 0;
        while self.bytes.len() > budget_bytes && self.entries.len() > 1 {
            if let Some(oldest) = self.entries.pop_front() {
                self.bytes.drain(..oldest.len as usize);
                self.base += u64::from(oldest.len);
                forgotten += 1;
            }
        }
        forgotten
    }

    /// Messages with numbers in `first..=last`, ascending.
    pub fn range(&self, first: u64, last: u64) -> impl Iterator<Item = Sent> + '_ {
        let from = self.entries.partition_point(|e| e.seq < first);
        self.entries.range(from..).take_while(move |e| e.seq <= last).map(|e| {
            let at = (e.start - self.base) as usize;
            let body = self.bytes.range(at..at + e.len as usize).copied().collect();
            Sent { seq: e.seq, at_ms: e.at_ms, msg_type: e.msg_type, body }
        })
    }

    /// Forgets everything: the sequence starts anew.
    pub fn clear(&mut self) {
        *self = Self::default();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_oldest_are_forgotten_first() {
        let mut store = SentStore::default();
        for seq in 1..=10 {
            store.push(seq * 2, seq, b'8', &[seq as u8; 10], 35);
        }
        let kept: Vec<u64> = store.range(0, u64::MAX).map(|s| s.seq).collect();
        assert_eq!(kept, [16, 18, 20]);
        let one: Vec<Sent> = store.range(17, 19).collect();
        assert_eq!(one, [Sent { seq: 18, at_ms: 9, msg_type: b'8', body: vec![9; 10] }]);
    }

    #[test]
    fn the_newest_is_kept_whatever_its_size() {
        let mut store = SentStore::default();
        store.push(1, 0, b'8', &[0; 100], 10);
        store.push(2, 0, b'8', &[0; 100], 10);
        assert_eq!(store.range(0, 9).count(), 1);
    }
}
