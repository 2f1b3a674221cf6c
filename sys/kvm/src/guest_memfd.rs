//! guest_memfd: memory whose file belongs to KVM.
//!
//! A *guest_memfd* is made for one VM and holds a reference on it: the kernel's VM object lives until
//! the file is closed and every mapping of it is gone, so a guest_memfd that is handed over keeps its
//! first VM alive. It can be bound to memory slots of that VM only; in any other VM its mapping serves
//! as plain memory.
//!
//! It cannot be read, written, resized or sealed, and its pages cannot be reached by a mapping unless
//! it is made with [`GuestMemfdFlags::MMAP`], nor be touched through one unless also with
//! [`GuestMemfdFlags::INIT_SHARED`].

use std::fmt;
use std::ops::BitOr;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

use kvm_bindings::{KVM_CAP_GUEST_MEMFD, kvm_create_guest_memfd};
use kvm_ioctls::VmFd;
use region::Errno;

use crate::PAGE_SIZE;
use crate::capabilities::extension;

/// `KVM_CAP_GUEST_MEMFD_FLAGS`: which flags `KVM_CREATE_GUEST_MEMFD` takes. Newer than the bindings.
const KVM_CAP_GUEST_MEMFD_FLAGS: u32 = 244;

/// How a guest_memfd is made (`GUEST_MEMFD_FLAG_*`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct GuestMemfdFlags(u64);

impl GuestMemfdFlags {
    /// No flag: memory that only the guest reaches.
    pub const NONE: Self = Self(0);
    /// The file can be mapped.
    pub const MMAP: Self = Self(1);
    /// Its memory starts out shared with the host, and so can be touched through a mapping.
    pub const INIT_SHARED: Self = Self(2);

    /// The flags as the kernel's bits.
    #[must_use]
    pub const fn bits(self) -> u64 {
        self.0
    }

    /// Whether every flag of `other` is among these.
    #[must_use]
    pub const fn contains(self, other: Self) -> bool {
        self.0 & other.0 == other.0
    }

    /// Those of these flags that are not among `other`.
    #[must_use]
    pub const fn without(self, other: Self) -> Self {
        Self(self.0 & !other.0)
    }
}

impl BitOr for GuestMemfdFlags {
    type Output = Self;

    fn bitor(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }
}

impl fmt::Display for GuestMemfdFlags {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#x}", self.0)
    }
}

/// Why [`create`] refused.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum GuestMemfdError {
    /// This KVM makes no guest_memfd for this kind of VM.
    #[error("this KVM has no guest_memfd for this VM")]
    Unsupported,
    /// This KVM does not take all of the flags.
    #[error("this KVM does not take the guest_memfd flags {refused}, only {accepted}")]
    Flags {
        /// The flags asked for that it does not take.
        refused: GuestMemfdFlags,
        /// All flags that it takes.
        accepted: GuestMemfdFlags,
    },
    /// The size is zero or no multiple of the page size.
    #[error("a guest_memfd of {size_bytes} bytes is not one of whole pages")]
    Size {
        /// The size asked for.
        size_bytes: u64,
    },
    /// The kernel refused.
    #[error("KVM_CREATE_GUEST_MEMFD of {size_bytes} bytes with flags {flags} failed")]
    Create {
        /// The size asked for.
        size_bytes: u64,
        /// The flags asked for.
        flags: GuestMemfdFlags,
        /// What the kernel said.
        #[source]
        source: kvm_ioctls::Error,
    },
}

impl GuestMemfdError {
    /// KVM's own error number, or the one that it gives for the same refusal.
    #[must_use]
    pub fn errno(&self) -> Errno {
        match self {
            Self::Unsupported => Errno::NOTTY,
            Self::Flags { .. } | Self::Size { .. } => Errno::INVAL,
            Self::Create { source, .. } => Errno::from_raw_os_error(source.errno()),
        }
    }
}

/// The flags that a guest_memfd of this VM can have, or `None` if it can have no guest_memfd.
pub(crate) fn accepted_flags(vm: &VmFd) -> Option<GuestMemfdFlags> {
    (extension(vm, KVM_CAP_GUEST_MEMFD) > 0)
        .then(|| GuestMemfdFlags(u64::from(extension(vm, KVM_CAP_GUEST_MEMFD_FLAGS))))
}

/// What KVM is asked for. KVM does not look at the fields that are kept for later, and will one day.
const fn request(size_bytes: u64, flags: GuestMemfdFlags) -> kvm_create_guest_memfd {
    kvm_create_guest_memfd { size: size_bytes, flags: flags.bits(), reserved: [0; 6] }
}

/// Makes a guest_memfd for this VM, `size_bytes` long, without memory in it yet. Close-on-exec.
///
/// # Errors
///
/// See [`GuestMemfdError`]; what this KVM cannot do is refused before it is asked.
pub fn create(vm: &VmFd, size_bytes: u64, flags: GuestMemfdFlags) -> Result<OwnedFd, GuestMemfdError> {
    let accepted = accepted_flags(vm).ok_or(GuestMemfdError::Unsupported)?;
    if !accepted.contains(flags) {
        return Err(GuestMemfdError::Flags { refused: flags.without(accepted), accepted });
    }
    if size_bytes == 0 || !size_bytes.is_multiple_of(PAGE_SIZE) {
        return Err(GuestMemfdError::Size { size_bytes });
    }
    let fd = vm.create_guest_memfd(request(size_bytes, flags)).map_err(|source| GuestMemfdError::Create {
        size_bytes,
        flags,
        source,
    })?;
    // SAFETY: the ioctl succeeded, so `fd` is a descriptor that it opened just now, and nobody else has
    // been told its number.
    let fd = unsafe { OwnedFd::from_raw_fd(fd) };
    // KVM leaves it open over an exec: a program started by chance would keep guest memory and the VM object.
    // SAFETY: sets a flag of a descriptor that is ours, which cannot fail.
    unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_SETFD, libc::FD_CLOEXEC) };
    Ok(fd)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// G5.2.5.
    #[test]
    fn fields_that_are_kept_for_later_are_zero() {
        let request = request(1 << 20, GuestMemfdFlags::MMAP | GuestMemfdFlags::INIT_SHARED);
        assert_eq!((request.size, request.flags, request.reserved), (1 << 20, 3, [0; 6]));
    }
}
