//! What the two sides say to each other: JSON, one message a packet, at most 64 KiB.
//!
//! What comes from the other side is an allegation: lengths are checked against the descriptors, words are
//! escaped and cut where they are shown, and what is not the message that is due, with the descriptors that are
//! due, ends the update.

use std::os::fd::BorrowedFd;
use std::os::fd::OwnedFd;
use std::time::Duration;

use fdpass::Channel;
use fdpass::Deadline;
use fdpass::MAX_MESSAGE_BYTES;
use fdpass::ReceiveError;
use fdpass::SendError;
use serde::Deserialize;
use serde::Serialize;
use thiserror::Error;

use crate::Origin;

/// Version of the messages. Both sides say theirs first, and they have to be equal.
pub const PROTOCOL: u32 = 1;

/// The most characters of the other side's words that are shown, or of ours that it is told.
const MAX_SHOWN: usize = 1000;

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
        descriptors: usize,
        vmm: serde_json::Value,
        /// Where the machine's files come from.
        #[serde(default, skip_serializing_if = "Origin::is_handed")]
        origin: Origin,
    },
    Accept,
    Memory,
    Warm {
        steps: Vec<(String, u64)>,
    },
    Sealed {
        epoch: u32,
        /// No process has the machine: the ownership word that the last one left.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        left: Option<u64>,
        /// What the successor's VMM is told that was not known when the machine was offered.
        #[serde(default, skip_serializing_if = "serde_json::Value::is_null")]
        vmm: serde_json::Value,
    },
    Running {
        steps: Vec<(String, u64)>,
    },
    Settled {
        steps: Vec<(String, u64)>,
        unclaimed: Vec<u64>,
        vmm: serde_json::Value,
    },
    /// The predecessor has told whoever asked for the update how it went, and goes.
    Farewell {
        /// What its VMM tells the successor's at last.
        #[serde(default, skip_serializing_if = "serde_json::Value::is_null")]
        vmm: serde_json::Value,
    },
    /// Instead of `sealed`: it was a rehearsal, and a good one.
    Rehearsed,
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
            Self::Farewell { .. } => "farewell",
            Self::Rehearsed => "rehearsed",
            Self::Refuse { .. } => "refuse",
        }
    }
}

/// Why the other side was not understood, or not reached.
#[derive(Debug, Clone, Error)]
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
    /// It wanted to know whether this side gets ready, and no more.
    #[error("it was a rehearsal")]
    Rehearsed,
    /// It has told whoever asked for the update how it went, and goes.
    #[error("the other side is gone, and has told how the update went")]
    Farewell {
        /// What its VMM tells this one at last; null if nothing.
        vmm: serde_json::Value,
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

/// Words of the other side as they may be shown: escaped, and not more of them than somebody reads.
pub(crate) fn shown(words: &str) -> String {
    let mut letters = words.chars();
    let shown: String = letters.by_ref().take(MAX_SHOWN).flat_map(char::escape_debug).collect();
    if letters.next().is_none() { shown } else { shown + "…" }
}

pub(crate) fn send(
    channel: &Channel,
    message: &Message,
    fds: &[BorrowedFd<'_>],
    deadline: Deadline,
) -> Result<(), LinkError> {
    let bytes = serde_json::to_vec(message).unwrap_or_default();
    channel.send(&bytes, fds, deadline).map_err(|source| match source {
        SendError::Closed => parting(channel),
        source => LinkError::Send { message: message.name(), source },
    })
}

/// What the other side said last, before it went.
fn parting(channel: &Channel) -> LinkError {
    match receive(channel, "nothing", Deadline::after(Duration::ZERO)) {
        Err(last @ (LinkError::Refused { .. } | LinkError::Farewell { .. })) => last,
        _ => LinkError::Closed,
    }
}

/// Tells the other side that this one gives up, and why.
pub fn refuse(channel: &Channel, reason: &str) {
    let soon = Deadline::after(Duration::from_millis(100));
    let reason = reason.chars().take(MAX_SHOWN).collect();
    // It may be gone: then it need not be told.
    let _ = send(channel, &Message::Refuse { reason }, &[], soon);
}

/// Receives the message called `awaited`, which comes without descriptors; another one is an error.
pub(crate) fn receive(
    channel: &Channel,
    awaited: &'static str,
    deadline: Deadline,
) -> Result<Message, LinkError> {
    receive_with(channel, awaited, 0, deadline).map(|(message, _)| message)
}

/// Tells the successor that this side has told whoever asked for the update how it went; `vmm` is what its VMM is to know of
/// that, or null.
pub fn farewell(channel: &Channel, vmm: serde_json::Value) {
    // It may be gone, or of a version that does not wait for this.
    let _ = send(channel, &Message::Farewell { vmm }, &[], Deadline::after(Duration::from_millis(100)));
}

/// Receives the message called `awaited`, with at most `max_fds` descriptors; another one is an error.
pub(crate) fn receive_with(
    channel: &Channel,
    awaited: &'static str,
    max_fds: usize,
    deadline: Deadline,
) -> Result<(Message, Vec<OwnedFd>), LinkError> {
    let received = match channel.receive(MAX_MESSAGE_BYTES, max_fds, deadline) {
        Ok(received) => received,
        Err(ReceiveError::Closed) => return Err(LinkError::Closed),
        Err(ReceiveError::TimedOut) => return Err(LinkError::TimedOut { awaited }),
        Err(source) => return Err(LinkError::Receive { awaited, source }),
    };
    match serde_json::from_slice::<Message>(&received.bytes) {
        Ok(Message::Refuse { reason }) => Err(LinkError::Refused { reason: shown(&reason) }),
        Ok(Message::Rehearsed) => Err(LinkError::Rehearsed),
        Ok(Message::Farewell { vmm }) => Err(LinkError::Farewell { vmm }),
        Ok(message) if message.name() == awaited => Ok((message, received.fds)),
        Ok(message) => Err(LinkError::Unexpected { awaited, came: message.name().to_owned() }),
        Err(error) => {
            // What could not be read stands in the text.
            let came = format!("something unreadable ({})", shown(&error.to_string()));
            Err(LinkError::Unexpected { awaited, came })
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;

    use super::*;

    fn exchange(bytes: &[u8]) -> Result<Message, LinkError> {
        let (one, other) = Channel::pair().unwrap();
        one.send(bytes, &[], Deadline::after(Duration::from_secs(1))).unwrap();
        receive(&other, "accept", Deadline::after(Duration::from_secs(1)))
    }

    #[test]
    fn messages_are_these_bytes() {
        let bytes = |message: &Message| String::from_utf8(serde_json::to_vec(message).unwrap()).unwrap();
        assert_eq!(bytes(&Message::Accept), r#"{"message":"accept"}"#);
        let sealed = Message::Sealed { epoch: 2, left: None, vmm: serde_json::Value::Null };
        assert_eq!(bytes(&sealed), r#"{"message":"sealed","epoch":2}"#);
        let farewell = Message::Farewell { vmm: serde_json::Value::Null };
        assert_eq!(bytes(&farewell), r#"{"message":"farewell"}"#);
        let steps = vec![("running".to_owned(), 5)];
        assert_eq!(bytes(&Message::Running { steps }), r#"{"message":"running","steps":[["running",5]]}"#);
    }

    /// L2.4.1, L2.4.4.
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
    fn who_gives_up_and_goes_is_heard_all_the_same() {
        let send = |channel: &Channel| send(channel, &Message::Accept, &[], Deadline::after(Duration::ZERO));
        let (one, other) = Channel::pair().unwrap();
        refuse(&other, "no room");
        drop(other);
        assert!(matches!(send(&one), Err(LinkError::Refused { reason }) if reason == "no room"));
        assert!(matches!(send(&one), Err(LinkError::Closed)));
    }

    #[test]
    fn unreadable_words_are_escaped_and_cut() {
        let unknown = exchange("{\"message\":\"\\u001b[2J\"}".as_bytes()).unwrap_err().to_string();
        assert!(unknown.contains("unknown variant `\\u{1b}[2J`"), "{unknown}");
        let long = format!(r#"{{"message":"{}"}}"#, "x".repeat(60_000));
        let long = exchange(long.as_bytes()).unwrap_err().to_string();
        assert!(long.contains("xxx…") && long.len() < 2 * MAX_SHOWN, "{}", long.len());
        let (one, other) = Channel::pair().unwrap();
        refuse(&one, &"\u{1b}".repeat(60_000));
        let error = receive(&other, "accept", Deadline::after(Duration::from_secs(1))).unwrap_err();
        let LinkError::Refused { reason } = error else { panic!("{error}") };
        assert_eq!(reason, "\\u{1b}".repeat(MAX_SHOWN));
    }

    #[test]
    fn a_descriptor_comes_only_where_it_is_due() {
        let (one, other) = Channel::pair().unwrap();
        let soon = || Deadline::after(Duration::from_secs(1));
        let sent = || send(&one, &Message::Memory, &[one.as_fd(), other.as_fd()], soon()).unwrap();
        sent();
        assert_eq!(receive_with(&other, "memory", 2, soon()).unwrap().1.len(), 2);
        for max_fds in [0, 1] {
            sent();
            let error = receive_with(&other, "memory", max_fds, soon()).unwrap_err();
            let LinkError::Receive { awaited: "memory", source } = error else { panic!("{error}") };
            assert!(matches!(source, ReceiveError::TooManyFds { .. }), "{source}");
        }
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
