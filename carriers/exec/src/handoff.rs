//! What one program leaves for the next: numbers of descriptors, as one word of its arguments.

use std::fmt;
use std::os::fd::AsRawFd as _;
use std::os::fd::OwnedFd;
use std::os::fd::RawFd;
use std::str::FromStr;

use thiserror::Error;

/// Where the program that is executed finds what goes with it: `CHANNEL`, or `CHANNEL,BACK,PROGRAM`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Handoff {
    /// The channel to where the guest runs.
    pub(crate) channel: RawFd,
    /// What it takes to go back. The program before itself, executed again, has none.
    pub(crate) back: Option<Back>,
}

/// How the program before is executed again.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Back {
    /// The channel that it uses then.
    pub(crate) channel: RawFd,
    /// The program.
    pub(crate) program: RawFd,
}

/// This is no hand-off.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[error("{0:?} is no hand-off: it is one number of a descriptor, or three with commas between them")]
pub struct HandoffError(String);

impl Handoff {
    /// For a program from which there is no way back.
    pub(crate) fn of_channel(channel: &OwnedFd) -> Self {
        Self { channel: channel.as_raw_fd(), back: None }
    }
}

impl fmt::Display for Handoff {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.channel)?;
        self.back.map_or(Ok(()), |Back { channel, program }| write!(f, ",{channel},{program}"))
    }
}

impl FromStr for Handoff {
    type Err = HandoffError;

    fn from_str(text: &str) -> Result<Self, HandoffError> {
        let error = || HandoffError(text.to_owned());
        let numbers: Result<Vec<RawFd>, _> = text.split(',').map(str::parse).collect();
        match numbers.map_err(|_| error())?[..] {
            [channel] => Ok(Self { channel, back: None }),
            [channel, back, program] => Ok(Self { channel, back: Some(Back { channel: back, program }) }),
            _ => Err(error()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_hand_off_is_read_as_it_was_written() {
        for text in ["7", "7,8,9"] {
            assert_eq!(text.parse::<Handoff>().map(|handoff| handoff.to_string()), Ok(text.to_owned()));
        }
    }

    #[test]
    fn what_is_no_hand_off_is_refused() {
        for text in ["", "7,", "7,8", "7,8,9,10", "seven", "99999999999"] {
            assert_eq!(text.parse::<Handoff>(), Err(HandoffError(text.to_owned())));
        }
    }
}
