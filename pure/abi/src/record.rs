//! The fixed head of our own records, and the checksum they share.
//!
//! A record is 32 bytes of [`RecordHeader`] and a payload, in consecutive bytes from the start of a page.
//! The version stands at a fixed place and can be read without decoding the rest; the checksum covers head
//! and payload and is checked before anything of the payload is decoded.

use alloc::vec::Vec;

use crc::CRC_32_ISCSI;
use crc::Crc;
use crc::Table;
use pages::PAGE_SIZE;
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

static CRC32C: Crc<u32, Table<16>> = Crc::<u32, Table<16>>::new(&CRC_32_ISCSI);

/// CRC-32C over the parts, one after the other.
pub fn checksum(parts: &[&[u8]]) -> u32 {
    let mut digest = CRC32C.digest();
    parts.iter().for_each(|part| digest.update(part));
    digest.finalize()
}

const MAGIC: [u8; 8] = *b"TDRECORD";

/// First 32 bytes of a record. They never change; what grows goes into the payload, under a new version.
#[derive(Debug, Clone, Copy, PartialEq, Eq, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub struct RecordHeader {
    magic: [u8; 8],
    kind: U32,
    version: U32,
    payload_bytes: U64,
    checksum: U32,
    reserved: U32,
}

/// Bytes of a [`RecordHeader`].
pub const HEADER_BYTES: u64 = 32;
const _: () = assert!(size_of::<RecordHeader>() as u64 == HEADER_BYTES);

/// One of our formats: what its records say of themselves.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Format {
    /// Compatible string, also used in errors.
    pub compatible: &'static str,
    /// Four bytes that tell the formats apart in a record's head.
    pub kind: [u8; 4],
    /// The version that is written.
    pub version: u32,
    /// The oldest version that is read.
    pub oldest: u32,
    /// The most bytes that a payload may have.
    pub max_payload_bytes: u64,
}

impl Format {
    /// The record of this payload.
    pub fn encode(&self, payload: &[u8]) -> Vec<u8> {
        let mut header = RecordHeader {
            magic: MAGIC,
            kind: U32::from_bytes(self.kind),
            version: self.version.into(),
            payload_bytes: U64::new(payload.len() as u64),
            checksum: 0.into(),
            reserved: 0.into(),
        };
        header.checksum = checksum(&[header.as_bytes(), payload]).into();
        let mut record = header.as_bytes().to_vec();
        record.extend_from_slice(payload);
        record
    }

    /// Reads the record at `address`, which has to be a page's: its version, and its payload.
    ///
    /// # Errors
    /// [`Malformed`] for another kind, a version that is not read, a payload over the limit, or another
    /// checksum.
    pub fn read(&self, memory: &(impl Memory + ?Sized), address: u64) -> Result<(u32, Vec<u8>), Malformed> {
        self.read_on(memory, address, &mut stop)
    }

    /// Reads the record at `address` as [`Format::read`] does, past a checksum that is another one if `on_fault` says so.
    ///
    /// # Errors
    /// As [`Format::read`]; of the checksum and the reserved field what `on_fault` makes of it.
    pub fn read_on(
        &self,
        memory: &(impl Memory + ?Sized),
        address: u64,
        on_fault: &mut OnFault<'_>,
    ) -> Result<(u32, Vec<u8>), Malformed> {
        let place = Place::new(self.compatible, address);
        place.page_address("address", address)?;
        let header: RecordHeader = place.get(memory)?;
        place.expect("magic", u64::from_le_bytes(header.magic), u64::from_le_bytes(MAGIC))?;
        place.expect("kind", header.kind.get().into(), U32::from_bytes(self.kind).get().into())?;
        let version = header.version.get();
        if !(self.oldest..=self.version).contains(&version) {
            return Err(place.bad("version", Problem::Unknown { found: version.into() }));
        }
        let found = header.payload_bytes.get();
        let len = usize::try_from(found).ok().filter(|_| found <= self.max_payload_bytes);
        let limit = self.max_payload_bytes;
        let len = len.ok_or_else(|| place.bad("payload_bytes", Problem::TooLarge { found, limit }))?;
        let mut payload = alloc::vec![0; len];
        memory
            .read(address + HEADER_BYTES, &mut payload)
            .map_err(|none| place.bad("payload", Problem::Unreadable(none)))?;
        let stored = header.checksum.get();
        let computed = checksum(&[RecordHeader { checksum: 0.into(), ..header }.as_bytes(), &payload]);
        if stored != computed {
            on_fault(place.bad("checksum", Problem::Checksum { stored, computed }))?;
        }
        place.expect("reserved", header.reserved.get().into(), 0).or_else(on_fault)?;
        Ok((version, payload))
    }

    /// Pages that a record with `payload_bytes` of payload takes.
    pub const fn pages(payload_bytes: u64) -> u64 {
        (HEADER_BYTES + payload_bytes).div_ceil(PAGE_SIZE)
    }
}

/// Splits a wire structure off the front of a payload.
pub(crate) fn take<'a, T: FromBytes + KnownLayout + Immutable + Unaligned>(
    place: Place,
    field: &'static str,
    payload: &'a [u8],
) -> Result<(&'a T, &'a [u8]), Malformed> {
    T::ref_from_prefix(payload).map_err(|_| place.bad(field, Problem::Truncated))
}

/// A payload that is one wire structure. What a later writer of the same version adds behind it may be zero and nothing
/// else: it would say what this reader does not know.
pub(crate) fn whole<T: FromBytes + KnownLayout + Immutable + Unaligned>(
    place: Place,
    payload: &[u8],
) -> Result<&T, Malformed> {
    let (whole, rest) = take::<T>(place, "payload", payload)?;
    match rest.iter().find(|byte| **byte != 0) {
        Some(found) => Err(place.bad("payload, behind its end", Problem::Unknown { found: (*found).into() })),
        None => Ok(whole),
    }
}

/// The rest of a payload as exactly `count` structures.
pub(crate) fn take_list<'a, T: FromBytes + KnownLayout + Immutable + Unaligned>(
    place: Place,
    field: &'static str,
    count: u64,
    rest: &'a [u8],
) -> Result<&'a [T], Malformed> {
    let list = <[T]>::ref_from_bytes(rest).map_err(|_| place.bad(field, Problem::Truncated))?;
    place.expect(field, count, list.len() as u64)?;
    Ok(list)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const FORMAT: Format = Format {
        compatible: "tideover-test-v2",
        kind: *b"TEST",
        version: 2,
        oldest: 1,
        max_payload_bytes: 5000,
    };

    fn memory(record: &[u8]) -> Vec<u8> {
        let mut memory = vec![0; 4096];
        memory.extend_from_slice(record);
        memory
    }

    #[test]
    fn a_record_is_these_bytes() {
        let record = FORMAT.encode(b"payload");
        assert_eq!(&record[..24], b"TDRECORDTEST\x02\0\0\0\x07\0\0\0\0\0\0\0");
        assert_eq!(&record[28..], b"\0\0\0\0payload");
        assert_eq!(checksum(&[b"123456789"]), 0xE306_9283, "CRC-32C's check value");
    }

    #[test]
    fn an_unknown_version_is_named_before_the_payload_is_read() {
        let newer = Format { version: 3, ..FORMAT }.encode(b"payload");
        let error = FORMAT.read(&memory(&newer[..32]), 4096).unwrap_err();
        assert_eq!((error.field, error.problem), ("version", Problem::Unknown { found: 3 }));
        let older = Format { version: 1, ..FORMAT }.encode(b"payload");
        assert_eq!(FORMAT.read(&memory(&older), 4096).unwrap(), (1, b"payload".to_vec()));
    }

    #[test]
    fn a_length_over_the_limit_is_refused() {
        let record = FORMAT.encode(&[0; 5001]);
        assert_eq!(FORMAT.read(&memory(&record), 4096).unwrap_err().field, "payload_bytes");
    }

    proptest! {
        #[test]
        fn every_changed_bit_is_refused(payload in proptest::collection::vec(any::<u8>(), 1..300), bit in 0usize..1 << 16) {
            let mut record = FORMAT.encode(&payload);
            let bit = bit % (record.len() * 8);
            record[bit / 8] ^= 1 << (bit % 8);
            prop_assert!(FORMAT.read(&memory(&record), 4096).is_err());
        }
    }
}
