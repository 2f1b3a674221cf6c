//! A VM with one vCPU, ready to be loaded.

use std::sync::Arc;

use kvm_bindings as bind;
use kvm_bindings::CpuId;
use kvm_ioctls::{Kvm, VcpuFd, VmFd};

use crate::{FloorError, PlainMemory, kvm};

/// Interrupt pins of the split interrupt controller, as many as the reference VMM's.
const PINS: u64 = 24;

/// A piece of the memory, and where the guest sees it. In bytes, in whole pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Slot {
    /// Guest physical address of its first byte.
    pub guest_address: u64,
    /// Offset of its first byte in the memory.
    pub offset_bytes: u64,
    /// How many bytes.
    pub len_bytes: u64,
}

/// What each VM of a guest is made from.
#[derive(Debug)]
pub(crate) struct Model {
    pub(crate) kvm: Kvm,
    pub(crate) memory: Arc<PlainMemory>,
    pub(crate) slots: Vec<Slot>,
    pub(crate) cpuid: CpuId,
}

/// A VM and its vCPU.
#[derive(Debug)]
pub(crate) struct Vm {
    // Dropped in this order: the memory outlives the VM that has its addresses.
    pub(crate) vcpu: VcpuFd,
    pub(crate) fd: VmFd,
    _memory: Arc<PlainMemory>,
}

impl Vm {
    /// Makes it in the order that is fast: slots, then interrupt controller, vCPU, CPUID.
    pub(crate) fn make(model: &Model) -> Result<Self, FloorError> {
        let fd = model.kvm.create_vm().map_err(kvm("make a VM"))?;
        for cap in [bind::KVM_CAP_EXCEPTION_PAYLOAD, bind::KVM_CAP_X86_TRIPLE_FAULT_EVENT] {
            if extension(&fd, cap) > 0 {
                enable(&fd, cap, 1)?;
            }
        }
        for (number, slot) in (0..).zip(&model.slots) {
            let end = slot.offset_bytes.checked_add(slot.len_bytes);
            assert!(end.is_some_and(|end| end <= model.memory.len_bytes()), "{slot:?}");
            let region = bind::kvm_userspace_memory_region {
                slot: number,
                flags: 0,
                guest_phys_addr: slot.guest_address,
                memory_size: slot.len_bytes,
                // A usize is at most 64 bits wide on every target of Rust.
                userspace_addr: model.memory.host_address() as u64 + slot.offset_bytes,
            };
            // SAFETY: the range lies in the memory, as asserted, which stays mapped as long as the `Arc` in this
            // value lives: longer than the VM. Its bytes are accessed as atomics only.
            unsafe { fd.set_user_memory_region(region) }.map_err(kvm("make a memory slot"))?;
        }
        enable(&fd, bind::KVM_CAP_SPLIT_IRQCHIP, PINS)?;
        let vcpu = fd.create_vcpu(0).map_err(kvm("make a vCPU"))?;
        vcpu.set_cpuid2(&model.cpuid).map_err(kvm("set CPUID"))?;
        Ok(Self { vcpu, fd, _memory: Arc::clone(&model.memory) })
    }
}

/// The answer of `KVM_CHECK_EXTENSION` for this VM; 0 for a capability that KVM does not know.
pub(crate) fn extension(fd: &VmFd, cap: u32) -> u32 {
    u32::try_from(fd.check_extension_raw(cap.into())).unwrap_or(0)
}

fn enable(fd: &VmFd, cap: u32, argument: u64) -> Result<(), FloorError> {
    let mut request = bind::kvm_enable_cap { cap, ..Default::default() };
    request.args[0] = argument;
    fd.enable_cap(&request).map_err(kvm("enable a capability"))
}
