//! One VM object's view of guest memory.

use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::Mutex;
use std::sync::MutexGuard;
use std::sync::PoisonError;
use std::sync::Weak;

use abi::gmem::MemoryName;
use abi::vm::Identity;
use kvm::MemorySlots;
use kvm::SlotError;
use kvm::SlotFlags;
use kvm::SlotHandle;
use kvm::kvm_ioctls::VmFd;
use region::Errno;
use region::Mapping;
use thiserror::Error;

use crate::Inode;

/// Guest memory was not opened for a VM object, nor linked to it (requirements R3.2 to R3.8).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
pub enum OpenError {
    /// It is another machine's (EINVAL).
    #[error("guest memory {name} belongs to machine {owner}, not to {asked}")]
    Identity {
        /// The memory.
        name: MemoryName,
        /// Whose it is.
        owner: Identity,
        /// Who asked.
        asked: Identity,
    },
    /// The VM object has a file of it (EINVAL): a second one could show a page at two places.
    #[error("the VM has a file of guest memory {name} already")]
    Taken {
        /// The memory.
        name: MemoryName,
    },
    /// The machine that owns it is gone (EIO).
    #[error("guest memory {name} is nobody's any more: its machine is gone")]
    Ended {
        /// The memory.
        name: MemoryName,
    },
}

impl OpenError {
    /// The kernel's error number for the same refusal.
    pub fn errno(&self) -> Errno {
        match self {
            Self::Identity { .. } | Self::Taken { .. } => Errno::INVAL,
            Self::Ended { .. } => Errno::IO,
        }
    }
}

/// Some of the memory's pages, and where the guest sees them. All in bytes, in whole pages.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Binding {
    /// Number of the memory slot.
    pub slot: u32,
    /// Guest physical address of the first byte.
    pub guest_address: u64,
    /// Offset of the first byte in the memory.
    pub offset_bytes: u64,
    /// How many bytes.
    pub len_bytes: u64,
}

impl Binding {
    fn overlaps(&self, other: &Self) -> bool {
        let end = |binding: &Self| binding.offset_bytes.saturating_add(binding.len_bytes);
        self.offset_bytes < end(other) && other.offset_bytes < end(self)
    }
}

/// Why pages were not bound.
#[derive(Debug, Error)]
pub enum BindError {
    /// A page of the memory has one place in a VM (EEXIST).
    #[error("some of guest memory {name} at {offset_bytes:#x} is bound to slot {slot} already")]
    Bound {
        /// The memory.
        name: MemoryName,
        /// First byte that was asked for.
        offset_bytes: u64,
        /// The slot that has it.
        slot: u32,
    },
    /// The file is another VM object's view (EINVAL): [link](GmemFile::link) it.
    #[error("this file of guest memory {name} is another VM's")]
    OtherVm {
        /// The memory.
        name: MemoryName,
    },
    /// The machine that owns the memory is gone (EIO).
    #[error("guest memory {name} is nobody's any more: its machine is gone")]
    Ended {
        /// The memory.
        name: MemoryName,
    },
    /// KVM, or the check before it, refused the slot.
    #[error("cannot bind guest memory {name}")]
    Slot {
        /// The memory.
        name: MemoryName,
        /// Why.
        #[source]
        source: SlotError,
    },
}

impl BindError {
    /// The kernel's error number for the same refusal.
    pub fn errno(&self) -> Errno {
        match self {
            Self::Bound { .. } => Errno::EXIST,
            Self::OtherVm { .. } => Errno::INVAL,
            Self::Ended { .. } => Errno::IO,
            Self::Slot { source, .. } => source.errno(),
        }
    }
}

/// What an inode knows of each of its files.
#[derive(Debug)]
pub(crate) struct View {
    /// Keeps its place in memory, so no other VM object can be mistaken for it.
    vm: Weak<VmFd>,
    bound: Mutex<Vec<Bound>>,
}

#[derive(Debug)]
struct Bound {
    binding: Binding,
    slot: SlotHandle<Arc<Mapping>>,
}

impl View {
    fn bound(&self) -> MutexGuard<'_, Vec<Bound>> {
        let mut bound = self.bound.lock().unwrap_or_else(PoisonError::into_inner);
        // A slot that was deleted is bound no more, whoever deleted it.
        bound.retain(|bound| bound.slot.is_there());
        bound
    }

    /// Whether its file is open, or a slot of it is left.
    fn is_used(self: &Arc<Self>) -> bool {
        Arc::strong_count(self) > 1 || !self.bound().is_empty()
    }

    fn is_of(&self, vm: &Arc<VmFd>) -> bool {
        self.vm.as_ptr() == Arc::as_ptr(vm)
    }

    /// Takes its pages from its VM.
    pub(crate) fn unbind_all(&self) {
        for bound in self.bound().drain(..) {
            // A slot that KVM does not give back goes on to lead to an address where there is other memory by then.
            let _ = bound.slot.remove();
        }
    }
}

/// Guest memory as one VM object has it: it keeps the memory, and knows the slots. Several files of one memory are as
/// many VM objects' views. Its slots stay when it is dropped.
#[derive(Debug)]
pub struct GmemFile {
    inode: Arc<Inode>,
    view: Arc<View>,
}

impl GmemFile {
    /// Opens the memory for a VM object of machine `identity`. This and [`link`](Self::link) are the only ways to give
    /// memory to a VM object: it is never implied.
    ///
    /// # Errors
    /// [`OpenError`] if it is another machine's memory, or nobody's any more, or the VM object has a file of it.
    pub fn open(inode: Arc<Inode>, identity: Identity, vm: &Arc<VmFd>) -> Result<Self, OpenError> {
        let (name, owner) = (inode.name(), inode.identity());
        if owner != identity {
            return Err(OpenError::Identity { name, owner, asked: identity });
        }
        let mut files = inode.files.lock().unwrap_or_else(PoisonError::into_inner);
        // Asked with the list locked: an end that comes now finds this file there.
        if inode.has_ended() {
            return Err(OpenError::Ended { name });
        }
        files.retain(View::is_used);
        if files.iter().any(|file| file.is_of(vm)) {
            return Err(OpenError::Taken { name });
        }
        let view = Arc::new(View { vm: Arc::downgrade(vm), bound: Mutex::default() });
        files.push(Arc::clone(&view));
        drop(files);
        Ok(Self { inode, view })
    }

    /// Opens the same memory for another VM object of the same machine, as a move to another VMM object on this host
    /// does: another file, one inode. This one goes on as it is.
    ///
    /// # Errors
    /// [`OpenError`]; so also for the VM object that this file is of.
    pub fn link(&self, identity: Identity, vm: &Arc<VmFd>) -> Result<Self, OpenError> {
        Self::open(Arc::clone(&self.inode), identity, vm)
    }

    /// The memory.
    pub fn inode(&self) -> &Arc<Inode> {
        &self.inode
    }

    /// The bindings, in the order in which they were made. One whose slot was deleted is none any more.
    pub fn bindings(&self) -> Vec<Binding> {
        self.view.bound().iter().map(|bound| bound.binding).collect()
    }

    /// The guest physical address at which the guest sees this byte of the memory, if it does.
    pub fn guest_address(&self, offset_bytes: u64) -> Option<u64> {
        self.bindings().iter().find_map(|binding| {
            let at = offset_bytes.checked_sub(binding.offset_bytes)?;
            (at < binding.len_bytes).then(|| binding.guest_address + at)
        })
    }

    /// The byte of the memory, by its offset, that the guest sees at this guest physical address, if it is one of it.
    pub fn offset_bytes(&self, guest_address: u64) -> Option<u64> {
        self.bindings().iter().find_map(|binding| {
            let at = guest_address.checked_sub(binding.guest_address)?;
            (at < binding.len_bytes).then(|| binding.offset_bytes + at)
        })
    }

    /// Shows pages of the memory to the guest, as a new slot of its VM.
    ///
    /// The VM object that made a guest_memfd has its slot bound to the file; for every other one, and for every other
    /// store, the mapping is plain memory.
    ///
    /// # Errors
    /// [`BindError`]; then nothing changed.
    pub fn bind(&self, slots: &mut MemorySlots<Arc<Mapping>>, binding: Binding) -> Result<(), BindError> {
        let name = self.inode.name();
        if !self.view.is_of(slots.vm()) {
            return Err(BindError::OtherVm { name });
        }
        // An end that comes now waits for the lock, and then finds the slot.
        let mut bound = self.view.bound();
        if self.inode.has_ended() {
            return Err(BindError::Ended { name });
        }
        if let Some(other) = bound.iter().find(|bound| bound.binding.overlaps(&binding)) {
            let slot = other.binding.slot;
            return Err(BindError::Bound { name, offset_bytes: binding.offset_bytes, slot });
        }
        self.add(slots, binding).map_err(|source| BindError::Slot { name, source })?;
        bound.extend(slots.handle(binding.slot).map(|slot| Bound { binding, slot }));
        Ok(())
    }

    fn add(&self, slots: &mut MemorySlots<Arc<Mapping>>, binding: Binding) -> Result<(), SlotError> {
        let Binding { slot, guest_address, offset_bytes, len_bytes } = binding;
        let mapping = self.inode.mapping();
        if self.inode.is_made_by(slots.vm()) {
            let file = kvm::Binding { guest_memfd: mapping.region().as_fd(), offset_bytes };
            return slots.add_bound(slot, guest_address, mapping, offset_bytes, len_bytes, file);
        }
        slots.add(slot, guest_address, mapping, offset_bytes, len_bytes, SlotFlags::default())
    }

    /// Takes the pages of a slot from the guest again, and deletes the slot.
    ///
    /// # Errors
    /// [`BindError::Slot`] if this file has no such slot (EINVAL), or KVM refuses. Then nothing changed.
    pub fn unbind(&self, slot: u32) -> Result<(), BindError> {
        let failed = |source| BindError::Slot { name: self.inode.name(), source };
        let mut bound = self.view.bound();
        let index = bound.iter().position(|bound| bound.binding.slot == slot);
        let index = index.ok_or(failed(SlotError::Unknown { slot }))?;
        bound[index].slot.remove().map_err(failed)?;
        bound.remove(index);
        Ok(())
    }
}

impl Inode {
    /// How many VM objects have a file of it, or a slot that is left of one.
    pub fn files(&self) -> usize {
        let mut files = self.files.lock().unwrap_or_else(PoisonError::into_inner);
        files.retain(View::is_used);
        files.len()
    }
}
