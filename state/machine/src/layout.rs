//! Where a machine's regions lie in its arena, and which token names what in its session.

use abi::regions::RegionEntry;
use abi::regions::Store;
use luo::Token;
use pages::PAGE_SIZE;
use pages::PageRange;

/// Bytes of region 0. Sparse: only what is used takes memory.
pub(crate) const REGION0_BYTES: u64 = 8 << 20;
/// Bytes of region 0 that are there from the start: what an update writes and reads while the guest stands still, and
/// more. A page fault there is a part of the pause.
pub(crate) const HOT_BYTES: u64 = 1 << 20;
/// Guest memory starts at multiples of this, so that huge pages of any size are aligned in the arena, too.
const ALIGN: u64 = 1 << 30;

/// The machine's own record.
pub(crate) const VM_TOKEN: Token = Token(1);
/// The first piece of guest memory; the others follow.
const FIRST_MEMORY_TOKEN: u64 = 0x100;
/// The first vCPU's or device's state; the others follow.
const FIRST_STATE_TOKEN: u64 = 0x1000;
/// The most pieces of guest memory: as many as the region table lists beside region 0.
pub(crate) const MAX_MEMORIES: usize = 255;

pub(crate) fn memory_token(index: usize) -> Token {
    Token(FIRST_MEMORY_TOKEN + index as u64)
}

pub(crate) fn state_token(index: usize) -> Token {
    Token(FIRST_STATE_TOKEN + index as u64)
}

pub(crate) fn is_memory_token(token: Token) -> bool {
    (FIRST_MEMORY_TOKEN..FIRST_STATE_TOKEN).contains(&token.0)
}

pub(crate) fn is_state_token(token: Token) -> bool {
    token.0 >= FIRST_STATE_TOKEN
}

/// A region's place in the arena, and the page size that it was made for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MemoryPlace {
    /// Its frames.
    pub frames: PageRange,
    /// In bytes.
    pub page_bytes: u64,
}

impl MemoryPlace {
    /// What the region table says of the region here, whose file has this inode number.
    pub(crate) fn entry(&self, file: u64) -> RegionEntry {
        RegionEntry { range: self.frames, page_bytes: self.page_bytes, store: Store::Memfd, file }
    }
}

/// Places for region 0 and for guest memory of these sizes and page sizes, in bytes. `None` if the address
/// space ends before they do.
pub(crate) fn places(memories: &[(u64, u64)]) -> Option<Vec<MemoryPlace>> {
    let region0 = PageRange::of_bytes(0, REGION0_BYTES).ok()?;
    let mut places = vec![MemoryPlace { frames: region0, page_bytes: PAGE_SIZE }];
    let mut next = ALIGN;
    for (size_bytes, page_bytes) in memories {
        let frames = PageRange::of_bytes(next, *size_bytes).ok()?;
        places.push(MemoryPlace { frames, page_bytes: *page_bytes });
        next = next.checked_add(*size_bytes)?.checked_next_multiple_of(ALIGN)?;
    }
    Some(places)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn guest_memory_starts_at_multiples_of_a_gib() {
        let places = places(&[(64 << 20, 4096), (3 << 30, 2 << 20), (4096, 4096)]).unwrap();
        let starts: Vec<u64> = places.iter().map(|place| place.frames.start().address() >> 30).collect();
        assert_eq!(starts, [0, 1, 2, 5]);
    }

    #[test]
    fn more_than_an_address_space_has_no_place() {
        assert_eq!(places(&[(1 << 63, 4096), (1 << 63, 4096)]), None);
    }

    #[test]
    fn tokens_of_different_things_differ() {
        assert!(memory_token(MAX_MEMORIES).0 < state_token(0).0);
        assert!(VM_TOKEN.0 < memory_token(0).0);
    }
}
