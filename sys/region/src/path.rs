//! A file with a name, or a device, that holds all of a machine: so it is found again by its path, by whoever comes after a crash of its VMM
//! and, where the memory behind it is not the kernel's, after a kexec.
//!
//! ```text
//! 0          2 MiB         10 MiB    16 MiB
//! │ notes    │ region 0    │ nothing │ guest memory, one piece after the other
//! ```
//!
//! | | its memory | survives a kexec |
//! | --- | --- | --- |
//! | [`Kind::Devdax`] | a device of memory (`/dev/dax0.0`) | yes |
//! | [`Kind::Fsdax`] | an ext4 or xfs on such memory, mounted with `dax` | yes |
//! | [`Kind::Hugetlbfs`] | huge pages from the host's pool | no |
//! | [`Kind::Tmpfs`] | any memory | no |
//!
//! Any other file is refused: between it and a disk, or a raw `/dev/pmem`, is the page cache, which is lost with the kernel.
//!
//! Such a file cannot be sealed. Whoever could truncate it is its owner alone, and [`guard`](crate::guard()) says what happened if somebody
//! does. One process and whom it passes the descriptor to have it at a time: a lock of its description goes with that.

use std::ffi::OsStr;
use std::fs;
use std::io;
use std::os::fd::AsFd as _;
use std::os::fd::AsRawFd as _;
use std::os::fd::BorrowedFd;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileTypeExt as _;
use std::os::unix::fs::MetadataExt as _;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::Path;
use std::path::PathBuf;

use rustix::fs::AtFlags;
use rustix::fs::FallocateFlags;
use rustix::fs::FlockOperation;
use rustix::fs::StatxAttributes;
use rustix::fs::StatxFlags;
use rustix::io::Errno;
use thiserror::Error;

use crate::Mapping;
use crate::PageSize;
use crate::Region;
use crate::RegionError;
use crate::STEP_BYTES;
use crate::Store;

/// Bytes at the start, for notes of the machine.
pub const NOTES_BYTES: u64 = 2 << 20;
/// Where region 0 begins.
pub const REGION0_AT: u64 = NOTES_BYTES;
/// Where guest memory begins.
pub const MEMORY_AT: u64 = 16 << 20;

/// What kind of memory a path leads to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// A device of memory that the kernel does not use.
    Devdax,
    /// A file of a file system on such memory, which is mapped without a page cache.
    Fsdax,
    /// A file of huge pages from the host's pool.
    Hugetlbfs,
    /// A file of shared memory.
    Tmpfs,
}

impl Kind {
    /// Its memory is there under the next kernel.
    pub fn survives_kexec(self) -> bool {
        matches!(self, Self::Devdax | Self::Fsdax)
    }

    /// It has a name that can be taken away.
    fn is_file(self) -> bool {
        self != Self::Devdax
    }
}

/// Why a path is no place for a machine.
#[derive(Debug, Error)]
pub enum PathError {
    /// A call failed.
    #[error("cannot {what} {}", path.display())]
    Call {
        /// Which.
        what: &'static str,
        /// The path.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// It leads to something that cannot hold a machine.
    #[error("{} {why}", path.display())]
    Unfit {
        /// The path.
        path: PathBuf,
        /// What is wrong with it, and what to do.
        why: String,
    },
    /// Somebody has it.
    #[error(
        "{} is in use: a process has its machine. `tideover ls` shows the machines of this user",
        path.display()
    )]
    Busy {
        /// The path.
        path: PathBuf,
    },
    /// It is too small.
    #[error("{} has {have} bytes, and the machine takes {want}", path.display())]
    Small {
        /// The path.
        path: PathBuf,
        /// Bytes that it has.
        have: u64,
        /// Bytes that it takes.
        want: u64,
    },
    /// Its memory cannot be mapped or written.
    #[error("cannot use the memory of {}", path.display())]
    Region {
        /// The path.
        path: PathBuf,
        /// Why.
        #[source]
        source: RegionError,
    },
}

/// A file or device that can hold a machine, which nobody else has.
#[derive(Debug)]
pub struct PathFile {
    fd: OwnedFd,
    path: PathBuf,
    kind: Kind,
    page_size: PageSize,
    len_bytes: u64,
}

impl PathFile {
    /// Makes the file for a machine of `memory_bytes` bytes of guest memory: all of it is zero, and has memory. `progress` gets bytes done,
    /// and bytes in all.
    ///
    /// # Errors
    /// [`PathError`]; nothing stays behind.
    pub fn create(
        path: &Path,
        memory_bytes: u64,
        progress: &mut dyn FnMut(u64, u64),
    ) -> Result<Self, PathError> {
        make_file(path, whole(memory_bytes), progress)
    }

    /// Makes all that a machine of `memory_bytes` bytes of guest memory takes of a device zero. `progress` gets bytes done, and bytes in
    /// all.
    ///
    /// # Errors
    /// [`PathError`]; if it is too small, nothing is written.
    pub fn clear(&self, memory_bytes: u64, progress: &mut dyn FnMut(u64, u64)) -> Result<(), PathError> {
        let want = whole(memory_bytes);
        if self.len_bytes < want {
            return Err(PathError::Small { path: self.path.clone(), have: self.len_bytes, want });
        }
        self.write_zeros(want, progress)
    }

    /// Takes what is there.
    ///
    /// # Errors
    /// [`PathError`]
    pub fn open(path: &Path) -> Result<Self, PathError> {
        // First: to open a device of another kind may do something.
        let there = fs::symlink_metadata(path).map_err(call("look at", path))?;
        if there.file_type().is_char_device() {
            devdax(there.rdev()).map_err(|why| PathError::Unfit { path: path.to_owned(), why })?;
        }
        let file = fs::File::options().read(true).write(true).custom_flags(libc::O_NOFOLLOW).open(path);
        let file = Self::of(file.map_err(|source| call("open", path)(source))?.into(), path)?;
        match rustix::fs::flock(&file.fd, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => Ok(file),
            Err(Errno::WOULDBLOCK) => Err(PathError::Busy { path: path.to_owned() }),
            Err(errno) => Err(call("lock", path)(errno.into())),
        }
    }

    /// What another process has opened, and passed to this one.
    ///
    /// # Errors
    /// [`PathError`]
    pub fn passed(fd: OwnedFd) -> Result<Self, PathError> {
        let path = fs::read_link(format!("/proc/self/fd/{}", fd.as_raw_fd()));
        Self::of(fd, &path.unwrap_or_else(|_| PathBuf::from("a descriptor that was passed")))
    }

    fn of(fd: OwnedFd, path: &Path) -> Result<Self, PathError> {
        let unfit = |why: String| PathError::Unfit { path: path.to_owned(), why };
        let stat = rustix::fs::fstat(&fd).map_err(|errno| call("look at", path)(errno.into()))?;
        let user = rustix::process::geteuid().as_raw();
        if stat.st_uid != user {
            // Whoever wrote it said which program is to be started.
            return Err(unfit(format!("belongs to user {}, and this is user {user}", stat.st_uid)));
        }
        if stat.st_mode & 0o077 != 0 {
            let why =
                format!("can be read or written by others (mode {:o}): chmod 600", stat.st_mode & 0o777);
            return Err(unfit(why));
        }
        let (kind, page_size) = kind_of(&fd, stat.st_rdev).map_err(unfit)?;
        let len_bytes = match kind {
            Kind::Devdax => {
                device_number(stat.st_rdev, "size").ok_or_else(|| unfit("has no size".to_owned()))?
            }
            _ => u64::try_from(stat.st_size).unwrap_or_default(),
        };
        Ok(Self { fd, path: path.to_owned(), kind, page_size, len_bytes })
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Its size.
    pub fn len_bytes(&self) -> u64 {
        self.len_bytes
    }

    /// What kind of memory it is.
    pub fn kind(&self) -> Kind {
        self.kind
    }

    /// The size of its own pages: of huge pages it is made for, small otherwise.
    pub fn page_size(&self) -> PageSize {
        self.page_size
    }

    /// Its notes' part.
    ///
    /// # Errors
    /// [`PathError`]
    pub fn notes(&self) -> Result<Mapping, PathError> {
        let region = self.part("notes", 0, NOTES_BYTES);
        region.and_then(Region::map).map_err(|source| self.region_error(source))
    }

    /// A part of it as a region: region 0, or a piece of guest memory.
    ///
    /// # Errors
    /// [`RegionError`] if it does not lie in the file.
    pub fn part(&self, name: &str, at: u64, len_bytes: u64) -> Result<Region, RegionError> {
        Region::part(name, self.copy()?, at, len_bytes)
    }

    /// Another descriptor of the same description: the lock stands as long as one of them is open.
    ///
    /// # Errors
    /// [`RegionError::Call`]
    pub fn copy(&self) -> Result<OwnedFd, RegionError> {
        let copy = rustix::io::fcntl_dupfd_cloexec(&self.fd, 3);
        copy.map_err(|errno| {
            crate::call_error("copy the descriptor of", &self.path.display().to_string(), errno)
        })
    }

    /// Takes the name of the file away, which nobody finds then; of a device nothing.
    ///
    /// # Errors
    /// [`PathError::Call`]. A name that leads elsewhere by now stays.
    pub fn remove(&self) -> Result<(), PathError> {
        let number = |stat: &fs::Metadata| (stat.dev(), stat.ino());
        let here = rustix::fs::fstat(&self.fd).map_err(|errno| call("look at", &self.path)(errno.into()))?;
        let there = fs::symlink_metadata(&self.path).ok();
        if !self.kind.is_file() || there.as_ref().map(number) != Some((here.st_dev, here.st_ino)) {
            return Ok(());
        }
        let removed = rustix::fs::unlinkat(rustix::fs::CWD, &self.path, AtFlags::empty());
        removed.map_err(|errno| call("remove", &self.path)(errno.into()))
    }

    fn region_error(&self, source: RegionError) -> PathError {
        PathError::Region { path: self.path.clone(), source }
    }

    /// Writes the first bytes of it: through a mapping, which any kind has.
    fn write_zeros(&self, want: u64, progress: &mut dyn FnMut(u64, u64)) -> Result<(), PathError> {
        let mapping =
            self.part("all", 0, want).and_then(Region::map).map_err(|error| self.region_error(error))?;
        for at in (0..want).step_by(STEP_BYTES) {
            let step = (STEP_BYTES as u64).min(want - at);
            // All of it is in the mapping.
            let _ = mapping.write_zeros(at, step);
            progress(at + step, want);
        }
        Ok(())
    }
}

/// Bytes that a machine takes with this much guest memory.
fn whole(memory_bytes: u64) -> u64 {
    MEMORY_AT.saturating_add(memory_bytes)
}

/// A new file. It goes again if anything fails.
fn make_file(path: &Path, want: u64, progress: &mut dyn FnMut(u64, u64)) -> Result<PathFile, PathError> {
    let made = fs::File::options().read(true).write(true).create_new(true).mode(0o600).open(path);
    let made = made.map_err(|source| match source.kind() {
        io::ErrorKind::AlreadyExists => PathError::Unfit {
            path: path.to_owned(),
            why: "exists: if a machine is in it, `tideover resume --path` has it again; else remove it first"
                .to_owned(),
        },
        _ => call("make", path)(source),
    })?;
    let mut filled = || -> Result<PathFile, PathError> {
        let call = |what| move |errno: Errno| call(what, path)(errno.into());
        // First of all: of a file system that would not do, nothing is taken.
        let file = PathFile::of(made.try_clone().map_err(self::call("open", path))?.into(), path)?;
        rustix::fs::flock(&file.fd, FlockOperation::NonBlockingLockExclusive).map_err(call("lock"))?;
        rustix::fs::ftruncate(&file.fd, want).map_err(call("size"))?;
        let allocated = rustix::fs::fallocate(&file.fd, FallocateFlags::empty(), 0, want);
        allocated.map_err(call("take memory for"))?;
        let file = PathFile { len_bytes: want, ..file };
        if file.kind == Kind::Fsdax {
            // What was never written reads as zero after a kexec, whatever was there: the file system would not know of it.
            file.write_zeros(want, progress)?;
            rustix::fs::fsync(&file.fd).map_err(call("write"))?;
            let folder = fs::File::open(path.parent().unwrap_or(Path::new("/"))).and_then(|it| it.sync_all());
            folder.map_err(self::call("write the folder of", path))?;
        }
        Ok(file)
    };
    filled().inspect_err(|_| {
        // It was made here.
        let _ = fs::remove_file(path);
    })
}

fn call(what: &'static str, path: &Path) -> impl FnOnce(io::Error) -> PathError {
    let path = path.to_owned();
    move |source| PathError::Call { what, path, source }
}

/// What a descriptor is of, and the size of its pages. Says what else it is.
pub(crate) fn kind_of(fd: &OwnedFd, device: u64) -> Result<(Kind, PageSize), String> {
    const TMPFS: i64 = libc::TMPFS_MAGIC;
    const HUGETLBFS: i64 = libc::HUGETLBFS_MAGIC;
    let file =
        fs::metadata(format!("/proc/self/fd/{}", fd.as_raw_fd())).map_err(|error| error.to_string())?;
    if file.file_type().is_char_device() {
        return devdax(device);
    }
    if !file.is_file() {
        return Err("is neither a file nor a devdax device. A raw /dev/pmem has the page cache before it, which is lost \
                    with the kernel: put a file system on it (`tideover setup format`)"
            .to_owned());
    }
    let of = rustix::fs::fstatfs(fd).map_err(|errno| errno.to_string())?;
    match of.f_type {
        TMPFS => Ok((Kind::Tmpfs, PageSize::Small)),
        HUGETLBFS if u64::try_from(of.f_bsize) == Ok(PageSize::Huge.bytes()) => {
            Ok((Kind::Hugetlbfs, PageSize::Huge))
        }
        HUGETLBFS => Err(format!("has pages of {} bytes: mount hugetlbfs with pagesize=2M", of.f_bsize)),
        _ if is_dax(fd.as_fd()) => Ok((Kind::Fsdax, PageSize::Small)),
        _ => Err("is on a file system with a page cache, which is lost with the kernel: it has to be an ext4 or xfs on \
                  reserved memory that is mounted with dax=always, a devdax device, or hugetlbfs or tmpfs"
            .to_owned()),
    }
}

/// The kernel's word that a file is mapped without a page cache.
fn is_dax(fd: BorrowedFd<'_>) -> bool {
    let stat = rustix::fs::statx(fd, "", AtFlags::EMPTY_PATH, StatxFlags::BASIC_STATS);
    stat.is_ok_and(|stat| stat.stx_attributes.contains(StatxAttributes::DAX))
}

fn devdax(device: u64) -> Result<(Kind, PageSize), String> {
    let subsystem = fs::read_link(sysfs(device, "subsystem"));
    if subsystem.ok().as_deref().and_then(Path::file_name) != Some(OsStr::new("dax")) {
        return Err("is a device of another kind than devdax".to_owned());
    }
    match device_number(device, "align").or_else(|| device_number(device, "device/align")) {
        // A smaller one takes any mapping that this one takes.
        None => Ok((Kind::Devdax, PageSize::Huge)),
        Some(align) if align <= PageSize::Huge.bytes() => Ok((Kind::Devdax, PageSize::Huge)),
        Some(align) => Err(format!(
            "can be mapped in pieces of {align} bytes alone: make it anew with an alignment of 2M"
        )),
    }
}

fn sysfs(device: u64, name: &str) -> PathBuf {
    let (major, minor) = (rustix::fs::major(device), rustix::fs::minor(device));
    PathBuf::from(format!("/sys/dev/char/{major}:{minor}/{name}"))
}

fn device_number(device: u64, name: &str) -> Option<u64> {
    fs::read_to_string(sysfs(device, name)).ok()?.trim().parse().ok()
}

impl Region {
    /// A part of a machine's file or device, from `at`, that came from elsewhere or was opened here.
    ///
    /// # Errors
    /// [`RegionError::NotARegion`] if it is no such file, or others may open it, or the part does not lie in it.
    pub fn part(name: &str, fd: OwnedFd, at: u64, len_bytes: u64) -> Result<Self, RegionError> {
        let not = |why: String| RegionError::NotARegion { name: name.to_owned(), why };
        let file = PathFile::of(fd, Path::new("it")).map_err(|error| not(describe(&error)))?;
        crate::check_size(name, len_bytes, file.page_size)?;
        let end = at.checked_add(len_bytes).filter(|end| *end <= file.len_bytes);
        if end.is_none() || !at.is_multiple_of(PageSize::Huge.bytes()) {
            return Err(not(format!("has {} bytes, and this part lies at {at}", file.len_bytes)));
        }
        let region = Self::new(name, file.fd, len_bytes, Store::Path, file.page_size);
        Ok(Self { at, ..region })
    }
}

fn describe(error: &PathError) -> String {
    match error {
        PathError::Unfit { why, .. } => why.clone(),
        other => other.to_string(),
    }
}

/// Whether the descriptor is of something with a name: no region that a process makes for itself is.
pub fn is_path(fd: BorrowedFd<'_>) -> bool {
    let seals = rustix::fs::fcntl_get_seals(fd);
    // A file of tmpfs or hugetlbfs has the seal that there are to be no others, and no more.
    !seals.is_ok_and(|seals| seals.contains(crate::SEALS))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A path of this test's own on a tmpfs.
    fn path(name: &str) -> PathBuf {
        let path = Path::new("/dev/shm").join(format!("tideover-path-{}-{name}", std::process::id()));
        let _ = fs::remove_file(&path);
        path
    }

    fn why(error: &PathError) -> String {
        match error {
            PathError::Unfit { why, .. } => why.clone(),
            other => other.to_string(),
        }
    }

    #[test]
    fn parts_of_a_file_are_regions_apart_from_each_other() {
        let path = path("parts");
        let file = PathFile::create(&path, 4 << 20, &mut |_, _| {}).unwrap();
        assert_eq!((file.kind(), file.page_size()), (Kind::Tmpfs, PageSize::Small));
        let map = |at, len| file.part("t", at, len).unwrap().map().unwrap();
        let (notes, region0, memory) =
            (file.notes().unwrap(), map(REGION0_AT, 8 << 20), map(MEMORY_AT, 4 << 20));
        for (value, part) in (1..).zip([&notes, &region0, &memory]) {
            assert_eq!(part.load(0).unwrap(), 0);
            part.store(0, value).unwrap();
        }
        let again = map(MEMORY_AT, 4 << 20);
        assert_eq!((again.load(0).unwrap(), notes.load(0).unwrap(), region0.load(0).unwrap()), (3, 1, 2));
        assert!(memory.region().is_whole().unwrap(), "it has all of its memory from the start");
        assert!(matches!(memory.region().punch(0, 4096), Err(RegionError::Whole { .. })));
        assert!(matches!(file.part("t", MEMORY_AT, 6 << 20), Err(RegionError::NotARegion { .. })));
        file.remove().unwrap();
        assert!(!path.exists());
    }

    #[test]
    fn a_file_is_one_machines_and_its_lock_goes_with_the_descriptor() {
        let path = path("busy");
        let file = PathFile::create(&path, 2 << 20, &mut |_, _| {}).unwrap();
        assert!(matches!(PathFile::open(&path), Err(PathError::Busy { .. })));
        let part = file.part("t", REGION0_AT, 4096).unwrap();
        drop(file);
        assert!(matches!(PathFile::open(&path), Err(PathError::Busy { .. })), "a region of it is open");
        drop(part);
        PathFile::open(&path).unwrap().remove().unwrap();
    }

    #[test]
    fn what_cannot_hold_a_machine_is_refused_by_name() {
        let path = path("unfit");
        fs::write(&path, "mine").unwrap();
        let exists = PathFile::create(&path, 2 << 20, &mut |_, _| {}).unwrap_err();
        assert!(why(&exists).contains("exists"), "{exists}");
        let others = PathFile::open(&path).unwrap_err();
        assert!(why(&others).contains("chmod 600"), "{others}");
        assert_eq!(fs::read(&path).unwrap(), b"mine");
        fs::remove_file(&path).unwrap();
        let null = PathFile::open(Path::new("/dev/null")).unwrap_err();
        assert!(why(&null).contains("another kind than devdax"), "{null}");
        let etc = PathFile::passed(fs::File::open("/etc").unwrap().into()).unwrap_err();
        assert!(matches!(etc, PathError::Unfit { .. }), "{etc}");
    }

    /// Of a file system with a page cache, if this is on one.
    #[test]
    fn what_was_made_where_no_machine_can_lie_goes_again() {
        let path = std::env::current_dir().unwrap().join(format!("unfit-{}", std::process::id()));
        match PathFile::create(&path, 2 << 20, &mut |_, _| {}) {
            Err(cached) => assert!(why(&cached).contains("page cache"), "{cached}"),
            Ok(file) => {
                assert_eq!(file.kind(), Kind::Tmpfs);
                file.remove().unwrap();
            }
        }
        assert!(!path.exists());
    }

    /// It would say which program is to run as this user. Root alone can try it.
    #[test]
    fn a_file_of_another_user_is_refused() {
        if !rustix::process::geteuid().is_root() {
            return;
        }
        let path = path("foreign");
        drop(PathFile::create(&path, 2 << 20, &mut |_, _| {}).unwrap());
        std::os::unix::fs::chown(&path, Some(65_534), None).unwrap();
        let foreign = PathFile::open(&path).unwrap_err();
        assert!(why(&foreign).contains("belongs to user 65534"), "{foreign}");
        fs::remove_file(&path).unwrap();
    }

    #[test]
    fn a_memfd_has_no_path_and_a_file_has() {
        let path = path("which");
        let file = PathFile::create(&path, 2 << 20, &mut |_, _| {}).unwrap();
        assert!(is_path(file.part("t", 0, 4096).unwrap().as_fd()));
        assert!(!is_path(Region::create("t", 4096).unwrap().as_fd()));
        file.remove().unwrap();
    }
}
