//! Warm-up: pages for a whole mapping before the guest needs them, huge where they can be had.
//!
//! Hugetlb memory has its huge pages already, and here gets entries for them; a guest_memfd has small ones only.
//! Of a memfd, `MADV_HUGEPAGE` on shared memory says yes and does nothing where the host's `shmem_enabled` is `never`, so it
//! is not relied on: memory is faulted in and then collapsed with `MADV_COLLAPSE`, and what came is
//! looked up, not assumed.

use std::fs::File;
use std::io;
use std::io::BufRead;
use std::io::BufReader;

use abi::regions::Store;
use rustix::io::Errno;
use rustix::mm::Advice;
use thiserror::Error;

use crate::Mapping;
use crate::PageSize;
use crate::STEP_BYTES;

/// Tries of a collapse that the kernel says may succeed later.
const COLLAPSE_TRIES: u32 = 3;

/// Warming up failed.
#[derive(Debug, Error)]
#[error("no memory for {name} from {offset:#x} on ({len_bytes:#x} bytes in all)")]
pub struct WarmError {
    /// The region's name.
    pub name: String,
    /// Where it stopped.
    pub offset: u64,
    /// The region's size.
    pub len_bytes: u64,
    /// Why.
    #[source]
    pub source: io::Error,
}

impl WarmError {
    /// The kernel's error number.
    pub fn errno(&self) -> Errno {
        Errno::from_io_error(&self.source).unwrap_or(Errno::IO)
    }
}

/// What came of a warm-up.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Account {
    /// The page size that was asked for.
    pub wanted: PageSize,
    /// Bytes of the mapping that are mapped by huge pages.
    pub huge_bytes: u64,
    /// Why some are not, as the kernel's error number; `None` if none was asked for or all came.
    pub refused: Option<i32>,
}

impl Mapping {
    /// Gives every page of the mapping memory, and maps it; then makes huge pages of it if `want` says so.
    /// `progress` gets bytes done and bytes in all.
    ///
    /// That huge pages do not come is no error: the account says how many did, and why not more.
    ///
    /// # Errors
    /// [`WarmError`] if there is not enough memory. What was given stays.
    pub fn warm(&self, want: PageSize, progress: &mut dyn FnMut(u64, u64)) -> Result<Account, WarmError> {
        let len_bytes = self.len_bytes();
        let mut refused = None;
        let collapse = want == PageSize::Huge && self.region().store() == Store::Memfd;
        if collapse {
            // Where the host allows it, pages are then huge from their first touch.
            let _ = self.advise(Advice::LinuxHugepage);
        }
        self.populate_all(progress, &mut |offset, step| {
            if collapse && refused.is_none() {
                refused =
                    self.collapse(offset, step).err().map(|error| error.raw_os_error().unwrap_or_default());
            }
        })?;
        let huge_bytes = if want > PageSize::Small { self.huge_bytes().unwrap_or_default() } else { 0 };
        let refused = refused.filter(|_| huge_bytes < whole_huge(len_bytes));
        Ok(Account { wanted: want, huge_bytes, refused })
    }

    /// Gives every page memory, and maps it. `after` gets each step, by offset and length, right after it.
    pub(crate) fn populate_all(
        &self,
        progress: &mut dyn FnMut(u64, u64),
        after: &mut dyn FnMut(usize, usize),
    ) -> Result<(), WarmError> {
        let len_bytes = self.len_bytes();
        let len = usize::try_from(len_bytes).unwrap_or(usize::MAX);
        let page = usize::try_from(self.region().page_size().bytes()).unwrap_or(STEP_BYTES);
        progress(0, len_bytes);
        self.region().filling(|| {
            for offset in (0..len).step_by(STEP_BYTES.max(page)) {
                let step = STEP_BYTES.max(page).min(len - offset);
                self.populate(offset, step)?;
                after(offset, step);
                progress((offset + step) as u64, len_bytes);
            }
            Ok(())
        })
    }

    /// Gives the pages of the first `len_bytes` bytes (of all, if they are fewer) memory, and maps them.
    ///
    /// # Errors
    /// [`WarmError`] if there is not enough memory. What was given stays.
    pub fn prefault_first(&self, len_bytes: u64) -> Result<(), WarmError> {
        let len = len_bytes.min(self.len_bytes());
        self.populate(0, usize::try_from(len).unwrap_or(usize::MAX))
    }

    fn populate(&self, offset: usize, len: usize) -> Result<(), WarmError> {
        loop {
            match self.advise_range(offset, len, Advice::LinuxPopulateWrite) {
                Ok(()) => return Ok(()),
                // A signal came in between: what was done stays done.
                Err(Errno::INTR | Errno::AGAIN) => {}
                // Memory of a device is not populated by all kernels. It is all there: a look enters it.
                Err(Errno::INVAL | Errno::FAULT | Errno::OPNOTSUPP)
                    if self.region().store() == Store::Path =>
                {
                    self.look_at(offset, len);
                    return Ok(());
                }
                Err(errno) => {
                    return Err(WarmError {
                        name: self.region().name().to_owned(),
                        offset: offset as u64,
                        len_bytes: self.len_bytes(),
                        source: errno.into(),
                    });
                }
            }
        }
    }

    /// Reads a word of each page.
    fn look_at(&self, offset: usize, len: usize) {
        for at in (offset..offset.saturating_add(len)).step_by(4096) {
            // What lies outside was not asked for.
            let _ = self.load(at as u64);
        }
    }

    fn collapse(&self, offset: usize, len: usize) -> io::Result<()> {
        let mut tries = 1;
        loop {
            match self.collapse_range(offset, len) {
                Err(error) if tries < COLLAPSE_TRIES && may_succeed_later(&error) => tries += 1,
                result => return result,
            }
        }
    }

    /// Bytes of this mapping that are mapped by huge pages now, by the kernel's choice or from the host's pool.
    ///
    /// # Errors
    /// If `/proc/self/smaps` cannot be read.
    pub fn huge_bytes(&self) -> io::Result<u64> {
        let start = self.host_address();
        let end = start + usize::try_from(self.len_bytes()).unwrap_or(usize::MAX - start);
        let mut inside = false;
        let mut kib = 0;
        for line in BufReader::new(File::open("/proc/self/smaps")?).lines() {
            let line = line?;
            let mut words = line.split_ascii_whitespace();
            match words.next() {
                Some("ShmemPmdMapped:" | "Shared_Hugetlb:" | "Private_Hugetlb:") if inside => {
                    kib += words.next().and_then(|count| count.parse::<u64>().ok()).unwrap_or_default();
                }
                Some(range) if !range.ends_with(':') => {
                    inside = vma_range(range).is_some_and(|(from, to)| start <= from && to <= end);
                }
                _ => {}
            }
        }
        Ok(kib << 10)
    }
}

/// The whole huge pages in `bytes`, in bytes.
const fn whole_huge(bytes: u64) -> u64 {
    bytes - bytes % PageSize::Huge.bytes()
}

fn may_succeed_later(error: &io::Error) -> bool {
    let errno = error.raw_os_error().map(Errno::from_raw_os_error);
    matches!(errno, Some(Errno::AGAIN | Errno::BUSY | Errno::INTR))
}

/// The addresses of a line of smaps that starts an entry.
fn vma_range(word: &str) -> Option<(usize, usize)> {
    let (from, to) = word.split_once('-')?;
    Some((usize::from_str_radix(from, 16).ok()?, usize::from_str_radix(to, 16).ok()?))
}

#[cfg(test)]
mod tests {
    use crate::PageSize;
    use crate::Region;

    #[test]
    fn a_warm_mapping_has_all_its_pages_and_says_how_many_are_huge() {
        let bytes = 8 << 20;
        let mapping = Region::create("t", bytes).unwrap().map().unwrap();
        mapping.write(5 << 20, b"kept").unwrap();
        let mut seen = Vec::new();
        let account = mapping.warm(PageSize::Huge, &mut |done, of| seen.push((done, of))).unwrap();
        assert_eq!(seen, [(0, bytes), (bytes, bytes)]);
        assert_eq!(mapping.region().allocated_bytes().unwrap(), Some(bytes));
        assert_eq!(account.huge_bytes, mapping.huge_bytes().unwrap());
        assert!(account.huge_bytes == bytes || account.refused.is_some(), "{account:?}");
        let mut read = [0; 4];
        mapping.read(5 << 20, &mut read).unwrap();
        assert_eq!(&read, b"kept", "a collapse keeps the bytes");
    }

    #[test]
    fn the_first_pages_are_given_memory_and_the_others_are_not() {
        let mapping = Region::create("t", 1 << 20).unwrap().map().unwrap();
        mapping.prefault_first(64 << 10).unwrap();
        assert_eq!(mapping.region().allocated_bytes().unwrap(), Some(64 << 10));
        mapping.prefault_first(u64::MAX).unwrap();
        assert_eq!(mapping.region().allocated_bytes().unwrap(), Some(1 << 20));
    }

    #[test]
    fn small_pages_stay_small() {
        let mapping = Region::create("t", 4 << 20).unwrap().map().unwrap();
        let account = mapping.warm(PageSize::Small, &mut |_, _| {}).unwrap();
        assert_eq!((account.huge_bytes, account.refused), (0, None));
        assert_eq!(mapping.region().allocated_bytes().unwrap(), Some(4 << 20));
    }
}
