//! The journal's records, and their bytes.
//!
//! Integers are written as LEB128, signed ones zigzag-coded, names with their length first. A journal entry is a
//! sequence of records; what does not decode is an error with its position, never skipped.

use crate::state::Resting;
use gateway_interface::{
    ClOrdId, CompId, ExecKind, Execution, Liquidity, Money, Name, NewOrder, OrdType, OrderId, Price, Qty, SessionId,
    Side, Symbol, TimeInForce,
};
use std::fmt;

/// One thing that must survive.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Record {
    /// A counterparty got its number.
    Session { id: SessionId, comp: CompId },
    /// The numbers that a session expects next.
    Sequence { id: SessionId, next_in: u64, next_out: u64 },
    /// Both sequences start anew.
    Reset { id: SessionId },
    /// Something happened to an order.
    Execution(Execution),
    /// An execution was reported, under this number, with this commission.
    Reported { id: SessionId, seq: u64, at_ms: u64, exec_id: u64, commission: Money },
    /// Another application message was sent.
    Sent { id: SessionId, seq: u64, at_ms: u64, msg_type: u8, body: Vec<u8> },
    /// In a snapshot: an order rests.
    Resting(Resting),
    /// In a snapshot: an account's sums.
    Account { id: SessionId, traded: Money, charged: Money },
    /// In a snapshot: the numbers to give out next.
    Ids { order: u64, exec: u64 },
    /// In a snapshot: a symbol's last trade.
    Last { symbol: Symbol, price: Price },
}

/// The journal holds something that this build does not understand.
#[derive(Debug, PartialEq, Eq)]
pub struct DecodeError {
    /// Where, in bytes from the start of the entry.
    pub at: usize,
    /// What was expected there.
    pub expected: &'static str,
}

impl fmt::Display for DecodeError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "journal entry: {} expected at byte {}", self.expected, self.at)
    }
}

impl std::error::Error for DecodeError {}

impl Record {
    /// Appends the record's bytes.
    pub fn encode(&self, out: &mut Vec<u8>) {
        match self {
            Self::Session { id, comp } => {
                out.push(1);
                unsigned(out, id.0.into());
                name(out, comp);
            }
            Self::Sequence { id, next_in, next_out } => {
                out.push(2);
                [id.0.into(), *next_in, *next_out].into_iter().for_each(|n| unsigned(out, n));
            }
            Self::Reset { id } => {
                out.push(3);
                unsigned(out, id.0.into());
            }
            Self::Execution(e) => {
                out.push(4);
                encode_execution(e, out);
            }
            Self::Reported { id, seq, at_ms, exec_id, commission } => {
                out.push(5);
                [id.0.into(), *seq, *at_ms, *exec_id].into_iter().for_each(|n| unsigned(out, n));
                signed(out, commission.0);
            }
            Self::Sent { id, seq, at_ms, msg_type, body } => {
                out.push(6);
                [id.0.into(), *seq, *at_ms].into_iter().for_each(|n| unsigned(out, n));
                out.push(*msg_type);
                unsigned(out, body.len() as u64);
                out.extend_from_slice(body);
            }
            Self::Resting(r) => {
                out.push(7);
                [r.owner.0.into(), r.order_id.0].into_iter().for_each(|n| unsigned(out, n));
                [r.cum_qty.0, r.cum_notional.0, r.order.qty.0, r.order.price.0]
                    .into_iter()
                    .for_each(|n| signed(out, n));
                out.push(kinds(r.order.side, r.order.ord_type, r.order.time_in_force));
                name(out, &r.order.cl_ord_id);
                name(out, &r.order.symbol);
            }
            Self::Account { id, traded, charged } => {
                out.push(8);
                unsigned(out, id.0.into());
                [traded.0, charged.0].into_iter().for_each(|n| signed(out, n));
            }
            Self::Ids { order, exec } => {
                out.push(9);
                [*order, *exec].into_iter().for_each(|n| unsigned(out, n));
            }
            Self::Last { symbol, price } => {
                out.push(10);
                name(out, symbol);
                signed(out, price.0);
            }
        }
    }
}

fn encode_execution(e: &Execution, out: &mut Vec<u8>) {
    [e.exec_id, e.session.0.into(), e.order_id.0, e.at_ms].into_iter().for_each(|n| unsigned(out, n));
    [&e.cl_ord_id, &e.orig_cl_ord_id].into_iter().for_each(|n| name(out, n));
    name(out, &e.symbol);
    let kind = match e.kind {
        ExecKind::New => 0,
        ExecKind::Trade => 1,
        ExecKind::Canceled => 2,
    };
    let maker = u8::from(e.liquidity == Liquidity::Maker);
    out.push(kinds(e.side, e.ord_type, e.time_in_force) | kind << 3 | maker << 5);
    [e.order_qty.0, e.price.0, e.last_qty.0, e.last_price.0, e.cum_qty.0, e.leaves_qty.0, e.avg_price.0]
        .into_iter()
        .for_each(|n| signed(out, n));
}

/// Reads the records of one journal entry.
///
/// # Errors
/// [`DecodeError`] at the first byte that is not understood.
pub fn decode_all(bytes: &[u8], mut each: impl FnMut(Record)) -> Result<(), DecodeError> {
    let mut reader = Reader { bytes, at: 0 };
    while reader.at < bytes.len() {
        each(reader.record()?);
    }
    Ok(())
}

struct Reader<'a> {
    bytes: &'a [u8],
    at: usize,
}

impl Reader<'_> {
    fn record(&mut self) -> Result<Record, DecodeError> {
        Ok(match self.byte()? {
            1 => Record::Session { id: self.session()?, comp: self.name()? },
            2 => Record::Sequence { id: self.session()?, next_in: self.unsigned()?, next_out: self.unsigned()? },
            3 => Record::Reset { id: self.session()? },
            4 => Record::Execution(self.execution()?),
            5 => Record::Reported {
                id: self.session()?,
                seq: self.unsigned()?,
                at_ms: self.unsigned()?,
                exec_id: self.unsigned()?,
                commission: Money(self.signed()?),
            },
            6 => Record::Sent {
                id: self.session()?,
                seq: self.unsigned()?,
                at_ms: self.unsigned()?,
                msg_type: self.byte()?,
                body: self.blob()?.to_vec(),
            },
            7 => Record::Resting(self.resting()?),
            8 => Record::Account { id: self.session()?, traded: Money(self.signed()?), charged: Money(self.signed()?) },
            9 => Record::Ids { order: self.unsigned()?, exec: self.unsigned()? },
            10 => Record::Last { symbol: self.name()?, price: Price(self.signed()?) },
            _ => return Err(DecodeError { at: self.at - 1, expected: "record kind" }),
        })
    }

    fn execution(&mut self) -> Result<Execution, DecodeError> {
        let (exec_id, session, order_id, at_ms) =
            (self.unsigned()?, self.session()?, OrderId(self.unsigned()?), self.unsigned()?);
        let (cl_ord_id, orig_cl_ord_id) = (self.name::<31>()?, self.name::<31>()?);
        let symbol = self.name()?;
        let bits = self.byte()?;
        let (side, ord_type, time_in_force) = unkinds(bits);
        let kind = match bits >> 3 & 3 {
            0 => ExecKind::New,
            1 => ExecKind::Trade,
            2 => ExecKind::Canceled,
            _ => return Err(self.expected("execution kind")),
        };
        Ok(Execution {
            exec_id,
            session,
            order_id,
            cl_ord_id,
            orig_cl_ord_id,
            symbol,
            side,
            ord_type,
            time_in_force,
            kind,
            order_qty: Qty(self.signed()?),
            price: Price(self.signed()?),
            last_qty: Qty(self.signed()?),
            last_price: Price(self.signed()?),
            cum_qty: Qty(self.signed()?),
            leaves_qty: Qty(self.signed()?),
            avg_price: Price(self.signed()?),
            liquidity: if bits & 32 == 0 { Liquidity::Taker } else { Liquidity::Maker },
            at_ms,
        })
    }

    fn resting(&mut self) -> Result<Resting, DecodeError> {
        let (owner, order_id) = (self.session()?, OrderId(self.unsigned()?));
        let (cum_qty, cum_notional) = (Qty(self.signed()?), Money(self.signed()?));
        let (qty, price) = (Qty(self.signed()?), Price(self.signed()?));
        let (side, ord_type, time_in_force) = unkinds(self.byte()?);
        let (cl_ord_id, symbol): (ClOrdId, Symbol) = (self.name()?, self.name()?);
        let order = NewOrder { cl_ord_id, symbol, side, qty, ord_type, price, time_in_force };
        Ok(Resting { owner, order_id, order, cum_qty, cum_notional })
    }

    fn expected(&self, expected: &'static str) -> DecodeError {
        DecodeError { at: self.at, expected }
    }

    fn byte(&mut self) -> Result<u8, DecodeError> {
        let byte = *self.bytes.get(self.at).ok_or(self.expected("a byte"))?;
        self.at += 1;
        Ok(byte)
    }

    fn unsigned(&mut self) -> Result<u64, DecodeError> {
        let mut value = 0u64;
        for shift in (0..64).step_by(7) {
            let byte = self.byte()?;
            value |= u64::from(byte & 0x7f) << shift;
            if byte & 0x80 == 0 {
                return Ok(value);
            }
        }
        Err(self.expected("the end of a number"))
    }

    fn signed(&mut self) -> Result<i64, DecodeError> {
        let coded = self.unsigned()?;
        Ok((coded >> 1).cast_signed() ^ -((coded & 1).cast_signed()))
    }

    fn session(&mut self) -> Result<SessionId, DecodeError> {
        u32::try_from(self.unsigned()?).map(SessionId).map_err(|_| self.expected("a session number"))
    }

    fn blob(&mut self) -> Result<&[u8], DecodeError> {
        let len = usize::try_from(self.unsigned()?).map_err(|_| self.expected("a length"))?;
        let end = self.at.checked_add(len).ok_or(self.expected("a length"))?;
        let blob = self.bytes.get(self.at..end).ok_or(self.expected("as many bytes as announced"))?;
        self.at = end;
        Ok(blob)
    }

    fn name<const N: usize>(&mut self) -> Result<Name<N>, DecodeError> {
        let error = self.expected("a name");
        match self.blob()? {
            [] => Ok(Name::EMPTY),
            text => Name::new(text).ok_or(error),
        }
    }
}

fn kinds(side: Side, ord_type: OrdType, time_in_force: TimeInForce) -> u8 {
    u8::from(side == Side::Sell)
        | u8::from(ord_type == OrdType::Market) << 1
        | u8::from(time_in_force == TimeInForce::ImmediateOrCancel) << 2
}

fn unkinds(bits: u8) -> (Side, OrdType, TimeInForce) {
    (
        if bits & 1 == 0 { Side::Buy } else { Side::Sell },
        if bits & 2 == 0 { OrdType::Limit } else { OrdType::Market },
        if bits & 4 == 0 { TimeInForce::Day } else { TimeInForce::ImmediateOrCancel },
    )
}

fn unsigned(out: &mut Vec<u8>, mut value: u64) {
    while value >= 0x80 {
        out.push(value as u8 | 0x80);
        value >>= 7;
    }
    out.push(value as u8);
}

fn signed(out: &mut Vec<u8>, value: i64) {
    unsigned(out, (value << 1 ^ value >> 63).cast_unsigned());
}

fn name<const N: usize>(out: &mut Vec<u8>, name: &Name<N>) {
    unsigned(out, name.as_bytes().len() as u64);
    out.extend_from_slice(name.as_bytes());
}

#[cfg(test)]
#[path = "record_tests.rs"]
mod tests;
