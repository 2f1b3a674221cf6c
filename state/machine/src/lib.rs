//! The virtual machine as a thing, served by one process after another.
//!
//! A [`Machine`] is what a VMM holds while it runs the guest: the arena with its metadata and its guest memory,
//! the session that keeps them, and the ownership word. A process that takes over goes through three types,
//! each of which proves what may be done:
//!
//! | type | the guest | proves |
//! | --- | --- | --- |
//! | [`Incoming`] | runs in the predecessor | the arena was checked and is mapped; nothing may be written |
//! | [`Claimed`] | stands still | this process alone loads the machine's state |
//! | [`Machine`] | may run here | this process owns the machine |
//!
//! ```text
//! predecessor  Machine ── seal ──▶ (sealed) ── unseal ──▶ Machine        gone back
//!                                     │
//! successor    Incoming ────────── claim ──▶ Claimed ── run ──▶ Machine  taken over
//! ```
//!
//! Whoever runs the guest has swapped the ownership word to RUNNING under its own nonce, and [`ownership`]
//! says why there is never a second one.
//!
//! Not here: how the regions get to another process (carriers), what the state of a vCPU is (`kvm`).
#![forbid(unsafe_code)]

mod foreign;
mod handlers;
mod incoming;
mod layout;
mod machine;
pub mod ownership;
pub mod update;
mod vm_file;

pub use abi::arena::Nonce;
pub use abi::arena::OwnershipState;
pub use abi::arena::OwnershipWord;
pub use abi::foreign::FdKind;
pub use abi::foreign::FdName;
pub use abi::gmem::MemoryName;
pub use abi::luo::SessionName;
pub use abi::state::StateName;
pub use abi::vm::Identity;
pub use foreign::FdError;
pub use foreign::Fds;
pub use foreign::KeepError;
pub use foreign::MAX_FDS;
pub use handlers::StateFile;
pub use incoming::AttachError;
pub use incoming::ClaimError;
pub use incoming::Claimed;
pub use incoming::Incoming;
pub use incoming::OfferedRegion;
pub use incoming::accept_region0;
pub use layout::MemoryPlace;
pub use machine::CreateError;
pub use machine::Machine;
pub use machine::Memory;
pub use machine::MemorySpec;
pub use machine::MemoryStore;
pub use machine::SealError;
pub use machine::SettleError;
pub use machine::Spec;
pub use machine::TableError;
pub use machine::UnsealError;
pub use machine::readable_formats;
pub use vm_file::Created;
pub use vm_file::Origin;
pub use vm_file::VmFile;
