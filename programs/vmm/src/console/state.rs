//! `tideover-console-v1`: what a console has of the guest's output, who has seen how much of it, and input on its way.
//!
//! All numbers are little-endian.
//!
//! | bytes | what |
//! | --- | --- |
//! | 4 | `CONS` |
//! | 4 | version, 1 |
//! | 8 | place of the output's first byte |
//! | 4, 4, 4 | bytes of output, bytes of input, consoles |
//! | 20 each | a console: number (4), place of the next byte for it (8), bytes that it has missed (8) |
//! | | the output, then the input |

use crate::guest::GuestError;

use super::stream::Stream;

/// The format.
pub(crate) const FORMAT: &str = "tideover-console-v1";
const MAGIC: [u8; 4] = *b"CONS";
const VERSION: u32 = 1;

/// How much one console has seen.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Seen {
    pub(crate) number: u32,
    pub(crate) next: u64,
    pub(crate) missed: u64,
}

#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct ConsoleState {
    pub(crate) output: Stream,
    pub(crate) input: Vec<u8>,
    pub(crate) seen: Vec<Seen>,
}

impl ConsoleState {
    pub(crate) fn encode(&self) -> Vec<u8> {
        let output = self.output.read(self.output.start(), usize::MAX);
        // All three are bounded far below this by who makes them.
        let count = |len: usize| u32::try_from(len).unwrap_or(u32::MAX).to_le_bytes();
        let mut bytes = Vec::new();
        bytes.extend(MAGIC);
        bytes.extend(VERSION.to_le_bytes());
        bytes.extend(self.output.start().to_le_bytes());
        bytes.extend([count(output.len()), count(self.input.len()), count(self.seen.len())].concat());
        for seen in &self.seen {
            bytes.extend(seen.number.to_le_bytes());
            bytes.extend(seen.next.to_le_bytes());
            bytes.extend(seen.missed.to_le_bytes());
        }
        bytes.extend(output);
        bytes.extend(&self.input);
        bytes
    }

    pub(crate) fn decode(bytes: &[u8]) -> Result<Self, GuestError> {
        let mut rest = Rest(bytes);
        if rest.take::<4>("magic")? != MAGIC {
            return Err(broken("magic"));
        }
        if rest.number("version")? != VERSION {
            return Err(broken("version"));
        }
        let start = rest.place("start")?;
        let [output, input, consoles] =
            [rest.len("output_bytes")?, rest.len("input_bytes")?, rest.len("consoles")?];
        let mut seen: Vec<Seen> = Vec::new();
        for _ in 0..consoles {
            let one = Seen {
                number: rest.number("number")?,
                next: rest.place("next")?,
                missed: rest.place("missed")?,
            };
            if seen.iter().any(|other| other.number == one.number) {
                return Err(broken("number"));
            }
            seen.push(one);
        }
        let output = Stream::new(start, rest.bytes(output, "output")?).ok_or(broken("start"))?;
        let input = rest.bytes(input, "input")?;
        if !rest.0.is_empty() {
            return Err(broken("input"));
        }
        if seen.iter().any(|seen| !(start..=output.end()).contains(&seen.next)) {
            return Err(broken("next"));
        }
        Ok(Self { output, input, seen })
    }
}

fn broken(field: &'static str) -> GuestError {
    GuestError::State { what: "the console", field }
}

/// What is left to be read.
struct Rest<'a>(&'a [u8]);

impl Rest<'_> {
    fn take<const N: usize>(&mut self, field: &'static str) -> Result<[u8; N], GuestError> {
        let (first, rest) = self.0.split_first_chunk().ok_or(broken(field))?;
        self.0 = rest;
        Ok(*first)
    }

    fn number(&mut self, field: &'static str) -> Result<u32, GuestError> {
        self.take(field).map(u32::from_le_bytes)
    }

    fn place(&mut self, field: &'static str) -> Result<u64, GuestError> {
        self.take(field).map(u64::from_le_bytes)
    }

    fn len(&mut self, field: &'static str) -> Result<usize, GuestError> {
        usize::try_from(self.number(field)?).map_err(|_| broken(field))
    }

    fn bytes(&mut self, len: usize, field: &'static str) -> Result<Vec<u8>, GuestError> {
        let (bytes, rest) = self.0.split_at_checked(len).ok_or(broken(field))?;
        self.0 = rest;
        Ok(bytes.to_vec())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn state() -> ConsoleState {
        let seen = vec![Seen { number: 0, next: 12, missed: 0 }, Seen { number: 7, next: 15, missed: 9 }];
        let output = Stream::new(10, b"hello".to_vec()).unwrap();
        ConsoleState { output, input: b"ls\r".to_vec(), seen }
    }

    #[test]
    fn a_state_is_read_as_it_was_written() {
        assert_eq!(ConsoleState::decode(&state().encode()).unwrap(), state());
        let empty = ConsoleState::default();
        assert_eq!(ConsoleState::decode(&empty.encode()).unwrap(), empty);
    }

    #[test]
    fn a_state_of_version_1_is_these_bytes() {
        let mut expected = b"CONS\x01\0\0\0\x0a\0\0\0\0\0\0\0\x05\0\0\0\x03\0\0\0\x02\0\0\0".to_vec();
        expected.extend(b"\0\0\0\0\x0c\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0");
        expected.extend(b"\x07\0\0\0\x0f\0\0\0\0\0\0\0\x09\0\0\0\0\0\0\0hellols\r");
        assert_eq!(state().encode(), expected);
    }

    #[test]
    fn what_is_no_state_is_refused_by_the_field() {
        let field = |change: fn(&mut Vec<u8>)| {
            let mut bytes = state().encode();
            change(&mut bytes);
            match ConsoleState::decode(&bytes) {
                Err(GuestError::State { field, .. }) => field,
                other => panic!("{other:?}"),
            }
        };
        assert_eq!(field(|bytes| bytes[0] = 0), "magic");
        assert_eq!(field(|bytes| bytes[4] = 2), "version");
        assert_eq!(field(|bytes| bytes[8..16].fill(0xff)), "start");
        assert_eq!(field(|bytes| bytes[16] = 200), "output");
        assert_eq!(field(|bytes| bytes[24] = 3), "next");
        assert_eq!(field(|bytes| bytes[32] = 9), "next");
        assert_eq!(field(|bytes| bytes[32] = 16), "next");
        assert_eq!(field(|bytes| bytes[48] = 0), "number");
        assert_eq!(field(|bytes| bytes.push(0)), "input");
        let whole = state().encode();
        for len in 0..whole.len() {
            assert!(ConsoleState::decode(&whole[..len]).is_err(), "{len}");
        }
    }
}
