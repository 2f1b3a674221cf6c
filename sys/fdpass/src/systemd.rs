//! The service manager as one who is told of things, and keeps descriptors for the next life of a service.
//!
//! systemd gives a service the address of a socket (`$NOTIFY_SOCKET`) and takes messages there: `READY=1`, `MAINPID=`, and
//! descriptors for the service's *store* (`FDSTORE=1`), which it gives to the service when it starts it anew
//! (`$LISTEN_FDS`, `$LISTEN_FDNAMES`). See sd_notify(3) and sd_listen_fds(3).
//!
//! It answers none of that. A descriptor that does not get in (the unit has no store, or too small a one, or may not speak)
//! is closed, and nobody told. So who pushes something here pushes a *probe* behind it, one end of a pair of sockets, and asks for
//! a barrier: a pipe that the manager closes when it has done all that came before. If the other end of the probe is closed by
//! then, there was no room for it, nor, perhaps, for what was pushed before; if it is not, there was room for all.

use std::borrow::Cow;
use std::env;
use std::ffi::OsStr;
use std::fmt;
use std::io::IoSlice;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, FromRawFd as _, OwnedFd, RawFd};
use std::os::unix::ffi::OsStrExt as _;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use rustix::cmsg_space;
use rustix::event::PollFlags;
use rustix::io::{Errno, FdFlags};
use rustix::net::{
    AddressFamily, SendAncillaryBuffer, SendAncillaryMessage, SendFlags, SocketAddrUnix, SocketFlags,
    SocketType, connect, sendmsg, socket_with, socketpair,
};
use rustix::pipe::{PipeFlags, pipe_with};

use crate::deadline::{Deadline, ready, wait};

/// Where the manager listens.
const ADDRESS: &str = "NOTIFY_SOCKET";
/// The process that descriptors are passed to, how many, and what they are called.
const PASSED: [&str; 3] = ["LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES"];
/// The number of the first descriptor that is passed.
const FIRST_PASSED: RawFd = 3;
/// More than any manager passes.
const MAX_PASSED: usize = 4096;
/// What a probe is called while it is in the store.
const PROBE: StoreName = StoreName(Cow::Borrowed("probe"));

/// What a descriptor in the store is called: 1 to 255 characters of ASCII that can be printed, but for `:`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StoreName(Cow<'static, str>);

impl StoreName {
    /// Takes a name that systemd takes.
    ///
    /// # Errors
    ///
    /// [`StoreNameError`]
    pub fn new(name: &str) -> Result<Self, StoreNameError> {
        let printable = name.bytes().all(|byte| matches!(byte, b' '..=b'~') && byte != b':');
        match printable && (1..=255).contains(&name.len()) {
            true => Ok(Self(Cow::Owned(name.to_owned()))),
            false => Err(StoreNameError { name: name.to_owned() }),
        }
    }

    /// The name.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for StoreName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// A name that no descriptor in a store can have.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("`{}` is no name for a descriptor in the service manager's store", .name.escape_debug())]
pub struct StoreNameError {
    /// The name.
    pub name: String,
}

/// What the manager can be told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Tell<'a> {
    /// The service is ready.
    Ready,
    /// How it is, in one line. What would end the line is left out.
    Status(&'a str),
    /// Which process is the service's main one from now on.
    MainPid(u32),
    /// What is under way may take so long, from now.
    Extend(Duration),
}

impl Tell<'_> {
    fn line(self) -> String {
        match self {
            Self::Ready => "READY=1\n".to_owned(),
            Self::Status(text) => {
                let line: String = text.chars().filter(|letter| !letter.is_control()).collect();
                format!("STATUS={line}\n")
            }
            Self::MainPid(pid) => format!("MAINPID={pid}\n"),
            Self::Extend(span) => format!("EXTEND_TIMEOUT_USEC={}\n", span.as_micros()),
        }
    }
}

/// Why the manager was not told.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ManagerError {
    /// `$NOTIFY_SOCKET` is no address of a Unix socket.
    #[error("`{}` is no address of a Unix socket", .address.escape_debug())]
    Address {
        /// The address.
        address: String,
    },
    /// There is nobody.
    #[error("cannot reach the service manager")]
    Reach {
        /// What the kernel answered.
        #[source]
        cause: Errno,
    },
    /// It does not take the message.
    #[error("cannot tell the service manager")]
    Send {
        /// What the kernel answered.
        #[source]
        cause: Errno,
    },
    /// There are no descriptors for a barrier or a probe.
    #[error("cannot make what shows that the service manager has heard")]
    Make {
        /// What the kernel answered.
        #[source]
        cause: Errno,
    },
    /// It is not known whether it has heard.
    #[error("cannot wait for the service manager")]
    Wait {
        /// What the kernel answered.
        #[source]
        cause: Errno,
    },
    /// It has not heard yet.
    #[error("the service manager did not get to it in time")]
    TimedOut,
}

/// Why descriptors are not in the store, or not all of them.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PushError {
    /// The manager was not told of all of them.
    #[error(transparent)]
    Manager(#[from] ManagerError),
    /// It closed the last one, for which it has no room.
    #[error(
        "the service manager's store has no room for {count} descriptors beside what is in it: the unit needs a larger \
         FileDescriptorStoreMax=, and NotifyAccess=all"
    )]
    Refused {
        /// How many, with those that are to fit besides.
        count: usize,
    },
}

/// The way to the service manager that started this process.
#[derive(Debug)]
pub struct Manager {
    /// Connected to the manager's socket.
    socket: OwnedFd,
}

impl Manager {
    /// The manager that this process's environment names; `None` if it names none.
    ///
    /// # Errors
    ///
    /// [`ManagerError::Address`], [`ManagerError::Reach`]
    pub fn from_environment() -> Result<Option<Self>, ManagerError> {
        let address = env::var_os(ADDRESS).filter(|address| !address.is_empty());
        address.map(|address| Self::at(&address)).transpose()
    }

    /// The manager at this address: a path, or the name of an abstract socket behind an `@`.
    ///
    /// # Errors
    ///
    /// As [`from_environment`](Self::from_environment).
    pub fn at(address: &OsStr) -> Result<Self, ManagerError> {
        let reach = |cause| ManagerError::Reach { cause };
        let parsed = match address.as_bytes() {
            [b'/', ..] => SocketAddrUnix::new(address.as_bytes()),
            [b'@', name @ ..] => SocketAddrUnix::new_abstract_name(name),
            _ => Err(Errno::INVAL),
        };
        let parsed =
            parsed.map_err(|_| ManagerError::Address { address: address.to_string_lossy().into_owned() })?;
        let socket =
            socket_with(AddressFamily::UNIX, SocketType::DGRAM, SocketFlags::CLOEXEC, None).map_err(reach)?;
        connect(&socket, &parsed).map_err(reach)?;
        Ok(Self { socket })
    }

    /// Tells it something.
    ///
    /// # Errors
    ///
    /// [`ManagerError`]: it was told nothing of it.
    pub fn tell(&self, what: &[Tell<'_>], deadline: Deadline) -> Result<(), ManagerError> {
        let text: String = what.iter().map(|tell| tell.line()).collect();
        self.send(&text, None, deadline)
    }

    /// Waits until it has done all that it was told before.
    ///
    /// # Errors
    ///
    /// [`ManagerError`]
    pub fn await_done(&self, deadline: Deadline) -> Result<(), ManagerError> {
        let make = |cause| ManagerError::Make { cause };
        let (ours, theirs) = pipe_with(PipeFlags::CLOEXEC).map_err(make)?;
        self.send("BARRIER=1\n", Some(theirs.as_fd()), deadline)?;
        drop(theirs);
        // Nothing is ever written to it: that it is readable means that its other end is closed.
        match wait(ours.as_fd(), PollFlags::IN, deadline).map_err(|cause| ManagerError::Wait { cause })? {
            true => Ok(()),
            false => Err(ManagerError::TimedOut),
        }
    }

    /// Has it keep copies of these, each under its name, in this order, and finds out whether it does, and would have room for
    /// `spare` more.
    ///
    /// # Errors
    ///
    /// [`PushError`]: some of them may be in the store.
    pub fn push(
        &self,
        fds: &[(StoreName, BorrowedFd<'_>)],
        spare: usize,
        deadline: Deadline,
    ) -> Result<(), PushError> {
        for (name, fd) in fds {
            self.push_one(name, *fd, false, deadline)?;
        }
        let probes: Vec<OwnedFd> =
            (0..spare.max(1)).map(|_| self.push_probe(deadline)).collect::<Result<_, _>>()?;
        self.await_done(deadline)?;
        let ends: Vec<BorrowedFd<'_>> = probes.iter().map(AsFd::as_fd).collect();
        let now = Deadline::after(Duration::ZERO);
        let closed = ready(&ends, now).map_err(|error| ManagerError::Wait { cause: errno(&error) })?;
        self.remove(&PROBE, deadline)?;
        match closed.is_empty() {
            true => Ok(()),
            false => Err(PushError::Refused { count: fds.len() + spare }),
        }
    }

    /// Gives the end that is not pushed.
    fn push_probe(&self, deadline: Deadline) -> Result<OwnedFd, ManagerError> {
        let (ours, theirs) = socketpair(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC, None)
            .map_err(|cause| ManagerError::Make { cause })?;
        // It is to be watched: should this process die, it goes by itself.
        self.push_one(&PROBE, theirs.as_fd(), true, deadline)?;
        Ok(ours)
    }

    fn push_one(
        &self,
        name: &StoreName,
        fd: BorrowedFd<'_>,
        watched: bool,
        deadline: Deadline,
    ) -> Result<(), ManagerError> {
        let poll = if watched { "" } else { "FDPOLL=0\n" };
        self.send(&format!("FDSTORE=1\nFDNAME={name}\n{poll}"), Some(fd), deadline)
    }

    /// Has it close all descriptors in the store that are called so.
    ///
    /// # Errors
    ///
    /// [`ManagerError`]
    pub fn remove(&self, name: &StoreName, deadline: Deadline) -> Result<(), ManagerError> {
        self.send(&format!("FDSTOREREMOVE=1\nFDNAME={name}\n"), None, deadline)
    }

    fn send(&self, text: &str, fd: Option<BorrowedFd<'_>>, deadline: Deadline) -> Result<(), ManagerError> {
        loop {
            match self.try_send(text, fd) {
                Ok(()) => return Ok(()),
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => {
                    let taken = wait(self.socket.as_fd(), PollFlags::OUT, deadline);
                    if !taken.map_err(|cause| ManagerError::Wait { cause })? {
                        return Err(ManagerError::TimedOut);
                    }
                }
                Err(cause) => return Err(ManagerError::Send { cause }),
            }
        }
    }

    fn try_send(&self, text: &str, fd: Option<BorrowedFd<'_>>) -> Result<(), Errno> {
        let mut space = [MaybeUninit::uninit(); cmsg_space!(ScmRights(1))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        let fds: Vec<BorrowedFd<'_>> = fd.into_iter().collect();
        if !fds.is_empty() && !control.push(SendAncillaryMessage::ScmRights(&fds)) {
            return Err(Errno::NOBUFS);
        }
        let flags = SendFlags::NOSIGNAL | SendFlags::DONTWAIT;
        sendmsg(&self.socket, &[IoSlice::new(text.as_bytes())], &mut control, flags).map(|_whole| ())
    }
}

fn errno(error: &std::io::Error) -> Errno {
    Errno::from_io_error(error).unwrap_or(Errno::IO)
}

/// Why descriptors that the manager passed are not there.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PassedError {
    /// They were taken before.
    #[error("what the service manager passed was taken before")]
    Taken,
    /// The environment does not say how many, or too many.
    #[error("`{}` is no number of descriptors that a service manager passes", .number.escape_debug())]
    Number {
        /// What it says.
        number: String,
    },
    /// One of them is not open, or is this process's own.
    #[error("descriptor {fd} is none that the service manager passed")]
    NotPassed {
        /// Its number.
        fd: RawFd,
    },
}

/// Whether the manager passed descriptors to this process, taken or not.
pub fn has_passed() -> bool {
    let [pid, number, _] = PASSED.map(|name| env::var(name).unwrap_or_default());
    pid == std::process::id().to_string() && number != "0"
}

static TAKEN: AtomicBool = AtomicBool::new(false);

/// Takes the descriptors that the manager passed to this process, each with its name: those in the store, and sockets of the
/// service. None, if it passed none to this process. From then on, they are close-on-exec.
///
/// # Errors
///
/// [`PassedError`]: nothing was taken.
pub fn take_passed() -> Result<Vec<(String, OwnedFd)>, PassedError> {
    let [pid, number, names] = PASSED.map(|name| env::var(name).unwrap_or_default());
    if pid != std::process::id().to_string() {
        return Ok(Vec::new());
    }
    let count = number.parse().ok().filter(|count| *count <= MAX_PASSED);
    let count = count.ok_or(PassedError::Number { number })?;
    if TAKEN.swap(true, Ordering::Relaxed) {
        return Err(PassedError::Taken);
    }
    let fds: Vec<RawFd> = (FIRST_PASSED..).take(count).collect();
    if let Some(fd) = fds.iter().copied().find(|fd| !is_passed(*fd)) {
        return Err(PassedError::NotPassed { fd });
    }
    let names = names.split(':').map(str::to_owned).chain(std::iter::repeat(String::new()));
    Ok(names.zip(fds.into_iter().map(adopt)).collect())
}

/// It is open, and goes to a program that is executed, as all that came by that way do. What this process has opened itself
/// does not: the standard library sees to that, and so does each crate here.
fn is_passed(fd: RawFd) -> bool {
    // SAFETY: F_GETFD takes any number, and changes nothing.
    let flags = unsafe { libc::fcntl(fd, libc::F_GETFD) };
    flags >= 0 && flags & libc::FD_CLOEXEC == 0
}

fn adopt(fd: RawFd) -> OwnedFd {
    // SAFETY:
    // 1. It is open, and came by way of the `execve` that began this process's program: `is_passed` in `take_passed`.
    // 2. The environment says that it was passed for this process to take, so no other part of it owns it.
    // 3. Nobody has taken it here before: `TAKEN`.
    let fd = unsafe { OwnedFd::from_raw_fd(fd) };
    // It stays open all the same should the kernel refuse, which it does for no descriptor that is open.
    let _ = rustix::io::fcntl_setfd(&fd, FdFlags::CLOEXEC);
    fd
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_is_what_the_manager_takes() {
        assert_eq!(StoreName::new("tideover/web1/note").unwrap().as_str(), "tideover/web1/note");
        for bad in ["", "a:b", "a\nb", "ä", &"n".repeat(256)] {
            assert!(StoreName::new(bad).is_err(), "{bad}");
        }
        assert!(StoreName::new(&"n".repeat(255)).is_ok());
    }

    #[test]
    fn what_is_told_is_one_line_each() {
        let text: String = [
            Tell::Ready,
            Tell::MainPid(7),
            Tell::Status("runs\nMAINPID=1"),
            Tell::Extend(Duration::from_secs(2)),
        ]
        .map(Tell::line)
        .concat();
        assert_eq!(text, "READY=1\nMAINPID=7\nSTATUS=runsMAINPID=1\nEXTEND_TIMEOUT_USEC=2000000\n");
    }

    #[test]
    fn what_is_no_address_is_refused() {
        for bad in ["", "vsock:2:1234", "relative"] {
            assert!(matches!(Manager::at(OsStr::new(bad)), Err(ManagerError::Address { .. })), "{bad}");
        }
        assert!(matches!(Manager::at(OsStr::new("/nowhere/notify")), Err(ManagerError::Reach { .. })));
    }
}
