//! What a KVM can do, asked of KVM itself and of nothing else.
//!
//! The names of hosts, kernels and processors say nothing here: every field is the answer of one
//! `KVM_CHECK_EXTENSION` for the VM at hand, or of the ioctl that the field names.

use std::ffi::c_ulong;
use std::num::NonZeroU32;

use kvm_bindings as bind;
use kvm_ioctls::{Kvm, VmFd};

use crate::guest_memfd::{self, GuestMemfdFlags};
use crate::ioctl;

/// What the KVM of one VM can do, as far as this crate makes a difference of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Capabilities {
    /// Extended control registers (`KVM_CAP_XCRS`).
    pub xcrs: bool,
    /// Debug registers (`KVM_CAP_DEBUGREGS`).
    pub debug_registers: bool,
    /// Pending and injected events (`KVM_CAP_VCPU_EVENTS`).
    pub vcpu_events: bool,
    /// An exception that is pending can be told from one that is injected, with its payload
    /// (`KVM_CAP_EXCEPTION_PAYLOAD`).
    pub exception_payload: bool,
    /// A pending triple fault is part of the events (`KVM_CAP_X86_TRIPLE_FAULT_EVENT`).
    pub triple_fault_event: bool,
    /// Whether a vCPU runs, halts or waits to be started (`KVM_CAP_MP_STATE`).
    pub mp_state: bool,
    /// Interrupt controllers inside KVM (`KVM_CAP_IRQCHIP`).
    pub irqchip: bool,
    /// LAPICs inside KVM with the rest outside (`KVM_CAP_SPLIT_IRQCHIP`).
    pub split_irqchip: bool,
    /// An interval timer inside KVM, and its state (`KVM_CAP_PIT2`, `KVM_CAP_PIT_STATE2`).
    pub pit2: bool,
    /// `KVM_CLOCK_*` flags that `KVM_GET_CLOCK` and `KVM_SET_CLOCK` know; `None` without the ioctls
    /// (`KVM_CAP_ADJUST_CLOCK`).
    pub clock_flags: Option<u32>,
    /// The frequency of a vCPU's TSC can be asked (`KVM_CAP_GET_TSC_KHZ`).
    pub tsc_khz: bool,
    /// The frequency of a vCPU's TSC can be another than the host's (`KVM_CAP_TSC_CONTROL`).
    pub tsc_control: bool,
    /// How fast the host's TSC runs, in kHz, as KVM reckons with it; `None` if it does not say (`KVM_GET_TSC_KHZ` of the VM, to
    /// which no other frequency has been given when it is asked).
    pub host_tsc_khz: Option<NonZeroU32>,
    /// State of a guest that is itself a hypervisor (`KVM_CAP_NESTED_STATE`). This crate looks at it
    /// only to refuse such a guest.
    pub nested_state: bool,
    /// `KVM_SYNC_X86_*` parts of the state that KVM can copy to the `kvm_run` page at each exit
    /// (`KVM_CAP_SYNC_REGS`).
    pub sync_registers: u32,
    /// `KVM_RUN` can be told to return at once (`KVM_CAP_IMMEDIATE_EXIT`).
    pub immediate_exit: bool,
    /// Memory slots that a VM can have (`KVM_CAP_NR_MEMSLOTS`).
    pub memory_slots: u32,
    /// Memory slots that the guest may only read (`KVM_CAP_READONLY_MEM`).
    pub read_only_slots: bool,
    /// Memory slots that are bound to a guest_memfd (`KVM_CAP_USER_MEMORY2`).
    pub bound_slots: bool,
    /// Flags with which a guest_memfd can be made; `None` if none can be made (`KVM_CAP_GUEST_MEMFD`,
    /// `KVM_CAP_GUEST_MEMFD_FLAGS`).
    pub guest_memfd: Option<GuestMemfdFlags>,
    /// Model-specific registers that make up a vCPU's state (`KVM_GET_MSR_INDEX_LIST`), in KVM's order.
    pub msr_indices: Vec<u32>,
}

/// Why [`Capabilities::probe`] failed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum CapabilitiesError {
    /// KVM did not say which MSRs it keeps.
    #[error("KVM_GET_MSR_INDEX_LIST failed")]
    MsrIndexList(#[source] kvm_ioctls::Error),
}

impl Capabilities {
    /// Asks the KVM of this VM.
    ///
    /// # Errors
    ///
    /// [`CapabilitiesError`] if KVM keeps its list of MSRs to itself. Whatever else it cannot do is no
    /// error but a field that says so.
    pub fn probe(kvm: &Kvm, vm: &VmFd) -> Result<Self, CapabilitiesError> {
        let has = |cap| extension(vm, cap) > 0;
        let msrs = kvm.get_msr_index_list().map_err(CapabilitiesError::MsrIndexList)?;
        Ok(Self {
            xcrs: has(bind::KVM_CAP_XCRS),
            debug_registers: has(bind::KVM_CAP_DEBUGREGS),
            vcpu_events: has(bind::KVM_CAP_VCPU_EVENTS),
            exception_payload: has(bind::KVM_CAP_EXCEPTION_PAYLOAD),
            triple_fault_event: has(bind::KVM_CAP_X86_TRIPLE_FAULT_EVENT),
            mp_state: has(bind::KVM_CAP_MP_STATE),
            irqchip: has(bind::KVM_CAP_IRQCHIP),
            split_irqchip: has(bind::KVM_CAP_SPLIT_IRQCHIP),
            pit2: has(bind::KVM_CAP_PIT2) && has(bind::KVM_CAP_PIT_STATE2),
            clock_flags: match extension(vm, bind::KVM_CAP_ADJUST_CLOCK) {
                0 => None,
                flags => Some(flags),
            },
            tsc_khz: has(bind::KVM_CAP_GET_TSC_KHZ),
            tsc_control: has(bind::KVM_CAP_TSC_CONTROL),
            host_tsc_khz: ioctl::vm_tsc_khz(vm),
            nested_state: has(bind::KVM_CAP_NESTED_STATE),
            sync_registers: extension(vm, bind::KVM_CAP_SYNC_REGS),
            immediate_exit: has(bind::KVM_CAP_IMMEDIATE_EXIT),
            memory_slots: extension(vm, bind::KVM_CAP_NR_MEMSLOTS),
            read_only_slots: has(bind::KVM_CAP_READONLY_MEM),
            bound_slots: has(bind::KVM_CAP_USER_MEMORY2),
            guest_memfd: guest_memfd::accepted_flags(vm),
            msr_indices: msrs.as_slice().to_vec(),
        })
    }
}

/// The answer of `KVM_CHECK_EXTENSION` for this VM; 0 for a capability that KVM does not know.
pub(crate) fn extension(vm: &VmFd, cap: u32) -> u32 {
    u32::try_from(vm.check_extension_raw(c_ulong::from(cap))).unwrap_or(0)
}
