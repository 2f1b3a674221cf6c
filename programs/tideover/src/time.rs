//! Spans of time as people write them.

use std::time::Duration;

/// A span of time: `500ms`, `10s`, `2min`.
pub(crate) fn parse(text: &str) -> Result<Duration, String> {
    let digits = text.find(|letter: char| !letter.is_ascii_digit()).unwrap_or(text.len());
    let (number, unit) = text.split_at(digits);
    let number: u64 = number.parse().map_err(|_| "a time is a number and a unit, as 500ms".to_owned())?;
    let millis = match unit.trim() {
        "ms" => Some(number),
        "s" | "" => number.checked_mul(1000),
        "min" => number.checked_mul(60_000),
        other => return Err(format!("unknown unit `{other}`: use ms, s or min")),
    };
    match millis {
        Some(1..=3_600_000) => Ok(Duration::from_millis(millis.unwrap_or_default())),
        _ => Err("from 1ms to 60min".to_owned()),
    }
}

/// A span of time for people, in its largest unit.
pub(crate) fn show(millis: u64) -> String {
    match millis / 1000 {
        0 => format!("{millis} ms"),
        seconds @ 1..120 => format!("{seconds} s"),
        seconds @ 120..7200 => format!("{} min", seconds / 60),
        seconds @ 7200..172_800 => format!("{} h", seconds / 3600),
        seconds => format!("{} days", seconds / 86400),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_read_and_shown() {
        assert_eq!(parse("500ms"), Ok(Duration::from_millis(500)));
        assert_eq!([parse("10s"), parse("10")], [Ok(Duration::from_secs(10)), Ok(Duration::from_secs(10))]);
        assert!(["0s", "", "5h", "61min", "18446744073709551615min"].iter().all(|text| parse(text).is_err()));
        let shown = [999, 119_999, 3_600_000, 86_400_000, 172_800_000].map(show);
        assert_eq!(shown, ["999 ms", "119 s", "60 min", "24 h", "2 days"]);
    }
}
