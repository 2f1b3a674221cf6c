//! A small guest that finds by itself every lost or changed byte of its memory, and every pause.
//!
//! The guest walks its memory for ever. A *pass* is one walk over the whole *work area*; in pass `p`
//! (from 0) every word is compared with the pattern of *generation* `p` and then written with that
//! of generation `p + 1`. Generation 0 is zero, so the first pass also proves that memory nobody
//! touched reads zero. A page is walked in *chunks* of 64 words; after each chunk the guest counts a
//! *tick* and looks at its clock, and the time since the look before is a *gap*. What the guest knows
//! about itself it writes into one page, the *mailbox*.
//!
//! A guest has 1 to 8 vCPUs. Each has a mailbox, stacks and a share of the work area of its own, and does
//! in it what a guest with one does. One word is shared: each counts its ticks there, too, with a locked
//! instruction, so a tick that was lost or counted twice makes the sum of all differ from it ([`Tally`]).
//!
//! There are two guests with one behaviour:
//!
//! - machine code for KVM's vCPUs, made by [`Image`], which runs in 64-bit mode at privilege level 3;
//! - [`Walk`], the same walk in Rust, for a vCPU that is a thread where there is no KVM.
//!
//! Both keep their live state outside of memory (in registers, in a struct), so that state which an
//! update loses shows: as registers that do not agree with each other, or as wrong words in the
//! memory that the guest checks or writes next.
//!
//! The host reads and asks through [`Mailbox`] and [`Mailboxes`], and with the guest stopped it proves every
//! byte by itself with [`check`]: it needs no more than a way to read the memory. It can also have a vCPU
//! switch the machine off, reset it or crash ([`Command`]), and talk at a serial console.
//!
//! ```no_run
//! # fn write(_offset: u64, _bytes: &[u8]) {}
//! # fn main() -> Result<(), pulse::ImageError> {
//! let image = pulse::Image::new(64 << 20, &pulse::Options::new(2_600_000))?;
//! for slot in pulse::slots(64 << 20) {
//!     // one KVM memory slot: slot.len_bytes of the file from slot.offset_bytes at slot.guest_address
//! }
//! for (offset, bytes) in image.pieces() {
//!     write(offset, bytes);
//! }
//! for start in image.starts() {
//!     // one vCPU each: vcpu.set_sregs(&start.sregs(vcpu.get_sregs()?)); vcpu.set_regs(&start.regs()); …
//! }
//! # Ok(())
//! # }
//! ```
//!
//! Not here: KVM itself, threads, the memory (all of them the VMM's).
#![forbid(unsafe_code)]

mod boot;
pub mod check;
mod layout;
mod mailbox;
mod mailboxes;
mod pattern;
pub mod ports;
mod program;
mod report;
#[cfg(test)]
mod rig;
mod thread;

pub use boot::{Image, ImageError, Options, Start};
pub use layout::{
    CHUNK_BYTES, CHUNK_WORDS, HUGE_PAGE_BYTES, Layout, LayoutError, MAILBOX_OFFSET, MAX_MEMORY_BYTES,
    MAX_VCPUS, MIN_MEMORY_BYTES, PAGE_BYTES, SHARED_OFFSET, Slot, slots,
};
pub use mailbox::{
    BadWord, Fault, Gap, Mailbox, MailboxError, Pause, Probe, Progress, SharedWords, Words, word,
};
pub use mailboxes::{Mailboxes, Tally};
pub use pattern::Line;
pub use ports::{Command, Outside};
pub use program::Vectors;
pub use report::{REPORT_PORT, Report};
pub use thread::{ENCODED_BYTES, Walk, WalkError};
