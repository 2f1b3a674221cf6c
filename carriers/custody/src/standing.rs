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
use socket::Left;
use socket::Origin;
use thiserror::Error;

use crate::Note;
use crate::NoteError;
use crate::Seen;

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
    /// Somebody else was faster: the machine runs.
    #[must_use]
    pub fn is_lost(&self) -> bool {
        matches!(self, Self::Revoke(OwnershipError::Lost(lost)) if lost.found.state() == OwnershipState::Running)
    }
}

/// How a machine stands that is kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Standing {
    /// Sealed, or claimed by a process that is dead (its word): it can be passed on.
    Ready {
        /// Epoch of the seal.
        sealed: u32,
        /// The dead one's claim.
        claimed: Option<OwnershipWord>,
    },
    /// A process has sealed, claimed or runs it, and lives.
    Taken(OwnershipWord),
    /// It was not sealed when the kernel went, which left this ownership word: its vCPUs' state is lost, and its memory whole.
    NeverSealed(OwnershipWord),
    /// It ran under this kernel, and the process that ran it is dead; or who was to recover it after that is. Its memory is later
    /// than any state that was saved. That is the word that it left.
    RanOn(OwnershipWord),
}

/// A machine's regions, region 0 first.
#[derive(Debug)]
pub(crate) struct Regions {
    pub(crate) fds: Vec<OwnedFd>,
}

impl Regions {
    /// See [`Kept::standing`](crate::Kept::standing).
    pub(crate) fn standing(&self, note: &Note, origin: Origin, seen: Seen) -> Result<Standing, CustodyError> {
        let region0 = self.region0(note)?;
        let word = ownership(&region0)?.read().map_err(CustodyError::Ownership)?;
        let lives =
            || liveness::is_held(region0.region(), word.nonce().get()).map_err(CustodyError::Liveness);
        match origin {
            Origin::MadeAgain => {
                after_kexec(word, note.sealed.as_ref().map(|sealed| sealed.epoch), seen, lives)
            }
            Origin::LeftBehind => after_death(word, seen, lives),
            Origin::Handed => Ok(Standing::Taken(word)),
        }
    }

    /// See [`Kept::revoke`](crate::Kept::revoke).
    pub(crate) fn revoke(&self, note: &Note, left: Left) -> Result<(), CustodyError> {
        let word = ownership(&self.region0(note)?)?;
        let revoked = word.transition(|found| match (left, found.state()) {
            (Left::RanOn(dead), _) if found == dead => ownership::recover(found, dead, NOBODY),
            (Left::Sealed { epoch, .. }, OwnershipState::Sealed) => ownership::claim(found, epoch, NOBODY),
            _ => ownership::claim_again(found, found, NOBODY),
        });
        revoked.map(drop).map_err(CustodyError::Revoke)
    }

    fn region0(&self, note: &Note) -> Result<Arc<Mapping>, CustodyError> {
        let (Some(fd), Some(len_bytes)) = (self.fds.first(), note.regions.first()) else {
            return Err(CustodyError::Regions { told: note.regions.len(), came: self.fds.len() });
        };
        let fd = fd.try_clone().map_err(CustodyError::Copy)?;
        let region = Region::accept("metadata", fd, *len_bytes).and_then(Region::map);
        Ok(Arc::new(region.map_err(CustodyError::Map)?))
    }
}

/// No process of the kernel before lives, and the note says whether the machine was sealed.
fn after_kexec(
    word: OwnershipWord,
    sealed: Option<u32>,
    seen: Seen,
    lives: impl Fn() -> Result<bool, CustodyError>,
) -> Result<Standing, CustodyError> {
    let sealed = match seen {
        Seen::Sealed(epoch) => Some(epoch),
        Seen::Nothing | Seen::RanOn => sealed,
    };
    Ok(match (word.state(), sealed) {
        (OwnershipState::Sealed, _) => Standing::Ready { sealed: word.epoch(), claimed: None },
        // As it was when its predecessor sealed it, or before.
        (OwnershipState::Running, Some(sealed)) if word.epoch() <= sealed => Standing::NeverSealed(word),
        (OwnershipState::Running, None) if seen == Seen::Nothing => Standing::NeverSealed(word),
        (_, _) if lives()? => Standing::Taken(word),
        (OwnershipState::Running, _) => Standing::RanOn(word),
        (OwnershipState::Claimed, _) if seen == Seen::RanOn => Standing::RanOn(word),
        (OwnershipState::Claimed, Some(sealed)) => Standing::Ready { sealed, claimed: Some(word) },
        (OwnershipState::Claimed, None) => Standing::NeverSealed(word),
    })
}

/// The machine's VMM is gone. Whoever it was about to be handed to may live.
fn after_death(
    word: OwnershipWord,
    seen: Seen,
    lives: impl Fn() -> Result<bool, CustodyError>,
) -> Result<Standing, CustodyError> {
    if lives()? {
        return Ok(Standing::Taken(word));
    }
    Ok(match (word.state(), seen) {
        (OwnershipState::Sealed, _) => Standing::Ready { sealed: word.epoch(), claimed: None },
        (OwnershipState::Running, _) | (OwnershipState::Claimed, Seen::RanOn) => Standing::RanOn(word),
        (OwnershipState::Claimed, Seen::Sealed(sealed)) => Standing::Ready { sealed, claimed: Some(word) },
        // Nobody but who keeps a machine claims it in any other way than from its seal.
        (OwnershipState::Claimed, Seen::Nothing) => {
            Standing::Ready { sealed: word.epoch().wrapping_sub(1), claimed: Some(word) }
        }
    })
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
