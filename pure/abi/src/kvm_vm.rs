//! `kvm_vm_luo_v1`: a VM as the kernel series hands it over: its type, and nothing else.
//!
//! Three layouts are known by this one name. The structure lies alone in memory that was zero, so those that are not
//! read can be told by what follows the type:
//!
//! | bytes | fields | read |
//! | --- | --- | --- |
//! | 8 | type | yes |
//! | 16 | type, address of the architecture's state | refused by name |
//! | 32 | type, number of memory attributes, [`vmalloc`](crate::vmalloc) descriptor of them | refused by name |

use zerocopy::FromBytes;
use zerocopy::Immutable;
use zerocopy::IntoBytes;
use zerocopy::KnownLayout;
use zerocopy::Unaligned;
use zerocopy::little_endian::U64;

use crate::memory::Malformed;
use crate::memory::Memory;
use crate::memory::Place;
use crate::memory::Problem;
use crate::vmalloc::Descriptor;

/// The compatible string.
pub const COMPATIBLE: &str = "kvm_vm_luo_v1";

/// As much as the longest of the layouts takes.
#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct Longest {
    vm_type: U64,
    second: U64,
    list: Descriptor,
}

/// A VM.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct KvmVm {
    /// The argument of KVM_CREATE_VM: on x86 0 for a plain VM; on others what the architecture makes of it.
    pub vm_type: u64,
}

/// A structure of this name, as far as it can be told what it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Draft {
    /// The VM's type.
    pub vm_type: u64,
    /// What follows it.
    pub layout: Layout,
}

/// What follows the type.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Layout {
    /// Nothing: 8 bytes.
    Type,
    /// The physical address of the architecture's state: 16 bytes.
    State {
        /// The address.
        address: u64,
    },
    /// Memory attributes: 32 bytes.
    Attributes {
        /// How many.
        count: u64,
        /// Where they are listed, 16 bytes each.
        list: Descriptor,
    },
    /// None of these.
    Unknown,
}

impl Draft {
    /// Reads the structure at `address`.
    ///
    /// # Errors
    /// [`Malformed`] if it is not there.
    pub fn read(memory: &(impl Memory + ?Sized), address: u64) -> Result<Self, Malformed> {
        let found: Longest = Place::new(COMPATIBLE, address).get(memory)?;
        let (second, list) = (found.second.get(), found.list);
        let layout = match (second, list.as_bytes().iter().all(|byte| *byte == 0)) {
            (0, true) => Layout::Type,
            (address, true) => Layout::State { address },
            (count @ 1.., false) => Layout::Attributes { count, list },
            (0, false) => Layout::Unknown,
        };
        Ok(Self { vm_type: found.vm_type.get(), layout })
    }
}

impl KvmVm {
    /// Reads the VM at `address`.
    ///
    /// # Errors
    /// [`Malformed`]: field `layout` for the other layouts of this name.
    pub fn read(memory: &(impl Memory + ?Sized), address: u64) -> Result<Self, Malformed> {
        let Draft { vm_type, layout } = Draft::read(memory, address)?;
        let other = match layout {
            Layout::Type => return Ok(Self { vm_type }),
            Layout::State { .. } => "is the one of 16 bytes, with an address of the architecture's state",
            Layout::Attributes { .. } => "is the one of 32 bytes, with memory attributes",
            Layout::Unknown => "is none of the three that are known",
        };
        Err(Place::new(COMPATIBLE, address).bad("layout", Problem::Structure(other)))
    }

    /// Its bytes.
    pub fn encode(self) -> [u8; 8] {
        self.vm_type.to_le_bytes()
    }
}
