//! Carries a machine by a file or a device that is found by its path: over a crash of its VMM; and, where the memory behind it is none of
//! the kernel's, over a kexec of any kernel.
//!
//! All of the machine lies there ([`region::path`] says where): its regions, and in front of them what the note of the other carriers
//! says. Nobody has to stay alive for it, and no kernel has to know of it.
//!
//! ```text
//! VMM: makes the file, writes a note, runs the guest; a successor writes a note of its own
//!   kexec: pauses, saves, seals, writes a note of that; ends
//!   or it dies, or the kernel goes under it
//! whoever comes next: finds the note by the path, and has the machine in its custody ([`custody::Kept`])
//!   sealed: a VMM claims, loads, runs
//!   not sealed: its memory is there, and later than any state
//! ```
//!
//! A note is not written over the one that counts. There is room for two, and of those that can be read the one that was written later
//! counts: so there is a whole one at every store.
#![forbid(unsafe_code)]

mod notes;
mod place;

use machine::update::Capabilities;

pub use notes::NotesError;
pub use place::Found;
pub use place::Place;
pub use place::PlaceError;
pub use place::find;
pub use region::path::Kind;

/// What this carrier can do.
pub const CAPABILITIES: Capabilities =
    Capabilities { other_descriptors: false, overlap: false, survives_crash: true, survives_kexec: true };
