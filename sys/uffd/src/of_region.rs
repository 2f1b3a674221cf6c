//! A region's mapping can be held and populated.

use crate::Mapped;

// SAFETY: a `region::Mapping` is one shared file mapping of its own, at one address, unmapped only by its drop;
// its bytes are only copied volatile or accessed as atomic words.
unsafe impl Mapped for region::Mapping {
    fn host_address(&self) -> usize {
        Self::host_address(self)
    }

    fn len_bytes(&self) -> usize {
        // It is mapped, so its length is one of this address space.
        usize::try_from(Self::len_bytes(self)).unwrap_or(0)
    }
}
