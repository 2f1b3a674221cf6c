//! Keeps a machine that no process runs, and gives it to the next one that is to run it.
//!
//! Who has a machine's regions can keep its memory; to have it run again takes a *note* besides, which its VMM wrote: how
//! large the regions are, in which formats, and what that VMM tells its successor. Where both come from is another's
//! matter: a kernel gives them back after a kexec, a VMM gives them to whoever keeps them against its death, the service
//! manager keeps them over a restart.
//!
//! [`Kept`] is all of that in one process. How the machine [stands](Kept::standing) is asked of its ownership word, and what
//! may be done follows from it.
#![forbid(unsafe_code)]

mod kept;
mod leaving;
mod note;
mod standing;
mod when;

pub use kept::Kept;
pub use leaving::LeaveError;
pub use leaving::Leaving;
pub use leaving::LostError;
pub use leaving::Offer;
pub use note::Note;
pub use note::NoteError;
pub use note::NoteFile;
pub use note::Sealed;
pub use note::cgroup;
pub use standing::CustodyError;
pub use standing::Standing;
pub use when::When;

/// The most regions that a machine has.
pub const MAX_REGIONS: usize = 256;
