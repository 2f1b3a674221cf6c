//! `tideover-vm-v1`: the machine that a session keeps.
//!
//! The kernel series hands a VM over with nothing but its type (objection O0.2); this record also carries
//! the machine's identity, and every other record of the machine repeats it.

use alloc::vec::Vec;
use core::fmt;

use zerocopy::FromBytes;
use zerocopy::Immutable;
use zerocopy::IntoBytes;
use zerocopy::KnownLayout;
use zerocopy::Unaligned;
use zerocopy::little_endian::U64;

use crate::memory::Malformed;
use crate::memory::Memory;
use crate::memory::OnFault;
use crate::memory::Place;
use crate::memory::stop;
use crate::record::Format;
use crate::record::whole;

/// The format.
pub const FORMAT: Format =
    Format { compatible: "tideover-vm-v1", kind: *b"VM\0\0", version: 1, oldest: 1, max_payload_bytes: 4096 };

/// 128 random bits, drawn when a machine is made. Never an address, never used again.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Identity([u8; 16]);

impl Identity {
    /// The identity of these bits.
    pub const fn new(bits: [u8; 16]) -> Self {
        Self(bits)
    }

    /// Its bits.
    pub const fn bytes(self) -> [u8; 16] {
        self.0
    }
}

impl fmt::Display for Identity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for Identity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{self}")
    }
}

#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct Payload {
    identity: [u8; 16],
    vm_type: U64,
    vcpus: U64,
}

/// The record.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct VmRecord {
    /// Whose record it is.
    pub identity: Identity,
    /// Argument of `KVM_CREATE_VM`; 0 is the default type.
    pub vm_type: u64,
    /// How many vCPUs it has.
    pub vcpus: u64,
}

impl VmRecord {
    /// The record's bytes.
    pub fn encode(&self) -> Vec<u8> {
        let payload = Payload {
            identity: self.identity.bytes(),
            vm_type: self.vm_type.into(),
            vcpus: self.vcpus.into(),
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

    /// Reads the record at `address` as [`VmRecord::read`] does, past a checksum that is another one if `on_fault` says so.
    ///
    /// # Errors
    /// As [`VmRecord::read`].
    pub fn read_on(
        memory: &(impl Memory + ?Sized),
        address: u64,
        on_fault: &mut OnFault<'_>,
    ) -> Result<Self, Malformed> {
        let (_, payload) = FORMAT.read_on(memory, address, on_fault)?;
        let vm: &Payload = whole(Place::new(FORMAT.compatible, address), &payload)?;
        Ok(Self { identity: Identity::new(vm.identity), vm_type: vm.vm_type.get(), vcpus: vm.vcpus.get() })
    }
}
