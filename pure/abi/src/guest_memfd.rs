//! `guest_memfd_luo_v1`: a guest_memfd as the kernel series hands it over, in folios of 4 KiB.
//!
//! The series' reader trusts another kernel's numbers; this one checks all of them (O1.14), and takes a frame number of
//! 0 for what it is, a corrupt record (O1.9).

use alloc::vec::Vec;

use pages::Order;
use pages::PAGE_SIZE;
use pages::Pfn;
use zerocopy::FromBytes;
use zerocopy::Immutable;
use zerocopy::IntoBytes;
use zerocopy::KnownLayout;
use zerocopy::Unaligned;
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
pub const COMPATIBLE: &str = "guest_memfd_luo_v1";
/// Flag of a guest_memfd's [`Folio`]: its bytes are the file's; else it is to be zeroed before it is seen.
pub const UPTODATE: u16 = 1;

/// Flags of a guest_memfd: the format's own numbers.
pub mod flags {
    /// User space may map it.
    pub const MMAP: u64 = 1;
    /// It starts out shared with the host.
    pub const INIT_SHARED: u64 = 2;
    /// All that there are.
    pub const KNOWN: u64 = MMAP | INIT_SHARED;
}

/// The structure.
#[derive(Debug, Clone, Copy, PartialEq, Eq, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub struct GuestMemfdSer {
    /// The file's size, in bytes: whole pages, one at least.
    pub size: U64,
    /// Its [`flags`].
    pub flags: U64,
    /// Records in the list.
    pub nr_folios: U64,
    /// The token of its VM, in the same session.
    pub vm_token: U64,
    /// The list; zero if it is empty.
    pub folios: Descriptor,
}

const _: () = assert!(size_of::<GuestMemfdSer>() == 48);

/// A guest_memfd.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GuestMemfd {
    /// The file's size, in bytes.
    pub size_bytes: u64,
    /// Its [`flags`].
    pub flags: u64,
    /// The token of its VM, in the same session.
    pub vm_token: u64,
    /// Its folios, in the order of the file. What is in none is a hole.
    pub folios: Vec<Folio>,
}

impl GuestMemfd {
    /// Reads the guest_memfd at `address`.
    ///
    /// # Errors
    /// [`Malformed`], with the field.
    pub fn read(memory: &(impl Memory + ?Sized), address: u64) -> Result<Self, Malformed> {
        let place = Place::new(COMPATIBLE, address);
        let ser: GuestMemfdSer = place.get(memory)?;
        check(place, &ser, &mut stop)?;
        let folios =
            folio::read(memory, place, ser.nr_folios.get(), &ser.folios, &rules(ser.size.get(), &single))?;
        let (size_bytes, flags) = (ser.size.get(), ser.flags.get());
        Ok(Self { size_bytes, flags, vm_token: ser.vm_token.get(), folios })
    }

    /// Walks the folios of the guest_memfd at `address`, past what is wrong, and gives its structure if it is there.
    /// `order` gives the order of the preserved block that begins at a frame; the series writes single pages alone.
    ///
    /// # Errors
    /// What `visit` and `on_fault` make of what they are told.
    pub fn walk_on(
        memory: &(impl Memory + ?Sized),
        address: u64,
        order: &dyn Fn(Pfn) -> Option<Order>,
        visit: &mut dyn FnMut(folio::Part) -> Result<(), Malformed>,
        on_fault: &mut OnFault<'_>,
    ) -> Result<Option<GuestMemfdSer>, Malformed> {
        let place = Place::new(COMPATIBLE, address);
        let Some(ser) = place.get_on::<GuestMemfdSer>(memory, on_fault)? else { return Ok(None) };
        check(place, &ser, on_fault)?;
        let rules = rules(ser.size.get(), order);
        folio::walk_on(memory, place, (ser.nr_folios.get(), &ser.folios), &rules, visit, on_fault)?;
        Ok(Some(ser))
    }

    /// The structure of this guest_memfd, whose [list](folio::encode) of folios lies behind `folios`.
    pub fn ser(&self, folios: Descriptor) -> GuestMemfdSer {
        GuestMemfdSer {
            size: self.size_bytes.into(),
            flags: self.flags.into(),
            nr_folios: (self.folios.len() as u64).into(),
            vm_token: self.vm_token.into(),
            folios,
        }
    }
}

fn check(place: Place, ser: &GuestMemfdSer, on_fault: &mut OnFault<'_>) -> Result<(), Malformed> {
    let (size, flags) = (ser.size.get(), ser.flags.get());
    if size == 0 {
        on_fault(place.bad("size", Problem::Zero))?;
    }
    if !size.is_multiple_of(PAGE_SIZE) {
        on_fault(place.bad("size", Problem::Misaligned { found: size }))?;
    }
    if flags & !flags::KNOWN != 0 {
        on_fault(place.bad("flags", Problem::Unknown { found: flags }))?;
    }
    Ok(())
}

fn rules<'a>(size_bytes: u64, order: &'a dyn Fn(Pfn) -> Option<Order>) -> Rules<'a> {
    Rules { pages: size_bytes / PAGE_SIZE, flags: UPTODATE, holes: false, order }
}

fn single(_: Pfn) -> Option<Order> {
    Some(Order::PAGE)
}
