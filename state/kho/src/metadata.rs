//! Region 0 as what the tree hangs on is read from.

use abi::Memory;
use abi::NoMemory;
use pages::PAGE_SIZE;
use pages::PageRange;
use pages::Pfn;

/// The frames of region 0, and nothing else of an arena: guest memory is the guest's to write, and there is more of it
/// than a reader can look through.
pub struct Metadata<'a> {
    memory: &'a dyn Memory,
    frames: u64,
}

impl std::fmt::Debug for Metadata<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Metadata").field("frames", &self.frames).finish_non_exhaustive()
    }
}

impl<'a> Metadata<'a> {
    pub(crate) fn new(memory: &'a dyn Memory, frames: u64) -> Self {
        Self { memory, frames }
    }
}

impl Memory for Metadata<'_> {
    fn read(&self, address: u64, into: &mut [u8]) -> Result<(), NoMemory> {
        let none = NoMemory::at(address, into.len());
        let end = address.checked_add(none.len_bytes);
        match end.filter(|end| end.div_ceil(PAGE_SIZE) <= self.frames) {
            Some(_) => self.memory.read(address, into),
            None => Err(none),
        }
    }

    fn runs(&self) -> Vec<PageRange> {
        PageRange::new(Pfn::ZERO, self.frames).into_iter().collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_lies_behind_region_0_is_not_there() {
        let memory = vec![7; 8 * 4096];
        let metadata = Metadata::new(&memory, 2);
        let mut bytes = [0; 2];
        metadata.read(2 * 4096 - 2, &mut bytes).unwrap();
        assert_eq!(bytes, [7; 2]);
        for address in [2 * 4096 - 1, 2 * 4096, 7 * 4096, u64::MAX - 1, u64::MAX] {
            assert_eq!(metadata.read(address, &mut bytes), Err(NoMemory::at(address, 2)), "{address:#x}");
        }
        assert_eq!(metadata.runs(), [PageRange::new(Pfn::ZERO, 2).unwrap()]);
    }
}
