//! `guest_memfd_luo_v1`: a guest_memfd as the kernel series hands it over, in folios of 4 KiB.
//!
//! The series' reader trusts another kernel's numbers; this one checks all of them (O1.14), and takes a frame number of
//! 0 for what it is, a corrupt record (O1.9).

use alloc::vec::Vec;

use pages::Order;
use pages::PAGE_SIZE;
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
use crate::memory::Place;
use crate::memory::Problem;
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
        let (size_bytes, flags) = (ser.size.get(), ser.flags.get());
        if size_bytes == 0 {
            return Err(place.bad("size", Problem::Zero));
        }
        if !size_bytes.is_multiple_of(PAGE_SIZE) {
            return Err(place.bad("size", Problem::Misaligned { found: size_bytes }));
        }
        if flags & !flags::KNOWN != 0 {
            return Err(place.bad("flags", Problem::Unknown { found: flags }));
        }
        let order = |_| Some(Order::PAGE);
        let rules = Rules { pages: size_bytes / PAGE_SIZE, flags: UPTODATE, holes: false, order: &order };
        let folios = folio::read(memory, place, ser.nr_folios.get(), &ser.folios, &rules)?;
        Ok(Self { size_bytes, flags, vm_token: ser.vm_token.get(), folios })
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
