//! What a holder has of a machine after a kexec.

use std::io;
use std::os::fd::AsFd as _;
use std::os::fd::OwnedFd;

use abi::Malformed;
use abi::arena::OwnershipState;
use liveupdate::Incoming;
use liveupdate::RetrieveError;
use liveupdate::Unfinished;
use machine::OwnershipWord;
use machine::ownership::OwnershipError;
use machine::update::Step;
use region::OutOfRange;
use region::RegionError;
use region::liveness::LivenessError;
use socket::Agreed;
use socket::Custody;
use socket::Passed;
use socket::Reason;
use thiserror::Error;

use crate::FIRST_REGION_TOKEN;
use crate::NOTE_TOKEN;
use crate::Note;
use crate::NoteError;
use crate::Standing;
use crate::When;
use crate::note;
use crate::standing::Regions;

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
    /// Region 0 cannot be mapped.
    #[error("cannot look at the machine's metadata")]
    Map(#[source] RegionError),
    /// Region 0 is too small.
    #[error("the machine's metadata is too small")]
    TooSmall(#[source] OutOfRange),
    /// The ownership word is none.
    #[error("nobody can tell who owns the machine")]
    Ownership(#[source] Malformed),
    /// The machine runs, or was never sealed: no claim can be revoked.
    #[error("no claim of the machine can be revoked")]
    Revoke(#[source] OwnershipError),
    /// Whether a process lives is not known.
    #[error("cannot tell whether the machine's owner is alive")]
    Liveness(#[source] LivenessError),
    /// A descriptor cannot be copied.
    #[error("cannot copy a descriptor of the machine")]
    Copy(#[source] io::Error),
}

impl KeptError {
    /// Somebody else was faster: the machine runs.
    #[must_use]
    pub fn is_lost(&self) -> bool {
        matches!(self, Self::Revoke(OwnershipError::Lost(lost)) if lost.found.state() == OwnershipState::Running)
    }
}

/// A machine's session and its note: what it takes to have the rest is known, and nothing of it is here.
#[derive(Debug)]
pub struct Found {
    session: Incoming,
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
            Ok(note) => Ok(Self { session, note, when }),
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
    /// a file that fails is lost, and the machine with it.
    ///
    /// # Errors
    /// This and a [`KeptError`]: what was retrieved can be had again.
    pub fn retrieve(mut self) -> Result<Kept, Box<(Self, KeptError)>> {
        let retrieve = |index: usize| {
            let token = FIRST_REGION_TOKEN + index as u64;
            self.session.retrieve(token).map_err(|source| KeptError::Region { index, source })
        };
        match (0..self.note.regions.len()).map(retrieve).collect() {
            Ok(fds) => {
                self.when.now("retrieved");
                let Self { session, note, when } = self;
                let regions = Regions { fds };
                Ok(Kept { session, note, regions, when })
            }
            Err(error) => Err(Box::new((self, error))),
        }
    }
}

/// A machine's session, its note and its regions, in a process that keeps them.
///
/// Its end is the session's: until [`finish`](Kept::finish) the kernel could give the files again.
#[derive(Debug)]
pub struct Kept {
    session: Incoming,
    note: Note,
    regions: Regions,
    when: When,
}

impl Kept {
    /// When what was done for the machine in this life.
    pub fn when(&self) -> &When {
        &self.when
    }

    /// What the machine's last VMM says.
    pub fn note(&self) -> &Note {
        &self.note
    }

    /// How the machine stands now.
    ///
    /// # Errors
    /// [`KeptError`]
    pub fn standing(&self) -> Result<Standing, KeptError> {
        self.regions.standing(&self.note)
    }

    /// Takes the machine from whoever has claimed it or is about to, and does not run it yet: it never will under
    /// that claim. The machine stands [ready](Standing::Ready) then, claimed by nobody who lives. Whoever was to run it may
    /// still write to its memory: end that one before another begins.
    ///
    /// # Errors
    /// [`KeptError`], of which the one that [is lost](KeptError::is_lost) says that the machine runs.
    pub fn revoke(&self) -> Result<(), KeptError> {
        self.regions.revoke(&self.note)
    }

    /// Gives the machine, which has to [stand](Self::standing) ready, to a successor that agreed to the note's
    /// [prospect](Note::prospect).
    /// `vmm` is what its VMM is told besides.
    ///
    /// # Errors
    /// [`Reason`]: how the machine stands then, is to be asked.
    pub fn pass_on(
        &self,
        agreed: Agreed,
        (sealed, claimed): (u32, Option<OwnershipWord>),
        vmm: serde_json::Value,
        told: &mut dyn FnMut(Step),
    ) -> Result<Passed, Reason> {
        let regions = self.regions.fds.iter().map(OwnedFd::as_fd).collect();
        agreed.pass_on(Custody { regions, sealed, claimed, vmm }, told)
    }

    /// The machine runs, or is given up: ends the session. What nobody else has open is gone.
    ///
    /// # Errors
    /// [`Unfinished`]: the session goes on, and ends with the process.
    pub fn finish(self) -> Result<(), Box<Unfinished>> {
        self.session.finish()
    }
}

/// The most regions that a machine has.
const MAX_REGIONS: usize = 256;

fn read_note(session: &mut Incoming) -> Result<Note, KeptError> {
    let file = session.retrieve(NOTE_TOKEN).map_err(KeptError::RetrieveNote)?;
    let note: Note = note::read(file).map_err(KeptError::Note)?;
    let regions = note.regions.len();
    if !(1..=MAX_REGIONS).contains(&regions) {
        return Err(KeptError::TooMany { regions });
    }
    Ok(note)
}
