//! A region's mapping can be given to a guest.

use std::sync::Arc;

use crate::HostMemory;

// SAFETY: a `region::Mapping` is one shared mapping at one address, unmapped when the last `Arc` is dropped, and
// its bytes are only copied volatile or accessed as atomic words.
unsafe impl HostMemory for Arc<region::Mapping> {
    fn host_address(&self) -> usize {
        region::Mapping::host_address(self)
    }

    fn len_bytes(&self) -> u64 {
        region::Mapping::len_bytes(self)
    }
}
