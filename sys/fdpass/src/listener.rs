//! Meeting at a path.
//!
//! The directory is what keeps others out: it must belong to this user and be closed to everybody
//! else (mode 0700). It is opened once; what is checked is the directory that was opened, and the
//! socket's file is made, looked at and removed through that same descriptor. So it does not matter
//! who may rename a directory further up, nor that a socket address holds only 107 bytes of path
//! (the socket's own name must still fit, with the `/proc/self/fd/N/` before it).
//!
//! A socket's file stays when its process dies. It counts as *stale* when a connection to it is
//! refused; only then is it removed. Two processes that bind at once are kept apart by a lock on
//! the directory, or one could remove what the other has just made.

use std::ffi::OsStr;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::event::PollFlags;
use rustix::fs::{
    AtFlags, FileType, FlockOperation, Mode, OFlags, Stat, fchmod, flock, fstat, statat, unlinkat,
};
use rustix::io::Errno;
use rustix::net::sockopt::{self, Timeout, set_socket_timeout};
use rustix::net::{
    AddressFamily, SocketAddrUnix, SocketFlags, SocketType, accept_with, bind, getsockname, listen,
    socket_with,
};
use rustix::process::geteuid;

use crate::channel::Channel;
use crate::deadline::{Deadline, wait};

/// Connections that may wait to be accepted. An update has one; the rest is for those that only
/// look whether somebody listens.
const BACKLOG: i32 = 16;

/// How long to wait for another process that binds in the same directory, which takes it
/// microseconds.
const LOCK_PATIENCE: Duration = Duration::from_secs(1);

/// How often to ask for the lock meanwhile.
const LOCK_INTERVAL: Duration = Duration::from_millis(2);

/// Why [`Listener::bind`] failed. Nothing that was at the path is then changed, except that a stale
/// socket may be gone.
#[derive(Debug, thiserror::Error)]
pub enum BindError {
    /// The path ends in `..` or `/`, or has no last part at all.
    #[error("{path:?} does not name a file")]
    NoName {
        /// The path given.
        path: PathBuf,
    },
    /// The last part of the path is too long for a socket address.
    #[error("the name in {path:?} is too long for a socket")]
    NameTooLong {
        /// The path given.
        path: PathBuf,
    },
    /// The directory is not there, or not to be opened.
    #[error("cannot open the directory {directory:?}")]
    Directory {
        /// The directory.
        directory: PathBuf,
        /// What the kernel answered.
        #[source]
        cause: Errno,
    },
    /// Others than this user may enter the directory, or own it.
    #[error(
        "the directory {directory:?} is not private: owner {owner}, mode {mode:04o}; \
         it must belong to user {user} and have mode 0700"
    )]
    NotPrivate {
        /// The directory.
        directory: PathBuf,
        /// The user that owns it.
        owner: u32,
        /// Its permission bits.
        mode: u32,
        /// The effective user of this process.
        user: u32,
    },
    /// Another process has held the lock on the directory for as long as we were ready to wait.
    #[error("another process keeps the directory {directory:?} locked")]
    Locked {
        /// The directory.
        directory: PathBuf,
    },
    /// Somebody listens there.
    #[error("another process listens at {path:?}")]
    InUse {
        /// The path given.
        path: PathBuf,
    },
    /// Something is there that no listener of ours left, so it is not ours to remove.
    #[error("{path:?} exists and is not a socket")]
    NotASocket {
        /// The path given.
        path: PathBuf,
    },
    /// A system call failed.
    #[error("cannot {action} the socket at {path:?}")]
    Socket {
        /// What was tried, as a verb.
        action: &'static str,
        /// The path given.
        path: PathBuf,
        /// What the kernel answered.
        #[source]
        cause: Errno,
    },
}

/// Why [`Listener::adopt`] refused.
#[derive(Debug, thiserror::Error)]
pub enum AdoptListenerError {
    /// The directory is not there, or not private.
    #[error("cannot use the socket's directory")]
    Directory(#[source] BindError),
    /// The descriptor is something else than a listener at that path.
    #[error("the descriptor is no socket that listens at {path:?}")]
    Other {
        /// The path given.
        path: PathBuf,
    },
    /// The kernel refused.
    #[error("cannot look at the socket at {path:?}")]
    Ask {
        /// The path given.
        path: PathBuf,
        /// What the kernel answered.
        #[source]
        cause: Errno,
    },
}

/// Why [`Listener::accept`] gave no channel.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum AcceptError {
    /// Nobody came.
    #[error("nobody connected in time")]
    TimedOut,
    /// The kernel refused.
    #[error("cannot accept a connection")]
    Accept {
        /// What the kernel answered.
        #[source]
        cause: Errno,
    },
}

/// Why [`connect`] failed.
#[derive(Debug, thiserror::Error)]
pub enum ConnectError {
    /// The path ends in `..` or `/`, or has no last part at all.
    #[error("{path:?} does not name a file")]
    NoName {
        /// The path given.
        path: PathBuf,
    },
    /// The last part of the path is too long for a socket address.
    #[error("the name in {path:?} is too long for a socket")]
    NameTooLong {
        /// The path given.
        path: PathBuf,
    },
    /// Nothing is there.
    #[error("there is no socket at {path:?}")]
    Absent {
        /// The path given.
        path: PathBuf,
    },
    /// A socket's file is there, but its listener is gone.
    #[error("nobody listens at {path:?}")]
    Refused {
        /// The path given.
        path: PathBuf,
    },
    /// The listener has too many connections that it has not accepted.
    #[error("the listener at {path:?} did not take the connection in time")]
    TimedOut {
        /// The path given.
        path: PathBuf,
    },
    /// The kernel refused.
    #[error("cannot connect to {path:?}")]
    Connect {
        /// The path given.
        path: PathBuf,
        /// What the kernel answered.
        #[source]
        cause: Errno,
    },
}

/// A socket that waits at a path for peers to connect. Its file has mode 0600 from its first
/// instant, and is removed when the listener is dropped.
///
/// Only processes of this user (and root) can reach it, but a check of the [`Peer`](crate::Peer)
/// of each accepted channel is still the caller's: that is what keeps root's processes out of a
/// user's machine, and shows who came.
#[derive(Debug)]
pub struct Listener {
    /// Non-blocking, so that a peer that gives up between poll and accept cannot hold us.
    socket: OwnedFd,
    /// The private directory that the file is in.
    directory: OwnedFd,
    /// The file's name in it.
    name: PathBuf,
    /// The file's device and inode number, so that only our own is ever removed.
    identity: (u64, u64),
    /// The file is ours to remove.
    remove: bool,
}

impl Listener {
    /// Makes the socket at `path` and listens, in place of a stale one if there is one.
    ///
    /// To learn whether an existing socket is stale it is connected to; a live listener then
    /// accepts a channel that is closed at once.
    ///
    /// # Errors
    ///
    /// [`BindError`].
    pub fn bind(path: &Path) -> Result<Self, BindError> {
        Self::bind_as(path, SocketType::SEQPACKET)
    }

    /// The same, of a socket of this type.
    pub(crate) fn bind_as(path: &Path, kind: SocketType) -> Result<Self, BindError> {
        let failed = |action| {
            let path = path.to_owned();
            move |cause| BindError::Socket { action, path, cause }
        };
        let (parent, name) = split(path).ok_or_else(|| BindError::NoName { path: path.into() })?;
        let directory = open_private(parent)?;
        lock(directory.as_fd(), parent)?;

        let address = address_in(directory.as_fd(), name)
            .map_err(|_too_long| BindError::NameTooLong { path: path.to_owned() })?;
        let socket = make(kind, SocketFlags::NONBLOCK).map_err(failed("make"))?;
        // The kernel takes the file's mode from here, so it is never open to others.
        fchmod(&socket, Mode::RUSR | Mode::WUSR).map_err(failed("close to others"))?;
        match bind(&socket, &address) {
            Ok(()) => {}
            Err(Errno::ADDRINUSE) => {
                remove_stale(directory.as_fd(), name, &address, path, kind)?;
                bind(&socket, &address).map_err(failed("bind"))?;
            }
            Err(cause) => return Err(failed("bind")(cause)),
        }
        let made = statat(&directory, name, AtFlags::SYMLINK_NOFOLLOW).map_err(failed("look at"))?;
        listen(&socket, BACKLOG).map_err(failed("listen on"))?;
        let listener = Self { socket, directory, name: name.into(), identity: identity(&made), remove: true };
        flock(&listener.directory, FlockOperation::Unlock).map_err(failed("unlock"))?;
        Ok(listener)
    }

    /// Takes over the listener at `path` that another process has made, by its descriptor. It leaves the file when
    /// it is dropped, until it [owns](Self::own) it.
    ///
    /// # Errors
    ///
    /// [`AdoptListenerError`] if the descriptor listens at no such path.
    pub fn adopt(socket: OwnedFd, path: &Path) -> Result<Self, AdoptListenerError> {
        Self::adopt_as(socket, path, SocketType::SEQPACKET)
    }

    pub(crate) fn adopt_as(
        socket: OwnedFd,
        path: &Path,
        kind: SocketType,
    ) -> Result<Self, AdoptListenerError> {
        let other = || AdoptListenerError::Other { path: path.to_owned() };
        let ask = |cause| AdoptListenerError::Ask { path: path.to_owned(), cause };
        let (parent, name) = split(path).ok_or_else(other)?;
        let directory = open_private(parent).map_err(AdoptListenerError::Directory)?;
        let listens = sockopt::socket_domain(&socket) == Ok(AddressFamily::UNIX)
            && sockopt::socket_type(&socket) == Ok(kind)
            && sockopt::socket_acceptconn(&socket) == Ok(true);
        // The kernel shows a bound socket's address as it was given, which held the number of a descriptor.
        let address = getsockname(&socket).map_err(ask)?;
        let address = SocketAddrUnix::try_from(address).map_err(|_| other())?;
        let bound = address
            .path_bytes()
            .is_some_and(|path| path.rsplit(|byte| *byte == b'/').next() == Some(name.as_encoded_bytes()));
        if !listens || !bound {
            return Err(other());
        }
        // A copy of the descriptor may have been given other flags.
        rustix::io::ioctl_fionbio(&socket, true).map_err(ask)?;
        let found = statat(&directory, name, AtFlags::SYMLINK_NOFOLLOW).map_err(ask)?;
        Ok(Self { socket, directory, name: name.into(), identity: identity(&found), remove: false })
    }

    /// From now on the file goes with this listener.
    pub fn own(&mut self) {
        self.remove = true;
    }

    /// Closes this process's end and leaves the file: somebody else owns it.
    pub fn leave(mut self) {
        self.remove = false;
    }

    /// Waits for a peer.
    ///
    /// # Errors
    ///
    /// [`AcceptError`].
    pub fn accept(&self, deadline: Deadline) -> Result<Channel, AcceptError> {
        self.accept_socket(deadline).map(Channel::from_connected)
    }

    pub(crate) fn accept_socket(&self, deadline: Deadline) -> Result<OwnedFd, AcceptError> {
        let failed = |cause| AcceptError::Accept { cause };
        loop {
            match accept_with(&self.socket, SocketFlags::CLOEXEC) {
                Ok(socket) => return Ok(socket),
                Err(Errno::INTR | Errno::CONNABORTED) => {}
                Err(Errno::AGAIN) => {
                    if !wait(self.as_fd(), PollFlags::IN, deadline).map_err(failed)? {
                        return Err(AcceptError::TimedOut);
                    }
                }
                Err(cause) => return Err(failed(cause)),
            }
        }
    }
}

impl AsFd for Listener {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

impl Drop for Listener {
    /// Leaves the file alone where in doubt: a stale socket does no harm.
    fn drop(&mut self) {
        if !self.remove || flock(&self.directory, FlockOperation::NonBlockingLockExclusive).is_err() {
            return;
        }
        if let Ok(found) = statat(&self.directory, &self.name, AtFlags::SYMLINK_NOFOLLOW)
            && identity(&found) == self.identity
        {
            let _left_stale = unlinkat(&self.directory, &self.name, AtFlags::empty());
        }
    }
}

/// Connects to a listener.
///
/// Who listens is for the caller to check, with
/// [`Channel::require_same_user`]: this side does not ask whether the directory is private.
///
/// # Errors
///
/// [`ConnectError`].
pub fn connect(path: &Path, deadline: Deadline) -> Result<Channel, ConnectError> {
    connect_as(path, SocketType::SEQPACKET, deadline).map(Channel::from_connected)
}

pub(crate) fn connect_as(path: &Path, kind: SocketType, deadline: Deadline) -> Result<OwnedFd, ConnectError> {
    let failed = |cause| {
        let path = path.to_owned();
        match cause {
            Errno::NOENT => ConnectError::Absent { path },
            Errno::CONNREFUSED => ConnectError::Refused { path },
            Errno::AGAIN => ConnectError::TimedOut { path },
            cause => ConnectError::Connect { path, cause },
        }
    };
    let (parent, name) = split(path).ok_or_else(|| ConnectError::NoName { path: path.into() })?;
    let directory =
        rustix::fs::open(parent, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())
            .map_err(failed)?;
    let address = address_in(directory.as_fd(), name)
        .map_err(|_too_long| ConnectError::NameTooLong { path: path.to_owned() })?;
    let socket = make(kind, SocketFlags::empty()).map_err(failed)?;
    loop {
        // Zero would mean no limit.
        let left = deadline.remaining().map(|left| left.max(Duration::from_millis(1)));
        set_socket_timeout(&socket, Timeout::Send, left).map_err(failed)?;
        match rustix::net::connect(&socket, &address) {
            Ok(()) => break,
            Err(Errno::INTR) => {}
            Err(cause) => return Err(failed(cause)),
        }
    }
    set_socket_timeout(&socket, Timeout::Send, None).map_err(failed)?;
    Ok(socket)
}

/// The directory and the name in it.
fn split(path: &Path) -> Option<(&Path, &OsStr)> {
    // `file_name` overlooks a slash at the end.
    if path.as_os_str().as_encoded_bytes().ends_with(b"/") {
        return None;
    }
    let name = path.file_name()?;
    let parent = path.parent()?;
    let parent = if parent.as_os_str().is_empty() { Path::new(".") } else { parent };
    Some((parent, name))
}

fn make(kind: SocketType, flags: SocketFlags) -> Result<OwnedFd, Errno> {
    socket_with(AddressFamily::UNIX, kind, SocketFlags::CLOEXEC | flags, None)
}

/// The address of `name` in the directory that is open, wherever that is by now.
fn address_in(directory: BorrowedFd<'_>, name: &OsStr) -> Result<SocketAddrUnix, Errno> {
    let parent = PathBuf::from(format!("/proc/self/fd/{}", directory.as_raw_fd()));
    SocketAddrUnix::new(parent.join(name))
}

fn identity(stat: &Stat) -> (u64, u64) {
    (stat.st_dev, stat.st_ino)
}

/// Opens a directory and makes sure that nobody else may enter it.
fn open_private(directory: &Path) -> Result<OwnedFd, BindError> {
    let failed = |cause| BindError::Directory { directory: directory.into(), cause };
    let opened =
        rustix::fs::open(directory, OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())
            .map_err(failed)?;
    let stat = fstat(&opened).map_err(failed)?;
    let mode = Mode::from_raw_mode(stat.st_mode);
    let user = geteuid().as_raw();
    if !is_private(stat.st_uid, mode, user) {
        return Err(BindError::NotPrivate {
            directory: directory.into(),
            owner: stat.st_uid,
            mode: mode.as_raw_mode(),
            user,
        });
    }
    Ok(opened)
}

fn is_private(owner: u32, mode: Mode, user: u32) -> bool {
    owner == user && mode & (Mode::RWXU | Mode::RWXG | Mode::RWXO) == Mode::RWXU
}

/// Locks the directory until its descriptor is closed or unlocked.
fn lock(opened: BorrowedFd<'_>, directory: &Path) -> Result<(), BindError> {
    let patience = Deadline::after(LOCK_PATIENCE);
    loop {
        match flock(opened, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => return Ok(()),
            Err(Errno::INTR) => {}
            Err(Errno::AGAIN) if patience.has_passed() => {
                return Err(BindError::Locked { directory: directory.into() });
            }
            Err(Errno::AGAIN) => std::thread::sleep(LOCK_INTERVAL),
            Err(cause) => {
                return Err(BindError::Directory { directory: directory.into(), cause });
            }
        }
    }
}

/// Removes a socket that nobody listens on, and nothing else. The directory is locked.
fn remove_stale(
    directory: BorrowedFd<'_>,
    name: &OsStr,
    address: &SocketAddrUnix,
    path: &Path,
    kind: SocketType,
) -> Result<(), BindError> {
    let failed = |action| move |cause| BindError::Socket { action, path: path.into(), cause };
    let found = match statat(directory, name, AtFlags::SYMLINK_NOFOLLOW) {
        Ok(found) => found,
        // Its owner removed it meanwhile.
        Err(Errno::NOENT) => return Ok(()),
        Err(cause) => return Err(failed("look at")(cause)),
    };
    if FileType::from_raw_mode(found.st_mode) != FileType::Socket {
        return Err(BindError::NotASocket { path: path.into() });
    }
    // Non-blocking, so that a listener that is busy answers EAGAIN at once.
    let probe = make(kind, SocketFlags::NONBLOCK).map_err(failed("make"))?;
    match rustix::net::connect(&probe, address) {
        Err(Errno::CONNREFUSED) => {
            unlinkat(directory, name, AtFlags::empty()).map_err(failed("remove the stale file of"))
        }
        Err(Errno::NOENT) => Ok(()),
        // PROTOTYPE: alive, but of another type.
        Ok(()) | Err(Errno::AGAIN | Errno::PROTOTYPE) => Err(BindError::InUse { path: path.into() }),
        Err(cause) => Err(failed("connect to")(cause)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_path_splits_into_directory_and_name() {
        let split = |path| split(Path::new(path)).map(|(d, n)| (d.to_str(), n.to_str()));
        assert_eq!(split("/run/t/socket"), Some((Some("/run/t"), Some("socket"))));
        assert_eq!(split("socket"), Some((Some("."), Some("socket"))));
        assert_eq!(split("/socket"), Some((Some("/"), Some("socket"))));
        for nameless in ["", "/", "..", "a/..", "a/"] {
            assert_eq!(split(nameless), None, "{nameless:?}");
        }
    }
    #[test]
    fn a_directory_is_private_if_it_is_ours_and_nobody_else_may_enter() {
        let mode = Mode::from_raw_mode;
        assert!(is_private(1000, mode(0o700), 1000));
        // The set-group-id bit says who owns new files, not who may enter.
        assert!(is_private(1000, mode(0o2700), 1000));
        assert!(!is_private(0, mode(0o700), 1000));
        assert!(!is_private(1000, mode(0o700), 0));
        for open in [0o750, 0o710, 0o701, 0o755, 0o777, 0o600] {
            assert!(!is_private(1000, mode(open), 1000), "{open:o}");
        }
    }
}
