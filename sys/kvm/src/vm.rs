//! The VM object: made in the order that is fast, with its interrupt controllers as one choice.

use std::io;
use std::os::fd::{AsRawFd as _, BorrowedFd, OwnedFd};
use std::sync::Arc;

use kvm_bindings as bind;
use kvm_ioctls::{Kvm, VmFd};

use crate::capabilities::{Capabilities, CapabilitiesError};
use crate::guest_memfd::{self, GuestMemfdError, GuestMemfdFlags};
use crate::slots::{HostMemory, MemorySlots};
use crate::vcpu::{Vcpu, VcpuError};

/// A descriptor of a VM object of one's own, as what a kernel that can is to preserve it by.
///
/// # Errors
/// If this process can have no more descriptors.
pub fn descriptor(vm: &VmFd) -> io::Result<OwnedFd> {
    // SAFETY: the VM object keeps its descriptor open, and is borrowed for longer than this is.
    let fd = unsafe { BorrowedFd::borrow_raw(vm.as_raw_fd()) };
    fd.try_clone_to_owned()
}

/// Which interrupt controllers of a VM are inside KVM.
///
/// The successor of a VM is to have the same: its state loads into no other.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Irqchip {
    /// None: the VMM injects each interrupt into each vCPU.
    None,
    /// The LAPICs only; PIC, IOAPIC and PIT are the VMM's. The VM ends in 0.1 ms instead of tens.
    Split {
        /// Pins of the VMM's IOAPIC, for which KVM reserves interrupt routes. A PC has 24.
        pins: u32,
    },
    /// The LAPICs, the two PICs and an IOAPIC.
    Full {
        /// With the interval timer (PIT).
        pit: bool,
    },
}

impl Irqchip {
    /// Whether vCPUs have their LAPIC inside KVM.
    #[must_use]
    pub const fn has_lapic(self) -> bool {
        !matches!(self, Self::None)
    }

    /// Whether the PICs and the IOAPIC are inside KVM.
    #[must_use]
    pub const fn has_pics(self) -> bool {
        matches!(self, Self::Full { .. })
    }

    /// Whether the PIT is inside KVM.
    #[must_use]
    pub const fn has_pit(self) -> bool {
        matches!(self, Self::Full { pit: true })
    }
}

/// Why a VM could not be made.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum VmError {
    /// `KVM_CREATE_VM` failed.
    #[error("KVM_CREATE_VM failed")]
    Create(#[source] kvm_ioctls::Error),
    /// What the KVM can do could not be found out.
    #[error("the capabilities of this KVM could not be found out")]
    Capabilities(#[from] CapabilitiesError),
    /// KVM offers a capability and refused to enable it.
    #[error("KVM offers {name} and refused to enable it")]
    Enable {
        /// The kernel's name of the capability.
        name: &'static str,
        /// What the kernel said.
        #[source]
        source: kvm_ioctls::Error,
    },
    /// This KVM cannot have these interrupt controllers.
    #[error("this KVM cannot have the interrupt controllers {irqchip:?} inside")]
    NoIrqchip {
        /// The controllers asked for.
        irqchip: Irqchip,
    },
    /// KVM failed to make the interrupt controllers.
    #[error("KVM failed to make the interrupt controllers {irqchip:?}")]
    Irqchip {
        /// The controllers asked for.
        irqchip: Irqchip,
        /// What the kernel said.
        #[source]
        source: kvm_ioctls::Error,
    },
}

/// A VM object that has no interrupt controllers yet: the time for its memory slots.
///
/// KVM waits for 6 to 11 ms in the first memory slot after `KVM_CREATE_IRQCHIP`, and not at all in one
/// before it. Hence the order: [`create`](Self::create), slots, [`finish`](Self::finish), vCPUs.
#[derive(Debug)]
pub struct VmBuilder {
    fd: Arc<VmFd>,
    capabilities: Capabilities,
}

impl VmBuilder {
    /// Makes a VM object, finds out what it can do, and enables what makes its state complete: a pending
    /// exception that can be told from an injected one, and a pending triple fault.
    ///
    /// # Errors
    ///
    /// See [`VmError`].
    pub fn create(kvm: &Kvm) -> Result<Self, VmError> {
        Self::prepare(kvm, Arc::new(kvm.create_vm().map_err(VmError::Create)?))
    }

    fn prepare(kvm: &Kvm, fd: Arc<VmFd>) -> Result<Self, VmError> {
        let capabilities = Capabilities::probe(kvm, &fd)?;
        if capabilities.exception_payload {
            enable(&fd, bind::KVM_CAP_EXCEPTION_PAYLOAD, "KVM_CAP_EXCEPTION_PAYLOAD")?;
        }
        if capabilities.triple_fault_event {
            enable(&fd, bind::KVM_CAP_X86_TRIPLE_FAULT_EVENT, "KVM_CAP_X86_TRIPLE_FAULT_EVENT")?;
        }
        Ok(Self { fd, capabilities })
    }

    /// The VM's descriptor, for what has to be set before there are interrupt controllers or vCPUs.
    #[must_use]
    pub const fn fd(&self) -> &Arc<VmFd> {
        &self.fd
    }

    /// What the VM can do.
    #[must_use]
    pub const fn capabilities(&self) -> &Capabilities {
        &self.capabilities
    }

    /// The VM's memory slots, of which there are none yet.
    #[must_use]
    pub fn memory_slots<M: HostMemory + Clone>(&self) -> MemorySlots<M> {
        MemorySlots::new(Arc::clone(&self.fd))
    }

    /// Makes the interrupt controllers, and so the VM ready for vCPUs.
    ///
    /// # Errors
    ///
    /// See [`VmError`].
    pub fn finish(self, irqchip: Irqchip) -> Result<Vm, VmError> {
        let Self { fd, capabilities } = self;
        let possible = match irqchip {
            Irqchip::None => true,
            Irqchip::Split { .. } => capabilities.split_irqchip,
            Irqchip::Full { pit } => capabilities.irqchip && (!pit || capabilities.pit2),
        };
        if !possible {
            return Err(VmError::NoIrqchip { irqchip });
        }
        let failed = |source| VmError::Irqchip { irqchip, source };
        match irqchip {
            Irqchip::None => {}
            Irqchip::Split { pins } => {
                let mut cap = bind::kvm_enable_cap { cap: bind::KVM_CAP_SPLIT_IRQCHIP, ..Default::default() };
                cap.args[0] = u64::from(pins);
                fd.enable_cap(&cap).map_err(failed)?;
            }
            Irqchip::Full { pit } => {
                fd.create_irq_chip().map_err(failed)?;
                if pit {
                    // With the dummy speaker port KVM answers port 0x61 too, which a guest reads to
                    // measure time by the PIT.
                    let config =
                        bind::kvm_pit_config { flags: bind::KVM_PIT_SPEAKER_DUMMY, ..Default::default() };
                    fd.create_pit2(config).map_err(failed)?;
                }
            }
        }
        Ok(Vm { fd, capabilities: Arc::new(capabilities), irqchip })
    }
}

fn enable(fd: &VmFd, cap: u32, name: &'static str) -> Result<(), VmError> {
    let mut request = bind::kvm_enable_cap { cap, ..Default::default() };
    request.args[0] = 1;
    fd.enable_cap(&request).map_err(|source| VmError::Enable { name, source })
}

/// A VM object with its interrupt controllers.
///
/// The kernel's object lives until the last of its descriptors is closed: this one's and its clones', the
/// vCPUs', those of its guest_memfds.
#[derive(Clone, Debug)]
pub struct Vm {
    fd: Arc<VmFd>,
    capabilities: Arc<Capabilities>,
    irqchip: Irqchip,
}

impl Vm {
    /// Takes up a VM object that was made by other means and has these interrupt controllers already.
    ///
    /// # Errors
    ///
    /// See [`VmError`].
    pub fn adopt(kvm: &Kvm, fd: Arc<VmFd>, irqchip: Irqchip) -> Result<Self, VmError> {
        let VmBuilder { fd, capabilities } = VmBuilder::prepare(kvm, fd)?;
        Ok(Self { fd, capabilities: Arc::new(capabilities), irqchip })
    }

    /// The VM's descriptor.
    #[must_use]
    pub const fn fd(&self) -> &Arc<VmFd> {
        &self.fd
    }

    /// What the VM can do.
    #[must_use]
    pub const fn capabilities(&self) -> &Arc<Capabilities> {
        &self.capabilities
    }

    /// Its interrupt controllers.
    #[must_use]
    pub const fn irqchip(&self) -> Irqchip {
        self.irqchip
    }

    /// Makes the vCPU with this number, which is its APIC id as well.
    ///
    /// # Errors
    ///
    /// See [`VcpuError`].
    pub fn create_vcpu(&self, id: u32) -> Result<Vcpu, VcpuError> {
        let fd = self.fd.create_vcpu(u64::from(id)).map_err(|source| VcpuError::Create { id, source })?;
        Vcpu::adopt(self, fd)
    }

    /// Makes a guest_memfd for this VM; see [`guest_memfd::create`].
    ///
    /// # Errors
    ///
    /// See [`GuestMemfdError`].
    pub fn create_guest_memfd(
        &self,
        size_bytes: u64,
        flags: GuestMemfdFlags,
    ) -> Result<std::os::fd::OwnedFd, GuestMemfdError> {
        guest_memfd::create(&self.fd, size_bytes, flags)
    }
}
