//! Guest memory that KVM made: a guest_memfd, and the VM object that it belongs to.

use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::Mutex;
use std::sync::PoisonError;
use std::sync::Weak;

use abi::gmem::flags;
use kvm::GuestMemfdError;
use kvm::GuestMemfdFlags;
use kvm::guest_memfd;
use kvm::kvm_ioctls::VmFd;
use region::Errno;
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
    size_bytes: u64,
    flags: GuestMemfdFlags,
    maker: Maker,
}

/// Who made it, and the descriptor that came of that.
#[derive(Debug, Clone)]
pub(crate) struct Maker {
    vm: Weak<VmFd>,
    /// None once the machine whose memory it was is gone.
    fd: Arc<Mutex<Option<OwnedFd>>>,
}

impl Maker {
    /// Whether it is this VM object. A `Weak` keeps its place in memory, so no other one can have the same.
    pub(crate) fn is(&self, vm: &Arc<VmFd>) -> bool {
        self.vm.as_ptr() == Arc::as_ptr(vm)
    }

    /// Closes the descriptor.
    pub(crate) fn let_go(&self) {
        *self.fd.lock().unwrap_or_else(PoisonError::into_inner) = None;
    }
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
        let maker = Maker { vm: Arc::downgrade(vm), fd: Arc::new(Mutex::new(Some(fd))) };
        Ok(Self { size_bytes, flags, maker })
    }

    /// Its size, in bytes.
    pub fn size_bytes(&self) -> u64 {
        self.size_bytes
    }

    /// It as a region, by another descriptor of its one file.
    ///
    /// # Errors
    /// [`RegionError`] if there is no descriptor left, or (EBADF) if the machine whose memory it was is gone.
    pub fn region(&self, name: &str) -> Result<Region, RegionError> {
        let kept = self.maker.fd.lock().unwrap_or_else(PoisonError::into_inner);
        let fd = kept.as_ref().map_or(Err(Errno::BADF.into()), OwnedFd::try_clone);
        let copied =
            |source| RegionError::Call { what: "copy the descriptor of", name: name.to_owned(), source };
        Region::accept_as(name, fd.map_err(copied)?, self.size_bytes, Store::GuestMemfd, PageSize::Small)
    }

    pub(crate) fn maker(&self) -> &Maker {
        &self.maker
    }

    /// Its flags, by [our numbers](abi::gmem::flags).
    pub(crate) fn flags(&self) -> u64 {
        FLAGS.iter().filter(|(kvms, _)| self.flags.contains(*kvms)).fold(0, |all, (_, ours)| all | ours)
    }
}
