//! Sessions, by their direction.

use std::io;
use std::os::fd::AsFd;
use std::os::fd::BorrowedFd;
use std::os::fd::OwnedFd;

use rustix::io::Errno;
use thiserror::Error;

use crate::ioctl;
use crate::name::Name;

/// Why a file was not preserved.
#[derive(Debug, Error)]
pub enum PreserveError {
    /// The session has a file with this token.
    #[error("the session has a file with token {token:#x} already")]
    Exists {
        /// The token.
        token: u64,
    },
    /// The kernel can preserve no file of this kind: `No handler`.
    #[error("this kernel preserves no file of this kind")]
    Unsupported,
    /// The file is preserved already, in this session or another; or was retrieved, and its session is not finished.
    #[error("the file is preserved already, or was retrieved from a session that is not finished")]
    Busy,
    /// The session is full: 630,000 files.
    #[error("the session can have no more files")]
    Full,
    /// What the file's kind needs beside it is not to be had: its module is being unloaded.
    #[error("the kernel is about to unload what preserves this kind of file")]
    Unloading,
    /// The kernel, or what preserves this kind of file, says something else.
    #[error("cannot preserve the file with token {token:#x}")]
    Other {
        /// The token.
        token: u64,
        /// What it says.
        #[source]
        source: io::Error,
    },
}

/// Why a file was not retrieved.
#[derive(Debug, Error)]
pub enum RetrieveError {
    /// The session has no file with this token, or is finished.
    #[error("the session has no file with token {token:#x}, or is finished")]
    Absent {
        /// The token.
        token: u64,
    },
    /// This process can have no more descriptors. The file can be retrieved later.
    #[error("this process can have no more descriptors")]
    Descriptors(#[source] io::Error),
    /// The file cannot be had, now and later: the kernel keeps the answer.
    #[error("the file with token {token:#x} cannot be retrieved, for good")]
    Failed {
        /// The token.
        token: u64,
        /// What the kernel says, this time and each time.
        #[source]
        source: io::Error,
    },
}

/// Why a session was not finished: nothing has changed.
#[derive(Debug, Error)]
pub enum FinishError {
    /// One of its files cannot be let go yet.
    #[error("a file of the session cannot be finished yet")]
    Busy,
    /// The kernel says something else.
    #[error("cannot finish the session")]
    Other(#[source] io::Error),
}

/// A session that is not finished, and goes on.
#[derive(Debug, Error)]
#[error("{error}")]
pub struct Unfinished {
    /// The session.
    pub session: Incoming,
    /// Why.
    #[source]
    pub error: FinishError,
}

/// A session that the next kernel is to have.
///
/// It lives as long as a descriptor of it is open anywhere. When the last one is closed, by this value's end or its process's,
/// all its files are as before: that is how to give it up, and how it is lost. To keep it, pass a
/// [copy](Outgoing::into_fd) to a process that lives until the kernel jumps.
#[derive(Debug)]
#[must_use = "dropping the session gives it up"]
pub struct Outgoing {
    session: OwnedFd,
}

impl Outgoing {
    pub(crate) fn of(session: OwnedFd) -> Self {
        Self { session }
    }

    /// Takes a session's descriptor that came from another process, after asking the kernel for its name.
    ///
    /// The kernel does not tell outgoing from incoming ones: of the wrong kind, calls will be refused (EINVAL).
    ///
    /// # Errors
    /// What the kernel says if it is no session's.
    pub fn from_fd(session: OwnedFd) -> io::Result<Self> {
        name(&session)?;
        Ok(Self { session })
    }

    /// Gives the session to whoever has the descriptor.
    #[must_use]
    pub fn into_fd(self) -> OwnedFd {
        self.session
    }

    /// Its name.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn name(&self) -> io::Result<Name> {
        name(&self.session)
    }

    /// Takes a file into the session, under a token that no other of its files has. The kernel keeps the file
    /// open: the caller may close it.
    ///
    /// # Errors
    /// [`PreserveError`]: the session is as before.
    pub fn preserve(&mut self, token: u64, file: BorrowedFd<'_>) -> Result<(), PreserveError> {
        ioctl::preserve_fd(&self.session, token, file).map_err(|source| {
            match source.raw_os_error().map(Errno::from_raw_os_error) {
                Some(Errno::EXIST) => PreserveError::Exists { token },
                Some(Errno::NOENT) => PreserveError::Unsupported,
                Some(Errno::BUSY) => PreserveError::Busy,
                Some(Errno::NOSPC) => PreserveError::Full,
                Some(Errno::NODEV) => PreserveError::Unloading,
                _ => PreserveError::Other { token, source },
            }
        })
    }
}

impl AsFd for Outgoing {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.session.as_fd()
    }
}

/// A session that the kernel before left.
///
/// **When its last descriptor is closed the session is finished**, by this value's end or its process's: each file that was
/// not retrieved is destroyed, with its memory. So retrieve in a process that does nothing else that can fail, and pass
/// what must live on; call [`finish`](Incoming::finish) when everything is safe.
#[derive(Debug)]
#[must_use = "dropping the session destroys each file that was not retrieved"]
pub struct Incoming {
    session: OwnedFd,
}

impl Incoming {
    pub(crate) fn of(session: OwnedFd) -> Self {
        Self { session }
    }

    /// Takes a session's descriptor that came from another process. See [`Outgoing::from_fd`].
    ///
    /// # Errors
    /// What the kernel says if it is no session's.
    pub fn from_fd(session: OwnedFd) -> io::Result<Self> {
        name(&session)?;
        Ok(Self { session })
    }

    /// Gives the session to whoever has the descriptor.
    #[must_use]
    pub fn into_fd(self) -> OwnedFd {
        self.session
    }

    /// Its name.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn name(&self) -> io::Result<Name> {
        name(&self.session)
    }

    /// Retrieves the file with this token, close-on-exec. Again, it gives another descriptor of the same open file.
    ///
    /// # Errors
    /// [`RetrieveError`]
    pub fn retrieve(&mut self, token: u64) -> Result<OwnedFd, RetrieveError> {
        ioctl::retrieve_fd(&self.session, token).map_err(|source| {
            match source.raw_os_error().map(Errno::from_raw_os_error) {
                Some(Errno::NOENT) => RetrieveError::Absent { token },
                Some(Errno::MFILE | Errno::NFILE) => RetrieveError::Descriptors(source),
                _ => RetrieveError::Failed { token, source },
            }
        })
    }

    /// The session is done with: what was retrieved is this system's alone, what was not is destroyed.
    ///
    /// # Errors
    /// [`Unfinished`], with the session, of which nothing has changed.
    pub fn finish(self) -> Result<(), Box<Unfinished>> {
        ioctl::finish(&self.session).map_err(|source| {
            let error = match source.raw_os_error().map(Errno::from_raw_os_error) {
                Some(Errno::BUSY) => FinishError::Busy,
                _ => FinishError::Other(source),
            };
            Box::new(Unfinished { session: self, error })
        })
    }
}

impl AsFd for Incoming {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.session.as_fd()
    }
}

fn name(session: &OwnedFd) -> io::Result<Name> {
    let field = ioctl::get_name(session)?;
    Name::of_field(&field).map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))
}
