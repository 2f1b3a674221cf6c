//! Lines of text with file descriptors, over a Unix socket of type `SOCK_STREAM`: what agents of live update speak.
//!
//! A stream has no messages. Descriptors come with bytes, and the kernel joins bytes that were sent apart, up to and with the first that
//! have descriptors: so these belong to the line with the last byte of what was received at once. That is the line that they were sent
//! with where each line is sent by itself, as it is here. Neither side waits for the other here. What cannot be sent yet is kept, up to a limit; a peer that
//! sends a line without an end, or does not read, is told apart from one that is slow.

use std::collections::VecDeque;
use std::io::{IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;

use rustix::cmsg_space;
use rustix::event::PollFlags;
use rustix::io::Errno;
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, SocketFlags, SocketType, recvmsg, sendmsg, socketpair, sockopt,
};

use crate::channel::{MAX_MESSAGE_BYTES, MAX_MESSAGE_FDS, PairError};
use crate::credentials;
use crate::deadline::{Deadline, wait};
use crate::listener::{AcceptError, AdoptListenerError, BindError, ConnectError, Listener};
use crate::peer::{Peer, PeerError};

/// The longest line, in bytes, its end not counted: as long as a message of a [`Channel`](crate::Channel).
pub const MAX_LINE_BYTES: usize = MAX_MESSAGE_BYTES;
/// What a peer that does not read may leave unsent, in bytes.
const MAX_UNSENT_BYTES: usize = 4 * MAX_LINE_BYTES;
/// Descriptors that may have come without their line's end.
const MAX_PENDING_FDS: usize = MAX_MESSAGE_FDS;

/// Why a connection is over.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum LineError {
    /// The peer is gone.
    #[error("the peer is gone")]
    Closed,
    /// A line is longer than [`MAX_LINE_BYTES`].
    #[error("a line is longer than {MAX_LINE_BYTES} bytes")]
    TooLong,
    /// More descriptors came than a line may have, or the kernel had no room for them.
    #[error("more descriptors came than a line may have")]
    TooManyFds,
    /// The peer does not read what it is sent.
    #[error("the peer does not read")]
    Stalled,
    /// The kernel refuses.
    #[error("cannot {action} a line")]
    Call {
        /// `send` or `receive`.
        action: &'static str,
        /// What the kernel answered.
        #[source]
        cause: Errno,
    },
}

/// A line, and the descriptors that came with it.
#[derive(Debug)]
pub struct Line {
    /// Its bytes, without the end.
    pub bytes: Vec<u8>,
    /// Its descriptors.
    pub fds: Vec<OwnedFd>,
}

/// One end of a connection.
#[derive(Debug)]
pub struct Lines {
    socket: OwnedFd,
    received: Vec<u8>,
    fds: Vec<OwnedFd>,
    unsent: VecDeque<Unsent>,
    unsent_bytes: usize,
}

#[derive(Debug)]
struct Unsent {
    bytes: Vec<u8>,
    fds: Vec<OwnedFd>,
}

impl Lines {
    /// Two connections that are each other's peer.
    ///
    /// # Errors
    ///
    /// [`PairError`] when the kernel has no room for two more descriptors.
    pub fn pair() -> Result<(Self, Self), PairError> {
        let (one, other) = socketpair(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC, None)
            .map_err(|cause| PairError { cause })?;
        Ok((Self::from_connected(one), Self::from_connected(other)))
    }

    pub(crate) fn from_connected(socket: OwnedFd) -> Self {
        Self { socket, received: Vec::new(), fds: Vec::new(), unsent: VecDeque::new(), unsent_bytes: 0 }
    }

    /// Who held the other end when the two were joined.
    ///
    /// # Errors
    ///
    /// If the kernel does not say.
    pub fn peer(&self) -> Result<Peer, Errno> {
        credentials::peer(self.as_fd())
    }

    /// Refuses a peer of another user.
    ///
    /// # Errors
    ///
    /// [`PeerError`].
    pub fn require_same_user(&self) -> Result<Peer, PeerError> {
        crate::peer::require_same_user(self.as_fd())
    }

    /// The lines that have come whole by now. `None` stands for the end, which comes after the last line.
    ///
    /// # Errors
    ///
    /// [`LineError`]; the connection is of no use then.
    pub fn receive(&mut self) -> Result<Vec<Line>, LineError> {
        let mut lines = Vec::new();
        loop {
            let mut bytes = [0; 4096];
            let (len, fds) = match self.try_receive(&mut bytes) {
                Ok(received) => received,
                Err(LineError::Call { cause: Errno::INTR, .. }) => continue,
                Err(LineError::Call { cause: Errno::AGAIN, .. }) => return Ok(lines),
                // What was whole is still to be read.
                Err(LineError::Call { cause: Errno::CONNRESET, .. }) if !lines.is_empty() => {
                    return Ok(lines);
                }
                Err(LineError::Call { cause: Errno::CONNRESET, .. }) => return Err(LineError::Closed),
                Err(error) => return Err(error),
            };
            if len == 0 {
                return if lines.is_empty() { Err(LineError::Closed) } else { Ok(lines) };
            }
            for part in bytes[..len].split_inclusive(|byte| *byte == b'\n') {
                self.received.extend(part);
                if self.received.last() == Some(&b'\n') {
                    self.received.pop();
                    let bytes = std::mem::take(&mut self.received);
                    lines.push(Line { bytes, fds: std::mem::take(&mut self.fds) });
                }
                if self.received.len() > MAX_LINE_BYTES {
                    return Err(LineError::TooLong);
                }
            }
            let of_last = match lines.last_mut() {
                Some(last) if self.received.is_empty() => &mut last.fds,
                _ => &mut self.fds,
            };
            of_last.extend(fds);
            if of_last.len() > MAX_PENDING_FDS {
                return Err(LineError::TooManyFds);
            }
            // One peer that never stops is not to keep the others waiting.
            if lines.len() >= 64 {
                return Ok(lines);
            }
        }
    }

    fn try_receive(&self, bytes: &mut [u8]) -> Result<(usize, Vec<OwnedFd>), LineError> {
        let mut space = [MaybeUninit::uninit(); cmsg_space!(ScmRights(MAX_MESSAGE_FDS))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let flags = RecvFlags::CMSG_CLOEXEC | RecvFlags::DONTWAIT;
        let received = recvmsg(&self.socket, &mut [IoSliceMut::new(bytes)], &mut control, flags)
            .map_err(|cause| LineError::Call { action: "receive", cause })?;
        let mut fds = Vec::new();
        for message in control.drain() {
            if let RecvAncillaryMessage::ScmRights(rights) = message {
                fds.extend(rights);
            }
        }
        if received.flags.contains(ReturnFlags::CTRUNC) {
            return Err(LineError::TooManyFds);
        }
        Ok((received.bytes, fds))
    }

    /// Sends a line with descriptors, as far as the peer reads; the rest is kept until [`flush`](Self::flush). The bytes must hold no
    /// line's end.
    ///
    /// # Errors
    ///
    /// [`LineError`]; the connection is of no use then.
    pub fn send(&mut self, bytes: &[u8], fds: Vec<OwnedFd>) -> Result<(), LineError> {
        debug_assert!(!bytes.contains(&b'\n'), "one line at a time");
        if fds.len() > MAX_MESSAGE_FDS {
            return Err(LineError::TooManyFds);
        }
        let line = [bytes, b"\n"].concat();
        self.unsent_bytes += line.len();
        self.unsent.push_back(Unsent { bytes: line, fds });
        self.flush()?;
        if self.unsent_bytes > MAX_UNSENT_BYTES { Err(LineError::Stalled) } else { Ok(()) }
    }

    /// Sends what is still unsent, as far as the peer reads.
    ///
    /// # Errors
    ///
    /// [`LineError`]; the connection is of no use then.
    pub fn flush(&mut self) -> Result<(), LineError> {
        while let Some(first) = self.unsent.front_mut() {
            let fds: Vec<BorrowedFd<'_>> = first.fds.iter().map(AsFd::as_fd).collect();
            match try_send(&self.socket, &first.bytes, &fds) {
                Ok(sent) => {
                    // Its descriptors went with its first byte.
                    first.fds.clear();
                    first.bytes.drain(..sent);
                    self.unsent_bytes -= sent;
                    if first.bytes.is_empty() {
                        self.unsent.pop_front();
                    }
                }
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => return Ok(()),
                Err(Errno::PIPE | Errno::CONNRESET) => return Err(LineError::Closed),
                Err(cause) => return Err(LineError::Call { action: "send", cause }),
            }
        }
        Ok(())
    }

    /// Something is still unsent.
    #[must_use]
    pub fn has_unsent(&self) -> bool {
        !self.unsent.is_empty()
    }

    /// Takes a descriptor that is said to be one end of a connection, after asking the kernel.
    ///
    /// # Errors
    ///
    /// If it is something else. The descriptor is then closed.
    pub fn from_fd(fd: OwnedFd) -> std::io::Result<Self> {
        let is_stream = sockopt::socket_domain(&fd)? == AddressFamily::UNIX
            && sockopt::socket_type(&fd)? == SocketType::STREAM;
        if is_stream { Ok(Self::from_connected(fd)) } else { Err(Errno::PROTOTYPE.into()) }
    }

    /// The next lines that come, at least one.
    ///
    /// # Errors
    ///
    /// [`LineError`], of which [`LineError::Stalled`] says that nothing came in time.
    pub fn receive_some(&mut self, deadline: Deadline) -> Result<Vec<Line>, LineError> {
        loop {
            let lines = self.receive()?;
            if !lines.is_empty() {
                return Ok(lines);
            }
            let call = |cause| LineError::Call { action: "receive", cause };
            if !wait(self.as_fd(), PollFlags::IN, deadline).map_err(call)? {
                return Err(LineError::Stalled);
            }
        }
    }

    /// Waits until the peer has been sent everything.
    ///
    /// # Errors
    ///
    /// [`LineError`], of which [`LineError::Stalled`] says that it does not read.
    pub fn await_sent(&mut self, deadline: Deadline) -> Result<(), LineError> {
        loop {
            self.flush()?;
            if self.unsent.is_empty() {
                return Ok(());
            }
            let call = |cause| LineError::Call { action: "send", cause };
            if !wait(self.as_fd(), PollFlags::OUT, deadline).map_err(call)? {
                return Err(LineError::Stalled);
            }
        }
    }
}

impl AsFd for Lines {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

fn try_send(socket: &OwnedFd, bytes: &[u8], fds: &[BorrowedFd<'_>]) -> Result<usize, Errno> {
    let mut space = [MaybeUninit::uninit(); cmsg_space!(ScmRights(MAX_MESSAGE_FDS))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if !fds.is_empty() && !control.push(SendAncillaryMessage::ScmRights(fds)) {
        return Err(Errno::NOBUFS);
    }
    sendmsg(socket, &[IoSlice::new(bytes)], &mut control, SendFlags::NOSIGNAL | SendFlags::DONTWAIT)
}

/// A socket at a path in a private directory, where peers come that speak lines.
#[derive(Debug)]
pub struct LineListener(Listener);

impl LineListener {
    /// Makes the socket: see [`Listener::bind`].
    ///
    /// # Errors
    ///
    /// [`BindError`].
    pub fn bind(path: &Path) -> Result<Self, BindError> {
        Listener::bind_as(path, SocketType::STREAM).map(Self)
    }

    /// Takes over the one that another process has made: see [`Listener::adopt`].
    ///
    /// # Errors
    ///
    /// [`AdoptListenerError`].
    pub fn adopt(socket: OwnedFd, path: &Path) -> Result<Self, AdoptListenerError> {
        Listener::adopt_as(socket, path, SocketType::STREAM).map(Self)
    }

    /// From now on the file goes with this listener.
    pub fn own(&mut self) {
        self.0.own();
    }

    /// Who has come, if somebody has.
    ///
    /// # Errors
    ///
    /// [`AcceptError`].
    pub fn accept(&self, deadline: Deadline) -> Result<Lines, AcceptError> {
        self.0.accept_socket(deadline).map(Lines::from_connected)
    }

    /// Closes this process's end and leaves the file: somebody else owns it.
    pub fn leave(self) {
        self.0.leave();
    }
}

impl AsFd for LineListener {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// Connects to a [`LineListener`].
///
/// # Errors
///
/// [`ConnectError`].
pub fn connect_lines(path: &Path, deadline: Deadline) -> Result<Lines, ConnectError> {
    crate::listener::connect_as(path, SocketType::STREAM, deadline).map(Lines::from_connected)
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;
    use std::os::unix::net::UnixStream;
    use std::time::Duration;

    use super::*;

    fn file() -> OwnedFd {
        rustix::fs::memfd_create("t", rustix::fs::MemfdFlags::CLOEXEC).unwrap()
    }

    #[test]
    fn lines_come_whole_and_each_with_its_descriptors() {
        let (mut one, mut other) = Lines::pair().unwrap();
        one.send(b"first", Vec::new()).unwrap();
        one.send(b"second", vec![file(), file()]).unwrap();
        one.send(b"", Vec::new()).unwrap();
        let mut lines = Vec::new();
        while lines.len() < 3 {
            lines.extend(other.receive().unwrap());
        }
        let shown: Vec<_> = lines.iter().map(|line| (&line.bytes[..], line.fds.len())).collect();
        assert_eq!(shown, [(&b"first"[..], 0), (b"second", 2), (b"", 0)]);
        drop(one);
        assert!(matches!(other.receive(), Err(LineError::Closed)));
    }

    #[test]
    fn a_line_that_comes_byte_by_byte_is_one_line() {
        let (mut one, other) = UnixStream::pair().unwrap();
        let mut other = Lines::from_connected(other.into());
        for byte in b"abc" {
            one.write_all(&[*byte]).unwrap();
            assert!(other.receive().unwrap().is_empty());
        }
        one.write_all(b"\nd").unwrap();
        drop(one);
        assert_eq!(other.receive().unwrap()[0].bytes, b"abc");
        assert!(matches!(other.receive(), Err(LineError::Closed)), "what has no end is no line");
    }

    #[test]
    fn a_line_without_an_end_and_a_flood_of_descriptors_are_refused() {
        let (mut one, other) = UnixStream::pair().unwrap();
        let mut other = Lines::from_connected(other.into());
        one.set_nonblocking(true).unwrap();
        let error = loop {
            let _full = one.write(&[b'x'; 4096]);
            if let Err(error) = other.receive() {
                break error;
            }
        };
        assert!(matches!(error, LineError::TooLong), "{error}");

        let (one, mut other) = Lines::pair().unwrap();
        let fd = file();
        let many: Vec<_> = (0..MAX_MESSAGE_FDS).map(|_| fd.as_fd()).collect();
        let error = loop {
            try_send(&one.socket, b"x", &many).unwrap();
            if let Err(error) = other.receive() {
                break error;
            }
        };
        assert!(matches!(error, LineError::TooManyFds), "{error}");
    }

    #[test]
    fn a_peer_that_does_not_read_is_given_up_and_one_that_is_slow_gets_all() {
        let (mut one, other) = Lines::pair().unwrap();
        let line = vec![b'x'; 32 << 10];
        let error = loop {
            if let Err(error) = one.send(&line, Vec::new()) {
                break error;
            }
        };
        assert!(matches!(error, LineError::Stalled), "{error}");
        drop(other);
        assert!(matches!(one.flush(), Err(LineError::Closed)));

        let (mut one, mut other) = Lines::pair().unwrap();
        let mut sent = 0;
        while !one.has_unsent() {
            one.send(&line, vec![file()]).unwrap();
            sent += 1;
        }
        let mut received = 0;
        while received < sent {
            for came in other.receive().unwrap() {
                assert_eq!((came.bytes.len(), came.fds.len()), (line.len(), 1));
                received += 1;
            }
            one.flush().unwrap();
        }
        let soon = Deadline::after(Duration::from_millis(1));
        assert!(matches!(other.receive_some(soon), Err(LineError::Stalled)));
    }
}
