//! How a machine stands that came through a kexec, by what its regions and its note say.

use std::os::fd::OwnedFd;
use std::sync::Arc;

use abi::arena::OWNERSHIP_ADDRESS;
use abi::arena::OwnershipState;
use machine::Nonce;
use machine::OwnershipWord;
use machine::ownership;
use machine::ownership::Ownership;
use region::Mapping;
use region::Region;
use region::liveness;

use crate::KeptError;
use crate::Note;

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

/// A machine's regions, region 0 first.
#[derive(Debug)]
pub(crate) struct Regions {
    pub(crate) fds: Vec<OwnedFd>,
}

impl Regions {
    /// See [`Kept::standing`](crate::Kept::standing).
    pub(crate) fn standing(&self, note: &Note) -> Result<Standing, KeptError> {
        let region0 = self.region0(note)?;
        let word = ownership(&region0)?.read().map_err(KeptError::Ownership)?;
        let lives = || liveness::is_held(region0.region(), word.nonce().get()).map_err(KeptError::Liveness);
        let sealed = note.sealed.as_ref().map(|sealed| sealed.epoch);
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

    /// See [`Kept::revoke`](crate::Kept::revoke).
    pub(crate) fn revoke(&self, note: &Note) -> Result<(), KeptError> {
        let sealed = note.sealed.as_ref().map(|sealed| sealed.epoch);
        let word = ownership(&self.region0(note)?)?;
        let revoked = word.transition(|found| match (found.state(), sealed) {
            (OwnershipState::Sealed, Some(sealed)) => ownership::claim(found, sealed, NOBODY),
            // Without the seal's epoch in the note nobody could claim it again.
            (OwnershipState::Sealed, None) => Ok(found),
            _ => ownership::claim_again(found, found, NOBODY),
        });
        revoked.map(drop).map_err(KeptError::Revoke)
    }

    fn region0(&self, note: &Note) -> Result<Arc<Mapping>, KeptError> {
        let (Some(fd), Some(len_bytes)) = (self.fds.first(), note.regions.first()) else {
            return Err(KeptError::TooMany { regions: 0 });
        };
        let fd = fd.try_clone().map_err(KeptError::Copy)?;
        let region = Region::accept("metadata", fd, *len_bytes).and_then(Region::map);
        Ok(Arc::new(region.map_err(KeptError::Map)?))
    }
}

/// Claims that are nobody's: processes choose their numbers by chance, and look whether another one has the same. This
/// one's lock nobody takes for longer than it takes to look.
const NOBODY: Nonce = match Nonce::new(1) {
    Some(nonce) => nonce,
    None => unreachable!(),
};

fn ownership(region0: &Arc<Mapping>) -> Result<Ownership, KeptError> {
    Ok(Ownership::new(region0.word(OWNERSHIP_ADDRESS).map_err(KeptError::TooSmall)?))
}

#[cfg(test)]
mod tests;
