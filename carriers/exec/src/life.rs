//! The program that this process executes after another.

use std::io;
use std::os::fd::OwnedFd;
use std::os::fd::RawFd;

use fdpass::AdoptError;
use fdpass::Channel;
use socket::Program;
use socket::ProgramError;
use thiserror::Error;

use crate::handoff::Handoff;
use crate::reap::reap;

/// Why this program does not run the machine. The guest runs where it ran before.
#[derive(Debug, Error)]
pub enum LifeError {
    /// A descriptor that the hand-off names was not inherited.
    #[error("descriptor {number}, which the hand-off names, did not come")]
    Descriptor {
        /// Its number.
        number: RawFd,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// A descriptor is no channel.
    #[error("descriptor {number} is no channel")]
    Channel {
        /// Its number.
        number: RawFd,
        /// What it is instead.
        #[source]
        source: AdoptError,
    },
    /// The program before cannot be executed again.
    #[error("the program before cannot be executed again, after this one failed: {reason}")]
    Back {
        /// Why this program failed.
        reason: String,
        /// Why that one cannot be executed.
        #[source]
        source: ProgramError,
    },
    /// The channel cannot go back.
    #[error("cannot go back to the program before, after this one failed: {reason}")]
    BackChannel {
        /// Why this program failed.
        reason: String,
        /// Why.
        #[source]
        source: io::Error,
    },
}

/// The way back to the program before, as long as this one has not run the machine.
#[derive(Debug)]
pub struct WayBack {
    /// A copy, to say why.
    channel: Option<Channel>,
    back: OwnedFd,
    program: Program,
}

impl WayBack {
    /// Has this process execute the program before again, with `arguments` and a hand-off, which takes the machine over in
    /// this one's place. Returns only if that fails. The guest runs in any case.
    pub fn take(self, reason: &str, arguments: &[String]) -> LifeError {
        if let Some(channel) = &self.channel {
            socket::refuse(channel, reason);
        }
        let reason = reason.to_owned();
        if let Err(source) = aside::inherit(&self.back, true) {
            return LifeError::BackChannel { reason, source };
        }
        let handoff = Handoff::of_channel(&self.back).to_string();
        let source = self.program.execute(arguments.iter().chain([&handoff]));
        LifeError::Back { reason, source }
    }
}

/// What a program finds that was executed.
#[derive(Debug)]
pub struct Life {
    /// To where the guest runs: a [`Successor`](socket::Successor) greets through it.
    pub channel: Channel,
    /// The way back, unless this is the program before, executed again.
    pub way_back: Option<WayBack>,
}

impl Life {
    /// Takes what the program before left. To be called before this program starts another one: children that this process
    /// has now are waited for.
    ///
    /// # Errors
    /// [`LifeError`] if it is not there.
    pub fn begin(handoff: &Handoff) -> Result<Self, LifeError> {
        reap();
        let channel = channel(handoff.channel)?;
        let way_back = handoff.back.map(|back| {
            let program = Program::opened(take(back.program)?);
            Ok(WayBack { channel: channel.try_clone().ok(), back: take(back.channel)?, program })
        });
        Ok(Self { way_back: way_back.transpose()?, channel })
    }
}

fn take(number: RawFd) -> Result<OwnedFd, LifeError> {
    aside::inherited(number).map_err(|source| LifeError::Descriptor { number, source })
}

fn channel(number: RawFd) -> Result<Channel, LifeError> {
    Channel::from_fd(take(number)?).map_err(|source| LifeError::Channel { number, source })
}
