//! File systems that stand still: before a kexec, which writes nothing back, and without unmounting them.
//!
//! [`Still::hold`] freezes each writable file system of the host that has a block device: what was written is on the disk then,
//! the file system there is whole as after an unmount, and whoever writes waits. If the kexec fails, [`Still::release`] or the
//! end of the value has everybody go on.
//!
//! ```no_run
//! use std::time::Duration;
//! use tideover_liveupdate::{filesystems, kexec};
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! filesystems::sync(); // takes as long as it takes, and nobody waits for it
//! let still = filesystems::Still::hold(Duration::from_secs(10))?;
//! let failed = kexec::execute();
//! still.release()?; // before anything is written
//! failed?;
//! # Ok(()) }
//! ```
//!
//! # Traps
//!
//! - **Between `hold` and `release` this process must write to no file.** It would wait for itself, and cannot be killed then. That
//!   goes for logs, for standard output that leads to a file, and for memory that is mapped from a file to write to. Nor may it
//!   wait for anyone who writes: that takes in most programs, a shell and a log daemon among them. Reading is no harm.
//! - **A process that is killed in between leaves the file systems frozen** until someone thaws them (`fsfreeze --unfreeze`) or
//!   the host is reset. The same goes for one that aborts. So hold late, and release early.
//! - What has no block device of its own is not held: network file systems and ZFS, which are synced only, and tmpfs, which is gone
//!   with the kernel. FAT has a block device and cannot be frozen: [`Still::left`] names it.
//! - It is the mounts of this process's mount namespace, below its root, that are held.

mod mounts;

use std::fmt;
use std::fs;
use std::io;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::mpsc;
use std::sync::mpsc::RecvTimeoutError;
use std::sync::mpsc::SyncSender;
use std::thread;
use std::time::Duration;

use rustix::fs::AtFlags;
use rustix::fs::Mode;
use rustix::fs::OFlags;
use rustix::fs::StatxFlags;
use rustix::io::Errno;
use thiserror::Error;

use self::mounts::Superblock;
use crate::ioctl;

const MOUNTS: &str = "/proc/self/mountinfo";
const KINDS: &str = "/proc/filesystems";

/// Has every file system of the host write back what it has, and waits for that.
pub fn sync() {
    rustix::fs::sync();
}

/// A file system that is mounted: one, however often it is mounted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Filesystem {
    /// Where: its first mount point.
    pub point: PathBuf,
    /// Its kind, as `ext4`.
    pub kind: String,
    /// Major and minor number of its device.
    pub device: (u32, u32),
}

/// With everything escaped that could harm a terminal.
impl fmt::Display for Filesystem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (major, minor) = self.device;
        write!(f, "{:?} ({} on {major}:{minor})", self.point, self.kind.escape_debug())
    }
}

/// Why a file system is not held.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum Refusal {
    /// It is mounted to be read only: there is nothing to hold.
    #[error("it is read-only")]
    ReadOnly,
    /// It cannot be frozen.
    #[error("its kind cannot be frozen")]
    Unsupported,
    /// Somebody else has it frozen: it stands still, and it is not ours to thaw.
    #[error("somebody else has it frozen")]
    Frozen,
    /// It has no mount point that this process can open: each is hidden below another mount, or gone.
    #[error("none of its mount points can be opened")]
    Hidden(#[source] io::Error),
    /// The kernel says something else: EIO from a broken disk.
    #[error("it cannot be frozen")]
    Other(#[source] io::Error),
}

/// Why no file system is held.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum HoldError {
    /// This process may not.
    #[error(
        "{0} may not be frozen by this process: it takes CAP_SYS_ADMIN where the file system was mounted"
    )]
    Denied(Filesystem),
    /// A file system does not answer: its disk does not, or it needs one that was frozen before.
    #[error("{filesystem} was not frozen within {patience:?}: its disk, or what it lies on, does not answer")]
    Stuck {
        /// The file system.
        filesystem: Filesystem,
        /// How long it was waited for.
        patience: Duration,
    },
    /// What is mounted is not to be learnt.
    #[error("the kernel does not tell what is mounted")]
    Mounts(#[source] io::Error),
    /// No thread could be made.
    #[error("no thread could be made to freeze file systems")]
    Thread(#[source] io::Error),
}

/// File systems that may still be frozen.
#[derive(Debug, Error)]
#[error("{} file systems were not thawed, {} the first", failed.len(), failed.first().map_or_else(String::new, |(first, _)| first.to_string()))]
pub struct ReleaseError {
    /// Which, and what the kernel said of each.
    pub failed: Vec<(Filesystem, io::Error)>,
}

/// What freezes and thaws.
trait Host: Send + Sync {
    /// Freezes a file system, and answers with what keeps hold of it; EPERM is an error of kind `Other`.
    fn freeze(&self, superblock: &Superblock) -> Result<OwnedFd, Refusal>;

    fn thaw(&self, filesystem: &Filesystem, fd: &OwnedFd) -> io::Result<()>;
}

/// The kernel.
struct Kernel;

impl Host for Kernel {
    fn freeze(&self, superblock: &Superblock) -> Result<OwnedFd, Refusal> {
        let fd = open(superblock).map_err(Refusal::Hidden)?;
        match ioctl::freeze(&fd) {
            Ok(()) => Ok(fd),
            Err(source) => Err(match source.raw_os_error().map(Errno::from_raw_os_error) {
                Some(Errno::OPNOTSUPP) => Refusal::Unsupported,
                Some(Errno::BUSY) => Refusal::Frozen,
                _ => Refusal::Other(source),
            }),
        }
    }

    fn thaw(&self, _: &Filesystem, fd: &OwnedFd) -> io::Result<()> {
        match ioctl::thaw(fd) {
            // Somebody else has thawed it.
            Err(source) if source.raw_os_error() == Some(libc::EINVAL) => Ok(()),
            other => other,
        }
    }
}

/// Opens the root of one of the mounts. What was mounted over it would be opened in its place: so the number of
/// the mount is compared.
fn open(superblock: &Superblock) -> io::Result<OwnedFd> {
    let mut last = Errno::NOENT;
    for mount in &superblock.mounts {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let opened = rustix::fs::open(&mount.point, flags, Mode::empty()).and_then(|fd| {
            let stat = rustix::fs::statx(&fd, "", AtFlags::EMPTY_PATH, StatxFlags::MNT_ID)?;
            let told = stat.stx_mask & StatxFlags::MNT_ID.bits() != 0;
            if told && stat.stx_mnt_id != mount.id { Err(Errno::NOENT) } else { Ok(fd) }
        });
        match opened {
            Ok(fd) => return Ok(fd),
            Err(errno) => last = errno,
        }
    }
    Err(last.into())
}

struct Held {
    filesystem: Filesystem,
    fd: OwnedFd,
}

/// File systems that are held still, until this is released or dropped.
#[must_use = "dropping it has the file systems go on"]
pub struct Still {
    host: Arc<dyn Host>,
    /// In the order of freezing.
    held: Vec<Held>,
    left: Vec<(Filesystem, Refusal)>,
}

impl Still {
    /// Freezes each writable file system that has a block device, the one that was mounted last first. Read
    /// [the traps](self#traps).
    ///
    /// What is dirty is written back by this, too; after a [`sync`] that is little. `patience` is for each file system. If one does
    /// not answer in time, all are thawed; one that needs another, as a loop device does, may answer then.
    ///
    /// # Errors
    /// [`HoldError`]: nothing is held.
    pub fn hold(patience: Duration) -> Result<Self, HoldError> {
        let mounts = fs::read(MOUNTS).map_err(HoldError::Mounts)?;
        let kinds = fs::read_to_string(KINDS).map_err(HoldError::Mounts)?;
        let superblocks = mounts::superblocks(&mounts, &mounts::kinds_of_disks(&kinds)).ok_or_else(|| {
            HoldError::Mounts(io::Error::new(io::ErrorKind::InvalidData, "mountinfo has another form"))
        })?;
        Self::hold_by(Arc::new(Kernel), superblocks, patience)
    }

    /// The freezing is done by a thread of its own, so that somebody is there to thaw what that thread waits for.
    fn hold_by(
        host: Arc<dyn Host>,
        superblocks: Vec<Superblock>,
        patience: Duration,
    ) -> Result<Self, HoldError> {
        let filesystems: Vec<_> = superblocks.iter().map(Superblock::filesystem).collect();
        let (tell, told) = mpsc::sync_channel(0);
        let freezer = Arc::clone(&host);
        let thread = thread::Builder::new().name("freeze".to_owned());
        let thread = thread.spawn(move || freeze_each(&*freezer, &superblocks, &tell));
        // It ends with the last answer, or when nobody waits for one.
        drop(thread.map_err(HoldError::Thread)?);
        // Declared after `told` and so dropped before it: what is held is thawed when nobody waits any more.
        let mut still = Self { host, held: Vec::new(), left: Vec::new() };
        for filesystem in filesystems {
            match told.recv_timeout(patience) {
                Ok(Ok(fd)) => still.held.push(Held { filesystem, fd }),
                Ok(Err(refusal)) if is_denial(&refusal) => return Err(HoldError::Denied(filesystem)),
                Ok(Err(refusal)) => still.left.push((filesystem, refusal)),
                Err(RecvTimeoutError::Timeout) => return Err(HoldError::Stuck { filesystem, patience }),
                Err(RecvTimeoutError::Disconnected) => {
                    return Err(HoldError::Thread(io::Error::other("it ended before its work was done")));
                }
            }
        }
        Ok(still)
    }

    /// What is held, in the order in which it was frozen.
    pub fn held(&self) -> impl ExactSizeIterator<Item = &Filesystem> {
        self.held.iter().map(|held| &held.filesystem)
    }

    /// What has a block device and is not held, and why.
    #[must_use]
    pub fn left(&self) -> &[(Filesystem, Refusal)] {
        &self.left
    }

    /// Thaws everything, the last frozen first.
    ///
    /// # Errors
    /// [`ReleaseError`]: all others are thawed.
    pub fn release(mut self) -> Result<(), ReleaseError> {
        let failed = self.thaw();
        if failed.is_empty() { Ok(()) } else { Err(ReleaseError { failed }) }
    }

    fn thaw(&mut self) -> Vec<(Filesystem, io::Error)> {
        let mut failed = Vec::new();
        while let Some(Held { filesystem, fd }) = self.held.pop() {
            if let Err(source) = self.host.thaw(&filesystem, &fd) {
                failed.push((filesystem, source));
            }
        }
        failed
    }
}

impl Drop for Still {
    fn drop(&mut self) {
        // Nobody is left to be told.
        drop(self.thaw());
    }
}

impl fmt::Debug for Still {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Still")
            .field("held", &self.held().collect::<Vec<_>>())
            .field("left", &self.left)
            .finish_non_exhaustive()
    }
}

type Answer = Result<OwnedFd, Refusal>;

/// Freezes one after the other. Each answer is handed over in person: one that nobody takes is undone.
fn freeze_each(host: &dyn Host, superblocks: &[Superblock], tell: &SyncSender<Answer>) {
    for superblock in superblocks {
        let answer = if superblock.read_only { Err(Refusal::ReadOnly) } else { host.freeze(superblock) };
        let denied = answer.as_ref().is_err_and(is_denial);
        if let Err(untaken) = tell.send(answer) {
            if let Ok(fd) = untaken.0 {
                // Who asked has gone, and with it whoever could be told.
                drop(host.thaw(&superblock.filesystem(), &fd));
            }
            return;
        }
        if denied {
            return;
        }
    }
}

fn is_denial(refusal: &Refusal) -> bool {
    matches!(refusal, Refusal::Other(source) if source.raw_os_error() == Some(libc::EPERM))
}

#[cfg(test)]
mod tests;
