//! A VM with one vCPU and full interrupt controllers, whose exits go to a bus.

use std::ops::ControlFlow;
use std::sync::Arc;

use devices::Bus;
use devices::GuestMemory;
use devices::linux::Loaded;
use kvm::Cpuid;
use kvm::Irqchip;
use kvm::Loader;
use kvm::MemorySlots;
use kvm::Saver;
use kvm::SlotFlags;
use kvm::Stopped;
use kvm::Vcpu;
use kvm::VcpuState;
use kvm::Vm;
use kvm::VmBuilder;
use kvm::VmState;
use kvm_ioctls::Kvm;
use kvm_ioctls::VcpuExit;
use region::Mapping;
use region::Region;

use crate::image::slots_of;

/// Guest memory, and how it is reached from both sides.
pub(crate) struct Ram {
    mapping: Arc<Mapping>,
    pub(crate) memory: GuestMemory,
}

impl Ram {
    pub(crate) fn new(len_bytes: u64) -> Self {
        let mapping = Arc::new(Region::create("ram", len_bytes).unwrap().map().unwrap());
        let memory = GuestMemory::new(slots_of(&mapping, &[(0, len_bytes)])).unwrap();
        Self { mapping, memory }
    }
}

/// Dropped in the order of the fields: the vCPU, then the slots, then the VM.
pub(crate) struct Machine {
    pub(crate) vcpu: Vcpu,
    _slots: MemorySlots<Arc<Mapping>>,
    pub(crate) vm: Vm,
}

impl Machine {
    fn bare(kvm: &Kvm, ram: &Ram) -> Self {
        let builder = VmBuilder::create(kvm).unwrap();
        let mut slots = builder.memory_slots();
        slots.add(0, 0, &ram.mapping, 0, ram.mapping.len_bytes(), SlotFlags::default()).unwrap();
        let vm = builder.finish(Irqchip::Full { pit: false }).unwrap();
        let vcpu = vm.create_vcpu(0).unwrap();
        Cpuid::supported(kvm).unwrap().load(&vcpu).unwrap();
        Self { vcpu, _slots: slots, vm }
    }

    /// One whose vCPU stands at the kernel's entry.
    pub(crate) fn at_entry(kvm: &Kvm, ram: &Ram, loaded: &Loaded) -> Self {
        let machine = Self::bare(kvm, ram);
        let fd = machine.vcpu.fd();
        fd.set_sregs(&loaded.sregs(fd.get_sregs().unwrap())).unwrap();
        fd.set_regs(&loaded.regs()).unwrap();
        machine
    }

    /// The state of the VM and of its vCPU.
    pub(crate) fn save(&self) -> [Vec<u8>; 2] {
        let vm_state = VmState::save(&self.vm).unwrap().encode();
        let vcpu_state = Saver::prepare(&self.vcpu).unwrap().save(&self.vcpu).unwrap().encode();
        [vm_state, vcpu_state]
    }

    /// A new one with this state.
    pub(crate) fn with(kvm: &Kvm, ram: &Ram, [vm_state, vcpu_state]: &[Vec<u8>; 2]) -> Self {
        let mut new = Self::bare(kvm, ram);
        let loader = Loader::prepare(&new.vcpu).unwrap();
        let vcpu_state = VcpuState::decode(vcpu_state).unwrap();
        loader.load(&mut new.vcpu, &vcpu_state).unwrap();
        VmState::decode(vm_state).unwrap().load(&new.vm).unwrap();
        loader.finish(&mut new.vcpu, &vcpu_state).unwrap();
        new
    }

    /// Runs until a kick, or until `look` says so at an exit after the bus had it.
    pub(crate) fn run(&mut self, bus: &Bus, mut look: impl FnMut(Exit) -> bool) -> Stopped<()> {
        let stopped = self.vcpu.run(|exit| {
            let seen = match exit {
                VcpuExit::IoIn(port, data) => {
                    bus.port_in(port, data);
                    return ControlFlow::Continue(());
                }
                VcpuExit::MmioRead(address, data) => {
                    bus.mmio_read(address, data);
                    return ControlFlow::Continue(());
                }
                VcpuExit::MmioWrite(address, data) => {
                    assert!(bus.mmio_write(address, data), "a write to {address:#x}");
                    return ControlFlow::Continue(());
                }
                VcpuExit::IoOut(port, data) => {
                    let taken = bus.port_out(port, data);
                    Exit { port, value: data.first_chunk().map(|dword| u32::from_le_bytes(*dword)), taken }
                }
                other => panic!("the guest left KVM: {other:?}"),
            };
            if look(seen) { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
        });
        stopped.unwrap()
    }
}

/// A write of the guest's to a port.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Exit {
    pub(crate) port: u16,
    /// If it was a dword.
    pub(crate) value: Option<u32>,
    /// A device had it.
    pub(crate) taken: bool,
}
