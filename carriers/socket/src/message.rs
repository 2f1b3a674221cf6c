//! What the two sides say to each other: JSON, one message a packet, at most 64 KiB.
//!
//! What comes from the other side is an allegation: lengths are checked against the descriptors, names are
//! escaped where they are shown, and what is not the message that is due ends the update.

use std::os::fd::BorrowedFd;
use std::os::fd::OwnedFd;

use fdpass::Channel;
use fdpass::Deadline;
use fdpass::MAX_MESSAGE_BYTES;
use fdpass::MAX_MESSAGE_FDS;
use fdpass::ReceiveError;
use fdpass::SendError;
use serde::Deserialize;
use serde::Serialize;
use thiserror::Error;

/// Version of the messages. Both sides say theirs first, and they have to be equal.
pub const PROTOCOL: u32 = 1;

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "message", rename_all = "snake_case")]
pub(crate) enum Message {
    Hello {
        protocol: u32,
        program: String,
        version: String,
        pid: u32,
        reads: Vec<String>,
    },
    Offer {
        protocol: u32,
        identity: String,
        formats: Vec<String>,
        regions: Vec<u64>,
        descriptors: Vec<String>,
        vmm: serde_json::Value,
    },
    Accept,
    Memory,
    Warm {
        steps: Vec<(String, u64)>,
    },
    Sealed {
        epoch: u32,
    },
    Running {
        steps: Vec<(String, u64)>,
    },
    Settled {
        steps: Vec<(String, u64)>,
        unclaimed: Vec<u64>,
        vmm: serde_json::Value,
    },
    /// Instead of any other: this side gives up.
    Refuse {
        reason: String,
    },
}

impl Message {
    pub(crate) fn name(&self) -> &'static str {
        match self {
            Self::Hello { .. } => "hello",
            Self::Offer { .. } => "offer",
            Self::Accept => "accept",
            Self::Memory => "memory",
            Self::Warm { .. } => "warm",
            Self::Sealed { .. } => "sealed",
            Self::Running { .. } => "running",
            Self::Settled { .. } => "settled",
            Self::Refuse { .. } => "refuse",
        }
    }
}

/// Why the other side was not understood, or not reached.
#[derive(Debug, Error)]
pub enum LinkError {
    /// It is gone.
    #[error("the other side is gone")]
    Closed,
    /// It says nothing.
    #[error("the other side did not send {awaited} in time")]
    TimedOut {
        /// The message that is due.
        awaited: &'static str,
    },
    /// It gives up.
    #[error("the other side gives up: {reason}")]
    Refused {
        /// Why, in its own words, escaped.
        reason: String,
    },
    /// It sent something else.
    #[error("the other side sent {came} where {awaited} is due")]
    Unexpected {
        /// The message that is due.
        awaited: &'static str,
        /// What came.
        came: String,
    },
    /// It speaks another version.
    #[error("the other side speaks version {theirs} of the messages, this one version {PROTOCOL}")]
    Protocol {
        /// Its version.
        theirs: u32,
    },
    /// Nothing could be sent.
    #[error("cannot send {message}")]
    Send {
        /// Which message.
        message: &'static str,
        /// Why.
        #[source]
        source: SendError,
    },
    /// Nothing could be received.
    #[error("cannot receive {awaited}")]
    Receive {
        /// Which message.
        awaited: &'static str,
        /// Why.
        #[source]
        source: ReceiveError,
    },
}

pub(crate) fn send(
    channel: &Channel,
    message: &Message,
    fds: &[BorrowedFd<'_>],
    deadline: Deadline,
) -> Result<(), LinkError> {
    let bytes = serde_json::to_vec(message).unwrap_or_default();
    channel.send(&bytes, fds, deadline).map_err(|source| LinkError::Send { message: message.name(), source })
}

/// Receives the message called `awaited`; another one is an error.
pub(crate) fn receive(
    channel: &Channel,
    awaited: &'static str,
    deadline: Deadline,
) -> Result<(Message, Vec<OwnedFd>), LinkError> {
    let received = match channel.receive(MAX_MESSAGE_BYTES, MAX_MESSAGE_FDS, deadline) {
        Ok(received) => received,
        Err(ReceiveError::Closed) => return Err(LinkError::Closed),
        Err(ReceiveError::TimedOut) => return Err(LinkError::TimedOut { awaited }),
        Err(source) => return Err(LinkError::Receive { awaited, source }),
    };
    match serde_json::from_slice::<Message>(&received.bytes) {
        Ok(Message::Refuse { reason }) => {
            Err(LinkError::Refused { reason: reason.escape_debug().to_string() })
        }
        Ok(message) if message.name() == awaited => Ok((message, received.fds)),
        Ok(message) => Err(LinkError::Unexpected { awaited, came: message.name().to_owned() }),
        Err(error) => Err(LinkError::Unexpected { awaited, came: format!("something unreadable ({error})") }),
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    fn exchange(bytes: &[u8]) -> Result<Message, LinkError> {
        let (one, other) = Channel::pair().unwrap();
        one.send(bytes, &[], Deadline::after(Duration::from_secs(1))).unwrap();
        receive(&other, "accept", Deadline::after(Duration::from_secs(1))).map(|(message, _)| message)
    }

    #[test]
    fn messages_are_these_bytes() {
        let bytes = |message: &Message| String::from_utf8(serde_json::to_vec(message).unwrap()).unwrap();
        assert_eq!(bytes(&Message::Accept), r#"{"message":"accept"}"#);
        assert_eq!(bytes(&Message::Sealed { epoch: 2 }), r#"{"message":"sealed","epoch":2}"#);
        let steps = vec![("running".to_owned(), 5)];
        assert_eq!(bytes(&Message::Running { steps }), r#"{"message":"running","steps":[["running",5]]}"#);
    }

    #[test]
    fn what_is_not_due_is_refused() {
        assert_eq!(exchange(br#"{"message":"accept"}"#).unwrap(), Message::Accept);
        let wrong = exchange(br#"{"message":"memory"}"#).unwrap_err();
        assert_eq!(wrong.to_string(), "the other side sent memory where accept is due");
        assert!(matches!(exchange(b"\xff{"), Err(LinkError::Unexpected { .. })));
        assert!(matches!(exchange(br#"{"message":"launch"}"#), Err(LinkError::Unexpected { .. })));
    }

    #[test]
    fn a_refusal_is_escaped() {
        let refusal =
            exchange("{\"message\":\"refuse\",\"reason\":\"no\\u001b[2J\"}".as_bytes()).unwrap_err();
        assert_eq!(refusal.to_string(), "the other side gives up: no\\u{1b}[2J");
    }

    #[test]
    fn silence_and_absence_are_told_apart() {
        let (one, other) = Channel::pair().unwrap();
        let soon = || Deadline::after(Duration::from_millis(10));
        assert!(matches!(receive(&other, "accept", soon()), Err(LinkError::TimedOut { awaited: "accept" })));
        drop(one);
        assert!(matches!(receive(&other, "accept", soon()), Err(LinkError::Closed)));
    }
}
