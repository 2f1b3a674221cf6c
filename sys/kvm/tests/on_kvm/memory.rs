//! Memory slots and guest_memfd on the real KVM.

use std::ops::ControlFlow;
use std::os::fd::{AsFd, AsRawFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use kvm::guest_memfd::{self, GuestMemfdError, GuestMemfdFlags};
use kvm::kvm_ioctls::{Kvm, VcpuExit};
use kvm::{
    Binding, HostMemory, Irqchip, MemorySlots, Saver, SlotError, SlotFlags, SlotRange, Stopped, Vcpu, Vm,
    VmBuilder, VmState,
};
use tideover_kvm as kvm;

use crate::guest::{CODE, COUNT, OUT_EACH_COUNT, TestMemory, machine, start_at_code};

const PAGE: u64 = 4096;
const DEFAULT: SlotFlags = SlotFlags { log_dirty_pages: false, read_only: false };

fn builder() -> VmBuilder {
    VmBuilder::create(&Kvm::new().unwrap()).unwrap()
}

/// G5.5.10.
#[test]
fn a_slot_beyond_its_memory_is_refused() {
    harness::need!(kvm);
    let builder = builder();
    let memory = TestMemory::new(0x4000);
    let mut slots = builder.memory_slots();
    let mut refused = |offset, len| slots.add(0, 0, &memory, offset, len, DEFAULT).unwrap_err();
    for (offset, len) in [(0, 0x5000), (0x1000, 0x4000), (0x4000, PAGE), (u64::MAX - PAGE + 1, PAGE)] {
        let error = refused(offset, len);
        assert!(
            matches!(error, SlotError::MemoryRange { offset_bytes, have_bytes: 0x4000, .. } if offset_bytes == offset),
            "{error:?}"
        );
    }
    slots.add(0, 0, &memory, 0x1000, 0x3000, DEFAULT).unwrap();
}

/// G5.5.2.
#[test]
fn a_slot_not_of_whole_pages_is_refused() {
    harness::need!(kvm);
    let builder = builder();
    let memory = TestMemory::new(0x4000);
    let mut slots = builder.memory_slots();
    let cases = [
        (0x800, 0, PAGE, "guest address", 0x800),
        (0, 0x10, PAGE, "offset in the memory", 0x10),
        (0, 0, PAGE + 1, "length", PAGE + 1),
        (0, 0, 0, "length", 0),
    ];
    for (guest_address, offset, len, named, its_value) in cases {
        let error = slots.add(0, guest_address, &memory, offset, len, DEFAULT).unwrap_err();
        assert!(
            matches!(error, SlotError::Unaligned { what, value, .. } if what == named && value == its_value),
            "{error:?}"
        );
    }
    assert_eq!(slots.iter().count(), 0);
}

/// G5.5.2.
#[test]
fn a_slot_beyond_the_guests_addresses_is_refused() {
    harness::need!(kvm);
    let builder = builder();
    let memory = TestMemory::new(0x4000);
    let mut slots = builder.memory_slots();
    let error = slots.add(0, u64::MAX - PAGE + 1, &memory, 0, PAGE, DEFAULT).unwrap_err();
    assert!(matches!(error, SlotError::GuestRange { .. }), "{error:?}");
    // Within 64 bits, but more than KVM has: its own refusal is kept.
    let error = slots.add(0, u64::MAX - 2 * PAGE + 1, &memory, 0, PAGE, DEFAULT).unwrap_err();
    assert!(matches!(error, SlotError::Kvm { .. }), "{error:?}");
}

/// G5.5.2, G5.5.3, G5.5.4, G5.5.5.
#[test]
fn a_slot_over_another_is_refused_and_names_it() {
    harness::need!(kvm);
    let builder = builder();
    let memory = TestMemory::new(0x4000);
    let mut slots = builder.memory_slots();
    slots.add(3, 0x10_0000, &memory, 0, 0x3000, DEFAULT).unwrap();
    let there = SlotRange { slot: 3, guest_address: 0x10_0000, len_bytes: 0x3000 };

    let error = slots.add(4, 0x10_2000, &memory, 0, 0x2000, DEFAULT).unwrap_err();
    assert!(matches!(error, SlotError::Overlap { other, .. } if other == there), "{error:?}");
    let error = slots.add(3, 0x20_0000, &memory, 0, PAGE, DEFAULT).unwrap_err();
    assert!(matches!(error, SlotError::InUse { in_use: 0x10_0000, .. }), "{error:?}");
    let beside = slots.add(4, 0x10_3000, &memory, 0, PAGE, DEFAULT);
    beside.unwrap();

    let count = builder.capabilities().memory_slots;
    let error = slots.add(count, 0x30_0000, &memory, 0, PAGE, DEFAULT).unwrap_err();
    assert!(matches!(error, SlotError::Number { slots, .. } if slots == count), "{error:?}");
    assert!(matches!(slots.remove(9), Err(SlotError::Unknown { slot: 9 })));
}

/// Memory that tells how many of its clones there are.
struct Counted {
    memory: TestMemory,
    clones: Arc<AtomicUsize>,
}

impl Clone for Counted {
    fn clone(&self) -> Self {
        self.clones.fetch_add(1, Ordering::SeqCst);
        Self { memory: self.memory.clone(), clones: Arc::clone(&self.clones) }
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        self.clones.fetch_sub(1, Ordering::SeqCst);
    }
}

// SAFETY: as `TestMemory`, of which it holds one.
unsafe impl HostMemory for Counted {
    fn host_address(&self) -> usize {
        self.memory.host_address()
    }

    fn len_bytes(&self) -> u64 {
        self.memory.len_bytes()
    }
}

/// G5.5.11, G5.5.13, G5.7.2.
#[test]
fn a_slot_keeps_its_memory_until_it_is_gone() {
    harness::need!(kvm);
    let builder = builder();
    let clones = Arc::new(AtomicUsize::new(1));
    let memory = Counted { memory: TestMemory::new(0x4000), clones: Arc::clone(&clones) };
    let mut slots = builder.memory_slots();
    slots.add(0, 0, &memory, 0, PAGE, DEFAULT).unwrap();
    slots.add(1, 0x10_0000, &memory, 0, PAGE, DEFAULT).unwrap();
    slots.add(2, 0x10_0000, &memory, 0, PAGE, DEFAULT).unwrap_err();
    drop(memory);
    assert_eq!(clones.load(Ordering::SeqCst), 2, "one for each slot, none for a refused one");
    slots.remove(0).unwrap();
    assert_eq!(clones.load(Ordering::SeqCst), 1);
    drop(slots);
    assert_eq!(clones.load(Ordering::SeqCst), 0);
    // The VM has let go of them: their numbers and addresses are free.
    let mut again: MemorySlots<TestMemory> = builder.memory_slots();
    again.add(0, 0x10_0000, &TestMemory::new(0x4000), 0, PAGE, DEFAULT).unwrap();
}

/// G5.7.2, G5.7.4.
#[test]
fn a_guest_reaches_a_removed_slot_no_more() {
    harness::need!(kvm);
    let memory = TestMemory::with_code(COUNT);
    let data = TestMemory::new(0x1000);
    let builder = builder();
    let mut slots = builder.memory_slots();
    slots.add(0, 0, &memory, 0, 0x2000, DEFAULT).unwrap();
    slots.add(1, 0x2000, &data, 0, PAGE, DEFAULT).unwrap();
    let vm = builder.finish(Irqchip::None).unwrap();
    let mut vcpu = vm.create_vcpu(0).unwrap();
    start_at_code(&vcpu);

    slots.remove(1).unwrap();
    // The one instruction reads and writes: its second half comes before the run returns.
    let mut exits = Vec::new();
    let stopped = vcpu.run(|exit| {
        match exit {
            VcpuExit::MmioRead(address, data) => {
                exits.push(('r', address));
                data.copy_from_slice(&[6, 0, 0, 0]);
            }
            VcpuExit::MmioWrite(address, [7, 0, 0, 0]) => exits.push(('w', address)),
            exit => panic!("not an exit that was expected: {exit:?}"),
        }
        ControlFlow::Break(exits.len())
    });
    assert_eq!(stopped.unwrap(), Stopped::Broke(2));
    assert_eq!(exits, [('r', 0x2000), ('w', 0x2000)]);
    assert_eq!(vcpu.fd().get_regs().unwrap().rip, 0x1005);
    assert_eq!(data.dword(0), 0);
}

#[test]
fn a_guest_runs_from_a_region() {
    harness::need!(kvm);
    let memory = Arc::new(region::Region::create("guest", 0x1_0000).unwrap().map().unwrap());
    memory.write(u64::try_from(CODE).unwrap(), OUT_EACH_COUNT).unwrap();
    let builder = builder();
    let mut slots = builder.memory_slots();
    slots.add(0, 0, &memory, 0, memory.len_bytes(), DEFAULT).unwrap();
    let vm = builder.finish(Irqchip::None).unwrap();
    let mut vcpu = vm.create_vcpu(0).unwrap();
    start_at_code(&vcpu);
    assert_eq!(vcpu.run(|_| ControlFlow::Break(())).unwrap(), Stopped::Broke(()));
    let mut counter = [0; 4];
    memory.read(0x2000, &mut counter).unwrap();
    assert_eq!(u32::from_le_bytes(counter), 1);
}

#[test]
fn a_read_only_slot_is_not_written() {
    harness::need!(kvm);
    let memory = TestMemory::with_code(COUNT);
    let builder = builder();
    let mut slots = builder.memory_slots();
    let read_only = SlotFlags { read_only: true, ..DEFAULT };
    let added = slots.add(0, 0, &memory, 0, memory.len_bytes(), read_only);
    if !builder.capabilities().read_only_slots {
        added.unwrap_err();
        return;
    }
    added.unwrap();
    let vm = builder.finish(Irqchip::None).unwrap();
    let mut vcpu = vm.create_vcpu(0).unwrap();
    start_at_code(&vcpu);
    let stopped = vcpu.run(|exit| match exit {
        VcpuExit::MmioWrite(address, data) => ControlFlow::Break((address, data.to_vec())),
        exit => panic!("not the exit that was expected: {exit:?}"),
    });
    assert_eq!(stopped.unwrap(), Stopped::Broke((0x2000, vec![1, 0, 0, 0])));
    assert_eq!(memory.counter(), 0);
}

/// G5.2.2, G5.2.3, G5.2.6.
#[test]
fn a_guest_memfd_takes_the_flags_that_kvm_says_and_no_other() {
    harness::need!(kvm);
    let builder = builder();
    let Some(accepted) = builder.capabilities().guest_memfd else {
        let refused = guest_memfd::create(builder.fd(), PAGE, GuestMemfdFlags::NONE).unwrap_err();
        assert!(matches!(refused, GuestMemfdError::Unsupported), "{refused:?}");
        return;
    };
    let both = GuestMemfdFlags::MMAP | GuestMemfdFlags::INIT_SHARED;
    for flags in [GuestMemfdFlags::NONE, GuestMemfdFlags::MMAP, GuestMemfdFlags::INIT_SHARED, both] {
        let made = guest_memfd::create(builder.fd(), 0x1_0000, flags);
        if accepted.contains(flags) {
            made.unwrap();
        } else {
            let refused = made.unwrap_err();
            assert!(
                matches!(refused, GuestMemfdError::Flags { refused, .. } if refused == flags.without(accepted)),
                "{refused:?}"
            );
        }
    }
    for size_bytes in [0, PAGE + 1] {
        let refused = guest_memfd::create(builder.fd(), size_bytes, GuestMemfdFlags::NONE).unwrap_err();
        assert!(matches!(refused, GuestMemfdError::Size { .. }), "{refused:?}");
    }
}

/// G5.2.7, G5.5.7, G5.5.12, G5.6.4.
#[test]
fn a_guest_runs_from_a_guest_memfd_that_the_host_sees_too() {
    harness::need!(kvm);
    let builder = builder();
    let flags = GuestMemfdFlags::MMAP | GuestMemfdFlags::INIT_SHARED;
    let file = match guest_memfd::create(builder.fd(), 0x1_0000, flags) {
        Ok(file) => file,
        Err(refused) => {
            let accepted = builder.capabilities().guest_memfd;
            assert!(accepted.is_none_or(|accepted| !accepted.contains(flags)), "{refused:?}");
            return;
        }
    };
    let info = std::fs::read_to_string(format!("/proc/self/fdinfo/{}", file.as_raw_fd())).unwrap();
    let flags = info.lines().find_map(|line| line.strip_prefix("flags:")).unwrap().trim();
    let close_on_exec = u32::from_str_radix(flags, 8).unwrap() & libc::O_CLOEXEC.cast_unsigned() != 0;
    assert!(close_on_exec, "{info}");
    let memory = TestMemory::of_file(&file, 0x1_0000);
    memory.write(CODE, OUT_EACH_COUNT);
    let mut slots = builder.memory_slots();
    let binding = Binding { guest_memfd: file.as_fd(), offset_bytes: 0 };
    slots.add_bound(0, 0, &memory, 0, 0x1_0000, binding).unwrap();
    // The same bytes are bound but once.
    let twice = slots.add_bound(1, 0x10_0000, &memory, 0, 0x1_0000, binding).unwrap_err();
    assert!(matches!(twice, SlotError::Kvm { .. }), "{twice:?}");

    let vm = builder.finish(Irqchip::None).unwrap();
    let mut vcpu = vm.create_vcpu(0).unwrap();
    start_at_code(&vcpu);
    let mut outs = 0;
    let stopped = vcpu.run(|_| {
        outs += 1;
        if outs == 5 { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    });
    assert_eq!(stopped.unwrap(), Stopped::Broke(()));
    assert_eq!(memory.counter(), 5);

    // Of another VM it is refused.
    let other = VmBuilder::create(&Kvm::new().unwrap()).unwrap();
    let mut other_slots = other.memory_slots();
    let refused = other_slots.add_bound(0, 0, &memory, 0, 0x1_0000, binding).unwrap_err();
    assert!(matches!(refused, SlotError::Kvm { .. }), "{refused:?}");
    // But its mapping serves there as plain memory.
    other_slots.add(0, 0, &memory, 0, 0x1_0000, DEFAULT).unwrap();
}

#[test]
fn the_order_of_making_a_vm_leaves_a_working_machine() {
    harness::need!(kvm);
    let kvm = Kvm::new().unwrap();
    for irqchip in [Irqchip::Full { pit: false }, Irqchip::Full { pit: true }] {
        let memory = TestMemory::with_code(OUT_EACH_COUNT);
        let mut machine = machine(&kvm, &memory, irqchip);
        let stopped = machine.vcpu.run(|_| ControlFlow::Break(()));
        assert_eq!(stopped.unwrap(), Stopped::Broke(()));
        assert_eq!(machine.slots.iter().count(), 1);
    }
}

#[test]
fn a_vm_made_by_other_means_is_taken_up() {
    harness::need!(kvm);
    let kvm = Kvm::new().unwrap();
    let fd = Arc::new(kvm.create_vm().unwrap());
    let memory = TestMemory::with_code(OUT_EACH_COUNT);
    let mut slots = MemorySlots::new(Arc::clone(&fd));
    slots.add(0, 0, &memory, 0, memory.len_bytes(), DEFAULT).unwrap();
    fd.create_irq_chip().unwrap();
    let vcpu_fd = fd.create_vcpu(0).unwrap();
    let vm = Vm::adopt(&kvm, fd, Irqchip::Full { pit: false }).unwrap();
    let mut vcpu = Vcpu::adopt(&vm, vcpu_fd).unwrap();
    start_at_code(&vcpu);
    assert_eq!(vcpu.run(|_| ControlFlow::Break(())).unwrap(), Stopped::Broke(()));
    VmState::save(&vm).unwrap();
    Saver::prepare(&vcpu).unwrap().save(&vcpu).unwrap();
}
