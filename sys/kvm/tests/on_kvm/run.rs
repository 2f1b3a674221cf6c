//! Running, kicking and stopping vCPUs on the real KVM.

use std::ops::ControlFlow;
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use kvm::kvm_ioctls::{Kvm, VcpuExit};
use kvm::{Cpuid, Irqchip, Kicker, Loader, Saver, Stopped, Vcpu, VcpuState};
use tideover_kvm as kvm;

use crate::guest::{
    CODE, COUNT, COUNTER, Machine, Numbers, OUT_EACH_COUNT, OUT_STRINGS, SUM_INS, TestMemory, bare_machine,
    machine,
};

/// Longer than any stop takes on the slowest machine.
const LONG: Duration = Duration::from_secs(20);

fn kvm() -> Kvm {
    Kvm::new().unwrap()
}

/// No exit expected.
fn no_exit(exit: VcpuExit<'_>) -> ControlFlow<()> {
    panic!("the guest was to make no exit: {exit:?}");
}

/// Waits without sleeping, which takes longer than most of these tests want.
fn spin(time: Duration) {
    let start = Instant::now();
    while start.elapsed() < time {
        std::hint::spin_loop();
    }
}

/// Kicks the vCPU of a run on this thread once, after some time.
fn kick_after(time: Duration, kicker: Kicker) -> thread::JoinHandle<()> {
    thread::spawn(move || {
        spin(time);
        kicker.kick().unwrap();
    })
}

/// The state of the machine in a new VM, and the old VM gone.
fn move_on(kvm: &Kvm, memory: &TestMemory, old: Machine, cpuid: &Cpuid) -> Machine {
    let state = Saver::prepare(&old.vcpu).unwrap().save(&old.vcpu).unwrap().encode();
    let mut new = bare_machine(kvm, memory, old.vm.irqchip());
    cpuid.load(&new.vcpu).unwrap();
    let loader = Loader::prepare(&new.vcpu).unwrap();
    let state = VcpuState::decode(&state).unwrap();
    loader.load(&mut new.vcpu, &state).unwrap();
    loader.finish(&mut new.vcpu, &state).unwrap();
    new
}

#[test]
fn a_kick_stops_a_spinning_vcpu_each_of_a_thousand_times() {
    harness::need!(kvm);
    let memory = TestMemory::with_code(COUNT);
    let Machine { mut vcpu, slots: _slots, vm: _vm } = machine(&kvm(), &memory, Irqchip::Split { pins: 24 });
    let kicker = vcpu.kicker();
    let (go, gone) = mpsc::channel::<()>();
    let (stopped, stops) = mpsc::channel();
    let runner = thread::spawn(move || {
        while gone.recv().is_ok() {
            stopped.send(vcpu.run(no_exit)).unwrap();
        }
    });
    let mut numbers = Numbers(42);
    for round in 0..1000 {
        // Half of them before the thread can be in the run, in some order with its getting there.
        let delay = if round % 2 == 0 { 0 } else { numbers.below(300) };
        go.send(()).unwrap();
        spin(Duration::from_micros(delay));
        kicker.kick().unwrap();
        let stop = stops.recv_timeout(LONG).unwrap_or_else(|_| panic!("kick {round} did not stop the vCPU"));
        assert_eq!(stop.unwrap(), Stopped::Kicked, "kick {round}");
    }
    assert_ne!(memory.counter(), 0);
    drop(go);
    runner.join().unwrap();
}

#[test]
fn many_kickers_at_once_stop_every_run() {
    harness::need!(kvm);
    let memory = TestMemory::with_code(COUNT);
    let mut machine = machine(&kvm(), &memory, Irqchip::None);
    for _ in 0..50 {
        let kickers: Vec<_> =
            (0..4).map(|n| kick_after(Duration::from_micros(n * 20), machine.vcpu.kicker())).collect();
        assert_eq!(machine.vcpu.run(no_exit).unwrap(), Stopped::Kicked);
        for kicker in kickers {
            kicker.join().unwrap();
        }
        // One of them may have come after that run.
        machine.vcpu.kicker().kick().unwrap();
        assert_eq!(machine.vcpu.run(no_exit).unwrap(), Stopped::Kicked);
    }
}

#[test]
fn a_kick_before_the_run_ends_it_before_the_guest_starts() {
    harness::need!(kvm);
    let memory = TestMemory::with_code(COUNT);
    let mut machine = machine(&kvm(), &memory, Irqchip::None);
    machine.vcpu.kicker().kick().unwrap();
    assert_eq!(machine.vcpu.run(no_exit).unwrap(), Stopped::Kicked);
    assert_eq!(memory.counter(), 0);
}

#[test]
fn a_kick_ends_one_run_only() {
    harness::need!(kvm);
    let memory = TestMemory::with_code(COUNT);
    let mut machine = machine(&kvm(), &memory, Irqchip::None);
    machine.vcpu.kicker().kick().unwrap();
    machine.vcpu.kicker().kick().unwrap();
    assert_eq!(machine.vcpu.run(no_exit).unwrap(), Stopped::Kicked);
    let kick = kick_after(Duration::from_millis(20), machine.vcpu.kicker());
    assert_eq!(machine.vcpu.run(no_exit).unwrap(), Stopped::Kicked);
    kick.join().unwrap();
    assert_ne!(memory.counter(), 0, "the second run ran the guest");
}

#[test]
fn a_kick_stops_a_halted_vcpu() {
    harness::need!(kvm);
    let memory = TestMemory::with_code(&[0xf4]);
    let mut machine = machine(&kvm(), &memory, Irqchip::Split { pins: 24 });
    let kick = kick_after(Duration::from_millis(20), machine.vcpu.kicker());
    assert_eq!(machine.vcpu.run(no_exit).unwrap(), Stopped::Kicked);
    kick.join().unwrap();
}

#[test]
fn a_kicker_of_a_vcpu_that_is_gone_asks_nothing() {
    harness::need!(kvm);
    let memory = TestMemory::with_code(COUNT);
    let machine = machine(&kvm(), &memory, Irqchip::None);
    let kicker = machine.vcpu.kicker();
    drop(machine);
    kicker.kick().unwrap();
}

#[test]
fn a_signal_without_a_kick_does_not_end_the_run() {
    harness::need!(kvm);
    let memory = TestMemory::with_code(COUNT);
    let mut machine = machine(&kvm(), &memory, Irqchip::None);
    let kicker = machine.vcpu.kicker();
    // SAFETY: no conditions.
    let runner = unsafe { libc::pthread_self() };
    let watched = memory.clone();
    let signals = thread::spawn(move || {
        for _ in 0..20 {
            thread::sleep(Duration::from_millis(1));
            // SAFETY: the thread joins this one before it ends.
            assert_eq!(unsafe { libc::pthread_kill(runner, kvm::kick_signal()) }, 0);
        }
        let counted = watched.counter();
        thread::sleep(Duration::from_millis(20));
        let ran_on = watched.counter() > counted;
        kicker.kick().unwrap();
        ran_on
    });
    assert_eq!(machine.vcpu.run(no_exit).unwrap(), Stopped::Kicked);
    assert!(signals.join().unwrap());
}

#[test]
fn a_thread_that_blocks_the_signal_is_kicked_too() {
    harness::need!(kvm);
    let memory = TestMemory::with_code(COUNT);
    let mut machine = machine(&kvm(), &memory, Irqchip::None);
    // SAFETY: `set` is a set that the calls fill in, and the mask is this thread's own.
    unsafe {
        let mut set = std::mem::zeroed();
        libc::sigfillset(&raw mut set);
        assert_eq!(libc::pthread_sigmask(libc::SIG_BLOCK, &raw const set, std::ptr::null_mut()), 0);
    }
    let kick = kick_after(Duration::from_millis(20), machine.vcpu.kicker());
    assert_eq!(machine.vcpu.run(no_exit).unwrap(), Stopped::Kicked);
    kick.join().unwrap();
}

/// The dword of an OUT to port 0x10.
fn out_dword(exit: VcpuExit<'_>) -> u32 {
    match exit {
        VcpuExit::IoOut(0x10, data) => u32::from_le_bytes(data.try_into().unwrap()),
        exit => panic!("not the OUT that was expected: {exit:?}"),
    }
}

#[test]
fn an_out_at_a_kick_is_neither_lost_nor_doubled() {
    harness::need!(kvm);
    let kvm = kvm();
    let memory = TestMemory::with_code(OUT_EACH_COUNT);
    let mut machine = machine(&kvm, &memory, Irqchip::None);
    let cpuid = Cpuid::of(&machine.vcpu).unwrap();
    let (mut numbers, mut seen) = (Numbers(7), 0);
    for round in 0..200 {
        let kick = kick_after(Duration::from_micros(numbers.below(500)), machine.vcpu.kicker());
        let stopped = machine.vcpu.run(|exit| -> ControlFlow<()> {
            assert_eq!(out_dword(exit), seen + 1, "round {round}");
            seen += 1;
            ControlFlow::Continue(())
        });
        assert_eq!(stopped.unwrap(), Stopped::Kicked);
        kick.join().unwrap();
        // What was counted is out, but for the one between the two instructions.
        let counted = memory.counter();
        assert!(counted == seen || counted == seen + 1, "round {round}: {seen} of {counted} are out");
        machine = move_on(&kvm, &memory, machine, &cpuid);
    }
    assert!(seen > 200, "only {seen} OUTs in 200 rounds");
}

#[test]
fn an_out_that_ends_the_run_is_complete_when_the_state_is_saved() {
    harness::need!(kvm);
    let kvm = kvm();
    let memory = TestMemory::with_code(OUT_EACH_COUNT);
    let mut machine = machine(&kvm, &memory, Irqchip::Split { pins: 24 });
    let cpuid = Cpuid::of(&machine.vcpu).unwrap();
    for expected in 1..100 {
        let stopped = machine.vcpu.run(|exit| ControlFlow::Break(out_dword(exit)));
        assert_eq!(stopped.unwrap(), Stopped::Broke(expected));
        let behind_the_out = CODE + 12;
        assert_eq!(machine.vcpu.fd().get_regs().unwrap().rip, u64::try_from(behind_the_out).unwrap());
        machine = move_on(&kvm, &memory, machine, &cpuid);
    }
}

#[test]
fn an_in_that_ends_the_run_is_complete_when_the_state_is_saved() {
    harness::need!(kvm);
    let kvm = kvm();
    let memory = TestMemory::with_code(SUM_INS);
    let mut machine = machine(&kvm, &memory, Irqchip::Split { pins: 24 });
    let cpuid = Cpuid::of(&machine.vcpu).unwrap();
    for given in 1..100_u32 {
        let stopped = machine.vcpu.run(|exit| {
            let VcpuExit::IoIn(0x11, data) = exit else { panic!("not the IN that was expected: {exit:?}") };
            data.copy_from_slice(&given.to_le_bytes());
            ControlFlow::Break(())
        });
        assert_eq!(stopped.unwrap(), Stopped::Broke(()));
        assert_eq!(machine.vcpu.fd().get_regs().unwrap().rax, u64::from(given));
        assert_eq!(memory.dword(COUNTER + 4), given - 1, "the guest went no further than the IN");
        machine = move_on(&kvm, &memory, machine, &cpuid);
    }
}

#[test]
fn a_kick_while_the_run_ends_by_itself_ends_the_next_one() {
    harness::need!(kvm);
    let memory = TestMemory::with_code(OUT_EACH_COUNT);
    let mut machine = machine(&kvm(), &memory, Irqchip::None);
    let kicker = machine.vcpu.kicker();
    let stopped = machine.vcpu.run(|exit| {
        kicker.kick().unwrap();
        ControlFlow::Break(out_dword(exit))
    });
    assert_eq!(stopped.unwrap(), Stopped::Broke(1));
    let next = machine.vcpu.run(|_| ControlFlow::Break(()));
    assert_eq!(next.unwrap(), Stopped::Kicked);
    assert_eq!(memory.counter(), 1, "the guest went no further");
}

#[test]
fn an_in_at_a_kick_is_neither_lost_nor_doubled() {
    harness::need!(kvm);
    let kvm = kvm();
    let memory = TestMemory::with_code(SUM_INS);
    let mut machine = machine(&kvm, &memory, Irqchip::None);
    let cpuid = Cpuid::of(&machine.vcpu).unwrap();
    let (mut numbers, mut given) = (Numbers(9), 0_u32);
    for round in 0..200 {
        let kick = kick_after(Duration::from_micros(numbers.below(500)), machine.vcpu.kicker());
        let stopped = machine.vcpu.run(|exit| -> ControlFlow<()> {
            let VcpuExit::IoIn(0x11, data) = exit else { panic!("not the IN that was expected: {exit:?}") };
            // All earlier ones are summed up and counted.
            assert_eq!(memory.dword(COUNTER + 4), given, "round {round}");
            assert_eq!(memory.counter(), (1..=given).fold(0, u32::wrapping_add), "round {round}");
            given += 1;
            data.copy_from_slice(&given.to_le_bytes());
            ControlFlow::Continue(())
        });
        assert_eq!(stopped.unwrap(), Stopped::Kicked);
        kick.join().unwrap();
        machine = move_on(&kvm, &memory, machine, &cpuid);
    }
    assert!(given > 200, "only {given} INs in 200 rounds");
}

#[test]
fn a_repeated_out_goes_on_where_it_was_kicked() {
    harness::need!(kvm);
    let kvm = kvm();
    let memory = TestMemory::with_code(OUT_STRINGS);
    let string: Vec<u8> = (0..64).collect();
    memory.write(0x3000, &string);
    let mut machine = machine(&kvm, &memory, Irqchip::None);
    let cpuid = Cpuid::of(&machine.vcpu).unwrap();
    let (mut numbers, mut seen) = (Numbers(11), 0_usize);
    for round in 0..200 {
        let kick = kick_after(Duration::from_micros(numbers.below(500)), machine.vcpu.kicker());
        let break_at = (round % 2 == 0).then(|| seen + usize::try_from(numbers.below(70)).unwrap());
        let stopped = machine.vcpu.run(|exit| {
            let VcpuExit::IoOut(0x12, bytes) = exit else { panic!("not the OUT expected: {exit:?}") };
            for &byte in bytes {
                assert_eq!(usize::from(byte), seen % string.len(), "round {round}, byte {seen}");
                seen += 1;
            }
            match break_at {
                Some(place) if seen >= place => ControlFlow::Break(()),
                _ => ControlFlow::Continue(()),
            }
        });
        stopped.unwrap();
        kick.join().unwrap();
        machine = move_on(&kvm, &memory, machine, &cpuid);
    }
    assert!(seen > 200, "only {seen} bytes in 200 rounds");
}

#[test]
fn a_vcpu_moves_between_threads() {
    harness::need!(kvm);
    let memory = TestMemory::with_code(COUNT);
    let Machine { mut vcpu, slots: _slots, vm: _vm } = machine(&kvm(), &memory, Irqchip::None);
    for _ in 0..3 {
        let counted = memory.counter();
        let kick = kick_after(Duration::from_millis(5), vcpu.kicker());
        let run = move |mut vcpu: Vcpu| {
            assert_eq!(vcpu.run(no_exit).unwrap(), Stopped::Kicked);
            vcpu
        };
        vcpu = thread::spawn(move || run(vcpu)).join().unwrap();
        kick.join().unwrap();
        assert!(memory.counter() > counted);
    }
}
