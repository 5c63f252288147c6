//! Quantities, prices, amounts and rates as integers: no floating point touches money.

use std::fmt;

/// How many units one currency unit has: prices and amounts count ten-thousandths.
const SCALE: i64 = 10_000;

/// A whole number of shares or contracts.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Qty(pub i64);

/// A price in ten-thousandths.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Price(pub i64);

/// An amount of money in ten-thousandths.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Money(pub i64);

/// A fee rate in hundredths of a basis point (one millionth of the amount).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Rate(pub i64);

/// The text is not a number of the kind that was expected.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ParseNumberError;

impl Qty {
    /// Reads a FIX Qty. Shares are whole, so `100` and `100.00` are read, `100.5` is an error.
    ///
    /// # Errors
    /// [`ParseNumberError`] when the text is no whole number of up to 15 digits.
    pub fn parse(text: &[u8]) -> Result<Self, ParseNumberError> {
        let value = parse_scaled(text)?;
        if value % SCALE != 0 {
            return Err(ParseNumberError);
        }
        Ok(Self(value / SCALE))
    }
}

impl Price {
    /// Reads a FIX Price with up to four decimals that count.
    ///
    /// # Errors
    /// [`ParseNumberError`] when the text is no decimal number, has more decimals than four or is too large.
    pub fn parse(text: &[u8]) -> Result<Self, ParseNumberError> {
        parse_scaled(text).map(Self)
    }
}

impl Money {
    /// Reads an amount as this gateway writes it.
    ///
    /// # Errors
    /// As [`Price::parse`].
    pub fn parse(text: &[u8]) -> Result<Self, ParseNumberError> {
        parse_scaled(text).map(Self)
    }

    /// Quantity times price; saturates instead of wrapping.
    pub fn notional(qty: Qty, price: Price) -> Self {
        Self(qty.0.saturating_mul(price.0))
    }
}

fn parse_scaled(text: &[u8]) -> Result<i64, ParseNumberError> {
    let (negative, digits) = match text.strip_prefix(b"-") {
        Some(rest) => (true, rest),
        None => (false, text),
    };
    let (whole, fraction) = match digits.iter().position(|&b| b == b'.') {
        Some(dot) => (&digits[..dot], &digits[dot + 1..]),
        None => (digits, &[][..]),
    };
    if whole.len() + fraction.len() == 0 || whole.len() > 14 {
        return Err(ParseNumberError);
    }
    let mut value: i64 = 0;
    for &b in whole {
        value = value * 10 + digit(b)?;
    }
    let mut unit = SCALE;
    value *= SCALE;
    for &b in fraction {
        let d = digit(b)?;
        unit /= 10;
        if unit == 0 && d != 0 {
            return Err(ParseNumberError);
        }
        value += d * unit;
    }
    Ok(if negative { -value } else { value })
}

fn digit(b: u8) -> Result<i64, ParseNumberError> {
    if b.is_ascii_digit() {
        Ok(i64::from(b - b'0'))
    } else {
        Err(ParseNumberError)
    }
}

fn write_scaled(value: i64, f: &mut fmt::Formatter<'_>) -> fmt::Result {
    let sign = if value < 0 { "-" } else { "" };
    let magnitude = value.unsigned_abs();
    let scale = SCALE.unsigned_abs();
    let (whole, fraction) = (magnitude / scale, magnitude % scale);
    if fraction % 100 == 0 {
        write!(f, "{sign}{whole}.{:02}", fraction / 100)
    } else {
        write!(f, "{sign}{whole}.{fraction:04}")
    }
}

impl fmt::Display for Qty {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl fmt::Display for Price {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write_scaled(self.0, f)
    }
}

impl fmt::Display for Money {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write_scaled(self.0, f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_round_trip() {
        for (text, raw, shown) in [
            ("100", 1_000_000, "100.00"),
            ("12.34", 123_400, "12.34"),
            ("0.0001", 1, "0.0001"),
            ("-7.5", -75_000, "-7.50"),
            (".5", 5_000, "0.50"),
            ("1.23450000", 12_345, "1.2345"),
        ] {
            let price = Price::parse(text.as_bytes()).expect(text);
            assert_eq!(price.0, raw, "{text}");
            assert_eq!(price.to_string(), shown);
        }
    }

    #[test]
    fn junk_is_no_number() {
        for text in ["", "-", ".", "1e5", "1.00001", "+1", "1,0", "123456789012345", "0x1", "1.2.3"] {
            assert!(Price::parse(text.as_bytes()).is_err(), "{text}");
        }
        assert!(Qty::parse(b"10.5").is_err());
        assert_eq!(Qty::parse(b"10.00"), Ok(Qty(10)));
    }
}
