//! Who owns the machine: one word, changed by compare-and-swap only.
//!
//! ```text
//!            seal              claim               run
//!  RUNNING ───────▶ SEALED ───────────▶ CLAIMED ───────────▶ RUNNING
//!  (predecessor)    (predecessor)       (successor)          (successor)
//!     ▲               │                    │
//!     └───────────────┴── take back ───────┘
//! ```
//!
//! Every transition raises the epoch, and each is a swap from one exact word. So a word never comes back, and
//! of two processes that try to leave the same word one succeeds. A successor claims only the seal that
//! it was told of, by its epoch; a stale one that wakes late finds another word and fails.
//!
//! The functions here are the whole protocol: [`Ownership`] applies them to shared memory, and the model
//! check in this crate's tests applies the same functions to a number, over every order of the steps of a
//! predecessor and two successors, each of which may crash or stall at each step.
//!
//! Where the predecessor is dead for certain, as after a kexec, a claimant that died before it ran the machine is no
//! end: the next one [claims it again](claim_again), from the dead one's word. And a machine whose owner died while it ran is
//! [recovered](recover), without a seal: its memory is whole, and no state of its vCPUs belongs to it.

use std::fmt;

use abi::Malformed;
use abi::arena::Nonce;
use abi::arena::OwnershipState;
use abi::arena::OwnershipWord;
use region::Word;
use thiserror::Error;

/// A transition is not ours to make: somebody else made one before.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
#[error("the machine cannot be {wanted} here any more: its ownership word is {found:?}")]
pub struct Lost {
    /// What was to happen.
    pub wanted: Wanted,
    /// The word that was found.
    pub found: OwnershipWord,
}

/// A transition.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Wanted {
    /// RUNNING to SEALED.
    Sealed,
    /// SEALED to CLAIMED.
    Claimed,
    /// CLAIMED or RECOVERING to RUNNING.
    Run,
    /// SEALED or CLAIMED back to the predecessor's RUNNING.
    TakenBack,
    /// A dead owner's RUNNING to RECOVERING.
    Recovered,
}

impl fmt::Display for Wanted {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Sealed => "sealed",
            Self::Claimed => "claimed",
            Self::Run => "run",
            Self::TakenBack => "taken back",
            Self::Recovered => "recovered",
        })
    }
}

fn lost(wanted: Wanted, found: OwnershipWord) -> Lost {
    Lost { wanted, found }
}

/// The first word of a machine: its maker runs it.
pub fn first(maker: Nonce) -> OwnershipWord {
    OwnershipWord::new(1, OwnershipState::Running, maker)
}

/// The word after the owner gives the machine up. `running` is the word under which it runs it.
///
/// # Errors
/// [`Lost`] if `found` is not that word.
pub fn seal(found: OwnershipWord, running: OwnershipWord) -> Result<OwnershipWord, Lost> {
    if found != running || found.state() != OwnershipState::Running {
        return Err(lost(Wanted::Sealed, found));
    }
    Ok(found.next(OwnershipState::Sealed, found.nonce()))
}

/// The word after `claimant` claims the machine as it was sealed at epoch `sealed`.
///
/// # Errors
/// [`Lost`] if `found` is not the word of that seal.
pub fn claim(found: OwnershipWord, sealed: u32, claimant: Nonce) -> Result<OwnershipWord, Lost> {
    if found.state() != OwnershipState::Sealed || found.epoch() != sealed {
        return Err(lost(Wanted::Claimed, found));
    }
    Ok(found.next(OwnershipState::Claimed, claimant))
}

/// The word after `claimant` claims a machine whose claimant died, under the word `dead`, before it ran it. To be asked
/// for only where no predecessor lives that could take the machine back. The machine is as it was sealed still.
///
/// # Errors
/// [`Lost`] if `found` is not that word, or it is no claim of a seal.
pub fn claim_again(
    found: OwnershipWord,
    dead: OwnershipWord,
    claimant: Nonce,
) -> Result<OwnershipWord, Lost> {
    if found != dead || found.state() != OwnershipState::Claimed {
        return Err(lost(Wanted::Claimed, found));
    }
    Ok(found.next(OwnershipState::Claimed, claimant))
}

/// The word after `claimant` takes a machine whose owner died, under the word `dead`, while it ran it; or whose recoverer
/// died before it ran it. It is told from a claim of a seal for good: no state belongs to the machine's memory.
///
/// # Errors
/// [`Lost`] if `found` is not that word, or the machine is sealed: then it is to be [claimed](claim).
pub fn recover(found: OwnershipWord, dead: OwnershipWord, claimant: Nonce) -> Result<OwnershipWord, Lost> {
    if found != dead || !matches!(found.state(), OwnershipState::Running | OwnershipState::Recovering) {
        return Err(lost(Wanted::Recovered, found));
    }
    Ok(found.next(OwnershipState::Recovering, claimant))
}

/// The word after the claimant is ready: the point of no return. `claimed` is the word of its claim.
///
/// # Errors
/// [`Lost`] if `found` is not that word.
pub fn run(found: OwnershipWord, claimed: OwnershipWord) -> Result<OwnershipWord, Lost> {
    if found != claimed || !matches!(found.state(), OwnershipState::Claimed | OwnershipState::Recovering) {
        return Err(lost(Wanted::Run, found));
    }
    Ok(found.next(OwnershipState::Running, found.nonce()))
}

/// The word after the predecessor takes back what it sealed as `sealed`, claimed meanwhile or not.
///
/// # Errors
/// [`Lost`] if `found` is neither that word nor the one of a claim of it, or `sealed` is no seal.
pub fn take_back(found: OwnershipWord, sealed: OwnershipWord) -> Result<OwnershipWord, Lost> {
    let claimed = found.state() == OwnershipState::Claimed && found.epoch() == sealed.epoch().wrapping_add(1);
    if sealed.state() != OwnershipState::Sealed || (found != sealed && !claimed) {
        return Err(lost(Wanted::TakenBack, found));
    }
    Ok(found.next(OwnershipState::Running, sealed.nonce()))
}

/// Why a transition was not made.
#[derive(Debug, Error)]
pub enum OwnershipError {
    /// Somebody else made one.
    #[error(transparent)]
    Lost(#[from] Lost),
    /// The word is none.
    #[error("the ownership word cannot be read")]
    Malformed(#[source] Malformed),
}

/// The ownership word in shared memory.
#[derive(Debug, Clone)]
pub struct Ownership {
    word: Word,
}

impl Ownership {
    /// The word at its place in region 0.
    pub fn new(word: Word) -> Self {
        Self { word }
    }

    /// Writes the first word. Only the maker of an arena does this, before anyone else has it.
    pub(crate) fn begin(&self, maker: Nonce) -> OwnershipWord {
        let word = first(maker);
        self.word.store(word.bits());
        word
    }

    /// The word as it is.
    ///
    /// # Errors
    /// [`Malformed`] if it is none.
    pub fn read(&self) -> Result<OwnershipWord, Malformed> {
        OwnershipWord::from_bits(self.word.load())
    }

    /// Makes a transition: `next` gives the word after the one that is found. It is asked again if somebody
    /// was faster, and then says no unless the transition is still allowed.
    ///
    /// # Errors
    /// [`OwnershipError`]
    pub fn transition(
        &self,
        next: impl Fn(OwnershipWord) -> Result<OwnershipWord, Lost>,
    ) -> Result<OwnershipWord, OwnershipError> {
        loop {
            let found = self.read().map_err(OwnershipError::Malformed)?;
            let wanted = next(found)?;
            if self.word.compare_exchange(found.bits(), wanted.bits()).is_ok() {
                return Ok(wanted);
            }
        }
    }
}
