//! One end of a connected socket, and what goes over it.
//!
//! A message has at least one byte: on a socket of this type the receiver could not tell an empty
//! one from the end of the connection. So an empty message is refused on sending, and from a peer
//! that does not keep to this, taken as the end.

use std::io::{IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::cmsg_space;
use rustix::event::PollFlags;
use rustix::io::{Errno, fcntl_dupfd_cloexec};
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, RecvMsg, ReturnFlags,
    SendAncillaryBuffer, SendAncillaryMessage, SendFlags, SocketFlags, SocketType, getpeername, recvmsg,
    sendmsg, socketpair, sockopt,
};
use rustix::stdio::{dup2_stdin, stdin};

use crate::deadline::{Deadline, wait};

/// The longest message, in bytes. Far below the kernel's default socket buffer (208 KiB), so that a
/// send to a peer that reads does not depend on its settings.
pub const MAX_MESSAGE_BYTES: usize = 64 << 10;

/// The most file descriptors that go with one message. The kernel's own limit is 253.
pub const MAX_MESSAGE_FDS: usize = 64;

/// The lowest number that a descriptor may get so as not to stand for a standard stream.
const FIRST_FREE_FD: i32 = 3;

/// A message that arrived.
#[derive(Debug)]
pub struct Message {
    /// What the peer says: at least one byte.
    pub bytes: Vec<u8>,
    /// The descriptors sent with it, in the order of the sender, all close-on-exec.
    pub fds: Vec<OwnedFd>,
}

/// Why [`Channel::pair`] failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("cannot make a pair of sockets")]
pub struct PairError {
    /// What the kernel answered.
    #[source]
    pub cause: Errno,
}

/// Why a descriptor was not taken as a channel.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum AdoptError {
    /// It is open on something else, or not open.
    #[error("the file descriptor is not a socket")]
    NotASocket,
    /// It is a socket of another family.
    #[error("the socket is of address family {family} and not a Unix socket")]
    NotUnix {
        /// The number of the family (`AF_*`).
        family: u16,
    },
    /// It is a Unix socket that does not keep messages apart, or loses them.
    #[error("the Unix socket is of type {kind} and not SOCK_SEQPACKET")]
    NotSeqpacket {
        /// The number of the type (`SOCK_*`).
        kind: u32,
    },
    /// It listens, or was never joined to another.
    #[error("the socket has no other end")]
    NotConnected,
    /// The kernel would not say what it is.
    #[error("cannot ask what the socket is")]
    Ask {
        /// What the kernel answered.
        #[source]
        cause: Errno,
    },
}

/// Why [`Channel::from_stdin`] failed. Standard input is as it was.
#[derive(Debug, thiserror::Error)]
pub enum StdinError {
    /// Standard input is something else: the program was not started by its predecessor.
    #[error("standard input is not a channel")]
    NotAChannel {
        /// What it is.
        #[source]
        cause: AdoptError,
    },
    /// A system call failed.
    #[error("cannot {action} standard input")]
    Move {
        /// What was tried: `duplicate` or `replace`.
        action: &'static str,
        /// What the kernel answered.
        #[source]
        cause: Errno,
    },
}

/// Why [`Channel::send`] sent nothing.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SendError {
    /// The other end would take it for the end of the connection.
    #[error("a message needs at least one byte")]
    Empty,
    /// More than [`MAX_MESSAGE_BYTES`].
    #[error("a message of {len} bytes is longer than {MAX_MESSAGE_BYTES}")]
    TooLong {
        /// Its length in bytes.
        len: usize,
    },
    /// More than [`MAX_MESSAGE_FDS`].
    #[error("{count} file descriptors are more than a message takes, {MAX_MESSAGE_FDS}")]
    TooManyFds {
        /// How many were to be sent.
        count: usize,
    },
    /// Nobody holds the other end any more.
    #[error("the peer has closed the channel")]
    Closed,
    /// The peer did not read, and the socket's buffer is full.
    #[error("the peer did not take the message in time")]
    TimedOut,
    /// The kernel refused, for example because too many descriptors of this user are under way.
    #[error("cannot send on the channel")]
    Send {
        /// What the kernel answered.
        #[source]
        cause: Errno,
    },
}

/// Why [`Channel::receive`] gave no message. Descriptors that came with a refused message are
/// closed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ReceiveError {
    /// The caller asked for more than [`MAX_MESSAGE_BYTES`] or [`MAX_MESSAGE_FDS`].
    #[error(
        "{max_bytes} bytes and {max_fds} file descriptors are more than a message has: \
         {MAX_MESSAGE_BYTES} and {MAX_MESSAGE_FDS}"
    )]
    Limits {
        /// The bytes asked for.
        max_bytes: usize,
        /// The descriptors asked for.
        max_fds: usize,
    },
    /// The message is longer than the caller wanted. It is lost.
    #[error("the peer sent a message of {len} bytes where at most {max_bytes} were expected")]
    TooLong {
        /// Its true length in bytes.
        len: usize,
        /// What the caller wanted.
        max_bytes: usize,
    },
    /// More descriptors came than the caller wanted. The message is lost.
    #[error("the peer sent at least {count} file descriptors where at most {max_fds} were expected")]
    TooManyFds {
        /// How many were seen; there may have been more.
        count: usize,
        /// What the caller wanted.
        max_fds: usize,
    },
    /// This process could not take all descriptors, most likely because it may have no more open.
    /// The message is lost.
    #[error("only {count} of the file descriptors sent could be taken: is RLIMIT_NOFILE reached?")]
    FdsLost {
        /// How many could be taken.
        count: usize,
    },
    /// Nobody holds the other end any more, and all it sent was read.
    #[error("the peer has closed the channel")]
    Closed,
    /// Nothing came.
    #[error("no message came in time")]
    TimedOut,
    /// The kernel refused.
    #[error("cannot receive on the channel")]
    Receive {
        /// What the kernel answered.
        #[source]
        cause: Errno,
    },
}

/// One end of a connected `SOCK_SEQPACKET` socket. Close-on-exec.
///
/// Both ends may be used by several threads at once; each message goes to one of them. The
/// `O_NONBLOCK` flag, which a holder of a copy could change, does not matter.
#[derive(Debug)]
pub struct Channel {
    /// Known to be a connected Unix socket of type `SOCK_SEQPACKET`.
    socket: OwnedFd,
}

impl Channel {
    /// Two channels that are each other's peer.
    ///
    /// # Errors
    ///
    /// [`PairError`] when the kernel has no room for two more descriptors.
    pub fn pair() -> Result<(Self, Self), PairError> {
        let (one, other) = socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)
            .map_err(|cause| PairError { cause })?;
        Ok((Self { socket: one }, Self { socket: other }))
    }

    /// Takes a descriptor that is said to be a channel, after asking the kernel.
    ///
    /// # Errors
    ///
    /// [`AdoptError`] says what it is instead. The descriptor is then closed.
    pub fn from_fd(fd: OwnedFd) -> Result<Self, AdoptError> {
        check_is_channel(fd.as_fd())?;
        Ok(Self { socket: fd })
    }

    /// Another descriptor of the same end: the peer sees it closed when both are.
    ///
    /// # Errors
    ///
    /// When the kernel has no room for one more descriptor.
    pub fn try_clone(&self) -> std::io::Result<Self> {
        Ok(Self { socket: self.socket.try_clone()? })
    }

    /// Only for a socket that this crate has made and connected itself.
    pub(crate) fn from_connected(socket: OwnedFd) -> Self {
        Self { socket }
    }

    /// Takes over the channel that this program was started with as its standard input.
    ///
    /// The channel moves to a descriptor of its own, close-on-exec; standard input becomes
    /// `/dev/null`, so that no other part of the program and no child of it reads from the channel.
    ///
    /// # Errors
    ///
    /// [`StdinError`] if standard input is something else, or cannot be moved; it then stays as it
    /// was.
    pub fn from_stdin() -> Result<Self, StdinError> {
        check_is_channel(stdin()).map_err(|cause| StdinError::NotAChannel { cause })?;
        let socket = fcntl_dupfd_cloexec(stdin(), FIRST_FREE_FD)
            .map_err(|cause| StdinError::Move { action: "duplicate", cause })?;
        rustix::fs::open(
            "/dev/null",
            rustix::fs::OFlags::RDONLY | rustix::fs::OFlags::CLOEXEC,
            rustix::fs::Mode::empty(),
        )
        .and_then(dup2_stdin)
        .map_err(|cause| StdinError::Move { action: "replace", cause })?;
        Ok(Self { socket })
    }

    /// Gives the channel away, to be a child's standard input; see [`Channel::from_stdin`].
    #[must_use]
    pub fn into_stdio(self) -> OwnedFd {
        self.socket
    }

    /// Ends the connection for both sides, whoever else has a descriptor of this end. What was sent can still be received.
    pub fn shut_down(&self) {
        // One that is ended already stays so.
        let _ = rustix::net::shutdown(&self.socket, rustix::net::Shutdown::Both);
    }

    /// Sends one message whole, with copies of `fds`, or nothing.
    ///
    /// That it was sent does not mean that it was read.
    ///
    /// # Errors
    ///
    /// [`SendError`]; nothing of the message is then on its way.
    pub fn send(&self, bytes: &[u8], fds: &[BorrowedFd<'_>], deadline: Deadline) -> Result<(), SendError> {
        if bytes.is_empty() {
            return Err(SendError::Empty);
        }
        if bytes.len() > MAX_MESSAGE_BYTES {
            return Err(SendError::TooLong { len: bytes.len() });
        }
        if fds.len() > MAX_MESSAGE_FDS {
            return Err(SendError::TooManyFds { count: fds.len() });
        }
        loop {
            match self.try_send(bytes, fds) {
                Ok(()) => return Ok(()),
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => {
                    if !wait(self.as_fd(), PollFlags::OUT, deadline)
                        .map_err(|cause| SendError::Send { cause })?
                    {
                        return Err(SendError::TimedOut);
                    }
                }
                Err(Errno::PIPE | Errno::CONNRESET | Errno::CONNREFUSED) => {
                    return Err(SendError::Closed);
                }
                Err(cause) => return Err(SendError::Send { cause }),
            }
        }
    }

    fn try_send(&self, bytes: &[u8], fds: &[BorrowedFd<'_>]) -> Result<(), Errno> {
        let mut space = [MaybeUninit::uninit(); cmsg_space!(ScmRights(MAX_MESSAGE_FDS))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        // A control message with no descriptors in it is not the same as none.
        if !fds.is_empty() && !control.push(SendAncillaryMessage::ScmRights(fds)) {
            return Err(Errno::NOBUFS);
        }
        sendmsg(&self.socket, &[IoSlice::new(bytes)], &mut control, SendFlags::NOSIGNAL | SendFlags::DONTWAIT)
            .map(|_whole| ())
    }

    /// Waits for one message of at most `max_bytes` bytes with at most `max_fds` descriptors.
    ///
    /// # Errors
    ///
    /// [`ReceiveError`]. A message that is over the limits is lost, and the channel goes on.
    pub fn receive(
        &self,
        max_bytes: usize,
        max_fds: usize,
        deadline: Deadline,
    ) -> Result<Message, ReceiveError> {
        if max_bytes > MAX_MESSAGE_BYTES || max_fds > MAX_MESSAGE_FDS {
            return Err(ReceiveError::Limits { max_bytes, max_fds });
        }
        // Never of no bytes: an empty buffer would make every message look like the end.
        let mut bytes = vec![0; max_bytes.max(1)];
        loop {
            match self.try_receive(&mut bytes, max_fds) {
                Ok((received, fds)) => return judge(received, bytes, fds, max_bytes, max_fds),
                // The peer closed before it had read all that we sent. The kernel says so once, and
                // before it gives out what the peer had sent to us: go on and read that.
                Err(Errno::INTR | Errno::CONNRESET) => {}
                Err(Errno::AGAIN) => {
                    if !wait(self.as_fd(), PollFlags::IN, deadline)
                        .map_err(|cause| ReceiveError::Receive { cause })?
                    {
                        return Err(ReceiveError::TimedOut);
                    }
                }
                Err(cause) => return Err(ReceiveError::Receive { cause }),
            }
        }
    }

    /// Whether a message waits to be received.
    #[must_use]
    pub fn has_message(&self) -> bool {
        let mut byte = [0; 1];
        let flags = RecvFlags::PEEK | RecvFlags::DONTWAIT;
        loop {
            match rustix::net::recv(&self.socket, &mut byte, flags) {
                Err(Errno::INTR) => {}
                // No message is empty: nothing is the end.
                result => return result.is_ok_and(|(received, _)| received > 0),
            }
        }
    }

    fn try_receive(&self, bytes: &mut [u8], max_fds: usize) -> Result<(RecvMsg, Vec<OwnedFd>), Errno> {
        let mut space = [MaybeUninit::uninit(); cmsg_space!(ScmRights(MAX_MESSAGE_FDS))];
        // Alignment leaves room for a few descriptors more than asked for; they are counted.
        let room = space.len().min(cmsg_space!(ScmRights(max_fds)));
        let mut control = RecvAncillaryBuffer::new(&mut space[..room]);
        let received = recvmsg(
            &self.socket,
            &mut [IoSliceMut::new(bytes)],
            &mut control,
            // TRUNC: the answer is the true length, also of a message that was cut.
            RecvFlags::CMSG_CLOEXEC | RecvFlags::DONTWAIT | RecvFlags::TRUNC,
        )?;
        let mut fds = Vec::new();
        for message in control.drain() {
            if let RecvAncillaryMessage::ScmRights(rights) = message {
                fds.extend(rights);
            }
        }
        Ok((received, fds))
    }
}

impl AsFd for Channel {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

/// Makes a message of what came, or says what is wrong with it. Returning drops, and so closes, the
/// descriptors of a message that is refused.
fn judge(
    received: RecvMsg,
    mut bytes: Vec<u8>,
    fds: Vec<OwnedFd>,
    max_bytes: usize,
    max_fds: usize,
) -> Result<Message, ReceiveError> {
    let len = received.bytes;
    if len > max_bytes || received.flags.contains(ReturnFlags::TRUNC) {
        return Err(ReceiveError::TooLong { len, max_bytes });
    }
    let cut = received.flags.contains(ReturnFlags::CTRUNC);
    if fds.len() > max_fds || (cut && fds.len() == max_fds) {
        return Err(ReceiveError::TooManyFds { count: fds.len().saturating_add(usize::from(cut)), max_fds });
    }
    if cut {
        return Err(ReceiveError::FdsLost { count: fds.len() });
    }
    if len == 0 {
        return Err(ReceiveError::Closed);
    }
    bytes.truncate(len);
    Ok(Message { bytes, fds })
}

fn check_is_channel(fd: BorrowedFd<'_>) -> Result<(), AdoptError> {
    let ask = |cause| match cause {
        Errno::NOTSOCK | Errno::BADF => AdoptError::NotASocket,
        Errno::NOTCONN => AdoptError::NotConnected,
        cause => AdoptError::Ask { cause },
    };
    let family = sockopt::socket_domain(fd).map_err(ask)?;
    if family != AddressFamily::UNIX {
        return Err(AdoptError::NotUnix { family: family.as_raw() });
    }
    let kind = sockopt::socket_type(fd).map_err(ask)?;
    if kind != SocketType::SEQPACKET {
        return Err(AdoptError::NotSeqpacket { kind: kind.as_raw() });
    }
    getpeername(fd).map_err(ask)?;
    Ok(())
}
