//! Is a holder alive? A lock that dies with its process, one byte for each holder.
//!
//! A process opens a description of the region of its own and locks one byte of it; the byte's number is the
//! holder's nonce, so that whoever reads the nonce can ask whether its holder lives. The lock never decides
//! who owns anything.
//!
//! A description stays locked as long as anything refers to it. So it is close-on-exec, is never mapped and
//! never passed on: a child that kept it would keep the lock of a dead parent.

use std::io;
use std::os::fd::AsFd;
use std::os::fd::AsRawFd;
use std::os::fd::OwnedFd;

use rustix::fs::Mode;
use rustix::fs::OFlags;
use thiserror::Error;

use crate::Region;

/// Why a lock could not be taken or asked for.
#[derive(Debug, Error)]
pub enum LivenessError {
    /// Another process holds this byte.
    #[error("the hold {byte:#x} on {region} is another process's")]
    Taken {
        /// The region's name.
        region: String,
        /// The byte.
        byte: u32,
    },
    /// Somebody has locked more of the region than a holder does: who lives cannot be told.
    #[error("another process has locked {region} beyond what a holder locks")]
    Foreign {
        /// The region's name.
        region: String,
    },
    /// A system call failed.
    #[error("cannot {what} a lock on {region}")]
    Call {
        /// What was tried.
        what: &'static str,
        /// The region's name.
        region: String,
        /// Why.
        #[source]
        source: io::Error,
    },
}

/// This process's hold on one byte of a region. It ends when this is dropped, or the process does.
#[derive(Debug)]
pub struct LivenessLock {
    _description: OwnedFd,
    byte: u32,
}

impl LivenessLock {
    /// Takes the byte.
    ///
    /// # Errors
    /// [`LivenessError::Taken`] if another description holds it.
    pub fn take(region: &Region, byte: u32) -> Result<Self, LivenessError> {
        let description = reopen(region)?;
        let mut lock = byte_lock(byte);
        match ofd(&description, libc::F_OFD_SETLK, &mut lock) {
            Ok(()) => Ok(Self { _description: description, byte }),
            Err(error) if matches!(error.raw_os_error(), Some(libc::EAGAIN | libc::EACCES)) => {
                Err(LivenessError::Taken { region: region.name().to_owned(), byte })
            }
            Err(source) => Err(call("take", region, source)),
        }
    }

    /// The byte that is held.
    pub fn byte(&self) -> u32 {
        self.byte
    }
}

/// True if some process holds the byte, this one included.
///
/// A free byte says that its holder is dead, not that all it began has ended: a kernel worker may still
/// add a page on its behalf.
///
/// # Errors
/// [`LivenessError::Call`] if the kernel does not say, [`LivenessError::Foreign`] if it names a lock that is no holder's.
pub fn is_held(region: &Region, byte: u32) -> Result<bool, LivenessError> {
    let description = reopen(region)?;
    let mut lock = byte_lock(byte);
    ofd(&description, libc::F_OFD_GETLK, &mut lock).map_err(|source| call("ask for", region, source))?;
    match i32::from(lock.l_type) {
        libc::F_UNLCK => Ok(false),
        libc::F_WRLCK if lock.l_start == i64::from(byte) && lock.l_len == 1 => Ok(true),
        _ => Err(LivenessError::Foreign { region: region.name().to_owned() }),
    }
}

/// A description of the region of our own: locks belong to descriptions, not to processes or files.
fn reopen(region: &Region) -> Result<OwnedFd, LivenessError> {
    let path = format!("/proc/self/fd/{}", region.as_fd().as_raw_fd());
    rustix::fs::open(path, OFlags::RDWR | OFlags::CLOEXEC, Mode::empty())
        .map_err(|errno| call("open a description for", region, errno.into()))
}

#[expect(clippy::cast_possible_truncation, reason = "the constants are small, their types are C's")]
fn byte_lock(byte: u32) -> libc::flock {
    libc::flock {
        l_type: libc::F_WRLCK as libc::c_short,
        l_whence: libc::SEEK_SET as libc::c_short,
        l_start: byte.into(),
        l_len: 1,
        l_pid: 0,
    }
}

fn ofd(description: &OwnedFd, command: libc::c_int, lock: &mut libc::flock) -> io::Result<()> {
    // SAFETY: an open descriptor and a flock that outlives the call; the command reads or writes just it.
    let result = unsafe { libc::fcntl(description.as_raw_fd(), command, std::ptr::from_mut(lock)) };
    if result == -1 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

fn call(what: &'static str, region: &Region, source: io::Error) -> LivenessError {
    LivenessError::Call { what, region: region.name().to_owned(), source }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_byte_has_one_holder_and_others_are_free() {
        let region = Region::create("t", 4096).unwrap();
        let lock = LivenessLock::take(&region, 0xABCDEF).unwrap();
        assert_eq!(lock.byte(), 0xABCDEF);
        assert!(matches!(
            LivenessLock::take(&region, 0xABCDEF),
            Err(LivenessError::Taken { byte: 0xABCDEF, .. })
        ));
        assert!(is_held(&region, 0xABCDEF).unwrap());
        assert!(!is_held(&region, 0xABCDEE).unwrap());
        drop(lock);
        assert!(is_free(&region, 0xABCDEF));
    }

    /// Whether nobody holds it. A program that this process, or a test beside this one, starts at that moment has copies of all
    /// descriptors until it is executed.
    fn is_free(region: &Region, byte: u32) -> bool {
        let until = std::time::Instant::now() + std::time::Duration::from_secs(10);
        while is_held(region, byte).unwrap() {
            if std::time::Instant::now() >= until {
                return false;
            }
            std::thread::yield_now();
        }
        true
    }

    #[test]
    fn a_lock_of_more_than_a_byte_is_no_holder() {
        let region = Region::create("t", 4096).unwrap();
        let description = reopen(&region).unwrap();
        let mut wide = libc::flock { l_len: 0, ..byte_lock(0) };
        ofd(&description, libc::F_OFD_SETLK, &mut wide).unwrap();
        assert!(matches!(is_held(&region, 7), Err(LivenessError::Foreign { .. })));
        assert!(matches!(LivenessLock::take(&region, 7), Err(LivenessError::Taken { .. })));
    }

    #[test]
    fn a_lock_is_not_inherited_by_a_program_that_is_started() {
        let region = Region::create("t", 4096).unwrap();
        let lock = LivenessLock::take(&region, 7).unwrap();
        let mut child = std::process::Command::new("sleep").arg("60").spawn().unwrap();
        drop(lock);
        let free = is_free(&region, 7);
        child.kill().unwrap();
        child.wait().unwrap();
        assert!(free);
    }
}
