//! An arena's memory for tests.

use std::sync::Arc;
use std::sync::Mutex;
use std::sync::MutexGuard;
use std::sync::PoisonError;

use abi::Memory;
use abi::MemoryMut;
use abi::NoMemory;
use pages::PageRange;

/// Memory that outlives who writes it: copies share it. Behind region 0 there is guest memory, 64 regions of 64 GiB each,
/// that can be marked and has no bytes.
#[derive(Debug, Clone)]
pub struct VecArena(Arc<Mutex<Vec<u8>>>);

impl VecArena {
    /// Memory whose region 0 has `frames` frames.
    pub fn new(frames: usize) -> Self {
        Self(Arc::new(Mutex::new(vec![0; frames * pages::PAGE_BYTES])))
    }

    fn bytes(&self) -> MutexGuard<'_, Vec<u8>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Memory for VecArena {
    fn read(&self, address: u64, into: &mut [u8]) -> Result<(), NoMemory> {
        self.bytes().read(address, into)
    }

    fn runs(&self) -> Vec<PageRange> {
        let guest = (1..=64).filter_map(|region| PageRange::of_bytes(region << 36, 1 << 36).ok());
        self.bytes().runs().into_iter().chain(guest).collect()
    }
}

impl MemoryMut for VecArena {
    fn write(&mut self, address: u64, bytes: &[u8]) -> Result<(), NoMemory> {
        self.bytes().write(address, bytes)
    }

    fn order_writes(&mut self) {}
}
