//! Keeps this process's address space while the process executes another program.
//!
//! `execve` takes the old address space down before the new program runs, and closes the descriptors that do not go
//! with it. For a VMM that is the guest's memory, page by page, and its VM: many milliseconds, in which the guest
//! stands still. A *holder* is a process that shares the address space and keeps a copy of chosen descriptors. It
//! sleeps; when the new program lets it go, it ends, and all that is taken down then, on some other processor.
//!
//! ```text
//! this process   ────── start ──────┬── exec ──▶ new program ── drop(Lease) ─▶ …
//!                                   │                              │
//! holder                            └── sleeps in the old space ───┴─▶ ends; the old space goes
//! ```
//!
//! It is nobody's child for long: its parent is a process that has ended, so that nobody has to wait for it.
#![expect(
    unsafe_code,
    reason = "makes processes that share this one's address space, and takes over what was inherited"
)]

mod process;

use std::io;
use std::os::fd::AsFd;
use std::os::fd::BorrowedFd;
use std::os::fd::FromRawFd;
use std::os::fd::OwnedFd;
use std::os::fd::RawFd;

use rustix::io::FdFlags;
use rustix::pipe::PipeFlags;
use thiserror::Error;

/// Why there is no holder.
#[derive(Debug, Error)]
#[error("cannot {what}")]
pub struct HolderError {
    /// What was tried.
    what: &'static str,
    /// Why.
    #[source]
    source: io::Error,
}

/// What keeps the old address space: as long as one process has it open, the holder lives.
#[derive(Debug)]
pub struct Lease {
    fd: OwnedFd,
}

impl Lease {
    /// Takes over the lease that the program before this one had. Dropping it ends the holder.
    pub fn from_fd(fd: OwnedFd) -> Self {
        Self { fd }
    }
}

impl AsFd for Lease {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// Starts a process that keeps this one's address space, and those of its descriptors that `keep` says yes to, by what
/// the kernel calls them (as `anon_inode:kvm-vm`). It ends when the lease, close-on-exec, and every copy of it is closed.
///
/// The other threads of this process must not be in the midst of anything that others wait for: they end with the
/// `execve` that is to follow.
///
/// # Errors
/// [`HolderError`] if the kernel refuses a pipe or a process.
pub fn start(keep: impl Fn(&str) -> bool) -> Result<Lease, HolderError> {
    let failed = |what| move |source: io::Error| HolderError { what, source };
    let (waits, lease) =
        rustix::pipe::pipe_with(PipeFlags::CLOEXEC).map_err(|errno| failed("make a pipe")(errno.into()))?;
    let close = others(&keep, &waits).map_err(failed("list this process's descriptors"))?;
    process::start(&waits, close).map_err(failed("start a process"))?;
    Ok(Lease { fd: lease })
}

/// Descriptors of this process that are not to be kept.
fn others(keep: &impl Fn(&str) -> bool, waits: &OwnedFd) -> io::Result<Vec<RawFd>> {
    use std::os::fd::AsRawFd as _;
    let mut others = Vec::new();
    for entry in std::fs::read_dir("/proc/self/fd")? {
        let entry = entry?;
        let Some(number) = entry.file_name().to_str().and_then(|name| name.parse::<RawFd>().ok()) else {
            continue;
        };
        // The directory's own descriptor is closed by now, or is another's: then it is closed in the holder.
        let kept = std::fs::read_link(entry.path()).is_ok_and(|link| keep(&link.to_string_lossy()));
        if number != waits.as_raw_fd() && !kept {
            others.push(number);
        }
    }
    Ok(others)
}

/// Takes over a descriptor that the program before this one had [inherited](inherit), by its number. It is close-on-exec
/// from now on.
///
/// # Errors
/// EBADF if there is none; EPERM for standard input, output and error, and for one that is close-on-exec: this program
/// opened it itself, or has taken it over already.
pub fn inherited(number: RawFd) -> io::Result<OwnedFd> {
    if number <= 2 {
        return Err(io::Error::from_raw_os_error(libc::EPERM));
    }
    // SAFETY: used for two calls of fcntl, which answer EBADF if it is not open, and change nothing but its flag.
    let fd = unsafe { BorrowedFd::borrow_raw(number) };
    if rustix::io::fcntl_getfd(fd)?.contains(FdFlags::CLOEXEC) {
        return Err(io::Error::from_raw_os_error(libc::EPERM));
    }
    rustix::io::fcntl_setfd(fd, FdFlags::CLOEXEC)?;
    // SAFETY: it is open, and nothing in this program owns it: all that Rust's libraries and this project's crates open is
    // close-on-exec from the start, what was inherited is not until it is taken here, and that is once.
    Ok(unsafe { OwnedFd::from_raw_fd(number) })
}

/// Says whether a descriptor goes with this process into the program that it executes next.
///
/// # Errors
/// What the kernel answers.
pub fn inherit(fd: impl AsFd, inherit: bool) -> io::Result<()> {
    let flags = if inherit { FdFlags::empty() } else { FdFlags::CLOEXEC };
    Ok(rustix::io::fcntl_setfd(fd, flags)?)
}
