//! Memory that may be registered, and ranges of it.

use std::ops::Range;
use std::sync::Arc;

use crate::fd::RangeError;

/// A shared mapping of one file.
///
/// # Safety
///
/// For as long as a value lives, wherever it is moved:
///
/// 1. `host_address() .. host_address() + len_bytes()` is mapped `MAP_SHARED`, whole, from
///    offset 0 of one file, in this address space; both answers stay the same. The value alone decides
///    when it is unmapped.
/// 2. Nobody holds a Rust reference to its bytes, except to atomics: other processes change them, and a
///    page that is not yet present appears when it is touched.
/// 3. `host_address()` is aligned to the file's page size, and so is `len_bytes()`.
pub unsafe trait Mapped {
    /// Where the mapping begins in this address space.
    fn host_address(&self) -> usize;

    /// How long it is, in bytes.
    fn len_bytes(&self) -> usize;
}

// SAFETY: the answers are those of the value behind the reference, which outlives the reference.
unsafe impl<M: Mapped + ?Sized> Mapped for &M {
    fn host_address(&self) -> usize {
        (**self).host_address()
    }

    fn len_bytes(&self) -> usize {
        (**self).len_bytes()
    }
}

// SAFETY: the answers are those of the shared value, which lives as long as any of its owners.
unsafe impl<M: Mapped + ?Sized> Mapped for Arc<M> {
    fn host_address(&self) -> usize {
        (**self).host_address()
    }

    fn len_bytes(&self) -> usize {
        (**self).len_bytes()
    }
}

/// A range of addresses that was inside a mapping when it was made.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Span {
    /// The address of its first byte.
    pub(crate) address: usize,
    /// Its length in bytes; not zero.
    pub(crate) len: usize,
}

impl Span {
    /// The bytes `range` of the mapping, if they are in it and on page boundaries.
    pub(crate) fn of(mapped: &impl Mapped, range: Range<usize>) -> Result<Self, RangeError> {
        let error = RangeError { start: range.start, end: range.end, mapping_len: mapped.len_bytes() };
        let page = page_size();
        let len = range.end.checked_sub(range.start).ok_or(error)?;
        if len == 0
            || range.end > mapped.len_bytes()
            || !range.start.is_multiple_of(page)
            || !range.end.is_multiple_of(page)
        {
            return Err(error);
        }
        let address = mapped.host_address().checked_add(range.start).ok_or(error)?;
        Ok(Self { address, len })
    }

    /// All of the mapping.
    pub(crate) fn whole(mapped: &impl Mapped) -> Result<Self, RangeError> {
        Self::of(mapped, 0..mapped.len_bytes())
    }
}

/// The size in bytes of the smallest page.
pub(crate) fn page_size() -> usize {
    rustix::param::page_size()
}
