//! Carries a machine through `execve`: the process stays, its program is the next VMM.
//!
//! ```text
//! program before ([`replace`])                    program after ([`Life`])
//! keep descriptors; start a holder
//! freeze, pause, save, seal
//! execve ──────────────────────────────────────▶  attach: check, map; make the VM; claim, load, run
//!                                                 settle; let the holder go
//!        ◀────────────────────────────────────── execve, if anything fails before the run ([`WayBack`])
//! take the machine back, load, run
//! ```
//!
//! Only one of the two programs is there at a time. So what the next one needs before the pause cannot be got ready
//! before it: try it out first, as a process of its own ([`socket::rehearse`]). The process id stays, and so does
//! everything that hangs on it: its parent, its cgroup, its limits.
//!
//! What the new program gets is one descriptor: a memory file with a hand-off that names the others.
#![forbid(unsafe_code)]

mod handoff;
mod life;
mod replace;

pub use handoff::HandoffError;
pub use life::Failed;
pub use life::Handed;
pub use life::Life;
pub use life::LifeError;
pub use life::Report;
pub use life::Running;
pub use life::WayBack;
use machine::update::Capabilities;
pub use replace::Fatal;
pub use replace::Offer;
pub use replace::Reason;
pub use replace::RolledBack;
pub use replace::replace;

/// What this carrier can do.
pub const CAPABILITIES: Capabilities =
    Capabilities { other_descriptors: true, overlap: false, survives_crash: false, survives_kexec: false };
