//! Saved states: one record each, of our own records' kind, and what is wrong with one.
//!
//! The record gives a state its kind, a version that is readable without the rest, and a checksum that is checked
//! before anything is decoded. Its payload is a fixed structure, perhaps with a list behind it.

use abi::Malformed;
use abi::Memory;
use abi::NoMemory;
use abi::record::Format;
use pages::PAGE_SIZE;
use pages::PageRange;
use thiserror::Error;
use zerocopy::FromBytes;
use zerocopy::Immutable;
use zerocopy::KnownLayout;
use zerocopy::Unaligned;

use crate::virtio::queue::RingFault;

/// Why a state was not saved or not loaded.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum StateError {
    /// The device works, so its state is not one of an instant.
    #[error("{device} is not paused")]
    NotPaused {
        /// The device's name.
        device: String,
    },
    /// The bytes are not a state of such a device.
    #[error("the state of {device} is none of its kind")]
    Record {
        /// The device's name.
        device: String,
        /// What is wrong.
        #[source]
        source: Malformed,
    },
    /// They end too early, or too late.
    #[error("the state of {device} ends within or after its `{field}`")]
    Length {
        /// The device's name.
        device: String,
        /// The last field that was looked for.
        field: &'static str,
    },
    /// A queue cannot be where it says.
    #[error("the state of {device} has a queue that cannot be")]
    Queue {
        /// The device's name.
        device: String,
        /// What is wrong with it.
        #[source]
        source: RingFault,
    },
    /// A field has a value that it cannot have, or not on this machine.
    #[error("the state of {device}: `{field}` is {found:#x}, which {why}")]
    Field {
        /// The device's name.
        device: String,
        /// The field.
        field: &'static str,
        /// What it is.
        found: u64,
        /// What is wrong with that.
        why: &'static str,
    },
}

/// Where records are looked for: the page after address 0, which means "none".
const AT: u64 = 4096;

struct Bytes<'a>(&'a [u8]);

impl Memory for Bytes<'_> {
    fn read(&self, address: u64, into: &mut [u8]) -> Result<(), NoMemory> {
        let none = NoMemory::at(address, into.len());
        let from = address.checked_sub(AT).and_then(|from| usize::try_from(from).ok()).ok_or(none)?;
        let bytes = self.0.get(from..).and_then(|rest| rest.get(..into.len())).ok_or(none)?;
        into.copy_from_slice(bytes);
        Ok(())
    }

    fn runs(&self) -> Vec<PageRange> {
        let whole = self.0.len() as u64 / PAGE_SIZE * PAGE_SIZE;
        PageRange::of_bytes(AT, whole).into_iter().collect()
    }
}

/// A state that is being decoded.
#[derive(Debug)]
pub(crate) struct Reader<'a> {
    device: &'a str,
    payload: Vec<u8>,
    used: usize,
}

impl<'a> Reader<'a> {
    /// Checks head and checksum.
    pub(crate) fn new(device: &'a str, format: &Format, bytes: &[u8]) -> Result<Self, StateError> {
        let record = |source| StateError::Record { device: device.to_owned(), source };
        let (_version, payload) = format.read(&Bytes(bytes), AT).map_err(record)?;
        let record_len = format.encode(&payload).len();
        let reader = Self { device, payload, used: 0 };
        if bytes.len() == record_len { Ok(reader) } else { Err(reader.length("payload")) }
    }

    fn length(&self, field: &'static str) -> StateError {
        StateError::Length { device: self.device.to_owned(), field }
    }

    /// The next structure.
    pub(crate) fn take<T: FromBytes + KnownLayout + Immutable + Unaligned + Copy>(
        &mut self,
        field: &'static str,
    ) -> Result<T, StateError> {
        let rest = self.payload.get(self.used..).unwrap_or_default();
        let (value, _) = T::read_from_prefix(rest).map_err(|_| self.length(field))?;
        self.used += size_of::<T>();
        Ok(value)
    }

    /// All that is left, which has to be `len` bytes.
    pub(crate) fn rest(self, field: &'static str, len: usize) -> Result<Vec<u8>, StateError> {
        match self.payload.get(self.used..) {
            Some(rest) if rest.len() == len => Ok(rest.to_vec()),
            _ => Err(self.length(field)),
        }
    }

    /// That nothing is left.
    pub(crate) fn end(self, field: &'static str) -> Result<(), StateError> {
        self.rest(field, 0).map(drop)
    }

    /// What to say of a queue that was read.
    pub(crate) fn queue(&self, source: RingFault) -> StateError {
        StateError::Queue { device: self.device.to_owned(), source }
    }

    /// That a field is good.
    pub(crate) fn check(
        &self,
        good: bool,
        field: &'static str,
        found: u64,
        why: &'static str,
    ) -> Result<(), StateError> {
        if good {
            return Ok(());
        }
        Err(StateError::Field { device: self.device.to_owned(), field, found, why })
    }
}
