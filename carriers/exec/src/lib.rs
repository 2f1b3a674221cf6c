//! Carries a machine through `execve`: the process stays, its program is the next VMM.
//!
//! ```text
//! program before ([`replace`])                     program after ([`Life`])
//! its threads step aside, into another process
//!        ─── execve, in the process they left ──▶  greet
//!        ◀────── as the `socket` carrier does ──▶  attach, prepare, claim, load, run
//! ends                                             the guest runs
//!        ◀─── execve of the program before, if anything fails before the run ([`WayBack`])
//! as the `socket` carrier does, with itself
//! ```
//!
//! The process id stays, and so does everything that hangs on it: its parent, its cgroup, its limits. The guest does not
//! stand still for the `execve`, nor while the next program gets ready: the threads of the one before go on in a
//! process that shares its memory (see [`aside`]), and hand over from there. So this is the `socket` carrier, with
//! another way to start the successor.
//!
//! If neither the next program nor the one before takes the machine, the guest runs on where it is, in the other process.
//!
//! What the new program gets are descriptors whose numbers are among its arguments: a [`Handoff`].
#![forbid(unsafe_code)]

mod handoff;
mod life;
mod reap;
mod replace;

pub use handoff::Handoff;
pub use handoff::HandoffError;
pub use life::Life;
pub use life::LifeError;
pub use life::WayBack;
pub use replace::Reason;
pub use replace::Replaced;
pub use replace::replace;
/// What this carrier can do: as the one that it is made of.
pub use socket::CAPABILITIES;
