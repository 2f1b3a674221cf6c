//! Physical memory made of an input's bytes: few pages, at addresses that matter, most of them zero.
//!
//! | bytes | |
//! | --- | --- |
//! | 1 | [`Flags`] |
//! | then pieces, to the end: 1 | which page: see [`pfn`] |
//! | 2 | where in it, of which the lowest 12 bits count |
//! | 1 | how many bytes |
//! | that many | the bytes; what would not fit the page is left out |
//!
//! A page is there if a piece names it. So a change of one byte of an input is a change of one field or of one place.

use std::collections::BTreeMap;

use abi::Memory;
use abi::MemoryMut;
use abi::NoMemory;
use abi::arena;
use abi::record;
use pages::PAGE_BYTES;
use pages::PAGE_SIZE;
use pages::PageRange;
use pages::Pfn;

/// First page of guest memory, as the arenas of the reference VMM have it.
const GUEST: u64 = 1 << 18;
/// The last pages that there can be.
const LAST: u64 = (1 << 52) - 64;

/// The page that a piece's first byte names: half of them from address 0 on, some in guest memory, some at the very end.
const fn pfn(code: u8) -> u64 {
    match code {
        0..128 => code as u64,
        128..192 => GUEST + (code - 128) as u64,
        192.. => LAST + (code - 192) as u64,
    }
}

/// The inverse of [`pfn`].
fn code(pfn: u64) -> Option<u8> {
    (0..=u8::MAX).find(|code| self::pfn(*code) == pfn)
}

/// What an input asks for beside its bytes.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Flags(u8);

impl Flags {
    /// Checksums are put right, so that what stands behind them is reached.
    pub(crate) const MEND: u8 = 1;

    /// Seven bits that mean what a target says.
    pub(crate) const fn rest(self) -> u8 {
        self.0 >> 1
    }
}

/// Pages that are there.
#[derive(Debug, Clone, Default)]
pub(crate) struct Pages(BTreeMap<u64, Box<[u8; PAGE_BYTES]>>);

impl Pages {
    /// The memory that an input describes.
    pub(crate) fn of(input: &[u8]) -> (Flags, Self) {
        let (&flags, mut rest) = input.split_first().unwrap_or((&0, &[]));
        let mut pages = Self::default();
        while let [page, low, high, len, after @ ..] = rest {
            let len = usize::from(*len).min(after.len());
            let (bytes, after) = after.split_at(len);
            pages.put(pfn(*page), usize::from(u16::from_le_bytes([*low, *high]) & 0xFFF), bytes);
            rest = after;
        }
        if flags & Flags::MEND != 0 {
            pages.mend();
        }
        (Flags(flags), pages)
    }

    fn put(&mut self, pfn: u64, offset: usize, bytes: &[u8]) {
        let page = self.0.entry(pfn).or_insert_with(|| Box::new([0; PAGE_BYTES]));
        for (to, from) in page.iter_mut().skip(offset).zip(bytes) {
            *to = *from;
        }
    }

    /// A page that is there, filled from its start.
    pub(crate) fn page(mut self, pfn: u64, bytes: &[u8]) -> Self {
        for (number, bytes) in (pfn..).zip(bytes.chunks(PAGE_BYTES)) {
            self.put(number, 0, bytes);
        }
        self
    }

    /// Every page of these, even if nothing is on it.
    pub(crate) fn blank(mut self, pfns: std::ops::Range<u64>) -> Self {
        pfns.for_each(|pfn| self.put(pfn, 0, &[]));
        self
    }

    /// The input that describes this memory.
    pub(crate) fn input(&self, flags: u8) -> Vec<u8> {
        let mut input = vec![flags];
        for (pfn, page) in &self.0 {
            let Some(code) = code(*pfn) else { continue };
            let before = input.len();
            for (offset, bytes) in pieces(page.as_slice()) {
                let [low, high, ..] = offset.to_le_bytes();
                input.extend([code, low, high, u8::try_from(bytes.len()).unwrap_or(u8::MAX)]);
                input.extend_from_slice(bytes);
            }
            if input.len() == before {
                input.extend([code, 0, 0, 0]);
            }
        }
        input
    }

    fn u64_at(&self, address: u64) -> u64 {
        let mut bytes = [0; 8];
        if self.read(address, &mut bytes).is_err() { 0 } else { u64::from_le_bytes(bytes) }
    }

    /// Puts the checksums right of an arena's header, of its root slots and of every record.
    fn mend(&mut self) {
        if self.u64_at(0) == u64::from_le_bytes(arena::MAGIC) {
            self.mend_bytes(0, 64, 12);
            for slot in arena::SLOT_ADDRESSES {
                self.mend_bytes(slot, 32, 16);
            }
        }
        for pfn in self.0.keys().copied().collect::<Vec<_>>() {
            let address = pfn * PAGE_SIZE;
            let payload = self.u64_at(address.wrapping_add(16));
            if self.u64_at(address) == u64::from_le_bytes(*b"TDRECORD") && payload < 1 << 16 {
                self.mend_bytes(address, record::HEADER_BYTES + payload, 24);
            }
        }
    }

    /// Puts right the checksum of 4 bytes at `at` in the `len` bytes at `address`, if they are there.
    fn mend_bytes(&mut self, address: u64, len: u64, at: usize) {
        let mut bytes = vec![0; usize::try_from(len).unwrap_or_default()];
        if self.read(address, &mut bytes).is_err() {
            return;
        }
        bytes.iter_mut().skip(at).take(4).for_each(|byte| *byte = 0);
        let sum = record::checksum(&[&bytes]).to_le_bytes();
        // It was read a moment ago.
        let _ = self.write(address + at as u64, &sum);
    }
}

/// The parts of a page that are not zero, of at most 255 bytes, short runs of zeroes between them included.
fn pieces(page: &[u8]) -> Vec<(usize, &[u8])> {
    const GAP: usize = 8;
    let mut found = Vec::new();
    let mut at = 0;
    while let Some(skip) = page.get(at..).and_then(|rest| rest.iter().position(|byte| *byte != 0)) {
        let start = at + skip;
        let rest = page.get(start..).unwrap_or_default();
        let end = rest.windows(GAP).position(|window| window.iter().all(|byte| *byte == 0));
        let end = end.unwrap_or_else(|| rest.iter().rposition(|byte| *byte != 0).map_or(0, |last| last + 1));
        let bytes = rest.get(..end.clamp(1, 255)).unwrap_or_default();
        found.push((start, bytes));
        at = start + bytes.len();
    }
    found
}

impl Memory for Pages {
    fn read(&self, address: u64, into: &mut [u8]) -> Result<(), NoMemory> {
        let none = NoMemory::at(address, into.len());
        let (mut at, mut into) = (address, into);
        while !into.is_empty() {
            let page = self.0.get(&(at / PAGE_SIZE)).ok_or(none)?;
            let offset = usize::try_from(at % PAGE_SIZE).unwrap_or_default();
            let (here, after) = into.split_at_mut(into.len().min(PAGE_BYTES - offset));
            here.copy_from_slice(page.get(offset..offset + here.len()).ok_or(none)?);
            let len = here.len() as u64;
            into = after;
            at = match at.checked_add(len) {
                Some(next) => next,
                None if into.is_empty() => break,
                None => return Err(none),
            };
        }
        Ok(())
    }

    fn runs(&self) -> Vec<PageRange> {
        let mut runs: Vec<(u64, u64)> = Vec::new();
        for pfn in self.0.keys() {
            match runs.last_mut() {
                Some((start, count)) if *start + *count == *pfn => *count += 1,
                _ => runs.push((*pfn, 1)),
            }
        }
        runs.iter().filter_map(|(start, count)| PageRange::new(Pfn::new(*start).ok()?, *count).ok()).collect()
    }
}

impl MemoryMut for Pages {
    fn write(&mut self, address: u64, bytes: &[u8]) -> Result<(), NoMemory> {
        let none = NoMemory::at(address, bytes.len());
        // All of it has to be there before any of it is written.
        self.read(address, &mut vec![0; bytes.len()])?;
        for (index, byte) in bytes.iter().enumerate() {
            let at = address + index as u64;
            let offset = usize::try_from(at % PAGE_SIZE).unwrap_or_default();
            let page = self.0.get_mut(&(at / PAGE_SIZE)).ok_or(none)?;
            page[offset] = *byte;
        }
        Ok(())
    }

    fn order_writes(&mut self) {}
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_memory_is_the_same_through_its_input() {
        let mut page = [0; PAGE_BYTES];
        page[7] = 1;
        page[13..400].fill(2);
        page[PAGE_BYTES - 1] = 3;
        let pages =
            Pages::default().page(0, &page).blank(5..7).page(GUEST + 1, &page).page((1 << 52) - 1, &page);
        let (_, again) = Pages::of(&pages.input(0));
        assert_eq!(again.0, pages.0);
        let lens: Vec<u64> = again.runs().iter().map(|run| run.len_pages()).collect();
        assert_eq!(lens, [1, 2, 1, 1]);
    }

    #[test]
    fn the_last_byte_that_there_is_can_be_read_and_nothing_behind_it() {
        let pages = Pages::default().blank((1 << 52) - 1..1 << 52);
        let mut bytes = [1; 16];
        assert_eq!(pages.read(u64::MAX - 15, &mut bytes), Ok(()));
        pages.read(u64::MAX - 14, &mut bytes).unwrap_err();
        pages.read(0, &mut bytes).unwrap_err();
    }

    #[test]
    fn what_is_mended_is_read() {
        let record = abi::vm::VmRecord { identity: abi::vm::Identity::new([7; 16]), vm_type: 0, vcpus: 1 };
        let pages = Pages::default().page(1, &record.encode());
        let mut input = pages.input(0);
        *input.last_mut().unwrap() ^= 4;
        let read = |input: &[u8]| abi::vm::VmRecord::read(&Pages::of(input).1, 4096);
        read(&input).unwrap_err();
        input[0] = Flags::MEND;
        assert_eq!(read(&input).unwrap().vcpus, 1 ^ 4);
    }
}
