//! `tideover-regions`: the table that gives each region of an arena its base, and says what its pages are.
//!
//! It is the blob of the KHO subtree [`SUBTREE`]. Region 0 has base 0 and stands first; the carrier hands the
//! regions' fds over in the table's order.
//!
//! | version | says of each region | written |
//! | --- | --- | --- |
//! | 1 | base, size, page size, inode number; every store is a memfd | where that is all there is to say |
//! | 2 | also other stores, and the NUMA policy | where it is needed |
//! | 3 | also the store that is a path | where it is needed |
//!
//! So a machine that needs nothing new can be handed to a program that knows version 1 only, and such a program
//! hears the name of what it does not know.
//!
//! The regions of a machine that lies at a path are parts of one file: all of them, or none.

use alloc::vec::Vec;
use core::fmt;

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
use crate::memory::OnFault;
use crate::memory::Place;
use crate::memory::Problem;
use crate::memory::stop;
use crate::numa::NODES;
use crate::numa::Policy;
use crate::record::Format;
use crate::record::HEADER_BYTES;
use crate::record::take;
use crate::record::take_list;

/// Entries that a table may have: region 0, and at most 255 pieces of guest memory.
const MAX_ENTRIES: u64 = 256;

/// The format, as it is read and as its newest version is written.
pub const FORMAT: Format = Format {
    compatible: "tideover-regions-v3",
    kind: *b"REGS",
    version: 3,
    oldest: 1,
    max_payload_bytes: 16 + 176 * MAX_ENTRIES,
};

/// The format's first version, as it is still written.
pub const V1: Format = Format {
    compatible: "tideover-regions-v1",
    version: 1,
    max_payload_bytes: 16 + 40 * MAX_ENTRIES,
    ..FORMAT
};

/// The format's second version, as it is still written.
pub const V2: Format = Format { compatible: "tideover-regions-v2", version: 2, ..FORMAT };

/// Name of the KHO subtree.
pub const SUBTREE: SubtreeName = SubtreeName::literal("regions");

/// What a region's memory comes from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Store {
    /// A memfd of shared memory, with transparent huge pages where they can be had.
    Memfd,
    /// A memfd of huge pages from the host's pool. It has every page from its making to its end.
    Hugetlb,
    /// A guest_memfd of KVM that user space may map and touch.
    GuestMemfd,
    /// A part of a file that has a name, or of a device: of a file system on memory (fsdax, hugetlbfs, tmpfs), or a devdax device. It
    /// has every page from its making to its end.
    Path,
}

impl Store {
    const fn code(self) -> u32 {
        match self {
            Self::Memfd => 1,
            Self::Hugetlb => 2,
            Self::GuestMemfd => 3,
            Self::Path => 4,
        }
    }

    fn read(place: Place, version: u32, code: u32) -> Result<Self, Malformed> {
        match (version, code) {
            (_, 1) => Ok(Self::Memfd),
            (2.., 2) => Ok(Self::Hugetlb),
            (2.., 3) => Ok(Self::GuestMemfd),
            (3.., 4) => Ok(Self::Path),
            (_, found) => Err(place.bad("store", Problem::Unknown { found: found.into() })),
        }
    }
}

impl fmt::Display for Store {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Memfd => "memfd",
            Self::Hugetlb => "hugetlb memfd",
            Self::GuestMemfd => "guest_memfd",
            Self::Path => "file at a path",
        })
    }
}

#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct Head {
    count: U64,
    reserved: U64,
}

/// All of an entry in version 1, and the first part of one in version 2.
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

#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct EntrySer2 {
    first: EntrySer,
    policy: U32,
    reserved: U32,
    nodes: [U64; NODES / 64],
}

const _: () = assert!(size_of::<EntrySer>() == 40 && size_of::<EntrySer2>() == 176);

/// One region.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RegionEntry {
    /// Its pages in the arena's address space.
    pub range: PageRange,
    /// The page size it was made for, in bytes. What it got may be smaller, unless its store is hugetlb.
    pub page_bytes: u64,
    /// What its memory comes from.
    pub store: Store,
    /// Inode number of its file: another file of the same size is another region. A carrier that brings the
    /// machine to another kernel writes the new numbers.
    pub file: u64,
    /// Which NUMA nodes its pages come from.
    pub policy: Policy,
}

/// The oldest version that can say all of this.
fn format_for(entries: impl Iterator<Item = (Store, Policy)>) -> &'static Format {
    entries.fold(&V1, |format, (store, policy)| match (store, policy) {
        (Store::Path, _) => &FORMAT,
        (Store::Memfd, Policy::Default) => format,
        _ if format.version < V2.version => &V2,
        _ => format,
    })
}

/// Compatible string of the table that [`encode`] writes for regions of these stores and policies: what a reader
/// has to know.
pub fn compatible(entries: impl Iterator<Item = (Store, Policy)>) -> &'static str {
    format_for(entries).compatible
}

/// The bytes of the table, in the oldest version that can say it.
pub fn encode(entries: &[RegionEntry]) -> Vec<u8> {
    let format = format_for(entries.iter().map(|entry| (entry.store, entry.policy)));
    let mut payload = Head { count: U64::new(entries.len() as u64), reserved: 0.into() }.as_bytes().to_vec();
    for entry in entries {
        let first = EntrySer {
            base: entry.range.start().address().into(),
            size_bytes: entry.range.len_bytes().into(),
            page_bytes: entry.page_bytes.into(),
            store: entry.store.code().into(),
            reserved: 0.into(),
            file: entry.file.into(),
        };
        if format.version == V1.version {
            payload.extend_from_slice(first.as_bytes());
            continue;
        }
        let nodes = entry.policy.nodes().words().map(U64::new);
        let ser = EntrySer2 { first, policy: entry.policy.code().into(), reserved: 0.into(), nodes };
        payload.extend_from_slice(ser.as_bytes());
    }
    format.encode(&payload)
}

/// A table as it was read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RegionTable {
    /// Its regions, by ascending base. Region 0 is a memfd, or all of them lie at a path.
    pub entries: Vec<RegionEntry>,
    /// Bytes of its record.
    pub len_bytes: u64,
}

/// Reads the table at `address`.
///
/// # Errors
/// [`Malformed`] if it is none, its first region is not at 0, or neither a memfd nor with all others at a path, two regions overlap or do not ascend, or one's
/// size and store cannot go together.
pub fn read(memory: &(impl Memory + ?Sized), address: u64) -> Result<RegionTable, Malformed> {
    read_on(memory, address, &mut stop)
}

/// Reads the table at `address` as [`read`] does, past a checksum that is another one if `on_fault` says so.
///
/// # Errors
/// As [`read`].
pub fn read_on(
    memory: &(impl Memory + ?Sized),
    address: u64,
    on_fault: &mut OnFault<'_>,
) -> Result<RegionTable, Malformed> {
    let place = Place::new(FORMAT.compatible, address);
    let (version, payload) = FORMAT.read_on(memory, address, on_fault)?;
    let (head, rest) = take::<Head>(place, "payload", &payload)?;
    place.expect("reserved", head.reserved.get(), 0)?;
    let entries = if version == V1.version {
        let list = take_list::<EntrySer>(place, "count", head.count.get(), rest)?;
        list.iter()
            .map(|entry| read_entry(place, version, entry, Policy::Default))
            .collect::<Result<Vec<_>, _>>()?
    } else {
        let list = take_list::<EntrySer2>(place, "count", head.count.get(), rest)?;
        let read = |entry: &EntrySer2| {
            place.expect("reserved", entry.reserved.get().into(), 0)?;
            let policy = Policy::read(place, entry.policy.get(), entry.nodes)?;
            read_entry(place, version, &entry.first, policy)
        };
        list.iter().map(read).collect::<Result<Vec<_>, _>>()?
    };
    let first = entries.first().ok_or_else(|| place.bad("count", Problem::Zero))?;
    place.expect("base", first.range.start().address(), 0)?;
    let whole = if first.store == Store::Path { Store::Path } else { Store::Memfd };
    place.expect("store", first.store.code().into(), whole.code().into())?;
    // One file is one machine's: what is at a path is there as a whole.
    if let Some(other) = entries.iter().find(|entry| (entry.store == Store::Path) != (whole == Store::Path)) {
        place.expect("store", other.store.code().into(), whole.code().into())?;
    }
    match entries.windows(2).find(|pair| pair[1].range.start().get() < pair[0].range.end()) {
        Some(pair) => Err(place.bad("base", Problem::Repeated { found: pair[1].range.start().address() })),
        None => Ok(RegionTable { entries, len_bytes: HEADER_BYTES + payload.len() as u64 }),
    }
}

fn read_entry(
    place: Place,
    version: u32,
    entry: &EntrySer,
    policy: Policy,
) -> Result<RegionEntry, Malformed> {
    place.expect("reserved", entry.reserved.get().into(), 0)?;
    let found = entry.size_bytes.get();
    let range = PageRange::of_bytes(entry.base.get(), found).ok().filter(|range| !range.is_empty());
    let range = range.ok_or_else(|| place.bad("size_bytes", Problem::Misaligned { found }))?;
    let store = Store::read(place, version, entry.store.get())?;
    let page_bytes = entry.page_bytes.get();
    if !page_bytes.is_power_of_two() || page_bytes < PAGE_SIZE {
        return Err(place.bad("page_bytes", Problem::Unknown { found: page_bytes }));
    }
    // Pages of a memfd may be smaller than it was made for; those of hugetlb may not.
    if store == Store::Hugetlb && !found.is_multiple_of(page_bytes) {
        return Err(place.bad("size_bytes", Problem::Misaligned { found }));
    }
    Ok(RegionEntry { range, page_bytes, store, file: entry.file.get(), policy })
}

#[cfg(test)]
mod tests {
    use alloc::vec;

    use proptest::prelude::*;

    use super::*;

    fn entry(base: u64, size_bytes: u64) -> RegionEntry {
        let range = PageRange::of_bytes(base, size_bytes).unwrap();
        let file = base ^ 0x1234_5678_9ABC;
        RegionEntry { range, page_bytes: 4096, store: Store::Memfd, file, policy: Policy::Default }
    }

    fn hugetlb(base: u64, size_bytes: u64) -> RegionEntry {
        RegionEntry { page_bytes: 2 << 20, store: Store::Hugetlb, ..entry(base, size_bytes) }
    }

    fn read_bytes(bytes: &[u8]) -> Result<Vec<RegionEntry>, Malformed> {
        let mut memory = vec![0; 4096];
        memory.extend(bytes);
        let table = read(&memory, 4096)?;
        assert_eq!(table.len_bytes, bytes.len() as u64);
        Ok(table.entries)
    }

    fn read_back(entries: &[RegionEntry]) -> Result<Vec<RegionEntry>, Malformed> {
        read_bytes(&encode(entries))
    }

    /// What is written for these.
    fn written(entries: &[RegionEntry]) -> &'static str {
        compatible(entries.iter().map(|entry| (entry.store, entry.policy)))
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

    /// L2.4.10.
    #[test]
    fn a_table_of_plain_memfds_is_what_version_1_wrote() {
        let entries = [entry(0, 0x10000), RegionEntry { page_bytes: 2 << 20, ..entry(1 << 30, 2 << 20) }];
        let bytes = encode(&entries);
        assert_eq!(written(&entries), "tideover-regions-v1");
        assert_eq!(bytes.len(), 32 + 16 + 2 * 40);
        assert_eq!(&bytes[..16], b"TDRECORDREGS\x01\0\0\0");
        let second = &bytes[32 + 16 + 40..];
        assert_eq!(second[..8], (1u64 << 30).to_le_bytes());
        assert_eq!(second[8..16], (2u64 << 20).to_le_bytes());
        assert_eq!(second[16..24], (2u64 << 20).to_le_bytes());
        assert_eq!(second[24..32], 1u64.to_le_bytes(), "memfd");
        assert_eq!(second[32..], ((1u64 << 30) ^ 0x1234_5678_9ABC).to_le_bytes());
    }

    #[test]
    fn stores_and_policies_are_read_as_they_were_written() {
        let nodes: crate::numa::Nodes = "0,3,64-66,1023".parse().unwrap();
        let with = |at: u64, policy| RegionEntry { policy, ..entry(at << 30, 0x1000) };
        let entries = [
            entry(0, 0x10000),
            hugetlb(1 << 30, 4 << 20),
            RegionEntry { page_bytes: 1 << 30, ..hugetlb(2 << 30, 1 << 30) },
            RegionEntry { store: Store::GuestMemfd, ..entry(4 << 30, 0x3000) },
            with(5, Policy::Bind(nodes)),
            with(6, Policy::Interleave(nodes)),
            with(7, Policy::Preferred(nodes)),
        ];
        assert_eq!(read_back(&entries).unwrap(), entries);
        assert_eq!(written(&entries), "tideover-regions-v2");
        for one in &entries[1..] {
            assert_eq!(written(&[entry(0, 0x1000), *one]), "tideover-regions-v2", "{one:?}");
        }
    }

    #[test]
    fn a_machine_at_a_path_has_all_of_its_regions_there_and_needs_version_3() {
        let at = |entry| RegionEntry { store: Store::Path, ..entry };
        let entries =
            [at(entry(0, 0x10000)), RegionEntry { page_bytes: 2 << 20, ..at(entry(1 << 30, 4 << 20)) }];
        assert_eq!(read_back(&entries).unwrap(), entries);
        assert_eq!(written(&entries), "tideover-regions-v3");
        for some in [[entries[0], entry(1 << 30, 0x1000)], [entry(0, 0x1000), entries[1]]] {
            assert_eq!(read_back(&some).unwrap_err().field, "store", "{some:?}");
        }
        let payload = encode(&entries)[32..].to_vec();
        assert_eq!(read_bytes(&V2.encode(&payload)).unwrap_err().field, "store", "version 2 knows none");
    }

    #[test]
    fn a_reader_of_version_1_names_the_version_that_it_does_not_know() {
        let mut memory = vec![0; 4096];
        memory.extend(encode(&[entry(0, 0x1000), hugetlb(1 << 30, 2 << 20)]));
        let refused = V1.read(&memory, 4096).unwrap_err();
        assert_eq!((refused.format, refused.field), ("tideover-regions-v1", "version"));
        assert_eq!(refused.problem, Problem::Unknown { found: 2 });
    }

    #[test]
    fn version_1_knows_no_store_but_memfd() {
        let mut payload = encode(&[entry(0, 0x1000), entry(1 << 30, 0x1000)])[32..].to_vec();
        assert_eq!(read_bytes(&V1.encode(&payload)).unwrap().len(), 2);
        payload[16 + 40 + 24] = 2;
        assert_eq!(read_bytes(&V1.encode(&payload)).unwrap_err().field, "store");
    }

    /// What is said of a table of version 2 whose second entry has this byte at `at`.
    fn with_byte(at: usize, byte: u8) -> &'static str {
        let policy = Policy::Bind("0".parse().unwrap());
        let entries = [entry(0, 0x1000), RegionEntry { policy, ..hugetlb(1 << 30, 4 << 20) }];
        let mut payload = encode(&entries)[32..].to_vec();
        payload[16 + 176 + at] = byte;
        read_bytes(&V2.encode(&payload)).map_or_else(|error| error.field, |_| "none")
    }

    #[test]
    fn entries_of_version_2_that_cannot_be_are_refused_by_field() {
        let (size, page, store, policy, nodes) = (8, 16, 24, 40, 48);
        assert_eq!(with_byte(store, 2), "none");
        assert_eq!(with_byte(store, 0), "store");
        assert_eq!(with_byte(store, 4), "store");
        assert_eq!(with_byte(size + 1, 0x10), "size_bytes", "a huge page and a small one");
        assert_eq!(with_byte(page + 3, 1), "page_bytes", "two bits");
        assert_eq!(with_byte(policy, 4), "policy");
        assert_eq!(with_byte(policy, 0), "nodes", "the default has none");
        assert_eq!(with_byte(nodes, 0), "nodes", "all others have some");
        let region0 = RegionEntry { store: Store::GuestMemfd, ..entry(0, 0x1000) };
        assert_eq!(read_back(&[region0]).unwrap_err().field, "store");
    }

    #[test]
    fn the_largest_table_is_read() {
        let policy = Policy::Bind("0-1023".parse().unwrap());
        let large: Vec<_> =
            (0..MAX_ENTRIES).map(|at| RegionEntry { policy, ..entry(at << 30, 0x1000) }).collect();
        assert_eq!(read_back(&large).unwrap(), large);
        let plain: Vec<_> = (0..MAX_ENTRIES).map(|at| entry(at << 30, 0x1000)).collect();
        assert_eq!(read_back(&plain).unwrap(), plain);
    }

    proptest! {
        #[test]
        fn whatever_is_in_a_record_is_an_error_or_a_table(
            version in 1..=2u32,
            count in 0..4u64,
            words in prop::collection::vec(prop_oneof![0..4u64, Just(4096), Just(2 << 20), any::<u64>()], 0..70),
        ) {
            let mut payload = [count, 0].map(u64::to_le_bytes).concat();
            payload.extend(words.iter().flat_map(|word| word.to_le_bytes()));
            let _ = read_bytes(&Format { version, ..FORMAT }.encode(&payload));
        }
    }
}
