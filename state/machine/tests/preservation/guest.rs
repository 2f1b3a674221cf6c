//! A guest in 64-bit mode that writes and checks memory at 4 GiB.

use std::ops::ControlFlow;
use std::sync::Arc;

use gmem::Binding;
use gmem::GmemFile;
use gmem::Inode;
use iced_x86::code_asm::*;
use kvm::Irqchip;
use kvm::MemorySlots;
use kvm::SlotFlags;
use kvm::Stopped;
use kvm::Vcpu;
use kvm::Vm;
use kvm::VmBuilder;
use kvm::kvm_bindings::kvm_segment;
use kvm::kvm_ioctls::VcpuExit;
use region::Mapping;
use region::Region;
use tideover_machine::Identity;

/// Where the guest has the memory that is looked at.
pub(crate) const BASE: u64 = 4 << 30;

/// In memory of the VM's own: tables that map the first GiB and the fifth, and the code.
const LOW_BYTES: u64 = 1 << 20;
const PML4: u64 = 0x1000;
const PDPT: u64 = 0x2000;
const FIRST: u64 = 0x3000;
const FIFTH: u64 = 0x4000;
const CODE: u64 = 0x8000;

/// Where no memory is: by a write there it tells that all is as it should be, or that something is not.
const GOOD: u64 = 0x20_0000;
const BAD: u64 = 0x20_0008;

/// What the guest does with eight bytes after the others.
#[derive(Clone, Copy)]
pub(crate) enum Work {
    /// Writes the byte `(offset ^ 0x5A) & 0xFF` to each offset.
    WritePattern,
    /// Checks it.
    CheckPattern,
    /// Checks that each byte is the first, and makes it the second.
    Replace(u8, u8),
}

/// A byte eight times.
fn repeated(byte: u8) -> u64 {
    u64::from_le_bytes([byte; 8])
}

/// What the pattern is at an offset.
pub(crate) fn pattern(offset: u64) -> u8 {
    (offset ^ 0x5A).to_le_bytes()[0]
}

fn assemble(work: Work, bytes: u64) -> Result<Vec<u8>, IcedError> {
    let mut a = CodeAssembler::new(64)?;
    let (mut again, mut bad, mut end) = (a.create_label(), a.create_label(), a.create_label());
    a.mov(rsi, BASE)?;
    a.mov(rdx, BASE + bytes)?;
    a.mov(r9, repeated(1))?;
    a.mov(r10, u64::from_le_bytes([0, 1, 2, 3, 4, 5, 6, 7]))?;
    a.mov(r11, repeated(0x5A))?;
    a.set_label(&mut again)?;
    match work {
        Work::WritePattern | Work::CheckPattern => {
            a.mov(rax, rsi)?;
            a.and(eax, 0xF8)?;
            a.imul_2(rax, r9)?;
            a.add(rax, r10)?;
            a.xor(rax, r11)?;
        }
        Work::Replace(found, _) => a.mov(rax, repeated(found))?,
    }
    if let Work::WritePattern = work {
        a.mov(qword_ptr(rsi), rax)?;
    } else {
        a.cmp(qword_ptr(rsi), rax)?;
        a.jne(bad)?;
    }
    if let Work::Replace(_, new) = work {
        a.mov(rax, repeated(new))?;
        a.mov(qword_ptr(rsi), rax)?;
    }
    a.add(rsi, 8)?;
    a.cmp(rsi, rdx)?;
    a.jne(again)?;
    a.mov(rdi, GOOD)?;
    a.jmp(end)?;
    a.set_label(&mut bad)?;
    a.mov(rdi, BAD)?;
    a.set_label(&mut end)?;
    a.mov(qword_ptr(rdi), rax)?;
    a.assemble(CODE)
}

/// A VM object with the memory at [`BASE`], slot 1, and its vCPU.
pub(crate) struct Object {
    vcpu: Vcpu,
    low: Arc<Mapping>,
    _slots: MemorySlots<Arc<Mapping>>,
    _file: GmemFile,
    _vm: Vm,
}

impl Object {
    pub(crate) fn new(builder: VmBuilder, memory: &Arc<Inode>, identity: Identity) -> Self {
        let low = Arc::new(Region::create("low", LOW_BYTES).unwrap().map().unwrap());
        let mut slots = builder.memory_slots();
        slots.add(0, 0, &low, 0, LOW_BYTES, SlotFlags::default()).unwrap();
        let file = GmemFile::open(Arc::clone(memory), identity, builder.fd()).unwrap();
        let len_bytes = memory.size_bytes();
        file.bind(&mut slots, Binding { slot: 1, guest_address: BASE, offset_bytes: 0, len_bytes }).unwrap();
        write_tables(&low);
        let vm = builder.finish(Irqchip::None).unwrap();
        let vcpu = vm.create_vcpu(0).unwrap();
        kvm::Cpuid::supported(&kvm::kvm_ioctls::Kvm::new().unwrap()).unwrap().load(&vcpu).unwrap();
        enter_long_mode(&vcpu);
        Self { vcpu, low, _slots: slots, _file: file, _vm: vm }
    }

    /// Has the guest do its work with the first `bytes` bytes; true if it found all as it should be.
    pub(crate) fn work(&mut self, work: Work, bytes: u64) -> bool {
        self.low.write(CODE, &assemble(work, bytes).unwrap()).unwrap();
        let registers = kvm::kvm_bindings::kvm_regs { rip: CODE, rflags: 2, ..Default::default() };
        self.vcpu.fd().set_regs(&registers).unwrap();
        let stopped = self.vcpu.run(|exit| match exit {
            VcpuExit::MmioWrite(address, _) => ControlFlow::Break(address),
            other => panic!("not an exit that was expected: {other:?}"),
        });
        match stopped.unwrap() {
            Stopped::Broke(GOOD) => true,
            Stopped::Broke(BAD) => false,
            other => panic!("{other:?}"),
        }
    }
}

/// Identity by pages of 2 MiB, for user mode.
fn write_tables(low: &Mapping) {
    const TABLE: u64 = 0x7;
    const PAGE: u64 = 0x87;
    low.store(PML4, PDPT | TABLE).unwrap();
    for (gib, table) in [(0, FIRST), (4, FIFTH)] {
        low.store(PDPT + gib * 8, table | TABLE).unwrap();
        for entry in 0..512 {
            low.store(table + entry * 8, gib << 30 | entry << 21 | PAGE).unwrap();
        }
    }
}

/// In user mode, which every KVM runs at full speed.
fn enter_long_mode(vcpu: &Vcpu) {
    let mut special = vcpu.fd().get_sregs().unwrap();
    let code = kvm_segment {
        limit: u32::MAX,
        selector: 0x33,
        dpl: 3,
        type_: 11,
        present: 1,
        s: 1,
        l: 1,
        g: 1,
        ..Default::default()
    };
    let data = kvm_segment { selector: 0x2b, type_: 3, l: 0, db: 1, ..code };
    special.cs = code;
    (special.ds, special.es, special.ss) = (data, data, data);
    special.cr0 = 0x8000_0033;
    special.cr3 = PML4;
    special.cr4 = 0x20;
    special.efer = 0x500;
    vcpu.fd().set_sregs(&special).unwrap();
}
