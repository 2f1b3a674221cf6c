//! Memory slots: which host memory the guest sees at which of its addresses.
//!
//! A *slot* hands a range of this process's addresses to the guest for as long as it exists: vCPUs read
//! and write what is mapped there at the moment, whatever it is. So the host memory of a slot must not
//! go before the slot does, and no line outside this ring can promise that. The promise is split in
//! two: what a mapping is, its maker says once, by implementing [`HostMemory`]; that it outlives its
//! slots, [`MemorySlots`] sees to, by owning a clone of it per slot.
//!
//! Where a VM has an in-kernel interrupt controller, add the slots before it: the first slot after it
//! may wait for milliseconds. See [`VmBuilder`](crate::VmBuilder).

use std::collections::BTreeMap;
use std::fmt;
use std::mem;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use kvm_bindings as bind;
use kvm_ioctls::VmFd;
use region::Errno;

use crate::PAGE_SIZE;
use crate::capabilities::extension;

/// Memory of this process that a guest may be given.
///
/// # Safety
///
/// For as long as the value or any clone of it lives:
///
/// 1. `host_address` and `len_bytes` answer the same, for the value and for its clones.
/// 2. The `len_bytes` bytes from `host_address` on are one mapping, or several side by side, made for
///    this use, and are not unmapped, nor replaced by a mapping of anything but memory for the same use.
/// 3. Nothing holds a Rust reference to those bytes, unless to atomics, and everything that reads or writes
///    them reckons with the guest changing them at any time: volatile copies, atomics, system calls.
pub unsafe trait HostMemory {
    /// Address of the first byte in this process.
    fn host_address(&self) -> usize;

    /// Bytes mapped from there on.
    fn len_bytes(&self) -> u64;
}

/// How the guest may use a slot.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SlotFlags {
    /// KVM notes which pages the guest writes (`KVM_MEM_LOG_DIRTY_PAGES`).
    pub log_dirty_pages: bool,
    /// The guest's writes leave KVM as MMIO exits (`KVM_MEM_READONLY`).
    pub read_only: bool,
}

impl SlotFlags {
    fn bits(self) -> u32 {
        let mut bits = 0;
        if self.log_dirty_pages {
            bits |= bind::KVM_MEM_LOG_DIRTY_PAGES;
        }
        if self.read_only {
            bits |= bind::KVM_MEM_READONLY;
        }
        bits
    }
}

/// A range that a slot was to have, or has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SlotRange {
    /// Number of the slot.
    pub slot: u32,
    /// Guest physical address of its first byte.
    pub guest_address: u64,
    /// Its length in bytes.
    pub len_bytes: u64,
}

impl fmt::Display for SlotRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "slot {} of {:#x} bytes at {:#x}", self.slot, self.len_bytes, self.guest_address)
    }
}

/// Why [`MemorySlots`] refused.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SlotError {
    /// This VM has no slot of that number.
    #[error("{range}: this VM's slots are numbered below {slots}")]
    Number {
        /// The slot asked for.
        range: SlotRange,
        /// Slots that the VM can have.
        slots: u32,
    },
    /// The slot is in use.
    #[error("{range}: the number is that of a slot at {in_use:#x}")]
    InUse {
        /// The slot asked for.
        range: SlotRange,
        /// Guest physical address of the slot that has the number.
        in_use: u64,
    },
    /// A number is zero that must not be, or no multiple of the page size.
    #[error("{range}: the {what}, {value:#x}, is not of whole pages")]
    Unaligned {
        /// The slot asked for.
        range: SlotRange,
        /// What is unaligned.
        what: &'static str,
        /// Its value.
        value: u64,
    },
    /// The guest's addresses end before the slot does.
    #[error("{range}: it ends beyond the last guest address")]
    GuestRange {
        /// The slot asked for.
        range: SlotRange,
    },
    /// The memory ends before the slot does.
    #[error("{range}: from offset {offset_bytes:#x} it ends beyond the {have_bytes:#x} bytes of its memory")]
    MemoryRange {
        /// The slot asked for.
        range: SlotRange,
        /// Where in the memory it was to start.
        offset_bytes: u64,
        /// Bytes of the memory.
        have_bytes: u64,
    },
    /// No file has as many bytes as the slot would need of its guest_memfd.
    #[error("{range}: from offset {offset_bytes:#x} it ends beyond the last byte of any file")]
    FileRange {
        /// The slot asked for.
        range: SlotRange,
        /// Where in the file it was to start.
        offset_bytes: u64,
    },
    /// Another slot has some of the guest addresses.
    #[error("{range}: it overlaps {other}")]
    Overlap {
        /// The slot asked for.
        range: SlotRange,
        /// The slot that is there.
        other: SlotRange,
    },
    /// There is no such slot to remove.
    #[error("no slot {slot}")]
    Unknown {
        /// Number of the slot.
        slot: u32,
    },
    /// KVM refused.
    #[error("{range}: KVM refused it")]
    Kvm {
        /// The slot asked for.
        range: SlotRange,
        /// What the kernel said.
        #[source]
        source: kvm_ioctls::Error,
    },
}

impl SlotError {
    /// KVM's own error number, or the one that it gives for the same refusal.
    #[must_use]
    pub fn errno(&self) -> Errno {
        match self {
            Self::Kvm { source, .. } => Errno::from_raw_os_error(source.errno()),
            Self::Overlap { .. } => Errno::EXIST,
            Self::Number { .. }
            | Self::InUse { .. }
            | Self::Unaligned { .. }
            | Self::GuestRange { .. }
            | Self::MemoryRange { .. }
            | Self::FileRange { .. }
            | Self::Unknown { .. } => Errno::INVAL,
        }
    }
}

/// A guest_memfd to bind a slot to, and from which of its bytes on.
#[derive(Clone, Copy, Debug)]
pub struct Binding<'a> {
    /// The guest_memfd: one of this very VM.
    pub guest_memfd: BorrowedFd<'a>,
    /// Where in the file the slot starts, in bytes.
    pub offset_bytes: u64,
}

struct Slot<M> {
    range: SlotRange,
    memory: M,
    /// How many slots were made before it: no other slot has or ever had it, though it had the slot's number.
    made: u64,
}

struct Shared<M> {
    vm: Arc<VmFd>,
    slots: Mutex<Slots<M>>,
}

struct Slots<M> {
    made: u64,
    // Every slot that exists in the VM by our doing has its entry, and the entry's clone of the memory
    // is dropped only after the VM let go of the slot. So KVM never reaches unmapped or foreign memory.
    entries: BTreeMap<u32, Slot<M>>,
}

impl<M> Shared<M> {
    fn slots(&self) -> MutexGuard<'_, Slots<M>> {
        self.slots.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// One slot, to be removed by who does not have the VM's [`MemorySlots`]. It keeps neither.
pub struct SlotHandle<M> {
    shared: Weak<Shared<M>>,
    slot: u32,
    made: u64,
}

impl<M> SlotHandle<M> {
    /// Whether the slot is still there. Another one of its number is not it.
    #[must_use]
    pub fn is_there(&self) -> bool {
        self.shared.upgrade().is_some_and(|shared| self.is_in(&shared.slots()))
    }

    fn is_in(&self, slots: &Slots<M>) -> bool {
        slots.entries.get(&self.slot).is_some_and(|slot| slot.made == self.made)
    }

    /// As [`MemorySlots::remove`]. Gives whether it was still there.
    ///
    /// # Errors
    ///
    /// See [`SlotError`]. Then the slot is still there.
    pub fn remove(&self) -> Result<bool, SlotError> {
        let Some(shared) = self.shared.upgrade() else { return Ok(false) };
        let mut slots = shared.slots();
        if !self.is_in(&slots) {
            return Ok(false);
        }
        remove(&shared.vm, &mut slots, self.slot)?;
        Ok(true)
    }
}

impl<M> fmt::Debug for SlotHandle<M> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "SlotHandle({}, number {})", self.slot, self.made)
    }
}

/// The memory slots of a VM, with the memory that is in them.
///
/// Dropping it removes the slots, so that the guest's memory is never mapped for longer in the VM than
/// in the process. To keep the VM's end short, stop its vCPUs first.
pub struct MemorySlots<M: HostMemory + Clone> {
    slot_count: u32,
    shared: Arc<Shared<M>>,
}

impl<M: HostMemory + Clone> MemorySlots<M> {
    /// No slots yet, for this VM.
    #[must_use]
    pub fn new(vm: Arc<VmFd>) -> Self {
        let slot_count = extension(&vm, bind::KVM_CAP_NR_MEMSLOTS);
        let slots = Mutex::new(Slots { made: 0, entries: BTreeMap::new() });
        Self { slot_count, shared: Arc::new(Shared { vm, slots }) }
    }

    /// The VM's descriptor.
    #[must_use]
    pub fn vm(&self) -> &Arc<VmFd> {
        &self.shared.vm
    }

    /// Shows the guest `len_bytes` of `memory`, from `offset_bytes` in it on, at `guest_address`.
    ///
    /// All three numbers and the memory's own address are to be multiples of the page size.
    ///
    /// # Errors
    ///
    /// See [`SlotError`]. Then nothing changed.
    pub fn add(
        &mut self,
        slot: u32,
        guest_address: u64,
        memory: &M,
        offset_bytes: u64,
        len_bytes: u64,
        flags: SlotFlags,
    ) -> Result<(), SlotError> {
        let range = SlotRange { slot, guest_address, len_bytes };
        let mut slots = self.shared.slots();
        let userspace_addr = self.check(&slots, range, memory, offset_bytes)?;
        let region = bind::kvm_userspace_memory_region {
            slot,
            flags: flags.bits(),
            guest_phys_addr: guest_address,
            memory_size: len_bytes,
            userspace_addr,
        };
        // SAFETY:
        // 1. `userspace_addr .. + len_bytes` lies in `memory`: `check` above. By the contract of
        //    `HostMemory` it stays mapped, and reckons with writers, while a clone of `memory` lives.
        // 2. A clone outlives the slot: the entry made below keeps it, and gives it up only in `remove`,
        //    a handle's, and `drop`, after KVM removed the slot.
        // 3. KVM itself refuses a range that overlaps another slot.
        unsafe { self.shared.vm.set_user_memory_region(region) }
            .map_err(|source| SlotError::Kvm { range, source })?;
        slots.insert(range, memory.clone());
        Ok(())
    }

    /// As [`add`](Self::add), with the slot bound to a guest_memfd.
    ///
    /// The guest then gets its memory from the guest_memfd. `memory` is what KVM itself reads and writes
    /// for the guest, and is to be a mapping of the same bytes of the same guest_memfd.
    ///
    /// # Errors
    ///
    /// See [`SlotError`]; KVM refuses a guest_memfd of another VM and bytes of it that are bound already.
    /// Then nothing changed.
    pub fn add_bound(
        &mut self,
        slot: u32,
        guest_address: u64,
        memory: &M,
        offset_bytes: u64,
        len_bytes: u64,
        binding: Binding<'_>,
    ) -> Result<(), SlotError> {
        let range = SlotRange { slot, guest_address, len_bytes };
        let mut slots = self.shared.slots();
        let userspace_addr = self.check(&slots, range, memory, offset_bytes)?;
        check_file(range, &binding)?;
        let refused = |errno| SlotError::Kvm { range, source: kvm_ioctls::Error::new(errno) };
        let region = bind::kvm_userspace_memory_region2 {
            slot,
            flags: bind::KVM_MEM_GUEST_MEMFD,
            guest_phys_addr: guest_address,
            memory_size: len_bytes,
            userspace_addr,
            guest_memfd_offset: binding.offset_bytes,
            guest_memfd: u32::try_from(binding.guest_memfd.as_raw_fd()).map_err(|_| refused(libc::EBADF))?,
            ..Default::default()
        };
        // SAFETY: as in `add`. Of the guest_memfd, KVM takes its own reference, and itself refuses one of
        // another VM, or a range of it that is bound already.
        unsafe { self.shared.vm.set_user_memory_region2(region) }
            .map_err(|source| SlotError::Kvm { range, source })?;
        slots.insert(range, memory.clone());
        Ok(())
    }

    /// Takes the slot from the guest and gives up its memory. What the guest does there later leaves KVM
    /// as an MMIO exit.
    ///
    /// # Errors
    ///
    /// See [`SlotError`]. Then the slot is still there.
    pub fn remove(&mut self, slot: u32) -> Result<(), SlotError> {
        remove(&self.shared.vm, &mut self.shared.slots(), slot)
    }

    /// The slots, by number.
    pub fn iter(&self) -> impl Iterator<Item = SlotRange> + '_ {
        let ranges: Vec<SlotRange> = self.shared.slots().entries.values().map(|slot| slot.range).collect();
        ranges.into_iter()
    }

    /// The memory in a slot.
    #[must_use]
    pub fn memory(&self, slot: u32) -> Option<M> {
        self.shared.slots().entries.get(&slot).map(|slot| slot.memory.clone())
    }

    /// A slot as something that others can remove.
    #[must_use]
    pub fn handle(&self, slot: u32) -> Option<SlotHandle<M>> {
        let made = self.shared.slots().entries.get(&slot)?.made;
        Some(SlotHandle { shared: Arc::downgrade(&self.shared), slot, made })
    }

    /// Refuses what must not become a slot; else the host address at which it starts.
    fn check(
        &self,
        slots: &Slots<M>,
        range: SlotRange,
        memory: &M,
        offset_bytes: u64,
    ) -> Result<u64, SlotError> {
        let SlotRange { slot, guest_address, len_bytes } = range;
        if slot >= self.slot_count {
            return Err(SlotError::Number { range, slots: self.slot_count });
        }
        if let Some(other) = slots.entries.get(&slot) {
            return Err(SlotError::InUse { range, in_use: other.range.guest_address });
        }
        // A usize is at most 64 bits wide on every target of Rust.
        let memory_address = memory.host_address() as u64;
        let have_bytes = memory.len_bytes();
        for (what, value) in [
            ("guest address", guest_address),
            ("length", len_bytes),
            ("offset in the memory", offset_bytes),
            ("address of the memory", memory_address),
        ] {
            if !value.is_multiple_of(PAGE_SIZE) {
                return Err(SlotError::Unaligned { range, what, value });
            }
        }
        if len_bytes == 0 {
            return Err(SlotError::Unaligned { range, what: "length", value: 0 });
        }
        let beyond_memory = SlotError::MemoryRange { range, offset_bytes, have_bytes };
        if offset_bytes.checked_add(len_bytes).is_none_or(|end| end > have_bytes) {
            return Err(beyond_memory);
        }
        let Some(userspace_addr) = memory_address.checked_add(offset_bytes) else {
            return Err(beyond_memory);
        };
        let Some(guest_end) = guest_address.checked_add(len_bytes) else {
            return Err(SlotError::GuestRange { range });
        };
        let overlaps = |other: &SlotRange| {
            // Cannot overflow: this very check let `other` in.
            other.guest_address < guest_end && guest_address < other.guest_address + other.len_bytes
        };
        match slots.entries.values().map(|slot| slot.range).find(overlaps) {
            Some(other) => Err(SlotError::Overlap { range, other }),
            None => Ok(userspace_addr),
        }
    }
}

/// Refuses bytes of a guest_memfd that no file can have: Linux 6.18 binds those whose end is no signed number.
fn check_file(range: SlotRange, binding: &Binding<'_>) -> Result<(), SlotError> {
    let value = binding.offset_bytes;
    if !value.is_multiple_of(PAGE_SIZE) {
        return Err(SlotError::Unaligned { range, what: "offset in the guest_memfd", value });
    }
    match value.checked_add(range.len_bytes) {
        Some(end) if i64::try_from(end).is_ok() => Ok(()),
        _ => Err(SlotError::FileRange { range, offset_bytes: value }),
    }
}

impl<M> Slots<M> {
    fn insert(&mut self, range: SlotRange, memory: M) {
        let made = self.made;
        self.made += 1;
        self.entries.insert(range.slot, Slot { range, memory, made });
    }
}

/// Removes a slot from the VM and then from the list.
fn remove<M>(vm: &VmFd, slots: &mut Slots<M>, slot: u32) -> Result<(), SlotError> {
    let range = slots.entries.get(&slot).ok_or(SlotError::Unknown { slot })?.range;
    unset(vm, range)?;
    slots.entries.remove(&slot);
    Ok(())
}

/// Removes a slot from the VM.
fn unset(vm: &VmFd, range: SlotRange) -> Result<(), SlotError> {
    let region = bind::kvm_userspace_memory_region {
        slot: range.slot,
        flags: 0,
        guest_phys_addr: range.guest_address,
        memory_size: 0,
        userspace_addr: 0,
    };
    // SAFETY: a size of zero gives KVM no memory, it takes the slot away; when the call returns, no vCPU
    // reaches the memory through it.
    unsafe { vm.set_user_memory_region(region) }.map_err(|source| SlotError::Kvm { range, source })
}

impl<M: HostMemory + Clone> Drop for MemorySlots<M> {
    fn drop(&mut self) {
        for (_, slot) in mem::take(&mut self.shared.slots().entries) {
            if unset(&self.shared.vm, slot.range).is_err() {
                // The VM may still reach the memory: better that it is never unmapped.
                mem::forget(slot.memory);
            }
        }
    }
}

impl<M: HostMemory + Clone> fmt::Debug for MemorySlots<M> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list().entries(self.iter()).finish()
    }
}
