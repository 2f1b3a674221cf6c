//! `memfd-v2`: a memfd as the kernel hands it over.

use alloc::vec::Vec;

use pages::Order;
use pages::PAGE_SIZE;
use pages::Pfn;
use zerocopy::FromBytes;
use zerocopy::Immutable;
use zerocopy::IntoBytes;
use zerocopy::KnownLayout;
use zerocopy::Unaligned;
use zerocopy::little_endian::U32;
use zerocopy::little_endian::U64;

use crate::folio;
use crate::folio::Folio;
use crate::folio::Rules;
use crate::memory::Malformed;
use crate::memory::Memory;
use crate::memory::OnFault;
use crate::memory::Place;
use crate::memory::Problem;
use crate::memory::stop;
use crate::vmalloc::Descriptor;

/// The compatible string.
pub const COMPATIBLE: &str = "memfd-v2";
/// The compatible string of the version before.
pub const COMPATIBLE_V1: &str = "memfd-v1";
/// Seals that there are: SEAL, SHRINK, GROW, WRITE, FUTURE_WRITE and EXEC.
pub const KNOWN_SEALS: u32 = 0x3f;

/// Flags of a memfd's [`Folio`]. The kernel sets both of all.
pub mod flags {
    /// It was written.
    pub const DIRTY: u16 = 1;
    /// Its bytes are the file's.
    pub const UPTODATE: u16 = 2;
}

/// The structure.
#[derive(Debug, Clone, Copy, PartialEq, Eq, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub struct MemfdSer {
    /// The file's position, in bytes.
    pub pos: U64,
    /// The file's size, in bytes.
    pub size: U64,
    /// Its seals.
    pub seals: U32,
    /// None is known.
    pub flags: U32,
    /// Records in the list.
    pub nr_folios: U64,
    /// The list; zero if it is empty.
    pub folios: Descriptor,
}

const _: () = assert!(size_of::<MemfdSer>() == 48);

/// The structure of `memfd-v1`, before there were seals. It is only looked at.
#[derive(Debug, Clone, Copy, PartialEq, Eq, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub struct MemfdSer1 {
    /// The file's position, in bytes.
    pub pos: U64,
    /// The file's size, in bytes.
    pub size: U64,
    /// Records in the list.
    pub nr_folios: U64,
    /// The list; zero if it is empty.
    pub folios: Descriptor,
}

const _: () = assert!(size_of::<MemfdSer1>() == 40);

/// A memfd.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Memfd {
    /// The file's position, in bytes.
    pub pos: u64,
    /// The file's size, in bytes: any number.
    pub size_bytes: u64,
    /// Its seals.
    pub seals: u32,
    /// Its folios, in the order of the file. What is in none is a hole.
    pub folios: Vec<Folio>,
}

impl Memfd {
    /// Reads the memfd at `address`. `order` gives the order of the preserved block that begins at a frame, which stands
    /// in the tree of preserved memory alone.
    ///
    /// # Errors
    /// [`Malformed`], with the field.
    pub fn read(
        memory: &(impl Memory + ?Sized),
        address: u64,
        order: &dyn Fn(Pfn) -> Option<Order>,
    ) -> Result<Self, Malformed> {
        let place = Place::new(COMPATIBLE, address);
        let ser: MemfdSer = place.get(memory)?;
        check(place, &ser, &mut stop)?;
        let folios =
            folio::read(memory, place, ser.nr_folios.get(), &ser.folios, &rules(ser.size.get(), order))?;
        Ok(Self { pos: ser.pos.get(), size_bytes: ser.size.get(), seals: ser.seals.get(), folios })
    }

    /// Walks the folios of the memfd at `address`, past what is wrong, and gives its structure if it is there.
    ///
    /// # Errors
    /// What `visit` and `on_fault` make of what they are told.
    pub fn walk_on(
        memory: &(impl Memory + ?Sized),
        address: u64,
        order: &dyn Fn(Pfn) -> Option<Order>,
        visit: &mut dyn FnMut(folio::Part) -> Result<(), Malformed>,
        on_fault: &mut OnFault<'_>,
    ) -> Result<Option<MemfdSer>, Malformed> {
        let place = Place::new(COMPATIBLE, address);
        let Some(ser) = place.get_on::<MemfdSer>(memory, on_fault)? else { return Ok(None) };
        check(place, &ser, on_fault)?;
        let rules = rules(ser.size.get(), order);
        folio::walk_on(memory, place, (ser.nr_folios.get(), &ser.folios), &rules, visit, on_fault)?;
        Ok(Some(ser))
    }

    /// Walks the folios of the memfd of version 1 at `address`, as [`Memfd::walk_on`] does.
    ///
    /// # Errors
    /// What `visit` and `on_fault` make of what they are told.
    pub fn walk_v1_on(
        memory: &(impl Memory + ?Sized),
        address: u64,
        order: &dyn Fn(Pfn) -> Option<Order>,
        visit: &mut dyn FnMut(folio::Part) -> Result<(), Malformed>,
        on_fault: &mut OnFault<'_>,
    ) -> Result<Option<MemfdSer1>, Malformed> {
        let place = Place::new(COMPATIBLE_V1, address);
        let Some(ser) = place.get_on::<MemfdSer1>(memory, on_fault)? else { return Ok(None) };
        let rules = rules(ser.size.get(), order);
        folio::walk_on(memory, place, (ser.nr_folios.get(), &ser.folios), &rules, visit, on_fault)?;
        Ok(Some(ser))
    }

    /// The structure of this memfd, whose [list](folio::encode) of folios lies behind `folios`.
    pub fn ser(&self, folios: Descriptor) -> MemfdSer {
        MemfdSer {
            pos: self.pos.into(),
            size: self.size_bytes.into(),
            seals: self.seals.into(),
            flags: 0.into(),
            nr_folios: (self.folios.len() as u64).into(),
            folios,
        }
    }
}

fn check(place: Place, ser: &MemfdSer, on_fault: &mut OnFault<'_>) -> Result<(), Malformed> {
    let (seals, flags) = (ser.seals.get(), ser.flags.get());
    if seals & !KNOWN_SEALS != 0 {
        on_fault(place.bad("seals", Problem::Unknown { found: seals.into() }))?;
    }
    if flags != 0 {
        on_fault(place.bad("flags", Problem::Unknown { found: flags.into() }))?;
    }
    Ok(())
}

fn rules<'a>(size_bytes: u64, order: &'a dyn Fn(Pfn) -> Option<Order>) -> Rules<'a> {
    let pages = size_bytes.div_ceil(PAGE_SIZE);
    Rules { pages, flags: flags::DIRTY | flags::UPTODATE, holes: true, order }
}
