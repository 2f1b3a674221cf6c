//! `tideover-gmem-v1`: guest memory as extents.
//!
//! An extent is a run of frames that holds a run of the file's pages: 32 bytes, whatever its length, where the
//! kernel's formats take 16 for every folio. Pages without an extent are holes for ever; pages inside one
//! may be holes, too: which are present is the region's own knowledge.

use alloc::vec::Vec;

use pages::PAGE_SHIFT;
use pages::PAGE_SIZE;
use pages::PageRange;
use pages::Pfn;
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
use crate::record::Format;
use crate::record::take;
use crate::record::take_list;
use crate::text::Text;
use crate::vm::Identity;

/// The format. Its payload may hold 65,536 extents.
pub const FORMAT: Format = Format {
    compatible: "tideover-gmem-v1",
    kind: *b"GMEM",
    version: 1,
    oldest: 1,
    max_payload_bytes: 80 + 32 * 65_536,
};

/// Flags that this version knows.
pub const KNOWN_FLAGS: u64 = flags::MMAP | flags::INIT_SHARED;

/// Flags of guest memory: our own numbers, translated from and to KVM's.
pub mod flags {
    /// User space may map it.
    pub const MMAP: u64 = 1;
    /// It starts out shared with the host.
    pub const INIT_SHARED: u64 = 2;
}

/// What a VMM calls a piece of guest memory: 1 to 31 bytes, as `ram`.
pub type MemoryName = Text<32>;

#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct Payload {
    identity: [u8; 16],
    name: [u8; 32],
    size_bytes: U64,
    flags: U64,
    extents: U64,
    reserved: U64,
}

#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct ExtentSer {
    index: U64,
    pfn: U64,
    count: U64,
    flags: U64,
}

/// A run of frames that holds a run of pages of the file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Extent {
    /// The file's first page in it.
    pub index: u64,
    /// The frames, in the same order.
    pub frames: PageRange,
}

/// The record.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GmemRecord {
    /// The machine that it is memory of.
    pub identity: Identity,
    /// What the VMM calls it.
    pub name: MemoryName,
    /// Its size, in bytes: a multiple of the page size, not 0.
    pub size_bytes: u64,
    /// [`flags`].
    pub flags: u64,
    /// By ascending index; neither pages nor frames overlap.
    pub extents: Vec<Extent>,
}

impl GmemRecord {
    /// The record's bytes.
    pub fn encode(&self) -> Vec<u8> {
        let head = Payload {
            identity: self.identity.bytes(),
            name: *self.name.field(),
            size_bytes: self.size_bytes.into(),
            flags: self.flags.into(),
            extents: U64::new(self.extents.len() as u64),
            reserved: 0.into(),
        };
        let mut payload = head.as_bytes().to_vec();
        for extent in &self.extents {
            let ser = ExtentSer {
                index: extent.index.into(),
                pfn: extent.frames.start().get().into(),
                count: extent.frames.len_pages().into(),
                flags: 0.into(),
            };
            payload.extend_from_slice(ser.as_bytes());
        }
        FORMAT.encode(&payload)
    }

    /// Reads the record at `address`.
    ///
    /// # Errors
    /// [`Malformed`] if it is none: size, flags, and every rule that [`GmemRecord::extents`] states.
    pub fn read(memory: &(impl Memory + ?Sized), address: u64) -> Result<Self, Malformed> {
        Self::read_on(memory, address, &mut stop)
    }

    /// Reads the record at `address` as [`GmemRecord::read`] does, past what is wrong with its fields if `on_fault` says so.
    ///
    /// # Errors
    /// As [`GmemRecord::read`].
    pub fn read_on(
        memory: &(impl Memory + ?Sized),
        address: u64,
        on_fault: &mut OnFault<'_>,
    ) -> Result<Self, Malformed> {
        let place = Place::new(FORMAT.compatible, address);
        let (_, payload) = FORMAT.read_on(memory, address, on_fault)?;
        let (head, rest) = take::<Payload>(place, "payload", &payload)?;
        place.expect("reserved", head.reserved.get(), 0).or_else(&mut *on_fault)?;
        let (size_bytes, flags) = (head.size_bytes.get(), head.flags.get());
        if let Err(fault) = place.page_address("size_bytes", size_bytes) {
            on_fault(fault)?;
        }
        if flags & !KNOWN_FLAGS != 0 {
            on_fault(place.bad("flags", Problem::Unknown { found: flags }))?;
        }
        let name = MemoryName::read(&head.name).ok_or_else(|| place.bad("name", Problem::NotTerminated))?;
        let list = take_list::<ExtentSer>(place, "extents", head.extents.get(), rest)?;
        let mut extents = Vec::new();
        for extent in list {
            match read_extent(place, extent) {
                Ok(extent) => extents.push(extent),
                Err(fault) => on_fault(fault)?,
            }
        }
        check_extents(place, &extents, size_bytes >> PAGE_SHIFT).or_else(on_fault)?;
        Ok(Self { identity: Identity::new(head.identity), name, size_bytes, flags, extents })
    }
}

fn read_extent(place: Place, extent: &ExtentSer) -> Result<Extent, Malformed> {
    let found = extent.pfn.get();
    if found == 0 || extent.count == 0 {
        return Err(place.bad("extent", Problem::Zero));
    }
    if extent.flags != 0 {
        return Err(place.bad("extent flags", Problem::Unknown { found: extent.flags.get() }));
    }
    let frames = Pfn::new(found).and_then(|start| PageRange::new(start, extent.count.get()));
    let frames = frames
        .map_err(|_| place.bad("extent pfn", Problem::TooLarge { found, limit: u64::MAX / PAGE_SIZE }))?;
    Ok(Extent { index: extent.index.get(), frames })
}

fn check_extents(place: Place, extents: &[Extent], pages: u64) -> Result<(), Malformed> {
    let mut next = 0;
    for extent in extents {
        let found = extent.index;
        if found < next {
            return Err(place.bad("extent index", Problem::Structure("does not ascend")));
        }
        let end = found.checked_add(extent.frames.len_pages()).filter(|end| *end <= pages);
        next = end.ok_or_else(|| place.bad("extent index", Problem::TooLarge { found, limit: pages }))?;
    }
    let mut frames: Vec<PageRange> = extents.iter().map(|extent| extent.frames).collect();
    frames.sort_unstable_by_key(|range| range.start());
    match frames.windows(2).find(|pair| pair[0].overlaps(pair[1])) {
        Some(pair) => Err(place.bad("extent pfn", Problem::Repeated { found: pair[1].start().get() })),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use alloc::vec;

    use proptest::prelude::*;

    use super::*;

    fn extent(index: u64, pfn: u64, count: u64) -> Extent {
        Extent { index, frames: PageRange::new(Pfn::new(pfn).unwrap(), count).unwrap() }
    }

    fn record(extents: &[Extent]) -> GmemRecord {
        GmemRecord {
            identity: Identity::new([1; 16]),
            name: MemoryName::literal("ram"),
            size_bytes: 100 * 4096,
            flags: flags::MMAP,
            extents: extents.to_vec(),
        }
    }

    fn read(record: &GmemRecord) -> Result<GmemRecord, Malformed> {
        let mut memory = vec![0; 4096];
        memory.extend(record.encode());
        GmemRecord::read(&memory, 4096)
    }

    #[test]
    fn an_extent_takes_32_bytes() {
        let one = record(&[extent(0, 1, 1)]).encode().len();
        assert_eq!(record(&[extent(0, 1, 1), extent(1, 9, 50)]).encode().len() - one, 32);
    }

    #[test]
    fn what_is_written_is_read() {
        for extents in [vec![], vec![extent(0, 0x40000, 100)], vec![extent(0, 9, 10), extent(50, 1, 5)]] {
            assert_eq!(read(&record(&extents)).unwrap(), record(&extents));
        }
    }

    /// O1.9, O1.14.
    #[test]
    fn extents_that_cannot_be_are_refused_by_field() {
        let field = |extents: &[Extent]| read(&record(extents)).unwrap_err().field;
        assert_eq!(field(&[extent(0, 0, 1)]), "extent");
        assert_eq!(field(&[extent(0, 1, 0)]), "extent");
        assert_eq!(field(&[extent(0, 1, 101)]), "extent index");
        assert_eq!(field(&[extent(5, 1, 2), extent(6, 9, 2)]), "extent index");
        assert_eq!(field(&[extent(0, 10, 2), extent(9, 9, 2)]), "extent pfn");
    }

    /// R1.4, R2.6, O1.5.
    #[test]
    fn sizes_and_flags_that_cannot_be_are_refused_by_field() {
        let with = |change: fn(&mut GmemRecord)| {
            let mut record = record(&[]);
            change(&mut record);
            read(&record).unwrap_err().field
        };
        assert_eq!(with(|record| record.size_bytes = 0), "size_bytes");
        assert_eq!(with(|record| record.size_bytes = 4097), "size_bytes");
        assert_eq!(with(|record| record.flags = 4), "flags");
    }

    proptest! {
        /// O1.14.
        #[test]
        fn any_two_extents_give_an_error_or_a_record(a in any::<[u64; 3]>(), b in any::<[u64; 3]>()) {
            let place = Place::new("test", 0);
            let ser = |[index, pfn, count]: [u64; 3]| {
                ExtentSer { index: index.into(), pfn: pfn.into(), count: count.into(), flags: 0.into() }
            };
            if let (Ok(a), Ok(b)) = (read_extent(place, &ser(a)), read_extent(place, &ser(b))) {
                let _ = check_extents(place, &[a, b], 1 << 40);
            }
        }
    }
}
