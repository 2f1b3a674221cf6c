//! Kills and stops VMMs in the midst of updates, at random and at every named step, and looks from outside at what that
//! cost.
//!
//! A *try* is one update of a machine by the real code, and one *fault*: `SIGKILL` or `SIGSTOP` (and later `SIGCONT`) of a process that
//! takes part. Which machine, which fault, where: all that follows from the seed and the try's number ([`choice`]). First each
//! place is gone through that there is, in an order of the seed's; then places and random moments alternate.
//!
//! After each try this process establishes the truth by itself. It is no part of any update, and has the machine's files open as any
//! other file ([`witness`]): which processes live, what the ownership word says, which process holds the nonce in it, whether the guest
//! goes on, and whether every page holds what it should.
//!
//! Half of the machines have a `tideoverd` that keeps them ([`keeper`]). Where the process that runs such a machine's guest is killed, the
//! machine has to be held with all of its memory, and to run again when it is recovered; and the daemon itself is killed.
//!
//! The machine's VMMs are this program, too ([`role`]): the `vmm` crate, told of each step so that it can come to grief there.
#![forbid(unsafe_code)]

pub mod attempt;
pub mod choice;
pub mod keeper;
pub mod machine;
pub mod plan;
pub mod process;
pub mod record;
pub mod role;
pub mod run;
pub mod witness;
