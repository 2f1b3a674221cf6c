//! Guest memory as devices see it: by guest-physical address.
//!
//! Each slot is a part of a region's mapping. The guest may write any byte at any time, so bytes are copied
//! and never borrowed; vm-memory's [`Bytes`] does both the copies and the words of a ring that want an order.

use std::sync::Arc;

use region::Mapping;
use thiserror::Error;
use vm_memory::Bytes;
use vm_memory::GuestAddress;
use vm_memory::GuestMemoryBackend;
use vm_memory::GuestMemoryError;
use vm_memory::GuestMemoryRegion;
use vm_memory::GuestMemoryRegionBytes;
use vm_memory::GuestRegionCollection;
use vm_memory::GuestUsize;
use vm_memory::MemoryRegionAddress;
use vm_memory::VolatileSlice;
use vm_memory::guest_memory::Error as AccessError;

/// Part of a mapping that the guest has at one of its addresses.
#[derive(Debug, Clone)]
pub struct Slot {
    /// Guest-physical address of the first byte.
    pub guest_address: u64,
    /// Where it comes from.
    pub mapping: Arc<Mapping>,
    /// First byte in the mapping.
    pub offset_bytes: u64,
    /// Its length in bytes.
    pub len_bytes: u64,
}

/// Why slots are not a guest's memory.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum MemoryError {
    /// There is none.
    #[error("a guest without memory")]
    None,
    /// A slot has no bytes, ends beyond its mapping, or beyond the last guest address.
    #[error(
        "the slot at {guest_address:#x}, {len_bytes:#x} bytes from {offset_bytes:#x} on, is not in its memory"
    )]
    Range {
        /// Its guest-physical address.
        guest_address: u64,
        /// Its place in the mapping.
        offset_bytes: u64,
        /// Its length.
        len_bytes: u64,
    },
    /// Two slots share an address.
    #[error("the slot at {guest_address:#x} begins within another")]
    Overlap {
        /// Guest-physical address of the higher one.
        guest_address: u64,
    },
}

/// Bytes are not, or not all, in the guest's memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
#[error("no guest memory at {address:#x}, {len_bytes:#x} bytes")]
pub struct NoGuestMemory {
    /// Guest-physical address of the first byte.
    pub address: u64,
    /// Bytes asked for.
    pub len_bytes: u64,
}

/// All of a guest's memory. Clones are the same memory.
#[derive(Debug, Clone)]
pub struct GuestMemory {
    slots: GuestRegionCollection<Slot>,
}

impl GuestMemory {
    /// The memory made of these slots, in any order.
    ///
    /// # Errors
    /// [`MemoryError`]
    pub fn new(mut slots: Vec<Slot>) -> Result<Self, MemoryError> {
        slots.sort_by_key(|slot| slot.guest_address);
        slots.iter().try_for_each(check)?;
        for (lower, higher) in slots.iter().zip(slots.iter().skip(1)) {
            if lower.guest_address + (lower.len_bytes - 1) >= higher.guest_address {
                return Err(MemoryError::Overlap { guest_address: higher.guest_address });
            }
        }
        let slots = GuestRegionCollection::from_regions(slots).map_err(|_| MemoryError::None)?;
        Ok(Self { slots })
    }

    /// Its slots, by rising guest address: first byte and length.
    pub fn slots(&self) -> impl Iterator<Item = (u64, u64)> + '_ {
        self.slots.iter().map(|slot| (slot.guest_address, slot.len_bytes))
    }

    /// For crates that ask for vm-memory's own traits.
    pub(crate) fn backend(&self) -> &impl GuestMemoryBackend {
        &self.slots
    }

    /// That all of these bytes are there.
    ///
    /// # Errors
    /// [`NoGuestMemory`]
    pub fn check(&self, address: u64, len_bytes: u64) -> Result<(), NoGuestMemory> {
        let none = NoGuestMemory { address, len_bytes };
        let len = usize::try_from(len_bytes).map_err(|_| none)?;
        let end = address.checked_add(len_bytes);
        let there = end.is_some() && self.slots.check_range(GuestAddress(address), len);
        there.then_some(()).ok_or(none)
    }

    /// Copies bytes out.
    ///
    /// # Errors
    /// [`NoGuestMemory`]; `into` may then hold part of them.
    pub fn read(&self, address: u64, into: &mut [u8]) -> Result<(), NoGuestMemory> {
        self.slots.read_slice(into, GuestAddress(address)).map_err(|_| none(address, into.len()))
    }

    /// Copies bytes in.
    ///
    /// # Errors
    /// [`NoGuestMemory`]; part of them may have been written.
    pub fn write(&self, address: u64, bytes: &[u8]) -> Result<(), NoGuestMemory> {
        self.slots.write_slice(bytes, GuestAddress(address)).map_err(|_| none(address, bytes.len()))
    }

    /// The little-endian 16-bit word at a multiple of 2. What its writer wrote before it is seen, too.
    ///
    /// # Errors
    /// [`NoGuestMemory`], also if it is not aligned.
    pub(crate) fn load_u16(&self, address: u64) -> Result<u16, NoGuestMemory> {
        let word: Result<u16, AccessError> =
            self.slots.load(GuestAddress(address), std::sync::atomic::Ordering::Acquire);
        word.map(u16::from_le).map_err(|_| none(address, 2))
    }

    /// Sets the little-endian 16-bit word at a multiple of 2. Who sees it sees what was written before it.
    ///
    /// # Errors
    /// [`NoGuestMemory`], also if it is not aligned.
    pub(crate) fn store_u16(&self, address: u64, value: u16) -> Result<(), NoGuestMemory> {
        let order = std::sync::atomic::Ordering::Release;
        self.slots.store(value.to_le(), GuestAddress(address), order).map_err(|_| none(address, 2))
    }
}

fn none(address: u64, len: usize) -> NoGuestMemory {
    NoGuestMemory { address, len_bytes: u64::try_from(len).unwrap_or(u64::MAX) }
}

fn check(slot: &Slot) -> Result<(), MemoryError> {
    let Slot { guest_address, offset_bytes, len_bytes, .. } = *slot;
    let in_mapping = offset_bytes.checked_add(len_bytes).is_some_and(|end| end <= slot.mapping.len_bytes());
    // The address behind the last byte has to exist: others compute it.
    let in_guest = guest_address.checked_add(len_bytes).is_some();
    if len_bytes == 0 || !in_mapping || !in_guest {
        return Err(MemoryError::Range { guest_address, offset_bytes, len_bytes });
    }
    Ok(())
}

impl GuestMemoryRegion for Slot {
    type B = ();

    fn len(&self) -> GuestUsize {
        self.len_bytes
    }

    fn start_addr(&self) -> GuestAddress {
        GuestAddress(self.guest_address)
    }

    fn bitmap(&self) {}

    fn get_slice(
        &self,
        offset: MemoryRegionAddress,
        count: usize,
    ) -> Result<VolatileSlice<'_, ()>, GuestMemoryError> {
        let inside = u64::try_from(count).ok().and_then(|count| offset.0.checked_add(count));
        if inside.is_none_or(|end| end > self.len_bytes) {
            return Err(GuestMemoryError::InvalidBackendAddress);
        }
        // The sum is below that of offset and length, which was checked when the memory was made.
        self.mapping
            .slice(self.offset_bytes + offset.0, count)
            .map_err(|_| GuestMemoryError::InvalidBackendAddress)
    }
}

impl GuestMemoryRegionBytes for Slot {}

#[cfg(test)]
mod tests {
    use region::Region;

    use super::*;

    fn mapping(pages: u64) -> Arc<Mapping> {
        Arc::new(Region::create("t", pages * 4096).unwrap().map().unwrap())
    }

    fn slot(guest_address: u64, offset_bytes: u64, len_bytes: u64) -> Slot {
        Slot { guest_address, mapping: mapping(4), offset_bytes, len_bytes }
    }

    #[test]
    fn an_access_may_cross_two_slots_but_not_a_hole() {
        let mapping = mapping(4);
        let part = |guest_address, offset_bytes| Slot {
            guest_address,
            mapping: Arc::clone(&mapping),
            offset_bytes,
            len_bytes: 4096,
        };
        let memory = GuestMemory::new(vec![part(0x9000, 8192), part(0, 0), part(4096, 4096)]).unwrap();
        memory.write(4094, &[1, 2, 3, 4]).unwrap();
        let mut read = [0; 4];
        mapping.read(4094, &mut read).unwrap();
        assert_eq!(read, [1, 2, 3, 4]);
        assert!(memory.check(0, 8192).is_ok());
        assert!(memory.check(0, 8193).is_err());
        assert!(memory.check(0x8fff, 2).is_err());
        assert!(memory.check(u64::MAX, 2).is_err());
        assert!(memory.write(8190, &[0; 4]).is_err());
        assert!(memory.read(0xa000, &mut read).is_err());
        memory.write(0x9ffe, &[0x34, 0x12]).unwrap();
        assert_eq!(memory.load_u16(0x9ffe), Ok(0x1234));
        assert!(memory.load_u16(0x9fff).is_err(), "not aligned");
    }

    #[test]
    fn slots_that_are_no_memory_are_refused() {
        let range = |slots| matches!(GuestMemory::new(slots), Err(MemoryError::Range { .. }));
        assert!(range(vec![slot(0, 0, 0)]));
        assert!(range(vec![slot(0, 4096, 16384)]));
        assert!(range(vec![slot(0, u64::MAX, 4096)]));
        assert!(range(vec![slot(u64::MAX - 4095, 0, 4096)]));
        assert_eq!(GuestMemory::new(vec![]).unwrap_err(), MemoryError::None);
        let overlap = GuestMemory::new(vec![slot(4096, 0, 8192), slot(8192, 0, 4096)]);
        assert_eq!(overlap.unwrap_err(), MemoryError::Overlap { guest_address: 8192 });
    }
}
