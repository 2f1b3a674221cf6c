//! A memfd, mappings of it, and what the kernel says about both.

use std::fs::File;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::ptr;

use rustix::fs::{FallocateFlags, MemfdFlags, SeekFrom, fallocate, fstat, ftruncate, memfd_create, seek};
use rustix::io::Errno;
use uffd::Mapped;

/// The size of a page in bytes.
pub(crate) const PAGE: usize = 4096;

/// A sparse file of whole pages.
pub(crate) struct Memory {
    pub(crate) file: OwnedFd,
    pub(crate) pages: usize,
}

impl Memory {
    /// A memfd that is one hole.
    pub(crate) fn new(pages: usize) -> Self {
        let file = memfd_create("uffd-test", MemfdFlags::CLOEXEC).unwrap();
        ftruncate(&file, (pages * PAGE) as u64).unwrap();
        Self { file, pages }
    }

    /// Writes to the pages for which `present` says so. Page `n` then begins with the number `n + 1`.
    pub(crate) fn fill(&self, present: impl Fn(usize) -> bool) {
        for page in (0..self.pages).filter(|&page| present(page)) {
            self.write(page, page as u64 + 1);
        }
    }

    /// Writes a number at the start of a page.
    pub(crate) fn write(&self, page: usize, number: u64) {
        let written = rustix::io::pwrite(&self.file, &number.to_le_bytes(), (page * PAGE) as u64);
        assert_eq!(written, Ok(8));
    }

    /// Gives the memory of a page back.
    pub(crate) fn punch(&self, page: usize) {
        let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        fallocate(&self.file, flags, (page * PAGE) as u64, PAGE as u64).unwrap();
    }

    /// How many pages the file has memory for.
    pub(crate) fn allocated(&self) -> usize {
        usize::try_from(fstat(&self.file).unwrap().st_blocks).unwrap() * 512 / PAGE
    }

    /// Which pages are data, not holes.
    pub(crate) fn data(&self) -> Vec<bool> {
        let mut data = vec![false; self.pages];
        let mut at = 0;
        loop {
            let start = match seek(&self.file, SeekFrom::Data(at)) {
                Ok(start) => start,
                Err(Errno::NXIO) => return data,
                Err(other) => panic!("{other}"),
            };
            at = seek(&self.file, SeekFrom::Hole(start)).unwrap();
            let pages = |offset| usize::try_from(offset).unwrap() / PAGE;
            data[pages(start)..pages(at)].fill(true);
        }
    }

    /// A new mapping, with no entry for any page.
    pub(crate) fn map(&self) -> View {
        View::of(&self.file, self.pages * PAGE)
    }
}

/// A shared mapping of a whole file, on a boundary that huge pages want.
#[derive(Debug)]
pub(crate) struct View {
    /// What is reserved, with room to align within.
    reserved: (*mut libc::c_void, usize),
    address: *mut u8,
    len: usize,
}

// SAFETY: the memory belongs to no thread; the test programs access it by single words.
unsafe impl Send for View {}
// SAFETY: as above.
unsafe impl Sync for View {}

// SAFETY: `address` and `len` are set once, to what `of` has mapped; only `drop` unmaps it; and no reference to the
// bytes is ever made.
unsafe impl Mapped for View {
    fn host_address(&self) -> usize {
        self.address.expose_provenance()
    }

    fn len_bytes(&self) -> usize {
        self.len
    }
}

impl View {
    /// Maps the first `len` bytes.
    pub(crate) fn of(file: &impl AsFd, len: usize) -> Self {
        const ALIGN: usize = 2 << 20;
        let none = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
        let room = len + ALIGN;
        // SAFETY: new memory, at an address that the kernel chooses.
        let base = unsafe { libc::mmap(ptr::null_mut(), room, libc::PROT_NONE, none, -1, 0) };
        assert_ne!(base, libc::MAP_FAILED);
        let address = base.wrapping_byte_add(base.align_offset(ALIGN));
        let access = libc::PROT_READ | libc::PROT_WRITE;
        let shared = libc::MAP_SHARED | libc::MAP_FIXED | libc::MAP_NORESERVE;
        // SAFETY: over a part of what was reserved above.
        let mapped = unsafe { libc::mmap(address, len, access, shared, file.as_fd().as_raw_fd(), 0) };
        assert_ne!(mapped, libc::MAP_FAILED, "{}", std::io::Error::last_os_error());
        Self { reserved: (base, room), address: mapped.cast(), len }
    }

    /// The address of the first word of a page, for system calls.
    pub(crate) fn word(&self, page: usize) -> *mut u64 {
        assert!(page * PAGE < self.len);
        self.address.wrapping_add(page * PAGE).cast()
    }

    /// The number at the start of a page; 0 in a hole, which this fills.
    pub(crate) fn read(&self, page: usize) -> u64 {
        // SAFETY: in the mapping, as `word` asserts, and aligned.
        u64::from_le(unsafe { self.word(page).read_volatile() })
    }

    /// Writes a number at the start of a page.
    pub(crate) fn write(&self, page: usize, number: u64) {
        // SAFETY: in the mapping, as `word` asserts, and aligned.
        unsafe { self.word(page).write_volatile(number.to_le()) }
    }

    /// Which pages this address space has an entry for.
    pub(crate) fn entries(&self) -> Vec<bool> {
        const PRESENT: u8 = 1 << 7;
        let mut entries = vec![0; self.len / PAGE * 8];
        let pagemap = File::open("/proc/self/pagemap").unwrap();
        let offset = self.host_address() / PAGE * 8;
        pagemap.read_exact_at(&mut entries, offset as u64).unwrap();
        // Bit 63 of a word in the host's order.
        let last = if cfg!(target_endian = "little") { 7 } else { 0 };
        entries.chunks_exact(8).map(|entry| entry[last] & PRESENT != 0).collect()
    }

    /// Asks the kernel to make huge pages of the bytes in `range`.
    pub(crate) fn collapse(&self, range: std::ops::Range<usize>) -> Result<(), std::io::Error> {
        assert!(range.end <= self.len);
        let start = self.address.wrapping_add(range.start).cast();
        // SAFETY: in the mapping, as asserted; the bytes stay what they are.
        match unsafe { libc::madvise(start, range.len(), libc::MADV_COLLAPSE) } {
            0 => Ok(()),
            _ => Err(std::io::Error::last_os_error()),
        }
    }

    /// How many bytes of the mapping have entries for whole huge pages.
    pub(crate) fn huge_bytes(&self) -> usize {
        let smaps = std::fs::read_to_string("/proc/self/smaps").unwrap();
        let begin = format!("{:x}-", self.host_address());
        let line = smaps
            .lines()
            .skip_while(|line| !line.starts_with(&begin))
            .find_map(|line| line.strip_prefix("ShmemPmdMapped:"))
            .unwrap();
        line.trim().strip_suffix(" kB").unwrap().parse::<usize>().unwrap() * 1024
    }
}

impl Drop for View {
    fn drop(&mut self) {
        let (base, room) = self.reserved;
        let none = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE | libc::MAP_FIXED;
        // Unmapped, but the addresses stay taken: else another test's mapping could come to lie where an
        // access of this one is still parked, which would then go on in that.
        // SAFETY: all that `of` has reserved, the mapping in it included, and nobody else's.
        let gone = unsafe { libc::mmap(base, room, libc::PROT_NONE, none, -1, 0) };
        assert_eq!(gone, base, "{}", std::io::Error::last_os_error());
    }
}

/// The numbers of a small generator (xorshift), the same in every run.
pub(crate) struct Numbers(u64);

impl Numbers {
    pub(crate) fn from_seed(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    /// The next number below `bound`.
    pub(crate) fn below(&mut self, bound: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        usize::try_from(self.0 >> 16).unwrap() % bound
    }
}
