//! UTCTimestamp, in milliseconds since 1970.

/// Length of `YYYYMMDD-HH:MM:SS.sss`.
pub const UTC_LEN: usize = 21;

const MS_PER_DAY: u64 = 86_400_000;

/// `YYYYMMDD-HH:MM:SS.sss`; years past 9999 are shown as 9999.
pub fn format_utc(ms: u64) -> [u8; UTC_LEN] {
    let (year, month, day) = civil_from_days(ms / MS_PER_DAY);
    let in_day = ms % MS_PER_DAY;
    let mut out = *b"00000000-00:00:00.000";
    digits(&mut out[0..4], year.min(9_999));
    digits(&mut out[4..6], month);
    digits(&mut out[6..8], day);
    digits(&mut out[9..11], in_day / 3_600_000);
    digits(&mut out[12..14], in_day / 60_000 % 60);
    digits(&mut out[15..17], in_day / 1_000 % 60);
    digits(&mut out[18..21], in_day % 1_000);
    out
}

/// Reads a UTCTimestamp with or without a fraction of 3, 6 or 9 digits. Second 60 is a leap second.
pub fn parse_utc_ms(text: &[u8]) -> Option<u64> {
    if text.len() < 17 || text[8] != b'-' || text[11] != b':' || text[14] != b':' {
        return None;
    }
    let (year, month, day) = (number(&text[0..4])?, number(&text[4..6])?, number(&text[6..8])?);
    let (hour, minute, second) = (number(&text[9..11])?, number(&text[12..14])?, number(&text[15..17])?);
    let in_range = year >= 1970
        && (1..=12).contains(&month)
        && (1..=31).contains(&day)
        && hour < 24
        && minute < 60
        && second <= 60;
    if !in_range {
        return None;
    }
    let ms = match &text[17..] {
        [] => 0,
        [b'.', fraction @ ..] if matches!(fraction.len(), 3 | 6 | 9) => {
            number(fraction)?;
            number(&fraction[..3])?
        }
        _ => return None,
    };
    Some(days_from_civil(year, month, day) * MS_PER_DAY + ((hour * 60 + minute) * 60 + second) * 1_000 + ms)
}

fn digits(out: &mut [u8], mut value: u64) {
    for slot in out.iter_mut().rev() {
        *slot = b'0' + (value % 10) as u8;
        value /= 10;
    }
}

fn number(text: &[u8]) -> Option<u64> {
    text.iter().try_fold(0u64, |n, b| b.is_ascii_digit().then(|| n * 10 + u64::from(b - b'0')))
}

/// Proleptic Gregorian calendar, counted in eras of 400 years that start in March.
fn civil_from_days(days: u64) -> (u64, u64, u64) {
    let z = days + 719_468;
    let (era, doe) = (z / 146_097, z % 146_097);
    let yoe = (doe - doe / 1_460 + doe / 36_524 - doe / 146_096) / 365;
    let doy = doe - (365 * yoe + yoe / 4 - yoe / 100);
    let mp = (5 * doy + 2) / 153;
    let month = if mp < 10 { mp + 3 } else { mp - 9 };
    (yoe + era * 400 + u64::from(month <= 2), month, doy - (153 * mp + 2) / 5 + 1)
}

fn days_from_civil(year: u64, month: u64, day: u64) -> u64 {
    let y = year - u64::from(month <= 2);
    let (era, yoe) = (y / 400, y % 400);
    let doy = (153 * (if month > 2 { month - 3 } else { month + 9 }) + 2) / 5 + day - 1;
    era * 146_097 + yoe * 365 + yoe / 4 - yoe / 100 + doy - 719_468
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn known_instants() {
        assert_eq!(&format_utc(0), b"19700101-00:00:00.000");
        assert_eq!(&format_utc(951_782_400_000), b"20000229-00:00:00.000");
        assert_eq!(parse_utc_ms(b"20240229-23:59:59.999"), Some(1_709_251_199_999));
        assert_eq!(parse_utc_ms(b"20240229-23:59:59"), Some(1_709_251_199_000));
        assert_eq!(parse_utc_ms(b"20240229-23:59:59.999123"), Some(1_709_251_199_999));
    }

    #[test]
    fn every_day_of_four_centuries_round_trips() {
        for day in 0..146_097 {
            let ms = day * MS_PER_DAY + 43_200_123;
            assert_eq!(parse_utc_ms(&format_utc(ms)), Some(ms));
        }
    }

    #[test]
    fn junk_is_no_time() {
        for text in
            ["", "20240101", "20241301-00:00:00", "20240101-24:00:00", "20240101-00:00:00.1", "20240101 00:00:00"]
        {
            assert_eq!(parse_utc_ms(text.as_bytes()), None, "{text}");
        }
    }
}
