//! KVM takes the state that an image starts with. That the program runs is tested where there is a
//! memory for it: in the VMM.

use kvm_bindings::KVM_MAX_CPUID_ENTRIES;
use kvm_ioctls::{Kvm, VcpuFd, VmFd};
use pulse::{Image, Options, Vectors};

/// A vCPU of a VM without memory, and the widest vectors that it has.
fn vcpu() -> (VmFd, VcpuFd, Vectors) {
    let kvm = Kvm::new().expect("/dev/kvm opens");
    let vm = kvm.create_vm().expect("a VM");
    let vcpu = vm.create_vcpu(0).expect("a vCPU");
    let cpuid = kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES).expect("the CPUID that KVM supports");
    vcpu.set_cpuid2(&cpuid).expect("KVM takes its own CPUID");
    (vm, vcpu, Vectors::widest(cpuid.as_slice()))
}

#[test]
fn kvm_takes_the_starting_registers_and_gives_them_back() {
    harness::need!(kvm);
    let (_vm, vcpu, widest) = vcpu();
    for vectors in [Vectors::Sse2, widest] {
        let options = Options { vectors, ..Options::new(1_000_000) };
        let image = Image::new(64 << 20, &options).unwrap();
        let sregs = image.sregs(vcpu.get_sregs().unwrap());
        vcpu.set_sregs(&sregs).unwrap();
        vcpu.set_regs(&image.regs()).unwrap();
        assert_eq!(vcpu.get_regs().unwrap(), image.regs());
        let found = vcpu.get_sregs().unwrap();
        assert_eq!((found.cs, found.ss), (sregs.cs, sregs.ss));
        assert_eq!(found.gs.base, sregs.gs.base);
        assert_eq!((found.tr.base, found.tr.limit), (sregs.tr.base, sregs.tr.limit));
        assert_eq!((found.gdt, found.idt), (sregs.gdt, sregs.idt));
        assert_eq!((found.cr0, found.cr3, found.cr4), (sregs.cr0, sregs.cr3, sregs.cr4));
        assert_eq!(found.efer, sregs.efer);
    }
}

#[test]
fn kvm_takes_the_extended_control_registers_of_wide_vectors() {
    harness::need!(kvm);
    let (_vm, vcpu, vectors) = vcpu();
    let options = Options { vectors, ..Options::new(1_000_000) };
    let image = Image::new(64 << 20, &options).unwrap();
    let xcrs = image.xcrs(vcpu.get_xcrs().unwrap());
    vcpu.set_xcrs(&xcrs).unwrap();
    let found = vcpu.get_xcrs().unwrap();
    let expected = if vectors == Vectors::Avx2 { 7 } else { xcrs.xcrs[0].value };
    assert_eq!(found.xcrs[0].value, expected);
}
