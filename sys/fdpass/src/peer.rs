//! Who is at the other end, and whether it lives.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::process::Child;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::process::{Pid, PidfdFlags, geteuid, pidfd_open};

use crate::channel::Channel;
use crate::credentials;
use crate::deadline::{Deadline, wait};

/// The process at the other end, as it was when the two ends were joined: when it called `connect`,
/// or `listen` before we connected, or made the pair.
///
/// So after [`Channel::pair`] each end names the process that made the pair, also when one of them
/// has been given to a child; and a process that has handed its end on is still the one named.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Peer {
    /// Its process id, as this process's PID namespace has it; 0 if that does not show it.
    pub pid: u32,
    /// Its effective user.
    pub uid: u32,
    /// Its effective group.
    pub gid: u32,
}

/// Why a peer was not accepted.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PeerError {
    /// It belongs to somebody else.
    #[error("process {pid} at the other end belongs to user {uid} and not to user {user}")]
    OtherUser {
        /// Its process id.
        pid: u32,
        /// Its effective user.
        uid: u32,
        /// The effective user of this process.
        user: u32,
    },
    /// The kernel would not say.
    #[error("cannot ask who is at the other end")]
    Ask {
        /// What the kernel answered.
        #[source]
        cause: Errno,
    },
}

/// Why there is no [`Pidfd`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PidfdError {
    /// The process was gone before it could be watched.
    #[error("process {pid} is gone")]
    Gone {
        /// Its process id.
        pid: u32,
    },
    /// The kernel would not say who is at the other end.
    #[error("cannot ask who is at the other end")]
    Ask {
        /// What the kernel answered.
        #[source]
        cause: Errno,
    },
    /// The kernel refused.
    #[error("cannot watch process {pid}")]
    Open {
        /// Its process id.
        pid: u32,
        /// What the kernel answered.
        #[source]
        cause: Errno,
    },
}

/// Why [`Pidfd::wait_exit`] returned before the process ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum WaitExitError {
    /// It still runs.
    #[error("the process did not end in time")]
    TimedOut,
    /// The kernel refused.
    #[error("cannot wait for the process to end")]
    Wait {
        /// What the kernel answered.
        #[source]
        cause: Errno,
    },
}

impl Channel {
    /// Who was at the other end when the channel was made; see [`Peer`].
    ///
    /// # Errors
    ///
    /// What the kernel answered.
    pub fn peer(&self) -> Result<Peer, Errno> {
        credentials::peer(self.as_fd())
    }

    /// Checks that the peer runs as the effective user of this process, and says who it is. Root is
    /// no exception, in either direction.
    ///
    /// # Errors
    ///
    /// [`PeerError`].
    pub fn require_same_user(&self) -> Result<Peer, PeerError> {
        require_same_user(self.as_fd())
    }
}

pub(crate) fn require_same_user(socket: BorrowedFd<'_>) -> Result<Peer, PeerError> {
    let peer = credentials::peer(socket).map_err(|cause| PeerError::Ask { cause })?;
    peer.require_user(geteuid().as_raw())?;
    Ok(peer)
}

impl Peer {
    fn require_user(self, user: u32) -> Result<(), PeerError> {
        if self.uid == user {
            return Ok(());
        }
        Err(PeerError::OtherUser { pid: self.pid, uid: self.uid, user })
    }
}

/// A process, whatever becomes of its process id. Close-on-exec.
#[derive(Debug)]
pub struct Pidfd {
    fd: OwnedFd,
}

impl Pidfd {
    /// The process at the other end of a channel, as [`Peer`] defines it.
    ///
    /// Exact since Linux 6.5, where the kernel gives the descriptor itself. Before, it tells a number, and
    /// only then is a descriptor made for it: if the process ends in between and its number is given to
    /// another process, the descriptor is that one's. To make this unlikely the channel is looked at last:
    /// if its other end is closed by then the answer is [`PidfdError::Gone`]. What remains is a peer that
    /// ends in that instant, after it has handed its end on to a process that keeps it, while its number is
    /// used anew. For a child there is no such gap: use [`Pidfd::of_child`].
    ///
    /// # Errors
    ///
    /// [`PidfdError`].
    pub fn of_peer(channel: &Channel) -> Result<Self, PidfdError> {
        let ask = |cause| PidfdError::Ask { cause };
        if let Some(fd) = credentials::peer_pidfd(channel.as_fd()).map_err(ask)? {
            return Ok(Self { fd });
        }
        let named = channel.peer().map_err(ask)?.pid;
        let pid = i32::try_from(named).ok().and_then(Pid::from_raw);
        let pidfd = Self::open(pid.ok_or(PidfdError::Gone { pid: named })?)?;
        if hung_up(channel.as_fd()).map_err(ask)? {
            return Err(PidfdError::Gone { pid: named });
        }
        Ok(pidfd)
    }

    /// A child of this process that has not been waited for. Exact: the kernel keeps a child's
    /// number until its parent has asked how it ended.
    ///
    /// # Errors
    ///
    /// [`PidfdError`].
    pub fn of_child(child: &Child) -> Result<Self, PidfdError> {
        Self::open(Pid::from_child(child))
    }

    /// The process that has this number now. To be used while something that only it can do shows that it lives, as
    /// an answer on a channel.
    ///
    /// # Errors
    ///
    /// [`PidfdError`].
    pub fn of_number(number: u32) -> Result<Self, PidfdError> {
        let pid = i32::try_from(number).ok().and_then(Pid::from_raw);
        Self::open(pid.ok_or(PidfdError::Gone { pid: number })?)
    }

    fn open(pid: Pid) -> Result<Self, PidfdError> {
        match pidfd_open(pid, PidfdFlags::empty()) {
            Ok(fd) => Ok(Self { fd }),
            Err(Errno::SRCH) => Err(PidfdError::Gone { pid: number(pid) }),
            Err(cause) => Err(PidfdError::Open { pid: number(pid), cause }),
        }
    }

    /// Waits until the process has ended: all its threads are gone, and with them its descriptors
    /// and its memory, if it shared neither with another process. Its parent may not yet have asked
    /// how it ended.
    ///
    /// # Errors
    ///
    /// [`WaitExitError`].
    pub fn wait_exit(&self, deadline: Deadline) -> Result<(), WaitExitError> {
        match wait(self.as_fd(), PollFlags::IN, deadline) {
            Ok(true) => Ok(()),
            Ok(false) => Err(WaitExitError::TimedOut),
            Err(cause) => Err(WaitExitError::Wait { cause }),
        }
    }
}

impl AsFd for Pidfd {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

fn number(pid: Pid) -> u32 {
    pid.as_raw_nonzero().get().unsigned_abs()
}

/// Whether the other end of a socket is closed now.
fn hung_up(socket: BorrowedFd<'_>) -> Result<bool, Errno> {
    let mut fds = [PollFd::from_borrowed_fd(socket, PollFlags::empty())];
    loop {
        match poll(&mut fds, Some(&Timespec::default())) {
            Ok(_) => return Ok(fds[0].revents().contains(PollFlags::HUP)),
            Err(Errno::INTR) => {}
            Err(errno) => return Err(errno),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_peer_of_another_user_is_refused() {
        let peer = Peer { pid: 7, uid: 1000, gid: 1000 };
        assert_eq!(peer.require_user(1000), Ok(()));
        assert_eq!(peer.require_user(0), Err(PeerError::OtherUser { pid: 7, uid: 1000, user: 0 }));
    }
}
