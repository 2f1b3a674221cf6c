//! The least that moving a guest to another VM can cost: what Tideover is measured against.
//!
//! A [`Guest`] is one vCPU on [`PlainMemory`], shared memory as any VMM would make it. A *hop* takes it to
//! another VM of the same process: that VM is made beforehand, with its slots, its interrupt controller, its vCPU and
//! its CPUID, while the guest still runs; then the vCPU leaves `KVM_RUN`, the same thread reads its state
//! with the GET ioctls, writes it with the SET ioctls into the other vCPU, and calls `KVM_RUN` there. Nothing
//! else happens in between: no other process, no message, no ownership, no copy of the state in any
//! format, no second thread.
//!
//! What a [`Hop`] takes is the *floor*: an update of a VMM that is a process of its own has to make the
//! same calls, so its pause less the floor is what Tideover adds.
//!
//! To be worth comparing, none of Tideover's own code is in here: every call is made by kvm-ioctls or by
//! hand. What is called, and in which order, follows `tideover-kvm`, and depends on what the KVM at hand
//! offers, as it does there.
//!
//! Only for benches. There is no error handling beyond stopping: a call that fails ends the guest.
#![expect(unsafe_code, reason = "maps memory, and makes ioctls that kvm-ioctls leaves unsafe or out")]

mod calls;
mod guest;
mod memory;
mod vm;

pub use kvm_bindings;
pub use kvm_ioctls;

pub use guest::{Guest, Hop};
pub use memory::{PageSize, PlainMemory};
pub use vm::Slot;

/// Why the floor could not be measured.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum FloorError {
    /// An ioctl failed.
    #[error("cannot {what}")]
    Kvm {
        /// What was tried.
        what: &'static str,
        /// What the kernel said.
        #[source]
        source: kvm_ioctls::Error,
    },
    /// Another system call failed.
    #[error("cannot {what}")]
    Call {
        /// What was tried.
        what: &'static str,
        /// What the kernel said.
        #[source]
        source: std::io::Error,
    },
    /// KVM read or set fewer model-specific registers than it was given.
    #[error("KVM took {taken} of {given} model-specific registers")]
    Msrs {
        /// Registers that it took.
        taken: usize,
        /// Registers that it was given.
        given: usize,
    },
    /// The guest left KVM for something that it is not known to do.
    #[error("the guest left KVM: {exit}")]
    Exit {
        /// How.
        exit: String,
    },
    /// The guest's thread did not do as it was told in time.
    #[error("the guest did not {what} in time")]
    TimedOut {
        /// What it was told.
        what: &'static str,
    },
    /// The guest's thread has ended.
    #[error("the guest's thread has ended")]
    Ended,
}

pub(crate) fn kvm(what: &'static str) -> impl Fn(kvm_ioctls::Error) -> FloorError {
    move |source| FloorError::Kvm { what, source }
}

pub(crate) fn call(what: &'static str) -> FloorError {
    FloorError::Call { what, source: std::io::Error::last_os_error() }
}
