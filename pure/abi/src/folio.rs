//! The folios of a file, as the kernel lists them behind a [`vmalloc`](crate::vmalloc) descriptor.
//!
//! 16 bytes each: a word of the page frame number (52 bits) and flags (12 bits), and a word of the page's index in the
//! file. What the flags say differs from format to format. A folio's order is not in the list.

use alloc::vec::Vec;

use pages::Order;
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
use crate::memory::Place;
use crate::memory::Problem;
use crate::memory::holds;
use crate::vmalloc::Descriptor;
use crate::vmalloc::List;

/// Bits of a page frame number; those above are flags.
const PFN_BITS: u32 = 52;
/// The bytes of a record.
pub const RECORD_BYTES: u64 = 16;

#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct Record {
    word: U64,
    index: U64,
}

/// A folio of a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Folio {
    /// Where it begins in the file, in pages.
    pub index: u64,
    /// The memory that it is.
    pub frames: PageRange,
    /// What else is known of it: 12 bits.
    pub flags: u16,
}

/// The bytes of a list.
pub fn encode(folios: &[Folio]) -> Vec<u8> {
    let record = |folio: &Folio| {
        let word = folio.frames.start().get() | u64::from(folio.flags) << PFN_BITS;
        Record { word: word.into(), index: folio.index.into() }
    };
    folios.iter().flat_map(|folio| record(folio).as_bytes().to_vec()).collect()
}

/// What a list has to keep to.
pub(crate) struct Rules<'a> {
    /// Pages of the file: each folio begins in one. A large one may reach beyond the end.
    pub(crate) pages: u64,
    /// Flags that the format knows.
    pub(crate) flags: u16,
    /// Whether a record without a frame is a hole; else it is an error.
    pub(crate) holes: bool,
    /// The order of the folio that begins at a frame; `None` if none does.
    pub(crate) order: &'a dyn Fn(Pfn) -> Option<Order>,
}

/// Reads the list of `count` folios behind `descriptor`, for the structure at `place`.
///
/// # Errors
/// [`Malformed`] if the list is not as long as it says, or a record not what [`Rules`] allow: folios ascend and do not
/// overlap in the file, are aligned to their size there and in memory, and none shares memory with another.
pub(crate) fn read(
    memory: &(impl Memory + ?Sized),
    place: Place,
    count: u64,
    descriptor: &Descriptor,
    rules: &Rules<'_>,
) -> Result<Vec<Folio>, Malformed> {
    // Each has a page of the file at least: with this the length below cannot overflow, either.
    if count > rules.pages {
        return Err(place.bad("nr_folios", Problem::TooLarge { found: count, limit: rules.pages }));
    }
    if count == 0 && !descriptor.is_empty() {
        return Err(place.bad("folios", Problem::Structure("is not zero, and the file has no folios")));
    }
    let list = List::read(memory, descriptor)?;
    let there: u64 = list.blocks.iter().map(|block| block.len_pages()).sum();
    place.expect("nr_folios, in pages of records", (count * RECORD_BYTES).div_ceil(PAGE_SIZE), there)?;
    let bytes = list.read_bytes(memory, count * RECORD_BYTES)?;
    let (records, _) = <[Record]>::ref_from_prefix_with_elems(&bytes, bytes.len() / size_of::<Record>())
        .map_err(|_| place.bad("folios", Problem::Truncated))?;
    let runs = memory.runs();
    let mut folios: Vec<Folio> = Vec::new();
    for record in records {
        let (word, index) = (record.word.get(), record.index.get());
        let number = word & ((1 << PFN_BITS) - 1);
        if number == 0 && rules.holes {
            continue;
        }
        let flags = u16::try_from(word >> PFN_BITS).unwrap_or_default();
        if flags & !rules.flags != 0 {
            return Err(place.bad("folio flags", Problem::Unknown { found: flags.into() }));
        }
        let frames = frames(place, number, rules, &runs)?;
        let begins = folios.last().map_or(0, |last| last.index + last.frames.len_pages());
        if index < begins {
            return Err(place.bad("folio index", Problem::Repeated { found: index }));
        }
        if !index.is_multiple_of(frames.len_pages()) {
            return Err(place.bad("folio index", Problem::Misaligned { found: index }));
        }
        if index >= rules.pages {
            return Err(place.bad("folio index", Problem::TooLarge { found: index, limit: rules.pages }));
        }
        folios.push(Folio { index, frames, flags });
    }
    alone(place, &folios)?;
    Ok(folios)
}

fn frames(place: Place, number: u64, rules: &Rules<'_>, runs: &[PageRange]) -> Result<PageRange, Malformed> {
    if number == 0 {
        return Err(place.bad("folio pfn", Problem::Zero));
    }
    let unknown = || place.bad("folio pfn", Problem::Unknown { found: number });
    let start = Pfn::new(number).map_err(|_| unknown())?;
    let order = (rules.order)(start).ok_or_else(unknown)?;
    if !number.is_multiple_of(order.len_pages()) {
        return Err(place.bad("folio pfn", Problem::Misaligned { found: number }));
    }
    let frames = PageRange::block(start, order).map_err(|_| unknown())?;
    if holds(runs, frames) { Ok(frames) } else { Err(unknown()) }
}

/// No frame is in two folios.
fn alone(place: Place, folios: &[Folio]) -> Result<(), Malformed> {
    let mut frames: Vec<PageRange> = folios.iter().map(|folio| folio.frames).collect();
    frames.sort_unstable_by_key(|range| range.start());
    let twice = frames.windows(2).find(|pair| pair[0].overlaps(pair[1]));
    match twice {
        Some(pair) => Err(place.bad("folio pfn", Problem::Repeated { found: pair[1].start().get() })),
        None => Ok(()),
    }
}
