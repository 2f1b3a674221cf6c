//! One userfaultfd: opened, and told which ranges it is for.

use std::fmt;
use std::ops::Range;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::OFlags;
use rustix::io::Errno;

use crate::ioctl::{
    self, MESSAGE_BYTES, UFFD_EVENT_PAGEFAULT, UFFD_FEATURE_MINOR_HUGETLBFS, UFFD_FEATURE_MINOR_SHMEM,
    UFFD_FEATURE_MISSING_HUGETLBFS, UFFD_FEATURE_MISSING_SHMEM, UFFD_FEATURE_SIGBUS,
    UFFD_PAGEFAULT_FLAG_MINOR, UFFD_PAGEFAULT_FLAG_WRITE, UFFDIO_REGISTER_MODE_MINOR,
    UFFDIO_REGISTER_MODE_MISSING,
};
use crate::mapped::{Mapped, Span};

/// What an access to a hole meets in a range that is registered for missing faults.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OnHole {
    /// The thread waits until the range is unregistered or the page is there. It can be killed; a vCPU can be
    /// kicked out by a signal.
    Park,
    /// Nothing waits. A thread gets SIGBUS; a system call that was given the address answers EFAULT, `KVM_RUN`
    /// among them. Where KVM carries out the guest's instruction itself, `KVM_RUN` answers with an MMIO exit
    /// at the guest's address instead: one that is inside a memory slot is such a refusal, and a VMM that
    /// completes it like any other loses the guest's write.
    Refuse,
}

/// A set of the kernel's `UFFD_FEATURE_*`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Features(u64);

impl Features {
    /// The bits, as the kernel numbers them.
    #[must_use]
    pub const fn bits(self) -> u64 {
        self.0
    }

    /// Whether minor faults of ordinary memfds can be taken (x86-64 and arm64, since Linux 5.14).
    #[must_use]
    pub const fn minor(self) -> bool {
        self.0 & UFFD_FEATURE_MINOR_SHMEM != 0
    }

    /// Whether faults of hugetlb memfds can be taken, missing and minor ones.
    #[must_use]
    pub const fn hugetlb(self) -> bool {
        const BOTH: u64 = UFFD_FEATURE_MISSING_HUGETLBFS | UFFD_FEATURE_MINOR_HUGETLBFS;
        self.0 & BOTH == BOTH
    }
}

impl fmt::Display for Features {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        const NAMES: [(u64, &str); 5] = [
            (UFFD_FEATURE_MISSING_HUGETLBFS, "MISSING_HUGETLBFS"),
            (UFFD_FEATURE_MISSING_SHMEM, "MISSING_SHMEM"),
            (UFFD_FEATURE_SIGBUS, "SIGBUS"),
            (UFFD_FEATURE_MINOR_HUGETLBFS, "MINOR_HUGETLBFS"),
            (UFFD_FEATURE_MINOR_SHMEM, "MINOR_SHMEM"),
        ];
        let mut rest = self.0;
        let mut separator = "";
        for (bit, name) in NAMES {
            if rest & bit != 0 {
                write!(f, "{separator}{name}")?;
                separator = ", ";
                rest &= !bit;
            }
        }
        if rest != 0 || self.0 == 0 {
            write!(f, "{separator}{rest:#x}")?;
        }
        Ok(())
    }
}

/// Why there is no userfaultfd.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum OpenError {
    /// The kernel has it, but not for this user. KVM's faults are the kernel's, so a userfaultfd for faults
    /// of user mode alone would not do.
    #[error(
        "no right to a userfaultfd: give this user access to /dev/userfaultfd, or CAP_SYS_PTRACE, or set \
         vm.unprivileged_userfaultfd=1"
    )]
    NoRight {
        /// What the kernel answered.
        #[source]
        cause: Errno,
    },
    /// The kernel was built without it.
    #[error("the kernel has no userfaultfd (CONFIG_USERFAULTFD)")]
    NotInKernel {
        /// What the kernel answered.
        #[source]
        cause: Errno,
    },
    /// The kernel has it, but not all that is needed: it is too old, or of an architecture without minor
    /// faults.
    #[error("the kernel's userfaultfd lacks {missing}")]
    KernelTooOld {
        /// What is needed and not there.
        missing: Features,
    },
    /// Something else, such as too many open files.
    #[error("cannot open a userfaultfd")]
    Open {
        /// What the kernel answered.
        #[source]
        cause: Errno,
    },
}

impl OpenError {
    /// The kernel's error number.
    #[must_use]
    pub const fn errno(&self) -> Errno {
        match self {
            Self::NoRight { cause } | Self::NotInKernel { cause } | Self::Open { cause } => *cause,
            Self::KernelTooOld { .. } => Errno::INVAL,
        }
    }
}

/// A range that is not one of the mapping's.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("bytes {start:#x} to {end:#x} are not a range of whole pages in a mapping of {mapping_len:#x} bytes")]
pub struct RangeError {
    /// Offset of the first byte in the mapping.
    pub start: usize,
    /// Offset of the byte after the last.
    pub end: usize,
    /// How many bytes the mapping has.
    pub mapping_len: usize,
}

/// Why a call on a userfaultfd failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum CallError {
    /// The range is not one of the mapping's.
    #[error("the range is not in the mapping")]
    Range {
        /// Why not.
        #[source]
        cause: RangeError,
    },
    /// This kind of memory has no faults that can be taken: a real guest_memfd, a file on a disk or on DAX,
    /// or a hugetlb memfd on an old kernel.
    #[error("memory of this kind cannot be registered with a userfaultfd")]
    Unsupported,
    /// A userfaultfd from [`Uffd::open_refusing`] takes missing faults only: it would refuse access to pages
    /// that are present.
    #[error("a userfaultfd that refuses faults takes no minor ones")]
    MinorRefused,
    /// Another userfaultfd has it.
    #[error("the range is registered with another userfaultfd")]
    Busy,
    /// The kernel refused.
    #[error("cannot {action}")]
    Call {
        /// What was tried.
        action: &'static str,
        /// What the kernel answered.
        #[source]
        cause: Errno,
    },
}

impl CallError {
    /// The kernel's error number.
    #[must_use]
    pub const fn errno(&self) -> Errno {
        match self {
            Self::Range { .. } | Self::Unsupported | Self::MinorRefused => Errno::INVAL,
            Self::Busy => Errno::BUSY,
            Self::Call { cause, .. } => *cause,
        }
    }
}

impl From<RangeError> for CallError {
    fn from(cause: RangeError) -> Self {
        Self::Range { cause }
    }
}

/// Which faults of a range are taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// Accesses to holes.
    Missing,
    /// First accesses to pages that are present.
    Minor,
    /// Both.
    MissingAndMinor,
}

impl Mode {
    const fn bits(self) -> u64 {
        match self {
            Self::Missing => UFFDIO_REGISTER_MODE_MISSING,
            Self::Minor => UFFDIO_REGISTER_MODE_MINOR,
            Self::MissingAndMinor => UFFDIO_REGISTER_MODE_MISSING | UFFDIO_REGISTER_MODE_MINOR,
        }
    }
}

/// An access that waits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fault {
    /// The address of the page in this address space. See [`Fault::offset_in`].
    pub host_address: u64,
    /// Whether it was to write.
    pub write: bool,
    /// Whether the file has the page.
    pub kind: FaultKind,
}

/// Whether a fault met a hole.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FaultKind {
    /// It did.
    Missing,
    /// The page is there, and only this address space has no entry for it.
    Minor,
}

impl Fault {
    /// Where in the mapping it is, in bytes; `None` if it is elsewhere.
    #[must_use]
    pub fn offset_in(&self, mapped: &impl Mapped) -> Option<usize> {
        let address = usize::try_from(self.host_address).ok()?;
        let offset = address.checked_sub(mapped.host_address())?;
        (offset < mapped.len_bytes()).then_some(offset)
    }
}

/// How far [`Uffd::continue_range`] came.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Continued {
    /// Bytes for which it made entries, from the start of the range.
    pub bytes_mapped: usize,
    /// What ended it.
    pub stopped: Stopped,
}

/// What ended [`Uffd::continue_range`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stopped {
    /// The end of the range.
    AtEnd,
    /// A page that has an entry already.
    AtMapped,
    /// A hole.
    AtHole,
}

/// A userfaultfd of this process. Close-on-exec and non-blocking.
///
/// Dropping it ends all that is registered with it, and whatever is parked goes on. It must not be given to
/// another process: that one could not read this address space, but its copy would keep what is parked from
/// going on when this process dies.
#[derive(Debug)]
pub struct Uffd {
    fd: OwnedFd,
    features: Features,
    on_hole: OnHole,
}

impl Uffd {
    /// A userfaultfd whose faults park. It sees the kernel's own faults too, as KVM's are.
    ///
    /// `/dev/userfaultfd` is tried before the system call: access to a file is a smaller right to give than
    /// what the call wants.
    ///
    /// # Errors
    ///
    /// [`OpenError`].
    pub fn open() -> Result<Self, OpenError> {
        Self::open_with(OnHole::Park, UFFD_FEATURE_MISSING_SHMEM | UFFD_FEATURE_MINOR_SHMEM)
    }

    /// A userfaultfd that [refuses](OnHole::Refuse) missing faults. It takes no minor ones, and so runs on
    /// more kernels.
    ///
    /// # Errors
    ///
    /// [`OpenError`].
    pub fn open_refusing() -> Result<Self, OpenError> {
        Self::open_with(OnHole::Refuse, UFFD_FEATURE_MISSING_SHMEM | UFFD_FEATURE_SIGBUS)
    }

    fn open_with(on_hole: OnHole, required: u64) -> Result<Self, OpenError> {
        let fd = new_fd()?;
        match ioctl::api(fd.as_fd(), required) {
            Ok(features) => Ok(Self { fd, features: Features(features), on_hole }),
            // The kernel does not say what it lacks, and a userfaultfd can be asked only once.
            Err(Errno::INVAL) => {
                let present = ioctl::api(new_fd()?.as_fd(), 0).unwrap_or(0);
                Err(OpenError::KernelTooOld { missing: Features(required & !present) })
            }
            Err(cause) => Err(OpenError::Open { cause }),
        }
    }

    /// All that this kernel has, whether it was asked for or not. The features for hugetlb need no asking.
    #[must_use]
    pub const fn features(&self) -> Features {
        self.features
    }

    /// What a missing fault meets.
    #[must_use]
    pub const fn on_hole(&self) -> OnHole {
        self.on_hole
    }

    /// Takes the faults of a range, from when this returns. An access that is under way is waited for. It
    /// costs the same for a page as for terabytes.
    ///
    /// # Errors
    ///
    /// [`CallError`].
    pub fn register(&self, mapped: &impl Mapped, range: Range<usize>, mode: Mode) -> Result<(), CallError> {
        let span = Span::of(mapped, range)?;
        self.register_span(span, mode)
    }

    pub(crate) fn register_span(&self, span: Span, mode: Mode) -> Result<(), CallError> {
        if self.on_hole == OnHole::Refuse && mode != Mode::Missing {
            return Err(CallError::MinorRefused);
        }
        ioctl::register(self.fd.as_fd(), span, mode.bits()).map_err(|cause| match cause {
            Errno::INVAL => CallError::Unsupported,
            Errno::BUSY => CallError::Busy,
            cause => CallError::Call { action: "register the range", cause },
        })
    }

    /// Takes the faults of a range no more. What is parked there goes on.
    ///
    /// # Errors
    ///
    /// [`CallError`].
    pub fn unregister(&self, mapped: &impl Mapped, range: Range<usize>) -> Result<(), CallError> {
        let span = Span::of(mapped, range)?;
        self.unregister_span(span)
    }

    pub(crate) fn unregister_span(&self, span: Span) -> Result<(), CallError> {
        ioctl::unregister(self.fd.as_fd(), span)
            .map_err(|cause| CallError::Call { action: "unregister the range", cause })
    }

    /// Has what is parked in a range try again.
    ///
    /// # Errors
    ///
    /// [`CallError`].
    pub fn wake(&self, mapped: &impl Mapped, range: Range<usize>) -> Result<(), CallError> {
        let span = Span::of(mapped, range)?;
        self.wake_span(span)
    }

    pub(crate) fn wake_span(&self, span: Span) -> Result<(), CallError> {
        ioctl::wake(self.fd.as_fd(), span)
            .map_err(|cause| CallError::Call { action: "wake the range", cause })
    }

    /// Makes entries for the pages that are present, from the start of the range up to its end, a page that
    /// has an entry or a hole, and wakes those that wait for one of them. The range must be registered with
    /// this userfaultfd.
    ///
    /// Each entry is for a page of the smallest size that the file has, also where the file holds a
    /// transparent huge page: a vCPU then pays for each small page, until `MADV_COLLAPSE` makes the entry
    /// whole again.
    ///
    /// # Errors
    ///
    /// [`CallError`].
    pub fn continue_range(&self, mapped: &impl Mapped, range: Range<usize>) -> Result<Continued, CallError> {
        let span = Span::of(mapped, range)?;
        let mut done = 0;
        while done < span.len {
            let rest = Span { address: span.address + done, len: span.len - done };
            let (mapped, result) = ioctl::continue_range(self.fd.as_fd(), rest);
            done += mapped.min(rest.len);
            let stopped = match result {
                Ok(()) => Stopped::AtEnd,
                Err(Errno::EXIST) => Stopped::AtMapped,
                Err(Errno::FAULT) => Stopped::AtHole,
                // It came part of the way; why not further, only the next call tells.
                Err(Errno::AGAIN) if mapped > 0 => continue,
                Err(cause) => return Err(CallError::Call { action: "continue the range", cause }),
            };
            return Ok(Continued { bytes_mapped: done, stopped });
        }
        Ok(Continued { bytes_mapped: done, stopped: Stopped::AtEnd })
    }

    /// Makes every access to these pages fail, in this address space and for good, as if the hardware had lost them: SIGBUS
    /// to a thread, EHWPOISON or EFAULT to a system call. The pages must have no entry yet, and be registered with this
    /// userfaultfd. So a lost page is told again to an address space that never touched it (poison is not the file's),
    /// and what happens then can be tried. Since Linux 6.6.
    ///
    /// # Errors
    ///
    /// [`CallError`].
    pub fn poison(&self, mapped: &impl Mapped, range: Range<usize>) -> Result<(), CallError> {
        let span = Span::of(mapped, range)?;
        ioctl::poison(self.fd.as_fd(), span)
            .map_err(|cause| CallError::Call { action: "poison the range", cause })
    }

    /// A fault that is parked and has not been told yet, if there is one by the end of `timeout`.
    ///
    /// Each is told once, and again if it is woken and faults anew. A vCPU's fault may come from a kernel
    /// worker in its stead.
    ///
    /// # Errors
    ///
    /// [`CallError::Call`].
    pub fn wait_fault(&self, timeout: Duration) -> Result<Option<Fault>, CallError> {
        wait_fault(self.fd.as_fd(), timeout)
    }

    /// Another descriptor of it. As long as that is open, closing this one lets nothing go on.
    pub(crate) fn duplicate(&self) -> Result<OwnedFd, CallError> {
        let copied = self.fd.try_clone();
        let copied = copied.map_err(|error| Errno::from_io_error(&error).unwrap_or(Errno::MFILE));
        copied.map(raised).map_err(|cause| CallError::Call { action: "copy the descriptor", cause })
    }
}

/// See [`Uffd::wait_fault`].
pub(crate) fn wait_fault(fd: BorrowedFd<'_>, timeout: Duration) -> Result<Option<Fault>, CallError> {
    let failed = |cause| CallError::Call { action: "read a fault", cause };
    let end = Instant::now().checked_add(timeout);
    loop {
        let mut message = [0; MESSAGE_BYTES];
        match rustix::io::read(fd, &mut message) {
            Ok(MESSAGE_BYTES) => {
                if let Some(fault) = parse(&message) {
                    return Ok(Some(fault));
                }
            }
            Ok(_short) => return Err(failed(Errno::IO)),
            Err(Errno::INTR) => {}
            Err(Errno::AGAIN) => {
                let left = end.map(|end| end.saturating_duration_since(Instant::now()));
                if left == Some(Duration::ZERO) {
                    return Ok(None);
                }
                let left = left.and_then(|left| Timespec::try_from(left).ok());
                match poll(&mut [PollFd::from_borrowed_fd(fd, PollFlags::IN)], left.as_ref()) {
                    Ok(_) | Err(Errno::INTR) => {}
                    Err(cause) => return Err(failed(cause)),
                }
            }
            Err(cause) => return Err(failed(cause)),
        }
    }
}

impl AsFd for Uffd {
    /// To wait for faults together with other descriptors.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// The same under a number above those of any VM and vCPU, if the process may have such a one.
///
/// The kernel closes the descriptors of a process that dies from the highest to the lowest. The close of a VM waits, out of
/// reach of any signal, for KVM's worker that is parked in a fault, and that one for the close of the userfaultfd: it
/// has to come first, or the process never ends.
fn raised(fd: OwnedFd) -> OwnedFd {
    let raise = |at| rustix::io::fcntl_dupfd_cloexec(&fd, at).ok();
    [4096, 512].into_iter().find_map(raise).unwrap_or(fd)
}

fn new_fd() -> Result<OwnedFd, OpenError> {
    open_fd().map(raised)
}

fn open_fd() -> Result<OwnedFd, OpenError> {
    let flags = OFlags::RDWR | OFlags::CLOEXEC;
    let device = rustix::fs::open("/dev/userfaultfd", flags, rustix::fs::Mode::empty());
    if let Ok(fd) = device.and_then(|device| ioctl::new_from_device(device.as_fd())) {
        return Ok(fd);
    }
    ioctl::new_from_syscall().map_err(|cause| match cause {
        Errno::PERM | Errno::ACCESS => OpenError::NoRight { cause },
        Errno::NOSYS => OpenError::NotInKernel { cause },
        cause => OpenError::Open { cause },
    })
}

/// Reads a `struct uffd_msg`. `None` for an event that is not a fault, which nobody has asked for.
fn parse(message: &[u8; MESSAGE_BYTES]) -> Option<Fault> {
    let word = |at: usize| {
        let bytes = message.get(at..)?.first_chunk()?;
        #[expect(
            clippy::host_endian_bytes,
            reason = "the kernel writes its structures in the host's byte order"
        )]
        let word = u64::from_ne_bytes(*bytes);
        Some(word)
    };
    if message[0] != UFFD_EVENT_PAGEFAULT {
        return None;
    }
    let flags = word(8)?;
    Some(Fault {
        host_address: word(16)?,
        write: flags & UFFD_PAGEFAULT_FLAG_WRITE != 0,
        kind: if flags & UFFD_PAGEFAULT_FLAG_MINOR != 0 { FaultKind::Minor } else { FaultKind::Missing },
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_fault_is_read_as_the_kernel_writes_it() {
        let mut message = [0; MESSAGE_BYTES];
        message[0] = UFFD_EVENT_PAGEFAULT;
        #[expect(
            clippy::host_endian_bytes,
            reason = "the kernel writes its structures in the host's byte order"
        )]
        {
            message[8..16].copy_from_slice(&5_u64.to_ne_bytes());
            message[16..24].copy_from_slice(&0x7f00_1234_5000_u64.to_ne_bytes());
        }
        let fault = Fault { host_address: 0x7f00_1234_5000, write: true, kind: FaultKind::Minor };
        assert_eq!(parse(&message), Some(fault));
        message[8] = 0;
        assert_eq!(parse(&message), Some(Fault { write: false, kind: FaultKind::Missing, ..fault }));
        message[0] = 0x15;
        assert_eq!(parse(&message), None);
    }

    #[test]
    fn features_are_named() {
        let both = Features(UFFD_FEATURE_MISSING_SHMEM | UFFD_FEATURE_MINOR_SHMEM);
        assert_eq!(both.to_string(), "MISSING_SHMEM, MINOR_SHMEM");
        assert_eq!(Features(UFFD_FEATURE_SIGBUS | 1).to_string(), "SIGBUS, 0x1");
        assert_eq!(Features(0).to_string(), "0x0");
    }
}
