//! `/dev/liveupdate`.

use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::os::fd::BorrowedFd;
use std::os::fd::OwnedFd;
use std::path::Path;

use rustix::fs::FileType;
use rustix::io::Errno;
use thiserror::Error;

use crate::ioctl;
use crate::name::Name;
use crate::session::Incoming;
use crate::session::Outgoing;

/// Where the device is.
const PATH: &str = "/dev/liveupdate";

/// Why the device is not to be had.
#[derive(Debug, Error)]
pub enum OpenError {
    /// There is none.
    #[error(
        "there is no {PATH}: the kernel needs to be Linux 6.19 or later with CONFIG_LIVEUPDATE, started with \
         liveupdate=on and kho=on"
    )]
    Absent,
    /// Somebody has it open: one process in all, with its children and whom it has sent the descriptor.
    #[error("{PATH} is in use: it has one user at a time (a service manager, perhaps)")]
    Busy,
    /// What the kernel before left cannot be read. That is final: everything it left is lost, until the next boot.
    #[error("the kernel cannot read what the kernel before it left; its log says why")]
    Unreadable,
    /// This process may not.
    #[error("{PATH} may be opened by root alone")]
    Denied(#[source] io::Error),
    /// The kernel says something else.
    #[error("cannot open {PATH}")]
    Other(#[source] io::Error),
}

impl OpenError {
    /// The kernel's number for it.
    #[must_use]
    pub fn errno(&self) -> Option<i32> {
        match self {
            Self::Absent => Some(Errno::NOENT.raw_os_error()),
            Self::Busy => Some(Errno::BUSY.raw_os_error()),
            Self::Unreadable => Some(Errno::IO.raw_os_error()),
            Self::Denied(source) | Self::Other(source) => source.raw_os_error(),
        }
    }

    fn of(source: io::Error) -> Self {
        match source.raw_os_error().map(Errno::from_raw_os_error) {
            Some(Errno::NOENT) => Self::Absent,
            Some(Errno::BUSY) => Self::Busy,
            Some(Errno::IO) => Self::Unreadable,
            Some(Errno::ACCESS | Errno::PERM) => Self::Denied(source),
            _ => Self::Other(source),
        }
    }
}

/// Why there is no new session.
#[derive(Debug, Error)]
pub enum CreateError {
    /// There is an outgoing one of this name.
    #[error("there is an outgoing session {name} already")]
    Exists {
        /// The name.
        name: Name,
    },
    /// The kernel has as many as it can hand over: 510,000.
    #[error("the kernel can hand over no more sessions")]
    Full,
    /// The kernel says something else: EMFILE or ENFILE without a free descriptor, ENOMEM without memory.
    #[error("cannot create the session {name}")]
    Other {
        /// The name.
        name: Name,
        /// What it says.
        #[source]
        source: io::Error,
    },
}

/// Why a session is not to be had.
#[derive(Debug, Error)]
pub enum FindError {
    /// The kernel before left none of this name, or it is finished and closed.
    #[error("the kernel before left no session {name}, or it is finished")]
    Absent {
        /// The name.
        name: Name,
    },
    /// It was retrieved already, since this kernel was booted.
    #[error("the session {name} was retrieved already: whoever did so has it, or has lost it")]
    Taken {
        /// The name.
        name: Name,
    },
    /// The kernel says something else: EMFILE or ENFILE without a free descriptor, ENOMEM without memory.
    #[error("cannot retrieve the session {name}")]
    Other {
        /// The name.
        name: Name,
        /// What it says.
        #[source]
        source: io::Error,
    },
}

/// The device, which has one user at a time. Closing it touches no session.
#[derive(Debug)]
pub struct Device {
    file: File,
}

impl AsFd for Device {
    /// For another process that is to use it, too: who has this one may do all that its user may.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

impl Device {
    /// Opens it. The first time since the kernel was booted, this has the kernel read what the one before left.
    ///
    /// # Errors
    /// [`OpenError`]
    pub fn open() -> Result<Self, OpenError> {
        let file = File::options().read(true).write(true).open(Path::new(PATH)).map_err(OpenError::of)?;
        Ok(Self { file })
    }

    /// Takes the device from another process, which has it open.
    ///
    /// # Errors
    /// If it is another file.
    pub fn from_fd(device: OwnedFd) -> io::Result<Self> {
        let (given, own) = (rustix::fs::fstat(&device)?, rustix::fs::stat(PATH)?);
        let is_device =
            FileType::from_raw_mode(given.st_mode).is_char_device() && given.st_rdev == own.st_rdev;
        if is_device { Ok(Self { file: device.into() }) } else { Err(Errno::NODEV.into()) }
    }

    /// Makes an empty session that the next kernel is to have.
    ///
    /// # Errors
    /// [`CreateError`]
    pub fn create(&self, name: &Name) -> Result<Outgoing, CreateError> {
        let session = ioctl::create_session(&self.file, name.to_field());
        session.map(Outgoing::of).map_err(|source| {
            match source.raw_os_error().map(Errno::from_raw_os_error) {
                Some(Errno::EXIST) => CreateError::Exists { name: name.clone() },
                Some(Errno::NOSPC) => CreateError::Full,
                _ => CreateError::Other { name: name.clone(), source },
            }
        })
    }

    /// Retrieves a session that the kernel before left. That works once.
    ///
    /// # Errors
    /// [`FindError`]
    pub fn retrieve(&self, name: &Name) -> Result<Incoming, FindError> {
        let session = ioctl::retrieve_session(&self.file, name.to_field());
        session.map(Incoming::of).map_err(|source| {
            match source.raw_os_error().map(Errno::from_raw_os_error) {
                Some(Errno::NOENT) => FindError::Absent { name: name.clone() },
                Some(Errno::INVAL) => FindError::Taken { name: name.clone() },
                _ => FindError::Other { name: name.clone(), source },
            }
        })
    }
}
