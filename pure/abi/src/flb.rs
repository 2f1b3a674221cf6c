//! Objects that many files share, as `luo-v5` lists them: file-lifecycle-bound, FLB.
//!
//! One page: how many pages it is (1), how many entries follow, and 64 bytes for each.

use alloc::collections::BTreeSet;
use alloc::vec::Vec;

use pages::PAGE_BYTES;
use zerocopy::FromBytes;
use zerocopy::Immutable;
use zerocopy::IntoBytes;
use zerocopy::KnownLayout;
use zerocopy::Unaligned;
use zerocopy::little_endian::U64;

use crate::luo::Compatible;
use crate::memory::Malformed;
use crate::memory::Memory;
use crate::memory::OnFault;
use crate::memory::Place;
use crate::memory::Problem;
use crate::memory::stop;

const FORMAT: &str = "luo flb";
const HEADER_BYTES: usize = 16;
/// The most objects: as many as the page holds.
pub const MAX: usize = (PAGE_BYTES - HEADER_BYTES) / size_of::<FlbSer>();

/// Head of the page.
#[derive(Debug, Clone, Copy, PartialEq, Eq, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub struct FlbHeader {
    /// Pages of this table: 1.
    pub pages: U64,
    /// Entries.
    pub count: U64,
}

/// An object as it is listed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub struct FlbSer {
    /// Its compatible string, NUL-terminated and zero filled.
    pub name: [u8; 48],
    /// Whatever number it likes, most likely the physical address of its own structure.
    pub data: U64,
    /// Files that need it, and others who hold it.
    pub count: U64,
}

const _: () = assert!(size_of::<FlbHeader>() == HEADER_BYTES && size_of::<FlbSer>() == 64 && MAX == 63);

/// An object that files share.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Flb {
    /// Its compatible string.
    pub name: Compatible,
    /// What its own code knows it by.
    pub data: u64,
    /// Files that need it, and others who hold it; never 0.
    pub count: u64,
}

/// The bytes of the page.
///
/// # Panics
/// If there are more than [`MAX`].
pub fn encode(flbs: &[Flb]) -> [u8; PAGE_BYTES] {
    assert!(flbs.len() <= MAX, "{} shared objects are more than one page lists", flbs.len());
    let mut page = [0; PAGE_BYTES];
    let (head, rest) = page.split_at_mut(HEADER_BYTES);
    head.copy_from_slice(FlbHeader { pages: 1.into(), count: U64::new(flbs.len() as u64) }.as_bytes());
    for (slot, flb) in rest.as_chunks_mut::<{ size_of::<FlbSer>() }>().0.iter_mut().zip(flbs) {
        let entry = FlbSer { name: *flb.name.field(), data: flb.data.into(), count: flb.count.into() };
        slot.copy_from_slice(entry.as_bytes());
    }
    page
}

/// Reads the page at `address`.
///
/// # Errors
/// [`Malformed`] if it says another number of pages than 1 or more entries than it holds, and for an entry that has no
/// name, another one's, or a count of 0.
pub fn read(memory: &(impl Memory + ?Sized), address: u64) -> Result<Vec<Flb>, Malformed> {
    read_on(memory, address, &mut stop)
}

/// Reads the page at `address` as [`read`] does, past what is wrong: without entries that are.
///
/// # Errors
/// What `on_fault` makes of what is wrong.
pub fn read_on(
    memory: &(impl Memory + ?Sized),
    address: u64,
    on_fault: &mut OnFault<'_>,
) -> Result<Vec<Flb>, Malformed> {
    let place = Place::new(FORMAT, address);
    let Some(header) = place.get_on::<FlbHeader>(memory, on_fault)? else { return Ok(Vec::new()) };
    place.expect("pgcnt", header.pages.get(), 1).or_else(&mut *on_fault)?;
    let found = header.count.get();
    let Some(count) = usize::try_from(found).ok().filter(|count| *count <= MAX) else {
        let problem = Problem::TooLarge { found, limit: MAX as u64 };
        return on_fault(place.bad("count", problem)).map(|()| Vec::new());
    };
    let mut names = BTreeSet::new();
    let mut flbs = Vec::new();
    for index in 0..count {
        let at = Place::new(FORMAT, address + (HEADER_BYTES + index * size_of::<FlbSer>()) as u64);
        match at.get(memory).and_then(|ser| entry(at, &ser)) {
            Ok(flb) if !names.insert(flb.name) => {
                on_fault(at.bad("name", Problem::Repeated { found: index as u64 }))?;
            }
            Ok(flb) => flbs.push(flb),
            Err(fault) => on_fault(fault)?,
        }
    }
    Ok(flbs)
}

fn entry(place: Place, entry: &FlbSer) -> Result<Flb, Malformed> {
    let name = Compatible::read(&entry.name).ok_or_else(|| place.bad("name", Problem::NotTerminated))?;
    let (data, count) = (entry.data.get(), entry.count.get());
    if count == 0 {
        return Err(place.bad("files", Problem::Zero));
    }
    Ok(Flb { name, data, count })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn flb(name: &str, data: u64, count: u64) -> Flb {
        Flb { name: Compatible::new(name.as_bytes()).unwrap(), data, count }
    }

    fn memory(page: &[u8]) -> Vec<u8> {
        [vec![0; PAGE_BYTES], page.to_vec()].concat()
    }

    /// H3.4.7.
    #[test]
    fn a_page_of_shared_objects_is_these_bytes() {
        let page = encode(&[flb("liveupdate-test-flb-v0", 0xFEED_F00D_CAFE_BEE0, 3), flb("b", 1, 2)]);
        assert_eq!(page[..16], *b"\x01\0\0\0\0\0\0\0\x02\0\0\0\0\0\0\0");
        assert_eq!(page[16..39], *b"liveupdate-test-flb-v0\0");
        assert!(page[39..64].iter().all(|byte| *byte == 0), "zero filled");
        assert_eq!(page[64..80], *b"\xe0\xbe\xfe\xca\x0d\xf0\xed\xfe\x03\0\0\0\0\0\0\0");
        assert_eq!(page[80..82], *b"b\0");
        assert_eq!(page[128..144], *b"\x01\0\0\0\0\0\0\0\x02\0\0\0\0\0\0\0");
        assert!(page[144..].iter().all(|byte| *byte == 0));
    }

    /// H3.8.7.
    #[test]
    fn a_page_holds_63_shared_objects() {
        let flbs: Vec<Flb> = (0..64).map(|number| flb(&format!("flb {number}"), number, 1)).collect();
        assert_eq!(read(&memory(&encode(&flbs[..63])), 4096).unwrap(), flbs[..63]);
        std::panic::catch_unwind(|| encode(&flbs)).unwrap_err();
    }

    /// H3.8.6.
    #[test]
    fn broken_pages_are_refused_by_field() {
        let whole = encode(&[flb("a", 1, 2), flb("b", 3, 4)]);
        let broken = |at: usize, bytes: &[u8]| {
            let mut page = whole;
            page[at..at + bytes.len()].copy_from_slice(bytes);
            let error = read(&memory(&page), 4096).unwrap_err();
            (error.field, error.problem)
        };
        assert_eq!(broken(0, &[2]), ("pgcnt", Problem::Mismatch { expected: 1, found: 2 }));
        assert_eq!(broken(8, &[64]), ("count", Problem::TooLarge { found: 64, limit: 63 }));
        assert_eq!(broken(8, &[0xff; 8]), ("count", Problem::TooLarge { found: u64::MAX, limit: 63 }));
        assert_eq!(broken(8, &[3]), ("name", Problem::NotTerminated), "an entry without a name");
        assert_eq!(broken(16, &[b'x'; 48]), ("name", Problem::NotTerminated));
        assert_eq!(broken(80, b"a"), ("name", Problem::Repeated { found: 1 }));
        assert_eq!(broken(72, &[0]), ("files", Problem::Zero));
        assert!(matches!(read(&memory(&whole), 8192).unwrap_err().problem, Problem::Unreadable(_)));
    }

    proptest! {
        #[test]
        fn what_is_written_is_read(entries in proptest::collection::btree_map("[a-z]{1,47}", (any::<u64>(), 1..u64::MAX), 0..=63)) {
            let flbs: Vec<Flb> = entries.iter().map(|(name, (data, count))| flb(name, *data, *count)).collect();
            prop_assert_eq!(read(&memory(&encode(&flbs)), 4096).unwrap(), flbs);
        }
    }
}
