//! `tideover-state-v1`: the saved state of a vCPU, of a VM or of a device.
//!
//! The record names a list of pages ([`crate::vmalloc`]) with the state's bytes, and their sum. It also says
//! at which instant they were saved, as the ownership epoch of the seal: state of one instant is never
//! combined with memory of a later one.

use alloc::vec::Vec;

use zerocopy::FromBytes;
use zerocopy::Immutable;
use zerocopy::IntoBytes;
use zerocopy::KnownLayout;
use zerocopy::Unaligned;
use zerocopy::little_endian::U32;
use zerocopy::little_endian::U64;

use crate::memory::Malformed;
use crate::memory::Memory;
use crate::memory::Place;
use crate::memory::Problem;
use crate::record::Format;
use crate::record::checksum;
use crate::record::take;
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
        let place = Place::new(FORMAT.compatible, address);
        let (_, payload) = FORMAT.read(memory, address)?;
        let (state, _) = take::<Payload>(place, "payload", &payload)?;
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

    /// Reads the bytes that the record at `address` names.
    ///
    /// # Errors
    /// [`Malformed`] if the list is broken or the sum is another one.
    pub fn read_bytes(&self, memory: &(impl Memory + ?Sized), address: u64) -> Result<Vec<u8>, Malformed> {
        let bytes = List::read(memory, &self.list)?.read_bytes(memory, self.len_bytes)?;
        let computed = checksum(&[&bytes]);
        if computed != self.checksum {
            let stored = self.checksum;
            let place = Place::new(FORMAT.compatible, address);
            return Err(place.bad("checksum", Problem::Checksum { stored, computed }));
        }
        Ok(bytes)
    }
}
