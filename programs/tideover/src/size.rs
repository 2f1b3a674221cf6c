//! Sizes as people write them.

/// Bytes of a text as `64MiB`, `1GiB`, `4096`.
pub(crate) fn parse(text: &str) -> Result<u64, String> {
    let text = text.trim();
    let digits = text.find(|letter: char| !letter.is_ascii_digit()).unwrap_or(text.len());
    let (number, unit) = text.split_at(digits);
    if number.is_empty() || unit.starts_with('.') {
        return Err("a size is a whole number and a unit, as 1536MiB".to_owned());
    }
    let shift = match unit.trim() {
        "" | "B" => 0,
        "K" | "KiB" => 10,
        "M" | "MiB" => 20,
        "G" | "GiB" => 30,
        "T" | "TiB" => 40,
        other => return Err(format!("unknown unit `{other}`: use KiB, MiB, GiB or TiB")),
    };
    let number: u64 = number.parse().map_err(|_| "larger than any memory".to_owned())?;
    number.checked_mul(1 << shift).ok_or_else(|| "larger than any memory".to_owned())
}

/// Guest memory: 4 MiB to 64 GiB, in whole 2 MiB.
pub(crate) fn guest_memory(text: &str) -> Result<u64, String> {
    let bytes = parse(text)?;
    let whole = bytes.is_multiple_of(2 << 20);
    if whole && (4 << 20..=64 << 30).contains(&bytes) {
        return Ok(bytes);
    }
    Err("the guest takes 4MiB to 64GiB of memory, in whole 2 MiB".to_owned())
}

/// A size for people: in the largest unit that it is a whole number of.
pub(crate) fn show(bytes: u64) -> String {
    let units = [(40, "TiB"), (30, "GiB"), (20, "MiB"), (10, "KiB")];
    let fits = units.into_iter().find(|(shift, _)| bytes > 0 && bytes.is_multiple_of(1 << shift));
    match fits {
        Some((shift, unit)) => format!("{} {unit}", bytes >> shift),
        None => format!("{bytes} bytes"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_read_and_shown() {
        assert_eq!(parse("64MiB"), Ok(64 << 20));
        assert_eq!(parse("1G"), Ok(1 << 30));
        assert_eq!(parse("4096"), Ok(4096));
        assert!(parse("").is_err() && parse("GiB").is_err() && parse("5GB").is_err());
        assert_eq!(parse(" 64 MiB"), Ok(64 << 20));
        assert!(parse("1.5GiB").unwrap_err().contains("whole number"));
        assert!(parse("99999999999TiB").is_err() && parse("99999999999999999999").is_err());
        assert_eq!(guest_memory("64GiB"), Ok(64 << 30));
        assert!(["2MiB", "5MiB", "65GiB"].into_iter().all(|text| guest_memory(text).is_err()));
        assert_eq!([show(1 << 30), show(1536 << 20), show(5)], ["1 GiB", "1536 MiB", "5 bytes"]);
    }
}
