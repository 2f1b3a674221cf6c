//! The reference VMM: runs `pulse`, and is replaced under it.
//!
//! A VMM process is started as the first of its machine ([`run`]) or as the successor of another ([`succeed`]).
//! Either way it then *serves* ([`serve()`]): it runs the guest and does what comes over the control channel,
//! which goes from VMM to VMM with the machine, so that whoever holds its other end ([`control::Client`])
//! need not notice an update.
//!
//! The guest is a [`KvmGuest`], a VM, or a [`ThreadGuest`], the same work with a thread for each vCPU where
//! there is no KVM. Both are [`Served`], and the machine, the carrier and the control channel know no more
//! of them.
#![forbid(unsafe_code)]

mod backends;
mod board;
mod clients;
pub mod confine;
mod console;
pub mod control;
mod crossing;
mod dump;
mod exits;
mod first;
mod guest;
mod holder;
mod kvm_guest;
mod leave;
pub mod machines;
mod measure;
mod remains;
mod room;
mod serve;
mod service;
mod successor;
mod thread_guest;
mod update;
mod vcpu_thread;

pub use backends::Backends;
pub use dump::Picture;
pub use first::run;
pub use first::run_watched;
pub use guest::End;
pub use guest::GuestError;
pub use guest::Health;
pub use guest::Served;
pub use holder::Brings;
pub use holder::Hold;
pub use holder::Released;
pub use holder::await_ready;
pub use holder::give;
pub use holder::hold;
pub use kvm_guest::KvmGuest;
pub use kvm_guest::NewVm;
pub use kvm_guest::Setup;
pub use pulse::MAX_VCPUS;
pub use serve::Side;
pub use serve::Watch;
pub use serve::serve;
pub use service::serve_unit;
pub use successor::Start;
pub use successor::formats;
pub use successor::succeed;
pub use successor::succeed_watched;
pub use thread_guest::ThreadGuest;
