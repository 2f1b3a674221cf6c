//! Page frames, orders and ranges of frames, and their algebra.
//!
//! A *page* is 4 KiB of a physical address space; its number is a [`Pfn`]. A *block* of [`Order`] n is
//! 2ⁿ pages that start at a multiple of 2ⁿ. A [`PageRange`] is a run of pages of any length and start;
//! [`PageRange::blocks`] cuts it into blocks the way Kexec Handover does.
//!
//! Nothing here reads memory: the address space may be a machine's, or an arena's.
#![cfg_attr(not(test), no_std)]
#![forbid(unsafe_code)]

use core::fmt;

use thiserror::Error;

/// log2 of [`PAGE_SIZE`].
pub const PAGE_SHIFT: u32 = 12;
/// Bytes in one page. Part of every format: there is no handover between different page sizes.
pub const PAGE_SIZE: u64 = 1 << PAGE_SHIFT;
/// [`PAGE_SIZE`] for lengths of buffers.
pub const PAGE_BYTES: usize = 4096;
/// Page frame numbers have this many bits, so that an address has 64.
pub const PFN_BITS: u32 = 64 - PAGE_SHIFT;

/// Why a number is not what it was taken for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
pub enum PageError {
    /// The address is not a multiple of 4096.
    #[error("address {address:#x} is not page aligned")]
    Misaligned {
        /// The address, in bytes.
        address: u64,
    },
    /// The length is not a multiple of 4096.
    #[error("length {bytes:#x} is not a multiple of the page size")]
    PartialPage {
        /// The length, in bytes.
        bytes: u64,
    },
    /// The range runs past the last page that an address can name.
    #[error("{count} pages from page {start:#x} run past the end of the address space")]
    Overflow {
        /// First page frame number.
        start: u64,
        /// Pages.
        count: u64,
    },
    /// An order above [`Order::MAX`].
    #[error("order {order} is above {}", Order::MAX.get())]
    Order {
        /// The order.
        order: u32,
    },
}

/// The number of one page: its physical address divided by 4096.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Pfn(u64);

impl Pfn {
    /// The first page.
    pub const ZERO: Self = Self(0);

    /// The page with this number.
    ///
    /// # Errors
    /// [`PageError::Overflow`] if no 64-bit address lies in it.
    pub const fn new(number: u64) -> Result<Self, PageError> {
        if number >> PFN_BITS != 0 {
            return Err(PageError::Overflow { start: number, count: 1 });
        }
        Ok(Self(number))
    }

    /// The page that starts at `address`.
    ///
    /// # Errors
    /// [`PageError::Misaligned`] if none starts there.
    pub const fn at(address: u64) -> Result<Self, PageError> {
        if !address.is_multiple_of(PAGE_SIZE) {
            return Err(PageError::Misaligned { address });
        }
        Ok(Self(address >> PAGE_SHIFT))
    }

    /// The page's number.
    pub const fn get(self) -> u64 {
        self.0
    }

    /// Physical address of the page's first byte.
    pub const fn address(self) -> u64 {
        self.0 << PAGE_SHIFT
    }
}

impl fmt::Debug for Pfn {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "pfn {:#x}", self.0)
    }
}

/// log2 of a block's pages: 0 is 4 KiB, 9 is 2 MiB, 18 is 1 GiB.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Order(u8);

impl Order {
    /// One page.
    pub const PAGE: Self = Self(0);
    /// The largest order a block can have and still lie in a 64-bit address space.
    pub const MAX: Self = Self(51);

    /// This order.
    ///
    /// # Errors
    /// [`PageError::Order`] above [`Order::MAX`].
    pub fn new(order: u32) -> Result<Self, PageError> {
        match u8::try_from(order) {
            Ok(small) if small <= Self::MAX.0 => Ok(Self(small)),
            _ => Err(PageError::Order { order }),
        }
    }

    /// The order as a number.
    pub const fn get(self) -> u32 {
        self.0 as u32
    }

    /// Pages in a block of this order.
    pub const fn len_pages(self) -> u64 {
        1 << self.0
    }
}

/// A run of pages: the first, and how many. It may be empty, and never runs past the address space.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct PageRange {
    start: Pfn,
    count: u64,
}

impl PageRange {
    /// `count` pages from `start`.
    ///
    /// # Errors
    /// [`PageError::Overflow`] if the run leaves the address space.
    pub const fn new(start: Pfn, count: u64) -> Result<Self, PageError> {
        match start.0.checked_add(count) {
            Some(end) if end <= 1 << PFN_BITS => Ok(Self { start, count }),
            _ => Err(PageError::Overflow { start: start.0, count }),
        }
    }

    /// The pages of `bytes` bytes at `address`.
    ///
    /// # Errors
    /// [`PageError`] if either is no multiple of the page size, or the run leaves the address space.
    pub const fn of_bytes(address: u64, bytes: u64) -> Result<Self, PageError> {
        if !bytes.is_multiple_of(PAGE_SIZE) {
            return Err(PageError::PartialPage { bytes });
        }
        match Pfn::at(address) {
            Ok(start) => Self::new(start, bytes >> PAGE_SHIFT),
            Err(error) => Err(error),
        }
    }

    /// The single page `pfn`.
    pub const fn page(pfn: Pfn) -> Self {
        Self { start: pfn, count: 1 }
    }

    /// The block of `order` at `start`, aligned or not.
    ///
    /// # Errors
    /// [`PageError::Overflow`] if it leaves the address space.
    pub const fn block(start: Pfn, order: Order) -> Result<Self, PageError> {
        Self::new(start, order.len_pages())
    }

    /// The first page.
    pub const fn start(self) -> Pfn {
        self.start
    }

    /// Pages in the run.
    pub const fn len_pages(self) -> u64 {
        self.count
    }

    /// Bytes in the run; all of the address space counts as `u64::MAX`.
    pub const fn len_bytes(self) -> u64 {
        self.count.saturating_mul(PAGE_SIZE)
    }

    /// True of a run of no pages.
    pub const fn is_empty(self) -> bool {
        self.count == 0
    }

    /// Number of the page after the last one.
    pub const fn end(self) -> u64 {
        self.start.0 + self.count
    }

    /// True if `pfn` is one of these pages.
    pub const fn contains(self, pfn: Pfn) -> bool {
        self.start.0 <= pfn.0 && pfn.0 < self.end()
    }

    /// True if every page of `other` is one of these.
    pub const fn covers(self, other: Self) -> bool {
        other.count == 0 || (self.start.0 <= other.start.0 && other.end() <= self.end())
    }

    /// True if some page is in both.
    pub const fn overlaps(self, other: Self) -> bool {
        self.count > 0 && other.count > 0 && self.start.0 < other.end() && other.start.0 < self.end()
    }

    /// The pages, one by one.
    pub fn pages(self) -> impl Iterator<Item = Pfn> {
        (self.start.0..self.end()).map(Pfn)
    }

    /// The run cut into the largest aligned blocks, from its start to its end, as Kexec Handover cuts a
    /// run that it preserves (on one NUMA node).
    pub fn blocks(self) -> Blocks {
        Blocks { next: self.start.0, end: self.end() }
    }
}

impl fmt::Debug for PageRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "pfn {:#x}..{:#x}", self.start.0, self.end())
    }
}

/// Iterator of [`PageRange::blocks`].
#[derive(Debug, Clone)]
pub struct Blocks {
    next: u64,
    end: u64,
}

impl Iterator for Blocks {
    type Item = (Pfn, Order);

    fn next(&mut self) -> Option<Self::Item> {
        let left = self.end.checked_sub(self.next).filter(|left| *left > 0)?;
        let aligned = self.next.trailing_zeros();
        let fits = left.ilog2();
        let order = Order::new(aligned.min(fits).min(Order::MAX.get())).ok()?;
        let block = (Pfn(self.next), order);
        self.next += order.len_pages();
        Some(block)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn blocks(start: u64, count: u64) -> Vec<(u64, u32)> {
        let range = PageRange::new(Pfn::new(start).unwrap(), count).unwrap();
        range.blocks().map(|(pfn, order)| (pfn.get(), order.get())).collect()
    }

    #[test]
    fn a_run_is_cut_as_the_kernel_cuts_it() {
        assert_eq!(blocks(0x10003, 10), [(0x10003, 0), (0x10004, 2), (0x10008, 2), (0x1000c, 0)]);
    }

    /// P6.5.7.
    #[test]
    fn one_gib_at_one_gib_is_one_block() {
        assert_eq!(blocks(1 << 18, 1 << 18), [(1 << 18, 18)]);
    }

    #[test]
    fn a_range_past_the_last_page_is_refused() {
        let last = Pfn::new((1 << PFN_BITS) - 1).unwrap();
        assert!(PageRange::new(last, 1).is_ok());
        assert_eq!(PageRange::new(last, 2), Err(PageError::Overflow { start: last.get(), count: 2 }));
        assert_eq!(PageRange::of_bytes(0x1001, 4096), Err(PageError::Misaligned { address: 0x1001 }));
        assert_eq!(PageRange::of_bytes(0x1000, 4097), Err(PageError::PartialPage { bytes: 4097 }));
    }

    proptest! {
        #[test]
        fn blocks_are_aligned_adjacent_and_cover_the_run(start in 0u64..1 << 40, count in 0u64..1 << 30) {
            let range = PageRange::new(Pfn::new(start).unwrap(), count).unwrap();
            let mut next = start;
            for (pfn, order) in range.blocks() {
                prop_assert_eq!(pfn.get(), next);
                prop_assert!(pfn.get().is_multiple_of(order.len_pages()));
                next += order.len_pages();
            }
            prop_assert_eq!(next, start + count);
        }
    }
}
