//! Chains of blocks of equal entries: how sessions and files are listed.
//!
//! A block is a page: the next block's address, a count, then that many entries back to back. A valid
//! chain has no empty block and no cycle, and shares no block with another one.

use alloc::collections::BTreeSet;
use alloc::vec::Vec;

use pages::PAGE_BYTES;
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
use crate::memory::Problem;
use crate::memory::stop;

/// The most blocks in one chain.
pub const MAX_BLOCKS: usize = 10_000;

const FORMAT: &str = "kho block";
const HEADER_BYTES: usize = 16;

/// First 16 bytes of a block.
#[derive(
    Debug, Clone, Copy, Default, PartialEq, Eq, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned,
)]
#[repr(C)]
pub struct Header {
    /// Physical address of the next block, or 0.
    pub next: U64,
    /// Entries in this block.
    pub count: U64,
}

const _: () = assert!(size_of::<Header>() == HEADER_BYTES);

/// Entries that one block holds.
pub const fn capacity<E>() -> usize {
    (PAGE_BYTES - HEADER_BYTES) / size_of::<E>()
}

/// Blocks that hold `entries` entries. None for none: an empty block is never written.
pub const fn blocks<E>(entries: usize) -> usize {
    entries.div_ceil(capacity::<E>())
}

/// The bytes of the blocks that hold `entries`, to be written at `addresses`, one for each block.
///
/// # Panics
/// If `addresses` are not [`blocks`] many.
pub fn encode<E: IntoBytes + Immutable>(entries: &[E], addresses: &[u64]) -> Vec<[u8; PAGE_BYTES]> {
    assert_eq!(addresses.len(), blocks::<E>(entries.len()), "one address a block");
    let next = addresses.iter().skip(1).copied().chain([0]);
    entries
        .chunks(capacity::<E>())
        .zip(next)
        .map(|(entries, next)| {
            let mut page = [0; PAGE_BYTES];
            let count = U64::new(entries.len() as u64);
            let (head, rest) = page.split_at_mut(HEADER_BYTES);
            head.copy_from_slice(Header { next: next.into(), count }.as_bytes());
            for (slot, entry) in rest.chunks_exact_mut(size_of::<E>()).zip(entries) {
                slot.copy_from_slice(entry.as_bytes());
            }
            page
        })
        .collect()
}

/// A chain as it was read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Chain<E> {
    /// Physical addresses of the blocks.
    pub blocks: Vec<u64>,
    /// The entries of all blocks.
    pub entries: Vec<E>,
    /// Every block that another one follows is full, as writers leave them. A reader takes any others, too.
    pub filled: bool,
}

impl<E: FromBytes + IntoBytes + Clone> Chain<E> {
    /// Reads the chain that starts at `first`; 0 is the empty chain. `seen` holds the pages that other structures
    /// lie in, and gets this chain's: chains that shared a block would have the reader take its entries as often as
    /// it is named.
    ///
    /// # Errors
    /// [`Malformed`] for a block that cannot be read, is empty, says more entries than it can hold, or was
    /// met before, and for more than [`MAX_BLOCKS`].
    pub fn read(
        memory: &(impl Memory + ?Sized),
        first: u64,
        seen: &mut BTreeSet<u64>,
    ) -> Result<Self, Malformed> {
        Self::read_on(memory, first, seen, &mut stop)
    }

    /// Reads the chain that starts at `first` as [`Chain::read`] does, past what is wrong as far as that can be: of a block
    /// that says more entries than it can hold those before the first that is zero are taken.
    ///
    /// # Errors
    /// What `on_fault` makes of what is wrong.
    pub fn read_on(
        memory: &(impl Memory + ?Sized),
        first: u64,
        seen: &mut BTreeSet<u64>,
        on_fault: &mut OnFault<'_>,
    ) -> Result<Self, Malformed> {
        let mut chain = Self { blocks: Vec::new(), entries: Vec::new(), filled: true };
        let mut next = first;
        while next != 0 {
            let page = match enter(memory, next, chain.blocks.len(), seen) {
                Ok(page) => page,
                Err(fault) => return on_fault(fault).map(|()| chain),
            };
            let place = Place::new(FORMAT, next);
            chain.blocks.push(next);
            let (header, rest) =
                Header::read_from_prefix(&page).map_err(|_| place.bad("count", Problem::Truncated))?;
            next = header.next.get();
            let count = match count::<E>(place, header.count.get()) {
                Ok(count) => count,
                Err(fault) => {
                    on_fault(fault)?;
                    let zero = |entry: &&[u8]| entry.iter().any(|byte| *byte != 0);
                    rest.chunks_exact(size_of::<E>()).take_while(zero).count()
                }
            };
            chain.filled &= next == 0 || count == capacity::<E>();
            let read = rest.chunks_exact(size_of::<E>()).take(count);
            chain.entries.extend(read.filter_map(|entry| E::read_from_bytes(entry).ok()));
        }
        Ok(chain)
    }
}

/// The page of the block at `next`, of a chain with so many before it.
fn enter(
    memory: &(impl Memory + ?Sized),
    next: u64,
    before: usize,
    seen: &mut BTreeSet<u64>,
) -> Result<[u8; PAGE_BYTES], Malformed> {
    let place = Place::new(FORMAT, next);
    place.page_address("next", next)?;
    if !seen.insert(next) {
        return Err(place.bad("next", Problem::Repeated { found: next }));
    }
    if before == MAX_BLOCKS {
        let limit = MAX_BLOCKS as u64;
        return Err(place.bad("next", Problem::TooLarge { found: limit + 1, limit }));
    }
    place.get(memory)
}

fn count<E>(place: Place, count: u64) -> Result<usize, Malformed> {
    let limit = capacity::<E>() as u64;
    match usize::try_from(count) {
        Ok(0) => Err(place.bad("count", Problem::Zero)),
        Ok(here) if here <= capacity::<E>() => Ok(here),
        _ => Err(place.bad("count", Problem::TooLarge { found: count, limit })),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    type Entry = [u8; 80];

    fn chain(entries: &[Entry]) -> Vec<u8> {
        let addresses: Vec<u64> =
            (1..=blocks::<Entry>(entries.len())).map(|page| page as u64 * 4096).collect();
        let mut memory = vec![0; PAGE_BYTES];
        memory.extend(encode(entries, &addresses).iter().flatten());
        memory
    }

    #[test]
    fn a_block_holds_51_sessions_or_63_files() {
        assert_eq!(capacity::<[u8; 80]>(), 51);
        assert_eq!(capacity::<[u8; 64]>(), 63);
    }

    #[test]
    fn no_entries_make_no_block() {
        assert!(encode::<Entry>(&[], &[]).is_empty());
        assert_eq!([51, 52, 102, 103].map(blocks::<Entry>), [1, 2, 2, 3]);
    }

    /// H3.9.4.
    #[test]
    fn broken_chains_are_refused_by_field() {
        let whole = chain(&[[7; 80]; 60]);
        let broken = |at: usize, value: u64| {
            let mut memory = whole.clone();
            memory[at..at + 8].copy_from_slice(&value.to_le_bytes());
            Chain::<Entry>::read(&memory, 4096, &mut BTreeSet::new()).unwrap_err()
        };
        assert_eq!(broken(4096, 4096).problem, Problem::Repeated { found: 4096 });
        assert_eq!(broken(4096, 4097).problem, Problem::Misaligned { found: 4097 });
        assert_eq!(broken(4096 + 8, 0).problem, Problem::Zero);
        assert_eq!(broken(4096 + 8, 52).problem, Problem::TooLarge { found: 52, limit: 51 });
        assert!(matches!(broken(4096, 1 << 40).problem, Problem::Unreadable(_)));
    }

    proptest! {
        #[test]
        fn what_is_written_is_read(entries in proptest::collection::vec(any::<u8>(), 0..200)) {
            let entries: Vec<Entry> = entries.into_iter().map(|byte| [byte; 80]).collect();
            let first = if entries.is_empty() { 0 } else { 4096 };
            let read = Chain::<Entry>::read(&chain(&entries), first, &mut BTreeSet::new()).unwrap();
            prop_assert_eq!(read.entries, entries);
        }
    }
}
