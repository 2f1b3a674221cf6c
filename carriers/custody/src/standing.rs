//! How a machine stands that no process may run, by what its regions and its note say.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use abi::Malformed;
use abi::arena::OWNERSHIP_ADDRESS;
use abi::arena::OwnershipState;
use machine::Nonce;
use machine::OwnershipWord;
use machine::ownership;
use machine::ownership::Ownership;
use machine::ownership::OwnershipError;
use region::Mapping;
use region::OutOfRange;
use region::Region;
use region::RegionError;
use region::liveness;
use region::liveness::LivenessError;
use thiserror::Error;

use crate::Note;
use crate::NoteError;

/// Why a machine that is kept cannot be used.
#[derive(Debug, Error)]
pub enum CustodyError {
    /// Its note cannot be used.
    #[error("the machine's note")]
    Note(#[source] NoteError),
    /// They are not the machine's.
    #[error("the machine's note tells of {told} regions, and {came} are kept")]
    Regions {
        /// In the note.
        told: usize,
        /// Kept.
        came: usize,
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

impl CustodyError {
    /// Somebody else was faster: the machine runs, or was sealed by a process that has run it since.
    #[must_use]
    pub fn is_lost(&self) -> bool {
        let is_owned =
            |word: OwnershipWord| matches!(word.state(), OwnershipState::Running | OwnershipState::Sealed);
        matches!(self, Self::Revoke(OwnershipError::Lost(lost)) if is_owned(lost.found))
    }
}

/// How a machine stands that is kept, by its ownership word.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Standing {
    /// Sealed, or claimed by a process that is dead: it can be passed on with its state.
    Ready(OwnershipWord),
    /// A process has sealed, claimed or runs it, and lives.
    Taken(OwnershipWord),
    /// The process that ran it is dead, or went with its kernel; or who was to recover it after that. Its memory is whole, and
    /// later than any state that was saved.
    RanOn(OwnershipWord),
}

impl Standing {
    /// A process has the machine, and lives: it runs it, or has sealed it itself and can take it back.
    pub fn runs(self) -> bool {
        let owned =
            |word: OwnershipWord| matches!(word.state(), OwnershipState::Running | OwnershipState::Sealed);
        matches!(self, Self::Taken(word) if owned(word))
    }

    /// The word.
    pub fn word(self) -> OwnershipWord {
        match self {
            Self::Ready(word) | Self::Taken(word) | Self::RanOn(word) => word,
        }
    }
}

/// A machine's regions, region 0 first.
#[derive(Debug)]
pub(crate) struct Regions {
    pub(crate) fds: Vec<OwnedFd>,
}

impl Regions {
    /// See [`Kept::standing`](crate::Kept::standing).
    pub(crate) fn standing(&self, note: &Note) -> Result<Standing, CustodyError> {
        let region0 = self.region0(note)?;
        let word = ownership(&region0)?.read().map_err(CustodyError::Ownership)?;
        // Of a kernel before this one none lives.
        if liveness::is_held(region0.region(), word.nonce().get()).map_err(CustodyError::Liveness)? {
            return Ok(Standing::Taken(word));
        }
        Ok(match word.state() {
            OwnershipState::Sealed | OwnershipState::Claimed => Standing::Ready(word),
            OwnershipState::Running | OwnershipState::Recovering => Standing::RanOn(word),
        })
    }

    /// See [`Kept::revoke`](crate::Kept::revoke).
    pub(crate) fn revoke(&self, note: &Note, left: OwnershipWord) -> Result<(), CustodyError> {
        let word = ownership(&self.region0(note)?)?;
        let revoked = word.transition(|found| match found.state() {
            OwnershipState::Sealed => ownership::claim(found, left.epoch(), NOBODY),
            OwnershipState::Claimed => ownership::claim_again(found, found, NOBODY),
            OwnershipState::Recovering => ownership::recover(found, found, NOBODY),
            OwnershipState::Running => ownership::recover(found, left, NOBODY),
        });
        revoked.map(drop).map_err(CustodyError::Revoke)
    }

    fn region0(&self, note: &Note) -> Result<Arc<Mapping>, CustodyError> {
        let (Some(fd), Some(len_bytes)) = (self.fds.first(), note.regions.first()) else {
            return Err(CustodyError::Regions { told: note.regions.len(), came: self.fds.len() });
        };
        let fd = fd.try_clone().map_err(CustodyError::Copy)?;
        let region = machine::accept_region0(fd, *len_bytes).and_then(Region::map);
        Ok(Arc::new(region.map_err(CustodyError::Map)?))
    }
}

/// Claims that are nobody's: processes choose their numbers by chance, and look whether another one has the same. This
/// one's lock nobody takes for longer than it takes to look.
const NOBODY: Nonce = match Nonce::new(1) {
    Some(nonce) => nonce,
    None => unreachable!(),
};

fn ownership(region0: &Arc<Mapping>) -> Result<Ownership, CustodyError> {
    Ok(Ownership::new(region0.word(OWNERSHIP_ADDRESS).map_err(CustodyError::TooSmall)?))
}

#[cfg(test)]
mod tests;
