//! Pages that the hardware lost: who touches one is killed, so a machine with one is not handed over.

use std::fs::File;
use std::io;
use std::mem::size_of;
use std::os::fd::AsRawFd;

use pages::PAGE_SIZE;
use rustix::io::Errno;
use rustix::mm::Advice;

use crate::Mapping;

/// `_IOWR('f', 16, struct pm_scan_arg)`.
const PAGEMAP_SCAN: libc::Ioctl = 0xC060_6610;
/// An entry that is no page: one that was swapped out, or a marker, as that of a poisoned page is.
const PAGE_IS_SWAPPED: u64 = 1 << 4;

/// `struct pm_scan_arg`.
#[repr(C)]
#[derive(Default)]
struct Scan {
    size: u64,
    flags: u64,
    start: u64,
    end: u64,
    walk_end: u64,
    found: u64,
    found_len: u64,
    max_pages: u64,
    category_inverted: u64,
    category_mask: u64,
    category_anyof_mask: u64,
    return_mask: u64,
}

/// `struct page_region`.
#[repr(C)]
#[derive(Clone, Copy, Default)]
struct Found {
    start: u64,
    end: u64,
    categories: u64,
}

const _: () = assert!(size_of::<Scan>() == 96 && size_of::<Found>() == 24, "as the kernel has them");

impl Mapping {
    /// Offset of the first page, in bytes, that is poisoned in this address space: lost by the hardware, or marked so by
    /// userfaultfd. `None` if there is none. Looks at page tables only and adds no page; some 2 ms for a GiB of small
    /// pages, less for huge ones.
    ///
    /// A page that was lost and is mapped nowhere here is not seen; who populates it finds out.
    ///
    /// # Errors
    /// If the kernel cannot be asked, as before Linux 6.7.
    pub fn first_poisoned(&self) -> io::Result<Option<u64>> {
        let pagemap = File::open("/proc/self/pagemap")?;
        let base = self.host_address() as u64;
        let end = base + self.mapped_bytes() as u64;
        let mut at = base;
        while at < end {
            let mut found = [Found::default(); 64];
            let (count, walked) = scan(&pagemap, at..end, &mut found)?;
            for run in &found[..count.min(found.len())] {
                let first = self.poisoned_within(run.start - base..run.end - base)?;
                if first.is_some() {
                    return Ok(first);
                }
            }
            at = walked.max(at + PAGE_SIZE);
        }
        Ok(None)
    }

    /// Of pages that have an entry that is none, the first that reading finds poisoned.
    fn poisoned_within(&self, offsets: std::ops::Range<u64>) -> io::Result<Option<u64>> {
        let page = usize::try_from(PAGE_SIZE).unwrap_or(4096);
        for offset in offsets.step_by(page) {
            let at = usize::try_from(offset).map_err(|_| Errno::OVERFLOW)?;
            // What else there is to say of such a page is not ours to say.
            if self.advise_range(at, page, Advice::LinuxPopulateRead) == Err(Errno::HWPOISON) {
                return Ok(Some(offset));
            }
        }
        Ok(None)
    }
}

/// Looks for entries that are no page. Gives how many runs there are, and up to where they are all.
fn scan(pagemap: &File, range: std::ops::Range<u64>, found: &mut [Found]) -> io::Result<(usize, u64)> {
    let mut scan = Scan {
        size: size_of::<Scan>() as u64,
        start: range.start,
        end: range.end,
        found: found.as_mut_ptr().expose_provenance() as u64,
        found_len: found.len() as u64,
        category_mask: PAGE_IS_SWAPPED,
        return_mask: PAGE_IS_SWAPPED,
        ..Scan::default()
    };
    // SAFETY: the argument is ours and of the type that this number stands for; the kernel writes at most `found_len` runs
    // to `found`, which has as many. Without flags it changes nothing of the memory that it looks at.
    let count = unsafe { libc::ioctl(pagemap.as_raw_fd(), PAGEMAP_SCAN, &raw mut scan) };
    match usize::try_from(count) {
        Ok(count) => Ok((count, scan.walk_end)),
        Err(_) => Err(io::Error::last_os_error()),
    }
}

#[cfg(test)]
mod tests {
    use crate::Region;

    #[test]
    fn memory_that_is_well_is_not_called_poisoned_and_gets_no_page() {
        let mapping = Region::create("t", 64 << 20).unwrap().map().unwrap();
        mapping.store(5 << 20, 7).unwrap();
        if let Err(error) = mapping.first_poisoned() {
            assert_eq!(error.raw_os_error(), Some(libc::ENOTTY), "before Linux 6.7");
            return;
        }
        assert_eq!(mapping.first_poisoned().unwrap(), None);
        assert_eq!(mapping.region().allocated_bytes().unwrap(), Some(4096));
    }
}
