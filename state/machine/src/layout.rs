//! Where a machine's regions lie in its arena, and which token names what in its session.

use abi::numa::Policy;
use abi::regions::RegionEntry;
use abi::regions::Store;
use luo::Token;
use pages::PAGE_SIZE;
use pages::PageRange;
use region::path::MEMORY_AT;
use region::path::REGION0_AT;

/// Bytes of region 0. Sparse: only what is used takes memory.
pub(crate) const REGION0_BYTES: u64 = 8 << 20;
/// Bytes of region 0 that are there from the start: what an update writes and reads while the guest stands still, and
/// more. A page fault there is a part of the pause.
pub(crate) const HOT_BYTES: u64 = 512 << 10;
/// Guest memory starts at multiples of this, so that huge pages of any size are aligned in the arena, too.
const ALIGN: u64 = 1 << 30;
/// The same in the file of a machine at a path.
const PART_ALIGN: u64 = 2 << 20;

/// The machine's own record.
pub(crate) const VM_TOKEN: Token = Token(1);
/// The first piece of guest memory; the others follow.
const FIRST_MEMORY_TOKEN: u64 = 0x100;
/// The first vCPU's or device's state; the others follow.
const FIRST_STATE_TOKEN: u64 = 0x1000;
/// The first descriptor that goes with the machine; the others follow.
const FIRST_FD_TOKEN: u64 = 0x10_0000;
/// The most pieces of guest memory: as many as the region table lists beside region 0.
pub(crate) const MAX_MEMORIES: usize = 255;

pub(crate) fn memory_token(index: usize) -> Token {
    Token(FIRST_MEMORY_TOKEN + index as u64)
}

pub(crate) fn state_token(index: usize) -> Token {
    Token(FIRST_STATE_TOKEN + index as u64)
}

pub(crate) fn fd_token(index: usize) -> Token {
    Token(FIRST_FD_TOKEN + index as u64)
}

pub(crate) fn is_memory_token(token: Token) -> bool {
    (FIRST_MEMORY_TOKEN..FIRST_STATE_TOKEN).contains(&token.0)
}

pub(crate) fn is_state_token(token: Token) -> bool {
    (FIRST_STATE_TOKEN..FIRST_FD_TOKEN).contains(&token.0)
}

pub(crate) fn is_fd_token(token: Token) -> bool {
    token.0 >= FIRST_FD_TOKEN
}

/// A region's place in the arena, and what it was made of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MemoryPlace {
    /// Its frames.
    pub frames: PageRange,
    /// The page size that it was made for, in bytes.
    pub page_bytes: u64,
    /// What its memory comes from.
    pub store: Store,
    /// Which NUMA nodes its pages come from.
    pub policy: Policy,
}

impl MemoryPlace {
    /// What the region table says of the region here, whose file has this inode number.
    pub(crate) fn entry(&self, file: u64) -> RegionEntry {
        let Self { frames: range, page_bytes, store, policy } = *self;
        RegionEntry { range, page_bytes, store, file, policy }
    }

    /// The inverse of [`MemoryPlace::entry`].
    pub(crate) fn of(entry: &RegionEntry) -> Self {
        let RegionEntry { range: frames, page_bytes, store, policy, .. } = *entry;
        Self { frames, page_bytes, store, policy }
    }
}

/// What a piece of guest memory takes.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Wanted {
    pub(crate) size_bytes: u64,
    pub(crate) page_bytes: u64,
    pub(crate) store: Store,
    pub(crate) policy: Policy,
}

/// Places for region 0, which comes from `store`, and for these pieces of guest memory. `None` if the address space ends before they do.
pub(crate) fn places(store: Store, memories: impl Iterator<Item = Wanted>) -> Option<Vec<MemoryPlace>> {
    let frames = PageRange::of_bytes(0, REGION0_BYTES).ok()?;
    let region0 = MemoryPlace { frames, page_bytes: PAGE_SIZE, store, policy: Policy::Default };
    let mut places = vec![region0];
    let mut next = ALIGN;
    for Wanted { size_bytes, page_bytes, store, policy } in memories {
        let frames = PageRange::of_bytes(next, size_bytes).ok()?;
        places.push(MemoryPlace { frames, page_bytes, store, policy });
        next = next.checked_add(size_bytes)?.checked_next_multiple_of(ALIGN)?;
    }
    Some(places)
}

/// Where each region lies in the file of a machine at a path: region 0, then the pieces of guest memory, one after the other.
pub(crate) fn parts(sizes_bytes: impl Iterator<Item = u64>) -> impl Iterator<Item = u64> {
    let mut next = MEMORY_AT;
    sizes_bytes.enumerate().map(move |(index, size_bytes)| match index {
        0 => REGION0_AT,
        _ => {
            let at = next;
            // One that ends beyond all addresses does not lie in the file, which is found out there.
            next = next.saturating_add(size_bytes).checked_next_multiple_of(PART_ALIGN).unwrap_or(u64::MAX);
            at
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of_sizes(sizes: &[u64]) -> Option<Vec<MemoryPlace>> {
        let wanted = |size_bytes: &u64| Wanted {
            size_bytes: *size_bytes,
            page_bytes: 4096,
            store: Store::Memfd,
            policy: Policy::Default,
        };
        places(Store::Memfd, sizes.iter().map(wanted))
    }

    #[test]
    fn guest_memory_starts_at_multiples_of_a_gib() {
        let places = of_sizes(&[64 << 20, 3 << 30, 4096]).unwrap();
        let starts: Vec<u64> = places.iter().map(|place| place.frames.start().address() >> 30).collect();
        assert_eq!(starts, [0, 1, 2, 5]);
    }

    #[test]
    fn parts_of_a_file_lie_behind_each_other_at_whole_huge_pages() {
        let sizes = [REGION0_BYTES, 4 << 20, 4096, 2 << 20, u64::MAX, 1];
        let at: Vec<u64> = parts(sizes.into_iter()).collect();
        assert_eq!(at, [2 << 20, 16 << 20, 20 << 20, 22 << 20, 24 << 20, u64::MAX]);
        const { assert!(REGION0_AT + REGION0_BYTES <= MEMORY_AT) };
    }

    #[test]
    fn more_than_an_address_space_has_no_place() {
        assert_eq!(of_sizes(&[1 << 63, 1 << 63]), None);
    }

    #[test]
    fn tokens_of_different_things_differ() {
        assert!(memory_token(MAX_MEMORIES).0 < state_token(0).0);
        assert!(VM_TOKEN.0 < memory_token(0).0);
        let of = |token| [is_memory_token(token), is_state_token(token), is_fd_token(token)];
        assert_eq!(of(memory_token(0)), [true, false, false]);
        assert_eq!(of(state_token(0)), [false, true, false]);
        assert_eq!(of(fd_token(0)), [false, false, true]);
    }
}
