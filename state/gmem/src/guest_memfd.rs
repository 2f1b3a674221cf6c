//! Guest memory that KVM made: a guest_memfd, and the VM object that it belongs to.

use std::os::fd::AsFd;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::Weak;

use abi::gmem::flags;
use kvm::GuestMemfdError;
use kvm::GuestMemfdFlags;
use kvm::guest_memfd;
use kvm::kvm_ioctls::VmFd;
use region::PageSize;
use region::Region;
use region::RegionError;
use region::Store;

/// Our numbers for KVM's flags.
const FLAGS: [(GuestMemfdFlags, u64); 2] =
    [(GuestMemfdFlags::MMAP, flags::MMAP), (GuestMemfdFlags::INIT_SHARED, flags::INIT_SHARED)];

/// A guest_memfd that the host can map and touch, made for a VM object. To that one it is bound; any other VM object,
/// here or in another process, is given its mapping as plain memory. As long as it is open or mapped anywhere, the
/// kernel keeps the VM object that made it, which by then may be nothing but that.
#[derive(Debug)]
pub struct GuestMemfd {
    fd: OwnedFd,
    size_bytes: u64,
    flags: GuestMemfdFlags,
    maker: Weak<VmFd>,
}

impl GuestMemfd {
    /// Has a VM object make one of `size_bytes` bytes, without pages. [`kvm::VmBuilder::fd`] is the VM object's.
    ///
    /// # Errors
    /// [`GuestMemfdError`]: this KVM makes none, or none that the host can map and touch (before Linux 6.18), or not of
    /// this size.
    pub fn create(vm: &Arc<VmFd>, size_bytes: u64) -> Result<Self, GuestMemfdError> {
        let flags = GuestMemfdFlags::MMAP | GuestMemfdFlags::INIT_SHARED;
        let fd = guest_memfd::create(vm, size_bytes, flags)?;
        Ok(Self { fd, size_bytes, flags, maker: Arc::downgrade(vm) })
    }

    /// Its size, in bytes.
    pub fn size_bytes(&self) -> u64 {
        self.size_bytes
    }

    /// It as a region, by another descriptor of its one file.
    ///
    /// # Errors
    /// [`RegionError`] if there is no descriptor left.
    pub fn region(&self, name: &str) -> Result<Region, RegionError> {
        let fd = self.fd.as_fd().try_clone_to_owned();
        let copied =
            |source| RegionError::Call { what: "copy the descriptor of", name: name.to_owned(), source };
        Region::accept_as(name, fd.map_err(copied)?, self.size_bytes, Store::GuestMemfd, PageSize::Small)
    }

    pub(crate) fn maker(&self) -> &Weak<VmFd> {
        &self.maker
    }

    /// Its flags, by [our numbers](abi::gmem::flags).
    pub(crate) fn flags(&self) -> u64 {
        FLAGS.iter().filter(|(kvms, _)| self.flags.contains(*kvms)).fold(0, |all, (_, ours)| all | ours)
    }
}
