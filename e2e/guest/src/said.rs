//! The guest's lines.

use std::fmt;

const BEGINS: &str = "guest:";

/// What the guest says in one line, as `guest: count=123 passes=4 errors=0 disk=17 gap_us=5000 lately_us=3000
/// up_ms=9000 ahead_us=1700000000000000`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Said {
    /// Pieces of its memory that it has checked and written anew.
    pub count: u64,
    /// How often it has been through all of that memory.
    pub passes: u64,
    /// Words of its memory and records of its disk that were not what it had written, and times that its clock went back.
    pub errors: u64,
    /// Records that it has written to its disk and read back: all below this number.
    pub disk: u64,
    /// The longest time between two looks at its clock (`CLOCK_MONOTONIC`), in microseconds. It looks every few milliseconds.
    pub gap_us: u64,
    /// The same since the line before.
    pub lately_us: u64,
    /// That clock, in milliseconds.
    pub up_ms: u64,
    /// By how much the time of day (`CLOCK_REALTIME`) is ahead of it, in microseconds.
    pub ahead_us: u64,
}

impl Said {
    fn fields(&mut self) -> [(&'static str, &mut u64); 8] {
        [
            ("count", &mut self.count),
            ("passes", &mut self.passes),
            ("errors", &mut self.errors),
            ("disk", &mut self.disk),
            ("gap_us", &mut self.gap_us),
            ("lately_us", &mut self.lately_us),
            ("up_ms", &mut self.up_ms),
            ("ahead_us", &mut self.ahead_us),
        ]
    }

    /// What a line says; `None` if it is not one of these, or not a whole one.
    #[must_use]
    pub fn parse(line: &str) -> Option<Self> {
        let mut said = Self::default();
        let mut words = line.trim_end().strip_prefix(BEGINS)?.split_whitespace();
        for (name, value) in said.fields() {
            let (named, text) = words.next()?.split_once('=')?;
            *value = text.parse().ok().filter(|_| named == name)?;
        }
        words.next().is_none().then_some(said)
    }
}

impl fmt::Display for Said {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut said = *self;
        f.write_str(BEGINS)?;
        said.fields().iter().try_for_each(|(name, value)| write!(f, " {name}={value}"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_said_is_heard() {
        let said =
            Said { count: 1, passes: 2, errors: 3, disk: 4, gap_us: 5, lately_us: 6, up_ms: 7, ahead_us: 8 };
        let line = said.to_string();
        assert_eq!(line, "guest: count=1 passes=2 errors=3 disk=4 gap_us=5 lately_us=6 up_ms=7 ahead_us=8");
        assert_eq!(Said::parse(&(line + "\r")), Some(said));
    }

    #[test]
    fn another_line_and_half_of_one_say_nothing() {
        let whole = Said::default().to_string();
        for line in
            ["", "guest:", "[    0.1] guest: count=1", &whole[..whole.len() - 2], &format!("{whole} x=1")]
        {
            assert_eq!(Said::parse(line), None, "{line}");
        }
    }
}
