//! Guests of a few instructions in real mode, and memory for them.

use std::ffi::c_int;
use std::ptr::{self, NonNull};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use tideover_kvm::kvm_ioctls::Kvm;
use tideover_kvm::{Cpuid, HostMemory, Irqchip, MemorySlots, SlotFlags, Vcpu, Vm, VmBuilder};

/// Guest physical address, and offset in the memory, of the code.
pub(crate) const CODE: usize = 0x1000;
/// Of what the guest counts.
pub(crate) const COUNTER: usize = 0x2000;
/// Bytes of a guest's memory.
pub(crate) const MEMORY_LEN: usize = 0x1_0000;

/// Counts for ever: `inc dword [COUNTER]`.
pub(crate) const COUNT: &[u8] = &[0x66, 0xff, 0x06, 0x00, 0x20, 0xeb, 0xf9];

/// Counts, and writes each count to port 0x10 as a dword.
pub(crate) const OUT_EACH_COUNT: &[u8] = &[
    0x66, 0xff, 0x06, 0x00, 0x20, // inc dword [0x2000]
    0x66, 0xa1, 0x00, 0x20, // mov eax, [0x2000]
    0x66, 0xe7, 0x10, // out 0x10, eax
    0xeb, 0xf2, // again
];

/// Reads dwords from port 0x11, sums them up in the counter, and counts them behind it.
pub(crate) const SUM_INS: &[u8] = &[
    0x66, 0xe5, 0x11, // in eax, 0x11
    0x66, 0x01, 0x06, 0x00, 0x20, // add [0x2000], eax
    0x66, 0xff, 0x06, 0x04, 0x20, // inc dword [0x2004]
    0xeb, 0xf1, // again
];

/// Writes the 64 bytes from 0x3000 on to port 0x12, by one repeated instruction, for ever.
pub(crate) const OUT_STRINGS: &[u8] = &[
    0xbe, 0x00, 0x30, // mov si, 0x3000
    0xb9, 0x40, 0x00, // mov cx, 64
    0xba, 0x12, 0x00, // mov dx, 0x12
    0xfc, // cld
    0xf3, 0x6e, // rep outsb
    0xeb, 0xf2, // again
];

/// Lets the PIT tick a thousand times a second over the PIC, halts, and counts the ticks.
pub(crate) const COUNT_TICKS: &[u8] = &[
    0xfa, // cli
    0xc7, 0x06, 0x80, 0x00, 0x40, 0x10, // mov word [0x20 * 4], 0x1040
    0xc7, 0x06, 0x82, 0x00, 0x00, 0x00, // mov word [0x20 * 4 + 2], 0
    0xb0, 0x11, 0xe6, 0x20, // PIC: initialise,
    0xb0, 0x20, 0xe6, 0x21, // vectors from 0x20,
    0xb0, 0x04, 0xe6, 0x21, // slave at 2,
    0xb0, 0x01, 0xe6, 0x21, // 8086 mode,
    0xb0, 0xfe, 0xe6, 0x21, // all masked but the PIT
    0xb0, 0x34, 0xe6, 0x43, // PIT: rate generator,
    0xb0, 0xa9, 0xe6, 0x40, // of 1193182 Hz / 1193
    0xb0, 0x04, 0xe6, 0x40, //
    0xfb, // sti
    0xf4, // hlt
    0xeb, 0xfd, // again
    0x90, 0x90, 0x90, 0x90, 0x90, 0x90, 0x90, 0x90, 0x90, 0x90, 0x90, 0x90, 0x90, 0x90, 0x90,
    // The handler, at 0x1040.
    0x66, 0xff, 0x06, 0x00, 0x20, // inc dword [0x2000]
    0xb0, 0x20, 0xe6, 0x20, // PIC: end of interrupt
    0xcf, // iret
];

const _: () = assert!(COUNT_TICKS.len() == 0x40 + 10);

struct Mapping {
    address: NonNull<libc::c_void>,
    len: usize,
}

// SAFETY: a mapping belongs to no thread.
unsafe impl Send for Mapping {}
// SAFETY: its bytes are reached by volatile copies and atomics only.
unsafe impl Sync for Mapping {}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: `TestMemory::map` made it with this length, and its clones are gone.
        unsafe { libc::munmap(self.address.as_ptr(), self.len) };
    }
}

/// Shared memory for a guest. Clones are the same memory.
#[derive(Clone)]
pub(crate) struct TestMemory(Arc<Mapping>);

// SAFETY: the mapping lasts until the last clone is gone, its address and length do not change, and it is
// reached by volatile copies and atomics only.
unsafe impl HostMemory for TestMemory {
    fn host_address(&self) -> usize {
        self.0.address.as_ptr().addr()
    }

    fn len_bytes(&self) -> u64 {
        u64::try_from(self.0.len).unwrap()
    }
}

impl TestMemory {
    /// Zeroed memory.
    pub(crate) fn new(len: usize) -> Self {
        Self::map(-1, libc::MAP_ANONYMOUS, len)
    }

    /// A mapping of a file.
    pub(crate) fn of_file(file: &impl std::os::fd::AsRawFd, len: usize) -> Self {
        Self::map(file.as_raw_fd(), 0, len)
    }

    fn map(fd: c_int, flags: c_int, len: usize) -> Self {
        let protection = libc::PROT_READ | libc::PROT_WRITE;
        // SAFETY: a new mapping at an address of the kernel's choice touches nothing that is there.
        let address =
            unsafe { libc::mmap(ptr::null_mut(), len, protection, libc::MAP_SHARED | flags, fd, 0) };
        assert_ne!(address, libc::MAP_FAILED, "{}", std::io::Error::last_os_error());
        Self(Arc::new(Mapping { address: NonNull::new(address).unwrap(), len }))
    }

    /// Memory with this code in it.
    pub(crate) fn with_code(code: &[u8]) -> Self {
        let memory = Self::new(MEMORY_LEN);
        memory.write(CODE, code);
        memory
    }

    pub(crate) fn write(&self, offset: usize, bytes: &[u8]) {
        assert!(offset + bytes.len() <= self.0.len);
        for (place, &byte) in (offset..).zip(bytes) {
            // SAFETY: in the mapping, as asserted.
            unsafe { self.0.address.as_ptr().cast::<u8>().add(place).write_volatile(byte) };
        }
    }

    pub(crate) fn dword(&self, offset: usize) -> u32 {
        assert!(offset.is_multiple_of(4) && offset + 4 <= self.0.len);
        // SAFETY: in the mapping and aligned, as asserted; reached as an atomic or from outside.
        let dword = unsafe { AtomicU32::from_ptr(self.0.address.as_ptr().cast::<u8>().add(offset).cast()) };
        dword.load(Ordering::SeqCst)
    }

    pub(crate) fn counter(&self) -> u32 {
        self.dword(COUNTER)
    }
}

/// A VM with its memory and one vCPU.
///
/// Dropped in the order of the fields: the vCPU, then the slots, then the VM.
pub(crate) struct Machine {
    pub(crate) vcpu: Vcpu,
    pub(crate) slots: MemorySlots<TestMemory>,
    pub(crate) vm: Vm,
}

/// A VM on this memory, whose vCPU stands in real mode at the code.
pub(crate) fn machine(kvm: &Kvm, memory: &TestMemory, irqchip: Irqchip) -> Machine {
    let machine = bare_machine(kvm, memory, irqchip);
    Cpuid::supported(kvm).unwrap().load(&machine.vcpu).unwrap();
    start_at_code(&machine.vcpu);
    machine
}

/// A VM on this memory, whose vCPU is as KVM made it.
pub(crate) fn bare_machine(kvm: &Kvm, memory: &TestMemory, irqchip: Irqchip) -> Machine {
    let builder = VmBuilder::create(kvm).unwrap();
    let mut slots = builder.memory_slots();
    slots.add(0, 0, memory, 0, memory.len_bytes(), SlotFlags::default()).unwrap();
    let vm = builder.finish(irqchip).unwrap();
    let vcpu = vm.create_vcpu(0).unwrap();
    Machine { vcpu, slots, vm }
}

/// Puts a vCPU that is as KVM made it into real mode at the code.
pub(crate) fn start_at_code(vcpu: &Vcpu) {
    let mut special = vcpu.fd().get_sregs().unwrap();
    for segment in [&mut special.cs, &mut special.ds, &mut special.ss] {
        segment.base = 0;
        segment.selector = 0;
    }
    vcpu.fd().set_sregs(&special).unwrap();
    let mut registers = vcpu.fd().get_regs().unwrap();
    registers.rip = u64::try_from(CODE).unwrap();
    registers.rsp = 0x8000;
    registers.rflags = 2;
    vcpu.fd().set_regs(&registers).unwrap();
}

/// Numbers that look random and are the same in every run.
pub(crate) struct Numbers(pub u64);

impl Numbers {
    pub(crate) fn below(&mut self, bound: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % bound
    }
}
