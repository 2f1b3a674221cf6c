//! Carries a machine to the next kernel: its memory lives through a kexec, by Linux's `/dev/liveupdate`.
//!
//! A machine has a *session* of the kernel's, with a *note* and its regions in it. The note says what the next life has
//! to know before it can read anything else: how large the regions are, in which formats, what the VMM tells its
//! successor, and when what happened.
//!
//! ```text
//! this kernel                                          the next one
//! VMM ([`Leaving`]): fill and freeze, preserve          who opens the device: retrieve the session
//!   pause, save, seal, write the note                  holder ([`Found`]): retrieve note and regions
//! who opened the device: reboot                          pass them on to a VMM, as a predecessor would
//!                                                      VMM: attach, claim, load, run
//!                                                      holder: finish the session
//! ```
//!
//! Until the kernel jumps, everything can be undone: [`Leaving::go_back`]. After it, the *holder* is a process that does
//! nothing that can fail once it has the memory, but to start VMMs: one that fails is followed by another one.
#![forbid(unsafe_code)]

mod index;
mod kept;
mod leaving;

use liveupdate::Name;
use machine::SessionName;
use machine::update::Capabilities;
use thiserror::Error;

pub use index::Index;
pub use index::IndexError;
pub use index::Listed;
pub use kept::Found;
pub use kept::KeptError;
pub use leaving::LeaveError;
pub use leaving::Leaving;
pub use leaving::Preserved;

/// What this carrier can do.
pub const CAPABILITIES: Capabilities =
    Capabilities { other_descriptors: false, overlap: false, survives_crash: false, survives_kexec: true };

/// What every session of a machine is called by, before the machine's own name.
const PREFIX: &[u8] = b"vm:";
/// Bytes that a machine's name may have, to be a session's with the prefix.
pub const MAX_NAME_BYTES: usize = 60;

/// The token of the note.
const NOTE_TOKEN: u64 = 0;
/// The token of region 0; the others follow.
const FIRST_REGION_TOKEN: u64 = 1;
/// The token of the VM object, if memory of the machine is its own.
const VM_TOKEN: u64 = 0x1000;

/// A machine's name is too long for a session of the kernel's.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[error("the name {name} is too long to go through a kexec: it may have {MAX_NAME_BYTES} bytes")]
pub struct TooLong {
    /// The name.
    pub name: SessionName,
}

/// What the kernel's session of a machine is called.
///
/// # Errors
/// [`TooLong`]
pub fn session_name(machine: SessionName) -> Result<Name, TooLong> {
    let name = [PREFIX, machine.bytes()].concat();
    Name::new(&name).map_err(|_| TooLong { name: machine })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_session_is_called_by_its_machine() {
        let name = |text: &str| SessionName::new(text.as_bytes()).unwrap_or(SessionName::literal("none"));
        let of = |text| session_name(name(text)).map(|name| name.to_string());
        assert_eq!(of("web1"), Ok("vm:web1".to_owned()));
        let long = "n".repeat(MAX_NAME_BYTES + 1);
        assert!(of(&long[1..]).is_ok());
        assert!(of(&long).is_err());
    }
}
