//! The seven ioctls, the read and the one madvise, as the kernel's header `linux/userfaultfd.h` defines them,
//! and nothing but them.

use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use libc::{_IO, _IOR, _IOWR};
use rustix::io::Errno;

use crate::mapped::Span;

/// The version of the interface that `UFFDIO_API` agrees on; also the letter of its ioctls.
const UFFD_API: u64 = 0xaa;
const LETTER: u32 = 0xaa;

const USERFAULTFD_IOC_NEW: libc::Ioctl = _IO(LETTER, 0x00);
const UFFDIO_REGISTER: libc::Ioctl = _IOWR::<RegisterArgument>(LETTER, 0x00);
const UFFDIO_UNREGISTER: libc::Ioctl = _IOR::<RangeArgument>(LETTER, 0x01);
const UFFDIO_WAKE: libc::Ioctl = _IOR::<RangeArgument>(LETTER, 0x02);
const UFFDIO_CONTINUE: libc::Ioctl = _IOWR::<ContinueArgument>(LETTER, 0x07);
const UFFDIO_POISON: libc::Ioctl = _IOWR::<PoisonArgument>(LETTER, 0x08);
const UFFDIO_API: libc::Ioctl = _IOWR::<ApiArgument>(LETTER, 0x3f);

pub(crate) const UFFD_FEATURE_MISSING_HUGETLBFS: u64 = 1 << 4;
pub(crate) const UFFD_FEATURE_MISSING_SHMEM: u64 = 1 << 5;
pub(crate) const UFFD_FEATURE_SIGBUS: u64 = 1 << 7;
pub(crate) const UFFD_FEATURE_MINOR_HUGETLBFS: u64 = 1 << 9;
pub(crate) const UFFD_FEATURE_MINOR_SHMEM: u64 = 1 << 10;

pub(crate) const UFFDIO_REGISTER_MODE_MISSING: u64 = 1 << 0;
pub(crate) const UFFDIO_REGISTER_MODE_MINOR: u64 = 1 << 2;

pub(crate) const UFFD_EVENT_PAGEFAULT: u8 = 0x12;
pub(crate) const UFFD_PAGEFAULT_FLAG_WRITE: u64 = 1 << 0;
pub(crate) const UFFD_PAGEFAULT_FLAG_MINOR: u64 = 1 << 2;

/// The length of `struct uffd_msg`.
pub(crate) const MESSAGE_BYTES: usize = 32;

#[repr(C)]
struct ApiArgument {
    api: u64,
    features: u64,
    ioctls: u64,
}

#[repr(C)]
struct RangeArgument {
    start: u64,
    len: u64,
}

#[repr(C)]
struct RegisterArgument {
    range: RangeArgument,
    mode: u64,
    ioctls: u64,
}

#[repr(C)]
struct ContinueArgument {
    range: RangeArgument,
    mode: u64,
    mapped: i64,
}

#[repr(C)]
struct PoisonArgument {
    range: RangeArgument,
    mode: u64,
    updated: i64,
}

// The header's sizes are part of each ioctl's number, so a wrong one would be an unknown ioctl.
const _: () = assert!(
    size_of::<ApiArgument>() == 24
        && size_of::<RangeArgument>() == 16
        && size_of::<RegisterArgument>() == 32
        && size_of::<ContinueArgument>() == 32
        && size_of::<PoisonArgument>() == 32
);

impl From<Span> for RangeArgument {
    fn from(span: Span) -> Self {
        // An address has at most 64 bits on every Linux.
        Self { start: span.address as u64, len: span.len as u64 }
    }
}

/// A system call's answer as a result.
fn answer(returned: libc::c_int) -> Result<libc::c_int, Errno> {
    if returned >= 0 {
        return Ok(returned);
    }
    let error = std::io::Error::last_os_error();
    Err(Errno::from_io_error(&error).unwrap_or(Errno::IO))
}

/// A new userfaultfd from the open `/dev/userfaultfd`.
pub(crate) fn new_from_device(device: BorrowedFd<'_>) -> Result<OwnedFd, Errno> {
    // SAFETY: this ioctl takes flags by value and no address.
    let fd = answer(unsafe {
        libc::ioctl(device.as_raw_fd(), USERFAULTFD_IOC_NEW, libc::O_CLOEXEC | libc::O_NONBLOCK)
    })?;
    // SAFETY: the kernel has just made it for us, and nobody else knows it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// A new userfaultfd from the system call, for faults of user and of kernel mode.
pub(crate) fn new_from_syscall() -> Result<OwnedFd, Errno> {
    let flags = rustix::mm::UserfaultfdFlags::CLOEXEC | rustix::mm::UserfaultfdFlags::NONBLOCK;
    // SAFETY: as long as nothing is registered with it, it has no effect on memory; what is, is a `Span`.
    unsafe { rustix::mm::userfaultfd(flags) }
}

/// Agrees on the version and asks for `features`, once in a userfaultfd's life. Answers with all that the
/// kernel has.
pub(crate) fn api(uffd: BorrowedFd<'_>, features: u64) -> Result<u64, Errno> {
    let mut argument = ApiArgument { api: UFFD_API, features, ioctls: 0 };
    // SAFETY: the argument is ours and of the type that this number stands for.
    answer(unsafe { libc::ioctl(uffd.as_raw_fd(), UFFDIO_API, &raw mut argument) })?;
    Ok(argument.features)
}

pub(crate) fn register(uffd: BorrowedFd<'_>, span: Span, mode: u64) -> Result<(), Errno> {
    let mut argument = RegisterArgument { range: span.into(), mode, ioctls: 0 };
    // SAFETY:
    // 1. The argument is ours and of the type that this number stands for.
    // 2. Registering changes no byte and no entry of the range; it makes faults wait or fail.
    answer(unsafe { libc::ioctl(uffd.as_raw_fd(), UFFDIO_REGISTER, &raw mut argument) })?;
    Ok(())
}

pub(crate) fn unregister(uffd: BorrowedFd<'_>, span: Span) -> Result<(), Errno> {
    let mut argument = RangeArgument::from(span);
    // SAFETY:
    // 1. The argument is ours and of the type that this number stands for.
    // 2. Faults of the range are again as for any memory.
    answer(unsafe { libc::ioctl(uffd.as_raw_fd(), UFFDIO_UNREGISTER, &raw mut argument) })?;
    Ok(())
}

/// Has every thread that is parked in the range try again. Whether the range is mapped does not matter.
pub(crate) fn wake(uffd: BorrowedFd<'_>, span: Span) -> Result<(), Errno> {
    let mut argument = RangeArgument::from(span);
    // SAFETY:
    // 1. The argument is ours and of the type that this number stands for.
    // 2. A woken access is an access like the first: it faults anew if nothing has changed.
    answer(unsafe { libc::ioctl(uffd.as_raw_fd(), UFFDIO_WAKE, &raw mut argument) })?;
    Ok(())
}

/// Makes entries for pages that are in the file. What the kernel has done is in the first part of the answer,
/// also where it stopped early.
pub(crate) fn continue_range(uffd: BorrowedFd<'_>, span: Span) -> (usize, Result<(), Errno>) {
    let mut argument = ContinueArgument { range: span.into(), mode: 0, mapped: 0 };
    // SAFETY:
    // 1. The argument is ours and of the type that this number stands for.
    // 2. The range is in a shared mapping, by the contract of `Mapped`: the entries that the kernel makes lead to
    //    the file's own pages, as those would that an access makes.
    let result = answer(unsafe { libc::ioctl(uffd.as_raw_fd(), UFFDIO_CONTINUE, &raw mut argument) });
    // Negative: an errno, which the call has also returned.
    let mapped = usize::try_from(argument.mapped).unwrap_or(0);
    (mapped, result.map(|_zero| ()))
}

/// Marks pages that have no entry as lost.
pub(crate) fn poison(uffd: BorrowedFd<'_>, span: Span) -> Result<(), Errno> {
    let mut argument = PoisonArgument { range: span.into(), mode: 0, updated: 0 };
    // SAFETY:
    // 1. The argument is ours and of the type that this number stands for.
    // 2. An access to what has no entry is one that may fail to get one; no byte of the file changes.
    answer(unsafe { libc::ioctl(uffd.as_raw_fd(), UFFDIO_POISON, &raw mut argument) })?;
    Ok(())
}

/// Whether each page of the range is in memory: one byte for each, its lowest bit. `pages` has as many.
pub(crate) fn in_memory(span: Span, pages: &mut [u8]) -> Result<(), Errno> {
    assert!(pages.len() >= span.len.div_ceil(crate::mapped::page_size()));
    let address = std::ptr::with_exposed_provenance_mut(span.address);
    // SAFETY: the kernel writes a byte for each page of the range, and `pages` has as many, as asserted; the range is
    // looked up, not touched.
    answer(unsafe { libc::mincore(address, span.len, pages.as_mut_ptr()) })?;
    Ok(())
}

/// Makes entries for the range as if each page of it were read.
pub(crate) fn populate_read(span: Span) -> Result<(), Errno> {
    let address = std::ptr::with_exposed_provenance_mut(span.address);
    // SAFETY: the range is in a shared mapping, by the contract of `Mapped`, of which the caller holds a
    // borrow; reading such memory changes no byte of it, and no reference to its bytes exists that a new page
    // could belie.
    answer(unsafe { libc::madvise(address, span.len, libc::MADV_POPULATE_READ) })?;
    Ok(())
}
