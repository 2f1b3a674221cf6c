//! The records on the guest's disk: each is known by its number, to the last byte.

use std::error::Error;
use std::fmt;

/// One record, in bytes.
pub const RECORD_BYTES: usize = 4096;
const WORD_BYTES: usize = size_of::<u64>();

/// The bytes of the record of this number, which stands at this place of the disk, counted in records; after the last place
/// comes the first again.
#[must_use]
pub fn record(number: u64) -> Vec<u8> {
    let words = (0..).map(|word: u64| {
        (number + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ word.wrapping_mul(0xff51_afd7_ed55_8ccd)
    });
    words.take(RECORD_BYTES / WORD_BYTES).flat_map(u64::to_le_bytes).collect()
}

/// A place of the disk does not hold what was written to it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BrokenRecord {
    /// The number of the record that should be there.
    pub number: u64,
}

impl fmt::Display for BrokenRecord {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "record {} is not on the disk as it was written", self.number)
    }
}

impl Error for BrokenRecord {}

/// How many records a disk holds, if the guest says that it has written all below `said`: it may have written some more, and
/// be in the midst of one.
///
/// # Errors
/// The first record that is not there, of those that were not written over.
pub fn whole_records(disk: &[u8], said: u64) -> Result<u64, BrokenRecord> {
    let places = disk.len() / RECORD_BYTES;
    let is_there = |number: u64| {
        let place = usize::try_from(number).unwrap_or_default() % places.max(1) * RECORD_BYTES;
        disk.get(place..place + RECORD_BYTES).is_some_and(|bytes| bytes == record(number))
    };
    // The oldest of as many as there are places may have been written over since it was said.
    let oldest = said.saturating_sub(u64::try_from(places / 2).unwrap_or_default().max(1));
    match (oldest..said).find(|&number| !is_there(number)) {
        Some(number) => Err(BrokenRecord { number }),
        None => Ok((said..).find(|&number| !is_there(number)).unwrap_or(said)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn disk(places: u64, written: u64) -> Vec<u8> {
        let number = |place: u64| (0..written).rev().find(|number| number % places == place);
        let bytes = |place| number(place).map_or_else(|| vec![0; RECORD_BYTES], record);
        (0..places).flat_map(bytes).collect()
    }

    #[test]
    fn no_two_records_are_alike_and_none_is_zero() {
        let (one, other) = (record(0), record(1));
        assert_eq!((one.len(), other.len()), (RECORD_BYTES, RECORD_BYTES));
        assert!(one != other && one.iter().any(|byte| *byte != 0));
        assert!(one.chunks(512).all(|sector| one.chunks(512).filter(|other| *other == sector).count() == 1));
    }

    #[test]
    fn all_that_was_said_has_to_be_there_and_more_may_be() {
        assert_eq!(whole_records(&disk(8, 5), 3), Ok(5));
        assert_eq!(whole_records(&disk(8, 21), 20), Ok(21));
        assert_eq!(whole_records(&disk(8, 0), 0), Ok(0));
        assert_eq!(whole_records(&disk(8, 2), 3), Err(BrokenRecord { number: 2 }));
        let mut broken = disk(8, 5);
        broken[2 * RECORD_BYTES + 77] ^= 1;
        assert_eq!(whole_records(&broken, 5), Err(BrokenRecord { number: 2 }));
        assert_eq!(whole_records(&[], 1), Err(BrokenRecord { number: 0 }));
    }
}
