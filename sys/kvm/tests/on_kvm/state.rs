//! Saving state in one VM and loading it into another, on the real KVM.

use std::ops::ControlFlow;
use std::thread;
use std::time::Duration;

use abi::groups::{self, Group};
use kvm::kvm_bindings as bind;
use kvm::kvm_ioctls::Kvm;
use kvm::{
    Contents, Cpuid, Fault, Irqchip, LoadError, Loader, RunError, SaveError, Saver, StateError, Stopped,
    Vcpu, VcpuGroup, VcpuState, VmGroup, VmLoadError, VmState,
};
use tideover_kvm as kvm;

use crate::guest::{COUNT, COUNT_TICKS, COUNTER, Machine, TestMemory, bare_machine, machine};

const IRQCHIPS: [Irqchip; 3] = [Irqchip::None, Irqchip::Split { pins: 24 }, Irqchip::Full { pit: true }];

fn kvm() -> Kvm {
    Kvm::new().unwrap()
}

/// A vCPU's state, over the wire.
fn save(vcpu: &Vcpu) -> VcpuState {
    let state = Saver::prepare(vcpu).unwrap().save(vcpu).unwrap().encode();
    VcpuState::decode(&state).unwrap()
}

/// A machine on the same memory, with the same CPUID, and the state of another.
fn successor(kvm: &Kvm, memory: &TestMemory, old: &Machine) -> Machine {
    let (cpuid, vm_state, state) =
        (Cpuid::of(&old.vcpu).unwrap(), VmState::save(&old.vm).unwrap(), save(&old.vcpu));
    let mut new = bare_machine(kvm, memory, old.vm.irqchip());
    Cpuid::decode(&cpuid.encode()).unwrap().load(&new.vcpu).unwrap();
    let loader = Loader::prepare(&new.vcpu).unwrap();
    loader.load(&mut new.vcpu, &state).unwrap();
    VmState::decode(&vm_state.encode()).unwrap().load(&new.vm).unwrap();
    loader.finish(&mut new.vcpu, &state).unwrap();
    new
}

/// Runs the guest for a while, until a kick stops it. It is to make no exits.
fn run_for(vcpu: &mut Vcpu, time: Duration) {
    let kicker = vcpu.kicker();
    thread::scope(|scope| {
        scope.spawn(move || {
            thread::sleep(time);
            kicker.kick().unwrap();
        });
        let stopped =
            vcpu.run(|exit| -> ControlFlow<()> { panic!("the guest was to make no exit: {exit:?}") });
        assert_eq!(stopped.unwrap(), Stopped::Kicked);
    });
}

/// Gives every group of the vCPU values that no reset gives.
fn stir(kvm: &Kvm, vcpu: &Vcpu) {
    let fd = vcpu.fd();
    let mut registers = fd.get_regs().unwrap();
    (registers.rax, registers.rbx, registers.r15) = (0x1111, 0x2222_2222, 0x3333_3333_3333);
    registers.rflags = 0x2 | 0x8d5;
    fd.set_regs(&registers).unwrap();

    let mut special = fd.get_sregs().unwrap();
    (special.cr2, special.cr8) = (0x1234_5000, 3);
    (special.gdt.base, special.gdt.limit) = (0x5000, 0x7f);
    (special.es.base, special.es.selector) = (0x4_3210, 0x4321);
    fd.set_sregs(&special).unwrap();

    let mut debug = fd.get_debug_regs().unwrap();
    debug.db = [0x10, 0x20, 0x30, 0x40];
    fd.set_debug_regs(&debug).unwrap();

    let mut xcrs = fd.get_xcrs().unwrap();
    // x87, SSE and, where the guest has it, AVX.
    xcrs.xcrs[0].value = 3 | supported_xcr0(kvm) & 4;
    fd.set_xcrs(&xcrs).unwrap();

    let mut xsave = fd.get_xsave().unwrap();
    let (xmm3, present) = (52, 128);
    xsave.region[xmm3] = 0xdead_beef;
    xsave.region[present] |= 3;
    // SAFETY: XSAVE features of more than 4096 bytes are on only where a process asks for them, and this
    // one has not.
    unsafe { fd.set_xsave(&xsave) }.unwrap();

    let entry = |index, data| bind::kvm_msr_entry { index, data, ..Default::default() };
    let (sysenter_eip, star, lstar, kernel_gs) = (0x176, 0xc000_0081, 0xc000_0082, 0xc000_0102);
    let msrs = [
        entry(sysenter_eip, 0xffff_8000_0000_1000),
        entry(star, 0x23_0010_0000_0000),
        entry(lstar, 0xffff_8000_0000_2000),
        entry(kernel_gs, 0xffff_8000_0000_3000),
    ];
    assert_eq!(fd.set_msrs(&bind::Msrs::from_entries(&msrs).unwrap()).unwrap(), msrs.len());

    if vcpu.irqchip().has_lapic() {
        let mut lapic = fd.get_lapic().unwrap();
        // Spurious vector register: on, vector 0xff. Timer: vector 0x40, masked. An interrupt waits.
        lapic.regs[0xf1] = 1;
        lapic.regs[0x320] = 0x40;
        lapic.regs[0x322] = 1;
        lapic.regs[0x210 + 1] = 2;
        fd.set_lapic(&lapic).unwrap();
    }

    let mut events = fd.get_vcpu_events().unwrap();
    (events.nmi.masked, events.interrupt.shadow) = (1, 1);
    fd.set_vcpu_events(&events).unwrap();

    if vcpu.irqchip().has_lapic() {
        fd.set_mp_state(bind::kvm_mp_state { mp_state: bind::KVM_MP_STATE_HALTED }).unwrap();
    }
}

fn supported_xcr0(kvm: &Kvm) -> u64 {
    let supported = Cpuid::supported(kvm).unwrap();
    let leaf = supported.entries().iter().find(|entry| (entry.function, entry.index) == (0xd, 0));
    leaf.map_or(0, |entry| u64::from(entry.eax))
}

/// Whether two saves of one state may differ in the register: only the TSC moves by itself.
fn moves(index: u32) -> bool {
    index == 0x10
}

/// P6.5.6.
#[test]
fn a_vcpu_loaded_from_anothers_state_saves_the_same() {
    harness::need!(kvm);
    let kvm = kvm();
    for irqchip in IRQCHIPS {
        let memory = TestMemory::with_code(COUNT);
        let old = machine(&kvm, &memory, irqchip);
        let at_reset = save(&old.vcpu);
        stir(&kvm, &old.vcpu);
        let saved = save(&old.vcpu);
        let new = successor(&kvm, &memory, &old);
        let again = save(&new.vcpu);

        assert_eq!(again.groups().collect::<Vec<_>>(), saved.groups().collect::<Vec<_>>());
        for group in saved.groups() {
            match group {
                VcpuGroup::Msrs => {
                    let still = |state: &VcpuState| {
                        let mut msrs = state.msrs();
                        msrs.retain(|msr| !moves(msr.index));
                        msrs
                    };
                    assert_eq!(still(&again), still(&saved), "{irqchip:?}");
                }
                _ => assert_eq!(again.data(group), saved.data(group), "{group} with {irqchip:?}"),
            }
        }
        // That the test can fail: the state was not that of a reset.
        for group in [
            VcpuGroup::Registers,
            VcpuGroup::SpecialRegisters,
            VcpuGroup::DebugRegisters,
            VcpuGroup::Xcrs,
            VcpuGroup::Xsave,
            VcpuGroup::Msrs,
            VcpuGroup::Events,
        ] {
            assert_ne!(saved.data(group), at_reset.data(group), "{group} with {irqchip:?}");
        }
        if irqchip.has_lapic() {
            assert_ne!(saved.data(VcpuGroup::Lapic), at_reset.data(VcpuGroup::Lapic));
            assert_ne!(saved.data(VcpuGroup::MpState), at_reset.data(VcpuGroup::MpState));
        }
    }
}

#[test]
fn a_group_that_kvm_lacks_is_left_out_and_said_so() {
    harness::need!(kvm);
    let memory = TestMemory::with_code(COUNT);
    let without = machine(&kvm(), &memory, Irqchip::None);
    let state = save(&without.vcpu);
    assert_eq!(state.data(VcpuGroup::Lapic), None);
    assert!(state.absent().any(|group| group == VcpuGroup::Lapic));
    assert!(!state.groups().any(|group| group == VcpuGroup::Lapic));
}

#[test]
fn a_guest_counts_on_in_the_second_vm_from_where_it_stood() {
    harness::need!(kvm);
    let kvm = kvm();
    for irqchip in IRQCHIPS {
        let memory = TestMemory::with_code(COUNT);
        let mut machine = machine(&kvm, &memory, irqchip);
        run_for(&mut machine.vcpu, Duration::from_millis(20));
        for _ in 0..5 {
            let counted = memory.counter();
            assert_ne!(counted, 0, "{irqchip:?}");
            machine = successor(&kvm, &memory, &machine);
            assert_eq!(memory.counter(), counted, "{irqchip:?}: nothing ran");
            run_for(&mut machine.vcpu, Duration::from_millis(20));
            assert!(memory.counter() > counted, "{irqchip:?}");
        }
    }
}

#[test]
fn the_timer_ticks_on_in_a_halted_guest() {
    harness::need!(kvm);
    let kvm = kvm();
    let memory = TestMemory::with_code(COUNT_TICKS);
    let mut machine = machine(&kvm, &memory, Irqchip::Full { pit: true });
    run_for(&mut machine.vcpu, Duration::from_millis(200));
    for hop in 0..5 {
        let ticks = memory.counter();
        assert!(ticks > 0, "hop {hop}");
        machine = successor(&kvm, &memory, &machine);
        run_for(&mut machine.vcpu, Duration::from_millis(200));
        // A quarter of what it should be: a busy machine loses some.
        assert!(memory.counter() >= ticks + 50, "hop {hop}: from {ticks} to {}", memory.counter());
    }
}

#[test]
fn a_vcpu_that_waits_to_be_started_is_kicked_and_carried_over() {
    harness::need!(kvm);
    let kvm = kvm();
    let memory = TestMemory::with_code(COUNT);
    let old = machine(&kvm, &memory, Irqchip::Split { pins: 24 });
    let mut waiting = old.vm.create_vcpu(1).unwrap();
    Cpuid::of(&old.vcpu).unwrap().load(&waiting).unwrap();
    run_for(&mut waiting, Duration::from_millis(20));
    let state = save(&waiting);

    let new = bare_machine(&kvm, &memory, Irqchip::Split { pins: 24 });
    let mut second = new.vm.create_vcpu(1).unwrap();
    Cpuid::of(&old.vcpu).unwrap().load(&second).unwrap();
    let loader = Loader::prepare(&second).unwrap();
    loader.load(&mut second, &state).unwrap();
    loader.finish(&mut second, &state).unwrap();
    let mp_state = second.fd().get_mp_state().unwrap().mp_state;
    assert_eq!(mp_state, bind::KVM_MP_STATE_UNINITIALIZED);
    run_for(&mut second, Duration::from_millis(20));
    assert_eq!(memory.counter(), 0);
}

#[test]
fn cr8_lives_on_where_the_lapic_is_not_kvms() {
    harness::need!(kvm);
    let kvm = kvm();
    let memory = TestMemory::with_code(COUNT);
    let mut old = machine(&kvm, &memory, Irqchip::None);
    let mut special = old.vcpu.fd().get_sregs().unwrap();
    special.cr8 = 5;
    old.vcpu.fd().set_sregs(&special).unwrap();
    let mut new = successor(&kvm, &memory, &old);
    run_for(&mut new.vcpu, Duration::from_millis(5));
    assert_eq!(new.vcpu.fd().get_sregs().unwrap().cr8, 5);
    // Without the load, KVM takes it from the kvm_run page, where it is zero.
    run_for(&mut old.vcpu, Duration::from_millis(5));
    assert_eq!(old.vcpu.fd().get_sregs().unwrap().cr8, 0);
}

#[test]
fn a_tsc_deadline_crosses() {
    harness::need!(kvm);
    let kvm = kvm();
    let memory = TestMemory::with_code(COUNT);
    let old = bare_machine(&kvm, &memory, Irqchip::Split { pins: 24 });
    let mut cpuid = Cpuid::supported(&kvm).unwrap();
    for leaf in cpuid.entries_mut().iter_mut().filter(|entry| entry.function == 1) {
        let tsc_deadline = 1 << 24;
        leaf.ecx |= tsc_deadline;
    }
    cpuid.load(&old.vcpu).unwrap();
    let mut lapic = old.vcpu.fd().get_lapic().unwrap();
    // On; timer: vector 0x40, masked, by deadline.
    lapic.regs[0xf1] = 1;
    (lapic.regs[0x320], lapic.regs[0x322]) = (0x40, 5);
    old.vcpu.fd().set_lapic(&lapic).unwrap();
    // SAFETY: every x86-64 processor has a TSC.
    let in_an_hour_or_so = unsafe { std::arch::x86_64::_rdtsc() } + 10_000_000_000_000;
    let deadline = [bind::kvm_msr_entry { index: 0x6e0, data: in_an_hour_or_so, ..Default::default() }];
    assert_eq!(old.vcpu.fd().set_msrs(&bind::Msrs::from_entries(&deadline).unwrap()).unwrap(), 1);

    let new = successor(&kvm, &memory, &old);
    let msrs = save(&new.vcpu).msrs();
    assert_eq!(msrs.iter().find(|msr| msr.index == 0x6e0).unwrap().data, in_an_hour_or_so);
}

/// The state with one group's data changed.
fn with_group(state: &VcpuState, group: VcpuGroup, change: impl FnOnce(&mut Vec<u8>)) -> Vec<u8> {
    let mut list = groups::decode(&state.encode()).unwrap();
    change(&mut list.iter_mut().find(|entry| entry.id == group.id()).unwrap().data);
    groups::encode(&list)
}

/// An MSR that no KVM has.
const BOGUS_MSR: u32 = 0x0bad_0bad;

#[test]
fn an_msr_that_kvm_refuses_is_named() {
    harness::need!(kvm);
    let kvm = kvm();
    let memory = TestMemory::with_code(COUNT);
    let old = machine(&kvm, &memory, Irqchip::None);
    let state = save(&old.vcpu);
    let bytes = with_group(&state, VcpuGroup::Msrs, |msrs| {
        let bogus = [u64::from(BOGUS_MSR).to_le_bytes(), 7_u64.to_le_bytes()].concat();
        // After the first register, so that KVM's count falls short in the middle.
        msrs.splice(16..16, bogus);
    });
    let state = VcpuState::decode(&bytes).unwrap();

    let mut new = machine(&kvm, &memory, Irqchip::None);
    let loader = Loader::prepare(&new.vcpu).unwrap();
    let refused = loader.load(&mut new.vcpu, &state).unwrap_err();
    assert!(
        matches!(
            refused,
            LoadError::Group { group: VcpuGroup::Msrs, source: Fault::MsrSet { index: BOGUS_MSR, value: 7 } }
        ),
        "{refused:?}"
    );
    let run = new.vcpu.run(|_| ControlFlow::Break(()));
    assert!(matches!(run, Err(RunError::PartlyLoaded)), "{run:?}");
}

#[test]
fn an_msr_that_cannot_be_set_must_have_its_value_already() {
    harness::need!(kvm);
    let kvm = kvm();
    let memory = TestMemory::with_code(COUNT);
    let old = machine(&kvm, &memory, Irqchip::None);
    let mut new = machine(&kvm, &memory, Irqchip::None);
    let loader = Loader::prepare(&new.vcpu).unwrap();
    let state = save(&old.vcpu);
    let msrs = state.msrs();
    // Which registers these are is KVM's to say. Without its LAPIC, mostly one of async page faults.
    for fixed in loader.fixed_msrs().iter().filter(|&&fixed| msrs.iter().any(|msr| msr.index == fixed)) {
        let (group, place) = [VcpuGroup::Msrs, VcpuGroup::GuestMemoryMsrs]
            .into_iter()
            .find_map(|group| {
                let mut entries = state.data(group).unwrap().chunks(16);
                Some((group, entries.position(|entry| entry.starts_with(&fixed.to_le_bytes()))?))
            })
            .unwrap();
        let bytes = with_group(&state, group, |msrs| msrs[place * 16 + 8] ^= 0x40);
        let other = VcpuState::decode(&bytes).unwrap();
        let refused = loader.load(&mut new.vcpu, &other).and_then(|()| loader.finish(&mut new.vcpu, &other));
        let Err(LoadError::Group { source: Fault::MsrFixed { index, .. }, .. }) = refused else {
            panic!("{fixed:#x}: {refused:?}");
        };
        assert_eq!(index, *fixed);
        // With the value that it has, it loads.
        loader.load(&mut new.vcpu, &state).unwrap();
        loader.finish(&mut new.vcpu, &state).unwrap();
    }
}

#[test]
fn a_state_of_other_interrupt_controllers_is_refused_by_the_groups_name() {
    harness::need!(kvm);
    let kvm = kvm();
    let memory = TestMemory::with_code(COUNT);
    let mut without = machine(&kvm, &memory, Irqchip::None);
    let mut with = machine(&kvm, &memory, Irqchip::Split { pins: 24 });
    let loader = Loader::prepare(&without.vcpu).unwrap();

    let refused = loader.load(&mut without.vcpu, &save(&with.vcpu)).unwrap_err();
    assert!(matches!(refused, LoadError::CannotLoad { group: VcpuGroup::Lapic }), "{refused:?}");
    assert!(refused.to_string().contains("LAPIC"), "{refused}");
    let contents = Saver::prepare(&with.vcpu).unwrap().contents(&with.vcpu);
    let early = loader.check(&without.vcpu, &contents).unwrap_err();
    assert!(matches!(early, LoadError::CannotLoad { group: VcpuGroup::Lapic }), "{early:?}");

    let without = machine(&kvm, &memory, Irqchip::None);
    let loader = Loader::prepare(&with.vcpu).unwrap();
    let refused = loader.load(&mut with.vcpu, &save(&without.vcpu)).unwrap_err();
    assert!(matches!(refused, LoadError::Lacks { group: VcpuGroup::Lapic }), "{refused:?}");
    let contents = Saver::prepare(&without.vcpu).unwrap().contents(&without.vcpu);
    let early = loader.check(&with.vcpu, &contents).unwrap_err();
    assert!(matches!(early, LoadError::Lacks { group: VcpuGroup::Lapic }), "{early:?}");
}

#[test]
fn what_could_not_be_loaded_is_refused_before_the_pause() {
    harness::need!(kvm);
    let kvm = kvm();
    let memory = TestMemory::with_code(COUNT);
    let old = machine(&kvm, &memory, Irqchip::None);
    let new = machine(&kvm, &memory, Irqchip::None);
    let loader = Loader::prepare(&new.vcpu).unwrap();
    let contents = Saver::prepare(&old.vcpu).unwrap().contents(&old.vcpu).encode();
    loader.check(&new.vcpu, &Contents::decode(&contents).unwrap()).unwrap();

    let changed = |place: usize, change: &dyn Fn(&mut Vec<u8>)| {
        let mut list = groups::decode(&contents).unwrap();
        change(&mut list[place].data);
        loader.check(&new.vcpu, &Contents::decode(&groups::encode(&list)).unwrap()).unwrap_err()
    };
    let refused = changed(1, &|msrs| msrs.extend(BOGUS_MSR.to_le_bytes()));
    assert!(matches!(refused, LoadError::UnknownMsr { index: BOGUS_MSR }), "{refused:?}");
    let refused = changed(2, &|len| len[3] = 1);
    assert!(
        matches!(refused, LoadError::Group { group: VcpuGroup::Xsave, source: Fault::XsaveLen { .. } }),
        "{refused:?}"
    );
    let refused = changed(0, &|ids| ids.clear());
    assert!(matches!(refused, LoadError::Lacks { .. }), "{refused:?}");
}

#[test]
fn an_extended_state_longer_than_kvms_is_refused() {
    harness::need!(kvm);
    let kvm = kvm();
    let memory = TestMemory::with_code(COUNT);
    let mut machine = machine(&kvm, &memory, Irqchip::None);
    let loader = Loader::prepare(&machine.vcpu).unwrap();
    let state = save(&machine.vcpu);
    let longer = with_group(&state, VcpuGroup::Xsave, |data| data.extend([0; 64]));
    let refused = loader.load(&mut machine.vcpu, &VcpuState::decode(&longer).unwrap()).unwrap_err();
    assert!(
        matches!(refused, LoadError::Group { group: VcpuGroup::Xsave, source: Fault::XsaveLen { .. } }),
        "{refused:?}"
    );
}

#[test]
fn a_state_with_a_group_of_a_later_release_is_refused_by_its_id() {
    harness::need!(kvm);
    let memory = TestMemory::with_code(COUNT);
    let machine = machine(&kvm(), &memory, Irqchip::Full { pit: true });

    let mut list = groups::decode(&save(&machine.vcpu).encode()).unwrap();
    list.push(Group { id: 0x99, data: vec![] });
    let refused = VcpuState::decode(&groups::encode(&list)).unwrap_err();
    assert!(matches!(refused, StateError::UnknownGroup { whose: "vCPU", id: 0x99 }), "{refused:?}");
    assert!(refused.to_string().contains("vCPU") && refused.to_string().contains("0x99"), "{refused}");

    let mut list = groups::decode(&VmState::save(&machine.vm).unwrap().encode()).unwrap();
    list.push(Group { id: 0x99, data: vec![] });
    let refused = VmState::decode(&groups::encode(&list)).unwrap_err();
    assert!(matches!(refused, StateError::UnknownGroup { whose: "VM", id: 0x99 }), "{refused:?}");
}

#[test]
fn a_state_that_lost_a_group_is_refused_by_its_name() {
    harness::need!(kvm);
    let memory = TestMemory::with_code(COUNT);
    let mut machine = machine(&kvm(), &memory, Irqchip::Split { pins: 24 });
    let loader = Loader::prepare(&machine.vcpu).unwrap();
    let state = save(&machine.vcpu);
    for lost in state.groups() {
        let mut list = groups::decode(&state.encode()).unwrap();
        list.retain(|group| group.id != lost.id());
        let less = VcpuState::decode(&groups::encode(&list)).unwrap();
        let refused = loader
            .load(&mut machine.vcpu, &less)
            .and_then(|()| loader.finish(&mut machine.vcpu, &less))
            .unwrap_err();
        assert!(matches!(refused, LoadError::Lacks { group } if group == lost), "{lost}: {refused:?}");
    }
}

#[test]
fn a_group_of_a_wrong_length_is_refused() {
    harness::need!(kvm);
    let memory = TestMemory::with_code(COUNT);
    let machine = machine(&kvm(), &memory, Irqchip::Split { pins: 24 });
    let state = save(&machine.vcpu);
    for group in state.groups() {
        let short = with_group(&state, group, |data| {
            data.pop();
            data.truncate(4095);
        });
        let refused = VcpuState::decode(&short).unwrap_err();
        let name = group.name();
        assert!(matches!(refused, StateError::GroupLength { group, .. } if group == name), "{refused:?}");
    }
}

#[test]
fn a_vcpu_runs_only_when_its_state_is_whole() {
    harness::need!(kvm);
    let memory = TestMemory::with_code(COUNT);
    let mut machine = machine(&kvm(), &memory, Irqchip::None);
    let mut saver = Saver::prepare(&machine.vcpu).unwrap();
    let loader = Loader::prepare(&machine.vcpu).unwrap();
    let state = save(&machine.vcpu);

    let early = loader.finish(&mut machine.vcpu, &state);
    assert!(matches!(early, Err(LoadError::NothingToFinish)), "{early:?}");
    loader.load(&mut machine.vcpu, &state).unwrap();
    let run = machine.vcpu.run(|_| ControlFlow::Break(()));
    assert!(matches!(run, Err(RunError::PartlyLoaded)), "{run:?}");
    let saved = saver.save(&machine.vcpu).err();
    assert!(matches!(saved, Some(SaveError::PartlyLoaded)), "{saved:?}");
    loader.finish(&mut machine.vcpu, &state).unwrap();
    run_for(&mut machine.vcpu, Duration::from_millis(1));
}

/// MSR by which a guest asks KVM to write the time of day at which it booted to its memory.
const WALL_CLOCK: u32 = 0x4b56_4d00;

#[test]
fn guest_memory_is_written_only_when_the_load_is_finished() {
    harness::need!(kvm);
    let kvm = kvm();
    let memory = TestMemory::with_code(COUNT);
    let old = machine(&kvm, &memory, Irqchip::Split { pins: 24 });
    let place = 0x5000_u32;
    let wall_clock =
        [bind::kvm_msr_entry { index: WALL_CLOCK, data: u64::from(place), ..Default::default() }];
    let set = old.vcpu.fd().set_msrs(&bind::Msrs::from_entries(&wall_clock).unwrap()).unwrap();
    assert_eq!(set, 1, "this KVM has no kvmclock");
    let place = usize::try_from(place).unwrap();
    let seconds = memory.dword(place + 4);
    assert_ne!(seconds, 0);
    thread::sleep(Duration::from_millis(1100));

    let (vm_state, state) = (VmState::save(&old.vm).unwrap(), save(&old.vcpu));
    memory.write(place, &[0; 12]);
    let mut new = bare_machine(&kvm, &memory, Irqchip::Split { pins: 24 });
    Cpuid::of(&old.vcpu).unwrap().load(&new.vcpu).unwrap();
    let loader = Loader::prepare(&new.vcpu).unwrap();
    loader.load(&mut new.vcpu, &state).unwrap();
    vm_state.load(&new.vm).unwrap();
    assert_eq!((memory.dword(place), memory.dword(place + 4)), (0, 0));
    loader.finish(&mut new.vcpu, &state).unwrap();
    // The moment of boot is the same as ever, which it is only if the clock was loaded before.
    assert!(memory.dword(place + 4).abs_diff(seconds) <= 1, "{seconds} and {}", memory.dword(place + 4));
}

#[test]
fn the_clock_goes_on_by_the_time_that_passed() {
    harness::need!(kvm);
    let kvm = kvm();
    let memory = TestMemory::with_code(COUNT);
    let mut old = machine(&kvm, &memory, Irqchip::Split { pins: 24 });
    run_for(&mut old.vcpu, Duration::from_millis(20));
    let saved = VmState::save(&old.vm).unwrap();
    thread::sleep(Duration::from_millis(200));

    let new = machine(&kvm, &memory, Irqchip::Split { pins: 24 });
    saved.load(&new.vm).unwrap();
    let (before, after) = (saved.clock().unwrap(), VmState::save(&new.vm).unwrap().clock().unwrap());
    assert_ne!(before.realtime, 0);
    let (clock_passed, time_passed) = (after.clock - before.clock, after.realtime - before.realtime);
    assert!(time_passed >= 200_000_000, "{time_passed} ns");
    assert!(clock_passed.abs_diff(time_passed) < 20_000_000, "{clock_passed} ns of {time_passed} ns");
}

/// The VM's state with its clock changed.
fn with_clock(state: &VmState, change: impl FnOnce(&mut bind::kvm_clock_data)) -> VmState {
    let mut clock = state.clock().unwrap();
    change(&mut clock);
    let mut list = groups::decode(&state.encode()).unwrap();
    let group = list.iter_mut().find(|group| group.id == VmGroup::Clock.id()).unwrap();
    group.data[..8].copy_from_slice(&clock.clock.to_le_bytes());
    group.data[16..24].copy_from_slice(&clock.realtime.to_le_bytes());
    group.data[24..32].copy_from_slice(&clock.host_tsc.to_le_bytes());
    let changed = VmState::decode(&groups::encode(&list)).unwrap();
    assert_eq!(changed.clock().unwrap(), clock);
    changed
}

/// Whether KVM says where the host's TSC stood when the clock was read.
fn tells_host_tsc(state: &VmState) -> bool {
    state.clock().unwrap().flags & bind::KVM_CLOCK_HOST_TSC != 0
}

#[test]
fn the_clock_goes_by_the_hosts_tsc_whatever_the_time_of_day_says() {
    harness::need!(kvm);
    let kvm = kvm();
    let memory = TestMemory::with_code(COUNT);
    let mut old = machine(&kvm, &memory, Irqchip::Split { pins: 24 });
    run_for(&mut old.vcpu, Duration::from_millis(20));
    let saved = VmState::save(&old.vm).unwrap();
    let by_tsc = old.vm.capabilities().host_tsc_khz.filter(|_| tells_host_tsc(&saved));
    let before = saved.clock().unwrap();
    let hour_ns = 3_600_000_000_000;
    // The host's time of day is set forward by an hour meanwhile, or back.
    for stepped in [before.realtime - hour_ns, before.realtime + hour_ns] {
        let new = machine(&kvm, &memory, Irqchip::Split { pins: 24 });
        with_clock(&saved, |clock| clock.realtime = stepped).load(&new.vm).unwrap();
        let after = VmState::save(&new.vm).unwrap();
        let passed_ns = after.clock().unwrap().clock - before.clock;
        let Some(khz) = by_tsc else {
            // All that there is to go by.
            assert_eq!(passed_ns >= hour_ns, stepped < before.realtime, "{passed_ns} ns");
            continue;
        };
        assert!(tells_host_tsc(&after));
        let ticks = after.clock().unwrap().host_tsc - before.host_tsc;
        let due_ns = u64::try_from(u128::from(ticks) * 1_000_000 / u128::from(khz.get())).unwrap();
        // A machine that is busy may set it late, each time that it tries.
        assert!(due_ns.abs_diff(passed_ns) < 20_000_000, "{passed_ns} ns for {due_ns} ns");
    }
}

/// Of a VM whose vCPUs have not run, KVM tells the host's TSC only when its clock has been set.
#[test]
fn a_host_whose_tsc_went_back_is_refused_by_a_vm_that_has_not_run() {
    harness::need!(kvm);
    let kvm = kvm();
    let memory = TestMemory::with_code(COUNT);
    let mut old = machine(&kvm, &memory, Irqchip::Split { pins: 24 });
    run_for(&mut old.vcpu, Duration::from_millis(20));
    let saved = VmState::save(&old.vm).unwrap();
    let ahead = saved.clock().unwrap().host_tsc + (1 << 60);
    let new = machine(&kvm, &memory, Irqchip::Split { pins: 24 });
    let loaded = with_clock(&saved, |clock| clock.host_tsc = ahead).load(&new.vm);
    if tells_host_tsc(&saved) {
        let Err(VmLoadError::Group { group, source: Fault::HostTscWentBack { saved, .. } }) = loaded else {
            panic!("{loaded:?}");
        };
        assert_eq!((group, saved), (VmGroup::Clock, ahead));
    } else {
        loaded.unwrap();
    }
}

/// The frequency of the TSC in the state that a vCPU has after it was loaded with another one.
fn tsc_khz_after(kvm: &Kvm, change: impl FnOnce(u32) -> u32) -> Result<(u32, u32), LoadError> {
    let memory = TestMemory::with_code(COUNT);
    let old = machine(kvm, &memory, Irqchip::None);
    let khz = |data: &[u8]| u32::from_le_bytes(data.try_into().unwrap());
    let here = old.vcpu.fd().get_tsc_khz().unwrap();
    let bytes = with_group(&save(&old.vcpu), VcpuGroup::TscKhz, |data| {
        *data = change(khz(data)).to_le_bytes().to_vec();
    });
    let state = VcpuState::decode(&bytes).unwrap();
    let mut new = machine(kvm, &memory, Irqchip::None);
    let loader = Loader::prepare(&new.vcpu).unwrap();
    loader.load(&mut new.vcpu, &state)?;
    loader.finish(&mut new.vcpu, &state)?;
    Ok((here, khz(save(&new.vcpu).data(VcpuGroup::TscKhz).unwrap())))
}

#[test]
fn a_tsc_that_the_next_kernel_measures_a_little_otherwise_is_loaded() {
    harness::need!(kvm);
    let kvm = kvm();
    let memory = TestMemory::with_code(COUNT);
    let probe = machine(&kvm, &memory, Irqchip::None);
    if save(&probe.vcpu).data(VcpuGroup::TscKhz).is_none() {
        return;
    }
    let scales = probe.vm.capabilities().tsc_control;
    for (up, down) in [(200, 0), (0, 200)] {
        let little = |khz: u32| khz + khz / 1_000_000 * up - khz / 1_000_000 * down;
        let (here, loaded) = tsc_khz_after(&kvm, little).unwrap();
        assert_eq!(loaded, if scales { little(here) } else { here });
    }
    for other in [|khz: u32| khz / 2, |khz: u32| khz + khz / 1000] {
        match tsc_khz_after(&kvm, other) {
            Ok((here, loaded)) => assert_eq!((loaded, scales), (other(here), true)),
            Err(LoadError::Group { group: VcpuGroup::TscKhz, source: Fault::TscKhz { saved, here } }) => {
                assert_eq!((saved, scales), (other(here), false))
            }
            Err(error) => panic!("{error:?}"),
        }
    }
}

/// P6.5.6.
#[test]
fn irqchip_and_pit_survive_a_change_of_vm() {
    harness::need!(kvm);
    let kvm = kvm();
    let memory = TestMemory::with_code(COUNT);
    let old = machine(&kvm, &memory, Irqchip::Full { pit: true });
    let at_reset = VmState::save(&old.vm).unwrap();
    for chip_id in [bind::KVM_IRQCHIP_PIC_MASTER, bind::KVM_IRQCHIP_PIC_SLAVE, bind::KVM_IRQCHIP_IOAPIC] {
        let mut chip = bind::kvm_irqchip { chip_id, ..Default::default() };
        old.vm.fd().get_irqchip(&mut chip).unwrap();
        if chip_id == bind::KVM_IRQCHIP_IOAPIC {
            // SAFETY: `chip_id` says that KVM filled in an IOAPIC.
            let ioapic = unsafe { &mut chip.chip.ioapic };
            ioapic.id = 3;
            ioapic.redirtbl[5].bits = 0x0300_0000_0001_0045;
        } else {
            // SAFETY: `chip_id` says that KVM filled in a PIC.
            let pic = unsafe { &mut chip.chip.pic };
            pic.imr = 0xa0 + u8::try_from(chip_id).unwrap();
            pic.irq_base = 0x20;
        }
        old.vm.fd().set_irqchip(&chip).unwrap();
    }
    let mut pit = old.vm.fd().get_pit2().unwrap();
    (pit.channels[2].count, pit.channels[2].mode) = (0x1234, 3);
    old.vm.fd().set_pit2(&pit).unwrap();

    let saved = VmState::save(&old.vm).unwrap();
    let new = bare_machine(&kvm, &memory, Irqchip::Full { pit: true });
    VmState::decode(&saved.encode()).unwrap().load(&new.vm).unwrap();
    let again = VmState::save(&new.vm).unwrap();
    for group in [VmGroup::PicMaster, VmGroup::PicSlave, VmGroup::Ioapic] {
        assert_eq!(again.data(group), saved.data(group), "{group}");
        assert_ne!(again.data(group), at_reset.data(group), "{group}");
    }
    // Of the PIT, KVM puts in anew when each count was loaded.
    let channels = |vm: &kvm::Vm| {
        vm.fd()
            .get_pit2()
            .unwrap()
            .channels
            .map(|channel| bind::kvm_pit_channel_state { count_load_time: 0, ..channel })
    };
    assert_eq!(channels(&new.vm), channels(&old.vm));
    assert_eq!(channels(&new.vm)[2].count, 0x1234);
}

#[test]
fn a_vms_state_loads_into_no_vm_with_other_controllers() {
    harness::need!(kvm);
    let kvm = kvm();
    let memory = TestMemory::with_code(COUNT);
    let full = machine(&kvm, &memory, Irqchip::Full { pit: true });
    let without_pit = machine(&kvm, &memory, Irqchip::Full { pit: false });
    let split = machine(&kvm, &memory, Irqchip::Split { pins: 24 });

    let refused = VmState::save(&full.vm).unwrap().load(&without_pit.vm).unwrap_err();
    assert!(matches!(refused, VmLoadError::CannotLoad { group: VmGroup::Pit }), "{refused:?}");
    let refused = VmState::save(&split.vm).unwrap().load(&full.vm).unwrap_err();
    assert!(matches!(refused, VmLoadError::Lacks { group: VmGroup::Ioapic }), "{refused:?}");
    let absent: Vec<_> = VmState::save(&without_pit.vm).unwrap().absent().collect();
    assert_eq!(absent, [VmGroup::Pit]);
}

#[test]
fn a_pending_exception_crosses_with_its_payload() {
    harness::need!(kvm);
    let kvm = kvm();
    let memory = TestMemory::with_code(COUNT);
    let old = machine(&kvm, &memory, Irqchip::None);
    let mut events = old.vcpu.fd().get_vcpu_events().unwrap();
    let page_fault = 14;
    (events.exception.pending, events.exception.nr, events.exception.has_error_code) = (1, page_fault, 1);
    (events.exception_has_payload, events.exception_payload) = (1, 0x0bad_f000);
    events.flags |= bind::KVM_VCPUEVENT_VALID_PAYLOAD;
    let set = old.vcpu.fd().set_vcpu_events(&events);
    if !old.vm.capabilities().exception_payload {
        set.unwrap_err();
        return;
    }
    set.unwrap();

    let new = successor(&kvm, &memory, &old);
    let events = new.vcpu.fd().get_vcpu_events().unwrap();
    assert_eq!((events.exception.pending, events.exception.nr), (1, page_fault));
    assert_eq!((events.exception_has_payload, events.exception_payload), (1, 0x0bad_f000));
    assert_eq!(new.vcpu.fd().get_sregs().unwrap().cr2, 0, "the payload is delivered with the exception");
}

#[test]
fn the_counter_is_where_the_tests_look() {
    assert_eq!(COUNT[3..5], u16::try_from(COUNTER).unwrap().to_le_bytes());
}
