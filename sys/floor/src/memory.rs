//! Shared memory as any VMM would make it: a memfd, mapped, with all its pages present.

use std::fs::File;
use std::io::{BufRead, BufReader};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::ptr::{self, NonNull};
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, AtomicU64, Ordering};

use crate::{FloorError, call};

const HUGE_BYTES: usize = 2 << 20;
/// Bytes that are made present, and huge, by one call.
const STEP_BYTES: usize = 32 << 20;

/// Pages that memory is asked to have.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PageSize {
    /// 4 KiB.
    Small,
    /// 2 MiB, where they can be had.
    Huge,
}

/// A memfd without seals, mapped shared at a multiple of 2 MiB, all pages present.
#[derive(Debug)]
pub struct PlainMemory {
    // The start of `len` bytes that are mapped from `_file` until `drop`, which alone unmaps them.
    address: NonNull<u8>,
    len: usize,
    // The start and length of the reservation that holds them.
    reserved: (NonNull<u8>, usize),
    _file: OwnedFd,
}

// SAFETY: the mapping belongs to no thread, and its bytes are accessed as atomics only.
unsafe impl Send for PlainMemory {}
// SAFETY: as for `Send`.
unsafe impl Sync for PlainMemory {}

impl PlainMemory {
    /// Makes `len_bytes` bytes, a multiple of 2 MiB, that read zero.
    ///
    /// # Errors
    ///
    /// [`FloorError::Call`], if only for want of memory. That huge pages do not come is none: see
    /// [`huge_bytes`](Self::huge_bytes).
    pub fn new(len_bytes: u64, pages: PageSize) -> Result<Arc<Self>, FloorError> {
        let invalid = || FloorError::Call {
            what: "make memory of that size",
            source: std::io::ErrorKind::InvalidInput.into(),
        };
        let len = usize::try_from(len_bytes).map_err(|_| invalid())?;
        if len == 0 || !len.is_multiple_of(HUGE_BYTES) {
            return Err(invalid());
        }
        let memory = Self::map(len, len.checked_add(HUGE_BYTES).ok_or_else(invalid)?)?;
        memory.fill(pages)?;
        Ok(Arc::new(memory))
    }

    fn map(len: usize, room: usize) -> Result<Self, FloorError> {
        // SAFETY: the name is a C string.
        let fd = unsafe { libc::memfd_create(c"plain".as_ptr(), libc::MFD_CLOEXEC) };
        if fd < 0 {
            return Err(call("make a memfd"));
        }
        // SAFETY: just made, and nobody else's.
        let file = unsafe { OwnedFd::from_raw_fd(fd) };
        let size = libc::off_t::try_from(len).unwrap_or(libc::off_t::MAX);
        // SAFETY: no memory is involved.
        if unsafe { libc::ftruncate(file.as_raw_fd(), size) } != 0 {
            return Err(call("size a memfd"));
        }
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
        // SAFETY: a new mapping at an address of the kernel's choice touches nothing that is there.
        let start = unsafe { libc::mmap(ptr::null_mut(), room, libc::PROT_NONE, flags, -1, 0) };
        let reserved = match NonNull::new(start) {
            Some(start) if start.as_ptr() != libc::MAP_FAILED => start.cast::<u8>(),
            _ => return Err(call("reserve addresses")),
        };
        let before = start.addr().next_multiple_of(HUGE_BYTES) - start.addr();
        // SAFETY: `before` is less than HUGE_BYTES, and the reservation has `len` and that many bytes.
        let address = unsafe { reserved.add(before) };
        let flags = libc::MAP_SHARED | libc::MAP_FIXED;
        let protection = libc::PROT_READ | libc::PROT_WRITE;
        // SAFETY: replaces a part of the reservation above, which nobody else knows.
        let mapped =
            unsafe { libc::mmap(address.as_ptr().cast(), len, protection, flags, file.as_raw_fd(), 0) };
        let memory = Self { address, len, reserved: (reserved, room), _file: file };
        if mapped == libc::MAP_FAILED { Err(call("map a memfd")) } else { Ok(memory) }
    }

    fn fill(&self, pages: PageSize) -> Result<(), FloorError> {
        if pages == PageSize::Huge {
            let _ = self.advise(0, self.len, libc::MADV_HUGEPAGE);
        }
        for offset in (0..self.len).step_by(STEP_BYTES) {
            let len = STEP_BYTES.min(self.len - offset);
            if !self.advise(offset, len, libc::MADV_POPULATE_WRITE) {
                return Err(call("make memory present"));
            }
            if pages == PageSize::Huge {
                let _ = self.advise(offset, len, libc::MADV_COLLAPSE);
            }
        }
        Ok(())
    }

    /// Tries three times: a signal, or another CPU's work, may come in between.
    fn advise(&self, offset: usize, len: usize, advice: libc::c_int) -> bool {
        assert!(offset + len <= self.len);
        (0..3).any(|_| {
            // SAFETY: the range lies in the mapping, as asserted, and no advice given here changes its bytes.
            unsafe { libc::madvise(self.address.as_ptr().add(offset).cast(), len, advice) == 0 }
        })
    }

    /// Its size in bytes.
    #[must_use]
    pub const fn len_bytes(&self) -> u64 {
        // A usize is at most 64 bits wide on every target of Rust.
        self.len as u64
    }

    pub(crate) fn host_address(&self) -> usize {
        self.address.as_ptr().addr()
    }

    /// Bytes that are mapped in huge pages now; 0 if the kernel does not say.
    #[must_use]
    pub fn huge_bytes(&self) -> u64 {
        let own = format!("{:x}-{:x}", self.host_address(), self.host_address() + self.len);
        let Ok(smaps) = File::open("/proc/self/smaps") else { return 0 };
        let lines = BufReader::new(smaps).lines().map_while(Result::ok);
        let mut fields = lines.skip_while(|line| !line.starts_with(&own));
        let field = fields.find_map(|line| Some(line.strip_prefix("ShmemPmdMapped:")?.trim().to_owned()));
        let kib = field.and_then(|field| field.split(' ').next()?.parse::<u64>().ok());
        kib.unwrap_or_default() << 10
    }

    /// Copies bytes in.
    ///
    /// # Panics
    ///
    /// If they do not lie in the memory.
    pub fn write(&self, offset_bytes: u64, bytes: &[u8]) {
        let start = self.place(offset_bytes, bytes.len(), 1);
        for (place, byte) in (start..).zip(bytes) {
            // SAFETY: in the mapping, as `place` asserted of the whole range; only reached as atomics.
            let to = unsafe { AtomicU8::from_ptr(self.address.as_ptr().add(place)) };
            to.store(*byte, Ordering::Relaxed);
        }
    }

    /// The word at an offset that is a multiple of 8.
    ///
    /// # Panics
    ///
    /// If it does not lie in the memory.
    #[must_use]
    pub fn load(&self, offset_bytes: u64) -> u64 {
        self.word(offset_bytes).load(Ordering::Acquire)
    }

    /// Sets the word at an offset that is a multiple of 8.
    ///
    /// # Panics
    ///
    /// If it does not lie in the memory.
    pub fn store(&self, offset_bytes: u64, value: u64) {
        self.word(offset_bytes).store(value, Ordering::Release);
    }

    fn word(&self, offset_bytes: u64) -> &AtomicU64 {
        let place = self.place(offset_bytes, 8, 8);
        // SAFETY: in the mapping and aligned, as `place` asserted, and mapped for as long as `self` lives; only
        // reached as atomics.
        unsafe { AtomicU64::from_ptr(self.address.as_ptr().add(place).cast()) }
    }

    fn place(&self, offset_bytes: u64, len: usize, align: usize) -> usize {
        let place = usize::try_from(offset_bytes).unwrap_or(usize::MAX);
        let end = place.checked_add(len);
        assert!(end.is_some_and(|end| end <= self.len) && place.is_multiple_of(align), "{offset_bytes:#x}");
        place
    }
}

impl Drop for PlainMemory {
    fn drop(&mut self) {
        let (start, len) = self.reserved;
        // SAFETY: the reservation, with the mapping in it, is this value's alone; whoever was given the
        // addresses (slots, in `vm`) keeps an `Arc` of this value.
        unsafe { libc::munmap(start.as_ptr().cast(), len) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn plain_memory_keeps_what_is_written_and_ends_where_it_says() {
        let memory = PlainMemory::new(4 << 20, PageSize::Small).unwrap();
        assert!(memory.host_address().is_multiple_of(HUGE_BYTES));
        memory.write((4 << 20) - 3, b"end");
        memory.store(8, 7);
        assert_eq!((memory.load(8), memory.load((4 << 20) - 8)), (7, u64::from_be_bytes(*b"dne\0\0\0\0\0")));
        assert!(std::panic::catch_unwind(|| memory.load(4 << 20)).is_err());
        assert_eq!(memory.huge_bytes(), 0);
    }

    #[test]
    fn a_size_of_no_whole_huge_pages_is_refused() {
        assert!(PlainMemory::new(4096, PageSize::Small).is_err());
        assert!(PlainMemory::new(0, PageSize::Huge).is_err());
    }
}
