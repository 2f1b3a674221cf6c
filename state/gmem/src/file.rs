//! One VM object's view of guest memory.

use std::os::fd::AsFd;
use std::sync::Arc;

use abi::gmem::MemoryName;
use abi::vm::Identity;
use kvm::MemorySlots;
use kvm::SlotError;
use kvm::SlotFlags;
use region::Mapping;
use thiserror::Error;

use crate::Inode;

/// Guest memory was not opened for a VM (requirements R3.2 to R3.8).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
#[error("guest memory {name} belongs to machine {owner}, not to {asked}")]
pub struct OpenError {
    /// The memory.
    pub name: MemoryName,
    /// Whose it is.
    pub owner: Identity,
    /// Who asked.
    pub asked: Identity,
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

/// Guest memory as one VM object has it: it keeps the memory, and knows the slots.
#[derive(Debug)]
pub struct GmemFile {
    inode: Arc<Inode>,
    bindings: Vec<Binding>,
}

impl GmemFile {
    /// Opens the memory for a VM object of machine `identity`. This is the only way to give memory to
    /// another VM object: it is never implied.
    ///
    /// # Errors
    /// [`OpenError`] if it is another machine's memory.
    pub fn open(inode: Arc<Inode>, identity: Identity) -> Result<Self, OpenError> {
        let owner = inode.identity();
        if owner != identity {
            return Err(OpenError { name: inode.name(), owner, asked: identity });
        }
        Ok(Self { inode, bindings: Vec::new() })
    }

    /// The memory.
    pub fn inode(&self) -> &Arc<Inode> {
        &self.inode
    }

    /// The bindings, in the order in which they were made.
    pub fn bindings(&self) -> &[Binding] {
        &self.bindings
    }

    /// Shows pages of the memory to the guest, as a new slot of its VM.
    ///
    /// The VM object that made a guest_memfd has its slot bound to the file; for every other one, and for every other
    /// store, the mapping is plain memory.
    ///
    /// # Errors
    /// [`BindError`]; then nothing changed.
    pub fn bind(&mut self, slots: &mut MemorySlots<Arc<Mapping>>, binding: Binding) -> Result<(), BindError> {
        let name = self.inode.name();
        let end = |binding: &Binding| binding.offset_bytes.saturating_add(binding.len_bytes);
        let taken = self
            .bindings
            .iter()
            .find(|other| other.offset_bytes < end(&binding) && binding.offset_bytes < end(other));
        if let Some(other) = taken {
            return Err(BindError::Bound { name, offset_bytes: binding.offset_bytes, slot: other.slot });
        }
        let Binding { slot, guest_address, offset_bytes, len_bytes } = binding;
        let mapping = self.inode.mapping();
        let added = if self.inode.is_made_by(slots.vm()) {
            let file = kvm::Binding { guest_memfd: mapping.region().as_fd(), offset_bytes };
            slots.add_bound(slot, guest_address, mapping, offset_bytes, len_bytes, file)
        } else {
            slots.add(slot, guest_address, mapping, offset_bytes, len_bytes, SlotFlags::default())
        };
        added.map_err(|source| BindError::Slot { name, source })?;
        self.bindings.push(binding);
        Ok(())
    }
}
