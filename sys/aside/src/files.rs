//! What the kernel tells of a thread in files, read without the allocator: see [`gather`](crate::gather).

use std::ffi::CStr;
use std::io::Write as _;

use rustix::fs::Mode;
use rustix::fs::OFlags;

/// The beginning of a file of a thread.
#[derive(Debug, Clone, Copy)]
pub(crate) struct OfThread<const BYTES: usize> {
    bytes: [u8; BYTES],
    length: usize,
}

impl<const BYTES: usize> OfThread<BYTES> {
    /// As far as it is text: a thread's name can be any bytes.
    pub(crate) fn str(&self) -> &str {
        let bytes = self.bytes();
        // What stands behind a name that is no text is, and is all that is looked for.
        let start = bytes.iter().rposition(|byte| !byte.is_ascii()).map_or(0, |last| last + 1);
        std::str::from_utf8(bytes.get(start..).unwrap_or_default()).unwrap_or_default()
    }

    pub(crate) fn text(&self) -> String {
        self.str().to_owned()
    }

    pub(crate) fn bytes(&self) -> &[u8] {
        self.bytes.get(..self.length).unwrap_or_default().trim_ascii_end()
    }
}

/// Reads a file of a thread of this process; nothing if that cannot be.
pub(crate) fn read<const BYTES: usize>(thread: i32, name: &str) -> OfThread<BYTES> {
    let mut read = OfThread { bytes: [0; BYTES], length: 0 };
    if let Some(file) = open(thread, name, OFlags::RDONLY) {
        read.length = rustix::io::read(&file, &mut read.bytes).unwrap_or_default();
    }
    read
}

/// Writes it, if that can be.
pub(crate) fn write(thread: i32, name: &str, bytes: &[u8]) {
    if let Some(file) = open(thread, name, OFlags::WRONLY) {
        let _ = rustix::io::write(&file, bytes);
    }
}

fn open(thread: i32, name: &str, flags: OFlags) -> Option<std::os::fd::OwnedFd> {
    let mut path = [0; 64];
    write!(&mut path[..], "/proc/self/task/{thread}/{name}\0").ok()?;
    let path = CStr::from_bytes_until_nul(&path).ok()?;
    rustix::fs::open(path, flags | OFlags::CLOEXEC, Mode::empty()).ok()
}
