//! All regions of one machine under one address space.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::sync::atomic::fence;

use abi::Memory;
use abi::MemoryMut;
use abi::NoMemory;
use pages::PageRange;

use crate::Mapping;

/// A region and its place in the arena.
#[derive(Debug, Clone)]
pub struct Placed {
    /// Its pages in the arena's address space.
    pub range: PageRange,
    /// Its bytes.
    pub mapping: Arc<Mapping>,
}

/// Regions under one address space: what the formats call physical memory. Copies share the memory.
#[derive(Debug, Clone, Default)]
pub struct Arena {
    regions: Vec<Placed>,
}

impl Arena {
    /// An arena of region 0 alone.
    ///
    /// # Panics
    /// Never: a mapping's size is one of whole pages.
    pub fn new(region0: Arc<Mapping>) -> Self {
        let range = PageRange::of_bytes(0, region0.len_bytes());
        let range = range.unwrap_or_else(|_| unreachable!("a region has whole pages"));
        Self { regions: vec![Placed { range, mapping: region0 }] }
    }

    /// Puts a region at `range`.
    ///
    /// # Errors
    /// The region, if its size is not the range's or another one is there already.
    pub fn place(&mut self, range: PageRange, mapping: Arc<Mapping>) -> Result<(), Arc<Mapping>> {
        let taken = self.regions.iter().any(|placed| placed.range.overlaps(range));
        if taken || range.len_bytes() != mapping.len_bytes() {
            return Err(mapping);
        }
        self.regions.push(Placed { range, mapping });
        Ok(())
    }

    /// The regions, region 0 first.
    pub fn regions(&self) -> &[Placed] {
        &self.regions
    }

    fn find(&self, address: u64, len: usize) -> Result<(&Mapping, u64), NoMemory> {
        let none = NoMemory::at(address, len);
        let holds = |placed: &&Placed| {
            let start = placed.range.start().address();
            address.checked_sub(start).is_some_and(|offset| offset < placed.range.len_bytes())
        };
        let placed = self.regions.iter().find(holds).ok_or(none)?;
        Ok((&placed.mapping, address - placed.range.start().address()))
    }
}

impl Memory for Arena {
    fn read(&self, address: u64, into: &mut [u8]) -> Result<(), NoMemory> {
        let (mapping, offset) = self.find(address, into.len())?;
        mapping.read(offset, into).map_err(|_| NoMemory::at(address, into.len()))
    }

    fn runs(&self) -> Vec<PageRange> {
        let mut runs: Vec<PageRange> = self.regions.iter().map(|placed| placed.range).collect();
        runs.sort_unstable_by_key(|run| run.start());
        runs
    }
}

impl MemoryMut for Arena {
    fn write(&mut self, address: u64, bytes: &[u8]) -> Result<(), NoMemory> {
        let (mapping, offset) = self.find(address, bytes.len())?;
        mapping.write(offset, bytes).map_err(|_| NoMemory::at(address, bytes.len()))
    }

    fn order_writes(&mut self) {
        fence(Ordering::SeqCst);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Region;

    fn mapping(pages: u64) -> Arc<Mapping> {
        Arc::new(Region::create("t", pages * 4096).unwrap().map().unwrap())
    }

    #[test]
    fn an_address_leads_to_its_region() {
        let mut arena = Arena::new(mapping(4));
        let ram = mapping(8);
        arena.place(PageRange::of_bytes(1 << 30, 8 * 4096).unwrap(), Arc::clone(&ram)).unwrap();
        arena.write((1 << 30) + 5000, b"there").unwrap();
        let mut read = [0; 5];
        ram.read(5000, &mut read).unwrap();
        assert_eq!(&read, b"there");
        assert_eq!(arena.read(4 * 4096, &mut read), Err(NoMemory::at(4 * 4096, 5)));
        assert!(arena.read((1 << 30) + 8 * 4096 - 2, &mut read).is_err(), "runs out of its region");
        arena.place(PageRange::of_bytes(1 << 20, 4096).unwrap(), mapping(1)).unwrap();
        let starts: Vec<u64> = arena.runs().iter().map(|run| run.start().address()).collect();
        assert_eq!(starts, [0, 1 << 20, 1 << 30]);
    }

    #[test]
    fn two_regions_cannot_have_one_place() {
        let mut arena = Arena::new(mapping(4));
        let at = |address| PageRange::of_bytes(address, 4096).unwrap();
        assert!(arena.place(at(3 * 4096), mapping(1)).is_err());
        assert!(arena.place(at(4 * 4096), mapping(2)).is_err(), "another size");
        assert!(arena.place(at(4 * 4096), mapping(1)).is_ok());
    }
}
