//! vCPU and VM state as typed groups, and what kvm-ioctls leaves out.
//!
//! KVM's state belongs to the process that made it, so a machine that changes hands gets a new VM object
//! in the successor, made ready while the guest still runs in the old one, and only the *state* crosses
//! in the pause. The words:
//!
//! - A [`Vm`] is one VM object with its interrupt controllers; [`VmBuilder`] makes it in the order that is
//!   fast. [`Capabilities`] is what its KVM can do, asked of KVM and of nothing else.
//! - [`MemorySlots`] gives the guest memory, and keeps that memory mapped for as long as it does.
//! - A [`Vcpu`] runs until an exit ends the run or a [`Kicker`] stops it, and can be saved whenever it
//!   has stopped.
//! - A *group* ([`VcpuGroup`], [`VmGroup`]) is what one ioctl saves and loads. A [`VcpuState`] or
//!   [`VmState`] is a list of them; a [`Saver`] fills it and a [`Loader`] gives it to another vCPU.
//!   [`Cpuid`] and [`Contents`] cross before the pause.
//!
//! # The steps of an update
//!
//! | guest | predecessor | successor |
//! | --- | --- | --- |
//! | runs | [`Cpuid::of`]; [`Saver::prepare`], [`Saver::contents`] when each vCPU is made | |
//! | runs | | [`VmBuilder::create`], [`MemorySlots::add`], [`VmBuilder::finish`], [`Vm::create_vcpu`]; per vCPU [`Cpuid::load`], [`Loader::prepare`], [`Loader::check`] |
//! | stops | [`Kicker::kick`], until each [`Vcpu::run`] returned | |
//! | stopped | [`VmState::save`], then [`Saver::save`] per vCPU | |
//! | stopped | | [`Loader::load`] per vCPU, [`VmState::load`], [`Loader::finish`] per vCPU |
//! | runs | | [`Vcpu::run`] |
//! | runs | ends: vCPUs, memory slots, VM | |
//!
//! What the VMM itself gave its VM, beyond what [`VmBuilder`] does, it gives the new one too: interrupt
//! routes, irqfds and ioeventfds, further capabilities (`KVM_CAP_X2APIC_API` changes what a LAPIC's state
//! looks like), and the permission to use extended state that a process has to ask for (AMX).
//!
//! Not here: the memory itself, devices, who owns the machine, and how bytes get to the successor.
//!
//! Only x86-64. A guest that uses nested virtualization is refused when it is saved.
#![expect(unsafe_code, reason = "ioctls, a mapping of the vCPU's page, and signals are system calls")]

mod capabilities;
mod contents;
mod cpuid;
pub mod guest_memfd;
mod ioctl;
mod kick;
mod last_registers;
mod msr;
mod of_region;
mod slots;
mod state;
mod vcpu;
mod vcpu_groups;
mod vcpu_state;
mod vm;
mod vm_state;

pub use kvm_bindings;
pub use kvm_ioctls;

pub use capabilities::{Capabilities, CapabilitiesError};
pub use contents::Contents;
pub use cpuid::{Cpuid, CpuidError};
pub use guest_memfd::{GuestMemfdError, GuestMemfdFlags};
pub use kick::{KickError, Kicker, SignalError, kick_signal};
pub use last_registers::LastRegisters;
pub use slots::{Binding, HostMemory, MemorySlots, SlotError, SlotFlags, SlotHandle, SlotRange};
pub use state::{Fault, StateError, VcpuGroup, VmGroup};
pub use vcpu::{MemoryFault, RunError, Stopped, Vcpu, VcpuError};
pub use vcpu_state::{LoadError, Loader, PrepareError, SaveError, Saver, VcpuState};
pub use vm::{Irqchip, Vm, VmBuilder, VmError, descriptor};
pub use vm_state::{VmLoadError, VmSaveError, VmState};

/// Unit of memory slots and guest_memfds, in bytes.
const PAGE_SIZE: u64 = 4096;
