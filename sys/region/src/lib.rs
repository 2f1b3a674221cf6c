//! Memory that outlives the process that made it.
//!
//! A [`Region`] is a file of memory with no name in any directory, sealed so that its size never changes; it
//! lives as long as somebody holds it open or mapped. A [`Mapping`] is one process's view of it. An
//! [`Arena`] puts several under one address space: region 0 holds metadata, each other one a guest's
//! memory from the start of its own file, so that who gets RAM never gets the metadata.
//!
//! Everybody who holds a region may write it at any time. So nothing here hands out a reference to its
//! bytes: they are copied in and out, or read and written as single words.
//!
//! | want | see |
//! | --- | --- |
//! | make, check, map | [`Region`] |
//! | copy, words, huge pages, warm-up | [`Mapping`] |
//! | physical addresses | [`Arena`] |
//! | is its holder alive? | [`liveness`] |
//! | which physical pages? | [`pagemap`] |
#![expect(unsafe_code, reason = "maps memory and makes the madvise and fcntl calls that rustix leaves out")]

pub mod arena;
pub mod liveness;
mod mapping;
pub mod pagemap;
mod warm;

use std::io;
use std::os::fd::AsFd;
use std::os::fd::BorrowedFd;
use std::os::fd::OwnedFd;

pub use arena::Arena;
pub use mapping::Mapping;
pub use mapping::OutOfRange;
pub use mapping::Word;
use pages::PAGE_SIZE;
use rustix::fs::MemfdFlags;
use rustix::fs::SealFlags;
use thiserror::Error;
pub use warm::Account;
pub use warm::WarmError;

/// Page size that a region is made for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum PageSize {
    /// 4 KiB.
    Small,
    /// 2 MiB: transparent huge pages, where they can be had.
    Huge,
}

impl PageSize {
    /// In bytes.
    pub const fn bytes(self) -> u64 {
        match self {
            Self::Small => PAGE_SIZE,
            Self::Huge => 2 << 20,
        }
    }
}

/// Seals of every region: its size is fixed for good, and no seal can be added that would make it
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
    #[error("the region {name} cannot have {bytes} bytes: a size is a multiple of the page size, and not 0")]
    Size {
        /// The region's name.
        name: String,
        /// The size.
        bytes: u64,
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

/// A file of memory: no name in any directory, its size sealed.
#[derive(Debug)]
pub struct Region {
    fd: OwnedFd,
    len_bytes: u64,
    name: String,
}

impl Region {
    /// Makes a region of `len_bytes` bytes of shared memory. Its pages come at first touch, or by
    /// [`Mapping::warm`]. `name` shows in `/proc/PID/maps`.
    ///
    /// # Errors
    /// [`RegionError`] for an impossible size, or if the kernel refuses.
    pub fn create(name: &str, len_bytes: u64) -> Result<Self, RegionError> {
        check_size(name, len_bytes)?;
        let call = |what| move |errno| call_error(what, name, errno);
        let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
        // Executable on purpose: one made with NOEXEC_SEAL comes back from LUO read-only for ever.
        // Kernels before 6.3 do not know the flag, and make it so without.
        let fd = rustix::fs::memfd_create(name, flags | MemfdFlags::EXEC)
            .or_else(|_| rustix::fs::memfd_create(name, flags))
            .map_err(call("make"))?;
        rustix::fs::ftruncate(&fd, len_bytes).map_err(call("size"))?;
        rustix::fs::fcntl_add_seals(&fd, SEALS).map_err(call("seal"))?;
        Ok(Self { fd, len_bytes, name: name.to_owned() })
    }

    /// Takes a descriptor that came from another process for a region of `len_bytes` bytes.
    ///
    /// # Errors
    /// [`RegionError::NotARegion`] if it is no shared memory, is not sealed as a region is (somebody could
    /// then take its pages away under us), or has another size.
    pub fn accept(name: &str, fd: OwnedFd, len_bytes: u64) -> Result<Self, RegionError> {
        check_size(name, len_bytes)?;
        let not = |why: String| RegionError::NotARegion { name: name.to_owned(), why };
        let seals = rustix::fs::fcntl_get_seals(&fd).map_err(|_| not("is no memory file".to_owned()))?;
        if !seals.contains(SEALS) {
            return Err(not(format!("is not sealed against a change of its size, but {seals:?}")));
        }
        if seals.intersects(SealFlags::WRITE | SealFlags::FUTURE_WRITE) {
            return Err(not("is sealed against writing".to_owned()));
        }
        let stat = rustix::fs::fstat(&fd).map_err(|errno| call_error("look at", name, errno))?;
        match u64::try_from(stat.st_size) {
            Ok(size) if size == len_bytes => Ok(Self { fd, len_bytes, name: name.to_owned() }),
            _ => Err(not(format!("has {} bytes, not {len_bytes}", stat.st_size))),
        }
    }

    /// Maps the whole region, at a multiple of 2 MiB, shared, readable and writable, and kept out of core
    /// dumps.
    ///
    /// # Errors
    /// [`RegionError::Call`] if the kernel refuses.
    pub fn map(self) -> Result<Mapping, RegionError> {
        Mapping::new(self)
    }

    /// Its size.
    pub fn len_bytes(&self) -> u64 {
        self.len_bytes
    }

    /// Its name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Inode number of its file, which no other living region of this kernel has.
    ///
    /// # Errors
    /// [`RegionError::Call`] if the kernel does not say.
    pub fn file_number(&self) -> Result<u64, RegionError> {
        let stat = rustix::fs::fstat(&self.fd).map_err(|errno| call_error("look at", &self.name, errno))?;
        Ok(stat.st_ino)
    }

    /// Bytes that it has pages for now, whoever touched them.
    ///
    /// # Errors
    /// [`RegionError::Call`] if the kernel does not say.
    pub fn allocated_bytes(&self) -> Result<u64, RegionError> {
        let stat = rustix::fs::fstat(&self.fd).map_err(|errno| call_error("look at", &self.name, errno))?;
        Ok(u64::try_from(stat.st_blocks).unwrap_or_default() * 512)
    }

    /// Gives the bytes `offset..offset + len` pages, without touching them.
    ///
    /// # Errors
    /// [`RegionError::Call`], with ENOSPC or ENOMEM if there is no memory.
    pub fn allocate(&self, offset: u64, len: u64) -> Result<(), RegionError> {
        self.fallocate("allocate in", rustix::fs::FallocateFlags::KEEP_SIZE, offset, len)
    }

    /// Gives the pages of `offset..offset + len` back; they read as zero from now on.
    ///
    /// # Errors
    /// [`RegionError::Call`] if the kernel refuses.
    pub fn punch(&self, offset: u64, len: u64) -> Result<(), RegionError> {
        let flags = rustix::fs::FallocateFlags::PUNCH_HOLE | rustix::fs::FallocateFlags::KEEP_SIZE;
        self.fallocate("punch a hole into", flags, offset, len)
    }

    fn fallocate(
        &self,
        what: &'static str,
        flags: rustix::fs::FallocateFlags,
        offset: u64,
        len: u64,
    ) -> Result<(), RegionError> {
        rustix::fs::fallocate(&self.fd, flags, offset, len)
            .map_err(|errno| call_error(what, &self.name, errno))
    }
}

impl AsFd for Region {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

fn check_size(name: &str, bytes: u64) -> Result<(), RegionError> {
    // Lengths of mappings are signed somewhere on their way.
    let fits = isize::try_from(bytes).is_ok();
    if bytes == 0 || !bytes.is_multiple_of(PAGE_SIZE) || !fits {
        return Err(RegionError::Size { name: name.to_owned(), bytes });
    }
    Ok(())
}

pub(crate) fn call_error(what: &'static str, name: &str, source: impl Into<io::Error>) -> RegionError {
    RegionError::Call { what, name: name.to_owned(), source: source.into() }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn memfd(seals: SealFlags, bytes: u64) -> OwnedFd {
        let fd = rustix::fs::memfd_create("t", MemfdFlags::ALLOW_SEALING | MemfdFlags::CLOEXEC).unwrap();
        rustix::fs::ftruncate(&fd, bytes).unwrap();
        rustix::fs::fcntl_add_seals(&fd, seals).unwrap();
        fd
    }

    #[test]
    fn a_region_cannot_change_its_size_nor_be_sealed_further() {
        let region = Region::create("t", 8192).unwrap();
        assert!(rustix::fs::ftruncate(region.as_fd(), 4096).is_err());
        assert!(rustix::fs::ftruncate(region.as_fd(), 16384).is_err());
        assert!(rustix::fs::fcntl_add_seals(region.as_fd(), SealFlags::FUTURE_WRITE).is_err());
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
        assert_eq!(mapping.region().allocated_bytes().unwrap(), 4096);
        mapping.region().punch(4096, 4096).unwrap();
        assert_eq!(mapping.region().allocated_bytes().unwrap(), 0);
        assert_eq!(mapping.load(4096).unwrap(), 0);
        mapping.region().allocate(0, 8192).unwrap();
        assert_eq!(mapping.region().allocated_bytes().unwrap(), 8192);
    }
}
