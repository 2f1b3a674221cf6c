//! Messages with file descriptors between two processes of one user.
//!
//! - A [`Channel`] is one end of a connected Unix socket of type `SOCK_SEQPACKET`: each message
//!   arrives whole or not at all, with the file descriptors that were sent with it.
//! - A [`Message`] is what came: bytes, and descriptors that the receiver now owns. The bytes are
//!   an allegation of the peer's; so is the kind of file behind each descriptor.
//! - [`Lines`] are the same over a stream, for who speaks in lines of text.
//! - A [`Listener`] waits at a path, in a directory that nobody else can enter, for [`connect`].
//! - A [`Peer`] is who held the other end when the two were joined, as the kernel says it.
//! - A [`Pidfd`] tells when a process is gone, which a closed channel alone does not: a channel can
//!   be closed by a process that lives, and kept open by a child of one that does not.
//! - [`kind()`] says what a descriptor is of.
//! - [`systemd`] is the service manager, which is told of things and keeps descriptors.
//! - A [`Deadline`] ends every wait.
//!
//! # Starting a program that has a channel
//!
//! A channel is given to a child as its standard input, so that neither side has to agree on the
//! number of a descriptor:
//!
//! ```no_run
//! use std::process::{Command, Stdio};
//! use std::time::Duration;
//! use fdpass::{Channel, Deadline};
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let (ours, theirs) = Channel::pair()?;
//! let child = Command::new("/usr/bin/successor")
//!     .stdin(Stdio::from(theirs.into_stdio()))
//!     .spawn()?;
//! ours.send(b"hello", &[], Deadline::after(Duration::from_secs(1)))?;
//! # Ok(())
//! # }
//! ```
//!
//! and the child begins with [`Channel::from_stdin`].
//!
//! Not here: what the bytes mean.

#![expect(
    unsafe_code,
    reason = "asks who is at the other end with getsockopt, and takes what the service manager passed"
)]

mod channel;
mod clock;
mod credentials;
mod deadline;
mod kind;
mod lines;
mod listener;
mod peer;
pub mod systemd;

pub use channel::{
    AdoptError, Channel, MAX_MESSAGE_BYTES, MAX_MESSAGE_FDS, Message, PairError, ReceiveError, SendError,
    StdinError,
};
pub use clock::monotonic_ns;
pub use deadline::{Deadline, ready};
pub use kind::{Kind, kind};
pub use lines::{Line, LineError, LineListener, Lines, MAX_LINE_BYTES, connect_lines};
pub use listener::{AcceptError, AdoptListenerError, BindError, ConnectError, Listener, connect};
pub use peer::{Peer, PeerError, Pidfd, PidfdError, WaitExitError};
