//! One process's view of a region: bytes copied in and out, and single words.

use std::fmt;
use std::io;
use std::ptr;
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering;

use abi::numa::Policy;
use abi::regions::Store;
use rustix::io::Errno;
use rustix::mm::Advice;
use rustix::mm::MapFlags;
use rustix::mm::ProtFlags;
use thiserror::Error;
use vm_memory::VolatileMemory;
use vm_memory::VolatileSlice;

use crate::HugePages;
use crate::PageSize;
use crate::Region;
use crate::RegionError;
use crate::WarmError;
use crate::call_error;

/// Not all of these bytes are in the mapping, or a word is not aligned.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
#[error("offset {offset:#x}, {len_bytes} bytes: outside the mapping's {of_bytes:#x} bytes, or not aligned")]
pub struct OutOfRange {
    /// First byte.
    pub offset: u64,
    /// Bytes.
    pub len_bytes: usize,
    /// Size of the mapping.
    pub of_bytes: u64,
}

/// A whole region, mapped shared, readable and writable. It stays mapped until this is dropped.
pub struct Mapping {
    // Invariant: `address .. address + len` is mapped from `region`, or, once that is revoked, from other memory. It
    // starts at a multiple of 2 MiB and of the region's page size, and belongs to this value alone: nobody else unmaps it
    // or maps something over it.
    address: NonNull<u8>,
    len: usize,
    region: Region,
}

// SAFETY: the mapping belongs to no thread, and its bytes are only copied or accessed as atomic words.
unsafe impl Send for Mapping {}
// SAFETY: as above; every access goes through `VolatileSlice`, which takes others' writes into account.
unsafe impl Sync for Mapping {}

impl fmt::Debug for Mapping {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Mapping({} at {:p}, {:#x} bytes)", self.region.name(), self.address, self.len)
    }
}

impl Mapping {
    pub(crate) fn new(
        region: Region,
        policy: &Policy,
        progress: &mut dyn FnMut(u64, u64),
    ) -> Result<Self, RegionError> {
        let (name, len_bytes, page_size) = (region.name(), region.len_bytes(), region.page_size());
        let call = |what| move |errno: Errno| call_error(what, name, errno);
        let len = usize::try_from(len_bytes).map_err(|_| RegionError::Size {
            name: name.to_owned(),
            bytes: len_bytes,
            page_size,
        })?;
        let align = page_size.max(PageSize::Huge).bytes();
        let address =
            usize::try_from(align).map_err(|_| Errno::NOMEM).and_then(|align| reserve_aligned(len, align));
        let address = address.map_err(call("find room for"))?;
        let prot = ProtFlags::READ | ProtFlags::WRITE;
        // Without NORESERVE: of hugetlb memory, the pool promises all pages that are missing, or refuses.
        // SAFETY: `address .. address + len` was reserved above and belongs to nobody else.
        let mapped = unsafe {
            rustix::mm::mmap(
                address.as_ptr().cast(),
                len,
                prot,
                MapFlags::SHARED | MapFlags::FIXED,
                &region,
                region.at(),
            )
        };
        if let Err(errno) = mapped {
            // SAFETY: the reservation is still whole, and nobody has its address.
            let _ = unsafe { rustix::mm::munmap(address.as_ptr().cast(), len) };
            return Err(match (errno, region.store()) {
                (Errno::NOMEM, Store::Hugetlb) => huge_pages_error(&region, policy),
                (Errno::NODEV, Store::GuestMemfd) => untouchable(&region),
                (errno, _) => call("map")(errno),
            });
        }
        let mapping = Self { address, len, region };
        mapping
            .advise(Advice::LinuxDontDump)
            .map_err(|errno| call_error("keep out of core dumps", mapping.region.name(), errno))?;
        mapping.set_policy(policy)?;
        match mapping.region.store() {
            Store::Memfd | Store::Path => {}
            Store::Hugetlb if mapping.region.is_whole()? => {}
            Store::Hugetlb => mapping
                .populate_all(progress, &mut |_, _| {})
                .map_err(|error| unfilled(&mapping.region, policy, error))?,
            Store::GuestMemfd => mapping.check_touchable()?,
        }
        Ok(mapping)
    }

    /// Reads the first page of a guest_memfd, as a system call would: one that was made without INIT_SHARED kills who
    /// touches it.
    fn check_touchable(&self) -> Result<(), RegionError> {
        match self.advise_range(0, 4096, Advice::LinuxPopulateRead) {
            Ok(()) => Ok(()),
            Err(Errno::FAULT) => Err(untouchable(&self.region)),
            Err(errno) => Err(call_error("touch", self.region.name(), errno)),
        }
    }

    /// Takes the region from this process for good, whoever holds this value: its addresses are from now on those of other
    /// memory, zero at first, and its descriptor is that of an empty file. What runs meanwhile finds the one or the
    /// other. The region's pages go if nobody else has it open or mapped.
    ///
    /// # Errors
    /// [`RegionError::Call`] if there is no room for a mapping or no descriptor left. What was taken stays taken.
    pub fn revoke(&self) -> Result<(), RegionError> {
        let prot = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: by the field's invariant the range is ours alone. It stays mapped, shared, readable and writable: the
        // kernel puts the new mapping in the old one's place in one step.
        let mapped = unsafe {
            rustix::mm::mmap_anonymous(
                self.address.as_ptr().cast(),
                self.len,
                prot,
                MapFlags::SHARED | MapFlags::FIXED | MapFlags::NORESERVE,
            )
        };
        mapped.map_err(|errno| call_error("unmap", self.region.name(), errno))?;
        self.region.let_go()
    }

    /// Another mapping of the region's first page, which nothing is to touch.
    pub(crate) fn second_look(&self) -> Result<Glance, RegionError> {
        let page = 4096;
        // SAFETY: a new mapping wherever there is room; it replaces nothing.
        let address = unsafe {
            rustix::mm::mmap(
                ptr::null_mut(),
                page,
                ProtFlags::empty(),
                MapFlags::SHARED,
                &self.region,
                self.region.at(),
            )
        };
        let address = address.map_err(|errno| call_error("map", self.region.name(), errno))?;
        Ok(Glance(address.addr(), address))
    }

    /// The region behind it.
    pub fn region(&self) -> &Region {
        &self.region
    }

    /// Its size.
    pub fn len_bytes(&self) -> u64 {
        self.region.len_bytes()
    }

    /// Where this process has it. To be handed to a kernel interface that wants an address (a memory
    /// slot, userfaultfd); valid as long as this value lives.
    pub fn host_address(&self) -> usize {
        self.address.as_ptr().addr()
    }

    /// As [`len_bytes`](Self::len_bytes), as a number of addresses.
    pub(crate) fn mapped_bytes(&self) -> usize {
        self.len
    }

    fn bytes(&self) -> VolatileSlice<'_> {
        // SAFETY: by the field's invariant the range is mapped as long as `self` lives, and the slice
        // borrows it. Others may write meanwhile: VolatileSlice copies and never makes a reference.
        unsafe { VolatileSlice::new(self.address.as_ptr(), self.len) }
    }

    /// Some of its bytes as rust-vmm's crates want them: to be copied, and accessed as atomics, but never
    /// borrowed.
    ///
    /// # Errors
    /// [`OutOfRange`]
    pub fn slice(&self, offset: u64, len: usize) -> Result<VolatileSlice<'_>, OutOfRange> {
        let error = self.out_of_range(offset, len);
        let at = usize::try_from(offset).map_err(|_| error)?;
        self.bytes().subslice(at, len).map_err(|_| error)
    }

    fn out_of_range(&self, offset: u64, len_bytes: usize) -> OutOfRange {
        OutOfRange { offset, len_bytes, of_bytes: self.len_bytes() }
    }

    /// Copies bytes out. Somebody may be writing them: what was read may be old and new in turns.
    ///
    /// # Errors
    /// [`OutOfRange`], and nothing was read.
    pub fn read(&self, offset: u64, into: &mut [u8]) -> Result<(), OutOfRange> {
        self.slice(offset, into.len())?.copy_to(into);
        Ok(())
    }

    /// Copies bytes in.
    ///
    /// # Errors
    /// [`OutOfRange`], and nothing was written.
    pub fn write(&self, offset: u64, bytes: &[u8]) -> Result<(), OutOfRange> {
        self.slice(offset, bytes.len())?.copy_from(bytes);
        Ok(())
    }

    /// Makes `len_bytes` bytes zero by writing them, which gives each of their pages memory.
    ///
    /// # Errors
    /// [`OutOfRange`], and nothing was written.
    pub fn write_zeros(&self, offset: u64, len_bytes: u64) -> Result<(), OutOfRange> {
        static ZEROS: [u8; 1 << 16] = [0; 1 << 16];
        let len = usize::try_from(len_bytes).map_err(|_| self.out_of_range(offset, usize::MAX))?;
        let bytes = self.slice(offset, len)?;
        for at in (0..len).step_by(ZEROS.len()) {
            let step = ZEROS.len().min(len - at);
            bytes.subslice(at, step).map_err(|_| self.out_of_range(offset, len))?.copy_from(&ZEROS[..step]);
        }
        Ok(())
    }

    /// The 64-bit word at `offset`, a multiple of 8.
    ///
    /// # Errors
    /// [`OutOfRange`]
    pub fn load(&self, offset: u64) -> Result<u64, OutOfRange> {
        self.with_word(offset, |word| word.load(Ordering::Acquire))
    }

    /// Sets the 64-bit word at `offset`, a multiple of 8.
    ///
    /// # Errors
    /// [`OutOfRange`], and nothing was written.
    pub fn store(&self, offset: u64, value: u64) -> Result<(), OutOfRange> {
        self.with_word(offset, |word| word.store(value, Ordering::Release))
    }

    /// Adds 1 to the 64-bit word at `offset`, a multiple of 8, in one atomic step; modulo 2^64.
    ///
    /// # Errors
    /// [`OutOfRange`], and nothing was written.
    pub fn increment(&self, offset: u64) -> Result<(), OutOfRange> {
        self.with_word(offset, |word| word.fetch_add(1, Ordering::AcqRel)).map(drop)
    }

    fn with_word<T>(&self, offset: u64, act: impl FnOnce(&AtomicU64) -> T) -> Result<T, OutOfRange> {
        let bytes = self.slice(offset, 8)?;
        let word = bytes.get_atomic_ref::<AtomicU64>(0).map_err(|_| self.out_of_range(offset, 8))?;
        Ok(act(word))
    }

    /// The word at `offset` as a handle of its own.
    ///
    /// # Errors
    /// [`OutOfRange`]
    pub fn word(self: &Arc<Self>, offset: u64) -> Result<Word, OutOfRange> {
        self.load(offset)?;
        Ok(Word { mapping: Arc::clone(self), offset })
    }

    pub(crate) fn advise(&self, advice: Advice) -> rustix::io::Result<()> {
        self.advise_range(0, self.len, advice)
    }

    /// `offset .. offset + len` has to lie in the mapping.
    pub(crate) fn advise_range(&self, offset: usize, len: usize, advice: Advice) -> rustix::io::Result<()> {
        debug_assert!(offset + len <= self.len);
        // SAFETY: the range lies in the mapping, which is ours. None of the advices that this crate gives
        // changes what the bytes are: they are kept out of dumps, faulted in, or backed by other pages.
        unsafe { rustix::mm::madvise(self.address.as_ptr().add(offset).cast(), len, advice) }
    }

    /// Asks for huge pages now. `offset .. offset + len` has to lie in the mapping.
    pub(crate) fn collapse_range(&self, offset: usize, len: usize) -> io::Result<()> {
        debug_assert!(offset + len <= self.len);
        // SAFETY: the range lies in the mapping, which is ours; a collapse moves the bytes to another page
        // behind every mapping at once and changes none of them.
        let result =
            unsafe { libc::madvise(self.address.as_ptr().add(offset).cast(), len, libc::MADV_COLLAPSE) };
        if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
    }
}

/// A page that is mapped to be looked up: its address is the first field.
pub(crate) struct Glance(pub(crate) usize, *mut core::ffi::c_void);

impl Drop for Glance {
    fn drop(&mut self) {
        // SAFETY: one page that `Mapping::second_look` mapped, and that nobody touches.
        let _ = unsafe { rustix::mm::munmap(self.1, 4096) };
    }
}

fn huge_pages_error(region: &Region, policy: &Policy) -> RegionError {
    let shortage = HugePages::shortage(region.page_size(), region.len_bytes(), policy);
    RegionError::HugePages { name: region.name().to_owned(), shortage: Box::new(shortage) }
}

/// Why hugetlb memory did not get all its pages.
fn unfilled(region: &Region, policy: &Policy, error: WarmError) -> RegionError {
    let errno = error.source.raw_os_error().map(Errno::from_raw_os_error);
    match errno {
        // What would have killed who touched it; or a fault that found no memory for itself.
        Some(Errno::FAULT | Errno::NOMEM) => huge_pages_error(region, policy),
        _ => call_error("fill", region.name(), error.source),
    }
}

fn untouchable(region: &Region) -> RegionError {
    let why =
        "is a guest_memfd that the host cannot touch: it has to be made with the flags MMAP and INIT_SHARED";
    RegionError::NotARegion { name: region.name().to_owned(), why: why.to_owned() }
}

impl Mapping {
    /// Bytes whose pages somebody, in whatever process, has touched. Of a guest_memfd, pages that were allocated and
    /// never touched do not count. Looks at each page: some 2 ms for a GiB.
    ///
    /// # Errors
    /// If the kernel does not say.
    pub fn touched_bytes(&self) -> io::Result<u64> {
        const STEP: usize = 64 << 20;
        let mut pages = vec![0_u8; STEP / 4096];
        let mut touched = 0;
        for at in (0..self.len).step_by(STEP) {
            let len = STEP.min(self.len - at);
            // SAFETY: the range lies in the mapping, which is ours; the kernel writes a byte for each of its pages, and
            // `pages` has one for each of a step.
            let result =
                unsafe { libc::mincore(self.address.as_ptr().add(at).cast(), len, pages.as_mut_ptr()) };
            if result != 0 {
                return Err(io::Error::last_os_error());
            }
            touched += pages[..len / 4096].iter().filter(|page| **page & 1 != 0).count() as u64 * 4096;
        }
        Ok(touched)
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: by the field's invariant the range is ours alone, and nothing borrows it any more.
        let _ = unsafe { rustix::mm::munmap(self.address.as_ptr().cast(), self.len) };
    }
}

/// Reserves `len` bytes of address space at a multiple of `align`, a power of two.
fn reserve_aligned(len: usize, align: usize) -> rustix::io::Result<NonNull<u8>> {
    let padded = len.checked_add(align).ok_or(Errno::NOMEM)?;
    // SAFETY: an anonymous mapping wherever there is room; it replaces nothing.
    let base = unsafe {
        rustix::mm::mmap_anonymous(
            ptr::null_mut(),
            padded,
            ProtFlags::empty(),
            MapFlags::PRIVATE | MapFlags::NORESERVE,
        )?
    };
    let before = base.addr().next_multiple_of(align) - base.addr();
    let used = len.next_multiple_of(4096);
    let after = padded - before - used;
    // SAFETY: `before` and `after` are the ends of the reservation just made, and nobody has their address.
    unsafe {
        if before > 0 {
            let _ = rustix::mm::munmap(base, before);
        }
        if after > 0 {
            let _ = rustix::mm::munmap(base.byte_add(before + used), after);
        }
        NonNull::new(base.byte_add(before).cast()).ok_or(Errno::NOMEM)
    }
}

/// One 64-bit word of a region, shared with whoever else has it mapped.
#[derive(Debug, Clone)]
pub struct Word {
    mapping: Arc<Mapping>,
    // Invariant: a word of the mapping; `Mapping::word` has read it.
    offset: u64,
}

impl Word {
    fn with<T>(&self, act: impl FnOnce(&AtomicU64) -> T) -> T {
        self.mapping
            .with_word(self.offset, act)
            .unwrap_or_else(|_| unreachable!("checked when the handle was made"))
    }

    /// Its value. What its writer wrote before it is seen, too.
    pub fn load(&self) -> u64 {
        self.with(|word| word.load(Ordering::Acquire))
    }

    /// Sets it. Who reads the value also sees what was written before it.
    pub fn store(&self, value: u64) {
        self.with(|word| word.store(value, Ordering::Release));
    }

    /// Replaces `old` by `new`, in one step.
    ///
    /// # Errors
    /// What it is, if that is not `old`; then nothing was written.
    pub fn compare_exchange(&self, old: u64, new: u64) -> Result<(), u64> {
        self.with(|word| word.compare_exchange(old, new, Ordering::AcqRel, Ordering::Acquire).map(|_| ()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mapping(pages: u64) -> Arc<Mapping> {
        Arc::new(Region::create("t", pages * 4096).unwrap().map().unwrap())
    }

    #[test]
    fn a_mapping_starts_at_a_multiple_of_2_mib() {
        for pages in [1, 3, 512, 513] {
            assert!(mapping(pages).host_address().is_multiple_of(2 << 20));
        }
    }

    #[test]
    fn room_is_found_at_a_multiple_of_whatever_is_asked_for() {
        for (len, align) in [(4096, 1 << 30), (3 << 30, 1 << 30), (2 << 20, 2 << 20)] {
            let room = reserve_aligned(len, align).unwrap();
            assert!(room.addr().get().is_multiple_of(align));
            // SAFETY: just reserved, all of it, and nobody has the address.
            unsafe { rustix::mm::munmap(room.as_ptr().cast(), len) }.unwrap();
        }
    }

    /// G5.3.11.
    #[test]
    fn bytes_outside_are_refused_and_nothing_is_written() {
        let mapping = mapping(1);
        assert!(mapping.write(4090, &[1; 7]).is_err());
        assert!(mapping.read(u64::MAX, &mut [0; 2]).is_err());
        assert!(mapping.load(4).is_err(), "not aligned");
        assert!(mapping.word(4096).is_err());
        assert_eq!(mapping.load(4088).unwrap(), 0);
    }

    #[test]
    fn increments_by_several_threads_are_all_counted() {
        let mapping = mapping(1);
        mapping.store(8, u64::MAX).unwrap();
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| (0..10_000).for_each(|_| mapping.increment(8).unwrap()));
            }
        });
        assert_eq!([0, 8, 16].map(|offset| mapping.load(offset).unwrap()), [0, 39_999, 0]);
        assert!(mapping.increment(4096).is_err());
    }

    #[test]
    fn zeros_are_written_where_they_should_be() {
        let mapping = mapping(64);
        let filled = vec![7; 64 * 4096];
        mapping.write(0, &filled).unwrap();
        mapping.write_zeros(5, (1 << 17) + 1).unwrap();
        let mut read = vec![0; 64 * 4096];
        mapping.read(0, &mut read).unwrap();
        let end = 5 + (1 << 17) + 1;
        assert!(read[..5].iter().chain(&read[end..]).all(|byte| *byte == 7));
        assert!(read[5..end].iter().all(|byte| *byte == 0));
        assert!(mapping.write_zeros(4096, 64 * 4096).is_err());
        assert!(mapping.write_zeros(0, u64::MAX).is_err());
        assert_eq!(
            mapping.load(8192 + (1 << 17)).unwrap(),
            u64::from_le_bytes([7; 8]),
            "nothing was written"
        );
    }

    /// G5.3.10.
    #[test]
    fn two_mappings_of_a_region_show_the_same_bytes() {
        let one = mapping(2);
        let fd = rustix::io::dup(one.region()).unwrap();
        let other = Region::accept("t", fd, 8192).unwrap().map().unwrap();
        one.write(5000, b"kept").unwrap();
        let mut read = [0; 4];
        other.read(5000, &mut read).unwrap();
        assert_eq!(&read, b"kept");
    }

    /// R3.2.
    #[test]
    fn a_region_that_is_revoked_is_gone_for_every_holder_of_the_mapping() {
        let one = mapping(512);
        one.write(4096, b"kept").unwrap();
        let other = Arc::clone(&one);
        let peer = Region::accept("t", rustix::io::dup(one.region()).unwrap(), 512 * 4096).unwrap();
        one.revoke().unwrap();
        assert_eq!(other.load(4096).unwrap(), 0);
        other.store(4096, 7).unwrap();
        assert_eq!(other.region().allocate(0, 4096).unwrap_err().errno(), Errno::PERM, "an empty file");
        assert_eq!(other.region().allocated_bytes().unwrap(), Some(0));
        assert_eq!(peer.allocated_bytes().unwrap(), Some(4096), "neither more nor less");
        let mut read = [0; 4];
        peer.map().unwrap().read(4096, &mut read).unwrap();
        assert_eq!(&read, b"kept", "who has a descriptor of its own");
        one.revoke().unwrap();
    }

    /// G5.7.3.
    #[test]
    fn a_region_lives_as_long_as_it_is_mapped_or_open() {
        let one = mapping(1);
        one.write(0, b"kept").unwrap();
        let fd = rustix::io::dup(one.region()).unwrap();
        drop(one);
        let again = Region::accept("t", fd, 4096).unwrap().map().unwrap();
        let mut read = [0; 4];
        again.read(0, &mut read).unwrap();
        assert_eq!(&read, b"kept");
    }

    #[test]
    fn contended_swaps_are_all_counted() {
        let mapping = mapping(1);
        std::thread::scope(|scope| {
            for _ in 0..2 {
                scope.spawn(|| {
                    let word = mapping.word(64).unwrap();
                    for _ in 0..50_000 {
                        let mut seen = word.load();
                        while let Err(other) = word.compare_exchange(seen, seen + 1) {
                            seen = other;
                        }
                    }
                });
            }
        });
        assert_eq!(mapping.load(64).unwrap(), 100_000);
    }

    #[test]
    fn a_mapping_is_kept_out_of_core_dumps() {
        let mapping = mapping(4);
        let maps = std::fs::read_to_string("/proc/self/smaps").unwrap();
        let start = format!("{:x}-", mapping.host_address());
        let entry = maps.lines().skip_while(|line| !line.starts_with(&start));
        let flags = entry.into_iter().find(|line| line.starts_with("VmFlags:")).unwrap();
        assert!(flags.split_whitespace().any(|flag| flag == "dd"), "{flags}");
    }
}
