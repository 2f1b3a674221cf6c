//! What the kernel says about the peer of a socket, by `getsockopt`.
//!
//! rustix has this call, but takes a process id of 0 for impossible; it is what the kernel gives for a peer
//! that this process's PID namespace does not show.

use std::ffi::c_int;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use rustix::io::Errno;

use crate::Peer;

/// `SO_PEERPIDFD`, since Linux 6.5; libc does not name it everywhere.
const SO_PEERPIDFD: c_int = 77;

/// Who made the other end. A process id of 0 is one that cannot be named here.
pub(crate) fn peer(socket: BorrowedFd<'_>) -> Result<Peer, Errno> {
    let mut credentials = libc::ucred { pid: 0, uid: u32::MAX, gid: u32::MAX };
    // SAFETY: `ucred` is the plain structure of integers that SO_PEERCRED fills.
    unsafe { get(socket, libc::SO_PEERCRED, &mut credentials) }?;
    Ok(Peer { pid: credentials.pid.unsigned_abs(), uid: credentials.uid, gid: credentials.gid })
}

/// A descriptor of the process that made the other end; `None` where the kernel is too old for it.
pub(crate) fn peer_pidfd(socket: BorrowedFd<'_>) -> Result<Option<OwnedFd>, Errno> {
    let mut fd: c_int = -1;
    // SAFETY: SO_PEERPIDFD fills an int.
    match unsafe { get(socket, SO_PEERPIDFD, &mut fd) } {
        // SAFETY: the kernel has just made this descriptor for us, and nobody else knows it.
        Ok(()) if fd >= 0 => Ok(Some(unsafe { OwnedFd::from_raw_fd(fd) })),
        Ok(()) => Ok(None),
        Err(Errno::NOPROTOOPT) => Ok(None),
        Err(errno) => Err(errno),
    }
}

/// Fills `value` with a socket option.
///
/// # Safety
/// Any bytes that the kernel gives for this option have to be a `T`.
unsafe fn get<T: Copy>(socket: BorrowedFd<'_>, option: c_int, value: &mut T) -> Result<(), Errno> {
    let whole = libc::socklen_t::try_from(size_of::<T>()).map_err(|_| Errno::OVERFLOW)?;
    let mut len = whole;
    let into = std::ptr::from_mut(value).cast();
    // SAFETY: `into` has room for `len` bytes, and the caller says that they may be any that come.
    let result =
        unsafe { libc::getsockopt(socket.as_raw_fd(), libc::SOL_SOCKET, option, into, &raw mut len) };
    if result != 0 {
        let errno = std::io::Error::last_os_error().raw_os_error().unwrap_or_default();
        return Err(Errno::from_raw_os_error(errno));
    }
    if len == whole { Ok(()) } else { Err(Errno::INVAL) }
}
