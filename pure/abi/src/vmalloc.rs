//! `kho_vmalloc`: a list of scattered pages that make up one run of bytes.
//!
//! A [`Descriptor`] of 16 bytes names the first *chunk*; a chunk is a page that names 511 blocks and the
//! next chunk. A zero address ends a chunk's list early.

use alloc::collections::BTreeSet;
use alloc::vec::Vec;

use pages::Order;
use pages::PAGE_BYTES;
use pages::PAGE_SIZE;
use pages::PageRange;
use pages::Pfn;
use zerocopy::FromBytes;
use zerocopy::Immutable;
use zerocopy::IntoBytes;
use zerocopy::KnownLayout;
use zerocopy::Unaligned;
use zerocopy::little_endian::U16;
use zerocopy::little_endian::U32;
use zerocopy::little_endian::U64;

use crate::memory::Malformed;
use crate::memory::Memory;
use crate::memory::NoMemory;
use crate::memory::OnFault;
use crate::memory::Place;
use crate::memory::Problem;
use crate::memory::holds;
use crate::memory::stop;

/// Flag: plain vmalloc memory. What we write.
pub const PLAIN: u16 = 1;
/// Flag: huge mappings were allowed.
pub const HUGE: u16 = 2;
/// Blocks that a chunk names.
pub const CHUNK_BLOCKS: usize = 511;

const FORMAT: &str = "kho_vmalloc";

/// Names a list of pages. All zero for an empty run.
#[derive(
    Debug, Clone, Copy, Default, PartialEq, Eq, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned,
)]
#[repr(C)]
pub struct Descriptor {
    /// Physical address of the first chunk.
    pub first: U64,
    /// Pages of 4 KiB in all blocks.
    pub total_pages: U32,
    /// [`PLAIN`] and [`HUGE`]; the kernel's reader ignores others.
    pub flags: U16,
    /// Order of every block.
    pub order: U16,
}

/// A chunk's page.
#[derive(Clone, Copy, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub struct Chunk {
    /// Physical address of the next chunk, or 0.
    pub next: U64,
    /// Physical addresses of the blocks; 0 ends the list.
    pub blocks: [U64; CHUNK_BLOCKS],
}

impl core::fmt::Debug for Chunk {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.debug_struct("Chunk").field("next", &self.next).finish_non_exhaustive()
    }
}

const _: () = assert!(size_of::<Descriptor>() == 16 && size_of::<Chunk>() == PAGE_BYTES);

impl Descriptor {
    /// A descriptor for `total_pages` single pages.
    pub fn plain(first: u64, total_pages: u32) -> Self {
        Self { first: first.into(), total_pages: total_pages.into(), flags: PLAIN.into(), order: 0.into() }
    }

    /// Chunks that a writer makes for `blocks` blocks: a new one is linked as soon as one is full.
    pub const fn chunks(blocks: usize) -> usize {
        blocks / CHUNK_BLOCKS + 1
    }

    /// True of the descriptor of an empty run.
    pub fn is_empty(&self) -> bool {
        self.first.get() == 0
    }
}

/// A list as it was read: its chunks' pages, and its blocks in order.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct List {
    /// Physical addresses of the chunks.
    pub chunks: Vec<u64>,
    /// The blocks, each `order` large.
    pub blocks: Vec<PageRange>,
}

impl List {
    /// Reads the list behind `descriptor`.
    ///
    /// # Errors
    /// [`Malformed`] for an unknown order, a chunk that was met before, a block that is not there, or blocks that
    /// are not exactly the pages that the descriptor counts. Work is bounded by that count, and the count by the
    /// pages that there are.
    pub fn read(memory: &(impl Memory + ?Sized), descriptor: &Descriptor) -> Result<Self, Malformed> {
        let mut list = Self::default();
        let mut gather = |part| {
            match part {
                Part::Chunk { address, .. } => list.chunks.push(address),
                Part::Block(block) => list.blocks.push(block),
                Part::Missing { .. } => {}
            }
            Ok(())
        };
        walk_on(memory, descriptor, &mut gather, &mut stop)?;
        Ok(list)
    }

    /// Reads the first `len` bytes of the run.
    ///
    /// # Errors
    /// [`Malformed`] if the run is shorter, or more than one page longer than that, or is not there.
    pub fn read_bytes(&self, memory: &(impl Memory + ?Sized), len: u64) -> Result<Vec<u8>, Malformed> {
        let place = Place::new(FORMAT, self.chunks.first().copied().unwrap_or_default());
        let there: u64 = self.blocks.iter().map(|block| block.len_pages()).sum();
        place.expect("length in pages", there, len.div_ceil(PAGE_SIZE))?;
        let mut bytes = Vec::new();
        for page in self.blocks.iter().flat_map(|block| block.pages()) {
            let mut buffer = [0; PAGE_BYTES];
            let left = len - bytes.len() as u64;
            let here = usize::try_from(left.min(PAGE_SIZE)).unwrap_or(PAGE_BYTES);
            let (buffer, _) = buffer.split_at_mut(here);
            memory
                .read(page.address(), buffer)
                .map_err(|none| place.bad("blocks", Problem::Unreadable(none)))?;
            bytes.extend_from_slice(buffer);
        }
        Ok(bytes)
    }
}

/// What a walk meets.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Part {
    /// A chunk.
    Chunk {
        /// Physical address of its page.
        address: u64,
        /// Blocks that it names.
        blocks: usize,
    },
    /// A block; those of a chunk come before the chunk.
    Block(PageRange),
    /// A block that is not there, where another one stands that follows it in the run.
    Missing {
        /// Pages that it would have.
        pages: u64,
    },
}

/// Walks the list behind `descriptor`, as [`List::read`] reads it, past what is wrong as far as that can be.
///
/// # Errors
/// What `visit` and `on_fault` make of what they are told.
pub fn walk_on(
    memory: &(impl Memory + ?Sized),
    descriptor: &Descriptor,
    visit: &mut dyn FnMut(Part) -> Result<(), Malformed>,
    on_fault: &mut OnFault<'_>,
) -> Result<(), Malformed> {
    let place = Place::new(FORMAT, descriptor.first.get());
    let total = u64::from(descriptor.total_pages.get());
    if descriptor.is_empty() {
        return place.expect("total_pages", total, 0).or_else(on_fault);
    }
    let runs = memory.runs();
    let limit: u64 = runs.iter().map(|run| run.len_pages()).sum();
    if total > limit {
        on_fault(place.bad("total_pages", Problem::TooLarge { found: total, limit }))?;
    }
    let found = descriptor.order.get().into();
    match Order::new(found) {
        Ok(order) => {
            let limit = total.min(limit);
            Walk { memory, runs, order, limit, pages: 0, named: 0, visit, on_fault }.chunks(place, total)
        }
        Err(_) => on_fault(place.bad("order", Problem::Unknown { found: found.into() })),
    }
}

struct Walk<'a, 'b, M: ?Sized> {
    memory: &'a M,
    runs: Vec<PageRange>,
    order: Order,
    /// Pages that there may be at most.
    limit: u64,
    /// Pages in the blocks so far.
    pages: u64,
    /// Blocks so far.
    named: usize,
    visit: &'a mut dyn FnMut(Part) -> Result<(), Malformed>,
    on_fault: &'a mut OnFault<'b>,
}

impl<M: Memory + ?Sized> Walk<'_, '_, M> {
    fn chunks(mut self, mut place: Place, total: u64) -> Result<(), Malformed> {
        let mut next = place.address;
        let mut seen = BTreeSet::new();
        while next != 0 {
            let chunk = match self.enter(place, next, &mut seen) {
                Ok(chunk) => chunk,
                Err(fault) => return (self.on_fault)(fault),
            };
            place = Place::new(FORMAT, next);
            if seen.len() > 1 && !self.named.is_multiple_of(CHUNK_BLOCKS) {
                (self.on_fault)(place.bad("next", Problem::Structure("follows a chunk that is not full")))?;
            }
            let before = self.named;
            for block in chunk.blocks.iter().map(|block| block.get()).take_while(|block| *block != 0) {
                if !self.block(place, block, total)? {
                    return Ok(());
                }
            }
            (self.visit)(Part::Chunk { address: next, blocks: self.named - before })?;
            next = chunk.next.get();
            if self.named == 0 && next != 0 {
                return (self.on_fault)(place.bad("next", Problem::Structure("follows an empty chunk")));
            }
        }
        place.expect("total_pages", total, self.pages).or_else(self.on_fault)
    }

    fn enter(&self, place: Place, next: u64, seen: &mut BTreeSet<u64>) -> Result<Chunk, Malformed> {
        let place = Place::new(FORMAT, place.page_address("next", next)?);
        if !seen.insert(next) {
            return Err(place.bad("next", Problem::Repeated { found: next }));
        }
        place.get(self.memory)
    }

    /// False if the list ends here, as it is longer than it may be.
    fn block(&mut self, place: Place, block: u64, total: u64) -> Result<bool, Malformed> {
        let pages = self.order.len_pages();
        self.pages = self.pages.saturating_add(pages);
        if self.pages > self.limit {
            let problem = Problem::TooLarge { found: self.pages, limit: total };
            // What there is not so many pages for was told already.
            let told = self.pages <= total;
            return if told {
                Ok(false)
            } else {
                (self.on_fault)(place.bad("blocks", problem)).map(|()| false)
            };
        }
        self.named += 1;
        let range = place.page_address("blocks", block).and_then(|block| {
            let range = Pfn::at(block).and_then(|start| PageRange::block(start, self.order)).ok();
            let none = NoMemory { address: block, len_bytes: pages.saturating_mul(PAGE_SIZE) };
            let range = range.filter(|range| holds(&self.runs, *range));
            range.ok_or_else(|| place.bad("blocks", Problem::Unreadable(none)))
        });
        match range {
            Ok(range) => (self.visit)(Part::Block(range))?,
            Err(fault) => {
                (self.on_fault)(fault)?;
                (self.visit)(Part::Missing { pages })?;
            }
        }
        Ok(true)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mark(index: usize) -> u8 {
        u8::try_from(index % 251).unwrap()
    }

    /// Data pages from page 100 on, chunks from page 1 on; written as the kernel writes them.
    fn memory(blocks: usize) -> (Vec<u8>, Descriptor) {
        let mut memory = vec![0; (100 + blocks) * PAGE_BYTES];
        for index in 0..blocks {
            let at = (1 + index / CHUNK_BLOCKS) * PAGE_BYTES + 8 + index % CHUNK_BLOCKS * 8;
            memory[at..at + 8].copy_from_slice(&((100 + index as u64) * PAGE_SIZE).to_le_bytes());
            memory[(100 + index) * PAGE_BYTES] = mark(index);
        }
        for chunk in 1..Descriptor::chunks(blocks) {
            memory[chunk * PAGE_BYTES..][..8]
                .copy_from_slice(&((chunk as u64 + 1) * PAGE_SIZE).to_le_bytes());
        }
        (memory, Descriptor::plain(PAGE_SIZE, u32::try_from(blocks).unwrap()))
    }

    #[test]
    fn the_worked_example_has_the_kernels_bytes() {
        let descriptor = Descriptor::plain(0x1_0700_0000, 20);
        assert_eq!(descriptor.as_bytes(), [0, 0, 0, 7, 1, 0, 0, 0, 0x14, 0, 0, 0, 1, 0, 0, 0]);
    }

    #[test]
    fn a_full_chunk_is_followed_by_another() {
        assert_eq!([0, 510, 511, 1021, 1022].map(Descriptor::chunks), [1, 1, 2, 2, 3]);
        let (memory, descriptor) = memory(511);
        let list = List::read(&memory, &descriptor).unwrap();
        assert_eq!((list.chunks.len(), list.blocks.len()), (2, 511));
    }

    #[test]
    fn a_list_is_read_in_order() {
        let (memory, descriptor) = memory(600);
        let list = List::read(&memory, &descriptor).unwrap();
        let bytes = list.read_bytes(&memory, 599 * PAGE_SIZE + 1).unwrap();
        assert_eq!(bytes.len(), 599 * PAGE_BYTES + 1);
        assert!(bytes.chunks(PAGE_BYTES).enumerate().all(|(index, page)| page[0] == mark(index)));
        assert!(list.read_bytes(&memory, 10).is_err());
    }

    #[test]
    fn blocks_that_are_not_the_count_are_refused() {
        let (memory, mut descriptor) = memory(20);
        descriptor.total_pages = 21.into();
        assert_eq!(List::read(&memory, &descriptor).unwrap_err().field, "total_pages");
        descriptor.total_pages = 19.into();
        assert_eq!(List::read(&memory, &descriptor).unwrap_err().field, "blocks");
    }

    #[test]
    fn a_list_that_goes_round_ends_with_an_error() {
        let (mut memory, mut descriptor) = memory(511 * 3);
        descriptor.total_pages = 1500.into();
        for next in [PAGE_SIZE, 2 * PAGE_SIZE] {
            memory[2 * PAGE_BYTES..2 * PAGE_BYTES + 8].copy_from_slice(&next.to_le_bytes());
            let error = List::read(&memory, &descriptor).unwrap_err();
            assert_eq!((error.field, error.problem), ("next", Problem::Repeated { found: next }));
        }
        memory[PAGE_BYTES + 8..2 * PAGE_BYTES].fill(0);
        assert_eq!(List::read(&memory, &descriptor).unwrap_err().field, "next");
    }

    #[test]
    fn a_count_of_more_pages_than_there_are_is_refused_before_the_first_chunk() {
        let (memory, mut descriptor) = memory(20);
        // There is no chunk: who looked for it would name that.
        descriptor.first = (1u64 << 40).into();
        descriptor.total_pages = u32::MAX.into();
        let error = List::read(&memory, &descriptor).unwrap_err();
        let problem = Problem::TooLarge { found: u32::MAX.into(), limit: 120 };
        assert_eq!((error.field, error.problem), ("total_pages", problem));
    }

    #[test]
    fn a_block_that_is_not_there_is_refused() {
        let last = 119 * PAGE_SIZE;
        for (block, order) in [(1 << 40, 0u16), (u64::MAX - 4095, 0), (last - 3 * PAGE_SIZE, 3), (last, 1)] {
            let (mut memory, mut descriptor) = memory(20);
            descriptor.order = order.into();
            memory[PAGE_BYTES + 8..][..8].copy_from_slice(&block.to_le_bytes());
            let error = List::read(&memory, &descriptor).unwrap_err();
            assert!(matches!((error.field, error.problem), ("blocks", Problem::Unreadable(_))), "{block:#x}");
        }
    }
}
