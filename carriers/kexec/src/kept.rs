//! What the kernel gives back of a machine after a kexec.

use custody::Kept;
use custody::MAX_REGIONS;
use custody::Note;
use custody::NoteError;
use custody::NoteFile;
use custody::When;
use liveupdate::Incoming;
use liveupdate::RetrieveError;
use liveupdate::Unfinished;
use thiserror::Error;

use crate::FIRST_REGION_TOKEN;
use crate::NOTE_TOKEN;

/// Why a machine's memory was not retrieved, or cannot be used.
#[derive(Debug, Error)]
pub enum KeptError {
    /// The kernel does not give the note.
    #[error("cannot retrieve the machine's note")]
    RetrieveNote(#[source] RetrieveError),
    /// It is no note.
    #[error("cannot read the machine's note")]
    Note(#[source] NoteError),
    /// It names more regions than a machine can have.
    #[error("the machine's note tells of {regions} regions")]
    TooMany {
        /// How many.
        regions: usize,
    },
    /// The kernel does not give a region.
    #[error("cannot retrieve region {index} of the machine")]
    Region {
        /// Its number; 0 is metadata.
        index: usize,
        /// Why.
        #[source]
        source: RetrieveError,
    },
}

/// A machine's session and its note: what it takes to have the rest is known, and nothing of it is here.
#[derive(Debug)]
pub struct Found {
    session: Incoming,
    file: NoteFile,
    note: Note,
    when: When,
}

impl Found {
    /// Reads the note in a machine's session.
    ///
    /// # Errors
    /// The session and a [`KeptError`]: it can be tried again.
    pub fn read(mut session: Incoming) -> Result<Self, Box<(Incoming, KeptError)>> {
        let mut when = When::default();
        when.now("session");
        match read_note(&mut session) {
            Ok((file, note)) => Ok(Self { session, file, note, when }),
            Err(error) => Err(Box::new((session, error))),
        }
    }

    /// What the machine's last VMM says.
    pub fn note(&self) -> &Note {
        &self.note
    }

    /// Gives the machine up: its memory is gone.
    ///
    /// # Errors
    /// [`Unfinished`]: the session goes on, and ends with the process.
    pub fn give_up(self) -> Result<(), Box<Unfinished>> {
        self.session.finish()
    }

    /// Retrieves the machine's regions. Their memory is charged to this process's cgroup, which has to have room for it:
    /// a file that fails is lost, and the machine with it. The session that comes beside it is to be finished once the machine runs
    /// or is given up: until then the kernel could give the files again.
    ///
    /// # Errors
    /// This and a [`KeptError`]: what was retrieved can be had again.
    pub fn retrieve(mut self) -> Result<(Kept, Incoming), Box<(Self, KeptError)>> {
        let retrieve = |index: usize| {
            let token = FIRST_REGION_TOKEN + index as u64;
            self.session.retrieve(token).map_err(|source| KeptError::Region { index, source })
        };
        let fds: Vec<_> = match (0..self.note.regions.len()).map(retrieve).collect() {
            Ok(fds) => fds,
            Err(error) => return Err(Box::new((self, error))),
        };
        self.when.now("retrieved");
        let Self { session, file, note, when } = self;
        let kept = Kept::made_again((file, note), fds, when);
        Ok((kept.unwrap_or_else(|_| unreachable!("there is a region for each in the note")), session))
    }
}

fn read_note(session: &mut Incoming) -> Result<(NoteFile, Note), KeptError> {
    let file = session.retrieve(NOTE_TOKEN).map_err(KeptError::RetrieveNote)?;
    let file = NoteFile::from_fd(file).map_err(KeptError::Note)?;
    let note: Note = file.read().map_err(KeptError::Note)?;
    let regions = note.regions.len();
    if !(1..=MAX_REGIONS).contains(&regions) {
        return Err(KeptError::TooMany { regions });
    }
    Ok((file, note))
}
