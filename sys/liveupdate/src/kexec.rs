//! Booting another kernel from this one.

use std::ffi::CStr;
use std::ffi::CString;
use std::fs;
use std::io;
use std::os::fd::AsRawFd as _;
use std::os::fd::BorrowedFd;

use rustix::io::Errno;
use rustix::system::RebootCommand;
use thiserror::Error;

/// `KEXEC_FILE_UNLOAD`.
const UNLOAD: libc::c_ulong = 1;
/// A flag that there is not.
const NO_FLAG: libc::c_ulong = 1 << 31;
/// `KEXEC_FILE_NO_INITRAMFS`.
const NO_INITRAMFS: libc::c_ulong = 4;

/// Why no kernel was loaded.
#[derive(Debug, Error)]
pub enum LoadError {
    /// This process may not (it takes CAP_SYS_BOOT), or the host forbids it (`kernel.kexec_load_disabled`).
    #[error("this process may load no kernel, or kernel.kexec_load_disabled is set")]
    Denied,
    /// The file is no kernel that this one can boot.
    #[error("the file is no kernel image that can be booted")]
    NotAKernel,
    /// The host wants kernels that are signed, and this one is not, or by somebody else.
    #[error("the kernel image has no signature that this host accepts")]
    Signature(#[source] io::Error),
    /// The kernel's command line is too long, or the image cannot be relocated, or memory was given up for a crash kernel.
    #[error("the kernel does not take the image with this command line (of {bytes} bytes)")]
    Invalid {
        /// Bytes of the command line, with its NUL.
        bytes: usize,
    },
    /// Somebody else is loading a kernel, or booting it.
    #[error("another kernel is being loaded, or booted")]
    Busy,
    /// The running kernel cannot.
    #[error("the running kernel was built without kexec_file_load")]
    Unsupported,
    /// The command line has a NUL in it.
    #[error("the kernel's command line has a NUL in it")]
    Nul,
    /// The kernel says something else: ENOMEM without memory, or EADDRNOTAVAIL without a place for the image.
    #[error("cannot load the kernel")]
    Other(#[source] io::Error),
}

impl LoadError {
    fn of(source: io::Error, bytes: usize) -> Self {
        match source.raw_os_error().map(Errno::from_raw_os_error) {
            Some(Errno::PERM) => Self::Denied,
            Some(Errno::NOEXEC) => Self::NotAKernel,
            Some(Errno::INVAL) => Self::Invalid { bytes },
            Some(Errno::BUSY) => Self::Busy,
            Some(Errno::NOSYS) => Self::Unsupported,
            Some(Errno::KEYREJECTED | Errno::NODATA | Errno::NOPKG | Errno::BADMSG) => {
                Self::Signature(source)
            }
            _ => Self::Other(source),
        }
    }
}

/// Why the kernel goes on.
#[derive(Debug, Error)]
pub enum ExecuteError {
    /// No kernel is loaded.
    #[error("no kernel is loaded")]
    NotLoaded,
    /// This process may not: it takes CAP_SYS_BOOT.
    #[error("this process may boot no kernel")]
    Denied,
    /// Somebody else is loading a kernel, or booting it; or a file says that it is busy.
    #[error("another kernel is being loaded or booted, or a file that is to be handed over is busy")]
    Busy,
    /// What is to be handed over could not be written: everything is as before.
    #[error("the kernel cannot hand over what it is to hand over; its log says why")]
    HandOver(#[source] io::Error),
}

/// Loads a kernel that [`execute`] boots, by kexec_file_load(2), which alone takes sessions along. One that was loaded before is
/// let go.
///
/// # Errors
/// [`LoadError`]: the one that was loaded before still is.
pub fn load(
    kernel: BorrowedFd<'_>,
    initrd: Option<BorrowedFd<'_>>,
    command_line: &str,
) -> Result<(), LoadError> {
    let command_line = CString::new(command_line).map_err(|_| LoadError::Nul)?;
    let (initrd, flags) = initrd.map_or((-1, NO_INITRAMFS), |initrd| (initrd.as_raw_fd(), 0));
    file_load(kernel.as_raw_fd(), initrd, &command_line, flags)
        .map_err(|source| LoadError::of(source, command_line.as_bytes_with_nul().len()))
}

/// Lets go of the kernel that is loaded, if one is.
///
/// # Errors
/// [`LoadError`]
pub fn unload() -> Result<(), LoadError> {
    file_load(-1, -1, c"", UNLOAD).map_err(|source| LoadError::of(source, 1))
}

/// Asks whether [`load`] could be called, by a call that does nothing else: what is loaded stays so.
///
/// A kernel that may load only so many (`kernel.kexec_load_limit_reboot`, when it is not -1) counts this as one of them.
///
/// # Errors
/// [`LoadError::Unsupported`] if the kernel has no such call, [`LoadError::Denied`] if this process may not make it.
pub fn ask() -> Result<(), LoadError> {
    match file_load(-1, -1, c"", NO_FLAG) {
        Err(source) if source.raw_os_error() == Some(Errno::INVAL.raw_os_error()) => Ok(()),
        Err(source) => Err(LoadError::of(source, 1)),
        // It took a flag that it cannot know, and loaded nothing from no file.
        Ok(()) => Ok(()),
    }
}

fn file_load(kernel: i32, initrd: i32, command_line: &CStr, flags: libc::c_ulong) -> io::Result<()> {
    let bytes = command_line.to_bytes_with_nul().len();
    // SAFETY: the kernel reads `bytes` bytes at the address, which are the string's, and the files; it writes nothing here.
    let result = unsafe {
        libc::syscall(libc::SYS_kexec_file_load, kernel, initrd, bytes, command_line.as_ptr(), flags)
    };
    if result == -1 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Is a kernel loaded? By which call it was loaded, the kernel does not say.
///
/// # Errors
/// If the kernel does not say even that: it has no kexec.
pub fn is_loaded() -> io::Result<bool> {
    Ok(fs::read_to_string("/sys/kernel/kexec_loaded")?.trim() == "1")
}

/// Boots the kernel that is loaded, at once: no process is told to end, and nothing is written back. Returns only if
/// that cannot be.
///
/// # Errors
/// [`ExecuteError`]: this kernel runs on, and sessions are as before.
pub fn execute() -> Result<std::convert::Infallible, ExecuteError> {
    match rustix::system::reboot(RebootCommand::Kexec) {
        Ok(()) | Err(Errno::INVAL) => Err(ExecuteError::NotLoaded),
        Err(Errno::PERM) => Err(ExecuteError::Denied),
        Err(Errno::BUSY) => Err(ExecuteError::Busy),
        Err(errno) => Err(ExecuteError::HandOver(errno.into())),
    }
}
