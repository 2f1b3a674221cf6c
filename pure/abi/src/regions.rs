//! `tideover-regions-v1`: the table that gives each region of an arena its base.
//!
//! It is the blob of the KHO subtree [`SUBTREE`]. Region 0 has base 0 and stands first; the carrier hands the
//! regions' fds over in the table's order.

use alloc::vec::Vec;

use pages::PAGE_SIZE;
use pages::PageRange;
use zerocopy::FromBytes;
use zerocopy::Immutable;
use zerocopy::IntoBytes;
use zerocopy::KnownLayout;
use zerocopy::Unaligned;
use zerocopy::little_endian::U32;
use zerocopy::little_endian::U64;

use crate::kho::SubtreeName;
use crate::memory::Malformed;
use crate::memory::Memory;
use crate::memory::Place;
use crate::memory::Problem;
use crate::record::Format;
use crate::record::take;
use crate::record::take_list;

/// The format. A machine has at most 255 pieces of guest memory.
pub const FORMAT: Format = Format {
    compatible: "tideover-regions-v1",
    kind: *b"REGS",
    version: 1,
    oldest: 1,
    max_payload_bytes: 16 + 40 * 256,
};

/// Name of the KHO subtree.
pub const SUBTREE: SubtreeName = SubtreeName::literal("regions");

/// What a region's memory comes from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Store {
    /// A memfd of shared memory.
    Memfd,
}

impl Store {
    const fn code(self) -> u32 {
        match self {
            Self::Memfd => 1,
        }
    }
}

#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct Head {
    count: U64,
    reserved: U64,
}

#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct EntrySer {
    base: U64,
    size_bytes: U64,
    page_bytes: U64,
    store: U32,
    reserved: U32,
    file: U64,
}

/// One region.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RegionEntry {
    /// Its pages in the arena's address space.
    pub range: PageRange,
    /// The page size it was made for, in bytes. What it got may be smaller.
    pub page_bytes: u64,
    /// What its memory comes from.
    pub store: Store,
    /// Inode number of its file: another file of the same size is another region. A carrier that brings the
    /// machine to another kernel writes the new numbers.
    pub file: u64,
}

/// The bytes of the table.
pub fn encode(entries: &[RegionEntry]) -> Vec<u8> {
    let mut payload = Head { count: U64::new(entries.len() as u64), reserved: 0.into() }.as_bytes().to_vec();
    for entry in entries {
        let ser = EntrySer {
            base: entry.range.start().address().into(),
            size_bytes: entry.range.len_bytes().into(),
            page_bytes: entry.page_bytes.into(),
            store: entry.store.code().into(),
            reserved: 0.into(),
            file: entry.file.into(),
        };
        payload.extend_from_slice(ser.as_bytes());
    }
    FORMAT.encode(&payload)
}

/// Reads the table at `address`.
///
/// # Errors
/// [`Malformed`] if it is none, its first region is not at 0, or two regions overlap or do not ascend.
pub fn read(memory: &(impl Memory + ?Sized), address: u64) -> Result<Vec<RegionEntry>, Malformed> {
    let place = Place::new(FORMAT.compatible, address);
    let (_, payload) = FORMAT.read(memory, address)?;
    let (head, rest) = take::<Head>(place, "payload", &payload)?;
    let list = take_list::<EntrySer>(place, "count", head.count.get(), rest)?;
    let entries = list.iter().map(|entry| read_entry(place, entry)).collect::<Result<Vec<_>, _>>()?;
    let first = entries.first().ok_or_else(|| place.bad("count", Problem::Zero))?;
    place.expect("base", first.range.start().address(), 0)?;
    match entries.windows(2).find(|pair| pair[1].range.start().get() < pair[0].range.end()) {
        Some(pair) => Err(place.bad("base", Problem::Repeated { found: pair[1].range.start().address() })),
        None => Ok(entries),
    }
}

fn read_entry(place: Place, entry: &EntrySer) -> Result<RegionEntry, Malformed> {
    let found = entry.size_bytes.get();
    let range = PageRange::of_bytes(entry.base.get(), found).ok().filter(|range| !range.is_empty());
    let range = range.ok_or_else(|| place.bad("size_bytes", Problem::Misaligned { found }))?;
    let store = match entry.store.get() {
        1 => Store::Memfd,
        found => return Err(place.bad("store", Problem::Unknown { found: found.into() })),
    };
    let page_bytes = entry.page_bytes.get();
    if !page_bytes.is_power_of_two() || page_bytes < PAGE_SIZE {
        return Err(place.bad("page_bytes", Problem::Unknown { found: page_bytes }));
    }
    Ok(RegionEntry { range, page_bytes, store, file: entry.file.get() })
}

#[cfg(test)]
mod tests {
    use alloc::vec;

    use super::*;

    fn entry(base: u64, size_bytes: u64) -> RegionEntry {
        let range = PageRange::of_bytes(base, size_bytes).unwrap();
        RegionEntry { range, page_bytes: 4096, store: Store::Memfd, file: base ^ 0x1234_5678_9ABC }
    }

    fn read_back(entries: &[RegionEntry]) -> Result<Vec<RegionEntry>, Malformed> {
        let mut memory = vec![0; 4096];
        memory.extend(encode(entries));
        read(&memory, 4096)
    }

    #[test]
    fn what_is_written_is_read() {
        let entries = [entry(0, 0x10000), entry(0x4000_0000, 0x20_0000)];
        assert_eq!(read_back(&entries).unwrap(), entries);
    }

    #[test]
    fn tables_that_cannot_be_are_refused_by_field() {
        let field = |entries: &[RegionEntry]| read_back(entries).unwrap_err().field;
        assert_eq!(field(&[]), "count");
        assert_eq!(field(&[entry(0x1000, 0x1000)]), "base");
        assert_eq!(field(&[entry(0, 0x2000), entry(0x1000, 0x1000)]), "base");
        assert_eq!(field(&[entry(0, 0)]), "size_bytes");
        assert_eq!(field(&[RegionEntry { page_bytes: 5000, ..entry(0, 0x1000) }]), "page_bytes");
    }
}
