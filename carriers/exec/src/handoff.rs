//! What one program leaves for the next: JSON in a memory file.

use std::fs::File;
use std::io;
use std::io::Read as _;
use std::io::Seek as _;
use std::io::Write as _;
use std::os::fd::OwnedFd;
use std::os::fd::RawFd;
use std::path::PathBuf;

use rustix::fs::MemfdFlags;
use serde::Deserialize;
use serde::Serialize;
use thiserror::Error;

/// Version of the hand-off.
pub(crate) const PROTOCOL: u32 = 1;
/// The most bytes of a hand-off. What a VMM tells has to fit.
const MAX_BYTES: u64 = 1 << 20;

/// The machine, by numbers of descriptors, and how far the update is.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Handoff {
    pub(crate) protocol: u32,
    /// Each region's descriptor, and its size in bytes.
    pub(crate) regions: Vec<(RawFd, u64)>,
    /// The descriptors that go with the machine.
    pub(crate) fds: Vec<RawFd>,
    /// What keeps the old address space.
    pub(crate) lease: Option<RawFd>,
    /// The program before, and its path.
    pub(crate) old: (RawFd, PathBuf),
    /// The ownership word of the seal.
    pub(crate) sealed: u64,
    pub(crate) steps: Vec<(String, u64)>,
    pub(crate) stopped_ns: Option<u64>,
    pub(crate) vmm: serde_json::Value,
    /// Why the program after could not run the machine: this is the way back.
    pub(crate) failed: Option<String>,
}

/// Why a hand-off was not written or read.
#[derive(Debug, Error)]
pub enum HandoffError {
    /// A system call failed.
    #[error("cannot {what} the hand-off")]
    Call {
        /// What was tried.
        what: &'static str,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// It is none, or longer than any.
    #[error("the hand-off cannot be read")]
    Malformed(#[source] serde_json::Error),
    /// It is of another version.
    #[error("the hand-off has version {theirs}, and this program knows {PROTOCOL}")]
    Protocol {
        /// Its version.
        theirs: u32,
    },
}

impl Handoff {
    /// Writes it into a memory file.
    pub(crate) fn write(&self) -> Result<File, HandoffError> {
        let call = |what| move |source: io::Error| HandoffError::Call { what, source };
        let text = serde_json::to_vec(self).map_err(HandoffError::Malformed)?;
        let fd = rustix::fs::memfd_create("tideover-handoff", MemfdFlags::CLOEXEC);
        let mut file = File::from(fd.map_err(|errno| call("make")(errno.into()))?);
        file.write_all(&text).map_err(call("write"))?;
        Ok(file)
    }

    pub(crate) fn read(fd: OwnedFd) -> Result<Self, HandoffError> {
        let call = |source: io::Error| HandoffError::Call { what: "read", source };
        let mut file = File::from(fd);
        file.rewind().map_err(call)?;
        let mut text = Vec::new();
        file.take(MAX_BYTES).read_to_end(&mut text).map_err(call)?;
        let handoff: Self = serde_json::from_slice(&text).map_err(HandoffError::Malformed)?;
        match handoff.protocol {
            PROTOCOL => Ok(handoff),
            theirs => Err(HandoffError::Protocol { theirs }),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn handoff() -> Handoff {
        Handoff {
            protocol: PROTOCOL,
            regions: vec![(5, 8 << 20), (6, 64 << 20)],
            fds: vec![7],
            lease: None,
            old: (8, "/usr/bin/vmm".into()),
            sealed: 9,
            steps: vec![("sealed".to_owned(), 1)],
            stopped_ns: Some(1),
            vmm: serde_json::Value::Null,
            failed: None,
        }
    }

    #[test]
    fn what_is_written_is_read() {
        let read = Handoff::read(handoff().write().unwrap().into()).unwrap();
        assert_eq!(read.regions, handoff().regions);
        assert_eq!((read.old, read.sealed), (handoff().old, 9));
    }

    #[test]
    fn another_version_and_nonsense_are_refused() {
        let newer = Handoff { protocol: 2, ..handoff() }.write().unwrap();
        assert!(matches!(Handoff::read(newer.into()), Err(HandoffError::Protocol { theirs: 2 })));
        let nothing = File::open("/dev/null").unwrap();
        assert!(Handoff::read(nothing.into()).is_err());
        let endless = File::open("/dev/zero").unwrap();
        assert!(Handoff::read(endless.into()).is_err());
    }
}
