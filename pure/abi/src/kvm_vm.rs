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

impl KvmVm {
    /// Reads the VM at `address`.
    ///
    /// # Errors
    /// [`Malformed`]: field `layout` for the other layouts of this name.
    pub fn read(memory: &(impl Memory + ?Sized), address: u64) -> Result<Self, Malformed> {
        let place = Place::new(COMPATIBLE, address);
        let found: Longest = place.get(memory)?;
        let (second, list) = (found.second.get(), &found.list);
        let other = match (second, list.as_bytes().iter().all(|byte| *byte == 0)) {
            (0, true) => return Ok(Self { vm_type: found.vm_type.get() }),
            (_, true) => "is the one of 16 bytes, with an address of the architecture's state",
            (1.., false) => "is the one of 32 bytes, with memory attributes",
            (0, false) => "is none of the three that are known",
        };
        Err(place.bad("layout", Problem::Structure(other)))
    }

    /// Its bytes.
    pub fn encode(self) -> [u8; 8] {
        self.vm_type.to_le_bytes()
    }
}
