//! The file that says what else there is of a machine.

use std::fs;
use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::os::fd::BorrowedFd;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt as _;
use std::path::PathBuf;

use abi::Malformed;
use abi::note;
use region::Region;
use region::RegionError;
use serde::Deserialize;
use serde::Serialize;
use serde::de::DeserializeOwned;
use socket::Origin;
use socket::Prospect;
use socket::Timeouts;
use thiserror::Error;

use crate::When;

/// Beside what is known before the pause: the seal, and moments.
const ROOM_BYTES: usize = 64 << 10;
/// The largest note that is read.
const MOST_BYTES: u64 = 8 << 20;

/// What a machine's VMM leaves for its next life.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Note {
    /// The machine's name.
    pub machine: String,
    /// Its identity, as hex.
    pub identity: String,
    /// Formats that a successor has to be able to read.
    pub formats: Vec<String>,
    /// Bytes of each region, region 0 first.
    pub regions: Vec<u64>,
    /// The program that ran it.
    pub program: PathBuf,
    /// The cgroup that its VMM was in, below the file system of cgroups.
    #[serde(default)]
    pub cgroup: Option<String>,
    /// What its VMM tells its successor.
    pub vmm: serde_json::Value,
    /// Its seal. Without one its vCPUs' state is lost.
    #[serde(default)]
    pub sealed: Option<Sealed>,
}

impl Note {
    /// What a successor is told of the machine before its memory is here; `vmm` is what its VMM is told.
    /// Where the machine came from, is the carrier's word.
    pub fn prospect(&self, origin: Origin, vmm: serde_json::Value, timeouts: Timeouts) -> Prospect {
        let (identity, formats, regions) =
            (self.identity.clone(), self.formats.clone(), self.regions.clone());
        Prospect { identity, formats, regions, origin, vmm, timeouts }
    }
}

/// A machine's seal.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Sealed {
    /// The epoch.
    pub epoch: u32,
    /// When the guest stopped, and when what was done since.
    pub when: When,
}

/// Why a note was not written or read.
#[derive(Debug, Error)]
pub enum NoteError {
    /// No file could be made for it.
    #[error("cannot make a file for the note")]
    Make(#[source] RegionError),
    /// It does not fit any more.
    #[error("the note has {bytes} bytes, and there is room for {room}")]
    Room {
        /// Its bytes.
        bytes: usize,
        /// Room.
        room: u64,
    },
    /// The file could not be written or read.
    #[error("cannot access the note's file")]
    Access(#[source] io::Error),
    /// The file is no note.
    #[error("it is no note")]
    Malformed(#[source] Malformed),
    /// The note is none of this kind.
    #[error("the note cannot be understood")]
    Json(#[source] serde_json::Error),
}

/// The cgroup that this process is in, of the one hierarchy of version 2.
#[must_use]
pub fn cgroup() -> Option<String> {
    let list = fs::read_to_string("/proc/self/cgroup").ok()?;
    Some(list.lines().find_map(|line| line.strip_prefix("0::"))?.to_owned())
}

/// A file in memory with a note in it.
#[derive(Debug)]
pub struct NoteFile {
    file: File,
    /// Bytes that it has.
    room: u64,
}

impl AsFd for NoteFile {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

impl NoteFile {
    /// Makes the file, with room for what is still to come.
    ///
    /// # Errors
    /// [`NoteError`]
    pub fn make(note: &impl Serialize) -> Result<Self, NoteError> {
        let bytes = bytes(note)?;
        let room = (bytes.len() * 2 + ROOM_BYTES).next_multiple_of(4096) as u64;
        let region = Region::create("note", room).map_err(NoteError::Make)?;
        let file = region.as_fd().try_clone_to_owned().map_err(NoteError::Access)?;
        let file = Self { file: file.into(), room };
        file.write_bytes(&bytes)?;
        Ok(file)
    }

    /// Takes a file that has come from elsewhere: what it says is an allegation.
    ///
    /// # Errors
    /// [`NoteError::Access`] if it has no size.
    pub fn from_fd(file: OwnedFd) -> Result<Self, NoteError> {
        let file = File::from(file);
        let room = file.metadata().map_err(NoteError::Access)?.len();
        Ok(Self { file, room })
    }

    /// Writes another note in its place.
    ///
    /// # Errors
    /// [`NoteError`]
    pub fn write(&self, note: &impl Serialize) -> Result<(), NoteError> {
        self.write_bytes(&bytes(note)?)
    }

    fn write_bytes(&self, bytes: &[u8]) -> Result<(), NoteError> {
        let room = self.room.saturating_sub(note::ADDRESS);
        if bytes.len() as u64 > room {
            return Err(NoteError::Room { bytes: bytes.len(), room });
        }
        self.file.write_all_at(bytes, note::ADDRESS).map_err(NoteError::Access)
    }

    /// What it says.
    ///
    /// # Errors
    /// [`NoteError`]
    pub fn read<T: DeserializeOwned>(&self) -> Result<T, NoteError> {
        let mut bytes = vec![0; usize::try_from(self.room.min(MOST_BYTES)).unwrap_or_default()];
        self.file.read_exact_at(&mut bytes, 0).map_err(NoteError::Access)?;
        let text = note::read(&bytes).map_err(NoteError::Malformed)?;
        serde_json::from_str(&text).map_err(NoteError::Json)
    }
}

fn bytes(note: &impl Serialize) -> Result<Vec<u8>, NoteError> {
    Ok(note::encode(&serde_json::to_string(note).map_err(NoteError::Json)?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_note_is_replaced_where_it_stands_and_never_larger_than_its_file() {
        let file = NoteFile::make(&vec!["one"]).unwrap();
        let copy = NoteFile::from_fd(file.as_fd().try_clone_to_owned().unwrap()).unwrap();
        let read = || copy.read::<Vec<String>>();
        assert_eq!(read().unwrap(), ["one"]);
        file.write(&vec!["one", "two"]).unwrap();
        assert_eq!(read().unwrap(), ["one", "two"]);
        let large = "x".repeat(ROOM_BYTES * 2);
        assert!(matches!(file.write(&vec![large]), Err(NoteError::Room { .. })));
        assert_eq!(read().unwrap(), ["one", "two"]);
    }

    #[test]
    fn what_is_no_note_is_refused() {
        let empty = Region::create("t", 4096).unwrap();
        let file = NoteFile::from_fd(empty.as_fd().try_clone_to_owned().unwrap()).unwrap();
        assert!(matches!(file.read::<Vec<String>>(), Err(NoteError::Malformed(_))));
        assert!(matches!(file.write(&7), Err(NoteError::Room { .. })));
        assert!(matches!(NoteFile::make(&7).unwrap().read::<Vec<String>>(), Err(NoteError::Json(_))));
    }
}
