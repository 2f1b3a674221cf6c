//! A disk's file, which one machine at a time has.
//!
//! The lock is an open-file-description lock over the whole file: it belongs to the open file, not to a process, and
//! ends when the last descriptor of that open file is closed. So it changes hands with the descriptor. A
//! successor that is given the open file holds the lock from the instant it has the descriptor, and the predecessor
//! that still has it holds the same one: there is no instant at which another could take it, and none at which
//! the successor would be refused. Nobody ever unlocks: that would take the lock from both.
//!
//! Who opens the file by its name has another open file, and is refused as long as any descriptor of the first lives.
//! Children made by fork keep it, too; programs executed do not, as every descriptor made here is close-on-exec.
//!
//! Two of our own processes, and QEMU (which locks single bytes of the same kind), exclude each other. Who does not
//! ask for locks is not bound.
#![expect(unsafe_code, reason = "open-file-description locks and fallocate's modes are calls of their own")]

use std::fs::File;
use std::fs::OpenOptions;
use std::io;
use std::os::fd::AsFd;
use std::os::fd::AsRawFd;
use std::os::fd::BorrowedFd;
use std::os::unix::fs::FileExt;
use std::os::unix::fs::FileTypeExt;
use std::path::Path;

use thiserror::Error;

/// Bytes of a sector, the unit of a disk's size.
pub const SECTOR_BYTES: u64 = 512;

/// What the guest may do.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Access {
    /// Reads only. Any number of machines may have the disk so at a time.
    ReadOnly,
    /// Reads and writes. No other machine has the disk at that time.
    ReadWrite,
}

/// Why a file is not this machine's disk.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum DiskError {
    /// Another open file has it locked.
    #[error("the disk {name} is another machine's")]
    Taken {
        /// How the caller called it.
        name: String,
    },
    /// Neither a file nor a block device, or not open for what the guest may do.
    #[error("the disk {name} {why}")]
    NotADisk {
        /// How the caller called it.
        name: String,
        /// What it is.
        why: &'static str,
    },
    /// A system call failed.
    #[error("cannot {what} the disk {name}")]
    Call {
        /// What was tried.
        what: &'static str,
        /// How the caller called it.
        name: String,
        /// Why.
        #[source]
        source: io::Error,
    },
}

/// An open file that is this machine's disk, and locked.
#[derive(Debug)]
pub struct DiskFile {
    // Invariant: the open file has the lock, and nothing here gives it up but the closing of the descriptor.
    file: File,
    access: Access,
    len_bytes: u64,
}

impl DiskFile {
    /// Opens the file at `path` and locks it.
    ///
    /// # Errors
    /// [`DiskError::Taken`] if another machine has it.
    pub fn open(path: &Path, access: Access) -> Result<Self, DiskError> {
        let name = path.display().to_string();
        let file = OpenOptions::new().read(true).write(access == Access::ReadWrite).open(path);
        let file = file.map_err(call("open", &name))?;
        Self::adopt(&name, file, access)
    }

    /// Takes a file that is open already, and locks it: one that came from a predecessor is locked by its open file,
    /// and stays so. `name` is for errors.
    ///
    /// # Errors
    /// [`DiskError::Taken`] if another open file has it locked.
    pub fn adopt(name: &str, file: File, access: Access) -> Result<Self, DiskError> {
        check_open_for(name, &file, access)?;
        let len_bytes = len_bytes(name, &file)?;
        lock(&file, access).map_err(|source| match source.raw_os_error() {
            Some(libc::EAGAIN | libc::EACCES) => DiskError::Taken { name: name.to_owned() },
            _ => call("lock", name)(source),
        })?;
        Ok(Self { file, access, len_bytes })
    }

    /// What the guest may do.
    pub fn access(&self) -> Access {
        self.access
    }

    /// Its size when it was opened.
    pub fn len_bytes(&self) -> u64 {
        self.len_bytes
    }

    /// Reads at an offset, perhaps less than asked.
    ///
    /// # Errors
    /// As `pread`.
    pub fn read_at(&self, into: &mut [u8], offset_bytes: u64) -> io::Result<usize> {
        self.file.read_at(into, offset_bytes)
    }

    /// Writes at an offset, perhaps less than asked. It is durable after [`sync`](Self::sync).
    ///
    /// # Errors
    /// As `pwrite`.
    pub fn write_at(&self, bytes: &[u8], offset_bytes: u64) -> io::Result<usize> {
        self.file.write_at(bytes, offset_bytes)
    }

    /// Makes durable what was written.
    ///
    /// # Errors
    /// As `fdatasync`.
    pub fn sync(&self) -> io::Result<()> {
        self.file.sync_data()
    }
}

impl AsFd for DiskFile {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

fn call(what: &'static str, name: &str) -> impl FnOnce(io::Error) -> DiskError {
    move |source| DiskError::Call { what, name: name.to_owned(), source }
}

fn check_open_for(name: &str, file: &File, access: Access) -> Result<(), DiskError> {
    let not = |why| Err(DiskError::NotADisk { name: name.to_owned(), why });
    // SAFETY: an open descriptor; the command takes no argument and changes nothing.
    let flags = unsafe { libc::fcntl(file.as_raw_fd(), libc::F_GETFL) };
    if flags == -1 {
        return Err(call("look at", name)(io::Error::last_os_error()));
    }
    if flags & libc::O_APPEND != 0 {
        // Every write would go to the end, whatever its offset.
        return not("is open for appending");
    }
    match (flags & libc::O_ACCMODE, access) {
        (libc::O_RDWR, _) | (libc::O_RDONLY, Access::ReadOnly) => Ok(()),
        (libc::O_RDONLY, Access::ReadWrite) => not("is open for reading only"),
        _ => not("is not open for reading"),
    }
}

fn len_bytes(name: &str, file: &File) -> Result<u64, DiskError> {
    let metadata = file.metadata().map_err(call("look at", name))?;
    let file_type = metadata.file_type();
    if file_type.is_file() {
        return Ok(metadata.len());
    }
    if !file_type.is_block_device() {
        return Err(DiskError::NotADisk {
            name: name.to_owned(),
            why: "is neither a file nor a block device",
        });
    }
    // SAFETY: an open descriptor. Where it stands is nobody's: every access here gives its offset.
    let end = unsafe { libc::lseek(file.as_raw_fd(), 0, libc::SEEK_END) };
    u64::try_from(end).map_err(|_| call("measure", name)(io::Error::last_os_error()))
}

#[expect(clippy::cast_possible_truncation, reason = "the constants are small, their types are C's")]
fn lock(file: &File, access: Access) -> io::Result<()> {
    let kind = match access {
        Access::ReadOnly => libc::F_RDLCK,
        Access::ReadWrite => libc::F_WRLCK,
    };
    // A length of 0 is up to the end, wherever that comes to be.
    let whole = libc::flock {
        l_type: kind as libc::c_short,
        l_whence: libc::SEEK_SET as libc::c_short,
        l_start: 0,
        l_len: 0,
        l_pid: 0,
    };
    // SAFETY: an open descriptor and a flock that outlives the call, which only reads it.
    let result = unsafe { libc::fcntl(file.as_raw_fd(), libc::F_OFD_SETLK, &raw const whole) };
    if result == -1 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;

    use super::*;

    /// A file of a few sectors, removed when dropped.
    struct Image(PathBuf);

    impl Image {
        fn new(test: &str) -> Self {
            let path = std::env::temp_dir().join(format!("tideover-disk-{}-{test}", std::process::id()));
            std::fs::write(&path, [0; 4096]).unwrap();
            Self(path)
        }

        fn open(&self, access: Access) -> Result<DiskFile, DiskError> {
            DiskFile::open(&self.0, access)
        }
    }

    impl Drop for Image {
        fn drop(&mut self) {
            let _ = std::fs::remove_file(&self.0);
        }
    }

    fn is_taken(result: Result<DiskFile, DiskError>) -> bool {
        matches!(result, Err(DiskError::Taken { .. }))
    }

    #[test]
    fn a_disk_that_is_written_has_one_machine() {
        let image = Image::new("one");
        let first = image.open(Access::ReadWrite).unwrap();
        assert!(is_taken(image.open(Access::ReadWrite)));
        assert!(is_taken(image.open(Access::ReadOnly)));
        drop(first);
        image.open(Access::ReadWrite).unwrap();
    }

    #[test]
    fn a_disk_that_is_read_may_have_several() {
        let image = Image::new("several");
        let _first = image.open(Access::ReadOnly).unwrap();
        let _second = image.open(Access::ReadOnly).unwrap();
        assert!(is_taken(image.open(Access::ReadWrite)));
    }

    #[test]
    fn the_lock_goes_with_the_open_file_and_is_never_free_on_the_way() {
        let image = Image::new("handover");
        let predecessor = image.open(Access::ReadWrite).unwrap();
        // What SCM_RIGHTS gives the other process: a descriptor of the same open file.
        let passed = File::from(predecessor.as_fd().try_clone_to_owned().unwrap());
        assert!(is_taken(image.open(Access::ReadWrite)), "while both have it");
        let successor = DiskFile::adopt("d", passed, Access::ReadWrite).unwrap();
        assert!(is_taken(image.open(Access::ReadWrite)), "while both have adopted it");
        drop(predecessor);
        assert!(is_taken(image.open(Access::ReadWrite)), "after the predecessor's end");
        drop(successor);
        image.open(Access::ReadWrite).unwrap();
    }

    #[test]
    fn a_successor_that_gives_up_leaves_the_lock_with_the_predecessor() {
        let image = Image::new("back");
        let predecessor = image.open(Access::ReadWrite).unwrap();
        let passed = File::from(predecessor.as_fd().try_clone_to_owned().unwrap());
        drop(DiskFile::adopt("d", passed, Access::ReadWrite).unwrap());
        assert!(is_taken(image.open(Access::ReadWrite)));
    }

    #[test]
    fn what_is_no_disk_is_refused() {
        let image = Image::new("none");
        let why = |file: File, access| match DiskFile::adopt("d", file, access) {
            Err(DiskError::NotADisk { why, .. }) => why,
            other => panic!("{other:?}"),
        };
        let read_only = File::open(&image.0).unwrap();
        assert_eq!(why(read_only, Access::ReadWrite), "is open for reading only");
        let write_only = OpenOptions::new().write(true).open(&image.0).unwrap();
        assert_eq!(why(write_only, Access::ReadOnly), "is not open for reading");
        let appending = OpenOptions::new().read(true).append(true).open(&image.0).unwrap();
        assert_eq!(why(appending, Access::ReadWrite), "is open for appending");
        let null = OpenOptions::new().read(true).write(true).open("/dev/null").unwrap();
        assert_eq!(why(null, Access::ReadWrite), "is neither a file nor a block device");
    }
}
