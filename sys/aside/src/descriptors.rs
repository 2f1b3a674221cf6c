//! Descriptors that go with this process into the program that it executes next.

use std::io;
use std::os::fd::AsFd;
use std::os::fd::BorrowedFd;
use std::os::fd::FromRawFd;
use std::os::fd::OwnedFd;
use std::os::fd::RawFd;

use rustix::io::FdFlags;

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
