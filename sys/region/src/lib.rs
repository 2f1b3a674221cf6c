//! Memory that outlives the process that made it.
//!
//! A [`Region`] is a file of memory with no name in any directory, whose size never changes; it lives as long as
//! somebody holds it open or mapped. A [`Mapping`] is one process's view of it. An
//! [`Arena`] puts several under one address space: region 0 holds metadata, each other one a guest's
//! memory from the start of its own file, so that who gets RAM never gets the metadata.
//!
//! Everybody who holds a region may write it at any time. So nothing here hands out a reference to its
//! bytes: they are copied in and out, or read and written as single words.
//!
//! Its memory comes from one of four stores; what lies at a [`path`] is the fourth:
//!
//! | | [`Store::Memfd`] | [`Store::Hugetlb`] | [`Store::GuestMemfd`] |
//! | --- | --- | --- | --- |
//! | pages | 4 KiB; 2 MiB where they can be had | 2 MiB or 1 GiB | 4 KiB |
//! | its size is kept by | seals | seals | the kernel |
//! | pages come | at first touch, or before | all when it is first mapped | at first touch, or before |
//! | a page given back | is a hole | never is: another one might not be had | is a hole |
//! | the file tells its holes | yes | it has none | no; a mapping tells what was touched |
//! | faults on holes can be held | yes | it has none | no |
//! | NUMA policy | kept with the file | heeded when it is made | kept with the file, or refused |
//!
//! | want | see |
//! | --- | --- |
//! | what does this host have? | [`available()`], [`ask`] |
//! | make, check, map | [`Region`] |
//! | copy, words, huge pages, warm-up | [`Mapping`] |
//! | physical addresses | [`Arena`] |
//! | is its holder alive? | [`liveness`] |
//! | which physical pages? | [`pagemap`] |
//! | a machine that is found by a path | [`path`] |
//! | say so when memory goes away | [`guard()`] |
#![expect(
    unsafe_code,
    reason = "maps memory and makes the madvise, mincore, mbind and fcntl calls that rustix leaves out"
)]

pub mod arena;
mod available;
mod guard;
mod hugepages;
pub mod liveness;
mod mapping;
mod numa;
pub mod pagemap;
pub mod path;
mod poison;
mod warm;

use std::fmt;
use std::fs;
use std::io;
use std::os::fd::AsFd;
use std::os::fd::AsRawFd;
use std::os::fd::BorrowedFd;
use std::os::fd::OwnedFd;
use std::sync::Mutex;
use std::sync::PoisonError;

pub use abi::numa::Nodes;
pub use abi::numa::Policy;
pub use abi::regions::Store;
pub use arena::Arena;
pub use available::Available;
pub use available::Transparent;
pub use available::Want;
pub use available::ask;
pub use available::available;
pub use guard::EXIT_CODE;
pub use guard::guard;
pub use hugepages::HugePages;
pub use hugepages::Shortage;
pub use mapping::Mapping;
pub use mapping::OutOfRange;
pub use mapping::Word;
pub use numa::host_nodes;
use pages::PAGE_SIZE;
use rustix::fs::FallocateFlags;
use rustix::fs::MemfdFlags;
use rustix::fs::SealFlags;
/// The kernel's error numbers.
pub use rustix::io::Errno;
use thiserror::Error;
pub use warm::Account;
pub use warm::WarmError;

/// Page size that a region is made for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum PageSize {
    /// 4 KiB.
    Small,
    /// 2 MiB: in a memfd, transparent huge pages where they can be had.
    Huge,
    /// 1 GiB.
    Giant,
}

impl PageSize {
    /// Every size, ascending.
    pub const ALL: [Self; 3] = [Self::Small, Self::Huge, Self::Giant];

    /// In bytes.
    pub const fn bytes(self) -> u64 {
        match self {
            Self::Small => PAGE_SIZE,
            Self::Huge => 2 << 20,
            Self::Giant => 1 << 30,
        }
    }

    /// The size of this many bytes.
    pub fn of_bytes(bytes: u64) -> Option<Self> {
        Self::ALL.into_iter().find(|size| size.bytes() == bytes)
    }

    /// Whether a region of this store can be made for it.
    pub const fn suits(self, store: Store) -> bool {
        matches!(
            (store, self),
            (Store::Memfd, Self::Small | Self::Huge)
                | (Store::Hugetlb, Self::Huge | Self::Giant)
                | (Store::GuestMemfd, Self::Small)
                | (Store::Path, Self::Small | Self::Huge)
        )
    }

    pub(crate) fn check(self, name: &str, store: Store) -> Result<(), RegionError> {
        if self.suits(store) {
            return Ok(());
        }
        Err(RegionError::PageSize { name: name.to_owned(), store, page_size: self })
    }
}

impl fmt::Display for PageSize {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Small => "4 KiB",
            Self::Huge => "2 MiB",
            Self::Giant => "1 GiB",
        })
    }
}

/// Seals of every memfd: its size is fixed for good, and no seal can be added that would make it
/// read-only under its user.
const SEALS: SealFlags = SealFlags::SHRINK.union(SealFlags::GROW).union(SealFlags::SEAL);

/// Why a region could not be made or was not accepted.
#[derive(Debug, Error)]
pub enum RegionError {
    /// A system call failed.
    #[error("cannot {what} the region {name}")]
    Call {
        /// Which call.
        what: &'static str,
        /// The region's name.
        name: String,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// A size of 0, or none of whole pages.
    #[error(
        "the region {name} cannot have {bytes} bytes: a size is a multiple of the page size, {page_size}, and not 0"
    )]
    Size {
        /// The region's name.
        name: String,
        /// The size.
        bytes: u64,
        /// The size of its pages.
        page_size: PageSize,
    },
    /// A store has no pages of that size.
    #[error("the region {name} cannot have pages of {page_size}: a {store} has none")]
    PageSize {
        /// The region's name.
        name: String,
        /// What its memory comes from.
        store: Store,
        /// The page size asked for.
        page_size: PageSize,
    },
    /// The host has not enough huge pages.
    #[error("no memory for the region {name}: {shortage}")]
    HugePages {
        /// The region's name.
        name: String,
        /// What is lacking, and what to do.
        shortage: Box<Shortage>,
    },
    /// A page was to be given back of a region that has all of them for good.
    #[error(
        "the region {name} keeps its pages: another one might not be had, and who touched the hole would be \
         killed"
    )]
    Whole {
        /// The region's name.
        name: String,
    },
    /// A NUMA policy names nodes that this host does not have.
    #[error(
        "the memory of {name} is to come from NUMA node {missing}, and this host has memory on node {have} only"
    )]
    Nodes {
        /// The region's name.
        name: String,
        /// The nodes that are not there.
        missing: Box<Nodes>,
        /// The nodes that are.
        have: Box<Nodes>,
    },
    /// The kernel took a NUMA policy and did not keep it.
    #[error(
        "the kernel does not keep the NUMA policy {policy} for the region {name}: {}",
        NotKept { store: *store, found: found.as_deref() }
    )]
    PolicyNotKept {
        /// The region's name.
        name: String,
        /// What its memory comes from.
        store: Store,
        /// The policy that was set.
        policy: Box<Policy>,
        /// The policy that came of it, as far as it has a name here.
        found: Option<Box<Policy>>,
    },
    /// A descriptor that came from elsewhere is not a region of that size.
    #[error("the descriptor handed over for the region {name} {why}")]
    NotARegion {
        /// The region's name.
        name: String,
        /// What it is instead.
        why: String,
    },
}

impl RegionError {
    /// The kernel's own error number, or the one that it gives for the same refusal.
    pub fn errno(&self) -> Errno {
        match self {
            Self::Call { source, .. } => Errno::from_io_error(source).unwrap_or(Errno::IO),
            Self::HugePages { .. } => Errno::NOMEM,
            Self::Whole { .. } | Self::PolicyNotKept { .. } => Errno::OPNOTSUPP,
            Self::Size { .. } | Self::PageSize { .. } | Self::Nodes { .. } | Self::NotARegion { .. } => {
                Errno::INVAL
            }
        }
    }
}

/// What is known of a policy that the kernel did not keep.
struct NotKept<'a> {
    store: Store,
    found: Option<&'a Policy>,
}

impl fmt::Display for NotKept<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (self.store, self.found) {
            (Store::GuestMemfd, _) => f.write_str(
                "a guest_memfd has none before Linux 6.19. Run the program under numactl, or use a memfd",
            ),
            (_, Some(found)) => write!(f, "it made {found} of it. Look at the memory nodes of the cpuset"),
            (_, None) => f.write_str("it made something else of it"),
        }
    }
}

/// Bytes that are given memory at a time, so that whoever waits hears of it.
pub(crate) const STEP_BYTES: usize = 32 << 20;

/// A file of memory: no name in any directory, its size fixed.
#[derive(Debug)]
pub struct Region {
    fd: OwnedFd,
    /// Where it begins in its file.
    at: u64,
    len_bytes: u64,
    name: String,
    store: Store,
    /// The size of the file's own pages: what a memfd is made of is the kernel's choice, and counts as small.
    page_size: PageSize,
    /// Whether this process has given all of the file memory and taken none of it away again: of a guest_memfd the
    /// kernel does not tell. Held while either is done.
    filled: Mutex<bool>,
}

impl Region {
    /// Makes a region of `len_bytes` bytes of shared memory. Its pages come at first touch, or by
    /// [`Mapping::warm`]. `name` shows in `/proc/PID/maps`.
    ///
    /// # Errors
    /// [`RegionError`] for an impossible size, or if the kernel refuses.
    pub fn create(name: &str, len_bytes: u64) -> Result<Self, RegionError> {
        check_size(name, len_bytes, PageSize::Small)?;
        let fd = memory_file(name, len_bytes, MemfdFlags::empty())?;
        Ok(Self::new(name, fd, len_bytes, Store::Memfd, PageSize::Small))
    }

    /// Makes a region of `len_bytes` bytes in huge pages from the host's pool. They come, all of them, when it is
    /// mapped for the first time, or it is not mapped: hugetlb memory that runs out while it is used kills its user.
    ///
    /// # Errors
    /// [`RegionError`] for an impossible size of the region or its pages, or if the kernel refuses.
    pub fn create_hugetlb(name: &str, len_bytes: u64, page_size: PageSize) -> Result<Self, RegionError> {
        page_size.check(name, Store::Hugetlb)?;
        check_size(name, len_bytes, page_size)?;
        if HugePages::of(page_size).is_none() {
            let shortage = Box::new(Shortage::NoSuchSize { page_size });
            return Err(RegionError::HugePages { name: name.to_owned(), shortage });
        }
        let size = if page_size == PageSize::Giant { MemfdFlags::HUGE_1GB } else { MemfdFlags::HUGE_2MB };
        let fd = memory_file(name, len_bytes, MemfdFlags::HUGETLB | size)?;
        Ok(Self::new(name, fd, len_bytes, Store::Hugetlb, page_size))
    }

    fn new(name: &str, fd: OwnedFd, len_bytes: u64, store: Store, page_size: PageSize) -> Self {
        Self { fd, at: 0, len_bytes, name: name.to_owned(), store, page_size, filled: Mutex::default() }
    }

    /// Takes a descriptor that came from another process for a memfd of `len_bytes` bytes; see
    /// [`Region::accept_as`].
    ///
    /// # Errors
    /// [`RegionError`]
    pub fn accept(name: &str, fd: OwnedFd, len_bytes: u64) -> Result<Self, RegionError> {
        Self::accept_as(name, fd, len_bytes, Store::Memfd, PageSize::Small)
    }

    /// Takes a descriptor that came from elsewhere for a region of `len_bytes` bytes, of this store, made for pages
    /// of this size.
    ///
    /// # Errors
    /// [`RegionError::NotARegion`] if it is not of that store or has another size; if it is a memfd and not sealed as
    /// a region is (somebody could then take its pages away under us); if it is hugetlb memory and has other pages, or
    /// not all of them. What flags a guest_memfd was made with shows when it is mapped.
    pub fn accept_as(
        name: &str,
        fd: OwnedFd,
        len_bytes: u64,
        store: Store,
        page_size: PageSize,
    ) -> Result<Self, RegionError> {
        page_size.check(name, store)?;
        check_size(name, len_bytes, if store == Store::Hugetlb { page_size } else { PageSize::Small })?;
        let not = |why: String| RegionError::NotARegion { name: name.to_owned(), why };
        match store {
            Store::Memfd | Store::Hugetlb => check_seals(&fd).map_err(not)?,
            Store::GuestMemfd if is_guest_memfd(&fd) => {}
            Store::GuestMemfd => return Err(not("is no guest_memfd".to_owned())),
            Store::Path => {
                return Err(not("is a part of a file, and nobody says where it lies there".to_owned()));
            }
        }
        let page_size = if store == Store::Hugetlb { page_size } else { PageSize::Small };
        let stat = rustix::fs::fstat(&fd).map_err(|errno| call_error("look at", name, errno))?;
        if u64::try_from(stat.st_size) != Ok(len_bytes) {
            return Err(not(format!("has {} bytes, not {len_bytes}", stat.st_size)));
        }
        check_pages(name, &fd, store, page_size)?;
        let region = Self::new(name, fd, len_bytes, store, page_size);
        if store == Store::Hugetlb && !region.is_whole()? {
            return Err(not("has not all of its huge pages".to_owned()));
        }
        Ok(region)
    }

    /// Maps the whole region, at a multiple of its page size and of 2 MiB, shared, readable and writable, and kept out
    /// of core dumps.
    ///
    /// # Errors
    /// As of [`Region::map_with`].
    pub fn map(self) -> Result<Mapping, RegionError> {
        self.map_with(&Policy::Default, &mut |_, _| {})
    }

    /// As [`Region::map`]; pages that are made from now on come from where `policy` says. Hugetlb memory gets all its
    /// pages here, if it has not; `progress` gets bytes done and bytes in all.
    ///
    /// # Errors
    /// [`RegionError::HugePages`] if there are not enough huge pages, with what to do; [`RegionError::Nodes`] for NUMA
    /// nodes that the host does not have; [`RegionError::NotARegion`] for a guest_memfd that cannot be touched;
    /// [`RegionError::Call`] if the kernel refuses.
    pub fn map_with(
        self,
        policy: &Policy,
        progress: &mut dyn FnMut(u64, u64),
    ) -> Result<Mapping, RegionError> {
        Mapping::new(self, policy, progress)
    }

    pub(crate) fn at(&self) -> u64 {
        self.at
    }

    /// Its size.
    pub fn len_bytes(&self) -> u64 {
        self.len_bytes
    }

    /// Its name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// What its memory comes from.
    pub fn store(&self) -> Store {
        self.store
    }

    /// The size of its pages. A memfd's count as small, whatever the kernel made of them.
    pub fn page_size(&self) -> PageSize {
        self.page_size
    }

    /// Inode number of its file, which no other living region of this kernel has.
    ///
    /// # Errors
    /// [`RegionError::Call`] if the kernel does not say.
    pub fn file_number(&self) -> Result<u64, RegionError> {
        Ok(self.stat()?.st_ino)
    }

    fn stat(&self) -> Result<rustix::fs::Stat, RegionError> {
        rustix::fs::fstat(&self.fd).map_err(|errno| call_error("look at", &self.name, errno))
    }

    /// Bytes that it has pages for now, whoever touched them. `None` for a guest_memfd: the kernel does not say.
    /// [`Mapping::touched_bytes`] then tells those that somebody has touched.
    ///
    /// # Errors
    /// [`RegionError::Call`] if the kernel does not say, though it should.
    pub fn allocated_bytes(&self) -> Result<Option<u64>, RegionError> {
        match self.store {
            Store::GuestMemfd => return Ok(None),
            // Its file was filled when it was made.
            Store::Path => return Ok(Some(self.len_bytes)),
            Store::Memfd | Store::Hugetlb => {}
        }
        Ok(Some(u64::try_from(self.stat()?.st_blocks).unwrap_or_default() * 512))
    }

    /// Whether every page of it has memory. Of a guest_memfd that is known only if this process gave it memory, by
    /// [`Region::fill`] or [`Mapping::warm`], and has punched no hole since.
    ///
    /// # Errors
    /// [`RegionError::Call`] if the kernel does not say.
    pub fn is_whole(&self) -> Result<bool, RegionError> {
        match self.allocated_bytes()? {
            Some(bytes) => Ok(bytes >= self.len_bytes),
            None => Ok(*self.filled.lock().unwrap_or_else(PoisonError::into_inner)),
        }
    }

    /// Gives the bytes `offset..offset + len` pages, without touching them.
    ///
    /// # Errors
    /// [`RegionError::Call`], with ENOSPC or ENOMEM if there is no memory; then some may have got pages.
    pub fn allocate(&self, offset: u64, len: u64) -> Result<(), RegionError> {
        if self.store == Store::Path {
            return Ok(());
        }
        let what = "allocate in";
        let error = |errno| call_error(what, &self.name, errno);
        let allocate = |at, len| rustix::fs::fallocate(&self.fd, FallocateFlags::KEEP_SIZE, at, len);
        let Some(end) = offset.checked_add(len).filter(|_| len > 0) else {
            return allocate(offset, len).map_err(error);
        };
        // A signal ends a call, and where older kernels take back what it did, a thread that gets one every millisecond would
        // never be done with a large range in one.
        let (most, least) = (self.page_size.bytes().max(STEP_BYTES as u64), self.page_size.bytes());
        let (mut at, mut step) = (offset, most);
        while at < end {
            let len = step.min(end - at);
            match allocate(at, len) {
                Ok(()) => (at, step) = (at + len, (step * 2).min(most)),
                // Whole pages: what is asked for starts at one, or is refused.
                Err(Errno::INTR) => step = (step / 2).max(least),
                Err(errno) => return Err(error(errno)),
            }
        }
        Ok(())
    }

    /// Gives all of it pages, without touching them.
    ///
    /// # Errors
    /// As of [`Region::allocate`].
    pub fn fill(&self) -> Result<(), RegionError> {
        self.filling(|| self.allocate(0, self.len_bytes))
    }

    /// Runs what gives every page memory, and remembers that it did.
    pub(crate) fn filling<E>(&self, fill: impl FnOnce() -> Result<(), E>) -> Result<(), E> {
        if self.store != Store::GuestMemfd {
            return fill();
        }
        let mut filled = self.filled.lock().unwrap_or_else(PoisonError::into_inner);
        fill()?;
        *filled = true;
        Ok(())
    }

    /// Gives the pages of `offset..offset + len` back; they read as zero from now on.
    ///
    /// # Errors
    /// [`RegionError::Whole`] for hugetlb memory, and at a path; [`RegionError::Call`] if the kernel refuses.
    pub fn punch(&self, offset: u64, len: u64) -> Result<(), RegionError> {
        let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        // A signal in between leaves some of it done, which does no harm when it is done again.
        let punch = || {
            rustix::io::retry_on_intr(|| rustix::fs::fallocate(&self.fd, flags, offset, len))
                .map_err(|errno| call_error("punch a hole into", &self.name, errno))
        };
        match self.store {
            Store::Memfd => punch(),
            Store::Hugetlb | Store::Path => Err(RegionError::Whole { name: self.name.clone() }),
            Store::GuestMemfd => {
                let mut filled = self.filled.lock().unwrap_or_else(PoisonError::into_inner);
                *filled = false;
                punch()
            }
        }
    }

    /// Makes the descriptor one of an empty file. Whoever holds another one of the region is not affected.
    ///
    /// # Errors
    /// [`RegionError::Call`]; then it is as it was.
    pub(crate) fn let_go(&self) -> Result<(), RegionError> {
        let empty = rustix::fs::memfd_create("gone", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)
            .and_then(|empty| rustix::fs::fcntl_add_seals(&empty, SEALS).map(|()| empty))
            .map_err(|errno| call_error("make an empty file for", &self.name, errno))?;
        // SAFETY: the number stays that of an open descriptor of ours, in one step: who borrows it has the region's file
        // before, and the empty one after.
        let result = unsafe { libc::dup3(empty.as_raw_fd(), self.fd.as_raw_fd(), libc::O_CLOEXEC) };
        if result < 0 {
            return Err(call_error("let go of", &self.name, io::Error::last_os_error()));
        }
        Ok(())
    }
}

/// A sealed file of memory, without pages.
fn memory_file(name: &str, len_bytes: u64, kind: MemfdFlags) -> Result<OwnedFd, RegionError> {
    let call = |what| move |errno| call_error(what, name, errno);
    let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING | kind;
    // Executable on purpose: one made with NOEXEC_SEAL comes back from LUO read-only for ever.
    // Kernels before 6.3 do not know the flag, and make it so without.
    let fd = rustix::fs::memfd_create(name, flags | MemfdFlags::EXEC)
        .or_else(|_| rustix::fs::memfd_create(name, flags))
        .map_err(call("make"))?;
    rustix::fs::ftruncate(&fd, len_bytes).map_err(call("size"))?;
    rustix::fs::fcntl_add_seals(&fd, SEALS).map_err(call("seal"))?;
    Ok(fd)
}

/// Refuses what is not sealed as a region is; says what it is instead.
fn check_seals(fd: &OwnedFd) -> Result<(), String> {
    let seals = rustix::fs::fcntl_get_seals(fd).map_err(|_| "is no memory file".to_owned())?;
    if !seals.contains(SEALS) {
        return Err(format!("is not sealed against a change of its size, but {seals:?}"));
    }
    if seals.intersects(SealFlags::WRITE | SealFlags::FUTURE_WRITE) {
        return Err("is sealed against writing".to_owned());
    }
    Ok(())
}

/// Refuses a memory file that has other pages than it should.
fn check_pages(name: &str, fd: &OwnedFd, store: Store, page_size: PageSize) -> Result<(), RegionError> {
    let not = |why: String| Err(RegionError::NotARegion { name: name.to_owned(), why });
    let of = rustix::fs::fstatfs(fd).map_err(|errno| call_error("look at", name, errno))?;
    match (store, of.f_type == libc::HUGETLBFS_MAGIC) {
        (Store::Hugetlb, false) => not("is not of huge pages".to_owned()),
        (Store::Memfd | Store::GuestMemfd | Store::Path, true) => {
            not("is of huge pages from the host's pool".to_owned())
        }
        (Store::Hugetlb, true) if u64::try_from(of.f_bsize) != Ok(page_size.bytes()) => {
            not(format!("has pages of {} bytes, not of {page_size}", of.f_bsize))
        }
        _ => Ok(()),
    }
}

/// Whether a descriptor is one of a guest_memfd. The kernel's word: no file of another kind can have either of
/// the two.
fn is_guest_memfd(fd: &OwnedFd) -> bool {
    /// The file system of guest_memfds, since they have one ("GMEM").
    const GUEST_MEMFD_MAGIC: u32 = 0x474D_454D;
    let magic = rustix::fs::fstatfs(fd).ok().and_then(|of| u32::try_from(of.f_type).ok());
    let name = fs::read_link(format!("/proc/self/fd/{}", fd.as_raw_fd()));
    magic == Some(GUEST_MEMFD_MAGIC) || name.is_ok_and(|name| name.as_os_str() == "anon_inode:[kvm-gmem]")
}

impl AsFd for Region {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

pub(crate) fn check_size(name: &str, bytes: u64, page_size: PageSize) -> Result<(), RegionError> {
    // Lengths of mappings are signed somewhere on their way.
    let fits = isize::try_from(bytes).is_ok();
    if bytes == 0 || !bytes.is_multiple_of(page_size.bytes()) || !fits {
        return Err(RegionError::Size { name: name.to_owned(), bytes, page_size });
    }
    Ok(())
}

pub(crate) fn call_error(what: &'static str, name: &str, source: impl Into<io::Error>) -> RegionError {
    RegionError::Call { what, name: name.to_owned(), source: source.into() }
}

#[cfg(test)]
mod tests {
    use super::*;

    const F_SEAL_EXEC: u32 = 0x20;

    fn memfd(seals: SealFlags, bytes: u64) -> OwnedFd {
        let fd = rustix::fs::memfd_create("t", MemfdFlags::ALLOW_SEALING | MemfdFlags::CLOEXEC).unwrap();
        rustix::fs::ftruncate(&fd, bytes).unwrap();
        rustix::fs::fcntl_add_seals(&fd, seals).unwrap();
        fd
    }

    /// G5.2.8, G5.3.2.
    #[test]
    fn a_region_cannot_change_its_size_nor_be_sealed_further() {
        let region = Region::create("t", 8192).unwrap();
        assert!(rustix::fs::ftruncate(region.as_fd(), 4096).is_err());
        assert!(rustix::fs::ftruncate(region.as_fd(), 16384).is_err());
        assert!(rustix::fs::fcntl_add_seals(region.as_fd(), SealFlags::FUTURE_WRITE).is_err());
    }

    /// A memfd with F_SEAL_EXEC comes out of Linux's live update with its write seals, too, and could never be written again.
    #[test]
    fn a_region_is_not_sealed_against_execution_and_stays_writable() {
        let region = Region::create("t", 8192).unwrap();
        let seals = rustix::fs::fcntl_get_seals(region.as_fd()).unwrap();
        assert!(!seals.intersects(SealFlags::from_bits_retain(F_SEAL_EXEC) | SealFlags::WRITE), "{seals:?}");
        let mode = rustix::fs::fstat(region.as_fd()).unwrap().st_mode;
        assert_eq!(mode & 0o111, 0o111, "{mode:o}: it was made without MFD_EXEC");
    }

    #[test]
    fn only_a_sealed_region_of_the_right_size_is_accepted() {
        let why = |fd, bytes| match Region::accept("t", fd, bytes) {
            Err(RegionError::NotARegion { why, .. }) => why,
            other => panic!("{other:?}"),
        };
        assert!(Region::accept("t", memfd(SEALS, 8192), 8192).is_ok());
        assert!(why(memfd(SEALS, 8192), 4096).contains("has 8192 bytes"));
        assert!(why(memfd(SealFlags::SHRINK, 8192), 8192).contains("not sealed"));
        assert!(why(memfd(SEALS | SealFlags::FUTURE_WRITE, 8192), 8192).contains("against writing"));
        let file = std::fs::File::open("/dev/null").unwrap();
        assert!(why(file.into(), 8192).contains("no memory file"));
    }

    /// R1.4.
    #[test]
    fn a_size_that_cannot_be_is_refused() {
        for bytes in [0, 1, 4097, 1 << 63] {
            assert!(matches!(Region::create("t", bytes), Err(RegionError::Size { .. })), "{bytes}");
        }
    }

    #[test]
    fn a_punched_page_reads_zero_and_takes_no_memory() {
        let mapping = Region::create("t", 16 * 4096).unwrap().map().unwrap();
        mapping.write(4096, &[7; 4096]).unwrap();
        assert_eq!(mapping.region().allocated_bytes().unwrap(), Some(4096));
        mapping.region().punch(4096, 4096).unwrap();
        assert_eq!(mapping.region().allocated_bytes().unwrap(), Some(0));
        assert_eq!(mapping.load(4096).unwrap(), 0);
        mapping.region().allocate(0, 8192).unwrap();
        assert_eq!(mapping.region().allocated_bytes().unwrap(), Some(8192));
        assert!(!mapping.region().is_whole().unwrap());
        mapping.region().fill().unwrap();
        assert!(mapping.region().is_whole().unwrap());
    }
}
