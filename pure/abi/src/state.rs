//! `tideover-state-v1`: the saved state of a vCPU, of a VM or of a device.
//!
//! The record names a list of pages ([`crate::vmalloc`]) with the state's bytes, and their sum. It also says
//! at which instant they were saved, as the ownership epoch of the seal: state of one instant is never
//! combined with memory of a later one.

use alloc::vec::Vec;

use pages::PAGE_SIZE;
use zerocopy::FromBytes;
use zerocopy::Immutable;
use zerocopy::IntoBytes;
use zerocopy::KnownLayout;
use zerocopy::Unaligned;
use zerocopy::little_endian::U32;
use zerocopy::little_endian::U64;

use crate::memory::Malformed;
use crate::memory::Memory;
use crate::memory::OnFault;
use crate::memory::Place;
use crate::memory::Problem;
use crate::memory::stop;
use crate::record::Format;
use crate::record::checksum;
use crate::record::whole;
use crate::text::Text;
use crate::vm::Identity;
use crate::vmalloc::Descriptor;
use crate::vmalloc::List;

/// The format.
pub const FORMAT: Format = Format {
    compatible: "tideover-state-v1",
    kind: *b"STAT",
    version: 1,
    oldest: 1,
    max_payload_bytes: 4096,
};

/// The most bytes that one state may have.
pub const MAX_STATE_BYTES: u64 = 64 << 20;

/// What the state is of, as `vcpu0`: 1 to 31 bytes.
pub type StateName = Text<32>;

#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct Payload {
    identity: [u8; 16],
    name: [u8; 32],
    epoch: U32,
    checksum: U32,
    len_bytes: U64,
    list: Descriptor,
}

/// The record.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct StateRecord {
    /// The machine that it is state of.
    pub identity: Identity,
    /// What it is the state of.
    pub name: StateName,
    /// Ownership epoch of the seal that it was saved for.
    pub epoch: u32,
    /// CRC-32C of the bytes.
    pub checksum: u32,
    /// How many bytes.
    pub len_bytes: u64,
    /// Where they are.
    pub list: Descriptor,
}

impl StateRecord {
    /// The record's bytes.
    pub fn encode(&self) -> Vec<u8> {
        let payload = Payload {
            identity: self.identity.bytes(),
            name: *self.name.field(),
            epoch: self.epoch.into(),
            checksum: self.checksum.into(),
            len_bytes: self.len_bytes.into(),
            list: self.list,
        };
        FORMAT.encode(payload.as_bytes())
    }

    /// Reads the record at `address`.
    ///
    /// # Errors
    /// [`Malformed`] if it is none.
    pub fn read(memory: &(impl Memory + ?Sized), address: u64) -> Result<Self, Malformed> {
        Self::read_on(memory, address, &mut stop)
    }

    /// Reads the record at `address` as [`StateRecord::read`] does, past a checksum that is another one if `on_fault` says so.
    ///
    /// # Errors
    /// As [`StateRecord::read`].
    pub fn read_on(
        memory: &(impl Memory + ?Sized),
        address: u64,
        on_fault: &mut OnFault<'_>,
    ) -> Result<Self, Malformed> {
        let place = Place::new(FORMAT.compatible, address);
        let (_, payload) = FORMAT.read_on(memory, address, on_fault)?;
        let state: &Payload = whole(place, &payload)?;
        let found = state.len_bytes.get();
        if found > MAX_STATE_BYTES {
            return Err(place.bad("len_bytes", Problem::TooLarge { found, limit: MAX_STATE_BYTES }));
        }
        let name = StateName::read(&state.name).ok_or_else(|| place.bad("name", Problem::NotTerminated))?;
        Ok(Self {
            identity: Identity::new(state.identity),
            name,
            epoch: state.epoch.get(),
            checksum: state.checksum.get(),
            len_bytes: found,
            list: state.list,
        })
    }

    /// Reads the list of the pages that hold the state's bytes. The record lies at `address`.
    ///
    /// # Errors
    /// [`Malformed`] if the list is broken, or counts other pages than the bytes take.
    pub fn read_list(&self, memory: &(impl Memory + ?Sized), address: u64) -> Result<List, Malformed> {
        let place = Place::new(FORMAT.compatible, address);
        let pages = self.len_bytes.div_ceil(PAGE_SIZE);
        place.expect("list.total_pages", self.list.total_pages.get().into(), pages)?;
        List::read(memory, &self.list)
    }

    /// Reads the bytes that lie in the pages of `list`, which is the [list](Self::read_list) of the record at
    /// `address`.
    ///
    /// # Errors
    /// [`Malformed`] if they are not there or their sum is another one.
    pub fn read_bytes(
        &self,
        memory: &(impl Memory + ?Sized),
        address: u64,
        list: &List,
    ) -> Result<Vec<u8>, Malformed> {
        let bytes = list.read_bytes(memory, self.len_bytes)?;
        let computed = checksum(&[&bytes]);
        if computed != self.checksum {
            let stored = self.checksum;
            let place = Place::new(FORMAT.compatible, address);
            return Err(place.bad("checksum", Problem::Checksum { stored, computed }));
        }
        Ok(bytes)
    }
}

#[cfg(test)]
mod tests {
    use alloc::vec;

    use super::*;

    /// The record at page 1, a chunk at 2, one page of data at 3.
    fn memory(record: &StateRecord) -> Vec<u8> {
        let mut memory = vec![0; 4 * 4096];
        let bytes = record.encode();
        memory[4096..][..bytes.len()].copy_from_slice(&bytes);
        memory[2 * 4096 + 8..][..8].copy_from_slice(&(3 * 4096u64).to_le_bytes());
        memory[3 * 4096..].fill(7);
        memory
    }

    fn record(len_bytes: usize) -> StateRecord {
        StateRecord {
            identity: Identity::new([1; 16]),
            name: StateName::literal("vcpu0"),
            epoch: 2,
            checksum: checksum(&[&vec![7; len_bytes]]),
            len_bytes: len_bytes as u64,
            list: Descriptor::plain(2 * 4096, 1),
        }
    }

    #[test]
    fn what_is_written_is_read() {
        for len in [1, 4096] {
            let (memory, record) = (memory(&record(len)), record(len));
            assert_eq!(StateRecord::read(&memory, 4096).unwrap(), record);
            let list = record.read_list(&memory, 4096).unwrap();
            assert_eq!(record.read_bytes(&memory, 4096, &list).unwrap(), vec![7; len]);
        }
    }

    #[test]
    fn a_list_that_counts_other_pages_than_the_bytes_take_is_refused_unread() {
        for (len, total_pages) in [(0, 1), (1, 2), (1, u32::MAX), (4097, 1)] {
            // There is no chunk: who looked for it would name that.
            let list = Descriptor::plain(1 << 40, total_pages);
            let record = StateRecord { list, ..record(len) };
            assert_eq!(record.read_list(&memory(&record), 4096).unwrap_err().field, "list.total_pages");
        }
    }
}
