//! Faults of guest memory: mapped ahead of time, or held back.
//!
//! - A *fault* is a thread's, a vCPU's or the kernel's access to a page of a mapping that this
//!   address space has no entry for. It is *missing* if the file has no page there either (a
//!   *hole*), and *minor* if it has one.
//! - A [`Mapped`] is memory that may be spoken of here: a shared mapping of one file.
//! - A [`Uffd`] is one userfaultfd: the kernel gives it the faults of the ranges registered with
//!   it, in this address space and no other. What a missing fault meets is fixed when it is opened:
//!   it [parks](OnHole::Park) or it is [refused](OnHole::Refuse).
//! - A [`Hold`] is the freeze of one mapping: while it stands, no access through this address space
//!   adds a page to the file.
//! - [`populate()`] makes entries for the pages that are present, and for those only, so that a new
//!   process does not pay for each of them with a fault.
//!
//! What is not bound by any of this: other processes that map the file, and calls on its descriptor
//! (`fallocate`, `write`). A child made by fork has the mapping without the registration.
//!
//! Not here: making and mapping regions, and the gate that keeps this process's own allocations out
//! while memory is frozen.

#![expect(
    unsafe_code,
    reason = "the userfaultfd ioctls and madvise take addresses, and no safe wrapper knows what lies there"
)]

mod fd;
pub mod hold;
mod ioctl;
mod mapped;
mod of_region;
pub mod populate;

pub use fd::{
    CallError, Continued, Fault, FaultKind, Features, Mode, OnHole, OpenError, RangeError, Stopped, Uffd,
};
pub use hold::{Faults, Hold, Parked};
pub use mapped::Mapped;
pub use populate::{Activity, Method, PopulateError, Populated, Refusal, populate, populate_by_seek};
