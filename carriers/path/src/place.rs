//! Where a machine lies that is found by its path.

use std::os::fd::AsFd as _;
use std::os::fd::BorrowedFd;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::path::PathBuf;
use std::sync::Arc;

use custody::CustodyError;
use custody::Kept;
use custody::Note;
use custody::NoteError;
use custody::NoteFile;
use custody::When;
use machine::Machine;
use region::RegionError;
use region::path::MEMORY_AT;
use region::path::PathError;
use region::path::PathFile;
use region::path::is_path;
use thiserror::Error;

use crate::notes;
use crate::notes::Notes;
use crate::notes::NotesError;
use crate::notes::Written;

/// Why a path is no place for a machine, or has none.
#[derive(Debug, Error)]
pub enum PlaceError {
    /// It cannot be used.
    #[error(transparent)]
    Path(#[from] PathError),
    /// There is a machine already.
    #[error(
        "the machine {machine} lies at {}: `tideover resume --path` has it again, and `tideover stop` ends it then",
        path.display()
    )]
    Taken {
        /// The path.
        path: PathBuf,
        /// The machine.
        machine: String,
    },
    /// A note was not written.
    #[error("cannot write what is to be known of the machine")]
    Notes(#[from] NotesError),
    /// A descriptor cannot be copied.
    #[error("cannot copy the machine's descriptor")]
    Copy(#[source] std::io::Error),
    /// The note cannot be given to others.
    #[error("cannot pass the machine's note on")]
    Note(#[source] NoteError),
    /// What lies there is no machine.
    #[error("what lies there is no machine")]
    Custody(#[source] CustodyError),
}

/// A file or device that a machine lies in, which this process and whom it passes the descriptor to have.
#[derive(Debug)]
pub struct Place {
    file: Arc<PathFile>,
    notes: Notes,
}

impl Place {
    /// Makes the file for a new machine with so many bytes of guest memory, or takes the device: all of it is zero then. `progress` gets
    /// bytes done, and bytes in all.
    ///
    /// # Errors
    /// [`PlaceError`]: a machine or a file that was there is as it was.
    pub fn make(
        path: &Path,
        memory_bytes: u64,
        progress: &mut dyn FnMut(u64, u64),
    ) -> Result<Self, PlaceError> {
        let there = match std::fs::symlink_metadata(path) {
            Ok(there) => there,
            Err(_) => return Self::new(PathFile::create(path, memory_bytes, progress)?),
        };
        let opened = PathFile::open(path).map_err(PlaceError::from).and_then(Self::new);
        if let Ok(place) = &opened
            && let Some((_, last)) = place.notes.last()
        {
            return Err(PlaceError::Taken { path: path.to_owned(), machine: last.note.machine });
        }
        if let Err(PlaceError::Path(busy @ PathError::Busy { .. })) = opened {
            return Err(busy.into());
        }
        if there.is_file() {
            // Whatever it is, it is somebody's: that is found out there, and said.
            return Self::new(PathFile::create(path, memory_bytes, progress)?);
        }
        let place = opened?;
        // What was of another machine must not be seen by this one.
        place.file.clear(memory_bytes, progress)?;
        Ok(place)
    }

    /// Where the machine lies, if it has a path: by one of its regions, which has come from another process.
    ///
    /// # Errors
    /// [`PlaceError`]
    pub fn of(machine: &Machine) -> Result<Option<Self>, PlaceError> {
        machine.regions().next().map_or(Ok(None), |region0| Self::of_region(region0.as_fd()))
    }

    /// The same by the descriptor of a region.
    ///
    /// # Errors
    /// [`PlaceError`]
    pub fn of_region(fd: BorrowedFd<'_>) -> Result<Option<Self>, PlaceError> {
        if !is_path(fd) {
            return Ok(None);
        }
        let fd = fd.try_clone_to_owned().map_err(PlaceError::Copy)?;
        Self::new(PathFile::passed(fd)?).map(Some)
    }

    fn new(file: PathFile) -> Result<Self, PlaceError> {
        let notes = Notes::new(file.notes()?);
        Ok(Self { file: Arc::new(file), notes })
    }

    /// The file.
    pub fn file(&self) -> &Arc<PathFile> {
        &self.file
    }

    /// Its memory is there under the next kernel, too.
    pub fn survives_kexec(&self) -> bool {
        self.file.kind().survives_kexec()
    }

    /// Writes a note of the machine, which counts from then on.
    ///
    /// # Errors
    /// [`PlaceError::Notes`]: the last one counts.
    pub fn write(&self, note: &Note) -> Result<(), PlaceError> {
        Ok(self.notes.write(note)?)
    }

    /// The note that was written last does not count after all.
    pub fn withdraw(&self) {
        self.notes.withdraw();
    }

    /// The machine is over. A file loses its name; a device is another machine's to take.
    ///
    /// # Errors
    /// [`PlaceError::Path`] if it keeps its name; the machine is over all the same.
    pub fn empty(&self) -> Result<(), PlaceError> {
        self.notes.erase_all();
        Ok(self.file.remove()?)
    }
}

/// A machine that lies at a path, and that no process has.
#[derive(Debug)]
pub struct Found {
    place: Place,
    written: Written,
}

/// Looks at a path. `None` if there is no machine.
///
/// # Errors
/// [`PlaceError`] if it cannot be one's, or some process has it.
pub fn find(path: &Path) -> Result<Option<Found>, PlaceError> {
    let file = PathFile::open(path)?;
    if file.len_bytes() < MEMORY_AT {
        return Ok(None);
    }
    let place = Place::new(file)?;
    let last = place.notes.last();
    Ok(last.map(|(_, written)| Found { place, written }))
}

impl Found {
    /// What its last VMM says of it: an allegation.
    pub fn note(&self) -> &Note {
        &self.written.note
    }

    /// It was written under a kernel before this one.
    ///
    /// # Errors
    /// [`PlaceError::Notes`] if the kernel does not say which boot this is.
    pub fn is_of_another_boot(&self) -> Result<bool, PlaceError> {
        Ok(self.written.boot != notes::boot()?)
    }

    /// The machine, in this process's custody. `when` is when what was done for it in this life of the host.
    ///
    /// # Errors
    /// [`PlaceError`]: it lies there as before.
    pub fn keep(&self, when: When) -> Result<Kept, PlaceError> {
        let note = self.note().clone();
        let file = NoteFile::make(&note).map_err(PlaceError::Note)?;
        let regions = self.regions()?;
        let kept = match self.is_of_another_boot()? {
            true => Kept::made_again((file, note), regions, when),
            false => Kept::left_behind(file, regions),
        };
        kept.map_err(PlaceError::Custody)
    }

    /// A descriptor for each region: all of one file.
    ///
    /// # Errors
    /// [`PlaceError::Copy`]
    fn regions(&self) -> Result<Vec<OwnedFd>, PlaceError> {
        let count = self.note().regions.len().min(custody::MAX_REGIONS);
        let copy = |_| self.place.file.copy();
        (0..count).map(copy).collect::<Result<_, RegionError>>().map_err(|source| {
            let path = self.place.file.path().to_owned();
            PathError::Region { path, source }.into()
        })
    }

    /// Where it lies.
    pub fn place(&self) -> &Place {
        &self.place
    }
}
