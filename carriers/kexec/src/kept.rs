//! What a holder has of a machine after a kexec.

use std::io;
use std::os::fd::AsFd as _;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use abi::Malformed;
use abi::arena::OWNERSHIP_ADDRESS;
use abi::arena::OwnershipState;
use fdpass::Channel;
use liveupdate::Incoming;
use liveupdate::RetrieveError;
use liveupdate::Unfinished;
use machine::OwnershipWord;
use machine::ownership::Ownership;
use machine::update::Step;
use region::Mapping;
use region::OutOfRange;
use region::Region;
use region::RegionError;
use region::liveness;
use region::liveness::LivenessError;
use socket::Custody;
use socket::Passed;
use socket::Reason;
use socket::Timeouts;
use thiserror::Error;

use crate::FIRST_REGION_TOKEN;
use crate::NOTE_TOKEN;
use crate::Note;
use crate::NoteError;
use crate::When;
use crate::note;

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
    /// Whether a process lives is not known.
    #[error("cannot tell whether the machine's owner is alive")]
    Liveness(#[source] LivenessError),
    /// A descriptor cannot be copied.
    #[error("cannot copy a descriptor of the machine")]
    Copy(#[source] io::Error),
}

/// How a machine stands that came through a kexec.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Standing {
    /// Sealed, or claimed by a process that is dead (its word): it can be passed on.
    Ready {
        /// Epoch of the seal.
        sealed: u32,
        /// The dead one's claim.
        claimed: Option<OwnershipWord>,
    },
    /// A process has claimed or runs it, and lives.
    Taken(OwnershipWord),
    /// It was not sealed when the kernel went: its vCPUs' state is lost, and its memory whole.
    NeverSealed,
    /// It ran under this kernel, and the process that ran it is dead: its memory is later than its state.
    RanOn,
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
            Ok(regions) => {
                self.when.now("retrieved");
                let Self { session, note, when } = self;
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
    regions: Vec<OwnedFd>,
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
        let region0 = self.region0()?;
        let word = region0.word(OWNERSHIP_ADDRESS).map_err(KeptError::TooSmall)?;
        let word = Ownership::new(word).read().map_err(KeptError::Ownership)?;
        let lives = || liveness::is_held(region0.region(), word.nonce().get()).map_err(KeptError::Liveness);
        let sealed = self.note.sealed.as_ref().map(|sealed| sealed.epoch);
        Ok(match (word.state(), sealed) {
            (OwnershipState::Sealed, _) => Standing::Ready { sealed: word.epoch(), claimed: None },
            (_, None) => Standing::NeverSealed,
            // As it was when its predecessor sealed it, or before.
            (OwnershipState::Running, Some(sealed)) if word.epoch() <= sealed => Standing::NeverSealed,
            (_, Some(_)) if lives()? => Standing::Taken(word),
            (OwnershipState::Claimed, Some(sealed)) => Standing::Ready { sealed, claimed: Some(word) },
            (OwnershipState::Running, Some(_)) => Standing::RanOn,
        })
    }

    fn region0(&self) -> Result<Arc<Mapping>, KeptError> {
        let (Some(fd), Some(len_bytes)) = (self.regions.first(), self.note.regions.first()) else {
            return Err(KeptError::TooMany { regions: 0 });
        };
        let fd = fd.try_clone().map_err(KeptError::Copy)?;
        let region = Region::accept("metadata", fd, *len_bytes).and_then(Region::map);
        Ok(Arc::new(region.map_err(KeptError::Map)?))
    }

    /// Gives the machine, which has to [stand](Self::standing) ready, to the successor at the other end of `channel`. `vmm`
    /// is what its VMM is told.
    ///
    /// # Errors
    /// [`Reason`]: how the machine stands then, is to be asked.
    pub fn pass_on(
        &self,
        channel: &Channel,
        (sealed, claimed): (u32, Option<OwnershipWord>),
        vmm: serde_json::Value,
        timeouts: Timeouts,
        told: &mut dyn FnMut(Step),
    ) -> Result<Passed, Reason> {
        let regions = self.regions.iter().map(OwnedFd::as_fd).zip(self.note.regions.iter().copied());
        let custody = Custody {
            identity: self.note.identity.clone(),
            formats: self.note.formats.clone(),
            regions: regions.collect(),
            sealed,
            claimed,
            vmm,
            timeouts,
        };
        socket::pass_on(channel, &custody, told)
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
