//! Where the decoders read: any source of physical memory.
//!
//! A *physical address* names a byte of the memory that is handed over: of a machine, of a copy of one,
//! or of an arena. 0 means "none" in every format.

use alloc::vec::Vec;
use core::fmt;

use pages::PAGE_SIZE;
use pages::PageRange;
use pages::Pfn;
use thiserror::Error;
use zerocopy::FromBytes;
use zerocopy::IntoBytes;

/// The source does not hold these bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
#[error("no memory at {address:#x}, {len_bytes} bytes")]
pub struct NoMemory {
    /// Physical address of the first byte.
    pub address: u64,
    /// Bytes asked for.
    pub len_bytes: u64,
}

impl NoMemory {
    /// For a buffer of `len` bytes at `address`.
    pub fn at(address: u64, len: usize) -> Self {
        Self { address, len_bytes: u64::try_from(len).unwrap_or(u64::MAX) }
    }
}

/// Memory that can be read by physical address.
///
/// Somebody else may write it meanwhile: two reads of one address may differ, so a decoder reads what it
/// needs once, checks its copy and uses the copy.
pub trait Memory {
    /// Fills `into` from `address` on.
    ///
    /// # Errors
    /// [`NoMemory`] if not all of the bytes are there; `into` may then hold part of them.
    fn read(&self, address: u64, into: &mut [u8]) -> Result<(), NoMemory>;

    /// The pages that are there, as ascending runs that do not overlap. Some of them may still not be readable; what
    /// is outside is not there at all, and a structure that says it is, or counts more pages than these, is broken.
    fn runs(&self) -> Vec<PageRange>;
}

/// True if all pages of `range` lie in one of `runs`, which ascend.
pub fn holds(runs: &[PageRange], range: PageRange) -> bool {
    let after = runs.partition_point(|run| run.start() <= range.start());
    after.checked_sub(1).and_then(|at| runs.get(at)).is_some_and(|run| run.covers(range))
}

/// Memory that can be written, too.
pub trait MemoryMut: Memory {
    /// Copies `bytes` to `address`.
    ///
    /// # Errors
    /// [`NoMemory`] if not all of the range is there; then nothing was written.
    fn write(&mut self, address: u64, bytes: &[u8]) -> Result<(), NoMemory>;

    /// What was written before is seen before what is written after, by every reader of this memory.
    fn order_writes(&mut self);
}

impl<M: Memory + ?Sized> Memory for &M {
    fn read(&self, address: u64, into: &mut [u8]) -> Result<(), NoMemory> {
        (**self).read(address, into)
    }

    fn runs(&self) -> Vec<PageRange> {
        (**self).runs()
    }
}

/// Why bytes are not what they were taken for: the format, the place, the field, and what is wrong there.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[error("{format} at {address:#x}: `{field}` {problem}")]
pub struct Malformed {
    /// The format's compatible string, or its name where it has none.
    pub format: &'static str,
    /// Physical address of the structure (of a blob without one: 0).
    pub address: u64,
    /// The field.
    pub field: &'static str,
    /// What is wrong with it.
    pub problem: Problem,
}

/// What is done with each fault that a reader meets: `Ok` has it go on with what it can still make out, `Err` ends it.
pub type OnFault<'a> = dyn FnMut(Malformed) -> Result<(), Malformed> + 'a;

/// Ends with the first fault: what whoever uses what he reads does.
///
/// # Errors
/// The fault.
pub const fn stop(fault: Malformed) -> Result<(), Malformed> {
    Err(fault)
}

/// What is wrong with a field.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum Problem {
    /// It points to memory that is not there.
    Unreadable(NoMemory),
    /// It has to be something else.
    Mismatch {
        /// What it has to be.
        expected: u64,
        /// What it is.
        found: u64,
    },
    /// It is larger than it may be.
    TooLarge {
        /// What it is.
        found: u64,
        /// The largest that is allowed.
        limit: u64,
    },
    /// An address or length that is not aligned as it has to be.
    Misaligned {
        /// What it is.
        found: u64,
    },
    /// It is zero, or empty, and must not be.
    Zero,
    /// A value that this version does not know.
    Unknown {
        /// What it is.
        found: u64,
    },
    /// The sum over the bytes is another one.
    Checksum {
        /// The sum that is stored.
        stored: u32,
        /// The sum of the bytes.
        computed: u32,
    },
    /// Something that may stand once stands twice.
    Repeated {
        /// What it is.
        found: u64,
    },
    /// It ends before its end.
    Truncated,
    /// A text without its NUL, or with bytes after it.
    NotTerminated,
    /// Not the structure it should be.
    Structure(&'static str),
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unreadable(none) => write!(f, "points to nothing: {none}"),
            Self::Mismatch { expected, found } => write!(f, "is {found:#x}, not {expected:#x}"),
            Self::TooLarge { found, limit } => write!(f, "is {found:#x}, over the limit {limit:#x}"),
            Self::Misaligned { found } => write!(f, "is {found:#x}, which is not aligned"),
            Self::Zero => f.write_str("is zero"),
            Self::Unknown { found } => write!(f, "has the unknown value {found:#x}"),
            Self::Checksum { stored, computed } => {
                write!(f, "says checksum {stored:#010x}, but the bytes have {computed:#010x}")
            }
            Self::Repeated { found } => write!(f, "stands twice: {found:#x}"),
            Self::Truncated => f.write_str("is cut short"),
            Self::NotTerminated => f.write_str("is not a NUL-terminated, zero-filled text"),
            Self::Structure(what) => f.write_str(what),
        }
    }
}

/// One structure at one place: what its fields' errors have in common.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Place {
    pub(crate) format: &'static str,
    pub(crate) address: u64,
}

impl Place {
    pub(crate) const fn new(format: &'static str, address: u64) -> Self {
        Self { format, address }
    }

    pub(crate) fn bad(self, field: &'static str, problem: Problem) -> Malformed {
        Malformed { format: self.format, address: self.address, field, problem }
    }

    /// Reads a wire structure that stands here.
    pub(crate) fn get<T: FromBytes + IntoBytes>(
        self,
        memory: &(impl Memory + ?Sized),
    ) -> Result<T, Malformed> {
        let mut value = T::new_zeroed();
        memory
            .read(self.address, value.as_mut_bytes())
            .map_err(|none| self.bad("address", Problem::Unreadable(none)))?;
        Ok(value)
    }

    /// The same, or none where `on_fault` goes on though nothing can be read here.
    pub(crate) fn get_on<T: FromBytes + IntoBytes>(
        self,
        memory: &(impl Memory + ?Sized),
        on_fault: &mut OnFault<'_>,
    ) -> Result<Option<T>, Malformed> {
        match self.get(memory) {
            Ok(value) => Ok(Some(value)),
            Err(fault) => on_fault(fault).map(|()| None),
        }
    }

    /// An address that must be a page's.
    pub(crate) fn page_address(self, field: &'static str, found: u64) -> Result<u64, Malformed> {
        match found {
            0 => Err(self.bad(field, Problem::Zero)),
            _ if !found.is_multiple_of(PAGE_SIZE) => Err(self.bad(field, Problem::Misaligned { found })),
            _ => Ok(found),
        }
    }

    /// A value that must be this one.
    pub(crate) fn expect(self, field: &'static str, found: u64, expected: u64) -> Result<(), Malformed> {
        if found == expected { Ok(()) } else { Err(self.bad(field, Problem::Mismatch { expected, found })) }
    }
}

/// Memory from address 0 on, in a buffer: what tests and copies of memory are made of.
impl Memory for Vec<u8> {
    fn read(&self, address: u64, into: &mut [u8]) -> Result<(), NoMemory> {
        let none = NoMemory::at(address, into.len());
        let from = usize::try_from(address).map_err(|_| none)?;
        let bytes = self.get(from..).and_then(|rest| rest.get(..into.len())).ok_or(none)?;
        into.copy_from_slice(bytes);
        Ok(())
    }

    fn runs(&self) -> Vec<PageRange> {
        let whole = self.len() as u64 / PAGE_SIZE;
        PageRange::new(Pfn::ZERO, whole).into_iter().collect()
    }
}

impl MemoryMut for Vec<u8> {
    fn write(&mut self, address: u64, bytes: &[u8]) -> Result<(), NoMemory> {
        let none = NoMemory::at(address, bytes.len());
        let from = usize::try_from(address).map_err(|_| none)?;
        let target = self.get_mut(from..).and_then(|rest| rest.get_mut(..bytes.len())).ok_or(none)?;
        target.copy_from_slice(bytes);
        Ok(())
    }

    fn order_writes(&mut self) {}
}

#[cfg(test)]
mod tests {
    use alloc::vec;

    use super::*;

    #[test]
    fn a_range_is_held_by_one_run_or_not_at_all() {
        let range = |start: u64, count: u64| PageRange::new(Pfn::new(start).unwrap(), count).unwrap();
        let runs = [range(0, 16), range(64, 32), range(96, 1)];
        for (held, start, count) in [
            (true, 0, 16),
            (false, 0, 17),
            (false, 16, 1),
            (true, 64, 32),
            (true, 95, 1),
            (true, 96, 1),
            (false, 95, 2),
            (false, 97, 1),
        ] {
            assert_eq!(holds(&runs, range(start, count)), held, "{start} {count}");
        }
        assert!(!holds(&[], range(0, 1)));
        assert_eq!(vec![0u8; 3 * 4096 + 5].runs(), [range(0, 3)]);
    }
}
