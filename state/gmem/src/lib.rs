//! Guest memory that outlives the VM object it serves.
//!
//! An [`Inode`] is the memory itself: its bytes, size and flags, and whose it is. A [`GmemFile`] is one VM
//! object's view of it: which of its pages the guest sees where. Memory is given to another VM object by
//! [linking](GmemFile::link) it, and only for the same machine. [`GmemHandler`] preserves an inode in a session, as
//! one extent however large it is.
//!
//! Memory may outlive a VM object and never its machine: when the one [`Owner`] is dropped, no slot, mapping or
//! descriptor of this process leads to it any more, whoever still knows the inode, a file or the mapping.
//!
//! [`Inode::freeze`] ends allocation and punching until the [`Freeze`] is dropped; it does not end reads,
//! writes or faults on pages that are there. It is a count, so freezes nest, and a gate of each inode's own,
//! so that one machine does not wait for another.
//!
//! # What may run together
//!
//! |           | fault on a hole | allocate | punch  | freeze | preserve | unpreserve |
//! |-----------|-----------------|----------|--------|--------|----------|------------|
//! | allocate  | kernel          | kernel   |        |        |          |            |
//! | punch     | kernel          | kernel   | kernel |        |          |            |
//! | freeze    | userfaultfd     | gate     | gate   | gate   |          |            |
//! | preserve  | whole           | whole    | whole  | count  | `&mut`   |            |
//! | unpreserve| whole           | whole    | whole  | count  | `&mut`   | `&mut`     |
//! | end       | unmapped        | gate     | gate   | gate   | gate     | gate       |
//!
//! A cell names what orders the two.
//!
//! - *kernel*: the file's own locks.
//! - *gate*: the inode's reader-writer lock, which allocate and punch hold shared, and freeze and the machine's end hold
//!   alone.
//! - *userfaultfd*: a MISSING registration of the mapping, made inside the gate and ended with the last freeze. A hole
//!   cannot be faulted in while a freeze stands, whether by a vCPU or by a thread of this process; another process that
//!   holds the region's descriptor is not bound.
//! - *whole*: nothing has to order them. What is preserved is the memory as one extent, not its pages, so it does not
//!   matter which are there at that moment.
//! - *count*: a hand-over adds a freeze of its own to one that stands, in one step inside the gate, and takes it away when
//!   it is called off or the session is dropped. So the others may end theirs at any time.
//! - *`&mut`*: the metadata has one writer, by its type.
//! - *unmapped*: after the machine's end a fault finds other memory at the address, and adds no page to the file.
//!
//! `tests/freeze_model.rs` walks every way in which threads can meet there, with the very code of the gate.
//!
//! Where userfaultfd cannot hold faults, there is nothing to hold: hugetlb memory has no holes, and those of a
//! [guest_memfd](GuestMemfd) are filled inside the gate, as they are where this process has no right to userfaultfd.
//!
//! Not here: mapping and warming (`region`), memory slots of KVM (`kvm`), crossing to another process
//! (carriers).
#![forbid(unsafe_code)]

mod end;
mod file;
mod fit;
mod freeze;
mod gate;
mod guest_memfd;
mod handler;
/// The locks of [`gate`]; a model of it has others.
mod sync {
    pub(crate) use std::sync::PoisonError;
    pub(crate) use std::sync::RwLock;
}

use std::sync::Arc;
use std::sync::Mutex;

use abi::gmem::MemoryName;
use abi::vm::Identity;
pub use end::End;
pub use end::Owner;
use end::Step;
use end::Teller;
pub use file::BindError;
pub use file::Binding;
pub use file::GmemFile;
pub use file::OpenError;
use file::View;
use fit::PrivatePages;
pub use fit::Sharing;
pub use fit::UnfitError;
pub use freeze::Freeze;
pub use freeze::FreezeError;
pub use freeze::Held;
use freeze::Holding;
use gate::Closed;
use gate::Gate;
pub use guest_memfd::GuestMemfd;
use guest_memfd::Maker;
pub use handler::GmemHandler;
use kvm::kvm_ioctls::VmFd;
use luo::FileId;
use pages::PageRange;
use region::Errno;
use region::Mapping;
use region::RegionError;
use region::Store;
use thiserror::Error;

/// Guest memory: bytes in a region of its own, and the machine that they belong to.
#[derive(Debug)]
pub struct Inode {
    id: FileId,
    name: MemoryName,
    identity: Identity,
    flags: u64,
    frames: PageRange,
    /// The VM object that made the file, if it is a guest_memfd and this process had it made. It is not kept alive by
    /// this, only not mistaken for another one.
    maker: Option<Maker>,
    owned: Mutex<bool>,
    private: Mutex<PrivatePages>,
    // From here on dropped in the order of the end. What a gate still holds, it holds of the mapping.
    gate: Gate<Holding>,
    mapping: Arc<Mapping>,
    _evicted: Step,
    files: Mutex<Vec<Arc<View>>>,
    _destroyed: Step,
    freed: Step,
}

/// Why pages were not added or taken away.
#[derive(Debug, Error)]
pub enum ChangeError {
    /// The machine that owns it is gone (EIO).
    #[error("guest memory {name} is nobody's any more: its machine is gone")]
    Ended {
        /// The memory.
        name: MemoryName,
    },
    /// The memory is frozen (EPERM): nothing may be added or taken away until the update is over.
    #[error("guest memory {name} is frozen for an update")]
    Frozen {
        /// The memory.
        name: MemoryName,
    },
    /// Not whole pages of it (EINVAL).
    #[error(
        "guest memory {name} has {size_bytes:#x} bytes, not {len_bytes:#x} at {offset_bytes:#x} in whole pages"
    )]
    Range {
        /// The memory.
        name: MemoryName,
        /// Its size.
        size_bytes: u64,
        /// First byte.
        offset_bytes: u64,
        /// Bytes.
        len_bytes: u64,
    },
    /// The kernel refused.
    #[error("cannot change the pages of guest memory {name}")]
    Region {
        /// The memory.
        name: MemoryName,
        /// Why.
        #[source]
        source: RegionError,
    },
}

impl ChangeError {
    /// The kernel's own error number, or the one that it gives for the same refusal.
    pub fn errno(&self) -> Errno {
        match self {
            Self::Ended { .. } => Errno::IO,
            Self::Frozen { .. } => Errno::PERM,
            Self::Region { source, .. } => source.errno(),
            Self::Range { offset_bytes, len_bytes, .. } => {
                // Its numbers are signed, and what is none at all is told first.
                let signed = |bytes: u64| i64::try_from(bytes).ok();
                match (signed(*offset_bytes), signed(*len_bytes)) {
                    (Some(offset), Some(len @ 1..)) if offset.checked_add(len).is_none() => Errno::FBIG,
                    _ => Errno::INVAL,
                }
            }
        }
    }
}

impl Inode {
    /// The memory of machine `identity` in `mapping`, whose place in the arena is `frames`. `flags` are
    /// those of [`abi::gmem::flags`].
    pub fn new(
        name: MemoryName,
        identity: Identity,
        mapping: Arc<Mapping>,
        frames: PageRange,
        flags: u64,
    ) -> Arc<Self> {
        Arc::new(Self::made_by(name, identity, mapping, frames, flags, None))
    }

    /// As [`Inode::new`], of memory in a mapping of this very [`GuestMemfd`], with whose flags it goes. The VM object
    /// that made it is known for as long as this process lives, and its slots are bound to the file.
    pub fn of_guest_memfd(
        name: MemoryName,
        identity: Identity,
        mapping: Arc<Mapping>,
        frames: PageRange,
        file: &GuestMemfd,
    ) -> Arc<Self> {
        let maker = Some(file.maker().clone());
        Arc::new(Self::made_by(name, identity, mapping, frames, file.flags(), maker))
    }

    fn made_by(
        name: MemoryName,
        identity: Identity,
        mapping: Arc<Mapping>,
        frames: PageRange,
        flags: u64,
        maker: Option<Maker>,
    ) -> Self {
        let teller = Arc::new(Teller::default());
        let step = |end| Step(end, Arc::clone(&teller));
        Self {
            id: FileId::fresh(),
            name,
            identity,
            flags,
            frames,
            maker,
            owned: Mutex::default(),
            private: Mutex::default(),
            gate: Gate::new(),
            mapping,
            _evicted: step(End::Evicted),
            files: Mutex::default(),
            _destroyed: step(End::Destroyed),
            freed: step(End::Freed),
        }
    }

    /// Whether its file is a guest_memfd that this VM object made.
    pub fn is_made_by(&self, vm: &Arc<VmFd>) -> bool {
        self.maker.as_ref().is_some_and(|maker| maker.is(vm))
    }

    /// What the VMM calls it.
    pub fn name(&self) -> MemoryName {
        self.name
    }

    /// The machine that it is memory of.
    pub fn identity(&self) -> Identity {
        self.identity
    }

    /// [`abi::gmem::flags`].
    pub fn flags(&self) -> u64 {
        self.flags
    }

    /// Its size, which never changes.
    pub fn size_bytes(&self) -> u64 {
        self.mapping.len_bytes()
    }

    /// Its place in the arena.
    pub fn frames(&self) -> PageRange {
        self.frames
    }

    /// Its bytes, in this process.
    pub fn mapping(&self) -> &Arc<Mapping> {
        &self.mapping
    }

    /// Gives pages memory before they are touched.
    ///
    /// # Errors
    /// [`ChangeError`]: arguments are checked before the freeze, so that their errors do not depend on it
    /// (objection O2.2).
    pub fn allocate(&self, offset_bytes: u64, len_bytes: u64) -> Result<(), ChangeError> {
        self.change(offset_bytes, len_bytes, |inode| inode.mapping.region().allocate(offset_bytes, len_bytes))
    }

    /// Gives pages back; they read as zero from now on.
    ///
    /// # Errors
    /// [`ChangeError`]; hugetlb memory gives none back.
    pub fn punch(&self, offset_bytes: u64, len_bytes: u64) -> Result<(), ChangeError> {
        self.change(offset_bytes, len_bytes, |inode| inode.mapping.region().punch(offset_bytes, len_bytes))
    }

    /// Makes every byte zero, as in new memory: for a guest that boots again. Pages are given back, but for those of
    /// hugetlb memory and at a path, which are written.
    ///
    /// # Errors
    /// [`ChangeError`]
    pub fn clear(&self) -> Result<(), ChangeError> {
        let size_bytes = self.size_bytes();
        self.change(0, size_bytes, |inode| match inode.mapping.region().store() {
            Store::Hugetlb | Store::Path => {
                // All of the mapping is in it.
                let _ = inode.mapping.write_zeros(0, size_bytes);
                Ok(())
            }
            Store::Memfd | Store::GuestMemfd => inode.mapping.region().punch(0, size_bytes),
        })
    }

    fn change(
        &self,
        offset_bytes: u64,
        len_bytes: u64,
        act: impl FnOnce(&Self) -> Result<(), RegionError>,
    ) -> Result<(), ChangeError> {
        let (name, size_bytes) = (self.name, self.size_bytes());
        let inside = PageRange::of_bytes(offset_bytes, len_bytes)
            .is_ok_and(|range| !range.is_empty() && range.end() <= self.frames.len_pages());
        if !inside {
            return Err(ChangeError::Range { name, size_bytes, offset_bytes, len_bytes });
        }
        match self.gate.change(|| act(self)) {
            Ok(changed) => changed.map_err(|source| ChangeError::Region { name, source }),
            Err(Closed::Frozen) => Err(ChangeError::Frozen { name }),
            Err(Closed::Ended) => Err(ChangeError::Ended { name }),
        }
    }
}
