//! Linux's live update: open files that outlive a kernel.
//!
//! Since Linux 6.19, with `CONFIG_LIVEUPDATE` and `liveupdate=on` (and, unless the kernel was built so, `kho=on`) on the
//! kernel's command line, `/dev/liveupdate` takes open files into *sessions* that the next kernel has, if that is booted by
//! a kexec whose image [`kexec::load`] loaded. What kinds of file, the kernel decides: memfds since 6.19.
//!
//! ```no_run
//! use std::os::fd::AsFd;
//! use tideover_liveupdate::{Device, Name};
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! # let memory = std::fs::File::open("/dev/null")?;
//! // Before the kexec. Who holds the session's descriptor when the kernel jumps need not be this process.
//! let mut session = Device::open()?.create(&Name::new(b"guest")?)?;
//! session.preserve(1, memory.as_fd())?;
//! tideover_liveupdate::kexec::execute()?;
//! # Ok(()) }
//! ```
//!
//! and in the next kernel:
//!
//! ```no_run
//! # use tideover_liveupdate::{Device, Name};
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let mut session = Device::open()?.retrieve(&Name::new(b"guest")?)?;
//! let memory = session.retrieve(1)?;
//! session.finish()?;
//! # drop(memory); Ok(()) }
//! ```
//!
//! The host's file systems are made to stand still for it by [`filesystems`]. How much time a guest missed is told by [`moment`].
//!
//! # Traps
//!
//! What the kernel's interface lets one do that nobody wants, and what becomes of it here:
//!
//! | trap | here |
//! | --- | --- |
//! | An answer that cannot be written leaves each call half done; a session that was to be retrieved is destroyed | cannot happen: answers go to this crate's own memory |
//! | A name that is empty, too long or has a NUL in it is refused by one call and never found by another | cannot happen: a [`Name`] has none of it |
//! | Commands of one direction are given to a session of the other | cannot happen: [`Outgoing`] and [`Incoming`] are two types |
//! | Closing a retrieved session finishes it, and destroys each file that was not retrieved; if that is refused, nobody hears, and nobody reaches the session again | named: see [`Incoming`]; [`Incoming::finish`] gives the session back if it is refused |
//! | A retrieve that fails goes on failing: it is not tried again | named: [`RetrieveError::Failed`] |
//! | An outgoing session dies with its last descriptor, and with the process that has it | named: see [`Outgoing`] |
//! | A file that was retrieved can be preserved again only when its session is finished | named: [`PreserveError::Busy`] |
//! | The device has one user at a time, and its first opening reads what the kernel before left; if that fails, nothing of it is ever reached | named: [`OpenError`] |
//! | KVM and others that bring handlers have to be there before that first opening | say so to your init: it cannot be asked |
//! | An image that kexec_load(2) loaded takes no session along, and nobody objects | [`kexec::load`] uses kexec_file_load(2); that another image was loaded since cannot be asked |
//! | From the reboot call on, each call on a session or the device waits until the kernel is gone | call [`kexec::execute`] last |
//!
//! Defects of Linux 7.3 that a user meets: a session name that is created twice when 51 sessions (or a multiple) exist makes the
//! *next* kernel panic. Do not create a name twice to see whether it is there.
#![expect(
    unsafe_code,
    reason = "makes the ioctls of /dev/liveupdate, and the kexec_file_load call, and reads the TSC"
)]

mod device;
pub mod filesystems;
mod ioctl;
pub mod kexec;
#[cfg(target_arch = "x86_64")]
pub mod moment;
mod name;
mod session;

pub use device::CreateError;
pub use device::Device;
pub use device::FindError;
pub use device::OpenError;
pub use name::Name;
pub use name::NameError;
pub use session::FinishError;
pub use session::Incoming;
pub use session::Outgoing;
pub use session::PreserveError;
pub use session::RetrieveError;
pub use session::Unfinished;
