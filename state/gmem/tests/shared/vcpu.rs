//! A vCPU for a guest in 16-bit code.

use kvm::Irqchip;
use kvm::Vcpu;
use kvm::Vm;
use kvm::VmBuilder;

/// Finishes the VM, with one vCPU that starts at the address `code`, below 64 KiB.
pub(crate) fn vcpu_at(builder: VmBuilder, code: u64) -> (Vm, Vcpu) {
    let vm = builder.finish(Irqchip::None).unwrap();
    let vcpu = vm.create_vcpu(0).unwrap();
    let mut special = vcpu.fd().get_sregs().unwrap();
    (special.cs.base, special.cs.selector) = (0, 0);
    vcpu.fd().set_sregs(&special).unwrap();
    let registers = kvm::kvm_bindings::kvm_regs { rip: code, rflags: 2, ..Default::default() };
    vcpu.fd().set_regs(&registers).unwrap();
    (vm, vcpu)
}
