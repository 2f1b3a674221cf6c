//! `tideover-fd-v1`: a descriptor that goes with the machine and is none of its memory.
//!
//! The descriptor itself goes by the carrier, if that can carry it; the record says what it is called, what kind
//! of file it is, and which of the carrier's descriptors it is.

use alloc::vec::Vec;
use core::fmt;

use zerocopy::FromBytes;
use zerocopy::Immutable;
use zerocopy::IntoBytes;
use zerocopy::KnownLayout;
use zerocopy::Unaligned;
use zerocopy::little_endian::U32;
use zerocopy::little_endian::U64;

use crate::memory::Malformed;
use crate::memory::Memory;
use crate::memory::OnFault;
use crate::memory::Place;
use crate::memory::Problem;
use crate::memory::stop;
use crate::record::Format;
use crate::record::whole;
use crate::text::Text;
use crate::vm::Identity;

/// The format.
pub const FORMAT: Format =
    Format { compatible: "tideover-fd-v1", kind: *b"FDES", version: 1, oldest: 1, max_payload_bytes: 4096 };

/// What the VMM calls the descriptor: 1 to 31 bytes.
pub type FdName = Text<32>;

/// What a descriptor is of.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum FdKind {
    /// An eventfd.
    Eventfd,
    /// A socket that listens.
    Listener,
    /// A socket that is connected.
    Connection,
    /// A network interface (`/dev/net/tun`).
    Tap,
    /// A file on a file system, or a block device: a disk.
    File,
    /// A pipe, or a character device: a terminal.
    Stream,
}

impl FdKind {
    const ALL: [Self; 6] =
        [Self::Eventfd, Self::Listener, Self::Connection, Self::Tap, Self::File, Self::Stream];

    const fn code(self) -> u32 {
        match self {
            Self::Eventfd => 1,
            Self::Listener => 2,
            Self::Connection => 3,
            Self::Tap => 4,
            Self::File => 5,
            Self::Stream => 6,
        }
    }
}

impl fmt::Display for FdKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Eventfd => "an eventfd",
            Self::Listener => "a listening socket",
            Self::Connection => "a connected socket",
            Self::Tap => "a tap",
            Self::File => "a file",
            Self::Stream => "a stream",
        })
    }
}

#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct Payload {
    identity: [u8; 16],
    name: [u8; 32],
    kind: U32,
    reserved: U32,
    index: U64,
}

/// The record.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FdRecord {
    /// The machine that it goes with.
    pub identity: Identity,
    /// What the VMM calls it.
    pub name: FdName,
    /// What it is of.
    pub kind: FdKind,
    /// Its number among the descriptors that the carrier hands over behind the regions', from 0.
    pub index: u64,
}

impl FdRecord {
    /// The record's bytes.
    pub fn encode(&self) -> Vec<u8> {
        let payload = Payload {
            identity: self.identity.bytes(),
            name: *self.name.field(),
            kind: self.kind.code().into(),
            reserved: 0.into(),
            index: self.index.into(),
        };
        FORMAT.encode(payload.as_bytes())
    }

    /// Reads the record at `address`.
    ///
    /// # Errors
    /// [`Malformed`] if it is none.
    pub fn read(memory: &(impl Memory + ?Sized), address: u64) -> Result<Self, Malformed> {
        Self::read_on(memory, address, &mut stop)
    }

    /// Reads the record at `address` as [`FdRecord::read`] does, past a checksum that is another one if `on_fault` says so.
    ///
    /// # Errors
    /// As [`FdRecord::read`].
    pub fn read_on(
        memory: &(impl Memory + ?Sized),
        address: u64,
        on_fault: &mut OnFault<'_>,
    ) -> Result<Self, Malformed> {
        let place = Place::new(FORMAT.compatible, address);
        let (_, payload) = FORMAT.read_on(memory, address, on_fault)?;
        let fd: &Payload = whole(place, &payload)?;
        let name = FdName::read(&fd.name).ok_or_else(|| place.bad("name", Problem::NotTerminated))?;
        let found = fd.kind.get();
        let kind = FdKind::ALL.into_iter().find(|kind| kind.code() == found);
        let kind = kind.ok_or_else(|| place.bad("kind", Problem::Unknown { found: found.into() }))?;
        place.expect("reserved", fd.reserved.get().into(), 0)?;
        Ok(Self { identity: Identity::new(fd.identity), name, kind, index: fd.index.get() })
    }
}

#[cfg(test)]
mod tests {
    use alloc::vec;

    use super::*;

    fn record(kind: FdKind) -> FdRecord {
        FdRecord { identity: Identity::new([7; 16]), name: FdName::literal("tap0"), kind, index: 3 }
    }

    fn at_4096(bytes: Vec<u8>) -> Vec<u8> {
        let mut memory = vec![0; 4096];
        memory.extend(bytes);
        memory
    }

    #[test]
    fn what_is_written_is_read() {
        for kind in FdKind::ALL {
            assert_eq!(FdRecord::read(&at_4096(record(kind).encode()), 4096).unwrap(), record(kind));
        }
    }

    #[test]
    fn an_unknown_kind_and_an_endless_name_are_refused_by_field() {
        let broken = |at: usize, byte: u8| {
            let mut payload = record(FdKind::Tap).encode()[32..].to_vec();
            payload[at..].iter_mut().take(32).for_each(|to| *to = byte);
            FdRecord::read(&at_4096(FORMAT.encode(&payload)), 4096).unwrap_err().field
        };
        assert_eq!(broken(48, 9), "kind");
        assert_eq!(broken(16, b'x'), "name");
    }
}
