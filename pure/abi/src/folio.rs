//! The folios of a file, as the kernel lists them behind a [`vmalloc`] descriptor.
//!
//! 16 bytes each: a word of the page frame number (52 bits) and flags (12 bits), and a word of the page's index in the
//! file. What the flags say differs from format to format. A folio's order is not in the list.

use alloc::vec::Vec;
use core::cell::RefCell;

use pages::Order;
use pages::PAGE_BYTES;
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
use crate::memory::holds;
use crate::memory::stop;
use crate::vmalloc;
use crate::vmalloc::Descriptor;

/// Bits of a page frame number; those above are flags.
const PFN_BITS: u32 = 52;
/// The bytes of a record.
pub const RECORD_BYTES: u64 = 16;
/// Records in a page.
const RECORDS: u64 = PAGE_SIZE / RECORD_BYTES;

#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct Record {
    word: U64,
    index: U64,
}

const _: () = assert!(size_of::<Record>() as u64 == RECORD_BYTES);

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

/// What a walk meets.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Part {
    /// A chunk or a block of the list of pages that hold the records.
    List(vmalloc::Part),
    /// A folio.
    Folio(Folio),
    /// A record without a frame, where the format has such: a hole.
    Hole {
        /// The page of the file.
        index: u64,
    },
    /// A record whose frames are none of a preserved block, and what it says.
    Lost {
        /// The page of the file.
        index: u64,
        /// The frame number that it says.
        pfn: u64,
    },
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
    let mut folios: Vec<Folio> = Vec::new();
    let mut gather = |part| {
        if let Part::Folio(folio) = part {
            folios.push(folio);
        }
        Ok(())
    };
    walk_on(memory, place, (count, descriptor), rules, &mut gather, &mut stop)?;
    alone(place, &folios)?;
    Ok(folios)
}

/// Walks the list of so many folios behind a descriptor, page by page and past what is wrong. Whether two folios share
/// memory is not looked at: whoever has a picture of all of it does that.
///
/// # Errors
/// What `visit` and `on_fault` make of what they are told.
pub(crate) fn walk_on(
    memory: &(impl Memory + ?Sized),
    place: Place,
    (count, descriptor): (u64, &Descriptor),
    rules: &Rules<'_>,
    visit: &mut dyn FnMut(Part) -> Result<(), Malformed>,
    on_fault: &mut OnFault<'_>,
) -> Result<(), Malformed> {
    // Each has a page of the file at least: with this the length below cannot overflow, either.
    let mut told = count > rules.pages;
    if told {
        on_fault(place.bad("nr_folios", Problem::TooLarge { found: count, limit: rules.pages }))?;
    }
    if count == 0 && !descriptor.is_empty() {
        told = true;
        on_fault(place.bad("folios", Problem::Structure("is not zero, and the file has no folios")))?;
    }
    let wanted = count.saturating_mul(RECORD_BYTES).div_ceil(PAGE_SIZE);
    let room = u64::from(descriptor.total_pages.get());
    let short = Place::expect(place, "nr_folios, in pages of records", wanted, room);
    if let (false, true, Err(fault)) = (told, wanted > room, short) {
        told = true;
        on_fault(fault)?;
    }
    let mut records =
        Records { place, rules, runs: memory.runs(), left: count, begins: 0, overcounted: told };
    let mut pages = 0u64;
    // Two closures have to tell of faults.
    let faults = RefCell::new(on_fault);
    let mut part = |part| {
        visit(Part::List(part))?;
        let on_fault = &mut **faults.borrow_mut();
        match part {
            vmalloc::Part::Block(block) => {
                pages += block.len_pages();
                records.block(memory, block, visit, on_fault)
            }
            vmalloc::Part::Missing { pages } => {
                records.left = records.left.saturating_sub(pages.saturating_mul(RECORDS));
                Ok(())
            }
            vmalloc::Part::Chunk { .. } => Ok(()),
        }
    };
    vmalloc::walk_on(memory, descriptor, &mut part, &mut |fault| {
        told = true;
        (faults.borrow_mut())(fault)
    })?;
    match told {
        // That it is not as long as it should be follows from what was told.
        true => Ok(()),
        false => place.expect("nr_folios, in pages of records", wanted, pages).or_else(faults.into_inner()),
    }
}

/// Where in the file a walk is.
struct Records<'a> {
    place: Place,
    rules: &'a Rules<'a>,
    runs: Vec<PageRange>,
    /// Records that are to come.
    left: u64,
    /// The first page of the file that no folio has had.
    begins: u64,
    /// More records are counted than there can be: they end at the first that is zero.
    overcounted: bool,
}

impl Records<'_> {
    fn block(
        &mut self,
        memory: &(impl Memory + ?Sized),
        block: PageRange,
        visit: &mut dyn FnMut(Part) -> Result<(), Malformed>,
        on_fault: &mut OnFault<'_>,
    ) -> Result<(), Malformed> {
        for page in block.pages() {
            if self.left == 0 {
                return Ok(());
            }
            let here = self.left.min(RECORDS);
            self.left -= here;
            let bytes: [u8; PAGE_BYTES] = match Place::new("kho_vmalloc", page.address()).get(memory) {
                Ok(bytes) => bytes,
                Err(fault) => {
                    on_fault(Malformed { field: "blocks", ..fault })?;
                    continue;
                }
            };
            let (records, _) = bytes.as_chunks::<{ size_of::<Record>() }>();
            for record in records.iter().take(usize::try_from(here).unwrap_or(usize::MAX)) {
                let record: Record = zerocopy::transmute!(*record);
                if self.overcounted && record.word == 0 && record.index == 0 {
                    self.left = 0;
                    return Ok(());
                }
                if let Some(part) = self.record(&record, on_fault)? {
                    visit(part)?;
                }
            }
        }
        Ok(())
    }

    fn record(&mut self, record: &Record, on_fault: &mut OnFault<'_>) -> Result<Option<Part>, Malformed> {
        let Self { place, rules, runs, .. } = self;
        let (word, index) = (record.word.get(), record.index.get());
        let number = word & ((1 << PFN_BITS) - 1);
        if number == 0 && rules.holes {
            return Ok(Some(Part::Hole { index }));
        }
        let flags = u16::try_from(word >> PFN_BITS).unwrap_or_default();
        if flags & !rules.flags != 0 {
            on_fault(place.bad("folio flags", Problem::Unknown { found: flags.into() }))?;
        }
        let frames = match frames(*place, number, rules, runs) {
            Ok(frames) => frames,
            Err(fault) => return on_fault(fault).map(|()| Some(Part::Lost { index, pfn: number })),
        };
        if index < self.begins {
            on_fault(place.bad("folio index", Problem::Repeated { found: index }))?;
        }
        if !index.is_multiple_of(frames.len_pages()) {
            on_fault(place.bad("folio index", Problem::Misaligned { found: index }))?;
        }
        if index >= rules.pages {
            let problem = Problem::TooLarge { found: index, limit: rules.pages };
            on_fault(place.bad("folio index", problem))?;
        }
        self.begins = self.begins.max(index.saturating_add(frames.len_pages()));
        Ok(Some(Part::Folio(Folio { index, frames, flags })))
    }
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
