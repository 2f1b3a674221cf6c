//! Carries a machine to its next VMM over a Unix socket, both alive at once.
//!
//! The *predecessor* runs the guest and has a [`Machine`](machine::Machine); the *successor* is another process that is to run it.
//! While the guest still runs, the successor hears which formats it will have to read, gets the regions'
//! descriptors, maps them and prepares everything that does not need the guest's state. Only then the
//! guest is paused; what follows does not grow with memory.
//!
//! ```text
//! predecessor ([`hand_over`])                     successor ([`Successor`])
//!        ◀── hello: who I am, what I can read ──   connect / from_stdin
//!        ─── offer: formats, sizes ────────────▶
//!        ◀── accept | refuse ───────────────────
//!        ─── memory: descriptors ──────────────▶   attach: check, map, populate; make the VM
//!        ◀── warm ──────────────────────────────
//! freeze, pause, save, seal
//!        ─── sealed: epoch ────────────────────▶   claim, load, run
//!        ◀── running ───────────────────────────   the guest runs
//!        ◀── settled ───────────────────────────   the session is finished and standing again
//! ```
//!
//! Up to *running* the predecessor goes back if anything fails, is refused or takes too long on the other
//! side: the guest runs on in it, and the [`Outcome`] says why. The messages only tell; what decides is the
//! ownership word, so a message that is lost or late does no harm.
//!
//! The successor is either [started](Program::start) by the predecessor, which gives it the socket as its
//! standard input, or by someone else, and then [connects](Successor::connect) to a path that the predecessor listens at.
#![forbid(unsafe_code)]

mod custody;
mod message;
mod predecessor;
mod program;
mod proposal;
mod successor;

use std::time::Duration;

pub use custody::Agreed;
pub use custody::Custody;
pub use custody::Origin;
pub use custody::Passed;
pub use custody::Prospect;
use machine::update::Capabilities;
pub use message::LinkError;
pub use message::PROTOCOL;
pub use message::farewell;
pub use message::refuse;
pub use predecessor::Fatal;
pub use predecessor::Offer;
pub use predecessor::Outcome;
pub use predecessor::Reason;
pub use predecessor::Report;
pub use predecessor::hand_over;
pub use predecessor::rehearse;
pub use program::Execute;
pub use program::Program;
pub use program::ProgramError;
pub use program::Started;
pub use successor::Attached;
pub use successor::Handed;
pub use successor::Parting;
pub use successor::Running;
pub use successor::Successor;
pub use successor::SuccessorError;
pub use successor::Unsettled;

/// What this carrier can do.
pub const CAPABILITIES: Capabilities =
    Capabilities { other_descriptors: true, overlap: true, survives_crash: false, survives_kexec: false };

/// How long each side waits for the other.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Timeouts {
    /// While the guest runs: until the successor is warm.
    pub prepare: Duration,
    /// While the guest stands still: until the successor runs it.
    pub hand_over: Duration,
}

impl Default for Timeouts {
    fn default() -> Self {
        Self { prepare: Duration::from_secs(60), hand_over: Duration::from_secs(2) }
    }
}

/// Formats that every successor built with this crate can read, its VMM's own states apart.
pub fn readable_formats() -> Vec<String> {
    machine::readable_formats()
}
