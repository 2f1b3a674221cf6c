//! What the service manager gives back of a machine.

use std::collections::BTreeMap;
use std::os::fd::OwnedFd;

use custody::CustodyError;
use custody::Kept;
use custody::NoteError;
use custody::NoteFile;
use fdpass::systemd::PassedError;
use fdpass::systemd::take_passed;
use thiserror::Error;

use crate::Item;
use crate::Told;

/// Why what was in the store is no machine.
#[derive(Debug, Error)]
pub enum FoundError {
    /// The manager's descriptors are not there.
    #[error("cannot take what the service manager kept")]
    Passed(#[from] PassedError),
    /// The file of a note cannot be used.
    #[error("cannot read the machine's note in the service manager's store")]
    Note(#[source] NoteError),
    /// A region is missing.
    #[error("region {index} of the machine is not in the service manager's store")]
    Missing {
        /// Its number; 0 is metadata.
        index: usize,
    },
    /// They are not what the note tells of.
    #[error("what is in the service manager's store is no machine")]
    Custody(#[source] CustodyError),
}

/// What the store had of a machine. It is still in there, too.
#[derive(Debug, Default)]
pub struct Found {
    notes: BTreeMap<u64, OwnedFd>,
    regions: BTreeMap<usize, OwnedFd>,
}

/// Takes what the manager passed to this process, of this machine; all else that it passed is closed here.
///
/// # Errors
/// [`FoundError::Passed`]
pub fn take(machine: &str) -> Result<Found, FoundError> {
    Ok(Found::of(take_passed()?, machine))
}

impl Found {
    /// What of these, each with its name in the store, is this machine's.
    pub fn of(passed: Vec<(String, OwnedFd)>, machine: &str) -> Self {
        let mut found = Self::default();
        for (name, fd) in passed {
            match Item::parse(&name, machine) {
                Some(Item::Note(number)) => drop(found.notes.insert(number, fd)),
                Some(Item::Region(index)) => drop(found.regions.insert(index, fd)),
                None => {}
            }
        }
        found
    }

    /// There is no machine: nothing, or regions without a note, of one whose guest never ran.
    pub fn is_none(&self) -> bool {
        self.notes.is_empty()
    }

    /// What is in the store, for who is to take it out of there.
    pub fn told(&self) -> Told {
        let regions = self.regions.last_key_value().map_or(0, |(index, _)| index + 1);
        Told { regions, note: self.notes.last_key_value().map_or(0, |(number, _)| *number) }
    }

    /// The machine, in this process's custody: by the newest note that can be read.
    ///
    /// # Errors
    /// [`FoundError`]: nothing has changed in the store.
    pub fn keep(&self) -> Result<Kept, FoundError> {
        let Self { notes, regions } = self;
        if let Some(index) = (0..regions.len()).find(|index| !regions.contains_key(index)) {
            return Err(FoundError::Missing { index });
        }
        let mut unread = FoundError::Missing { index: 0 };
        let copy = |error| FoundError::Custody(CustodyError::Copy(error));
        for note in notes.values().rev() {
            let file = match NoteFile::from_fd(note.try_clone().map_err(copy)?) {
                Ok(file) => file,
                Err(error) => {
                    unread = FoundError::Note(error);
                    continue;
                }
            };
            let copies = regions.values().map(OwnedFd::try_clone).collect::<Result<_, _>>();
            let copies = copies.map_err(copy)?;
            match Kept::left_behind(file, copies) {
                Ok(kept) => return Ok(kept),
                Err(CustodyError::Note(error)) => unread = FoundError::Note(error),
                Err(error) => return Err(FoundError::Custody(error)),
            }
        }
        Err(unread)
    }
}
